"""The plots of reports: fit for a page and for a paper; no display, no global figure.

Each is drawn once and kept as PNG, SVG and PDF (`Drawing`). Colours are Okabe and Ito's, which
everybody can tell apart, and lines differ in their marks too. Rates have axes from 0 to 100, and every
plot says how many trials it rests on and what its bars are.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_pdf import FigureCanvasPdf
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

INK, DIM, PALE = "#22303c", "#5b6b76", "#d5dde2"
BAR = "#56B4E9"  # light enough for an interval to be seen on it
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#4d4d4d")
MARKS = ("o", "s", "^", "D", "v", "P", "X")
WILSON = "95 % Wilson intervals"
BOOTSTRAP = "95 % bootstrap intervals"
DPI = 150
CHARACTERS_PER_INCH = 11.5  # of a title, beside a legend
# Without a date, so that the same numbers give the same file; text stays text in a PDF.
_SAVED: dict[str, dict[str, Any]] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
_STYLE: Any = {"svg.hashsalt": "openhelix", "pdf.fonttype": 42, "svg.fonttype": "path"}


@dataclass(frozen=True, slots=True)
class Drawing:
    """One plot in the three formats."""

    png: bytes
    svg: bytes
    pdf: bytes

    def files(self, stem: str) -> dict[str, bytes]:
        """Return the contents of `stem`.png, .svg and .pdf by their names."""
        return {f"{stem}.{kind}": getattr(self, kind) for kind in ("png", "svg", "pdf")}


def drawing(figure: Figure) -> Drawing:
    """Return a figure in all formats; the same figure gives the same bytes."""
    canvases: dict[str, Any] = {
        "png": FigureCanvasAgg,
        "svg": FigureCanvasSVG,
        "pdf": FigureCanvasPdf,
    }
    made = {}
    with rc_context(_STYLE):
        for kind, canvas in canvases.items():
            stream = io.BytesIO()
            more = {"metadata": _SAVED[kind]} if kind in _SAVED else {}
            canvas(figure).print_figure(stream, format=kind, dpi=DPI, **more)
            made[kind] = stream.getvalue()
    return Drawing(**made)


def trials(numbers: Sequence[int], what: str) -> str:
    """Return how many trials a plot rests on: "n = 12 episodes each", or their range."""
    low, high = min(numbers, default=0), max(numbers, default=0)
    if low == high:
        return f"n = {low} {what}" + (" each" if len(numbers) > 1 else "")
    return f"n = {low} to {high} {what} each"


def axes_of(width: float, height: float, title: str, note: str) -> tuple[Figure, Any]:
    """Return a figure with one pair of axes, its title above and what it rests on below."""
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(colors=INK, labelsize=8)
    wrapped = textwrap.fill(title, round(CHARACTERS_PER_INCH * width))
    figure.suptitle(wrapped, fontsize=9.5, color=INK, x=0.01, ha="left")
    figure.supxlabel(note, fontsize=7.5, color=DIM, x=0.01, ha="left")
    return figure, axes


def rates(rows: Mapping[str, Mapping[str, Any]], title: str) -> Drawing:
    """Return horizontal bars of success rates with their intervals."""
    rows = {name: row for name, row in rows.items() if row["n_episodes"]}
    numbers = [row["n_episodes"] for row in rows.values()]
    note = f"{trials(numbers, 'attempts')}; lines: {WILSON}"
    figure, axes = axes_of(6.6, 1.1 + 0.21 * len(rows), title, note)
    y = np.arange(len(rows))[::-1]
    values = np.array([row["success_rate"] for row in rows.values()])
    limits = np.array([row["ci95"] for row in rows.values()])
    errors = np.clip(np.stack((values - limits[:, 0], limits[:, 1] - values)), 0, None)
    axes.barh(y, 100 * values, color=BAR, height=0.66)
    axes.errorbar(100 * values, y, xerr=100 * errors, fmt="none", ecolor=INK, elinewidth=1)
    varied = len(set(numbers)) > 1
    names = [f"{name} ({n})" if varied else name for name, n in zip(rows, numbers, strict=True)]
    axes.set_yticks(y, names, fontsize=8)
    axes.set_xlim(0, 100)
    axes.set_ylim(-0.7, len(rows) - 0.3)
    axes.set_xlabel("success (%)", fontsize=8)
    axes.grid(axis="x", color=PALE, lw=0.5)
    axes.set_axisbelow(True)
    return drawing(figure)


def chain(
    reached: Sequence[float], limits: Sequence[Sequence[float]], title: str, n: int
) -> Drawing:
    """Return the rates of 1 to 5 tasks in a row with their intervals, over `n` chains."""
    figure, axes = axes_of(4.4, 2.8, title, f"{trials([n], 'chains')}; bars: {WILSON}")
    x = np.arange(1, len(reached) + 1)
    values, bounds = np.array(reached), np.array(limits)
    errors = np.clip(np.stack((values - bounds[:, 0], bounds[:, 1] - values)), 0, None)
    axes.bar(x, 100 * values, color=BAR, width=0.66)
    axes.errorbar(x, 100 * values, yerr=100 * errors, fmt="none", ecolor=INK, elinewidth=1)
    axes.set_xticks(x)
    axes.set_ylim(0, 100)
    axes.set_xlabel("tasks in a row", fontsize=8)
    axes.set_ylabel("chains (%)", fontsize=8)
    axes.grid(axis="y", color=PALE, lw=0.5)
    axes.set_axisbelow(True)
    return drawing(figure)


def lines(
    series: Mapping[str, Sequence[tuple[float, float, float, float]]],
    x_label: str,
    y_label: str,
    title: str,
    note: str,
    ticks: Sequence[float] = (),
    top: float | None = None,
    even: bool = False,
) -> Drawing:
    """Return lines of (x, y, low, high), one for each name.

    Several lines stand a little beside each other, so that all intervals can be seen.

    Args:
        series: points by name.
        x_label, y_label: of the axes, with units.
        title: above.
        note: below: trials and intervals.
        ticks: of the x axis.
        top: of the y axis; None as high as the data.
        even: an x axis that is even and may begin at 0, instead of a logarithmic one.
    """
    figure, axes = axes_of(6.0, 3.8, title, note)
    for number, (name, points) in enumerate(series.items()):
        data = np.array(points, np.float64)
        aside = number - (len(series) - 1) / 2
        x = data[:, 0] + 0.008 * max(ticks) * aside if even else data[:, 0] * 1.04**aside
        errors = np.clip(np.stack((data[:, 1] - data[:, 2], data[:, 3] - data[:, 1])), 0, None)
        style = _line(number) | {"elinewidth": 1.2, "capsize": 2}
        axes.errorbar(x, data[:, 1], yerr=errors, label=name, **style)
    axes.set_ylim(0, top)
    axes.set_xscale("linear" if even else "log")
    axes.set_xticks(list(ticks), [f"{tick:.2g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel(x_label, fontsize=8)
    axes.set_ylabel(y_label, fontsize=8)
    axes.grid(color=PALE, lw=0.5)
    if len(series) > 1:
        axes.legend(fontsize=8, frameon=False, loc="best")
    return drawing(figure)


def _line(number: int) -> dict[str, Any]:
    return {
        "lw": 1.6,
        "ms": 4.5,
        "color": COLOURS[number % len(COLOURS)],
        "fmt": f"{MARKS[number % len(MARKS)]}-",
    }


def panels(
    parts: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]],
    x_label: str,
    title: str,
    note: str,
    ticks: Sequence[float],
) -> Drawing:
    """Return small plots of (x, y) in rows of three, the same lines in each, from 0 upwards.

    Args:
        parts: points by the name of their line, by what y is.
        x_label: of all, with its unit.
        title: above.
        note: below.
        ticks: of the x axes.
    """
    height = -(-len(parts) // 3)
    figure = Figure(figsize=(7.6, 0.9 + 1.9 * height), dpi=DPI, layout="constrained")
    figure.suptitle(title, fontsize=9.5, color=INK, x=0.01, ha="left")
    figure.supxlabel(note, fontsize=7.5, color=DIM, x=0.01, ha="left")
    for place, (what, series) in enumerate(parts.items(), 1):
        axes = figure.add_subplot(height, 3, place)
        for number, (name, points) in enumerate(series.items()):
            style = _line(number)
            axes.plot(*zip(*points, strict=True), style.pop("fmt"), label=name, **style)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        axes.tick_params(colors=INK, labelsize=7)
        axes.set_title(what, fontsize=8, color=INK, loc="left")
        axes.set_xticks(list(ticks), [f"{tick:.2g}" for tick in ticks])
        highest = max(y for points in series.values() for _, y in points)
        axes.set_ylim(0, 1.1 * highest or 1.0)
        axes.set_xlabel(x_label, fontsize=7)
        axes.grid(color=PALE, lw=0.5)
        if place == 1 and len(series) > 1:
            axes.legend(fontsize=7, frameon=False, loc="best")
    return drawing(figure)


def beside(
    names: Sequence[str],
    ours: Sequence[tuple[float, float, float]],
    theirs: Sequence[float | None],
    x_label: str,
    title: str,
    note: str,
    top: float | None = None,
) -> Drawing:
    """Return horizontal bars of (value, low, high) with published values as marks beside them."""
    figure, axes = axes_of(7.6, 1.5 + 0.36 * len(names), title, note)
    y = np.arange(len(names))[::-1]
    data = np.array(ours, np.float64)
    errors = np.clip(np.stack((data[:, 0] - data[:, 1], data[:, 2] - data[:, 0])), 0, None)
    axes.barh(y, data[:, 0], color=BAR, height=0.6, label="ours")
    axes.errorbar(data[:, 0], y, xerr=errors, fmt="none", ecolor=INK, elinewidth=1)
    marks = [(v, at) for v, at in zip(theirs, y, strict=True) if v is not None]
    if marks:
        axes.plot(*zip(*marks, strict=True), "D", color=COLOURS[1], ms=6, label="paper")
        figure.legend(fontsize=8, frameon=False, loc="outside upper right", ncols=2)
    axes.set_yticks(y, list(names), fontsize=8)
    axes.set_xlim(0, top)
    axes.set_xlabel(x_label, fontsize=8)
    axes.grid(axis="x", color=PALE, lw=0.5)
    axes.set_axisbelow(True)
    return drawing(figure)


def differences(
    rows: Mapping[str, Mapping[str, Any]], x_label: str, title: str, note: str, scale: float
) -> Drawing:
    """Return B minus A with its interval for each name; what does not touch 0 is filled."""
    figure, axes = axes_of(6.6, 1.2 + 0.22 * len(rows), title, note)
    y = np.arange(len(rows))[::-1]
    for at, row in zip(y, rows.values(), strict=True):
        value = scale * row["difference"]
        low, high = (scale * limit for limit in row["ci95"])
        clear = low > 0 or high < 0
        colour = COLOURS[0] if value > 0 else COLOURS[1] if value < 0 else DIM
        axes.plot([low, high], [at, at], "-", color=colour, lw=1.4)
        axes.plot([value], [at], "o", color=colour, ms=5, mfc=colour if clear else "white")
    axes.axvline(0, color=INK, lw=0.8)
    axes.set_yticks(y, list(rows), fontsize=8)
    axes.set_ylim(-0.7, len(rows) - 0.3)
    left, right = axes.get_xlim()  # at least a tenth: what is no difference must not look like one
    axes.set_xlim(min(left, -0.1 * scale), max(right, 0.1 * scale))
    axes.set_xlabel(x_label, fontsize=8)
    axes.grid(axis="x", color=PALE, lw=0.5)
    return drawing(figure)
