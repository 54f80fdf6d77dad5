"""`openhelix replay RECORDING`: run the recorded observations through System 1 again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from openhelix.runtime.cli.arguments import parse, parser
from openhelix.runtime.control.assembly import make
from openhelix.runtime.core.config import load
from openhelix.runtime.observe.recorder import Reader, replay


def main(argv: Sequence[str]) -> int:
    """Compare recorded and recomputed chunks; the policy is the configuration's."""
    arguments = parser("replay", __doc__ or "")
    arguments.add_argument(
        "recording", type=Path, help="a recording (.mcap), or the folder of its run"
    )
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
