"""Robot instructions for one picture, and the plain sentence that each of them means there.

"Grab the block at the left end" means "lift the red block from the table" in one picture and
"lift the blue block out of the drawer" in another. Training data for a System 2 that looks: it
learns to say the plain sentence, and to have a latent like that sentence's. The wordings here
are for training alone: CALVIN-R (`openhelix.benchmarks.evaluation.referring`) says the same relations in
others, which no training sees. Nothing here needs the simulator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from openhelix.benchmarks.calvin import refusals
from openhelix.benchmarks.calvin.phrases import normalised
from openhelix.benchmarks.calvin.table_talk import COLOURS
from openhelix.benchmarks.calvin.tasks import TASK_NAMES, TASKS
from openhelix.benchmarks.calvin.wordings import drawn, reserved

Labels = Mapping[str, str]  # as `table_talk.labels` returns them
NOTHING = "do nothing"
ALTHOUGH = 0.25  # of what names its task: with a "not", or more around it than it needs
_LINKS = {"table": "table", "cabinet": "slider", "drawer": "drawer"}  # place: as tasks name it
_LIFT_FROM = {"table": "from the table", "slider": "from the cabinet", "drawer": "from the drawer"}
_OTHERS = {
    "move_slider_left": "slide the door to the left",
    "move_slider_right": "slide the door to the right",
    "open_drawer": "open the drawer",
    "close_drawer": "close the drawer",
    "place_in_slider": "put the held block into the cabinet",
    "place_in_drawer": "put the held block into the drawer",
    "stack_block": "stack the held block on another block",
    "unstack_block": "take the upper block off the stack",
    "turn_on_lightbulb": "switch on the light bulb",
    "turn_off_lightbulb": "switch off the light bulb",
    "turn_on_led": "switch on the green LED",
    "turn_off_led": "switch off the green LED",
    "push_into_drawer": "sweep the block into the drawer",
}


def plain(task: str | None) -> str:
    """Return the one plain sentence of a task; `NOTHING` of None."""
    if task is None:
        return NOTHING
    if task in _OTHERS:
        return _OTHERS[task]
    family, colour, _, last = task.split("_")
    if family == "lift":
        return f"lift the {colour} block {_LIFT_FROM[last]}"
    return f"{family} the {colour} block to the {last}"


def _only(place: str) -> Callable[[Labels], str | None]:
    def find(known: Labels) -> str | None:
        there = [c for c in COLOURS if known.get(f"{c} place") == place]
        return there[0] if len(there) == 1 else None

    return find


def _middle(known: Labels) -> str | None:
    ends = {known.get("leftmost"), known.get("rightmost")} - {None}
    seen = [c for c in COLOURS if known.get(f"{c} place") != "hidden"]
    rest = [c for c in seen if c not in ends]
    return rest[0] if len(seen) == 3 and len(ends) == 2 and len(rest) == 1 else None


_BLOCKS: Mapping[str, tuple[Callable[[Labels], str | None], tuple[str, ...]]] = {
    "leftmost": (
        lambda known: known.get("leftmost"),
        (
            "the block at the left end",
            "the block on the far left",
            "whichever block is most to the left",
            "the left one of the blocks",
            "the block that lies further left than the others",
        ),
    ),
    "rightmost": (
        lambda known: known.get("rightmost"),
        (
            "the block at the right end",
            "the block on the far right",
            "whichever block is most to the right",
            "the right one of the blocks",
            "the block that lies further right than the others",
        ),
    ),
    "middle": (
        _middle,
        (
            "the middle block",
            "the block in the middle",
            "the one between the two other blocks",
            "the block that is neither leftmost nor rightmost",
        ),
    ),
    "on_table": (
        _only("table"),
        (
            "the one that stands on the table",
            "whatever block is on the table",
            "the single block on the desk",
            "the block which is on the table top",
        ),
    ),
    "in_cabinet": (
        _only("cabinet"),
        (
            "the one in the sliding cabinet",
            "whatever block is in the cabinet",
            "the single block on the cabinet's shelf",
            "the block which is inside the cabinet",
        ),
    ),
    "in_drawer": (
        _only("drawer"),
        (
            "the one in the open drawer",
            "whatever block is in the drawer",
            "the single block down in the drawer",
            "the block which is inside the drawer",
        ),
    ),
    "near_button": (
        lambda known: known.get("nearest button"),
        (
            "the block next to the button",
            "the block by the button",
            "whichever block is least far from the button",
            "the block that lies nearer to the button than the others",
        ),
    ),
    "near_switch": (
        lambda known: known.get("nearest switch"),
        (
            "the block next to the switch",
            "the block by the light switch",
            "whichever block is least far from the switch",
            "the block that lies nearer to the switch than the others",
        ),
    ),
}
_LIFT = (
    "take {} and lift it",
    "pick {} up",
    "lift {} up",
    "raise {}",
    "get hold of {} and raise it",
)
_PUSH = ("push {} {}", "slide {} to the {}", "give {} a push to the {}", "push {} over to the {}")
_TURN = ("rotate {} {}", "turn {} to the {}", "twist {} to the {}", "give {} a turn to the {}")
_STATES: tuple[tuple[str, str, Mapping[str, str], tuple[str, ...]], ...] = (
    (
        "toggle_bulb",
        "bulb",
        {"on": "turn_off_lightbulb", "off": "turn_on_lightbulb"},
        (
            "flip the light switch",
            "change the state of the lamp",
            "switch the bulb over",
            "if the bulb is lit put it out, otherwise light it",
            "operate the switch of the light bulb",
        ),
    ),
    (
        "toggle_led",
        "led",
        {"on": "turn_off_led", "off": "turn_on_led"},
        (
            "push the button",
            "switch the LED over",
            "toggle the green light",
            "if the LED is lit put it out, otherwise light it",
            "operate the button",
        ),
    ),
    (
        "other_side",
        "door",
        {"left": "move_slider_right", "right": "move_slider_left"},
        (
            "move the sliding door to the opposite side",
            "push the slider across to the other end",
            "bring the door over to the side where it is not",
            "change the position of the sliding door",
        ),
    ),
    (
        "drawer_other_way",
        "drawer",
        {"open": "close_drawer", "closed": "open_drawer"},
        (
            "pull the drawer out if it is in, otherwise push it in",
            "change the state of the drawer",
            "toggle the drawer",
            "if the drawer is shut open it, if it is open shut it",
        ),
    ),
)


@dataclass(frozen=True, slots=True)
class Goal:
    """One instruction for one picture.

    Attributes:
        said: what a person says.
        task: what it means there; None where it means none of the tasks.
        looks: whether only the picture tells.
    """

    said: str
    task: str | None
    looks: bool

    @property
    def plain(self) -> str:
        """What it means, in one plain sentence."""
        return plain(self.task)


def references(known: Labels) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Return what can be said by looking: {name: (the task that is meant, ways to say it)}.

    Args:
        known: what a picture shows, see `table_talk.labels`; what it leaves out is not spoken of.
    """
    found: dict[str, tuple[str, tuple[str, ...]]] = {}
    for key, (find, names) in _BLOCKS.items():
        colour = find(known)
        link = _LINKS.get(known.get(f"{colour} place", "")) if colour else None
        if link is None:
            continue
        task = f"lift_{colour}_block_{link}"
        found[f"lift_{key}"] = (task, tuple(f.format(n) for n in names for f in _LIFT))
        if link != "table":
            continue
        for family, forms in (("push", _PUSH), ("rotate", _TURN)):
            for side in ("left", "right"):
                task = f"{family}_{colour}_block_{side}"
                said = tuple(f.format(n, side) for n in names for f in forms)
                found[f"{family}_{key}_{side}"] = (task, said)
    for name, thing, meaning, said in _STATES:
        if known.get(thing) in meaning:
            found[name] = (meaning[known[thing]], said)
    return found


