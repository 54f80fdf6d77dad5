"""openhelix.runtime.observe.recorder: what went in comes out, and losses are admitted."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from dataclasses import replace

import lz4.frame
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mcap.data_stream import RecordBuilder
from mcap.reader import make_reader
from mcap.records import Chunk
from mcap.writer import CompressionType, Writer
from mcap_protobuf.decoder import DecoderFactory

from openhelix.runtime.control.talk import Entry
from openhelix.runtime.core.config import ConfigError, RunConfig
from openhelix.runtime.core.interfaces import (
    ActionSpec,
    CameraSpec,
    LatentSpec,
    PartFailed,
    PolicySpec,
)
from openhelix.runtime.observe import recorder as module
from openhelix.runtime.observe.recorder import (
    Reader,
    Recorder,
    RecordingError,
    playback,
    replay,
)
from tests.runtime.ticks import chunk_for, ticks, told


def record(path, run, **options):
    recorder = Recorder(path, lossless=True, **options)
    for message in told(run):
        recorder(message)
    return recorder.close()


def by_topic(path):
    found = {}
    for topic, _, message in Reader(path):
        found.setdefault(topic, []).append(message)
    return found


def test_what_was_recorded_comes_back(tmp_path):
    run = ticks(30)
    path = tmp_path / "r.mcap"
    summary = record(path, run, meta={"scene": "D"})
    reader = Reader(path)
    found = by_topic(path)
    assert summary["complete"]
    assert reader.complete
    assert reader.meta["scene"] == "D"
    assert len(found["/observation"]) == len(found["/tick"]) == len(found["/action"]) == 30
    for tick, observation in zip(run, found["/observation"], strict=True):
        assert observation.t_ns == tick.observation.t_ns
        np.testing.assert_array_equal(observation.tcp_pose, tick.observation.tcp_pose)
        assert set(observation.frames) == {"static", "gripper"}
        for name, frame in tick.observation.frames.items():
            back = observation.frames[name]
            for field in ("rgb", "depth", "K", "T_world_cam"):
                np.testing.assert_array_equal(getattr(back, field), getattr(frame, field))
                assert getattr(back, field).dtype == getattr(frame, field).dtype
    for topic, name in (("/chunk", "new_chunk"), ("/latent", "new_latent")):
        sent = [getattr(tick, name) for tick in run if getattr(tick, name)]
        assert [str(message) for message in found[topic]] == [str(message) for message in sent]
    assert found["/tick"][3].state == "run"


@given(
    z=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1),
    joint=st.floats(),
)
@settings(max_examples=40, deadline=None)
def test_numbers_come_back_to_the_last_bit(tmp_path_factory, z, joint):
    path = tmp_path_factory.mktemp("r") / "r.mcap"
    (tick,) = ticks(1)
    latent = replace(tick.new_latent, z=np.array([z], np.float32))
    # A sensor may say NaN or inf; JSON cannot tell one from the other.
    observation = replace(tick.observation, joints=np.array([joint, 0.1]))
    record(path, [replace(tick, new_latent=latent, observation=observation)])
    found = by_topic(path)
    np.testing.assert_array_equal(found["/latent"][0].z, latent.z)
    want = joint if np.isfinite(joint) else np.nan
    np.testing.assert_array_equal(found["/observation"][0].joints, [want, 0.1])


def test_a_track_is_the_run_without_its_images_and_plays_back_as_it_was_told(tmp_path):
    run = ticks(20)
    visual = np.linspace(0.0, 1.0, 36)
    happened = [Entry(1, 5, "begun", "open the drawer"), Entry(2, 9, "seen", task="open_drawer")]
    sent = told(run, "open_drawer", visual=visual, entries={1: happened[:1], 12: happened[1:]})
    for name, images in (("recording.mcap", True), ("track.mcap", False)):
        recorder = Recorder(tmp_path / name, images=images, lossless=True)
        for message in sent:
            recorder(message)
        assert recorder.close()["complete"]
    for source, cameras in ((tmp_path, {"static", "gripper"}), (tmp_path / "track.mcap", set())):
        played = list(playback(source))
        assert [m.tick.index for m in played] == [m.tick.index for m in sent]
        for back, message in zip(played, sent, strict=True):
            assert back.entries == message.entries
            assert (back.task, back.instruction, back.steps) == (
                message.task,
                message.instruction,
                message.steps,
            )
            np.testing.assert_array_equal(back.visual, visual)
            np.testing.assert_array_equal(back.tick.sent.pose, message.tick.sent.pose)
            assert (back.tick.new_chunk is None) == (message.tick.new_chunk is None)
            assert set(back.tick.observation.frames) == cameras


def test_a_camera_without_depth(tmp_path):
    (tick,) = ticks(1)
    frame = replace(tick.observation.frames["static"], depth=None)
    observation = replace(tick.observation, frames={"static": frame})
    record(tmp_path / "r.mcap", [replace(tick, observation=observation)])
    (back,) = by_topic(tmp_path / "r.mcap")["/camera/static"]
    assert back.depth is None


def test_the_index_stays_small_in_memory_and_other_programs_find_every_chunk_by_it(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(module, "CHUNK_BYTES", 2048)
    recorder = Recorder(tmp_path / "r.mcap", images=False, lossless=True)
    writer, run = recorder._writer, told(ticks(400))
    after = []
    for part in (run[:100], run[100:]):
        for message in part:
            recorder(message)
        while recorder.written < message.tick.index:
            time.sleep(0.01)
        after.append((sys.getallocatedblocks(), writer._writer._Writer__statistics.chunk_count))
    (blocks, chunks), (more_blocks, more_chunks) = after
    assert more_chunks - chunks > 80
    assert more_blocks - blocks < 3 * (more_chunks - chunks)  # fifteen, were it of objects
    recorder.close()
    with (tmp_path / "r.mcap").open("rb") as file:
        reader = make_reader(file)
        summary = reader.get_summary()
        assert len(summary.chunk_indexes) == summary.statistics.chunk_count >= more_chunks
        for index in summary.chunk_indexes:
            assert index.message_start_time <= index.message_end_time
            assert index.message_index_offsets
        assert len(list(reader.iter_messages(topics=["/tick"]))) == 400


def test_other_programs_see_images_and_described_records(tmp_path):
    run = ticks(4)
    record(tmp_path / "r.mcap", run)
    with open(tmp_path / "r.mcap", "rb") as file:
        reader = make_reader(file, decoder_factories=[DecoderFactory()])
        summary = reader.get_summary()
        schemas = {c.topic: summary.schemas[c.schema_id] for c in summary.channels.values()}
        decoded = list(reader.iter_decoded_messages("/camera/static/rgb"))
    image = decoded[0][3]
    assert (image.width, image.height, image.encoding, image.step) == (64, 64, "rgb8", 192)
    assert image.data == run[0].observation.frames["static"].rgb.tobytes()
    assert decoded[0][2].log_time == run[0].observation.frames["static"].t_ns
    assert schemas["/camera/static/depth"].name == "foxglove.RawImage"
    for topic in ("/observation", "/latent", "/chunk", "/action", "/tick", "/camera/static"):
        schema = json.loads(schemas[topic].data)
        assert schema["type"] == "object"
        assert "$ref" not in schemas[topic].data.decode()
    fields = json.loads(schemas["/observation"].data)["properties"]
    assert fields["tcp_pose"]["type"] == "array"
    assert "frames" not in fields


def test_each_camera_frame_is_written_once(tmp_path):
    record(tmp_path / "r.mcap", ticks(30, camera_every=3))
    assert len(by_topic(tmp_path / "r.mcap")["/camera/static"]) == 10


def test_what_the_robot_was_told_is_there_once_each(tmp_path):
    run = ticks(20, instruction_ids=2)
    recorder = Recorder(tmp_path / "r.mcap", lossless=True)
    for i, message in enumerate(told(run)):
        task, text = ("open_drawer", "open the drawer") if i < 10 else ("", "now close it")
        recorder(replace(message, task=task, instruction=text))
    recorder.close()
    found = [m for m in Reader(tmp_path / "r.mcap") if m.topic == "/instruction"]
    assert [m.t_ns for m in found] == [run[0].t_ns, run[10].t_ns]
    assert [(m.message.instruction_id, m.message.task, m.message.text) for m in found] == [
        (0, "open_drawer", "open the drawer"),
        (1, "", "now close it"),
    ]


def test_a_recorder_that_cannot_keep_up_drops_counts_and_says_incomplete(tmp_path):
    path = tmp_path / "r.mcap"
    recorder = Recorder(path, queue_size=2)
    gate = threading.Event()
    put = recorder._writer.put
    recorder._writer.put = lambda *words: (gate.wait(10), put(*words))
    for message in told(ticks(20)):
        recorder(message)
    gate.set()
    summary = recorder.close()
    assert summary["dropped"] >= 17
    assert summary["written"] + summary["dropped"] == 20
    assert not summary["complete"]
    assert not Reader(path).complete
    assert Reader(path).meta["dropped"] == summary["dropped"]
    # A frame whose first tick was dropped comes with the next one that shows it.
    for observation in by_topic(path)["/observation"]:
        assert set(observation.frames) == {"static", "gripper"}


def test_until_it_is_closed_a_recording_is_incomplete(tmp_path):
    recorder = Recorder(tmp_path / "r.mcap")
    assert not Reader(tmp_path / "r.mcap").complete
    recorder.close()
    assert Reader(tmp_path / "r.mcap").complete


def test_a_full_disk_ends_the_recording_and_not_the_run(tmp_path):
    summary = record(tmp_path / "r.mcap", ticks(30), max_bytes=100_000)
    assert not summary["complete"]
    assert "100000 bytes" in summary["error"]
    assert summary["dropped"] > 0
    assert len(by_topic(tmp_path / "r.mcap")["/observation"]) > 0


FULL = """
import json, resource, sys
from pathlib import Path
from openhelix.runtime.observe.recorder import Recorder
from tests.runtime.ticks import ticks, told
limit = int(sys.argv[2])
recorder = Recorder(Path(sys.argv[1]), lossless=True)
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
for message in told(ticks(60, camera_every=1, noise=True)):
    recorder(message)
