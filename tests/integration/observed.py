"""A real Prometheus with the configuration of deploy/prometheus, on ports of a test's own."""

from __future__ import annotations

import json
import math
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import yaml

from openhelix.runtime.core.config import METRICS_PARTS

CONFIG = Path(__file__).resolve().parents[2] / "deploy" / "prometheus"
BINARY = shutil.which("prometheus")
MISSING = "Prometheus is not installed; deploy/install-debian.sh prometheus installs it"
Sample = dict[str, Any]


class Prometheus:
    """The server, from outside."""

    def __init__(self, port: int, parts_port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.parts_port = parts_port  # of a run: `output.metrics_port`

    def get(self, path: str, **parameters: str) -> Any:
        """Ask the HTTP API; an error in the question fails the test with its text."""
        query = urllib.parse.urlencode(parameters)
        try:
            with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{query}", timeout=20) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{parameters}: {error.read().decode()}") from None

    def ask(self, expr: str) -> list[Sample]:
        """Return the samples of an instant query that are numbers."""
        found = self.get("query", query=expr)["result"]
        return [s for s in found if not math.isnan(float(s["value"][1]))]

    def value(self, expr: str) -> float | None:
        """Return the value of an expression that has one; None while it has none."""
        found = self.ask(expr)
        return float(found[0]["value"][1]) if found else None

    def rules(self) -> list[dict[str, Any]]:
        """Return every rule with its health."""
        return [rule for group in self.get("rules")["groups"] for rule in group["rules"]]

    def firing(self) -> set[str]:
        """Return the names of the alerts that fire."""
        alerts = self.get("alerts")["alerts"]
        return {a["labels"]["alertname"] for a in alerts if a["state"] == "firing"}

    def until(self, what: str, test: Callable[[], Any], timeout_s: float = 30.0) -> None:
        """Wait until something holds."""
        deadline_s = time.monotonic() + timeout_s
        while not test():
            assert time.monotonic() < deadline_s, f"{what} did not come about in {timeout_s} s"
            time.sleep(0.3)


def free_ports(count: int) -> int:
    """Return the first of so many ports in a row that nobody has."""
    for first in range(20_000, 30_000, count):
        with ExitStack() as stack:
            try:
                for port in range(first, first + count):
                    taken = stack.enter_context(socket.socket())
                    taken.bind(("127.0.0.1", port))
            except OSError:
                continue
        return first
    raise AssertionError("no ports are free")


def configure(folder: Path, own_port: int, parts_port: int) -> Path:
    """Write deploy/prometheus' configuration with other ports, and once a second."""
    config = yaml.safe_load((CONFIG / "prometheus.yml").read_text())
    config["global"] = dict.fromkeys(config["global"], "1s")
    config["rule_files"] = [str(path) for path in sorted((CONFIG / "rules").glob("*.yml"))]
    for job in config["scrape_configs"]:
        job.pop("file_sd_configs", None)
        for group in job.get("static_configs", ()):
            part = group.get("labels", {}).get("part")
            port = parts_port + METRICS_PARTS.index(part) if part else own_port
            group["targets"] = [f"127.0.0.1:{port}"]
    path = folder / "prometheus.yml"
    path.write_text(yaml.safe_dump(config))
    return path


@contextmanager
def prometheus(folder: Path) -> Iterator[Prometheus]:
    """Run a Prometheus; ends it and nothing else."""
    own_port = free_ports(len(METRICS_PARTS) + 1)
    server = Prometheus(own_port, own_port + 1)
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(
            [
                *(str(BINARY), f"--config.file={configure(folder, own_port, own_port + 1)}"),
                *(f"--storage.tsdb.path={folder / 'tsdb'}", "--log.level=warn"),
                f"--web.listen-address=127.0.0.1:{own_port}",
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        server.until("a Prometheus that is ready", lambda: _ready(own_port))
        yield server
    finally:
        process.terminate()
        process.wait(20.0)


def _ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/-/ready", timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False
