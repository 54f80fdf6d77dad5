"""CALVIN's 34 tasks as one table of data and nine oracles that read info only.

A task is a *change* between two `info` dictionaries. Everything an oracle needs (body
identifiers, table links, contacts) is looked up in those dictionaries and never in a
simulator, so the same oracle judges PlayTable, the real calvin_env and a recorded run
alike. All comparisons are strict, as CALVIN's are.

Of a pybullet contact tuple only two entries are read: the other body (index 2) and its
link (index 4); link -1 is a body's base.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from openhelix.runtime.core.plugins import none_of

Info = Mapping[str, Any]
Touch = tuple[int, int]  # (body, link)

BLOCKS = ("block_red", "block_blue", "block_pink")
MAX_TILT_DEG = 30.0  # a rotation with more tilt than this is a tumble
MAX_TURN_DEG = 180.0
MAX_SHIFT_M = 0.1  # a rotated block may move this far and no farther
MAX_STACK_SPEED = 1.0  # m/s and rad/s, each component: a block flying past is not stacked


@dataclass(frozen=True, slots=True)
class Task:
    """One task.

    Attributes:
        name: CALVIN's name.
        family: The oracle that judges it, a key of `ORACLES`.
        sentence: CALVIN's validation sentence.
        target: What changes, as info names it: a block, a door joint or a light; "" for any.
        threshold: Signed change that must be exceeded: degrees (rotate), metres along x
            (push), metres up (lift), metres of joint travel (door), or the light's new state.
        link: The table link a block leaves (lift) or reaches (place, push_into).
    """

    name: str
    family: str
    sentence: str
    target: str = ""
    threshold: float = 0.0
    link: str = ""


class UnknownTaskError(ValueError):
    """The name is not one of the 34 tasks."""


def _touching(contacts: Any) -> set[Touch]:
    """What a contact list touches, as (body, link) pairs."""
    return {(int(c[2]), int(c[4])) for c in contacts}


def _bodies(contacts: Any) -> set[int]:
    return {int(c[2]) for c in contacts}


def _blocks(info: Info) -> Mapping[str, Any]:
    return info["scene_info"]["movable_objects"]


def _robot(info: Info) -> int:
    return int(info["robot_info"]["uid"])


def _surface(info: Info, link: str) -> Touch:
    """(body, link) of one of the table's links by name."""
    table = info["scene_info"]["fixed_objects"]["table"]
    return int(table["uid"]), int(table["links"][link])


def _shift(task: Task, start: Info, end: Info) -> np.ndarray:
    """(3,) metres the task's block moved, world frame."""
    before = _blocks(start)[task.target]["current_pos"]
    after = _blocks(end)[task.target]["current_pos"]
    return np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)


def turn_deg(start_xyzw: Any, end_xyzw: Any) -> tuple[float, float, float]:
    """World-frame rotation `end * start^-1` as fixed-axis Euler angles (x, y, z), degrees.

    Args:
        start_xyzw: (4,) quaternion xyzw, need not be exactly of unit length.
        end_xyzw: (4,) the same, later.
    """
    a = np.asarray(end_xyzw, dtype=np.float64)
    b = np.asarray(start_xyzw, dtype=np.float64)
    # end * conj(start), vector part then scalar part
    v = b[3] * a[:3] - a[3] * b[:3] - np.cross(a[:3], b[:3])
    w = a[3] * b[3] + a[:3] @ b[:3]
    x, y, z = (float(c) for c in v)
    w = float(w)
    n = x * x + y * y + z * z + w * w
    roll = math.atan2(2 * (y * z + w * x), n - 2 * (x * x + y * y))
    pitch = math.asin(max(-1.0, min(1.0, 2 * (w * y - x * z) / n)))
    yaw = math.atan2(2 * (x * y + w * z), n - 2 * (y * y + z * z))
    return math.degrees(roll), math.degrees(pitch), math.degrees(yaw)


def _exceeds(change: float, threshold: float) -> bool:
    """Whether a signed change goes strictly past a signed threshold, on its side of zero."""
    return change > threshold if threshold > 0 else change < threshold


