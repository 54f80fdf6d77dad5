"""`openhelix`: one word a command, each in a module of its own that is imported when asked for.

A user's mistake ends in one line on standard error and exit code 2, a failure that is not
theirs in one line and 1; Ctrl-C in 130.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from runtime.errors import CommandFailed
from runtime.resolve import resolve

COMMANDS = {
    "run": ("runtime.commands.run:main", "run the whole system on a robot or simulator"),
    "record": ("runtime.commands.run:record", "run, and record everything to disk"),
    "replay": ("runtime.commands.replay:main", "run recorded observations through System 1 again"),
    "status": ("runtime.commands.status:main", "how a running robot is doing; --web for a page"),
    "serve": ("runtime.commands.serve:main", "one System 2 for many robots"),
    "collect": ("benchmarks.playtable.collect:main", "demonstrations and frames for training"),
    "train": ("benchmarks.training.command:main", "both systems, from frames to checkpoints"),
    "eval": ("benchmarks.dsvlabench.eval:main", "how often a policy does what it is told"),
    "sweep": ("benchmarks.dsvlabench.sweep:main", "success against the age of the latent"),
    "compare": ("benchmarks.dsvlabench.compare:main", "two evaluations on the same episodes"),
    "experiment": ("benchmarks.experiments.command:main", "the paper's tables and figures, here"),
    "probe": ("system2.probe:main", "what System 2 makes of one image and instruction"),
    "keys": ("runtime.commands.keys:main", "make the CURVE keys that other hosts need"),
    "doctor": ("runtime.commands.doctor:main", "what this machine can do, and what to do about it"),
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
