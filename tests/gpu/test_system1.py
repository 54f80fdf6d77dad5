"""System 1 on a CUDA device: the same numbers as on the CPU, and graphs that replay."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from system1.accelerate import GraphedSampler, to_bf16
from system1.policy import DiffusionPolicy
from tests.system1.test_actor import make
from tests.system1.test_heads import batch_of, stirred
from tests.system1.test_policy import goal, observe, tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def on_gpu(inputs):
    from dataclasses import fields, replace

    moved = {}
    for field in fields(inputs):
        value = getattr(inputs, field.name)
        if isinstance(value, tuple):
            moved[field.name] = tuple(v.cuda() for v in value)
        elif value is not None:
            moved[field.name] = value.cuda()
    return replace(inputs, **moved)


def seeded(seed: int, device: str):
    g = torch.Generator().manual_seed(seed)
    return lambda shape: torch.randn(shape, generator=g).to(device)


@pytest.fixture(autouse=True)
def exact_arithmetic():
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


@pytest.mark.parametrize("head", ["trajectory", "plain", "dit", "lstm"])
def test_a_graph_gives_the_cpus_trajectory(head):
    config = tiny(head=head)
    inputs = batch_of(config, [0])
    want = stirred(config).sample_inputs(inputs, seeded(1, "cpu"))
    graphed = GraphedSampler(stirred(config).cuda())
    for _ in range(2):
        out = graphed.sample_inputs(on_gpu(inputs), seeded(1, "cuda"))
        torch.testing.assert_close(out.cpu(), want, atol=2e-3, rtol=0)
    assert graphed.reason == ""


def test_a_graph_reads_new_inputs():
    config = tiny()
    graphed = GraphedSampler(stirred(config).cuda())
    eager = stirred(config).cuda()
    for seed in range(3):
        inputs = on_gpu(batch_of(config, [seed]))
        out = graphed.sample_inputs(inputs, seeded(seed, "cuda"))
        want = eager.sample_inputs(inputs, seeded(seed, "cuda"))
        torch.testing.assert_close(out, want, atol=1e-5, rtol=0)


def test_the_official_network_as_a_graph():
    model = make(1, 1).cuda()
    policy = DiffusionPolicy(model, "cuda")
    policy.warm_up()
    assert policy.eager_reason == ""
    chunk = policy.act(observe(policy.config), [goal(policy.config)])
    assert np.isfinite(chunk.poses).all()


def test_bf16_as_a_graph():
    config = tiny()
    graphed = GraphedSampler(to_bf16(stirred(config)).cuda())
    out = graphed.sample_inputs(on_gpu(batch_of(config, [0])), seeded(0, "cuda"))
    assert graphed.reason == ""
    assert torch.isfinite(out).all()


def test_a_failed_capture_says_why_and_goes_on(monkeypatch):
    config = tiny()
    model = stirred(config).cuda()

    def refuse(*_args, **_kwargs):
        raise RuntimeError("not capturable")

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    graphed = GraphedSampler(model)
    out = graphed.sample_inputs(on_gpu(batch_of(config, [0])), seeded(0, "cuda"))
    assert graphed.reason == "capture failed: not capturable"
    assert torch.isfinite(out).all()
