"""`openhelix run` as a user has it: from the shell, with mistakes, Ctrl-C and kill -9."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.integration.command import start

MEASURED = (
    *(
        "ready_s",
        "tick_duration_s",
        "prefetch_duration_s",
        "s1_latency_s",
        "s2_latency_s",
        "sinks",
        "versions",
    ),
    *("tasks",),
)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["sytem2.hz=1"], "did you mean 'system2'"),
        (["tasks.instruction=' '"], "tasks.instruction"),
        (["tasks.instruction="], "tasks.instruction: nothing follows"),
        (["world.scene=Q"], "'A', 'B', 'C' or 'D'"),
        (["--frobnicate"], "unknown option"),
        (["robot.name=panda"], "no robot 'panda'; valid: "),
        (["world.cameras=[static, front]"], "'static', 'gripper' or 'tactile'"),
        (["--config", "no/such.yaml"], "no file no/such.yaml"),
    ],
)
def test_a_mistake_gets_one_line_and_code_2(
    tmp_path: Path, words: list[str], expected: str
) -> None:
    process = start(tmp_path / "out", *words)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 2 and output == ""
    assert len(errors.strip().splitlines()) == 1 and expected in errors
    assert not (tmp_path / "out").exists()


def test_lockstep_twice_gives_the_same_report(tmp_path: Path) -> None:
    reports = []
    for folder in ("a", "b"):
        words = ["control.clock=lockstep", "tasks.steps_limit=25", "--json", "output.record=true"]
        process = start(tmp_path / folder, *words)
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        reports.append(json.loads(output))
    for report in reports:
        assert [row.pop("duration_s") > 0 for row in report["tasks"]] == [True]
    first, second = reports
    assert first["tasks"] == second["tasks"] and first["tasks"][0]["env_steps"] == 25
    same = [{k: v for k, v in r.items() if k not in MEASURED} for r in reports]
    assert same[0] == same[1]
    assert first["clock"] == "lockstep" and first["latents_published"] == 5
