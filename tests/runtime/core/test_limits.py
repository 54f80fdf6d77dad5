"""Limits hold for any input."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openhelix.runtime.core.limits import SafetyFilter, SafetyLimits
from openhelix.runtime.core.quaternion import angle_between, from_rotation_vector, rotation_vector
from openhelix.runtime.core.types import Action

DT = 1 / 30
LIMITS = SafetyLimits()
LOW, HIGH = np.array(LIMITS.box_min_m), np.array(LIMITS.box_max_m)


def action(x=0.0, y=-0.2, z=0.55, v=(0.0, 0.0, 0.0), gripper=1.0):
    return Action(np.array([x, y, z, *from_rotation_vector(v)]), gripper, instruction_id=3, t_ns=7)


def test_a_legal_target_passes_unchanged():
    wanted = action(x=0.01, v=(0, 0, 0.02))
    got = SafetyFilter().limit(wanted, action(), DT)
    np.testing.assert_allclose(got.pose, wanted.pose, atol=1e-12)
    assert (got.gripper, got.instruction_id, got.t_ns, dict(got.info)) == (1.0, 3, 7, {})


def test_calvins_largest_relative_action_is_reached_and_kept():
    """0.02 m on each axis, tick after tick, after a start within the acceleration limit."""
    safety, at = SafetyFilter(), action(x=-0.2, y=-0.2, z=0.4)
    steps = []
    for _ in range(8):
        wanted = action(*(at.pose[:3] + 0.02))
        got = safety.limit(wanted, at, DT)
        steps.append(got.pose[0] - at.pose[0])
        at = got
    assert steps[0] < 0.02
    assert steps[3:] == pytest.approx([0.02] * 5)


def test_a_far_target_is_approached_at_the_speed_limit_and_says_so():
    safety, at = SafetyFilter(), action(x=-0.4)
    for _ in range(6):
        got = safety.limit(action(x=0.5), at, DT)
        speed, at = np.linalg.norm(got.pose[:3] - at.pose[:3]) / DT, got
    assert speed == pytest.approx(LIMITS.max_linear_speed_m_s)
    assert got.info["speed"] > 0


def test_a_far_rotation_is_approached_at_the_angular_limit():
    safety, at = SafetyFilter(), action()
    for _ in range(6):
        got = safety.limit(action(v=(0, 0, 2.0)), at, DT)
        turned, at = angle_between(tuple(at.pose[3:]), tuple(got.pose[3:])), got
    assert turned / DT == pytest.approx(LIMITS.max_angular_speed_rad_s)
    assert got.info["angular_speed"] > 0


def test_a_target_below_the_table_stops_at_the_box():
    safety, at = SafetyFilter(), action(z=0.4)
    for _ in range(60):
        at = safety.limit(action(z=-1.0), at, DT)
        assert at.pose[2] >= LOW[2]
    assert at.pose[2] == pytest.approx(LOW[2], abs=1e-3)
    assert at.info["box"] > 0


@pytest.mark.parametrize("index", range(7))
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e300])
def test_what_is_not_finite_becomes_a_hold(index, value):
    wanted = action(x=0.01)
    wanted.pose[index] = value
    got = SafetyFilter().limit(wanted, action(), DT)
    np.testing.assert_allclose(got.pose, action().pose)
    assert got.info["not_finite"] == 1.0


def test_a_gripper_that_is_not_finite_keeps_the_last_one():
    got = SafetyFilter().limit(action(gripper=math.nan), action(gripper=0.0), DT)
    assert got.gripper == 0.0
    assert SafetyFilter().limit(action(gripper=2.0), action(), DT).gripper == 1.0


def test_a_zero_quaternion_becomes_a_hold_and_a_long_one_is_normalised():
    wanted = action(v=(0, 0, 0.01))
    wanted.pose[3:] *= 4
    assert np.linalg.norm(SafetyFilter().limit(wanted, action(), DT).pose[3:]) == pytest.approx(1)
    wanted.pose[3:] = 0
    assert SafetyFilter().limit(wanted, action(), DT).info["not_finite"] == 1.0


def test_an_arm_outside_the_box_is_led_straight_back():
    safety, at = SafetyFilter(), action(z=0.0)
    distance = LOW[2]
    for _ in range(40):
        at = safety.limit(action(z=-0.5), at, DT)
        now = max(0.0, LOW[2] - at.pose[2])
        assert now <= distance
        distance = now
    assert distance == 0.0


def test_after_rest_the_next_step_starts_from_standstill():
    safety, at = SafetyFilter(), action(x=-0.4)
    for _ in range(5):
        at = safety.limit(action(x=0.5), at, DT)
    safety.rest()
    step = safety.limit(action(x=0.5), at, DT).pose[0] - at.pose[0]
    assert step == pytest.approx(LIMITS.max_linear_acceleration_m_s2 * DT * DT)


def test_a_rehearsal_changes_nothing_that_follows():
    rehearsed, plain = SafetyFilter(), SafetyFilter()
    here = action()
    for step in range(12):
        target = action(x=0.4, y=-0.2 + 0.01 * step, v=(0.0, 0.1 * step, 0.0))
        rehearsed.rehearse(here, 1 / 30)
        a, b = (f.limit(target, here, 1 / 30) for f in (rehearsed, plain))
        assert a.pose.tolist() == b.pose.tolist()
        assert a.info == b.info
        here = a


def test_a_stall_allows_no_longer_step():
    got = SafetyFilter().limit(action(x=0.5), action(x=0.0), 10.0)
    assert got.pose[0] <= LIMITS.max_linear_speed_m_s * LIMITS.max_tick_s + 1e-9


@pytest.mark.parametrize("dt", [0.0, -1.0, math.nan, math.inf])
def test_bad_time_step(dt):
    with pytest.raises(ValueError, match="dt_s"):
        SafetyFilter().limit(action(), action(), dt)


def test_without_a_finite_reference_there_is_nothing_safe_to_send():
    with pytest.raises(ValueError, match="reference"):
        SafetyFilter().limit(action(), np.full(7, np.nan), DT)


number = st.one_of(st.floats(-2, 2), st.floats(allow_nan=True, allow_infinity=True))
targets = st.tuples(st.lists(number, min_size=7, max_size=7), number)
starts = st.tuples(*(st.floats(float(lo), float(hi)) for lo, hi in zip(LOW, HIGH, strict=True)))


@settings(max_examples=200, deadline=None)
@given(
    starts,
    st.lists(st.tuples(targets, st.integers(1, 5)), min_size=1, max_size=8),
    st.sampled_from([1 / 60, 1 / 30, 1 / 10]),
)
def test_box_speed_and_acceleration_limits_hold_for_any_sequence(start, sequence, dt):
    safety, at = SafetyFilter(), action(*start)
    velocity, omega = np.zeros(3), np.zeros(3)
    for (pose, gripper), repeats in sequence:
        for _ in range(repeats):
            wanted = Action(np.array(pose), gripper)
            got = safety.limit(wanted, at, dt)
            assert np.isfinite(got.pose).all()
            assert np.linalg.norm(got.pose[3:]) == pytest.approx(1)
            assert 0.0 <= got.gripper <= 1.0
            assert (got.pose[:3] >= LOW).all()
            assert (got.pose[:3] <= HIGH).all()
            v = (got.pose[:3] - at.pose[:3]) / dt
            w = np.array(rotation_vector(tuple(at.pose[3:]), tuple(got.pose[3:]))) / dt
            slack = 1e-6
            assert np.linalg.norm(v) <= LIMITS.max_linear_speed_m_s + slack
            assert np.linalg.norm(w) <= LIMITS.max_angular_speed_rad_s + slack
            braking = LIMITS.max_linear_acceleration_m_s2 * dt
            assert np.linalg.norm(v - velocity) <= braking + slack
            turning = LIMITS.max_angular_acceleration_rad_s2 * dt
            assert np.linalg.norm(w - omega) <= turning + slack
            # Never faster than asked, or than it was: braking is stretched, nothing amplified.
            if "not_finite" not in got.info:
                asked = np.linalg.norm(np.array(pose[:3]) - at.pose[:3]) / dt
                assert np.linalg.norm(v) <= max(asked, float(np.linalg.norm(velocity))) + slack
            velocity, omega, at = v, w, got


@settings(max_examples=100, deadline=None)
@given(st.tuples(*[st.floats(-1, 1)] * 3), st.tuples(*[st.floats(-1, 1)] * 3))
def test_from_standstill_a_step_is_never_longer_than_asked(move, turn):
    at = action(0.0, -0.2, 0.6)
    got = SafetyFilter().limit(action(*(at.pose[:3] + move), v=turn), at, DT)
    assert np.linalg.norm(got.pose[:3] - at.pose[:3]) <= np.linalg.norm(move) + 1e-9
    turned = angle_between(tuple(at.pose[3:]), tuple(got.pose[3:]))
    assert turned <= np.linalg.norm(turn) + 1e-6


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"box_min_m": (1.0, 0.0, 0.0)}, "box"),
        ({"box_max_m": (math.nan, 1.0, 1.0)}, "box"),
        ({"max_linear_speed_m_s": 0.0}, "max_linear_speed_m_s"),
        ({"camera_max_age_s": -1.0}, "camera_max_age_s"),
        ({"latent_grace_s": -1.0}, "latent_grace_s"),
    ],
)
def test_bad_limits_name_the_field(changes, field):
    with pytest.raises(ValueError, match=field):
        SafetyLimits(**changes)
