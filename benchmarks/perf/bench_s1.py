"""How fast System 1 is, what it costs, and how far each fast mode strays from the exact one.

    python -m benchmarks.perf.bench_s1 --threads 2

runs every case in a process of its own (so that peak memory is that case's alone) and writes
one JSON file: device, threads, versions, and a record a case with the median and 90th
percentile of a chunk, its parts, GFLOP (counted by torch with attention written out),
peak resident memory, and the deviation from the exact float32 result under the same noise.
Cases that are compared are alternated within one process, so their ratio does not depend on
what else the machine was doing. Weights are random unless `--checkpoint` names a folder for
the small policy: speed does not depend on weights, deviation does.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from system1.accelerate import GraphedSampler, compile_denoiser, to_bf16
from system1.actor import DiffuserActor
from system1.checkpoint import Network, build_model, load_policy
from system1.config import official_calvin, small
from system1.points import farthest_point_sample
from system1.sampler import Noise, draw_noise
from system1.scene import Inputs

RESULTS = Path(__file__).parent / "results" / "bench_s1.json"
Run = Callable[[], Tensor]
Observation = tuple[Tensor, Tensor, Tensor, Tensor]  # what `DiffuserActor.sample` takes


def seeded(seed: int, device: str) -> Noise:
    """Return a reproducible noise source."""
    generator = torch.Generator().manual_seed(seed)
    return lambda shape: torch.randn(shape, generator=generator).to(device)


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
    """Return the GFLOP of one call; attention is counted as the products it is made of."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return round(counter.get_total_flops() / 1e9, 2)


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


def case_official_exact(args: argparse.Namespace) -> dict[str, Any]:
    """The exact path: time, parts, GFLOP, memory."""
    model, inputs = official(args.device, args.nhist, args.tokens)
    noise = seeded(0, args.device)

    def sample() -> Tensor:
        return model.sample(*inputs, noise)

    out: dict[str, Any] = alternate({"chunk": sample}, args.repeats, args.device)
    out |= peak_mib(args.device)
    with torch.inference_mode():
        scene = model.encode(*inputs)
        first, drawn = draw_noise(model.plan, 1, 19, noise)
        out["parts"] = alternate(
            {
                "images": lambda: model.encoder.images(inputs[0], inputs[1], None),
                "encode": lambda: model.encode(*inputs),
                "farthest_points": lambda: farthest_point_sample(
                    scene.context, scene.sampled.shape[1]
                ),
                "caches": lambda: model.prediction_head.prepare(scene, model.plan.times),
                "denoise": lambda: model.denoise(scene, first, drawn),
            },
            args.repeats,
            args.device,
        )
    out["gflop"] = gflop(sample)
    return out


