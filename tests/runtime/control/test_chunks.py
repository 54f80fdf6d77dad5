"""openhelix.runtime.control.chunks: time in, target out; no clock, no threads."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openhelix.runtime.control.chunks import ChunkBuffer
from openhelix.runtime.core.quaternion import angle_between, from_rotation_vector
from openhelix.runtime.core.types import ActionChunk

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
                # Linear mixing never leaves the hull of what was planned.
                assert min(seen) - 1e-9 <= action.pose[0] <= max(seen) + 1e-9
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
