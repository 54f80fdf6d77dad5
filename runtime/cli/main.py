"""`openhelix`: one word a command, each in a module of its own that is imported when asked for.

A user's mistake ends in one line on standard error and exit code 2, a failure that is not
theirs in one line and 1; Ctrl-C in 130.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from openhelix.runtime.core.config import CommandFailed
from openhelix.runtime.core.plugins import resolve

COMMANDS = {
    "run": ("openhelix.runtime.cli.run:main", "run the whole system on a robot or simulator"),
    "record": ("openhelix.runtime.cli.run:record", "run, and record everything to disk"),
    "replay": (
        "openhelix.runtime.cli.replay:main",
        "run recorded observations through System 1 again",
    ),
    "status": (
        "openhelix.runtime.cli.status:main",
        "how a running robot is doing; --web for a page",
    ),
    "serve": ("openhelix.runtime.cli.serve:main", "one System 2 for many robots"),
    "collect": (
        "openhelix.benchmarks.calvin.collect:main",
        "demonstrations and frames for training",
    ),
    "train": (
        "openhelix.benchmarks.training.command:main",
        "both systems, from frames to checkpoints",
    ),
    "eval": (
        "openhelix.benchmarks.evaluation.eval:main",
        "how often a policy does what it is told",
    ),
    "sweep": (
        "openhelix.benchmarks.evaluation.sweep:main",
        "success against the age of the latent",
    ),
    "compare": (
        "openhelix.benchmarks.evaluation.compare:main",
        "two evaluations on the same episodes",
    ),
    "experiment": (
        "openhelix.benchmarks.paper.command:main",
        "the paper's tables and figures, here",
    ),
    "probe": (
        "openhelix.benchmarks.evaluation.naming:main",
        "what System 2 makes of images and sentences",
    ),
    "keys": ("openhelix.runtime.cli.keys:main", "make the CURVE keys that other hosts need"),
    "doctor": (
        "openhelix.runtime.cli.doctor:main",
        "what this machine can do, and what to do about it",
    ),
}


def usage() -> str:
    """The page that `openhelix --help` prints."""
    rows = "\n".join(f"  {name:<10} {text}" for name, (_, text) in COMMANDS.items())
    return (
        f"usage: openhelix COMMAND [--config FILE] [section.field=value ...] [--json]\n\n{rows}\n\n"
        "`openhelix COMMAND --help` says more."
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if words else 2
    name, *rest = words
    if name not in COMMANDS:
        print(f"openhelix: unknown command {name!r}; valid: {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    try:
        code = int(resolve(COMMANDS[name][0])(rest))
        sys.stdout.flush()
        return code
    except ValueError as error:
        # Bad input; every ValueError raised for it says in one line what is valid.
        if os.environ.get("OPENHELIX_DEBUG"):
            raise
        print(f"openhelix {name}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except CommandFailed as error:
        print(f"openhelix {name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"openhelix {name}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of a pipe (head, less) went away: not an error of ours.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    raise SystemExit(main())
