"""`openhelix replay RECORDING`: run the recorded observations through System 1 again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from runtime.assembly import make
from runtime.commands.arguments import parse, parser
from runtime.config import load
from runtime.recorder import Reader
from runtime.replay import replay


def main(argv: Sequence[str]) -> int:
    """Compare recorded and recomputed chunks; the policy is the configuration's."""
    arguments = parser("replay", __doc__ or "")
    arguments.add_argument("recording", type=Path, help="folder of a recording")
    options, overrides = parse(arguments, argv)
    config = load(options.config, overrides)
    Reader(options.recording)  # a wrong path is told before a policy is loaded
    policy = make(config.system1.policy)
    policy.warm_up()
    report = replay(options.recording, policy, config.system1.latent_memory)
    if options.json:
        print(json.dumps(report))
        return 0
    for name, value in report.items():
        print(f"{name:<20} {json.dumps(value)}")
    return 0
