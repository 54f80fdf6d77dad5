"""Every command that README and docs show is run as it stands there, made short, or it says why not.

`RULES` has one line per kind of command, in the order in which they are tried: what is added to it
(later options and words win), or the reason it is not run here. A command that no rule knows fails
the test, and so does a rule that no command needs.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from tests.data.small import write_split
from tests.runtime.docs_code import DOCS, blocks, commands

ROOT = DOCS.parent
PAGES = ("../README.md", "../CONTRIBUTING.md", *sorted(page.name for page in DOCS.glob("*.md")))
PLAIN = "system2.engine.target=openhelix.system2.engines.transformers:TransformersEngine"
LOCKSTEP = f"{PLAIN} ray=false control.clock=lockstep tasks.steps_limit=1 output.track=false"
SHORT = f"--steps 1 --workers 1 {PLAIN}"


class Rule(NamedTuple):
    """What is done with the commands that match."""

    pattern: str
    add: str | None  # words that make it short; None: it is not run
    why: str = ""  # not
    code: int = 0  # exit code when run


RULES = (
    Rule(r"^make (run-sim|test|check|setup)\b", None, "CI and each fresh clone run these"),
    Rule(
        r"^make (faults|fuzz|soak)\b",
        None,
        "half an hour; tests/faults and tests/perf/test_fuzz.py try the same, short",
    ),
    Rule(
        r"^make (data|train)\b", None, "hours; the commands in them are run small by tests/training"
    ),
    Rule(r"openhelix train ", None, "hours; tests/training runs every stage small"),
    Rule(r"openhelix dagger ", None, "a pair of the reader's own; tests/evaluation/test_dagger.py"),
    Rule(
        r"-m openhelix.benchmarks.training\.(collect_talk|gpu_vlm)",
        None,
        "minutes to hours; test_vlm.py of tests/training and tests/system2",
    ),
    Rule(r"openhelix run .*GoThere", None, "tests/runtime/cli/test_docs.py runs it"),
    Rule(r"OPENHELIX_ROBOT=.* -m pytest", ""),
    Rule(r"openhelix run .*my_arm:TableArm", LOCKSTEP),
    Rule(
        r"openhelix run .*system2.connect=", None, "needs a server; tests/integration/test_fleet.py"
    ),
    Rule(
        r"openhelix run .*configs/cluster.yaml",
        None,
        "two hosts; tests/integration/test_two_hosts.py",
    ),
    Rule(
        r"openhelix run .*robot.name=calvin", None, "needs calvin_env; tests/calvin/test_calvin.py"
    ),
    Rule(
        r"openhelix run system1.policy.options.path=checkpoints/mine",
        None,
        "weights of the reader's own",
    ),
    Rule(r"openhelix run --config configs/run.yaml( system2.trigger=(change|learned))?$", LOCKSTEP),
    Rule(
        r"openhelix run .*--interactive",
        None,
        "goes on until it is left; tests/integration/test_talk.py talks to runs",
    ),
    Rule(r"openhelix run --task ", LOCKSTEP),
    Rule(r"openhelix say ", "", code=1),  # no run is alive
    Rule(
        r"openhelix (view|film)",
        None,
        "of a run of the reader's; tests/runtime/cli/test_commands.py makes one and looks at it",
    ),
    Rule(r"openhelix serve ", None, "goes on until it is stopped; tests/integration/test_fleet.py"),
    Rule(
        r"openhelix status --web",
        None,
        "goes on until it is stopped; tests/integration/test_status.py",
    ),
    Rule(r"openhelix status", "", code=1),  # no run is alive
    Rule(r"openhelix doctor", ""),
    Rule(r"openhelix keys", ""),
    Rule(r"openhelix calibrate --print", ""),
    Rule(
        r"openhelix calibrate pictures",
        None,
        "pictures of the reader's; tests/runtime/cli/test_calibrate.py renders some",
    ),
    Rule(r"openhelix run .*arm.yaml", None, "an arm; tests/runtime/robots/test_robot_lerobot.py"),
    Rule(r"openhelix eval .*--world calvin", None, "needs calvin_env; tests/calvin/test_calvin.py"),
    Rule(
        r"openhelix eval .*target=mine:",
        None,
        "the policy is the reader's; tests/paper/test_leaderboard.py names an evaluation",
    ),
    Rule(
        r"openhelix eval --suite tasks",
        f"{SHORT} --episodes-per-task 1 --tasks open_drawer --scene D",
    ),
    Rule(
        r"openhelix eval --suite calvin-d",
        f"{SHORT} --episodes-per-task 1 --tasks lift_red_block_table --patterns static "
        "--speeds paper",
    ),
    Rule(r"openhelix eval --suite calvin-r", f"{SHORT} --tasks open_drawer"),
    Rule(r"openhelix eval --suite switch", f"--steps 31 --workers 1 {PLAIN} --tasks open_drawer"),
    Rule(r"openhelix eval --suite", f"{SHORT} --sequences 1"),
    Rule(r"openhelix sweep", None, "hours; tests/evaluation/test_eval_command.py runs a small one"),
    Rule(
        r"openhelix compare",
        None,
        "the folders are the reader's; tests/evaluation/test_eval_command.py",
    ),
    Rule(r"openhelix experiment --list", ""),
    Rule(r"openhelix experiment", None, "trains; tests/paper runs a session on stand-ins"),
    Rule(r"openhelix probe --places", "--places 24"),
    Rule(r"openhelix probe ", None, "a 7B checkpoint; tests/system2/test_probe.py has a tiny one"),
    Rule(r"openhelix gate", None, "half an hour; tests/evaluation/test_gating.py fits one"),
    Rule(r"openhelix collect format=calvin", "jobs=1 per_task=1"),
    Rule(r"openhelix collect scenes=ABC", None, "minutes; tests/calvin/test_collect.py"),
    Rule(r"openhelix data ", "jobs=1"),
    Rule(r"openhelix convert ", None, "weights of the reader's own; tests/system1/test_convert.py"),
    Rule(r"pytest -m slow|perf\.bench_two_hosts", None, "slow, needs root; run by make test-slow"),
    Rule(
        r"\bray (up|down|exec|get-auth-token)|^docker |^prometheus ",
        None,
        "needs other hosts or Docker",
    ),
    Rule(r"^deploy/install-debian.sh", None, "installs packages; CI runs it"),
    Rule(
        r"deploy.grafana.picture", None, "needs a Prometheus; tests/deploy/test_grafana_picture.py"
    ),
    Rule(r"^GF_SERVER", None, "needs Grafana"),
)
PROGRAM = re.compile(
    r"^(?:\.venv/bin/)?(?:openhelix|torchrun|make|python|ray|docker|prometheus|OPENHELIX_ROBOT|GF_SERVER_HTTP_ADDR|deploy/\S+\.sh)(?= |=|$)"
)


def shown() -> dict[str, list[str]]:
    """Every command in the pages' blocks, without its remark, by page."""
    found: dict[str, list[str]] = {}
    for page in PAGES:
        text = re.sub(r"^```.*?^```$", "", (DOCS / page).read_text(), flags=re.M | re.S)
        lines = [*commands(page), *re.findall(r"^    (\S.*)$", text, re.M)]
        lines = [re.sub(r"\s+", " ", re.split(r"\s\s+#", line)[0]).strip() for line in lines]
        lines = [line.removeprefix("cd ~/openhelix && ") for line in lines]
        found[page] = [line for line in lines if PROGRAM.match(line)]
    return found


