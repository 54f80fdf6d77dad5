"""openhelix.runtime.observe.viewer: what is logged, with a stand-in for Rerun; and what is said without it."""

from __future__ import annotations

import sys
import threading
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from openhelix.runtime.observe import viewer
from openhelix.runtime.observe.viewer import RerunViewer, ViewerMissing, point_cloud
from tests.runtime.ticks import frame, ticks


class Stream:
    """Keeps what is logged, as (path, archetype), and where it goes."""

    gate = threading.Event()

    def __init__(self, name):
        self.logged, self.calls, self.now_s = [], [], None

    def save(self, path):
        self.calls.append(("save", path))

    def spawn(self):
        self.calls.append(("spawn",))

    def set_time(self, timeline, *, duration):
        self.now_s = duration

    def log(self, path, what, static=False):
        self.gate.wait(10)
        self.logged.append((path, what, self.now_s))

    def flush(self, *, timeout_sec):
        self.calls.append(("flush",))

    def disconnect(self):
        self.calls.append(("disconnect",))


@pytest.fixture
def rerun(monkeypatch):
    """A module with the names of Rerun that the viewer uses, and no other."""
    module = ModuleType("rerun")
    for name in ("Image", "Points3D", "LineStrips3D", "Transform3D", "Pinhole", "Scalars"):
        monkeypatch.setattr(
            module,
            name,
            lambda *args, _name=name, **kw: SimpleNamespace(kind=_name, args=args, kw=kw),
            raising=False,
        )
    module.Quaternion = lambda xyzw: xyzw
    module.ViewCoordinates = SimpleNamespace(RIGHT_HAND_Z_UP="z up")
    module.RecordingStream = Stream
    monkeypatch.setitem(sys.modules, "rerun", module)
    Stream.gate.set()
    return module


def test_a_run_is_logged_and_the_stream_is_ended(rerun, tmp_path):
    shown = RerunViewer(tmp_path / "run.rrd", queue_size=64)
    for tick in ticks(30, camera_every=3):
        shown(tick)
    assert shown.close()
    stream = shown._stream
    paths = [path for path, _, _ in stream.logged]
    assert stream.calls == [("save", str(tmp_path / "run.rrd")), ("flush",), ("disconnect",)]
    assert paths.count("world/cameras/static/rgb") == 10  # each image once
    assert paths.count("world/tcp") == 30
    assert "world/plan" in paths
    assert next(w.args for p, w, _ in stream.logged if p == "system2/latent_age_s") == (0.25,)
    assert stream.logged[-1][2] == pytest.approx(29 / 30, abs=1e-3)
    assert (shown.written, shown.dropped) == (30, 0)


def test_without_a_path_a_window_opens(rerun):
    shown = RerunViewer()
    shown.close()
    assert shown._stream.calls[0] == ("spawn",)


def test_a_stuck_viewer_loses_pictures_and_holds_nobody_up(rerun):
    Stream.gate.clear()
    shown = RerunViewer(queue_size=4)
    for tick in ticks(30):
        shown(tick)
    assert shown.dropped >= 25
    Stream.gate.set()
    assert shown.close()
    assert shown.written + shown.dropped == 30


def test_points_lie_where_the_pixels_are():
    picture = frame(0, 64, 200)
    points, colors = point_cloud(picture, 2)
    assert points.shape == colors.shape == (32 * 32, 3)
    np.testing.assert_allclose(points[:, 2], 0.5)  # the camera is 1.5 m up and sees 1 m far
    np.testing.assert_allclose(points[0, :2], [-0.5 + 0.5 / 64, 0.5 - 0.5 / 64])
    assert tuple(colors[0]) == (200, 40, 40)


def test_without_rerun_one_line_says_what_to_do(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(viewer.importlib, "import_module", missing)
    with pytest.raises(ViewerMissing, match="rerun-sdk") as caught:
        RerunViewer()
    assert "\n" not in str(caught.value)
