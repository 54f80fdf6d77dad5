"""System 2 benchmark: latency, many robots, prompt tuning, start-up and memory.

Each section runs in a process of its own, so that one's memory and threads are not the
next's; what is compared is measured in turns within one process. Nothing is downloaded: the
laptop model is assembled on the first run.

    python -m openhelix.benchmarks.perf.bench_s2 [--threads 2] [--only latency agreement robots tuning start]
                                       [--model laptop] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from openhelix.benchmarks.perf.places import results_file

TEXTS = (
    "lift the red block",
    "push the sliding door to the left side",
    "pull the handle to open the drawer",
    "use the switch to turn on the light bulb",
    "go push the blue block right",
    "press the button to turn off the led light",
    "store the grasped block in the drawer",
    "take the pink block and rotate it to the left",
)
N_ROBOTS = 8
ENGINES, DTYPES = ("transformers", "vllm"), ("float32", "bfloat16")


def pictures(n: int) -> list[Any]:
    """Noise at the static camera's size; what is in a picture does not change the time."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, 255, (200, 200, 3), dtype=np.uint8) for _ in range(n)]


def summary(values_s: Sequence[float]) -> dict[str, float]:
    """Milliseconds: p50, p99, min."""
    p50, p99 = np.percentile(values_s, (50, 99), method="higher")
    return {"p50_ms": p50 * 1e3, "p99_ms": p99 * 1e3, "min_ms": min(values_s) * 1e3}


def latency(options: argparse.Namespace) -> dict[str, Any]:
    """vLLM and transformers in turns, batch 1 and 8, and how far apart their latents are."""
    from openhelix.system2.engines.transformers import TransformersEngine
    from openhelix.system2.engines.vllm import VllmEngine

    common = {"dtype": options.dtype, "threads": options.threads}
    plain = TransformersEngine(options.model, **common)
    vllm = VllmEngine(options.model, max_batch=8, **common)
    images = pictures(8)
    result: dict[str, Any] = {"dtype": options.dtype}
    a, b = plain.encode(images, TEXTS)[:, 0], vllm.encode(images, TEXTS)[:, 0]
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    result["agreement"] = {"cosine_min": float(cosine.min()), "max_abs": float(abs(a - b).max())}
    for batch in (1, 8):
        times: dict[str, list[float]] = {"vllm": [], "transformers": []}
        for _ in range(options.repeats):
            for name, engine in (("vllm", vllm), ("transformers", plain)):
                start = time.perf_counter()
                engine.encode(images[:batch], TEXTS[:batch])
                times[name].append(time.perf_counter() - start)
        # The first turns warm caches.
        row: dict[str, Any] = {name: summary(values[2:]) for name, values in times.items()}
        for value in row.values():
            value["a_request_ms"] = value["p50_ms"] / batch
        row["vllm_to_transformers"] = row["vllm"]["p50_ms"] / row["transformers"]["p50_ms"]
        result[f"batch_{batch}"] = row
    return result


# -- Does a latent depend on its batch, its engine, its precision? -----------------------


def agreement(options: argparse.Namespace) -> dict[str, Any]:
    """Least cosines of eight latents and of every read-out, and what a latent costs.

    `batch` is each alone against all eight together, of one engine in one precision; `engines` is
    vLLM against transformers; `exact` is against transformers in float32. Each engine runs in a
    process of its own; a latent's cost at batch 1 is the least of its repeats, on one thread.
    With `--last` the states are those after the model's last layer, read at an untrained `<ACT>`.
    """
    folder, made = Path(tempfile.mkdtemp()), {}
    for engine in ENGINES:
        for dtype in DTYPES:
            out = folder / f"{engine}-{dtype}.npz"
            done = subprocess.run(
                [sys.executable, "-c", _read_code(options, engine, dtype, out)],
                capture_output=True,
                text=True,
            )
            if done.returncode:
                raise RuntimeError(f"{engine}, {dtype}: {done.stderr[-2000:]}")
            made[engine, dtype] = dict(np.load(out))
    exact = made["transformers", "float32"]
    result: dict[str, Any] = {
        "batch": {},
        "engines": {},
        "exact": {},
        "latent_ms": {},
        "latent_cpu_ms": {},
    }
    for (engine, dtype), found in made.items():
        name = f"{engine}, {dtype}"
        kinds = sorted({key.split("/")[0] for key in found if "/" in key})
        for cost in ("latent_ms", "latent_cpu_ms"):
            result[cost][name] = round(float(found[cost]), 1)
        result["batch"][name] = {k: cosines(found[f"{k}/8"], found[f"{k}/1"]) for k in kinds}
        result["exact"][name] = {k: cosines(found[f"{k}/1"], exact[f"{k}/1"]) for k in kinds}
    for dtype in DTYPES:
        one, other = (made[engine, dtype] for engine in ENGINES)
        kinds = sorted({key.split("/")[0] for key in one if "/" in key})
        result["engines"][dtype] = {k: cosines(one[f"{k}/1"], other[f"{k}/1"]) for k in kinds}
    return result


