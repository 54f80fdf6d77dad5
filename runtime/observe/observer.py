"""Observers of a run: the subscribers of its loop, and the process they feed.

The control process does one thing for observers: it sends each tick unprocessed, with the new
frames (`TickPublisher`). Rendering and encoding happen elsewhere, so that no observer ever holds
the control thread's interpreter lock. Unlike on the control path, where only the newest message
counts, here every message does; lost ones are counted (`EveryReader`).

On the wall clock `ObserverProcess`, a process of its own, takes the ticks. It feeds the `Sinks`
(video, recording, viewer), which drop items (and count them) rather than delay
anything, and the `StatusBoard`, which answers status requests. The control process is never
queried: any number of observers, however slow, cost its loop nothing. On the lockstep clock the sinks work inside the run's process and lose nothing.

`Subscribers` gives a loop what its configuration asks for.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from openhelix.runtime.control.assembly import ControlStack
from openhelix.runtime.control.episodes import EpisodeRunner, LoopStatistics
from openhelix.runtime.control.loop import Tick
from openhelix.runtime.control.realtime import RealtimeStatus
from openhelix.runtime.core.clock import MonotonicClock
from openhelix.runtime.core.config import RunConfig, validate
from openhelix.runtime.core.interfaces import U8, CameraFrame
from openhelix.runtime.observe.collectors import LoopMetrics, SinkMetrics, WireMetrics, loop_wire
from openhelix.runtime.observe.metrics import Endpoint, serve
from openhelix.runtime.observe.video import Caption, VideoRecorder
from openhelix.runtime.transport.codec import WireError, decode, kind_of, register
from openhelix.runtime.transport.wire import Inlet, Publisher, Track, topic_bytes

TOPIC = "ticks"
WINDOW_S = 10.0  # over which rates are counted
MAX_SIDE_PX = 640  # of an image that is handed out; larger ones are thinned
KEPT_STOPS = 20
QUIET_S = 0.3  # after this long without a tick, a run that was broken off has been seen whole
LATE_S = 5.0  # how long the last ticks of a run may be on their way
T = TypeVar("T")


# The stream of ticks -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TickMessage:
    """A tick and what it was part of."""

    tick: Tick  # its observation holds only frames that were not sent before
    task: str
    instruction: str
    number: int  # of the task, from 1
    steps: int  # environment steps of this task so far
    succeeded: int  # tasks before this one that succeeded


register("tick", TickMessage)


class TickPublisher:
    """A subscriber of the loop that sends each tick."""

    def __init__(self, publisher: Publisher, episode_runner: EpisodeRunner) -> None:
        self._publisher, self._episode_runner = publisher, episode_runner
        self._sent_ns: dict[str, int] = {}

    def __call__(self, tick: Tick) -> None:
        episode_runner, current = self._episode_runner, self._episode_runner.current
        fresh = self._fresh(tick.observation.frames)
        self._publisher.send(
            TickMessage(
                tick=replace(tick, observation=replace(tick.observation, frames=fresh)),
                task=current.task if current else "",
                instruction=current.instruction if current else "",
                number=len(episode_runner.results) + 1,
                steps=episode_runner.steps,
                succeeded=episode_runner.succeeded,
            )
        )

    def _fresh(self, frames: Mapping[str, CameraFrame]) -> dict[str, CameraFrame]:
        fresh = {n: f for n, f in frames.items() if self._sent_ns.get(n) != f.t_ns}
        for name, frame in fresh.items():
            self._sent_ns[name] = frame.t_ns
        return fresh


class EveryReader(Generic[T]):
    """Returns every message of a topic, in order.

    Args:
        endpoint: bound here; publishers connect.
        topic: exactly the publishers'.
        expect: the record's class; anything else is dropped and counted.
        keys: folder of CURVE keys, off loopback.
        hwm: messages that may queue.
    """

    def __init__(
        self,
        endpoint: str,
        topic: str,
        expect: type[T],
        *,
        keys: str | None = None,
        hwm: int = 10_000,
    ) -> None:
        kind_of(expect)
        self._expect = expect
        prefix = topic_bytes(topic) + b"\0"
        self._inlet = Inlet(endpoint, prefix, bind=True, keys=keys, hwm=hwm, max_drain=256)
        self.stats = self._inlet.stats
        self._track = Track(expect, self.stats, MonotonicClock())
        self._last: tuple[int, int] | None = None  # source and number of the last message

    def poll(self) -> list[T]:
        """Return what has arrived; never blocks or raises."""
        self._inlet.drain(lambda _: self._track)
        messages = []
        for (source, seq, _), frames, start, _ in self._track.new:
            try:
                messages.append(decode(frames, self._expect, start))
            except WireError as error:
                self.stats.dropped[error.reason] += 1
                continue
            # A publisher counts from 0: what it sent before we heard it is lost as well.
            before = self._last[1] if self._last is not None and self._last[0] == source else -1
            self.stats.gaps += max(0, seq - before - 1)
            self._last = (source, seq)
        self._track.new.clear()
        self.stats.delivered += len(messages)
        return messages

    def wait(self, timeout_s: float) -> bool:
        """Sleep until something arrives, at most `timeout_s`."""
        return bool(self._inlet.port.socket.poll(max(0, round(timeout_s * 1e3))))

    def close(self) -> None:
        """Close the socket."""
        self._inlet.port.close()


# The status board --------------------------------------------------------------------------------


class StatusBoard:
    """The newest state of one run.

    One thread feeds it, another asks: what they share is replaced, never changed.

    Args:
        config: of the run.
        now_ns: this process's monotonic clock.
    """

    def __init__(self, config: RunConfig, now_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self._config, self._now_ns = config, now_ns
        self._newest: TickMessage | None = None
        self._heard_ns = 0
        self._frames: Mapping[str, CameraFrame] = {}
        self._marks: dict[str, deque[int]] = {
            name: deque(maxlen=4096) for name in ("loop", "system1", "system2")
        }
        self._stops: deque[tuple[int, str]] = deque(maxlen=KEPT_STOPS)
        self.finished = False

    def take(self, message: TickMessage, frames: Mapping[str, CameraFrame]) -> None:
        """Note a tick.

        Args:
            message: the newest.
            frames: the newest of every camera; replaced by the caller, not changed.
        """
        now_ns, tick = self._now_ns(), message.tick
        self._marks["loop"].append(now_ns)
        if tick.new_latent is not None:
            self._marks["system2"].append(now_ns)
        if tick.new_chunk is not None:
            self._marks["system1"].append(now_ns)
        before = self._newest.tick if self._newest is not None else None
        if tick.state == "stop" and (before is None or before.state != "stop"):
            self._stops.append((now_ns, tick.reason))
        self._heard_ns, self._frames, self._newest = now_ns, frames, message

    def snapshot(self) -> dict[str, Any]:
        """Return plain values: state, ages in seconds, rates in hertz; see the keys."""
        config, message, now_ns = self._config, self._newest, self._now_ns()
        status: dict[str, Any] = {
            "robot": config.robot.id,
            "driver": config.robot.name,
            "steps_limit": config.tasks.steps_limit,
            "expected_hz": {"loop": config.control.hz, "system2": config.system2.hz},
            "latent_max_age_s": config.safety.latent_max_age_s,
            "finished": self.finished,
            "started": message is not None,
            "rates_hz": {name: self._rate_hz(marks, now_ns) for name, marks in self._marks.items()},
            "stops": [
                {"ago_s": (now_ns - at_ns) * 1e-9, "reason": reason}
                for at_ns, reason in list(self._stops)
            ],
        }
        return status | (self._tick(message, now_ns) if message is not None else _NOTHING)

    def frame(self, camera: str) -> dict[str, Any]:
        """Return {"t_ns": capture time, "rgb": (h, w, 3) u8}; an empty dict without a frame."""
        frame = self._frames.get(camera)
        if frame is None:
            return {}
        step = -(-max(frame.rgb.shape[:2]) // MAX_SIDE_PX)
        rgb: U8 = np.ascontiguousarray(frame.rgb[::step, ::step])
        return {"t_ns": frame.t_ns, "rgb": rgb}

    def _tick(self, message: TickMessage, now_ns: int) -> dict[str, Any]:
        tick, silent_s = message.tick, (now_ns - self._heard_ns) * 1e-9
        age_s = tick.latent_age_s
        return {
            "task": message.task,
            "instruction": message.instruction,
            "number": message.number,
            "steps": message.steps,
            "succeeded": message.succeeded,
            "attempted": message.number - 1,
            "state": tick.state,
            "reason": tick.reason,
            "ticks": tick.index,
            "silent_s": silent_s,
            "latent_age_s": None if age_s is None else age_s + silent_s,
            "understood": tick.understood,
            "cameras": {
                name: {
                    "t_ns": frame.t_ns,
                    # Both times are the control host's clock.
                    "age_s": max(0.0, (tick.t_ns - frame.t_ns) * 1e-9) + silent_s,
                }
                for name, frame in self._frames.items()
            },
        }

    def _rate_hz(self, marks: deque[int], now_ns: int) -> float:
        """Count over the window; a rate that has stopped falls to 0 within it."""
        loop = self._marks["loop"]
        if not loop:
            return 0.0
        since_ns = max(now_ns - round(WINDOW_S * 1e9), loop[0])
        span_s = (now_ns - since_ns) * 1e-9
        count = sum(mark > since_ns for mark in list(marks))
        return count / span_s if span_s > 0.5 else 0.0


_NOTHING: dict[str, Any] = {
    "task": "",
    "instruction": "",
    "number": 1,
    "steps": 0,
    "succeeded": 0,
    "attempted": 0,
    "state": "wait",
    "reason": "",
    "ticks": 0,
    "silent_s": 0.0,
    "latent_age_s": None,
    "understood": None,
    "cameras": {},
}


# Sinks -------------------------------------------------------------------------------------------


class Sinks:
    """The sinks of one run.

    Args:
        config: what is wanted.
        folder: where files go.
        cameras: names, as the video shows them from left to right.
        caption: what the video writes under them.
        patient: wait instead of dropping.

    Raises:
        ValueError: a package that was asked for is not installed.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        cameras: Sequence[str],
        caption: Callable[[], Caption],
        patient: bool,
    ) -> None:
        output = config.output
        self.parts: dict[str, Any] = {}
        self._summary: dict[str, Any] | None = None
        if output.video and cameras:
            fps = config.control.hz if patient else config.world.camera_hz
            self.parts["video"] = VideoRecorder(
                folder / "video.mp4", cameras, caption, fps, lossless=patient
            )
        if output.record:
            # What reads and writes recordings takes a tenth of a second to import.
            from openhelix.runtime.observe.recorder import FILE_NAME, Recorder

            meta = {"config": config.model_dump(mode="json"), "seed": config.seed}
            self.parts["recording"] = Recorder(
                folder / FILE_NAME,
                meta,
                lambda: (caption().task, caption().instruction),
                lossless=patient,
            )
        if output.viewer:
            # Rerun is an extra of half a gigabyte: imported only here.
            from openhelix.runtime.observe.viewer import RerunViewer

            # A file that any Rerun viewer opens, also while it is being written.
            self.parts["viewer"] = RerunViewer(path=folder / "run.rrd", lossless=patient)

    @staticmethod
    def wanted(config: RunConfig) -> bool:
        """Whether there is any."""
        return config.output.video or config.output.record or config.output.viewer

    def close(self, ticks: int | None = None) -> dict[str, Any]:
        """Finish; return what each sink wrote and dropped, and what ended it. Twice is fine.

        Args:
            ticks: how many there were, where that is known.
        """
        if self._summary is None:
            for name, part in self.parts.items():
                if name == "recording":
                    part.close(ticks=ticks)
                else:
                    part.close()
            self._summary = {
                name: {"written": part.written, "dropped": part.dropped, "error": part.error}
                for name, part in self.parts.items()
            }
        return self._summary


