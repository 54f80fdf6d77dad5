"""DAgger: the student acts, experts label where it comes, training reads the result."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from openhelix.benchmarks.calvin.demonstrations import perform
from openhelix.benchmarks.calvin.env import PlayTableEnv
from openhelix.benchmarks.calvin.experts import Expert
from openhelix.benchmarks.calvin.frames import FramesConfig
from openhelix.benchmarks.calvin.phrases import training
from openhelix.benchmarks.calvin.starts import begin
from openhelix.benchmarks.calvin.tasks import is_completed
from openhelix.benchmarks.calvin.units import read_unit
from openhelix.benchmarks.evaluation import dagger as module
from openhelix.benchmarks.evaluation.dagger import (
    DaggerConfig,
    Labeller,
    chunk_of,
    dagger,
    main,
    parse,
)
from openhelix.runtime.core.config import ConfigError
from openhelix.runtime.core.interfaces import ActionChunk
from openhelix.system1.data import Cache
from tests.evaluation.small import small_config

TASKS = ("turn_on_led", "open_drawer")
STEPS, EVERY = 24, 8


def settings(folder: Path, **changes: Any) -> DaggerConfig:
    values: dict[str, Any] = {
        **{"out": folder, "scenes": "R2", "tasks": TASKS, "steps": STEPS, "every": EVERY},
        **{"beta": 0.0, "frames": FramesConfig(every=4, system2_px=20)},
    }
    return DaggerConfig(**{**values, **changes})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """Two attempts of a student that does not know its tasks, labelled."""
    folder = tmp_path_factory.mktemp("dagger") / "data"
    return folder, dagger(settings(folder), small_config())


def test_labels_are_what_experts_do_from_the_states_that_were_visited(
    made: tuple[Path, dict],
) -> None:
    folder, card = made
    about, found = read_unit(folder / "units" / "R2_00000.npz")
    assert sum(card["tried"].values()) == len(found) + sum(card["failed"].values())
    assert card["labels"] == len(found) >= 4
    for row, label in zip(about["demonstrations"], found, strict=True):
        assert label.success and row["at"] % EVERY == 0 and row["at"] < STEPS
        assert label.task == TASKS[row["rollout"]] and label.instruction in training()[label.task]
    for rollout in range(2):
        at = [r["at"] for r in about["demonstrations"] if r["rollout"] == rollout]
        assert at == sorted(set(at)) and at[0] == 0
    # The student goes its own way: a later label does not begin where an earlier one led.
    first, second = found[0], found[1]
    assert not np.allclose(first.proprio[EVERY, :3], second.proprio[0, :3], atol=0.005)


def test_training_reads_them(made: tuple[Path, dict]) -> None:
    folder, card = made
    about, found = read_unit(folder / "units" / "R2_00000.npz")
    cache = Cache(folder / "frames")
    assert len(cache) == card["frames"] <= 2 * len(found)
    expected = [
        (row["rollout"], row["at"] + local, label.steps - local)
        for row, label in zip(about["demonstrations"], found, strict=True)
        for local in (0, 4)
        if local < len(label.targets)
    ]
    shard = load_file(folder / "frames" / "R2_00000.safetensors")
    rollouts = shard["episode"] - shard["episode"].min()
    got = list(zip(rollouts, shard["step"], shard["steps_left"], strict=True))
    assert [tuple(map(int, row)) for row in got] == expected
    np.testing.assert_allclose(shard["proprio"][0, 0], found[0].proprio[0])
    np.testing.assert_allclose(shard["target_pose"][0, 0], found[0].targets[0, :7])
    assert (folder / "frames" / "system2" / "R2_00000.safetensors").exists()


def test_a_killed_round_goes_on_and_equal_settings_give_equal_labels(
    made: tuple[Path, dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, card = made
    config = settings(tmp_path / "again", frames=FramesConfig(every=0))
    again = dagger(config, small_config())
    assert again["sha256"] == card["sha256"]
    monkeypatch.setattr(module, "DaggerRunner", None)  # there is nothing left to run
    assert dagger(config, small_config())["new_units"] == 0
    with pytest.raises(ConfigError, match=r"beta: .* was begun with 0\.0"):
        dagger(settings(tmp_path / "again", beta=0.5), small_config())


def test_with_beta_one_the_expert_drives_and_succeeds(tmp_path: Path) -> None:
    config = settings(tmp_path / "expert", beta=1.0, steps=60, frames=FramesConfig(every=0))
    dagger(config, small_config())
    about, found = read_unit(tmp_path / "expert" / "units" / "R2_00000.npz")
    left = [
        [label.steps for row, label in zip(about["demonstrations"], found, strict=True)
         if row["rollout"] == rollout]
        for rollout in range(2)
    ]  # fmt: skip
    for steps in left:  # each label has about as many steps less to go as the expert drove
        assert all(b < a for a, b in pairwise(steps))
        assert steps[-1] <= EVERY + 4


def test_an_expert_takes_over_in_the_middle() -> None:
    """What is in the grip stays there; what is done already counts."""
    with PlayTableEnv("A", cameras=()) as env, PlayTableEnv("A", cameras=()) as copy:
        for task in ("lift_red_block_table", "rotate_blue_block_left", "move_slider_left"):
            begin(env, task, np.random.default_rng(3))
            start = before = info = env.get_info()
            expert, sent = Expert(task, "A", info), []
            for step in range(64):
                if step and step % 6 == 0:
                    copy.restore(env.state())
                    other = Expert(task, "A", info, start=start, before=before)
                    label = perform(copy, other, 96, record=True, start=start)
                    assert label.success, (task, step)
                    sent.append((step, label))
                move = expert.act(info)
                for at, label in sent:  # both mean the same, give or take the first steps
                    if 2 <= step - at < 6 and step - at < label.steps:
                        gap = label.targets[step - at, :3] - move.position
                        assert np.linalg.norm(gap) < 0.025, (task, at, step)
                env.advance(move.action())
                before, info = info, env.get_info()
                if is_completed(task, start, info):
                    break
            assert len(sent) >= 2


def test_a_dropped_block_is_fetched_again() -> None:
    with PlayTableEnv("B", cameras=()) as env:
        begin(env, "place_in_drawer", np.random.default_rng(1))
        start = env.get_info()
        hand = env.robot.tcp()
        for step in range(20):  # somebody opens the hand where it is
            env.advance((hand[0], hand[1], 1 if step > 2 else -1))
        info = env.get_info()
        assert not is_completed("place_in_drawer", start, info)
        label = perform(env, Expert("place_in_drawer", "B", info, start=start), 160, start=start)
        assert label.success


def test_a_labels_rest_is_a_chunk(made: tuple[Path, dict]) -> None:
    label = read_unit(made[0] / "units" / "R2_00000.npz")[1][0]
    like = ActionChunk(5, 7, np.zeros((16, 7)), np.zeros(16), 3, 2, 4)
    chunk = chunk_of(label, 4, like)
    np.testing.assert_allclose(chunk.poses[0], label.targets[4, :7])
    assert (chunk.t_start_ns, chunk.instruction_id, chunk.latent_seq) == (5, 3, 2)
    late = chunk_of(label, len(label.targets) + 9, like)
    np.testing.assert_allclose(late.poses, np.tile(label.targets[-1, :7], (16, 1)))


@pytest.mark.parametrize(
    "task", ["stack_block", "place_in_slider", "push_into_drawer", "unstack_block", "turn_on_led"]
)
def test_what_leads_to_a_task_can_be_done_and_leaves_the_task_to_be_done(
    task: str, tmp_path: Path
) -> None:
    """The student's part is played by an expert; then the wanted task alone is labelled."""
    labeller = Labeller(settings(tmp_path), "R2")
    doing, labelled = {"task": ""}, 0
    try:
        with PlayTableEnv("R2", cameras=()) as env:
            for seed in range(4):
                rng = np.random.default_rng(seed)
                doing["task"], state = labeller.lead(task, rng)
                assert doing["task"] != task
                env.restore(state)
                labeller.begin(env, task, rng, lambda: doing["task"])
                like = ActionChunk(5, 7, np.zeros((16, 7)), np.zeros(16), 3, 2, 4)
                assert labeller.visit(like) is like and not labeller.found
                expert = Expert(doing["task"], "R2", env.get_info())
                if not perform(env, expert, tail=0).success:
                    continue
                labeller.step(None)
                doing["task"] = task
                labeller.visit(like)
                labelled += len(labeller.found)
                assert all(at == 0 and label.task == task for label, at in labeller.found)
    finally:
        labeller.close()
    assert labelled >= 2


