"""Reads the committed dashboards: their panels, and their queries as Prometheus wants them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[2] / "deploy" / "grafana" / "dashboards"
VARIABLE = re.compile(r"\$(?:__)?\w+")


@dataclass(frozen=True)
class PanelQuery:
    """One query of one panel."""

    board: str
    panel: str
    expr: str  # as it stands in the dashboard
    legend: str

    def filled(self, range_s: int, rate_s: int) -> str:
        """Return the expression with Grafana's variables replaced, every choice being "all"."""
        known = {
            "$__rate_interval": f"{rate_s}s",
            "$__range": f"{range_s}s",
            "$instance": ".*",
        }
        return VARIABLE.sub(lambda match: known[match[0]], self.expr)


def dashboards() -> dict[str, dict[str, Any]]:
    """Return every dashboard by file name."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))}


def panels(board: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the panels that show something."""
    return [panel for panel in board["panels"] if panel["type"] != "row"]


def queries() -> Iterator[PanelQuery]:
    """Return every query of every panel of every dashboard."""
    for name, board in dashboards().items():
        for panel in panels(board):
            for target in panel["targets"]:
                legend = target.get("legendFormat", "")
                yield PanelQuery(name, panel["title"], target["expr"], legend)
