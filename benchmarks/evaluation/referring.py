"""CALVIN-R: instructions whose task, one of the 34, only the picture resolves.

"Push the leftmost block to the right", "toggle the lamp", "lift the block that lies on the
table": which task that is depends on where things are when it is said. Every reference here is
plain data, and `Reference.resolve` tells the task from the start state. A start in which a
sentence has no clear referent (two blocks as far left, none in the drawer) is not used.

A balanced list asks every reference equally often for each of its tasks, so that a system that
ignores the picture is right at most `blind_chance` of the time.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from openhelix.benchmarks.calvin.expert_control import View
from openhelix.benchmarks.calvin.scene import Scene
from openhelix.benchmarks.calvin.table_talk import COLOURS, TableView
from openhelix.benchmarks.calvin.tasks import TASKS
from openhelix.runtime.core.interfaces import F64, U8
from openhelix.runtime.core.plugins import none_of

log = logging.getLogger(__name__)
BUTTON_YZ_M, SWITCH_YZ_M = (-0.12, 0.48), (0.04, 0.53)
DRAWER_SHUT_M, DRAWER_OPEN_M = 0.05, 0.16  # as the tasks need it


class NoSuchReference(ValueError):
    """There is no such reference; the message names the valid ones."""


def whole_view(info: Mapping[str, Any], scene: Scene) -> TableView:
    """Return what is where, by ground truth: `TableView` of an info.

    A block in the closed drawer or behind the door is "hidden"; everything else counts as seen,
    whatever the arm covers.
    """
    view = View(scene, info)
    place: dict[str, str] = {}
    under: dict[str, str] = {}
    for c in COLOURS:
        name = f"block_{c}"
        below = [
            n for n in view.neighbours(name)
            if view.blocks[n].position[2] < view.blocks[name].position[2] - 0.02
        ]  # fmt: skip
        if view.held(name):
            place[c] = "gripper"
        elif below:
            place[c], under[c] = "stack", below[0].removeprefix("block_")
        elif view.on(name, "drawer_link"):
            place[c] = "drawer" if view.drawer > DRAWER_SHUT_M else "hidden"
        elif view.on(name, "plank_link"):
            place[c] = "cabinet" if _in_the_open(view, name) else "hidden"
        else:
            place[c] = "table"
    held = view.in_hand()
    slide = view.slide / scene.slide_travel
    x, y, z = (float(v) for v in view.position)
    return TableView(
        place=place,
        under=under,
        xyz={c: _point(view.blocks[f"block_{c}"].position) for c in COLOURS},
        drawer="open" if view.drawer > DRAWER_OPEN_M else "closed" if view.drawer < DRAWER_SHUT_M else None,
        door="left" if slide > 0.75 else "right" if slide < 0.25 else None,
        bulb="on" if view.bulb else "off",
        led="on" if view.led else "off",
        holds=held.removeprefix("block_") if held else "",
        tcp=(x, y, z),
        spots={
            "button": (scene.button_x, *BUTTON_YZ_M),
            "switch": (scene.switch_x, *SWITCH_YZ_M),
        },
    )  # fmt: skip


def _point(values: F64) -> tuple[float, float, float]:
    x, y, z = (float(v) for v in values)
    return x, y, z


def _in_the_open(view: View, name: str) -> bool:
    """Whether a block in the cabinet lies in the door's gap."""
    from openhelix.benchmarks.calvin.starts import opening

    low, high = opening(view)
    return bool(low < view.blocks[name].position[0] < high)


Referent = Callable[[TableView], str | None]


def _only_in(place: str) -> Referent:
    def find(view: TableView) -> str | None:
        found = [c for c in view.seen if view.place[c] == place]
        return found[0] if len(found) == 1 else None

    return find


