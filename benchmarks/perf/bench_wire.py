"""The wire's figures: latency beside bare ZeroMQ, and that the newest is never lost.

Two processes, publisher and reader, over ipc. Latency is one way: from just before `send`
(encoding included) to the record in the reader's hands, decoded and checked. Beside it, in
alternating blocks of the same run because only ratios mean anything on a busy machine:

- `one_frame`: a ready-made frame of the same size, received as bytes. ZeroMQ's own share.
- `by_hand`: what one writes without this module: a msgpack header and the arrays in frames of
  their own, drained to the newest, viewed with numpy; no checks.
- `round`: one ready-made frame there and back (REQ and REP).

Loss is measured twice. `bursts`: after each burst the publisher is silent until the reader
has seen the burst's last message, or 2 s have passed, which counts as a lost newest.
`back_to_back`: everything is sent without a pause, and the last one must arrive; if the reader
has too little of the machine to keep up, its queue fills and `gaps` are counted.

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
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import zmq

from runtime.types import CameraFrame, LatentGoal, Observation
from runtime.wire import NewestReader, Publisher, ipc_endpoint

BLOCK = 200  # messages of one kind before the other has its turn
GAP_S = 0.005
GIVE_UP_S = 2.0
KINDS = ("one_frame", "by_hand", "wire")


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
    """The size of the large arrays: what the bare frames carry."""
    return sum(array.nbytes for array in arrays(message))


def arrays(message: LatentGoal | Observation) -> list[Any]:
    """The large arrays of a message."""
    if isinstance(message, LatentGoal):
        return [message.z]
    found: list[Any] = []
    for frame in message.frames.values():
        found += [frame.rgb, frame.depth]
    return found


class ByHand:
    """The shortest honest way to send arrays with ZeroMQ, and to get the newest."""

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self.socket = socket

    def send(self, message: LatentGoal | Observation, seq: int) -> None:
        parts = arrays(message)
        header = {"seq": seq, "arrays": [(a.dtype.str, a.shape) for a in parts]}
        self.socket.send_multipart([b"bench", msgpack.packb(header), *parts])

    def poll(self) -> object:
        newest = None
        try:
            while True:
                newest = self.socket.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            pass
        if newest is None:
            return None
        header = msgpack.unpackb(newest[1])
        specs = zip(newest[2:], header["arrays"], strict=True)
        return [np.frombuffer(part, dtype).reshape(shape) for part, (dtype, shape) in specs]


def latency_publisher(
    run_dir: str, what: str, rounds: int, gap_s: float, sent: Any, seen: Any
) -> None:
    """Child: publish blocks of each kind, a message when the last has been seen."""
    message = latent(0) if what == "latent" else observation(0)
    wire = Publisher(ipc_endpoint(run_dir, f"wire-{what}"), "bench")
    sockets = [raw_socket(zmq.PUB, run_dir, f"{kind}-{what}", True) for kind in KINDS[:2]]
    by_hand, data = ByHand(sockets[1]), os.urandom(payload_bytes(message))
    time.sleep(0.5)  # subscriptions arrive
    total = len(KINDS) * rounds
    for index in range(total):
        while seen.value < index:
            time.sleep(0.0)
        if gap_s:
            time.sleep(gap_s)
        kind = KINDS[index // BLOCK % len(KINDS)]
        sent.value = time.monotonic_ns()
        if kind == "one_frame":
            sockets[0].send(data)
        elif kind == "by_hand":
            by_hand.send(message, index)
        else:
            wire.send(message)
    while seen.value < total:  # closing would discard the last message
        time.sleep(0.001)
    wire.close()
    for socket in sockets:
        socket.close(linger=0)


def raw_socket(kind: int, run_dir: str, name: str, bind: bool) -> zmq.Socket[bytes]:
    """A socket without any of this project's settings."""
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(kind)
    endpoint = ipc_endpoint(run_dir, name)
    if bind:
        socket.bind(endpoint)
    else:
        socket.connect(endpoint)
    if kind == zmq.SUB:
        socket.subscribe(b"")
    return socket


