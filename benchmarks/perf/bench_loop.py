"""Pacer benchmark: how late ticks are under different ways of waiting, side by side.

Four ways at three rates, in turns of two seconds within one run, so that whatever else the
machine does hits all of them alike. Nothing but pacing is measured here: no observation, no
inference. `missed` counts whole periods that were skipped.

    python -m openhelix.benchmarks.perf.bench_loop [--seconds 60] [--spin-us 300] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from openhelix.benchmarks.perf.places import results_file
from openhelix.runtime.control.realtime import enter, leave
from openhelix.runtime.core.clock import MonotonicClock, Pacer

RATES_HZ = (30, 100, 200)
TURN_S = 2.0


@dataclass(frozen=True, slots=True)
class Way:
    """One way to wait for a deadline."""

    name: str
    fifo: bool
    spin: bool


WAYS = (
    Way("sleep", fifo=False, spin=False),
    Way("sleep_then_spin", fifo=False, spin=True),
    Way("fifo_sleep", fifo=True, spin=False),
    Way("fifo_sleep_then_spin", fifo=True, spin=True),
)


@dataclass(slots=True)
class Tally:
    """What one way did at one rate."""

    lateness_ns: list[int]
    missed: int = 0
    fallback: str = ""


def turn(way: Way, hz: int, spin_ns: int, seconds: float, tally: Tally) -> None:
    """Pace for some seconds in this thread; the first tick is warm-up."""
    status = enter(
        priority=50 if way.fifo else None,
        timer_slack_ns=None if way.name == "sleep" else 1,
        gc_mode="leave",
    )
    tally.fallback = status.reason
    pacer = Pacer(MonotonicClock(spin_ns if way.spin else 0), round(1e9 / hz))
    pacer.start()
    pacer.wait()
    for _ in range(max(1, round(seconds * hz))):
        tick = pacer.wait()
        tally.lateness_ns.append(tick.lateness_ns)
        tally.missed += tick.missed
    leave(status)


def measure(seconds: float, spin_ns: int) -> dict[str, Any]:
    """Return lateness by rate and way; each way runs for `seconds` at each rate."""
    figures: dict[str, Any] = {}
    for hz in RATES_HZ:
        tallies = {way.name: Tally([]) for way in WAYS}
        for _ in range(max(1, round(seconds / TURN_S))):
            for way in WAYS:
                # A thread of its own, so that scheduler and slack begin as they are by default.
                args = (way, hz, spin_ns, min(TURN_S, seconds), tallies[way.name])
                thread = threading.Thread(target=turn, args=args)
                thread.start()
                thread.join()
        figures[f"{hz}_hz"] = {name: summarise(tally) for name, tally in tallies.items()}
    return figures


def summarise(tally: Tally) -> dict[str, Any]:
    """Percentiles in microseconds."""
    p50, p99 = np.percentile(tally.lateness_ns, (50, 99), method="higher")
    return {
        "p50_us": round(int(p50) * 1e-3, 1),
        "p99_us": round(int(p99) * 1e-3, 1),
        "max_us": round(max(tally.lateness_ns) * 1e-3, 1),
        "ticks": len(tally.lateness_ns),
        "missed": tally.missed,
        "fallback": tally.fallback,
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="of each way at each rate")
    parser.add_argument("--spin-us", type=float, default=300.0, help="length of the spin")
    parser.add_argument("--out", type=Path, default=results_file("loop.json"))
    args = parser.parse_args()
    figures = {
        "machine": {
            "system": platform.platform(),
            "cores": os.cpu_count(),
            "load_1min": round(os.getloadavg()[0], 2),
        },
        "seconds": args.seconds,
        "spin_us": args.spin_us,
        "pacing": measure(args.seconds, round(args.spin_us * 1e3)),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
