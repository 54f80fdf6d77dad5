"""The wire's figures: one-way latency beside bare ZeroMQ, and that the newest is never lost.

Two processes, publisher and reader, over ipc. Latency is from just before `send` (encoding
included) to the decoded record in the reader's hands; the bare round sends one ready frame of
the same size on a socket of its own. Both are measured in alternating blocks of one run, since
only their ratio means anything on a busy machine.

Loss is measured twice. `bursts`: after each burst the publisher is silent until the reader
has seen the burst's last message, or 2 s have passed, which counts as a lost newest.
`back_to_back`: everything is sent without a pause, and the last one must arrive.

    python -m benchmarks.perf.bench_wire [--messages 200000] [--rounds 4000] [--out FILE]
"""

from __future__ import annotations

import argparse
import ctypes
import json
import multiprocessing
import os
import platform
import random
import struct
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import zmq

from runtime.types import CameraFrame, LatentGoal, Observation
from runtime.wire import NewestReader, Publisher, ipc_endpoint

BLOCK = 200  # messages of one kind before the other has its turn
GAP_S = 0.005
GIVE_UP_S = 2.0
KINDS = ("bare", "wire")


def latent(seq: int) -> LatentGoal:
    """A latent of 4096 floats (16 KB), as LLaVA-7B gives."""
    z = np.random.default_rng(seq).standard_normal((1, 4096), dtype=np.float32)
    return LatentGoal(z, seq, 0, 0, 0, "0123456789ab", "bench")


def observation(seq: int) -> Observation:
    """CALVIN's two RGB-D cameras, 200 x 200 and 84 x 84 pixels (329 KB)."""
    rng = np.random.default_rng(seq)
    frames = {
        name: CameraFrame(
            seq,
            rng.integers(0, 255, (size, size, 3), dtype=np.uint8),
            rng.random((size, size), dtype=np.float32),
            np.eye(3),
            np.eye(4),
        )
        for name, size in (("static", 200), ("gripper", 84))
    }
    return Observation(seq, frames, np.zeros(7), 0.04, True, np.zeros(7))


def payload_bytes(message: LatentGoal | Observation) -> int:
    """The size of the arrays alone: what the bare round carries."""
    if isinstance(message, LatentGoal):
        return message.z.nbytes
    return sum(
        f.rgb.nbytes + (0 if f.depth is None else f.depth.nbytes) for f in message.frames.values()
    )


def latency_publisher(
    run_dir: str, what: str, rounds: int, gap_s: float, sent: Any, seen: Any
) -> None:
    """Child: publish blocks of bare and wire messages, each when the last has been seen."""
    message = latent(0) if what == "latent" else observation(0)
    publisher = Publisher(ipc_endpoint(run_dir, f"wire-{what}"), "bench")
    bare: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PUB)
    bare.bind(ipc_endpoint(run_dir, f"bare-{what}"))
    data = os.urandom(payload_bytes(message) - 8)
    time.sleep(0.5)  # subscriptions arrive
    for index in range(2 * rounds):
        while seen.value < index:
            time.sleep(0.0)
        if gap_s:
            time.sleep(gap_s)
        if index // BLOCK % 2 == 0:
            sent.value = now = time.monotonic_ns()
            bare.send(struct.pack("<q", now) + data)
        else:
            sent.value = time.monotonic_ns()
            publisher.send(message)
    while seen.value < 2 * rounds:  # closing would discard the last message
        time.sleep(0.001)
    publisher.close()
    bare.close(linger=0)


