"""Talking to a robot, and looking at it: what takes how long, how large it gets, what it costs.

Runs `openhelix run` on the wall clock as a user does, and says one sentence after the other from
outside, as `openhelix say` does. From the moment of saying it, on this host's monotonic clock:

    say to effect    the tick before which the new instruction holds and the old plan is void
    say to answer    `say` is back with who was replaced
    say to action    the tick that sends the first target of a plan for the new instruction

So that the loop's figures can be compared, the run is done three times: `bare`, without anybody who
looks on, so that nobody can talk to it either; `plain`, with the track from which a film is drawn
afterwards, which is the default; and `looked_at`, with the viewer as well, and a status page that a
browser shows. From the last come the sizes per minute of film, of the viewer's recording and of the
track, and the page's weight and first paint.

    python -m openhelix.benchmarks.perf.bench_talk [--times 40] [--config FILE] [--out FILE]
    python -m openhelix.benchmarks.perf.bench_talk --config my_robot.yaml --sentences "go home" "fold it"
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from openhelix.benchmarks.perf.places import CONFIG, results_file
from openhelix.runtime.observe.robot import Robot
from openhelix.runtime.observe.status_source import NoRun

CLI = (sys.executable, "-m", "openhelix.runtime.cli.main")
SENTENCES = (
    "push the sliding door to the left side",
    "pull the handle to open the drawer",
    "press the button to turn on the led light",
    "grasp and lift the red block",
)
LOOKING = ("output.viewer=true",)
PLAIN = ("output.viewer=false",)
BARE = (*PLAIN, "output.status=false", "output.track=false")
BARE_S = 2.5  # for each sentence that the others are told, so that the runs are about as long
READY_S, ACTION_S, APART_S, END_S, FILM_S = 300.0, 20.0, 1.0, 600.0, 30.0
LOOP = (
    *("control_hz", "ticks", "deadline_missed", "tick_lateness_s", "tick_duration_s"),
    *("latent_age_s", "s1_latency_s", "s2_latency_s", "realtime", "sinks"),
)
PAINTED = (
    "JSON.stringify(performance.getEntriesByType('paint')"
    ".map(p => [p.name, p.startTime]).concat([['live', document.getElementById('state')"
    ".textContent ? performance.now() : null]]))"
)


def command(config: Path, folder: Path, sentence: str, *words: str) -> list[str]:
    """The words of a run that follows one instruction until it is told another."""
    return [
        *(*CLI, "run", "--config", str(config), "--json", f"output.folder={folder}"),
        # Its film would be drawn afterwards, for as long again.
        *(f"tasks.instruction={sentence}", "output.metrics_port=0", "output.video=false", *words),
    ]


def bare(config: Path, folder: Path, sentences: Sequence[str], times: int) -> dict[str, Any]:
    """Run as long as it takes to talk `times` times, looked at by nobody; return its figures."""
    steps = f"tasks.steps_limit={round(30 * times * BARE_S)}"
    done = subprocess.run(
        command(config, folder, sentences[-1], steps, *BARE),
        capture_output=True,
        text=True,
        timeout=READY_S + END_S,
    )
    if done.returncode != 0:
        raise SystemExit(f"bench_talk: the run ended with code {done.returncode}: {done.stderr}")
    report = json.loads(done.stdout)
    return {"loop": {name: report.get(name) for name in LOOP}}


def run(
    config: Path,
    folder: Path,
    sentences: Sequence[str],
    times: int,
    words: tuple[str, ...],
    page: bool,
) -> dict[str, Any]:
    """Run, talk `times` times, stop; return what was measured and the run's report."""
    process = subprocess.Popen(
        command(config, folder, sentences[-1], "tasks.steps_limit=100000", *words),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        with Robot(outputs=folder) as robot:
            _until_acting(robot, process)
            with contextlib.ExitStack() as looking:
                seen = looking.enter_context(_looked_at(folder)) if page else {}
                found = [_say(robot, sentences[i % len(sentences)]) for i in range(times)]
            robot.stop()
        output, _ = process.communicate(timeout=END_S)
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(60.0)
    report = json.loads(output)
    return {
        "said": times,
        **{name: _figures([one[name] for one in found]) for name in found[0]},
        "loop": {name: report.get(name) for name in LOOP},
        **({"page": seen, **_sizes(folder / "run-0001", report)} if page else {}),
    }


def _until_acting(robot: Robot, process: subprocess.Popen[str]) -> None:
    deadline_s = time.monotonic() + READY_S
    while time.monotonic() < deadline_s and process.poll() is None:
        with contextlib.suppress(NoRun):
            if robot.status()["state"] == "run":
                return
        time.sleep(0.1)
    raise SystemExit(f"bench_talk: the run did not begin (exit code {process.poll()})")


def _say(robot: Robot, text: str) -> dict[str, float | None]:
    """Say a sentence and wait for what comes of it; seconds from saying it."""
    begun_ns = time.monotonic_ns()
    told = robot.say(text, timeout_s=0.0)
    answered_ns = time.monotonic_ns()
    at: dict[str, int] = {}
    for entry in robot.events(told.said - 1, timeout_s=ACTION_S):
        if entry["said"] == told.said:
            at.setdefault(entry["kind"], entry["t_ns"])
        if "acting" in at:
            break
    time.sleep(APART_S)
    at["answered"] = answered_ns
    return {
        f"say_to_{name}_s": (at[kind] - begun_ns) * 1e-9 if kind in at else None
        for name, kind in (("effect", "begun"), ("answer", "answered"), ("action", "acting"))
    }


def _figures(values: list[float | None]) -> dict[str, float]:
    """Return median and 99th percentile; what never came is counted."""
    came = [value for value in values if value is not None]
    return {
        "p50": float(np.quantile(came, 0.5)),
        "p99": float(np.quantile(came, 0.99)),
        "max": max(came),
        "never": len(values) - len(came),
    }


@contextlib.contextmanager
def _looked_at(folder: Path) -> Iterator[dict[str, Any]]:
    """Serve the status page, open it in a browser if there is one; give its figures."""
    from tests.integration.browser import CHROMIUM
    from tests.integration.command import page

    files = Path(__file__).resolve().parents[2] / "runtime" / "observe" / "status_page"
    seen: dict[str, Any] = {
        "bytes": sum(f.stat().st_size for f in files.iterdir() if f.suffix != ".py"),
        "browser": CHROMIUM is not None,
    }
    with page(folder) as url:
        if CHROMIUM is None:
            yield seen
            return
        with _browser(url, folder / "profile", seen):
            yield seen


@contextlib.contextmanager
def _browser(url: str, profile: Path, seen: dict[str, Any]) -> Iterator[None]:
    """Keep a tab open in a thread of its own; note its paints."""
    import threading

    from tests.integration.browser import browse

    ready, done = threading.Event(), threading.Event()

    async def look() -> None:
        async with browse(url, profile) as tab:
            await tab.until("document.getElementById('state').textContent.length > 0")
            paints = dict(json.loads(await tab.evaluate(PAINTED)))
            seen["first_paint_s"] = paints.get("first-paint", 0.0) * 1e-3
            seen["live_s"] = paints["live"] * 1e-3
            ready.set()
            while not done.is_set():
                await asyncio.sleep(0.2)

    thread = threading.Thread(target=lambda: asyncio.run(look()))
    thread.start()
    try:
        if not ready.wait(120.0):
            raise SystemExit("bench_talk: the page did not come")
        yield
    finally:
        done.set()
        thread.join()


def _sizes(folder: Path, report: dict[str, Any]) -> dict[str, Any]:
    """Return bytes per minute of what the run left."""
    minutes = report["ticks"] / report["control_hz"] / 60
    found: dict[str, Any] = {"minutes": minutes}
    for name in ("run.rrd", "track.mcap"):
        size = (folder / name).stat().st_size
        found[f"{name.rpartition('.')[2]}_bytes_per_minute"] = round(size / minutes)
    # Half a minute of it: a film is drawn about as fast as the run went.
    words = ("--seconds", str(FILM_S), "--no-title", "--json")
    done = subprocess.run(
        [*CLI, "film", str(folder), *words], capture_output=True, text=True, check=True
    )
    film = json.loads(done.stdout)
    found["mp4_bytes_per_minute"] = round(film["bytes"] / film["seconds"] * 60)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=40, help="sentences in each run")
    parser.add_argument("--sentences", nargs="+", default=SENTENCES, help="said in turn")
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--out", type=Path, default=results_file("talk.json"))
    options = parser.parse_args()
    result: dict[str, Any] = {
        "cores": os.cpu_count(),
        "load_before": os.getloadavg(),
        "config": options.config.name,
    }
    with tempfile.TemporaryDirectory(prefix="openhelix-talk-") as folder:
        result["bare"] = bare(options.config, Path(folder), options.sentences, options.times)
    sys.stdout.write(f"bare {json.dumps(result['bare'])}\n")
    for name, words, page in (("plain", PLAIN, False), ("looked_at", LOOKING, True)):
        with tempfile.TemporaryDirectory(prefix="openhelix-talk-") as folder:
            result[name] = run(
                options.config, Path(folder), options.sentences, options.times, words, page
            )
        sys.stdout.write(f"{name} {json.dumps(result[name])}\n")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
