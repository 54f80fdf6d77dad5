"""The drawing of figure 5: what System 2 saw, the words nearest to its latent, words of space."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.dsvlabench.plots import BAR, COLOURS, INK, PALE, png
from runtime.types import U8

SHOWN = 6


def draw(made: Mapping[str, Any], moved: Sequence[U8], shift_at: int, title: str) -> bytes:
    """Return the figure as PNG.

    Args:
        made: what `latent_probe.probe` returned.
        moved: images of the first start's episode, one a row of `made["episode"]`.
        shift_at: step at which the block was moved.
        title: of the figure.
    """
    episode = made["episode"]
    figure = Figure(figsize=(11, 7.6), dpi=100, layout="constrained")
    halves: Any = figure.subfigures(2, 1, height_ratios=(1.35, 1.0))
    above, below = halves
    grid = above.add_gridspec(2, SHOWN, height_ratios=(1.0, 0.85))
    sides = below.add_gridspec(1, 2, width_ratios=(1.7, 1.0))
    left, right = below.add_subplot(sides[0]), below.add_subplot(sides[1])
    chosen = np.linspace(0, len(episode) - 1, SHOWN).round().astype(int)
    after = next((i for i, row in enumerate(episode) if row["step"] >= shift_at), 1)
    chosen[1] = after
    for column, row in enumerate(chosen):
        picture = above.add_subplot(grid[0, column])
        picture.imshow(moved[row])
        picture.set_axis_off()
        picture.set_title(f"step {episode[row]['step']}", fontsize=9, color=INK)
        words = above.add_subplot(grid[1, column])
        words.set_axis_off()
        lines = [f"{n['word'][:14]} {n['cosine']:.2f}" for n in episode[row]["nearest"][:10]]
        words.text(0.02, 1.0, "\n".join(lines), va="top", fontsize=8, color=INK)
    steps = [row["step"] for row in episode]
    for number, word in enumerate(made["words"]):
        colour = COLOURS[number % len(COLOURS)]
        style = "-" if number < len(COLOURS) else "--"
        values = [row["probability"][word] for row in episode]
        left.plot(steps, values, style, color=colour, label=word, lw=1.5)
    left.axvline(shift_at, color=INK, lw=0.8, ls=":")
    left.set_xlabel("environment step (dotted: the block is moved)", fontsize=9)
    left.set_ylabel("share among these words", fontsize=9)
    left.set_ylim(bottom=0)
    left.legend(fontsize=7, ncols=2, frameon=False)
    left.grid(color=PALE, lw=0.5)
    names = list(made["distances"])
    means = [float(np.mean(made["distances"][n])) for n in names]
    at = np.arange(len(names))[::-1]
    right.barh(at, means, color=BAR, height=0.6)
    for y, name in zip(at, names, strict=True):
        values = made["distances"][name]
        right.plot(values, [y] * len(values), ".", color=INK, ms=3)
    right.set_yticks(at, names, fontsize=8)
    right.locator_params(axis="x", nbins=3)  # small numbers are long
    right.set_xlabel("1 - cosine of the latent (dots: starts)", fontsize=9)
    right.set_title("what moves the latent", fontsize=9, color=INK, loc="left")
    figure.suptitle(title, fontsize=10, color=INK)
    return png(figure)
