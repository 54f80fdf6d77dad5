"""A live 3D and timeline view through Rerun, off the control thread.

Rerun is large and optional (`pip install 'openhelix[viewer]'`); it is imported only when a
viewer is asked for. A viewer that is slow or gone loses pictures, counted, and nothing else:
a viewer's backpressure must never reach a control loop.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from openhelix.runtime.core.interfaces import CameraFrame, Observation
from openhelix.runtime.observe.background import Background, Counted

if TYPE_CHECKING:
    from openhelix.runtime.control.loop import Tick

STATES = {"wait": 0, "run": 1, "hold": 2, "stop": 3}


class ViewerMissing(ValueError):
    """Rerun is not installed; the message says how to get it."""


class RerunViewer(Counted):
    """A subscriber that shows cameras, point cloud, arm, trajectory and latent age.

    Args:
        path: write an `.rrd` file there; None opens the viewer's window.
        points: keep every n-th pixel of the point cloud, in both directions; 0 for no cloud.
        queue_size: ticks that may wait.
        lossless: wait instead of dropping (the lockstep clock).
        name: of the recording.

    Raises:
        ViewerMissing: rerun-sdk is not installed.
    """

    def __init__(
        self,
        path: Path | None = None,
        points: int = 2,
        queue_size: int = 8,
        lossless: bool = False,
        name: str = "openhelix",
    ) -> None:
        self._rr = require()
        self._stream = self._rr.RecordingStream(name)
        if path is None:
            self._stream.spawn()
        else:
            self._stream.save(str(path))
        self._points = points
        self._seen_ns: dict[str, int] = {}
        self._start_ns: int | None = None
        self._work: Background[Tick] = Background(
            "viewer", self._show, self._end, queue_size, lossless
        )

    def __call__(self, tick: Tick) -> None:
        """Take one tick; a few microseconds."""
        self._work.offer(tick)

    def close(self, timeout_s: float = 10.0) -> bool:
        """Send what waits; False if that took too long. Twice is fine."""
        return self._work.close(timeout_s)

    def _end(self) -> None:
        self._stream.flush(timeout_sec=5.0)
        self._stream.disconnect()

    def _show(self, tick: Tick) -> None:
        rr, log = self._rr, self._stream.log
        if self._start_ns is None:
            self._start_ns = tick.t_ns
            log("world", rr.ViewCoordinates.RIGHT_HAND_Z_UP, static=True)
        self._stream.set_time("run", duration=(tick.t_ns - self._start_ns) * 1e-9)
        for name, frame in tick.observation.frames.items():
            if self._seen_ns.get(name) != frame.t_ns:
                self._seen_ns[name] = frame.t_ns
                self._camera(name, frame)
        self._arm(tick.observation)
        log("world/target", rr.Points3D([tick.sent.pose[:3]], radii=0.008, colors=[255, 180, 0]))
        if tick.new_chunk is not None:
            log("world/plan", rr.LineStrips3D([tick.new_chunk.poses[:, :3]], colors=[80, 200, 255]))
        numbers: Mapping[str, float | None] = {
            "loop/tick_duration_s": tick.duration_s,
            "loop/state": STATES[tick.state],
            "system2/latent_age_s": tick.latent_age_s,
            "arm/gripper_width_m": tick.observation.gripper_width,
            "arm/gripper_target": tick.sent.gripper,
        }
        for path, value in numbers.items():
            if value is not None:
                log(path, rr.Scalars(value))

    def _camera(self, name: str, frame: CameraFrame) -> None:
        rr, log = self._rr, self._stream.log
        at = f"world/cameras/{name}"
        height, width = frame.rgb.shape[:2]
        T = frame.T_world_cam
        log(at, rr.Transform3D(translation=T[:3, 3], mat3x3=T[:3, :3]))
        log(at, rr.Pinhole(image_from_camera=frame.K, width=width, height=height))
        log(f"{at}/rgb", rr.Image(frame.rgb))
        if frame.depth is not None and self._points > 0:
            points, colors = point_cloud(frame, self._points)
            log(f"world/points/{name}", rr.Points3D(points, colors=colors, radii=0.002))

    def _arm(self, observation: Observation) -> None:
        rr, pose = self._rr, observation.tcp_pose
        rotation = rr.Quaternion(xyzw=pose[3:])
        self._stream.log("world/tcp", rr.Transform3D(translation=pose[:3], rotation=rotation))


def point_cloud(frame: CameraFrame, step: int) -> tuple[Any, Any]:
    """Return points (n, 3) in W and colours (n, 3) of every `step`-th pixel with a depth.

    Raises:
        ValueError: the frame has no depth.
    """
    if frame.depth is None:
        raise ValueError("the frame has no depth")
    depth = frame.depth[::step, ::step].astype(np.float64)
    # Pixel centres are at +0.5.
    v, u = np.mgrid[0 : frame.depth.shape[0] : step, 0 : frame.depth.shape[1] : step] + 0.5
    x = (u - frame.K[0, 2]) / frame.K[0, 0] * depth
    y = (v - frame.K[1, 2]) / frame.K[1, 1] * depth
    points = np.stack([x, y, depth], axis=-1).reshape(-1, 3)
    points = points @ frame.T_world_cam[:3, :3].T + frame.T_world_cam[:3, 3]
    kept = (depth > 0).reshape(-1)
    return points[kept], frame.rgb[::step, ::step].reshape(-1, 3)[kept]


def require() -> Any:
    try:
        return importlib.import_module("rerun")
    except ModuleNotFoundError:
        raise ViewerMissing(
            "output.viewer: Rerun is not installed; `.venv/bin/python -m pip install "
            "'rerun-sdk>=0.41'` (about 490 MB), or run without --viewer"
        ) from None
