"""Keeps what a run saw and did, off the control thread, and admits what it lost.

A subscriber of the loop hands whole ticks to a thread, which writes each camera frame once
(the loop sees one several times), then the rest of the tick. Whatever is dropped is counted,
and a recording that lost anything says so in its `meta.json` instead of looking complete.

Topics, in the order of a tick: `frame/<camera>`, `observation` (its frames are the newest of
each camera before it), `latent`, `chunk`, `action`, `tick`; and `event` for what the run did.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final, NamedTuple

from openhelix.runtime.core.config import RunConfig, apply_overrides, validate
from openhelix.runtime.core.types import Action, ActionChunk, CameraFrame, LatentGoal, Observation
from openhelix.runtime.observe.background import Background, Counted
from openhelix.runtime.transport.codec import WireError, decode, decode_dict, encode, encode_dict

if TYPE_CHECKING:
    from openhelix.runtime.control.loop import Tick
import time
from collections import deque

import numpy as np

from openhelix.runtime.core.interfaces import Policy
from openhelix.runtime.core.quaternion import angle_between, normalise

# ------------------------------------------------------------------------------------------------
# Records on disk: a folder of append-only segments of the wire's own frames.
#
# One record is a length-prefixed multipart message of `openhelix.runtime.transport.codec` with a topic, a time and
# a checksum, so what a run recorded is what its processes said to each other, nothing is
# pickled, and a file that a crash cut off is read up to the cut. `meta.json` says whether the
# recording is complete; it says "no" until the writer has closed.
#
#     segment   MAGIC, then records
#     record    u32 crc of all that follows | u32 bytes of body | i64 time (ns) |
#               u8 bytes of topic | u16 frames | topic | u32 bytes of each frame | frames


MAGIC: Final = b"OHREC\0\0\1"
META: Final = "meta.json"
_HEAD: Final = struct.Struct("<IIqBH")
MAX_BODY_BYTES: Final = 256 * 1024 * 1024

Record = tuple[str, int, list[bytes]]  # topic, time (ns), frames


class RecordingError(ValueError):
    """A path that holds no recording of this kind."""


class SegmentWriter:
    """Appends records, a new file every `segment_bytes`.

    Args:
        folder: made if needed; must not hold a recording already.
        segment_bytes: size at which the next file begins.
        max_bytes: size of the whole recording at which `write` refuses.
        meta: kept in `meta.json`.

    Raises:
        RecordingError: the folder holds a recording.
    """

    def __init__(
        self,
        folder: Path,
        segment_bytes: int = 256 * 1024 * 1024,
        max_bytes: int = 20 * 1024**3,
        meta: dict[str, Any] | None = None,
    ) -> None:
        self.folder = Path(folder)
        if (self.folder / META).exists():
            raise RecordingError(f"{self.folder}: holds a recording already; name another folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._segment_bytes, self._max_bytes = segment_bytes, max_bytes
        self._file: BinaryIO | None = None
        self._segments = 0
        self.bytes = 0
        self.records = 0
        self.meta = dict(meta or {})
        self.save_meta({"complete": False})

    def write(self, topic: str, t_ns: int, frames: Sequence[bytes | memoryview]) -> None:
        """Append one record.

        Raises:
            OSError: the disk refuses, or the recording has reached `max_bytes`.
        """
        name = topic.encode()
        sizes = [memoryview(frame).nbytes for frame in frames]
        body = len(name) + 4 * len(sizes) + sum(sizes)
        if self.bytes + body + _HEAD.size > self._max_bytes:
            raise OSError(f"the recording has reached its limit of {self._max_bytes} bytes")
        parts: list[bytes | memoryview] = [
            _HEAD.pack(0, body, t_ns, len(name), len(sizes))[4:],
            name,
            struct.pack(f"<{len(sizes)}I", *sizes),
            *frames,
        ]
        crc = 0
        for part in parts:
            crc = zlib.crc32(part, crc)
        file = self._open()
        file.write(struct.pack("<I", crc))
        file.writelines(parts)
        self.bytes += body + _HEAD.size
        self.records += 1

    def save_meta(self, extra: dict[str, Any]) -> None:
        """Write `meta.json`, whole or not at all."""
        text = json.dumps(self.meta | extra, indent=2)
        temporary = self.folder / (META + ".new")
        temporary.write_text(text)
        temporary.replace(self.folder / META)

    def close(self) -> None:
        """Close the last file; `meta.json` is the caller's to finish."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self) -> BinaryIO:
        if self._file is not None and self._file.tell() >= self._segment_bytes:
            self.close()
        if self._file is None:
            self._file = open(self.folder / f"{self._segments:06d}.ohr", "wb")  # noqa: SIM115
            self._file.write(MAGIC)
            self._segments += 1
        return self._file


