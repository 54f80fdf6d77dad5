"""The figures of a run, gathered tick by tick in memory allocated once."""

from __future__ import annotations

from array import array
from dataclasses import asdict
from typing import Any

from runtime.assembly import Rig
from runtime.loop import Tick
from runtime.report import percentiles

KEPT = 1 << 17  # ticks: more than an hour at 30 Hz


class LoopStatistics:
    """A subscriber that counts and keeps what `report.json` and the live view need."""

    def __init__(self, rig: Rig) -> None:
        self._rig = rig
        self._ages_s = array("d")
        self._durations_s = array("d")
        self._prefetches_s = array("d")
        self._first_ns = 0
        self.first_action_ns: int | None = None  # of the first planned target
        self._last_ns = 0
        self._ticks = 0
        self._states: dict[str, int] = {}
        self._newest: Tick | None = None

    def __call__(self, tick: Tick) -> None:
        if self._ticks == 0:
            self._first_ns = tick.t_ns
        self._ticks += 1
        self._last_ns = tick.t_ns
        self._newest = tick
        if self.first_action_ns is None and tick.state == "run":
            self.first_action_ns = tick.t_ns
        self._states[tick.state] = self._states.get(tick.state, 0) + 1
        if len(self._durations_s) < KEPT:
            self._durations_s.append(tick.duration_s)
            self._prefetches_s.append(self._rig.loop.prefetch_s)
            # Waiting for an instruction's first latent has no age to count.
            if tick.latent_age_s is not None and tick.state == "run":
                self._ages_s.append(tick.latent_age_s)

    @property
    def control_hz(self) -> float | None:
        """Ticks a second, from the first to the last."""
        span_s = (self._last_ns - self._first_ns) * 1e-9
        return (self._ticks - 1) / span_s if span_s > 0 else None

    def live(self) -> dict[str, Any]:
        """A few numbers for a person who is watching."""
        tick = self._newest
        return {
            "ticks": self._ticks,
            "control_hz": self.control_hz,
            "loop_state": tick.state if tick else "wait",
            "loop_reason": tick.reason if tick else "",
            "latent_age_s": tick.latent_age_s if tick else None,
        }

    def report(self) -> dict[str, Any]:
        """The part of `report.json` that the loop itself has measured."""
        return {
            "control_hz": self.control_hz,
            "ticks": self._ticks,
            "ticks_by_state": dict(self._states),
            "tick_duration_s": percentiles(self._durations_s, ("p50", "p99", "max")),
            "prefetch_duration_s": percentiles(self._prefetches_s, ("p50", "p99", "max")),
            "latent_age_s": percentiles(self._ages_s, ("p50", "p99", "max")),
            "chunks": asdict(self._rig.loop.chunks.counters),
            "s1_failures": self._rig.loop.planner.failures,
            "holds": dict(self._rig.loop.machine.holds),
        }
