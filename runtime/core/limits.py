"""Limits on every target: workspace, speed and acceleration; non-finite values are refused.

`SafetyFilter` limits each tick's *step*, so it needs no model of the arm. Braking is planned
for: a step is taken only if the arm could still stop before the wall of the box by braking
within its acceleration limit, which is why position, speed and acceleration limits hold all
at once. Plain floats throughout: a tick has 300 µs for everything.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import hypot, isfinite, sqrt

import numpy as np

from openhelix.runtime.core.quaternion import (
    Quat,
    QuaternionError,
    Vec3,
    from_rotation_vector,
    multiply,
    normalise,
    rotation_vector,
)
from openhelix.runtime.core.types import F64, Action


@dataclass(frozen=True, slots=True)
class SafetyLimits:
    """Limits in W, for a Panda at CALVIN's table unless said otherwise.

    CALVIN's largest relative action is 0.02 m and 0.05 rad per axis and 1/30 s step, that is
    0.6 m/s and 1.5 rad/s per axis; the speed limits are that along a diagonal, so that no legal
    CALVIN action is cut. The accelerations are the Cartesian limits of Franka's control
    interface (13 m/s², 25 rad/s²).
    """

    box_min_m: Vec3 = (-0.60, -0.70, 0.26)
    box_max_m: Vec3 = (0.60, 0.40, 0.95)
    max_linear_speed_m_s: float = 1.04
    max_angular_speed_rad_s: float = 2.6
    max_linear_acceleration_m_s2: float = 13.0
    max_angular_acceleration_rad_s2: float = 25.0
    max_tick_s: float = 0.1  # a longer tick (a stall) allows no longer step than this one
    camera_max_age_s: float = 1.0
    proprioception_max_age_s: float = 0.25
    latent_max_age_s: float = 4.0  # older: System 2 counts as silent
    latent_grace_s: float = 5.0  # how long to go on with the last latent after that
    frozen_motion_m: float = 0.03  # an image unchanged over this much motion is frozen

    def __post_init__(self) -> None:
        for axis, low, high in zip("xyz", self.box_min_m, self.box_max_m, strict=True):
            if not (isfinite(low) and isfinite(high) and low < high):
                raise ValueError(f"safety.box: {axis} runs from {low} to {high} m, which is empty")
        for name in _POSITIVE:
            value = getattr(self, name)
            if not (isfinite(value) and value > 0.0):
                raise ValueError(f"safety.{name}: {value} is not a positive number")
        if not self.latent_grace_s >= 0.0:
            raise ValueError(f"safety.latent_grace_s: {self.latent_grace_s} is negative")


_POSITIVE = (
    "max_linear_speed_m_s",
    "max_angular_speed_rad_s",
    "max_linear_acceleration_m_s2",
    "max_angular_acceleration_rad_s2",
    "max_tick_s",
    "camera_max_age_s",
    "proprioception_max_age_s",
    "latent_max_age_s",
    "frozen_motion_m",
)


class SafetyFilter:
    """Bends targets into the limits, one tick at a time.

    Call `limit` at every tick, with holds too, so that the filter knows how the arm moves;
    call `rest` when the arm has been stopped or moved by something else.
    """

    def __init__(self, limits: SafetyLimits | None = None) -> None:
        self.limits = limits or SafetyLimits()
        low, high = self.limits.box_min_m, self.limits.box_max_m
        # A micrometre of grace, for a reference that went through float32.
        self._walls = (*(v - 1e-6 for v in low), *(v + 1e-6 for v in high))
        self._previous: tuple[Vec3, Quat] | None = None  # the reference of the tick before
        self._previous_dt_s = 0.0

    def rest(self) -> None:
        """Forget the motion so far: the next step starts from standstill."""
        self._previous = None

    def rehearse(self, action: Action, dt_s: float) -> None:
        """Go through `limit` with an action sent before, and forget it."""
        before = self._previous, self._previous_dt_s
        try:
            self.limit(action, action, dt_s)
        finally:
            self._previous, self._previous_dt_s = before

    def limit(self, action: Action, reference: Action | F64, dt_s: float) -> Action:
        """Return the target to send: `action` bent into the limits.

        The result is never further along than `action` asked for, except where the
        acceleration limit forbids stopping sooner. A target that is not finite, or whose
        quaternion is no rotation, becomes a hold at `reference`. A reference outside the box
        (an arm that starts there) is led back at the speed limit and never further out.

        Args:
            action: the wanted target.
            reference: the last action sent (preferred) or the measured TCP pose (7,) in W.
            dt_s: seconds since the tick that `reference` belongs to.

        Returns:
            A new action. Its `info` says what was cut and by how much: `box` (m), `speed`
            (m/s), `angular_speed` (rad/s), `acceleration` (m/s²), `angular_acceleration`
            (rad/s²), `gripper` (openness), `not_finite` (1).

        Raises:
            ValueError: the reference is not finite or `dt_s` is not a positive time; there is
                nothing safe to send then, so the caller must stop the robot.
        """
        if not (isfinite(dt_s) and dt_s > 0.0):
            raise ValueError(f"dt_s: {dt_s} is not a positive time")
        dt_s = min(dt_s, self.limits.max_tick_s)
        here = _pose(reference.pose if isinstance(reference, Action) else reference)
        if here is None:
            raise ValueError("reference: the pose is not finite, so there is nothing to hold")
        info: dict[str, float] = dict(action.info)
        target = _pose(action.pose)
        gripper = float(action.gripper)
        if target is None or not isfinite(gripper):
            info["not_finite"] = 1.0
            target = target or here
            if not isfinite(gripper):
                gripper = reference.gripper if isinstance(reference, Action) else 1.0
            else:
                target = here
        open_ = min(1.0, max(0.0, gripper))
        if open_ != gripper:
            info["gripper"] = abs(open_ - gripper)
        velocity, omega = self._motion(here)
        position = self._position(here[0], target[0], velocity, dt_s, info)
        rotation = self._rotation(here[1], target[1], omega, dt_s, info)
        self._previous, self._previous_dt_s = here, dt_s
        return Action(
            np.array((*position, *rotation)),
            open_,
            action.instruction_id,
            info=info,
            t_ns=action.t_ns,
        )

    def _motion(self, here: tuple[Vec3, Quat]) -> tuple[Vec3, Vec3]:
        """Return the velocity (m/s) and angular velocity (rad/s) over the tick before."""
        if self._previous is None:
            return (0.0, 0.0, 0.0), (0.0, 0.0, 0.0)
        p, q = self._previous
        rate = 1.0 / self._previous_dt_s
        velocity = _scaled(_minus(here[0], p), rate)
        omega = _scaled(rotation_vector(q, here[1]), rate)
        # A measured reference is noisy and an arm may be pushed: never believe more than the
        # limit, or the "motion so far" would itself allow a motion beyond it.
        return (
            _capped(velocity, self.limits.max_linear_speed_m_s),
            _capped(omega, self.limits.max_angular_speed_rad_s),
        )

    def _position(
        self, here: Vec3, target: Vec3, velocity: Vec3, dt_s: float, info: dict[str, float]
    ) -> Vec3:
        limits = self.limits
        inside = self._clamp(target)
        if inside != target:
            info["box"] = hypot(*_minus(target, inside))
        wanted = _scaled(_minus(inside, here), 1.0 / dt_s)
        most = limits.max_linear_acceleration_m_s2 * dt_s
        step = _paced(
            wanted, velocity, limits.max_linear_speed_m_s, most, dt_s, info, "speed", "acceleration"
        )
        within = self._contains(here)
        if not within:
            # Outside already: straight back in is the only motion that is never worse.
            step = _capped(wanted, limits.max_linear_speed_m_s)
        elif not self._can_stop(here, step, dt_s):
            braked = self._braked(here, step, velocity, most, dt_s)
            info["box"] = info.get("box", 0.0) + hypot(*_minus(step, braked)) * dt_s
            step = braked
        moved = (here[0] + step[0] * dt_s, here[1] + step[1] * dt_s, here[2] + step[2] * dt_s)
        # Rounding may put the last bit over the wall.
        return self._clamp(moved) if within else moved

    def _rotation(
        self, here: Quat, target: Quat, omega: Vec3, dt_s: float, info: dict[str, float]
    ) -> Quat:
        limits = self.limits
        wanted = _scaled(rotation_vector(here, target), 1.0 / dt_s)
        most = limits.max_angular_acceleration_rad_s2 * dt_s
        step = _paced(
            wanted,
            omega,
            limits.max_angular_speed_rad_s,
            most,
            dt_s,
            info,
            "angular_speed",
            "angular_acceleration",
        )
        return normalise(multiply(from_rotation_vector(_scaled(step, dt_s)), here))

    def _clamp(self, p: Vec3) -> Vec3:
        low, high = self.limits.box_min_m, self.limits.box_max_m
        return (
            min(max(p[0], low[0]), high[0]),
            min(max(p[1], low[1]), high[1]),
            min(max(p[2], low[2]), high[2]),
        )

    def _contains(self, p: Vec3) -> bool:
        x0, y0, z0, x1, y1, z1 = self._walls
        return x0 <= p[0] <= x1 and y0 <= p[1] <= y1 and z0 <= p[2] <= z1

    def _can_stop(self, here: Vec3, velocity: Vec3, dt_s: float) -> bool:
        """Whether the arm stays in the box if it takes this step and then brakes."""
        speed = hypot(*velocity)
        reach = dt_s + 0.5 * speed / self.limits.max_linear_acceleration_m_s2
        end = (
            here[0] + velocity[0] * reach,
            here[1] + velocity[1] * reach,
            here[2] + velocity[2] * reach,
        )
        return self._contains(end)

    def _braked(self, here: Vec3, step: Vec3, velocity: Vec3, most: float, dt_s: float) -> Vec3:
        """Return the step nearest to `step`, on the way to braking, that can still stop.

        Braking keeps the promise of the tick before (it stops where that one would have), and
        whatever lies between braking and `step` keeps speed and acceleration limits because
        both are balls.
        """
        speed = hypot(*velocity)
        brake = _scaled(velocity, max(0.0, speed - most) / speed) if speed > 0.0 else velocity
        safe, bad = 0.0, 1.0
        for _ in range(12):
            middle = 0.5 * (safe + bad)
            if self._can_stop(here, _between(brake, step, middle), dt_s):
                safe = middle
            else:
                bad = middle
        return _between(brake, step, safe)


def _paced(
    wanted: Vec3,
    velocity: Vec3,
    fastest: float,
    most: float,
    dt_s: float,
    info: dict[str, float],
    speed_name: str,
    acceleration_name: str,
) -> Vec3:
    """Return `wanted` within the speed limit and within `most` of the velocity so far."""
    capped = _capped(wanted, fastest)
    excess = hypot(*_minus(wanted, capped))
    if excess > 1e-9:
        info[speed_name] = excess
    change = _minus(capped, velocity)
    size = hypot(*change)
    if size <= most:
        return capped
    info[acceleration_name] = (size - most) / dt_s
    return _between(velocity, capped, most / size)


def _pose(pose: object) -> tuple[Vec3, Quat] | None:
    """Return a pose (7,) as position and unit quaternion; None when it is not one."""
    values = np.asarray(pose, dtype=np.float64)
    if values.shape != (7,):
        return None
    x, y, z, *q = values.tolist()
    # Beyond a kilometre a number is a fault; keeping it out keeps the arithmetic finite.
    if not (abs(x) < 1e3 and abs(y) < 1e3 and abs(z) < 1e3):
        return None
    try:
        return (x, y, z), normalise(q)
    except QuaternionError:
        return None


def _minus(a: Vec3, b: Vec3) -> Vec3:
    return (a[0] - b[0], a[1] - b[1], a[2] - b[2])


def _scaled(a: Vec3, k: float) -> Vec3:
    return (a[0] * k, a[1] * k, a[2] * k)


def _between(a: Vec3, b: Vec3, weight: float) -> Vec3:
    u = 1.0 - weight
    return (u * a[0] + weight * b[0], u * a[1] + weight * b[1], u * a[2] + weight * b[2])


def _capped(a: Vec3, longest: float) -> Vec3:
    size = sqrt(a[0] * a[0] + a[1] * a[1] + a[2] * a[2])
    return a if size <= longest else _scaled(a, longest / size)
