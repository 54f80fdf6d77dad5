"""Start states: a world in which a given task can be done, and an arm somewhere in it.

A task that begins with a block in the hand begins with an expert's grasp, and any task may
begin where another one has just ended.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import pi
from typing import Any

import numpy as np

from openhelix.benchmarks.calvin.demonstrations import perform, random_expert
from openhelix.benchmarks.calvin.env import PlayTableEnv
from openhelix.benchmarks.calvin.expert_control import ROBOT_XY_M, WIDEST_GRASP_M, View, hand, wrap
from openhelix.benchmarks.calvin.geometry import CABINET_HALF_X, DOOR_SIZE_X
from openhelix.benchmarks.calvin.scene import (
    BLOCK_SIDE_M,
    DRAWER_TRAVEL_M,
    SWITCH_THRESHOLD_M,
    Scene,
)
from openhelix.benchmarks.calvin.sequences import ROBOT_OBS, SWITCH_ON_M, get_layout
from openhelix.benchmarks.calvin.tasks import TASK_NAMES, get_task
from openhelix.runtime.core.interfaces import F64
from openhelix.runtime.core.plugins import none_of
from openhelix.runtime.core.quaternion import from_euler_xyz

# -- Layouts: where blocks, doors and lights are, drawn at random for a task -----------
#
# Half of them follow CALVIN's layouts (its slots, its yaws), since that is what evaluation
# starts from; the others put things anywhere that the scene allows.

REACH_M = 0.83  # from the arm's base to a block, horizontally
DRAWER_Z_M, SHELF_Z_M, TABLE_Z_M = 0.362, 0.461, 0.46
APART_M = 0.105
ASKEW_RAD = 1.0  # of the long block in the cabinet, at most, for the hand to fit
PLACES = ("table", "slider_left", "slider_right")
CLOSE_STEPS = 4  # a closing hand travels its whole way in four steps


@dataclass(slots=True)
class Layout:
    """A world in words and numbers: what `scene_obs` is made from.

    Attributes:
        slide, drawer, switch: joint positions, m.
        bulb, led: 0 or 1.
        place: where each block is: "table", "slider_left", "slider_right", "drawer" or
            "on <block>".
        at: x and y in m, and yaw in rad if it matters, of blocks that lie on the table just there.
        exact: use CALVIN's slots instead of random places.
    """

    slide: float = 0.0
    drawer: float = 0.0
    switch: float = 0.0
    bulb: int = 0
    led: int = 0
    place: dict[str, str] = field(default_factory=dict)
    exact: bool = False
    at: dict[str, tuple[float, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, words: Mapping[str, Any], scene: Scene) -> Layout:
        """Return the layout that `world.layout` describes.

        Args:
            words: "drawer" (open, closed, or m), "slider" (left, right, or m), "bulb" and "led"
                (on, off), and "blocks": by colour, a place as above or [x, y, yaw], m and rad on
                the table. What is left out is closed, right, off, or on the table somewhere.
            scene: where it is to be.

        Raises:
            LayoutError: in one line, what it says that cannot be, and what is valid.
        """
        _known("", words, ("drawer", "slider", "bulb", "led", "blocks"))
        layout = cls(
            drawer=_amount("drawer", words, {"closed": 0.0, "open": DRAWER_TRAVEL_M}),
            slide=_amount("slider", words, {"right": 0.0, "left": scene.slide_travel}),
            bulb=int(_amount("bulb", words, {"off": 0.0, "on": 1.0})),
            led=int(_amount("led", words, {"off": 0.0, "on": 1.0})),
        )
        layout.switch = SWITCH_ON_M * layout.bulb
        colours = {name.removeprefix("block_"): name for name in scene.blocks}
        given = words.get("blocks", {})
        if not isinstance(given, Mapping):
            raise LayoutError("world.layout.blocks: say {red: drawer, blue: [0.1, -0.1]}")
        _known("blocks.", given, tuple(colours))
        for colour, name in colours.items():
            place = given.get(colour, "table")
            on = place.removeprefix("on ").strip() if isinstance(place, str) else ""
            if isinstance(place, list | tuple):
                if len(place) not in (2, 3) or not all(isinstance(v, int | float) for v in place):
                    raise LayoutError(
                        f"world.layout.blocks.{colour}: {place}, expected [x, y, yaw]"
                    )
                layout.at[name], place = tuple(map(float, place)), "table"
            elif isinstance(place, str) and place.startswith("on ") and on in colours:
                place = f"on {colours[on]}"
            elif place not in (*PLACES, "drawer"):
                valid = ", ".join((*PLACES, "drawer"))
                raise LayoutError(
                    f"world.layout.blocks.{colour}: {place!r}; valid: {valid}, on COLOUR, [x, y, yaw]"
                )
            layout.place[name] = place
        return layout


class LayoutError(ValueError):
    """A layout in words says what cannot be; the line names the field and what is valid."""


def _known(where: str, words: Mapping[str, Any], valid: tuple[str, ...]) -> None:
    for name in words:
        if name not in valid:
            raise LayoutError(f"world.layout.{where}{none_of(name, valid)}")


def _amount(name: str, words: Mapping[str, Any], named: Mapping[str, float]) -> float:
    """A number between two that have names, which YAML may have read as true or false."""
    value = words.get(name, next(iter(named)))
    if isinstance(value, bool):
        value = {True: "on", False: "off"}[value]
    if isinstance(value, str) and value in named:
        return named[value]
    low, high = min(named.values()), max(named.values())
    switches = set(named) == {"on", "off"}
    if isinstance(value, int | float) and low <= value <= high and not switches:
        return float(value)
    more = "" if switches else f", or {low:g} to {high:g} m"
    raise LayoutError(f"world.layout.{name}: {value!r}; valid: {', '.join(named)}{more}")


def random_layout(scene: Scene, rng: np.random.Generator) -> Layout:
    """A world of CALVIN's kind: one or two blocks on the table, the others in the cabinet."""
    layout = Layout(exact=bool(rng.uniform() < 0.5))
    layout.slide = scene.slide_travel if rng.uniform() < 0.5 else 0.0
    layout.drawer = DRAWER_TRAVEL_M if rng.uniform() < 0.5 else 0.0
    layout.bulb, layout.led = int(rng.integers(2)), int(rng.integers(2))
    layout.switch = SWITCH_ON_M if layout.bulb else 0.0
    if not layout.exact:
        layout.slide = _loosen(rng, layout.slide, scene.slide_travel)
        layout.drawer = _loosen(rng, layout.drawer, DRAWER_TRAVEL_M)
    names = list(rng.permutation(scene.blocks))
    in_cabinet = int(rng.integers(1, 3))
    sides = list(rng.permutation(PLACES[1:]))
    for i, name in enumerate(names):
        layout.place[name] = sides[i] if i < in_cabinet else "table"
    return layout


