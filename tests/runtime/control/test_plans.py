"""How the loop asks System 1, and the plan: time in, target out; no clock, no threads."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openhelix.runtime.control.plans import (
    LOST_AFTER_NS,
    ChunkBuffer,
    Following,
    PlanReply,
    PlanRequest,
    RemotePlanner,
    SyncPlanner,
)
from openhelix.runtime.core.interfaces import ActionChunk, LatentGoal, Observation
from openhelix.runtime.core.quaternion import angle_between, from_rotation_vector
from openhelix.runtime.launch.parts import System1Process
from openhelix.runtime.transport.wire import NewestReader, Publisher
from tests.fakes import PERIOD_NS, ReachPolicy

# ------------------------------------------------------------------------------------------------
# The plan on its time line


MS = 1_000_000


def chunk(
    start_ms=0, dt_ms=10, x=(0.0, 1.0, 2.0), instruction_id=0, gripper=None, t_obs_ms=0, yaw=None
):
    yaw = [0.0] * len(x) if yaw is None else yaw
    poses = np.array(
        [[v, 0, 0, *from_rotation_vector((0, 0, a))] for v, a in zip(x, yaw, strict=True)]
    )
    return ActionChunk(
        t_start_ns=start_ms * MS,
        dt_ns=dt_ms * MS,
        poses=poses,
        gripper=np.zeros(len(x)) if gripper is None else np.asarray(gripper, dtype=float),
        instruction_id=instruction_id,
        t_obs_ns=t_obs_ms * MS,
    )


def x_at(buffer, t_ms):
    action = buffer.sample(round(t_ms * MS))
    return None if action is None else pytest.approx(float(action.pose[0]), abs=1e-9)


def rows_accounted(buffer):
    c = buffer.counters
    waiting = sum(buffer._mine)
    return c.rows_consumed + c.rows_expired + c.rows_replaced + c.rows_voided + waiting


def test_samples_rows_and_between_rows():
    buffer = ChunkBuffer()
    assert buffer.sample(0) is None
    assert buffer.put(chunk(yaw=[0, 0.2, 0.4], gripper=[0, 1, 1]), now_ns=0)
    assert x_at(buffer, 0) == 0
    middle = buffer.sample(5 * MS)
    assert middle.pose[0] == pytest.approx(0.5)
    assert middle.gripper == pytest.approx(0.5)
    assert angle_between(tuple(middle.pose[3:]), (0, 0, 0, 1)) == pytest.approx(0.1)
    assert x_at(buffer, 20) == 2
    assert buffer.sample(21 * MS) is None


def test_before_the_first_row_there_is_no_plan():
    buffer = ChunkBuffer()
    buffer.put(chunk(start_ms=100), now_ns=0)
    assert buffer.sample(50 * MS) is None
    assert buffer.counters.runs_out == 0  # it has not begun: that is not running out
    assert x_at(buffer, 100) == 0


def test_expired_rows_are_dropped_by_time_and_counted():
    buffer = ChunkBuffer()
    assert buffer.put(chunk(x=range(10)), now_ns=35 * MS)
    assert buffer.counters.rows_expired == 4
    assert x_at(buffer, 35) == 3.5  # the last expired row still anchors the interpolation
    assert x_at(buffer, 40) == 4


def test_a_wholly_expired_chunk_is_late_and_changes_nothing():
    buffer = ChunkBuffer()
    buffer.put(chunk(x=range(10)), 0)
    assert not buffer.put(chunk(x=[9, 9], t_obs_ms=5), now_ns=50 * MS)
    assert buffer.counters.chunks_late == 1
    assert x_at(buffer, 50) == 5


def test_another_epoch_is_refused_and_void_drops_the_plan():
    buffer = ChunkBuffer()
    assert not buffer.put(chunk(instruction_id=1), 0)
    assert buffer.put(chunk(), 0)
    buffer.void(1)
    assert buffer.sample(0) is None
    assert buffer.remaining_s(0) == 0
    assert not buffer.put(chunk(instruction_id=0), 0)
    assert buffer.put(chunk(instruction_id=1), 0)
    assert buffer.sample(0).instruction_id == 1
    assert buffer.counters.chunks_void == 2
    assert buffer.counters.rows_voided == 3


def test_a_plan_can_be_voided_with_all_that_was_seen_before():
    buffer = ChunkBuffer(instruction_id=1)
    assert buffer.put(chunk(instruction_id=1), now_ns=0)
    buffer.void(1, from_ns=15 * MS)
    assert buffer.sample(10 * MS) is None
    assert not buffer.put(chunk(instruction_id=1, t_obs_ms=10), now_ns=0)  # was on its way
    assert buffer.put(chunk(instruction_id=1, t_obs_ms=15), now_ns=0)
    assert buffer.counters.chunks_void == 1
    buffer.void(2)
    assert buffer.put(chunk(instruction_id=2), now_ns=0)  # another instruction begins afresh


def test_older_observation_never_replaces_a_newer_plan():
    buffer = ChunkBuffer()
    buffer.put(chunk(t_obs_ms=10), 0)
    assert not buffer.put(chunk(t_obs_ms=5, x=[7, 7, 7]), 0)
    assert buffer.counters.chunks_stale == 1
    buffer.void(1)  # a new instruction starts anew
    assert buffer.put(chunk(t_obs_ms=5, instruction_id=1), 0)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda c: c.poses.__setitem__((1, 0), np.nan),
        lambda c: c.poses.__setitem__((1, slice(3, 7)), 0.0),
        lambda c: c.gripper.__setitem__(0, np.inf),
        lambda c: object.__setattr__(c, "poses", c.poses[:, :6]),
        lambda c: object.__setattr__(c, "gripper", c.gripper[:2]),
        lambda c: object.__setattr__(c, "dt_ns", 0),
        lambda c: object.__setattr__(c, "poses", np.zeros((0, 7))),
    ],
)
def test_malformed_chunks_are_counted_never_raised(spoil):
    buffer, bad = ChunkBuffer(), chunk()
    spoil(bad)
    assert not buffer.put(bad, 0)
    assert buffer.counters.chunks_bad == 1
    assert buffer.sample(0) is None


def test_quaternions_are_normalised():
    buffer, c = ChunkBuffer(), chunk()
    c.poses[:, 3:] *= 5.0
    buffer.put(c, 0)
    assert np.linalg.norm(buffer.sample(3 * MS).pose[3:]) == pytest.approx(1)


def test_overlap_blends_position_and_rotation_linearly_gripper_from_the_newer():
    buffer = ChunkBuffer(blend_s=0.1)
    buffer.put(chunk(x=[0.0] * 30), 0)
    buffer.sample(50 * MS)
    new = chunk(start_ms=50, x=[1.0] * 30, gripper=[1.0] * 30, yaw=[1.0] * 30, t_obs_ms=50)
    assert buffer.put(new, 50 * MS)
    for t_ms, expected in [(50, 0.0), (75, 0.25), (100, 0.5), (140, 0.9), (150, 1.0), (200, 1.0)]:
        action = buffer.sample(t_ms * MS)
        assert action.pose[0] == pytest.approx(expected)
        assert angle_between(tuple(action.pose[3:]), (0, 0, 0, 1)) == pytest.approx(expected)
        assert action.gripper == 1.0
    assert buffer.counters.rows_blended == 10


def test_without_blend_the_new_chunk_takes_over_at_once():
    buffer = ChunkBuffer(blend_s=0.0)
    buffer.put(chunk(x=[0.0] * 10), 0)
    buffer.put(chunk(start_ms=20, x=[1.0] * 10, t_obs_ms=1), 25 * MS)
    assert x_at(buffer, 25) == 1.0


def test_a_chunk_for_later_leaves_the_plan_until_then():
    buffer = ChunkBuffer(blend_s=0.01)
    buffer.put(chunk(x=[0.0] * 5), 0)
    buffer.put(chunk(start_ms=40, x=[1.0] * 5, t_obs_ms=1), 10 * MS)
    assert x_at(buffer, 20) == 0.0
    assert x_at(buffer, 40) == 0.0  # the join
    assert x_at(buffer, 50) == 1.0


def test_a_hole_in_time_is_not_interpolated_across():
    buffer = ChunkBuffer()
    buffer.put(chunk(x=[0.0, 0.0]), 0)  # ends at 10 ms
    buffer.put(chunk(start_ms=100, x=[1.0, 1.0], t_obs_ms=1), 5 * MS)
    assert x_at(buffer, 10) == 0.0
    assert buffer.sample(50 * MS) is None
    assert x_at(buffer, 100) == 1.0


def test_counts_what_was_really_consumed():
    buffer = ChunkBuffer()
    buffer.put(chunk(x=range(10)), 0)
    for t_ms in (0, 10, 20):
        buffer.sample(t_ms * MS)
    buffer.put(chunk(start_ms=20, x=range(5), t_obs_ms=1), 25 * MS)
    c = buffer.counters
    assert (c.actions_sampled, c.rows_consumed, c.rows_replaced) == (3, 3, 7)
    assert (c.chunks_accepted, c.chunks_used) == (2, 1)
    buffer.sample(30 * MS)
    assert c.chunks_used == 2
    buffer.sample(61 * MS)
    buffer.sample(62 * MS)
    assert c.runs_out == 1
    assert c.actions_sampled == 4
    assert rows_accounted(buffer) == 15


def test_a_rehearsal_takes_nothing():
    rehearsed, plain = ChunkBuffer(), ChunkBuffer()
    for buffer in (rehearsed, plain):
        buffer.put(chunk(x=(0.0, 1.0, 2.0, 3.0)), 0)
    for t_ms in (5, 15, 22, 40):
        rehearsed.rehearse(t_ms * MS)
        assert x_at(rehearsed, t_ms) == x_at(plain, t_ms)
        assert asdict(rehearsed.counters) == asdict(plain.counters)


def test_remaining():
    buffer = ChunkBuffer()
    buffer.put(chunk(), 0)
    assert buffer.remaining_s(5 * MS) == pytest.approx(0.015)
    assert buffer.remaining_s(50 * MS) == 0.0


def test_bad_blend_time():
    with pytest.raises(ValueError, match="blend_s"):
        ChunkBuffer(blend_s=-1)


STEP = st.tuples(
    st.integers(0, 40),  # ms until this event
    st.integers(-60, 60),  # start of the chunk relative to now
    st.integers(1, 30),  # dt
    st.lists(st.floats(-1, 1), min_size=1, max_size=8),
    st.integers(-1, 1),  # change of instruction_id of the chunk
)


@settings(max_examples=150, deadline=None)
@given(st.lists(STEP, max_size=12), st.sampled_from([0.0, 0.015, 0.1]))
def test_any_history_keeps_rows_accounted_and_targets_inside_what_was_planned(steps, blend_s):
    buffer, now, put_rows, seen = ChunkBuffer(blend_s, instruction_id=5), 1000, 0, [0.0]
    for wait, lead, dt, x, epoch_change in steps:
        now += wait
        c = chunk(now + lead, dt, x, instruction_id=5 + epoch_change, t_obs_ms=now)
        late_before = buffer.counters.chunks_late
        accepted = buffer.put(c, now * MS)
        if accepted or buffer.counters.chunks_late > late_before:
            put_rows += len(x)
        if accepted:
            seen += x
        for t_ms in range(now, now + wait, 7):
            action = buffer.sample(t_ms * MS)
            if action is not None:
                assert np.isfinite(action.pose).all()
                assert np.linalg.norm(action.pose[3:]) == pytest.approx(1)
                # Linear mixing never leaves the hull of what was planned; a plan that ends within
                # the blend is carried on by at most as much as plans differ, each anew.
                carried = (max(seen) - min(seen)) * buffer.counters.chunks_accepted
                slack = 1e-9 + (carried if blend_s else 0.0)
                assert min(seen) - slack <= action.pose[0] <= max(seen) + slack
    assert rows_accounted(buffer) == put_rows
    assert all(value >= 0 for value in asdict(buffer.counters).values())


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.floats(-1, 1), min_size=12, max_size=12),
    st.lists(st.floats(-1, 1), min_size=12, max_size=12),
    st.integers(0, 100),
    st.integers(0, 50),
)
def test_the_join_is_continuous(old, new, now_ms, age_ms):
    """What was executed at the join and what comes next differ by no more than the time does."""
    buffer = ChunkBuffer(blend_s=0.05)
    buffer.put(chunk(x=old, dt_ms=10), 0)
    before = buffer.sample(now_ms * MS).pose[0]
    buffer.put(chunk(max(0, now_ms - age_ms), 10, new, t_obs_ms=1), now_ms * MS)
    assert buffer.sample(now_ms * MS).pose[0] == pytest.approx(before, abs=1e-9)
    after = buffer.sample(now_ms * MS + 1000).pose[0]  # a microsecond later
    assert after == pytest.approx(before, abs=1e-3)


# ------------------------------------------------------------------------------------------------
# Where plans end, meet and begin anew: the buffer at the very rows and bounds


def test_every_coordinate_is_interpolated():
    buffer, c = ChunkBuffer(), chunk()
    c.poses[:, :3] = [[0.0, 1.0, 10.0], [1.0, 3.0, 5.0], [2.0, 4.0, 6.0]]
    buffer.put(c, 0)
    for t_ms, place in ((0, [0, 1, 10]), (2.5, [0.25, 1.5, 8.75]), (10, [1, 3, 5])):
        np.testing.assert_allclose(buffer.sample(round(t_ms * MS)).pose[:3], place, atol=1e-12)


def test_what_the_plan_is_for_and_made_from():
    buffer = ChunkBuffer(instruction_id=3)
    assert (buffer.instruction_id, buffer.latent_seq) == (3, -1)
    c = chunk(instruction_id=3)
    object.__setattr__(c, "latent_seq", 8)
    buffer.put(c, 0)
    assert buffer.latent_seq == 8
    buffer.void(4)
    assert (buffer.instruction_id, buffer.latent_seq) == (4, -1)


def test_as_new_an_observation_as_the_plans_is_new_enough():
    buffer = ChunkBuffer(blend_s=0.0)
    buffer.put(chunk(t_obs_ms=10), 0)
    assert buffer.put(chunk(t_obs_ms=10, x=[7, 7, 7]), 0)
    assert x_at(buffer, 5) == 7


def test_a_chunk_counts_as_used_from_its_first_row_on():
    buffer = ChunkBuffer()
    buffer.put(chunk(start_ms=20), 10 * MS)
    buffer.sample(19 * MS)
    assert buffer.counters.chunks_used == 0
    buffer.sample(20 * MS)
    assert buffer.counters.chunks_used == 1


def test_by_default_a_tenth_of_a_second_is_blended():
    buffer = ChunkBuffer()
    buffer.put(chunk(x=[0.0] * 30), 0)
    buffer.put(chunk(x=[1.0] * 30, t_obs_ms=1), 0)
    assert x_at(buffer, 50) == 0.5
    assert x_at(buffer, 100) == 1.0


def test_an_older_plan_that_ends_within_the_blend_goes_on_beside_the_new_one():
    buffer = ChunkBuffer(blend_s=0.1)
    buffer.put(chunk(x=[0.0, 2.0, 4.0], yaw=[0.0, 0.0, 0.3]), 0)  # ends at 20 ms
    buffer.put(chunk(x=[8.0 + i for i in range(12)], yaw=[0.1 * i for i in range(12)]), 0)
    assert x_at(buffer, 10) == 0.9 * 2.0 + 0.1 * 9.0
    assert x_at(buffer, 50) == 13.0 - 0.5 * 6.0  # behind the new plan by half of what it was
    turned = from_rotation_vector((0, 0, 0.5 + 0.5 * 0.1))
    assert angle_between(buffer.sample(50 * MS).pose[3:], turned) == pytest.approx(0, abs=1e-6)
    assert x_at(buffer, 100) == 18.0


def test_an_arm_in_motion_is_not_braked_where_its_plan_ends():
    """Each chunk arrives as the one before ends, and says the same: as from a slow System 1."""
    buffer, sent = ChunkBuffer(blend_s=0.1), []
    for start in range(0, 400, 80):
        rows = [(start + i * 10) * 0.01 for i in range(1, 17)]
        buffer.put(chunk(start + 10, 10, rows, t_obs_ms=start), (start + 80) * MS)
        sent += [buffer.sample(t * MS).pose[0] for t in range(start + 80, start + 160, 10)]
    assert np.diff(sent) == pytest.approx(0.1)


@pytest.mark.parametrize(("start_ms", "middle"), [(20, 0.5), (21, None)])
def test_plans_a_row_apart_are_joined_and_further_ones_are_not(start_ms, middle):
    buffer = ChunkBuffer()
    buffer.put(chunk(x=[0.0, 0.0]), 0)  # ends at 10 ms
    buffer.put(chunk(start_ms=start_ms, x=[1.0, 1.0], t_obs_ms=1), 5 * MS)
    assert x_at(buffer, 15) == middle


def test_a_plan_sampled_to_its_very_end_is_still_joined():
    buffer = ChunkBuffer()
    buffer.put(chunk(x=[0.0, 0.0]), 0)
    assert x_at(buffer, 10) == 0.0
    buffer.put(chunk(start_ms=18, x=[1.0, 1.0], t_obs_ms=1), 11 * MS)
    assert x_at(buffer, 14) == 0.5


def test_a_plan_that_has_run_out_is_not_joined_to_what_comes_after():
    buffer = ChunkBuffer()
    buffer.put(chunk(x=[0.0, 0.0]), 0)
    assert buffer.sample(11 * MS) is None
    assert buffer.counters.rows_consumed == 2
    assert buffer.put(chunk(start_ms=18, x=[1.0, 1.0], t_obs_ms=1), 12 * MS)
    assert buffer.sample(14 * MS) is None
    assert x_at(buffer, 18) == 1.0


def test_a_row_at_the_very_start_of_a_newer_chunk_is_replaced():
    buffer = ChunkBuffer()
    buffer.put(chunk(x=range(5)), 0)
    buffer.put(chunk(start_ms=20, x=range(5), t_obs_ms=1), 10 * MS)
    assert buffer.counters.rows_replaced == 3  # at 20, 30 and 40 ms


def test_running_out_is_counted_once_until_there_was_a_target_again():
    buffer = ChunkBuffer()
    for t_ms, counted in ((0, 1), (100, 1)):  # of the second no row was ever sampled
        buffer.put(chunk(start_ms=t_ms, t_obs_ms=t_ms), t_ms * MS)
        for later_ms in (30, 40):
            assert buffer.sample((t_ms + later_ms) * MS) is None
        assert buffer.counters.runs_out == counted
    buffer.put(chunk(start_ms=200, t_obs_ms=200), 200 * MS)
    assert buffer.sample(200 * MS) is not None
    buffer.sample(230 * MS)
    assert buffer.counters.runs_out == 2
    buffer.void(1)
    buffer.put(chunk(start_ms=300, instruction_id=1), 300 * MS)
    buffer.sample(330 * MS)
    assert buffer.counters.runs_out == 3


def held(x, yaw=0.0):
    return np.array([x, 0, 0, *from_rotation_vector((0, 0, yaw))])


def test_an_arm_that_stood_still_begins_at_the_row_nearest_to_it():
    buffer = ChunkBuffer(blend_s=0.02)
    assert buffer.put(chunk(x=range(1, 11)), now_ns=35 * MS, held=held(0))  # nothing was followed
    assert buffer.counters.chunks_moved == 1 and buffer.counters.rows_expired == 0
    assert x_at(buffer, 35) == 0
    assert x_at(buffer, 45) == 0.5  # half of the blend from where it is held to the first row
    assert x_at(buffer, 55) == 2
    assert x_at(buffer, 135) == 10
    assert rows_accounted(buffer) == 10


def test_an_arm_whose_plan_ran_out_goes_on_from_where_it_stands():
    buffer = ChunkBuffer(blend_s=0.0)
    buffer.put(chunk(x=range(4)), now_ns=0)
    assert x_at(buffer, 30) == 3
    assert buffer.sample(50 * MS) is None
    # Seen at row 1 while the arm moved; it went on to row 3.
    late = chunk(start_ms=20, x=range(2, 12), t_obs_ms=10)
    assert buffer.put(late, now_ns=70 * MS, held=held(3.2))
    assert x_at(buffer, 80) == 4 and x_at(buffer, 90) == 5
    assert buffer.counters.rows_expired == 2


def test_rows_at_which_the_hand_works_are_not_left_out():
    buffer = ChunkBuffer(blend_s=0.0)
    grasp = chunk(x=[0, 0, 0, 0, 1, 2], gripper=[1, 1, 0, 0, 0, 0])
    assert buffer.put(grasp, now_ns=45 * MS, held=held(0))
    assert [buffer.sample(t * MS).gripper for t in (55, 65, 75)] == [1, 1, 0]


def test_a_chunk_that_is_not_late_keeps_its_times_though_the_arm_stood():
    buffer = ChunkBuffer()
    assert buffer.put(chunk(start_ms=10, x=[5, 6, 7]), now_ns=0, held=held(0))
    assert x_at(buffer, 10) == 5
    assert buffer.counters.chunks_moved == 0


def test_how_late_a_chunk_was_is_known_until_one_is_in_time():
    buffer = ChunkBuffer()
    assert not buffer.put(chunk(x=range(3)), now_ns=50 * MS, held=held(0))
    assert buffer.late_s == pytest.approx(0.03)
    assert buffer.put(chunk(x=range(9), t_obs_ms=1), now_ns=50 * MS, held=held(0))
    assert buffer.late_s is None


@given(
    delay=st.integers(1, 15),
    rows=st.integers(18, 30),
    place=st.floats(-1, 16),
    blend_ms=st.sampled_from([0, 15, 40]),
)
def test_what_an_arm_at_rest_is_sent_goes_from_its_place_towards_the_end(
    delay, rows, place, blend_ms
):
    buffer = ChunkBuffer(blend_s=blend_ms / 1e3)
    now_ns = round((delay + 0.5) * 10) * MS
    assert buffer.put(chunk(x=range(rows)), now_ns, held=held(place))
    sent = [place]
    for tick in range(1, rows + 20):
        target = buffer.sample(now_ns + tick * 10 * MS)
        if target is not None:
            sent.append(float(target.pose[0]))
    if place < delay:  # else it stands where the plan will only be later
        assert np.diff(sent).min() >= -1e-3
    assert np.diff(sent).max() <= 2.0 + max(0.0, -place) + 1e-9
    assert sent[-1] <= rows - 1
    if rows - place > 2 + blend_ms / 10:  # enough is left to be blended
        assert sent[-1] == rows - 1
    assert rows_accounted(buffer) == rows


def test_plans_that_come_late_are_carried_out_slower_in_proportion():
    buffer = ChunkBuffer(blend_s=0.0, slow_after=0.25)
    line = range(1, 9)
    assert buffer.slowed == 1.0
    assert buffer.put(chunk(start_ms=10, x=line), now_ns=20 * MS)  # as late as it may be
    assert buffer.slowed == 1.0 and x_at(buffer, 20) == 2
    buffer = ChunkBuffer(blend_s=0.0, slow_after=0.25)
    assert buffer.put(chunk(start_ms=10, x=line), now_ns=60 * MS)
    assert buffer.slowed == 3.0 and buffer.counters.chunks_slowed == 1
    assert [x_at(buffer, t) for t in (60, 75, 90, 240)] == [2, 2.5, 3, 8]
    assert x_at(buffer, 241) is None
    going = buffer.ahead(90 * MS, 30 * MS, 3)
    assert going is None  # it has run out
    assert buffer.put(chunk(start_ms=210, x=line, t_obs_ms=200), now_ns=280 * MS)
    assert buffer.slowed == 3.5  # 70 ms of 80 had passed, on average
    assert not buffer.put(chunk(start_ms=310, x=line, t_obs_ms=300), now_ns=381 * MS)
    assert buffer.counters.chunks_late == 1 and buffer.slowed == 3.5


@pytest.mark.parametrize("share", [0.0, -1.0, 1.1, float("nan")])
def test_a_share_out_of_bounds_is_named(share):
    with pytest.raises(ValueError, match="slow_after"):
        ChunkBuffer(slow_after=share)


def test_without_a_limit_plans_keep_their_pace_however_late():
    buffer = ChunkBuffer(blend_s=0.0)
    assert buffer.put(chunk(start_ms=10, x=range(1, 9)), now_ns=60 * MS)
    assert buffer.slowed == 1.0 and x_at(buffer, 60) == 6 and buffer.counters.chunks_slowed == 0


@given(st.integers(0, 14), st.integers(1, 6), st.sampled_from(["blend", "prefix"]))
def test_a_slowed_arm_goes_evenly_whatever_the_delay(delay, trusted, join):
    """A policy that always plans to go on at one speed, from where the arm was."""
    ms, rows = 10, 16
    buffer = ChunkBuffer(blend_s=0.03, slow_after=trusted / rows)
    following = Following(buffer, join, rows, 1000 / ms)
    where, passed, pending = 0.0, [], None
    for tick in range(500):
        now = tick * ms
        if pending is not None and tick >= pending[1]:
            buffer.put(pending[0], now_ns=now * MS, held=np.array([where, 0, 0, 0, 0, 0, 1.0]))
            pending = None
        action = buffer.sample(now * MS)
        if action is not None:
            passed.append(float(action.pose[0]) - where)
            where = float(action.pose[0])
        if pending is None:
            line = [where + i for i in range(1, rows + 1)]
            pending = (chunk(start_ms=now + ms, x=line, t_obs_ms=now), tick + max(1, delay))
    settled = passed[-100:]
    slowed = max(1.0, max(1, delay) / trusted)
    assert buffer.slowed == pytest.approx(slowed)
    if max(1, delay) / slowed < rows - 4:
        assert max(settled) <= 1.02 / slowed
        assert min(settled) >= 0.98 / slowed
    asked = following.joined(PlanRequest(observation(0), (), 0), delay * ms * MS)
    assert asked.plan is None or asked.plan.dt_ns == round(ms * MS * slowed)


@pytest.mark.parametrize("blend_s", [-0.001, 10.0, float("nan")])
def test_a_blend_time_out_of_bounds_is_named(blend_s):
    with pytest.raises(ValueError, match=r"blend_s: \S+ is not a time between 0 and 10 s"):
        ChunkBuffer(blend_s)
    assert ChunkBuffer(9.999).instruction_id == 0


# ------------------------------------------------------------------------------------------------
# System 1, beside the loop or inside the tick


REPLAN_NS = 4 * PERIOD_NS


def observation(tick: int, instruction_id: int = 1) -> Observation:
    pose = np.array([0.0, 0.0, 0.5, 0.0, 0.0, 0.0, 1.0])
    return Observation(tick * PERIOD_NS, {}, pose, 0.08, True, np.zeros(7), instruction_id)


def latent(instruction_id: int = 1) -> LatentGoal:
    z = np.zeros((1, 8), np.float32)
    z[0, :3] = (0.2, 0.0, 0.5)
    return LatentGoal(z, seq=0, instruction_id=instruction_id, t_obs_ns=0, t_pub_ns=0, spec_id="x")


def test_a_chunk_is_due_every_replan_interval_and_after_a_reset() -> None:
    policy = ReachPolicy()
    planner = SyncPlanner(policy, REPLAN_NS)
    planned = []
    for tick in range(10):
        planner.offer(observation(tick), [latent()])
        if planner.poll(tick * PERIOD_NS) is not None:
            planned.append(tick)
    assert planned == [0, 4, 8]
    planner.reset(3)
    planner.offer(observation(9), [latent()])
    assert planner.poll(9 * PERIOD_NS) is not None and policy.seeds == [3]


def test_a_chunk_can_be_late_and_none_is_begun_meanwhile() -> None:
    policy = ReachPolicy()
    planner = SyncPlanner(policy, REPLAN_NS, delay_ns=6 * PERIOD_NS)
    arrived = []
    for tick in range(20):
        now_ns = tick * PERIOD_NS
        chunk = planner.poll(now_ns)
        planner.offer(observation(tick), [latent()])
        chunk = chunk or planner.poll(now_ns)
        if chunk is not None:
            arrived.append((tick, chunk.t_obs_ns // PERIOD_NS))
    assert arrived == [(6, 0), (12, 6), (18, 12)]
    assert policy.calls == 4


def test_a_new_chunk_is_given_what_is_being_executed_in_its_own_times() -> None:
    buffer = ChunkBuffer(instruction_id=1)
    following = Following(buffer, "prefix", horizon=6, hz=100.0)

    def asked(t_ms: int, delay_ms: int | None = None) -> tuple[ActionChunk | None, int, str]:
        seen = replace(observation(0), t_ns=t_ms * MS)
        delay_ns = None if delay_ms is None else delay_ms * MS
        request = following.joined(PlanRequest(seen, (), 0), delay_ns)
        return request.plan, request.given, request.join

    assert asked(0) == (None, 0, "blend")
    buffer.put(chunk(start_ms=10, x=range(20), gripper=[0.5] * 20, instruction_id=1), now_ns=0)
    plan, given, join = asked(25, delay_ms=30)
    assert plan is not None and (given, join) == (3, "prefix")
    assert (plan.t_start_ns, plan.dt_ns, plan.instruction_id) == (35 * MS, 10 * MS, 1)
    np.testing.assert_allclose(plan.poses[:, 0], [2.5, 3.5, 4.5, 5.5, 6.5, 7.5])
    assert (plan.gripper == 0.5).all()
    assert asked(25)[1] == 0  # nothing is known yet of how late chunks are
    for delay_ms in (12, 31, 5):
        following.took(delay_ms * MS)
    assert asked(25)[1] == 4
    plan, given, _ = asked(170, delay_ms=60)  # it ends before the chunk comes
    assert plan is not None and len(plan.poses) == given == 3
    assert buffer.counters.actions_sampled == 0  # nothing was taken


class Going(ReachPolicy):
    """Goes on from the plan it is given, and remembers it."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[int, int, str]] = []

    def go_on(self, observation, latents, plan, given, join):  # type: ignore[no-untyped-def]
        self.asked.append((len(plan.poses), given, join))
        return self.act(observation, latents)


