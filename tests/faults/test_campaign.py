"""The short fault campaign: what `make faults` tries on an idle machine, with generous times here."""

from __future__ import annotations

from pathlib import Path

import pytest

from openhelix.benchmarks.perf.fault_table import Fault, faults
from openhelix.benchmarks.perf.faults import attempt, choose, table

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


def test_every_fault_has_a_name_of_its_own_and_can_be_chosen() -> None:
    names = [(fault.kind, fault.name) for fault in faults()]
    assert len(set(names)) == len(names) > 50
    chosen, left_out = choose(False, ["kill -9"], ["plain", "ray"])
    assert [(fault.name, on) for fault, on in chosen] == [
        ("kill -9 of the command", "plain"),
        ("kill -9 of the command", "ray"),
    ]
    assert not left_out