def _loosen(rng: np.random.Generator, value: float, travel: float) -> float:
    """A door is not always quite at its stop."""
    return float(np.clip(value + rng.uniform(-0.04, 0.04), 0.0, travel))


def layout_for(task: str, scene: Scene, rng: np.random.Generator) -> Layout:
    """A random world in which `task` (not one that needs a block in the hand) can be done."""
    layout = random_layout(scene, rng)
    words = task.split("_")
    family = get_task(task).family
    if family in ("rotate", "push") or task.endswith("_table"):
        _claim(layout, f"block_{words[1]}", "table")
    elif task.endswith("block_slider"):
        side = "left" if rng.uniform() < 0.5 else "right"
        _claim(layout, f"block_{words[1]}", f"slider_{side}")
        layout.slide = scene.slide_travel if side == "right" else 0.0
    elif task.endswith("block_drawer"):
        layout.drawer = DRAWER_TRAVEL_M
        layout.place[f"block_{words[1]}"] = "drawer"
    elif words[1] == "slider":
        layout.slide = 0.0 if words[2] == "left" else scene.slide_travel
        if not layout.exact:
            layout.slide = _loosen(rng, layout.slide, scene.slide_travel)
    elif words[1] == "drawer":
        layout.drawer = 0.0 if words[0] == "open" else DRAWER_TRAVEL_M
        if not layout.exact:
            layout.drawer = _loosen(rng, layout.drawer, DRAWER_TRAVEL_M)
    elif family == "light":
        before = int(words[1] == "off")
        if words[2] == "led":
            layout.led = before
        else:
            layout.bulb, layout.switch = before, SWITCH_ON_M * before
    elif family == "unstack":
        bottom, top = list(rng.permutation(scene.blocks))[:2]
        _claim(layout, bottom, "table")
        layout.place[top] = f"on {bottom}"
    elif family == "push_into":
        layout.drawer = DRAWER_TRAVEL_M
        names = list(rng.permutation(scene.blocks))
        layout.place = dict(zip(names, PLACES, strict=True))
    return layout


