"""`openhelix probe`: what System 2 makes of a picture, an instruction, a question."""

from __future__ import annotations

from collections.abc import Sequence

from openhelix.benchmarks.evaluation import asking
from openhelix.system2 import probe


def main(argv: Sequence[str]) -> int:
    """What System 2 makes of an image and an instruction; `--ask` for answers in words.

    Raises:
        ConfigError: bad input, in one line.
    """
    if any(word.partition("=")[0] == "--ask" for word in argv):
        return asking.main(argv)
    return probe.main(argv)
