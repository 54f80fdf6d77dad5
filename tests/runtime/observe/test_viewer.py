"""openhelix.runtime.observe.viewer: what is logged, with a stand-in for Rerun and with Rerun itself."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import numpy as np
import psutil
import pytest

from openhelix.runtime.control.talk import Entry
from openhelix.runtime.observe import viewer
from openhelix.runtime.observe.overlay import About
from openhelix.runtime.observe.viewer import RerunViewer, ViewerMissing, point_cloud, similarity
from openhelix.runtime.robots.base import ScenePart
from tests.runtime.ticks import frame, latent, ticks, told

HAPPENED = {
    1: [Entry(1, 0, "begun", "open the drawer")],
    20: [Entry(2, 0, "ended", "success", task="open_drawer", steps=19, success=True)],
}


class Made(SimpleNamespace):
    """Something of Rerun's, with its name and what it was made of."""


class Anything(ModuleType):
    """A module that has every name; what is called keeps its arguments."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        maker = lambda *args, **kw: Made(kind=name, args=args, kw=kw)  # noqa: E731
        maker.RIGHT_HAND_Z_UP = "z up"
        maker.cursor_relative = lambda **kw: kw
        return maker


class Stream:
    """Keeps what is logged, as (path, archetype, time), and where it goes."""

    gate = threading.Event()

    def __init__(self, name, batcher_config=None):
        self.batching = batcher_config
        self.logged, self.calls, self.blueprint, self.now_s = [], [], None, None

    def save(self, path):
        self.calls.append(("save", path))

    def connect_grpc(self, url):
        self.calls.append(("connect", url))

    def set_time(self, timeline, *, duration):
        self.now_s = duration

    def log(self, path, what, *more, static=False):
        self.gate.wait(10)
        self.logged.append((path, what, self.now_s))

    def send_blueprint(self, blueprint):
        self.blueprint = blueprint

    def flush(self, *, timeout_sec):
        self.calls.append(("flush",))

    def disconnect(self):
        self.calls.append(("disconnect",))


class Scene:
    """A scenery of one triangle that moves with its state."""

    def parts(self):
        triangle = np.array([[[0, 0, 0], [1, 0, 0], [0, 1, 0]]], np.float32)
        return [ScenePart("block", 1, triangle, np.array([[255, 0, 0]], np.uint8))]

    def transforms(self, visual):
        places = np.stack([np.eye(4), np.eye(4)])
        places[1, 0, 3] = visual[0]
        return places


@pytest.fixture
def rerun(monkeypatch):
    module = Anything("rerun")
    module.RecordingStream = Stream
    monkeypatch.setitem(sys.modules, "rerun", module)
    monkeypatch.setitem(sys.modules, "rerun.blueprint", Anything("rerun.blueprint"))
    Stream.gate.set()
    return module


def shown(path, run, about=None):
    view = RerunViewer(path, about, lossless=True)
    for message in run:
        view(message)
    assert view.close() and view.error == ""
    return view


def logged(view, path):
    return [what for at, what, _ in view._stream.logged if at == path]


def test_a_run_is_logged_and_the_stream_is_ended(rerun, tmp_path):
    view = shown(tmp_path / "run.rrd", told(ticks(30, camera_every=1), entries=HAPPENED))
    stream = view._stream
    assert stream.calls == [("save", str(tmp_path / "run.rrd")), ("flush",), ("disconnect",)]
    assert (view.written, view.dropped) == (30, 0)
    # Images ten times a second and poses fifteen, however often they come.
    assert len(logged(view, "world/cameras/static/rgb")) == 10
    assert logged(view, "world/cameras/static/rgb")[0].kw["contents"][:2] == b"\xff\xd8"  # JPEG
    assert 14 <= len(logged(view, "world/target")) <= 16
    assert [text.args[0] for text in logged(view, "told")] == [
        "follows: open the drawer",
        "open_drawer: success after 19 steps",
    ]
    assert [state.kw["state"] for state in logged(view, "state/loop")[1:]] == ["runs"]
    ages = logged(view, "latent/age")
    assert len(ages) == 31 and ages[-1].args == (0.25,)  # its style first, then every tick
    assert stream.logged[-1][2] == pytest.approx(29 / 30, abs=1e-3)


def test_the_plan_is_there_in_3d_and_in_the_images_with_its_committed_part_apart(rerun, tmp_path):
    view = shown(tmp_path / "run.rrd", told(ticks(12)), About(committed=1))
    plan = logged(view, "world/plan")[0]
    first, rest = plan.args[0]
    assert (len(first), len(rest)) == (2, 3)
    assert plan.kw["colors"][0] != plan.kw["colors"][1]
    drawn = logged(view, "world/cameras/static/rgb/plan")
    assert len(drawn[-1].args[0]) == 2


def test_a_new_instruction_takes_the_old_plan_away(rerun, tmp_path):
    view = shown(tmp_path / "run.rrd", told(ticks(20, instruction_ids=2)))
    kinds = [what.kind for what in logged(view, "world/plan")]
    assert "Clear" in kinds and kinds.index("Clear") < len(kinds) - 1


def test_a_drawn_world_is_shown_by_its_parts_where_they_move(rerun, tmp_path):
    run = told(ticks(20))
    moving = [replace(m, visual=np.array([0.01 * (i // 10)])) for i, m in enumerate(run)]
    view = shown(tmp_path / "run.rrd", moving, About(scenery=Scene()))
    mesh, *places = logged(view, "world/scene/block")
    assert mesh.kind == "Mesh3D" and mesh.kw["vertex_positions"].shape == (3, 3)
    assert [place.kw["translation"][0] for place in places] == [0.0, 0.01]  # only where it moved
    assert not logged(view, "world/points/static")  # the scene itself is there
    assert logged(shown(tmp_path / "run.rrd", run), "world/points/static")


def test_a_stuck_viewer_loses_pictures_and_holds_nobody_up(rerun, tmp_path):
    Stream.gate.clear()
    view = RerunViewer(tmp_path / "run.rrd", queue_size=4)
    for message in told(ticks(30)):
        view(message)
    assert view.dropped >= 25
    Stream.gate.set()
    assert view.close()
    assert view.written + view.dropped == 30


@pytest.mark.skipif(
    importlib.util.find_spec("rerun") is None,
    reason="Rerun is not installed; pip install 'openhelix[viewer]' installs it",
)
@pytest.mark.filterwarnings("error::UserWarning")  # Rerun warns of what it does not understand
def test_rerun_takes_all_of_it_and_a_minute_is_small(tmp_path):
    run = told(ticks(300, camera_every=1), visual=np.array([0.0]), entries=HAPPENED)
    sizes = {}
    for name, about in (("scene", About(scenery=Scene())), ("cameras", About())):
        shown(tmp_path / f"{name}.rrd", run, about)
        sizes[name] = (tmp_path / f"{name}.rrd").stat().st_size
    data = (tmp_path / "scene.rrd").read_bytes()
    for path in (b"world/scene/block", b"world/cameras/static/rgb/plan", b"latent/similarity"):
        assert path in data
    assert all(50_000 < size < 10_000_000 / 6 for size in sizes.values()), sizes


@pytest.mark.skipif(
    importlib.util.find_spec("rerun") is None,
    reason="Rerun is not installed; pip install 'openhelix[viewer]' installs it",
)
def test_a_file_that_is_written_while_a_robot_works_is_no_larger_than_one_made_at_once(tmp_path):
    run = told(ticks(60, camera_every=1), visual=np.array([0.0]))
    sizes = []
    for pause_s in (0.0, 0.25):  # Rerun's own batches are of 0.2 s
        path = tmp_path / f"{pause_s}.rrd"
        view = RerunViewer(path, About(), queue_size=1000)
        for number, message in enumerate(run):
            view(message)
            time.sleep(pause_s if number % 6 == 0 else 0.0)
        assert view.close() and view.dropped == 0
        sizes.append(path.stat().st_size)
    assert sizes[1] < 1.15 * sizes[0], sizes


@pytest.mark.skipif(
    importlib.util.find_spec("rerun") is None,
    reason="Rerun is not installed; pip install 'openhelix[viewer]' installs it",
)
def test_a_run_that_is_alive_is_seen_on_this_host_alone_and_leaves_nothing_behind(tmp_path):
    view = RerunViewer(about=About(scenery=Scene()), lossless=True)
    server = view._server.process.pid
    for message in told(ticks(60), visual=np.array([0.0])):
        view(message)
    seen = tmp_path / "seen.rrd"
    command = [sys.executable, "-m", "rerun", view.url, "--save", str(seen)]
    with subprocess.Popen(command, start_new_session=True) as reader:
        try:
            end_s = time.monotonic() + 60
            while not (seen.exists() and b"world/scene/block" in seen.read_bytes()):
                assert time.monotonic() < end_s and reader.poll() is None
                time.sleep(0.1)
        finally:
            os.killpg(reader.pid, signal.SIGKILL)
    ours = [p for p in psutil.process_iter() if _session(p.pid) == server]
    places = [c.laddr for p in ours for c in p.net_connections() if c.status == "LISTEN"]
    assert {place.ip for place in places} == {"127.0.0.1"}
    assert any(f":{place.port}/" in view.url for place in places)
    assert view.close() and view.error == ""
    gone, left = psutil.wait_procs(ours, 10)
    assert len(gone) >= 1 and not left


def _session(pid):
    with suppress(ProcessLookupError):
        return os.getsid(pid)


@pytest.mark.skipif(
    importlib.util.find_spec("rerun") is None,
    reason="Rerun is not installed; pip install 'openhelix[viewer]' installs it",
)
def test_a_server_that_does_not_begin_is_told():
    process = viewer.RerunProcess("--no-such-option")
    with pytest.raises(viewer.ViewerFailed, match="Rerun has ended with"):
        process.answers()


def test_similarity_is_the_cosine():
    a = latent(1, 0, 0)
    assert similarity(a, a) == pytest.approx(1.0)
    assert similarity(a, replace(a, z=-a.z)) == pytest.approx(-1.0)
    assert similarity(a, replace(a, z=np.zeros_like(a.z))) == 0.0
    assert similarity(a, replace(a, z=np.zeros((2, 8), np.float32))) == 0.0


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
