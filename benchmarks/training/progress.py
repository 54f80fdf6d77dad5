"""What a training shows while it goes on, and when it ends.

On a terminal a bar with the time left, under the log's lines; elsewhere one line of the log for
every row of the history; curves beside it, see `curves.py`.
"""

from __future__ import annotations

import logging
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.highlighter import NullHighlighter
from rich.logging import RichHandler
from rich.progress import BarColumn, Progress, TextColumn

from openhelix.benchmarks.training.curves import FOLDER, Curves, Tracker, figures_of, opened
from openhelix.runtime.core.clock import duration_text
from openhelix.system1.train_loop import LOG, Pace

log = logging.getLogger(__name__)
WINDOW = 100  # steps whose mean time says how long the rest takes
NEXT = {"policy": "stage1", "stage1": "stage2", "stage2": "export"}


def open_log() -> Console | None:
    """Send the log to standard error; return the terminal there, None if it is none."""
    console = Console(stderr=True, highlight=False)
    if console.is_terminal:
        handler: logging.Handler = RichHandler(
            console=console,
            show_level=False,
            show_path=False,
            log_time_format="%H:%M:%S",
            highlighter=NullHighlighter(),
        )
        logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[handler])
    else:
        form = "%(asctime)s %(message)s"
        logging.basicConfig(level=logging.INFO, format=form, stream=sys.stderr)
    for name in ("httpx", "urllib3", "matplotlib", "transformers", "tensorboard"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return console if console.is_terminal else None


class Shown:
    """What is shown of one stage: a `openhelix.system1.train_loop.Watch`.

    Args:
        stage: its name.
        folder: the stage's.
        terminal: where the bar is drawn; None for lines of the log.
        curves: whether figures go anywhere; then to TensorBoard's files and to the tracker.
        tracker: which.
        told: the settings it is told.
    """

    def __init__(
        self,
        stage: str,
        folder: Path,
        terminal: Console | None = None,
        curves: bool = False,
        tracker: Tracker = "",
        told: Mapping[str, Any] | None = None,
    ) -> None:
        self._stage, self._folder = stage, folder
        self._tracker, self._told = tracker, told or {}
        self._times: deque[tuple[int, int]] = deque(maxlen=WINDOW + 1)  # step, monotonic ns
        self._begun_ns = time.monotonic_ns()
        self._bar = (
            Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[said]}"),
                console=terminal,
                transient=True,
                expand=True,
            )
            if terminal is not None
            else None
        )
        self._task = None if self._bar is None else self._bar.add_task(stage, total=1.0, said="")
        self._curves = curves
        self._opened: list[Curves] | None = None

    def __enter__(self) -> Shown:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        for curves in self._opened or ():
            curves.close()

    def begins(self, step: int) -> None:
        """Take from which step it goes on, where not every one will be shown."""
        self._times.clear()
        self._times.append((step, time.monotonic_ns()))

    def __call__(self, row: Mapping[str, Any], pace: Pace, logged: bool) -> None:
        """See `openhelix.system1.train_loop.Watch`."""
        now_ns, step = time.monotonic_ns(), int(row["step"])
        if self._times and step < self._times[-1][0]:  # another stage counts from nought
            _, then_ns = self._times[-1]
            self._times.clear()
            self._times.append((0, then_ns))
        self._times.append((step, now_ns))
        left_s, share = self._left(step, pace, now_ns)
        said = f"step {step:,} of {pace.steps:,}, {duration_text(left_s)} to go"
        if self._bar is not None and self._task is not None:
            loss = f", loss {row['loss']:.3g}" if "loss" in row else ""
            name = str(row.get("stage", self._stage))
            self._bar.update(self._task, completed=share, said=said + loss, description=name)
        elif logged:
            log.info("%s: %s", row.get("stage", self._stage), said)
        if logged and self._curves:
            self._write(row)

    def _left(self, step: int, pace: Pace, now_ns: int) -> tuple[float, float]:
        """Return the seconds left, by steps or by the deadline, and the share that is done."""
        first, then_ns = self._times[0]
        # The first step is timed from the stage's beginning: loading is part of it, once.
        if len(self._times) == 1:
            first, then_ns = step - 1, self._begun_ns
        each_s = (now_ns - then_ns) * 1e-9 / max(1, step - first)
        by_steps_s, share = each_s * (pace.steps - step), step / pace.steps
        if pace.deadline_ns:
            by_time_s = max(0, pace.deadline_ns - now_ns) * 1e-9
            if by_time_s < by_steps_s:
                return by_time_s, 1 - by_time_s * 1e9 / max(1, pace.deadline_ns - self._begun_ns)
        return by_steps_s, share

    def _write(self, row: Mapping[str, Any]) -> None:
        step = int(row["step"])
        if self._opened is None:
            self._opened = opened(self._tracker, self._stage, self._folder, step, self._told)
        for curves in self._opened:
            curves.add(figures_of(row), step)