def case_official_naive(args: argparse.Namespace) -> dict[str, Any]:
    """The exact path beside the plain one that recomputes everything, alternated."""
    from tests.system1.naive import Naive  # the reference that the tests hold it against

    model, inputs = official(args.device, args.nhist, args.tokens)
    plain = Naive(model.state_dict())

    def naive() -> Tensor:
        with torch.inference_mode():
            return plain.sample(*inputs, seeded(0, args.device))

    def exact() -> Tensor:
        return model.sample(*inputs, seeded(0, args.device))

    out: dict[str, Any] = alternate(
        {"naive": naive, "exact": exact}, max(3, args.repeats // 3), args.device
    )
    out["ratio"] = round(out["exact"]["median_ms"] / out["naive"]["median_ms"], 3)
    out["max_abs_position_m"] = float((naive()[..., :3] - exact()[..., :3]).abs().max())
    out["gflop_naive"], out["gflop_exact"] = gflop(naive), gflop(exact)
    return out


def case_official_modes(args: argparse.Namespace) -> dict[str, Any]:
    """Fast modes of the official network, alternated with the exact one."""
    runs: dict[str, Run] = {}
    for name in ("exact", "bf16", "ddim10", "dpmpp10", "dpmpp5", "tokens133", "tokens66"):
        model, inputs = official(args.device, args.nhist, args.tokens)
        if name == "bf16":
            to_bf16(model)
        elif name.startswith(("ddim", "dpmpp")):
            kind = name.rstrip("0123456789")
            model.use_sampler(kind, int(name[len(kind) :]))
        elif name.startswith("tokens"):
            model.encoder.fps_factor = 800 // int(name[6:])
        runs[name] = _bind(model, inputs, args.device)
    if args.compile:
        model, inputs = official(args.device, args.nhist, args.tokens)
        runs["compiled"] = _bind(compile_denoiser(model), inputs, args.device)
    return with_deviation(runs, args)


def _bind(model: Any, inputs: Observation, device: str) -> Run:
    return lambda: model.sample(*inputs, seeded(0, device))


def case_official_bf16_memory(args: argparse.Namespace) -> dict[str, Any]:
    """Peak memory of bf16 alone."""
    model, inputs = official(args.device, args.nhist, args.tokens)
    to_bf16(model)
    out: dict[str, Any] = alternate(
        {"chunk": _bind(model, inputs, args.device)}, args.repeats, args.device
    )
    return out | peak_mib(args.device)


def case_small(args: argparse.Namespace) -> dict[str, Any]:
    """The small policy: time, parts, GFLOP, memory."""
    model, inputs = small_policy(args.device, args.checkpoint)

    def sample() -> Tensor:
        return model.sample_inputs(inputs, seeded(0, args.device))

    out: dict[str, Any] = alternate({"chunk": sample}, args.repeats * 3, args.device)
    out |= peak_mib(args.device)
    out["parameters"] = sum(p.numel() for p in model.parameters())
    out["sampler"] = f"{model.config.sampler} {model.config.sample_steps}"
    if not isinstance(model, DiffuserActor):
        encoder = model.encoder
        with torch.inference_mode():
            out["parts"] = alternate(
                {"encode": lambda: encoder(inputs)}, args.repeats * 3, args.device
            )
    out["gflop"] = gflop(sample)
    return out


def case_small_modes(args: argparse.Namespace) -> dict[str, Any]:
    """Fast modes of the small policy; the exact one is DDPM over all training steps."""
    runs: dict[str, Run] = {}
    modes = ("ddim100", "ddim20", "ddim10", "ddim5", "ddim4", "ddim2", "dpmpp10", "dpmpp5", "bf16")
    for name in modes:
        model, inputs = small_policy(args.device, args.checkpoint)
        if name == "bf16":
            to_bf16(model)
        else:
            kind = name.rstrip("0123456789")
            model.use_sampler(kind, int(name[len(kind) :]))
        runs[name] = _bind_inputs(model, inputs, args.device)
    return with_deviation(runs, args)


def _bind_inputs(model: Any, inputs: Inputs, device: str) -> Run:
    return lambda: model.sample_inputs(inputs, seeded(0, device))


def case_graph(args: argparse.Namespace) -> dict[str, Any]:
    """CUDA graphs beside eager runs, both networks."""
    if args.device != "cuda":
        return {"skipped": f"the device is {args.device}, graphs need cuda"}
    model, inputs = small_policy(args.device, args.checkpoint)
    big, tensors = official(args.device, args.nhist, args.tokens)
    rgb, pcd, gripper, latent = tensors
    valid = torch.ones(1, 160, 160, dtype=torch.bool, device=args.device)
    proprio = torch.cat((gripper[..., :7], gripper[..., 6:8]), -1)
    big_inputs = Inputs(
        tuple(rgb.unbind(1)),
        tuple(pcd.unbind(1)),
        (valid, valid),
        proprio,
        latent.unsqueeze(1),
        None,
        None,
        torch.tensor([-1], device=args.device),
    )
    out: dict[str, Any] = {}
    for name, net, given in (("small", model, inputs), ("official", big, big_inputs)):
        graphed = GraphedSampler(net)
        timed = alternate(
            {
                "graph": _bind_inputs(graphed, given, args.device),
                "eager": _bind_inputs(net, given, args.device),
            },
            args.repeats * 3,
            args.device,
        )
        timed["ratio"] = round(timed["graph"]["median_ms"] / timed["eager"]["median_ms"], 3)
        timed["fallback_reason"] = graphed.reason
        out[name] = timed
    return out | peak_mib(args.device)


def with_deviation(runs: dict[str, Run], args: argparse.Namespace) -> dict[str, Any]:
    """Time the runs in turn; add ratio and deviation to the first of them."""
    out = alternate(runs, args.repeats, args.device)
    base = next(iter(runs))
    exact = runs[base]()
    for name, run in runs.items():
        out[name]["ratio"] = round(out[name]["median_ms"] / out[base]["median_ms"], 3)
        if name != base:
            out[name]["deviation"] = deviation(exact, run())
    return out


CASES: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "official_exact": case_official_exact,
    "official_naive": case_official_naive,
    "official_modes": case_official_modes,
    "official_bf16_memory": case_official_bf16_memory,
    "small": case_small,
    "small_modes": case_small_modes,
    "graph": case_graph,
}


def spawn(case: str, argv: list[str], threads: int) -> dict[str, Any]:
    """Run one case in a process of its own."""
    env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "benchmarks.perf.bench_s1", *argv, "--case", case]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1] if done.stderr else "no output"}
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--nhist", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=1)
    parser.add_argument("--checkpoint", default=None, help="folder of a small policy")
    parser.add_argument("--compile", action="store_true", help="time torch.compile too")
    parser.add_argument("--only", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--case", choices=list(CASES), default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case is not None:
        torch.set_num_threads(args.threads)
        print(json.dumps(CASES[args.case](args)))
        return
    name = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor()
    report: dict[str, Any] = {
        "device": args.device,
        "device_name": name or platform.machine(),
        "cores": os.cpu_count(),
        "threads": args.threads,
        "load_before": os.getloadavg()[0],
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "weights": args.checkpoint or "random",
        "cases": {},
    }
    for case in args.only:
        report["cases"][case] = spawn(case, sys.argv[1:], args.threads)
        print(case, json.dumps(report["cases"][case])[:300], flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(args.out)


if __name__ == "__main__":
    main()
