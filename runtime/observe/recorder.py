"""Records a run's data in one MCAP file, off the control thread, and reports what it lost.

A subscriber of the loop hands whole ticks to a thread, which writes each camera frame once
(the loop sees one several times), then the rest of the tick. Whatever is dropped is counted,
and a recording that lost anything says so instead of looking complete.

Foxglove, Rerun and the `mcap` command open the file directly. Topics, in the order of a tick:

    /instruction                               the instruction, whenever it changes (JSON)
    /entry                                     what happened, in words (JSON); see `journal.py`
    /camera/<name>/rgb, /camera/<name>/depth   foxglove.RawImage (protobuf)
    /camera/<name>                             capture time, intrinsics, pose (JSON)
    /observation, /latent, /chunk, /action     the records of `runtime/core/interfaces.py` (JSON)
    /chunk_refused                             a chunk that came too late or for nothing (JSON)
    /visual                                    what a simulated world looks like (JSON)
    /tick                                      state, reason, ages of the tick (JSON)

A *track* (`track.mcap`) is the same without images: small enough to be kept of every run. Of a
simulated world it is all that a film or a viewer needs, which draw the images anew.

Log times are the run's monotonic clock in nanoseconds; messages are numbered through. The
run's configuration is metadata in front of the first message, the summary metadata behind the
last. A chunk is on its way to the disk as soon as it holds `CHUNK_BYTES`, so that a process
that is killed loses no more than that; the file then has no summary and is incomplete.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import time
import typing
from collections import deque
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Final, NamedTuple, cast

import lz4.frame
import msgspec
import numpy as np
from foxglove_schemas_protobuf.RawImage_pb2 import RawImage
from mcap.exceptions import EndOfFile, McapError, RecordLengthLimitExceeded
from mcap.reader import SeekingReader
from mcap.records import Channel, Chunk, ChunkIndex, Metadata
from mcap.records import Message as McapMessage
from mcap.stream_reader import StreamReader, breakup_chunk
from mcap.well_known import MessageEncoding, SchemaEncoding
from mcap.writer import CompressionType, Writer
from mcap_protobuf.schema import build_file_descriptor_set

from openhelix.runtime.control.loop import Tick
from openhelix.runtime.control.plans import checked_chunk
from openhelix.runtime.control.talk import Entry
from openhelix.runtime.core.clock import percentiles
from openhelix.runtime.core.config import RunConfig, apply_overrides, validate
from openhelix.runtime.core.files import CalmFile
from openhelix.runtime.core.interfaces import (
    F32,
    F64,
    U8,
    Action,
    ActionChunk,
    CameraFrame,
    LatentGoal,
    Observation,
    PartFailed,
    Policy,
    PolicySpec,
    SpecMismatch,
    check_frame,
)
from openhelix.runtime.core.quaternion import angle_between, normalise
from openhelix.runtime.observe.background import Background, Counted
from openhelix.runtime.observe.ticks import TickMessage
from openhelix.runtime.transport.codec import WireError, encode

FILE_NAME: Final = "recording.mcap"
TRACK_NAME: Final = "track.mcap"
PROFILE: Final = "openhelix"
SUMMARY: Final = "openhelix.summary"  # name of the metadata written last
CHUNK_BYTES: Final = 512 * 1024
# A chunk holds at most `CHUNK_BYTES` and one message; nothing larger is unpacked. LZ4 itself
# cannot grow by more than 255 times, so that a small file stays small in memory.
MAX_MESSAGE_BYTES: Final = 48 * 1024 * 1024
MAX_CHUNK_BYTES: Final = MAX_MESSAGE_BYTES + CHUNK_BYTES + 1024 * 1024
_CAMERA: Final = re.compile(r"/camera/([^/]+)(?:/(rgb|depth))?")
_PIXELS: Final[Mapping[str, tuple[str, np.dtype[Any], int]]] = {
    "rgb": ("rgb8", np.dtype("u1"), 3),
    "depth": ("32FC1", np.dtype("<f4"), 1),
}


class RecordingError(ValueError):
    """A path that holds no recording, or already holds one."""


@dataclass(frozen=True, slots=True)
class TickRecord:
    """What a tick came to, besides its observation and action."""

    index: int
    state: str
    reason: str
    latent_age_s: float | None
    duration_s: float
    understood: float | None = None  # None where nobody judges, or nobody has yet
    number: int = 1  # of the instruction; see `TickMessage`
    steps: int = 0
    judged: int = 0
    succeeded: int = 0


@dataclass(frozen=True, slots=True)
class VisualRecord:
    """What a simulated world looks like."""

    values: F64  # see `openhelix.runtime.robots.base.Scenery`


@dataclass(frozen=True, slots=True)
class InstructionRecord:
    """What the robot is told from this tick on."""

    instruction_id: int
    task: str  # empty for free text
    text: str


class Message(NamedTuple):
    """One thing recorded."""

    topic: str
    t_ns: int
    message: Any  # of the topic's class


# Records as JSON -------------------------------------------------------------------------------


def _without(cls: type[Any], *left_out: str) -> type[Any]:
    """Return a dataclass with the fields of `cls` except some: these are recorded beside it."""
    hints = typing.get_type_hints(cls)
    kept = [field for field in dataclasses.fields(cls) if field.name not in left_out]
    return dataclasses.make_dataclass(
        cls.__name__,
        [(f.name, hints[f.name], dataclasses.field(default=f.default)) for f in kept],
        namespace={"__doc__": cls.__doc__},
        frozen=True,
    )


_Geometry: Final = _without(CameraFrame, "rgb", "depth")
_State: Final = _without(Observation, "frames")
_RECORDS: Final[Mapping[str, type[Any]]] = {
    "/instruction": InstructionRecord,
    "/entry": Entry,
    "/observation": _State,
    "/latent": LatentGoal,
    "/chunk": ActionChunk,
    "/chunk_refused": ActionChunk,
    "/action": Action,
    "/visual": VisualRecord,
    "/tick": TickRecord,
}


def _to_plain(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    raise TypeError(f"a {type(value).__name__} cannot be recorded")


def _to_array(hint: Any, value: Any) -> Any:
    dtype = typing.get_args(typing.get_args(hint)[1])[0]
    with np.errstate(over="ignore"):  # too large a number becomes infinite, and is refused as that
        return np.asarray(value, dtype)  # null, as JSON writes NaN, becomes NaN again


def _schema(cls: type[Any]) -> bytes:
    """Return the JSON schema of a record, flat, as Foxglove wants it."""
    number = {"type": "array", "items": {"type": "number"}}
    _, parts = msgspec.json.schema_components((cls,), schema_hook=lambda _: number)
    return msgspec.json.encode(parts[cls.__name__])


_DECODERS: Final = {
    name: msgspec.json.Decoder(cls, dec_hook=_to_array)
    for name, cls in {**_RECORDS, "/camera": _Geometry}.items()
}


def _check(message: Any) -> None:
    """Raise `WireError` for what could not travel or would not come back as it was."""
    cls = type(message)
    if cls in (Observation, LatentGoal, ActionChunk, Action, CameraFrame):
        encode(message)
    for name in _NUMBERS[cls]:
        value = getattr(message, name)
        for one in value.values() if isinstance(value, Mapping) else (value,):
            if isinstance(one, float) and not math.isfinite(one):  # JSON has no such number
                raise WireError("nonfinite", name)


def _numbers(cls: type[Any]) -> tuple[str, ...]:
    """Return the fields of a record that are numbers, or map names to numbers."""
    hints = typing.get_type_hints(cls)
    kinds = (float, float | None, Mapping[str, float])
    return tuple(f.name for f in dataclasses.fields(cls) if hints[f.name] in kinds)


# Found once: a tick is several records, and their annotations are strings.
_NUMBERS: Final = {
    cls: _numbers(cls)
    for cls in (
        *(InstructionRecord, Observation, CameraFrame),
        *(LatentGoal, ActionChunk, Action, TickRecord, Entry, VisualRecord),
    )
}


# Writing ---------------------------------------------------------------------------------------


class _PackedIndex:
    """What the library writes at a file's end to find each chunk again, kept as bytes.

    As objects it would take 2.6 kB per chunk until the file is closed, and a process that records
    grew by 14 MB per hour.
    """

    def __init__(self) -> None:
        self._rows = bytearray()

    def append(self, index: ChunkIndex) -> None:
        behind = index.chunk_start_offset + index.chunk_length
        offsets = {name: at - behind for name, at in index.message_index_offsets.items()}
        values = {**vars(index), "message_index_offsets": offsets}
        row = msgspec.msgpack.encode([values[name] for name in _INDEX])
        self._rows += len(row).to_bytes(4, "little") + row

    def __iter__(self) -> Iterator[ChunkIndex]:
        at = 0
        while at < len(self._rows):
            begin = at + 4
            at = begin + int.from_bytes(self._rows[at:begin], "little")
            row = msgspec.msgpack.decode(self._rows[begin:at], type=list[Any])
            index = ChunkIndex(**dict(zip(_INDEX, row, strict=True)))
            behind = index.chunk_start_offset + index.chunk_length
            offsets = index.message_index_offsets.items()
            index.message_index_offsets = {name: behind + far for name, far in offsets}
            yield index


_INDEX: Final = tuple(field.name for field in dataclasses.fields(ChunkIndex))


class RecordingWriter:
    """Writes one file.

    Args:
        path: of the file; its folder is made if needed.
        meta: JSON data about the run, in front of all else.
        max_bytes: of messages, unpacked; `put` refuses more.

    Attributes:
        bytes, records: taken so far.
        stored: of the records, how many the system has; the others wait for their chunk.

    Raises:
        RecordingError: there is a file of that name.
        OSError: the disk refuses.
    """

    def __init__(
        self, path: Path, meta: Mapping[str, Any] | None = None, max_bytes: int = 20 * 1024**3
    ) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._file = CalmFile(path, "x")
        except FileExistsError:
            raise RecordingError(f"{path}: holds a recording already; name another") from None
        # The library leaves half of a chunk that is refused, and then cannot close.
        output = cast(IO[bytes], self._file)
        self._writer = Writer(output, CHUNK_BYTES, CompressionType.LZ4, enable_data_crcs=True)
        vars(self._writer)["_Writer__chunk_indices"] = _PackedIndex()
        self._writer.start(PROFILE)
        self._writer.add_metadata(PROFILE, _as_text(meta or {}))
        if self._file.error is not None:
            path.unlink()
            raise self._file.error
        self._size = self._file.tell()  # of the file, up to its last whole chunk
        self._max_bytes = max_bytes
        self._channels: dict[str, int] = {}
        self._images = 0  # id of the schema of images
        self.bytes = 0
        self.records = self.stored = 0

    def put(self, topic: str, t_ns: int, message: Any) -> None:
        """Append a record of `_RECORDS`.

        Raises:
            WireError: the record breaks its own schema.
            OSError: the disk refuses, or the recording has reached `max_bytes`.
        """
        _check(message)
        if isinstance(message, Observation):
            message = _State(*_values(message, _State))
        self._json(topic, t_ns, message, _RECORDS[topic])

    def put_frame(self, name: str, frame: CameraFrame) -> None:
        """Append a camera's frame: its images, then what completes them; errors as `put`."""
        _check(frame)
        self._image(f"/camera/{name}/rgb", frame.t_ns, name, frame.rgb)
        if frame.depth is not None:
            self._image(f"/camera/{name}/depth", frame.t_ns, name, frame.depth)
        geometry = _Geometry(*_values(frame, _Geometry))
        self._json(f"/camera/{name}", frame.t_ns, geometry, _Geometry)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write the summary and the index, close the file.

        Raises:
            OSError: the disk refuses; the file ends with the last chunk that it took.
        """
        try:
            self._raise_refusal()
            self._writer.add_metadata(SUMMARY, _as_text(summary))
            self._writer.finish()
            self._raise_refusal()
            self.stored = self.records
        finally:
            self._file.close()

    def _json(self, topic: str, t_ns: int, message: Any, cls: type[Any]) -> None:
        if topic not in self._channels:
            schema = self._writer.register_schema(
                f"{PROFILE}.{cls.__name__}", SchemaEncoding.JSONSchema, _schema(cls)
            )
            self._register(topic, MessageEncoding.JSON, schema)
        try:
            data = msgspec.json.encode(message, enc_hook=_to_plain)
        except (msgspec.MsgspecError, TypeError) as error:
            raise WireError("field", f"{topic}: {error}") from None
        self._append(topic, t_ns, data)

    def _image(self, topic: str, t_ns: int, camera: str, pixels: U8 | F32) -> None:
        if topic not in self._channels:
            if not self._images:
                self._images = self._writer.register_schema(
                    RawImage.DESCRIPTOR.full_name,
                    SchemaEncoding.Protobuf,
                    build_file_descriptor_set(RawImage).SerializeToString(),
                )
            self._register(topic, MessageEncoding.Protobuf, self._images)
        encoding, dtype, samples = _PIXELS[topic.rpartition("/")[2]]
        height, width = pixels.shape[:2]
        image = RawImage(
            frame_id=camera,
            width=width,
            height=height,
            encoding=encoding,
            step=width * samples * dtype.itemsize,
            data=pixels.tobytes(),
        )
        image.timestamp.seconds, image.timestamp.nanos = divmod(t_ns, 10**9)
        self._append(topic, t_ns, image.SerializeToString())

    def _register(self, topic: str, encoding: str, schema: int) -> None:
        self._channels[topic] = self._writer.register_channel(topic, encoding, schema)

    def _append(self, topic: str, t_ns: int, data: bytes) -> None:
        if not 0 <= t_ns < 1 << 63 or len(data) > MAX_MESSAGE_BYTES:
            raise WireError("oversize", f"{topic}: {len(data)} bytes at {t_ns} ns")
        if self.bytes + len(data) > self._max_bytes:
            raise OSError(f"the recording has reached its limit of {self._max_bytes} bytes")
        # Numbered through: a reader knows a hole from the end.
        self._writer.add_message(
            self._channels[topic], t_ns, data, t_ns, sequence=self.records & 0xFFFFFFFF
        )
        self.bytes += len(data)
        self.records += 1
        self._raise_refusal()
        if self._file.tell() > self._size:  # a chunk was full, and this was its last message
            self._size, self.stored = self._file.tell(), self.records

    def _raise_refusal(self) -> None:
        """Raise what the disk has refused; the file is cut back to its last whole chunk."""
        if self._file.error is not None:
            self._file.cut(self._size)
            raise self._file.error


def _values(message: Any, cls: Any) -> list[Any]:
    return [getattr(message, field.name) for field in dataclasses.fields(cls)]


def _as_text(values: Mapping[str, Any]) -> dict[str, str]:
    return {name: json.dumps(value) for name, value in values.items()}


class Recorder(Counted):
    """A subscriber that records every tick.

    Args:
        path: of the file; must not exist.
        meta: what to remember about the run (JSON data); `Reader.config` wants "config".
        images: False for a track.
        queue_size: ticks that may wait; at 30 Hz with two cameras one is up to 330 kB.
        lossless: wait instead of dropping (the lockstep clock).
        max_bytes: where to stop; the recording is incomplete then.
    """

    def __init__(
        self,
        path: Path,
        meta: Mapping[str, Any] | None = None,
        images: bool = True,
        queue_size: int = 128,
        lossless: bool = False,
        max_bytes: int = 20 * 1024**3,
    ) -> None:
        self._writer = RecordingWriter(path, meta, max_bytes)
        self._images = images
        self._instruction: InstructionRecord | None = None
        self._frames_ns: dict[str, int] = {}
        self._refused = 0  # records that the codec would not take, a NaN for example
        self._newest = self._missed = 0  # number of the newest tick; ticks that never came
        self._ends: deque[int] = deque()  # the last record of each tick that is not stored yet
        self._lost = 0  # ticks that were written, and whose chunk the disk refused
        self._summary: dict[str, Any] | None = None
        self._work: Background[TickMessage] = Background(
            "recorder" if images else "track", self._write, size=queue_size, lossless=lossless
        )

    def __call__(self, message: TickMessage) -> None:
        """Take one tick; a few microseconds."""
        tick = message.tick
        self._missed += max(0, tick.index - self._newest - 1)  # what never came to us
        self._newest = tick.index
        self._work.offer(message)

    def close(self, timeout_s: float = 60.0, missed: int = 0) -> dict[str, Any]:
        """Finish; return the summary that the file ends with. Twice is fine.

        Args:
            timeout_s: for what is queued.
            missed: ticks that should have followed the newest and never came.
        """
        if self._summary is not None:
            return self._summary
        ended = self._work.close(timeout_s)
        self._missed += missed
        summary = self._say(ended)
        if ended:  # otherwise the file is still the thread's, and stays without a summary
            try:
                self._writer.finish(summary)
            except OSError as failure:
                self._work.error = self._work.error or failure
                self._forget_unkept()
                summary = self._say(False)
        self._summary = summary
        return summary

    @property
    def _unkept(self) -> int:
        return self._lost

    def _say(self, ended: bool) -> dict[str, Any]:
        lost = self._missed + self.dropped + self._refused
        return {
            "complete": ended and not self.error and lost == 0,
            "written": self.written,
            "dropped": self.dropped,
            "missed": self._missed,
            "refused": self._refused,
            "records": self._writer.records,
            "bytes": self._writer.bytes,
            "error": self.error,
        }

    def _forget_unkept(self) -> None:
        """Count the ticks whose last records were in the chunk that the disk refused."""
        self._lost = sum(end > self._writer.stored for end in self._ends)

    def _write(self, message: TickMessage) -> None:
        tick, put = message.tick, self._put
        observation = tick.observation
        instruction = InstructionRecord(
            observation.instruction_id, message.task, message.instruction
        )
        for entry in message.entries:
            put("/entry", tick.t_ns, entry)
        if instruction != self._instruction:
            self._instruction = instruction
            put("/instruction", tick.t_ns, instruction)
        for name, frame in observation.frames.items() if self._images else ():
            if self._frames_ns.get(name) != frame.t_ns:
                self._frames_ns[name] = frame.t_ns
                put(name, frame.t_ns, frame)
        put("/observation", observation.t_ns, replace(observation, frames={}))
        for topic, made in (
            ("/latent", tick.new_latent),
            ("/chunk", tick.new_chunk),
            ("/chunk_refused", tick.refused_chunk),
        ):
            if made is not None:
                put(topic, tick.t_ns, made)
        put("/action", tick.t_ns, tick.sent)
        if message.visual is not None:
            put("/visual", tick.t_ns, VisualRecord(message.visual))
        came_to = TickRecord(
            *(tick.index, tick.state, tick.reason, tick.latent_age_s, tick.duration_s),
            tick.understood,
            *(message.number, message.steps, message.judged, message.succeeded),
        )
        put("/tick", tick.t_ns, came_to)
        self._ends.append(self._writer.records)
        while self._ends and self._ends[0] <= self._writer.stored:
            self._ends.popleft()

    def _put(self, topic: str, t_ns: int, message: Any) -> None:
        try:
            if isinstance(message, CameraFrame):
                self._writer.put_frame(topic, message)
            else:
                self._writer.put(topic, t_ns, message)
        except WireError:
            self._refused += 1


# Reading ---------------------------------------------------------------------------------------


class _Bounded:
    """A file that reads exactly what is asked for, and never makes room for a mere claim."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.seek = file.seek

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MAX_CHUNK_BYTES:
            raise RecordLengthLimitExceeded(0, size, MAX_CHUNK_BYTES)
        data = self._file.read(size)
        if len(data) < size:
            raise EndOfFile
        return data


