"""RGB-D cameras through their own libraries: RealSense (`pyrealsense2`), Orbbec (`pyorbbecsdk2`).

Each camera has a thread that keeps its newest picture, colour and depth in the colour camera's
frame, with the lens the camera itself reports and the time at which it took it. A driver of an arm
asks for the newest one and never waits.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from openhelix.runtime.core.clock import MonotonicClock
from openhelix.runtime.core.interfaces import F32, F64, U8
from openhelix.runtime.robots.base import RobotError

log = logging.getLogger(__name__)
Device = Literal["realsense", "orbbec"]
FIRST_S = 10.0  # until the first picture
WAIT_MS = 1000  # for a picture, in the camera's thread


@dataclass(frozen=True, slots=True)
class Rgbd:
    """One picture.

    t_ns: when it was taken, on the host's monotonic clock; rgb (H, W, 3); depth (H, W) m along the
    axis, 0 where there is none; K (3, 3) with pixel centres at +0.5.
    """

    t_ns: int
    rgb: U8
    depth: F32
    K: F64


class Source(Protocol):
    """A camera that has been started."""

    def next(self) -> Rgbd | None:
        """Wait for the next picture; None where none came in time."""

    def close(self) -> None:
        """Stop the camera."""


def lens(fx: float, fy: float, cx: float, cy: float) -> F64:
    """Return K of a library that counts pixels from their centres."""
    return np.array([[fx, 0, cx + 0.5], [0, fy, cy + 0.5], [0, 0, 1.0]])


def taken_ns(epoch_ms: float) -> int:
    """Return a time of the host's calendar clock (ms) on its monotonic clock."""
    return MonotonicClock().now_ns() - round((time.time() * 1e3 - epoch_ms) * 1e6)


class RealSense:
    """A RealSense of the D400 family or later, by serial number or the only one."""

    def __init__(self, serial: str, width: int, height: int, fps: int) -> None:
        import pyrealsense2 as rs

        self._rs, self._pipeline = rs, rs.pipeline()
        config = rs.config()
        if serial:
            config.enable_device(serial)
        config.enable_stream(rs.stream.color, width, height, rs.format.rgb8, fps)
        # Depth at a size that every model has; it is brought to the colour image's below.
        config.enable_stream(rs.stream.depth, rs.format.z16, fps)
        profile = self._pipeline.start(config)
        self._unit_m = float(profile.get_device().first_depth_sensor().get_depth_scale())
        color = profile.get_stream(rs.stream.color).as_video_stream_profile()
        at = color.get_intrinsics()
        self._K = lens(at.fx, at.fy, at.ppx, at.ppy)
        self._align = rs.align(rs.stream.color)

    def next(self) -> Rgbd | None:
        arrived, frames = self._pipeline.try_wait_for_frames(WAIT_MS)
        if not arrived:
            return None
        now_ns = MonotonicClock().now_ns()
        frames = self._align.process(frames)
        color, depth = frames.get_color_frame(), frames.get_depth_frame()
        if not color or not depth:
            return None
        # The camera's own counter has another zero than any clock of the host.
        counted = color.get_frame_timestamp_domain() == self._rs.timestamp_domain.hardware_clock
        return Rgbd(
            t_ns=now_ns if counted else min(now_ns, taken_ns(color.get_timestamp())),
            rgb=np.array(color.get_data(), np.uint8),
            depth=np.asarray(depth.get_data(), np.uint16).astype(np.float32)
            * np.float32(self._unit_m),
            K=self._K,
        )

    def close(self) -> None:
        self._pipeline.stop()


