"""Cameras through their makers' libraries, which stand-ins of the same calls take the places of."""

from __future__ import annotations

import copy
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest

from openhelix.runtime.robots import rgbd
from openhelix.runtime.robots.base import RobotError
from openhelix.runtime.robots.lerobot import LeRobotAdapter
from openhelix.runtime.robots.rgbd import RgbdCamera
from tests.runtime.robot_cases import GANTRY_MAPPING, FakeLeRobot

H, W = 48, 64
AGE_S = 0.04


class Taken:
    """What a library hands out: two images, taken a little while ago."""

    def __init__(self, shade: int, hardware: bool = False) -> None:
        self.shade, self.hardware = shade, hardware
        self.at = time.time() - AGE_S

    def image(self) -> np.ndarray:
        return np.full((H, W, 3), self.shade, np.uint8)

    def raw(self) -> np.ndarray:
        return np.full((H, W), 700, np.uint16)


def fake_realsense(fails: str = "", hardware: bool = False) -> SimpleNamespace:
    """`pyrealsense2`, of what is called of it."""
    count = iter(range(1, 10_000))

    class Pipeline:
        def start(self, config):
            if fails == "start":
                raise RuntimeError("No device connected")
            at = SimpleNamespace(fx=60.0, fy=61.0, ppx=31.5, ppy=23.5)
            stream = SimpleNamespace(get_intrinsics=lambda: at)
            sensor = SimpleNamespace(get_depth_scale=lambda: 0.001)
            return SimpleNamespace(
                get_device=lambda: SimpleNamespace(first_depth_sensor=lambda: sensor),
                get_stream=lambda _: SimpleNamespace(as_video_stream_profile=lambda: stream),
            )

        def try_wait_for_frames(self, timeout_ms):
            time.sleep(0.02)
            return fails != "silent", Taken(next(count), hardware)

        def stop(self):
            stopped.append(True)

    def aligned(frames):
        domain = "hardware" if frames.hardware else "global"
        return SimpleNamespace(
            get_color_frame=lambda: SimpleNamespace(
                get_data=frames.image,
                get_timestamp=lambda: 123.0 if frames.hardware else frames.at * 1e3,
                get_frame_timestamp_domain=lambda: domain,
            ),
            get_depth_frame=lambda: SimpleNamespace(get_data=frames.raw),
        )

    stopped: list[bool] = []
    asked: list[tuple] = []
    config = SimpleNamespace(
        enable_device=lambda *a: asked.append(a), enable_stream=lambda *a: asked.append(a)
    )
    return SimpleNamespace(
        pipeline=Pipeline,
        config=lambda: config,
        align=lambda stream: SimpleNamespace(process=aligned),
        stream=SimpleNamespace(color="color", depth="depth"),
        format=SimpleNamespace(rgb8="rgb8", z16="z16"),
        timestamp_domain=SimpleNamespace(hardware_clock="hardware"),
        stopped=stopped,
        asked=asked,
    )


def fake_orbbec() -> SimpleNamespace:
    """`pyorbbecsdk`, of what is called of it."""
    count = iter(range(1, 10_000))

    class Pipeline:
        def __init__(self, device=None):
            pass

        def get_stream_profile_list(self, sensor):
            return SimpleNamespace(
                get_video_stream_profile=lambda *a: a, get_default_video_stream_profile=lambda: ()
            )

        def enable_frame_sync(self):
            pass

        def start(self, config):
            pass

        def get_camera_param(self):
            return SimpleNamespace(
                rgb_intrinsic=SimpleNamespace(fx=60.0, fy=61.0, cx=31.5, cy=23.5)
            )

        def wait_for_frames(self, timeout_ms):
            time.sleep(0.02)
            return Taken(next(count))

        def stop(self):
            stopped.append(True)

    def aligned(frames):
        color = SimpleNamespace(
            get_height=lambda: H,
            get_width=lambda: W,
            get_data=lambda: frames.image().ravel(),
            get_global_timestamp_us=lambda: 0,
            get_system_timestamp_us=lambda: round(frames.at * 1e6),
        )
        depth = SimpleNamespace(
            get_data=lambda: frames.raw().tobytes(), get_depth_scale=lambda: 1.0
        )
        both = SimpleNamespace(get_color_frame=lambda: color, get_depth_frame=lambda: depth)
        return SimpleNamespace(as_frame_set=lambda: both)

    stopped: list[bool] = []
    return SimpleNamespace(
        Pipeline=Pipeline,
        Config=lambda: SimpleNamespace(enable_stream=lambda *a: None),
        AlignFilter=lambda align_to_stream: SimpleNamespace(process=aligned),
        OBSensorType=SimpleNamespace(COLOR_SENSOR=1, DEPTH_SENSOR=2),
        OBStreamType=SimpleNamespace(COLOR_STREAM=1),
        OBFormat=SimpleNamespace(RGB=1),
        stopped=stopped,
    )


