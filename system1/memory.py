"""Keeping freed memory: what a training step gives back, the next one needs again.

A step allocates and frees the same few hundred megabytes. The C library hands large blocks
straight back to the kernel, which must find and clear every page anew a moment later: on a
CPU that is a tenth to a quarter of a step.
"""

from __future__ import annotations

import ctypes
import sys

# glibc's malloc.h
TRIM_THRESHOLD, TOP_PAD, MMAP_MAX = -1, -2, -4
NEVER = 2**31 - 1
AT_ONCE = 64 * 2**20  # the heap grows by so much


def keep_freed_memory() -> bool:
    """Let this process keep what it frees; return whether the C library can be told so."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # another C library
        return False
    settings = ((MMAP_MAX, 0), (TRIM_THRESHOLD, NEVER), (TOP_PAD, AT_ONCE))
    return all([bool(mallopt(name, value)) for name, value in settings])
