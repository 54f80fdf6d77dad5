"""pybullet, imported without the line that it prints.

At its import pybullet says when it was built, on standard error, from C: before the one-line
error, or into the progress, of whichever command needed it. So the descriptor itself is pointed
at a file for that moment; what others wrote to it meanwhile is passed on after it.
"""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
from typing import Any

_BANNER = b"pybullet build time:"
_STDERR = 2


def _import_quietly() -> Any:
    """Import pybullet; Python's own lock of this module lets one thread in, once."""
    if "pybullet" in sys.modules:
        return sys.modules["pybullet"]
    try:
        kept = os.dup(_STDERR)
    except OSError:  # closed: nobody reads it
        return importlib.import_module("pybullet")
    try:
        with tempfile.TemporaryFile() as file:
            os.dup2(file.fileno(), _STDERR)
            try:
                module = importlib.import_module("pybullet")
            finally:
                os.dup2(kept, _STDERR)
            file.seek(0)
            others = [line for line in file if not line.startswith(_BANNER)]
        if others:
            os.write(_STDERR, b"".join(others))
    finally:
        os.close(kept)
    return module


pybullet: Any = _import_quietly()
