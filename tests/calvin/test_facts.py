"""What is said of a state is what the world holds, and what cannot be told is left open."""

from __future__ import annotations

import numpy as np
import pytest

from openhelix.benchmarks.calvin.captions import (
    COLOURS,
    HEIGHT_M,
    MARGIN_M,
    PLACES,
    SEEN_PIXELS,
    SIDE_BORDERS_M,
    StateMaker,
    facts_of,
)
from openhelix.benchmarks.calvin.scene import DRAWER_TRAVEL_M
from tests.calvin.helpers import SEEN, truth


@pytest.mark.parametrize("border", SIDE_BORDERS_M)
def test_close_to_a_border_there_is_no_side(border: float) -> None:
    inside = facts_of(truth(tcp=(border + 0.9 * MARGIN_M, -0.1, 0.7)), SEEN)
    assert inside.gripper_side is None
    left, right = (
        facts_of(truth(tcp=(border + way * 1.1 * MARGIN_M, -0.1, 0.7)), SEEN) for way in (-1, 1)
    )
    sides = ("left", "middle", "right")
    at = sides.index(left.gripper_side or "")
    assert right.gripper_side == sides[at + 1]


@pytest.mark.parametrize(("above_m", "said"), [(0.02, "high"), (0.01, None), (-0.02, "low")])
def test_how_high_the_gripper_is(above_m: float, said: str | None) -> None:
    assert facts_of(truth(tcp=(0.0, 0.0, HEIGHT_M + above_m)), SEEN).gripper_height == said


def test_a_block_that_hardly_shows_is_hidden_and_has_no_numbers() -> None:
    at = facts_of(truth(), SEEN | {"pink": SEEN_PIXELS})
    below = facts_of(truth(), SEEN | {"pink": SEEN_PIXELS - 1})
    assert (at.places["pink"], below.places["pink"]) == ("cabinet", "hidden")
    assert (at.sides["pink"], below.sides["pink"]) == ("middle", "hidden")
    assert at.numbers[6:12] == (0.1, 0.1, 0.46, 1.0, 1.0, 1.0)
    assert below.numbers[6:12] == (0.0, 0.0, 0.0, 1.0, 1.0, 0.0)


def test_numbers_end_with_tcp_joints_and_lights() -> None:
    numbers = facts_of(truth(slide=0.5, drawer=DRAWER_TRAVEL_M / 2), SEEN).numbers
    assert numbers[12:] == (0.25, -0.1, 0.7, 0.5, 0.5, 1.0, 0.0)


def test_states_are_drawn_from_the_generator_and_are_what_is_said_of_them() -> None:
    drawn = []
    for _ in range(2):
        maker = StateMaker("B", np.random.default_rng(3))
        drawn.append([maker.draw() for _ in range(30)])
        maker.close()
    held = 0
    for (state, said), (again, _) in zip(*drawn, strict=True):
        assert np.array_equal(state, again)
        assert set(said["places"].values()) <= {*PLACES} - {"hidden"}
        assert [c for c in COLOURS if said["places"][c] == "hand"] == [said["held"]] * bool(
            said["held"]
        )
        assert 0.0 <= said["slide"] <= 1.0 and 0.0 <= said["drawer"] <= DRAWER_TRAVEL_M
        if said["held"]:
            held += 1
            np.testing.assert_allclose(said["xyz"][said["held"]], said["tcp"], atol=1e-6)
    assert 0 < held < 30
