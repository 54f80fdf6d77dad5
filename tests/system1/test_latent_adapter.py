"""The latent adapter: what it keeps, and the latents that say what the task table says."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from openhelix.runtime.core.files import CheckpointError
from openhelix.runtime.core.interfaces import LatentSpec
from openhelix.system1 import policy as policy_module
from openhelix.system1.checkpoint import build_model, save_policy
from openhelix.system1.config import official_calvin
from openhelix.system1.latent_adapter import (
    ADAPTER,
    adapt_to_latent,
    adapter_tokens,
    name_by_sentences,
    nearest_task,
    task_anchors,
)
from openhelix.system1.policy import DiffusionPolicy
from tests.system1.test_policy import observe, tiny


def model(**changes):
    torch.manual_seed(0)
    return build_model(tiny(use_latent=False, **changes)).eval()


@pytest.mark.parametrize("tokens", [1, 3])
def test_a_policy_told_by_an_anchor_acts_as_told_by_name(tokens) -> None:
    made = adapt_to_latent(model(), LatentSpec("act_last", tokens, 512, "x"))
    for p in made.parameters():  # a fresh network's zeroed layers would hide the condition
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.2)
    anchors = task_anchors(made)
    assert anchors.shape == (34, tokens, 512)
    assert torch.equal(nearest_task(made, anchors), torch.arange(34))
    if tokens > 1:
        return
    policy = DiffusionPolicy(made)
    inputs = policy.prepare(observe(tiny()), [])
    mask = torch.ones(1, 1, dtype=torch.bool)
    for task in (0, 33):
        named = made.encode(replace(inputs, task=torch.tensor([task])))
        z = anchors[task][None, None]
        told = made.encode(replace(inputs, latent=z, latent_mask=mask, task=torch.tensor([-1])))
        torch.testing.assert_close(told.tokens, named.tokens, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(told.signal, named.signal, atol=1e-4, rtol=1e-4)


def test_a_task_is_named_by_the_mean_of_its_sentences() -> None:
    network = model()
    dim = network.config.latent_dim
    generator = torch.Generator().manual_seed(3)
    task = torch.arange(network.config.n_tasks).repeat(4)
    middle = torch.randn(network.config.n_tasks, 1, dim, generator=generator)
    latent = middle[task] + 0.3 * torch.randn(len(task), 1, dim, generator=generator)
    none = network.encoder.condition.table.weight[0].clone()
    before = (nearest_task(network, latent) == task).float().mean()
    assert name_by_sentences(network, latent, task)
    assert before < 0.5 and torch.equal(nearest_task(network, latent), task)
    assert torch.equal(network.encoder.condition.table.weight[0], none)
    rows = adapter_tokens(network, latent[task == 1]).mean(dim=(0, 1))
    assert torch.allclose(network.encoder.condition.table.weight[2], rows, atol=1e-5)


def test_the_table_speaks_where_there_is_no_latent() -> None:
    made = model()
    inputs = DiffusionPolicy(made).prepare(observe(tiny()), [])
    none = torch.zeros(1, 1, dtype=torch.bool)
    for task in (-1, 4):
        plain = made.encode(replace(inputs, task=torch.tensor([task])))
        masked = made.encode(
            replace(
                inputs,
                task=torch.tensor([task]),
                latent=torch.randn(1, 1, 1, 12),
                latent_mask=none,
            )
        )
        torch.testing.assert_close(masked.signal, plain.signal)
        torch.testing.assert_close(masked.tokens, plain.tokens)


def test_everything_behind_the_adapter_is_kept() -> None:
    before = model()
    state = {n: t.clone() for n, t in before.state_dict().items()}
    after = adapt_to_latent(before, LatentSpec("act_lang", 5, 64, "y"), seed=3)
    assert after.config.latent_tokens == 5 and after.config.use_latent
    fresh = {n for n, t in after.state_dict().items() if t.shape != state[n].shape}
    assert fresh == {"encoder.condition.project.weight", "encoder.condition.slot"}
    for name, tensor in after.state_dict().items():
        if not name.startswith(ADAPTER):
            assert torch.equal(tensor, state[name]), name
    same = adapt_to_latent(after, LatentSpec("act_lang", 5, 64, "z"))
    assert same is after and after.config.latent_model_id == "z"


def test_gradients_reach_the_latents_and_no_weight_of_the_policy() -> None:
    made = model(latent_tokens=2)
    latent = torch.randn(3, 2, made.config.latent_dim, requires_grad=True)
    tokens = adapter_tokens(made, latent)
    said, _ = made.encoder.condition.embed(latent.unsqueeze(1), None, None)
    torch.testing.assert_close(tokens, said)
    (tokens * torch.randn(tokens.shape)).sum().backward()
    assert latent.grad is not None and bool((latent.grad != 0).any(-1).all())
    assert all(p.grad is None for p in made.parameters())


def test_a_published_policy_takes_its_own_width_alone() -> None:
    config = official_calvin(dim=48, heads=2, layers=1)
    made = build_model(config)
    assert task_anchors(made) is None
    assert adapt_to_latent(made, LatentSpec("act_last", 4, 512, "x")).config.latent_tokens == 4
    with pytest.raises(CheckpointError, match="width 64 needs"):
        adapt_to_latent(made, LatentSpec("act_last", 1, 64, "x"))


def test_the_shipped_policy_is_the_default_and_an_untrained_one_is_asked_for(
    tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(policy_module, "SHIPPED", tmp_path / "none")
    with pytest.raises(CheckpointError, match=r"none: no config\.json"):
        DiffusionPolicy.load()
    with pytest.raises(CheckpointError, match="null; name a folder, or say"):
        DiffusionPolicy.load(None)
    assert DiffusionPolicy.load(untrained=True).untrained
    made = model()
    save_policy(tmp_path / "there", made.config, made.state_dict(), made.normalizer)
    monkeypatch.setattr(policy_module, "SHIPPED", tmp_path / "there")
    assert DiffusionPolicy.load().config == made.config
    assert not DiffusionPolicy.load().untrained