class Orbbec:
    """An Orbbec camera (Femto, Gemini, Astra 2), by serial number or the first one."""

    def __init__(self, serial: str, width: int, height: int, fps: int) -> None:
        import pyorbbecsdk as ob

        device = None
        if serial:
            device = ob.Context().query_devices().get_device_by_serial_number(serial)
        self._pipeline = ob.Pipeline(device) if device is not None else ob.Pipeline()
        config = ob.Config()
        color = self._pipeline.get_stream_profile_list(ob.OBSensorType.COLOR_SENSOR)
        config.enable_stream(color.get_video_stream_profile(width, height, ob.OBFormat.RGB, fps))
        depth = self._pipeline.get_stream_profile_list(ob.OBSensorType.DEPTH_SENSOR)
        config.enable_stream(depth.get_default_video_stream_profile())
        self._pipeline.enable_frame_sync()
        self._pipeline.start(config)
        at = self._pipeline.get_camera_param().rgb_intrinsic
        self._K = lens(at.fx, at.fy, at.cx, at.cy)
        self._align = ob.AlignFilter(align_to_stream=ob.OBStreamType.COLOR_STREAM)

    def next(self) -> Rgbd | None:
        frames = self._pipeline.wait_for_frames(WAIT_MS)
        if frames is None:
            return None
        now_ns = MonotonicClock().now_ns()
        frames = self._align.process(frames)
        frames = frames.as_frame_set() if frames is not None else None
        color = frames.get_color_frame() if frames is not None else None
        depth = frames.get_depth_frame() if frames is not None else None
        if color is None or depth is None:
            return None
        shape = (color.get_height(), color.get_width())
        raw = np.frombuffer(depth.get_data(), np.uint16).reshape(shape)
        # Its clock set to the host's where it can be; else when the host got it.
        epoch_us = color.get_global_timestamp_us() or color.get_system_timestamp_us()
        return Rgbd(
            t_ns=min(now_ns, taken_ns(epoch_us / 1e3)),
            rgb=np.frombuffer(color.get_data(), np.uint8).reshape(*shape, 3).copy(),
            depth=raw.astype(np.float32) * np.float32(depth.get_depth_scale() * 1e-3),
            K=self._K,
        )

    def close(self) -> None:
        self._pipeline.stop()


SOURCES: dict[str, Callable[[str, int, int, int], Source]] = {
    "realsense": RealSense,
    "orbbec": Orbbec,
}
PACKAGES = {"realsense": "pyrealsense2", "orbbec": "pyorbbecsdk2"}


class RgbdCamera:
    """A camera with a thread that keeps its newest picture.

    Args:
        device: whose library.
        serial: of the camera; empty takes the only one.
        width, height: of the colour image, pixels.
        fps: pictures per second.

    Raises:
        RobotError: the library is missing, or the camera cannot be opened or gives no picture.
    """

    def __init__(
        self, device: Device, serial: str = "", width: int = 640, height: int = 480, fps: int = 30
    ) -> None:
        self._name = f"{device} camera {serial}".strip()
        try:
            self._source = SOURCES[device](serial, width, height, fps)
        except ImportError as error:
            raise RobotError(
                f"{self._name}: its library is missing ({error}); pip install {PACKAGES[device]}"
            ) from error
        except Exception as error:  # each library has a type of error of its own
            said = " ".join(str(error).split())
            raise RobotError(f"{self._name}: cannot be opened: {said}") from error
        self._newest: Rgbd | None = None
        self._there, self._stop = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
        self._thread.start()
        if not self._there.wait(FIRST_S):
            self.close()
            raise RobotError(f"{self._name}: no picture within {FIRST_S:g} s")

    def latest(self) -> Rgbd:
        """Return the newest picture, the same one until there is a newer; never waits.

        What has gone wrong shows by its age, which the safety checks watch.
        """
        assert self._newest is not None  # the first was waited for
        return self._newest

    def close(self) -> None:
        """Stop the camera; safe to call again."""
        self._stop.set()
        self._thread.join(2 * WAIT_MS * 1e-3)

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                found = self._source.next()
                if found is not None:
                    self._newest = found
                    self._there.set()
        except Exception as error:  # a thread's end is told by the age of its last picture
            log.warning("%s: %s", self._name, " ".join(str(error).split()))
        finally:
            self._source.close()
