"""Where plans end, meet and begin anew: the buffer at the very rows and bounds."""

from __future__ import annotations

import numpy as np
import pytest

from openhelix.runtime.control.chunks import ChunkBuffer
from tests.runtime.control.test_chunks import MS, chunk, x_at


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


def test_an_older_plan_that_ends_within_the_blend_is_held_at_its_end():
    buffer = ChunkBuffer(blend_s=0.1)
    buffer.put(chunk(x=[0.0, 2.0, 4.0]), 0)  # ends at 20 ms
    buffer.put(chunk(x=[8.0] * 12, t_obs_ms=1), 0)
    assert x_at(buffer, 10) == 0.9 * 2.0 + 0.1 * 8.0
    assert x_at(buffer, 50) == 0.5 * 4.0 + 0.5 * 8.0


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


@pytest.mark.parametrize("blend_s", [-0.001, 10.0, float("nan")])
def test_a_blend_time_out_of_bounds_is_named(blend_s):
    with pytest.raises(ValueError, match=r"blend_s: \S+ is not a time between 0 and 10 s"):
        ChunkBuffer(blend_s)
    assert ChunkBuffer(9.999).instruction_id == 0