def test_without_labels_where_the_student_does_not_get_there(tmp_path: Path) -> None:
    config = settings(tmp_path / "led", led=1.0, frames=FramesConfig(every=0))
    card = dagger(config, small_config())
    assert card["labels"] == 0 and not card["tried"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["scenes=ABD"], "scenes.*D is held out"),
        (["scenes=R1,random:89999-90000"], "scenes.*R90000 is held out"),
        (["scenes=ABQ"], "no choice of scenes"),
        (["beta=1.5"], "beta"),
        (["every=2"], "every"),
        (["student={}"], "system1.policy"),
        (["format=calvin"], "format"),
        (["gamma=1"], "gamma"),
        (["system1.nonsense=1"], "system1.nonsense"),
        (["loud"], "loud"),
    ],
)
def test_bad_input(words: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse(words)


def test_words_find_their_place(tmp_path: Path) -> None:
    weights = tmp_path / "pair"
    weights.mkdir()
    (weights / "model.safetensors").write_bytes(b"w")
    words = ["scenes=A,random:0-1", "beta=0.5", "seed=4", f"system1.policy.options.path={weights}"]
    config, run, as_json = parse([*words, "--json"])
    assert config.scene_list == ("A", "R0", "R1") and config.beta == 0.5 and config.seed == 4
    assert run.system1.policy.options["path"] == str(weights) and as_json
    first = config.identity()["student"]
    (weights / "model.safetensors").write_bytes(b"other")
    assert parse(words)[0].identity()["student"] != first
    assert json.loads(json.dumps(first)) == first


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0 and "beta=0.3" in capsys.readouterr().out
