"""The short fault campaign: what `make faults` tries on an idle machine, with generous times here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from openhelix.benchmarks.perf.fault_table import Fault, faults
from openhelix.benchmarks.perf.faults import (
    Outcome,
    Slope,
    attempt,
    choose,
    fitted,
    joined,
    table,
)

SLACK = 10.0  # for a machine that does other things too: what counts is what the arm was told
QUICK = [(fault, "plain") for fault in faults() if fault.quick]
RAY = [(fault, "ray") for fault in faults() if fault.name == "kill -9 of the command"]


@pytest.mark.parametrize(
    ("fault", "on"), QUICK + RAY, ids=[f"{fault.name}, {on}" for fault, on in QUICK + RAY]
)
def test_the_arm_is_safe_and_nothing_is_left(fault: Fault, on: str, tmp_path: Path) -> None:
    outcome = attempt(fault, on, tmp_path / "run", SLACK, None)
    assert outcome.ok, outcome.why
    assert outcome.after_stop == 0 and not outcome.left and not outcome.uncounted
    assert outcome.kind in table([outcome], SLACK)


def test_a_row_that_was_tried_again_takes_the_place_of_the_first() -> None:
    def row(fault: Fault, on: str, safe_s: float) -> Outcome:
        outcome = Outcome(fault.name, fault.kind, on, fault.expect, fault.within_s, ok=True)
        outcome.safe_s = safe_s
        return outcome

    first, second, third = faults()[:3]
    before = [row(second, "plain", 0.1), row(first, "plain", 0.19)]
    now = [row(third, "plain", 0.05), row(first, "plain", 0.02)]
    rows = joined(before, now)
    assert [(o.fault, o.safe_s) for o in rows] == [
        (first.name, 0.02),
        (second.name, 0.1),
        (third.name, 0.05),
    ]
    assert "halt: 100 ms of 200" in table(rows, 1.0)
    assert f"| {first.kind} | 3 | 3 | 0.10 s of 0.20 s | 0 | 0 | 0 |" in table(rows, 1.0)
    assert f"0.02 of {first.within_s:.2f}" in table(rows, 1.0)


def test_a_leak_is_told_from_memory_that_comes_and_goes() -> None:
    times = np.arange(0.0, 1800.0, 6.0)
    wave = 3.0 * np.sin(times / 90.0)

    def slope(values: np.ndarray) -> Slope:
        made = fitted("control", "MB", list(zip(times, values, strict=True)), 30.0)
        assert made is not None
        return made

    assert slope(50.0 + wave).flat
    leaking = slope(50.0 + wave + times / 60.0)
    assert not leaking.flat and abs(leaking.per_hour - 60.0) < leaking.error
    assert not slope(50.0 + times / 600.0).flat  # six an hour
    warming = 50.0 - 9.0 * np.exp(-times / 60.0)
    assert slope(warming).flat
    assert fitted("control", "MB", [(400.0, 1.0)] * 9, 30.0) is None


def test_every_fault_has_a_name_of_its_own_and_can_be_chosen() -> None:
    names = [(fault.kind, fault.name) for fault in faults()]
    assert len(set(names)) == len(names) > 50
    chosen, left_out = choose(False, ["kill -9"], ["plain", "ray"])
    assert [(fault.name, on) for fault, on in chosen] == [
        ("kill -9 of the command", "plain"),
        ("kill -9 of the command, System 2 halted", "plain"),
        ("kill -9 of the command", "ray"),
        ("kill -9 of the command, System 2 halted", "ray"),
    ]
    assert not left_out
