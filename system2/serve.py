"""`openhelix serve`: one System 2 for many robots, until told to stop.

The same node as in a run's graph, alone in this process: robots on this host or others
connect to its two addresses, each with its own topic and epoch.
"""

from __future__ import annotations

import argparse
import json
import logging
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runtime.config import ConfigError, load
from system2.publisher import PublisherNode


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise ConfigError(message)


def main(argv: Sequence[str], stop: threading.Event | None = None) -> int:
    """Serve until SIGINT or SIGTERM (or `stop`); prints the counters at the end."""
    parser = _Parser(prog="openhelix serve", description=__doc__)
    parser.add_argument("--requests", default="tcp://127.0.0.1:7001", help="endpoint to bind")
    parser.add_argument("--latents", default="tcp://127.0.0.1:7002", help="endpoint to bind")
    parser.add_argument("--max-batch", type=int, default=8, help="most requests in one engine call")
    parser.add_argument("--max-robots", type=int, default=64, help="further robots are refused")
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML configuration")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")
    options, rest = parser.parse_known_args(argv)
    wrong = [word for word in rest if "=" not in word]
    if wrong:
        raise ConfigError(
            f"{wrong[0]!r}: unknown option; overrides are written section.field=value"
        )
    config = load(options.config, [word.removeprefix("--") for word in rest])
    logging.basicConfig(level=logging.WARNING if options.json else logging.INFO)
    node = PublisherNode(
        engine=config.system2.engine.model_dump(),
        hz=config.system2.hz,
        requests=options.requests,
        latents=options.latents,
        limits={"max_batch": options.max_batch, "max_robots": options.max_robots},
        keys=str(config.transport.keys) if config.transport.keys else None,
    )
    if stop is None:
        stop = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
    try:
        node.setup()
        logging.getLogger(__name__).info(
            "ready: requests on %s, latents on %s, %g Hz a robot",
            options.requests,
            options.latents,
            config.system2.hz,
        )
        node.run(stop)
        health = node.health()
    finally:
        node.close()
    sys.stdout.write(json.dumps(health, indent=None if options.json else 2) + "\n")
    return 0