def rule_of(command: str) -> Rule:
    for rule in RULES:
        if re.search(rule.pattern, command):
            return rule
    raise AssertionError(f"no rule knows: {command}")


COMMANDS = sorted({command for lines in shown().values() for command in lines})
RUN = [command for command in COMMANDS if rule_of(command).add is not None]


def test_every_rule_is_needed_and_says_why() -> None:
    assert len(COMMANDS) > 40
    used = {rule_of(command) for command in COMMANDS}
    assert not [rule.pattern for rule in RULES if rule not in used]
    assert all(rule.why for rule in RULES if rule.add is None)


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like a checkout and has the pages' own files, nothing else."""
    folder = tmp_path_factory.mktemp("desk")
    for name in ("configs", "checkpoints", "openhelix", "tests", "Makefile", "pyproject.toml"):
        (folder / name).symlink_to(ROOT / name)
    for page, name in (("add-a-robot.md", "my_arm.py"), ("add-a-policy.md", "my_policy.py")):
        (code,) = blocks(page, "python")
        (folder / name).write_text(code)
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(folder / "scene.png")
    write_split(folder / "calvin" / "task_ABC_D" / "training")
    return folder


@pytest.mark.parametrize("command", RUN)
def test_it_runs_as_shown(command: str, desk: Path) -> None:
    rule = rule_of(command)
    assert rule.add is not None
    line = command.replace(".venv/bin/python", sys.executable)
    line = re.sub(r"^(\.venv/bin/)?openhelix\b", f"{sys.executable} -m openhelix", line)
    line = line.replace("~/", f"{desk}/home/")
    words = f"{line} {rule.add}"
    if "openhelix" in line and not re.search("doctor|keys|status|collect|experiment", line):
        words += " --json"
    environment = os.environ | {"PYTHONPATH": f"{desk}:{ROOT}", "OPENHELIX_CACHE": ""}
    environment.pop("OPENHELIX_CACHE")
    environment.pop("OPENHELIX_SKIPPED", None)  # a pytest inside has skips of its own
    done = subprocess.run(
        words,
        shell=True,
        executable="/bin/bash",
        cwd=desk,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == rule.code, f"{shlex.join([words])}\n{done.stderr[-2000:]}"
    if words.endswith("--json") and rule.code == 0:
        assert isinstance(json.loads(done.stdout), dict)
