"""Captions and questions say what the state is, and what cannot be seen is not asked for."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from openhelix.benchmarks.calvin.captions import (
    COLOURS,
    PLACES,
    SIDES,
    caption,
    facts_of,
    make_dataset,
    questions,
)
from tests.calvin.helpers import SEEN, truth


def answers(facts) -> dict[tuple[str, str], str]:
    made = questions(facts, np.random.default_rng(0))
    return {(kind, opening): answer for kind, _, opening, answer, _ in made}


def test_words_of_a_state() -> None:
    facts = facts_of(truth(), SEEN)
    text = caption(facts)
    assert "The red block is in the table, left." in text
    assert "The blue block is in the hand, right." in text
    assert "The gripper is right, high, holding blue." in text
    assert text.endswith(
        "The drawer is closed. The slider is left. The bulb is on. The LED is off."
    )
    asked = answers(facts)
    assert asked["place", "The pink block is in the"] == "cabinet"
    assert asked["holds", "The gripper is holding"] == "blue"
    assert asked["bulb", "The bulb is"] == "on"


def test_what_is_hidden_has_no_side_and_no_order() -> None:
    facts = facts_of(truth(), SEEN | {"red": 3})
    asked = answers(facts)
    assert asked["place", "The red block is in the"] == "hidden"
    assert ("side", "The red block is on the") not in asked
    made = questions(facts, np.random.default_rng(0))
    assert [set(choices) for kind, *_, choices in made if kind == "order"] == [{"blue", "pink"}]
    assert facts.numbers[:3] == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(("slide", "drawer"), [(0.5, 0.07), (0.4, 0.06)])
def test_the_ambiguous_is_not_asked(slide: float, drawer: float) -> None:
    kinds = {kind for kind, _ in answers(facts_of(truth(slide=slide, drawer=drawer), SEEN))}
    assert not kinds & {"slider", "drawer"}


def test_dataset_is_deterministic_and_consistent(tmp_path: Path) -> None:
    for name in ("a", "b"):
        make_dataset(tmp_path / name, "AD", 12, seed=4, random_looks=0.5, states_per_look=4)
    assert (tmp_path / "a/records.jsonl").read_text() == (tmp_path / "b/records.jsonl").read_text()
    images = np.load(tmp_path / "a/images.npy")
    assert np.array_equal(images, np.load(tmp_path / "b/images.npy"))
    assert images.shape == (12, 128, 128, 3)
    records = [json.loads(line) for line in (tmp_path / "a/records.jsonl").open()]
    assert sorted(record["row"] for record in records) == list(range(12))
    assert {record["group"] for record in records} == {"A", "D"}
    for record in records:
        assert len(record["numbers"]) == len(records[0]["numbers"])
        for _, _, _, answer, choices in record["questions"]:
            assert answer in choices
            assert set(choices) <= {
                *PLACES,
                *SIDES,
                *COLOURS,
                "nothing",
                "open",
                "closed",
                "on",
                "off",
                "high",
                "low",
            }


def test_a_held_block_is_drawn_between_the_fingers(tmp_path: Path) -> None:
    make_dataset(tmp_path / "a", "B", 40, seed=9)
    images = np.load(tmp_path / "a/images.npy").astype(int)
    records = [json.loads(line) for line in (tmp_path / "a/records.jsonl").open()]
    redness = images[..., 0] - images[..., 1:].max(-1)
    held = [
        r["row"]
        for r in records
        if "holding red" in r["caption"] and "red block is in the hidden" not in r["caption"]
    ]
    assert held
    for row in held:
        assert (redness[row] > 80).sum() > 3
