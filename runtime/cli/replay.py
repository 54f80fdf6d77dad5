"""`openhelix replay RECORDING`: run recorded observations through System 1 again.

    openhelix replay outputs/latest
    openhelix replay outputs/run-0007/recording.mcap system1.policy.options.steps=5

The policy and its settings are those of the recorded run, which the recording carries; words
`system1.policy.options.path=FOLDER` change them, `--config FILE` replaces them. A policy that is
not OpenHelix's own is code that the recording names: it runs only where the command line repeats
it, as `system1.policy.target=MODULE:CLASS`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from openhelix.runtime.cli.arguments import Options, Positional, option, parse
from openhelix.runtime.control.assembly import make_policy
from openhelix.runtime.core.config import ConfigError, PolicyPart, RunConfig, load
from openhelix.runtime.core.output import answer
from openhelix.runtime.core.plugins import resolve
from openhelix.runtime.observe.recorder import Reader, replay


class ReplayOptions(Options):
    """Options of `replay`; all else is the recorded run's `RunConfig`."""

    recording: Annotated[Path, Positional()] = option(
        ..., "a recording (.mcap), or the folder of its run"
    )


def main(argv: Sequence[str]) -> int:
    """Run recorded observations through System 1 again, and compare."""
    options, overrides = parse(
        "replay", ReplayOptions, argv, __doc__ or "", RunConfig, ("system1",)
    )
    recorded = Reader(options.recording)  # a wrong path is told before a policy is loaded
    if options.config is None:
        config = recorded.config(overrides)
        if not any(map(_names_policy, overrides)):
            _check_ours(config.system1.policy, recorded.path)
    else:
        config = load(options.config, overrides)
    policy = make_policy(config.system1.policy)
    policy.warm_up()
    report = {"policy": config.system1.policy.model_dump(mode="json")}
    report |= replay(options.recording, policy, config.system1.latent_memory)
    if options.as_json:
        answer(json.dumps(report))
        return 0
    answer("\n".join(f"{name:<20} {json.dumps(value)}" for name, value in report.items()))
    return 0


def _names_policy(override: str) -> bool:
    """Whether a word of the command line says itself which policy to make."""
    key = override.removeprefix("--").partition("=")[0]
    return key in ("system1", "system1.policy", "system1.policy.target")


def _check_ours(part: PolicyPart, path: Path) -> None:
    """Refuse a recorded target that is no policy class of OpenHelix; nothing of it is run.

    The name alone is not enough: `openhelix.x:subprocess.run` would lead out of the package.
    """
    module, _, attribute = part.target.partition(":")
    found = None
    if module.startswith("openhelix.") and not module.endswith("__main__"):
        found = resolve(f"{module}:{attribute.partition('.')[0]}")
        target = resolve(part.target)
    if not (
        isinstance(found, type)
        and all(hasattr(found, verb) for verb in ("warm_up", "reset", "act"))
        and all(str(x.__module__).startswith("openhelix.") for x in (found, target))
    ):
        raise ConfigError(
            f"{path}: was recorded with system1.policy.target={part.target}, which is not "
            "OpenHelix's own; if you trust that code, repeat these words on the command line"
        )
