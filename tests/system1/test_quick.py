"""What makes a training step quick must not change what it computes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from openhelix.system1 import train_loop
from openhelix.system1.attention import Attention, written_to_learn
from openhelix.system1.encoder_light import normed
from openhelix.system1.train_loop import Muon, Optimizers, keep_freed_memory, orthogonal


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("padding", [0, 3])
def test_written_attention_and_its_gradients_are_the_fused_ones(masked, padding):
    torch.manual_seed(0)
    layer = Attention(48, 4)
    q, k, v = (torch.randn(3, n, 48, requires_grad=True) for n in (5, 11, 11))
    mask = torch.rand(3, 11) < 0.7 if masked else None
    if mask is not None:
        mask[:, 0] = True
    fused = layer.attend(q, k, v, mask, padding)  # float32: the fused kernel
    written = written_to_learn(q, k, v, mask, 4, padding)
    assert torch.allclose(fused, written, atol=1e-6)
    weight = torch.randn_like(fused)
    want = torch.autograd.grad((fused * weight).sum(), (q, k, v))
    have = torch.autograd.grad((written * weight).sum(), (q, k, v))
    for a, b in zip(want, have, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_bfloat16_training_takes_the_written_attention(monkeypatch):
    calls = []
    monkeypatch.setattr(
        "openhelix.system1.attention.written_to_learn",
        lambda q, k, v, mask, heads, padding: calls.append(q.dtype) or v,
    )
    layer, x = Attention(48, 4), torch.randn(2, 6, 48)
    with torch.autocast("cpu", torch.bfloat16):
        layer(x)
    assert calls == [torch.bfloat16]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        layer(x)
    layer(x)
    assert len(calls) == 1


def test_the_norm_is_taken_in_float32_only_while_weights_are():
    x = torch.randn(2, 16, 5, 5).bfloat16()
    norm = nn.GroupNorm(2, 16)
    assert normed(norm, x).dtype == torch.float32
    assert torch.allclose(normed(norm, x), norm(x.float()))
    assert normed(norm.bfloat16(), x).dtype == torch.bfloat16


@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_of_many_matrices_is_muon_of_each(nesterov):
    torch.manual_seed(0)
    shapes = [(40, 40), (40, 80), (80, 40), (40, 80)]
    ours = [nn.Parameter(torch.randn(s)) for s in shapes]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    settings = {"lr": 1e-2, "weight_decay": 0.1, "nesterov": nesterov}
    both = [
        Muon(ours, adjust_lr_fn="match_rms_adamw", **settings),
        torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **settings),
    ]
    for _ in range(4):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        for optimizer in both:
            optimizer.step()
    for p, q, shape in zip(ours, theirs, shapes, strict=True):
        moved = 4 * 1e-2 * 0.2 * max(shape) ** 0.5
        assert float((p - q).norm() / q.norm()) < 0.02 * moved, shape
        state = both[0].state[p]["momentum_buffer"], both[1].state[q]["momentum_buffer"]
        assert torch.allclose(*state, atol=1e-6)


@pytest.mark.parametrize("native", [True, False])
def test_muon_multiplies_in_bfloat16_only_where_that_is_native(native, monkeypatch):
    monkeypatch.setattr(train_loop, "computes_bf16", lambda wanted, device: native)
    torch.manual_seed(0)
    turned = orthogonal(torch.randn(3, 40, 64), (3.4445, -4.775, 2.0315), 5)
    assert turned.dtype == (torch.bfloat16 if native else torch.float32)
    squares = torch.linalg.svdvals(turned.float())
    assert float(squares.min()) > 0.6 and float(squares.max()) < 1.3


def test_a_matrix_without_a_gradient_stays():
    torch.manual_seed(0)
    p, q = (nn.Parameter(torch.randn(40, 40)) for _ in range(2))
    optimizers = Optimizers({"a": p, "b": q}, "muon", 1e-2, 0.0)
    p.grad, before = torch.randn_like(p), q.detach().clone()
    optimizers.step(1e-2)
    assert torch.equal(q, before)


def test_freed_memory_can_be_kept_here():
    assert keep_freed_memory()
