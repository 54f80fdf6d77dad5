"""A real Prometheus scrapes `openhelix serve` on vLLM: the panels about vLLM have answers."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from openhelix.runtime.core.interfaces import GoalRequest
from openhelix.runtime.launch.processes import reap
from openhelix.runtime.transport.sockets import served
from openhelix.runtime.transport.wire import Publisher
from tests.deploy.dashboards import PanelQuery, queries
from tests.integration.observed import BINARY, MISSING, prometheus
from tests.system2 import tiny

pytestmark = pytest.mark.skipif(BINARY is None, reason=MISSING)
READY_S, PATIENCE_S = 150.0, 60.0
INSTRUCTIONS = ("lift the red block", "open the drawer")


def about_vllm() -> list[PanelQuery]:
    return [query for query in queries() if "vllm:" in query.expr]


@contextmanager
def asked(requests: str) -> Iterator[None]:
    """A robot that offers an image ten times a second and wants nothing back."""
    port, over = Publisher(requests, "arm", bind=False), threading.Event()

    def ask() -> None:
        image = np.full((80, 80, 3), 90, np.uint8)
        seq = 0
        while not over.wait(0.1):
            text = INSTRUCTIONS[seq % len(INSTRUCTIONS)]
            port.send(GoalRequest(image, text, "arm", seq, seq, time.monotonic_ns()))
            seq += 1

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        port.close()


@contextmanager
def vllm_served(folder: Path, metrics_port: int) -> Iterator[str]:
    """`openhelix serve` with a tiny LLaVA on vLLM; gives where requests go."""
    model = tiny.write_laptop_like(folder / "tiny")
    engine = "{target: 'openhelix.system2.engines.vllm:VllmEngine', options: {model: '%s', dtype: float32, untrained: true}}"
    address = f"ipc://{folder}/s2"
    words = (f"system2.engine={engine % model}", "system2.hz=5")
    with (folder / "serve.log").open("wb") as log:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "openhelix.runtime.cli.main", "serve", address, "--json"),
                *(*words, f"output.metrics_port={metrics_port}"),
            ],
            env=os.environ | {"OPENHELIX_CACHE": str(folder / "cache")},
            stdout=subprocess.DEVNULL,
            stderr=log,
        )
    try:
        yield served(address)["requests"]
    finally:
        process.terminate()
        reap(process, 30.0)


@pytest.mark.timeout(420)
def test_every_panel_about_vllm_has_an_answer(tmp_path: Path) -> None:
    assert len(about_vllm()) >= 3
    with (
        prometheus(tmp_path) as server,
        vllm_served(tmp_path, server.parts_port) as requests,
        asked(requests),
    ):
        work = "rate(openhelix_system2_published_total[20s]) > 0"
        server.until("latents", lambda: server.ask(work), READY_S)
        for query in about_vllm():
            expr = query.filled(300, 20)
            server.until(f"{query.panel}: {expr}", lambda e=expr: server.ask(e), PATIENCE_S)
        tokens, latents = (
            server.value(name)
            for name in ("vllm:prompt_tokens_total", "openhelix_system2_published_total")
        )
        assert tokens is not None and latents is not None
        assert tokens > 3 * latents > 0  # every latent is a prefill of image, words and `<ACT>`
