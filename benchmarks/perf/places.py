"""Where benchmarks find what they run and leave what they measured.

In a checkout figures go to `benchmarks/perf/results/`, where they are kept; an installed package
is not written to, so there they go to `outputs/perf/` of the working directory.
"""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # of the checkout, or of the installed package
IN_CHECKOUT = (ROOT / "openhelix" / "__init__.py").is_file()
CONFIG = ROOT / "configs" / "run.yaml"


def results_file(name: str) -> Path:
    """Return where the figures of one benchmark go, a JSON file."""
    if IN_CHECKOUT:
        return ROOT / "benchmarks" / "perf" / "results" / name
    return Path("outputs") / "perf" / name
