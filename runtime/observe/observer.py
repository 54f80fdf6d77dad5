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
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from openhelix.runtime.control.assembly import ControlStack
from openhelix.runtime.control.episodes import LoopStatistics
from openhelix.runtime.control.loop import Tick
from openhelix.runtime.control.realtime import RealtimeStatus, one_heap
from openhelix.runtime.control.talk import KEPT, Entry, row
from openhelix.runtime.core import plugins
from openhelix.runtime.core.config import RunConfig, validate
from openhelix.runtime.core.interfaces import U8, ActionChunk, CameraFrame, LatentGoal
from openhelix.runtime.observe.collectors import LoopMetrics, SinkMetrics, WireMetrics, loop_wire
from openhelix.runtime.observe.film import FILE_NAME as FILM_NAME
from openhelix.runtime.observe.film import LiveFilm
from openhelix.runtime.observe.metrics import Endpoint, serve
from openhelix.runtime.observe.overlay import About, strokes, world_of
from openhelix.runtime.observe.ticks import TOPIC, EveryReader, Teller, TickMessage, TickPublisher
from openhelix.runtime.transport.wire import Publisher

WINDOW_S = 10.0  # over which rates are counted
MAX_SIDE_PX = 640  # of an image that is handed out; larger ones are thinned
KEPT_STOPS = 20
FRAMES_KEPT = 45  # of the camera that System 2 looks through: what a latent was made from
SHOWN_ENTRIES = 40  # of the journal, in a snapshot
QUIET_S = 0.3  # after this long without a tick, a run that was broken off has been seen whole
APART_BYTES = 64 * 1024  # a picture, or a chunk of a recording
LATE_S = 5.0  # how long the last ticks of a run may be on their way


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
        self._entries: tuple[Entry, ...] = ()
        self._plan: ActionChunk | None = None
        self._looked: deque[CameraFrame] = deque(maxlen=FRAMES_KEPT)  # of System 2's camera
        self._latent: tuple[LatentGoal, str] | None = None  # the newest, and what was said
        self.finished = False

    def take(self, message: TickMessage, frames: Mapping[str, CameraFrame]) -> None:
        """Note a tick.

        Args:
            message: the newest.
            frames: the newest of every camera; replaced by the caller, not changed.
        """
        now_ns, tick = self._now_ns(), message.tick
        self._marks["loop"].append(now_ns)
        looked = frames.get(self._config.system2.camera)
        if looked is not None and (not self._looked or self._looked[-1].t_ns != looked.t_ns):
            self._looked.append(looked)
        if tick.new_latent is not None:
            self._marks["system2"].append(now_ns)
            self._latent = tick.new_latent, message.instruction
        if tick.new_chunk is not None:
            self._marks["system1"].append(now_ns)
        if message.entries:
            self._entries = (*self._entries, *message.entries)[-KEPT:]
        plan = tick.new_chunk or self._plan
        here = tick.observation.instruction_id
        self._plan = plan if plan is not None and plan.instruction_id == here else None
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
            "expected_hz": {"loop": config.control.hz, "system2": 1 / config.system2.longest_s},
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

    def journal(self, since: int) -> dict[str, Any]:
        """Return {"entries": what happened after the entry of that number}; see `talk.row`."""
        return {"entries": [row(entry) for entry in self._entries if entry.number > since]}

    def frame(self, camera: str) -> dict[str, Any]:
        """Return {"t_ns": capture time, "rgb": (h, w, 3) u8}; an empty dict without a frame."""
        frame = self._frames.get(camera)
        return {} if frame is None else {"t_ns": frame.t_ns, "rgb": _thinned(frame)}

    def latent(self) -> dict[str, Any]:
        """Return the newest latent and what it was made from; an empty dict without one.

        Its "z", "seq", "t_obs_ns", "spec_id", "understood", "refused"; "instruction"; and "rgb",
        the image, where it is still at hand.
        """
        if self._latent is None:
            return {}
        latent, instruction = self._latent
        kept = ("z", "seq", "t_obs_ns", "spec_id", "understood", "refused")
        found = {name: getattr(latent, name) for name in kept} | {"instruction": instruction}
        for frame in list(self._looked):
            if frame.t_ns == latent.t_obs_ns:
                found["rgb"] = _thinned(frame)
        return found

    def _tick(self, message: TickMessage, now_ns: int) -> dict[str, Any]:
        tick, silent_s = message.tick, (now_ns - self._heard_ns) * 1e-9
        age_s = tick.latent_age_s
        return {
            "task": message.task,
            "instruction": message.instruction,
            "number": message.number,
            "steps": message.steps,
            "succeeded": message.succeeded,
            "judged": message.judged,
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
                    "plan": self._drawn(frame),
                }
                for name, frame in self._frames.items()
            },
            "entries": [
                # Both times are the control host's clock.
                row(entry) | {"ago_s": max(0.0, (tick.t_ns - entry.t_ns) * 1e-9) + silent_s}
                for entry in self._entries[-SHOWN_ENTRIES:]
            ],
        }

    def _drawn(self, frame: CameraFrame) -> list[list[list[float]]]:
        """The plan in an image: its committed part, then the rest, each [[u, v], ...] from 0 to 1."""
        if self._plan is None:
            return []
        height, width = frame.rgb.shape[:2]
        committed = self._config.system1.replan_steps
        return [
            (points / (width, height)).round(4).tolist()
            for points, _ in strokes(frame, self._plan, committed)
        ]

    def _rate_hz(self, marks: deque[int], now_ns: int) -> float:
        """Count over the window; a rate that has stopped falls to 0 within it."""
        loop = self._marks["loop"]
        if not loop:
            return 0.0
        since_ns = max(now_ns - round(WINDOW_S * 1e9), loop[0])
        span_s = (now_ns - since_ns) * 1e-9
        count = sum(mark > since_ns for mark in list(marks))
        return count / span_s if span_s > 0.5 else 0.0


