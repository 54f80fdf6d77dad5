"""Draws a dashboard without Grafana: its own queries, put to a Prometheus, with matplotlib.

    python -m openhelix.deploy.grafana.picture realtime --minutes 5 --out realtime.png

For reports, and for hosts without Grafana. Places, titles, units and questions are the dashboard's,
and the colours are Grafana's dark theme, so that one finds in Grafana what one saw here; but it is a
drawing, and says so. A row in which nothing has data (a GPU's on a host without one) is left out.
"""

from __future__ import annotations

import argparse
import json
import re
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from matplotlib.ticker import FuncFormatter, MaxNLocator

FOLDER = Path(__file__).resolve().parent / "dashboards"
COLUMNS, CELL_IN, GAP_IN = 24, (0.62, 0.36), 0.06  # a grid cell in inches
# Grafana's dark theme and its classic palette.
PAGE, PANEL, EDGE, TEXT, FAINT = "#111217", "#181b1f", "#2c2f36", "#ccccdc", "#8e8e9c"
PALETTE = ("#73bf69", "#f2cc0c", "#8ab8ff", "#ff780a", "#f2495c", "#5794f2", "#b877d9", "#ffa6b0")
NAMED = {
    "green": "#73bf69",
    "orange": "#ff9830",
    "red": "#f2495c",
    "text": TEXT,
    "yellow": "#fade2a",
}
STYLE = {
    "font.size": 8,
    "text.color": TEXT,
    "axes.facecolor": PANEL,
    "axes.edgecolor": EDGE,
    "axes.labelcolor": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "grid.color": EDGE,
    "legend.frameon": False,
}
Series = tuple[str, list[float], list[float]]  # legend, seconds from the end, values


