"""Questions about a picture of the table, and their correct answers: plain data in, words out.

`TableView` describes what one picture shows, in names and metres; `talk` asks about it in many
wordings. Every kind of question has wordings for training and others that are kept for
measuring alone. Answers are short and exact, so that a model's words can be compared letter by
letter. Some questions have no answer in the picture ("cannot tell") and some ask for what is
not there ("there is no green block"): a model that always names a block gets them wrong.
Nothing here needs the simulator.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import dist
from typing import Any

import numpy as np

COLOURS = ("red", "blue", "pink")
ABSENT = ("green", "yellow", "orange", "white", "purple", "brown", "black")
THINGS = ("ball", "cup", "banana", "cube of sugar", "pen", "bottle", "plate", "toy car")
NUMBERS = ("none", "one", "two", "three")
CANNOT_TELL = "cannot tell"
SIDE_BORDERS_M = (0.0, 0.17)  # x in W, between left, middle and right
MARGIN_M = 0.015  # no side is asked for so close to a border
APART_M = 0.03  # two blocks that differ by less have no order; two distances, no nearest


@dataclass(frozen=True, slots=True)
class TableView:
    """What a picture shows.

    Attributes:
        place: by colour: "table", "cabinet", "drawer", "gripper", "stack", or "hidden" where
            the block cannot be seen.
        under: by colour of a block in a stack, the colour below it.
        xyz: centres of the blocks, m in W; read of visible blocks only.
        drawer: "open", "closed", or None where it is too little of either.
        door: side of the sliding door, "left", "right" or None in between.
        bulb, led: "on" or "off".
        holds: colour in the gripper, or "".
        tcp: the gripper, m in W.
        spots: further places by name ("button", "switch"), m in W.
    """

    place: Mapping[str, str]
    under: Mapping[str, str]
    xyz: Mapping[str, tuple[float, float, float]]
    drawer: str | None
    door: str | None
    bulb: str
    led: str
    holds: str
    tcp: tuple[float, float, float]
    spots: Mapping[str, tuple[float, float, float]]
    gripper_height: str | None = None

    @property
    def seen(self) -> tuple[str, ...]:
        """Colours of the visible blocks."""
        return tuple(c for c in COLOURS if self.place[c] != "hidden")

    def side(self, colour: str) -> str | None:
        """Return left, middle or right; None near a border."""
        return side_of(self.xyz[colour][0])

    def extreme(self, way: int) -> str | None:
        """Return the leftmost (-1) or rightmost (1) visible block; None without a clear one."""
        order = sorted(self.seen, key=lambda c: way * -self.xyz[c][0])
        if not order:
            return None
        if len(order) > 1 and abs(self.xyz[order[0]][0] - self.xyz[order[1]][0]) < APART_M:
            return None
        return order[0]

    def nearest(self, spot: Sequence[float], among: Sequence[str]) -> str | None:
        """Return the visible block nearest to a place; None without a clear one."""
        order = sorted((dist(self.xyz[c], spot), c) for c in among if self.place[c] != "hidden")
        if not order or (len(order) > 1 and order[1][0] - order[0][0] < APART_M):
            return None
        return order[0][1]

    @property
    def middle(self) -> str | None:
        """The block between the two others; None unless all are seen and in a clear order."""
        left, right = self.extreme(-1), self.extreme(1)
        if len(self.seen) < len(COLOURS) or left is None or right is None:
            return None
        return next(c for c in COLOURS if c not in (left, right))

    def left_of(self, a: str, b: str) -> bool | None:
        """Whether block a is left of block b; None where it cannot be said."""
        gap = self.xyz[b][0] - self.xyz[a][0]
        if abs(gap) < APART_M or "hidden" in (self.place[a], self.place[b]):
            return None
        return gap > 0


def side_of(x_m: float) -> str | None:
    """Return left, middle or right of an x in W; None near a border."""
    if min(abs(x_m - border) for border in SIDE_BORDERS_M) < MARGIN_M:
        return None
    return ("left", "middle", "right")[int(np.searchsorted(SIDE_BORDERS_M, x_m))]


def end_of(spot: Sequence[float]) -> str:
    """Return the end of the table, left or right, at which a fixture is."""
    return "left" if spot[0] < 0.0 else "right"


@dataclass(frozen=True, slots=True)
class Wordings:
    """How a kind of question is put: in training, and in measuring only."""

    train: tuple[str, ...]
    held_out: tuple[str, ...]


WORDINGS: dict[str, Wordings] = {
    "where": Wordings(
        (
            "Where is the {c} block?",
            "Where does the {c} block lie?",
            "In which place is the {c} block?",
            "Where can I find the {c} block?",
            "What is the {c} block in or on?",
            "Tell me where the {c} block is.",
            "Where has the {c} block been put?",
            "Can you see where the {c} block is?",
        ),
        (
            "The {c} block, where is it?",
            "Where should I look for the {c} block?",
            "I am looking for the {c} block. Where is it?",
        ),
    ),
    "side": Wordings(
        (
            "Is the {c} block on the left, in the middle or on the right?",
            "On which side is the {c} block?",
            "Which side is the {c} block on?",
            "Left, middle or right: where is the {c} block?",
            "Is the {c} block left, middle or right?",
            "On which side of the table do you see the {c} block?",
        ),
        (
            "Which side do I find the {c} block on?",
            "The {c} block is on which side?",
        ),
    ),
    "inside": Wordings(
        (
            "Is the {c} block {where}?",
            "Does the {c} block lie {where}?",
            "Is it true that the {c} block is {where}?",
            "Do you see the {c} block {where}?",
            "Is there a {c} block {where}?",
        ),
        ("Would you say that the {c} block is {where}?", "The {c} block is {where}, right?"),
    ),
    "which inside": Wordings(
        (
            "Which block is {where}?",
            "What is {where}?",
            "Which blocks do you see {where}?",
            "What lies {where}?",
            "Name the blocks {where}.",
            "Which of the blocks is {where}?",
        ),
        ("What can be seen {where}?", "Tell me which blocks are {where}."),
    ),
    "extreme": Wordings(
        (
            "Which block is {most}?",
            "Which block is the {most} one?",
            "Which of the blocks is furthest to the {way}?",
            "Which block lies furthest {way}?",
            "What is the {most} block?",
            "Name the {most} block.",
        ),
        (
            "Of all the blocks, which is the {most}?",
            "Which block is more to the {way} than the others?",
        ),
    ),
    "order": Wordings(
        (
            "Is the {a} block to the left of the {b} block?",
            "Is the {a} block further left than the {b} block?",
            "Is the {a} block left of the {b} one?",
            "Does the {a} block lie to the left of the {b} block?",
        ),
        ("Do you see the {a} block left of the {b} block?",),
    ),
    "order right": Wordings(
        (
            "Is the {a} block to the right of the {b} block?",
            "Is the {a} block further right than the {b} block?",
            "Is the {a} block right of the {b} one?",
            "Does the {a} block lie to the right of the {b} block?",
        ),
        ("Do you see the {a} block right of the {b} block?",),
    ),
    "further": Wordings(
        (
            "Which block is further to the {way}, the {a} or the {b} one?",
            "Is the {a} block or the {b} block further {way}?",
            "Which is further {way}, the {a} block or the {b} block?",
        ),
        ("Of the {a} and the {b} block, which is more to the {way}?",),
    ),
    "nearest": Wordings(
        (
            "Which block is nearest to the {spot}?",
            "Which block is closest to the {spot}?",
            "What is the block nearest to the {spot}?",
            "Which of the blocks lies closest to the {spot}?",
            "Name the block next to the {spot}.",
        ),
        (
            "Which block is the least far from the {spot}?",
            "Which block do you see nearest the {spot}?",
        ),
    ),
    "nearer": Wordings(
        (
            "Which block is nearer to the {c} block, the {a} or the {b} one?",
            "Is the {a} or the {b} block closer to the {c} block?",
            "Which is closer to the {c} block, the {a} block or the {b} block?",
        ),
        ("Of the {a} and the {b} block, which is nearer to the {c} block?",),
    ),
    "nearer spot": Wordings(
        (
            "Which block is nearer to the {spot}, the {a} or the {b} one?",
            "Is the {a} or the {b} block closer to the {spot}?",
            "Which is closer to the {spot}, the {a} block or the {b} block?",
        ),
        ("Of the {a} and the {b} block, which is nearer to the {spot}?",),
    ),
    "middle": Wordings(
        (
            "Which block has one block on either side of it?",
            "Which block is neither the leftmost nor the rightmost?",
            "What is the middle block?",
            "Which block comes second from the left?",
        ),
        ("Name the block in the middle of the row.",),
    ),
    "spot side": Wordings(
        (
            "Is the {spot} on the left or on the right?",
            "On which side is the {spot}?",
            "Which side of the table is the {spot} on?",
            "Left or right: where is the {spot}?",
            "At which end of the table do you see the {spot}?",
        ),
        ("Which side do I find the {spot} on?", "The {spot} is on which side?"),
    ),
    "drawer": Wordings(
        (
            "Is the drawer open or closed?",
            "What is the state of the drawer?",
            "How is the drawer?",
            "Open or closed: the drawer?",
            "Tell me whether the drawer is open or closed.",
        ),
        ("In what state is the drawer?", "Has the drawer been left open or closed?"),
    ),
    "drawer yes": Wordings(
        (
            "Is the drawer {word}?",
            "Is it true that the drawer is {word}?",
            "Do you see that the drawer is {word}?",
            "Has somebody left the drawer {word}?",
        ),
        ("Would you say that the drawer is {word}?",),
    ),
    "door": Wordings(
        (
            "Is the sliding door on the left or on the right?",
            "On which side is the sliding door?",
            "Where has the sliding door been moved to?",
            "Is the slider left or right?",
            "To which side has the door been slid?",
        ),
        ("Which side is the sliding door on?", "The sliding door is at which side?"),
    ),
    "door yes": Wordings(
        (
            "Is the sliding door on the {word}?",
            "Has the door been slid to the {word}?",
            "Is the slider at the {word} side?",
            "Is it true that the sliding door is on the {word}?",
        ),
        ("Would you say that the sliding door is on the {word}?",),
    ),
    "light": Wordings(
        (
            "Is the {light} on or off?",
            "How is the {light}, on or off?",
            "What is the state of the {light}?",
            "Tell me whether the {light} is on or off.",
        ),
        ("On or off, how is the {light}?",),
    ),
    "light yes": Wordings(
        (
            "Is the {light} {word}?",
            "Has the {light} been turned {word}?",
            "Is the {light} switched {word}?",
            "Is it true that the {light} is {word}?",
        ),
        ("Would you say that the {light} is {word}?",),
    ),
    "holds": Wordings(
        (
            "What is the gripper holding?",
            "Which block does the robot hold?",
            "What is in the gripper, if anything?",
            "What does the hand hold?",
            "What has the robot grasped?",
            "What is the robot holding in its hand?",
        ),
        ("Which thing is held by the robot?", "Is there something in the gripper, and what?"),
    ),
    "holds yes": Wordings(
        (
            "Is the robot holding the {c} block?",
            "Does the gripper hold the {c} block?",
            "Is the {c} block in the hand?",
            "Has the robot grasped the {c} block?",
        ),
        ("Is it the {c} block that the robot holds?",),
    ),
    "gripper side": Wordings(
        (
            "Is the gripper on the left, in the middle or on the right?",
            "On which side is the robot hand?",
            "Left, middle or right: where is the gripper?",
            "Which side is the hand of the robot on?",
        ),
        ("On which side do you see the gripper?",),
    ),
    "gripper height": Wordings(
        (
            "Is the gripper high or low?",
            "How high is the robot hand, high or low?",
            "High or low: where is the gripper?",
            "Is the hand of the robot high or low?",
        ),
        ("Would you say that the gripper is high or low?",),
    ),
    "count": Wordings(
        (
            "How many blocks are {where}?",
            "How many blocks do you see {where}?",
            "What is the number of blocks {where}?",
            "Count the blocks {where}.",
        ),
        ("Tell me how many blocks there are {where}.",),
    ),
    "count seen": Wordings(
        (
            "How many blocks can you see?",
            "How many blocks are visible?",
            "Count the blocks in the picture.",
            "What is the number of blocks in view?",
        ),
        ("How many of the blocks are in sight?",),
    ),
    "count lights": Wordings(
        ("How many lights are on?", "How many lights are lit?", "Count the lights that are on."),
        ("What is the number of lit lights?",),
    ),
    "absent where": Wordings(
        (
            "Where is the {thing}?",
            "Where does the {thing} lie?",
            "Where can I find the {thing}?",
            "Tell me where the {thing} is.",
            "On which side is the {thing}?",
            "Which block is nearest to the {thing}?",
        ),
        ("Where should I look for the {thing}?", "The {thing}, where is it?"),
    ),
    "absent yes": Wordings(
        (
            "Is there a {thing}?",
            "Do you see a {thing}?",
            "Can you find a {thing} in the picture?",
            "Is a {thing} on the table?",
        ),
        ("Is any {thing} to be seen?",),
    ),
    "stack": Wordings(
        (
            "Is a block stacked on another block?",
            "Is there a stack of blocks?",
            "Does one block lie on top of another?",
            "Are two blocks stacked?",
        ),
        ("Do you see one block on another?",),
    ),
    "on top": Wordings(
        (
            "What is on top of the {c} block?",
            "Which block lies on the {c} block?",
            "What has been stacked on the {c} block?",
        ),
        ("Which block do you see on top of the {c} block?",),
    ),
    "unknowable": Wordings(
        (
            "How heavy is the {c} block?",
            "Who put the {c} block there?",
            "What is the name of the robot?",
            "What is behind the wall?",
            "What time is it?",
            "What is inside the {c} block?",
            "Which block was moved first?",
            "How old is the table?",
            "What will the robot do next?",
            "Who built the robot?",
        ),
        (
            "How much does the {c} block cost?",
            "What did the robot do yesterday?",
            "Who owns the table?",
        ),
    ),
    "describe block": Wordings(
        (
            "Describe the {c} block.",
            "What can you say of the {c} block?",
            "Say where the {c} block is, and on which side.",
        ),
        ("Give a description of the {c} block.",),
    ),
    "describe lights": Wordings(
        ("Describe the lights.", "How are the lights?", "What can you say of the lights?"),
        ("Give a description of the lights.",),
    ),
    "describe furniture": Wordings(
        (
            "Describe the drawer and the door.",
            "How are drawer and door?",
            "What can you say of the drawer and the sliding door?",
        ),
        ("Give a description of the drawer and the door.",),
    ),
    "describe robot": Wordings(
        ("Describe the robot.", "How is the gripper?", "What can you say of the robot?"),
        ("Give a description of the robot.",),
    ),
    "caption": Wordings(
        (
            "Describe the picture.",
            "What do you see?",
            "Describe the scene.",
            "What is on the table and around it?",
            "Say everything that you see.",
        ),
        ("Give a full description of the picture.",),
    ),
}
KINDS = tuple(WORDINGS)
PLACES = {
    "table": "on the table",
    "cabinet": "in the cabinet",
    "drawer": "in the drawer",
    "gripper": "in the gripper",
}
# Other words for the same place, in questions only.
SAYINGS = {
    "table": ("on the table", "on the table top"),
    "cabinet": ("in the cabinet", "in the sliding cabinet"),
    "drawer": ("in the drawer",),
    "gripper": ("in the gripper", "in the hand"),
}
LIGHTS = {
    "bulb": ("light bulb", "lamp", "yellow light", "bulb"),
    "led": ("LED", "green light", "LED light"),
}


@dataclass(frozen=True, slots=True)
class Asked:
    """One question: its kind, its words, the right answer, and whether its wording is held out."""

    kind: str
    question: str
    answer: str
    held_out: bool = False

    def to_json(self) -> list[Any]:
        """Return plain data."""
        return [self.kind, self.question, self.answer, int(self.held_out)]


def the(colours: Sequence[str]) -> str:
    """Return "the red block and the blue block" of colours in the order of `COLOURS`."""
    named = [f"the {c} block" for c in COLOURS if c in colours]
    if not named:
        return "none"
    return ", ".join(named[:-1]) + (" and " if named[:-1] else "") + named[-1]


def yes(right: bool) -> str:
    """Return yes or no."""
    return "yes" if right else "no"


def place_words(view: TableView, colour: str) -> str:
    """Return where a block is, in words."""
    place = view.place[colour]
    if place == "hidden":
        return CANNOT_TELL
    return f"on the {view.under[colour]} block" if place == "stack" else PLACES[place]


def sentence_of(view: TableView, colour: str) -> str:
    """Return one sentence about a block."""
    if view.place[colour] == "hidden":
        return f"The {colour} block cannot be seen."
    side = view.side(colour)
    words = {"left": ", on the left", "right": ", on the right", "middle": ", in the middle"}
    return f"The {colour} block is {place_words(view, colour)}{words[side] if side else ''}."


def lights_of(view: TableView) -> str:
    """Return one sentence about the lights."""
    return f"The light bulb is {view.bulb} and the LED is {view.led}."


def furniture_of(view: TableView) -> str:
    """Return one sentence about drawer and door."""
    door = {"left": "on the left", "right": "on the right", None: "in between"}[view.door]
    return f"The drawer is {view.drawer or 'half open'} and the sliding door is {door}."


def robot_of(view: TableView) -> str:
    """Return one sentence about the robot."""
    side = side_of(view.tcp[0])
    words = {"left": " on the left", "right": " on the right", "middle": " in the middle", None: ""}
    height = f" {view.gripper_height}" if view.gripper_height else ""
    holds = f"the {view.holds} block" if view.holds else "nothing"
    return f"The gripper is{height}{words[side]} and holds {holds}."


def caption_of(view: TableView) -> str:
    """Return everything in sentences."""
    blocks = [sentence_of(view, c) for c in COLOURS]
    return " ".join([*blocks, furniture_of(view), lights_of(view), robot_of(view)])


class _Asker:
    """Collects questions about one view, in wordings drawn at random."""

    def __init__(self, rng: np.random.Generator, held_out: float) -> None:
        self._rng, self._share = rng, held_out
        self.made: list[Asked] = []

    def ask(self, kind: str, answer: str, **words: str) -> None:
        held = bool(self._rng.uniform() < self._share)
        wordings = WORDINGS[kind].held_out if held else WORDINGS[kind].train
        text = wordings[int(self._rng.integers(len(wordings)))].format(**words)
        self.made.append(Asked(kind, text, answer, held))

    def pick(self, options: Sequence[str]) -> str:
        return options[int(self._rng.integers(len(options)))]

    def chance(self, share: float) -> bool:
        return bool(self._rng.uniform() < share)


def talk(view: TableView, rng: np.random.Generator, held_out: float = 0.0) -> list[Asked]:
    """Return about forty questions with answers, in wordings drawn at random.

    Args:
        view: what the picture shows.
        rng: where every draw comes from.
        held_out: share of the questions that is put in wordings kept from training.
    """
    asker = _Asker(rng, held_out)
    _blocks(view, asker)
    _relations(view, asker)
    _furniture(view, asker)
    _counts(view, asker)
    _nothing_there(asker)
    _descriptions(view, asker)
    return asker.made


def _blocks(view: TableView, asker: _Asker) -> None:
    for c in COLOURS:
        asker.ask("where", place_words(view, c), c=c)
        if view.place[c] == "hidden":
            if asker.chance(0.5):
                asker.ask("side", CANNOT_TELL, c=c)
        elif (side := view.side(c)) is not None:
            asker.ask("side", side, c=c)
        place = view.place[c]
        # Half of the questions whether it is somewhere are true.
        there = place if place in PLACES and asker.chance(0.5) else asker.pick(tuple(PLACES))
        where = asker.pick(SAYINGS[there])
        asker.ask(
            "inside", CANNOT_TELL if place == "hidden" else yes(place == there), c=c, where=where
        )
    for place in ("drawer", "cabinet", "table"):
        found = [c for c in view.seen if view.place[c] == place]
        if place == "drawer" and not found:
            if view.drawer is None:
                continue
            answer = CANNOT_TELL if view.drawer == "closed" else "none"
        else:
            answer = the(found)
        asker.ask("which inside", answer, where=asker.pick(SAYINGS[place]))


def _relations(view: TableView, asker: _Asker) -> None:
    for way, side in ((-1, "left"), (1, "right")):
        most = view.extreme(way)
        if most is not None and len(view.seen) > 1:
            asker.ask("extreme", the([most]), most=f"{side}most", way=side)
    for first, second in combinations(COLOURS, 2):
        a, b = (first, second) if asker.chance(0.5) else (second, first)
        left = view.left_of(a, b)
        if "hidden" in (view.place[a], view.place[b]):
            if asker.chance(0.4):
                asker.ask(asker.pick(("order", "order right")), CANNOT_TELL, a=a, b=b)
            continue
        if left is None:
            continue
        if asker.chance(0.5):
            asker.ask("order", yes(left), a=a, b=b)
        else:
            asker.ask("order right", yes(not left), a=a, b=b)
        to = asker.pick(("left", "right"))
        asker.ask("further", the([a if left == (to == "left") else b]), a=a, b=b, way=to)
    for name, spot in (*view.spots.items(), ("gripper", view.tcp)):
        # What is in the hand is nearest to it: that is another question.
        among = [c for c in COLOURS if c != view.holds] if name == "gripper" else COLOURS
        near = view.nearest(spot, among)
        if near is not None and len(view.seen) > 1 and not (name == "gripper" and view.holds):
            asker.ask("nearest", the([near]), spot=name)
    for name, spot in view.spots.items():
        # What is nearest to it can only be told by who sees where it is.
        asker.ask("spot side", end_of(spot), spot=name)
        a, b = _two(asker)
        near = view.nearest(spot, (a, b))
        if near is not None and "hidden" not in (view.place[a], view.place[b]):
            asker.ask("nearer spot", the([near]), a=a, b=b, spot=name)
    if view.middle is not None:
        asker.ask("middle", the([view.middle]))
    for c in COLOURS:
        a, b = (other for other in COLOURS if other != c)
        near = view.nearest(view.xyz[c], (a, b))
        if len(view.seen) == 3 and near is not None:
            asker.ask("nearer", the([near]), a=a, b=b, c=c)
    stacked = [c for c in view.seen if view.place[c] == "stack"]
    asker.ask("stack", yes(bool(stacked)))
    for c in stacked:
        asker.ask("on top", the([c]), c=view.under[c])
    if not stacked and asker.chance(0.3):
        asker.ask("on top", "none", c=asker.pick(view.seen or COLOURS))


def _two(asker: _Asker) -> tuple[str, str]:
    """Two colours in any order."""
    a = asker.pick(COLOURS)
    return a, asker.pick(tuple(c for c in COLOURS if c != a))


def _furniture(view: TableView, asker: _Asker) -> None:
    if view.drawer is not None:
        asker.ask("drawer", view.drawer)
        word = asker.pick(("open", "closed"))
        asker.ask("drawer yes", yes(view.drawer == word), word=word)
    if view.door is not None:
        asker.ask("door", view.door)
        word = asker.pick(("left", "right"))
        asker.ask("door yes", yes(view.door == word), word=word)
    for light, state in (("bulb", view.bulb), ("led", view.led)):
        asker.ask("light", state, light=asker.pick(LIGHTS[light]))
        word = asker.pick(("on", "off"))
        asker.ask("light yes", yes(state == word), light=asker.pick(LIGHTS[light]), word=word)
    asker.ask("holds", the([view.holds]) if view.holds else "nothing")
    c = view.holds if view.holds and asker.chance(0.5) else asker.pick(COLOURS)
    asker.ask("holds yes", yes(view.holds == c), c=c)
    side = side_of(view.tcp[0])
    if side is not None:
        asker.ask("gripper side", side)
    if view.gripper_height is not None:
        asker.ask("gripper height", view.gripper_height)


def _counts(view: TableView, asker: _Asker) -> None:
    place = asker.pick(("table", "cabinet", "drawer"))
    if place != "drawer" or view.drawer == "open":
        found = [c for c in view.seen if view.place[c] == place]
        asker.ask("count", NUMBERS[len(found)], where=asker.pick(SAYINGS[place]))
    asker.ask("count seen", NUMBERS[len(view.seen)])
    asker.ask("count lights", NUMBERS[(view.bulb == "on") + (view.led == "on")])


def _nothing_there(asker: _Asker) -> None:
    thing = f"{asker.pick(ABSENT)} block" if asker.chance(0.7) else asker.pick(THINGS)
    asker.ask("absent where", f"there is no {thing}", thing=thing)
    thing = f"{asker.pick(ABSENT)} block" if asker.chance(0.7) else asker.pick(THINGS)
    if asker.chance(0.6):
        asker.ask("absent yes", "no", thing=thing)
    else:
        asker.ask("absent yes", "yes", thing=f"{asker.pick(COLOURS)} block")
    if asker.chance(0.5):
        asker.ask("unknowable", CANNOT_TELL, c=asker.pick(COLOURS))


def _descriptions(view: TableView, asker: _Asker) -> None:
    c = asker.pick(COLOURS)
    asker.ask("describe block", sentence_of(view, c), c=c)
    about = {
        "describe lights": lights_of(view),
        "describe furniture": furniture_of(view),
        "describe robot": robot_of(view),
    }
    kind = asker.pick(tuple(about))
    asker.ask(kind, about[kind])
    if asker.chance(0.3):
        asker.ask("caption", caption_of(view))


def labels(view: TableView) -> dict[str, str]:
    """Return what a picture shows as one word a question, for a read-out without language.

    What cannot be said is left out.
    """
    found: dict[str, str | None] = {}
    for c in COLOURS:
        visible = view.place[c] != "hidden"
        found[f"{c} place"] = view.place[c]
        found[f"{c} side"] = view.side(c) if visible else "hidden"
    for a, b in combinations(COLOURS, 2):
        left = view.left_of(a, b)
        found[f"{a} left of {b}"] = None if left is None else yes(left)
    found |= {"leftmost": view.extreme(-1), "rightmost": view.extreme(1)}
    for name, spot in (*view.spots.items(), ("gripper", view.tcp)):
        found[f"nearest {name}"] = view.nearest(spot, COLOURS)
    found |= {"drawer": view.drawer, "door": view.door, "bulb": view.bulb, "led": view.led}
    found |= {"holds": view.holds or "nothing", "gripper side": side_of(view.tcp[0])}
    found["gripper height"] = view.gripper_height
    found |= {f"{name} side": end_of(spot) for name, spot in view.spots.items()}
    return {name: word for name, word in found.items() if word is not None}
