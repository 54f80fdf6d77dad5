"""Our tabulated samplers against the diffusers schedulers."""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.schedulers import scheduling_ddpm

from openhelix.runtime.core.config import ConfigError
from openhelix.system1.config import official_calvin, small, small_flow
from openhelix.system1.diffusion import (
    Known,
    add_noise,
    alphas_cumprod,
    draw_noise,
    make_table,
    row_alphas,
    row_levels,
    run_table,
    spread_timesteps,
    target_of,
)

KINDS = ("scaled_linear", "squaredcos_cap_v2", "linear")


def toy(i: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A smooth "network" that depends on the step."""
    return torch.tanh(0.7 * x + 0.1 * i) * 0.5, x[..., :1]


def seeded(seed: int):
    g = torch.Generator().manual_seed(seed)
    return lambda shape: torch.randn(shape, generator=g)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [25, 100])
def test_schedules(kind, steps):
    theirs = DDPMScheduler(num_train_timesteps=steps, beta_schedule=kind).alphas_cumprod
    torch.testing.assert_close(alphas_cumprod(kind, steps).float(), theirs, rtol=0, atol=0)


def test_an_unknown_schedule_is_named():
    with pytest.raises(ValueError, match="schedule: 'sine' is not"):
        alphas_cumprod("sine", 10)


@pytest.fixture
def silent_scheduler(monkeypatch):
    """Replace the scheduler's own noise with zeros; the test adds its own."""
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda shape, **_: torch.zeros(shape))


@pytest.mark.usefixtures("silent_scheduler")
def test_official_ddpm_is_diffusers_ddpm():
    config = official_calvin()
    table = make_table(config)
    theirs = [
        DDPMScheduler(num_train_timesteps=25, beta_schedule=k, prediction_type="epsilon")
        for k in (config.position_schedule, config.rotation_schedule)
    ]
    for s in theirs:
        s.set_timesteps(25)
    assert table.timesteps == tuple(theirs[0].timesteps.tolist())
    first, drawn = draw_noise(table, 2, 19, seeded(0))
    ours, _ = run_table(table, toy, first, drawn)
    x = first
    for i, t in enumerate(table.timesteps):
        out, _ = toy(i, x)
        parts = []
        for scheduler, part in zip(theirs, (slice(0, 3), slice(3, 9)), strict=True):
            mean = scheduler.step(out[..., part], t, x[..., part]).prev_sample
            if t > 0:
                mean = mean + scheduler._get_variance(t) ** 0.5 * drawn[i][..., part]
            parts.append(mean)
        x = torch.cat(parts, -1)
    torch.testing.assert_close(ours, x, atol=2e-6, rtol=0)


@pytest.mark.parametrize("steps", [4, 5, 10])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v"])
def test_ddim_is_diffusers_ddim(steps, prediction):
    config = small(prediction=prediction, position_schedule="linear", rotation_schedule="linear")
    table = make_table(config, "ddim", steps)
    theirs = DDIMScheduler(
        num_train_timesteps=100,
        beta_schedule="linear",
        clip_sample=False,
        prediction_type={"v": "v_prediction"}.get(prediction, prediction),
        timestep_spacing="trailing",
    )
    theirs.set_timesteps(steps)
    assert table.timesteps == tuple(theirs.timesteps.tolist())
    first, drawn = draw_noise(table, 1, 6, seeded(1))
    assert drawn is None
    ours, _ = run_table(table, toy, first, None)
    x = first
    for i, t in enumerate(theirs.timesteps):
        x = theirs.step(toy(i, x)[0], t, x).prev_sample
    torch.testing.assert_close(ours, x, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("steps", [1, 4, 5, 10, 20])
def test_dpmpp_is_diffusers_dpmpp(steps):
    config = small(position_schedule="linear", rotation_schedule="linear")
    table = make_table(config, "dpmpp", steps)
    theirs = DPMSolverMultistepScheduler(
        num_train_timesteps=100,
        beta_schedule="linear",
        prediction_type="sample",
        algorithm_type="dpmsolver++",
        solver_order=2,
        lower_order_final=True,
        final_sigmas_type="zero",
        timestep_spacing="trailing",
        euler_at_final=True,
    )
    theirs.set_timesteps(steps)
    first, _ = draw_noise(table, 1, 6, seeded(2))
    ours, _ = run_table(table, toy, first, None)
    x = first
    for i, t in enumerate(theirs.timesteps):
        x = theirs.step(toy(i, x)[0], t, x).prev_sample
    torch.testing.assert_close(ours, x, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("steps", [1, 4, 10])
def test_flow_matching_is_diffusers_flow_matching(steps):
    table = make_table(small_flow(), steps=steps)
    theirs = FlowMatchEulerDiscreteScheduler(num_train_timesteps=100)
    theirs.set_timesteps(sigmas=[1 - i / steps for i in range(steps)])
    first, drawn = draw_noise(table, 1, 6, seeded(3))
    assert drawn is None
    ours, _ = run_table(table, toy, first, None)
    x = first
    for i, t in enumerate(theirs.timesteps):
        x = theirs.step(toy(i, x)[0], t, x).prev_sample
    torch.testing.assert_close(ours, x, atol=1e-5, rtol=1e-4)
    clean, noise = torch.randn(2, 3, 5, 9).unbind(0)
    t = torch.tensor([0, 49, 99])
    begun = add_noise(row_levels(small_flow()), clean, noise, t)
    torch.testing.assert_close(begun[1], (clean[1] + noise[1]) / 2)
    torch.testing.assert_close(begun[2], noise[2], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"rotation_schedule": "linear"}, "rotation_schedule: 'linear'; rectified_flow is for"),
        ({"prediction": "v"}, "prediction: 'v'; with rectified_flow it is sample or flow"),
        ({"sampler": "ddim"}, "sampler: 'ddim' is not euler"),
    ],
)
def test_what_does_not_go_with_flow_matching_is_named(changes, line):
    with pytest.raises(ConfigError, match=line):
        small_flow(**changes)


