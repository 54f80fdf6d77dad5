"""Keeps what a run saw and did, off the control thread, and admits what it lost.

A subscriber of the loop hands whole ticks to a thread, which writes each camera frame once
(the loop sees one several times), then the rest of the tick. Whatever is dropped is counted,
and a recording that lost anything says so in its `meta.json` instead of looking complete.

Topics, in the order of a tick: `frame/<camera>`, `observation` (its frames are the newest of
each camera before it), `latent`, `chunk`, `action`, `tick`; and `event` for what the run did.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from runtime.background import Background, Counted
from runtime.codec import WireError, decode, decode_dict, encode, encode_dict
from runtime.segments import SegmentReader, SegmentWriter
from runtime.types import Action, ActionChunk, CameraFrame, LatentGoal, Observation

if TYPE_CHECKING:
    from runtime.loop import Tick

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
        runtime.segments.RecordingError: the folder holds no recording.
    """

    def __init__(self, folder: Path) -> None:
        self._segments = SegmentReader(folder)
        self.meta = self._segments.meta
        self.bad = 0

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
