"""Limits hold for any input; everything that control relies on has an age, and every stop a reason."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openhelix.runtime.core.config import SafetyLimits
from openhelix.runtime.core.interfaces import Action, CameraFrame
from openhelix.runtime.core.quaternion import angle_between, from_rotation_vector, rotation_vector
from openhelix.runtime.core.safety import Mode, SafeStop, SafetyFilter, SafetyState, Watchdog

# ------------------------------------------------------------------------------------------------
# Limits


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
        ({"latent_grace_s": float("inf")}, "latent_grace_s"),  # nothing would ever stop the arm
    ],
)
def test_bad_limits_name_the_field(changes, field):
    with pytest.raises(ValueError, match=field):
        SafetyLimits(**changes)


# ------------------------------------------------------------------------------------------------
# Ages


S = 1_000_000_000


def frame(t_ns, seed=0, change=0):
    rgb = np.random.default_rng(seed).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    rgb[5, 5, 0] ^= change  # off the sparse sample
    return CameraFrame(t_ns, rgb, None, np.eye(3), np.eye(4))


def tcp(x):
    return np.array([x, 0, 0.5, 0, 0, 0, 1.0])


def watched(limits=LIMITS):
    dog = Watchdog(limits, cameras=("static",))
    dog.arm(0)
    return dog


def alive(dog, t_ns):
    dog.saw("proprioception", t_ns, t_ns)
    dog.saw("latent", t_ns, t_ns)


def test_fresh_sources_are_no_reason_to_stop():
    dog = watched()
    for i in range(100):
        t = i * S // 30
        alive(dog, t)
        dog.saw_frame("static", frame(t, seed=i), tcp(i * 0.01), t)
        assert dog.check(t) is None
    assert dog.ages_s(t + S)["latent"] == pytest.approx(1.0)


def test_a_camera_that_stops_sending_is_stale_by_capture_time():
    dog, old = watched(), frame(0)
    for i in range(60):
        t = i * S // 30
        alive(dog, t)
        dog.saw_frame("static", old, tcp(0), t)  # the same frame is read again and again
        stop = dog.check(t)
        if stop:
            break
    assert stop.reason == "camera_stale"
    assert stop.source == "static"
    assert stop.age_s == pytest.approx(1.0, abs=0.05)
    assert "static, 1." in str(stop)


def test_identical_images_while_the_arm_moves_are_a_frozen_camera():
    dog = watched()
    stops = []
    for i in range(30):
        t = i * S // 30
        alive(dog, t)
        dog.saw_frame("static", frame(t, seed=0), tcp(i * 0.01), t)  # stamps do advance
        stops.append(dog.check(t))
    assert stops[2] is None
    assert stops[-1].reason == "camera_frozen"


def test_frames_of_another_size_are_none_of_this_camera():
    dog = watched()
    for i in range(60):
        t = i * S // 30
        alive(dog, t)
        rgb = frame(t, seed=i).rgb
        dog.saw_frame("static", replace(frame(t), rgb=rgb[::2] if i > 10 else rgb), tcp(0), t)
        if (stop := dog.check(t)) is not None:
            break
    assert stop.reason == "camera_stale" and 1.0 < stop.age_s < 1.1
    assert dog.misshapen == i - 10


def test_identical_images_of_a_still_arm_are_fine():
    dog = watched()
    for i in range(90):
        t = i * S // 30
        alive(dog, t)
        jitter = 0.0005 * (i % 2)  # sensor noise must not add up to a motion
        dog.saw_frame("static", frame(t, seed=0), tcp(jitter), t)
        assert dog.check(t) is None


def test_one_changed_pixel_off_the_sparse_sample_is_life():
    dog = watched()
    for i in range(30):
        t = i * S // 30
        alive(dog, t)
        dog.saw_frame("static", frame(t, change=i), tcp(i * 0.01), t)
        assert dog.check(t) is None


@pytest.mark.parametrize("pictures", [2, 3, 8])
def test_a_few_pictures_in_turn_while_the_arm_moves_are_a_frozen_camera(pictures):
    dog = watched()
    stops = []
    for i in range(30):
        t = i * S // 30
        alive(dog, t)
        dog.saw_frame("static", frame(t, seed=i % pictures), tcp(i * 0.01), t)
        stops.append(dog.check(t))
    assert stops[pictures] is None
    assert stops[-1].reason == "camera_frozen"


def test_an_arm_that_goes_to_and_fro_looks_the_same_at_the_same_place():
    dog = watched()
    for i in range(90):
        t = i * S // 30
        alive(dog, t)
        place = (0, 1, 2, 1)[i % 4]
        dog.saw_frame("static", frame(t, seed=place), tcp(place * 0.1), t)
        assert dog.check(t) is None


def test_proprioception_and_never_seen_sources_age_from_arming():
    dog = watched()
    stop = dog.check(S // 2)
    assert stop.reason == "proprioception_stale"
    assert stop.latched


def test_a_stamp_from_the_future_is_not_believed():
    dog = watched()
    dog.saw("proprioception", 100 * S, 0)
    assert dog.future_refused == 1
    assert dog.check(S // 2).reason == "proprioception_stale"


def test_silent_system_2_first_grace_then_a_stop_that_ends_with_it():
    dog = watched(SafetyLimits(latent_max_age_s=1.0, latent_grace_s=2.0))

    def at(t_s):
        now = round(t_s * S)
        dog.saw("proprioception", now, now)
        dog.saw_frame("static", frame(now, seed=now), tcp(0), now)
        return now

    assert dog.check(at(2.9)) is None
    stop = dog.check(at(3.1))
    assert (stop.reason, stop.latched) == ("latent_silent", False)
    dog.saw("latent", at(3.2), at(3.2))
    assert dog.check(at(3.3)) is None


def test_a_new_instruction_gives_the_first_latent_its_time():
    dog = watched(SafetyLimits(latent_max_age_s=1.0, latent_grace_s=0.0))
    dog.expect_latent(5 * S)
    dog.saw("proprioception", 5 * S, 5 * S)
    dog.saw_frame("static", frame(5 * S), tcp(0), 5 * S)
    assert dog.check(5 * S) is None


def test_without_system_2_its_silence_means_nothing():
    dog = Watchdog(LIMITS, use_latent=False)
    dog.arm(0)
    dog.saw("proprioception", 1000 * S, 1000 * S)
    assert dog.check(1000 * S) is None


def test_before_it_is_armed_nothing_is_old():
    dog = Watchdog(LIMITS, cameras=("static",))
    assert dog.cameras == ("static",)
    assert set(dog.ages_s(7 * S).values()) == {0.0}
    assert dog.check(7 * S) is None


def test_ages_and_bounds_are_told_for_what_is_watched():
    limits = SafetyLimits(latent_max_age_s=1.0, latent_grace_s=2.0)
    dog = watched(limits)
    dog.arm(5 * S)
    alive(dog, 6 * S)
    dog.saw("proprioception", 5 * S + 1, 6 * S)  # an older one that comes late changes nothing
    ages = dog.ages_s(6 * S)
    assert ages == {"camera:static": 1.0, "proprioception": 0.0, "latent": 0.0}
    assert dog.stop_after_s() == {
        "camera:static": limits.camera_max_age_s,
        "proprioception": limits.proprioception_max_age_s,
        "latent": 3.0,
    }


def test_a_source_stops_the_arm_after_its_bound_and_not_at_it():
    limits = SafetyLimits(latent_max_age_s=1.0, latent_grace_s=2.0)
    dog = Watchdog(limits)
    dog.arm(5 * S)
    dog.saw("proprioception", 8 * S, 8 * S)
    assert dog.check(8 * S) is None
    dog.saw("proprioception", 8 * S + 1, 8 * S + 1)
    stop = dog.check(8 * S + 1)
    assert stop.reason == "latent_silent" and stop.age_s == pytest.approx(3.0)


def test_what_is_not_watched_is_not_looked_at():
    dog = Watchdog(LIMITS, use_latent=False)
    dog.arm(0)
    dog.saw("latent", 0, 0)
    dog.saw("a stranger", 10**6 * S, 0)
    dog.saw_frame("gripper", frame(0), tcp(0), 0)
    assert dog.future_refused == 0 and set(dog.ages_s(0)) == {"proprioception"}


@pytest.mark.parametrize(("ahead_s", "refused"), [(0.2, 0), (0.3, 1)])
def test_how_far_ahead_a_stamp_may_be(ahead_s, refused):
    dog = watched()
    dog.saw("proprioception", 10 * S + round(ahead_s * S), 10 * S)
    assert dog.future_refused == refused
    assert (dog.ages_s(10 * S)["proprioception"] == 0.0) == (not refused)


def frozen_after(dog, xs):
    """Show the same picture while the arm is at each x; return what the watchdog says each time."""
    said = []
    for i, x in enumerate(xs):
        alive(dog, i * S // 30)
        dog.saw_frame("static", frame(i * S // 30), tcp(x), i * S // 30)
        said.append(dog.check(i * S // 30))
    return said


def test_two_repeats_and_a_real_motion_make_a_camera_frozen():
    far = LIMITS.frozen_motion_m
    assert frozen_after(watched(), [0.0, far, far, far]) == [None] * 4  # as far as is allowed
    said = frozen_after(watched(), [0.0, 2 * far, 2 * far])
    assert said[:2] == [None, None]
    assert said[2] == SafeStop("camera_frozen", "static", 0.0)
    assert str(said[2]) == "camera frozen (static)"


def test_fingertips_that_touch_nothing_are_no_frozen_camera():
    dog = Watchdog(LIMITS, ("tactile",))
    dog.arm(0)
    for i, x in enumerate([0.0, 0.1, 0.2, 0.3]):
        now = i * S // 30
        dog.saw("proprioception", now, now)
        dog.saw("latent", now, now)
        dog.saw_frame("tactile", frame(now), tcp(x), now)
        assert dog.check(now) is None
    late = dog.check(now + round(2 * LIMITS.camera_max_age_s * S))
    assert late is not None and late.source != "latent"  # silent it must not be


def test_an_arm_that_stands_away_from_the_origin_has_not_moved():
    dog = watched()
    for i in range(9):
        t = i * S // 30
        alive(dog, t)
        dog.saw_frame("static", frame(t), np.array([0.3, -0.2, 0.5, 0, 0, 0, 1.0]), t)
        assert dog.check(t) is None


def test_a_frame_read_twice_is_no_repeat_and_a_restart_forgets_repeats():
    dog = watched()
    for x in (0.0, 1.0, 2.0, 3.0):
        dog.saw_frame("static", frame(1), tcp(x), 1)
    alive(dog, 1)
    assert dog.check(1) is None
    assert frozen_after(dog, [0.0, 1.0, 2.0, 3.0])[-1] is not None
    dog.arm(S // 10)
    assert dog.check(S // 10) is None


# -- the verdict ---------------------------------------------------------------------------


def test_hold_recovers_by_itself_and_counts_once():
    safety = SafetyState()
    assert safety.update(None, "chunk_ran_out") is Mode.HOLD
    assert safety.update(None, "chunk_ran_out") is Mode.HOLD
    assert safety.reason == "chunk ran out"
    assert safety.update(None) is Mode.RUN
    assert safety.holds == {"chunk_ran_out": 1}
    assert safety.reason == ""


def test_a_latched_stop_stays_until_reset():
    safety = SafetyState()
    assert safety.update(SafeStop("camera_stale", "static", 1.2)) is Mode.STOP
    assert safety.update(None) is Mode.STOP
    assert safety.reason == "camera stale (static, 1.20 s old)"
    safety.reset()
    assert safety.update(None) is Mode.RUN
    assert safety.stops == {"camera_stale": 1}


def test_an_unlatched_stop_ends_with_its_cause_and_yields_to_a_latched_one():
    safety = SafetyState()
    silent = SafeStop("latent_silent", "latent", 9.0, latched=False)
    assert safety.update(silent) is Mode.STOP
    assert safety.update(silent) is Mode.STOP
    assert safety.stops == {"latent_silent": 1}
    assert safety.update(None) is Mode.RUN
    safety.update(silent)
    assert safety.trip("operator", "keyboard") is Mode.STOP
    assert safety.update(None) is Mode.STOP
    assert safety.stops == {"latent_silent": 2, "operator": 1}


def test_a_person_stops_the_arm_for_good_whatever_else_is_well():
    watchdog, safety = Watchdog(LIMITS), SafetyState()
    watchdog.arm(0)
    assert safety.update(watchdog.check(1)) is Mode.RUN
    watchdog.order_stop("somebody")
    watchdog.arm(2)  # a restart of the sources does not take it back
    assert safety.update(watchdog.check(3)) is Mode.STOP
    assert safety.update(None) is Mode.STOP
    assert safety.reason == "operator (somebody)" and safety.stops == {"operator": 1}


def test_a_latent_of_another_model_stops_the_arm_for_good():
    watchdog, safety = Watchdog(LIMITS), SafetyState()
    watchdog.arm(0)
    watchdog.saw_mismatch("System 2 sends b, the run began with a")
    watchdog.saw_mismatch("System 2 sends c, the run began with a")
    watchdog.saw("latent", 1, 1)  # one of its own comes later
    assert safety.update(watchdog.check(2)) is Mode.STOP
    assert safety.update(None) is Mode.STOP
    assert safety.stops == {"latent_mismatch": 1}
    assert safety.reason == "latent mismatch (System 2 sends b, the run began with a)"


def test_each_reason_to_hold_is_counted_once_for_as_long_as_it_lasts():
    safety = SafetyState()
    for reason in ("first_latent", "first_latent", "first_latent", "chunk_ran_out"):
        assert safety.update(None, reason) is Mode.HOLD
    assert safety.holds == {"first_latent": 1, "chunk_ran_out": 1}
    assert [mode.value for mode in Mode] == ["run", "hold", "stop"]  # labels of metrics


def test_a_reason_names_an_age_where_there_is_one():
    assert str(SafeStop("latent_silent", "latent", 0.4)) == "latent silent (latent, 0.40 s old)"
    safety = SafetyState()
    safety.trip("operator", "keyboard")
    assert safety.reason == "operator (keyboard)"