def test_diffusion_takes_none_of_flow_matching():
    with pytest.raises(ConfigError, match="prediction: 'flow' needs both schedules"):
        small(prediction="flow")
    with pytest.raises(ValueError, match="sampler: 'euler' is not ddpm or ddim or dpmpp"):
        make_table(small(), "euler")


def test_timesteps_start_at_the_noisiest():
    assert spread_timesteps(25, 25) == tuple(range(24, -1, -1))
    assert spread_timesteps(100, 5) == (99, 79, 59, 39, 19)


def test_our_schedule_reaches_noise_and_the_official_one_does_not():
    assert row_alphas(small())[-1].max() < 1e-4
    assert row_alphas(official_calvin())[-1, 0] == pytest.approx(0.832, abs=1e-3)


@pytest.mark.parametrize(
    ("prediction", "sampler"),
    [(p, s) for p in ("epsilon", "sample", "v") for s in ("ddpm", "ddim", "dpmpp")]
    + [("flow", "euler"), ("sample", "euler")],
)
def test_a_perfect_network_gives_the_clean_trajectory(prediction, sampler):
    if sampler == "euler":
        config = small_flow(prediction=prediction)
    else:
        config = small(prediction=prediction, position_schedule="scaled_linear")
    levels, table = row_levels(config), make_table(config, sampler, 10)
    clean = 0.5 * torch.randn(1, 6, 9, generator=torch.Generator().manual_seed(0))

    def perfect(i: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        t = torch.tensor([table.timesteps[i]])
        alpha, sigma = levels[:, t].unsqueeze(2)
        noise = ((x - alpha * clean) / sigma).float()
        return target_of(prediction, levels, clean, noise, t), x[..., :1]

    out, _ = run_table(table, perfect, *draw_noise(table, 1, 6, seeded(0)))
    torch.testing.assert_close(out, clean, atol=2e-3, rtol=0)


def test_noising_matches_diffusers():
    levels = row_levels(official_calvin())
    theirs = DDPMScheduler(num_train_timesteps=25, beta_schedule="scaled_linear")
    clean, noise = torch.randn(2, 3, 5, 9).unbind(0)
    t = torch.tensor([0, 12, 24])
    ours = add_noise(levels, clean, noise, t)[..., :3]
    torch.testing.assert_close(ours, theirs.add_noise(clean[..., :3], noise[..., :3], t))


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp", "euler"])
def test_what_is_known_of_a_trajectory_is_in_the_result(sampler):
    table = make_table(small_flow() if sampler == "euler" else small(), sampler, 8)
    first, drawn = draw_noise(table, 2, 6, seeded(0))
    free, _ = run_table(table, toy, first, drawn)
    rows, weight = torch.full((2, 6, 9), 0.7), torch.zeros(2, 6)
    nothing, _ = run_table(table, toy, first, drawn, Known(rows, weight))
    torch.testing.assert_close(nothing, free, rtol=0, atol=0)
    weight[:, :2], weight[:, 2] = 1.0, 0.5
    led, _ = run_table(table, toy, first, drawn, Known(rows, weight))
    torch.testing.assert_close(led[:, :2], rows[:, :2])
    assert ((led[:, 2] - 0.7).abs() < (free[:, 2] - 0.7).abs()).all()
    torch.testing.assert_close(led[:, 3:], free[:, 3:])  # this network knows of no neighbours
    entered = []

    def watched(i, x):
        entered.append(x)
        return toy(i, x)

    run_table(table, watched, first, drawn, Known(rows, weight, torch.tensor([2, 0])))
    for x in entered:
        torch.testing.assert_close(x[0, :2], rows[0, :2])
        assert (x[1, :2] != 0.7).all() and (x[0, 2:] != 0.7).all()


@pytest.mark.parametrize("steps", [0, 101])
def test_steps_out_of_range(steps):
    with pytest.raises(ValueError, match="steps"):
        make_table(small(), "ddim", steps or -1)