print(json.dumps([recorder.close(), recorder.written, recorder.dropped]))
"""


@pytest.mark.parametrize("limit", [500, 20_000, 600_000, 800_000])
def test_what_a_disk_refuses_later_is_not_counted_as_written(tmp_path, limit):
    """Chunks go to the disk whole: what waited for its chunk is lost with it, and is counted."""
    path = tmp_path / "r.mcap"
    words = [sys.executable, "-c", FULL, str(path), str(limit)]
    done = subprocess.run(words, cwd=os.getcwd(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    summary, written, dropped = json.loads(done.stdout)
    found = [m.message for m in Reader(path) if m.topic == "/tick"]
    assert len(found) == summary["written"] == written < 60
    assert summary["dropped"] == dropped == 60 - written
    assert (written > 0) == (limit >= 600_000)
    assert str(path) in summary["error"] and not summary["complete"]
    reader = Reader(path)
    assert len(list(reader)) > 0 or written == 0
    assert not reader.complete and reader.bad == 0


def test_ticks_that_never_came_make_a_recording_incomplete(tmp_path):
    run = ticks(30)
    for kept, after, missed in (
        (run[2:], 0, 2),  # the recorder joined late
        (run[:10] + run[13:], 0, 3),
        (run[:25], 5, 5),  # the last ones are lost on the way
        ([*run, run[-1]], 0, 0),  # the last tick again, with what happened after it
    ):
        recorder = Recorder(tmp_path / f"{missed}.mcap", lossless=True)
        for message in told(kept):
            recorder(message)
        summary = recorder.close(missed=after)
        assert summary["missed"] == missed
        assert summary["complete"] == (missed == 0)
        assert Reader(tmp_path / f"{missed}.mcap").complete == (missed == 0)


def test_chunks_that_came_too_late_are_recorded_and_replayed(tmp_path):
    run = ticks(60)
    late = [i for i, tick in enumerate(run) if tick.new_chunk][::2]
    for i in late:
        run[i] = replace(run[i], new_chunk=None, refused_chunk=run[i].new_chunk)
    record(tmp_path / "r.mcap", run)
    found = by_topic(tmp_path / "r.mcap")
    assert [str(m) for m in found["/chunk_refused"]] == [str(run[i].refused_chunk) for i in late]
    report = replay(tmp_path / "r.mcap", Policy())
    assert report["replayed"] == len(found["/chunk"]) + len(late)
    assert report["unmatched"] == 0


def test_what_the_codec_refuses_is_counted_and_the_rest_goes_on(tmp_path):
    run = ticks(6)
    run[2].sent.pose[0] = np.nan
    run[4] = replace(run[4], observation=replace(run[4].observation, gripper_width=np.inf))
    summary = record(tmp_path / "r.mcap", run)
    assert summary["refused"] == 2
    assert not summary["complete"]
    found = by_topic(tmp_path / "r.mcap")
    assert len(found["/action"]) == len(found["/observation"]) == 5


def test_a_second_recording_never_overwrites_the_first(tmp_path):
    record(tmp_path / "r.mcap", ticks(3))
    with pytest.raises(RecordingError, match="already"):
        Recorder(tmp_path / "r.mcap")


def test_no_recording_there(tmp_path):
    with pytest.raises(RecordingError, match="no recording"):
        Reader(tmp_path)
    with pytest.raises(RecordingError, match="no recording"):
        Reader(tmp_path / "none.mcap")
    for data in (b"", b"{", os.urandom(3000)):
        (tmp_path / "recording.mcap").write_bytes(data)
        with pytest.raises(RecordingError, match="not a recording"):
            Reader(tmp_path)
    with open(tmp_path / "other.mcap", "wb") as file:
        writer = Writer(file)
        writer.start("ros2")
        writer.finish()
    with pytest.raises(RecordingError, match="not a recording"):
        Reader(tmp_path / "other.mcap")


def test_a_recording_carries_the_configuration_of_its_run(tmp_path):
    config = RunConfig(seed=7)
    meta = {"config": config.model_dump(mode="json"), "seed": 7}
    record(tmp_path / "recording.mcap", ticks(2), meta=meta)
    reader = Reader(tmp_path)  # the folder of a run will do
    assert reader.config() == config
    assert reader.config(["system1.latent_memory=3"]).system1.latent_memory == 3
    with pytest.raises(ConfigError, match="latent_memori"):
        reader.config(["system1.latent_memori=3"])
    record(tmp_path / "bare.mcap", ticks(2))
    with pytest.raises(RecordingError, match="carries no configuration"):
        Reader(tmp_path / "bare.mcap").config()


KILLED = """
import os, signal, sys
from pathlib import Path
from openhelix.runtime.observe.recorder import Recorder
from tests.runtime.ticks import ticks, told
recorder = Recorder(Path(sys.argv[1]), {"config": {"seed": 3}}, lossless=True)
for message in told(ticks(60, camera_every=1)):
    recorder(message)
