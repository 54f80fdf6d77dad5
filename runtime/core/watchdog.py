"""Tracks the age of every source that control relies on, and decides between run, hold and stop.

Both classes are pure (times and records in, verdicts out) and belong to the control loop's
thread. Ages count from capture, never from arrival: a frozen source keeps arriving.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import hypot

import numpy as np

from openhelix.runtime.core.limits import SafetyLimits
from openhelix.runtime.core.quaternion import Vec3
from openhelix.runtime.core.types import F64, U8, CameraFrame


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


@dataclass(slots=True)
class _Camera:
    frame_t_ns: int = -1
    rgb: U8 | None = None
    sample: bytes = b""  # of its pixels
    repeats: int = 0  # newer frames with the very same pixels
    tcp: Vec3 = (0.0, 0.0, 0.0)  # where the arm was when the pixels last changed
    moved_m: float = 0.0  # the farthest it has been from there since


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

    def saw(self, source: str, t_ns: int, now_ns: int) -> None:
        """Note a datum of `source` ("proprioception", "latent") captured at `t_ns`."""
        if source not in self._max_age_s:
            return
        if t_ns - now_ns > self.FUTURE_S * 1e9:
            self.future_refused += 1
            return
        self._newest_ns[source] = max(t_ns, self._newest_ns.get(source, t_ns))

    def saw_frame(self, name: str, frame: CameraFrame, tcp_pose: F64, now_ns: int) -> None:
        """Note a camera's frame and where the arm was; compares pixels if it is a new one."""
        camera = self._cameras.get(name)
        if camera is None or frame.t_ns == camera.frame_t_ns:
            return
        self.saw(f"camera:{name}", frame.t_ns, now_ns)
        camera.frame_t_ns = frame.t_ns
        x, y, z = tcp_pose[:3].tolist()
        sample = frame.rgb[len(frame.rgb) // 4 :: max(1, len(frame.rgb) // 4)].tobytes()
        # A few rows tell live images apart nearly always; only where they agree, compare all.
        if sample == camera.sample and _same_pixels(camera.rgb, frame.rgb):
            camera.repeats += 1
            camera.moved_m = max(
                camera.moved_m, hypot(x - camera.tcp[0], y - camera.tcp[1], z - camera.tcp[2])
            )
        else:
            camera.repeats, camera.moved_m, camera.tcp = 0, 0.0, (x, y, z)
        camera.rgb, camera.sample = frame.rgb, sample

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
            if camera.repeats >= 2 and camera.moved_m > self.limits.frozen_motion_m:
                return SafeStop("camera_frozen", name, 0.0)
        return None


def _same_pixels(a: U8 | None, b: U8) -> bool:
    return a is b or (a is not None and bool(np.array_equal(a, b)))


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
