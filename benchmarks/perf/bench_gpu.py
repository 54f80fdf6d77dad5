"""All that a machine with a GPU has to show, in one command and under eight minutes.

    python -m openhelix.benchmarks.perf.bench_gpu [--seconds 480] [--device cuda]

Runs, each in a process of its own and for a stated share of the time at most: the GPU tests;
System 1 as one CUDA graph, the official shape and the small one, with the eager network beside
it; a LLaVA's latents by transformers, and by vLLM where that is installed; and training samples
per second of the small policy in float32 and bfloat16. Writes one JSON file; a part that fails,
takes too long or cannot run here says so in it and stops none of the others. Exit code 1 if a
part failed. Weights are random or shipped: nothing is downloaded. `--device cpu` tries the
command itself where there is no GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from openhelix.benchmarks.perf.places import results_file
from openhelix.benchmarks.perf.s1_cases import small_policy
from openhelix.benchmarks.perf.s1_cases import sync as wait_for
from openhelix.runtime.core.paths import CHECKOUT

# Share of the time that a part may take. What one leaves over is nobody's: parts must not depend
# on each other.
SHARES = {"tests": 0.3, "system1": 0.3, "system2": 0.25, "training": 0.15}
SIZES = {"cuda": (32, 128, 512), "cpu": (8,)}  # observations in a training step
DRAWS = 4  # noise draws of each, as policies are trained
TEXTS = ("lift the red block from the table", "open the drawer")


def tests(device: str, out: Path) -> dict[str, Any]:
    """Run the GPU tests; how many passed, were skipped and failed, by pytest's own report."""
    if CHECKOUT is None:
        return {"skipped": "this is an installed package; the tests are in the repository"}
    report = out / "tests.xml"
    words = ["-m", "pytest", "-q", "-m", "gpu", f"--junitxml={report}", "tests/gpu"]
    done = subprocess.run(
        [sys.executable, *words], cwd=CHECKOUT, capture_output=True, text=True, check=False
    )
    if not report.is_file():
        return {"error": (done.stderr or done.stdout).strip().splitlines()[-1]}
    from xml.etree import ElementTree

    (suite,) = ElementTree.parse(report).getroot().iter("testsuite")
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    broken = [
        f"{case.get('classname')}.{case.get('name')}"
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    return counts | ({"error": f"failed: {', '.join(broken)}"} if broken else {})


def system1(device: str, out: Path) -> dict[str, Any]:
    """Time System 1: graph and eager side by side, then the exact networks alone."""
    cases = ("graph", "small", "official_exact", "official_bf16")
    words = ["--device", device, "--repeats", "10" if device == "cuda" else "1", "--only", *cases]
    file = out / "system1.json"
    command = [sys.executable, "-m", "openhelix.benchmarks.perf.bench_s1", *words]
    subprocess.run([*command, "--out", str(file)], stdout=sys.stderr, check=True)
    found: dict[str, Any] = json.loads(file.read_text())["cases"]
    wrong = [f"{name}: {case['error']}" for name, case in found.items() if "error" in case]
    return found | ({"error": "; ".join(wrong)} if wrong else {})


def system2(device: str, out: Path) -> dict[str, Any]:
    """Time a latent of the shipped LLaVA, alone and in a batch, by each engine there is."""
    from openhelix.system2.engines.transformers import TransformersEngine

    dtype = "bfloat16"
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 255, (200, 200, 3), dtype=np.uint8) for _ in range(16)]
    texts = [TEXTS[i % len(TEXTS)] for i in range(16)]
    makers: dict[str, Callable[[], Any]] = {
        "transformers": lambda: TransformersEngine("laptop", device=device, dtype=dtype)
    }
    result: dict[str, Any] = {"dtype": dtype}
    if importlib.util.find_spec("vllm") is None:
        result["vllm"] = {"skipped": "vLLM is not installed"}
    else:
        from openhelix.system2.engines.vllm import VllmEngine

        makers["vllm"] = lambda: VllmEngine("laptop", dtype=dtype, max_batch=16)
    for name, make in makers.items():
        engine = make()
        try:
            row: dict[str, Any] = {}
            for batch in (1, 16):
                times = []
                for _ in range(12 if device == "cuda" else 3):
                    begun = time.perf_counter()
                    engine.encode(images[:batch], texts[:batch])
                    wait_for(device)
                    times.append(time.perf_counter() - begun)
                row[f"batch_{batch}_ms"] = round(1e3 * float(np.median(times[2:])), 2)
            result[name] = row
        finally:
            engine.close()
    return result


