"""openhelix.runtime.observe.recorder, segments and replay: what went in comes out, and losses are admitted."""

from __future__ import annotations

import json
import threading
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openhelix.runtime.observe.recorder import (
    Reader,
    Recorder,
    RecordingError,
    SegmentReader,
    SegmentWriter,
    replay,
)
from tests.runtime.ticks import chunk_for, ticks


def record(folder, run, **options):
    recorder = Recorder(folder, lossless=True, **options)
    for tick in run:
        recorder(tick)
    return recorder.close()


def by_topic(folder):
    found = {}
    for topic, _, message in Reader(folder):
        found.setdefault(topic, []).append(message)
    return found


def test_what_was_recorded_comes_back(tmp_path):
    run = ticks(30)
    summary = record(tmp_path / "r", run, meta={"scene": "D"})
    reader = Reader(tmp_path / "r")
    assert summary["complete"]
    assert reader.complete
    assert reader.meta["scene"] == "D"
    found = by_topic(tmp_path / "r")
    assert len(found["observation"]) == len(found["tick"]) == len(found["action"]) == 30
    for tick, observation in zip(run, found["observation"], strict=True):
        assert observation.t_ns == tick.observation.t_ns
        assert set(observation.frames) == {"static", "gripper"}
        for name, frame in tick.observation.frames.items():
            np.testing.assert_array_equal(observation.frames[name].rgb, frame.rgb)
            np.testing.assert_array_equal(observation.frames[name].depth, frame.depth)
    chunks = [tick.new_chunk for tick in run if tick.new_chunk]
    for a, b in zip(chunks, found["chunk"], strict=True):
        np.testing.assert_array_equal(a.poses, b.poses)
    assert found["tick"][3]["state"] == "run"


def test_each_camera_frame_is_written_once(tmp_path):
    record(tmp_path / "r", ticks(30, camera_every=3))
    assert len(by_topic(tmp_path / "r")["frame/static"]) == 10


def test_events(tmp_path):
    recorder = Recorder(tmp_path / "r")
    recorder.event("instruction", 5, instruction_id=1, text="open the drawer")
    recorder.close()
    (message,) = Reader(tmp_path / "r")
    assert message.t_ns == 5
    assert message.message["text"] == "open the drawer"


def test_a_recorder_that_cannot_keep_up_drops_counts_and_says_incomplete(tmp_path):
    recorder = Recorder(tmp_path / "r", queue_size=2)
    gate = threading.Event()
    write = recorder._writer.write
    recorder._writer.write = lambda *args: (gate.wait(10), write(*args))
    for tick in ticks(20):
        recorder(tick)
    gate.set()
    summary = recorder.close()
    assert summary["dropped"] >= 17
    assert summary["written"] + summary["dropped"] == 20
    assert not summary["complete"]
    assert not Reader(tmp_path / "r").complete
    # A frame whose first tick was dropped comes with the next one that shows it.
    for observation in by_topic(tmp_path / "r")["observation"]:
        assert set(observation.frames) == {"static", "gripper"}


def test_until_it_is_closed_a_recording_is_incomplete(tmp_path):
    recorder = Recorder(tmp_path / "r")
    assert not Reader(tmp_path / "r").complete
    recorder.close()
    assert Reader(tmp_path / "r").complete


def test_a_full_disk_ends_the_recording_and_not_the_run(tmp_path):
    summary = record(tmp_path / "r", ticks(30), max_bytes=100_000)
    assert not summary["complete"]
    assert "100000 bytes" in summary["error"]
    assert summary["dropped"] > 0
    assert len(by_topic(tmp_path / "r")["observation"]) > 0


def test_what_the_codec_refuses_is_counted_and_the_rest_goes_on(tmp_path):
    run = ticks(6)
    run[2].sent.pose[0] = np.nan
    summary = record(tmp_path / "r", run)
    assert summary["refused"] == 1
    assert not summary["complete"]
    assert len(by_topic(tmp_path / "r")["action"]) == 5


