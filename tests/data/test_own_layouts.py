"""Our own data and plain arrays as sources."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from openhelix.benchmarks.calvin.cameras import SceneRenderer
from openhelix.benchmarks.calvin.collect import CollectConfig, collect
from openhelix.benchmarks.calvin.frames import FramesConfig
from openhelix.benchmarks.calvin.units import read_unit
from openhelix.benchmarks.data.build import Build, CacheSettings
from openhelix.benchmarks.data.lerobot_layout import read_said
from openhelix.benchmarks.data.own_layouts import PlainSource
from openhelix.benchmarks.data.source import DataError, Source, open_source
from openhelix.benchmarks.data.writers import convert
from openhelix.runtime.control.talk import Entry
from openhelix.runtime.core.interfaces import Action, CameraFrame, Observation
from openhelix.runtime.observe.recorder import InstructionRecord, RecordingWriter
from openhelix.system1.data import Cache
from tests.runtime.docs_code import blocks


@pytest.fixture(scope="module")
def collection(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("c") / "data"
    frames = FramesConfig(every=0)
    config = CollectConfig(
        out=out, scenes="D", tasks=("turn_on_led",), per_task=2, jobs=1, frames=frames
    )
    collect(config)
    return out


def test_a_collection_is_rendered_when_it_is_looked_at(collection: Path, tmp_path: Path) -> None:
    source = open_source(collection)
    _, (done,) = read_unit(collection / "units" / "D_00000.npz")
    first = source.segments[0]
    assert (first.task, first.text, first.scene) == ("turn_on_led", done.instruction, "D")
    motion = source.motion(first.first, first.last)
    np.testing.assert_array_equal(motion.targets, done.targets[: len(motion)])
    seen = next(source.views([first.first + 2], ["gripper"]))["gripper"]
    want = SceneRenderer("D").render(done.states[2].astype(np.float64))["gripper"]
    np.testing.assert_array_equal(seen.rgb, want.rgb)
    np.testing.assert_array_equal(seen.T_world_cam, want.T_world_cam)
    convert(source, tmp_path / "calvin", "calvin", lambda text: None)
    back = open_source(tmp_path / "calvin")
    again = back.motion(back.segments[0].first, back.segments[0].last)
    np.testing.assert_allclose(again.proprio[:, :3], motion.proprio[:, :3], atol=1e-6)
    with np.load(tmp_path / "calvin" / "episode_0000000.npz") as frame:
        assert np.abs(frame["scene_obs"]).sum() > 0 and np.abs(frame["robot_obs"][7:14]).sum() > 0


def observed(t: int, hidden: bool = False) -> Observation:
    pose = np.array([0.1 + 0.01 * t, 0, 0.5, 0, 0, 0, 1.0])
    place = np.eye(4)
    place[0, 3] = 0.01 * t
    rgb = np.full((12, 16, 3), t, np.uint8)
    depth = np.full((12, 16), 1.0 + t / 100, np.float32)
    K = np.array([[20.0, 0, 8], [0, 20, 6], [0, 0, 1]])
    frames = {
        "static": CameraFrame(t, rgb, depth, K, np.eye(4)),
        "gripper": CameraFrame(t, rgb, depth, K, place),
    }
    return Observation(t, {} if hidden else frames, pose, 0.04, t % 8 < 4, np.zeros(7), t // 8)


def record(path: Path, ticks: int = 24) -> Path:
    """Write a run of three instructions, the second of which failed."""
    writer = RecordingWriter(path, {"config": {"control": {"hz": 20.0}}})
    for t in range(ticks):
        if t % 8 == 0:
            if t:
                ended = Entry(t, t, "ended", "", success=t != 16)
                writer.put("/entry", t, ended)
            said = InstructionRecord(t // 8, "turn_on_led", f"press {t // 8}")
            writer.put("/instruction", t, said)
        seen = observed(t)
        for name, frame in seen.frames.items():
            writer.put_frame(name, frame)
        writer.put("/observation", t, observed(t, hidden=True))
        target = seen.tcp_pose + np.array([0.02, 0, 0, 0, 0, 0, 0])
        writer.put("/action", t, Action(target, 1.0 if t % 2 else 0.0, t // 8))
    writer.finish({"complete": True, "records": writer.records})
    return path


def test_a_recording_is_what_was_seen_and_sent(tmp_path: Path) -> None:
    record(tmp_path / "recording.mcap")
    for path in (tmp_path, tmp_path / "recording.mcap"):
        source = open_source(path)
    assert source.hz == 20 and source.n_frames == 24 and source.problems() == []
    assert [(s.first, s.last, s.text) for s in source.segments] == [
        (0, 7, "press 0"), (16, 23, "press 2"),
    ]  # fmt: skip
    assert source.facts["left out"].startswith("1 stretches")
    assert {c.name: c.mount for c in source.cameras} == {"static": "world", "gripper": "hand"}
    motion = source.motion(16, 23)
    np.testing.assert_allclose(motion.proprio[1, :3], [0.27, 0, 0.5], atol=1e-6)
    np.testing.assert_allclose(motion.targets[1, :3], [0.29, 0, 0.5], atol=1e-6)
    assert motion.targets[:, 7].tolist() == [0, 1] * 4
    assert motion.proprio[:, 8].tolist() == [1] * 4 + [0] * 4
    for t, view in zip((17, 17, 22), source.views([17, 17, 22], ["gripper"]), strict=True):
        assert (view["gripper"].rgb == t).all()
        assert view["gripper"].T_world_cam[0, 3] == pytest.approx(0.01 * t)


def test_recordings_can_be_trained_on(tmp_path: Path) -> None:
    for number in range(2):
        record(tmp_path / f"{number}.mcap")
    found = Build(open_source(tmp_path), "", CacheSettings(every=1), tmp_path / "c")
    assert found.run(lambda text: None)["segments"] == 4
    cache = Cache(tmp_path / "c")
    assert cache.cameras == ["static", "gripper"] and cache.hz == 20
    assert sorted(set(cache.episode.tolist())) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("data", "said"),
    [(b"", "not a recording"), (b"\x89MCAP0\r\n" + bytes(90), "not a recording")],
)
def test_what_is_no_recording_is_told(tmp_path: Path, data: bytes, said: str) -> None:
    (tmp_path / "x.mcap").write_bytes(data)
    with pytest.raises(DataError, match=rf"x\.mcap: {said}"):
        open_source(tmp_path)


def test_a_cut_recording_is_read_up_to_there(tmp_path: Path) -> None:
    place = record(tmp_path / "x.mcap")
    place.write_bytes(place.read_bytes()[:-400])
    source = open_source(place)
    assert "not complete" in source.problems()[0]
    with pytest.raises(DataError, match=r"x\.mcap: ends before tick 90"):
        list(source.views([90], ["static"]))


EYE = [[20.0, 0, 8], [0, 20, 6], [0, 0, 1]]


def write_plain(folder: Path, count: int = 10) -> dict[str, Any]:
    arrays: dict[str, Any] = {
        "position": np.linspace([0, 0, 0.5], [0.1, 0, 0.5], count),
        "quaternion": np.tile([0.0, 0, 0, 1], (count, 1)),
        "gripper_open": np.arange(count) < 5,
        "rgb_front": np.arange(count, dtype=np.uint8)[:, None, None, None]
        * np.ones((1, 12, 16, 3), np.uint8),
        "depth_front": np.full((count, 12, 16), 0.8, np.float32),
    }
    about = {
        "hz": 15,
        "cameras": {"front": {"K": EYE, "T_world_cam": np.eye(4).tolist()}},
        "episodes": [
            {"file": "a.npz", "instruction": "fold the towel", "task": "fold"},
            {"file": "b.npz", "instruction": "unfold it"},
        ],
    }
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "a.npz", **arrays)
    np.savez(folder / "b.npz", **arrays, target_position=arrays["position"] + 0.5)
    (folder / "dataset.json").write_text(json.dumps(about))
    return about


def test_plain_arrays_become_a_dataset(tmp_path: Path) -> None:
    write_plain(tmp_path)
    source = open_source(tmp_path)
    assert (source.hz, source.tasks) == (15, ("fold", "unfold it"))
    assert source.spans.tolist() == [[0, 9], [10, 19]]
    motion = source.motion(0, 9)
    np.testing.assert_allclose(motion.targets[:-1, :3], motion.proprio[1:, :3], atol=1e-6)
    assert motion.targets[:, 7].tolist() == [1] * 4 + [0] * 6
    told = source.motion(10, 19)
    np.testing.assert_allclose(told.targets[:, :3], told.proprio[:, :3] + 0.5, atol=1e-6)
    view = next(source.views([13], ["front"]))["front"]
    assert (view.rgb == 3).all() and view.K.tolist() == EYE
    found = Build(source, "", CacheSettings(), tmp_path / "c").run(lambda text: None)
    assert found["segments"] == 2 and Cache(tmp_path / "c").meta["tasks"] == ["fold", "unfold it"]


def drop(name: str) -> Any:
    return lambda about, arrays: arrays.pop(name)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (drop("position"), "a.npz: no position"),
        (drop("quaternion"), "a.npz: no quaternion"),
        (lambda b, a: a.update(position=a["position"] * np.nan), "a.npz: position[0, 0]: nan"),
        (
            lambda b, a: a.update(gripper_open=np.ones(3)),
            "gripper_open: float64(3,), must be (10,)",
        ),
        (lambda b, a: a.update(rgb_front=np.ones((10, 9))), "rgb_front: float64(10, 9), must be"),
        (
            lambda b, a: b["episodes"][0].update(file="../a.npz"),
            "episodes.0.file: '../a.npz' is not",
        ),
        (lambda b, a: b["episodes"][0].update(file="z.npz"), "z.npz: no such file"),
        (lambda b, a: b.update(hz=0), "dataset.json: episodes, hz: at least one episode"),
        (lambda b, a: b.pop("episodes"), "dataset.json: episodes"),
        (lambda b, a: b["cameras"]["front"].update(K=[[1]]), "cameras.front.K: must be (3, 3)"),
    ],
)
def test_bad_plain_arrays_are_one_line(tmp_path: Path, change: Any, said: str) -> None:
    about = write_plain(tmp_path)
    with np.load(tmp_path / "a.npz") as stored:
        arrays = dict(stored)
    change(about, arrays)
    np.savez(tmp_path / "a.npz", **arrays)
    (tmp_path / "dataset.json").write_text(json.dumps(about))
    with pytest.raises(DataError, match=re.escape(said)) as caught:
        open_source(tmp_path).motion(0, 9)
    assert "\n" not in str(caught.value)


class Mine(PlainSource):
    """A reader of somebody's own."""

    def __init__(self, path: Path) -> None:
        raise DataError(f"{path}: mine")


def test_a_reader_of_ones_own_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"{tmp_path}: mine"):
        open_source(tmp_path, "tests.data.test_own_layouts:Mine")


class Half(Source):
    """One that is not written yet."""

    def __init__(self, path: Path) -> None:
        self.path = path


def test_a_reader_that_lacks_something_is_told_what(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"reader: .*:Half lacks files, index_files, matches"):
        open_source(tmp_path, "tests.data.test_own_layouts:Half")


def test_the_files_that_the_page_shows_are_read(tmp_path: Path) -> None:
    said, about = blocks("data.md", "json")
    (tmp_path / "openhelix.json").write_text(said)
    told = read_said(tmp_path / "openhelix.json")
    assert told.action is not None and told.cameras is not None and told.cameras["front"].depth
    write_plain(tmp_path)
    (tmp_path / "one.npz").write_bytes((tmp_path / "a.npz").read_bytes())
    (tmp_path / "dataset.json").write_text(about)
    source = open_source(tmp_path)
    assert source.segments[0].task == "fold" and source.cameras[0].usable
