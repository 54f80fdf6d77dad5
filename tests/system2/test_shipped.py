"""The shipped eyes see: questions about a few pictures of the scene that training never saw."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from openhelix.system2.model import SHIPPED, VisionShape, load_vision, open_checkpoint
from openhelix.system2.prompt import TEMPLATES

pytestmark = pytest.mark.skipif(
    not (SHIPPED / "vision.safetensors").is_file(), reason="no weights are shipped"
)


def test_shipped_weights_fit_the_default_shape() -> None:
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    from tests.system2 import tiny

    shape = VisionShape()
    text = tiny.text_config(64)
    text.hidden_size = 576
    text.num_attention_heads, text.num_key_value_heads, text.num_hidden_layers = 9, 3, 1
    text.head_dim = 64
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=shape.clip_config(), text_config=text)
    )
    weights = load_file(SHIPPED / "vision.safetensors")
    load_vision(model, weights)
    assert all(bool(value.isfinite().all()) for value in weights.values())


@pytest.mark.slow
def test_the_laptop_model_sees_a_scene_that_it_was_not_trained_on(tmp_path: Path) -> None:
    captions = pytest.importorskip("openhelix.benchmarks.calvin.captions")
    from PIL import Image
    from transformers import LlavaForConditionalGeneration

    from openhelix.system2.engines.transformers import TransformersEngine
    from openhelix.system2.pretrain import Reader

    captions.make_dataset(tmp_path, "D", 20, seed=77)
    images = np.load(tmp_path / "images.npy")
    records = [json.loads(line) for line in (tmp_path / "records.jsonl").open()]
    checkpoint = open_checkpoint("laptop")
    assert checkpoint.template == TEMPLATES["chatml"]
    engine = TransformersEngine("laptop", dtype="float32", device="cpu")
    with torch.inference_mode():
        tokens = engine.image_features([Image.fromarray(image) for image in images])
    model = LlavaForConditionalGeneration.from_pretrained(checkpoint.path, dtype=torch.bfloat16)
    reader = Reader(model.eval(), checkpoint)
    seen = reader.accuracy(records, "image", lambda row: tokens[row])["all"]
    blind = reader.accuracy(records, "none", lambda row: tokens[row])["all"]
    assert seen.accuracy > 0.72  # measured 0.86 over 826 questions
    assert seen.accuracy > blind.accuracy + 0.2
