"""System 2 benchmark: latency, many robots, prompt tuning, start-up and memory.

Each section runs in a process of its own, so that one's memory and threads are not the
next's; what is compared is measured in turns within one process. Nothing is downloaded: the
laptop model is assembled on the first run.

    python -m openhelix.benchmarks.perf.bench_s2 [--threads 2] [--only latency robots tuning start]
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
    "robots": robots,
    "tuning": tuning,
    "start": start,
}


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", default="laptop")
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