def say(value: float, unit: str) -> str:
    """Return a value as Grafana writes it: "27.1 ms", "98.2 %", "1.21 GiB", "29.9 Hz"."""
    if not np.isfinite(value):
        return "-"
    if unit == "percentunit":
        return f"{100 * value:.3g} %"
    if unit == "s":
        size, name = next(
            ((s, n) for s, n in ((1, "s"), (1e-3, "ms")) if abs(value) >= s), (1e-6, "µs")
        )
        return f"{value / size:.3g} {name}" if value else "0 s"
    if unit == "bytes":
        power = int(np.clip(np.log2(max(abs(value), 1.0)) // 10, 0, 4))
        return f"{value / 1024**power:.3g} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"
    name = " Hz" if unit == "hertz" else unit.removeprefix("suffix:") if ":" in unit else ""
    return (f"{value:,.0f}" if float(value).is_integer() else f"{value:.3g}") + name


@dataclass(frozen=True)
class Source:
    """A Prometheus and the time that is looked at."""

    url: str
    end_s: float
    range_s: int
    rate_s: int = 20
    answers: dict[str, list[Any]] = field(default_factory=dict, compare=False)

    @property
    def step_s(self) -> float:
        """Seconds between the points of a curve."""
        return max(1.0, self.range_s / 240)

    def _get(self, path: str, **parameters: str) -> list[dict[str, Any]]:
        address = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        if address not in self.answers:
            with urllib.request.urlopen(address, timeout=30) as answer:
                self.answers[address] = list(json.load(answer)["data"]["result"])
        return self.answers[address]

    def _filled(self, expr: str) -> str:
        known = {"$__rate_interval": f"{self.rate_s}s", "$__range": f"{self.range_s}s"}
        known["$instance"] = ".*"
        return re.sub(r"\$(?:__)?\w+", lambda match: known[match[0]], expr)

    def over_time(self, target: dict[str, Any]) -> list[Series]:
        """Return the curves of a query."""
        found = self._get(
            "query_range",
            query=self._filled(target["expr"]),
            start=str(self.end_s - self.range_s),
            end=str(self.end_s),
            step=str(self.step_s),
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
    with rc_context(STYLE):
        return _draw(board, source)


def _draw(board: dict[str, Any], source: Source) -> Figure:
    panels = _shown(board["panels"], source)
    height = max(p["gridPos"]["y"] + p["gridPos"]["h"] for p in panels)
    size = (COLUMNS * CELL_IN[0], height * CELL_IN[1] + 0.75)
    figure = Figure(figsize=size, dpi=100, facecolor=PAGE)
    FigureCanvasAgg(figure)
    for panel in panels:
        place = panel["gridPos"]
        left, top = place["x"] * CELL_IN[0] / size[0], (place["y"] * CELL_IN[1] + 0.5) / size[1]
        wide, high = place["w"] * CELL_IN[0] / size[0], place["h"] * CELL_IN[1] / size[1]
        if panel["type"] == "row":
            figure.text(0.006, 1 - top - high * 0.65, f"⌄  {panel['title']}", size=10)
            continue
        gap = (GAP_IN / size[0], GAP_IN / size[1])
        box = (left + gap[0], 1 - top - high + gap[1], wide - 2 * gap[0], high - 2 * gap[1])
        figure.add_artist(
            FancyBboxPatch(
                *(box[:2], box[2], box[3]),
                **{"boxstyle": "square,pad=0", "fc": PANEL, "ec": EDGE, "lw": 0.8},
                zorder=-1,  # axes are at 0: what a panel shows lies on it
            )
        )
        title = box[1] + box[3] - 0.2 / size[1]
        figure.text(box[0] + 0.1 / size[0], title, panel["title"], size=9)
        _fill(figure, panel, source, box, size)
    figure.text(0.006, 1 - 0.32 / size[1], board["title"], size=13)
    ours = "drawn from the dashboard's queries by openhelix.deploy.grafana.picture, not by Grafana"
    figure.text(0.994, 1 - 0.32 / size[1], ours, size=8, color=FAINT, ha="right")
    minutes, seconds = divmod(source.range_s, 60)
    last = f"last {minutes} min" if not seconds else f"last {minutes}:{seconds:02d} min"
    figure.text(0.994, 0.08 / size[1], last, color=FAINT, ha="right")
    return figure


def _shown(panels: Sequence[dict[str, Any]], source: Source) -> list[dict[str, Any]]:
    """Return the panels without rows in which nothing has data, those below moved up."""
    rows: list[list[dict[str, Any]]] = []
    for panel in panels:
        if panel["type"] == "row" or not rows:
            rows.append([])
        rows[-1].append(panel)
    shown: list[dict[str, Any]] = []
    gone = 0
    for row in rows:
        first = min(p["gridPos"]["y"] for p in row)
        last = max(p["gridPos"]["y"] + p["gridPos"]["h"] for p in row)
        if not any(_has_data(p, source) for p in row if p["type"] != "row"):
            gone += last - first
            continue
        shown += [{**p, "gridPos": {**p["gridPos"], "y": p["gridPos"]["y"] - gone}} for p in row]
    return shown or list(panels)


def _has_data(panel: dict[str, Any], source: Source) -> bool:
    ask = source.now if panel["type"] in ("table", "barchart", "trend") else source.over_time
    return any(ask(target) for target in panel["targets"])


def _fill(
    figure: Figure,
    panel: dict[str, Any],
    source: Source,
    box: tuple[float, float, float, float],
    size: tuple[float, float],
) -> None:
    """Draw what a panel shows, or what it means that it shows nothing."""
    kinds: dict[str, Callable[[Axes, dict[str, Any], Source], None]] = {
        "heatmap": _heat,
        "stat": _number,
        "table": _table,
        "barchart": _bars,
        "trend": _trend,
        "state-timeline": _states,
    }
    whole = panel["type"] in ("stat", "table")
    pads = (0.1, 0.1, 0.1, 0.32) if whole else (0.62, 0.3, 0.15, 0.36)  # left, below, right, above
    x, y = box[0] + pads[0] / size[0], box[1] + pads[1] / size[1]
    wide = box[2] - (pads[0] + pads[2]) / size[0]
    axes = figure.add_axes((x, y, wide, box[3] - (pads[1] + pads[3]) / size[1]))
    if _has_data(panel, source):
        kinds.get(panel["type"], _lines)(axes, panel, source)
    else:
        axes.set_axis_off()
        text = panel["fieldConfig"]["defaults"].get("noValue", "no data")
        axes.text(0.5, 0.5, text, ha="center", va="center", color=FAINT, wrap=True)


def _unit(panel: dict[str, Any]) -> str:
    defaults = panel["fieldConfig"]["defaults"]
    return str(defaults.get("unit") or panel["options"].get("yAxis", {}).get("unit", "none"))


def _over_time(axes: Axes, source: Source) -> None:
    """Label the time axis with minutes and seconds before the end."""
    axes.set_xlim(-source.range_s, 0)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 1.5, 2, 3, 6, 10]))
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda t, _: f"-{int(-t) // 60}:{int(-t) % 60:02d}" if t < 0 else "end")
    )


