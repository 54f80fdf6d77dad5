"""Training: the loss falls, a stopped run goes on as if it had not, bad runs stop."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from openhelix.runtime.core.config import ConfigError
from openhelix.system1.checkpoint import load_policy
from openhelix.system1.data import Augment, Cache
from openhelix.system1.diffusion import row_levels
from openhelix.system1.latent_adapter import ADAPTER
from openhelix.system1.losses import LossParts, diffusion_loss, trajectory_loss
from openhelix.system1.policy import DiffusionPolicy
from openhelix.system1.train import TrainConfig, Trainer, policy_config, train
from openhelix.system1.train_loop import OPTIMIZERS
from tests.system1.synthetic import SENTENCES, make_cache
from tests.system1.test_policy import tiny

SMALL = {"dim": 48, "heads": 4, "encoder_width": 8, "layers": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("cache")
    make_cache(path, tiny(n_tasks=2))
    return path


def run_config(folder, out, **changes) -> TrainConfig:
    base = TrainConfig(
        cache=folder,
        out=out,
        sentences=folder / SENTENCES,
        changes=SMALL,
        steps=6,
        batch=8,
        draws=4,
        lr=3e-3,
        warmup=2,
        validation=0.2,
        eval_every=6,
        save_every=3,
        log_every=1,
        augment=Augment(shift=1),
    )
    return replace(base, **changes)


@pytest.mark.parametrize("head", ["trajectory", "plain", "dit", "lstm"])
def test_the_loss_falls_with_every_head(folder, tmp_path, head):
    changes = {**SMALL, "head": head}
    run = Trainer(run_config(folder, tmp_path, steps=25, changes=changes, eval_every=25, ema=0.8))
    before = run.evaluate()
    history = run.run()
    assert history[-1]["loss"] < 0.96 * history[0]["loss"]
    assert history[-1]["val_loss"] < 0.97 * before["val_loss"]
    assert (tmp_path / "loss.png").stat().st_size > 5_000
    assert json.loads((tmp_path / "train.json").read_text())["step"] == 25
    policy = DiffusionPolicy.load(tmp_path)
    assert policy.spec.latent.model_id == "fake0"
    assert policy.config.head == head


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["small", "small_flow"])
def test_the_policy_learns_where_to_go(tmp_path, preset):
    make_cache(tmp_path / "cache", tiny(n_tasks=2), episodes=60)
    config = run_config(tmp_path / "cache", tmp_path / "run", steps=400, batch=16, eval_every=400)
    config = replace(config, preset=preset)
    history = Trainer(replace(config, warmup=10, validation=0.1, ema=0.95)).run()
    assert history[-1]["val_position_m"] < 0.012  # of 35 mm moved on average
    assert history[-1]["val_gripper_error"] < 0.05


def test_a_resumed_run_is_the_run_that_never_stopped(folder, tmp_path):
    whole = Trainer(run_config(folder, tmp_path / "a"))
    whole.run()
    first = Trainer(run_config(folder, tmp_path / "b"))
    for _ in range(3):
        first.train_step()
    first.save()
    second = Trainer(run_config(folder, tmp_path / "b"))
    assert second.step == 3
    second.run()
    for (name, a), b in zip(
        whole.model.state_dict().items(), second.model.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name
    for name, value in whole.ema.values.items():
        assert torch.equal(value, second.ema.values[name]), name


def test_bf16_stays_close(folder, tmp_path):
    exact = Trainer(run_config(folder, tmp_path / "a")).train_step()
    half = Trainer(run_config(folder, tmp_path / "b", bf16=True)).train_step()
    assert half["loss"] == pytest.approx(exact["loss"], rel=0.05)
    assert half["loss"] != exact["loss"]


def test_a_time_limit_stops_and_saves(folder, tmp_path):
    train(run_config(folder, tmp_path, steps=1000, time_limit_s=1e-6))
    assert json.loads((tmp_path / "train.json").read_text())["step"] == 1


def test_frozen_parts_stay(folder, tmp_path):
    run = Trainer(run_config(folder, tmp_path, freeze=("encoder.",)))
    before = {n: t.clone() for n, t in run.model.state_dict().items()}
    run.train_step()
    after = run.model.state_dict()
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert changed
    assert all(n.startswith("head.") for n in changed)


def test_a_run_can_start_from_a_checkpoint(folder, tmp_path):
    first = Trainer(run_config(folder, tmp_path / "a", sentences=None))
    first.train_step()
    first.save()
    second = Trainer(run_config(folder, tmp_path / "b", init=tmp_path / "a"))
    weights = DiffusionPolicy.load(tmp_path / "a").model.state_dict()
    for name, tensor in second.model.state_dict().items():
        if not name.startswith(ADAPTER):  # the sentences' latents have another width
            assert torch.equal(tensor, weights[name]), name
    assert second.policy_config.use_latent
    assert second.policy_config.latent_model_id == "fake0"
    assert second.train_step()["loss"] > 0


def test_a_run_can_start_from_a_checkpoint_and_add_to_it(folder, tmp_path):
    plain = {**SMALL, "keyposes": 0}
    first = Trainer(run_config(folder, tmp_path / "a", sentences=None, changes=plain))
    first.train_step()
    first.save()
    weights = DiffusionPolicy.load(tmp_path / "a").model.state_dict()
    config = run_config(folder, tmp_path / "b", sentences=None, init=tmp_path / "a")
    second = Trainer(replace(config, changes={"keyposes": 2}))
    state = second.model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in weights.items())
    added = set(state) - set(weights)
    assert added and all(name.startswith("encoder.keyposes.") for name in added)
    assert second.train_step()["keypose"] > 0
    with pytest.raises(ConfigError, match="changes: encoder_width would lose"):
        Trainer(replace(config, out=tmp_path / "c", changes={"encoder_width": 16}))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_optimiser_goes_on_as_it_was(folder, tmp_path, optimizer):
    changes = {**SMALL, "dim": 96, "heads": 4}
    config = run_config(folder, tmp_path, changes=changes, optimizer=optimizer)
    whole = Trainer(config)
    whole.train_step()
    whole.save()
    again = Trainer(config)
    for run in (whole, again):
        run.train_step()
    for (name, a), b in zip(
        whole.model.state_dict().items(), again.model.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name
    kinds = {type(part).__name__ for part in whole.optimizers.parts}
    assert kinds == ({"AdamW", "Muon"} if optimizer == "muon" else {"AdamW"})


def test_a_loss_that_is_not_finite_stops_the_run(folder, tmp_path):
    run = Trainer(run_config(folder, tmp_path))
    run.model.head.out.bias.data.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="the loss of step 0 is nan"):
        run.train_step()


def test_contradictions_are_named(folder, tmp_path):
    cache = Cache(folder)
    with pytest.raises(
        ConfigError, match=r"^policy\.changes\.horizon: 9 contradicts the cache, which has 6"
    ):
        policy_config(run_config(folder, tmp_path, changes={"horizon": 9}), cache)
    with pytest.raises(ConfigError, match=r"^policy\.preset: 'big' is none of"):
        policy_config(run_config(folder, tmp_path, preset="big"), cache)


def test_masked_rows_do_not_count():
    g = torch.Generator().manual_seed(0)
    target, predicted = torch.randn(2, 2, 4, 9, generator=g)
    logits, opened = torch.randn(2, 4, 1, generator=g), torch.rand(2, 4, generator=g)
    mask = torch.tensor([[True, True, False, False], [True, False, False, False]])
    parts = trajectory_loss(predicted, target, logits, opened, mask)
    gap = (predicted - target).abs()[mask]
    torch.testing.assert_close(parts.position, gap[:, :3].mean())
    torch.testing.assert_close(parts.rotation, gap[:, 3:].mean())
    spoiled = target.clone()
    spoiled[~mask] = 1e6
    again = trajectory_loss(predicted, spoiled, logits, opened, mask)
    torch.testing.assert_close(parts.total, again.total)
    weighted = 30 * parts.position + 10 * parts.rotation + parts.gripper
    torch.testing.assert_close(
        LossParts(*(getattr(parts, n) for n in ("position", "rotation", "gripper"))).total, weighted
    )


def test_draws_spread_the_timesteps():
    config, seen = tiny(), []

    def model(x, t, given):
        seen.append(t)
        return x, x[..., :1]

    clean = torch.zeros(3, 6, 9)
    ones = torch.ones(3, 6)
    diffusion_loss(model, clean, ones, ones.bool(), row_levels(config), "sample", 4, None)
    t = seen[0].view(3, 4)
    assert ((t // 25) == torch.arange(4)).all()


def test_given_rows_go_in_clean_and_do_not_count():
    config, seen = tiny(), []

    def model(x, t, given):
        seen.append((x, given))
        return torch.zeros_like(x), x[..., :1]

    clean = torch.arange(1.0, 7)[None, :, None].expand(5, 6, 9)
    ones = torch.ones(5, 6)
    source = torch.Generator().manual_seed(0)
    args = (clean, ones, ones.bool(), row_levels(config), "sample", 4)
    parts = diffusion_loss(model, *args, source, given_rows=3)
    (x, given), *_ = seen
    assert (given.view(5, 4)[:, 1:] == 0).all()
    assert set(given.view(5, 4)[:, 0].tolist()) <= {1, 2, 3} and given.max() > given[::4].min()
    left = []
    for row, count in zip(x, given.tolist(), strict=True):
        torch.testing.assert_close(row[:count], clean[0, :count], rtol=0, atol=0)
        assert (row[count:] != clean[0, count:]).any()
        left += clean[0, count:, 0].tolist()
    assert float(parts.position) == pytest.approx(sum(left) / len(left))
    diffusion_loss(model, *args, None)
    assert seen[-1][1] is None


def test_a_policy_that_learns_to_go_on_begins_as_it_was(folder, tmp_path):
    first = run_config(folder, tmp_path / "a", steps=2)
    train(first)
    again = run_config(folder, tmp_path / "b", init=first.out)
    grown_run = Trainer(replace(again, changes={**again.changes, "given_rows": 3}))
    before, after = load_policy(first.out), grown_run.model
    torch.testing.assert_close(after.head.given, torch.zeros_like(after.head.given))
    with torch.no_grad():
        for name, p in before.named_parameters():
            torch.testing.assert_close(dict(after.named_parameters())[name], p, rtol=0, atol=0)
    grown_run.train_step()
    assert float(after.head.given.abs().max()) > 0


def test_a_run_planned_by_time_ends_with_its_rate_down_and_is_then_left_alone(folder, tmp_path):
    config = run_config(folder, tmp_path, steps=10_000, warmup=1, plan_s=1.5, eval_every=10_000)
    run = Trainer(config)
    history = run.run()
    assert 1 <= run.step < 10_000
    assert 1.5 <= history[-1]["seconds"] < 60
    assert history[-1]["val_loss"] > 0
    assert run.rate(run.step) == pytest.approx(config.lr * config.decay_to, rel=1e-3)
    again = Trainer(config)
    assert again.seconds >= 1.5
    again.run()
    assert again.step == run.step


def test_a_plan_by_time_goes_on_where_it_stopped(folder, tmp_path):
    config = run_config(folder, tmp_path, steps=10_000, warmup=1, plan_s=1000.0)
    first = Trainer(replace(config, time_limit_s=0.5))
    first.run()
    spent = first.history[-1]["seconds"]
    second = Trainer(config)
    assert spent <= second.seconds < spent + 10
    assert second.step == first.step
