"""The training cache of a dataset: what is learnt from it, resumed, and never stale."""

from __future__ import annotations

import json
import os
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from openhelix.benchmarks.calvin import dataset as layout
from openhelix.benchmarks.calvin.dataset import Annotation
from openhelix.benchmarks.calvin.tasks import TASK_NAMES
from openhelix.benchmarks.data import build as module
from openhelix.benchmarks.data.build import Build, CacheSettings, check_unchanged
from openhelix.benchmarks.data.source import DataError, open_source
from openhelix.runtime.cli.main import main
from openhelix.runtime.core.config import CommandFailed, ConfigError
from openhelix.system1.data import Cache
from tests.data.small import LED, OPEN, annotate, as_published, change_frame, write_split

CHANGES = "{dim: 48, heads: 4, encoder_width: 8, layers: 2, context_layers: 1}"


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENHELIX_CACHE", str(folder))
        yield folder


@pytest.fixture
def split(tmp_path: Path) -> Path:
    return as_published(write_split(tmp_path / "training", ((OPEN, LED), (OPEN,), (LED,))))


def build(split: Path, out: Path, **more: Any) -> dict[str, Any]:
    settings = CacheSettings(**{k: more.pop(k) for k in ("every", "system2_px") if k in more})
    said: list[str] = []
    found = Build(open_source(split), "", settings, out, **more).run(said.append)
    return found | {"said": said}


def test_what_is_built_is_what_the_dataset_shows(split: Path, tmp_path: Path) -> None:
    found = build(split, tmp_path / "c")
    cache, source = Cache(tmp_path / "c"), open_source(split)
    assert len(cache) == found["frames"] > 12 and found["segments"] == 4
    assert cache.meta["tasks"] == list(TASK_NAMES)
    stored = load_file(tmp_path / "c" / "shard-00000.safetensors")
    for row in range(len(cache)):
        segment = source.segments[int(cache.episode[row])]
        step = int(cache.step[row])
        motion = source.motion(segment.first, segment.last)
        view = next(source.views([segment.first + step], ["static", "gripper"]))
        np.testing.assert_array_equal(stored["rgb.gripper"][row], view["gripper"].rgb)
        depth = stored["depth.gripper"][row] * 1e-4
        np.testing.assert_allclose(depth, view["gripper"].depth, atol=6e-5)
        np.testing.assert_allclose(stored["T.gripper"][row], view["gripper"].T_world_cam, atol=1e-6)
        np.testing.assert_array_equal(stored["proprio"][row, 0], motion.proprio[step])
        usable = stored["target_mask"][row]
        assert usable.sum() == min(16, len(motion) - step) >= 4
        np.testing.assert_array_equal(
            stored["target_pose"][row][usable], motion.targets[step : step + usable.sum(), :7]
        )
        assert TASK_NAMES[stored["task"][row]] == segment.task
        assert cache.meta["instructions"][stored["instruction"][row]] == segment.text
        assert stored["steps_left"][row] == len(motion) - 1 - step


def test_size_and_time_left_are_told_before_and_meanwhile(split: Path, tmp_path: Path) -> None:
    said = build(split, tmp_path / "c")["said"]
    assert "4 segments, about 2" in said[0] and "GB into" in said[0]
    assert said[1].startswith("1 of 1: ") and said[1].endswith(" s to go")
    assert build(split, tmp_path / "c")["said"] == []  # nothing is left to do


def test_what_does_not_fit_is_refused_before_anything_is_written(
    split: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"max_gb: .* GB are needed, 1e-06 allowed"):
        build(split, tmp_path / "c", max_gb=1e-6)
    assert not (tmp_path / "c").exists()


def test_windows_that_overlap_are_held_out_together(split: Path, tmp_path: Path) -> None:
    build(split, tmp_path / "c", every=1)
    cache = Cache(tmp_path / "c")
    groups = {int(e): int(g) for e, g in zip(cache.episode, cache.group, strict=True)}
    assert groups == {0: 0, 1: 0, 2: 2, 3: 3}
    for seed in range(8):
        train, held = cache.split(0.34, seed)
        assert len(train) and len(held)
        assert not set(cache.group[train].tolist()) & set(cache.group[held].tolist())


