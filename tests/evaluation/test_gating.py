"""Fitting the gate: tapes of a small pair, examples, the threshold, and the file in use."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from openhelix.benchmarks.evaluation import gating
from openhelix.benchmarks.evaluation.gating import (
    GateConfig,
    Taped,
    attempts,
    choose,
    examples,
    fit,
    learned,
    read,
    record,
    replayed,
    save,
    score,
)
from openhelix.benchmarks.evaluation.runner import Runner
from openhelix.runtime.control.gate import FEATURES, look_at
from openhelix.runtime.core.config import ConfigError, RunConfig
from openhelix.runtime.core.interfaces import SpecMismatch
from tests.evaluation.small import small_config
from tests.fakes import PERIOD_NS
from tests.runtime.control.test_gate import AWAY, ELSEWHERE, HERE, gate_of
from tests.runtime.control.test_trigger import BASE_M, seen

RUN = RunConfig()
LOOKS = 16


def taped(changed: int | None, scene: str = "A", hand: float = 0.0) -> Taped:
    """An attempt at which somebody moves a block before look `changed`, and System 2 sees it."""

    def at(i: int) -> bool:
        return changed is not None and i >= changed

    views = [
        look_at(
            seen(3 * i, hand=(hand, 0.01 * i), blocks=AWAY if at(i) else HERE),
            "static",
            BASE_M,
            None,
        )
        for i in range(LOOKS)
    ]
    says = ["push_red_block_left" if at(i) else "push_blue_block_left" for i in range(LOOKS)]
    looks = [view for view in views if view is not None]
    return Taped(scene, "changing", looks, [1] * LOOKS, says, says, True)


def test_a_tape_comes_back_from_its_file(tmp_path: Path) -> None:
    made = taped(5)
    save(tmp_path / "a.npz", made)
    back = read(tmp_path / "a.npz")
    assert back is not None and (back.scene, back.kind) == ("A", "changing") and back.success
    assert (back.says, back.told, back.meant) == (made.says, made.told, made.meant)
    for one, other in zip(back.looks, made.looks, strict=True):
        assert one.t_ns == other.t_ns and (one.robot == other.robot).all()
        assert np.abs(one.seen - other.seen).max() < 1e-3
    save(tmp_path / "b.npz", None)
    assert read(tmp_path / "b.npz") is None


def test_an_example_is_whether_it_says_something_else_and_stays_with_it() -> None:
    made = taped(6)
    features, labels = examples(made)
    assert features.shape == (len(labels), len(FEATURES))
    first = labels[: LOOKS - 1]  # of the looks after the first one
    assert first.tolist() == [0.0] * 5 + [1.0] * 10
    flicker = replace(made, says=[s if i == 9 else made.says[0] for i, s in enumerate(made.says)])
    assert not examples(flicker)[1].any()
    other = replace(made, told=[1] * 3 + [2] * (LOOKS - 3))
    assert len(examples(other)[1]) < len(labels)


def test_when_what_is_meant_changes_under_one_instruction() -> None:
    assert taped(None).changed_ns() is None
    assert taped(6).changed_ns() == 18 * PERIOD_NS
    other = replace(taped(6), told=[1] * 6 + [2] * (LOOKS - 6))
    assert other.changed_ns() is None


def test_what_a_gate_would_have_asked_is_scored() -> None:
    tapes = [taped(6), taped(None)]
    keen = replace(gate_of(ELSEWHERE, -0.5), threshold=0.5)
    assert replayed(tapes[0], keen, RUN)[0] == 0 and len(replayed(tapes[0], keen, RUN)) == 2
    assert replayed(tapes[1], keen, RUN) == [0]
    found = score(tapes, [keen, keen], RUN, 30)
    assert (found["changes"], found["seen"], found["recall"]) == (1, 1, 1.0)
    assert found["latents_per_task"] == 1.5 and found["latents_per_task_at_cadence"] == 2.0
    assert (found["asked"], found["right"], found["precision"]) == (1, 1, 1.0)
    deaf = replace(keen, threshold=1.1)
    assert score(tapes, [deaf, deaf], RUN, 30)["recall"] == 0.0


def test_the_threshold_is_the_highest_with_enough_recall() -> None:
    def one(recall: float, latents: float) -> dict[str, float]:
        return {"recall": recall, "latents_per_task": latents, "latents_per_task_at_cadence": 2.0}

    rows = [one(1.0, 4.0), one(0.9, 2.0), one(0.8, 1.5), one(0.4, 1.0)]
    assert choose(rows, 0.8) == 2 and choose(rows, 0.95) == 0
    assert choose(rows[1:], 0.95) == 0  # the most there is at the cadence's price


def test_a_gate_is_fitted_and_scored_on_scenes_left_out() -> None:
    tapes = [taped(5, "A"), taped(None, "A", 0.1), taped(8, "B", 0.05), taped(None, "B")]
    config = GateConfig(scenes="AB", changing=2, plain=0)
    made = learned(config, tapes, RUN, "me")
    assert made.system2 == "me" and made.threshold in gating.THRESHOLDS
    out = made.about["scenes_left_out"]
    assert isinstance(out, dict) and out["changes"] == out["seen"] == 2
    features, labels = examples(tapes[0])
    given = [made.probability(row) for row in features]
    assert min(np.array(given)[labels == 1]) > max(np.array(given)[labels == 0])
    again = fit(features, labels, 4, 0, "me")
    assert (again.hidden == fit(features, labels, 4, 0, "me").hidden).all()


def test_fewer_attempts_are_the_first_of_more() -> None:
    many = attempts(GateConfig(scenes="AB", changing=8, plain=2))
    few = attempts(GateConfig(scenes="AB", changing=4, plain=2))
    assert len(many) == 12 and len(few) == 8
    assert {(kind, e.key) for _, kind, e in few} <= {(kind, e.key) for _, kind, e in many}
    assert [turn for turn, *_ in many] == sorted(turn for turn, *_ in many)
    assert {e.scene for _, _, e in many} == {"A", "B"}


@pytest.mark.parametrize("scenes", ["AD", "A", "AR90000"])
def test_held_out_scenes_and_a_single_one_are_refused(scenes: str) -> None:
    with pytest.raises(ValueError, match="scenes"):
        GateConfig(scenes=scenes)


def test_a_pair_is_recorded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gating, "named", lambda _, latents: ["turn_on_led"] * len(latents))
    config = GateConfig(scenes="AB", changing=2, plain=0, steps=40, out=tmp_path)
    lines: list[str] = []
    tapes, system2 = record(config, small_config(), lines.append)
    assert len(lines) == 2 and 1 <= len(tapes) <= 2 and system2
    assert all(len(tape.looks) == len(tape.says) == len(tape.meant) for tape in tapes)
    steps = np.diff([look.t_ns for look in tapes[0].looks]) / PERIOD_NS
    assert (np.round(steps) == 3).all()
    again, _ = record(config, small_config(), lines.append)
    assert len(lines) == 2 and [tape.says for tape in again] == [tape.says for tape in tapes]
    with pytest.raises(ConfigError, match=r"out: .* holds another recording"):
        record(config.model_copy(update={"steps": 60}), small_config(), lines.append)


def test_an_evaluation_with_the_gate_of_another_system_2_is_refused(tmp_path: Path) -> None:
    gate_of(ELSEWHERE, -1.5, "another").save(tmp_path / "gate.json")
    weights = f"system2.trigger_weights={tmp_path / 'gate.json'}"
    with pytest.raises(SpecMismatch, match="was fitted to System 2 another"):
        Runner(small_config("system2.trigger=learned", weights))


def test_the_pair_is_recorded_at_its_cadence_alone() -> None:
    with pytest.raises(ConfigError, match=r"system2\.trigger: change; while it is recorded"):
        gating.main(["system2.trigger=change"])
