"""Packed weights: the plain operators' numbers, and never those of weights that have changed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import relu

from openhelix.benchmarks.perf.s1_cases import gflop
from openhelix.system1 import attention
from openhelix.system1.actor import DiffuserActor
from openhelix.system1.attention import KERNELS, Linear, Pack, fold, packable
from openhelix.system1.encoder import Bottleneck
from tests.system1.test_actor import observe, stir

needs_kernels = pytest.mark.skipif(KERNELS is None, reason="this torch has no packed kernels")


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def linear() -> Linear:
    layer = Linear(12, 20)
    stir(layer)
    return layer.requires_grad_(False)


@needs_kernels
@pytest.mark.parametrize("rows", [3, 80])
def test_a_linear_layer_with_what_follows_it(rows):
    layer, x, other = linear(), numbers(2, rows, 12), numbers(2, rows, 20, seed=1)
    plain = x @ layer.weight.T + layer.bias
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), plain)
        torch.testing.assert_close(layer.relu(x), relu(plain))
        torch.testing.assert_close(layer.add(x, other), plain + other)
    torch.testing.assert_close(layer.add(x, other), plain + other)


@needs_kernels
def test_a_slice_of_the_rows():
    weight, bias, x = numbers(30, 12), numbers(30), numbers(1, 70, 12)
    with torch.inference_mode():
        got = Pack().linear(x, weight.clone(), bias.clone(), slice(10, None))
    torch.testing.assert_close(got, x @ weight[10:].T + bias[10:])


@needs_kernels
def test_changed_weights_are_packed_again():
    layer, x = linear(), numbers(1, 70, 12)
    with torch.no_grad():
        before = layer(x)
        layer.weight.mul_(2)
        layer.bias.zero_()
        torch.testing.assert_close(layer(x), x @ layer.weight.T)
        assert not torch.allclose(layer(x), before)
        layer.load_state_dict({"weight": numbers(20, 12, seed=5), "bias": numbers(20, seed=6)})
        torch.testing.assert_close(layer(x), x @ layer.weight.T + layer.bias)
        layer.weight = nn.Parameter(torch.zeros(20, 12), requires_grad=False)
        torch.testing.assert_close(layer(x), layer.bias.expand(1, 70, 20))


@needs_kernels
def test_a_copy_packs_its_own():
    layer, x = linear(), numbers(1, 70, 12)
    with torch.no_grad():
        want = layer(x)
        twin = copy.deepcopy(layer)
        layer.weight.zero_()
        torch.testing.assert_close(twin(x), want)


def test_gradients_take_the_plain_way():
    layer, x = linear().requires_grad_(True), numbers(1, 70, 12)
    with torch.no_grad():
        layer(x)
    layer.add(layer.relu(x).detach()[..., :12], numbers(1, 70, 20)).sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.abs().sum() > 0
    assert not packable(x, layer.weight)


def test_batch_norm_folds_into_the_convolution():
    conv, norm = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5).eval()
    stir(conv)
    stir(norm)
    with torch.no_grad():
        norm.running_mean.copy_(numbers(5))
        weight, bias = fold(conv, norm)
        x = numbers(2, 3, 8, 8)
        torch.testing.assert_close(torch.conv2d(x, weight, bias), norm(conv(x)))


@needs_kernels
@pytest.mark.parametrize("stride", [1, 2])
def test_a_bottleneck_packed_and_plain(stride):
    block = Bottleneck(16, 8, stride).eval()
    stir(block)
    x = numbers(2, 16, 12, 12)
    with torch.no_grad():
        for size in (12, 8):  # packed for the first size, run with another
            given = x[..., :size, :size].contiguous(memory_format=torch.channels_last)
            with torch.enable_grad():
                plain = block(given).detach()
            torch.testing.assert_close(block(given), plain, atol=1e-5, rtol=1e-5)
        block.bn3.running_var.mul_(3)
        with torch.enable_grad():
            plain = block(x).detach()
        torch.testing.assert_close(block(x), plain, atol=1e-5, rtol=1e-5)


def test_without_the_kernels_the_plain_operators_run(monkeypatch):
    model = DiffuserActor().eval().requires_grad_(False)
    stir(model)
    inputs = observe(1, 1, 1)
    with torch.inference_mode():
        want = model.encode(*inputs)
        monkeypatch.setattr(attention, "KERNELS", None)
        got = model.encode(*inputs)
    torch.testing.assert_close(got.context, want.context, atol=1e-5, rtol=1e-5)


@needs_kernels
def test_the_bench_counts_what_packed_operators_compute(monkeypatch):
    block, layer = Bottleneck(256, 64, 1).eval().requires_grad_(False), linear()
    pixels, rows = numbers(2, 256, 24, 24), numbers(2, 20_000, 12)

    def run() -> torch.Tensor:
        with torch.inference_mode():
            return block(pixels).sum() + layer.add(rows, layer.relu(rows)).sum()

    counted = gflop(run)
    monkeypatch.setattr(attention, "packable", lambda x, weight: False)
    assert counted == gflop(run) > 0.1