def _read_code(options: argparse.Namespace, engine: str, dtype: str, out: Path) -> str:
    how = (options.weights, options.last, options.repeats)
    given = (engine, dtype, options.model, *how, str(out))
    return f"from openhelix.benchmarks.perf.bench_s2 import read; read(*{given!r})"


def cosines(a: Any, b: Any) -> float:
    """Return the least cosine of latents (N, n, d), each taken as one vector."""
    x, y = (np.asarray(v, np.float64).reshape(len(v), -1) for v in (a, b))
    return float(((x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)).min())


def read(
    engine_name: str, dtype: str, model: str, weights: str, last: bool, repeats: int, out: str
) -> None:
    """Write latents and every read-out, each alone ("KIND/1") and eight together ("KIND/8")."""
    import torch

    from openhelix.runtime.core.plugins import resolve
    from openhelix.system2.latents import KINDS, LatentConfig, MapPool, read_out
    from openhelix.system2.probe import ENGINES as TARGETS

    options = {"model": model, "dtype": dtype, "threads": 1, "understanding": "off"}
    if last:
        options |= {"kind": "lang_mean", "untrained": True}
    elif weights:
        options |= {"latent_projector": weights}
    engine: Any = resolve(TARGETS[engine_name])(**options)
    torch.manual_seed(0)
    states = engine.hidden(pictures(1), TEXTS[:1])[0]
    whole = states.shape[0] == engine.layout(TEXTS[0]).length
    pool = MapPool(states.shape[1])
    kinds = KINDS if whole else ("act_last",)

    def everything(images: list[Any], texts: Sequence[str]) -> dict[str, Any]:
        hidden = engine.hidden(images, texts)
        rows = {
            kind: torch.stack(
                [
                    read_out(LatentConfig(kind), h, engine.layout(t), pool)[0].detach()
                    for h, t in zip(hidden, texts, strict=True)
                ]
            ).numpy()
            for kind in kinds
        }
        return rows | {"latent": engine.encode(images, texts)}

    images = pictures(len(TEXTS))
    together = everything(images, TEXTS)
    alone = [everything(images[i : i + 1], TEXTS[i : i + 1]) for i in range(len(TEXTS))]
    wall, cpu = [], []
    for _ in range(repeats):
        start, used = time.perf_counter(), time.process_time()
        engine.encode(images[:1], TEXTS[:1])
        wall.append(time.perf_counter() - start)
        cpu.append(time.process_time() - used)
    found = {f"{kind}/8": rows for kind, rows in together.items()}
    found |= {f"{kind}/1": np.concatenate([row[kind] for row in alone]) for kind in together}
    np.savez(out, latent_ms=min(wall) * 1e3, latent_cpu_ms=min(cpu) * 1e3, **found)