while recorder.queued or recorder.written < 60:
    pass
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_process_leaves_what_it_had_written(tmp_path):
    path = tmp_path / "r.mcap"
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)], cwd=os.getcwd(), timeout=120)
    assert done.returncode == -signal.SIGKILL
    reader = Reader(path)
    observations = [m.message for m in reader if m.topic == "/observation"]
    # A tick's images have 36 kB: fifteen ticks fill a chunk.
    assert 0 < 60 - len(observations) < 18
    for tick, observation in zip(ticks(60, camera_every=1), observations, strict=False):
        assert observation.t_ns == tick.observation.t_ns
        frame = tick.observation.frames["static"]
        np.testing.assert_array_equal(observation.frames["static"].rgb, frame.rgb)
    assert reader.cut
    assert not reader.complete
    assert reader.config().seed == 3


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    """A recording's bytes, and the numbers and times of its messages."""
    path = tmp_path_factory.mktemp("whole") / "r.mcap"
    record(path, ticks(40, camera_every=1), meta={"seed": 5})
    messages = [(m.topic, m.t_ns, str(m.message)) for m in Reader(path)]
    return path.read_bytes(), messages


@settings(max_examples=60, deadline=None)
@given(cut=st.floats(0, 1) | st.just(1.0), flip=st.floats(0, 1) | st.none(), bit=st.integers(0, 7))
def test_a_damaged_file_is_read_up_to_the_damage_and_says_so(
    tmp_path_factory, recording, cut, flip, bit
):
    whole, messages = recording
    data = bytearray(whole[: round(cut * len(whole))])
    if flip is not None and data:
        data[min(len(data) - 1, int(flip * len(data)))] ^= 1 << bit
    path = tmp_path_factory.mktemp("r") / "r.mcap"
    path.write_bytes(data)
    try:
        reader = Reader(path)
    except RecordingError:
        return
    found = [(m.topic, m.t_ns, str(m.message)) for m in reader]
    assert found == messages[: len(found)]
    if reader.complete:
        assert found == messages
        assert len(data) == len(whole)
    if len(found) < len(messages):
        assert not reader.complete


