"""`openhelix probe --places`: what is read out, how far off it is, and mistakes in one line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from openhelix.benchmarks.calvin.table_talk import COLOURS
from openhelix.benchmarks.evaluation import placing
from openhelix.runtime.cli.main import main
from openhelix.runtime.core.config import ConfigError
from openhelix.runtime.core.interfaces import F32
from openhelix.system2.prompt import Layout

LAYOUT = Layout(7, (1, 3), (3, 6), (6, 7), (4, 6))


class Sees:
    """A System 2 whose image states hold the place, 1 cm off; its words hold the colour, `<ACT>` nothing."""

    def __init__(self) -> None:
        self.rng = torch.Generator().manual_seed(0)

    def hidden(self, images: Sequence[Any], instructions: Sequence[str]) -> list[torch.Tensor]:
        found = []
        for image, text in zip(images, instructions, strict=True):
            states = torch.randn(7, 4, generator=self.rng)
            noise = 0.01 * torch.randn(2, generator=self.rng)
            states[1, :2] = torch.from_numpy(image).float() + noise
            states[4:6] = COLOURS.index(text.split()[2])
            found.append(states)
        return found

    def encode(self, images: Sequence[Any], instructions: Sequence[str]) -> F32:
        return np.zeros((len(images), 1, 3), np.float32)

    def layout(self, instruction: str) -> Layout:
        return LAYOUT


def seen(count: int) -> list[tuple[str, Any, tuple[float, float]]]:
    rng = np.random.default_rng(0)
    spots = rng.uniform(-0.3, 0.3, (count, 2))
    return [(COLOURS[i % 3], xy, (float(xy[0]), float(xy[1]))) for i, xy in enumerate(spots)]


def test_places_are_found_where_they_are_and_nowhere_else() -> None:
    made = placing.placed(Sees(), seen(300))
    rows = made["read_outs"]
    assert list(rows) == ["image", "words", "<ACT>", "latent"]
    assert made["n"] == 75
    assert rows["image"]["median_cm"] < 2 and rows["image"]["within_2_cm"] > 0.6
    for blind in ("words", "<ACT>", "latent"):
        assert rows[blind]["median_cm"] > 0.8 * made["guess"]["median_cm"] > 10
    assert rows["latent"] == made["guess"]  # a constant tells what the mean place tells
    text = placing.page(made)
    assert "75 held-out starts" in text and "image: " in text and "the mean place: " in text


def test_held_out_starts_are_not_learned_from() -> None:
    """States that are other in every start fit any place and tell nothing of another start's."""
    own = torch.eye(120, dtype=torch.float32)
    places = torch.tensor([place for *_, place in seen(120)], dtype=torch.float64)
    said = [colour for colour, *_ in seen(120)]
    found = placing.held_out_errors(own, places, said)
    guess = placing.held_out_errors(torch.zeros(120, 1), places, said)
    assert float(found.median()) > 0.9 * float(guess.median())


def test_what_is_read() -> None:
    states = torch.arange(14.0).reshape(7, 2)
    found = placing.read_outs(states, LAYOUT)
    assert found["image"].tolist() == [2, 3, 4, 5]
    assert found["words"].tolist() == [9, 10]
    assert found["<ACT>"].tolist() == [12, 13]
    sightless = placing.read_outs(states[:4], Layout(4, (1, 1), (1, 3), (3, 4), (1, 3)))
    assert "image" not in sightless
    with pytest.raises(ConfigError, match="only the last state"):
        placing.read_outs(states[-1:], LAYOUT)


def test_starts_take_turns_and_can_be_drawn_again() -> None:
    drawn = list(placing.starts(("A", "B"), 4, 3))
    assert [colour for colour, *_ in drawn] == [COLOURS[0], COLOURS[1]] * 2
    assert all(image.shape == (200, 200, 3) for _, image, _ in drawn)
    assert len({place for *_, place in drawn}) == 4
    again = list(placing.starts(("A", "B"), 4, 3))
    assert [place for *_, place in drawn] == [place for *_, place in again]
    assert np.array_equal(drawn[2][1], again[2][1])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--places", "5"], "--places: 5, want 24 or more"),
        (["--places", "many"], "--places: input should be a valid integer"),
        (["--places", "100", "--scene", "X"], "--scene: 'X' is no choice of scenes"),
        (["--places", "24", "--seed", "-1"], "--seed: input should be greater than or equal to 0"),
        (["--places", "24", "system1.replan_steps=4"], "system1.replan_steps: --places looks at"),
        (["--places", "24", "--sentences", "seen"], "--sentences and --places exclude each other"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["probe", *words]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
