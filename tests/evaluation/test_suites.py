"""openhelix.benchmarks.evaluation.suites: what is asked of a policy."""

from __future__ import annotations

import json

import pytest

from openhelix.benchmarks.calvin.motions import PATTERNS
from openhelix.benchmarks.calvin.phrases import calvin_e
from openhelix.benchmarks.calvin.sequences import get_sequences
from openhelix.benchmarks.calvin.tasks import TASK_NAMES, TASKS
from openhelix.benchmarks.evaluation.suites import (
    BEGUN,
    FIXTURES,
    GRASP_TASKS,
    SUITES,
    Episode,
    Suite,
    spread,
)


@pytest.mark.parametrize("name", SUITES)
def test_the_same_settings_give_the_same_episodes(name):
    first, second = (Suite(name, scenes=("A", "D"), count=2, seed=5).episodes() for _ in range(2))
    assert first == second
    assert [e.index for e in first] == list(range(len(first)))
    assert len({e.key for e in first}) == len(first)
    assert {e.scene for e in first} == {"A", "D"}


@pytest.mark.parametrize("name", SUITES)
def test_an_episode_survives_json(name):
    for episode in Suite(name, count=1).episodes()[:12]:
        assert Episode.from_json(json.loads(json.dumps(episode.to_json()))) == episode


def test_tasks_has_every_task_as_often_as_asked():
    episodes = Suite("tasks", count=3).episodes()
    assert [sum(e.tasks == (t,) for e in episodes) for t in TASK_NAMES] == [3] * 34
    assert {e.instructions[0] for e in episodes} == {t.sentence for t in TASKS.values()}
    assert len({e.draw for e in episodes}) == len({e.seed for e in episodes}) == 102


def test_a_start_depends_on_the_seed():
    a, b = (Suite("tasks", count=1, seed=seed).episodes() for seed in (0, 1))
    assert all(x.draw != y.draw and x.seed != y.seed for x, y in zip(a, b, strict=True))


def test_chains_are_calvins():
    episodes = Suite("calvin", count=7).episodes()
    assert [e.tasks for e in episodes] == [tasks for _, tasks in get_sequences(7)]
    assert [e.sequence for e in episodes] == list(range(7))
    assert episodes[0].instructions == tuple(TASKS[t].sentence for t in episodes[0].tasks)


def test_calvin_e_says_the_same_chains_in_words_of_the_split():
    plain = Suite("calvin", count=5).episodes()
    for split in ("seen", "unseen"):
        rich = Suite("calvin-e", count=5, phrases=split).episodes()
        assert [e.tasks for e in rich] == [e.tasks for e in plain]
        known = calvin_e(split)
        for episode in rich:
            pairs = zip(episode.tasks, episode.instructions, strict=True)
            assert all(text in known[task] for task, text in pairs)
    other = Suite("calvin-e", count=5, seed=1).episodes()
    assert [e.instructions for e in other] != [e.instructions for e in rich]


def test_calvin_e_reads_a_users_file(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({name: [f"please do {name}"] for name in TASK_NAMES}))
    (episode,) = Suite("calvin-e", count=1, phrases=str(path)).episodes()
    assert episode.instructions == tuple(f"please do {name}" for name in episode.tasks)
    path.write_text(json.dumps({"open_drawer": ["open it"]}))
    with pytest.raises(ValueError, match="rotate_red_block_right"):
        Suite("calvin-e", phrases=str(path))


def test_calvin_d_moves_the_block_to_grasp_from_the_same_starts():
    episodes = Suite("calvin-d", count=1, speeds=("paper", "x5")).episodes()
    assert len(episodes) == len(GRASP_TASKS) * (1 + 2 * (len(PATTERNS) - 1))
    mine = [e for e in episodes if e.tasks == ("lift_pink_block_slider",)]
    assert {e.motion.block for e in mine} == {"block_pink"}
    assert len({e.draw for e in mine}) == 1 and len({e.seed for e in mine}) == len(mine)
    assert {e.groups["pattern"] for e in mine} == set(PATTERNS)
    slow, fast = (
        next(e.motion for e in mine if e.groups["motion"] == f"left {s}") for s in ("paper", "x5")
    )
    assert fast.speed_m_s == pytest.approx(5 * slow.speed_m_s) and slow.speed_m_s > 0


def test_switch_has_a_second_task_that_the_first_does_not_touch():
    found = Suite("switch", count=3).episodes()
    assert {e.tasks[0] for e in found} == set(BEGUN)
    assert {e.tasks[1] for e in found} == {task for tasks in FIXTURES.values() for task in tasks}
    for e in found:
        (fixture,) = (name for name, tasks in FIXTURES.items() if e.tasks[1] in tasks)
        assert fixture not in e.tasks[0] and 8 <= e.switch_steps <= 30 and e.uncounted == 1
        assert [a.replaced_after for a in e.assignments] == [e.switch_steps, 0]
        assert e.instructions == tuple(a.instruction for a in e.assignments)


def test_episodes_to_film_are_spread_over_the_list():
    episodes = Suite("tasks", count=1).episodes()
    assert spread(episodes, 3) == {0, 16, 33} and spread(episodes, 0) == set()
    assert spread(episodes, 99) == set(range(34))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"name": "calvn"}, "--suite: 'calvn' is none of tasks, calvin"),
        ({"name": "tasks", "world": "mars"}, "--world: no world 'mars'"),
        ({"name": "tasks", "tasks": ("fly",)}, "--tasks: 'fly'"),
        ({"name": "calvin", "tasks": ("open_drawer",)}, "CALVIN's chains"),
        ({"name": "calvin-d", "tasks": ("open_drawer",)}, "lift_red_block_table"),
        ({"name": "calvin-d", "patterns": ("zigzag",)}, "--patterns: 'zigzag'"),
        ({"name": "calvin-d", "speeds": ("fast",)}, "--speeds: 'fast'"),
        ({"name": "calvin-d", "speeds": ("-1",)}, "--speeds: '-1'"),
        ({"name": "calvin-d", "world": "calvin"}, "needs playtable"),
        ({"name": "calvin", "count": 1001}, "--sequences: 1001"),
        ({"name": "tasks", "count": 0}, "--episodes-per-task: 0"),
        ({"name": "tasks", "scenes": ("E",)}, "E"),
        ({"name": "tasks", "scenes": ()}, "--scene"),
        ({"name": "tasks", "seed": -1}, "--seed: -1"),
        ({"name": "calvin-r", "changing": True, "plain": True}, "--plain: not with --changing"),
        ({"name": "calvin-e", "phrases": "/nowhere.json"}, "nowhere"),
    ],
)
def test_wrong_settings_are_told_in_one_line(wrong, message):
    with pytest.raises(ValueError) as caught:
        Suite(**wrong)
    assert message in str(caught.value) and "\n" not in str(caught.value)
