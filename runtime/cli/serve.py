"""`openhelix serve ADDRESS`: one System 2 for many robots, until told to stop.

    openhelix serve ipc://system2                             for the robots on this host
    openhelix serve tcp://0.0.0.0:5800 transport.keys=keys    for others, with CURVE keys
    openhelix run system2.connect=ipc://system2 robot.id=left

The same node as in a run's graph, alone in this process. Robots on this host or others run
with `system2.connect=ADDRESS` and a `robot.id` of their own, each with its own topic and
instructions.
"""

from __future__ import annotations

import json
import logging
import signal
from collections.abc import Sequence
from typing import Annotated

from openhelix.runtime.cli.arguments import Options, Positional, option, parse
from openhelix.runtime.core import plugins
from openhelix.runtime.core.config import CommandFailed, ConfigError, Count, RunConfig, load
from openhelix.runtime.core.output import answer
from openhelix.runtime.core.targets import check_part
from openhelix.runtime.launch.node import NodeRunner, NodeSpec, in_a_thread
from openhelix.runtime.transport.sockets import check_bind, check_keys, served


class ServeOptions(Options):
    """Options of `serve`; all else is `RunConfig`."""

    address: Annotated[str, Positional()] = option(
        ..., "tcp://HOST:PORT (and the two ports after) or ipc://NAME"
    )
    max_batch: Count = option(8, "most requests in one call (8)", "N")
    max_robots: Count = option(64, "further ones are refused (64)", "N")


def main(argv: Sequence[str]) -> int:
    """Run one System 2 for many robots, until Ctrl-C or SIGTERM.

    Prints its counters at the end.
    """
    options, overrides = parse(
        "serve",
        ServeOptions,
        argv,
        __doc__ or "",
        RunConfig,
        ("system2", "transport", "output.metrics_port", "output.metrics_host"),
    )
    config = load(options.config, overrides)
    logging.basicConfig(level=logging.WARNING if options.as_json else logging.INFO)
    check_keys(config.transport.keys)
    check_part("system2.engine", config.system2.engine)
    keys = str(config.transport.keys) if config.transport.keys else None
    ends = served(options.address)
    for endpoint in ends.values():
        check_bind(endpoint, keys)
    limits = {"max_batch": options.max_batch, "max_robots": options.max_robots}
    node = {
        "engine": config.system2.engine.model_dump(),
        "shared": True,
        "hz": config.system2.hz,
        "requests": ends["requests"],
        "latents": ends["latents"],
        "limits": limits,
        "keys": keys,
        "metrics_port": config.output.metrics_port_of("system2"),
        "metrics_host": config.output.metrics_host,
    }
    spec = NodeSpec(
        "system2", plugins.entries(plugins.NODES)["system2"], ends["control"], node, keys=keys
    )
    # No client may end what all the others rely on: that is for a signal to do.
    runner = NodeRunner(spec, stay_refused=False, stoppable=False)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: in_a_thread(runner.stop))
    state = runner.run()
    if state == "refused":
        raise ConfigError(runner.error)
    if state == "failed":
        raise CommandFailed(runner.error)
    answer(json.dumps(runner.last_health, indent=None if options.as_json else 2))
    return 0