def test_processes_and_shards_make_no_difference(
    split: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(split, tmp_path / "one")
    monkeypatch.setattr(module, "SHARD_FRAMES", 1)
    found = build(split, tmp_path / "many", jobs=2)
    assert found["shards"] == 4
    one, many = Cache(tmp_path / "one"), Cache(tmp_path / "many")
    for name in ("rgb.static", "depth.static", "target_pose", "keypose_pose", "group", "task"):
        rows = torch.arange(len(one))
        assert torch.equal(one.gather(name, rows), many.gather(name, rows)), name


def test_a_process_that_was_ended_is_one_line(
    split: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Pool:
        """A pool whose processes die."""

        def __init__(self, *_: Any, **__: Any) -> None: ...
        def __enter__(self) -> Pool:
            return self

        def __exit__(self, *_: object) -> None: ...
        def submit(self, *_: Any) -> Future[Any]:
            future: Future[Any] = Future()
            future.set_exception(BrokenProcessPool("died"))
            return future

    monkeypatch.setattr(module, "SHARD_FRAMES", 1)
    monkeypatch.setattr(module, "ProcessPoolExecutor", Pool)
    with pytest.raises(CommandFailed, match="the same command goes on"):
        build(split, tmp_path / "c", jobs=2)


def test_a_killed_build_goes_on(
    split: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SHARD_FRAMES", 1)
    real, calls = module.build_shard, []

    def dies_third(order: Any) -> Any:
        calls.append(order.shard.name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(order)

    monkeypatch.setattr(module, "build_shard", dies_third)
    with pytest.raises(KeyboardInterrupt):
        build(split, tmp_path / "c")
    assert not (tmp_path / "c" / "cache.json").exists()
    (tmp_path / "c" / ".shard-00002.safetensors.1.part").write_bytes(b"torn")
    assert build(split, tmp_path / "c")["shards"] == 4
    assert calls == [f"shard-{n:05d}.safetensors" for n in (0, 1, 2, 2, 3)]
    assert not list((tmp_path / "c").glob(".*"))


def test_system2s_images_lie_beside(split: Path, tmp_path: Path) -> None:
    found = build(split, tmp_path / "c", system2_px=24)
    images = load_file(tmp_path / "c" / "system2" / "shard-00000.safetensors")["rgb"]
    assert images.shape == (found["frames"], 24, 24, 3)


def nan_action(split: Path) -> Path:
    return change_frame(split, 33, actions=np.array([0, np.nan, 0, 0, 0, 0, 1.0]))


def cut(split: Path) -> Path:
    place = split / layout.frame_name(33)
    place.write_bytes(place.read_bytes()[:2000])
    return place


def gone(split: Path) -> Path:
    place = split / layout.frame_name(33)
    place.unlink()
    return place


def small_image(split: Path) -> Path:
    for index in range(30, 50):
        change_frame(split, index, rgb_static=np.zeros((8, 8, 3), np.uint8))
    return split / "episode_00000"


def beyond(split: Path) -> Path:
    notes = [Annotation(*OPEN), Annotation(10, 28, *LED[2:]), Annotation(80, 300, *OPEN[2:])]
    return annotate(split, [*notes, Annotation(60, 78, *LED[2:])])


@pytest.mark.parametrize("spoil", [nan_action, cut, gone, small_image, beyond])
def test_what_is_bad_is_one_line_and_can_be_left_out(
    split: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], spoil: Any
) -> None:
    place, out = spoil(split), f"out={tmp_path / 'c'}"
    assert main(["data", "cache", str(split), out, "jobs=1"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"openhelix data: {place}") and "(--skip-bad leaves such out)" in error
    assert not (tmp_path / "c" / "cache.json").exists()
    assert main(["data", "cache", str(split), out, "jobs=1", "--skip-bad", "--json"]) == 0
    told = capsys.readouterr()
    found = json.loads(told.out)
    assert found["skipped"] == 1 and found["left_out"][0]["why"].startswith(str(place))
    listed = json.loads((tmp_path / "c" / "skipped.json").read_text())
    assert listed == found["left_out"] and listed[0]["segment"] == 2
    assert sorted(set(Cache(tmp_path / "c").episode.tolist())) == [0, 1, 3]
    assert main(["data", "cache", str(split), out, "jobs=1"]) == 2  # nothing is left out silently


def test_nothing_to_train_on_is_told(
    split: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = f"out={tmp_path / 'c'}"
    for index in range(90):
        change_frame(split, index, depth_gripper=None)
    assert main(["data", "cache", str(split), 'cameras=["gripper"]', out]) == 2
    assert "cameras: gripper lacks depth. System 1 acts on points" in capsys.readouterr().err
    assert main(["data", "cache", str(split), 'cameras=["front"]', out]) == 2
    assert "cameras: 'front' is none of static, gripper" in capsys.readouterr().err
    annotate(split, [])
    assert main(["data", "cache", str(split), out]) == 2
    assert "auto_lang_ann.npy: no annotations" in capsys.readouterr().err


def rows(cache: Cache) -> torch.Tensor:
    return torch.arange(len(cache))


def touched(split: Path) -> Path:
    place = split / layout.frame_name(12)
    os.utime(place, ns=(0, 1))
    return place


def reworded(split: Path) -> Path:
    return annotate(split, ann=["open it", "press", "open it now", "press it"])


@pytest.mark.parametrize("change", [nan_action, gone, touched, reworded])
def test_a_dataset_that_changed_is_noticed(
    split: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Any
) -> None:
    build(split, tmp_path / "c")
    check_unchanged(tmp_path / "c")
    place = change(split)
    with pytest.raises(DataError, match=rf"{place}: .*since the cache {tmp_path / 'c'} was built"):
        check_unchanged(tmp_path / "c")
    for words in (
        ["train", "policy", f"data={tmp_path / 'c'}", f"out={tmp_path / 't'}"],
        ["data", "cache", str(split), f"out={tmp_path / 'c'}"],
    ):
        assert main(words) == 2
        assert f"{place}: " in capsys.readouterr().err.splitlines()[-1]
    assert main(["data", "inspect", str(tmp_path / "c"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["problems"][0].startswith(f"{place}: ")
    if change in (touched, reworded):
        assert main(["data", "cache", str(split), f"out={tmp_path / 'c'}", "--fresh"]) == 0
        check_unchanged(tmp_path / "c")
        cache = Cache(tmp_path / "c")
        said = [
            cache.meta["instructions"][int(i)] for i in cache.gather("instruction", rows(cache))
        ]
        texts = [s.text for s in open_source(split).segments]
        assert said == [texts[int(e)] for e in cache.episode]
        assert main(["data", "inspect", str(tmp_path / "c")]) == 0
        assert '"problems": []' in capsys.readouterr().out


def test_a_cache_is_not_continued_with_other_settings(split: Path, tmp_path: Path) -> None:
    build(split, tmp_path / "c")
    with pytest.raises(ConfigError, match=r"settings: .* was built with"):
        build(split, tmp_path / "c", every=2)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds other data"):
        build(split, tmp_path / "mine")
    assert main(["data", "cache", str(split), f"out={tmp_path / 'mine'}", "--fresh"]) == 2
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_a_policy_trains_on_a_dataset_as_it_lies_there(
    split: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "train", "policy", f"data={split}", f"out={tmp_path / 't'}", "validation=0.3",
        f"policy.changes={CHANGES}", "policy.steps=2", "policy.batch=4", "policy.eval_every=2",
        "eval_frames=4", "threads=1", "--json",
    ]  # fmt: skip
    assert main(words) == 0
    told = capsys.readouterr()
    (stage,) = json.loads(told.out)["stages"]
    assert stage["step"] == 2 and np.isfinite(stage["val_loss"])
    assert "segments, about" in told.err
    config = json.loads((tmp_path / "t" / "policy" / "config.json").read_text())
    assert [c["name"] for c in config["cameras"]] == ["static", "gripper"]
    assert config["n_tasks"] == 34 and config["hz"] == 30
    nan_action(split)
    assert main(words) == 2  # the cache that was built notices
    assert "since the cache" in capsys.readouterr().err


def test_a_bad_dataset_can_be_trained_on_without_its_bad_part(
    split: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nan_action(split)
    words = [
        "train", "policy", f"data={split}", f"out={tmp_path / 't'}",
        f"policy.changes={CHANGES}", "policy.steps=1", "policy.batch=2", "threads=1",
    ]  # fmt: skip
    assert main(words) == 2
    capsys.readouterr()
    assert main([*words, "--skip-bad"]) == 0
    assert "left out: " in capsys.readouterr().err