def bomb(path, unpacked, packed=None):
    """A recording whose first chunk unpacks to `unpacked` zeros, or says so."""
    with open(path, "wb") as file:
        writer = Writer(file, compression=CompressionType.NONE)
        writer.start(module.PROFILE)
        writer.add_metadata(module.PROFILE, {})
        chunk = Chunk("lz4", packed or lz4.frame.compress(bytes(unpacked)), 0, 0, 0, unpacked)
        builder = RecordBuilder()
        chunk.write(builder)
        file.write(builder.end())
        writer.finish()


@pytest.mark.parametrize(
    ("unpacked", "packed"),
    [
        (700 << 20, None),  # a chunk of 3 MB that really is one of 700 MB
        (1000, lz4.frame.compress(bytes(700 << 20))),  # one that does not admit it
        (1 << 62, b"x"),  # a claim
    ],
)
def test_a_small_file_does_not_unpack_to_gigabytes(tmp_path, unpacked, packed):
    bomb(tmp_path / "r.mcap", unpacked, packed)
    assert (tmp_path / "r.mcap").stat().st_size < 4 << 20
    tracemalloc.start()
    try:
        reader = Reader(tmp_path / "r.mcap")
        assert list(reader) == []
        assert reader.cut
        assert tracemalloc.get_traced_memory()[1] < 100 << 20
    finally:
        tracemalloc.stop()