def measure_latency(run_dir: str, what: str, rounds: int, gap_s: float) -> dict[str, Any]:
    """Return one-way latencies in microseconds, bare and wire, and the ratio of medians."""
    context = multiprocessing.get_context("spawn")
    sent, seen = context.Value(ctypes.c_longlong, 0), context.Value(ctypes.c_longlong, 0)
    expect: Any = LatentGoal if what == "latent" else Observation
    reader = NewestReader(ipc_endpoint(run_dir, f"wire-{what}"), "bench", expect)
    bare: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.SUB)
    bare.connect(ipc_endpoint(run_dir, f"bare-{what}"))
    bare.subscribe(b"")
    child = context.Process(
        target=latency_publisher, args=(run_dir, what, rounds, gap_s, sent, seen)
    )
    child.start()

    def get_bare() -> object:
        bare.poll(1000)
        try:
            return bare.recv(zmq.NOBLOCK)
        except zmq.Again:
            return None

    def get_wire() -> object:
        reader.wait(1.0)
        return reader.poll()

    times: dict[str, list[int]] = {kind: [] for kind in KINDS}
    get: dict[str, Callable[[], object]] = {"bare": get_bare, "wire": get_wire}
    for index in range(2 * rounds):
        kind = KINDS[index // BLOCK % 2]
        while get[kind]() is None:
            pass
        times[kind].append(time.monotonic_ns() - sent.value)
        seen.value = index + 1
    child.join()
    reader.close()
    bare.close(linger=0)
    result: dict[str, Any] = {
        kind: percentiles(values[BLOCK // 2 :]) for kind, values in times.items()
    }
    result["ratio_p50"] = round(result["wire"]["p50_us"] / result["bare"]["p50_us"], 3)
    result["payload_bytes"] = payload_bytes(latent(0) if what == "latent" else observation(0))
    result["gaps"] = reader.stats.gaps
    return result


def percentiles(values_ns: list[int]) -> dict[str, float]:
    """p50 and p99 in microseconds."""
    p50, p99 = np.percentile(np.array(values_ns) * 1e-3, (50, 99))
    return {"p50_us": round(float(p50), 1), "p99_us": round(float(p99), 1), "n": len(values_ns)}


def loss_publisher(run_dir: str, messages: int, burst: int, seen: Any, result: Any) -> None:
    """Child: send bursts of 1 to `burst` messages and wait for each to have been seen."""
    publisher = Publisher(ipc_endpoint(run_dir, f"loss-{burst}"), "bench")
    rng = random.Random(0)
    z = np.zeros((1, 4096), np.float32)
    time.sleep(0.5)
    sent = lost = bursts = after_repeat = 0
    begin = time.monotonic()
    while sent < messages:
        size = rng.randint(1, burst) if burst < messages else messages
        for _ in range(min(size, messages - sent)):
            publisher.send(LatentGoal(z, sent, 0, 0, 0, "0123456789ab", "bench"))
            sent += 1
        bursts += 1
        if not wait_seen(seen, sent - 1):
            lost += 1
            publisher.repeat()
            after_repeat += not wait_seen(seen, sent - 1)
    figures = {
        "messages": sent,
        "bursts": bursts,
        "newest_lost": lost,
        "newest_lost_after_repeat": after_repeat,
        "queue_filled_up": publisher.dropped,
        "wall_s": round(time.monotonic() - begin, 2),
    }
    result.put(figures)


def wait_seen(seen: Any, seq: int) -> bool:
    """Whether the reader reports that message within `GIVE_UP_S`."""
    give_up = time.monotonic() + GIVE_UP_S
    while seen.value < seq and time.monotonic() < give_up:
        time.sleep(0)
    return bool(seen.value >= seq)


def measure_loss(run_dir: str, messages: int, burst: int) -> dict[str, Any]:
    """Return how often the newest message of a burst never arrived."""
    context = multiprocessing.get_context("spawn")
    seen, result = context.Value(ctypes.c_longlong, -1), context.Queue()
    reader = NewestReader(ipc_endpoint(run_dir, f"loss-{burst}"), "bench", LatentGoal)
    child = context.Process(target=loss_publisher, args=(run_dir, messages, burst, seen, result))
    child.start()
    backwards = 0
    while child.is_alive() and result.empty():
        for _ in range(1000):
            message = reader.poll()
            if message is not None:
                backwards += message.seq <= seen.value
                seen.value = message.seq
    figures: dict[str, Any] = result.get()
    child.join()
    reader.close()
    stats = reader.stats
    figures |= {"delivered": stats.delivered, "gaps": stats.gaps, "went_backwards": backwards}
    return figures


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--messages", type=int, default=200_000, help="of each loss measurement")
    parser.add_argument("--rounds", type=int, default=4_000, help="of each latency measurement")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "wire.json")
    args = parser.parse_args()
    figures: dict[str, Any] = {
        "machine": {"cpu": platform.machine(), "cores": os.cpu_count(), "zmq": zmq.zmq_version()}
    }
    with tempfile.TemporaryDirectory() as run_dir:
        for what in ("latent", "rgbd"):
            for name, gap_s in (("in_a_row", 0.0), ("paced", GAP_S)):
                figures[f"{what}_{name}"] = measure_latency(run_dir, what, args.rounds, gap_s)
        figures["bursts"] = measure_loss(run_dir, args.messages, 64)
        figures["back_to_back"] = measure_loss(run_dir, args.messages, args.messages)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
