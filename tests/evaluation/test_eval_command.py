"""The commands `eval`, `compare` and `sweep`, and what they write."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from openhelix.benchmarks.evaluation import report as reports
from openhelix.benchmarks.evaluation.compare import compare, to_markdown
from openhelix.benchmarks.evaluation.eval import brief, default_folder, make_plan
from openhelix.benchmarks.evaluation.eval import read as read_eval
from openhelix.benchmarks.evaluation.evaluation import Console, evaluate
from openhelix.benchmarks.evaluation.measurement import Motion
from openhelix.benchmarks.evaluation.pool import LocalPool
from openhelix.benchmarks.evaluation.suites import Suite
from openhelix.benchmarks.evaluation.sweep import (
    command_again,
    make_plans,
    name_of,
    sweep,
    table_of,
    to_keep,
    write,
)
from openhelix.benchmarks.evaluation.sweep import read as read_sweep
from openhelix.runtime.cli.main import main
from openhelix.runtime.core.config import ConfigError
from openhelix.runtime.core.interfaces import Action
from tests.evaluation.small import CAMERAS, small_config, small_plan

PARTS = (
    "system1.policy.target=tests.fakes:ReachPolicy",
    f"system1.policy.options={{cameras: {CAMERAS}}}",
    "system2.engine={target: 'tests.evaluation.small:WordEngine', options: {}}",
)
TASKS = ("turn_on_led", "open_drawer")


@pytest.fixture(scope="module")
def two(pool, tmp_path_factory):
    """The same episodes at two step limits: the second cannot do what takes longer."""
    base = tmp_path_factory.mktemp("two")
    suite = Suite("tasks", count=3, tasks=TASKS)
    evaluate(small_plan(suite, steps=60), pool, base / "long")
    evaluate(small_plan(suite, steps=2), pool, base / "short")
    return base


def images(text):
    return [base64.b64decode(d) for d in re.findall(r"data:image/[\w+]+;base64,([^\"]+)", text)]


def test_generated_scenes_are_evaluated_like_others(tmp_path, capsys):
    words = ["eval", "--suite", "tasks", "--episodes-per-task", "1", "--tasks", "turn_on_led"]
    words += ["--steps", "5", "--json", "--base", str(tmp_path), "--scene", "A,random:3-4"]
    assert main([*words, *PARTS]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["n_episodes"] == 3 and set(report["per_scene"]) == {"A", "R3", "R4"}
    assert (tmp_path / "tasks-A,R3-R4-0001").is_dir()
    words = ["eval", "--suite", "calvin", "--sequences", "1", "--steps", "2", "--json"]
    assert main([*words, "--base", str(tmp_path), "--scene", "R5", *PARTS]) == 0
    assert json.loads(capsys.readouterr().out)["n_errors"] == 0


def test_the_command_prints_one_json_object_and_writes_reports(tmp_path, capsys):
    words = ["eval", "--suite", "tasks", "--episodes-per-task", "1", "--tasks", "turn_on_led"]
    words += ["--steps", "5", "--seed", "3", "--json", "--videos", "1", "--base", str(tmp_path)]
    assert main([*words, *PARTS]) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert report["n_episodes"] == 1 and report["seed"] == 3 and report["steps_limit"] == 5
    assert "1 of 1 episodes" in err and "to go" in err
    folder = tmp_path / "tasks-D-0001"
    assert report["folder"] == str(folder)
    page = (folder / "report.html").read_text()
    found = images(page)
    assert b"<svg" in found[0] and found[-1].startswith(b"\xff\xd8")
    assert "http" not in page  # nothing is fetched
    text = (folder / "report.md").read_text()
    for stated in (
        "95 % interval",
        "over 1 episode",
        "lockstep clock",
        "5 environment steps",
        "seed 3",
    ):
        assert stated in text and stated in page
    # It is finished: the same words begin a new one.
    plan = make_plan(*read_eval([*words[1:], *PARTS]))
    assert default_folder(plan, tmp_path).name == "tasks-D-0002"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--suite", "calvn"], "--suite: 'calvn' is none of tasks, calvin, calvin-e, calvin-d"),
        (["--suite", "tasks", "--tasks", "fly"], "--tasks: 'fly' is none of"),
        (["--suite", "tasks", "--scene", "Q"], "eval: --scene: 'Q' is no choice"),
        (["--suite", "calvin-e", "--phrases", "none.json"], "eval: --phrases: none.json: cannot"),
        (["--suite", "tasks", "--delay", "99"], "eval: --delay: 99, must be 0 to 15; a plan"),
        (["--suite", "tasks", "--config", "empty.yaml"], "eval: system2: "),
        (["--suite", "tasks", "--config", "odd.yaml"], "eval: system2.engine: "),
        (["--suite", "tasks", "--steps", "0"], "--steps: input should be greater"),
        (["--suite", "tasks", "--workers", "0"], "--workers: input should be"),
        (["--suite", "tasks", "--interval", "0"], "--interval"),
        (["--suite", "tasks", "--clock", "sundial"], "--clock: 'sundial'"),
        (["--suite", "tasks", "--clock", "realtime", "--interval", "3"], "lockstep clock"),
        (["--suite", "tasks", "--interval", "3", "system2.trigger=change"], "--interval: belongs"),
        (["--suite", "switch", "--steps", "30"], "--steps: 30; switch needs more than 30"),
        (["--suite", "tasks", "--clock", "realtime", "--workers", "2"], "--workers: 2"),
        (["--suite", "tasks", "--sequences", "3"], "--sequences: tasks takes --episodes-per-task"),
        (["--suite", "calvin", "--episodes-per-task", "3"], "calvin takes --sequences"),
        (
            ["--suite", "tasks", "system1.policy.options.path=/none"],
            "system1.policy.options.path: there is nothing at /none",
        ),
        (["--suite", "tasks", "system1.polcy=1"], "did you mean 'policy'"),
        (["--suite", "tasks", "world.cameras=[static]", *PARTS], "camera 'gripper'"),
        ([], "--suite"),
        (["--suite", "tasks", "--phrases", "seen"], "--phrases: tasks does not use it; it is of"),
        (["--suite", "tasks", "--scene", "B", "world.scene=A"], "world.scene: A, and --scene B"),
        (["--suite", "tasks", "--tasks", "open_drawr"], "did you mean 'open_drawer'"),
        (["--suite", "tasks", "tasks={steps_limit: 60}"], "tasks.steps_limit: .* say --steps"),
        (["--suite", "tasks", "seed=3"], "seed: .* say --seed"),
        (["--suite", "calvin", "tasks.sequence=7"], "tasks.sequence: .* say --sequences"),
        (["--suite", "tasks", "control.clock=realtime"], "control.clock: .* say --clock"),
        (["--suite", "tasks", "robot.name=fake"], "robot.name: .* say --world"),
        (["--suite", "tasks", "system2.engine.options.modle=x"], "options.modle: .* 'model'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(words, message, tmp_path, capsys):
    out = tmp_path / "run"
    for name, text in (("empty", "system2:\n"), ("odd", "system2: {engine: 3}\n")):
        (tmp_path / f"{name}.yaml").write_text(text)
    words = [str(tmp_path / w) if w in ("empty.yaml", "odd.yaml") else w for w in words]
    quiet = "output.metrics_port=null"  # another evaluation may have the port, and that is said
    assert main(["eval", *words, quiet, "--out", str(out)]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "results in" not in line]
    assert len(lines) == 1
    assert message in lines[0] or re.search(message, lines[0]), lines[0]
    assert not out.exists()


def test_a_setting_that_says_the_same_as_the_option_is_let_through():
    words = ["--suite", "tasks", "--seed", "3", "seed=3", "world.scene=D", "control.clock=lockstep"]
    assert make_plan(*read_eval([*words, *PARTS])).suite.seed == 3
    words = ["--intervals", "2", "--latencies", "0", "--suites", "calvin"]
    with pytest.raises(ValueError, match=r"lockstep\.interval_steps: .* say --intervals"):
        make_plans(*read_sweep([*words, "lockstep.interval_steps=5", *PARTS]))
    with pytest.raises(ValueError, match="--speeds: calvin does not use it; it is of calvin-d"):
        make_plans(*read_sweep([*words, "--speeds", "x2", *PARTS]))


def test_a_damaged_folder_is_left_alone(tmp_path, capsys):
    folder = tmp_path / "run"
    words = ["eval", "--suite", "tasks", "--episodes-per-task", "3", "--tasks", ",".join(TASKS)]
    words += ["--steps", "2", "--out", str(folder), *PARTS]
    assert main(words) == 0
    shard = folder / "shards" / "0000.jsonl"
    shard.write_text(shard.read_text()[:-9])
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert main(words) == 2
    assert "0000.jsonl:6: damaged" in capsys.readouterr().err.splitlines()[-1]
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_two_runs_are_compared_in_pairs(two, capsys):
    found = compare(two / "long", two / "short")
    assert found["n_pairs"] == 6 and found["differs"] == {"steps_limit": [60, 2]}
    score = found["success_rate"]
    assert score["a"] > score["b"] == 0 and score["better"] == 0
    assert score["worse"] == round(6 * score["a"]) and score["starts"] == 6 and score["shows"] > 0
    assert found["per_task"]["turn_on_led"]["n"] == 3
    text = to_markdown(found)
    assert "steps_limit" in text and "6 pairs" in text and "lockstep clock" in text
    assert main(["compare", str(two / "long"), str(two / "short"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == found


def test_a_comparison_is_written_as_a_page_with_its_plot(two, tmp_path, capsys):
    words = ["compare", str(two / "long"), str(two / "short"), "--out", str(tmp_path / "c")]
    assert main(words) == 0
    page = (tmp_path / "c" / "compare.html").read_text()
    assert "data:image/svg+xml" in page and "<h2>What differs</h2>" in page
    assert "<td>steps_limit</td>" in page and "<td>turn_on_led</td>" in page
    assert f"A is <code>{two / 'long'}</code>" in page
    assert (tmp_path / "c" / "compare.pdf").read_bytes().startswith(b"%PDF")
    assert (tmp_path / "c" / "compare.md").read_text() in capsys.readouterr().out


def test_a_comparison_is_not_written_into_a_file(two, tmp_path, capsys):
    (tmp_path / "c").write_text("mine")
    for out in (tmp_path / "c", tmp_path / "c" / "d"):
        assert main(["compare", str(two / "long"), str(two / "short"), "--out", str(out)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"--out: {tmp_path / 'c'} is a file; name a folder" in line
    assert (tmp_path / "c").read_text() == "mine"


def test_chains_are_compared_by_their_length(pool, tmp_path):
    suite = Suite("calvin", count=2)
    for name, interval in (("a", 5), ("b", 10)):
        evaluate(small_plan(suite, steps=3, interval=interval), pool, tmp_path / name)
    found = compare(tmp_path / "a", tmp_path / "b")
    assert found["avg_len"]["difference"] == 0 and len(found["success_in_a_row"]) == 5
    assert "average length" in to_markdown(found)


def test_runs_that_share_nothing_are_not_compared(two, pool, tmp_path, capsys):
    evaluate(
        small_plan(Suite("tasks", count=1, tasks=TASKS, seed=9), steps=2), pool, tmp_path / "x"
    )
    assert main(["compare", str(two / "long"), str(tmp_path / "x")]) == 2
    assert "seed is 0 in A, 9 in B" in capsys.readouterr().err
    assert main(["compare", str(two / "long"), str(tmp_path)]) == 2
    assert "no run.json" in capsys.readouterr().err


def test_a_report_says_what_is_untrained(two):
    report = json.loads((two / "long" / "report.json").read_text())
    assert report["untrained"] == [] and "untrained" not in brief(report)
    report["untrained"] = ["system1"]
    assert "untrained, as asked for: system1 (random weights)" in brief(report)
    assert "| untrained, as asked for | system1 |" in reports.to_markdown(report)


def test_a_report_escapes_what_it_quotes(two):
    report = json.loads((two / "long" / "report.json").read_text())
    report["errors"] = [{"key": "D/x", "error": "<script>a|b</script>"}]
    result = {"key": "D/<b>", "tasks": [], "error": "<script>alert(1)</script>"}
    shown = reports.to_html(report, [result])
    assert "<script>a" not in shown and "<b>" not in shown
    assert 'name="viewport"' in shown  # on a phone it is as wide as the phone
    assert "&lt;script&gt;alert(1)" in shown
    assert "a\\|b" in reports.to_markdown(report)


def test_a_sweep_on_both_clocks_has_the_same_cadences():
    words = ["--clock", "both", "--intervals", "1,30", "--latencies", "0,6", *PARTS]
    plans = make_plans(*read_sweep(words))
    names = [name_of(plan) for plan in plans]
    assert names[:4] == ["calvin-i01-d00", "calvin-i30-d00", "calvin-i01-d06", "calvin-i30-d06"]
    assert names[8:] == [f"{s}-i{i}-wall" for s in ("calvin", "calvin-d") for i in ("01", "30")]
    assert [plan.config.system2.hz for plan in plans[8:10]] == [30.0, 1.0]
    assert len({json.dumps(plan.identity(), sort_keys=True) for plan in plans}) == len(plans)
    assert {p.config.control.clock for p in plans[8:]} == {"realtime"}
    some = make_plans(*read_sweep(["--tasks", "lift_red_block_table", *PARTS]))
    assert {p.suite.name: p.suite.tasks for p in some} == {
        "calvin": (),
        "calvin-d": ("lift_red_block_table",),
    }


def test_a_sweep_over_delays_of_plans_is_plotted_along_them_with_how_the_arm_was_led(
    pool, tmp_path
):
    words = ["--intervals", "10", "--latencies", "0", "--delays", "0,4,8", *PARTS]
    assert [name_of(plan) for plan in make_plans(*read_sweep([*words, "--suites", "calvin"]))] == [
        *("calvin-i10-d00", "calvin-i10-d00-p04", "calvin-i10-d00-p08"),
    ]
    rows = ["--joins", "blend,inpaint", "--suites", "calvin", *words[:4], *PARTS]
    assert [name_of(plan) for plan in make_plans(*read_sweep(rows))] == [
        *("calvin-i10-d00", "calvin-inpaint-i10-d00"),
    ]
    with pytest.raises(ConfigError, match=r"--joins: 'inpant' is none of .*mean 'inpaint'"):
        make_plans(*read_sweep(["--joins", "inpant", *rows[2:]]))
    with pytest.raises(ConfigError, match=r"^--delays: 99, must be 0 to 15; a plan of this policy"):
        make_plans(*read_sweep(["--suites", "calvin", "--delays", "0,99"]))  # before any cell
    with pytest.raises(ConfigError, match=r"^--delays: belong to the lockstep clock"):
        make_plans(*read_sweep(["--clock", "realtime", "--delays", "4", *PARTS]))
    with pytest.raises(ConfigError, match="--latencies and --delays at least 0"):
        make_plans(*read_sweep([*words[:4], "--delays", "-1", *PARTS]))
    plans = [
        replace(plan, conditions=replace(plan.conditions, interval=10, delay=delay))
        for plan in (small_plan(Suite("calvin", count=2), steps=40),)
        for delay in (0, 6)
    ]
    report = sweep(plans, lambda config: pool, tmp_path, 0, Console("sweep", every_s=1e9))
    fresh, late = report["cells"]
    assert (fresh["delay"], late["delay"], late["against"]["delay"]) == (0, 6, 0)
    assert fresh["hold_steps_per_task"] == 0 and late["hold_steps_per_task"] == 6
    assert late["steps_to_success"] is None or late["steps_to_success"] > 0
    for one in (fresh["motion"], late["motion"]):
        assert one["borders"] > 0 and 0 <= one["jump_m"] < 0.02 and one["jerk_m_s3"] > 0
    write(report, tmp_path)
    text = (tmp_path / "sweep.md").read_text()
    assert "| join | interval | latency | plan delay | steps to success |" in text
    assert "![calvin-motion](calvin-motion.png)" in text
    assert "time from an observation to its plan (s)" in (tmp_path / "calvin.svg").read_text()
    led = (tmp_path / "calvin-motion.svg").read_text()
    assert "jump at a border (mm)" in led and "held steps per task" in led


def test_a_jump_at_a_border_is_measured():
    class Stack:
        class loop:
            period_ns = 10_000_000

    motion = Motion(Stack())

    def tick(x, chunk=None, state="run", info=()):
        pose = np.array([x, 0, 0, 0, 0, 0, 1.0])
        seen = SimpleNamespace(instruction_id=1)
        sent = Action(pose, 1.0, 1, dict.fromkeys(info, 0.0))
        motion(SimpleNamespace(observation=seen, state=state, new_chunk=chunk, sent=sent))

    tick(0.0, chunk=1)  # the first one: there is nothing to take over from
    for x in (0.01, 0.02, 0.03):
        tick(x)
    assert motion.row(0)["motion"] | {"jerk_m_s3": 0.0} == {
        "jerk_m_s3": 0.0,
        "borders": 0,
        "jump_m": None,
        "jump_rad": None,
        "limited": 0,
    }
    assert motion.row(0)["motion"]["jerk_m_s3"] == pytest.approx(0, abs=1e-6)
    tick(0.045, chunk=2, info=("speed",))
    tick(0.055)
    tick(0.065)
    row = motion.row(0)["motion"]
    assert (row["borders"], row["limited"]) == (1, 1)
    assert row["jump_m"] == pytest.approx(0.005) and row["jump_rad"] == 0
    tick(0.065, state="hold")
    tick(0.165, chunk=3)  # it stood still: no border
    assert motion.row(0)["motion"]["borders"] == 1
    assert motion.row(1) == {"motion": None}


def test_chosen_episodes_are_filmed():
    words = ["--suite", "calvin", "--sequences", "2", "--videos", "D/1", *PARTS]
    assert make_plan(*read_eval(words)).filmed == ("D/1",)
    both = make_plan(*read_eval([*words[:-5], "--videos", "2,failures,D/0", *PARTS]))
    assert (both.videos, both.filmed, both.failures) == (2, ("D/0",), True)
    with pytest.raises(ValueError, match="'D/7' is no number and no episode; 'D/0' would be one"):
        make_plan(*read_eval([*words[:-5], "--videos", "D/7", *PARTS]))


def test_a_sweep_has_a_cell_for_each_interval_and_latency(pool, tmp_path):
    plans = [
        replace(plan, conditions=replace(plan.conditions, interval=interval, latency=latency))
        for plan in (
            small_plan(Suite("calvin", count=2), steps=20),
            small_plan(Suite("calvin-d", count=1, tasks=("lift_red_block_table",)), steps=9),
        )
        for latency in (0, 3)
        for interval in (1, 10)
    ]
    console = Console("sweep", every_s=1e9)
    report = sweep(plans, lambda config: pool, tmp_path / "sweep", 1, console)
    cells = report["cells"]
    assert [(c["suite"], c["interval"], c["latency"]) for c in cells[:4]] == [
        *(("calvin", 1, 0), ("calvin", 10, 0), ("calvin", 1, 3), ("calvin", 10, 3)),
    ]
    assert cells[0]["latents_per_task"] == 10 * cells[1]["latents_per_task"] == 20
    assert cells[0]["latent_age_steps"]["max"] == 0 < cells[1]["latent_age_steps"]["max"]
    assert cells[0]["drift"]["n"] == 0 and 0.99 < cells[1]["drift"]["cosine_mean"] <= 1
    assert cells[1]["against"]["interval"] == 1 and cells[1]["against"]["difference"] == 0
    assert cells[4]["per_pattern"]["circular"]["n_episodes"] == 1
    write(report, tmp_path / "sweep")
    for kind, begins in (("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")):
        assert (tmp_path / "sweep" / f"calvin.{kind}").read_bytes().startswith(begins)
    text = (tmp_path / "sweep" / "sweep.md").read_text()
    assert "2 sequences a cell, lockstep clock, at most 20 environment steps" in text
    assert "![calvin](calvin.png)" in text and report["policy"]["sha256"] in text
    assert f"latents {report['system2']['spec_id']}" in text
    on_wall = {**report, "system2": {**report["system2"], "spec_id": None}}
    (tmp_path / "wall").mkdir()
    write(on_wall, tmp_path / "wall")  # System 2 is in a process of its own there
    assert "None" not in (tmp_path / "wall" / "sweep.md").read_text().splitlines()[2]
    report["command"] = command_again(["--out", "x", "--steps", "9", "--results", "y"])
    (tmp_path / "kept").mkdir()
    write(to_keep(report), tmp_path / "kept", kept=True)
    kept = (tmp_path / "kept" / "sweep.json").read_text()
    assert len(json.loads(kept)["cells"]) == len(cells) and str(tmp_path) not in kept
    assert not (tmp_path / "kept" / "sweep.html").exists()
    assert "`openhelix sweep --steps 9`" in (tmp_path / "kept" / "sweep.md").read_text()
    header, rows = table_of(cells[:4])
    assert len(rows) == 4 and all(len(row) == len(header) for row in rows)

    class Forbidden(LocalPool):
        def start(self):
            raise AssertionError("a finished cell was run again")

    forbidden = Forbidden(small_config())
    again = sweep(plans, lambda config: forbidden, tmp_path / "sweep", 1, console)
    assert again["cells"] == cells
