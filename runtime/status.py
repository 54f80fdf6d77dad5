"""What a person wants to know of a running robot, kept by the process that looks on.

The observer hears every tick anyway; `StatusBoard` keeps the newest of everything and answers
when somebody asks. The control process is never asked: whoever watches a robot, however many
and however slowly, cannot cost its loop a microsecond.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from runtime.config import RunConfig
from runtime.stream import TickMessage
from runtime.types import U8, CameraFrame

WINDOW_S = 10.0  # over which rates are counted
MAX_SIDE_PX = 640  # of an image that is handed out; larger ones are thinned
KEPT_STOPS = 20


class StatusBoard:
    """The newest state of one run.

    One thread feeds it, another asks: what they share is replaced, never changed.

    Args:
        config: of the run.
        now_ns: this process's monotonic clock.
    """

    def __init__(self, config: RunConfig, now_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self._config, self._now_ns = config, now_ns
        self._newest: TickMessage | None = None
        self._heard_ns = 0
        self._frames: Mapping[str, CameraFrame] = {}
        self._marks: dict[str, deque[int]] = {
            name: deque(maxlen=4096) for name in ("loop", "system1", "system2")
        }
        self._stops: deque[tuple[int, str]] = deque(maxlen=KEPT_STOPS)
        self.finished = False

    def take(self, message: TickMessage, frames: Mapping[str, CameraFrame]) -> None:
        """Note a tick.

        Args:
            message: the newest.
            frames: the newest of every camera; replaced by the caller, not changed.
        """
        now_ns, tick = self._now_ns(), message.tick
        self._marks["loop"].append(now_ns)
        if tick.new_latent is not None:
            self._marks["system2"].append(now_ns)
        if tick.new_chunk is not None:
            self._marks["system1"].append(now_ns)
        before = self._newest.tick if self._newest is not None else None
        if tick.state == "stop" and (before is None or before.state != "stop"):
            self._stops.append((now_ns, tick.reason))
        self._heard_ns, self._frames, self._newest = now_ns, frames, message

    def snapshot(self) -> dict[str, Any]:
        """Return plain values: state, ages in seconds, rates in hertz; see the keys."""
        config, message, now_ns = self._config, self._newest, self._now_ns()
        status: dict[str, Any] = {
            "robot": config.robot.id,
            "driver": config.robot.name,
            "steps_limit": config.tasks.steps_limit,
            "expected_hz": {"loop": config.control.hz, "system2": config.system2.hz},
            "latent_max_age_s": config.safety.latent_max_age_s,
            "finished": self.finished,
            "started": message is not None,
            "rates_hz": {name: self._rate_hz(marks, now_ns) for name, marks in self._marks.items()},
            "stops": [
                {"ago_s": (now_ns - at_ns) * 1e-9, "reason": reason}
                for at_ns, reason in list(self._stops)
            ],
        }
        return status | (self._tick(message, now_ns) if message is not None else _NOTHING)

    def frame(self, camera: str) -> dict[str, Any]:
        """Return {"t_ns": capture time, "rgb": (h, w, 3) u8}; an empty dict without a frame."""
        frame = self._frames.get(camera)
        if frame is None:
            return {}
        step = -(-max(frame.rgb.shape[:2]) // MAX_SIDE_PX)
        rgb: U8 = np.ascontiguousarray(frame.rgb[::step, ::step])
        return {"t_ns": frame.t_ns, "rgb": rgb}

    def _tick(self, message: TickMessage, now_ns: int) -> dict[str, Any]:
        tick, silent_s = message.tick, (now_ns - self._heard_ns) * 1e-9
        age_s = tick.latent_age_s
        return {
            "task": message.task,
            "instruction": message.instruction,
            "number": message.number,
            "steps": message.steps,
            "succeeded": message.succeeded,
            "attempted": message.number - 1,
            "state": tick.state,
            "reason": tick.reason,
            "ticks": tick.index,
            "silent_s": silent_s,
            "latent_age_s": None if age_s is None else age_s + silent_s,
            "cameras": {
                name: {
                    "t_ns": frame.t_ns,
                    # Both times are the control host's clock.
                    "age_s": max(0.0, (tick.t_ns - frame.t_ns) * 1e-9) + silent_s,
                }
                for name, frame in self._frames.items()
            },
        }

    def _rate_hz(self, marks: deque[int], now_ns: int) -> float:
        """Count over the window; a rate that has stopped falls to 0 within it."""
        loop = self._marks["loop"]
        if not loop:
            return 0.0
        since_ns = max(now_ns - round(WINDOW_S * 1e9), loop[0])
        span_s = (now_ns - since_ns) * 1e-9
        count = sum(mark > since_ns for mark in list(marks))
        return count / span_s if span_s > 0.5 else 0.0


_NOTHING: dict[str, Any] = {
    "task": "",
    "instruction": "",
    "number": 1,
    "steps": 0,
    "succeeded": 0,
    "attempted": 0,
    "state": "wait",
    "reason": "",
    "ticks": 0,
    "silent_s": 0.0,
    "latent_age_s": None,
    "cameras": {},
}
