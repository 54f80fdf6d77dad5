"""CALVIN-R: a sentence means what the state makes it mean, and nothing where that is unclear."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from openhelix.benchmarks.calvin.env import PlayTableEnv
from openhelix.benchmarks.calvin.expert_control import View
from openhelix.benchmarks.calvin.starts import StartError, feasible
from openhelix.benchmarks.calvin.tasks import TASK_NAMES, get_task
from openhelix.benchmarks.evaluation.referring import (
    REFERENCES,
    NoSuchReference,
    begin,
    blind_chance,
    get_reference,
    pictures,
    referred,
    resolved,
    whole_view,
)
from openhelix.benchmarks.evaluation.runner import stage
from openhelix.benchmarks.evaluation.suites import Episode, Suite
from tests.calvin.test_table_talk import (
    VIEW,
)  # red in the drawer, blue left, pink in the cabinet


def means(name: str, view=VIEW) -> str | None:
    return get_reference(name).resolve(view)


def test_the_state_decides() -> None:
    assert means("push_leftmost_right") == "push_blue_block_right"
    assert means("lift_leftmost") == "lift_blue_block_table"
    assert means("lift_rightmost") == "lift_red_block_drawer"
    assert means("lift_middle") == "lift_pink_block_slider"
    assert means("lift_on_table") == "lift_blue_block_table"
    assert means("lift_in_drawer") == "lift_red_block_drawer"
    assert means("rotate_near_button_left") == "rotate_blue_block_left"
    assert means("toggle_bulb") == "turn_off_lightbulb" and means("toggle_led") == "turn_on_led"
    assert means("other_side") == "move_slider_right"
    assert means("drawer_other_way") == "close_drawer"
    swapped = {**VIEW.xyz, "blue": VIEW.xyz["red"], "red": VIEW.xyz["blue"]}
    other = replace(VIEW, xyz=swapped, place={"red": "table", "blue": "drawer", "pink": "cabinet"})
    assert means("push_leftmost_right", other) == "push_red_block_right"
    assert means("toggle_bulb", replace(VIEW, bulb="off")) == "turn_on_lightbulb"
    assert means("other_side", replace(VIEW, door="right")) == "move_slider_left"


def test_what_is_unclear_means_nothing() -> None:
    assert means("push_rightmost_left") is None  # it lies in the drawer
    two = replace(VIEW, place={**VIEW.place, "pink": "table"})
    assert means("lift_on_table", two) is None
    close = replace(VIEW, xyz={**VIEW.xyz, "pink": (-0.21, 0.08, 0.46)})
    assert means("lift_leftmost", close) is None
    held = replace(VIEW, place={**VIEW.place, "blue": "gripper"}, holds="blue")
    assert means("lift_leftmost", held) is None
    assert means("drawer_other_way", replace(VIEW, drawer=None)) is None
    assert means("other_side", replace(VIEW, door=None)) is None


def test_references_are_about_tasks_that_exist() -> None:
    assert len(REFERENCES) >= 30
    for name, reference in REFERENCES.items():
        assert name == reference.name and len(set(reference.sentences)) == len(reference.sentences)
        assert len(reference.tasks) >= 2 and set(reference.tasks) <= set(TASK_NAMES)
        for sentence in reference.sentences:
            assert not any(colour in sentence.split() for colour in ("red", "blue", "pink"))
    with pytest.raises(NoSuchReference, match="did you mean 'push_"):
        get_reference("push_uppermost")


def test_only_what_can_be_done_is_meant() -> None:
    assert resolved(VIEW, ["turn_on_led", "push_blue_block_right"]).keys() == {
        "toggle_led", "push_leftmost_right", "push_on_table_right", "push_near_button_right",
    }  # fmt: skip


def test_a_balanced_list_cannot_be_guessed() -> None:
    episodes = referred(("D",), count=2)
    assert episodes == referred(("D",), count=2) and len({e.key for e in episodes}) == len(episodes)
    assert episodes != referred(("D",), count=2, seed=1)
    for name in REFERENCES:
        tasks = Counter(e.task for e in episodes if e.reference == name)
        assert set(tasks.values()) == {2}
    each = [1 / len(r.tasks) for r in REFERENCES.values() for _ in r.tasks]
    assert blind_chance(episodes) == pytest.approx(sum(each) / len(each))
    assert blind_chance(referred(references=("toggle_bulb",))) == 0.5


@pytest.mark.parametrize(
    "name", ["push_leftmost_right", "lift_in_cabinet", "toggle_led", "drawer_other_way"]
)
def test_a_start_gives_the_sentence_its_meaning(name: str) -> None:
    for episode in referred(("A",), references=(name,)):
        env = PlayTableEnv("A", cameras=())
        try:
            info = begin(env, name, episode.task, np.random.default_rng(list(episode.draw)))
            view = whole_view(info, env.scene)
            assert get_reference(name).resolve(view) == episode.task
            assert episode.task in feasible(View(env.scene, info))
        finally:
            env.close()


def test_the_suite_is_the_balanced_list() -> None:
    suite = Suite("calvin-r", scenes=("A",), count=1, tasks=("turn_on_led", "turn_off_led"))
    episodes = suite.episodes()
    assert [e.tasks for e in episodes] == [("turn_on_led",), ("turn_off_led",)]
    assert {e.groups["reference"] for e in episodes} == {"toggle_led"}
    assert {e.instructions[0] for e in episodes} <= set(get_reference("toggle_led").sentences)
    whole = Suite("calvin-r", count=1).episodes()
    assert len(whole) == sum(len(r.tasks) for r in REFERENCES.values())
    assert [e.index for e in whole] == list(range(len(whole)))
    with PlayTableEnv("A", cameras=()) as env:
        stage(env, Episode.from_json(json.loads(json.dumps(episodes[0].to_json()))))
        assert not env.led
        stage(env, episodes[1])
        assert env.led


def test_plain_words_for_the_same_starts_are_paired_with_them() -> None:
    look, plain = (Suite("calvin-r", count=1, plain=said).episodes() for said in (False, True))
    starts, same = ([replace(e, instructions=()) for e in made] for made in (look, plain))
    assert starts == same
    assert all(e.instructions == (get_task(e.tasks[0]).sentence,) for e in plain)
    assert not {e.instructions for e in look} & {e.instructions for e in plain}


def test_pictures_show_what_the_sentence_is_about() -> None:
    episodes = referred(("A",), references=("toggle_led",))
    shown = list(pictures(episodes))
    assert [e for e, _ in shown] == episodes
    green = [int(((p[..., 1] > 200) & (p[..., 0] < 90) & (p[..., 2] < 90)).sum()) for _, p in shown]
    lit = {e.task: n for (e, _), n in zip(shown, green, strict=True)}
    assert lit["turn_off_led"] > 10 > lit["turn_on_led"] == 0
    again = [p for _, p in pictures(episodes)]
    assert all((a == b).all() for (_, a), b in zip(shown, again, strict=True))


def test_a_start_that_is_never_found_is_left_out(monkeypatch, caplog) -> None:
    episodes = referred(("A",), references=("toggle_led",))

    def never(env: object, name: str, task: str, rng: object) -> None:
        if task == "turn_on_led":
            raise StartError("reference: no start")

    monkeypatch.setattr("openhelix.benchmarks.evaluation.referring.begin", never)
    assert [e.task for e, _ in pictures(episodes)] == ["turn_off_led"]
    assert "left out" in caplog.text