def rotated(task: Task, start: Info, end: Info) -> bool:
    """The block turned about z, stayed about where it was, and something still holds it up."""
    before, after = _blocks(start)[task.target], _blocks(end)[task.target]
    if float(np.linalg.norm(_shift(task, start, end))) > MAX_SHIFT_M:
        return False
    if not _bodies(after["contacts"]) - {_robot(start)}:
        return False
    roll, pitch, yaw = turn_deg(before["current_orn"], after["current_orn"])
    upright = abs(roll) < MAX_TILT_DEG and abs(pitch) < MAX_TILT_DEG
    return upright and _exceeds(yaw, task.threshold) and abs(yaw) < MAX_TURN_DEG


def pushed(task: Task, start: Info, end: Info) -> bool:
    """The block moved along x and still touches whatever it lay on."""
    robot = _robot(start)
    before, after = (
        {t for t in _touching(_blocks(i)[task.target]["contacts"]) if t[0] != robot}
        for i in (start, end)
    )
    if not before or not before <= after:
        return False
    return _exceeds(float(_shift(task, start, end)[0]), task.threshold)


def door_moved(task: Task, start: Info, end: Info) -> bool:
    """The sliding door or the drawer travelled far enough in the wanted direction."""
    before, after = (
        float(np.ravel(i["scene_info"]["doors"][task.target]["current_state"])[0])
        for i in (start, end)
    )
    return _exceeds(after - before, task.threshold)


def lifted(task: Task, start: Info, end: Info) -> bool:
    """The block left its surface, rose, and now touches the robot and nothing else."""
    before, after = _blocks(start)[task.target], _blocks(end)[task.target]
    return (
        float(_shift(task, start, end)[2]) > task.threshold
        and _bodies(after["contacts"]) == {_robot(start)}
        and _surface(start, task.link) in _touching(before["contacts"])
    )


def placed(task: Task, start: Info, end: Info) -> bool:
    """The one block the robot held is let go of and touches its destination."""
    held = _bodies(start["robot_info"]["contacts"])
    if len(held) != 1 or held & _bodies(end["robot_info"]["contacts"]):
        return False
    for name, before in _blocks(start).items():
        if int(before["uid"]) in held:
            alone = _bodies(before["contacts"]) == {_robot(start)}
            after = _blocks(end)[name]
            return alone and _surface(end, task.link) in _touching(after["contacts"])
    return False


def pushed_into(task: Task, start: Info, end: Info) -> bool:
    """Any block that lay on the table top alone now touches the drawer.

    CALVIN means to exclude blocks that the robot touches at either time, but its test
    compares a body with (body, link) pairs and so never fires. A robot contact at the
    *start* is excluded all the same, by "exactly one contact"; one at the end is not, and
    scores that are to compare with CALVIN's must not exclude it either.
    """
    source, goal = _surface(start, "base_link"), _surface(end, task.link)
    return any(
        _touching(before["contacts"]) == {source}
        and goal in _touching(_blocks(end)[name]["contacts"])
        for name, before in _blocks(start).items()
    )


def _rests_on_blocks(info: Info, name: str, blocks: set[int]) -> bool:
    """Whether a block touches other blocks, nothing else, and is nearly at rest."""
    block = _blocks(info)[name]
    touched = _bodies(block["contacts"])
    speeds = np.abs(np.concatenate([block["current_lin_vel"], block["current_ang_vel"]]))
    return bool(touched) and touched <= blocks and bool((speeds < MAX_STACK_SPEED).all())


def _is_free(info: Info, name: str, blocks: set[int]) -> bool:
    return not _bodies(_blocks(info)[name]["contacts"]) & blocks


def stacked(task: Task, start: Info, end: Info) -> bool:
    """A block that touched no other block now rests on blocks only."""
    ids = {int(b["uid"]) for b in _blocks(start).values()}
    return any(
        _is_free(start, name, ids) and _rests_on_blocks(end, name, ids) for name in _blocks(start)
    )


def unstacked(task: Task, start: Info, end: Info) -> bool:
    """A block that rested on blocks only now touches no block."""
    ids = {int(b["uid"]) for b in _blocks(start).values()}
    return any(
        _rests_on_blocks(start, name, ids) and _is_free(end, name, ids) for name in _blocks(start)
    )


def light_switched(task: Task, start: Info, end: Info) -> bool:
    """The light went from the other state to the wanted one."""
    before, after = (
        int(i["scene_info"]["lights"][task.target]["logical_state"]) for i in (start, end)
    )
    return after == int(task.threshold) and before == 1 - int(task.threshold)


