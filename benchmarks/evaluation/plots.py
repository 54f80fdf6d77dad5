"""The plots of the reports, as PNG; no display, no global figure."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

INK, BAR, PALE = "#22303c", "#2a7f9e", "#c8d6dd"
COLOURS = ("#2a7f9e", "#c4622d", "#5b8c3a", "#7a4f9a", "#b08d1a", "#9a3b52", "#4a5a66")


def png(figure: Figure) -> bytes:
    """Return a figure as PNG."""
    stream = io.BytesIO()
    FigureCanvasAgg(figure).print_png(stream)
    return stream.getvalue()


def _figure(width: float, height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(colors=INK, labelsize=8)
    return figure, axes


def rates(rows: Mapping[str, Mapping[str, Any]], title: str) -> bytes:
    """Return horizontal bars of success rates with their intervals."""
    rows = {name: row for name, row in rows.items() if row["n_episodes"]}
    figure, axes = _figure(7.0, 0.9 + 0.24 * len(rows))
    y = np.arange(len(rows))[::-1]
    values = np.array([row["success_rate"] for row in rows.values()])
    limits = np.array([row["ci95"] for row in rows.values()])
    errors = np.clip(np.stack((values - limits[:, 0], limits[:, 1] - values)), 0, None)
    axes.barh(y, 100 * values, color=BAR, height=0.68)
    axes.errorbar(100 * values, y, xerr=100 * errors, fmt="none", ecolor=INK, elinewidth=1)
    axes.set_yticks(y, list(rows), fontsize=8)
    axes.set_xlim(0, 100)
    axes.set_ylim(-0.7, len(rows) - 0.3)
    axes.set_xlabel("success, % (95 % Wilson interval)", fontsize=8)
    axes.set_title(title, fontsize=9, color=INK, loc="left")
    return png(figure)


def chain(reached: Sequence[float], limits: Sequence[Sequence[float]], title: str) -> bytes:
    """Return the rates of 1 to 5 tasks in a row with their intervals."""
    figure, axes = _figure(4.6, 2.8)
    x = np.arange(1, len(reached) + 1)
    values, bounds = np.array(reached), np.array(limits)
    errors = np.clip(np.stack((values - bounds[:, 0], bounds[:, 1] - values)), 0, None)
    axes.bar(x, 100 * values, color=BAR, width=0.66)
    axes.errorbar(x, 100 * values, yerr=100 * errors, fmt="none", ecolor=INK, elinewidth=1)
    axes.set_xticks(x)
    axes.set_ylim(0, 100)
    axes.set_xlabel("tasks in a row", fontsize=8)
    axes.set_ylabel("chains, %", fontsize=8)
    axes.set_title(title, fontsize=9, color=INK, loc="left")
    return png(figure)


def lines(
    series: Mapping[str, Sequence[tuple[float, float, float, float]]],
    x_label: str,
    y_label: str,
    title: str,
    ticks: Sequence[float] = (),
) -> bytes:
    """Return lines of (x, y, low, high) on a logarithmic x axis, one for each name.

    Several lines stand a little beside each other, so that all intervals can be seen.
    """
    figure, axes = _figure(6.2, 3.8)
    for number, (name, points) in enumerate(series.items()):
        data = np.array(points, np.float64)
        colour = COLOURS[number % len(COLOURS)]
        x = data[:, 0] * 1.04 ** (number - (len(series) - 1) / 2)
        errors = np.clip(np.stack((data[:, 1] - data[:, 2], data[:, 3] - data[:, 1])), 0, None)
        style: dict[str, Any] = {"fmt": "o-", "lw": 1.6, "ms": 4, "elinewidth": 1.2, "capsize": 2}
        axes.errorbar(x, data[:, 1], yerr=errors, color=colour, label=name, **style)
    axes.set_ylim(bottom=0)
    axes.set_xscale("log")
    axes.set_xticks(list(ticks), [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel(x_label, fontsize=8)
    axes.set_ylabel(y_label, fontsize=8)
    axes.set_title(title, fontsize=9, color=INK, loc="left")
    axes.grid(color=PALE, lw=0.5)
    figure.legend(fontsize=8, frameon=False, loc="outside lower center", ncols=len(series))
    return png(figure)


def beside(
    names: Sequence[str],
    ours: Sequence[tuple[float, float, float]],
    theirs: Sequence[float | None],
    y_label: str,
    title: str,
) -> bytes:
    """Return horizontal bars of (value, low, high) with published values as marks beside them."""
    figure, axes = _figure(8.6, 1.3 + 0.4 * len(names))
    y = np.arange(len(names))[::-1]
    data = np.array(ours, np.float64)
    errors = np.clip(np.stack((data[:, 0] - data[:, 1], data[:, 2] - data[:, 0])), 0, None)
    axes.barh(y, data[:, 0], color=BAR, height=0.6, label="ours, 95 % interval")
    axes.errorbar(data[:, 0], y, xerr=errors, fmt="none", ecolor=INK, elinewidth=1)
    marks = [(v, at) for v, at in zip(theirs, y, strict=True) if v is not None]
    if marks:
        axes.plot(*zip(*marks, strict=True), "D", color=COLOURS[1], ms=6, label="paper")
    axes.set_yticks(y, list(names), fontsize=8)
    axes.set_xlim(left=0)
    axes.set_xlabel(y_label, fontsize=8)
    axes.set_title(title, fontsize=9, color=INK, loc="left")
    figure.legend(fontsize=8, frameon=False, loc="outside lower center", ncols=2)
    return png(figure)
