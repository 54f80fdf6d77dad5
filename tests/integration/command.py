"""`openhelix run` and its status page as processes: started, waited for, looked into."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from tests.integration.session import SMALL

CLI = (sys.executable, "-m", "openhelix.runtime.cli.main")
RUN = [*CLI, "run", *SMALL, "tasks.instruction=reach 0.3 0.1 0.7"]


def start(folder: Path, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*RUN, "ray=false", f"output.folder={folder}", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(what: str, test: Any, timeout_s: float = 60.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not test():
        assert time.monotonic() < deadline_s, f"{what} did not come about"
        time.sleep(0.05)


def control_log(folder: Path) -> str:
    log = folder / "run-0001" / "logs" / "control.log"
    return log.read_text() if log.exists() else ""


def nodes_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def started(folder: Path) -> bool:
    """Whether the loop has begun, as its log says."""
    return "the loop starts" in control_log(folder)


@contextmanager
def page(base: Path) -> Iterator[str]:
    """`openhelix status --web`; gives its address."""
    process = subprocess.Popen(
        [*CLI, "status", "--web", "--json", "--listen", "127.0.0.1:0", f"output.folder={base}"],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        yield str(json.loads(process.stdout.readline())["url"])
    finally:
        process.terminate()
        process.communicate(timeout=20)
    assert process.returncode == 0
