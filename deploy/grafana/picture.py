"""Draws a dashboard without Grafana: its own queries, put to a Prometheus, with matplotlib.

    python -m openhelix.deploy.grafana.picture realtime --minutes 5 --out realtime.png

For reports, and for hosts without Grafana. The places, titles, units and questions are the
dashboard's; the looks are not Grafana's.
"""

from __future__ import annotations

import argparse
import json
import re
import time
import urllib.parse
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

FOLDER = Path(__file__).resolve().parent / "dashboards"
COLUMNS, CELL_IN = 24, (0.72, 0.36)  # a grid cell in inches
UNITS = {"s": " s", "hertz": "/s", "percentunit": " %", "bytes": " MiB", "none": ""}
SCALES = {"percentunit": 100.0, "bytes": 2.0**-20}
Series = tuple[str, list[float], list[float]]  # legend, seconds from now, values


@dataclass(frozen=True)
class Source:
    """A Prometheus and the time that is looked at."""

    url: str
    end_s: float
    range_s: int
    rate_s: int = 20

    def _get(self, path: str, **parameters: str) -> list[dict[str, Any]]:
        address = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(address, timeout=30) as answer:
            return list(json.load(answer)["data"]["result"])

    def _filled(self, expr: str) -> str:
        known = {"$__rate_interval": f"{self.rate_s}s", "$__range": f"{self.range_s}s"}
        known["$instance"] = ".*"
        return re.sub(r"\$(?:__)?\w+", lambda match: known[match[0]], expr)

    def over_time(self, target: dict[str, Any]) -> list[Series]:
        """Return the curves of a query."""
        step_s = max(1.0, self.range_s / 240)
        found = self._get(
            "query_range",
            query=self._filled(target["expr"]),
            start=str(self.end_s - self.range_s),
            end=str(self.end_s),
            step=str(step_s),
        )
        return [
            (
                _legend(target.get("legendFormat", ""), series["metric"]),
                [float(t) - self.end_s for t, _ in series["values"]],
                [float(v) for _, v in series["values"]],
            )
            for series in found
        ]

    def now(self, target: dict[str, Any]) -> list[tuple[dict[str, str], float]]:
        """Return the samples of a query at the end."""
        found = self._get("query", query=self._filled(target["expr"]), time=str(self.end_s))
        return [(sample["metric"], float(sample["value"][1])) for sample in found]


def draw(board: dict[str, Any], source: Source) -> Figure:
    """Return the dashboard as a figure."""
    panels = board["panels"]
    height = max(p["gridPos"]["y"] + p["gridPos"]["h"] for p in panels)
    size = (COLUMNS * CELL_IN[0], height * CELL_IN[1] + 0.5)
    figure = plt.figure(figsize=size, dpi=80, facecolor="#f4f5f5")
    kinds = {"heatmap": _heat, "stat": _number, "table": _table, "barchart": _bars}
    for panel in panels:
        place = panel["gridPos"]
        left, top = place["x"] * CELL_IN[0] / size[0], (place["y"] * CELL_IN[1] + 0.45) / size[1]
        wide, high = place["w"] * CELL_IN[0] / size[0], place["h"] * CELL_IN[1] / size[1]
        if panel["type"] == "row":
            figure.text(0.006, 1 - top - high * 0.7, panel["title"], weight="bold", size=11)
            continue
        pad = (0.5 / size[0], 0.45 / size[1])
        box = (left + pad[0], 1 - top - high + pad[1], wide - 1.4 * pad[0], high - 1.9 * pad[1])
        axes = figure.add_axes(box)
        axes.set_title(panel["title"], size=9, loc="left", pad=3)
        axes.tick_params(labelsize=7)
        kinds.get(panel["type"], _lines)(axes, panel, source)
    figure.text(0.006, 1 - 0.3 / size[1], board["title"], size=14, weight="bold")
    return figure


def _unit(panel: dict[str, Any]) -> tuple[str, float]:
    unit = panel["fieldConfig"]["defaults"].get("unit", "none")
    return UNITS.get(unit, ""), SCALES.get(unit, 1.0)


def _lines(axes: Axes, panel: dict[str, Any], source: Source) -> None:
    unit, scale = _unit(panel)
    custom = panel["fieldConfig"]["defaults"].get("custom", {})
    stacked = custom.get("stacking", {}).get("mode") == "normal"
    found = [s for target in panel["targets"] for s in source.over_time(target)]
    floor: dict[float, float] = {}
    for legend, at, values in found:
        scaled = [v * scale for v in values]
        if stacked:
            low = [floor.get(t, 0.0) for t in at]
            scaled = [a + b for a, b in zip(low, scaled, strict=True)]
            axes.fill_between(at, low, scaled, alpha=0.3)
            floor |= dict(zip(at, scaled, strict=True))
        axes.plot(at, scaled, lw=1.2, label=legend)
    if custom.get("scaleDistribution", {}).get("type") == "log":
        axes.set_yscale("log")
    elif found:
        axes.set_ylim(bottom=0)
    axes.set_xlim(-source.range_s, 0)
    axes.set_ylabel(unit.strip(), size=7)
    axes.grid(alpha=0.3)
    if any(legend for legend, _, _ in found):
        axes.legend(fontsize=6, loc="upper left", ncols=2)