Oracle = Callable[[Task, Info, Info], bool]
ORACLES: Mapping[str, Oracle] = {
    "rotate": rotated,
    "push": pushed,
    "door": door_moved,
    "lift": lifted,
    "place": placed,
    "push_into": pushed_into,
    "stack": stacked,
    "unstack": unstacked,
    "light": light_switched,
}


def _table() -> tuple[Task, ...]:
    """The 34 tasks in CALVIN's order, on which its sequence generator depends."""
    rows: list[Task] = []
    for family, size in (("rotate", -60.0), ("push", 0.1)):
        for block in BLOCKS:
            color = block.removeprefix("block_")
            for side, sign in (("right", 1), ("left", -1)):
                text = (
                    f"take the {color} block and rotate it to the {side}"
                    if family == "rotate"
                    else f"go push the {color} block {side}"
                )
                name = f"{family}_{color}_block_{side}"
                rows.append(Task(name, family, text, block, sign * size))
    for side, travel in (("left", 0.15), ("right", -0.15)):
        text = f"push the sliding door to the {side} side"
        rows.append(Task(f"move_slider_{side}", "door", text, "base__slide", travel))
    for verb, hand, travel in (("open", "pull", 0.12), ("close", "push", -0.12)):
        text = f"{hand} the handle to {verb} the drawer"
        rows.append(Task(f"{verb}_drawer", "door", text, "base__drawer", travel))
    lifts = (
        ("table", "grasp and lift the {} block", 0.05, "base_link"),
        ("slider", "lift the {} block from the sliding cabinet", 0.03, "plank_link"),
        ("drawer", "Take the {} block from the drawer", 0.05, "drawer_link"),
    )
    for block in BLOCKS:
        color = block.removeprefix("block_")
        for place, text, rise, link in lifts:
            name = f"lift_{color}_block_{place}"
            rows.append(Task(name, "lift", text.format(color), block, rise, link))
    for place, text, link in (
        ("slider", "sliding cabinet", "plank_link"),
        ("drawer", "drawer", "drawer_link"),
    ):
        sentence = f"store the grasped block in the {text}"
        rows.append(Task(f"place_in_{place}", "place", sentence, link=link))
    rows.append(Task("stack_block", "stack", "stack the grasped block"))
    rows.append(Task("unstack_block", "unstack", "remove the stacked block"))
    for light, text in (
        ("lightbulb", "use the switch to turn {} the light bulb"),
        ("led", "press the button to turn {} the led light"),
    ):
        for word, state in (("on", 1.0), ("off", 0.0)):
            name = f"turn_{word}_{light}"
            rows.append(Task(name, "light", text.format(word), light, state))
    text = "slide the block that it falls into the drawer"
    rows.append(Task("push_into_drawer", "push_into", text, link="drawer_link"))
    return tuple(rows)


TASKS: Mapping[str, Task] = {task.name: task for task in _table()}
TASK_NAMES: tuple[str, ...] = tuple(TASKS)


def get_task(name: str) -> Task:
    """The task of this name.

    Raises:
        UnknownTaskError: No such task; the message names the valid ones.
    """
    try:
        return TASKS[name]
    except (KeyError, TypeError):
        raise UnknownTaskError(f"task: {none_of(name, TASK_NAMES)}") from None


def sentence(name: str) -> str:
    """CALVIN's validation sentence of a task.

    Raises:
        UnknownTaskError: No such task.
    """
    return get_task(name).sentence


def is_completed(name: str, start_info: Info, end_info: Info) -> bool:
    """Whether one task was done between two infos; the cheap test for every control step.

    Args:
        name: One of `TASK_NAMES`.
        start_info: `info` (from `get_info`) when the task was given.
        end_info: `info` now.

    Raises:
        UnknownTaskError: No such task.
    """
    task = get_task(name)
    return ORACLES[task.family](task, start_info, end_info)


def completed(start_info: Info, end_info: Info) -> set[str]:
    """The names of all tasks done between two infos (CALVIN's or PlayTable's).

    Raises:
        ValueError: one of them is no such info.
    """
    for name, info in (("start_info", start_info), ("end_info", end_info)):
        if not isinstance(info, Mapping) or not {"robot_info", "scene_info"} <= info.keys():
            raise ValueError(
                f"{name}: has no robot_info and scene_info; give what get_info() returned"
            )
    return {
        task.name for task in TASKS.values() if ORACLES[task.family](task, start_info, end_info)
    }
