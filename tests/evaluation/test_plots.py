"""The plots of reports: three formats, the same bytes again, and what they rest on written below."""

from __future__ import annotations

import re

import pytest

from openhelix.benchmarks.evaluation import plots
from openhelix.benchmarks.evaluation.plots import Drawing, trials

ROW = {"success_rate": 0.5, "ci95": [0.2, 0.8], "n_episodes": 6}
DIFFERENCE = {"difference": -0.2, "ci95": [-0.4, -0.1], "n": 9}
DRAWN = {
    "rates": lambda: plots.rates({"open_drawer": ROW, "turn_on_led": ROW}, "By task"),
    "chain": lambda: plots.chain([0.9, 0.5], [[0.7, 1.0], [0.3, 0.7]], "In a row", 20),
    "lines": lambda: plots.lines(
        {"a": [(0.1, 50, 40, 60), (1.0, 40, 30, 50)], "b": [(0.1, 20, 10, 30)]},
        *("time (s)", "success (%)", "Sweep", "n = 9 episodes each", (0.1, 1.0), 100.0),
    ),
    "beside": lambda: plots.beside(
        ["x"], [(3.0, 2.0, 4.0)], [3.5], "tasks in a row", "Table", "n = 9 chains", 5.0
    ),
    "differences": lambda: plots.differences(
        {"all": DIFFERENCE}, "B - A", "Compared", "n = 9 pairs", 100.0
    ),
}


def written(drawing: Drawing) -> list[str]:
    """What is written in a plot, from the remarks beside its outlines."""
    return re.findall(r"<!-- (.*?) -->", drawing.svg.decode())


@pytest.mark.parametrize("name", DRAWN)
def test_a_plot_comes_in_three_formats_and_the_same_again(name: str) -> None:
    drawing, again = DRAWN[name](), DRAWN[name]()
    assert drawing.png.startswith(b"\x89PNG") and drawing.pdf.startswith(b"%PDF")
    assert b"<svg" in drawing.svg[:600]
    assert drawing == again
    assert list(drawing.files("x")) == ["x.png", "x.svg", "x.pdf"]
    assert any(text.startswith("n = ") for text in written(drawing))


def test_rates_go_from_0_to_100_and_say_how_many() -> None:
    texts = written(DRAWN["rates"]())
    assert {"0", "100", "success (%)", "n = 6 attempts each; lines: 95 % Wilson intervals"} <= set(
        texts
    )
    varied = plots.rates({"a": ROW, "b": ROW | {"n_episodes": 9}}, "By task")
    assert {"a (6)", "b (9)", "n = 6 to 9 attempts each; lines: 95 % Wilson intervals"} <= set(
        written(varied)
    )
    assert "100" in written(DRAWN["lines"]()) and "time (s)" in written(DRAWN["lines"]())


def test_colours_can_be_told_apart_by_their_lightness_or_their_marks() -> None:
    assert len(set(plots.COLOURS)) == len(set(plots.MARKS)) == len(plots.COLOURS)
    assert trials([3], "chains") == "n = 3 chains"


def test_two_that_are_equal_do_not_look_as_if_they_differed() -> None:
    same = {"difference": 0.0, "ci95": (0.0, 0.0)}
    texts = written(plots.differences({"all": same}, "B - A", "Compared", "n = 2 pairs", 100.0))
    assert {"0.0", "10.0"} <= set(texts)
