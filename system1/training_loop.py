"""The loop around a training step: when to log, evaluate, save and stop."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Any, Protocol

log = logging.getLogger(__name__)


class Run(Protocol):
    """A training run: what it has done, and how it goes on."""

    step: int
    history: list[dict[str, Any]]

    def train_step(self) -> dict[str, float]:
        """Take one step, count it, and return what is to be logged of it."""

    def evaluate(self) -> dict[str, float]:
        """Return the validation figures."""

    def save(self) -> None:
        """Write everything that is needed to go on."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How many steps, and how often the rest is done.

    `deadline_ns` is monotonic: the run ends, saved, with the first step after it; 0 for none.
    """

    steps: int
    eval_every: int
    save_every: int
    log_every: int
    deadline_ns: int = 0


def deadline_after(seconds: float) -> int:
    """Return the monotonic time in so many seconds; 0 ("none") for 0."""
    return time.monotonic_ns() + int(seconds * 1e9) if seconds > 0 else 0


def run_loop(run: Run, pace: Pace) -> bool:
    """Train to the last step or the deadline; return whether the last step was reached."""
    begun = time.monotonic_ns()
    before = float(run.history[-1]["seconds"]) if run.history else 0.0
    while run.step < pace.steps:
        row: dict[str, Any] = run.train_step()
        done = run.step >= pace.steps
        now = time.monotonic_ns()
        late = 0 < pace.deadline_ns <= now
        keep = run.step % pace.log_every == 0
        if run.step % pace.eval_every == 0 or done or late:
            row |= run.evaluate()
            keep = True
        if keep:
            run.history.append({**row, "seconds": before + (now - begun) * 1e-9})
            log.info("%s", " ".join(f"{k}={v:.5g}" for k, v in row.items()))
        if run.step % pace.save_every == 0 or done or late:
            run.save()
        if late:
            break
    return run.step >= pace.steps
