"""`--json` prints one object, whatever the libraries that a command loads print."""

# ruff: noqa: T201  (printing is what this is about)

from __future__ import annotations

import ast
import atexit
import ctypes
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from openhelix.runtime.cli.main import main
from openhelix.runtime.core import output, plugins
from tests.fakes import ReachPolicy

CLI = (sys.executable, "-m", "openhelix.runtime.cli.main")
RUN = (
    *("run", "control.clock=lockstep", "robot.name=fake", "tasks.steps_limit=10"),
    *("output.video=false", "output.metrics_port=null", "tasks.instruction=reach 0.3 0 0.5"),
    "system2.engine.target=openhelix.runtime.robots.fake:PointEngine",
)


def shout() -> None:
    """Everything that ends up on standard output, each in its own way."""
    print('{"from": "print"}')
    sys.stdout.write('{"from": "write"}\n')
    sys.__stdout__.write('{"from": "the first stdout"}\n')
    sys.__stdout__.flush()
    os.write(1, b'{"from": "a descriptor"}\n')
    libc = ctypes.CDLL(None)
    libc.puts(b'{"from": "C"}')
    libc.fflush(None)
    subprocess.run(["echo", '{"from": "a process"}'], check=True)


class Loud(ReachPolicy):
    """Prints when it is made and when it acts."""

    def __init__(self, ends: str = "", last: bool = True) -> None:
        shout()
        if last:
            atexit.register(lambda: (print("the end"), os.write(1, b"the very end\n")))
        super().__init__()
        self._ends = ends

    def act(self, observation, latents):
        shout()
        if self._ends:
            raise RuntimeError("as configured")
        return super().act(observation, latents)


def run(tmp_path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*CLI, *RUN, f"output.folder={tmp_path}", *words],
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_with_json_only_the_object_is_on_standard_output(tmp_path: Path) -> None:
    done = run(tmp_path, f"system1.policy.target={__name__}:Loud", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["ticks"] == 10 and "from" not in report
    for said in ("print", "write", "the first stdout", "a descriptor", "C", "a process"):
        assert f'"from": "{said}"' in done.stderr
    assert "the very end" in done.stderr


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ((f"system1.policy={{target: '{__name__}:Loud', options: {{ends: x}}}}",), 1),
        ((f"system1.policy.target={__name__}:Loud", "world.scene=Q"), 2),
    ],
)
def test_what_fails_prints_its_report_or_nothing(tmp_path: Path, words, code) -> None:
    done = run(tmp_path, *words, "--json")
    assert done.returncode == code
    assert done.stderr.count("openhelix run: ") == 1
    if code == 1:
        assert json.loads(done.stdout)["error"] == "system1: RuntimeError: as configured"
    else:
        assert done.stdout == ""


def test_a_command_that_is_called_gives_standard_output_back(tmp_path: Path, capfd) -> None:
    before = sys.stdout
    policy = f"system1.policy={{target: '{__name__}:Loud', options: {{last: false}}}}"
    assert main([*RUN, f"output.folder={tmp_path}", policy, "--json"]) == 0
    assert sys.stdout is before
    assert json.loads(capfd.readouterr().out)["ticks"] == 10
    print("as ever")
    assert capfd.readouterr().out == "as ever\n"


def test_help_is_not_an_answer_and_is_printed(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["run", "--json", "--help"])
    assert "usage: openhelix run" in capsys.readouterr().out


def test_whoever_stops_reading_ends_nothing_with_an_error(tmp_path: Path) -> None:
    words = [*RUN, f"output.folder={tmp_path}", f"system1.policy.target={__name__}:Loud", "--json"]
    process = subprocess.Popen([*CLI, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    errors = process.stderr.read().decode()
    assert process.wait(300) in (0, 130) and "Traceback" not in errors  # a run may end for it
    assert (tmp_path / "latest" / "report.json").exists()


@pytest.mark.parametrize("name", sorted(plugins.entries(plugins.COMMANDS)))
def test_every_command_answers_in_the_one_way(name: str) -> None:
    """A command that printed its object itself would have it on standard error."""
    module = plugins.entries(plugins.COMMANDS)[name].partition(":")[0]
    if not module.startswith("openhelix."):
        pytest.skip("another package's")
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None
    tree = ast.parse(Path(spec.origin).read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr == "stdout":
            assert getattr(node.value, "id", "") != "sys", node.lineno
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print":
            assert any(k.arg == "file" for k in node.keywords), node.lineno


def test_an_answer_ends_its_line(capsys) -> None:
    with output.reserved():
        print("aside")
        output.answer("one")
        output.answer("two\n")
    captured = capsys.readouterr()
    assert captured.out == "one\ntwo\n" and captured.err == "aside\n"
