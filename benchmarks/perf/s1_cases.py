"""The benchmark cases of System 1: one function per case, each run in its own process.

A case returns plain data. Runs that are compared are alternated within the case, so that
their ratio does not depend on what else the machine was doing. Networks have their official or
small size; observations are made up, since speed does not depend on them.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from openhelix.system1.actor import DiffuserActor
from openhelix.system1.attention import KERNELS
from openhelix.system1.checkpoint import Network, build_model, load_policy
from openhelix.system1.config import official_calvin, small, small_flow
from openhelix.system1.diffusion import Noise, draw_noise
from openhelix.system1.fast_modes import GraphedSampler, compile_denoiser, to_bf16
from openhelix.system1.geometry import Inputs, farthest_point_sample

Record = dict[str, Any]
Run = Callable[[], Tensor]
Shape = Sequence[int]
Observation = tuple[Tensor, Tensor, Tensor, Tensor]  # what `DiffuserActor.sample` takes


# -- Networks and observations ---------------------------------------------------------


def seeded(seed: int, device: str) -> Noise:
    """Return a reproducible noise source."""
    generator = torch.Generator().manual_seed(seed)
    return lambda shape: torch.randn(shape, generator=generator).to(device)


def official(device: str, nhist: int = 1, tokens: int = 1) -> tuple[DiffuserActor, Observation]:
    """Return the official-size network with random weights and one made-up observation."""
    torch.manual_seed(0)
    model = DiffuserActor(official_calvin(nhist, tokens)).eval().requires_grad_(False)
    g = torch.Generator().manual_seed(1)
    rgb = torch.rand(1, 2, 3, 160, 160, generator=g)
    pcd = 0.3 * torch.randn(1, 2, 3, 160, 160, generator=g)
    gripper = 0.2 * torch.randn(1, nhist, 8, generator=g)
    latent = torch.randn(1, tokens, 512, generator=g)
    return model.to(device), (rgb.to(device), pcd.to(device), gripper.to(device), latent.to(device))


def small_policy(device: str, checkpoint: str | None) -> tuple[Network, Inputs]:
    """Return the small policy and one made-up observation."""
    torch.manual_seed(0)
    model = load_policy(checkpoint) if checkpoint else build_model(small())
    model = model.eval().requires_grad_(False).to(device)
    g = torch.Generator().manual_seed(1)
    c = model.config
    sizes = [(camera.work_height, camera.work_width) for camera in c.cameras]
    proprio = torch.zeros(1, c.nhist, 9)
    proprio[..., 6:] = torch.tensor([1.0, 0.08, 1.0])
    latent = torch.randn(1, c.latent_memory, c.latent_tokens, c.latent_dim, generator=g)
    inputs = Inputs(
        rgb=tuple(torch.rand(1, 3, *s, generator=g).to(device) for s in sizes),
        xyz=tuple(0.3 * torch.randn(1, 3, *s, generator=g).to(device) for s in sizes),
        valid=tuple(torch.ones(1, *s, dtype=torch.bool, device=device) for s in sizes),
        proprio=proprio.to(device),
        latent=latent.to(device) if c.use_latent else None,
        latent_age_s=torch.zeros(1, c.latent_memory, device=device),
        latent_mask=torch.ones(1, c.latent_memory, dtype=torch.bool, device=device),
        task=torch.tensor([-1], device=device),
    )
    return model, inputs


def runtime_inputs(given: Observation) -> Inputs:
    """Return an official observation as the runtime hands it over."""
    rgb, pcd, gripper, latent = given
    valid = torch.ones(len(rgb), *rgb.shape[-2:], dtype=torch.bool, device=rgb.device)
    return Inputs(
        rgb=tuple(rgb.unbind(1)),
        xyz=tuple(pcd.unbind(1)),
        valid=(valid,) * rgb.shape[1],
        proprio=torch.cat((gripper[..., :7], gripper[..., 6:8]), -1),
        latent=latent.unsqueeze(1),
        latent_age_s=None,
        latent_mask=None,
        task=torch.tensor([-1], device=rgb.device),
    )


def run_of(model: DiffuserActor, given: Observation, device: str) -> Run:
    """Return a function that samples one chunk, always with the same noise."""
    return lambda: model.sample(*given, seeded(0, device))


def run_inputs(model: Network | GraphedSampler, inputs: Inputs, device: str) -> Run:
    """Return a function that samples one chunk from the runtime's inputs."""
    return lambda: model.sample_inputs(inputs, seeded(0, device))


