"""System 2 on CUDA: vLLM and transformers agree in bfloat16 on a tiny LLaVA."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.system2 import tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_vllm_equals_transformers_on_cuda(tmp_path: Path) -> None:
    from openhelix.system2.engines.transformers import TransformersEngine
    from openhelix.system2.engines.vllm import VllmEngine

    path = str(tiny.write_laptop_like(tmp_path / "tiny"))
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 255, (60, 80, 3), dtype=np.uint8) for _ in range(4)]
    texts = ["lift the red block", "open the drawer", "push it left", "turn on the light"]
    a = TransformersEngine(path, dtype="bfloat16").encode(images, texts)
    b = VllmEngine(path, dtype="bfloat16").encode(images, texts)
    cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    assert cosine.min() > 0.99
