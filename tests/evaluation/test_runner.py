"""openhelix.benchmarks.evaluation.runner: one episode in lockstep."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest

from openhelix.benchmarks.calvin.tasks import TASK_NAMES, TASKS
from openhelix.benchmarks.evaluation.runner import Conditions, Runner
from openhelix.benchmarks.evaluation.suites import Episode, Suite
from openhelix.runtime.cli.main import main
from openhelix.runtime.control.goals import LockstepGoals
from openhelix.runtime.core.config import ConfigError
from openhelix.runtime.core.interfaces import CameraSpec, SpecMismatch
from openhelix.runtime.robots.env import PlayTableRobot
from tests.evaluation.small import CAMERAS, WordEngine, small_config, untimed
from tests.fakes import ReachPolicy

LED = TASKS["turn_on_led"].sentence


@pytest.fixture(scope="module")
def runner():
    found = Runner(small_config())
    yield found
    found.close()


def chain(*tasks: str, sequence: int = 2, **changes) -> Episode:
    """A chain from a CALVIN layout; in that of sequence 2 the LED is off."""
    words = tuple(TASKS[t].sentence for t in tasks)
    values = {"index": 0, "key": "D/x", "scene": "D", "tasks": tasks, "instructions": words}
    return Episode(**(values | {"seed": 7, "sequence": sequence} | changes))


def run(runner, episode, **conditions):
    return runner.run(episode, Conditions(**({"steps_limit": 40, "interval": 10} | conditions)))


def test_a_policy_whose_plans_cannot_be_joined_so_is_refused_before_any_episode():
    config = small_config()
    system1 = config.system1.model_copy(update={"join": "prefix"})
    with pytest.raises(SpecMismatch, match=r"system1\.join: 'prefix'; this policy can blend"):
        Runner(config.model_copy(update={"system1": system1}))


class GoingPolicy(ReachPolicy):
    """Goes on from what is being executed, and remembers how often it was asked to."""

    def __init__(self, cameras):
        super().__init__(cameras=cameras)
        self.spec = replace(self.spec, joins=("blend", "inpaint"))
        self.given = []

    def go_on(self, observation, latents, plan, given, join):
        assert latents[-1].z.size and join == "inpaint"  # filled, though computed on demand
        self.given.append(given)
        return self.act(observation, latents)


def test_chunks_go_on_from_the_plan_in_an_evaluation_too():
    config = small_config()
    system1 = config.system1.model_copy(update={"join": "inpaint"})
    cameras = [CameraSpec("static", 200, 200), CameraSpec("gripper", 84, 84)]
    policy = GoingPolicy(cameras)
    runner = Runner(config.model_copy(update={"system1": system1}), policy=policy)
    try:
        result = run(runner, chain("turn_on_led"), delay=3).result
    finally:
        runner.close()
    assert result["error"] is None and result["success"]
    assert policy.given and set(policy.given) == {3}
    assert policy.calls > len(policy.given)  # the first plan follows nothing


def test_a_policy_that_can_is_seen_to_succeed(runner):
    result = run(runner, chain("turn_on_led")).result
    (row,) = result["tasks"]
    assert result["success"] and result["in_a_row"] == 1 and result["error"] is None
    assert row["reason"] == "success" and 3 < row["env_steps"] < 40 and row["hold_steps"] == 0


def test_a_chain_ends_at_its_first_failure(runner):
    result = run(runner, chain("turn_on_led", "open_drawer", "turn_on_led")).result
    assert [row["task"] for row in result["tasks"]] == ["turn_on_led", "open_drawer"]
    assert result["in_a_row"] == 1 and not result["success"]
    assert result["tasks"][1]["env_steps"] == 40
    assert result["tasks"][1]["reason"] == "step limit"


def test_a_sentence_that_replaces_another_is_what_counts(runner):
    pair = chain("open_drawer", "turn_on_led")
    result = run(runner, replace(pair, switch_steps=9), latency=4).result
    (row,) = result["tasks"]
    assert row["task"] == "turn_on_led" and row["success"] and result["success"]
    assert row["replaced"] == {
        "task": "open_drawer",
        "success": None,
        "env_steps": 9,
        "reason": "replaced",
    }
    assert row["reaction_steps"] == row["hold_steps"] >= 4  # until its own latent came
    first, *_ = run(runner, replace(chain("turn_on_led", "open_drawer"), switch_steps=39)).result[
        "tasks"
    ]
    assert first["replaced"]["success"] and first["replaced"]["reason"] == "success"
    assert first["task"] == "open_drawer" and not first["success"]


def test_who_never_gets_to_the_second_sentence_has_failed(runner):
    pair = replace(chain("open_drawer", "turn_on_led"), switch_steps=39)
    result = run(runner, pair, steps_limit=20).result
    (row,) = result["tasks"]
    assert (row["task"], row["success"], row["env_steps"]) == ("turn_on_led", False, 20)
    assert row["reason"] == "never told: step limit" and not result["success"]


def test_each_task_of_a_chain_starts_from_the_world_as_it_is(runner):
    """The second pressing turns the LED off: judged since the first, it would be no change."""
    twice = chain("turn_on_led", "turn_off_led", instructions=(LED, LED))
    result = run(runner, twice, steps_limit=60).result
    assert result["tasks"][0]["success"]
    assert not result["tasks"][1]["success"]  # the hand stays down: no rising edge


def test_the_result_does_not_depend_on_what_ran_before(runner):
    episode = Suite("tasks", tasks=("place_in_slider",), count=1).episodes()[0]
    first = run(runner, episode).result
    run(runner, chain("turn_on_led"))
    again = run(runner, episode).result
    fresh = Runner(small_config())
    elsewhere = run(fresh, episode).result
    fresh.close()
    assert untimed([first]) == untimed([again]) == untimed([elsewhere])


def test_frames_are_drawn_only_for_plans(runner):
    result = run(runner, chain("open_drawer"), steps_limit=24, interval=1).result
    (row,) = result["tasks"]
    assert row["plans"] == row["encoded"] == result["renders"] == 6
    assert row["latents"] == 24


def test_the_time_of_a_latent_is_system_2s_alone(runner, monkeypatch):
    engine = runner._engine.engine
    encode = engine.encode
    monkeypatch.setattr(engine, "encode", lambda *given: time.sleep(0.3) or encode(*given))
    timing = run(runner, chain("open_drawer"), steps_limit=24, interval=1).result["timing"]
    assert timing["s2_s"] >= 6 * 0.3
    assert 0 <= timing["s1_s"] < timing["s2_s"]


@pytest.mark.parametrize(("interval", "latency"), [(1, 0), (3, 0), (10, 4), (7, 15)])
def test_latents_that_are_not_computed_change_nothing(runner, monkeypatch, interval, latency):
    episode, ways = chain("close_drawer", sequence=3), []
    for goals in ("DemandGoals", "LockstepGoals"):
        if goals == "LockstepGoals":
            monkeypatch.setattr("openhelix.benchmarks.evaluation.runner.DemandGoals", eager)
            monkeypatch.setattr(
                "openhelix.benchmarks.evaluation.runner.DemandPolicy", lambda p, _: p
            )
        poses = []
        ways.append(poses)
        stack_of = runner._stack

        def watched(*args, stack_of=stack_of, poses=poses):
            stack = stack_of(*args)
            stack.loop.subscribers.append(lambda tick: poses.append(tick.sent.pose))
            return stack

        monkeypatch.setattr(runner, "_stack", watched)
        assert run(runner, episode, interval=interval, latency=latency).result["error"] is None
        monkeypatch.setattr(runner, "_stack", stack_of)
    assert len(ways[0]) >= 40 and np.array_equal(ways[0], ways[1])


def test_who_judges_by_latents_is_asked_with_the_latent_of_that_moment(runner):
    engine = "system2.engine={target: 'tests.evaluation.small:DoubtingEngine', options: {}}"
    doubting = Runner(small_config(engine))
    (row,) = run(doubting, chain("turn_on_led")).result["tasks"]
    doubting.close()
    assert (row["hold_steps"], row["env_steps"], row["plans"], row["encoded"]) == (40, 0, 0, 4)
    assert run(runner, chain("turn_on_led")).result["tasks"][0]["plans"] > 0


def eager(engine, camera, interval, latency, memory, draw_now, trigger):
    return LockstepGoals(engine, camera, interval, latency, memory, trigger=trigger)


def test_latency_makes_the_first_latent_late_and_the_others_older(runner):
    soon, late = (run(runner, chain("open_drawer"), latency=d).result["tasks"][0] for d in (0, 5))
    assert (soon["hold_steps"], late["hold_steps"]) == (0, 5)
    # Steps held still count to the limit: the world does not wait for System 2.
    assert (soon["env_steps"], late["env_steps"]) == (40, 35)
    assert late["latent_age_steps"]["max"] > soon["latent_age_steps"]["max"]


def test_drift_is_one_for_a_latent_that_does_not_change(runner):
    result = run(runner, chain("open_drawer"), interval=60, drift=True).result
    ages = [age for age, _ in result["drift"]]
    assert ages == list(range(4, 4 + 4 * len(ages), 4)) and len(ages) >= 8
    assert all(0.9999 < cosine <= 1.0 for _, cosine in result["drift"])
    plain = run(runner, chain("open_drawer"), interval=60).result
    assert plain["tasks"] == result["tasks"] and plain["drift"] == []


def test_what_goes_wrong_in_an_episode_is_its_failure():
    broken = Runner(
        small_config(f"system2.engine.options={{broken: '{TASKS['open_drawer'].sentence}'}}")
    )
    result = run(broken, chain("turn_on_led", "open_drawer", "turn_on_led")).result
    assert result["in_a_row"] == 1 and not result["success"]
    assert result["error"] == "system2: ValueError: instruction: broken as configured"
    assert [row["success"] for row in result["tasks"]] == [True, False]
    assert run(broken, chain("turn_on_led")).result["success"]
    broken.close()


def test_a_start_that_is_not_found_is_a_failure_too(runner, monkeypatch):
    def never(env, task, rng):
        from openhelix.benchmarks.calvin.starts import StartError

        raise StartError("task: none found")

    monkeypatch.setattr("openhelix.benchmarks.evaluation.staging.begin", never)
    result = run(runner, Suite("tasks", count=1).episodes()[0]).result
    assert "task: none found" in result["error"] and not result["success"]
    assert result["tasks"][0]["env_steps"] == 0


def test_a_film_shows_the_episode_and_changes_nothing(runner):
    conditions = Conditions(20, 10)
    filmed = runner.run(chain("open_drawer"), conditions, film=True)
    plain = runner.run(chain("open_drawer"), conditions)
    assert filmed.video is not None and b"ftyp" in filmed.video[:16] and plain.video is None
    assert filmed.result["tasks"] == plain.result["tasks"]
    assert filmed.result["renders"] == plain.result["renders"]


def test_a_policy_without_system_2_is_told_its_task():
    alone = Runner(
        small_config("system1.policy={target: 'tests.evaluation.small:TaskReach', options: {}}")
    )
    result = run(alone, chain("turn_on_led", "open_drawer")).result
    assert result["in_a_row"] == 1 and result["error"] is None
    told = alone._policy.inner.told
    assert set(told) == {TASK_NAMES.index("turn_on_led"), TASK_NAMES.index("open_drawer")}
    assert result["tasks"][0]["latents"] == 0 and result["tasks"][0]["latent_age_steps"] is None
    assert alone.about()["latent_spec"] is None
    alone.close()


def test_a_moving_block_moves_and_is_let_go_of_afterwards(runner):
    suite = Suite("calvin-d", count=1, tasks=("lift_red_block_table",), speeds=("x20",))
    still, *moving = suite.episodes()
    x = {}
    for episode in (still, moving[0]):
        run(runner, episode, steps_limit=30)
        world = runner._robots["D"]._env.world
        assert world.hooks == []
        x[episode.motion.pattern] = np.array(world.block_pose("block_red")[0])
    assert np.linalg.norm(x["left"] - x["static"]) > 0.02


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (f"system1.policy.options={{cameras: {CAMERAS.replace('84, 84', '96, 96')}}}", "84x84"),
        ("system1.policy.options={cameras: [[wrist, 84, 84]]}", "camera 'wrist'"),
        ("world.cameras=[static]", "camera 'gripper'"),
        ("system2.engine.target='tests.evaluation.test_runner:OtherEngine'", "latent.dim"),
    ],
)
def test_parts_that_do_not_fit_are_refused(override, message):
    with pytest.raises(SpecMismatch, match=message):
        Runner(small_config(override))


class OtherEngine:
    def __init__(self):
        from openhelix.runtime.core.interfaces import LatentSpec

        self.spec = LatentSpec("act_last", 1, 512)

    def encode(self, images, instructions): ...

    def close(self): ...


class SpoiltEngine(WordEngine):
    """Its latents of one sentence are not finite."""

    def encode(self, images, instructions):
        z = super().encode(images, instructions)
        return z * np.float32("nan") if instructions[0] == TASKS["open_drawer"].sentence else z


def test_a_latent_that_is_not_finite_is_an_error_and_reaches_no_policy():
    spoilt = Runner(small_config("system2.engine.target=tests.evaluation.test_runner:SpoiltEngine"))
    result = run(spoilt, chain("turn_on_led", "open_drawer")).result
    assert result["error"] == "system2: BadLatent: the latent is not finite"
    assert [row["success"] for row in result["tasks"]] == [True, False]
    spoilt.close()


def test_a_world_that_cannot_be_used_is_refused_before_anything_runs(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("OPENHELIX_CALVIN_ENV", str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="calvin_env is not installed"):
        Runner(small_config("robot.name=calvin"))
    words = ["eval", "--suite", "tasks", "--world", "calvin", "--episodes-per-task", "1"]
    words += [
        "--base",
        str(tmp_path / "eval"),
        "system2.engine.target=tests.evaluation.small:WordEngine",
    ]
    words += ["system2.engine.options={}", "system1.policy.target=tests.fakes:ReachPolicy"]
    assert main([*words, f"system1.policy.options={{cameras: {CAMERAS}}}"]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("openhelix eval: world: calvin_env is not installed (no checkout at")
    assert not list((tmp_path / "eval").iterdir())  # nothing is stored


def test_a_world_that_is_gone_in_the_middle_is_no_failed_episode(runner, monkeypatch):
    def gone(robot, prepare):
        raise ConfigError("world: calvin_env is not installed")

    monkeypatch.setattr(PlayTableRobot, "prepare_world", gone)
    with pytest.raises(ConfigError, match="not installed"):
        run(runner, chain("turn_on_led"))
