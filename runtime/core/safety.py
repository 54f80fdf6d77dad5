"""What keeps the arm safe: limits on every target, and the age of every source.

`SafetyFilter` limits each tick's *step*, so it needs no model of the arm: workspace, speed and
acceleration; non-finite values are refused. Braking is planned for: a step is taken only if the
arm could still stop before the wall of the box by braking within its acceleration limit, which
is why position, speed and acceleration limits hold all at once. Plain floats throughout: a tick
has 300 µs for everything.

`Watchdog` tracks the age of every source that control relies on, and `SafetyState` decides between
run, hold and stop. Ages count from capture, never from arrival: a frozen source keeps arriving.

All three are pure (times and records in, verdicts out) and belong to the control loop's thread.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import hypot, isfinite, sqrt
from typing import NamedTuple

import numpy as np

from openhelix.runtime.core.config import SafetyLimits
from openhelix.runtime.core.interfaces import F64, U8, Action, CameraFrame
from openhelix.runtime.core.quaternion import (
    Quat,
    QuaternionError,
    Vec3,
    from_rotation_vector,
    multiply,
    normalise,
    rotation_vector,
)

# ------------------------------------------------------------------------------------------------
# Limits


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


# ------------------------------------------------------------------------------------------------
# Ages, and what they make the loop do


@dataclass(frozen=True, slots=True)
class SafeStop:
    """Why the arm must stop.

    `reason` is one of a few words (a metric's label); the sentence is `str(stop)`.
    """

    reason: str  # camera_stale, latent_silent, latent_mismatch, ...
    source: str  # what it is about: a camera's name, "proprioception", "latent", ...
    age_s: float  # how old the newest of it is; 0 where age has no meaning
    latched: bool = True  # False: work resumes by itself when the cause is gone

    def __str__(self) -> str:
        text = self.reason.replace("_", " ")
        age = f", {self.age_s:.2f} s old" if self.age_s > 0 else ""
        return f"{text} ({self.source}{age})"


class _Picture(NamedTuple):
    sample: bytes  # of its pixels: a few rows, which tell live images apart nearly always
    rgb: U8
    tcp: Vec3  # where the arm was when it was first seen


class _Camera:
    """The last different pictures of a camera, and whether those that come now are among them.

    A live camera never gives the same pixels twice while the arm moves. A frozen one gives the
    last picture again, one with a stuck buffer a few in turn.
    """

    PICTURES = 8

    def __init__(self) -> None:
        self.frame_t_ns = -1
        self.refused_t_ns: int | None = None  # of the newest frame that is not believed
        self.shape: tuple[int, ...] = ()  # of all its frames, as the first one's
        self._pictures: deque[_Picture] = deque(maxlen=self.PICTURES)
        self.repeats = 0  # frames in a row whose picture had been seen before
        self.moved_m = 0.0  # the farthest that the arm has meanwhile been from where it was then

    def see(self, rgb: U8, tcp: Vec3) -> None:
        sample = rgb[len(rgb) // 4 :: max(1, len(rgb) // 4)].tobytes()
        for picture in self._pictures:
            if picture.sample == sample and (
                picture.rgb is rgb or np.array_equal(picture.rgb, rgb)
            ):
                self.repeats += 1
                self.moved_m = max(self.moved_m, hypot(*_minus(tcp, picture.tcp)))
                return
        self.repeats, self.moved_m = 0, 0.0
        self._pictures.append(_Picture(sample, rgb, tcp))


STILL = ("tactile",)  # cameras that show the same for as long as nothing is touched


class Watchdog:
    """Knows how old each source's newest datum is, by capture time, and what is too old.

    A source that never delivered ages from `arm`. A datum stamped in the future is not
    believed: it would look fresh for ever.

    Args:
        limits: the maximum ages.
        cameras: names of the cameras that must be alive.
        use_latent: whether System 2's silence matters.
    """

    FUTURE_S = 0.25  # a simulated state is stamped with the time it is meant for

    def __init__(
        self, limits: SafetyLimits, cameras: tuple[str, ...] = (), use_latent: bool = True
    ) -> None:
        self.limits = limits
        self._max_age_s: dict[str, float] = {
            f"camera:{name}": limits.camera_max_age_s for name in cameras
        }
        self._max_age_s["proprioception"] = limits.proprioception_max_age_s
        if use_latent:
            self._max_age_s["latent"] = limits.latent_max_age_s
        grace_s = {"latent": limits.latent_grace_s}
        self._stop_after_ns = [
            (name, round((age_s + grace_s.get(name, 0.0)) * 1e9))
            for name, age_s in self._max_age_s.items()
        ]
        self._newest_ns: dict[str, int] = {}
        self._cameras = {name: _Camera() for name in cameras}
        self.future_refused = 0
        self.misshapen = 0  # frames of another size than their camera's first
        self._ordered: SafeStop | None = None
        self._mismatch: SafeStop | None = None

    @property
    def cameras(self) -> tuple[str, ...]:
        """The cameras that are watched; nobody need look at the others' frames."""
        return tuple(self._cameras)

    def arm(self, now_ns: int) -> None:
        """Start anew: every source counts as seen now, no camera as frozen."""
        self._newest_ns = dict.fromkeys(self._max_age_s, now_ns)
        self._cameras = {name: _Camera() for name in self._cameras}

    def expect_latent(self, now_ns: int) -> None:
        """A new instruction has begun: its first latent is due from now on."""
        if "latent" in self._max_age_s:
            self._newest_ns["latent"] = now_ns

    def saw(self, source: str, t_ns: int, now_ns: int) -> bool:
        """Note a datum of `source` ("proprioception", "latent") captured at `t_ns`.

        Returns:
            Whether it is believed. One that is not must not be used either: whoever waits for
            the next one would wait until the time that it is stamped with.
        """
        if source not in self._max_age_s:
            return True
        if t_ns - now_ns > self.FUTURE_S * 1e9:
            self.future_refused += 1
            return False
        self._newest_ns[source] = max(t_ns, self._newest_ns.get(source, t_ns))
        return True

    def saw_frame(self, name: str, frame: CameraFrame, tcp_pose: F64, now_ns: int) -> bool:
        """Note a camera's frame and where the arm was; compares pixels if it is a new one.

        Returns:
            Whether it is believed, as of `saw`, and of its camera's size.
        """
        camera = self._cameras.get(name)
        if camera is None or frame.t_ns == camera.frame_t_ns:
            return True
        if frame.t_ns == camera.refused_t_ns:
            return False  # and counted
        camera.shape = camera.shape or frame.rgb.shape
        if frame.rgb.shape != camera.shape:
            self.misshapen += 1  # not this camera's: it is silent
            camera.refused_t_ns = frame.t_ns
            return False
        if not self.saw(f"camera:{name}", frame.t_ns, now_ns):
            camera.refused_t_ns = frame.t_ns
            return False
        camera.frame_t_ns = frame.t_ns
        x, y, z = tcp_pose[:3].tolist()
        camera.see(frame.rgb, (x, y, z))
        return True

    def ages_s(self, now_ns: int) -> Mapping[str, float]:
        """Return the age of each source's newest datum, in seconds."""
        return {
            name: max(0.0, (now_ns - self._newest_ns.get(name, now_ns)) * 1e-9)
            for name in self._max_age_s
        }

    def stop_after_s(self) -> Mapping[str, float]:
        """Return the age at which each source stops the arm, in seconds."""
        return {name: bound_ns * 1e-9 for name, bound_ns in self._stop_after_ns}

    def order_stop(self, who: str) -> None:
        """A person stops the arm, for good, at the next tick; any thread may call this."""
        self._ordered = SafeStop("operator", who, 0.0)

    def saw_mismatch(self, what: str) -> None:
        """A latent of another model has arrived: nobody knows what it would make the arm do."""
        if self._mismatch is None:
            self._mismatch = SafeStop("latent_mismatch", what, 0.0)

    def check(self, now_ns: int) -> SafeStop | None:
        """Return why the arm must stop now, or None.

        A silent System 2 stops the arm only after the grace time, and not for good: work
        resumes when its latents do. One with other weights stops it at once and for good: a
        person has put them there.
        """
        if self._ordered is not None:
            return self._ordered
        if self._mismatch is not None:
            return self._mismatch
        for name, bound_ns in self._stop_after_ns:
            age_ns = now_ns - self._newest_ns.get(name, now_ns)
            if age_ns > bound_ns:
                if name == "latent":
                    return SafeStop("latent_silent", name, age_ns * 1e-9, latched=False)
                kind, _, source = name.partition(":")
                return SafeStop(f"{kind}_stale", source or kind, age_ns * 1e-9)
        for name, camera in self._cameras.items():
            if name in STILL:
                continue
            if camera.repeats >= 2 and camera.moved_m > self.limits.frozen_motion_m:
                return SafeStop("camera_frozen", name, 0.0)
        return None


class Mode(enum.Enum):
    """What the loop does: follow the plan, hold still for a while, or stand stopped."""

    RUN = "run"
    HOLD = "hold"
    STOP = "stop"


@dataclass(slots=True)
class SafetyState:
    """RUN, HOLD or STOP, and the reason.

    RUN <-> HOLD: no plan for now (a chunk ran out, the first latent is due). Recovers by itself.
    any -> STOP: a `SafeStop`. A latched one stays until `reset`; another ends with its cause.
    """

    mode: Mode = Mode.RUN
    stop: SafeStop | None = None
    hold_reason: str = ""
    stops: dict[str, int] = field(default_factory=dict)  # by reason, since it was made
    holds: dict[str, int] = field(default_factory=dict)

    def update(self, stop: SafeStop | None, hold_reason: str = "") -> Mode:
        """Take this tick's findings; return what to do.

        Args:
            stop: the watchdog's finding, or None.
            hold_reason: a word for why there is nothing to execute, or "".
        """
        if self.mode is Mode.STOP and self.stop is not None and self.stop.latched:
            return self.mode
        if stop is not None:
            if self.stop is None or self.stop.reason != stop.reason:
                self.stops[stop.reason] = self.stops.get(stop.reason, 0) + 1
            self.mode, self.stop, self.hold_reason = Mode.STOP, stop, ""
            return self.mode
        self.stop = None
        if hold_reason and hold_reason != self.hold_reason:
            self.holds[hold_reason] = self.holds.get(hold_reason, 0) + 1
        self.hold_reason = hold_reason
        self.mode = Mode.HOLD if hold_reason else Mode.RUN
        return self.mode

    def trip(self, reason: str, source: str, age_s: float = 0.0) -> Mode:
        """Stop for good for something that no watchdog sees: an operator, a driver's error."""
        return self.update(SafeStop(reason, source, age_s))

    def reset(self) -> None:
        """End a stop, latched or not; counts remain."""
        self.mode, self.stop, self.hold_reason = Mode.RUN, None, ""

    @property
    def reason(self) -> str:
        """One line for a person: why the arm does not run; "" when it runs."""
        if self.stop is not None:
            return str(self.stop)
        return self.hold_reason.replace("_", " ")
