"""A run in the terminal: what is waited for, a live view while it runs, and what became of it.

Everything fits 80 columns. Drawing happens in the head process, never in the control loop's. Without
a terminal the live view becomes one plain line per event, so that a log stays readable.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import stat
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from openhelix.runtime.core.output import descriptors
from openhelix.runtime.observe.prompt import Prompt, myself

WIDTH = 78  # columns that a line may have
WAITS_FOR = {  # what a node does before it is ready, as a person would say it
    "ray": "Ray",
    "system1": "System 1 (loads the policy)",
    "system2": "System 2 (loads the model)",
    "world": "the world",
    "camera": "the cameras",
    "control": "the robot",
    "observer": "the observer",
}


class Audience:
    """Who reads what we write: a terminal, or the other end of a pipe, as long as it is there.

    A closed terminal that was to be ignored (`nohup`) is.
    """

    def __init__(self) -> None:
        self._poll = select.poll()
        ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        for number in descriptors():
            with contextlib.suppress(OSError):
                pipe = stat.S_ISFIFO(os.fstat(number).st_mode)
                if pipe or (os.isatty(number) and not ignored):
                    self._poll.register(number, 0)

    @property
    def gone(self) -> bool:
        """Whether one of them is."""
        events = self._poll.poll(0)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in events)


class Outlet:
    """A standard stream that may go away: what cannot be written then is not written.

    News (standard error) is never worth an error; results (standard output) are, unless it is
    their reader who has gone.

    Args:
        name: "stdout" or "stderr"; whichever stream that is at the time.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def write(self, text: str) -> int:
        with self._leniently():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._leniently():
            self._stream.flush()

    @contextlib.contextmanager
    def _leniently(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if self._name == "stdout" and error.errno not in (errno.EPIPE, errno.EIO):
                raise

    @property
    def _stream(self) -> Any:
        stream = getattr(sys, self._name)
        return getattr(stream, "rich_proxied_file", stream)  # beneath what a live view puts there

    def __getattr__(self, name: str) -> Any:
        if name == "rich_proxied_file":
            raise AttributeError(name)
        return getattr(self._stream, name)


class Display:
    """Progress and results; writes to standard error, so that standard output stays clean.

    Args:
        live: False keeps silent until the summary.
        console: where to; made for standard error by default.
    """

    def __init__(self, live: bool = True, console: Console | None = None) -> None:
        self.console = console or Console(file=cast(IO[str], Outlet("stderr")), highlight=False)
        self._audience = Audience()
        self._on = live
        self._live: Live | None = None
        self._told: dict[str, str] = {}
        self._entries_told = 0
        self._prompt: Prompt | None = None
        self._start_s = time.monotonic()

    def __enter__(self) -> Display:
        self._draw()
        return self

    def _draw(self) -> None:
        if self._on and self.console.is_terminal:
            # A prompt has replaced the streams, and puts them back before the live view ends.
            aside = self._prompt is None
            self._live = Live(
                console=self.console,
                refresh_per_second=8,
                transient=True,
                redirect_stdout=aside,
                redirect_stderr=aside,
            )
            self._live.start()

    def __exit__(self, *error: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    @property
    def gone(self) -> bool:
        """Whether nobody can see this any more: the terminal was closed, a pipe's reader ended."""
        return self._audience.gone

    def above(self, prompt: Prompt) -> None:
        """From now on the live view is above a prompt, which redraws it."""
        if self._live is not None:
            self._live.stop()
            self._live = None
        self._prompt = prompt

    def say(self, text: str, style: str = "") -> None:
        """One line of news, with the time since the start."""
        if not self._on:
            return
        since, line = Text(f"{time.monotonic() - self._start_s:6.1f} s", "dim"), Text(text, style)
        if not self.console.is_terminal:  # a log has one line for each
            self.console.print(since + Text("  ") + line, soft_wrap=True)
            return
        row = Table.grid(padding=(0, 2, 0, 0))
        row.add_column(no_wrap=True)
        row.add_column(overflow="fold")
        row.add_row(since, line)
        self.console.print(row)

    def warn(self, text: str) -> None:
        """One line that must be read, also where only the report is wanted (`--json`)."""
        if self._on:
            self.say(text, "yellow")
        else:
            self.console.print(text, markup=False, soft_wrap=True)

    def states(self, states: Mapping[str, str]) -> None:
        """The nodes' states while they start."""
        for name, state in states.items():
            # On a busy machine a node that is ready may not answer in time: no news.
            if state in ("unreachable", "starting") or state == self._told.get(name):
                continue
            self._told[name] = state
            self.say(f"{name}: {state}")
        waiting = [name for name, state in states.items() if state not in ("ready", "done")]
        if waiting:
            # System 1 and System 2 take seconds, everything else waits for them in turn.
            longest = [n for n in ("system2", "system1") if n in waiting] or waiting
            if "ray" in waiting:
                longest = ["ray"]
            self.waiting(" and ".join(WAITS_FOR.get(name, name) for name in longest))

    def waiting(self, what: str) -> None:
        """Show what is being waited for, with a spinner, until something else is shown."""
        if self._live is not None:
            spent = f"{time.monotonic() - self._start_s:.0f} s"
            self._live.update(Spinner("dots", Text(f"waiting for {what}, {spent}")))

    def progress(self, health: Mapping[str, Any], steps_limit: int) -> None:
        """The loop's own account of itself, a few times a second."""
        for entry in health.get("entries", ()):
            if entry["number"] <= self._entries_told:
                continue
            self._entries_told = entry["number"]
            own = self._prompt is not None and entry["who"] == myself()  # what is typed is there
            first = self._prompt is not None and entry["kind"] == "acting"
            if (entry["kind"] in TOLD or first) and not own:
                self.say(entry["line"], STYLES.get(_mood(entry), ""))
        if not health.get("loop_state"):
            return
        if self._prompt is not None and self._prompt.left and self._live is None:
            self._draw()  # nobody types any more, and the prompt redraws nothing
        if self._live is not None:
            self._live.update(_live_table(health, steps_limit))
        elif self._prompt is not None:
            drawing = Console(width=WIDTH + 2, force_terminal=True, highlight=False)
            with drawing.capture() as drawn:
                drawing.print(_live_table(health, steps_limit))
            self._prompt.view(tuple(drawn.get().rstrip("\n").split("\n")))

    @contextmanager
    def working(self, what: str, total: int | None) -> Iterator[Callable[[int], None]]:
        """Show a bar with the time left while the block works; gives a function to tell it."""
        if not (self._on and self.console.is_terminal):
            yield lambda done: None
            return
        if self._live is not None:
            self._live.stop()
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(24),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeRemainingColumn(compact=True),
        )
        with Progress(*columns, console=self.console, transient=True) as bar:
            task = bar.add_task(what, total=total)
            yield lambda done: bar.update(task, completed=done)

    def summary(self, report: Mapping[str, Any], folder: Path) -> None:
        """What became of the run, on standard output."""
        console = Console(file=cast(IO[str], Outlet("stdout")), highlight=False)
        limit = f"at most {report['steps_limit']} steps per instruction"
        console.print(f"[bold]{report['clock']} clock, {limit}[/bold]")
        console.print(_result_table(report) if report["tasks"] else "it was told to do nothing")
        rows = figures(report)
        for name, file in FILES.items():
            if (folder / file).exists():
                rows.append((name, f"{folder / file}"))
        if (folder / "track.mcap").exists() or (folder / "recording.mcap").exists():
            rows.append(("look", f"openhelix view {folder}"))
        print_rows(console, rows)


TOLD = ("begun", "seen", "ended", "held", "said", "answer")
STYLES = {"good": "green", "bad": "red"}
NONE = "-"
PARTS = (("System 1", "s1_latency_s", "plan"), ("System 2", "s2_latency_s", "latent"))
FILES = {"report": "report.json", "film": "video.mp4", "viewer": "run.rrd"}


def _mood(entry: Mapping[str, Any]) -> str:
    if entry["kind"] == "seen" or entry["success"]:
        return "good"
    return "bad" if entry["success"] is False else ""


def print_rows(console: Console, rows: Sequence[tuple[str, str]]) -> None:
    """Print names and values aligned; a value is never broken, so that it can be copied."""
    width = max((len(name) for name, _ in rows), default=0)
    for name, value in rows:
        console.print(f"  [dim]{name:<{width}}[/dim]  {escape(value)}", soft_wrap=True)


def _live_table(health: Mapping[str, Any], steps_limit: int) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(no_wrap=True, overflow="ellipsis", max_width=WIDTH - 16)
    state = health["loop_state"] + (f" ({health['loop_reason']})" if health["loop_reason"] else "")
    sentence = Text(health.get("instruction") or "-", "bold")
    table.add_row("instruction", sentence)
    table.add_row("step", f"{health['steps']} of {steps_limit}, {state}")
    age = health["latent_age_s"]
    rate = f"control {_number(health['control_hz'], '.1f')} Hz, "
    rate += "no latent yet" if age is None else f"latent {age:.2f} s old"
    if health["understood"] is not None:
        rate += f", {health['understood']:.0%} understood"
    table.add_row("now", rate)
    judged = [row for row in health["tasks"] if row["task"]]
    if judged:
        table.add_row("so far", f"{health['n_success']} of {len(judged)} done")
    return table


def _result_table(report: Mapping[str, Any]) -> Table:
    wall = report["clock"] == "realtime"
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("task or sentence", no_wrap=True, overflow="ellipsis", max_width=34)
    table.add_column("result", no_wrap=True, overflow="ellipsis", max_width=24)
    for name in ("steps", "held", *(["seconds"] if wall else [])):
        table.add_column(name, justify="right", no_wrap=True)
    for row in report["tasks"]:
        cells = [str(row["env_steps"]), str(row["hold_steps"])]
        if wall:
            cells.append(f"{row['duration_s']:.1f}")
        table.add_row(escape(row["task"] or row["instruction"]), _result(row), *cells)
        for seen in row.get("seen", ()):
            table.add_row(f"  [green]{seen['task']}[/green]", "seen", str(seen["steps"]))
    return table


def _result(row: Mapping[str, Any]) -> str:
    if row["success"]:
        return "[green]success[/green]"
    reason = escape(row["reason"])
    return f"[red]{reason}[/red]" if row["task"] else reason


def figures(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the figures of a run as names and values, for a person."""

    def of(name: str, key: str, scale: float, form: str) -> str:
        return _number((report.get(name) or {}).get(key), form, scale)

    rows = []
    judged = [row for row in report["tasks"] if row["task"]]
    if judged:
        rows.append(
            (
                "tasks",
                f"{report['n_success']} of {len(judged)}, {report['success_in_a_row']} in a row",
            )
        )
    timed = []  # what never happened took no time
    if (age := of("latent_age_s", "p50", 1, ".2f")) != NONE:
        timed.append(("latent age", f"{age} s at the median"))
    # In lockstep time stands still while the loop computes: nothing is late and nothing takes time.
    if report["clock"] == "realtime":
        late = of("tick_lateness_s", "p99", 1e3, ".2f")
        rows += [
            ("control", f"{_number(report['control_hz'], '.2f')} Hz over {report['ticks']} ticks"),
            ("lateness", f"p99 {late} ms, {report['deadline_missed']} deadlines missed"),
        ]
        for name, key, what in PARTS:
            if (took := of(key, "p50", 1e3, ".0f")) != NONE:
                timed.append((name, f"{took} ms a {what}"))
    else:
        rows.append(("ticks", str(report["ticks"])))
    rows += timed
    if report.get("stopped"):
        rows.append(("stopped", str(report["stopped"])))
    return rows


def _number(value: float | None, form: str, scale: float = 1.0) -> str:
    return NONE if value is None else format(value * scale, form)
