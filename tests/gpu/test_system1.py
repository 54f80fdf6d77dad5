"""System 1 on a CUDA device: the same numbers as on the CPU, and graphs that replay."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from openhelix.runtime.core.interfaces import PolicyFault
from openhelix.system1.diffusion import draw_noise
from openhelix.system1.fast_modes import GraphedSampler, to_bf16
from openhelix.system1.geometry import Inputs
from openhelix.system1.policy import DiffusionPolicy
from tests.system1.test_actor import make
from tests.system1.test_actor import observe as observe_official
from tests.system1.test_heads import batch_of, stirred
from tests.system1.test_policy import goal, observe, tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def on_gpu(inputs):
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


def official_inputs():
    rgb, pcd, gripper, latent = observe_official(1, 1, 1, size=200)
    valid = torch.ones(1, 200, 200, dtype=torch.bool)
    proprio = torch.cat((gripper[..., :3], gripper[..., 3:7].roll(-1, -1), gripper[..., 6:]), -1)
    rest = (proprio, latent.unsqueeze(1), None, None, torch.tensor([-1]))
    return Inputs(rgb.unbind(1), pcd.unbind(1), (valid, valid), *rest)


def test_the_official_network_as_a_graph_equals_the_cpu():
    inputs = official_inputs()
    want = make(1, 1).sample_inputs(inputs, seeded(3, "cpu"))
    graphed = GraphedSampler(make(1, 1).cuda())
    eager = make(1, 1).cuda().sample_inputs(on_gpu(inputs), seeded(3, "cuda"))
    for _ in range(2):
        out = graphed.sample_inputs(on_gpu(inputs), seeded(3, "cuda"))
        torch.testing.assert_close(out, eager, atol=1e-4, rtol=0)
    assert graphed.reason == ""
    # Tokens that are nearly equally far may be picked in another order; the chunk is the same.
    assert (out.cpu() - want)[..., :3].abs().max() < 5e-3


@pytest.mark.parametrize("official", [False, True])
def test_a_policy_on_the_gpu_plans_what_it_plans_on_the_cpu(official):
    chunks = {}
    for device in ("cpu", "cuda"):
        model = make(1, 1) if official else stirred(tiny())
        policy = DiffusionPolicy(model, device)
        policy.warm_up()
        policy.reset(4)
        obs = observe(policy.config, seed=2)
        holes = obs.frames["static"].depth.copy()
        holes[:7] = np.nan
        frames = {**obs.frames, "static": replace(obs.frames["static"], depth=holes)}
        planned = policy.act(replace(obs, frames=frames), [goal(policy.config)])
        chunks[device] = planned, policy.counters.invalid_points
    assert policy.eager_reason == ""
    assert chunks["cpu"][1] == chunks["cuda"][1] > 0
    near = np.abs(chunks["cpu"][0].poses - chunks["cuda"][0].poses)[:, :3]
    assert near.max() < 5e-3


def test_a_faulty_output_is_counted_on_the_gpu():
    policy = DiffusionPolicy(stirred(tiny()), "cuda")
    policy.warm_up()
    policy.model.head.out.weight.fill_(torch.nan)  # in place: the graph sees it
    with pytest.raises(PolicyFault):
        policy.act(observe(policy.config), [goal(policy.config)])
    assert policy.counters.faults == 1


def test_bf16_as_a_graph_stays_near():
    config = tiny()
    inputs = on_gpu(batch_of(config, [0]))
    exact = stirred(config).cuda().sample_inputs(inputs, seeded(0, "cuda"))
    graphed = GraphedSampler(to_bf16(stirred(config)).cuda())
    out = graphed.sample_inputs(inputs, seeded(0, "cuda"))
    assert graphed.reason == ""
    assert out.dtype == torch.float32
    assert (out - exact)[..., :3].abs().max() < 0.01
    assert (out - exact).abs().max() < 0.05


def test_the_official_network_in_bf16_stays_near():
    inputs = on_gpu(official_inputs())
    exact = make(1, 1).cuda().sample_inputs(inputs, seeded(0, "cuda"))
    graphed = GraphedSampler(to_bf16(make(1, 1)).cuda())
    out = graphed.sample_inputs(inputs, seeded(0, "cuda"))
    assert graphed.reason == ""
    assert (out - exact)[..., :3].abs().max() < 0.02


def test_weights_of_another_precision_get_a_graph_of_their_own():
    config = tiny()
    inputs = on_gpu(batch_of(config, [0]))
    graphed = GraphedSampler(stirred(config).cuda())
    graphed.sample_inputs(inputs, seeded(0, "cuda"))
    to_bf16(graphed.model)
    want = graphed.model.sample_inputs(inputs, seeded(0, "cuda"))
    out = graphed.sample_inputs(inputs, seeded(0, "cuda"))
    torch.testing.assert_close(out, want, atol=1e-5, rtol=0)
    assert graphed.reason == ""


def test_denoising_never_waits_for_the_gpu():
    for model, inputs in (
        (stirred(tiny()), batch_of(tiny(), [0])),
        (make(1, 1), official_inputs()),
    ):
        model, inputs = model.cuda(), on_gpu(inputs)
        first, drawn = draw_noise(model.sampler, 1, model.config.horizon, seeded(0, "cuda"))
        with torch.inference_mode():
            model.denoise_inputs(inputs, first, drawn)  # libraries may wait while they load
            torch.cuda.set_sync_debug_mode("error")
            try:
                model.denoise_inputs(inputs, first, drawn)
            finally:
                torch.cuda.set_sync_debug_mode("default")


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