def _claim(layout: Layout, name: str, place: str) -> None:
    """Put a block at a place; in the cabinet, whoever was there takes its place."""
    before = layout.place[name]
    for other, where in layout.place.items():
        if where == place != "table":
            layout.place[other] = before
    layout.place[name] = place


def scene_obs(layout: Layout, scene: Scene, rng: np.random.Generator) -> F64 | None:
    """The (24,) vector of a layout; None where the blocks did not fit."""
    values = np.zeros(24)
    values[:2] = layout.slide, layout.drawer
    values[3:6] = layout.switch, layout.bulb, layout.led
    poses: dict[str, F64] = {}
    slots = [np.array(slot) for slot in rng.permutation(np.array(get_layout(scene.name).table))]
    order = sorted(scene.blocks, key=lambda name: layout.place[name].startswith("on "))
    for name in order:
        pose = _block_pose(name, layout, scene, rng, poses, slots)
        if pose is None:
            return None
        poses[name] = pose
    for i, name in enumerate(scene.blocks):
        values[6 + 6 * i : 12 + 6 * i] = poses[name]
    return values


def _block_pose(
    name: str,
    layout: Layout,
    scene: Scene,
    rng: np.random.Generator,
    taken: Mapping[str, F64],
    slots: list[F64],
) -> F64 | None:
    place = layout.place[name]
    if name in layout.at:
        x, y, *yaw = layout.at[name]
        return np.array([x, y, TABLE_Z_M, 0.0, 0.0, yaw[0] if yaw else pi / 2])
    if place.startswith("on "):
        base = taken[place[3:]]
        shift = rng.uniform(-0.004, 0.004, 2)
        yaw = base[5] + rng.uniform(-0.25, 0.25) + rng.integers(2) * pi / 2
        spot = np.array([base[0] + shift[0], base[1] + shift[1], base[2] + BLOCK_SIDE_M])
        return np.array([*spot, 0.0, 0.0, yaw])
    if layout.exact and place in PLACES and (slots or place != "table"):
        fixed = slots.pop() if place == "table" else getattr(get_layout(scene.name), place)
        return np.array([*fixed, 0.0, 0.0, rng.uniform(3 * pi / 8, 5 * pi / 8)])
    for _ in range(60):
        spot = _anywhere(place, layout, scene, rng)
        gaps = [np.linalg.norm(spot[:2] - other[:2]) for other in taken.values()]
        if all(gap > APART_M for gap in gaps) and in_reach(spot):
            return np.array([*spot, 0.0, 0.0, _any_yaw(name, place, scene, rng)])
    return None


def _any_yaw(name: str, place: str, scene: Scene, rng: np.random.Generator) -> float:
    """Any yaw; but the long block has no room to be grasped lengthwise in the cabinet."""
    if place.startswith("slider") and dict(scene.block_lengths)[name] > WIDEST_GRASP_M:
        return float(pi / 2 + rng.uniform(-ASKEW_RAD, ASKEW_RAD) + rng.integers(2) * pi)
    return float(rng.uniform(-pi, pi))


