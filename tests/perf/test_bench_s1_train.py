"""The trainer's bench: both precisions learn alike and are timed."""

from __future__ import annotations

import json
import sys

from openhelix.benchmarks.perf import bench_s1_train
from openhelix.system1.train import TrainConfig, Trainer
from tests.system1.synthetic import make_cache
from tests.system1.test_policy import tiny
from tests.system1.test_train import SMALL


def test_both_precisions_are_timed_and_lose_alike(tmp_path, monkeypatch, capsys):
    make_cache(tmp_path / "frames", tiny(n_tasks=2), episodes=6)

    def small(config: TrainConfig) -> Trainer:
        config.changes.update(SMALL)
        return Trainer(config)

    monkeypatch.setattr(bench_s1_train, "Trainer", small)
    words = f"bench --data {tmp_path / 'frames'} --steps 4 --batch 8 --out {tmp_path / 'out'}"
    monkeypatch.setattr(sys, "argv", words.split())
    assert bench_s1_train.main() == 0
    said = json.loads(capsys.readouterr().out)
    assert said == json.loads((tmp_path / "out" / "s1_train.json").read_text())
    for name in ("float32", "bfloat16"):
        assert said[name]["samples_per_cpu_s"] > 0 and len(said[name]["losses"]) == 4
    pairs = zip(said["float32"]["losses"], said["bfloat16"]["losses"], strict=True)
    assert all(abs(a - b) < 0.05 * a for a, b in pairs)
    assert (tmp_path / "out" / "s1_train.png").stat().st_size > 5_000
