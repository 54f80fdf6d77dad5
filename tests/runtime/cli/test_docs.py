"""What the documentation tells people to write and to type works as it stands there."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from openhelix.benchmarks.paper.catalogue import Experiment, Variant
from openhelix.runtime.cli.main import main
from openhelix.runtime.core import plugins
from openhelix.runtime.core.config import RunConfig, load, validate
from openhelix.runtime.observe.metrics import catalogue
from tests.runtime.docs_code import DOCS, blocks, commands

ROOT = DOCS.parent
PAGES = ("../README.md", "../ARCHITECTURE.md", *sorted(page.name for page in DOCS.glob("*.md")))


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere_and_every_command_exists(page: str) -> None:
    text = (DOCS / page).read_text()
    for target in re.findall(r"\]\(([^)#]+)", text):
        assert "://" in target or ((DOCS / page).parent / target).exists(), target
    for path in re.findall(r"`((?:runtime|system1|system2|benchmarks|tests)/[\w/.]+)`", text):
        assert (ROOT / path).exists(), path
    for command in commands(page):
        words = command.split("#")[0].split()
        if words and words[0].removeprefix(".venv/bin/") == "openhelix":
            assert words[1] in plugins.entries(plugins.COMMANDS), command


@pytest.mark.parametrize("page", PAGES)
def test_every_field_that_is_named_is_one_of_the_configuration(page: str) -> None:
    sections = "|".join(RunConfig.model_fields)
    text = re.sub(r"^```python.*?^```$", "", (DOCS / page).read_text(), flags=re.M | re.S)
    for name in sorted(set(re.findall(rf"[ `\"]((?:{sections})\.\w+)", text))):
        section, field = name.split(".")
        if (ROOT / section / f"{field}.py").exists() or (ROOT / section / field).is_dir():
            continue  # a module
        assert field in load(None).model_dump()[section], name


@pytest.mark.parametrize("page", PAGES)
def test_every_configuration_that_is_shown_is_valid(page: str) -> None:
    for block in blocks(page, "yaml"):
        shown = yaml.safe_load(block)
        if page != "experiments.md":
            validate(RunConfig, shown)
        elif "rows" in shown:
            validate(Experiment, {"name": "mine", **shown})
        else:
            for variant in shown.values():
                validate(Variant, variant)


@functools.cache
def help_of(command: str) -> str:
    said = io.StringIO()
    ways = ([], ["--ask", "what?"], ["--sentences", "mine.json"]) if command == "probe" else ([],)
    for way in ways:
        with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
            main([command, *way, "--help"])
    return said.getvalue()


def shown(page: str) -> list[str]:
    """What a page shows to type: lines of blocks, and code within sentences."""
    text = re.sub(r"^```.*?^```$", "", (DOCS / page).read_text(), flags=re.M | re.S)
    indented = re.findall(r"^    (\S.*)$", text, re.M)
    inline = [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", text)]
    return [*commands(page), *indented, *inline]


@pytest.mark.parametrize("page", PAGES)
def test_every_option_target_and_module_that_is_shown_exists(page: str) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for line in shown(page):
        words = line.split("  #")[0]
        for name, rest in re.findall(r"(?:^|/)openhelix ([a-z]+)( .*)?", words):
            for option in re.findall(r" (--[a-z-]+)", rest):
                assert re.search(rf"{option}\b", help_of(name)), line
        for target in re.findall(r"^make ([a-z][a-z0-9-]*)", words):
            assert re.search(rf"^{target}:", makefile, re.M), line
        for module in re.findall(r"python -m ([a-z0-9_.]+)", words):
            path = ROOT / module.replace(".", "/")
            assert module == "pytest" or path.with_suffix(".py").exists(), line


@pytest.mark.parametrize("page", ["training.md", "experiments.md"])
def test_every_setting_of_a_training_that_is_named_exists(page: str) -> None:
    text = (DOCS / page).read_text()
    names = set(re.findall(r"(?:[` ]|train\.)((?:policy|latent|stage1|stage2)\.[a-z]\w+)", text))
    assert names
    for name in names - {"latent.safetensors"}:
        assert f"  {name}=" in help_of("train"), name


def test_every_metric_that_is_named_exists() -> None:
    names = {entry.name for entry in catalogue()}
    for page in set(PAGES) - {"metrics.md"}:  # written from them, with what others count too
        for name in re.findall(r"`(\w+_total)\b", (DOCS / page).read_text()):
            assert f"openhelix_{name.removeprefix('openhelix_')}" in names, name


def run_line(line: str, folder: Path, *words: str) -> dict[str, Any]:
    """Run a command of a page with what the pages' code blocks are; return its report."""
    for page, name in (("add-a-robot.md", "my_arm.py"), ("add-a-policy.md", "my_policy.py")):
        (code,) = blocks(page, "python")
        (folder / name).write_text(code)
    line = line.replace("openhelix", f"{sys.executable} -m openhelix.runtime.cli.main", 1)
    more = (*words, "output.video=false", "output.metrics_port=0", f"output.folder={folder}/out")
    done = subprocess.run(
        f"{line} --json {' '.join(more)}",
        shell=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{folder}:{ROOT}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def test_the_robot_and_the_policy_of_the_pages_run_together(tmp_path: Path) -> None:
    (line,) = (line for line in commands("add-a-policy.md") if "GoThere" in line)
    line = line.replace("robot.name=fake", "robot.name=my_arm:TableArm")
    report = run_line(line, tmp_path, "tasks.steps_limit=90")
    assert report["tasks"][0]["env_steps"] == 90 and report["safe_stops"] == {}
    assert report["ticks_by_state"]["run"] == 90


@pytest.mark.timeout(600)
@pytest.mark.parametrize("clock", ["lockstep", "realtime"])
def test_the_robot_of_the_page_runs_as_the_page_says(tmp_path: Path, clock: str) -> None:
    lines = [line for line in commands("add-a-robot.md") if "robot.name=my_arm:TableArm" in line]
    (line,) = (line for line in lines if ("clock=lockstep" in line) == (clock == "lockstep"))
    # However busy this machine is; and Ray, where the page leaves it on, has tests of its own.
    patient = ("ray=false", "safety.latent_max_age_s=300", "control.hold_limit_s=300")
    report = run_line(line, tmp_path, "tasks.steps_limit=8", *patient)
    assert report["clock"] == clock and report["stopped"] is None
    assert report["tasks"][0]["env_steps"] == 8
    assert report["tasks"][0]["instruction"] == "lift the red block"