@pytest.mark.parametrize(
    ("device", "module", "make"),
    [
        ("realsense", "pyrealsense2", fake_realsense),
        ("orbbec", "pyorbbecsdk", fake_orbbec),
    ],
)
def test_a_picture_is_in_metres_on_the_colour_image_and_as_old_as_it_is(
    device, module, make, monkeypatch
) -> None:
    library = make()
    monkeypatch.setitem(sys.modules, module, library)
    camera = RgbdCamera(device, width=W, height=H)
    seen = camera.latest()
    age_s = (time.monotonic_ns() - seen.t_ns) * 1e-9
    assert AGE_S * 0.9 < age_s < 60
    assert seen.rgb.shape == (H, W, 3) and seen.depth.shape == (H, W)
    assert seen.depth.dtype == np.float32 and np.allclose(seen.depth, 0.7)
    # The libraries count from pixel centres, frames here from corners.
    assert seen.K.tolist() == [[60, 0, 32], [0, 61, 24], [0, 0, 1]]
    deadline = time.monotonic() + 30
    while camera.latest().t_ns == seen.t_ns and time.monotonic() < deadline:
        time.sleep(0.01)
    assert camera.latest().t_ns > seen.t_ns
    camera.close()
    assert library.stopped == [True]


def test_a_cameras_own_counter_is_no_time_of_the_hosts(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pyrealsense2", fake_realsense(hardware=True))
    camera = RgbdCamera("realsense", "0123", W, H)
    assert 0 <= time.monotonic_ns() - camera.latest().t_ns < 30e9
    camera.close()


@pytest.mark.parametrize(
    ("library", "said"),
    [
        (None, "its library is missing .*pip install pyrealsense2"),
        (fake_realsense("start"), "cannot be opened: No device connected"),
        (fake_realsense("silent"), "no picture within 0.1 s"),
    ],
)
def test_a_camera_that_is_not_there_is_one_line(library, said, monkeypatch) -> None:
    monkeypatch.setattr(rgbd, "FIRST_S", 0.1)
    monkeypatch.setitem(sys.modules, "pyrealsense2", library)
    with pytest.raises(RobotError, match=f"realsense camera 0123: {said}") as caught:
        RgbdCamera("realsense", "0123", W, H)
    assert "\n" not in str(caught.value)


def with_device(**changes):
    mapping = copy.deepcopy(GANTRY_MAPPING)
    camera = {k: v for k, v in mapping["cameras"]["front"].items() if k not in ("key", "K")}
    mapping["cameras"]["front"] = (
        camera | {"device": "realsense", "height": H, "width": W} | changes
    )
    return mapping


def test_an_arm_of_lerobots_with_a_camera_of_its_own(monkeypatch) -> None:
    library = fake_realsense()
    monkeypatch.setitem(sys.modules, "pyrealsense2", library)
    with LeRobotAdapter(with_device(), FakeLeRobot()) as robot:
        assert robot.spec.cameras[0].depth
        seen = robot.get_observation()
        frame = seen.frames["front"]
        assert frame.depth is not None and np.allclose(frame.depth, 0.7)
        assert frame.K[0, 2] == 32 and frame.t_ns < seen.t_ns
        K = np.diag([50.0, 50, 1]).tolist()
    with LeRobotAdapter(with_device(K=K), FakeLeRobot()) as robot:
        assert robot.get_observation().frames["front"].K[0, 0] == 50
    assert library.stopped == [True, True]


def test_an_arm_whose_camera_is_not_there_is_let_go(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pyrealsense2", fake_realsense("start"))
    arm = FakeLeRobot()
    with pytest.raises(RobotError, match="No device connected"):
        LeRobotAdapter(with_device(), arm).connect()
    assert not arm.is_connected


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"key": "front"}, "one of key .* and device"),
        ({"device": None}, "one of key .* and device"),
        ({"device": None, "key": "front"}, "K: the intrinsics"),
        ({"device": "kinect"}, "cameras.front.device"),
        ({"depth_key": "front_depth"}, "depth_key: of a camera that LeRobot reads"),
    ],
)
def test_a_camera_that_is_said_wrongly(changes, said) -> None:
    with pytest.raises(ValueError, match=said):
        LeRobotAdapter(with_device(**changes), FakeLeRobot())
