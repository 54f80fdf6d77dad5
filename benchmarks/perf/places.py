"""Where benchmarks find their inputs and write their results.

In a checkout figures go to `benchmarks/perf/results/`, where they are kept; an installed package
is not written to, so there they go to `outputs/perf/` of the working directory.
"""

from __future__ import annotations

from pathlib import Path

from openhelix.runtime.core.paths import CHECKOUT, CONFIGS

CONFIG = CONFIGS / "run.yaml"


def results_file(name: str) -> Path:
    """Return where the figures of one benchmark go, a JSON file."""
    if CHECKOUT is not None:
        return CHECKOUT / "benchmarks" / "perf" / "results" / name
    return Path("outputs") / "perf" / name
