"""Fast modes on the CPU: how far bf16 strays, and that graphs say why they are not used."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from openhelix.system1.attention import Attention, written_out
from openhelix.system1.encoder import pad_sampled
from openhelix.system1.fast_modes import GraphedSampler, to_bf16
from openhelix.system1.policy import DiffusionPolicy
from tests.system1.test_actor import make, seeded
from tests.system1.test_actor import observe as observe_official
from tests.system1.test_heads import batch_of, stirred
from tests.system1.test_policy import goal, observe, tiny


@pytest.mark.parametrize("head", ["trajectory", "dit"])
def test_bf16_stays_near(head):
    config = tiny(head=head)
    exact, half = stirred(config), to_bf16(stirred(config))
    inputs = batch_of(config, [0, 1])
    a = exact.sample_inputs(inputs, lambda s: torch.full(s, 0.3))
    b = half.sample_inputs(inputs, lambda s: torch.full(s, 0.3))
    assert b.dtype == torch.float32
    assert not torch.equal(a, b)
    assert (a - b).abs().max() < 0.05
    assert (a[..., :3] - b[..., :3]).abs().max() < 0.01


def test_bf16_official_stays_near():
    exact, half = make(1, 1), to_bf16(make(1, 1))
    inputs = observe_official(1, 1, 1)
    a, b = exact.sample(*inputs, seeded(0)), half.sample(*inputs, seeded(0))
    assert not torch.equal(a, b)
    # Random weights on random pixels: the sampled tokens differ, the trajectory hardly.
    assert (a[..., :3] - b[..., :3]).abs().max() < 0.02


def on_meta(value):
    if isinstance(value, tuple):
        return tuple(on_meta(v) for v in value)
    return None if value is None else value.to("meta")


@pytest.mark.parametrize("head", ["trajectory", "plain", "dit", "lstm"])
def test_what_a_graph_captures_looks_at_no_value_and_stays_on_its_device(head):
    # Tensors on "meta" have no values: reading one, or mixing it with one of the CPU's, is an
    # error, as both would be while a CUDA graph is being captured.
    config = tiny(head=head)
    model, inputs = stirred(config).to("meta"), batch_of(config, [0])
    fields = {f.name: on_meta(getattr(inputs, f.name)) for f in dataclasses.fields(inputs)}
    given = dataclasses.replace(inputs, **fields)
    assert model.sample_inputs(given, seeded(0)).device.type == "meta"
    assert model.sample_inputs(given.without_latent(), seeded(0)).device.type == "meta"


def test_the_official_network_looks_at_no_value():
    model, inputs = make(1, 1).to("meta"), on_meta(observe_official(1, 1, 1))
    assert model.sample(*inputs, seeded(0)).device.type == "meta"


def test_a_policy_in_bf16_acts():
    config = tiny()
    policy = DiffusionPolicy(to_bf16(DiffusionPolicy.build(config, 0).model))
    policy.warm_up()
    assert np.isfinite(policy.act(observe(config), [goal(config)]).poses).all()


def test_graphs_on_a_cpu_fall_back_and_say_why():
    config = tiny()
    model, inputs = stirred(config), batch_of(config, [0])
    graphed = GraphedSampler(model)
    out = graphed.sample_inputs(inputs, seeded(0))
    assert torch.equal(out, model.sample_inputs(inputs, seeded(0)))
    assert graphed.reason == "the policy is on cpu, graphs need cuda"
    assert DiffusionPolicy(model).eager_reason == graphed.reason


@pytest.mark.slow
def test_compiled_is_exact_enough():
    from openhelix.system1.fast_modes import compile_denoiser

    config = tiny()
    model, inputs = stirred(config), batch_of(config, [0])
    want = model.sample_inputs(inputs, seeded(0))
    compiled = compile_denoiser(stirred(config))
    torch.testing.assert_close(compiled.sample_inputs(inputs, seeded(0)), want, atol=1e-4, rtol=0)


@pytest.mark.parametrize("masked", [False, True])
def test_attention_written_out_is_attention(masked):
    g = torch.Generator().manual_seed(0)
    attention = Attention(24, 4)
    q, k, v = (torch.randn(2, n, 24, generator=g) for n in (7, 11, 11))
    mask = torch.rand(2, 11, generator=g) > 0.4 if masked else None
    with torch.inference_mode():
        fused = attention.attend(q, k, v, mask)
        plain = written_out(q, k, v, mask, 4)
    torch.testing.assert_close(fused, plain)


def test_padding_keys_are_not_seen():
    g = torch.Generator().manual_seed(0)
    attention = Attention(24, 4)
    q, k, v = (torch.randn(2, n, 24, generator=g) for n in (7, 16, 16))
    with torch.inference_mode():
        want = attention.attend(q, k[:, :13], v[:, :13])
        torch.testing.assert_close(attention.attend(q, k, v, padding=3), want)
        torch.testing.assert_close(written_out(q, k, v, None, 4, padding=3), want)


def test_many_rows_in_bf16_agree_with_the_fused_kernel():
    g = torch.Generator().manual_seed(0)
    attention = Attention(48, 4)
    q, k, v = (torch.randn(1, 144, 48, generator=g).bfloat16() for _ in range(3))
    mask = torch.rand(1, 144, generator=g) > 0.3
    with torch.inference_mode():
        for given, padding in ((None, 0), (None, 7), (mask, 7)):
            assert attention._big(q, k)
            fast = attention.attend(q, k, v, given, padding).float()
            exact = attention.attend(q.float(), k.float(), v.float(), given, padding)
            assert 0 < (fast - exact).abs().max() < 0.02


def test_padding_changes_nothing():
    model, inputs = make(1, 1), observe_official(1, 1, 1)
    with torch.inference_mode():
        scene = model.encode(*inputs)
        first = torch.full((1, 19, 9), 0.1)
        plain = model.denoise(scene, first, None)[0]
        padded = model.denoise(pad_sampled(scene, 3), first, None)[0]
    torch.testing.assert_close(plain, padded, atol=1e-5, rtol=0)
