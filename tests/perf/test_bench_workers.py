"""Samples per second of one process and of two, on a tiny cache."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.system1.synthetic import make_cache
from tests.system1.test_policy import tiny


def test_one_and_two_are_measured(tmp_path):
    make_cache(tmp_path / "cache", tiny(n_tasks=2), episodes=6)
    command = [sys.executable, "-m", "openhelix.benchmarks.perf.bench_workers"]
    words = ["--data", str(tmp_path / "cache"), "--steps", "2", "--batch", "4", "--draws", "1"]
    made = subprocess.run(
        [*command, *words, "--out", str(tmp_path)], capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr[-2000:]
    found = json.loads((tmp_path / "workers.json").read_text())
    assert found == json.loads(made.stdout)
    assert found["one"]["processes"] == 1 and found["several"]["processes"] == 2
    rate = found["several"]["samples_per_cpu_s"] / found["one"]["samples_per_cpu_s"]
    assert abs(found["speedup_by_cpu_time"] - 2 * rate) < 0.05