# -- Timing, work and deviation --------------------------------------------------------


def sync(device: str) -> None:
    """Wait for the device, so that a clock around a call measures the call."""
    if device == "cuda":
        torch.cuda.synchronize()


def alternate(runs: dict[str, Callable[[], Any]], repeats: int, device: str) -> dict[str, Any]:
    """Time several functions in turn; return median and p90 in ms by name."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(repeats):
        for name, run in runs.items():
            sync(device)
            begun = time.perf_counter_ns()
            run()
            sync(device)
            taken[name].append((time.perf_counter_ns() - begun) * 1e-6)
    out = {}
    for name, values in taken.items():
        values.sort()
        out[name] = {
            "median_ms": round(values[len(values) // 2], 3),
            "p90_ms": round(values[min(len(values) - 1, int(0.9 * len(values)))], 3),
            "min_ms": round(values[0], 3),
        }
    return out


def gflop(run: Run) -> float:
    """Return the GFLOP of one call.

    Attention is counted as the products it is made of, and so are oneDNN's operators on packed
    weights, of which torch's counter knows nothing.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    with (
        FlopCounterMode(display=False, custom_mapping=packed_operators()) as counter,
        sdpa_kernel(SDPBackend.MATH),
    ):
        run()
    return round(counter.get_total_flops() / 1e9, 2)


def packed_operators() -> dict[Any, Callable[..., int]]:
    """Return what oneDNN's linear and convolution cost, by operator; empty without oneDNN."""
    if KERNELS is None:
        return {}

    def linear(x: Shape, *_: Any, out_shape: Shape, **__: Any) -> int:
        return 2 * prod(out_shape) * x[-1]

    def convolution(x: Shape, *rest: Any, out_shape: Shape, **_: Any) -> int:
        # The fused form has a map to add before the weight.
        weight = [s for s in rest if isinstance(s, torch.Size) and len(s) == 4][-1]
        return 2 * prod(out_shape) * prod(weight[1:])

    return {KERNELS._linear_pointwise: linear, KERNELS._convolution_pointwise: convolution}


def deviation(exact: Tensor, other: Tensor) -> dict[str, float]:
    """Return how far trajectories (B, T, 8) stray: mm, degrees, openness."""
    position = (exact[..., :3] - other[..., :3]).norm(dim=-1) * 1e3
    dot = (exact[..., 3:7] * other[..., 3:7]).sum(-1).abs().clamp(max=1)
    angle = torch.rad2deg(2 * torch.acos(dot))
    grip = (exact[..., 7] - other[..., 7]).abs()
    return {
        "position_mm_mean": float(position.mean()),
        "position_mm_max": float(position.max()),
        "rotation_deg_mean": float(angle.mean()),
        "openness_max": float(grip.max()),
    }