# The observer process ----------------------------------------------------------------------------


class ObserverProcess:
    """Looks on: feeds the sinks with the ticks that the control process sends.

    Args:
        config: `RunConfig` as JSON data.
        ticks: endpoint on which ticks arrive (bound here).
        cameras: names.
        folder: where files go.
        keys: folder of CURVE keys, off loopback.

    Its metrics are at the configuration's `output.metrics_port_of("observer")`.
    """

    def __init__(
        self,
        config: dict[str, Any],
        ticks: str,
        cameras: Sequence[str],
        folder: str,
        keys: str | None = None,
    ) -> None:
        self._config, self._folder = validate(RunConfig, config), Path(folder)
        self._board = StatusBoard(self._config)
        self._endpoint, self._cameras, self._keys = ticks, tuple(cameras), keys
        self._caption = Caption()
        self._frames: dict[str, CameraFrame] = {}
        self._last_s = 0.0
        self._newest = 0  # number of the newest tick, from 1
        self._finish = threading.Event()
        self._finished = threading.Event()
        self._expected: int | None = None  # ticks of the whole run
        self._summary: dict[str, Any] = {}
        self._metrics: Endpoint | None = None
        self._sinks: Sinks | None = None
        self._reader: EveryReader[TickMessage] | None = None

    @staticmethod
    def wanted(config: RunConfig) -> bool:
        """Whether anybody looks on: a sink, or a person who may ask how it goes."""
        return config.output.status or Sinks.wanted(config)

    def setup(self) -> None:
        self._sinks = Sinks(
            self._config, self._folder, self._cameras, lambda: self._caption, patient=False
        )
        self._reader = EveryReader(self._endpoint, TOPIC, TickMessage, keys=self._keys)
        output = self._config.output
        port = output.metrics_port_of("observer")
        if port is not None:
            wire = WireMetrics({"ticks": self._reader.stats})
            sinks = SinkMetrics(self._sinks.parts)
            self._metrics = serve(port, wire, sinks, host=output.metrics_host)

    def run(self, stop: threading.Event) -> None:
        assert self._reader is not None and self._sinks is not None
        while not stop.is_set() and not self._finish.is_set():
            self._reader.wait(0.1)
            self._take()
        while self._awaits_more():
            self._reader.wait(0.05)
            self._take()
        self._summary = self._sinks.close(self._expected) | {"ticks_lost": self._lost()}
        self._finished.set()
        stop.wait()

    def health(self) -> dict[str, Any]:
        stats = self._reader.stats if self._reader else None
        return {
            "ticks": stats.delivered if stats else 0,
            "ticks_lost": stats.gaps if stats else 0,
            "metrics_url": self._metrics.url if self._metrics else None,
        }

    def handlers(self) -> Mapping[str, Callable[[dict[str, Any]], dict[str, Any]]]:
        return {
            "finish": self._on_finish,
            "status": lambda _: self._board.snapshot(),
            "frame": lambda arguments: self._board.frame(str(arguments["camera"])),
        }

    def close(self) -> None:
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None
        for part in (self._sinks, self._reader):
            if part is not None:
                part.close()

    def _awaits_more(self) -> bool:
        """Whether ticks of the run are still on their way."""
        if self._expected is not None and self._newest >= self._expected:
            return False
        patience_s = QUIET_S if self._expected is None else LATE_S
        return time.monotonic() - self._last_s < patience_s

    def _lost(self) -> int:
        """Ticks that never came: holes, what went before the first, what should have followed."""
        assert self._reader is not None
        return self._reader.stats.gaps + max(0, (self._expected or 0) - self._newest)

    def _take(self) -> None:
        assert self._reader is not None and self._sinks is not None
        for message in self._reader.poll():
            self._last_s = time.monotonic()
            tick = message.tick
            self._newest = tick.index
            # Whoever looks at a tick sees the newest frame of every camera, as the loop did.
            self._frames = {**self._frames, **tick.observation.frames}
            self._board.take(message, self._frames)
            seen = replace(tick.observation, frames=self._frames)
            note = f"task {message.number}, step {message.steps}"
            self._caption = Caption(message.task, message.instruction, note)
            for sink in self._sinks.parts.values():
                sink(replace(tick, observation=seen))

    def _on_finish(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Write out everything, of `ticks` in all; the answer comes when the files are whole."""
        self._expected = int(arguments["ticks"])
        self._last_s = time.monotonic()
        self._finish.set()
        self._board.finished = True
        if not self._finished.wait(60.0):
            raise ValueError("the video or the recording could not be finished within 60 s")
        return self._summary


# What a loop is given ----------------------------------------------------------------------------


class Subscribers:
    """Figures and metrics always; sinks inside the process (lockstep) or a tick stream.

    Args:
        config: what is wanted.
        folder: where files go.
        stack: whose loop they subscribe to.
        ticks: endpoint of the process that looks on; None keeps the sinks in this one.
        realtime: what the system granted to the control thread, once that is known.
        tasks: names of those that will be attempted.

    Raises:
        ValueError: a port is taken, or a package that was asked for is not installed.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        stack: ControlStack,
        ticks: str | None = None,
        realtime: Callable[[], RealtimeStatus | None] = lambda: None,
        tasks: Sequence[str] = (),
    ) -> None:
        self._stack = stack
        self.statistics = LoopStatistics(stack.loop)
        stack.loop.subscribers.append(self.statistics)
        self._sinks: Sinks | None = None
        self._publisher: Publisher | None = None
        self._endpoint: Endpoint | None = None
        if ticks is not None:
            keys = str(config.transport.keys) if config.transport.keys else None
            self._publisher = Publisher(ticks, TOPIC, bind=False, keys=keys, awaited=True)
            stack.loop.subscribers.append(TickPublisher(self._publisher, stack.episode_runner))
        else:
            cameras = [camera.name for camera in stack.loop.robot.spec.cameras]
            self._sinks = Sinks(config, folder, cameras, self._caption, patient=True)
            stack.loop.subscribers += self._sinks.parts.values()
        port = config.output.metrics_port
        if port is not None and config.control.clock == "realtime":
            period_s = 1.0 / config.system2.hz
            metrics = LoopMetrics(
                stack.loop, stack.pacer, stack.episode_runner, realtime, tasks, period_s
            )
            stack.loop.subscribers.append(metrics)
            parts: list[Any] = [metrics, loop_wire(stack.loop, self._publisher)]
            if self._sinks is not None:
                parts.append(SinkMetrics(self._sinks.parts))
            self._endpoint = serve(port, *parts, host=config.output.metrics_host)

    @property
    def metrics_url(self) -> str | None:
        """Where Prometheus finds the metrics."""
        return self._endpoint.url if self._endpoint else None

    def await_scrape(self) -> bool:
        """Wait for Prometheus to fetch the last figures; see `Endpoint.await_scrape`."""
        return self._endpoint is not None and self._endpoint.await_scrape()

    def heard(self, timeout_s: float) -> bool:
        """Wait until whoever looks on hears the ticks, so that it sees the first ones too."""
        return self._publisher is None or self._publisher.await_reader(timeout_s)

    def close(self) -> dict[str, Any]:
        """End them; return what each sink inside this process wrote. Twice is fine."""
        if self._endpoint is not None:
            self._endpoint.close()
            self._endpoint = None
        if self._publisher is not None:
            self._publisher.close()
            self._publisher = None
        return self._sinks.close(self._stack.loop.ticks) if self._sinks else {}

    def _caption(self) -> Caption:
        episode_runner = self._stack.episode_runner
        current = episode_runner.current
        if current is None:
            return Caption()
        number = len(episode_runner.results) + 1
        return Caption(
            current.task, current.instruction, f"task {number}, step {episode_runner.steps}"
        )
