"""The bench of reading datasets: all its rates are measured and written."""

from __future__ import annotations

import json
import sys

from openhelix.benchmarks.perf import bench_data
from tests.data.small import as_published, write_split


def test_all_rates_are_measured(tmp_path, monkeypatch, capsys):
    split = as_published(write_split(tmp_path / "training"))
    monkeypatch.setattr(bench_data, "keep_freed_memory", lambda: None)  # of the test's process
    words = f"bench --data {split} --seconds 0.05 --out {tmp_path / 'out'}"
    monkeypatch.setattr(sys, "argv", words.split())
    assert bench_data.main() == 0
    said = json.loads(capsys.readouterr().out)
    assert said == json.loads((tmp_path / "out" / "data.json").read_text())
    assert said["dataset_frames"] == 60 and said["cache_frames"] > 0
    assert len(said["samples_per_cpu_s"]) == 4
    assert all(rate > 0 for rate in said["samples_per_cpu_s"].values())