def _heat(axes: Axes, panel: dict[str, Any], source: Source) -> None:
    (target,) = panel["targets"]
    found = [s for s in source.over_time(target) if s[0] != "+Inf"]
    found.sort(key=lambda series: float(series[0]))
    if not found:
        return
    times = sorted({t for _, at, _ in found for t in at})
    table = np.zeros((len(found), len(times)))
    for i, (_, at, values) in enumerate(found):
        table[i, np.searchsorted(times, at)] = values
    table[1:] = np.diff(table, axis=0)
    used = np.flatnonzero(np.nansum(table, axis=1) > 0)
    first, last = (used[0], used[-1] + 1) if used.size else (0, len(found))
    image = np.where(table[first:last] > 0, table[first:last], np.nan)
    axes.pcolormesh(times, np.arange(last - first), image, norm=PowerNorm(0.5), cmap="turbo")
    axes.set_yticks(np.arange(last - first), [f"{float(s[0]):g}" for s in found[first:last]])
    axes.set_xlim(-source.range_s, 0)


def _number(axes: Axes, panel: dict[str, Any], source: Source) -> None:
    unit, scale = _unit(panel)
    values = [value * scale for target in panel["targets"] for _, value in source.now(target)]
    text = "   ".join(f"{value:.3g}{unit}" for value in values[:3]) or "no data"
    axes.text(0.5, 0.4, text, ha="center", va="center", size=15 if len(values) < 2 else 11)
    axes.set_axis_off()


def _joined(panel: dict[str, Any], source: Source) -> tuple[list[str], list[str], list[list[Any]]]:
    """Return labels, titles of the values, and the rows of a table of snapshots."""
    organize = panel["transformations"][-1]["options"]
    places, renamed = organize["indexByName"], organize["renameByName"]
    ordered = sorted(places, key=places.__getitem__)
    titles = [renamed[name] for name in ordered if name in renamed]
    labels = [name for name in ordered if name not in renamed]
    rows: dict[tuple[str, ...], list[Any]] = {}
    for number, target in enumerate(panel["targets"]):
        for metric, value in source.now(target):
            key = tuple(metric.get(label, "") for label in labels)
            rows.setdefault(key, [np.nan] * len(titles))[number] = value
    order = sorted(rows, key=lambda key: [(_number_of(k), k) for k in key])
    return labels, titles, [[*key, *rows[key]] for key in order]


def _number_of(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0


def _table(axes: Axes, panel: dict[str, Any], source: Source) -> None:
    labels, titles, rows = _joined(panel, source)
    axes.set_axis_off()
    if rows:
        text = [[c if isinstance(c, str) else f"{round(c, 9):.3g}" for c in row] for row in rows]
        table = axes.table(text[:14], colLabels=[*labels, *titles], loc="upper center")
        table.auto_set_font_size(False)
        table.set_fontsize(7)


def _bars(axes: Axes, panel: dict[str, Any], source: Source) -> None:
    _, titles, rows = _joined(panel, source)
    unit, scale = _unit(panel)
    width = 0.8 / max(1, len(titles))
    for i, title in enumerate(titles):
        heights = [float(row[1 + i]) * scale for row in rows]
        axes.bar(np.arange(len(rows)) + i * width, heights, width, label=title)
    axes.set_xticks(np.arange(len(rows)) + 0.4 - width / 2, [str(row[0]) for row in rows])
    axes.set_xlabel(panel["options"]["xField"], size=7)
    axes.set_ylabel(unit.strip(), size=7)
    axes.legend(fontsize=6)


def _legend(text: str, metric: dict[str, str]) -> str:
    return re.sub(r"\{\{(\w+)\}\}", lambda match: metric.get(match[1], ""), text).strip()


def main(argv: Sequence[str] | None = None) -> None:
    """Draw one dashboard into a PNG file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("board", choices=sorted(path.stem for path in FOLDER.glob("*.json")))
    parser.add_argument("--prometheus", default="http://127.0.0.1:9090", metavar="URL")
    parser.add_argument("--minutes", type=float, default=15.0, help="how much is shown")
    parser.add_argument("--ago", type=float, default=0.0, help="minutes from its end to now")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(argv)
    board = json.loads((FOLDER / f"{options.board}.json").read_text())
    source = Source(options.prometheus, time.time() - 60 * options.ago, round(60 * options.minutes))
    try:
        figure = draw(board, source)
    except OSError as error:
        parser.error(f"--prometheus: {options.prometheus} does not answer ({error})")
    figure.savefig(options.out)


if __name__ == "__main__":
    main()
