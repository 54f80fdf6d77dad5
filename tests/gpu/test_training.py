"""Both joint stages on CUDA, with the language model live: every part is on the device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from openhelix.benchmarks.training.export import export
from openhelix.benchmarks.training.stages import run_joint, run_policy
from tests.system1.synthetic import make_cache
from tests.system1.test_policy import tiny
from tests.system2.tiny import write_laptop_like
from tests.training.conftest import settings

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("more", [(), ("latent.regime=lora",), ("latent.feed=prefix",)])
def test_the_stages_run_on_cuda(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...]
) -> None:
    monkeypatch.setenv("OPENHELIX_CACHE", str(tmp_path / "cache"))
    make_cache(tmp_path / "frames", tiny(n_tasks=2), episodes=10, frames=6)
    llava = str(write_laptop_like(tmp_path / "tiny"))
    config = settings(
        tmp_path / "frames", llava, tmp_path / "out", "device=cuda", "bf16=true",
        "latent.clip=0.1", "latent.dtype=auto", *more,
    )  # fmt: skip
    run_policy(config, 0)
    for stage in ("stage1", "stage2"):
        assert run_joint(config, stage, 0)["step"] == 4
    assert export(config)["from"] == "stage2"