def robots(options: argparse.Namespace) -> dict[str, Any]:
    """Eight robots at 1 Hz from one engine, through the real node and sockets."""
    from openhelix.runtime.core.interfaces import GoalRequest, LatentGoal
    from openhelix.runtime.transport.wire import NewestReader, Publisher
    from openhelix.system2.publisher import System2Process

    folder = Path(tempfile.mkdtemp())
    requests, latents = f"ipc://{folder}/requests", f"ipc://{folder}/latents"
    engine = {
        "target": "openhelix.system2.engines.vllm:VllmEngine",
        "options": {"model": options.model, "dtype": options.dtype, "threads": options.threads},
    }
    node = System2Process(engine, 1.0, requests, latents)
    node.setup()
    stop = threading.Event()
    server = threading.Thread(target=node.run, args=(stop,))
    server.start()
    images, ages, rates = pictures(N_ROBOTS), [], []
    lock = threading.Lock()

    def robot(index: int) -> None:
        name = f"robot{index}"
        out = Publisher(requests, name, bind=False)
        reader = NewestReader(latents, f"latents/{name}", LatentGoal)
        mine: list[float] = []
        begin = time.monotonic()
        seq, warm_s, next_s = 0, 3.0, begin + index / N_ROBOTS / 10
        while time.monotonic() < begin + warm_s + options.seconds:
            if time.monotonic() >= next_s:
                # Ten pictures per second: System 2 takes the newest of them.
                rgb, now = images[index], time.monotonic_ns()
                out.send(GoalRequest(rgb, TEXTS[index], name, seq, 0, now))
                seq, next_s = seq + 1, next_s + 0.1
            reader.wait(0.005)
            goal = reader.poll()
            if goal is not None and time.monotonic() > begin + warm_s:
                mine.append((time.monotonic_ns() - goal.t_obs_ns) * 1e-9)
        with lock:
            ages.extend(mine)
            rates.append(len(mine) / options.seconds)
        out.close()
        reader.close()

    threads = [threading.Thread(target=robot, args=(i,)) for i in range(N_ROBOTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    health = node.health()
    stop.set()
    server.join()
    node.close()
    return {
        "robots": N_ROBOTS,
        "hz": 1.0,
        "capture_to_latent": summary(ages),
        "latents_per_robot_hz": {"min": min(rates), "max": max(rates)},
        "compute_s": health["compute_s"],
        "latents_a_batch": health["published"] / max(1, health["batches"]),
        "deadlines_skipped": health["skipped"],
        "shed": health["shed"],
    }


def tuning(options: argparse.Namespace) -> dict[str, Any]:
    """One prompt-tuning step through the cached prefix beside full backpropagation, fp32."""
    import torch
    from transformers import LlavaForConditionalGeneration

    from openhelix.system2.latents import LatentConfig, LatentHead
    from openhelix.system2.model import open_checkpoint
    from openhelix.system2.prompt import as_pil
    from openhelix.system2.train import System2Learner

    torch.set_num_threads(options.threads)
    checkpoint = open_checkpoint(options.model)
    model = LlavaForConditionalGeneration.from_pretrained(checkpoint.path, dtype=torch.float32)
    table = model.get_input_embeddings().weight[: checkpoint.act_ids[0]]
    learner = System2Learner(
        model.model.eval(), checkpoint, LatentHead.fresh(LatentConfig(), table)
    )
    batch = options.batch
    images = [as_pil(image) for image in pictures(batch)]
    texts = [TEXTS[i % len(TEXTS)] for i in range(batch)]
    tokens = learner.image_tokens(images)

    def step(make: Callable[[], Any]) -> tuple[float, torch.Tensor]:
        learner.zero_grad()
        start = time.perf_counter()
        make().z.square().mean().backward()
        took = time.perf_counter() - start
        assert learner.head.act.grad is not None
        return took, learner.head.act.grad.clone()

    start = time.perf_counter()
    prefix = learner.prefix(tokens, texts)
    once = time.perf_counter() - start
    full, cached, wrong = [], [], []
    for _ in range(4):
        took, exact = step(lambda: learner(tokens, texts))
        full.append(took)
        for _ in range(3):
            took, ours = step(lambda: learner.from_prefix(prefix))
            cached.append(took)
        wrong.append(float((ours - exact).norm() / exact.norm()))
    return {
        "batch": batch,
        "full_s": summary(full[1:]),
        "cached_s": summary(cached[3:]),
        "speed_up": float(np.median(full[1:]) / np.median(cached[3:])),
        "prefix_once_s": once,
        "prefix_mb_a_sample": prefix.keys.nbytes * 2 / batch / 2**20,
        "gradient_relative_error": max(wrong),
    }


def start(options: argparse.Namespace) -> dict[str, Any]:
    """From a new process to a warm engine, with the files in the page cache; and its memory."""
    code = (
        "import json,sys,time,psutil\n"
        "began=time.time()-psutil.Process().create_time()\n"
        "t=time.time()\n"
        "from openhelix.system2.engines.vllm import VllmEngine\n"
        f"e=VllmEngine({options.model!r},dtype={options.dtype!r},threads={options.threads})\n"
        "e.warm_up()\n"
        "ready=time.time()-t+began\n"
        "import numpy as np\n"
        "for _ in range(5): e.encode([np.zeros((200,200,3),np.uint8)]*8,['push it']*8)\n"
        "m=psutil.Process().memory_full_info()\n"
        "print('RESULT'+json.dumps({'ready_s':ready,'rss_gb':m.rss/2**30,'uss_gb':m.uss/2**30}))\n"
    )
    rows = []
    for _ in range(2):  # the first brings the files into the page cache
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        line = next(x for x in done.stdout.splitlines() if x.startswith("RESULT"))
        rows.append(json.loads(line.removeprefix("RESULT")))
    return {"first": rows[0], "warm": rows[1]}


SECTIONS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "latency": latency,
    "agreement": agreement,
    "robots": robots,
    "tuning": tuning,
    "start": start,
}


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", default="laptop")
    parser.add_argument(
        "--weights", default="", help="latent.safetensors of --model, if not shipped"
    )
    parser.add_argument("--last", action="store_true", help="agreement after the last layer")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--repeats", type=int, default=17, help="turns a batch size")
    parser.add_argument("--seconds", type=float, default=30.0, help="of eight robots at 1 Hz")
    parser.add_argument("--batch", type=int, default=32, help="of prompt tuning")
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--section", choices=list(SECTIONS), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=results_file("bench_s2.json"))
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the sections and write one JSON file."""
    words = list(sys.argv[1:] if argv is None else argv)
    options = arguments().parse_args(words)
    if options.section:
        print("RESULT" + json.dumps(SECTIONS[options.section](options)))
        return 0
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads)}
    result: dict[str, Any] = {
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "threads": options.threads,
        "load_average_at_start": os.getloadavg()[0],
    }
    if options.out.is_file():  # sections measured one by one join up
        result = json.loads(options.out.read_text()) | result
    for name in options.only:
        command = [
            sys.executable,
            "-m",
            "openhelix.benchmarks.perf.bench_s2",
            *words,
            "--section",
            name,
        ]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        lines = [x for x in done.stdout.splitlines() if x.startswith("RESULT")]
        if done.returncode or not lines:
            print(f"{name}: failed\n{done.stderr[-2000:]}", file=sys.stderr)
            return 1
        result[name] = json.loads(lines[-1].removeprefix("RESULT"))
        print(f"{name}: {json.dumps(result[name])}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
