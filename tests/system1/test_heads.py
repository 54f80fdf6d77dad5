"""Heads behind one interface: the same inputs, the same outputs, caches that are exact."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from openhelix.runtime.core.config import ConfigError
from openhelix.system1.diffusion import Normalizer
from openhelix.system1.geometry import Inputs
from openhelix.system1.heads.base import DiffusionHead
from openhelix.system1.heads.registry import HEADS
from openhelix.system1.model import VisuomotorPolicy
from openhelix.system1.policy import DiffusionPolicy
from tests.system1.test_policy import goal, observe, tiny

ALL = sorted(HEADS)
DIFFUSION = [name for name in ALL if issubclass(HEADS[name], DiffusionHead)]


def sized(head: str, **changes):
    """A tiny configuration of a head; an expert's latent has two layers' keys and values."""
    own = {"latent_dim": 32, "latent_kind": "kv"} if head == "expert" else {}
    return tiny(head=head, **own | changes)


def stirred(config) -> VisuomotorPolicy:
    policy = DiffusionPolicy.build(config, 1)
    g = torch.Generator().manual_seed(0)
    for p in policy.model.parameters():
        p.add_(0.05 * torch.randn(p.shape, generator=g))
    return policy.model


def batch_of(config, seeds) -> Inputs:
    policy = DiffusionPolicy.build(config, 0)
    single = [policy.prepare(observe(config, seed=s), [goal(config, seq=s)]) for s in seeds]

    def join(values):
        if isinstance(values[0], tuple):
            return tuple(join(v) for v in zip(*values, strict=True))
        return None if values[0] is None else torch.cat(values)

    names = [f.name for f in dataclasses.fields(Inputs)]
    return Inputs(*(join([getattr(i, n) for i in single]) for n in names))


@pytest.mark.parametrize("head", DIFFUSION)
@pytest.mark.parametrize("changes", [{}, {"latent_tokens": 3, "latent_memory": 2}])
def test_training_and_acting_compute_the_same(head, changes):
    config = sized(head, **changes)
    model, inputs = stirred(config), batch_of(config, [0, 1])
    with torch.inference_mode():
        scene = model.encode(inputs)
        x = torch.randn(6, 6, 9, generator=torch.Generator().manual_seed(1))
        t = torch.tensor([5, 40, 99])
        plain, logits = model.head(x, t.repeat(2), scene)
        step = model.head.prepare(scene, t)
        for i in range(3):
            fast, fast_logits = step(i, x[[i, 3 + i]])
            torch.testing.assert_close(plain[[i, 3 + i]], fast, atol=1e-5, rtol=0)
            torch.testing.assert_close(logits[[i, 3 + i]], fast_logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("head", ALL)
def test_a_batch_is_its_samples_side_by_side(head):
    config = sized(head)
    model = stirred(config)
    both = model.sample_inputs(batch_of(config, [3, 4]), lambda s: torch.full(s, 0.3))
    for i, seed in enumerate((3, 4)):
        alone = model.sample_inputs(batch_of(config, [seed]), lambda s: torch.full(s, 0.3))
        torch.testing.assert_close(both[i : i + 1], alone, atol=2e-5, rtol=0)


@pytest.mark.parametrize("head", ALL)
def test_what_a_head_looks_at(head):
    config = sized(head)
    model = stirred(config)
    model.set_normalizer(Normalizer(torch.zeros(6, 9), torch.ones(6, 9)))
    inputs = batch_of(config, [0])

    def run(changed: Inputs) -> torch.Tensor:
        return model.sample_inputs(changed, lambda s: torch.full(s, 0.3))

    base = run(inputs)
    other = dataclasses.replace(inputs, rgb=tuple(1 - x for x in inputs.rgb))
    assert not torch.equal(run(other), base)
    assert not torch.equal(run(dataclasses.replace(inputs, latent=-inputs.latent)), base)
    assert not torch.equal(run(inputs.without_latent()), base)
    older = dataclasses.replace(inputs, latent_age_s=inputs.latent_age_s + 1)
    assert not torch.equal(run(older), base)


@pytest.mark.parametrize("head", ALL)
def test_plain_tensors_and_the_null_latent(head):
    config = sized(head, cameras=tiny().cameras[:1])
    model = stirred(config)
    g = torch.Generator().manual_seed(0)
    rgb, pcd = torch.rand(2, 1, 3, 16, 16, generator=g), torch.rand(2, 1, 3, 16, 16, generator=g)
    gripper = torch.zeros(2, 1, 8)
    gripper[..., 3] = 1
    out = model.sample(rgb, pcd, gripper, None)
    assert out.shape == (2, 6, 8)
    torch.testing.assert_close(out[..., 3:7].norm(dim=-1), torch.ones(2, 6))
    with pytest.raises(ValueError, match="rgb: 2 cameras, the policy needs 1: static"):
        model.sample(rgb.repeat(1, 2, 1, 1, 1), pcd.repeat(1, 2, 1, 1, 1), gripper, None)
    with pytest.raises(ValueError, match="latent: 2 tokens of width 12, the policy was trained"):
        model.sample(rgb, pcd, gripper, torch.zeros(2, 2, 12))


@pytest.mark.parametrize("head", ALL)
def test_a_blind_policy_knows_the_scene_from_its_latent_alone(head):
    config = sized(head, sensors=("proprio",))
    model, inputs = stirred(config), batch_of(config, [0])
    base = run(model, inputs)
    assert torch.equal(run(model, dark(inputs)), base)
    assert not torch.equal(run(model, dataclasses.replace(inputs, latent=-inputs.latent)), base)
    assert not config.sees and not len(model.encoder.cameras)


def run(model, inputs):
    model.set_normalizer(Normalizer(torch.zeros(6, 9), torch.ones(6, 9)))
    return model.sample_inputs(inputs, lambda s: torch.full(s, 0.3))


def dark(inputs):
    return dataclasses.replace(inputs, rgb=tuple(1 - x for x in inputs.rgb))


def moved(inputs):
    shift = torch.tensor([0.1, 0.0, 0.2]).view(1, 3, 1, 1)
    return dataclasses.replace(inputs, xyz=tuple(x + shift for x in inputs.xyz))


def turned(inputs):
    proprio = inputs.proprio.clone()
    proprio[..., 8] = 1 - proprio[..., 8]
    return dataclasses.replace(inputs, proprio=proprio)


@pytest.mark.parametrize("encoder", ["light", "vit", "efficientnet"])
@pytest.mark.parametrize(
    "sensors", [("rgb",), ("rgb", "proprio"), ("depth", "proprio"), ("rgb", "depth")]
)
def test_a_sensor_that_is_masked_changes_nothing_and_another_does(encoder, sensors):
    if encoder == "efficientnet" and "rgb" not in sensors:
        with pytest.raises(ConfigError, match="efficientnet sees colours alone"):
            tiny(encoder=encoder, sensors=sensors)
        return
    config = tiny(encoder=encoder, sensors=sensors)
    model, inputs = stirred(config), batch_of(config, [0])
    base = run(model, inputs)
    assert torch.isfinite(base).all()
    for sensor, change in (("rgb", dark), ("depth", moved), ("proprio", turned)):
        assert torch.equal(run(model, change(inputs)), base) == (sensor not in sensors), sensor


@pytest.mark.parametrize("encoder", ["vit", "efficientnet"])
def test_other_encoders_learn_and_a_sample_does_not_depend_on_the_batch(encoder):
    config = tiny(encoder=encoder, head="map", sensors=("rgb", "proprio"))
    model = stirred(config)
    both = model.sample_inputs(batch_of(config, [3, 4]), lambda s: torch.full(s, 0.3))
    alone = model.sample_inputs(batch_of(config, [4]), lambda s: torch.full(s, 0.3))
    torch.testing.assert_close(both[1:], alone, atol=2e-5, rtol=0)
    model.requires_grad_(True).train()
    rows = torch.zeros(2, config.horizon, 9)
    mask = torch.ones(2, config.horizon, dtype=torch.bool)
    with torch.enable_grad():
        loss = model.loss(batch_of(config, [3, 4]), rows, rows[..., 0], mask)
        loss.total.backward()
    grads = [p.grad for p in model.encoder.cameras.parameters()]
    assert all(g is not None for g in grads) and any(float(g.abs().max()) > 0 for g in grads)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sensors": ("smell",)}, "sensors: 'smell' is none of rgb, depth, tactile, proprio"),
        ({"sensors": ()}, "sensors: .*; want one or more"),
        ({"sensors": "rgb"}, r"sensors: 'rgb'; want a list, \[rgb\]"),
        ({"sensors": ("rgb", "rgb")}, "each once"),
        ({"sensors": ("rgb", "tactile")}, "beside no camera 'tactile'"),
        ({"encoder": "eagle"}, "encoder: 'eagle' is none of light, vit, efficientnet"),
    ],
)
def test_a_sensor_or_encoder_that_there_is_not_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        tiny(**changes)


def test_fewer_scene_tokens():
    config = tiny(scene_tokens=3)
    model = stirred(config)
    with torch.inference_mode():
        scene = model.encode(batch_of(config, [0, 1]))
    assert scene.tokens.shape[:2] == (2, 3 + config.keyposes)
    assert torch.isfinite(model.sample_inputs(batch_of(config, [0, 1]))).all()


def test_an_expert_attends_to_each_layers_own_keys_and_values():
    config = sized("expert", latent_tokens=3, sensors=("proprio",))
    model, inputs = stirred(config), batch_of(config, [0])
    head, latent = model.head, inputs.latent.clone()
    base = run(model, inputs)
    keys, mask = head.kept(model.encode(inputs))
    assert len(keys) == 2 and mask.all()
    for layer, (key, value) in enumerate(keys):
        given = latent[0, 0].unflatten(-1, (2, 2, 4, 2))[:, layer]  # token, key or value, head
        torch.testing.assert_close(
            key[0].transpose(0, 1), given[:, 0] + head.place.unflatten(-1, (4, 2))
        )
        torch.testing.assert_close(value[0].transpose(0, 1), given[:, 1])
    for number in range(4):  # keys and values of either layer matter
        changed = latent.clone()
        changed[..., 8 * number : 8 * number + 8] += 1
        assert not torch.equal(run(model, dataclasses.replace(inputs, latent=changed)), base)
    latent[:, :, 2] = 0  # a row that the sentence does not fill
    _, mask = head.kept(model.encode(dataclasses.replace(inputs, latent=latent)))
    assert mask.tolist() == [[True, True, False]]
    with pytest.raises(ConfigError, match="head: 'expert' of 2 layers and 4 heads needs as many"):
        stirred(tiny(head="expert", latent_dim=32))
    with pytest.raises(ConfigError, match="not kv of 12 numbers"):
        stirred(tiny(head="expert", latent_kind="kv"))
