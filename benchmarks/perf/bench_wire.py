"""Transport benchmark: latency beside bare ZeroMQ, and a check that the newest is never lost.

Two processes, publisher and reader, over ipc. Latency is one way: from just before `send`
(encoding included) to the record in the reader's hands, decoded and checked. Beside it, in
alternating blocks of the same run because only ratios mean anything on a busy machine:

- `one_frame`: a ready-made frame of the same size, received as bytes. ZeroMQ's own share.
- `by_hand`: what one writes without this module: a msgpack header and the arrays in frames of
  their own, drained to the newest, viewed with numpy; no checks.
- `round`: one ready-made frame there and back (REQ and REP).

`in_a_row` sends the next message as soon as the last was seen; `paced` leaves 5 ms between
them, as a run does, so that both processes sleep and wake.

Loss is measured twice. `bursts`: after each burst the publisher is silent until the reader
has seen the burst's last message, or 2 s have passed, which counts as a lost newest.
`back_to_back`: everything is sent without a pause, and the last one must arrive; if the reader
has too little of the machine to keep up, its queue fills and `gaps` are counted.

Nobody polls shared memory for the other process: on two cores that takes the processor from
the threads that carry the messages. Each measurement has a time limit, and a peer that died
ends the benchmark with a message.

    python -m openhelix.benchmarks.perf.bench_wire [--messages 200000] [--rounds 2000] [--out FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import multiprocessing
import os
import platform
import random
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import zmq

from openhelix.benchmarks.perf.places import results_file
from openhelix.runtime.core.interfaces import CameraFrame, LatentGoal, Observation
from openhelix.runtime.transport.wire import NewestReader, Publisher

BLOCK = 50  # messages of one kind before the other has its turn
GAP_S = 0.005
PACED_SHARE = 4  # paced rounds cost their gap: a quarter as many
GIVE_UP_S = 2.0
LIMIT_S = 60.0  # of one measurement; each takes seconds
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
    run_dir: str, what: str, rounds: int, gap_s: float, sent: Any, seen: Connection
) -> None:
    """Child: publish blocks of each kind, a message when the last has been seen."""
    message = latent(0) if what == "latent" else observation(0)
    wire = Publisher(f"ipc://{run_dir}/wire-{what}", "bench")
    sockets = [raw_socket(zmq.PUB, run_dir, f"{kind}-{what}", True) for kind in KINDS[:2]]
    by_hand, data = ByHand(sockets[1]), os.urandom(payload_bytes(message))
    time.sleep(0.5)  # subscriptions arrive
    for index in range(len(KINDS) * rounds):
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
        seen.recv_bytes()
    wire.close()
    for socket in sockets:
        socket.close(linger=0)


def raw_socket(kind: int, run_dir: str, name: str, bind: bool) -> zmq.Socket[bytes]:
    """A socket without any of this project's settings."""
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(kind)
    endpoint = f"ipc://{run_dir}/{name}"
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
    # Without a lock: one process writes it, and a lock would be one more thing to wait for.
    sent, (theirs, seen) = context.RawValue(ctypes.c_longlong, 0), context.Pipe(duplex=False)
    expect: Any = LatentGoal if what == "latent" else Observation
    reader = NewestReader(f"ipc://{run_dir}/wire-{what}", "bench", expect)
    sockets = [raw_socket(zmq.SUB, run_dir, f"{kind}-{what}", False) for kind in KINDS[:2]]
    by_hand = ByHand(sockets[1])
    args = (run_dir, what, rounds, gap_s, sent, theirs)
    child = context.Process(target=latency_publisher, args=args, daemon=True)
    child.start()
    receive: dict[str, Callable[[], object]] = {
        "one_frame": lambda: sockets[0].recv() if sockets[0].poll(100) else None,
        "by_hand": lambda: by_hand.poll() if sockets[1].poll(100) else None,
        "wire": lambda: reader.poll() if reader.wait(0.1) else None,
    }
    times: dict[str, list[int]] = {kind: [] for kind in KINDS}
    give_up_s = time.monotonic() + LIMIT_S
    for index in range(len(KINDS) * rounds):
        kind = KINDS[index // BLOCK % len(KINDS)]
        get = receive[kind]
        while get() is None:
            if time.monotonic() > give_up_s or not child.is_alive():
                raise SystemExit(f"bench_wire: {what}: {kind} message {index} never came")
        times[kind].append(time.monotonic_ns() - sent.value)
        seen.send_bytes(b"x")
    end(child)
    reader.close()
    for socket in sockets:
        socket.close(linger=0)
    result: dict[str, Any] = {kind: percentiles(times[kind]) for kind in KINDS}
    result["gaps"] = reader.stats.gaps
    return result


def end(child: Any) -> None:
    """Let a child finish; make it end where it does not."""
    child.join(timeout=GIVE_UP_S)
    if child.is_alive():
        child.kill()
        child.join()


def echo(run_dir: str, rounds: int) -> None:
    """Child: answer each request with itself."""
    socket = raw_socket(zmq.REP, run_dir, "round", True)
    socket.rcvtimeo = round(LIMIT_S * 1e3)
    for _ in range(rounds):
        socket.send(socket.recv())
    time.sleep(0.2)
    socket.close(linger=0)


def measure_round(run_dir: str, rounds: int, size: int) -> dict[str, float]:
    """Return how long one frame takes there and back, in microseconds."""
    child = multiprocessing.get_context("spawn").Process(
        target=echo, args=(run_dir, rounds), daemon=True
    )
    child.start()
    socket = raw_socket(zmq.REQ, run_dir, "round", False)
    socket.rcvtimeo = round(LIMIT_S * 1e3)
    data, times = os.urandom(size), []
    try:
        for _ in range(rounds):
            begin = time.monotonic_ns()
            socket.send(data)
            socket.recv()
            times.append(time.monotonic_ns() - begin)
    except zmq.Again:
        raise SystemExit("bench_wire: round: no answer came") from None
    end(child)
    socket.close(linger=0)
    return percentiles(times)


def latencies(run_dir: str, rounds: int) -> dict[str, Any]:
    """All latencies, each with its ratios to the bare ones."""
    figures: dict[str, Any] = {}
    for what in ("latent", "rgbd"):
        size = payload_bytes(latent(0) if what == "latent" else observation(0))
        for name, gap_s in (("in_a_row", 0.0), ("paced", GAP_S)):
            count = rounds // PACED_SHARE if gap_s else rounds
            count = max(1, count // BLOCK) * BLOCK  # as many of each kind
            result = measure_latency(run_dir, what, count, gap_s)
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
    """p50 and p99 in microseconds, without the first tenth, which warms up."""
    values_ns = values_ns[len(values_ns) // 10 :]
    p50, p99 = np.percentile(np.array(values_ns) * 1e-3, (50, 99))
    return {"p50_us": round(float(p50), 1), "p99_us": round(float(p99), 1), "n": len(values_ns)}


def loss_publisher(
    run_dir: str, messages: int, burst: int, seen: Any, news: Connection, result: Connection
) -> None:
    """Child: send bursts of 1 to `burst` messages and wait for each to have been seen."""
    publisher = Publisher(f"ipc://{run_dir}/loss-{burst}", "bench")
    rng = random.Random(0)
    z = np.zeros((1, 4096), np.float32)
    time.sleep(0.5)
    sent = lost = bursts = 0
    begin = time.monotonic()
    while sent < messages and time.monotonic() < begin + LIMIT_S:
        size = rng.randint(1, burst) if burst < messages else messages
        for _ in range(min(size, messages - sent)):
            publisher.send(LatentGoal(z, sent, 0, 0, 0, "0123456789ab", "bench"))
            sent += 1
        bursts += 1
        if not wait_seen(seen, news, sent - 1):
            lost += 1
    figures = {
        "messages": sent,
        "bursts": bursts,
        "newest_lost": lost,
        "queue_filled_up": publisher.dropped,
        "wall_s": round(time.monotonic() - begin, 2),
    }
    result.send(figures)
    publisher.close()


def wait_seen(seen: Any, news: Connection, seq: int) -> bool:
    """Whether the reader reports that message within `GIVE_UP_S`."""
    give_up_s = time.monotonic() + GIVE_UP_S
    while seen.value < seq and news.poll(max(0.0, give_up_s - time.monotonic())):
        news.recv_bytes()
    return bool(seen.value >= seq)


def measure_loss(run_dir: str, messages: int, burst: int) -> dict[str, Any]:
    """Return how often the newest message of a burst never arrived."""
    context = multiprocessing.get_context("spawn")
    seen = context.RawValue(ctypes.c_longlong, -1)
    (result, theirs), (heard, news) = (context.Pipe(duplex=False) for _ in range(2))
    reader = NewestReader(f"ipc://{run_dir}/loss-{burst}", "bench", LatentGoal)
    args = (run_dir, messages, burst, seen, heard, theirs)
    child = context.Process(target=loss_publisher, args=args, daemon=True)
    child.start()
    os.set_blocking(news.fileno(), False)
    theirs.close()  # or a child that died would leave us waiting for its end of the pipe
    backwards = 0
    while not result.poll():
        if not reader.wait(0.1):
            continue
        message = reader.poll()
        if message is not None:
            backwards += message.seq <= seen.value
            seen.value = message.seq
            # A pipe that is full has news enough.
            with contextlib.suppress(BlockingIOError):
                news.send_bytes(b"x")
    try:
        figures: dict[str, Any] = result.recv()
    except EOFError:
        raise SystemExit("bench_wire: the publisher of the loss measurement died") from None
    end(child)
    reader.close()
    stats = reader.stats
    figures |= {"delivered": stats.delivered, "gaps": stats.gaps, "went_backwards": backwards}
    return figures


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--messages", type=int, default=200_000, help="of each loss measurement")
    parser.add_argument("--rounds", type=int, default=2_000, help="of each latency measurement")
    parser.add_argument("--out", type=Path, default=results_file("wire.json"))
    args = parser.parse_args()
    figures: dict[str, Any] = {
        "machine": {"cpu": platform.machine(), "cores": os.cpu_count(), "zmq": zmq.zmq_version()}
    }
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as run_dir:
        figures |= latencies(run_dir, args.rounds)
        figures["bursts"] = measure_loss(run_dir, args.messages, 64)
        figures["back_to_back"] = measure_loss(run_dir, args.messages, args.messages)
    figures["wall_s"] = round(time.monotonic() - begin, 1)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
