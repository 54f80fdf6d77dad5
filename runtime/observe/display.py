"""A run in the terminal: states while it starts, a live line while it runs, a final table.

Drawing happens in the head process, never in the control loop's. Without a terminal the live
view becomes one plain line per task, so that a log stays readable.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text


class Display:
    """Progress and results; writes to standard error, so that standard output stays clean.

    Args:
        live: False keeps silent until the summary.
    """

    def __init__(self, live: bool = True) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._on = live
        self._live: Live | None = None
        self._told: dict[str, str] = {}
        self._rows_told = 0
        self._start_s = time.monotonic()

    def __enter__(self) -> Display:
        if self._on and self._console.is_terminal:
            self._live = Live(console=self._console, refresh_per_second=8, transient=True)
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def say(self, text: str) -> None:
        """One line of news, with the time since the start."""
        if self._on:
            self._console.print(f"[dim]{time.monotonic() - self._start_s:6.1f} s[/dim]  {text}")

    def warn(self, text: str) -> None:
        """One line that must be read, also where only the report is wanted (`--json`)."""
        if self._on:
            self.say(text)
        else:
            self._console.print(text, markup=False, soft_wrap=True)

    def states(self, states: dict[str, str]) -> None:
        """The nodes' states while they start."""
        for name, state in states.items():
            if state != self._told.get(name) and state not in ("unreachable", "starting"):
                self.say(f"{name}: {state}")
        self._told = dict(states)
        if self._live is not None:
            waiting = [name for name, state in states.items() if state != "ready"]
            self._live.update(Text(f"starting: {', '.join(waiting)}" if waiting else "ready"))

    def progress(self, health: dict[str, Any], steps_limit: int) -> None:
        """The loop's own account of itself, a few times a second."""
        for row in health.get("tasks", [])[self._rows_told :]:
            self._rows_told += 1
            mark = "[green]success[/green]" if row["success"] else f"[red]{row['reason']}[/red]"
            self.say(f"{row['task'] or 'task'}: {mark} after {row['env_steps']} steps")
        if self._live is not None and health.get("instruction"):
            self._live.update(_live_table(health, steps_limit))

    def summary(self, report: dict[str, Any], folder: Path) -> None:
        """The final table, on standard output."""
        console = Console(highlight=False)
        console.print(_result_table(report))
        console.print(_figures(report))
        if report.get("stopped"):
            console.print(f"[red]stopped: {report['stopped']}[/red]")
        if (folder / "report.json").exists():
            console.print(f"{folder}/report.json")
        if (folder / "video.mp4").exists():
            console.print(f"{folder}/video.mp4")


def _live_table(health: dict[str, Any], steps_limit: int) -> Table:
    table = Table.grid(padding=(0, 2))
    state = health["loop_state"] + (f" ({health['loop_reason']})" if health["loop_reason"] else "")
    table.add_row("instruction", f"[bold]{health['instruction']}[/bold]")
    table.add_row("step", f"{health['steps']} of {steps_limit}")
    table.add_row("state", state)
    table.add_row("control", f"{_number(health['control_hz'], '.1f')} Hz")
    table.add_row("latent age", f"{_number(health['latent_age_s'], '.2f')} s")
    table.add_row("understood", f"{_number(health['understood'], '.0f', 100)} %")
    table.add_row("so far", f"{health['n_success']} of {len(health['tasks'])} done")
    return table


def _result_table(report: dict[str, Any]) -> Table:
    table = Table(title=f"{report['clock']} clock, at most {report['steps_limit']} steps a task")
    for column in ("task", "instruction", "result", "steps", "held", "seconds"):
        table.add_column(column, justify="left" if column in ("task", "instruction") else "right")
    for row in report["tasks"]:
        result = "[green]success[/green]" if row["success"] else f"[red]{row['reason']}[/red]"
        table.add_row(
            row["task"],
            row["instruction"],
            result,
            str(row["env_steps"]),
            str(row["hold_steps"]),
            f"{row['duration_s']:.1f}",
        )
    return table


def _figures(report: dict[str, Any]) -> str:
    def of(name: str, key: str, scale: float, form: str) -> str:
        return _number((report.get(name) or {}).get(key), form, scale)

    # In lockstep time stands still while the loop computes: no rate and no lateness is measured.
    timing = (
        f"control {_number(report['control_hz'], '.2f')} Hz, "
        f"{report['deadline_missed']} deadlines missed in {report['ticks']} ticks, lateness p99 "
        f"{of('tick_lateness_s', 'p99', 1e3, '.2f')} ms"
    )
    return (
        f"{report['n_success']} of {len(report['tasks'])} tasks, "
        f"{report['success_in_a_row']} in a row; "
        f"{timing if report['clock'] == 'realtime' else str(report['ticks']) + ' ticks'}; latent age p50 "
        f"{of('latent_age_s', 'p50', 1, '.2f')} s; System 1 p50 "
        f"{of('s1_latency_s', 'p50', 1e3, '.0f')} ms; System 2 p50 "
        f"{of('s2_latency_s', 'p50', 1e3, '.0f')} ms"
    )


def _number(value: float | None, form: str, scale: float = 1.0) -> str:
    return "-" if value is None else format(value * scale, form)