def _anywhere(place: str, layout: Layout, scene: Scene, rng: np.random.Generator) -> F64:
    if place == "drawer":
        x = scene.drawer_x + rng.uniform(-0.12, 0.12)
        return np.array([x, -layout.drawer - rng.uniform(0.02, 0.11), DRAWER_Z_M])
    surface = dict(scene.surfaces)[place]
    z = TABLE_Z_M if place == "table" else SHELF_Z_M
    return np.array([rng.uniform(*surface.x), rng.uniform(*surface.y), z])


def in_reach(spot: F64) -> bool:
    return bool(np.hypot(spot[0] - ROBOT_XY_M[0], spot[1] - ROBOT_XY_M[1]) < REACH_M)


# -- Starts: an arm somewhere in a layout ----------------------------------------------


class StartError(RuntimeError):
    """No start state for a task was found."""


def random_arm(env: PlayTableEnv, rng: np.random.Generator) -> F64:
    """A `robot_obs` (15,) with the tool anywhere over the table; disturbs the arm of `env`."""
    for _ in range(20):
        spot = np.array([rng.uniform(-0.2, 0.32), rng.uniform(-0.32, -0.06), 0.0])
        spot[2] = rng.uniform(0.50, 0.66)
        tilt = max(rng.normal(0.0, 0.25), 0.0) if rng.uniform() < 0.4 else 0.0
        quaternion = hand(1.5 + float(np.clip(rng.normal(0, 0.5), -1.2, 1.2)), tilt)
        finger = 0.04 if rng.uniform() < 0.6 else 0.0
        env.robot.reset(ROBOT_OBS[7:14], finger)
        for _ in range(8):
            env.robot.reset(env.robot.solve_ik(spot, quaternion), finger)
        reached = np.array(env.robot.tcp()[0])
        if np.linalg.norm(reached - spot) < 0.004:
            width, grip = 2 * finger, 1.0 if finger else -1.0
            return np.array([*reached, 0.0, 0.0, 0.0, width, *env.robot.joints(), grip])
    return np.array(ROBOT_OBS)


def home(scene: Scene) -> F64:
    """The `robot_obs` (15,) that the arm rests at; a generated scene's is somewhat off CALVIN's.

    Of a generated scene's only the joints and the gripper are right, which is all that a
    reset reads.
    """
    rest = np.array(ROBOT_OBS)
    if scene.variant is not None:
        rest[7:14] += scene.variant.home_rad
    return rest


def reset_to(env: PlayTableEnv, layout: Layout, rng: np.random.Generator) -> bool:
    """Reset `env` to a layout with an arm pose; False where the blocks did not fit."""
    world = scene_obs(layout, env.scene, rng)
    if world is None:
        return False
    robot = home(env.scene) if rng.uniform() < 0.4 else random_arm(env, rng)
    env.reset(robot, world)
    return True


def feasible(view: View) -> list[str]:
    """The tasks that can be done from a state, by what is where (not by symbols)."""
    held = view.in_hand()
    if held is not None:
        return _with_block_in_hand(view, held)
    if any(view.gripped(name) for name in view.blocks):
        return []
    return [task for task in TASK_NAMES if _can(task, view)]


def _with_block_in_hand(view: View, held: str) -> list[str]:
    found = ["place_in_slider"]
    if view.drawer > 0.17:
        found.append("place_in_drawer")
    free = [n for n in view.blocks if n != held and _lies_free(view, n)]
    if free:
        found.append("stack_block")
    return found


def opening(view: View) -> tuple[float, float]:
    """Return between which x the door leaves the cabinet open, m."""
    scene = view.scene
    left, right = scene.plank_x - CABINET_HALF_X, scene.plank_x + CABINET_HALF_X
    door = scene.slide_x - view.slide
    gaps = [(left, max(door, left)), (min(door + DOOR_SIZE_X, right), right)]
    return max(gaps, key=lambda gap: gap[1] - gap[0])