def _custom(panel: dict[str, Any], name: str) -> dict[str, Any]:
    """Return what is overridden for a curve."""
    return {
        p["id"]: p["value"]
        for o in panel["fieldConfig"].get("overrides", [])
        if o["matcher"]["options"] == name
        for p in o["properties"]
    }


def _lines(axes: Axes, panel: dict[str, Any], source: Source) -> None:
    unit = _unit(panel)
    custom = panel["fieldConfig"]["defaults"].get("custom", {})
    stacked = custom.get("stacking", {}).get("mode") == "normal"
    found = [s for target in panel["targets"] for s in source.over_time(target)]
    curves = {legend: (at, values) for legend, at, values in found}
    floor: dict[float, float] = {}
    for number, (legend, at, values) in enumerate(found):
        colour, own = PALETTE[number % len(PALETTE)], _custom(panel, legend)
        if "custom.fillBelowTo" in own:
            low = dict(zip(*curves.get(own["custom.fillBelowTo"], ([], [])), strict=True))
            both = [(t, low[t], v) for t, v in zip(at, values, strict=True) if t in low]
            if both:
                axes.fill_between(*zip(*both, strict=True), color=TEXT, alpha=0.15, lw=0)
        if own.get("custom.lineWidth") == 0:
            continue
        if stacked:
            low_values = [floor.get(t, 0.0) for t in at]
            values = [a + b for a, b in zip(low_values, values, strict=True)]
            axes.fill_between(at, low_values, values, color=colour, alpha=0.3, lw=0)
            floor |= dict(zip(at, values, strict=True))
        axes.plot(at, values, lw=1.2, color=colour, label=legend)
    if custom.get("scaleDistribution", {}).get("type") == "log":
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0, top=panel["fieldConfig"]["defaults"].get("max"))
        axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: say(value, unit)))
    _over_time(axes, source)
    axes.grid(lw=0.6)
    names = [label for label in axes.get_legend_handles_labels()[1] if label]
    if names:
        columns = 1 if max(map(len, names)) > 30 else 2 if len(names) < 7 else 3
        axes.legend(fontsize=7, loc="best", ncols=columns, handlelength=1.2)