def test_a_second_recording_never_overwrites_the_first(tmp_path):
    record(tmp_path / "r", ticks(3))
    with pytest.raises(RecordingError, match="already"):
        Recorder(tmp_path / "r")


def test_no_recording_there(tmp_path):
    with pytest.raises(RecordingError, match="no recording"):
        Reader(tmp_path)
    (tmp_path / "meta.json").write_text("{")
    with pytest.raises(RecordingError, match="cannot be read"):
        Reader(tmp_path)


def test_segments_rotate_and_read_in_order(tmp_path):
    writer = SegmentWriter(tmp_path, segment_bytes=1000)
    for i in range(50):
        writer.write("a", i, [bytes(100), b"", bytes([i])])
    writer.close()
    writer.save_meta({"complete": True})
    assert len(list(tmp_path.glob("*.ohr"))) > 3
    records = list(SegmentReader(tmp_path))
    assert [t for _, t, _ in records] == list(range(50))
    assert records[7][2] == [bytes(100), b"", b"\7"]


@settings(max_examples=40, deadline=None)
@given(cut=st.integers(0, 3000), flip=st.integers(0, 3000) | st.none())
def test_a_damaged_file_is_read_up_to_the_damage_and_says_so(tmp_path_factory, cut, flip):
    folder = tmp_path_factory.mktemp("r")
    writer = SegmentWriter(folder)
    for i in range(20):
        writer.write("topic", i, [bytes([i]) * 100])
    writer.close()
    writer.save_meta({"complete": True, "records": 20})
    path = folder / "000000.ohr"
    data = bytearray(path.read_bytes())
    if flip is not None:
        data[flip % len(data)] ^= 0x10
    cut %= len(data)
    path.write_bytes(data[: len(data) - cut])
    reader = SegmentReader(folder)
    records = list(reader)
    assert [t for _, t, _ in records] == list(range(len(records)))
    assert all(frames == [bytes([t]) * 100] for _, t, frames in records)
    assert reader.cut == (len(records) < 20)
    if flip is not None or cut:
        assert len(records) < 20
        assert not reader.complete


class Policy:
    """Answers as the run's policy did; `off_m` makes it another one."""

    def __init__(self, off_m=0.0):
        self.off_m, self.seeds = off_m, []

    def reset(self, seed=None):
        self.seeds.append(seed)

    def act(self, observation, latents):
        chunk = chunk_for(observation, latents)
        chunk.poses[:, 0] += self.off_m
        return chunk


def test_replay_gives_each_chunk_its_own_input_again(tmp_path):
    run = ticks(60, instruction_ids=2)
    record(tmp_path / "r", run, meta={"seed": 7})
    policy = Policy()
    report = replay(tmp_path / "r", policy)
    recorded = sum(tick.new_chunk is not None for tick in run)
    assert report["complete"]
    assert report["chunks"] == report["replayed"] == recorded > 10
    assert report["unmatched"] == 0
    assert report["position_error_m"]["max"] == 0.0
    assert policy.seeds == [7 + 0, 7 + 1]  # the seed of the run and the number of the instruction


def test_replay_measures_how_far_another_policy_is(tmp_path):
    record(tmp_path / "r", ticks(40))
    report = replay(tmp_path / "r", Policy(off_m=0.02))
    assert report["position_error_m"]["p50"] == pytest.approx(0.02)
    assert report["rotation_error_rad"]["max"] == pytest.approx(0.0)
    assert json.loads(json.dumps(report)) == report


def test_replay_says_what_it_could_not_match(tmp_path):
    run = ticks(20)
    for i, tick in enumerate(run):
        if tick.new_chunk:
            run[i] = replace(tick, new_chunk=replace(tick.new_chunk, t_obs_ns=5))
    record(tmp_path / "r", run)
    report = replay(tmp_path / "r", Policy())
    assert report["unmatched"] == report["chunks"] > 0
    assert report["position_error_m"] is None
