"""`openhelix replay RECORDING`: run recorded observations through System 1 again.

The policy and its settings are those of the recorded run, which the recording carries; words
`system1.policy.options.path=FOLDER` change them, `--config FILE` replaces them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from openhelix.runtime.cli.arguments import Options, Positional, option, parse
from openhelix.runtime.control.assembly import make
from openhelix.runtime.core.config import RunConfig, load
from openhelix.runtime.observe.recorder import Reader, replay


class ReplayOptions(Options):
    """Options of `replay`; all else is the recorded run's `RunConfig`."""

    recording: Annotated[Path, Positional()] = option(
        ..., "a recording (.mcap), or the folder of its run"
    )


def main(argv: Sequence[str]) -> int:
    """Run recorded observations through System 1 again, and compare its trajectories."""
    options, overrides = parse(
        "replay", ReplayOptions, argv, __doc__ or "", RunConfig, ("system1",)
    )
    recorded = Reader(options.recording)  # a wrong path is told before a policy is loaded
    if options.config is None:
        config = recorded.config(overrides)
    else:
        config = load(options.config, overrides)
    policy = make(config.system1.policy)
    policy.warm_up()
    report = {"policy": config.system1.policy.model_dump(mode="json")}
    report |= replay(options.recording, policy, config.system1.latent_memory)
    if options.as_json:
        print(json.dumps(report))
        return 0
    for name, value in report.items():
        print(f"{name:<20} {json.dumps(value)}")
    return 0