class Showing:
    """How the stages of one command are shown; arguments as of `Shown`."""

    def __init__(
        self,
        terminal: Console | None = None,
        curves: bool = False,
        tracker: Tracker = "",
        told: Mapping[str, Any] | None = None,
    ) -> None:
        self._rest = (terminal, curves, tracker, told)

    def __call__(self, stage: str, folder: Path) -> Shown:
        """Return what a stage is watched with, a context."""
        return Shown(stage, folder, *self._rest)


# -- The ending ------------------------------------------------------------------------


def ending(result: Mapping[str, Any], words: Sequence[str], seconds: float) -> list[str]:
    """Return the five lines with which a training ends.

    Args:
        result: what the command returns as JSON.
        words: of the command line, the stage first.
        seconds: how long this command took.
    """
    done = [stage for stage in result["stages"] if not stage.get("skipped")]
    last = done[-1] if done else {"stage": words[0], "folder": result["folder"]}
    folder = Path(last.get("folder", result["folder"]))
    names = ", ".join(stage["stage"] for stage in done) or "nothing new"
    first = f"{names} in {duration_text(seconds)}" if result["finished"] else str(result["why"])
    rows = [
        ("trained" if result["finished"] else "stopped", first),
        ("figures", _figures(done) or "none measured"),
        (
            "written",
            f"{folder}" + (" (every figure: train.json)" if (folder / LOG).is_file() else ""),
        ),
        ("curves", _curves(done, folder)),
        ("next", next_command(result, words)),
    ]
    return [f"{name:<8} {text}" for name, text in rows]


def next_command(result: Mapping[str, Any], words: Sequence[str]) -> str:
    """Return what is to be typed after this training."""
    stage, rest = words[0], [word for word in words[1:] if word != "--json"]
    if not result["finished"]:
        return " ".join(["openhelix train", stage, *rest])
    last = result["stages"][-1] if result["stages"] else {"stage": stage}
    if last["stage"] == "export":
        ship = Path(last["folder"])
        policy = f"system1.policy.options.path={ship / 'system1-laptop'}"
        latent = ship / "system2-laptop" / "latent.safetensors"
        if not latent.is_file():
            return f"openhelix run {policy}"
        return f"openhelix run {policy} system2.engine.options.latent_projector={latent}"
    if last["stage"] == "vlm":
        return f"openhelix train all latent.model={last['folder']}"
    if last["stage"] == "understanding":
        return f"cp {last['folder']}/understanding.safetensors PAIR/system2-laptop/"
    if last["stage"] == "prepare":
        return " ".join(["openhelix train", last["for"], *rest])
    return " ".join(["openhelix train", NEXT[last["stage"]], *rest])


def _curves(done: Sequence[Mapping[str, Any]], folder: Path) -> str:
    drawn = [
        Path(stage["folder"])
        for stage in done
        if "folder" in stage and (Path(stage["folder"]) / "loss.png").is_file()
    ]
    where = drawn[-1] if drawn else folder
    found = [str(where / "loss.png")] if drawn else []
    if any((place / FOLDER).is_dir() for place in (where, where.parent)):  # or beside a model
        found.append(f"tensorboard --logdir {where.parent}")
    return "; ".join(found) or "none"


FIGURES = (  # column of the history, what it is called, a factor, its unit
    ("val_loss", "held-out loss", 1.0, ""),
    ("val_policy", "policy's", 1.0, ""),
    ("val_position_m", "position", 100.0, " cm"),
    ("val_rotation_rad", "rotation", 57.29578, " degrees"),
    ("val_gripper_error", "gripper wrong", 100.0, " %"),
    ("val_task_top1", "right task", 100.0, " %"),
)


def _figures(done: Sequence[Mapping[str, Any]]) -> str:
    """Return the held-out figures of the last stage that measured some."""
    for stage in reversed(done):
        found = [
            f"{name} {factor * stage[key]:.3g}{unit}"
            for key, name, factor, unit in FIGURES
            if stage.get(key) is not None
        ]
        if found:
            return f"{stage['stage']}: " + ", ".join(found)
        if isinstance(stage.get("accuracy"), Mapping):
            return ", ".join(f"{k}: {v}" for k, v in stage["accuracy"].items())
    return ""