def _thinned(frame: CameraFrame) -> U8:
    """Return a frame's image, of at most `MAX_SIDE_PX`."""
    step = -(-max(frame.rgb.shape[:2]) // MAX_SIDE_PX)
    rgb: U8 = np.ascontiguousarray(frame.rgb[::step, ::step])
    return rgb


_NOTHING: dict[str, Any] = {
    "task": "",
    "instruction": "",
    "number": 1,
    "steps": 0,
    "succeeded": 0,
    "judged": 0,
    "state": "wait",
    "reason": "",
    "ticks": 0,
    "silent_s": 0.0,
    "latent_age_s": None,
    "understood": None,
    "cameras": {},
    "entries": [],
}


# Sinks -------------------------------------------------------------------------------------------


class Sinks:
    """The sinks of one run.

    Args:
        config: what is wanted.
        folder: where files go.
        cameras: names; the film shows the first large.
        patient: wait instead of dropping.

    Raises:
        ValueError: a package that was asked for is not installed.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        cameras: Sequence[str],
        patient: bool,
    ) -> None:
        output = config.output
        self.parts: dict[str, Any] = {}
        self._summary: dict[str, Any] | None = None
        # A film of what can be drawn anew is made of the track, after the run.
        live = output.video and cameras and not drawn_later(config)
        about = About.of(config, cameras) if live or output.viewer else About()
        if live:
            fps = config.control.hz if patient else config.world.camera_hz
            self.parts["video"] = LiveFilm(folder / FILM_NAME, about, fps, lossless=patient)
        if output.track or output.record:
            # What reads and writes recordings takes a tenth of a second to import.
            from openhelix.runtime.observe.recorder import FILE_NAME, TRACK_NAME, Recorder

            meta = {"config": config.model_dump(mode="json"), "seed": config.seed}
            meta["cameras"] = list(cameras)
            if output.track:
                self.parts["track"] = Recorder(
                    folder / TRACK_NAME, meta, images=False, lossless=patient
                )
            if output.record:
                self.parts["recording"] = Recorder(folder / FILE_NAME, meta, lossless=patient)
        if output.viewer:
            # Rerun is an extra of half a gigabyte: imported only here.
            from openhelix.runtime.observe.viewer import FILE_NAME as VIEW_NAME
            from openhelix.runtime.observe.viewer import RerunViewer

            self.parts["viewer"] = RerunViewer(folder / VIEW_NAME, about, lossless=patient)

    @staticmethod
    def wanted(config: RunConfig) -> bool:
        """Whether there is any."""
        output = config.output
        return output.video or output.track or output.record or output.viewer

    def close(self, missed: int = 0) -> dict[str, Any]:
        """Finish; return what each sink wrote and dropped, and what ended it. Twice is fine.

        Args:
            missed: ticks that should have followed the newest and never came.
        """
        if self._summary is None:
            for name, part in self.parts.items():
                if name in ("recording", "track"):
                    part.close(missed=missed)
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
        one_heap(APART_BYTES)
        self._config, self._folder = validate(RunConfig, config), Path(folder)
        self._board = StatusBoard(self._config)
        self._endpoint, self._cameras, self._keys = ticks, tuple(cameras), keys
        self._frames: dict[str, CameraFrame] = {}
        self._last_s = 0.0
        self._viewing: threading.Thread | None = None  # starts Rerun
        self._view_error = ""
        self._finish = threading.Event()
        self._finished = threading.Event()
        self._expected: int | None = None  # messages of the whole run
        self._summary: dict[str, Any] = {}
        self._metrics: Endpoint | None = None
        self._sinks: Sinks | None = None
        self._reader: EveryReader[TickMessage] | None = None

    @staticmethod
    def wanted(config: RunConfig) -> bool:
        """Whether anybody looks on: a sink, or a person who may ask how it goes."""
        return config.output.status or Sinks.wanted(config)

    def setup(self) -> None:
        self._sinks = Sinks(self._config, self._folder, self._cameras, patient=False)
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
        missed = max(0, (self._expected or 0) - self._reader.heard)
        lost = {"ticks_lost": self._reader.stats.gaps + missed}
        self._summary = self._sinks.close(missed) | lost
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
            "journal": lambda arguments: self._board.journal(int(arguments["since"])),
            "view": self._on_view,
            "frame": lambda arguments: self._board.frame(str(arguments["camera"])),
            "latent": lambda _: self._board.latent(),
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
        assert self._reader is not None
        if self._expected is not None and self._reader.heard >= self._expected:
            return False
        patience_s = QUIET_S if self._expected is None else LATE_S
        return time.monotonic() - self._last_s < patience_s

    def _take(self) -> None:
        assert self._reader is not None and self._sinks is not None
        for message in self._reader.poll():
            self._last_s = time.monotonic()
            tick = message.tick
            # Whoever looks at a tick sees the newest frame of every camera, as the loop did.
            self._frames = {**self._frames, **tick.observation.frames}
            self._board.take(message, self._frames)
            seen = replace(tick.observation, frames=self._frames)
            whole = replace(message, tick=replace(tick, observation=seen))
            for sink in self._sinks.parts.values():
                sink(whole)

    def _on_view(self, _: dict[str, Any]) -> dict[str, Any]:
        """Begin to show the run in Rerun, unless that has been done; return where, once it does."""
        assert self._sinks is not None
        viewer, error, self._view_error = self._sinks.parts.get("live view"), self._view_error, ""
        if viewer is None and not error and (self._viewing is None or not self._viewing.is_alive()):
            # It takes seconds, in which others ask how the robot does.
            self._viewing = threading.Thread(target=self._begin_view, name="viewer", daemon=True)
            self._viewing.start()
        return {"url": viewer.url if viewer is not None else "", "error": error}

    def _begin_view(self) -> None:
        assert self._sinks is not None
        # Rerun is an extra of half a gigabyte: imported only here.
        from openhelix.runtime.observe.viewer import RerunViewer, ViewerFailed, ViewerMissing

        try:
            viewer = RerunViewer(about=About.of(self._config, self._cameras))
        except (ViewerFailed, ViewerMissing) as error:
            self._view_error = str(error)
            return
        if self._finish.is_set():
            viewer.close()
        else:
            self._sinks.parts = {**self._sinks.parts, "live view": viewer}

    def _on_finish(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Write out everything, `told` messages in all; the answer comes when all is written."""
        self._expected = int(arguments["told"])
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
        self._teller: TickPublisher | _Told
        if ticks is not None:
            keys = str(config.transport.keys) if config.transport.keys else None
            self._publisher = Publisher(ticks, TOPIC, bind=False, keys=keys, awaited=True)
            robot = stack.loop.robot
            self._teller = TickPublisher(self._publisher, stack.episode_runner, robot)
            stack.loop.subscribers.append(self._teller)
        else:
            cameras = [camera.name for camera in stack.loop.robot.spec.cameras]
            self._sinks = Sinks(config, folder, cameras, patient=True)
            self._teller = _Told(stack, self._sinks)
            stack.loop.subscribers.append(self._teller)
        port = config.output.metrics_port
        if port is not None and config.control.clock == "realtime":
            period_s = config.system2.longest_s
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

    def finish(self) -> None:
        """Tell observers what happened after the last tick; call it on the loop's thread."""
        self._teller.finish()

    def await_scrape(self) -> bool:
        """Wait for Prometheus to fetch the last figures; see `Endpoint.await_scrape`."""
        return self._endpoint is not None and self._endpoint.await_scrape()

    @property
    def told(self) -> int:
        """Messages that were sent to the process that looks on."""
        return self._publisher.sent if self._publisher is not None else 0

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
        return self._sinks.close() if self._sinks else {}


class _Told:
    """A subscriber that tells the sinks in this process."""

    def __init__(self, stack: ControlStack, sinks: Sinks) -> None:
        self._teller = Teller(stack.episode_runner, stack.loop.robot)
        self._sinks = sinks

    def __call__(self, tick: Tick) -> None:
        self._tell(self._teller(tick))

    def finish(self) -> None:
        """Tell what happened after the last tick."""
        self._tell(self._teller.rest())

    def _tell(self, message: TickMessage | None) -> None:
        for sink in self._sinks.parts.values() if message is not None else ():
            sink(message)


def drawn_later(config: RunConfig) -> bool:
    """Whether a film of the run can be made of its track: its world can be drawn anew."""
    world = world_of(config)
    if world is None or not config.output.track:
        return False
    return bool(plugins.find(plugins.WORLDS, world).drawable)
