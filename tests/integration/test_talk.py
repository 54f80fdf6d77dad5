"""Talking to a run from everywhere: a prompt, other terminals, Python; and what must not stop it."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import select
import struct
import subprocess
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from openhelix import Robot
from openhelix.runtime.observe.status_source import NoRun
from tests.integration.command import CLI, wait_for
from tests.integration.session import SMALL

FAR, NEAR = "reach 0.3 0.1 0.7", "reach 0.1 -0.1 0.6"
PATIENCE_S = 60.0
WORDS = (
    *SMALL,
    "ray=false",
    "output.status=true",
    "tasks.steps_limit=100000",
    "output.track=false",
)


@contextmanager
def running(base: Path, *words: str, **pipes: Any) -> Iterator[subprocess.Popen[str]]:
    """A run below `base`, ended if need be."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | pipes
    run = subprocess.Popen(
        [*CLI, "run", *WORDS, f"output.folder={base}", *words], text=True, **pipes
    )
    try:
        yield run
    finally:
        if run.poll() is None:
            run.terminate()
            run.wait(PATIENCE_S)


def say(base: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """`openhelix say`."""
    command = [*CLI, "say", *words, f"output.folder={base}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def until_acting(robot: Robot) -> None:
    def acting() -> bool:
        try:
            return bool(robot.status()["state"] == "run")
        except NoRun:
            return False

    wait_for("a robot that acts", acting, 200.0)


class Terminal:
    """A terminal of 80 columns, as a person has it before them."""

    def __init__(self) -> None:
        self._master, self.slave = pty.openpty()
        size = struct.pack("HHHH", 24, 80, 0, 0)
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, size)
        self.text = ""

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def until(self, words: str, timeout_s: float = PATIENCE_S) -> None:
        """Read until some words have come."""
        end_s = time.monotonic() + timeout_s
        while words not in self.text:
            assert time.monotonic() < end_s, f"{words!r} did not come: {self.text[-3000:]}"
            self.read(0.2)

    def read(self, wait_s: float) -> None:
        if select.select([self._master], [], [], wait_s)[0]:
            try:
                self.text += os.read(self._master, 65536).decode(errors="replace")
            except OSError:  # nobody is at the other end any more
                time.sleep(wait_s)

    def close(self) -> None:
        os.close(self._master)


def journal(base: Path) -> list[dict[str, Any]]:
    """What a run that has ended says was said."""
    (file,) = base.glob("run-*/report.json")
    return list(json.loads(file.read_text())["journal"])


def test_a_prompt_under_the_live_view(tmp_path: Path) -> None:
    terminal = Terminal()
    pipes = {"stdin": terminal.slave, "stdout": terminal.slave, "stderr": terminal.slave}
    with running(tmp_path, "--interactive", start_new_session=True, **pipes) as run:
        os.close(terminal.slave)
        terminal.until("type what the robot is to do", 200.0)
        terminal.type(f"{FAR}\r")
        terminal.until("first action after")
        terminal.type("wait\r")
        terminal.until("holds still until told to go on")
        terminal.type("go on\r")
        terminal.until("goes on")
        terminal.type("x" * 600 + "\r")
        terminal.until("500")  # how long a sentence may be
        terminal.type("go onn\r")
        terminal.until("did you mean 'go on'")
        terminal.type("stop\r")
        terminal.until("stands still")
        terminal.type("\x04")  # Ctrl-D: nothing more will be said
        terminal.until("the run ends when the robot has done what it does")
        end_s = time.monotonic() + PATIENCE_S
        while run.poll() is None and time.monotonic() < end_s:
            terminal.read(0.1)
        assert run.returncode == 0, terminal.text[-2000:]
    terminal.close()
    assert "ConfigError" not in terminal.text
    kinds = [entry["kind"] for entry in journal(tmp_path)]
    assert kinds.count("said") == 4 and "acting" in kinds and kinds.count("held") == 3
    (file,) = tmp_path.glob("run-*/report.json")
    (told,) = json.loads(file.read_text())["tasks"]
    assert told["instruction"] == FAR and told["success"] is None


def test_ctrl_c_at_the_prompt_of_an_idle_robot_is_an_interruption(tmp_path: Path) -> None:
    terminal = Terminal()
    pipes = {"stdin": terminal.slave, "stdout": terminal.slave, "stderr": terminal.slave}
    with running(tmp_path, "--interactive", start_new_session=True, **pipes) as run:
        os.close(terminal.slave)
        terminal.until("nothing to do", 200.0)
        terminal.type("\x03")
        end_s = time.monotonic() + PATIENCE_S
        while run.poll() is None and time.monotonic() < end_s:
            terminal.read(0.1)
        assert run.returncode == 130, terminal.text[-2000:]
    assert "it was told to do nothing" in terminal.text
    terminal.close()


def test_a_terminal_that_is_closed_ends_its_own_run_in_order(tmp_path: Path) -> None:
    terminal = Terminal()
    pipes = {"stdin": terminal.slave, "stdout": terminal.slave, "stderr": terminal.slave}

    def own() -> None:  # the terminal's, so that it hears of its end
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    with running(tmp_path, "--interactive", preexec_fn=own, **pipes) as run:
        os.close(terminal.slave)
        terminal.until("type what the robot is to do", 200.0)
        terminal.type(f"{FAR}\r")
        terminal.until("first action after")
        terminal.close()
        run.wait(PATIENCE_S)
    assert [e["text"] for e in journal(tmp_path) if e["kind"] == "said"] == [FAR]


def test_lines_of_a_pipe_are_said_one_after_the_other(tmp_path: Path) -> None:
    with running(tmp_path, "--interactive", "--json", stdin=subprocess.PIPE) as run:
        assert run.stdin is not None
        run.stdin.write(f"{FAR}\n\nstop\n")
        run.stdin.close()
        assert run.stdout is not None
        report = json.loads(run.stdout.read())
        assert run.wait(PATIENCE_S) == 0
    assert [e["text"] for e in report["journal"] if e["kind"] == "said"] == [FAR, "stop"]


def test_other_terminals_and_python_talk_to_a_run(tmp_path: Path) -> None:
    with running(tmp_path, f"tasks.instruction={FAR}") as run, Robot(outputs=tmp_path) as robot:
        until_acting(robot)
        done = say(tmp_path, NEAR, "--who", "ann")
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[:2] == [f"follows: {NEAR}", f"instead of: {FAR}"]
        assert "first action after" in done.stdout
        # Another person, from Python: both are told.
        told = Robot(outputs=tmp_path, who="ben").say(FAR)
        assert (told.replaces, told.replaces_who) == (NEAR, "ann")
        assert told.first_action_s is not None
        # A follower whose terminal is closed takes nothing with it.
        terminal = Terminal()
        follower = subprocess.Popen(
            [*CLI, "say", NEAR, "--follow", f"output.folder={tmp_path}"],
            stdout=terminal.slave,
            stderr=terminal.slave,
        )
        os.close(terminal.slave)
        terminal.until(f"follows: {NEAR}")
        terminal.until("first action after")
        for _ in range(5):
            terminal.read(0.2)
        terminal.close()  # nothing more happens that it could fail to tell
        follower.wait(PATIENCE_S)
        assert "replaced" not in terminal.text  # that was the one before
        done = say(tmp_path, "wait")
        assert done.stdout == "holds still until told to go on\n"
        wait_for("a robot that holds", lambda: robot.status()["state"] == "hold")
        assert say(tmp_path, "go on").stdout == "goes on\n"
        # What is no sentence is refused in one line, and the robot goes on.
        for wrong in ("", "open\x07the drawer", "x" * 10_000):
            refused = say(tmp_path, wrong)
            assert refused.returncode == 2 and len(refused.stderr.strip().splitlines()) == 1
        until_acting(robot)
        done = say(tmp_path, "stop", "--json")
        assert json.loads(done.stdout)["word"] == "stop"
        assert run.poll() is None
        robot.stop()
        assert run.wait(PATIENCE_S) == 3, run.stderr.read()
    said = [(e["who"], e["text"]) for e in journal(tmp_path) if e["kind"] == "said"]
    assert said[:2] == [("ann", NEAR), ("ben", FAR)]


def test_nobody_to_talk_to_is_one_line(tmp_path: Path) -> None:
    done = say(tmp_path, FAR)
    assert done.returncode == 1 and "no run is alive" in done.stderr
    with pytest.raises(NoRun):
        Robot(outputs=tmp_path).say(FAR)
