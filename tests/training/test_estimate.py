"""An estimate's formula against what autograd really keeps, and what is said of it."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from openhelix.benchmarks.training.estimate import (
    estimate,
    kept_bytes,
    kept_per_token,
    language_memory,
    llava_config,
    model_sizes,
    trained_weights,
)
from openhelix.benchmarks.training.estimate_vlm import Model, Shape, kept_of
from openhelix.benchmarks.training.stages import JointRun
from openhelix.runtime.cli.main import main
from openhelix.runtime.core.config import ConfigError
from openhelix.system2.vlm_train import STAGES, Counted, VlmRun
from tests.training.conftest import settings
from tests.training.test_workers import vlm_words

SAMPLES, TOKENS, LAYERS = 3, 50, 4


@pytest.fixture(autouse=True)
def short_looks(monkeypatch) -> None:
    monkeypatch.setattr("openhelix.benchmarks.training.estimate.MEASURED_S", 0.01)


@pytest.mark.parametrize("regime", ["prompt", "lora", "full"])
def test_what_a_layer_keeps_is_what_the_formula_says(llava, frames, tmp_path, regime) -> None:
    from peft import LoraConfig, inject_adapter_in_model
    from transformers import LlamaConfig, LlamaModel

    shape = LlamaConfig(
        hidden_size=96, intermediate_size=256, num_hidden_layers=LAYERS,
        num_attention_heads=6, num_key_value_heads=3, vocab_size=8,
    )  # fmt: skip
    model = LlamaModel(shape).requires_grad_(regime == "full")
    if regime == "lora":
        names = ["q_proj", "k_proj", "v_proj", "o_proj"]
        inject_adapter_in_model(LoraConfig(r=4, target_modules=names), model)
    x = torch.randn(SAMPLES, TOKENS, 96, requires_grad=True)
    with kept_bytes(model) as found:
        model(inputs_embeds=x, use_cache=False)
    sizes = model_sizes(settings(frames, llava, tmp_path, "latent.model=llava-1.5-7b"))
    sizes = type(sizes)(
        hidden=96, ffn=256, layers=LAYERS, heads=6, kv_heads=3, head=16, words=8, language=0,
        vision=0, projector=0, layer=0, tokens=TOKENS, n_image=0,
    )  # fmt: skip
    said = SAMPLES * TOKENS * LAYERS * kept_per_token(sizes, regime, 4, 4, bf16=False)
    assert said == pytest.approx(found[0], rel=0.04)


@pytest.mark.parametrize("regime", ["prompt_tuning", "lora", "full"])
def test_weights_that_learn_are_counted(llava, frames, trained_policy, tmp_path, regime) -> None:
    config = settings(
        frames, llava, tmp_path, f"policy.checkpoint={trained_policy}", "stage1.steps=0",
        f"latent.regime={regime}", "latent.feed=live",
    )  # fmt: skip
    run = JointRun(config, "stage2")
    learner = run.learner
    learned = sum(p.numel() for p in learner.model.parameters() if p.requires_grad)
    inner = {"prompt_tuning": "prompt"}.get(regime, regime)
    sizes = model_sizes(config)
    assert trained_weights(sizes, inner, config.latent.lora_rank) == learned
    memory = language_memory(config, "stage2", sizes, 8)
    whole = 4 * sum(p.numel() for p in learner.parameters())
    assert memory["weights"] == pytest.approx(whole, rel=0.02)
    state = nn.ParameterList(p for p in learner.parameters() if p.requires_grad)
    assert memory["optimiser"] == pytest.approx(8 * sum(p.numel() for p in state), rel=0.02)


def test_a_7b_model_by_its_sizes_alone(frames, llava, tmp_path) -> None:
    def peak(regime: str, *more: str) -> dict[str, float]:
        config = settings(
            frames, llava, tmp_path, "latent.model=llava-1.5-7b", f"latent.regime={regime}",
            "latent.feed=live", "latent.dtype=bfloat16", "bf16=true", *more,
        )  # fmt: skip
        sizes = model_sizes(config)
        assert sizes.language == pytest.approx(6.6e9, rel=0.02) and sizes.tokens == 616
        return {k: v / 1e9 for k, v in language_memory(config, "stage2", sizes, 1).items()}

    assert peak("prompt_tuning")["weights"] == pytest.approx(13.9, rel=0.02)
    full = peak("full")
    assert full["optimiser"] == pytest.approx(2 * full["gradients"])
    assert full["gradients"] == pytest.approx(4 * 6.63, rel=0.02)
    assert peak("lora")["gradients"] < 0.2 < full["activations"]
    eighth = peak("full", "workers=8", "latent.shard=true")
    assert eighth["gradients"] == pytest.approx(full["gradients"] / 8, rel=0.05)
    assert eighth["weights"] < full["weights"] / 4


def test_every_stage_is_estimated(frames, llava, trained_policy, tmp_path, capsys) -> None:
    more = (f"policy.checkpoint={trained_policy}", "accumulate=2")
    for stage in ("policy", "stage1", "stage2"):
        found = estimate(settings(frames, llava, tmp_path, *more), stage)
        memory = found["memory_gb"]
        assert memory["peak"] >= memory["process"] > 0 and found["samples_at_once"] == 4
        assert found["seconds"]["all steps"] >= 0 < found["seconds"]["a step"]
    with pytest.raises(ConfigError, match=r"--estimate: of 'export'"):
        estimate(settings(frames, llava, tmp_path), "export")
    with pytest.raises(ConfigError, match=r"policy\.batch: 8 samples cannot be divided"):
        estimate(settings(frames, llava, tmp_path, "accumulate=3"), "policy")
    words = ["train", "policy", "--estimate", f"data={frames}", f"out={tmp_path / 'none'}"]
    assert main([*words, "policy.batch=8", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["stage"] == "policy"
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_a_base_models_stages_are_counted_with_one_layer(llava, frames, tmp_path, mode) -> None:
    """What learns, and what is kept of a step, is what the training has."""
    words = vlm_words(tmp_path, llava)
    config = settings(frames, llava, tmp_path, *words, f"vlm.tune.mode={mode}", "vlm.tune.goals=0")
    run = VlmRun(config.vlm, tmp_path / "run", device="cpu")
    made, n_image = llava_config(llava, "vlm.model")
    labels = tuple(map(len, run.labels.words.values())), run.labels.numbers
    model = Model(config, made, n_image, labels)
    for stage in STAGES:
        run._enter(stage)
        assert model.enter(stage) == sum(p.numel() for p in run._chosen), stage
        (batch,) = run._next_batches()
        counted = Counted(batch.answered, batch.asked, 0)
        with kept_bytes(run.learner) as found:
            run._learned_from(batch, counted)
        tokens = 0 if batch.packed is None else batch.packed.ids.shape[1]
        shape = Shape(n_image, batch.asked // 8, tokens, batch.answered // 8)
        assert 8 * kept_of(model, stage, shape) == pytest.approx(found[0], rel=0.1), stage


def test_a_base_models_training_is_estimated(frames, llava, tmp_path, capsys) -> None:
    words = ["train", "vlm", "--estimate", f"out={tmp_path / 'none'}", *vlm_words(tmp_path, llava)]
    assert main([*words, "--json", "vlm.align.steps=0"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["stages"]) == {"see", "tune"}
    assert found["memory_gb"]["peak"] >= found["memory_gb"]["process"] > 0
    assert found["seconds"]["all steps"] > 0
    assert main(words) == 0
    assert "GB beside weights" in capsys.readouterr().out
    assert not (tmp_path / "none").exists()
    assert main([*words, "vlm.tune.batch=8", "accumulate=3"]) == 2
    assert "vlm.see.batch: 8 samples cannot be divided" in capsys.readouterr().err
    assert main([*words, "vlm.model=/nowhere"]) == 2
    assert "vlm.model: no folder" in capsys.readouterr().err


def test_keys_and_values_are_not_estimated(frames, llava, tmp_path, capsys) -> None:
    words = ["train", "stage2", "--estimate", f"data={frames}", f"out={tmp_path}", "stage1.steps=0"]
    words += [f"latent.model={llava}", "latent.kind=kv", "latent.aux=false"]
    assert main(words) == 2
    assert "latent.kind: 'kv' is not estimated" in capsys.readouterr().err
