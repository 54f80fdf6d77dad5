"""openhelix.benchmarks.evaluation.evaluation: resumable, and the same whoever runs the episodes."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from openhelix.benchmarks.calvin.tasks import TASKS
from openhelix.benchmarks.evaluation.evaluation import Console, evaluate, fingerprint, shares_engine
from openhelix.benchmarks.evaluation.pool import LocalPool
from openhelix.benchmarks.evaluation.report import write_reports
from openhelix.benchmarks.evaluation.results import ResultsError, read_results
from openhelix.benchmarks.evaluation.suites import Suite
from openhelix.runtime.core.config import CommandFailed, ConfigError, Part
from tests.evaluation.small import small_config, small_plan, untimed

SUITE = Suite("tasks", count=2, tasks=("turn_on_led", "open_drawer", "lift_red_block_table"))


@pytest.fixture(scope="module")
def done(pool, tmp_path_factory):
    folder = tmp_path_factory.mktemp("eval") / "run"
    return folder, evaluate(small_plan(SUITE), pool, folder)


class Forbidden(LocalPool):
    """A pool that must not be asked."""

    def __init__(self):
        super().__init__(small_config())

    def start(self):
        raise AssertionError("nothing was left to do")


def test_a_report_says_what_its_score_depends_on(done):
    folder, report = done
    assert json.loads((folder / "report.json").read_text()) == report
    assert report["n_episodes"] == 6 and 0 <= report["success_rate"] <= 1
    low, high = report["ci95"]
    assert low <= report["success_rate"] <= high
    assert report["clock"] == "lockstep" and report["steps_limit"] == 12 and report["seed"] == 0
    assert (report["world"], report["scene"]) == ("playtable", "D")
    assert report["policy"]["spec"]["horizon"] == 16 and len(report["policy"]["sha256"]) == 16
    assert {name: row["n_episodes"] for name, row in report["per_task"].items()} == {
        "lift_red_block_table": 2,
        "open_drawer": 2,
        "turn_on_led": 2,
    }
    assert report["per_task"]["turn_on_led"]["ci95"][1] > 0
    assert report["n_errors"] == 0 and report["work"]["plans"] > 0


def test_a_finished_evaluation_loads_and_runs_nothing(done):
    folder, report = done
    again = evaluate(small_plan(SUITE), Forbidden(), folder)
    assert again["resumed_episodes"] == 6
    for key in ("success_rate", "per_task", "policy", "system2", "work", "timing"):
        assert again[key] == report[key]


def test_other_conditions_need_another_folder(done):
    folder, _ = done
    for plan in (small_plan(SUITE, steps=13), small_plan(SUITE, interval=9)):
        with pytest.raises(ResultsError, match="was begun with"):
            evaluate(plan, Forbidden(), folder)


def test_another_model_behind_the_same_settings_needs_another_folder(pool, tmp_path):
    plan = small_plan(SUITE, steps=3)
    folder = tmp_path / "run"
    report = evaluate(plan, pool, folder)
    (folder / "shards" / "0000.jsonl").write_text(
        "".join((folder / "shards" / "0000.jsonl").read_text().splitlines(keepends=True)[:2])
    )

    class Retrained(LocalPool):
        def start(self):
            return super().start() | {"spec_id": "another"}

    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != "run.json"}
    other = Retrained(small_config())
    with pytest.raises(ResultsError, match="another model: spec_id"):
        evaluate(plan, other, folder)
    other.close()
    assert before.items() <= {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}.items()
    again = evaluate(plan, pool, folder)
    assert again["resumed_episodes"] == 2 and again["per_task"] == report["per_task"]


def test_a_changed_file_of_sentences_is_another_evaluation(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({name: [task.sentence] for name, task in TASKS.items()}))
    suite = Suite("calvin-e", count=1, phrases=str(path))
    before = suite.identity()
    path.write_text(json.dumps({name: ["please " + t.sentence] for name, t in TASKS.items()}))
    assert suite.identity() != before and suite.identity()["phrases"] == before["phrases"]


def test_chains_have_rates_of_one_to_five(pool, tmp_path):
    report = evaluate(small_plan(Suite("calvin", count=3), steps=4), pool, tmp_path / "run")
    assert report["n_sequences"] == 3 and 0 <= report["avg_len"] <= 5
    assert len(report["success_in_a_row"]) == len(report["success_in_a_row_ci95"]) == 5
    assert report["avg_len"] == pytest.approx(sum(report["success_in_a_row"]))
    assert report["ci95"][0] <= report["avg_len"] <= report["ci95"][1]


def test_moving_blocks_are_summed_up_by_pattern(pool, tmp_path):
    suite = Suite("calvin-d", count=1, tasks=("lift_blue_block_table",))
    report = evaluate(small_plan(suite, steps=4), pool, tmp_path / "run")
    assert set(report["per_pattern"]) == {"static", "left", "forward", "diagonal", "circular"}
    assert report["n_episodes"] == 5 == sum(r["n_episodes"] for r in report["per_pattern"].values())


def test_videos_of_chosen_episodes(pool, tmp_path):
    plan = small_plan(SUITE, steps=3)
    report = evaluate(
        type(plan)(plan.suite, plan.conditions, plan.config, videos=2), pool, tmp_path / "r"
    )
    names = [p.name for p in sorted((tmp_path / "r" / "videos").iterdir())]
    assert names == ["D-lift_red_block_table-1.mp4", "D-turn_on_led-0.mp4"]
    assert report["n_errors"] == 0


def test_a_report_plays_films_lists_episodes_and_shows_failures(pool, tmp_path):
    plan = replace(small_plan(SUITE, steps=3), videos=0, failures=True)
    report = evaluate(plan, pool, tmp_path / "r")
    results = read_results(tmp_path / "r")
    failed = [r for r in results if not r["success"]]
    films = {p.stem for p in (tmp_path / "r" / "videos").iterdir()}
    assert films == {r["key"].replace("/", "-") for r in failed} and films
    write_reports(report, tmp_path / "r", results)
    page = (tmp_path / "r" / "report.html").read_text()
    assert page.count("<video controls") == min(len(failed), 24)
    assert f'src="videos/{min(films)}.mp4"' in page and "<h2>Failures</h2>" in page
    assert page.count("<tr data-result=") == len(results)
    assert page.count('data-result="failure"') == len(failed)
    assert "&#10007;" in page  # a cross, for whoever does not see the colours
    assert (tmp_path / "r" / "plots" / "tasks.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize(
    ("address", "kind", "told"),
    [
        ("localhost:1", CommandFailed, r"^ray_address: no Ray cluster answers at '127.0.0.1:1'"),
        ("ray://head:10001", ConfigError, r"^ray_address: 'ray://head:10001'; write auto, HOST"),
    ],
)
def test_a_cluster_that_is_not_there_is_told_before_ray_is_asked(
    address: str, kind: type[Exception], told: str
) -> None:
    from openhelix.benchmarks.evaluation.ray_pool import RayPool

    pool = RayPool(small_config(f"ray_address={address}"), 2)
    with pytest.raises(kind, match=told):
        pool.start()
    pool.close()


@pytest.fixture(scope="module")
def ray_session():
    """One Ray for all tests here: starting it takes longest."""
    import ray

    options = {"include_dashboard": False, "log_to_driver": False}
    ray.init("local", num_cpus=4, **options)
    yield
    ray.shutdown()


def test_workers_change_nothing_and_a_dying_one_costs_its_episode(done, tmp_path, ray_session):
    from openhelix.benchmarks.evaluation.ray_pool import RayPool

    deadly = TASKS["open_drawer"].sentence
    pool = RayPool(small_config(f"system2.engine.options={{deadly: '{deadly}'}}"), 2)
    try:
        report = evaluate(
            small_plan(Suite("tasks", count=1, tasks=SUITE.tasks)), pool, tmp_path / "r"
        )
    finally:
        pool.close()
    want = {r["key"]: r for r in untimed(read_results(done[0]))}
    lost, *others = sorted(
        untimed(read_results(tmp_path / "r")), key=lambda r: "open_drawer" not in r["key"]
    )
    assert lost["key"] == "D/open_drawer/0" and not lost["success"]
    assert lost["error"] == "the worker's process died 2 times" and report["n_errors"] == 1
    assert len(others) == 2
    for result in others:
        assert result == want[result["key"]] | {"index": result["index"]}


@pytest.mark.slow
def test_a_shared_system_2_changes_nothing(done, tmp_path, ray_session):
    from openhelix.benchmarks.evaluation.ray_pool import RayPool

    pool = RayPool(small_config(), 2, shared=True)
    try:
        evaluate(small_plan(SUITE), pool, tmp_path / "run")
    finally:
        pool.close()
    assert untimed(read_results(tmp_path / "run")) == untimed(read_results(done[0]))


@pytest.mark.slow
def test_a_system_2_or_a_worker_that_hangs_is_ended(done, tmp_path, ray_session):
    from openhelix.benchmarks.evaluation.ray_pool import RayPool

    # Its first answer never comes; the one that is started in its place gives all of them.
    once = f"system2.engine.options={{hang_once: '{tmp_path / 'hung'}'}}"
    pool = RayPool(small_config(once), 1, shared=True, answer_s=5.0)
    try:
        evaluate(small_plan(SUITE), pool, tmp_path / "run")
    finally:
        pool.close()
    assert untimed(read_results(tmp_path / "run")) == untimed(read_results(done[0]))
    # A worker's own System 2 that hangs takes the worker with it.
    sentence = TASKS["open_drawer"].sentence
    options = f"system2.engine.options={{hang_once: '/', hang_at: '{sentence}'}}"
    pool = RayPool(small_config(options), 1, episode_s=8.0, start_s=30.0)
    try:
        report = evaluate(
            small_plan(Suite("tasks", count=1, tasks=SUITE.tasks)), pool, tmp_path / "two"
        )
    finally:
        pool.close()
    assert [e["error"] for e in report["errors"]] == ["the worker's process died 2 times"]
    assert report["n_episodes"] == 3


def test_a_worker_refuses_what_does_not_fit(ray_session):
    from openhelix.benchmarks.evaluation.ray_pool import RayPool

    pool = RayPool(small_config("world.cameras=[static]"), 1)
    with pytest.raises(ConfigError, match="camera 'gripper'"):
        pool.start()


KILLED_AFTER_3 = """
import os, signal, sys
from openhelix.benchmarks.evaluation.results import Store
from openhelix.runtime.cli.main import main