def peak_mib(device: str) -> dict[str, float]:
    """Return peak resident memory of this process and of the device, MiB."""
    out = {"peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
    if device == "cuda":
        out["peak_device_mib"] = torch.cuda.max_memory_allocated() / 2**20
    return {k: round(v, 1) for k, v in out.items()}


def with_deviation(runs: dict[str, Run], repeats: int, device: str) -> dict[str, Any]:
    """Time the runs in turn; add ratio and deviation to the first of them."""
    out = alternate(runs, repeats, device)
    base = next(iter(runs))
    exact = runs[base]()
    for name, run in runs.items():
        out[name]["ratio"] = round(out[name]["median_ms"] / out[base]["median_ms"], 3)
        if name != base:
            out[name]["deviation"] = deviation(exact, run())
    return out


# -- Cases -----------------------------------------------------------------------------


def official_exact(args: argparse.Namespace) -> Record:
    """The exact path: time, parts, GFLOP, memory."""
    model, given = official(args.device, args.nhist, args.tokens)
    run = run_of(model, given, args.device)
    out: Record = alternate({"chunk": run}, args.repeats, args.device)
    out |= peak_mib(args.device)
    with torch.inference_mode():
        scene = model.encode(*given)
        first, drawn = draw_noise(model.sampler, 1, 19, seeded(0, args.device))
        context, count = scene.context, scene.sampled.shape[1] - scene.padding
        out["parts"] = alternate(
            {
                "images": lambda: model.encoder.images(given[0], given[1], None),
                "encode": lambda: model.encode(*given),
                "farthest_points": lambda: farthest_point_sample(context, count),
                "caches": lambda: model.prediction_head.prepare(scene, model.sampler.times),
                "denoise": lambda: model.denoise(scene, first, drawn),
            },
            args.repeats,
            args.device,
        )
    out["gflop"] = gflop(run)
    return out


def official_naive(args: argparse.Namespace) -> Record:
    """The exact path and bf16 beside the plain network that recomputes everything."""
    if args.device != "cpu":
        return {"skipped": f"the plain network runs on the cpu, the device is {args.device}"}
    from tests.system1.naive import Naive  # the reference that the tests hold it against

    model, given = official(args.device, args.nhist, args.tokens)
    half, _ = official(args.device, args.nhist, args.tokens)
    to_bf16(half)
    plain = Naive(model.state_dict())

    def naive() -> torch.Tensor:
        with torch.inference_mode():
            return plain.sample(*given, seeded(0, args.device))

    exact = run_of(model, given, args.device)
    runs = {"naive": naive, "exact": exact, "bf16": run_of(half, given, args.device)}
    out: Record = alternate(runs, max(3, args.repeats // 2), args.device)
    for name in ("exact", "bf16"):
        out[name]["ratio"] = round(out[name]["median_ms"] / out["naive"]["median_ms"], 3)
    out["bf16"]["deviation"] = deviation(exact(), runs["bf16"]())
    out["max_abs_position_m"] = float((naive()[..., :3] - exact()[..., :3]).abs().max())
    out["gflop_naive"], out["gflop_exact"] = gflop(naive), gflop(exact)
    return out


def official_modes(args: argparse.Namespace) -> Record:
    """Fast modes of the official network, alternated with the exact one."""
    runs: dict[str, Run] = {}
    for name in ("exact", "bf16", "ddim10", "dpmpp10", "dpmpp5", "tokens133", "tokens66"):
        model, given = official(args.device, args.nhist, args.tokens)
        if name == "bf16":
            to_bf16(model)
        elif name.startswith(("ddim", "dpmpp")):
            kind = name.rstrip("0123456789")
            model.use_sampler(kind, int(name[len(kind) :]))
        elif name.startswith("tokens"):
            model.encoder.fps_factor = 800 // int(name[6:])
        runs[name] = run_of(model, given, args.device)
    return with_deviation(runs, args.repeats, args.device)


def official_steps(args: argparse.Namespace) -> Record:
    """The official network in few steps beside its own 25, both precisions; ratios to those."""
    runs: dict[str, Run] = {}
    for name in ("exact", "ddim1", "ddim2", "ddim4", "ddim5"):
        for precision in ("", "bf16_"):
            model, given = official(args.device, args.nhist, args.tokens)
            if name != "exact":
                model.use_sampler("ddim", int(name.removeprefix("ddim")))
            if precision:
                to_bf16(model)
            runs[precision + name] = run_of(model, given, args.device)
    out: Record = alternate(runs, args.repeats, args.device)
    for row in out.values():
        row["ratio"] = round(row["median_ms"] / out["exact"]["median_ms"], 3)
    return out


def official_compiled(args: argparse.Namespace) -> Record:
    """The compiled denoiser beside the eager one, in both precisions; minutes to compile."""
    if not args.compile:
        return {"skipped": "asked for with --compile: it takes minutes"}
    runs: dict[str, Run] = {}
    for name in ("exact", "bf16", "compiled", "bf16_compiled"):
        model, given = official(args.device, args.nhist, args.tokens)
        if "bf16" in name:
            to_bf16(model)
        if "compiled" in name:
            compile_denoiser(model)
        runs[name] = run_of(model, given, args.device)
    return with_deviation(runs, args.repeats, args.device)


def official_bf16(args: argparse.Namespace) -> Record:
    """bf16 alone: time and peak memory."""
    model, given = official(args.device, args.nhist, args.tokens)
    run = run_of(to_bf16(model), given, args.device)  # type: ignore[arg-type]
    out: Record = alternate({"chunk": run}, args.repeats, args.device)
    return out | peak_mib(args.device)


def small_exact(args: argparse.Namespace) -> Record:
    """The small policy: time, parts, GFLOP, memory."""
    model, inputs = small_policy(args.device, args.checkpoint)
    run = run_inputs(model, inputs, args.device)
    out: Record = alternate({"chunk": run}, args.repeats * 3, args.device)
    out |= peak_mib(args.device)
    out["parameters"] = sum(p.numel() for p in model.parameters())
    out["sampler"] = f"{model.config.sampler} {model.config.sample_steps}"
    if not isinstance(model, DiffuserActor):
        encoder = model.encoder
        with torch.inference_mode():
            out["parts"] = alternate(
                {"encode": lambda: encoder(inputs)}, args.repeats * 3, args.device
            )
    out["gflop"] = gflop(run)
    return out


def small_modes(args: argparse.Namespace) -> Record:
    """Fast modes of the small policy; the exact one is 100 steps of DDIM."""
    runs: dict[str, Run] = {}
    modes = ("ddim100", "ddim20", "ddim10", "ddim5", "ddim4", "ddim2", "dpmpp10", "dpmpp5", "bf16")
    for name in modes:
        model, inputs = small_policy(args.device, args.checkpoint)
        if name == "bf16":
            to_bf16(model)
        else:
            kind = name.rstrip("0123456789")
            model.use_sampler(kind, int(name[len(kind) :]))
        runs[name] = run_inputs(model, inputs, args.device)
    return with_deviation(runs, args.repeats, args.device)


def small_steps(args: argparse.Namespace) -> Record:
    """A chunk of the small policy in few steps, by diffusion and by flow matching, in turn."""
    runs: dict[str, Run] = {}
    for steps in (1, 2, 4, 5, 8):
        for name, config in (("ddim", small()), ("euler", small_flow())):
            model = build_model(config).to(args.device).eval().requires_grad_(False)
            model.use_sampler(name, steps)
            inputs = small_policy(args.device, None)[1]
            runs[f"{name}{steps}"] = run_inputs(model, inputs, args.device)
    return dict(alternate(runs, args.repeats * 3, args.device))


def graph(args: argparse.Namespace) -> Record:
    """CUDA graphs beside eager runs: both networks, both precisions."""
    if args.device != "cuda":
        return {"skipped": f"the device is {args.device}, graphs need cuda"}
    out: Record = {}
    for size in ("small", "official"):
        runs: dict[str, Run] = {}
        graphs: dict[str, GraphedSampler] = {}
        for precision in ("", "bf16_"):
            if size == "small":
                net, inputs = small_policy(args.device, args.checkpoint)
            else:
                net, given = official(args.device, args.nhist, args.tokens)
                inputs = runtime_inputs(given)
            if precision:
                to_bf16(net)
            graphs[precision] = GraphedSampler(net)
            runs[f"{precision}eager"] = run_inputs(net, inputs, args.device)
            runs[f"{precision}graph"] = run_inputs(graphs[precision], inputs, args.device)
        out[size] = with_deviation(runs, args.repeats * 3, args.device)
        out[size]["fallback_reasons"] = {p + "graph": g.reason for p, g in graphs.items()}
    return out | peak_mib(args.device)


CASES: dict[str, Callable[[argparse.Namespace], Record]] = {
    "official_exact": official_exact,
    "official_naive": official_naive,
    "official_modes": official_modes,
    "official_steps": official_steps,
    "official_compiled": official_compiled,
    "official_bf16": official_bf16,
    "small": small_exact,
    "small_modes": small_modes,
    "small_steps": small_steps,
    "graph": graph,
}
