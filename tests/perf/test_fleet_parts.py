"""The parts of bench_fleet that decide what its figures say."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from openhelix.benchmarks.perf.bench_fleet import LADDER, most
from openhelix.benchmarks.perf.tick_overhead import TURN_TICKS, WAYS, Block, summary


@given(limit=st.integers(0, LADDER[-1] + 5))
def test_the_last_number_that_holds_is_found(limit: int) -> None:
    asked: list[int] = []

    def holds(count: int) -> bool:
        asked.append(count)
        return count <= limit

    good, bad = most(holds)
    assert good == min(limit, LADDER[-1])
    assert bad == (limit + 1 if limit < LADDER[-1] else None)
    assert len(asked) == len(set(asked)) <= 10


def blocks(count: int, cost_us: float, drift_us: float = 0.0) -> list[Block]:
    """Turns on a machine that gets slower all the time; recording costs `cost_us`, metrics nothing."""
    rng = np.random.default_rng(0)
    found = []
    for number in range(count):
        base_us = 300.0 + drift_us * number
        extra = {"recording": cost_us, "both": cost_us}
        found.append(
            {
                way: [
                    (base_us + extra.get(way, 0.0) + rng.normal(0, 20), 200.0, 150.0)
                    for _ in range(TURN_TICKS - 1)
                ]
                for way in WAYS
            }
        )
    return found


def test_what_a_way_costs_is_told_with_its_interval_though_the_machine_changes() -> None:
    ways = summary(blocks(25, 40.0, drift_us=30.0), 30.0)["ways"]
    extra = ways["recording"]["extra_us"]
    assert extra["from"] < 40.0 < extra["to"] and extra["to"] - extra["from"] < 10.0
    metrics = ways["metrics"]["extra_us"]
    assert metrics["from"] < 0.0 < metrics["to"]
    share = ways["recording"]["percent_of_period"]
    assert share["mean"] == pytest.approx(100 * extra["mean"] * 30.0 / 1e6)
    assert ways["recording"]["extra_cpu_us"] == {"mean": 0.0, "from": 0.0, "to": 0.0}
    assert "extra_us" not in ways["nothing"]


def test_blocks_in_which_a_way_is_missing_do_not_count() -> None:
    whole = blocks(3, 0.0)
    broken = {**blocks(1, 0.0)[0], "both": []}
    assert summary([*whole, broken], 30.0)["blocks"] == 3
    with pytest.raises(ValueError, match="--overhead-seconds"):
        summary([whole[0], broken], 30.0)
