"""When System 2 is asked: a picture of a table from above, with an arm, and somebody else."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openhelix.runtime.control.goals import LockstepGoals, WireGoals
from openhelix.runtime.control.trigger import Cadence, ChangeTrigger, spread, squares, wider
from openhelix.runtime.core.interfaces import CameraFrame, Observation
from openhelix.runtime.robots.fake import PointEngine
from tests.fakes import PERIOD_NS
from tests.runtime.control.test_goals import Channel

SIZE, HIGH_M, BASE_M = 200, 2.0, (0.0, -0.9, 0.0)
FOCUS = 200.0  # pixels: at 2 m a pixel is 1 cm
DOWN = np.array([[1.0, 0, 0, 0], [0, -1.0, 0, 0], [0, 0, -1.0, HIGH_M], [0, 0, 0, 1.0]])
K = np.array([[FOCUS, 0, SIZE / 2], [0, FOCUS, SIZE / 2], [0, 0, 1.0]])


def pixels(x: float, y: float) -> tuple[int, int]:
    """Row and column of a point on the table, m."""
    return round(SIZE / 2 - 100 * y), round(SIZE / 2 + 100 * x)


def seen(
    tick: int, hand: tuple[float, float] = (0.0, 0.0), blocks: tuple[tuple[float, float], ...] = ()
) -> Observation:
    """A grey table, blue blocks of 12 cm, and a white arm from the base to the hand."""
    rgb = np.full((SIZE, SIZE, 3), 120, np.uint8)
    depth = np.full((SIZE, SIZE), HIGH_M, np.float32)
    for x, y in blocks:
        v, u = pixels(x, y)
        rgb[v - 6 : v + 6, u - 6 : u + 6] = (20, 20, 220)
    v, u = pixels(*hand)
    rgb[v - 4 :, u - 4 : u + 4] = 255
    depth[v - 4 :, u - 4 : u + 4] = HIGH_M - 0.4
    depth[v - 4 : v + 4, u - 4 : u + 4] = HIGH_M - 0.1
    frame = CameraFrame(tick * PERIOD_NS, rgb, depth, K, DOWN)
    pose = np.array([*hand, 0.05, 0.0, 0.0, 0.0, 1.0])
    return Observation(tick * PERIOD_NS, {"static": frame}, pose, 0.08, True, np.zeros(7))


def trigger(floor_s: float = 0.2, ceiling_s: float = 100.0) -> ChangeTrigger:
    made = ChangeTrigger("static", floor_s, ceiling_s, BASE_M)
    made.begin()
    return made


def asked(made: ChangeTrigger, see: Callable[[int], Observation], ticks: int) -> list[int]:
    return [tick for tick in range(ticks) if made.due(see(tick))]


def test_what_stays_as_it_is_is_asked_about_once_and_at_the_ceiling() -> None:
    made = trigger(ceiling_s=0.999)
    assert asked(made, lambda tick: seen(tick, blocks=((0.5, 0.5),)), 70) == [0, 30, 60]
    assert made.changes == 0
    made.begin()
    assert made.due(seen(70)) and not made.due(seen(71))


def test_a_block_that_somebody_moves_is_asked_about_within_three_looks() -> None:
    made = trigger()
    found = asked(made, lambda t: seen(t, blocks=((0.5 if t < 20 else -0.5, 0.5),)), 60)
    assert found[0] == 0 and len(found) == 2 and 20 < found[1] <= 20 + 3 * 3 + 1
    assert made.changes == 1


def test_never_more_often_than_the_floor() -> None:
    made = trigger(floor_s=0.999)
    places = ((0.5, 0.5), (-0.5, 0.5), (0.5, -0.5), (-0.5, -0.5))
    found = asked(made, lambda t: seen(t, blocks=(places[t // 12 % 4],)), 200)
    assert len(found) > 3 and min(np.diff(found)) >= 30


@pytest.mark.parametrize("speed", [0.005, 0.02])
def test_the_arm_that_moves_is_no_change(speed: float) -> None:
    made = trigger()

    def see(tick: int) -> Observation:
        x = min(speed * tick, 0.6) if tick < 60 else max(0.6 - speed * (tick - 60), 0.0)
        return seen(tick, hand=(x, 0.3 * np.sin(tick / 20)), blocks=((-0.6, 0.6),))

    assert asked(made, see, 120) == [0]


def test_what_the_hand_has_moved_is_no_change() -> None:
    made = trigger()

    def see(tick: int) -> Observation:
        at = min(max(tick - 10, 0) * 0.01, 0.5)
        hand = at if tick < 70 else at - 0.02 * (tick - 70)  # then it goes away
        return seen(tick, hand=(hand, 0.0), blocks=((at + 0.08, 0.0),))

    assert asked(made, see, 100) == [0]


def test_no_camera_is_nothing_to_look_at() -> None:
    made = trigger()
    blank = Observation(0, {}, seen(0).tcp_pose, 0.08, True, np.zeros(7))
    assert made.due(blank) and not made.due(blank)


def test_a_camera_without_depth_is_refused() -> None:
    flat = seen(0)
    frame = flat.frames["static"]
    frames = {"static": CameraFrame(0, frame.rgb, None, K, DOWN)}
    with pytest.raises(ValueError, match=r"system2\.trigger: System 2's camera has no depth"):
        trigger().due(Observation(0, frames, flat.tcp_pose, 0.08, True, np.zeros(7)))


def test_a_cadence_counts_observations() -> None:
    made = Cadence(7)
    for _ in range(2):
        made.begin()
        assert [t for t in range(20) if made.due(seen(0))] == [0, 7, 14]


def test_both_clocks_ask_when_the_trigger_says_so() -> None:
    channel = Channel()
    wire = WireGoals(channel, channel, "a", "static", 1, max_age_s=1.0, trigger=trigger())
    engine = PointEngine()
    lockstep = LockstepGoals(engine, "static", 1, 0, trigger=trigger())
    counts = []
    for goals in (wire, lockstep):
        goals.begin(1, "reach 0 0 0")
        got = 0
        for tick in range(60):
            there = 0.5 if tick < 20 else -0.5
            observation = seen(tick, blocks=((there, 0.5),))
            got += goals.update(observation, tick * PERIOD_NS) is not None
        goals.forget(60 * PERIOD_NS)
        got += goals.update(seen(61), 61 * PERIOD_NS) is not None
        counts.append(got)
    assert len(channel.sent) == 3 and counts[1] == 3


masks = st.integers(0, 2**36 - 1).map(
    lambda bits: np.array([bits >> i & 1 for i in range(36)], bool).reshape(6, 6)
)


@settings(max_examples=200)
@given(start=masks, over=masks)
def test_what_spreads_is_what_hangs_together(start: np.ndarray, over: np.ndarray) -> None:
    reached = spread(start, over)
    assert (reached >= start).all() and (reached <= (start | over)).all()
    assert not (wider(reached) & over & ~reached).any()
    whole = {tuple(p) for p in np.argwhere(start | over)}
    flood = {tuple(p) for p in np.argwhere(start)}
    grown = True
    while grown:  # the plain way
        near = {(r + i, c + j) for r, c in flood for i in (-1, 0, 1) for j in (-1, 0, 1)}
        more = {p for p in near & whole if over[p]}
        grown = not more <= flood
        flood |= more
    assert flood == {tuple(p) for p in np.argwhere(reached)}
    for r, c in np.argwhere(squares(over)):
        assert over[r : r + 2, c : c + 2].all()
