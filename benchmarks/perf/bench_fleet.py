"""How many robots one System 2 can serve on this machine, and what observing costs the loop.

Robots: the real engine behind `openhelix serve`, as a user runs it; the robots are light (the
loop's own half of the conversation at 30 ticks per second with a 200x200 camera at 10 Hz, no
simulator), so that the cores are System 2's. Their number rises until the limit: the p99 age
of the latent in use, sampled at every tick, exceeds 2 s, or a request is shed. Bisection then
finds the largest number that works; a number that fails is tried twice. The benchmark takes six
to eight minutes.

Overhead: a real loop (PlayTable's processes, small System 1 and System 2, SCHED_FIFO where it
is granted) with metrics and recording switched on and off in one-second blocks, so that all
ways share one run and are compared block by block, with an interval. A Prometheus-like client
scrapes once in every turn that has metrics.

    python -m openhelix.benchmarks.perf.bench_fleet [--seconds 20] [--overhead-seconds 100] [--out FILE]
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from openhelix.benchmarks.perf.places import CONFIG, results_file
from openhelix.benchmarks.perf.tick_overhead import overhead
from openhelix.runtime.control.assembly import IMAGES_A_LATENT, request_interval_ns
from openhelix.runtime.control.goals import WireGoals
from openhelix.runtime.core.config import ConfigError, load
from openhelix.runtime.core.interfaces import CameraFrame, LatentGoal, LatentSpec, Observation
from openhelix.runtime.launch.processes import reap
from openhelix.runtime.transport.rpc import RpcClient, RpcError
from openhelix.runtime.transport.sockets import served
from openhelix.runtime.transport.wire import NewestReader, Publisher

_stages = itertools.count()  # numbers names: a System 2 keeps a name for who has it
OFFERS = (2, IMAGES_A_LATENT)  # images a robot offers for each latent, side by side
LADDER = (4, 8, 12, 16, 24, 32)  # after one robot alone
TICK_NS = 1_000_000_000 // 30
CAMERA_NS = 100_000_000
WARM_UP_S = 5.0
AGE_LIMIT_S = 2.0
READY_S = 240.0
LEAST_OVERHEAD_S = 15.0  # for the first plan, and two blocks of turns
INSTRUCTIONS = (
    "push the sliding door to the left side",
    "pull the handle to open the drawer",
    "use the switch to turn on the light bulb",
    "grasp and lift the blue block",
)


@dataclass
class LightRobot:
    """The System 2 half of a control loop."""

    name: str
    goals: WireGoals
    phase_ns: int
    image: np.ndarray[Any, Any]
    shown_ns: int = -1
    ages_s: list[float] = field(default_factory=list)
    received: int = 0
    image_ages_s: list[float] = field(default_factory=list)  # when the engine took them

    def tick(self, now_ns: int, count: bool) -> None:
        """Offer the newest image, take the newest latent, note its age."""
        t_ns = now_ns - (now_ns - self.phase_ns) % CAMERA_NS
        if t_ns != self.shown_ns:
            self.shown_ns = t_ns
            self.image[0, 0, :] = (t_ns // CAMERA_NS) % 256
        frame = CameraFrame(t_ns, self.image, None, np.eye(3), np.eye(4))
        seen = Observation(now_ns, {"static": frame}, np.zeros(7), 0.0, True, np.zeros(7))
        latent = self.goals.update(seen, now_ns)
        if count and latent is not None:
            self.received += 1
            waited_s = (latent.t_pub_ns - latent.t_obs_ns) * 1e-9 - latent.compute_s
            self.image_ages_s.append(waited_s)
        if count and self.goals.recent:
            self.ages_s.append(self.goals.recent[-1].age_s(now_ns))


def make_robots(
    count: int, ends: dict[str, str], spec: LatentSpec, hz: float, images: int
) -> list[LightRobot]:
    """Return connected robots whose cameras and requests are out of step with one another."""
    rng = np.random.default_rng(count)
    robots, stage_number = [], next(_stages)
    for i in range(count):
        name = f"fleet-{stage_number}-{i}"
        goals = WireGoals(
            sender=Publisher(ends["requests"], name, bind=False),
            reader=NewestReader(ends["latents"], f"latents/{name}", LatentGoal),
            robot=name,
            camera="static",
            min_interval_ns=request_interval_ns(hz, images),
            max_age_s=math.inf,  # how old latents get is what is measured
        )
        goals.expect(spec)
        image = rng.integers(0, 256, (200, 200, 3), np.uint8)
        robots.append(LightRobot(name, goals, int(rng.integers(0, CAMERA_NS)), image))
    return robots


def drive(robots: list[LightRobot], seconds: float) -> None:
    """Tick all robots; they begin one after the other over the first second."""
    start_ns = time.monotonic_ns()
    begun = 0
    due_ns = start_ns
    while (elapsed_s := (due_ns - start_ns) * 1e-9) < WARM_UP_S + seconds:
        wanted = min(len(robots), 1 + int(elapsed_s * len(robots)))
        for i in range(begun, wanted):
            robots[i].goals.begin(1, INSTRUCTIONS[i % len(INSTRUCTIONS)])
        begun = wanted
        now_ns = time.monotonic_ns()
        for robot in robots[:begun]:
            robot.tick(now_ns, elapsed_s >= WARM_UP_S)
        due_ns += TICK_NS
        time.sleep(max(0.0, (due_ns - time.monotonic_ns()) * 1e-9))


def stage(
    count: int,
    ends: dict[str, str],
    client: RpcClient,
    args: Any,
    images: int = IMAGES_A_LATENT,
) -> dict[str, Any]:
    """Serve `count` robots for a while; return what came of it."""
    before = client.call("health", {}, 10.0)
    me = psutil.Process()
    server = psutil.Process(before["pid"])
    cpu = [sum(p.cpu_times()[:2]) for p in (me, server)]
    robots = make_robots(count, ends, LatentSpec(**before["latent_spec"]), args.hz, images)
    begin_s = time.monotonic()
    try:
        drive(robots, args.seconds)
    finally:
        missed = sum(robot.goals.missed for robot in robots)
        for robot in robots:
            robot.goals.close()
    wall_s = time.monotonic() - begin_s
    after = client.call("health", {}, 10.0)
    ages = [age for robot in robots for age in robot.ages_s]
    image_ages = [age for robot in robots for age in robot.image_ages_s]
    p99 = [float(np.percentile(robot.ages_s or [np.inf], 99)) for robot in robots]
    shed = {
        reason: total - before["shed"].get(reason, 0)
        for reason, total in after["shed"].items()
        if total != before["shed"].get(reason, 0)
    }
    rates = [robot.received / args.seconds for robot in robots]
    result = {
        "robots": count,
        "latent_age_s": {
            "p50": float(np.percentile(ages, 50)) if ages else None,
            "p99": float(np.percentile(ages, 99)) if ages else None,
            "max": max(ages, default=None),
            "p99_of_the_worst_robot": max(p99) if np.isfinite(max(p99)) else None,
        },
        "image_age_s": {
            name: float(np.percentile(image_ages, share)) if image_ages else None
            for name, share in (("p50", 50), ("p99", 99))
        },
        "latents_hz_a_robot": {"min": min(rates), "mean": float(np.mean(rates))},
        "latents_a_batch": (after["published"] - before["published"])
        / max(1, after["batches"] - before["batches"]),
        "deadlines_skipped": after["skipped"] - before["skipped"],
        "latents_missed": missed,
        "shed": shed,
        "cpu_of_robots": (sum(me.cpu_times()[:2]) - cpu[0]) / wall_s,
        "cpu_of_system2": (sum(server.cpu_times()[:2]) - cpu[1]) / wall_s,
    }
    age = result["latent_age_s"]["p99"]
    result["holds"] = not shed and age is not None and age <= AGE_LIMIT_S
    print(json.dumps(result), flush=True)
    return result


def tried(count: int, ends: dict[str, str], client: RpcClient, args: Any) -> dict[str, Any]:
    """Return a stage; one that breaks is tried once more, since machines have other things to do."""
    first = stage(count, ends, client, args)
    if first["holds"]:
        return first
    return stage(count, ends, client, args) | {"first_try": first}


def most(
    holds: Callable[[int], bool], ladder: Sequence[int] = (1, *LADDER)
) -> tuple[int, int | None]:
    """Return the largest number that holds and the next one up, which breaks; None if none did."""
    good, bad = 0, None
    for count in ladder:
        if not holds(count):
            bad = count
            break
        good = count
    while bad is not None and bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if holds(middle) else (good, middle)
    return good, bad


@contextmanager
def system2(args: Any, folder: Path) -> Iterator[tuple[dict[str, str], RpcClient]]:
    """`openhelix serve` with the configured engine; ready when it is given."""
    address = f"ipc://{folder}/s2"
    process = subprocess.Popen(
        [
            *(
                sys.executable,
                "-m",
                "openhelix.runtime.cli.main",
                "serve",
                address,
                "--config",
                str(args.config),
            ),
            *("--json", f"--max-batch={args.max_batch}", "--max-robots=1024"),
            *(f"system2.hz={args.hz}", "output.metrics_port=0"),
        ],
        env=os.environ | {"OMP_NUM_THREADS": str(os.cpu_count() or 1)},
        stdout=subprocess.DEVNULL,
    )
    client = RpcClient(served(address)["control"])
    try:
        end_s = time.monotonic() + READY_S
        while True:
            try:
                if client.call("health", {}, 1.0)["state"] == "ready":
                    break
            except RpcError:
                pass
            if process.poll() is not None or time.monotonic() > end_s:
                raise SystemExit("bench_fleet: System 2 did not become ready")
            time.sleep(0.2)
        yield served(address), client
    finally:
        client.close()
        process.terminate()
        reap(process, 15.0)


def robots_served(args: Any) -> dict[str, Any]:
    """Find how many robots one System 2 serves."""
    config = load(args.config)
    stages: dict[int, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name, system2(args, Path(name)) as (ends, client):
        offers = {images: stage(1, ends, client, args, images) for images in OFFERS}
        stages[1] = offers[IMAGES_A_LATENT]
        if not stages[1]["holds"]:
            stages[1] = stage(1, ends, client, args) | {"first_try": stages[1]}

        def holds(count: int) -> bool:
            if count not in stages:
                stages[count] = tried(count, ends, client, args)
            return bool(stages[count]["holds"])

        good, bad = most(holds)
        health = client.call("health", {}, 10.0)
    return {
        "hz": args.hz,
        "max_batch": args.max_batch,
        "engine": config.system2.engine.model_dump(),
        "seconds_a_stage": args.seconds,
        "age_limit_s": AGE_LIMIT_S,
        "robots_served": good,
        "breaks_at": bad,
        "engine_call_s": health["compute_s"],
        "by_images_offered": {
            str(images): {name: offer[name] for name in ("latent_age_s", "image_age_s")}
            for images, offer in offers.items()
        },
        "stages": [stages[count] for count in sorted(stages)],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each number of robots")
    parser.add_argument("--overhead-seconds", type=float, default=100.0, help="0 leaves it out")
    parser.add_argument("--hz", type=float, default=1.0, help="latents per second for each robot")
    parser.add_argument("--max-batch", type=int, default=8, help="as of `openhelix serve`")
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--only", choices=("robots", "overhead"), default=None)
    parser.add_argument("--out", type=Path, default=results_file("fleet.json"))
    args = parser.parse_args()
    if args.seconds <= 0 or args.hz <= 0 or args.max_batch < 1:
        parser.error("--seconds, --hz and --max-batch must be above 0")
    if 0 < args.overhead_seconds < LEAST_OVERHEAD_S:
        parser.error(f"--overhead-seconds: 0, or at least {LEAST_OVERHEAD_S:g}")
    try:
        load(args.config)
    except ConfigError as error:
        parser.error(str(error))
    result: dict[str, Any] = (
        json.loads(args.out.read_text()) if args.only and args.out.exists() else {}
    )
    result |= {"cores": os.cpu_count(), "load_before": os.getloadavg()}
    if args.only != "overhead":
        result["fleet"] = robots_served(args)
    if args.only != "robots" and args.overhead_seconds > 0:
        result["overhead"] = overhead(args.overhead_seconds)
        print(json.dumps(result["overhead"]))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
