"""Makes the pictures of the documentation anew, on a machine that is left alone meanwhile.

    python -m tests.integration.pictures [--sequence 0] [--only film] [--out docs/images]

`boards`: a run of two dozen sentences on the wall clock and one of a chain, watched by a real
Prometheus, then a small asynchrony sweep; the dashboards are drawn from what that Prometheus answers. `page`: a robot is told the same
chain by somebody, one sentence after the other, which the status page shows in headless Chromium.
`film`: ten seconds of the chain, the README's moving picture; on the lockstep clock, so that it does
not depend on what else the machine does. Needs `deploy/install-debian.sh prometheus browser`; takes
about ten minutes.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from openhelix import Robot
from openhelix.deploy.grafana.picture import main as draw
from openhelix.runtime.cli.run import plan
from openhelix.runtime.control.episodes import Assignment
from openhelix.runtime.core.config import load
from openhelix.runtime.observe.status_source import NoRun
from tests.integration.browser import CHROMIUM, Page, browse
from tests.integration.command import CLI, started, wait_for
from tests.integration.command import page as served
from tests.integration.observed import BINARY, Prometheus, prometheus

CONFIG = ("--config", "configs/run.yaml")
COLOURS = 128  # of a dashboard's file: a third of the bytes, and nobody sees it
SEEN = """JSON.stringify({
    state: document.getElementById('state').textContent,
    steps: Number(document.getElementById('steps').textContent),
    good: document.querySelectorAll('#history .good').length,
    seen: [...document.querySelectorAll('figure img')].filter(i => i.naturalWidth > 0).length,
    age: Number(document.getElementById('age').textContent),
    limit: Number(document.getElementById('age-limit').textContent)})"""
CLOSING_S = 1.2  # what became of a sentence is looked at before the next one
PATIENCE_S = 300.0  # for a run to begin
SAID = (  # two minutes of work that undoes itself
    *("pull the handle to open the drawer", "push the handle to close the drawer"),
    *("push the sliding door to the left side", "push the sliding door to the right side"),
    *("press the button to turn on the led light", "press the button to turn off the led light"),
)


async def photograph(url: str, profile: Path, speaker: threading.Thread, out: Path) -> None:
    """Keep the picture of the robot at work with the most tasks done."""
    best = -1
    async with browse(url, profile) as tab:
        while speaker.is_alive():
            await asyncio.sleep(0.5)
            best = await _better(tab, best, out)


async def _better(tab: Page, best: int, out: Path) -> int:
    seen = json.loads(await tab.evaluate(SEEN))
    if not _at_work(seen) or seen["good"] <= best:
        return best
    trial = out.with_suffix(".new.png")
    await tab.screenshot(trial, height=1340)
    after = json.loads(await tab.evaluate(SEEN))  # what changed meanwhile may be in the picture
    if not _at_work(after) or after["good"] != seen["good"]:
        trial.unlink()
        return best
    trial.replace(out)
    return int(seen["good"])


def _at_work(seen: dict[str, Any]) -> bool:
    fresh = 0 < (seen["age"] or 0) < (seen["limit"] or 0)
    acts = seen["state"].lower() == "run" and seen["steps"] > 20
    return acts and fresh and seen["seen"] == 2


def board(name: str, minutes: float, server: Prometheus, out: Path) -> None:
    """Draw a dashboard."""
    path = out / f"{name}.png"
    draw([name, "--prometheus", server.url, "--minutes", str(minutes), "--out", str(path)])
    with Image.open(path) as image:
        image.convert("RGB").quantize(COLOURS).save(path, optimize=True)


def boards(folder: Path, out: Path, sequence: int) -> None:
    """Write the dashboards' pictures."""
    with prometheus(folder) as server:
        port = f"output.metrics_port={server.parts_port}"
        own = ("--no-ray", port, "tasks.steps_limit=180", "output.video=false")
        said = f"tasks.instructions={json.dumps(SAID * 4)}"
        run = subprocess.Popen([*CLI, "run", *CONFIG, *own, said, f"output.folder={folder}"])
        try:
            wait_for("a run", lambda: started(folder) or run.poll() is not None, PATIENCE_S)
            begun_s = time.monotonic()
        finally:
            run.wait(600.0)
        board("realtime", (time.monotonic() - begun_s) / 60, server, out)
        chain = (f"tasks.sequence={sequence}", f"output.folder={folder / 'chain'}")
        subprocess.run([*CLI, "run", *CONFIG, *own, *chain], check=True)
        cells = ("--intervals", "2,10,30,60", "--latencies", "0", "--drift-sequences", "0")
        small = ("--suites", "calvin", "--sequences", "6", "--steps", "60", "--workers", "1")
        subprocess.run(
            [
                *(*CLI, "sweep", *CONFIG, *small, *cells, port),
                *("--out", str(folder / "sweep"), "--results", str(folder / "results")),
            ],
            check=True,
        )
        for name in ("success", "asynchrony"):
            board(name, 10.0, server, out)


def page(folder: Path, out: Path, sequence: int) -> None:
    """Write the status page's picture."""
    own = (f"tasks.sequence={sequence}", f"output.folder={folder}")
    listed, _ = plan(load(Path(CONFIG[1]), list(own)))
    words = ("--interactive", "--no-ray", "output.metrics_port=0", "output.video=false")
    with served(folder) as url, Robot(outputs=folder, who="ann") as robot:
        run = subprocess.Popen([*CLI, "run", *CONFIG, *words, *own], stdin=subprocess.PIPE)
        try:
            wait_for("a run", lambda: started(folder) or run.poll() is not None, PATIENCE_S)
            speaker = threading.Thread(target=tell, args=(robot, listed), daemon=True)
            speaker.start()
            asyncio.run(photograph(url, folder / "profile", speaker, out / "status.png"))
        finally:
            with contextlib.suppress(ProcessLookupError):
                run.terminate()
            run.wait(600.0)


def film(folder: Path, out: Path, sequence: int) -> None:
    """Write the README's moving picture."""
    words = ("control.clock=lockstep", "lockstep.interval_steps=30", "lockstep.latency_steps=8")
    own = (f"tasks.sequence={sequence}", f"output.folder={folder}", "output.video=false")
    subprocess.run([*CLI, "run", *CONFIG, *words, *own], check=True)
    part = ("--seconds", "10", "--height", "360", "--no-title", "--out", str(out / "run.webp"))
    subprocess.run([*CLI, "film", str(folder / "run-0001"), *part], check=True)


def tell(robot: Robot, listed: Sequence[Assignment]) -> None:
    """Say one sentence after the other, each when the one before has come to something."""
    for assignment in listed:
        try:
            told = robot.say(assignment.instruction)
        except NoRun:
            return
        for entry in robot.events(told.said, timeout_s=60.0):
            if entry["said"] == told.said and entry["kind"] in ("seen", "ended"):
                break
        time.sleep(CLOSING_S)


KINDS = {"boards": boards, "page": page, "film": film}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sequence", type=int, default=0, help="of the 1000, for the runs")
    parser.add_argument("--only", choices=KINDS, help="these pictures alone")
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    options = parser.parse_args()
    if BINARY is None or CHROMIUM is None:
        parser.error("needs Prometheus and Chromium: deploy/install-debian.sh prometheus browser")
    for kind, write in KINDS.items():
        if options.only in (None, kind):
            with tempfile.TemporaryDirectory(prefix="openhelix-pictures-") as folder:
                write(Path(folder), options.out, options.sequence)


if __name__ == "__main__":
    main()
