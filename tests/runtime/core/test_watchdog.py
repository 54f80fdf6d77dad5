"""Everything that control relies on has an age, and every stop has a reason."""

from __future__ import annotations

import numpy as np
import pytest

from openhelix.runtime.core.limits import SafetyLimits
from openhelix.runtime.core.types import CameraFrame
from openhelix.runtime.core.watchdog import Mode, SafeStop, SafetyState, Watchdog

LIMITS = SafetyLimits()
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
        dog.saw_frame("static", frame(t, change=i % 2), tcp(i * 0.01), t)
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
