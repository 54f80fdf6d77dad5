"""CALVIN-R, changing: the change comes, the right task with it, and the wrong one ends it."""

from __future__ import annotations

import json

import numpy as np
import pytest

from openhelix.benchmarks.calvin.cameras import SceneRenderer
from openhelix.benchmarks.calvin.demonstrations import perform, random_expert
from openhelix.benchmarks.calvin.env import PlayTableEnv
from openhelix.benchmarks.calvin.tasks import TASK_NAMES, get_task
from openhelix.benchmarks.evaluation import changing
from openhelix.benchmarks.evaluation.eval import load_config
from openhelix.benchmarks.evaluation.evaluation import Evaluation, evaluate
from openhelix.benchmarks.evaluation.oracle import OracleEngine, ToldGoals, other_pictures
from openhelix.benchmarks.evaluation.pool import LocalPool
from openhelix.benchmarks.evaluation.referring import get_reference, whole_view
from openhelix.benchmarks.evaluation.report import to_markdown
from openhelix.benchmarks.evaluation.results import changes, reaction, read_results
from openhelix.benchmarks.evaluation.runner import Conditions, Runner, TaskPolicy
from openhelix.benchmarks.evaluation.staging import Starts, stage
from openhelix.benchmarks.evaluation.suites import Episode, Suite
from openhelix.runtime.cli.main import main
from openhelix.runtime.control.trigger import ChangeTrigger
from openhelix.runtime.core.config import System2Config
from openhelix.runtime.core.interfaces import Observation
from openhelix.runtime.robots.base import INSTEAD
from tests.evaluation.small import TaskReach, WordEngine, small_config
from tests.fakes import PERIOD_NS
from tests.runtime.control.test_gate import ELSEWHERE, gate_of
from tests.runtime.control.test_goals import observation


@pytest.fixture(scope="module")
def env():
    with PlayTableEnv("D", cameras=()) as made:
        yield made


def episode(reference: str, task: str) -> Episode:
    suite = Suite("calvin-r", count=1, seed=3, changing=True)
    key = f"D/{reference}/{task}/0"
    return next(e for e in suite.episodes() if e.key == key)


def wave(env: PlayTableEnv, steps: int) -> None:
    """Move the hand up and down, away from everything."""
    info = env.get_info()["robot_info"]
    x, y, z = info["tcp_pos"]
    for step in range(steps):
        env.advance(((x, y, z + 0.02 * (step % 2 + 1)), info["tcp_orn"], 1))


def does(env: PlayTableEnv, task: str) -> bool:
    return perform(env, random_expert(env, task, np.random.default_rng(5))).success


@pytest.mark.parametrize(
    ("reference", "task", "what"),
    [
        ("toggle_led", "turn_off_led", "led"),
        ("toggle_bulb", "turn_on_lightbulb", "bulb"),
        ("other_side", "move_slider_left", "door"),
        ("drawer_other_way", "close_drawer", "drawer"),
        ("lift_on_table", "lift_pink_block_table", "swap"),
    ],
)
def test_what_is_meant_changes_after_the_hand_has_set_out(env, reference, task, what) -> None:
    change = stage(env, episode(reference, task))
    assert isinstance(change, changing.Change) and env.referee is change
    steps, of = change.about[3], get_reference(reference)
    try:
        before = of.resolve(whole_view(env.get_info(), env.scene))
        assert before == change.before != task and change.what.split()[0] == what
        still = env.get_info()["robot_info"]
        for _ in range(40):  # the hand stays: nothing happens
            env.advance((still["tcp_pos"], still["tcp_orn"], 1))
        assert not change.done and change.right == before
        wave(env, steps - 1)
        assert not change.done
        wave(env, 8)
        assert change.done and change.right == task
        assert of.resolve(whole_view(env.get_info(), env.scene)) == task
        assert change.completed(env.get_info()) == frozenset()  # nobody has done anything yet
    finally:
        change.close()
    assert env.referee is None


def test_the_task_that_is_right_then_succeeds_and_what_was_right_before_does_not(env) -> None:
    for right in (True, False):
        change = stage(env, episode("lift_on_table", "lift_red_block_table"))
        assert isinstance(change, changing.Change)
        wave(env, change.about[3] + 10)
        assert change.done
        task = change.after if right else change.before
        # What lies in the cabinet now is lifted from there: the other block on the table counts.
        moved = task if right else task.replace("_table", "_slider")
        done = does(env, moved)
        found = change.completed(env.get_info())
        change.close()
        if right:
            assert done and found == {change.after}
        else:
            assert found == frozenset()  # lifted from the cabinet: not what was meant before


