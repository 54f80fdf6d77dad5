"""Policies compared on held-out caches: every one on every cache, all frames."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from openhelix.benchmarks.perf import compare_policies
from openhelix.system1.train import TrainConfig, train
from tests.system1.synthetic import make_cache
from tests.system1.test_policy import tiny
from tests.system1.test_train import SMALL


def test_every_policy_is_measured_on_every_cache(tmp_path, monkeypatch, capsys):
    caches = [tmp_path / name for name in ("one", "two")]
    for folder, episodes in zip(caches, (6, 4), strict=True):
        make_cache(folder, tiny(n_tasks=2), episodes=episodes)
    for name, steps in (("none", 1), ("some", 60)):
        train(TrainConfig(caches[0], tmp_path / name, changes=SMALL, steps=steps, batch=8))
    words = ["--policies", *(str(tmp_path / n) for n in ("none", "some")), "--caches"]
    monkeypatch.setattr(sys, "argv", ["compare", *words, *map(str, caches)])
    assert compare_policies.main() == 0
    found = json.loads(capsys.readouterr().out)
    assert {row["frames"] for row in found[str(caches[1])].values()} == {32}
    none, some = (found[str(caches[0])][str(tmp_path / n)] for n in ("none", "some"))
    assert some["loss"] < none["loss"]
    assert set(some) == {"frames", "loss", "position_m", "rotation_rad", "gripper_error"}


def test_a_difference_has_an_interval_over_demonstrations():
    """Two equal kinds of policies differ by nothing; one that errs twice as much, by what it does."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.full((2, 30, 1), 10.0, dtype=torch.float64)
    errors = 10 * torch.rand(2, 30, 4, generator=generator, dtype=torch.float64)
    one, worse = torch.cat((errors, rows), -1), torch.cat((2 * errors, rows), -1)
    for name, row in compare_policies.compared(one, one).items():
        low, high = row["interval_95"]
        assert row["difference"] == 0 and low < 0 < high, name
    for row in compare_policies.compared(one, worse).values():
        assert row["calvin"] == pytest.approx(2 * row["collection"], abs=2e-4)
        low, high = row["interval_95"]
        assert 0 < low < row["difference"] < high
