"""Questions about the table: right answers, nothing asked that cannot be told, wordings apart."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations
from math import dist

import numpy as np
import pytest

from openhelix.benchmarks.calvin.table_talk import (
    CANNOT_TELL,
    COLOURS,
    KINDS,
    WORDINGS,
    Asked,
    TableView,
    caption_of,
    labels,
    talk,
)

VIEW = TableView(
    place={"red": "drawer", "blue": "table", "pink": "cabinet"},
    under={},
    xyz={"red": (0.2, -0.3, 0.36), "blue": (-0.2, -0.1, 0.46), "pink": (0.1, 0.08, 0.46)},
    drawer="open",
    door="left",
    bulb="on",
    led="off",
    holds="",
    tcp=(0.08, 0.0, 0.6),
    spots={"button": (-0.28, -0.12, 0.48), "switch": (0.3, 0.04, 0.53)},
    gripper_height="high",
)


def asked(view: TableView, kind: str, tries: int = 40, held_out: float = 0.0) -> list[Asked]:
    found = []
    for seed in range(tries):
        found += [q for q in talk(view, np.random.default_rng(seed), held_out) if q.kind == kind]
    return found


def answers(view: TableView, kind: str, word: str = "") -> set[str]:
    return {q.answer for q in asked(view, kind) if word in q.question}


def test_where_things_are() -> None:
    assert answers(VIEW, "where", "red") == {"in the drawer"}
    assert answers(VIEW, "where", "blue") == {"on the table"}
    assert answers(VIEW, "side", "red") == {"right"}
    assert answers(VIEW, "side", "blue") == {"left"}
    for q in asked(VIEW, "inside"):
        true = {"red": "drawer", "blue": "table", "pink": "cabinet"}
        colour = next(c for c in COLOURS if c in q.question)
        assert q.answer == (
            "yes" if true[colour] in q.question.replace("table top", "table") else "no"
        )
    assert {q.answer for q in asked(VIEW, "which inside") if "drawer" in q.question} == {
        "the red block"
    }


def test_relations() -> None:
    assert answers(VIEW, "extreme", "left") == {"the blue block"}
    assert answers(VIEW, "extreme", "right") == {"the red block"}
    assert answers(VIEW, "nearest", "button") == {"the blue block"}
    for q in [*asked(VIEW, "order"), *asked(VIEW, "order right")]:
        first, second = sorted(
            (c for c in COLOURS if c in q.question),
            key=lambda c: (
                q.question.index(f"{c} block")
                if f"{c} block" in q.question
                else q.question.index(c)
            ),
        )
        left = VIEW.xyz[first][0] < VIEW.xyz[second][0]
        assert q.answer == ("yes" if left == (q.kind == "order") else "no"), q
    for q in asked(VIEW, "further"):
        a, b = (c for c in COLOURS if c in q.question)
        sign = 1 if "left" in q.question else -1
        near = min((a, b), key=lambda c: sign * VIEW.xyz[c][0])
        assert q.answer == f"the {near} block"


def test_which_is_nearer_and_which_is_in_the_middle() -> None:
    assert answers(VIEW, "middle") == {"the pink block"} and VIEW.middle == "pink"
    assert {len(asked(VIEW, kind)) > 20 for kind in ("nearer spot", "nearer")} == {True}
    for q in asked(VIEW, "nearer spot"):
        spot = VIEW.spots["button" if "button" in q.question else "switch"]
        near = min((c for c in COLOURS if c in q.question), key=lambda c: dist(VIEW.xyz[c], spot))
        assert q.answer == f"the {near} block", q
    for q in asked(VIEW, "spot side"):
        spot = VIEW.spots["button" if "button" in q.question else "switch"]
        assert q.answer == ("left" if spot[0] < 0 else "right"), q
    for q in asked(VIEW, "nearer"):
        a, b, c = next(
            order
            for order in permutations(COLOURS)
            for wording in WORDINGS["nearer"].train
            if wording.format(a=order[0], b=order[1], c=order[2]) == q.question
        )
        near = min((a, b), key=lambda other: dist(VIEW.xyz[other], VIEW.xyz[c]))
        assert q.answer == f"the {near} block", q
    close = replace(VIEW, xyz={**VIEW.xyz, "pink": (0.195, 0.08, 0.46)})
    assert close.middle is None and not answers(close, "middle")
    hidden = replace(VIEW, place={**VIEW.place, "red": "hidden"})
    assert hidden.middle is None
    assert not any("red" in q.question for q in asked(hidden, "nearer spot"))


def test_fixtures_lights_counts_and_hand() -> None:
    assert answers(VIEW, "drawer") == {"open"} and answers(VIEW, "door") == {"left"}
    for q in asked(VIEW, "drawer yes"):
        assert q.answer == ("yes" if "open" in q.question else "no")
    for q in asked(VIEW, "light"):
        led = "LED" in q.question or "green" in q.question
        assert q.answer == ("off" if led else "on")
    assert answers(VIEW, "count lights") == {"one"} and answers(VIEW, "count seen") == {"three"}
    assert answers(VIEW, "holds") == {"nothing"}
    held = replace(VIEW, place={**VIEW.place, "blue": "gripper"}, holds="blue")
    assert answers(held, "holds") == {"the blue block"}
    assert answers(held, "where", "blue") == {"in the gripper"}


def test_what_cannot_be_seen_is_not_told() -> None:
    view = replace(VIEW, place={**VIEW.place, "red": "hidden"}, drawer="closed")
    for kind in ("where", "side", "inside"):
        found = [q for q in asked(view, kind) if "red" in q.question]
        assert found and {q.answer for q in found} == {CANNOT_TELL}
    assert {q.answer for q in asked(view, "which inside") if "drawer" in q.question} == {
        CANNOT_TELL
    }
    assert not any(
        q.kind in ("further", "nearer") and "red" in q.question for q in asked(view, "further")
    )
    assert labels(view)["red place"] == "hidden" and "red left of blue" not in labels(view)
    assert "The red block cannot be seen." in caption_of(view)


def test_close_calls_are_not_asked() -> None:
    near = {**VIEW.xyz, "pink": (0.195, 0.08, 0.46)}
    view = replace(VIEW, xyz=near)
    assert not any("pink" in q.question for q in asked(view, "further") if "red" in q.question)
    assert view.extreme(1) is None and not answers(view, "extreme", "right")
    assert not answers(replace(VIEW, drawer=None), "drawer")


def test_what_is_not_there_is_said_not_to_be() -> None:
    for q in asked(VIEW, "absent where"):
        assert (
            q.answer.startswith("there is no ")
            and q.answer.removeprefix("there is no ") in q.question
        )
    said = asked(VIEW, "absent yes", tries=80)
    assert {q.answer for q in said} == {"yes", "no"}
    for q in said:
        assert q.answer == ("yes" if any(f"{c} block" in q.question for c in COLOURS) else "no")
    assert answers(VIEW, "unknowable") == {CANNOT_TELL}


def test_a_stack() -> None:
    view = replace(
        VIEW,
        place={**VIEW.place, "pink": "stack"},
        under={"pink": "blue"},
        xyz={**VIEW.xyz, "pink": (-0.2, -0.1, 0.5)},
    )
    assert answers(view, "where", "pink") == {"on the blue block"}
    assert answers(view, "stack") == {"yes"} and answers(view, "on top") == {"the pink block"}


def test_wordings_of_training_and_measuring_are_apart() -> None:
    for kind, wordings in WORDINGS.items():
        assert wordings.train and wordings.held_out, kind
        assert not {w.lower() for w in wordings.train} & {w.lower() for w in wordings.held_out}
    every = [q for seed in range(20) for q in talk(VIEW, np.random.default_rng(seed), 0.0)]
    kept = [q for seed in range(20) for q in talk(VIEW, np.random.default_rng(seed), 1.0)]
    assert not any(q.held_out for q in every) and all(q.held_out for q in kept)
    assert not {q.question for q in every} & {q.question for q in kept}


def test_the_same_seed_asks_the_same() -> None:
    one, two = (talk(VIEW, np.random.default_rng(5), 0.5) for _ in range(2))
    assert one == two and one != talk(VIEW, np.random.default_rng(6), 0.5)
    assert 25 <= len(one) <= 52


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_asked_in_some_view(kind: str) -> None:
    views = [
        VIEW,
        replace(VIEW, place={**VIEW.place, "pink": "stack"}, under={"pink": "blue"}),
        replace(VIEW, place={**VIEW.place, "blue": "gripper"}, holds="blue"),
    ]
    assert any(asked(view, kind) for view in views)
