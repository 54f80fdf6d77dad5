"""`openhelix serve ADDRESS`: one System 2 for many robots, until told to stop.

The same node as in a run's graph, alone in this process. Robots on this host or others run
with `system2.connect=ADDRESS` and a `robot.id` of their own, each with its own topic and
instructions.
"""

from __future__ import annotations

import json
import logging
import signal
from collections.abc import Sequence

from openhelix.runtime.cli.arguments import parse, parser
from openhelix.runtime.core.config import CommandFailed, ConfigError, load
from openhelix.runtime.launch.graph import SYSTEM2
from openhelix.runtime.launch.node import NodeRunner, NodeSpec, in_a_thread
from openhelix.runtime.transport.sockets import check_bind, served


def main(argv: Sequence[str]) -> int:
    """Serve until Ctrl-C or SIGTERM; prints the counters at the end."""
    arguments = parser("serve", __doc__ or "")
    arguments.add_argument(
        "address", help="tcp://HOST:PORT (and the two ports after) or ipc://PATH"
    )
    arguments.add_argument("--max-batch", type=int, default=8, help="most requests in one call")
    arguments.add_argument("--max-robots", type=int, default=64, help="further ones are refused")
    options, overrides = parse(arguments, argv)
    for name in ("max_batch", "max_robots"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')}: must be 1 or more")
    config = load(options.config, overrides)
    logging.basicConfig(level=logging.WARNING if options.json else logging.INFO)
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
    spec = NodeSpec("system2", SYSTEM2, ends["control"], node, keys=keys)
    # No client may end what all the others rely on: that is for a signal to do.
    runner = NodeRunner(spec, stay_refused=False, stoppable=False)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: in_a_thread(runner.stop))
    state = runner.run()
    if state == "refused":
        raise ConfigError(runner.error)
    if state == "failed":
        raise CommandFailed(runner.error)
    print(json.dumps(runner.last_health, indent=None if options.json else 2))
    return 0
