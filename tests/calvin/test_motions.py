"""Moving blocks: the paths as geometry, and the drive in physics."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from openhelix.benchmarks.calvin import motions
from openhelix.benchmarks.calvin.env import PlayTableEnv
from openhelix.benchmarks.calvin.motions import PATTERNS, MotionError, MovingBlock, make_path
from openhelix.benchmarks.calvin.sequences import initial_state

STATE = {
    **{"led": 0, "lightbulb": 0, "slider": "right", "drawer": "closed"},
    **{"red_block": "slider_left", "blue_block": "table", "pink_block": "table", "grasped": 0},
}
X, Y = (0.0, 0.35), (-0.15, -0.03)
HOLD = [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0]


@pytest.fixture(scope="module")
def env() -> Iterator[PlayTableEnv]:
    with PlayTableEnv("D", cameras=()) as made:
        yield made


def where(env: PlayTableEnv, color: str) -> np.ndarray:
    return np.array(env.world.block_pose(f"block_{color}")[0])


@given(st.floats(0.0, 0.35), st.floats(-0.15, -0.03), st.sampled_from(PATTERNS))
def test_paths_start_at_the_block_and_stay_in_its_area(x: float, y: float, pattern: str) -> None:
    path = make_path(pattern, (x, y), X, Y)
    np.testing.assert_allclose(path.point(0.0), (x, y), atol=1e-12)
    longest = path.length if path.center is None else 1.0
    points = [path.point(s) for s in np.linspace(0.0, longest, 50)]
    # no circle through a corner stays inside; it may leave by (1 - 1/sqrt(2)) of its radius
    slack = 1e-9 if path.center is None else 0.3 * motions.RADIUS_M
    for px, py in points:
        assert X[0] - slack <= px <= X[1] + slack
        assert Y[0] - slack <= py <= Y[1] + slack
    for (s0, p0), (s1, p1) in pairwise(zip(np.linspace(0, longest, 50), points, strict=True)):
        assert math.dist(p0, p1) <= (s1 - s0) + 1e-9  # never faster than along the path


def test_patterns_go_where_their_names_say() -> None:
    start = (0.23, -0.12)
    assert make_path("left", start, X, Y).end == (0.0, -0.12)
    assert make_path("forward", start, X, Y).end == (0.23, -0.03)
    assert make_path("diagonal", start, X, Y).end == (0.0, -0.03)
    assert make_path("static", start, X, Y).length == 0.0
    circle = make_path("circular", start, X, Y)
    assert circle.center is not None
    assert math.dist(circle.center, start) == pytest.approx(motions.RADIUS_M)
    turn = circle.point(2 * math.pi * motions.RADIUS_M)
    np.testing.assert_allclose(turn, start, atol=1e-12)


def test_presets_are_the_papers_speeds_and_multiples() -> None:
    assert motions.speed_m_s("left") == pytest.approx(0.23 / 38)
    assert motions.speed_m_s("circular", "x10") == pytest.approx(10 * 2 * math.pi * 0.03 / 38)
    assert motions.speed_m_s("static", "x20") == 0.0


@pytest.mark.parametrize("color", ["blue", "red"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_block_moves_at_its_speed_in_contact(env: PlayTableEnv, pattern: str, color: str) -> None:
    env.reset(*initial_state(STATE))
    start_info, start = env.get_info(), where(env, color)
    speed, steps = 0.03, 30
    with MovingBlock(env, color, pattern, speed) as motion:
        path = [start]
        for _ in range(steps):
            env.advance(HOLD)
            path.append(where(env, color))
    moved = float(np.linalg.norm(np.diff(np.array(path)[:, :2], axis=0), axis=1).sum())
    if pattern == "static":
        assert moved < 1e-3
        return
    assert moved == pytest.approx(speed * steps / 30, rel=0.12)
    assert motion.travelled_m == pytest.approx(speed * steps / 30)
    assert abs(path[-1][2] - start[2]) < 1e-3
    name = f"block_{color}"
    touched = {
        (c[2], c[4]) for c in env.get_info()["scene_info"]["movable_objects"][name]["contacts"]
    }
    assert touched >= {
        (c[2], c[4]) for c in start_info["scene_info"]["movable_objects"][name]["contacts"]
    }
    others = [c for c in ("red", "blue", "pink") if c != color]
    assert all(np.linalg.norm(where(env, c) - initial(env, c)) < 2e-3 for c in others)


def initial(env: PlayTableEnv, color: str) -> np.ndarray:
    row = env.scene.blocks.index(f"block_{color}")
    return initial_state(STATE)[1][6 + 6 * row :][:3]


def test_it_turns_back_at_the_end(env: PlayTableEnv) -> None:
    env.reset(*initial_state(STATE))
    with MovingBlock(env, "blue", "forward", 0.3) as motion:
        seen = []
        for _ in range(45):
            env.advance(HOLD)
            seen.append(where(env, "blue")[1])
    assert max(seen) <= motion.path.end[1] + 1e-3
    assert max(seen) > motion.path.end[1] - 0.02
    assert min(seen[20:]) < motion.path.start[1] + 0.03  # and back, 0.45 m in all


def test_another_block_in_the_way_turns_it_back(env: PlayTableEnv) -> None:
    env.reset(*initial_state(STATE))
    blue, pink = where(env, "blue"), where(env, "pink")
    # pink, put against the front of the cabinet, cannot be pushed farther forward
    env.world.set_block_pose("block_pink", (blue[0], -0.02, pink[2]), (0, 0, 0, 1))
    env.world.set_block_pose("block_blue", (blue[0], -0.10, blue[2]), (0, 0, 0, 1))
    with MovingBlock(env, "blue", "forward", 0.1) as motion:
        highest = -1.0
        for _ in range(60):
            env.advance(HOLD)
            highest = max(highest, where(env, "blue")[1])
            assert math.dist(where(env, "blue")[:2], motion.path.point(motion._s)) < 0.02
    assert highest < motion.path.end[1] - 0.005
    assert not motion.released


def test_touching_it_ends_it_for_good(env: PlayTableEnv) -> None:
    env.reset(*initial_state(STATE))
    with MovingBlock(env, "blue", "left", "x5") as motion:
        x, y, _ = where(env, "blue")
        for _ in range(60):
            env.advance((np.array([x - 0.02, y, 0.47]), np.array([math.pi, 0, math.pi / 2]), -1))
            if motion.released:
                break
        assert motion.released
        travelled = motion.travelled_m
        for _ in range(10):
            env.advance((np.array([x, y, 0.65]), np.array([math.pi, 0, math.pi / 2]), -1))
        rest = where(env, "blue")
        for _ in range(20):
            env.advance((np.array([x, y, 0.65]), np.array([math.pi, 0, math.pi / 2]), -1))
    assert motion.travelled_m == travelled
    assert np.linalg.norm(where(env, "blue") - rest) < 1e-3


def test_same_input_same_bits(env: PlayTableEnv) -> None:
    ends = []
    for _ in range(2):
        env.reset(*initial_state(STATE))
        with MovingBlock(env, "pink", "circular", "x10"):
            for _ in range(20):
                env.advance(HOLD)
        ends.append(env.get_state_obs()["scene_obs"])
    np.testing.assert_array_equal(*ends)


def test_closing_removes_the_hook(env: PlayTableEnv) -> None:
    env.reset(*initial_state(STATE))
    before = len(env.world.hooks)
    motion = MovingBlock(env, "block_red", "left")
    assert len(env.world.hooks) == before + 1
    motion.close()
    motion.close()
    assert len(env.world.hooks) == before


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (("green", "left"), "block: 'green'"),
        (("blue", "up"), "pattern: 'up'"),
        (("blue", "left", "warp"), "speed: 'warp'"),
        (("blue", "left", 3.0), r"speed: 3\.0"),
        (("blue", "left", math.nan), "speed: nan"),
    ],
)
def test_bad_arguments(env: PlayTableEnv, arguments: Any, field: str) -> None:
    before = len(env.world.hooks)
    with pytest.raises(MotionError, match=field):
        MovingBlock(env, *arguments)
    assert len(env.world.hooks) == before


def test_a_world_without_hooks_is_refused() -> None:
    with pytest.raises(MotionError, match="world: moving blocks need PlayTable"):
        MovingBlock(object(), "blue", "left")
