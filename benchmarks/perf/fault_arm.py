"""A fake arm that logs all that it is told, and that breaks in the way it is told to.

`faults.py` runs the whole system on it: what the arm was sent after something broke is the
measure of safety. Each call is a line of the log, written at once, so that nothing is lost with
the process: `NANOSECONDS connect PID`, `... target X Y Z OPENNESS`, `... stop REASON`.
"""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from openhelix.runtime.core.interfaces import (
    F32,
    Action,
    ActionChunk,
    ActionSpec,
    CameraFrame,
    CameraSpec,
    LatentGoal,
    Observation,
    PolicySpec,
)
from openhelix.runtime.robots.base import RobotError
from openhelix.runtime.robots.fake import LATENT, FakeRobot, PointEngine

PERIOD_NS = round(1e9 / 30)
HOUR_NS = 3600 * 10**9
STILL_M = 1e-6  # a target that is nearer than this to the one before moves nothing


class FaultArm(FakeRobot):
    """`FakeRobot` that logs; see the module's text.

    Args:
        log: the file to append to.
        orders: a file that may appear; its words are what breaks from then on, for example
            "alternate static". See `ORDERS`.
        options: of `FakeRobot`.
    """

    ORDERS = (
        *("freeze", "pixels", "alternate"),  # a camera: no new frame, old pixels, two in turn
        *("shape", "future_frame"),  # a camera: frames of another size, or of in an hour
        *("nan", "future", "stale"),  # the state: not a number, of in an hour, always the same
        *("future_once", "future_frame_once"),  # a single state, a single frame
        *("hang", "slow", "fail", "fail_send"),  # calls: 3 s, 0.2 s each, errors
        "none",
    )

    def __init__(self, log: str, orders: str | None = None, **options: Any) -> None:
        super().__init__(**options)
        self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._file = Path(orders) if orders is not None else None
        self._order, self._camera = "none", ""
        self._pictures: list[CameraFrame] = []
        self._seen: Observation | None = None

    def connect(self) -> None:
        super().connect()
        self._write("connect", str(os.getpid()))

    def get_observation(self) -> Observation:
        self._read_order()
        if self._order == "hang":
            self._order = "none"
            time.sleep(3.0)
        if self._order == "slow":
            time.sleep(0.2)
        if self._order == "fail":
            raise RobotError("fault arm: no answer, as ordered")
        seen = super().get_observation()
        if self._order == "nan":
            return replace(seen, tcp_pose=np.full(7, np.nan))
        if self._order in ("future", "future_once"):
            self._over("future_once")
            return replace(seen, t_ns=seen.t_ns + HOUR_NS)
        if self._order == "stale" and self._seen is not None:
            return self._seen
        self._seen = seen
        return seen

    def send_action(self, action: Action) -> Action:
        x, y, z = np.asarray(action.pose)[:3].tolist()
        self._write("target", f"{x:.7f} {y:.7f} {z:.7f} {action.gripper:.4f}")
        if self._order == "fail_send":
            raise RobotError("fault arm: no answer, as ordered")
        sent = super().send_action(action)
        self.sent.clear()  # the log has it
        return sent

    def stop(self, reason: str) -> None:
        self._write("stop", reason)
        super().stop(reason)

    def _frame(self, camera: CameraSpec, t_ns: int) -> CameraFrame:
        frame = super()._frame(camera, t_ns)
        if camera.name != self._camera:
            return frame
        if self._order == "alternate":
            if len(self._pictures) < 2:
                if not self._pictures or self._pictures[-1].t_ns != frame.t_ns:
                    self._pictures.append(frame)
                return frame
            kept = self._pictures[frame.t_ns // 10**6 // 33 % 2]
            return replace(frame, rgb=kept.rgb)
        if self._order == "shape":
            return replace(frame, rgb=frame.rgb[::2, ::2], depth=None)
        if self._order in ("future_frame", "future_frame_once"):
            self._over("future_frame_once")
            return replace(frame, t_ns=frame.t_ns + HOUR_NS)
        return frame

    def _over(self, order: str) -> None:
        if self._order == order:
            self._order = "none"

    def _read_order(self) -> None:
        if self._file is None or not self._file.exists():
            return
        word, _, camera = self._file.read_text().partition(" ")
        self._file.unlink()
        if word not in self.ORDERS:
            raise ValueError(f"order: {word!r}, must be one of {', '.join(self.ORDERS)}")
        self._order, self._camera, self._pictures = word, camera.strip(), []
        for name in tuple(self._frozen):
            self.thaw_camera(name)
        if word in ("freeze", "pixels"):
            self.freeze_camera(self._camera, "stamps" if word == "freeze" else "pixels")

    def _write(self, kind: str, text: str) -> None:
        os.write(self._log, f"{time.monotonic_ns()} {kind} {text}\n".encode())


class PatrolPolicy:
    """A System 1 that never comes to rest: round and round the place that the latent names.

    Args:
        cameras: (name, height, width) of those that it looks through.
        at_signal: what `act` does from a SIGUSR1 on: "raise", or "nan" in the trajectory.
    """

    RADIUS_M = 0.08
    TURN_S = 4.0
    HORIZON = 16

    def __init__(
        self,
        cameras: Sequence[tuple[str, int, int]] = (("static", 64, 64),),
        at_signal: str = "",
    ) -> None:
        specs = tuple(CameraSpec(name, h, w, depth=False) for name, h, w in cameras)
        self.spec = PolicySpec(specs, LATENT, ActionSpec(), self.HORIZON)
        self._at_signal, self._fails = at_signal, ""

    def warm_up(self) -> None:
        """Get ready to fail."""
        if self._at_signal:
            signal.signal(signal.SIGUSR1, lambda *_: setattr(self, "_fails", self._at_signal))

    def reset(self, seed: int | None = None) -> None:
        """There is nothing to forget."""

    def act(self, observation: Observation, latents: Sequence[LatentGoal]) -> ActionChunk:
        """Return the next half second of the way round."""
        if self._fails == "raise":
            raise RuntimeError("the policy fails as configured")
        start_ns = observation.t_ns + PERIOD_NS
        angles = (start_ns + np.arange(self.HORIZON) * PERIOD_NS) * 1e-9 * 2 * np.pi / self.TURN_S
        poses = np.tile(observation.tcp_pose, (self.HORIZON, 1))
        poses[:, :3] = np.asarray(latents[-1].z[0, :3], np.float64)
        poses[:, 0] += self.RADIUS_M * np.cos(angles)
        poses[:, 1] += self.RADIUS_M * np.sin(angles)
        if self._fails == "nan":
            poses[-1, 0] = np.nan
        return ActionChunk(
            t_start_ns=start_ns,
            dt_ns=PERIOD_NS,
            poses=poses,
            gripper=np.ones(self.HORIZON),
            instruction_id=observation.instruction_id,
            latent_seq=latents[-1].seq,
            t_obs_ns=observation.t_ns,
        )


class LeakyEngine(PointEngine):
    """A System 2 that keeps 8 MB of every call, until memory is refused to it."""

    def __init__(self) -> None:
        super().__init__()
        self._kept: list[bytearray] = []

    def encode(self, images: Any, instructions: Any) -> F32:
        self._kept.append(bytearray(8 << 20))
        return super().encode(images, instructions)


# What was told -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Told:
    """One line of the log."""

    t_ns: int
    kind: str
    text: str

    @property
    def position(self) -> tuple[float, ...]:
        """A target's x, y, z in metres."""
        return tuple(float(word) for word in self.text.split()[:3])


def read_log(path: Path) -> list[Told]:
    """Return what the arm has been told so far; nothing before it is connected."""
    try:
        lines = path.read_text().splitlines()
    except FileNotFoundError:
        return []
    return [Told(int(t), kind, text) for t, kind, text in (line.split(" ", 2) for line in lines)]


def moving(rows: list[Told]) -> list[Told]:
    """Return the targets that differ from the one before them."""
    targets = [row for row in rows if row.kind == "target"]
    return [
        row
        for before, row in itertools.pairwise(targets)
        if any(abs(a - b) > STILL_M for a, b in zip(row.position, before.position, strict=True))
    ]