def test_doing_afterwards_what_was_meant_before_ends_the_attempt(env) -> None:
    change = stage(env, episode("lift_leftmost", "lift_pink_block_table"))
    assert isinstance(change, changing.Change) and change.before.endswith("_table")
    wave(env, change.about[3] + 10)
    assert change.done and does(env, change.before)
    assert change.completed(env.get_info()) == {INSTEAD + change.before}
    change.close()


def test_what_is_done_before_the_change_counts_and_then_none_comes(env) -> None:
    made = stage(env, episode("toggle_led", "turn_on_led"))
    assert isinstance(made, changing.Change)
    made.close()
    change = changing.Change(env, made.what, made.before, made.after, after_steps=10_000)
    change.begin(env.get_info())
    assert does(env, change.before)
    assert change.completed(env.get_info()) == {change.after}
    change._left = 1
    wave(env, 2)
    assert change.done and change.right == change.before
    change.close()


def test_the_list_is_balanced_and_travels_as_plain_data() -> None:
    plain, made = (Suite("calvin-r", count=1, changing=c) for c in (False, True))
    assert [e.key for e in made.episodes()] == [e.key for e in plain.episodes()]
    assert all(e.changing for e in made.episodes())
    assert made.identity()["changing"] and not plain.identity()["changing"]
    assert "changing" not in Suite("tasks").identity()
    first = made.episodes()[0]
    assert Episode.from_json(json.loads(json.dumps(first.to_json()))) == first


def look(env: PlayTableEnv, renderer: SceneRenderer, step: int) -> Observation:
    hand = [*env.get_info()["robot_info"]["tcp_pos"], 0.0, 0.0, 0.0, 1.0]
    t_ns = step * PERIOD_NS
    frame = renderer.render(env.visual_state())["static"].camera_frame(t_ns)
    return Observation(t_ns, {"static": frame}, np.array(hand), 0.08, True, np.zeros(7))


def test_a_change_is_noticed_and_the_arm_alone_is_not(env) -> None:
    change = stage(env, episode("toggle_bulb", "turn_on_lightbulb"))
    system2 = System2Config()
    trigger = ChangeTrigger("static", 0.2, 100.0, system2.trigger_base_m)
    trigger.begin()
    renderer, asked = SceneRenderer("D", ("static",)), []
    came = None
    for step in range(change.about[3] + 40):
        wave(env, 1)
        came = step if came is None and change.done else came
        if trigger.due(look(env, renderer, step)):
            asked.append(step)
    change.close()
    assert came is not None and len(asked) == 2 and asked[0] == 0
    assert came < asked[1] <= came + 12


def test_how_soon_a_change_is_known_is_in_the_results() -> None:
    assert reaction([]) == {}
    assert reaction([None, None])["reaction_steps"] == {
        "n": 2,
        "never": 2,
        "p50": None,
        "p90": None,
    }
    found = reaction([4, None, *range(1, 10)])["reaction_steps"]
    assert found == {"n": 11, "never": 1, "p50": 5, "p90": 9}


def test_what_was_missed_is_counted_by_kind() -> None:
    rows = [
        {"change": kind, "looked_steps": steps, "success": steps == 4}
        for kind, steps in (("swap", 4), ("led", None), ("swap", 9), ("led", 5))
    ]
    assert changes(rows)["changes"] == {
        **{"n": 4, "seen": 3, "missed": 1, "p50": 5, "p90": 9, "succeeded": 1},
        "by_kind": {"led": {"n": 2, "seen": 1}, "swap": {"n": 2, "seen": 2}},
    }
    assert changes([]) == {}