def test_a_planner_asks_for_a_chunk_that_goes_on_once_there_is_a_plan() -> None:
    policy, buffer = Going(), ChunkBuffer(instruction_id=1)
    planner = SyncPlanner(policy, REPLAN_NS, delay_ns=2 * PERIOD_NS)
    planner.follow(Following(buffer, "inpaint", policy.spec.horizon, 30.0))
    for tick in range(9):
        planner.offer(observation(tick), [latent()])
        made = planner.poll(tick * PERIOD_NS)
        if made is not None:
            buffer.put(made, tick * PERIOD_NS)
        buffer.sample((tick + 1) * PERIOD_NS)
    assert policy.asked == [(12, 2, "inpaint"), (12, 2, "inpaint")]


@dataclass
class Remote:
    planner: RemotePlanner
    node: System1Process
    stop: threading.Event
    before: set[str]  # the fields of its health before it was set up

    def join(self) -> None:
        """Ask until both channels are connected: what is sent before that is lost."""
        for number in range(30):
            self.planner.reset(11)
            self.planner.offer(observation(-number), [latent()])
            for _ in range(4 + 2 * number):  # more and more patient, on a busy machine
                chunk = self.planner.poll(0)
                if chunk is not None and chunk.t_obs_ns == observation(-number).t_ns:
                    return
                threading.Event().wait(0.02)
        raise AssertionError("no reply")

    def reply(self, timeout_s: float = 60.0) -> Any:
        """Poll until the reply to the last request is there; None if it has no chunk."""
        for _ in range(int(timeout_s / 0.005)):
            chunk = self.planner.poll(0)
            if chunk is not None or self.planner.failures:
                return chunk
            threading.Event().wait(0.005)
        raise AssertionError("no reply")


