"""`openhelix train vlm` as a command: from nothing to a model, stopped and continued, bad words."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from openhelix.benchmarks.calvin.scene import get_scene
from openhelix.benchmarks.training.collect_talk import (
    PLANS,
    TalkPlan,
    ask_again,
    make,
    subset,
)
from openhelix.benchmarks.training.collect_talk import main as collect
from openhelix.runtime.cli.main import main
from openhelix.system2.model import open_checkpoint
from openhelix.system2.vlm_data import read, read_about, shards, write_about

QUICK = [
    "vlm.see.steps=2", "vlm.align.steps=2", "vlm.tune.steps=3", "vlm.pictures=6",
    "vlm.see.batch=4", "vlm.align.batch=2", "vlm.tune.batch=2", "vlm.eval_pictures=2",
    "vlm.eval_questions=3", "vlm.measure_pictures=3", "vlm.bf16=off", "--json",
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def small_shards() -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("openhelix.benchmarks.training.collect_talk.SHARD", 6)
        patch.setattr("openhelix.benchmarks.training.collect_talk.make_shard.__defaults__", (6,))
        yield


def test_one_command_makes_pictures_and_a_model(llava: str, tmp_path: Path, capsys) -> None:
    words = ["train", "vlm", f"vlm.model={llava}", f"vlm.data={tmp_path / 'talk'}", *QUICK]
    assert main([*words, f"out={tmp_path / 'run'}", "device=auto"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["finished"] and said["stages"][0]["stage"] == "vlm"
    assert said["stages"][0]["samples"] == 2 * 2 * 8 + 3 * 2 * 8
    assert set(said["stages"][0]["accuracy"]) == {"held-out", "scene-D"}
    assert set(said["stages"][0]["accuracy"]["held-out"]) == {
        "image", "none", "other", "commonest answer",
    }  # fmt: skip
    assert {r.group for r in read(tmp_path / "talk" / "scene-D")} == {"D"}
    assert {r.group for r in read(tmp_path / "talk" / "train")} == {"A"}  # one shard
    assert not any(q.held_out for r in read(tmp_path / "talk" / "train") for q in r.questions)
    assert open_checkpoint(str(tmp_path / "run" / "llava")).template.name == "chatml"
    # Again: nothing is left to train.
    assert main([*words, f"out={tmp_path / 'run'}"]) == 0
    assert json.loads(capsys.readouterr().out)["stages"][0]["samples"] == 80


def test_a_time_limit_leaves_a_model_and_the_command_goes_on(
    llava: str, tmp_path: Path, capsys
) -> None:
    words = ["train", "vlm", f"vlm.model={llava}", f"vlm.data={tmp_path / 'talk'}", *QUICK]
    words += [f"out={tmp_path / 'run'}"]
    assert main([*words, "time_limit_s=0.0001"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert not said["finished"] and "step 1 of 2 of 'see'" in said["why"]
    assert (tmp_path / "run" / "llava" / "config.json").is_file()
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["finished"]


def test_pictures_grow_and_are_the_same_for_a_seed(tmp_path: Path) -> None:
    plan = TalkPlan(scenes=(get_scene("B"),), seed=7, random_looks=0.5)
    make(tmp_path / "a", plan, 6)
    make(tmp_path / "b", plan, 12)
    assert shards(tmp_path / "a") == [0] and shards(tmp_path / "b") == [0, 1]
    first, both = read(tmp_path / "a"), read(tmp_path / "b")
    assert first == both[:6] != both[6:]
    assert read_about(tmp_path / "a")["scenes"] == ["B"] and first[0].group == "B"
    with pytest.raises(ValueError, match="made with seed 7, not 8"):
        make(tmp_path / "a", TalkPlan(scenes=(get_scene("B"),), seed=8, random_looks=0.5), 6)


def test_what_a_picture_shows_can_be_asked_anew(tmp_path: Path, capsys) -> None:
    """From what stands beside it: the same seed asks the same, another seed something else."""
    plan = PLANS["train"]
    make(tmp_path / "a" / "train", plan, 12)
    assert ask_again(tmp_path / "a" / "train", tmp_path / "b", plan) == 12
    assert read(tmp_path / "a" / "train") == read(tmp_path / "b")
    write = dict(read_about(tmp_path / "a" / "train"))
    write_about(tmp_path / "a" / "train", write | {"seed": 5})
    ask_again(tmp_path / "a" / "train", tmp_path / "c", replace(plan, seed=5))
    other, same = read(tmp_path / "c"), read(tmp_path / "b")
    assert [r.picture for r in other] == [r.picture for r in same]
    assert all(a.questions != b.questions for a, b in zip(other, same, strict=True))
    with pytest.raises(SystemExit):
        collect(["--out", str(tmp_path / "d"), "--pictures-of", str(tmp_path / "a")])
    assert "pictures-of: " in capsys.readouterr().err


def test_a_small_copy_holds_the_same_questions(tmp_path: Path) -> None:
    for name in ("train", "held-out"):
        make(tmp_path / "talk" / name, PLANS[name], 6)
    count = subset(tmp_path / "talk", tmp_path / "small", 10_000_000, 64)
    assert count == 12
    small, whole = read(tmp_path / "small" / "train"), read(tmp_path / "talk" / "train")
    assert [r.questions for r in small] == [r.questions for r in whole]
    assert small[0].image().size == (64, 64)
    assert sum(len(r.picture) for r in small) < sum(len(r.picture) for r in whole)
    assert subset(tmp_path / "talk", tmp_path / "none", 100, 64) == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["vlm.tune.mode=magic"], "vlm.tune.mode"),
        (["vlm.see.steps=-1"], "vlm.see.steps"),
        (["vlm.tower.patch_size=33"], "vlm.tower.patch_size: 33 does not divide"),
        (["vlm.model=/nowhere"], "vlm.model: no folder"),
        (["vlm.init=/nowhere"], "vlm.init: no state.safetensors"),
        (["vlm.colour=red"], "vlm.colour"),
        (["vlm.tune.often={nearset: 3}"], "vlm.tune.often: 'nearset' is unknown"),
        (["vlm.tune.often={nearest: 0}"], "vlm.tune.often"),
        (
            ["vlm.scenes=AD", "vlm.data=NEW"],
            "vlm.scenes: name one or more to train on, without D",
        ),
        (["vlm.scenes=Q", "vlm.data=NEW"], "vlm.scenes: 'Q' is no choice of scenes"),
    ],
)
def test_bad_words_are_one_line(
    words: list[str], said: str, llava: str, tmp_path: Path, capsys
) -> None:
    make(tmp_path / "talk" / "train", PLANS["train"], 6)
    common = [f"vlm.data={tmp_path / 'talk'}", f"out={tmp_path / 'run'}", *QUICK]
    if not words[0].startswith(("vlm.model", "vlm.tower")):
        common.append(f"vlm.model={llava}")
    words = [word.replace("NEW", str(tmp_path / "new")) for word in words]
    assert main(["train", "vlm", *common, *words]) == 2
    error = capsys.readouterr().err
    assert said in error and error.strip().splitlines()[-1].startswith("openhelix train: ")
