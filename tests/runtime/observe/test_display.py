"""What is shown goes nowhere when nobody is there to see it, and that is noticed."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from rich.console import Console

from openhelix.benchmarks.perf.fault_system import terminal
from openhelix.runtime.observe.display import Display, figures

TALK = """
import sys
from openhelix.runtime.observe.display import Display, Outlet
with Display() as display:
    open({mark!r}, "w").close()
    sys.stdin.readline()
    for _ in range(3):
        display.say("news")
        display.waiting("nothing")
    display.warn("more of it")
    print("a result", file=Outlet("stdout"), flush=True)
    with open({mark!r}, "w") as file:
        file.write(str(display.gone))
"""


@contextmanager
def talking(mark: Path, out: int, err: int) -> Iterator[subprocess.Popen[str]]:
    """A program that tells news once it may."""
    program = [sys.executable, "-c", TALK.format(mark=str(mark))]
    process = subprocess.Popen(
        program,
        stdin=subprocess.PIPE,
        stdout=out,
        stderr=err,
        text=True,
        # Under `nohup`, which these tests may run under, a closed terminal is nobody's absence.
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    )
    try:
        while not mark.exists():
            assert process.poll() is None
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("kind", ["pipe", "terminal"])
def test_who_writes_to_nobody_is_told_so_and_does_not_fail(tmp_path: Path, kind: str) -> None:
    ours, theirs = os.pipe() if kind == "pipe" else terminal()
    with talking(tmp_path / "mark", theirs, theirs) as process:
        os.close(theirs)
        os.close(ours)
        process.communicate("go\n", timeout=60)
        assert process.returncode == 0
    assert (tmp_path / "mark").read_text() == "True"


def test_a_file_or_a_reader_that_is_there_is_somebody(tmp_path: Path) -> None:
    ours, theirs = os.pipe()
    with (
        (tmp_path / "out").open("wb") as file,
        talking(tmp_path / "mark", file.fileno(), theirs) as process,
    ):
        process.communicate("go\n", timeout=60)
        assert process.returncode == 0
    os.close(theirs)
    assert b"news" in os.read(ours, 65536)
    os.close(ours)
    assert (tmp_path / "mark").read_text() == "False"
    assert (tmp_path / "out").read_text() == "a result\n"


def test_a_result_that_cannot_be_written_is_an_error_news_are_not() -> None:
    program = "from openhelix.runtime.observe.display import Display, Outlet\n"
    program += "Display().say('news')\nprint('a result', file=Outlet('stdout'), flush=True)\n"
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-c", program], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode != 0 and "No space left on device" in done.stderr


def test_a_state_is_told_once_it_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    display = Display()
    display.states({"ray": "starting", "system2": "unreachable", "control": "ready"})
    assert "control: ready" in capsys.readouterr().err


def test_news_are_broken_between_words_in_a_terminal_and_not_at_all_in_a_log() -> None:
    text = "System 2: shipped, e0bbd89cb2e1 (openhelix.system2.engines.vllm:VllmEngine)"
    for seen in (True, False):
        file = io.StringIO()
        console = Console(file=file, force_terminal=seen, width=60, color_system=None)
        Display(console=console).say(text)
        lines = [line.rstrip() for line in file.getvalue().splitlines()]
        if not seen:
            assert len(lines) == 1 and lines[0].endswith(text)
            continue
        assert len(lines) == 2 and max(map(len, lines)) <= 60
        assert lines[0].endswith(" s  System 2: shipped, e0bbd89cb2e1")
        assert lines[1].split() == ["(openhelix.system2.engines.vllm:VllmEngine)"]


def test_what_never_happened_has_no_figure() -> None:
    idle = {
        **{"clock": "realtime", "tasks": [], "control_hz": 30.0, "ticks": 90},
        **{"deadline_missed": 0, "tick_lateness_s": {"p99": 1e-5}},
        **{"latent_age_s": {"p50": None}, "s1_latency_s": {"p50": None}, "s2_latency_s": None},
    }
    assert [name for name, _ in figures(idle)] == ["control", "lateness"]
    acted = idle | {"latent_age_s": {"p50": 0.5}, "s1_latency_s": {"p50": 0.02}}
    assert figures(acted)[2:] == [
        ("latent age", "0.50 s at the median"),
        ("System 1", "20 ms a plan"),
    ]