@pytest.mark.parametrize("trigger", ["change", "learned", "cadence"])
def test_when_system_2_was_asked_after_a_change_is_reported(trigger: str, tmp_path) -> None:
    suite = Suite("calvin-r", count=1, seed=3, changing=True, tasks=("turn_off_led",))
    gate_of(ELSEWHERE, -1.5, WordEngine().spec.spec_id).save(tmp_path / "gate.json")
    weights = f"system2.trigger_weights={tmp_path / 'gate.json'}"
    more = [weights] if trigger == "learned" else []
    config = small_config(f"system2.trigger={trigger}", *more)
    pool = LocalPool(config)
    try:
        plan = Evaluation(suite, Conditions(steps_limit=90, interval=40), config)
        report = evaluate(plan, pool, tmp_path / "results")
    finally:
        pool.close()
    [row] = read_results(tmp_path / "results")[0]["tasks"]
    assert row["change"] == "led" and row["looked_steps"] <= row["reaction_steps"]
    came, text = report["work"]["changes"], to_markdown(report)
    assert came["by_kind"] == {"led": {"n": 1, "seen": 1}} and came["p90"] == row["looked_steps"]
    assert "| changes shown to System 2 | 1 of 1 (led 1 of 1) |" in text
    if trigger != "cadence":
        assert row["looked_steps"] <= 12 and row["alarms"] == report["work"]["alarms"] == 0
        said = {"change": "somebody changes the scene", "learned": "a gate expects another answer"}
        assert f"System 2 when {said[trigger]}" in text
        assert "| asked though nothing had changed, per task | 0.00 |" in text
    else:
        assert "alarms" not in row and "alarms" not in report["work"]


def test_a_kept_start_is_the_same_start(env) -> None:
    starts, asked = Starts(), episode("toggle_led", "turn_on_led")
    seen = []
    for _ in range(2):
        change = stage(env, asked, starts)
        assert isinstance(change, changing.Change)
        wave(env, 5)
        seen.append((change.about, env.visual_state().tolist()))
        change.close()
    assert seen[0] == seen[1]


def test_a_policy_without_system_2_is_told_what_is_right_at_each_plan() -> None:
    runner = Runner(small_config("system1.policy={target: 'tests.evaluation.small:TaskReach'}"))
    try:
        asked = episode("toggle_led", "turn_off_led")
        runner.run(asked, Conditions(steps_limit=60, interval=10))
        policy = runner._policy
        assert isinstance(policy, TaskPolicy) and isinstance(policy.inner, TaskReach)
        told = [TASK_NAMES[index] for index in dict.fromkeys(policy.inner.told)]
        assert told == ["turn_on_led", "turn_off_led"]
    finally:
        runner.close()


def test_the_oracle_knows_no_more_than_when_it_was_asked() -> None:
    teller = OracleEngine({"target": "tests.evaluation.small:WordEngine", "options": {}})
    goals = ToldGoals(teller, teller, "static", interval=10, latency=2)
    right = ["open_drawer"]
    teller.task = lambda: right[-1]
    latents = {
        name: teller.encode([observation(0).frames["static"].rgb], [get_task(name).sentence])[0]
        for name in ("open_drawer", "close_drawer")
    }
    goals.begin(1, "move the drawer")
    named = []
    for tick in range(15):
        if tick == 5:
            right.append("close_drawer")
        seen = observation(tick)
        goals.update(seen, seen.frames["static"].t_ns)
        if goals.recent:
            z = goals.filled(goals.recent[-1]).z
            named.append((tick, *(t for t, told in latents.items() if np.array_equal(z, told))))
    assert named == [
        *((t, "open_drawer") for t in range(2, 12)),
        *((t, "close_drawer") for t in range(12, 15)),
    ]
    assert goals.instruction == "move the drawer"


def test_what_system_2_is_shown(tmp_path) -> None:
    black = load_config((), sees="black").system2.engine
    assert black.options["blind"] is True
    assert load_config((), sees="none").system2.engine.options["shown"] == "none"
    others = load_config((), sees="shuffled").system2.engine.options["shown"]
    pictures = np.load(others)
    assert others == str(other_pictures(("D",))) and pictures.shape[1:] == (200, 200, 3)
    assert len({p.tobytes() for p in pictures}) == len(pictures) > 10
    told = load_config((), sees="oracle").system2.engine
    assert told.target.endswith(":OracleEngine")
    assert told.options["engine"] == load_config(()).system2.engine.model_dump()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--sees", "half"), "--sees: 'half' is none of image, black"),
        (("--sees", "oracle", "--clock", "realtime"), "lockstep clock alone"),
        (("--changing",), "--changing: tasks does not use it; it is of calvin-r"),
    ],
)
def test_mistakes_are_one_line(words, message, capsys) -> None:
    assert main(["eval", "--suite", "tasks", *words]) == 2
    said = capsys.readouterr().err.strip()
    assert message in said and "\n" not in said


def test_it_needs_a_world_that_can_be_meddled_with() -> None:
    with pytest.raises(ValueError, match="--changing needs playtable"):
        Suite("calvin-r", world="calvin", changing=True)
