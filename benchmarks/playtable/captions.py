"""Pictures of PlayTable with words: what System 2's small vision tower learns to see from.

Random states of a scene (`facts`) are drawn by the static camera and described three ways: a
caption of constant form (every alternative is one word, so that word i is about the same
thing in every picture), questions with short answers in varied wording, and numbers (where
things are). Only what can be seen is asked for. `make_dataset` writes a folder that
`system2.pretrain` reads.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.playtable.appearance import Appearance
from benchmarks.playtable.cameras import SceneRenderer
from benchmarks.playtable.facts import COLOURS, PLACES, SIDES, Facts, StateMaker, facts_of
from runtime.types import U8

IMAGE_SIZE = 128  # what the tower sees; see system2.model.VisionShape
LED, BULB = "LED", "light bulb"


def caption(facts: Facts) -> str:
    """The caption of constant form; what is ambiguous gets one of its words all the same."""
    words = [
        f"The {c} block is in the {facts.places[c]}, {facts.sides[c] or 'middle'}." for c in COLOURS
    ]
    words += [
        f"The gripper is {facts.gripper_side or 'middle'}, {facts.gripper_height or 'low'}, "
        f"holding {facts.holds}.",
        f"The drawer is {facts.drawer or 'open'}.",
        f"The slider is {facts.slider or 'left'}.",
        f"The bulb is {facts.bulb}.",
        f"The LED is {facts.led}.",
    ]
    return " ".join(words)


# Kind, question, how the answering sentence begins, its next word, and the choices for that.
Question = tuple[str, str, str, str, tuple[str, ...]]

_WHERE = (
    "Where is the {c} block?",
    "In which place is the {c} block?",
    "Where can I find the {c} block?",
    "What is the {c} block in or on?",
)
_SIDE = (
    "Is the {c} block on the left, in the middle or on the right?",
    "On which side is the {c} block?",
    "Which side is the {c} block on?",
)
_ORDER = (
    "Which block is further to the left, the {a} or the {b} one?",
    "Is the {a} block or the {b} block further left?",
)
_DRAWER = (
    "Is the drawer open or closed?",
    "What is the state of the drawer?",
    "How is the drawer?",
)
_SLIDER = (
    "Is the slider on the left or on the right?",
    "On which side is the sliding door?",
    "Where has the sliding door been moved to?",
)
_LIGHT = ("Is the {light} on or off?", "Is the {light} lit? Say on or off.", "How is the {light}?")
_HOLDS = (
    "What is the gripper holding?",
    "Which block does the robot hold?",
    "What is in the gripper, if anything?",
)
_GRIPPER = (
    "Is the gripper on the left, in the middle or on the right?",
    "On which side is the robot hand?",
)
_HEIGHT = ("Is the gripper high or low?", "How high is the robot hand, high or low?")


def questions(facts: Facts, rng: np.random.Generator) -> list[Question]:
    """Return every question that this state answers, each in a wording drawn at random."""

    def ask(templates: Sequence[str], **words: str) -> str:
        return templates[int(rng.integers(len(templates)))].format(**words)

    made: list[Question] = []
    for c in COLOURS:
        made.append(
            ("place", ask(_WHERE, c=c), f"The {c} block is in the", facts.places[c], PLACES)
        )
        side = facts.sides[c]
        if side is not None and side != "hidden":
            made.append(("side", ask(_SIDE, c=c), f"The {c} block is on the", side, SIDES))
    for a, b in (("red", "blue"), ("blue", "pink"), ("pink", "red")):
        apart = abs(facts.x_m[a] - facts.x_m[b]) > 0.04
        if apart and "hidden" not in (facts.places[a], facts.places[b]):
            left = a if facts.x_m[a] < facts.x_m[b] else b
            made.append(
                ("order", ask(_ORDER, a=a, b=b), "The block further left is the", left, (a, b))
            )
    if facts.drawer:
        made.append(("drawer", ask(_DRAWER), "The drawer is", facts.drawer, ("open", "closed")))
    if facts.slider:
        made.append(("slider", ask(_SLIDER), "The slider is", facts.slider, ("left", "right")))
    made.append(("bulb", ask(_LIGHT, light=BULB), "The bulb is", facts.bulb, ("on", "off")))
    made.append(("led", ask(_LIGHT, light=LED), "The LED is", facts.led, ("on", "off")))
    made.append(
        ("holds", ask(_HOLDS), "The gripper is holding", facts.holds, (*COLOURS, "nothing"))
    )
    if facts.gripper_side:
        made.append(("gripper side", ask(_GRIPPER), "The gripper is", facts.gripper_side, SIDES))
    if facts.gripper_height:
        made.append(
            (
                "gripper height",
                ask(_HEIGHT),
                "The gripper is",
                facts.gripper_height,
                ("high", "low"),
            )
        )
    return made


def _small(rgb: U8) -> U8:
    image = Image.fromarray(rgb).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
    return np.asarray(image)


def make_dataset(
    folder: Path,
    scenes: Sequence[str],
    n: int,
    seed: int = 0,
    random_looks: float = 0.0,
    states_per_look: int = 50,
) -> None:
    """Write `images.npy` (n, 128, 128, 3) u8 and `records.jsonl`, n / len(scenes) a scene.

    Args:
        folder: made if it is missing.
        scenes: which scenes, in turn.
        n: pictures in all.
        seed: everything that is drawn follows from it.
        random_looks: fraction of pictures with random wood, light and noise.
        states_per_look: pictures between two changes of look.
    """
    folder.mkdir(parents=True, exist_ok=True)
    images = np.lib.format.open_memmap(
        folder / "images.npy", mode="w+", dtype=np.uint8, shape=(n, IMAGE_SIZE, IMAGE_SIZE, 3)
    )
    with (folder / "records.jsonl").open("w") as out:
        for index, scene in enumerate(scenes):
            rng = np.random.default_rng([seed, ord(scene)])
            maker, renderer = StateMaker(scene, rng), SceneRenderer(scene, ("static",))
            ids = maker.block_ids
            for k, row in enumerate(range(index, n, len(scenes))):
                if k % states_per_look == 0:
                    other = rng.uniform() < random_looks
                    look = Appearance.random(int(rng.integers(1 << 30)), scene) if other else None
                    renderer.set_appearance(look or Appearance.of(scene))
                state, truth = maker.draw()
                frame = renderer.render(state)["static"]
                seen = {c: int((frame.segmentation == uid).sum()) for c, uid in ids.items()}
                facts = facts_of(truth, seen)
                images[row] = _small(frame.rgb)
                record = {
                    "row": row,
                    "group": scene,
                    "caption": caption(facts),
                    "questions": questions(facts, rng),
                    "numbers": facts.numbers,
                }
                out.write(json.dumps(record) + "\n")
            maker.close()
    images.flush()


def main(argv: Sequence[str] | None = None) -> int:
    """Make the training set (scenes A-C) and two held-out sets (new states; scene D)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--train", type=int, default=18000, help="pictures to train on")
    options = parser.parse_args(argv)
    make_dataset(options.out / "test-states", "ABC", 1200, seed=1001)
    make_dataset(options.out / "test-scene", "D", 800, seed=1002)
    make_dataset(options.out / "train", "ABC", options.train, seed=1, random_looks=0.5)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