class Reader:
    """Reads a recording; iterate for `Message`s, observations with their frames.

    Frames come under "/camera/<name>". A damaged file is read up to the damage; records that
    do not decode are counted in `bad` and skipped.

    Args:
        path: of the file, or a folder in which it is called `recording.mcap`.
        only: topics to read; None for all. Others are passed over undecoded.

    Raises:
        RecordingError: there is no recording.
    """

    def __init__(self, path: Path, only: Container[str] | None = None) -> None:
        self._only = only
        self.path = path / FILE_NAME if path.is_dir() else path
        try:
            with open(self.path, "rb") as file:
                head, summary = _metadata(file)
        except FileNotFoundError:
            raise RecordingError(f"{self.path}: no recording there") from None
        except OSError as error:
            raise RecordingError(f"{self.path}: cannot be read: {error.strerror}") from None
        self.meta: dict[str, Any] = head | summary
        self.bad = 0
        self.cut = False  # something is missing or damaged; set while reading

    def config(self, overrides: Iterable[str] = ()) -> RunConfig:
        """Return the configuration of the run that was recorded, with `a.b=value` overrides.

        Raises:
            RecordingError: the recording carries none.
            ConfigError: it is of another version, or an override is wrong.
        """
        data = self.meta.get("config")
        if not isinstance(data, dict):
            raise RecordingError(f"{self.path}: carries no configuration")
        return validate(RunConfig, apply_overrides(data, overrides, RunConfig))

    @property
    def complete(self) -> bool:
        """Whether nothing was dropped, cut off or damaged; damage shows after reading."""
        return self.meta.get("complete") is True and not self.cut and self.bad == 0

    def __iter__(self) -> Iterator[Message]:
        frames: dict[str, CameraFrame] = {}
        images: dict[str, dict[str, Any]] = {}  # of a camera whose frame is not whole yet
        for topic, t_ns, data in self._messages():
            if self._only is not None and topic not in self._only:
                continue
            try:
                message = _decoded(topic, data, frames, images)
            except (WireError, ValueError, TypeError, OverflowError, RecursionError):
                self.bad += 1
                continue
            if message is not None:
                yield Message(topic, t_ns, message)

    def _messages(self) -> Iterator[tuple[str, int, bytes]]:
        """Yield topic, time and data in the order of writing, up to the first damage."""
        topics: dict[int, str] = {}
        found = 0
        with open(self.path, "rb") as file:
            try:
                for chunk in _stream(file).records:
                    for record in _unpacked(chunk) if isinstance(chunk, Chunk) else ():
                        if isinstance(record, Channel):
                            topics[record.id] = record.topic
                        elif isinstance(record, McapMessage):
                            if record.sequence != found & 0xFFFFFFFF:
                                raise McapError(f"message {found} is missing")
                            found += 1
                            yield topics[record.channel_id], record.log_time, record.data
            # The library lets through what its parser meets: struct.error, UnicodeDecodeError, ...
            except Exception:
                self.cut = True
        self.cut = self.cut or found != self.meta.get("records", found)