def _lies_free(view: View, name: str) -> bool:
    """Alone on the table top, and within reach."""
    block = view.blocks[name]
    alone = block.touches == {(view.table_uid, view.links["base_link"])}
    x, y, z = block.position
    on_top = 0.45 < z < 0.47 and -0.16 < y < 0.0 and -0.40 < x < 0.40
    return bool(alone and on_top and in_reach(block.position))


def _can(task: str, view: View) -> bool:
    words, scene = task.split("_"), view.scene
    family = get_task(task).family
    name = f"block_{words[1]}"
    if family in ("rotate", "push") or task.endswith("_table"):
        if not _lies_free(view, name):
            return False
        return family != "push" or _room_to_push(view, name, 1 if words[3] == "right" else -1)
    if task.endswith("block_slider"):
        low, high = opening(view)
        x = view.blocks[name].position[0]
        clear = low + 0.035 < x < high - 0.035 and not view.neighbours(name)
        block = view.blocks[name]
        askew = abs(wrap(block.yaw - pi / 2, pi))
        graspable = block.length < WIDEST_GRASP_M or askew < ASKEW_RAD
        return bool(view.on(name, "plank_link") and clear and graspable)
    if task.endswith("block_drawer"):
        alone = view.on(name, "drawer_link") and not view.neighbours(name)
        y = view.blocks[name].position[1]
        return bool(alone and view.drawer > 0.17 and y < -0.195)
    if words[1] == "slider":
        return view.slide < 0.06 if words[2] == "left" else view.slide > scene.slide_travel - 0.06
    if words[1] == "drawer":
        return view.drawer < 0.05 if words[0] == "open" else view.drawer > 0.16
    if family == "light":
        now = view.led if words[2] == "led" else view.bulb
        settled = words[2] == "led" or (view.switch > SWITCH_THRESHOLD_M) == bool(view.bulb)
        return settled and now == int(words[1] == "off")
    if family == "unstack":
        return _a_stack(view)
    lone = [n for n in view.blocks if _lies_free(view, n)]
    inside = [n for n in lone if abs(view.blocks[n].position[0] - scene.drawer_x) < 0.16]
    return family == "push_into" and view.drawer > 0.19 and len(lone) == 1 and bool(inside)


def _a_stack(view: View) -> bool:
    pairs = [n for n in view.blocks if view.neighbours(n)]
    tops = [n for n in pairs if view.blocks[n].position[2] > 0.485]
    return bool(len(pairs) == 2 and tops and in_reach(view.blocks[tops[0]].position))


def _room_to_push(view: View, name: str, way: int) -> bool:
    """Whether nothing stands in the block's way or in the hand's."""
    x, y, _ = view.blocks[name].position
    if not -0.42 < x + way * 0.11 < 0.47:
        return False
    for other, block in view.blocks.items():
        ahead = way * (block.position[0] - x)
        near = abs(block.position[1] - y) < 0.07 and block.position[2] < 0.55
        if other != name and near and -0.12 < ahead < 0.19:
            return False
    button = view.scene.button_x
    return not (abs(y + 0.12) < 0.065 and -0.06 < way * (button - x) < 0.17)


def begin(
    env: PlayTableEnv, task: str, rng: np.random.Generator, tries: int = 40
) -> dict[str, Any]:
    """Put `env` into a random state in which `task` can be done; return its info.

    About a third of the starts are the end of another task, and those with a block in the
    hand always are.

    Raises:
        UnknownTaskError: there is no such task.
        StartError: none was found in `tries` draws.
    """
    family = get_task(task).family
    for _ in range(tries):
        if family in ("place", "stack"):
            before = _task_before(env.scene, rng, task)
        else:
            before = None
        layout = layout_for(before or task, env.scene, rng)
        if task == "place_in_drawer":
            layout.drawer = DRAWER_TRAVEL_M
        if not reset_to(env, layout, rng):
            continue
        info = env.get_info()
        if before is None and rng.uniform() < 0.35:
            options = [t for t in feasible(View(env.scene, info)) if get_task(t).family != "lift"]
            options = [t for t in options if t != task]
            before = str(rng.choice(options)) if options else None
        if before is not None:
            tail = int(rng.integers(0, 4))
            if not perform(env, random_expert(env, before, rng), tail=tail).success:
                continue
            info = env.get_info()
        if task in feasible(View(env.scene, info)):
            return info
    raise StartError(f"task: no start state for {task} in scene {env.scene.name} in {tries} tries")