def _heat(axes: Axes, panel: dict[str, Any], source: Source) -> None:
    (target,) = panel["targets"]
    unit = _unit(panel)
    found = [s for s in source.over_time(target) if s[0] != "+Inf"]
    found.sort(key=lambda series: float(series[0]))
    times = sorted({t for _, at, _ in found for t in at})
    table = np.zeros((len(found), len(times)))
    for i, (_, at, values) in enumerate(found):
        table[i, np.searchsorted(times, at)] = values
    table[1:] = np.diff(table, axis=0)
    used = np.flatnonzero(np.nansum(table, axis=1) > 0)
    first, last = (used[0], used[-1] + 1) if used.size else (0, len(found))
    image = np.where(table[first:last] > 0, table[first:last], np.nan)
    scheme = colormaps[panel["options"]["color"]["scheme"].lower()]
    # Edges, not middles: of a single bucket or moment matplotlib cannot guess them.
    step = (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else source.step_s
    across = np.append(times, times[-1] + step) - step / 2
    up = np.arange(last - first + 1) - 0.5
    axes.pcolormesh(across, up, image, norm=PowerNorm(0.5), cmap=scheme)
    names = [say(float(s[0]), unit) for s in found[first:last]]
    axes.set_yticks(np.arange(last - first), names)
    _over_time(axes, source)


def _number(axes: Axes, panel: dict[str, Any], source: Source) -> None:
    """Draw the newest values large, over a small curve of each."""
    axes.set_axis_off()
    unit = _unit(panel)
    found = [s for target in panel["targets"] for s in source.over_time(target)][:3]
    steps = panel["fieldConfig"]["defaults"]["thresholds"]["steps"]
    for number, (_, at, values) in enumerate(found):
        newest = values[-1]
        passed = [s for s in steps if s["value"] is None or newest >= s["value"]]
        colour = NAMED.get(passed[-1]["color"], TEXT)
        left, wide = number / len(found), 1 / len(found)
        area = axes.inset_axes((left, 0.0, wide, 0.42))
        area.set_axis_off()
        area.fill_between(at, 0, values, color=colour, alpha=0.18, lw=0)
        area.plot(at, values, color=colour, lw=1)
        area.set_xlim(-source.range_s, 0)
        area.set_ylim(bottom=0)
        size = 17 if len(found) == 1 else 13
        text = say(newest, unit)
        axes.text(left + wide / 2, 0.7, text, ha="center", va="center", size=size, color=colour)


def _states(axes: Axes, panel: dict[str, Any], source: Source) -> None:
    """Draw which state held when, a bar for each series."""
    (target,) = panel["targets"]
    shown = panel["fieldConfig"]["defaults"]["mappings"][0]["options"]
    found = source.over_time(target)
    for row, (_, at, values) in enumerate(found):
        each = at[1] - at[0] if len(at) > 1 else 1.0
        for t, value in zip(at, values, strict=True):
            one = shown.get(f"{value:.0f}", {"color": "text"})
            colour = NAMED.get(one["color"], TEXT)
            axes.barh(row, each, left=t - each, height=0.7, color=colour, alpha=0.8, lw=0)
    for number, one in enumerate(shown.values()):
        place = (0.02 + 0.12 * number, -0.02)
        axes.text(*place, one["text"], transform=axes.transAxes, size=7, color=NAMED[one["color"]])
    axes.set_yticks(range(len(found)), [name.replace(":", "\n:") for name, _, _ in found], size=7)
    axes.set_ylim(-0.9, len(found) - 0.4)
    _over_time(axes, source)


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


def _units(panel: dict[str, Any]) -> dict[str, str]:
    """Return the unit of every column that has one of its own."""
    return {
        o["matcher"]["options"]: str(p["value"])
        for o in panel["fieldConfig"]["overrides"]
        for p in o["properties"]
        if p["id"] == "unit"
    }


def _table(axes: Axes, panel: dict[str, Any], source: Source) -> None:
    labels, titles, rows = _joined(panel, source)
    axes.set_axis_off()
    units, columns = _units(panel), [*labels, *titles]
    fitting = max(1, int(panel["gridPos"]["h"] * CELL_IN[1] / 0.25) - 2)
    step = 1 / (fitting + 1)
    written = [
        [title]
        + [
            cell if isinstance(cell, str) else say(float(cell), units.get(title, "none"))
            for cell in (row[column] for row in rows[:fitting])
        ]
        for column, title in enumerate(columns)
    ]
    # Every column as wide as its longest text, at least as wide as a figure.
    widths = [max(8, *map(len, column)) for column in written]
    for column, texts in enumerate(written):
        x = sum(widths[:column]) / sum(widths)
        for number, text in enumerate(texts):
            colour = "#6e9fff" if number == 0 else TEXT
            axes.text(x, 1 - (number + 0.5) * step, text, color=colour, size=8, va="center")
    for number in range(min(fitting, len(rows)) + 1):
        axes.axhline(1 - (number + 1) * step, color=EDGE, lw=0.7)
    axes.set(xlim=(0, 1), ylim=(0, 1))


def _bars(axes: Axes, panel: dict[str, Any], source: Source) -> None:
    _, _, rows = _joined(panel, source)
    unit = _unit(panel)
    heights = [float(row[-1]) for row in rows]
    drawn = axes.bar(np.arange(len(rows)), heights, 0.65, color=PALETTE[0], alpha=0.7)
    axes.bar_label(drawn, [say(v, unit) for v in heights], color=TEXT, size=8, padding=2)
    axes.set_xticks(np.arange(len(rows)), [str(row[0]) for row in rows])
    axes.set_xlabel(panel["options"]["xField"], size=8)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: say(value, unit)))
    axes.margins(y=0.12)
    axes.grid(axis="y", lw=0.6)


def _trend(axes: Axes, panel: dict[str, Any], source: Source) -> None:
    _, titles, rows = _joined(panel, source)
    unit = _unit(panel)
    at = [_number_of(row[0]) for row in rows]
    if len(titles) == 3:
        low, high = ([float(row[i]) for row in rows] for i in (2, 3))
        axes.fill_between(at, low, high, color=TEXT, alpha=0.15, lw=0, label="95 %")
        axes.set_ylim(top=1.02)
    values = [float(row[1]) for row in rows]
    axes.plot(at, values, marker="o", color=PALETTE[0], lw=1.6, label=titles[0])
    axes.set_ylim(bottom=0)
    axes.set_xticks(at, [f"{x:g}" for x in at])
    axes.set_xlabel(panel["options"]["xField"], size=8)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: say(value, unit)))
    axes.grid(lw=0.6)
    axes.legend(fontsize=7)


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