def _stream(file: IO[bytes]) -> StreamReader:
    return StreamReader(
        cast(IO[bytes], _Bounded(file)),
        emit_chunks=True,
        validate_crcs=True,
        record_size_limit=MAX_CHUNK_BYTES,
    )


def _metadata(file: IO[bytes]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what was said of the run, and the summary; empty where it was never finished.

    Raises:
        RecordingError: the file is no recording of this program.
    """
    head: dict[str, Any] = {}
    try:
        records = _stream(file).records
        profile = getattr(next(records), "profile", "")
        first = next(records)
        if isinstance(first, Metadata):
            head = _from_text(first.metadata)
    except Exception:  # see `Reader._messages`
        profile = ""
    if profile != PROFILE:
        raise RecordingError(f"{file.name}: not a recording of OpenHelix (MCAP)")
    file.seek(0)
    try:
        bounded = cast(IO[bytes], _Bounded(file))
        found = SeekingReader(bounded, record_size_limit=MAX_CHUNK_BYTES).iter_metadata()
        summaries = [_from_text(record.metadata) for record in found if record.name == SUMMARY]
    except Exception:
        summaries = []
    return head, summaries[-1] if summaries else {}


def _from_text(values: Mapping[str, str]) -> dict[str, Any]:
    return {name: json.loads(text) for name, text in values.items()}


def _unpacked(chunk: Chunk) -> list[Any]:
    """Return the records in a chunk.

    Raises:
        McapError: it is larger than any that is written, or packed by another method.
    """
    data = chunk.data
    if chunk.uncompressed_size > MAX_CHUNK_BYTES:
        raise RecordLengthLimitExceeded(6, chunk.uncompressed_size, MAX_CHUNK_BYTES)
    if chunk.compression == "lz4":
        unpacker = lz4.frame.LZ4FrameDecompressor()
        data = unpacker.decompress(data, max_length=chunk.uncompressed_size)
    elif chunk.compression:
        raise McapError(f"{chunk.compression}: not supported; rewrite the file with lz4")
    if len(data) != chunk.uncompressed_size:
        raise McapError("a chunk has another size than it says")
    return breakup_chunk(dataclasses.replace(chunk, compression="", data=data), validate_crc=True)


def _decoded(
    topic: str, data: bytes, frames: dict[str, CameraFrame], images: dict[str, dict[str, Any]]
) -> Any:
    """Return what a message holds; None for an image, which waits for its frame's last part.

    Raises:
        WireError, ValueError, TypeError, OverflowError, RecursionError: it is not as recorded.
    """
    camera = _CAMERA.fullmatch(topic)
    if camera is None:
        if topic not in _RECORDS:
            raise WireError("kind", f"{topic!r} is no topic of a recording")
        message: Any = _DECODERS[topic].decode(data)
        if isinstance(message, _State):
            message = Observation(**(vars(message) | {"frames": dict(frames)}))
            _check(replace(message, frames={}))
        else:
            _check(message)
        return message
    name, part = camera.groups()
    if part is not None:
        images.setdefault(name, {})[part] = _pixels(data, part)
        return None
    parts = {"rgb": None, "depth": None} | images.pop(name, {})
    frame = CameraFrame(**(vars(_DECODERS["/camera"].decode(data)) | parts))
    _check(frame)
    frames[name] = frame
    return frame


def _pixels(data: bytes, part: str) -> np.ndarray[Any, Any]:
    try:
        image = RawImage.FromString(data)
    except Exception as error:  # protobuf's own DecodeError
        raise WireError("field", f"an image: {error}") from None
    encoding, dtype, samples = _PIXELS[part]
    if image.encoding != encoding:
        raise WireError("dtype", f"an image has encoding {image.encoding:.20}, not {encoding}")
    shape = (image.height, image.width, samples)[: 3 if samples > 1 else 2]
    return np.frombuffer(image.data, dtype).reshape(shape)


# Playback --------------------------------------------------------------------------------------


def playback(path: Path) -> Iterator[TickMessage]:
    """Yield a recording's or a track's ticks as observers were told of them.

    Args:
        path: of the file, or the folder of a run: its recording, or else its track.

    Raises:
        RecordingError: there is neither.
    """
    if path.is_dir() and not (path / FILE_NAME).exists():
        path = path / TRACK_NAME
    told, entries = InstructionRecord(0, "", ""), []
    seen: dict[str, Any] = {}
    for topic, t_ns, message in Reader(path):
        if topic == "/instruction":
            told = message
        elif topic == "/entry":
            entries.append(message)
        elif topic != "/tick":
            seen[topic] = message
        elif "/observation" in seen and "/action" in seen:
            visual = seen.get("/visual")
            tick = Tick(
                index=message.index,
                t_ns=t_ns,
                observation=seen["/observation"],
                state=message.state,
                reason=message.reason,
                sent=seen["/action"],
                new_latent=seen.get("/latent"),
                new_chunk=seen.get("/chunk"),
                refused_chunk=seen.get("/chunk_refused"),
                latent_age_s=message.latent_age_s,
                duration_s=message.duration_s,
                understood=message.understood,
            )
            yield TickMessage(
                tick,
                told.task,
                told.text,
                message.number,
                message.steps,
                message.judged,
                message.succeeded,
                None if visual is None else visual.values,
                tuple(entries),
            )
            seen, entries = {}, []


# Replay ----------------------------------------------------------------------------------------


KEPT: Final = 900  # observations a chunk may look back on: 30 s at 30 Hz
KEPT_BYTES: Final = 512 * 1024 * 1024  # of their frames, each counted as often as it is seen


def replay(path: Path, policy: Policy, memory: int = 1) -> dict[str, Any]:
    """Run a recording's observations through System 1 again and compare the trajectories.

    Each recorded chunk names the observation and the latent it was computed from; the policy
    is given exactly these once more, and the seed of each instruction. With the same weights
    the errors are rounding, as long as no chunk was lost: a policy that samples draws its noise
    chunk after chunk, so after a loss they are its spread.

    Args:
        path: of a recording; see `Reader`.
        policy: System 1, warmed up.
        memory: recent latents that the policy was given (`system1.latent_memory`).

    Returns:
        Counts, and distances between recorded and recomputed rows: position (m), rotation
        (rad), openness; p50, p99 and max over all rows. Null without a chunk to compare.

    Raises:
        RecordingError: there is no recording, its seed is none, or what it holds is no input of
            the policy.
        PartFailed: the policy raised.
    """
    reader, matcher = Reader(path), _Inputs(memory)
    seed = reader.meta.get("seed", 0)  # each instruction draws from seed + its number
    if not isinstance(seed, int) or seed < 0:
        raise RecordingError(f"{reader.path}: seed: {seed!r} is no whole number from 0")
    chunks = unmatched = 0
    errors: list[np.ndarray[Any, Any]] = []
    latencies_s: list[float] = []
    instruction_id: int | None = None
    for topic, _, message in reader:
        if topic == "/observation":
            matcher.observed(message)
        elif topic == "/latent":
            matcher.conditioned(message)
        elif topic in ("/chunk", "/chunk_refused"):  # the policy drew noise for both
            chunks += 1
            given = matcher.of(message)
            if given is None:
                unmatched += 1
                continue
            if message.instruction_id != instruction_id:
                instruction_id = message.instruction_id
                policy.reset(seed + instruction_id)
            _check_given(reader.path, policy.spec, *given)
            start_s = time.perf_counter()
            try:
                again = checked_chunk(policy.act(*given), given[0])
            except Exception as error:
                raise PartFailed("system1", error) from error
            latencies_s.append(time.perf_counter() - start_s)
            errors.append(_distances(message, again))
    rows = np.concatenate(errors) if errors else np.empty((0, 3))
    return {
        "recording": str(reader.path),
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


def _check_given(
    path: Path, spec: PolicySpec, observation: Observation, latents: Sequence[LatentGoal]
) -> None:
    """Refuse what is recorded and is no input of this policy.

    Raises:
        RecordingError: an image or a latent is missing or of another size.
    """
    try:
        for camera in spec.cameras:
            frame = observation.frames.get(camera.name)
            if frame is None:
                raise SpecMismatch(f"camera {camera.name!r}: is not in it")
            check_frame(frame, camera)
        if spec.latent is None:
            return
        shape = (spec.latent.n_tokens, spec.latent.dim)
        for latent in latents:
            if latent.z.shape != shape:
                raise SpecMismatch(f"latent: has shape {latent.z.shape}, the policy takes {shape}")
    except SpecMismatch as error:
        raise RecordingError(f"{path}: {error}") from None


class _Inputs:
    """Finds what a chunk was computed from among what was seen shortly before."""

    def __init__(self, memory: int) -> None:
        self._recent: deque[LatentGoal] = deque(maxlen=memory)
        self._seen: deque[tuple[Observation, tuple[LatentGoal, ...]]] = deque(maxlen=KEPT)

    def observed(self, observation: Observation) -> None:
        self._seen.append((observation, tuple(self._of_instruction_id(observation.instruction_id))))
        size = sum(
            f.rgb.nbytes + getattr(f.depth, "nbytes", 0) for f in observation.frames.values()
        )
        while len(self._seen) > 1 and len(self._seen) * size > KEPT_BYTES:
            self._seen.popleft()

    def conditioned(self, latent: LatentGoal) -> None:
        """A latent follows its tick's observation, and the plan of that tick already has it."""
        if latent.refused:  # what came before is no longer acted on
            self._recent.clear()
        else:
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


def _spread(values: np.ndarray[Any, Any]) -> dict[str, float | None] | None:
    return percentiles(values) if len(values) else None
