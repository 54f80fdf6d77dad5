"""What an instruction means in front of a picture, and that CALVIN-R's words stay unseen."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from openhelix.benchmarks.calvin import refusals
from openhelix.benchmarks.calvin.goals import (
    NOTHING,
    by_relation,
    every_wording,
    goals,
    plain,
    references,
)
from openhelix.benchmarks.calvin.phrases import normalised
from openhelix.benchmarks.calvin.table_talk import COLOURS, TableView, labels
from openhelix.benchmarks.calvin.tasks import TASK_NAMES
from openhelix.benchmarks.calvin.wordings import reserved
from openhelix.benchmarks.evaluation.referring import REFERENCES


def view(rng: np.random.Generator) -> TableView:
    """A table in any state."""
    places = ("table", "cabinet", "drawer", "hidden")
    place = {c: str(rng.choice(places)) for c in COLOURS}
    x, y = rng.uniform(-0.3, 0.4, 3), rng.uniform(-0.15, 0.1, 3)
    return TableView(
        place=place,
        under={},
        xyz={c: (float(x[i]), float(y[i]), 0.46) for i, c in enumerate(COLOURS)},
        drawer=str(rng.choice(("open", "closed"))),
        door=str(rng.choice(("left", "right"))),
        bulb=str(rng.choice(("on", "off"))),
        led=str(rng.choice(("on", "off"))),
        holds="",
        tcp=(0.0, 0.0, 0.6),
        spots={"button": (-0.1, -0.12, 0.48), "switch": (0.3, 0.04, 0.53)},
    )


@pytest.mark.parametrize("seed", range(40))
def test_instructions_mean_what_calvin_r_says_they_mean(seed: int) -> None:
    seen = view(np.random.default_rng(seed))
    found = references(labels(seen))
    meant = {name: r.resolve(seen) for name, r in REFERENCES.items()}
    assert found  # a lamp is always on or off
    for name, (task, _) in found.items():
        assert task == meant[name], name
    # What the labels leave out is a close call; nothing else is left out.
    assert {n for n, task in meant.items() if task} - set(found) <= {
        n for n in meant if "middle" in n or "near" in n
    }


def test_calvin_r_is_said_in_words_that_no_training_sees() -> None:
    suite = {normalised(s) for r in REFERENCES.values() for s in r.sentences}
    trained = {normalised(s) for s in every_wording()}
    assert len(trained) > 500
    assert not suite & trained


def test_no_instruction_is_one_that_is_measured_with() -> None:
    rng = np.random.default_rng(3)
    said = [g for _ in range(60) for g in goals(labels(view(rng)), rng)]
    assert not {normalised(g.said) for g in said} & (reserved() | refusals.for_measuring())
    assert {g.looks for g in said} == {True, False}
    assert NOTHING in {g.plain for g in said}


def test_every_task_has_a_plain_sentence_of_its_own() -> None:
    assert len({plain(task) for task in (*TASK_NAMES, None)}) == len(TASK_NAMES) + 1


def test_a_lift_that_does_not_say_from_where_is_from_where_the_block_is() -> None:
    rng = np.random.default_rng(5)
    known = labels(view(rng)) | {"red place": "drawer"}
    lifts = [
        g.task
        for _ in range(200)
        for g in goals(known, rng)
        if (g.task or "").startswith("lift_red")
    ]
    assert lifts and set(lifts) == {"lift_red_block_drawer"}


def test_every_relation_of_a_picture_is_asked_for_before_one_is_asked_for_twice() -> None:
    rng = np.random.default_rng(8)
    for _ in range(40):
        known = labels(view(rng))
        possible = references(known)
        relations = by_relation(possible)
        looks = [g for g in goals(known, rng) if g.looks]
        of = {
            said: key for key, names in relations.items() for n in names for said in possible[n][1]
        }
        asked = Counter(of[g.said] for g in looks)
        blocks = {key for key in relations if any(n.startswith("lift") for n in relations[key])}
        assert blocks <= set(asked)  # there are eight, and as many are asked for
        assert sum(asked[key] for key in set(relations) - blocks) == 2


def test_what_can_be_pushed_is_lifted_pushed_and_turned_alike() -> None:
    rng = np.random.default_rng(2)
    known = {"bulb": "on", "leftmost": "red", "red place": "table"}
    said = [g.task for _ in range(300) for g in goals(known, rng, 1, told=0, nothing=0) if g.looks]
    families = Counter(str(task).split("_")[0] for task in said)
    assert min(families[name] for name in ("lift", "push", "rotate")) > 70