def training(device: str, out: Path) -> dict[str, Any]:
    """Count training samples per second of the small policy on made-up observations."""
    result: dict[str, Any] = {"draws": DRAWS}
    for precision in ("float32", "bfloat16"):
        for batch in SIZES[device]:
            rate = _samples_per_s(device, batch, precision == "bfloat16")
            result[f"{precision}, batch {batch}"] = round(rate, 1)
    if device == "cuda":
        result["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return result


def _samples_per_s(device: str, batch: int, bf16: bool, seconds: float = 5.0) -> float:
    """Return observations per second through loss, gradient and optimiser."""
    from dataclasses import fields

    model, one = small_policy(device, None)
    model = model.train().requires_grad_(True)
    many: dict[str, Any] = {}
    for field in fields(one):
        value = getattr(one, field.name)
        if isinstance(value, tuple):
            many[field.name] = tuple(v.expand(batch, *v.shape[1:]).contiguous() for v in value)
        else:
            many[field.name] = value.expand(batch, *value.shape[1:]).contiguous()
    inputs, rows = type(one)(**many), model.config.horizon
    # Relative trajectories that do not move: the 6D form of no turn.
    still = torch.tensor([0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0], device=device)
    target = still.expand(batch, rows, 9).contiguous()
    openness = torch.ones(batch, rows, device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device == "cuda")
    done, begun = 0, 0.0
    for step in range(1_000_000):
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            parts = model.loss(inputs, target, openness, openness.bool(), DRAWS)
        optimizer.zero_grad(set_to_none=True)
        parts.total.backward()
        optimizer.step()
        wait_for(device)
        if step == 2:
            begun = time.perf_counter()  # what comes before makes what all others find ready
        elif step > 2:
            done += batch
            if time.perf_counter() - begun > seconds:
                break
    return done / (time.perf_counter() - begun)


PARTS: dict[str, Callable[[str, Path], dict[str, Any]]] = {
    "tests": tests,
    "system1": system1,
    "system2": system2,
    "training": training,
}


def spawn(name: str, device: str, out: Path, limit_s: float) -> dict[str, Any]:
    """Run a part in a process group of its own; what it found, or why it found nothing."""
    words = ["-m", "openhelix.benchmarks.perf.bench_gpu", "--device", device, "--part", name]
    with subprocess.Popen(
        [sys.executable, *words, "--folder", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as child:
        try:
            said, complaint = child.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, 9)
            child.communicate()
            return {"error": f"took longer than {limit_s:.0f} s"}
    lines = said.strip().splitlines()
    if child.returncode or not lines:
        last = complaint.strip().splitlines()[-1:] or ["no output"]
        return {"error": last[0][:300]}
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run all parts, or one; 0 when none failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    here = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cuda", "cpu"), default=here)
    parser.add_argument("--seconds", type=float, default=480.0, help="for all parts together")
    parser.add_argument("--only", nargs="*", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--out", type=Path, default=results_file("gpu.json"))
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.part is not None:
        print(json.dumps(PARTS[options.part](options.device, options.folder)))
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device here")
    begun = time.monotonic()
    name = torch.cuda.get_device_name() if options.device == "cuda" else platform.machine()
    report: dict[str, Any] = {
        "device": options.device,
        "device_name": name,
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "parts": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        for part in options.only:
            start = time.monotonic()
            limit_s = options.seconds * SHARES[part]
            found = spawn(part, options.device, Path(folder), limit_s)
            report["parts"][part] = found | {"wall_s": round(time.monotonic() - start, 1)}
            print(part, json.dumps(report["parts"][part])[:400], flush=True)
            # Kept after each part: the machine may be taken away before the last.
            report["wall_s"] = round(time.monotonic() - begun, 1)
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(options.out)
    return int(any("error" in found for found in report["parts"].values()))


if __name__ == "__main__":
    raise SystemExit(main())