class Policy:
    """Answers as the run's policy did; `off_m` makes it another one."""

    def __init__(self, off_m=0.0, side=64, dim=8):
        self.off_m, self.seeds = off_m, []
        cameras = (CameraSpec("static", side, side),)
        self.spec = PolicySpec(cameras, LatentSpec("x", 1, dim), ActionSpec(), 4)

    def reset(self, seed=None):
        self.seeds.append(seed)

    def act(self, observation, latents):
        chunk = chunk_for(observation, latents)
        chunk.poses[:, 0] += self.off_m
        return chunk


def test_replay_gives_each_chunk_its_own_input_again(tmp_path):
    run = ticks(60, instruction_ids=2)
    record(tmp_path / "r.mcap", run, meta={"seed": 7})
    policy = Policy()
    report = replay(tmp_path / "r.mcap", policy)
    recorded = sum(tick.new_chunk is not None for tick in run)
    assert report["complete"]
    assert report["chunks"] == report["replayed"] == recorded > 10
    assert report["unmatched"] == 0
    assert report["position_error_m"]["max"] == 0.0
    assert policy.seeds == [7 + 0, 7 + 1]  # the seed of the run and the number of the instruction


def test_replay_measures_how_far_another_policy_is(tmp_path):
    record(tmp_path / "r.mcap", ticks(40))
    report = replay(tmp_path / "r.mcap", Policy(off_m=0.02))
    assert report["position_error_m"]["p50"] == pytest.approx(0.02)
    assert report["rotation_error_rad"]["max"] == pytest.approx(0.0)
    assert json.loads(json.dumps(report)) == report


def test_replay_says_what_it_could_not_match(tmp_path):
    run = ticks(20)
    for i, tick in enumerate(run):
        if tick.new_chunk:
            run[i] = replace(tick, new_chunk=replace(tick.new_chunk, t_obs_ns=5))
    record(tmp_path / "r.mcap", run)
    report = replay(tmp_path / "r.mcap", Policy())
    assert report["unmatched"] == report["chunks"] > 0
    assert report["position_error_m"] is None


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        (Policy(side=200), r"camera 'static': rgb is uint8\(64, 64, 3\), promised"),
        (Policy(dim=512), r"latent: has shape \(1, 8\), the policy takes \(1, 512\)"),
    ],
)
def test_a_recording_that_is_no_input_of_the_policy_is_named(tmp_path, policy, said):
    path = tmp_path / "r.mcap"
    record(path, ticks(20))
    with pytest.raises(RecordingError, match=rf"^{re.escape(str(path))}: {said}"):
        replay(path, policy)


@pytest.mark.parametrize("seed", ["abc", -1, None, 1.5])
def test_a_seed_that_is_none_is_named_with_its_file(tmp_path, seed):
    path = tmp_path / "r.mcap"
    record(path, ticks(2), meta={"seed": seed})
    with pytest.raises(RecordingError, match=rf"^{re.escape(str(path))}: seed: {seed!r} is no"):
        replay(path, Policy())


def test_a_policy_that_fails_in_a_replay_is_named(tmp_path):
    class Broken(Policy):
        def act(self, observation, latents):
            raise RuntimeError("no weights")

    record(tmp_path / "r.mcap", ticks(20))
    with pytest.raises(PartFailed, match=r"^system1: RuntimeError: no weights$"):
        replay(tmp_path / "r.mcap", Broken())
