"""Timing functions side by side, and what else a record of a System 1 case holds."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from openhelix.system1.packed import KERNELS

Run = Callable[[], Tensor]
Shape = Sequence[int]


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
