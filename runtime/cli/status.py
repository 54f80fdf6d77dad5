"""`openhelix status`: how a running robot is doing, here or as a page (`--web`).

    openhelix status                          the newest run, in the terminal
    openhelix status --web                    as a page, with a text box and a stop button
    openhelix status --web --serve tcp://10.0.0.2:5800    with all robots of a shared System 2
    openhelix status --stop                   stop the robot for good

Shows the newest run below `output.folder`, or the one in `--run FOLDER`, that `openhelix run`
started on this host. Talking and stopping through the page need the run's token, which the link that
is printed carries; `--token` prints it alone. Both need to be able to read the run's folder.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import ssl
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from openhelix.runtime.cli.arguments import Options, option, parse
from openhelix.runtime.core.config import ConfigError, RunConfig, load
from openhelix.runtime.core.output import answer
from openhelix.runtime.observe.robot import PATIENCE_S
from openhelix.runtime.observe.status_server import StatusServer, is_loopback
from openhelix.runtime.observe.status_source import ASK_TIMEOUT_S, RunSource

PORT = 9120


class StatusOptions(Options):
    """Options of `status`."""

    run: Path | None = option(None, "folder of a run (the newest)", "FOLDER")
    web: bool = option(False, "serve the page until Ctrl-C")
    listen: str = option(
        f"127.0.0.1:{PORT}", "off loopback, reading needs the token too", "HOST:PORT"
    )
    plain_http: bool = option(False, "off loopback without TLS, behind a proxy that adds it")
    tls_cert: Path | None = option(None, "serve https", "FILE")
    tls_key: Path | None = option(None, "key of the certificate", "FILE")
    serve: str | None = option(None, "an `openhelix serve`, whose robots are listed", "ADDRESS")
    token: bool = option(False, "print the run's token")
    stop: bool = option(False, "stop the robot for good")


def main(argv: Sequence[str]) -> int:
    """Show how a running robot is doing; --web for a page.

    Exit code 1 when there is no run.
    """
    options, overrides = parse(
        "status", StatusOptions, argv, __doc__ or "", RunConfig, ("output.folder", "transport.keys")
    )
    config = load(options.config, overrides)
    patience_s = ASK_TIMEOUT_S if options.web else PATIENCE_S
    source = RunSource(
        config.output.folder, options.run, options.serve, config.transport.keys, patience_s
    )
    try:
        return _do(options, source)
    finally:
        source.close()


def _do(options: StatusOptions, source: RunSource) -> int:
    if options.stop:
        robot = source.record().robot
        source.stop("openhelix status --stop")
        answer(json.dumps({"stopped": robot}) if options.as_json else f"{robot}: stopped")
    elif options.token:
        token = source.record().token
        answer(json.dumps({"token": token}) if options.as_json else token)
    elif options.web:
        logging.basicConfig(level=logging.WARNING)
        os.nice(10)  # whoever looks on gives way to whoever works
        with contextlib.suppress(KeyboardInterrupt):
            asyncio.run(_serve(options, source))
    else:
        status = source.snapshot()
        if options.as_json:
            answer(json.dumps(status))
        else:
            Console(highlight=False).print(_table(status))
    return 0


async def _serve(options: StatusOptions, source: RunSource) -> None:
    host, port = _address(options.listen)
    tls = _tls(options)
    if tls is None and not is_loopback(host) and not options.plain_http:
        raise ConfigError(
            f"--listen: {options.listen} would show images and take the token unencrypted; give "
            "--tls-cert and --tls-key, or say --plain-http behind a proxy that adds TLS"
        )
    server = StatusServer(source, host, port, tls)
    url = await server.start()
    if options.as_json:
        answer(json.dumps({"url": url}))
    else:
        # What follows the # stays in the browser: it is in no request and in no log.
        token = source.token
        answer(f"{url}#token={token}" if token else f"{url} (no run is alive yet)")
        answer("the link carries the run's token: whoever has it may command the robot")
    ended = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    await ended.wait()
    await server.close()


def _address(text: str) -> tuple[str, int]:
    host, sign, port = text.rpartition(":")
    if not sign or not host or not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"--listen: {text!r}, expected HOST:PORT, for example 127.0.0.1:{PORT}")
    return host.removeprefix("[").removesuffix("]"), int(port)


def _tls(options: StatusOptions) -> ssl.SSLContext | None:
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
    understood = status["understood"]
    state = status["state"] + (f": {status['reason']}" if status["reason"] else "")
    rows = {
        "run": f"{status['run']}, robot {status['robot']}",
        "state": state if status["started"] else "starting",
        "instruction": status["instruction"] or "-",
        "task": f"{status['number']} {status['task']}".strip(),
        "step": f"{status['steps']} of {status['steps_limit']}",
        "so far": f"{status['succeeded']} of {status['judged']} tasks done"
        if status["judged"]
        else "-",
        "understood": "-" if understood is None else f"{100 * understood:.0f} %",
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
