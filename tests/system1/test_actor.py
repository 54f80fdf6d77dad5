"""The published architecture: names, exactness of the caches, masks, batches, bad input."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.functional import interpolate, normalize

from openhelix.system1.actor import DiffuserActor
from openhelix.system1.config import official_calvin
from openhelix.system1.diffusion import Noise
from openhelix.system1.geometry import Inputs, matrix_from_6d, matrix_to_quat
from tests.system1.naive import Naive

NAMES = Path(__file__).parent / "data" / "official_state_dict.tsv"


def seeded(seed: int) -> Noise:
    generator = torch.Generator().manual_seed(seed)
    return lambda shape: torch.randn(shape, generator=generator)


def stir(model: torch.nn.Module, seed: int = 0) -> None:
    """Give every part a say: modulations, biases, norms and statistics leave their defaults."""
    g = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if "adaln" in name:
            p.data.copy_(0.1 * torch.randn(p.shape, generator=g))
        elif name.endswith("bias"):
            p.data.add_(0.05 * torch.randn(p.shape, generator=g))
        elif "norm" in name or ".bn" in name:
            p.data.mul_(1 + 0.1 * torch.randn(p.shape, generator=g))
    for name, b in model.named_buffers():
        if name.endswith("running_mean"):
            b.copy_(0.1 * torch.randn(b.shape, generator=g))
        elif name.endswith("running_var"):
            b.copy_(1 + 0.3 * torch.rand(b.shape, generator=g))


def make(nhist: int, tokens: int) -> DiffuserActor:
    with torch.random.fork_rng():
        torch.manual_seed(nhist)
        model = DiffuserActor(official_calvin(nhist, tokens))
    stir(model)
    return model.eval().requires_grad_(False)


def observe(batch: int, nhist: int, tokens: int, size: int = 32, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    rgb = torch.rand(batch, 2, 3, size, size, generator=g)
    coarse = 0.3 * torch.randn(batch * 2, 3, 6, 6, generator=g)
    pcd = interpolate(coarse, (size, size), mode="bilinear").view(batch, 2, 3, size, size)
    gripper = 0.2 * torch.randn(batch, nhist, 8, generator=g)
    gripper[..., 3:7] = normalize(gripper[..., 3:7], dim=-1)
    return rgb, pcd, gripper, torch.randn(batch, tokens, 512, generator=g)


@pytest.fixture(scope="module")
def model() -> DiffuserActor:
    return make(1, 1)


def test_every_name_and_shape_is_the_published_one(model):
    want = dict(line.split("\t") for line in NAMES.read_text().splitlines())
    have = {name: str(tuple(t.shape)) for name, t in model.state_dict().items()}
    assert have == want
    assert sum(p.numel() for p in model.parameters()) == 47_994_282
    assert sum(p.numel() for p in model.encoder.backbone.parameters()) == 38_316_896


@pytest.mark.parametrize(("nhist", "tokens", "size"), [(1, 1, 32), (3, 16, 64)])
def test_caches_are_exact(nhist, tokens, size):
    model = make(nhist, tokens)
    inputs = observe(2, nhist, tokens, size=size)
    with torch.inference_mode():
        slow = Naive(model.state_dict()).sample(*inputs, seeded(7))
    fast = model.sample(*inputs, seeded(7))
    assert slow[..., :3].std() > 0.05
    quat = matrix_to_quat(matrix_from_6d(slow[..., 3:9]))
    want = torch.cat((slow[..., :3], quat, slow[..., 9:]), -1)
    assert (fast - want).abs().max() <= 1e-5


def test_training_and_acting_compute_the_same(model):
    inputs = observe(2, 1, 1)
    with torch.inference_mode():
        scene = model.encode(*inputs)
        x = torch.randn(4, 19, 9, generator=torch.Generator().manual_seed(0))
        t = torch.tensor([3, 17])
        plain, logits = model.prediction_head(x, torch.tensor([3, 17, 3, 17]), scene)
        step = model.prediction_head.prepare(scene, t)
        for i in range(2):
            fast, fast_logits = step(i, x[[i, 2 + i]])
            torch.testing.assert_close(plain[[i, 2 + i]], fast, atol=1e-5, rtol=0)
            torch.testing.assert_close(logits[[i, 2 + i]], fast_logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("tokens", [1, 16])
def test_a_batch_is_its_samples_side_by_side(model, tokens):
    inputs = observe(2, 1, tokens, seed=3)
    first = torch.full((2, 19, 9), 0.3)
    with torch.inference_mode():
        both, _ = model.denoise(model.encode(*inputs), first, None)
        for b in range(2):
            one = (x[b : b + 1] for x in inputs)
            alone, _ = model.denoise(model.encode(*one), first[:1], None)
            torch.testing.assert_close(both[b : b + 1], alone, atol=2e-5, rtol=0)


def test_noise_is_drawn_in_the_published_order(model):
    shapes: list[tuple[int, ...]] = []

    def record(shape: tuple[int, ...]) -> torch.Tensor:
        shapes.append(tuple(shape))
        return torch.zeros(shape)

    model.sample(*observe(1, 1, 1), record)
    assert shapes == [(1, 19, 9)] + [(1, 19, 3), (1, 19, 6)] * 24


def test_a_full_image_is_cropped(model):
    rgb, pcd, gripper, latent = observe(1, 1, 1, size=200)
    inner = slice(20, 180)
    with torch.inference_mode():
        whole = model.encode(rgb, pcd, gripper, latent)
        crop = model.encode(rgb[..., inner, inner], pcd[..., inner, inner], gripper, latent)
    assert whole.context.shape[1] == 2 * 20 * 20
    assert whole.sampled.shape[1] == 266
    torch.testing.assert_close(whole.context, crop.context)
    torch.testing.assert_close(whole.code, crop.code)


def test_invalid_points_stay_out_of_attention(model):
    rgb, pcd, gripper, latent = observe(1, 1, 1)
    clean = model.sample(rgb, pcd, gripper, latent, seeded(1))
    results = []
    for bad in (torch.nan, torch.inf):
        broken = pcd.clone()
        broken[:, 0, 0, :12, :12] = bad
        results.append(model.sample(rgb, broken, gripper, latent, seeded(1)))
    assert torch.isfinite(results[0]).all()
    torch.testing.assert_close(results[0], results[1])
    assert not torch.allclose(results[0], clean)


def test_a_mask_without_holes_changes_nothing(model):
    inputs = observe(1, 1, 1)
    with torch.inference_mode():
        first = torch.ones(1, 19, 9) * 0.1
        plain = model.denoise(model.encode(*inputs), first, None)[0]
        masked = model.denoise(model.encode(*inputs, mask=True), first, None)[0]
    torch.testing.assert_close(plain, masked, atol=1e-5, rtol=0)


def test_wrong_shapes_are_named(model):
    rgb, pcd, gripper, latent = observe(1, 1, 1)
    with pytest.raises(ValueError, match=r"rgb, pcd: shapes .* both must be \(B, 2, 3, H, W\)"):
        model.sample(rgb[:, :1], pcd[:, :1], gripper, latent)
    with pytest.raises(ValueError, match=r"gripper: shape .* must be \(B, 1, 7 or 8\)"):
        model.sample(rgb, pcd, gripper[..., :5], latent)
    with pytest.raises(ValueError, match=r"latent: shape .* must be \(B, n, 512\)"):
        model.sample(rgb, pcd, gripper, latent[..., :100])
    with pytest.raises(ValueError, match=r"rgb: \(30, 32\) pixels"):
        model.sample(rgb[..., :30, :], pcd[..., :30, :], gripper, latent)


def test_loss_reaches_every_part_that_is_trained(model):
    rgb, pcd, gripper, latent = observe(1, 1, 16)
    valid = torch.ones(1, 32, 32, dtype=torch.bool)
    proprio = torch.cat((gripper[..., :3], gripper[..., 3:7].roll(-1, -1), gripper[..., 6:]), -1)
    inputs = Inputs(
        *(rgb.unbind(1), pcd.unbind(1), (valid, valid), proprio),
        *(latent.unsqueeze(1), None, None, torch.tensor([-1])),
    )
    grown = make(1, 16)
    for name, p in grown.named_parameters():
        p.requires_grad_(not name.startswith("encoder.backbone"))
    rows = torch.zeros(1, 19, 9)
    rows[..., 3] = rows[..., 7] = 1
    mask = torch.ones(1, 19, dtype=torch.bool)
    parts = grown.loss(inputs, rows, torch.ones(1, 19), mask, draws=2)
    parts.total.backward()
    unused = ["attnpool", "goal_gripper_embed", "inner_blocks.0", "inner_blocks.1"]
    unused += [f"layer_blocks.{i}" for i in (0, 1, 3, 4)]
    unused += ["traj_lang_attention.0.layers.0.ffn_12", "traj_lang_attention.0.layers.0.norm_122"]
    for name, p in grown.named_parameters():
        if p.requires_grad and not any(part in name for part in unused):
            assert p.grad is not None, name
            assert p.grad.abs().sum() > 0, name
