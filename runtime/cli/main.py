"""`openhelix`: one word per command, each an entry point that is imported when it is called.

A user's mistake ends in one line on standard error and exit code 2, a failure that is not
theirs in one line and 1; Ctrl-C in 130.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

from openhelix.runtime.cli.arguments import fitted, wrapped
from openhelix.runtime.core import output, plugins
from openhelix.runtime.core.paths import CHECKOUT

# As a person meets them; the metadata of an installed package lists them by the alphabet.
ORDER = (
    *("run", "say", "status", "view", "film", "record", "replay", "serve"),
    *("collect", "data", "dagger", "train", "gate", "convert"),
    *("eval", "sweep", "compare", "experiment", "probe"),
    *("keys", "config", "completion", "calibrate", "doctor"),
)


def usage() -> str:
    """Return the page that `openhelix --help` prints: our commands, then other packages'."""
    found = plugins.entries(plugins.COMMANDS)
    commands = {name: found[name] for name in ORDER if name in found} | found
    width = max(map(len, commands), default=0) + 1
    rows = "\n".join(
        "\n".join(wrapped(plugins.summary(path), f"  {name:<{width}} ", " " * (width + 3)))
        for name, path in commands.items()
    )
    return (
        f"usage: openhelix COMMAND [--config FILE] [section.field=value ...] [--json]\n\n{rows}\n\n"
        + fitted("`openhelix COMMAND --help` says more, `openhelix --version` which one this is.")
    )


def version_line() -> str:
    """Return the version, and in a checkout where that is."""
    try:
        number = version(plugins.DISTRIBUTION)
    except PackageNotFoundError:
        number = "not installed"
    return f"openhelix {number}" + (f" ({CHECKOUT})" if CHECKOUT is not None else "")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if words else 2
    name, *rest = words
    if name == "--version":
        print(version_line())
        return 0
    commands = plugins.entries(plugins.COMMANDS)
    if name not in commands:
        said = plugins.nearest(name, commands)
        print(f"openhelix: unknown command {name!r}; {said}", file=sys.stderr)
        return 2
    if "--json" in rest and not {"-h", "--help"} & set(rest):
        # Run as a program, to the very end of it.
        with output.reserved(for_good=argv is None):
            return _call(name, commands[name], rest)
    return _call(name, commands[name], rest)


def _call(name: str, path: str, words: Sequence[str]) -> int:
    """Call a command; tell its refusals and failures in one line, and return the exit code."""
    try:
        # Not at the top: numpy and pydantic take long enough for somebody to press Ctrl-C.
        from openhelix.runtime.core.config import CommandFailed
        from openhelix.runtime.core.files import NO_ROOM, refusal_of
    except KeyboardInterrupt:
        return _interrupted(name)
    try:
        code = int(plugins.resolve(path)(words))
    except ModuleNotFoundError as error:
        extra = plugins.missing(error)
        if extra is None or os.environ.get("OPENHELIX_DEBUG"):
            raise
        _complain(f"openhelix {name}: {extra}")
        return 2
    except ValueError as error:
        # Bad input; every ValueError raised for it says in one line what is valid.
        if os.environ.get("OPENHELIX_DEBUG"):
            raise
        _complain(f"openhelix {name}: {' '.join(str(error).split())}")
        return 2
    except CommandFailed as error:
        if os.environ.get("OPENHELIX_DEBUG"):
            raise
        _complain(f"openhelix {name}: {error}")
        return 1
    except KeyboardInterrupt:
        return _interrupted(name)
    except BrokenPipeError:
        # The reader of a pipe (head, less) went away: not an error of ours.
        code = 0
    except OSError as error:
        # The machine refuses: a full disk, a folder that may not be written, too many files.
        if os.environ.get("OPENHELIX_DEBUG"):
            raise
        where = f"{error.filename}: " if error.filename is not None else ""
        _complain(f"openhelix {name}: {where}{error.strerror or error}")
        return 1
    except Exception as error:
        # Libraries have names of their own for a disk that is full.
        number = refusal_of(error)
        if number not in NO_ROOM or os.environ.get("OPENHELIX_DEBUG"):
            raise
        _complain(f"openhelix {name}: {os.strerror(number)}: {' '.join(str(error).split())}")
        return 1
    try:
        sys.stdout.flush()
    except OSError as error:  # Python would say so once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if error.errno not in (errno.EPIPE, errno.EIO):
            _complain(f"openhelix {name}: standard output: {error.strerror}")
            return 1
    return code


def _interrupted(name: str) -> int:
    _complain(f"openhelix {name}: interrupted")
    return 130


def _complain(text: str) -> None:
    """One line on standard error, if that is still there."""
    with suppress(OSError):
        print(text, file=sys.stderr)


if __name__ == "__main__":
    raise SystemExit(main())
