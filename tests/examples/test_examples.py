"""Every example runs as it stands there, made short."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import matplotlib
import pytest

from tests.integration.session import SMALL

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
SCRIPTS = {
    "act_in_a_loop.py": (("open_drawer", "2"), r"told to: .*\n2 steps; completed: \[\]"),
    "own_policy.py": (("20",), r"n = 1\nfilms, figures and every attempt: .*report\.html"),
    "own_robot.py": (("20",), r"draw a circle +step limit +20"),
    "asynchrony_study.py": (("1", "1", "2", "30"), r"a latent every 30 steps: .*\nasynchrony\.png"),
}


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{EXAMPLES}", "COLUMNS": "80"}
    return subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )


def test_all_examples_are_in_the_table_and_are_run() -> None:
    listed = set(re.findall(r"^\| `([\w.]+)`", (EXAMPLES / "README.md").read_text(), re.M))
    there = {path.name for path in EXAMPLES.glob("*.py")} | {"tour.ipynb"}
    assert listed == there == {*SCRIPTS, "talk_to_it.py", "tour.ipynb"}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_does_what_it_says(name: str, tmp_path: Path) -> None:
    words, expected = SCRIPTS[name]
    done = run(tmp_path, str(EXAMPLES / name), *words)
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(expected, done.stdout), done.stdout
    assert len((EXAMPLES / name).read_text().splitlines()) < 125


def test_a_robot_is_talked_to(tmp_path: Path) -> None:
    words = (*SMALL, "output.status=true", "output.track=false", f"output.folder={tmp_path}")
    sentences = ("reach 0.3 0.1 0.7", "reach 0.1 -0.1 0.6")
    done = run(tmp_path, str(EXAMPLES / "talk_to_it.py"), *sentences, *words)
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(r"'reach 0.3 0.1 0.7': first action after \d", done.stdout), done.stdout
    assert "wait: holds still until told to go on" in done.stdout
    assert "go on: goes on" in done.stdout
    assert "'reach 0.1 -0.1 0.6' instead of 'reach 0.3 0.1 0.7'" in done.stdout
    assert "stop: stands still" in done.stdout
    report = json.loads((tmp_path / "latest" / "report.json").read_text())
    assert [row["reason"] for row in report["tasks"]] == ["replaced", "stopped by example"]


def test_the_notebook_runs_from_top_to_bottom(monkeypatch: pytest.MonkeyPatch) -> None:
    matplotlib.use("Agg")
    monkeypatch.chdir(EXAMPLES)
    notebook = json.loads((EXAMPLES / "tour.ipynb").read_text())
    cells = ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]
    assert all(not c.get("outputs") for c in notebook["cells"])  # it is kept without its pictures
    names: dict[str, object] = {}
    for number, cell in enumerate(cells):
        short = cell.replace("range(60)", "range(6)")
        exec(compile(short, f"cell {number}", "exec"), names)
    assert len(names["path"]) == 6  # type: ignore[arg-type]
    cosine = names["cosine"]
    assert min(names["same"]) > cosine[0, 2]  # type: ignore[call-overload, index]
