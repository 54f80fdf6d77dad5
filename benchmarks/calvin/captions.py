"""Pictures of PlayTable with captions: training data for System 2's small vision tower.

Random states of a scene (`facts`) are drawn by the static camera and described three ways: a
caption of constant form (every alternative is one word, so that word i is about the same
thing in every picture), questions with short answers in varied wording, and numbers (where
things are). Only what can be seen is asked for. `make_dataset` writes a folder that
`openhelix.system2.pretrain` reads.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from openhelix.benchmarks.calvin.appearance import Appearance
from openhelix.benchmarks.calvin.cameras import SceneRenderer
from openhelix.benchmarks.calvin.env import PlayTableEnv
from openhelix.benchmarks.calvin.physics import (
    BUTTON,
    DRAWER,
    FINGER_OPEN_M,
    SLIDE,
    SWITCH,
    quaternion_from_euler,
)
from openhelix.benchmarks.calvin.scene import (
    BLOCK_SIDE_M,
    DRAWER_TRAVEL_M,
    ROBOT_Q0_RAD,
    SWITCH_THRESHOLD_M,
    SWITCH_TRAVEL_M,
    Scene,
)
from openhelix.runtime.core.interfaces import F64, U8

# -- Facts: states drawn at random, and what is true of them as far as it can be seen --
#
# `StateMaker` puts arm, blocks, drawer, slider and lights anywhere that a policy meets them;
# `facts_of` says in words and numbers what a picture of that shows. A block behind the door or
# under the arm has no place, and what is too close to a border to tell is left open.

COLOURS = ("red", "blue", "pink")
SIDES = ("left", "middle", "right")
PLACES = ("table", "cabinet", "drawer", "hand", "stack", "hidden")
SIDE_BORDERS_M = (0.0, 0.17)  # x in W, between left, middle and right
MARGIN_M = 0.015  # nothing is asked so close to a border
SEEN_PIXELS = 12  # a block that shows fewer (of 200 x 200) counts as hidden
HEIGHT_M = 0.56  # the gripper is high above this, low below


@dataclass(frozen=True, slots=True)
class Facts:
    """What is true of one state, in words and numbers.

    `places`, `sides`: by colour; "hidden" where the block cannot be seen, None as a side
    within `MARGIN_M` of a border. `None` elsewhere: too ambiguous to ask for.
    """

    places: dict[str, str]
    sides: dict[str, str | None]
    x_m: dict[str, float]
    drawer: str | None
    slider: str | None
    bulb: str
    led: str
    holds: str
    gripper_side: str | None
    gripper_height: str | None
    numbers: tuple[float, ...]  # per block xyz or zeros; seen flags; TCP xyz; joints; lights


class StateMaker:
    """Draws random states of one scene.

    Args:
        scene: "A" to "D", or a scene of one's own.
        rng: where every draw comes from.
    """

    def __init__(self, scene: str | Scene, rng: np.random.Generator) -> None:
        self._env = PlayTableEnv(scene, cameras=())
        self._rng = rng
        self._surfaces = dict(self._env.scene.surfaces)

    def close(self) -> None:
        """Release the physics client."""
        self._env.close()

    @property
    def block_ids(self) -> dict[str, int]:
        """Body ids by colour, as the segmentation has them."""
        return {name.removeprefix("block_"): uid for name, uid in self._env.world.blocks.items()}

    def draw(self) -> tuple[F64, dict[str, Any]]:
        """Return a visual state (36,) and what was put where."""
        rng, env, world = self._rng, self._env, self._env.world
        held = str(rng.choice(COLOURS)) if rng.uniform() < 0.3 else ""
        tcp = self._move_arm(held != "")
        slide = env.scene.slide_travel * float(
            rng.choice([0.0, 1.0, rng.uniform()], p=[0.45, 0.45, 0.1])
        )
        opening = rng.choice(
            [0.0, rng.uniform(0.15, DRAWER_TRAVEL_M), rng.uniform(0, DRAWER_TRAVEL_M)],
            p=[0.4, 0.5, 0.1],
        )
        bulb, led = bool(rng.integers(2)), bool(rng.integers(2))
        switch = (
            rng.uniform(SWITCH_THRESHOLD_M + 0.006, SWITCH_TRAVEL_M)
            if bulb
            else rng.uniform(0, 0.03)
        )
        for joint, value in ((SLIDE, slide), (DRAWER, opening), (BUTTON, 0.0), (SWITCH, switch)):
            world.set_table_joint(joint, float(value))
        env.bulb, env.led = bulb, led
        places = self._place_blocks(held, tcp, float(opening))
        truth = {
            "places": places,
            "tcp": tcp,
            "slide": slide / env.scene.slide_travel,
            "drawer": float(opening),
            "bulb": bulb,
            "led": led,
            "held": held,
            "xyz": {c: world.block_pose(f"block_{c}")[0] for c in COLOURS},
        }
        return env.visual_state(), truth

    def shut_in(self, truth: dict[str, Any]) -> F64 | None:
        """Put a block of the drawn state into the closed drawer, where nobody sees it.

        Returns:
            the visual state (36,), with `truth` changed; None, and nothing done, where the
            drawer is open or no block is free.
        """
        below = {c for c, place in truth["places"].items() if place == "stack"}
        free = [c for c in COLOURS if truth["places"][c] in ("table", "cabinet")]
        if truth["drawer"] > 0.04 or below or not free:
            return None
        rng, world = self._rng, self._env.world
        colour = free[int(rng.integers(len(free)))]
        x = rng.uniform(-0.13, 0.13) + self._env.scene.drawer_x
        spot = (float(x), float(rng.uniform(-0.14, 0.0) - truth["drawer"]), 0.362)
        world.set_block_pose(f"block_{colour}", spot, quaternion_from_euler((0.0, 0.0, 0.0)))
        truth["places"][colour], truth["xyz"][colour] = "drawer", spot
        return self._env.visual_state()

    def _move_arm(self, holding: bool) -> tuple[float, ...]:
        """Put the TCP at a random place over the table; return where it is."""
        rng, arm = self._rng, self._env.robot
        width = (
            rng.uniform(0.018, 0.021) if holding else rng.choice([0.0, FINGER_OPEN_M], p=[0.3, 0.7])
        )
        arm.reset(ROBOT_Q0_RAD, float(width))
        if rng.uniform() < 0.15:
            return arm.tcp()[0]
        for _ in range(10):
            target = rng.uniform((-0.32, -0.24, 0.46), (0.36, 0.14, 0.74))
            tilt = rng.normal(0.0, 0.08, 2)
            quaternion = quaternion_from_euler((np.pi + tilt[0], tilt[1], rng.uniform(0.6, 2.5)))
            arm.reset(ROBOT_Q0_RAD, float(width))
            for _ in range(4):
                arm.reset(arm.solve_ik(target, quaternion), float(width))
            if np.linalg.norm(np.subtract(arm.tcp()[0], target)) < 0.03:
                break
        return arm.tcp()[0]

    def _place_blocks(self, held: str, tcp: tuple[float, ...], opening: float) -> dict[str, str]:
        rng, world = self._rng, self._env.world
        places: dict[str, str] = {}
        poses: dict[str, tuple[float, float, float]] = {}
        for colour in rng.permutation(COLOURS):
            colour = str(colour)
            if colour == held:
                places[colour], poses[colour] = "hand", (tcp[0], tcp[1], tcp[2])
                continue
            for _ in range(50):
                place, spot = self._spot(places, poses, opening)
                far = all(
                    np.hypot(spot[0] - q[0], spot[1] - q[1]) > 0.085 or abs(spot[2] - q[2]) > 0.035
                    for q in poses.values()
                )
                if far:
                    break
            places[colour], poses[colour] = place, spot
        for colour, spot in poses.items():
            yaw = rng.uniform(-np.pi, np.pi)
            world.set_block_pose(f"block_{colour}", spot, quaternion_from_euler((0.0, 0.0, yaw)))
        return places

    def _spot(
        self, places: dict[str, str], poses: dict[str, Any], opening: float
    ) -> tuple[str, tuple[float, float, float]]:
        """A random place and block centre."""
        rng, scene = self._rng, self._env.scene
        draw = rng.uniform()
        below = [c for c, place in places.items() if place == "table"]
        if draw < 0.08 and below:
            under = poses[below[int(rng.integers(len(below)))]]
            return "stack", (under[0], under[1], under[2] + BLOCK_SIDE_M)
        if draw < 0.25 and opening > 0.15:
            x, y = rng.uniform(-0.13, 0.13) + scene.drawer_x, rng.uniform(-0.14, 0.0) - opening
            return "drawer", (float(x), float(y), 0.362)
        if draw < 0.6:
            side = self._surfaces["slider_left" if rng.integers(2) else "slider_right"]
            x, y = rng.uniform(*side.x), rng.uniform(*side.y)
            return "cabinet", (float(x), float(y), side.z)
        table = self._surfaces["table"]
        # Wider than where blocks start: tasks push them about.
        x, y = (
            rng.uniform(table.x[0] - 0.1, min(table.x[1] + 0.03, 0.37)),
            rng.uniform(-0.16, -0.02),
        )
        return "table", (float(x), float(y), table.z)


def _side(x_m: float) -> str | None:
    if min(abs(x_m - border) for border in SIDE_BORDERS_M) < MARGIN_M:
        return None
    return SIDES[int(np.searchsorted(SIDE_BORDERS_M, x_m))]


def facts_of(truth: dict[str, Any], seen: dict[str, int]) -> Facts:
    """Put a state into words.

    Args:
        truth: what `StateMaker.draw` returned.
        seen: pixels that each colour's block shows.
    """
    places = {c: truth["places"][c] if seen[c] >= SEEN_PIXELS else "hidden" for c in COLOURS}
    x = {c: float(truth["xyz"][c][0]) for c in COLOURS}
    tcp, slide, opening = truth["tcp"], truth["slide"], truth["drawer"]
    visible = {c: places[c] != "hidden" for c in COLOURS}
    numbers: list[float] = []
    for c in COLOURS:
        numbers += [float(v) for v in truth["xyz"][c]] if visible[c] else [0.0, 0.0, 0.0]
    numbers += [float(visible[c]) for c in COLOURS]
    numbers += [*map(float, tcp), float(slide), opening / DRAWER_TRAVEL_M]
    numbers += [float(truth["bulb"]), float(truth["led"])]
    return Facts(
        places=places,
        sides={c: _side(x[c]) if visible[c] else "hidden" for c in COLOURS},
        x_m=x,
        drawer="open" if opening > 0.1 else "closed" if opening < 0.04 else None,
        slider="left" if slide > 0.7 else "right" if slide < 0.3 else None,
        bulb="on" if truth["bulb"] else "off",
        led="on" if truth["led"] else "off",
        holds=truth["held"] or "nothing",
        gripper_side=_side(float(tcp[0])),
        gripper_height=_height(float(tcp[2])),
        numbers=tuple(numbers),
    )


def _height(z_m: float) -> str | None:
    if abs(z_m - HEIGHT_M) < MARGIN_M:
        return None
    return "high" if z_m > HEIGHT_M else "low"


IMAGE_SIZE = 128  # what the tower sees; see openhelix.system2.model.VisionShape
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
            number = ord(scene) if len(scene) == 1 else 1000 + int(scene[1:])
            rng = np.random.default_rng([seed, number])
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
