"""Standard output, which belongs to the answer that a command was asked for.

Libraries print there as well: vLLM and Ray through Python, others from C or from processes of their
own. With `--json` a program reads what comes, so that all of that goes to standard error, and
`answer` alone writes to where standard output led.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

_kept: list[TextIO] = []  # where answers go while standard output is reserved, innermost last


@contextmanager
def reserved(for_good: bool = False) -> Iterator[None]:
    """Send whatever is printed to standard error, answers excepted.

    Args:
        for_good: leave it so, for what libraries print when the process ends.
    """
    out, keep = sys.stdout, sys.stdout
    out.flush()
    before = os.dup(1)
    try:
        os.dup2(2, 1)
    except OSError:  # there is no standard error
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    with suppress(OSError, ValueError):  # a test reads from something without a number
        if out.fileno() == 1:
            keep = os.fdopen(os.dup(before), "w", encoding=out.encoding, errors=out.errors)
    _kept.append(keep)
    sys.stdout = sys.stderr
    try:
        yield
    finally:
        if not for_good:
            _kept.pop()
            sys.stdout = out
            os.dup2(before, 1)
            if keep is not out:
                with suppress(OSError):
                    keep.close()
        os.close(before)


def answer(text: str) -> None:
    """Write what the command was asked for, with a line's end if it has none.

    Where nobody reads any more, nothing is written, and that is no error.
    """
    out = _kept[-1] if _kept else sys.stdout
    try:
        out.write(text if text.endswith("\n") else f"{text}\n")
        out.flush()
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.EIO):
            raise
        with suppress(OSError, ValueError):  # or Python says so once more at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())


def descriptors() -> tuple[int, int]:
    """Return where answers and where news go, as the system numbers them."""
    out = _kept[-1] if _kept else None
    try:
        return (1 if out is None else out.fileno()), 2
    except (OSError, ValueError):  # a test reads from something without a number
        return 1, 2