add = Store.add

def until_three(self, *result):
    add(self, *result)
    if len(self.results) == 3:
        os.kill(os.getpid(), signal.SIGKILL)

Store.add = until_three
main(sys.argv[1:])
"""


def test_a_killed_evaluation_is_continued(tmp_path):
    words = [
        *("eval", "--suite", "tasks", "--episodes-per-task", "4", "--steps", "60", "--json"),
        *(
            "--tasks",
            "turn_on_led,open_drawer,lift_red_block_table",
            "--out",
            str(tmp_path / "run"),
        ),
        "system1.policy.target=tests.fakes:ReachPolicy",
        "system1.policy.options={cameras: [[static, 200, 200], [gripper, 84, 84]]}",
        "system2.engine={target: 'tests.evaluation.small:WordEngine', options: {}}",
    ]
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root)}
    command = [sys.executable, "-c", KILLED_AFTER_3, *words]
    ended = subprocess.run(command, cwd=root, env=environment, capture_output=True, timeout=240)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()[-2000:]
    assert sum(1 for p in tmp_path.glob("run/shards/*.jsonl") for _ in p.open()) == 3
    command = [sys.executable, "-m", "openhelix.runtime.cli.main", *words]
    ended = subprocess.run(command, cwd=root, env=environment, capture_output=True, timeout=240)
    assert ended.returncode == 0, ended.stderr.decode()[-2000:]
    report = json.loads(ended.stdout)
    assert report["n_episodes"] == 12 and report["resumed_episodes"] == 3
    pool = LocalPool(small_config())
    suite = Suite("tasks", count=4, tasks=SUITE.tasks)
    evaluate(small_plan(suite, steps=60, interval=30), pool, tmp_path / "whole")
    pool.close()
    assert untimed(read_results(tmp_path / "run")) == untimed(read_results(tmp_path / "whole"))
    assert (tmp_path / "run" / "report.html").exists()


def test_a_checkpoint_is_known_by_its_content(tmp_path):
    weights = tmp_path / "policy"
    weights.mkdir()
    (weights / "model.safetensors").write_bytes(b"one")
    part = Part(target="a.b:C", options={"path": str(weights)})
    first = fingerprint(part)
    assert first == fingerprint(part)
    (weights / "model.safetensors").write_bytes(b"two")
    assert fingerprint(part) != first
    with pytest.raises(ConfigError, match="no checkpoint at /nowhere"):
        fingerprint(Part(target="a.b:C", options={"path": "/nowhere"}))


def test_code_of_ones_own_is_part_of_what_is_evaluated(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "beside.py").write_text("")
    (tmp_path / "lab_arm").mkdir()
    found = []
    for code in ("x = 1\n", "x = 12\n"):
        for file in ("lab_policy.py", "lab_arm/helper.py"):
            (tmp_path / file).write_text(code)
            targets = ("lab_policy:Mine", "lab_arm.policy:Mine")
            found.append([fingerprint(Part(target=target)) for target in targets])
    assert len(set(found[0] + found[3])) == 4
    assert found[0][1] != found[1][1] == found[2][1] and found[0][0] == found[1][0]
    (tmp_path / "beside.py").write_text("other = 1\n")
    assert [fingerprint(Part(target=target)) for target in targets] == found[3]
    for target in ("json:Mine", "sys:Mine", "__main__:Mine", "nowhere:Mine"):
        assert fingerprint(Part(target=target)) == fingerprint(Part(target=target))


def test_progress_is_told_with_the_time_to_go():
    stream = io.StringIO()
    console = Console("eval", stream, every_s=0.0)
    console(1, 4, {"key": "a", "in_a_row": 1, "error": None})
    console(2, 4, {"key": "b", "in_a_row": 0, "error": "it broke"})
    text = stream.getvalue()
    assert "1 of 4 episodes" in text and "0:00:00 to go" in text
    assert "b failed: it broke" in text and "0.50 tasks each" in text


def test_vllm_is_shared_and_a_small_engine_is_not():
    assert shares_engine(
        small_config("system2.engine.target=openhelix.system2.engines.vllm:VllmEngine")
    )
    assert not shares_engine(small_config("system2.engine.options={device: cpu}"))
