"""What is measured of System 1: one function a case, each for a process of its own.

A case returns plain data. Runs that are compared are alternated within the case, so that
their ratio does not depend on what else the machine was doing.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch

from openhelix.benchmarks.perf.s1_networks import (
    official,
    run_inputs,
    run_of,
    runtime_inputs,
    seeded,
    small_policy,
)
from openhelix.benchmarks.perf.s1_timing import (
    Run,
    alternate,
    deviation,
    gflop,
    peak_mib,
    with_deviation,
)
from openhelix.system1.actor import DiffuserActor
from openhelix.system1.fast_modes import GraphedSampler, compile_denoiser, to_bf16
from openhelix.system1.points import farthest_point_sample
from openhelix.system1.sampler import draw_noise

Record = dict[str, Any]


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


def small(args: argparse.Namespace) -> Record:
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
    "official_compiled": official_compiled,
    "official_bf16": official_bf16,
    "small": small,
    "small_modes": small_modes,
    "graph": graph,
}
