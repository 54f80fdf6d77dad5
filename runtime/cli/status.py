"""`openhelix status`: how a running robot is doing, here or as a page (`--web`).

Shows the newest run below `output.folder`, or the one in `--run FOLDER`, that `openhelix run`
started on this host. The page's stop button needs the run's token; `--token` prints it, and `--stop`
stops the robot from here. Both need to be able to read the run's folder.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import ssl
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from openhelix.runtime.cli.arguments import parse, parser
from openhelix.runtime.core.config import ConfigError, load
from openhelix.runtime.observe.status_server import StatusServer, is_loopback
from openhelix.runtime.observe.status_source import RunSource

PORT = 9120


def main(argv: Sequence[str]) -> int:
    """Show a run; exit code 1 when there is none."""
    arguments = parser("status", __doc__ or "")
    arguments.add_argument("--run", type=Path, metavar="FOLDER", help="default: the newest")
    arguments.add_argument("--web", action="store_true", help="serve the page until Ctrl-C")
    arguments.add_argument(
        *("--listen",),
        default=f"127.0.0.1:{PORT}",
        metavar="HOST:PORT",
        help="off loopback, reading needs the token too",
    )
    arguments.add_argument("--tls-cert", type=Path, metavar="FILE", help="serve https")
    arguments.add_argument("--tls-key", type=Path, metavar="FILE")
    arguments.add_argument("--token", action="store_true", help="print the run's token")
    arguments.add_argument("--stop", action="store_true", help="stop the robot for good")
    options, overrides = parse(arguments, argv)
    source = RunSource(load(options.config, overrides).output.folder, options.run)
    try:
        return _do(options, source)
    finally:
        source.close()


def _do(options: Namespace, source: RunSource) -> int:
    if options.stop:
        robot = source.record().robot
        source.stop("openhelix status --stop")
        print(json.dumps({"stopped": robot}) if options.json else f"{robot}: stopped")
    elif options.token:
        token = source.record().token
        print(json.dumps({"token": token}) if options.json else token)
    elif options.web:
        logging.basicConfig(level=logging.WARNING)
        os.nice(10)  # whoever looks on gives way to whoever works
        with contextlib.suppress(KeyboardInterrupt):
            asyncio.run(_serve(options, source))
    else:
        status = source.snapshot()
        if options.json:
            print(json.dumps(status))
        else:
            Console(highlight=False).print(_table(status))
    return 0


async def _serve(options: Namespace, source: RunSource) -> None:
    host, port = _address(options.listen)
    server = StatusServer(source, host, port, _tls(options))
    url = await server.start()
    if options.json:
        print(json.dumps({"url": url}), flush=True)
    else:
        guard = "" if is_loopback(host) else " (asks for the run's token: openhelix status --token)"
        print(f"{url}{guard}", flush=True)
    ended = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    await ended.wait()
    await server.close()


def _address(text: str) -> tuple[str, int]:
    host, sign, port = text.rpartition(":")
    if not sign or not host or not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"--listen: {text!r}, expected HOST:PORT, for example 127.0.0.1:{PORT}")
    return host.strip("[]"), int(port)


def _tls(options: Namespace) -> ssl.SSLContext | None:
    if options.tls_cert is None and options.tls_key is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(options.tls_cert or "", options.tls_key)
    except OSError as error:
        raise ConfigError(f"--tls-cert: not a certificate with its key: {error}") from None
    return context


def _table(status: dict[str, Any]) -> Table:
    rates, expected = status["rates_hz"], status["expected_hz"]
    age = status["latent_age_s"]
    state = status["state"] + (f": {status['reason']}" if status["reason"] else "")
    rows = {
        "run": f"{status['run']}, robot {status['robot']}",
        "state": state if status["started"] else "starting",
        "instruction": status["instruction"] or "-",
        "task": f"{status['number']} {status['task']}".strip(),
        "step": f"{status['steps']} of {status['steps_limit']}",
        "success": f"{status['succeeded']} of {status['attempted']} so far",
        "latent age": "-" if age is None else f"{age:.2f} s",
        "System 2": f"{rates['system2']:.2f} Hz of {expected['system2']:g}",
        "System 1": f"{rates['system1']:.2f} Hz",
        "loop": f"{rates['loop']:.1f} Hz of {expected['loop']:g}",
        "last tick": f"{status['silent_s']:.2f} s ago" if status["started"] else "-",
        "stops": "; ".join(f"{s['reason']}, {s['ago_s']:.0f} s ago" for s in status["stops"])
        or "-",
    }
    table = Table(show_header=False, box=None, padding=(0, 2))
    for name, value in rows.items():
        table.add_row(name, value)
    return table