class SegmentReader:
    """Reads what `SegmentWriter` wrote.

    Raises:
        RecordingError: the folder holds no recording.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        try:
            self.meta: dict[str, Any] = json.loads((self.folder / META).read_text())
        except FileNotFoundError:
            raise RecordingError(f"{self.folder}: no recording there (no {META})") from None
        except (OSError, ValueError) as error:
            raise RecordingError(f"{self.folder / META}: cannot be read: {error}") from None
        self.cut = False  # a record was cut off or damaged; set while reading

    @property
    def complete(self) -> bool:
        """Whether the writer closed properly and dropped nothing, and no damage was found."""
        return bool(self.meta.get("complete")) and not self.cut

    def __iter__(self) -> Iterator[Record]:
        """Yield every record in order; a damaged file is read up to the damage."""
        found = 0
        for path in sorted(self.folder.glob("*.ohr")):
            with open(path, "rb") as file:
                if file.read(len(MAGIC)) != MAGIC:
                    self.cut = True
                    continue
                while (record := self._read(file)) is not None:
                    found += 1
                    yield record
        # A file cut off between two records looks whole; the writer's count tells.
        self.cut = self.cut or found < self.meta.get("records", 0)

    def _read(self, file: BinaryIO) -> Record | None:
        head = file.read(_HEAD.size)
        if not head:
            return None
        if len(head) < _HEAD.size:
            self.cut = True
            return None
        crc, size, t_ns, topic_bytes, count = _HEAD.unpack(head)
        body = file.read(size) if size <= MAX_BODY_BYTES else b""
        if len(body) < size or zlib.crc32(body, zlib.crc32(head[4:])) != crc:
            self.cut = True
            return None
        # Checked against its checksum: from here on the sizes are what was written.
        topic = body[:topic_bytes].decode()
        at = topic_bytes + 4 * count
        frames = []
        for length in struct.unpack_from(f"<{count}I", body, topic_bytes):
            frames.append(body[at : at + length])
            at += length
        return topic, t_ns, frames


_RECORDS: Mapping[str, type] = {
    "observation": Observation,
    "latent": LatentGoal,
    "chunk": ActionChunk,
    "action": Action,
}
_FREE = ("tick", "event")


class Message(NamedTuple):
    """One thing recorded."""

    topic: str
    t_ns: int
    message: Any  # of the topic's class; a dict for "tick" and "event"


class Recorder(Counted):
    """A subscriber that records every tick.

    Args:
        folder: of the recording; must not hold one.
        meta: what to remember about the run (JSON data).
        queue_size: ticks that may wait; at 30 Hz with two cameras one is up to 330 kB.
        lossless: wait instead of dropping (the lockstep clock).
        max_bytes: where to stop; the recording is incomplete then.
    """

    def __init__(
        self,
        folder: Path,
        meta: Mapping[str, Any] | None = None,
        queue_size: int = 128,
        lossless: bool = False,
        max_bytes: int = 20 * 1024**3,
    ) -> None:
        self._writer = SegmentWriter(folder, max_bytes=max_bytes, meta=dict(meta or {}))
        self._frames_ns: dict[str, int] = {}
        self._refused = 0  # records that the codec would not take, a NaN for example
        self._work: Background[Tick | dict[str, Any]] = Background(
            "recorder", self._write, self._writer.close, queue_size, lossless
        )

    def __call__(self, tick: Tick) -> None:
        """Take one tick; a few microseconds."""
        self._work.offer(tick)

    def event(self, name: str, t_ns: int, **details: Any) -> None:
        """Take note of something that happened, for example a new instruction."""
        self._work.offer({"name": name, "t_ns": t_ns} | details)

    def close(self, timeout_s: float = 60.0) -> dict[str, Any]:
        """Finish; return what `meta.json` says. Twice is fine."""
        ended = self._work.close(timeout_s)
        error = self._work.error
        summary = {
            "complete": ended and error is None and self.dropped == self._refused == 0,
            "written": self.written,
            "dropped": self.dropped,
            "refused": self._refused,
            "records": self._writer.records,
            "bytes": self._writer.bytes,
            "error": "" if error is None else str(error),
        }
        self._writer.save_meta(summary)
        return summary

    def _write(self, item: Tick | dict[str, Any]) -> None:
        if isinstance(item, dict):
            self._put("event", item["t_ns"], item)
            return
        observation, put = item.observation, self._put
        for name, frame in observation.frames.items():
            if self._frames_ns.get(name) != frame.t_ns:
                self._frames_ns[name] = frame.t_ns
                put(f"frame/{name}", frame.t_ns, frame)
        put("observation", observation.t_ns, replace(observation, frames={}))
        for topic, message in (("latent", item.new_latent), ("chunk", item.new_chunk)):
            if message is not None:
                put(topic, item.t_ns, message)
        put("action", item.t_ns, item.sent)
        told = {
            "index": item.index,
            "state": item.state,
            "reason": item.reason,
            "latent_age_s": item.latent_age_s,
            "duration_s": item.duration_s,
        }
        put("tick", item.t_ns, told)

    def _put(self, topic: str, t_ns: int, message: Any) -> None:
        try:
            free = isinstance(message, dict)
            frames = encode_dict(topic, message) if free else encode(message)
        except WireError:
            self._refused += 1
            return
        self._writer.write(topic, t_ns, frames)


class Reader:
    """Reads a recording; iterate for `Message`s, observations with their frames.

    Records that do not decode are counted in `bad` and skipped.

    Raises:
        openhelix.runtime.observe.recorder.RecordingError: the folder holds no recording.
    """

    def __init__(self, folder: Path) -> None:
        self._segments = SegmentReader(folder)
        self.meta = self._segments.meta
        self.bad = 0

    def config(self, overrides: Iterable[str] = ()) -> RunConfig:
        """Return the configuration of the run that was recorded, with `a.b=value` overrides.

        Raises:
            RecordingError: the recording carries none.
            ConfigError: it is of another version, or an override is wrong.
        """
        data = self.meta.get("config")
        if not isinstance(data, dict):
            raise RecordingError(f"{self._segments.folder}: carries no configuration")
        return validate(RunConfig, apply_overrides(data, overrides))

    @property
    def complete(self) -> bool:
        """Whether nothing was dropped, cut off or damaged; damage shows after reading."""
        return self._segments.complete and self.bad == 0

    def __iter__(self) -> Iterator[Message]:
        frames: dict[str, CameraFrame] = {}
        for topic, t_ns, raw in self._segments:
            try:
                message = _decoded(topic, raw)
            except WireError:
                self.bad += 1
                continue
            if isinstance(message, CameraFrame):
                frames[topic.partition("/")[2]] = message
            elif isinstance(message, Observation):
                message = replace(message, frames=dict(frames))
            yield Message(topic, t_ns, message)


def _decoded(topic: str, raw: list[bytes]) -> Any:
    if topic in _FREE:
        return decode_dict(raw, topic)
    if topic.startswith("frame/"):
        return decode(raw, CameraFrame)
    if topic not in _RECORDS:
        raise WireError("kind", f"{topic!r} is no topic of a recording")
    return decode(raw, _RECORDS[topic])


# ------------------------------------------------------------------------------------------------
# Runs a recording's observations through System 1 again and compares the trajectories.
#
# Each recorded chunk names the observation and the latent it was computed from; the policy is
# given exactly these once more, and the seed of each instruction. With the same weights the
# errors are rounding, as long as no chunk was lost: a policy that samples draws its noise chunk
# after chunk, so after a loss they are its spread.


KEPT = 900  # observations a chunk may look back on: 30 s at 30 Hz


def replay(path: Path, policy: Policy, memory: int = 1) -> dict[str, Any]:
    """Compute every recorded chunk again.

    Args:
        path: folder of a recording.
        policy: System 1, warmed up.
        memory: recent latents that the policy was given (`system1.latent_memory`).

    Returns:
        Counts, and distances between recorded and recomputed rows: position (m), rotation
        (rad), openness; p50, p99 and max over all rows. Null without a chunk to compare.

    Raises:
        openhelix.runtime.observe.recorder.RecordingError: there is no recording.
    """
    reader, matcher = Reader(path), _Inputs(memory)
    seed = int(reader.meta.get("seed", 0))  # the loop gives each instruction seed + instruction_id
    chunks = unmatched = 0
    errors: list[np.ndarray[Any, Any]] = []
    latencies_s: list[float] = []
    instruction_id: int | None = None
    for topic, _, message in reader:
        if topic == "observation":
            matcher.observed(message)
        elif topic == "latent":
            matcher.conditioned(message)
        elif topic == "chunk":
            chunks += 1
            given = matcher.of(message)
            if given is None:
                unmatched += 1
                continue
            if message.instruction_id != instruction_id:
                instruction_id = message.instruction_id
                policy.reset(seed + instruction_id)
            start_s = time.perf_counter()
            again = policy.act(*given)
            latencies_s.append(time.perf_counter() - start_s)
            errors.append(_distances(message, again))
    rows = np.concatenate(errors) if errors else np.empty((0, 3))
    return {
        "recording": str(path),
        "complete": reader.complete,
        "dropped": reader.meta.get("dropped"),
        "chunks": chunks,
        "replayed": len(errors),
        "unmatched": unmatched,
        "rows": len(rows),
        "position_error_m": _spread(rows[:, 0]),
        "rotation_error_rad": _spread(rows[:, 1]),
        "gripper_error": _spread(rows[:, 2]),
        "s1_latency_s": _spread(np.array(latencies_s)),
    }


class _Inputs:
    """Finds what a chunk was computed from among what was seen shortly before."""

    def __init__(self, memory: int) -> None:
        self._recent: deque[LatentGoal] = deque(maxlen=memory)
        self._seen: deque[tuple[Observation, tuple[LatentGoal, ...]]] = deque(maxlen=KEPT)

    def observed(self, observation: Observation) -> None:
        self._seen.append((observation, tuple(self._of_instruction_id(observation.instruction_id))))

    def conditioned(self, latent: LatentGoal) -> None:
        """A latent follows its tick's observation, and the plan of that tick already has it."""
        self._recent.append(latent)
        if self._seen:
            observation, _ = self._seen.pop()
            self.observed(observation)

    def of(self, chunk: ActionChunk) -> tuple[Observation, Sequence[LatentGoal]] | None:
        for observation, latents in reversed(self._seen):
            if (
                observation.t_ns != chunk.t_obs_ns
                or observation.instruction_id != chunk.instruction_id
            ):
                continue
            newest = latents[-1].seq if latents else -1
            if chunk.latent_seq in (-1, newest):
                return observation, latents
        return None

    def _of_instruction_id(self, instruction_id: int) -> list[LatentGoal]:
        return [latent for latent in self._recent if latent.instruction_id == instruction_id]


def _distances(a: ActionChunk, b: ActionChunk) -> np.ndarray[Any, Any]:
    """Return (rows, 3): distance (m), angle (rad) and openness between two chunks."""
    count = min(len(a.poses), len(b.poses))
    away = np.linalg.norm(a.poses[:count, :3] - b.poses[:count, :3], axis=1)
    turned = [
        angle_between(normalise(p.tolist()), normalise(q.tolist()))
        for p, q in zip(a.poses[:count, 3:], b.poses[:count, 3:], strict=True)
    ]
    opened = np.abs(np.asarray(a.gripper[:count]) - np.asarray(b.gripper[:count]))
    return np.stack([away, np.array(turned), opened], axis=1)


def _spread(values: np.ndarray[Any, Any]) -> dict[str, float] | None:
    if len(values) == 0:
        return None
    p50, p99 = np.percentile(values, (50, 99))
    return {"p50": float(p50), "p99": float(p99), "max": float(values.max())}