def every_wording() -> set[str]:
    """Return every sentence that `references` can ever give."""
    said = {text for *_, texts in _STATES for text in texts}
    for _, names in _BLOCKS.values():
        for name in names:
            said |= {form.format(name) for form in _LIFT}
            said |= {f.format(name, side) for f in (*_PUSH, *_TURN) for side in ("left", "right")}
    return said


def by_relation(names: Iterable[str]) -> dict[str, list[str]]:
    """Return the names that `references` gives by what has to be looked for."""
    found: dict[str, list[str]] = {}
    for name in names:
        relation = next((key for key in _BLOCKS if key in name), name)
        found.setdefault(relation, []).append(name)
    return found


def goals(
    known: Labels,
    rng: np.random.Generator,
    blocks: int = 8,
    fixtures: int = 2,
    told: int = 4,
    nothing: int = 2,
) -> list[Goal]:
    """Return instructions for one picture.

    Every relation between blocks that the picture has is asked for once before any is asked for
    again: which block is nearest to the switch is far harder to see than whether a lamp is lit,
    and the lift, the push and the turn of one block teach the eye the same thing.

    Args:
        known: what it shows.
        rng: where every draw comes from.
        blocks: at most so many that only the picture resolves, about blocks.
        fixtures: and about drawer, door and lights.
        told: sentences that name their task, of any task, in the training grammar's words.
        nothing: sentences that name no task: what is not to be done, not there, or nonsense.
    """
    possible = references(known)
    relations = by_relation(possible)
    made = [
        Goal(str(rng.choice(said)), task, True)
        for wanted, among in (
            (blocks, [key for key in relations if key in _BLOCKS]),
            (fixtures, [key for key in relations if key not in _BLOCKS]),
        )
        for name in _in_turn({key: relations[key] for key in among}, wanted, rng)
        for task, said in [possible[name]]
    ]
    made += [_told(known, rng) for _ in range(told)]
    return made + [Goal(refusals.nothing(rng), None, False) for _ in range(nothing)]


def _in_turn(
    relations: Mapping[str, list[str]], wanted: int, rng: np.random.Generator
) -> list[str]:
    """Draw names, one of each relation in turn; lifts, pushes and turns evenly within one."""
    left = {key: _by_family(names) for key, names in relations.items()}
    order = [str(key) for key in rng.permutation(sorted(left))] if left else []
    chosen: list[str] = []
    while len(chosen) < wanted and any(left[key] for key in order):
        for key in order:
            if left[key] and len(chosen) < wanted:
                families = sorted(left[key])
                family = families[int(rng.integers(len(families)))]
                chosen.append(str(rng.choice(left[key].pop(family))))
    return chosen


def _by_family(names: Iterable[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(name.split("_")[0], []).append(name)
    return found


def _told(known: Labels, rng: np.random.Generator) -> Goal:
    """A sentence that names its task, in the training grammar's words."""
    task = str(rng.choice(TASK_NAMES))
    if TASKS[task].family == "lift":
        # Many sentences do not say where the block is: the picture does.
        colour = task.split("_")[1]
        link = _LINKS.get(known.get(f"{colour} place", ""))
        task = f"lift_{colour}_block_{link}" if link else task
    if rng.random() < ALTHOUGH:
        return Goal(refusals.although(task, rng), task, False)
    text = drawn(task, rng)
    while normalised(text) in reserved():
        text = drawn(task, rng)
    return Goal(text, task, False)
