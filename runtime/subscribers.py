"""The subscribers that a configuration asks for: metrics, recording, video, viewer.

Each does its work off the control thread and drops, counted, rather than delay a tick.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from runtime.assembly import Rig
from runtime.config import RunConfig
from runtime.loop import Subscriber


class Subscribers:
    """Builds and owns the subscribers of one run."""

    def __init__(self, config: RunConfig, folder: Path, rig: Rig) -> None:
        self._parts: list[Subscriber] = []

    def __iter__(self) -> Iterator[Subscriber]:
        return iter(self._parts)

    def close(self) -> None:
        """Finish files and threads; safe to call twice."""
