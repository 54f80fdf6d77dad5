"""Makes the pictures of the documentation anew, on a machine that is left alone meanwhile.

    python -m tests.integration.pictures [--sequence 0] [--out docs/images]

One run of the shipped pair on the wall clock, seen by the status page in headless Chromium and
by a real Prometheus, then a small asynchrony sweep; the dashboards are drawn from what that
Prometheus answers, and ten seconds of the run's film are the README's moving picture. Needs
`deploy/install-debian.sh prometheus browser`; takes five to ten minutes.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image

from openhelix.deploy.grafana.picture import main as draw
from tests.integration.browser import CHROMIUM, Page, browse
from tests.integration.command import CLI, page
from tests.integration.observed import BINARY, Prometheus, prometheus

CONFIG = ("--config", "configs/run.yaml")
COLOURS = 128  # of a dashboard's file: a third of the bytes, and nobody sees it
SEEN = """JSON.stringify({
    state: document.getElementById('state').textContent,
    steps: Number(document.getElementById('steps').textContent),
    good: Number(document.getElementById('succeeded').textContent),
    age: Number(document.getElementById('age').textContent),
    limit: Number(document.getElementById('age-limit').textContent)})"""


async def photograph(url: str, profile: Path, run: subprocess.Popen[bytes], out: Path) -> None:
    """Keep the picture of the robot at work with the most tasks done."""
    best = -1
    async with browse(url, profile) as tab:
        while run.poll() is None:
            await asyncio.sleep(0.5)
            best = await _better(tab, best, out)


async def _better(tab: Page, best: int, out: Path) -> int:
    seen = json.loads(await tab.evaluate(SEEN))
    if not _at_work(seen) or seen["good"] <= best:
        return best
    trial = out.with_suffix(".new.png")
    await tab.screenshot(trial, height=1040)
    after = json.loads(await tab.evaluate(SEEN))  # what changed meanwhile may be in the picture
    if not _at_work(after) or after["good"] != seen["good"]:
        trial.unlink()
        return best
    trial.replace(out)
    return int(seen["good"])


def _at_work(seen: dict[str, Any]) -> bool:
    fresh = 0 < (seen["age"] or 0) < (seen["limit"] or 0)
    return seen["state"].lower() == "run" and seen["steps"] > 20 and fresh


def board(name: str, minutes: float, server: Prometheus, out: Path) -> None:
    """Draw a dashboard."""
    path = out / f"{name}.png"
    draw([name, "--prometheus", server.url, "--minutes", str(minutes), "--out", str(path)])
    with Image.open(path) as image:
        image.convert("RGB").quantize(COLOURS).save(path, optimize=True)


def make(folder: Path, out: Path, sequence: int) -> None:
    """Write all pictures."""
    with prometheus(folder) as server, page(folder) as url:
        port = f"output.metrics_port={server.parts_port}"
        words = ("--no-ray", f"tasks.sequence={sequence}", "tasks.steps_limit=180", port)
        run = subprocess.Popen([*CLI, "run", *CONFIG, *words, f"output.folder={folder}"])
        try:
            asyncio.run(photograph(url, folder / "profile", run, out / "status.png"))
        finally:
            with contextlib.suppress(ProcessLookupError):
                run.terminate()
            run.wait(300.0)  # it draws its film
        part = ("--seconds", "10", "--height", "360", "--no-title", "--out", str(out / "run.webp"))
        subprocess.run([*CLI, "film", str(folder / "run-0001"), *part], check=True)
        board("realtime", 1.0, server, out)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sequence", type=int, default=0, help="of the 1000, for the run")
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    options = parser.parse_args()
    if BINARY is None or CHROMIUM is None:
        parser.error("needs Prometheus and Chromium: deploy/install-debian.sh prometheus browser")
    with tempfile.TemporaryDirectory(prefix="openhelix-pictures-") as folder:
        make(Path(folder), options.out, options.sequence)


if __name__ == "__main__":
    main()
