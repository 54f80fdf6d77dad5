"""A tiny cache, a tiny LLaVA, and a training of a few steps on them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from openhelix.benchmarks.training.config import TrainingConfig
from openhelix.runtime.core.config import apply_overrides, validate
from tests.system1.synthetic import make_cache
from tests.system1.test_policy import tiny
from tests.system2.tiny import write_laptop_like

CHANGES = {"dim": 48, "heads": 4, "encoder_width": 8, "layers": 2, "context_layers": 1}


@pytest.fixture(scope="session", autouse=True)
def thrown_away(own_cache: Path) -> None:
    """What these tests write to the cache is thrown away."""


@pytest.fixture(scope="session", autouse=True)
def quick_start() -> Iterator[None]:
    """Two tasks are told apart in few steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("openhelix.benchmarks.training.start.FIT_STEPS", 30)
        patch.setattr("openhelix.benchmarks.training.start.WHOLE_STEPS", 30)
        yield


@pytest.fixture(scope="session")
def frames(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "frames"
    make_cache(folder, tiny(n_tasks=2), episodes=10, frames=6)
    return folder


@pytest.fixture(scope="session")
def llava(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_laptop_like(tmp_path_factory.mktemp("model") / "tiny"))


def settings(frames: Path, llava: str, out: Path, *more: str) -> TrainingConfig:
    """A training of a few steps; `more` are overrides as on the command line."""
    base: dict[str, Any] = {
        "data": frames,
        "out": out,
        "validation": 0.2,
        "eval_frames": 8,
        "log_every": 1,
        "policy": {
            "changes": CHANGES,
            "steps": 4,
            "batch": 8,
            "draws": 2,
            "lr": 3e-3,
            "warmup": 2,
            "eval_every": 4,
            "save_every": 2,
        },
        "latent": {"model": llava, "dtype": "float32", "lag_steps": 2, "stride": 2},
        "stage1": {"steps": 4, "batch": 8, "draws": 2, "warmup": 1, "eval_every": 4},
        "stage2": {"steps": 4, "batch": 8, "draws": 2, "warmup": 1, "eval_every": 4},
    }
    for stage in ("stage1", "stage2"):
        base[stage]["save_every"] = 2
    return validate(TrainingConfig, apply_overrides(base, more))


@pytest.fixture(scope="session")
def trained_policy(frames: Path, llava: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a policy trained alone, for the stages after."""
    from openhelix.benchmarks.training.stages import run_policy

    out = tmp_path_factory.mktemp("policy")
    run_policy(settings(frames, llava, out, "policy.steps=30", "policy.save_every=30"), 0)
    return out / "policy"