def lead_to(env: PlayTableEnv, task: str, rng: np.random.Generator, tries: int = 40) -> str:
    """Put `env` into a random state for another task, after which `task` can be done; return it.

    Where `begin` has an expert do the task before, somebody else may do it here, and ends it in
    states of its own: a block that is held just above the table, one pushed past the drawer.

    Raises:
        UnknownTaskError: there is no such task.
        StartError: none was found in `tries` draws.
    """
    family = get_task(task).family
    for _ in range(tries):
        before = _task_before(env.scene, rng, task) if family in ("place", "stack") else None
        layout = layout_for(before or task, env.scene, rng)
        if task == "place_in_drawer":
            layout.drawer = DRAWER_TRAVEL_M
        if not reset_to(env, layout, rng):
            continue
        possible = feasible(View(env.scene, env.get_info()))
        if before is None:
            possible = [t for t in possible if not _keeps_from(t, task)]
            before = str(rng.choice(possible)) if possible else ""
        if before in possible:
            return before
    raise StartError(f"task: nothing leads to {task} in scene {env.scene.name} in {tries} tries")


def _keeps_from(before: str, task: str) -> bool:
    """Whether `task` cannot follow `before`: done already, the hand is full, or it is undone."""
    ends = get_task(before).family
    # What the hand still touches counts as pushed nowhere, see `pushed_into`.
    undone = get_task(task).family == "push_into" and (ends == "rotate" or before == "close_drawer")
    return before == task or undone or ends in ("lift", "unstack")


def _task_before(scene: Scene, rng: np.random.Generator, task: str) -> str:
    """A lift, after which a block is in the hand."""
    where = ["table", "table", "slider", "drawer"]
    place = where[int(rng.integers(len(where)))]
    return f"lift_{str(rng.choice(scene.blocks)).removeprefix('block_')}_block_{place}"


def carry_over(model: PlayTableEnv, env: Any) -> None:
    """Put another env of CALVIN's kind into the state of a PlayTable.

    CALVIN's own state vectors say nothing of the gripper's command, so a closed hand is closed
    again there.
    """
    state, robot = model.get_state_obs(), model.get_info()["robot_info"]
    env.reset(state["robot_obs"], state["scene_obs"])
    if robot["gripper_action"] < 0:
        rotation = from_euler_xyz(robot["tcp_orn"])
        for _ in range(CLOSE_STEPS):
            env.advance((robot["tcp_pos"], rotation, -1))


def lay_out(env: Any, layout: Mapping[str, Any], seed: int) -> None:
    """Bring PlayTable or calvin_env into the layout that is described, with the arm at rest.

    Raises:
        LayoutError: it says what cannot be, or the blocks do not fit.
    """
    found = Layout.of(layout, env.scene)
    rng = np.random.default_rng(seed)
    for _ in range(40):
        world = scene_obs(found, env.scene, rng)
        if world is not None:
            env.reset(home(env.scene), world)
            return
    raise LayoutError("world.layout.blocks: they do not fit where they are to be")


DRAWS = 5  # of a start, each with another seed, before it is given up


def put_up(env: Any, task: str, seed: int) -> None:
    """Bring PlayTable or calvin_env into a random state in which `task` can be done.

    Raises:
        StartError: none was found.
    """
    if not isinstance(env, PlayTableEnv):
        with PlayTableEnv(env.scene, cameras=()) as model:
            put_up(model, task, seed)
            carry_over(model, env)
        return
    failed = StartError(f"task: no draw for {task}")
    for draw in range(DRAWS):
        try:
            begin(env, task, np.random.default_rng([seed, draw]))
        except StartError as error:
            failed = error
        else:
            return
    raise failed