def measure_latency(run_dir: str, what: str, rounds: int, gap_s: float) -> dict[str, Any]:
    """Return one-way latencies in microseconds by kind, and ratios of medians."""
    context = multiprocessing.get_context("spawn")
    sent, seen = context.Value(ctypes.c_longlong, 0), context.Value(ctypes.c_longlong, 0)
    expect: Any = LatentGoal if what == "latent" else Observation
    reader = NewestReader(ipc_endpoint(run_dir, f"wire-{what}"), "bench", expect)
    sockets = [raw_socket(zmq.SUB, run_dir, f"{kind}-{what}", False) for kind in KINDS[:2]]
    by_hand = ByHand(sockets[1])
    child = context.Process(
        target=latency_publisher, args=(run_dir, what, rounds, gap_s, sent, seen)
    )
    child.start()
    receive: dict[str, Callable[[], object]] = {
        "one_frame": lambda: sockets[0].recv() if sockets[0].poll(1000) else None,
        "by_hand": lambda: by_hand.poll() if sockets[1].poll(1000) else None,
        "wire": lambda: reader.poll() if reader.wait(1.0) else None,
    }
    times: dict[str, list[int]] = {kind: [] for kind in KINDS}
    for index in range(len(KINDS) * rounds):
        kind = KINDS[index // BLOCK % len(KINDS)]
        get = receive[kind]
        while get() is None:
            pass
        times[kind].append(time.monotonic_ns() - sent.value)
        seen.value = index + 1
    child.join()
    reader.close()
    for socket in sockets:
        socket.close(linger=0)
    result: dict[str, Any] = {kind: percentiles(times[kind][BLOCK // 2 :]) for kind in KINDS}
    result["gaps"] = reader.stats.gaps
    return result


def echo(run_dir: str, rounds: int) -> None:
    """Child: answer each request with itself."""
    socket = raw_socket(zmq.REP, run_dir, "round", True)
    for _ in range(rounds):
        socket.send(socket.recv())
    time.sleep(0.2)
    socket.close(linger=0)


def measure_round(run_dir: str, rounds: int, size: int) -> dict[str, float]:
    """Return how long one frame takes there and back, in microseconds."""
    child = multiprocessing.get_context("spawn").Process(target=echo, args=(run_dir, rounds))
    child.start()
    socket = raw_socket(zmq.REQ, run_dir, "round", False)
    data, times = os.urandom(size), []
    for _ in range(rounds):
        begin = time.monotonic_ns()
        socket.send(data)
        socket.recv()
        times.append(time.monotonic_ns() - begin)
    child.join()
    socket.close(linger=0)
    return percentiles(times[BLOCK // 2 :])


def latencies(run_dir: str, rounds: int) -> dict[str, Any]:
    """All latencies, each with its ratios to the bare ones."""
    figures: dict[str, Any] = {}
    for what in ("latent", "rgbd"):
        size = payload_bytes(latent(0) if what == "latent" else observation(0))
        for name, gap_s in (("in_a_row", 0.0), ("paced", GAP_S)):
            result = measure_latency(run_dir, what, rounds, gap_s)
            result["payload_bytes"] = size
            if gap_s == 0.0:
                result["round"] = measure_round(run_dir, rounds, size)
            for kind in ("one_frame", "by_hand", "round"):
                if kind in result:
                    ratio = result["wire"]["p50_us"] / result[kind]["p50_us"]
                    result[f"p50_over_{kind}"] = round(ratio, 3)
            figures[f"{what}_{name}"] = result
    return figures


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
        figures |= latencies(run_dir, args.rounds)
        figures["bursts"] = measure_loss(run_dir, args.messages, 64)
        figures["back_to_back"] = measure_loss(run_dir, args.messages, args.messages)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