@pytest.fixture
def remote(tmp_path: Path) -> Iterator[Remote]:
    plans, chunks = f"ipc://{tmp_path}/plans", f"ipc://{tmp_path}/chunks"
    options = {"horizon": 6}
    node = System1Process({"target": "tests.fakes:ReachPolicy", "options": options}, plans, chunks)
    before = set(node.health())
    node.setup()
    stop = threading.Event()
    thread = threading.Thread(target=node.run, args=(stop,), daemon=True)
    thread.start()
    planner = RemotePlanner(
        Publisher(plans, "plans", bind=False), NewestReader(chunks, "chunks", PlanReply), REPLAN_NS
    )
    yield Remote(planner, node, stop, before)
    stop.set()
    thread.join(timeout=5.0)
    planner.close()
    node.close()


def test_another_process_plans_and_failures_are_counted(remote: Remote) -> None:
    remote.join()
    planner, policy = remote.planner, remote.node._policy
    assert isinstance(policy, ReachPolicy)
    policy.fail_at = policy.calls + 3
    planner.latencies_s.clear()
    begun = remote.node.health()["planned"]
    planner.reset(11)
    planner.offer(observation(1), [latent()])
    chunk = remote.reply()
    assert chunk.poses.shape == (6, 7) and chunk.instruction_id == 1
    assert chunk.t_obs_ns == observation(1).t_ns and len(planner.latencies_s) == 1
    planner.offer(observation(2), [latent()])  # not due yet
    planner.offer(observation(5), [latent()])
    assert remote.reply().t_obs_ns == observation(5).t_ns
    planner.offer(observation(9), [latent()])  # this call of the policy raises
    assert remote.reply() is None and planner.failures == 1
    health = remote.node.health()
    assert health["planned"] == begun + 2 and health["failed"] == 1
    planner.offer(observation(13), [latent()])  # and it is asked again
    planner.failures = 0
    assert remote.reply() is not None


def test_health_has_its_fields_from_the_start(remote: Remote) -> None:
    now = remote.node.health()
    assert now.keys() == remote.before and now["policy_spec"]["horizon"] == 6


def test_a_lost_request_is_given_up_after_a_while(tmp_path: Path) -> None:
    sent: list[Any] = []

    class Sender:
        def send(self, message: Any) -> None:
            sent.append(message)

        def close(self) -> None: ...

    class Silence:
        def poll(self) -> None: ...
        def close(self) -> None: ...

    planner = RemotePlanner(Sender(), Silence(), REPLAN_NS)  # type: ignore[arg-type]
    late = LOST_AFTER_NS // PERIOD_NS + 1
    for tick in (0, 1, 4, 8, late + 1, late + 2):
        planner.offer(observation(tick), [latent()])
        assert planner.poll(0) is None
    assert [m.observation.t_ns // PERIOD_NS for m in sent] == [0, late + 1]
    planner.reset(1)  # a new instruction waits for no answer of the old one
    planner.offer(observation(late + 3, instruction_id=2), [latent(2)])
    assert len(sent) == 3 and sent[-1].seed == 1