BLOCKS: Mapping[str, tuple[Referent, tuple[str, ...]]] = {
    "leftmost": (
        lambda view: view.extreme(-1),
        ("the leftmost block", "the block furthest to the left"),
    ),
    "rightmost": (
        lambda view: view.extreme(1),
        ("the rightmost block", "the block furthest to the right"),
    ),
    "middle": (
        lambda view: view.middle,
        ("the middle one of the three blocks", "the block between the other two"),
    ),
    "on_table": (
        _only_in("table"),
        ("the block that lies on the table", "the only block on the table top"),
    ),
    "in_cabinet": (
        _only_in("cabinet"),
        ("the block that lies in the cabinet", "the only block in the sliding cabinet"),
    ),
    "in_drawer": (
        _only_in("drawer"),
        ("the block that lies in the drawer", "the only block inside the drawer"),
    ),
    "near_button": (
        lambda view: view.nearest(view.spots["button"], COLOURS),
        ("the block nearest to the button", "the block closest to the button"),
    ),
    "near_switch": (
        lambda view: view.nearest(view.spots["switch"], COLOURS),
        ("the block nearest to the switch", "the block closest to the switch"),
    ),
}
_LIFT = ("lift {}", "pick up {}", "grasp {} and lift it")
_PUSH = ("push {} to the {}", "shove {} towards the {}", "move {} to the {} by pushing it")
_ROTATE = ("rotate {} to the {}", "turn {} {}", "take {} and rotate it to the {}")
_TOGGLES: Mapping[str, tuple[tuple[str, ...], Mapping[str, str], Callable[[TableView], str | None]]] = {
    "toggle_bulb": (
        ("toggle the lamp", "switch the light bulb to its other state", "use the switch"),
        {"on": "turn_off_lightbulb", "off": "turn_on_lightbulb"},
        lambda view: view.bulb,
    ),
    "toggle_led": (
        ("toggle the LED", "change the state of the green light", "press the button"),
        {"on": "turn_off_led", "off": "turn_on_led"},
        lambda view: view.led,
    ),
    "other_side": (
        ("slide the door to its other side", "move the slider to where it is not"),
        {"left": "move_slider_right", "right": "move_slider_left"},
        lambda view: view.door,
    ),
    "drawer_other_way": (
        ("open the drawer if it is closed, else close it", "bring the drawer into its other state"),
        {"open": "close_drawer", "closed": "open_drawer"},
        lambda view: view.drawer,
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Reference:
    """One thing to say and what it can mean.

    Attributes:
        name: "push_leftmost_right", "toggle_bulb", ...
        sentences: ways to say it; the first is the standard one.
        tasks: everything that it can mean, in the tasks' order.
        pick: from a view to a task; None where there is no clear referent.
    """

    name: str
    sentences: tuple[str, ...]
    tasks: tuple[str, ...]
    pick: Callable[[TableView], str | None]

    def resolve(self, view: TableView) -> str | None:
        """Return the task that is meant in a state, by name; None where none is."""
        task = self.pick(view)
        return task if task in self.tasks else None


def _about_blocks() -> list[Reference]:
    made = []
    for key, (find, names) in BLOCKS.items():
        made.append(_lift(key, find, names))
        # What lies in cabinet or drawer can be lifted and nothing else.
        if key in ("in_cabinet", "in_drawer"):
            continue
        for family, forms in (("push", _PUSH), ("rotate", _ROTATE)):
            for side in ("left", "right"):
                made.append(_turned(key, find, names, family, forms, side))
    return made


def _lift(key: str, find: Referent, names: tuple[str, ...]) -> Reference:
    links = {"table": "table", "cabinet": "slider", "drawer": "drawer"}

    def pick(view: TableView) -> str | None:
        colour = find(view)
        link = links.get(view.place[colour]) if colour else None
        return f"lift_{colour}_block_{link}" if link else None

    fixed = {"on_table": ("table",), "in_cabinet": ("slider",), "in_drawer": ("drawer",)}
    places = fixed.get(key, tuple(links.values()))
    tasks = tuple(t for t in TASKS if TASKS[t].family == "lift" and t.split("_")[3] in places)
    return Reference(f"lift_{key}", _said(_LIFT, names), tasks, pick)


def _turned(
    key: str, find: Referent, names: tuple[str, ...], family: str, forms: tuple[str, ...], side: str
) -> Reference:
    def pick(view: TableView) -> str | None:
        colour = find(view)
        if colour is None or view.place[colour] != "table":
            return None
        return f"{family}_{colour}_block_{side}"

    tasks = tuple(t for t in TASKS if TASKS[t].family == family and t.endswith(side))
    return Reference(f"{family}_{key}_{side}", _said(forms, names, side), tasks, pick)


def _said(forms: tuple[str, ...], names: tuple[str, ...], *words: str) -> tuple[str, ...]:
    return tuple(form.format(name, *words) for name in names for form in forms)


def _about_fixtures() -> list[Reference]:
    made = []
    for name, (sentences, meaning, state) in _TOGGLES.items():

        def pick(
            view: TableView,
            meaning: Mapping[str, str] = meaning,
            state: Callable[[TableView], str | None] = state,
        ) -> str | None:
            return meaning.get(state(view) or "")

        tasks = tuple(task for task in TASKS if task in meaning.values())
        made.append(Reference(name, sentences, tasks, pick))
    return made


REFERENCES: Mapping[str, Reference] = {
    reference.name: reference for reference in (*_about_blocks(), *_about_fixtures())
}


def get_reference(name: str) -> Reference:
    """Return the reference of this name.

    Raises:
        NoSuchReference: there is none.
    """
    if name not in REFERENCES:
        raise NoSuchReference(f"reference: {none_of(name, REFERENCES)}")
    return REFERENCES[name]


def resolved(view: TableView, feasible: Sequence[str]) -> dict[str, str]:
    """Return what every reference means in a state, of those that mean a feasible task."""
    found = {}
    for name, reference in REFERENCES.items():
        task = reference.resolve(view)
        if task is not None and task in feasible:
            found[name] = task
    return found


@dataclass(frozen=True, slots=True)
class Referred:
    """One episode of CALVIN-R: plain data, made from settings and a seed alone.

    Attributes:
        key: says what it is; two evaluations are paired by it.
        scene: "A" to "D".
        reference: name in `REFERENCES`.
        sentence: what is said.
        task: what it means in the start; `begin` finds such a start.
        draw: seed of the start.
    """

    key: str
    scene: str
    reference: str
    sentence: str
    task: str
    draw: tuple[int, ...]


def referred(
    scenes: Sequence[str] = ("D",), count: int = 1, seed: int = 0, references: Sequence[str] = ()
) -> list[Referred]:
    """Return the balanced list: every reference, for each task that it can mean, `count` times.

    Args:
        scenes: in order.
        count: starts of each pair of reference and task.
        seed: of starts and wordings.
        references: names; () for all.

    Raises:
        NoSuchReference: an unknown name.
    """
    made = []
    for scene in scenes:
        for name in references or tuple(REFERENCES):
            reference = get_reference(name)
            for task in reference.tasks:
                for number in range(count):
                    key = f"{scene}/{name}/{task}/{number}"
                    draw = (zlib.crc32(key.encode()), seed)
                    rng = np.random.default_rng([*draw, 1])
                    sentence = str(rng.choice(reference.sentences))
                    made.append(Referred(key, scene, name, sentence, task, draw))
    return made


def blind_chance(episodes: Sequence[Referred]) -> float:
    """Return the best share of tasks that can be named from the sentences alone."""
    counts: dict[str, dict[str, int]] = {}
    for episode in episodes:
        tasks = counts.setdefault(episode.reference, {})
        tasks[episode.task] = tasks.get(episode.task, 0) + 1
    return sum(max(tasks.values()) for tasks in counts.values()) / max(1, len(episodes))


def begin(
    env: Any, name: str, task: str, rng: np.random.Generator, tries: int = 150
) -> dict[str, Any]:
    """Put an environment into a start in which a reference means `task`.

    Args:
        env: a PlayTable.
        name: of the reference.
        task: one that it can mean.
        rng: where every draw comes from.
        tries: starts of the task that are looked at.

    Returns:
        its info.

    Raises:
        StartError: none was found.
    """
    from openhelix.benchmarks.calvin.starts import StartError
    from openhelix.benchmarks.calvin.starts import begin as begin_task

    reference = get_reference(name)
    for _ in range(tries):
        try:
            info = begin_task(env, task, rng)
        except StartError:
            continue
        if reference.resolve(whole_view(info, env.scene)) == task:
            return info
    raise StartError(f"reference: no start in which {name} means {task} in {tries} tries")


def pictures(episodes: Sequence[Referred]) -> Iterator[tuple[Referred, U8]]:
    """Yield every episode with the static camera's picture of its start, (200, 200, 3).

    For asking what System 2 makes of a sentence without letting a robot move. Episodes of a scene
    share a world, so they come fastest when sorted by scene. An episode whose start is so rare that
    none is found is left out, with a warning.
    """
    from openhelix.benchmarks.calvin.env import PlayTableEnv
    from openhelix.benchmarks.calvin.starts import StartError

    env: PlayTableEnv | None = None
    try:
        for episode in episodes:
            if env is None or env.scene.name != episode.scene:
                if env is not None:
                    env.close()
                env = PlayTableEnv(episode.scene, cameras=("static",))
            rng = np.random.default_rng([*episode.draw, 0])
            try:
                begin(env, episode.reference, episode.task, rng)
            except StartError as error:
                log.warning("%s: left out: %s", episode.key, error)
                continue
            yield episode, env.render_frames()["static"].rgb
    finally:
        if env is not None:
            env.close()
