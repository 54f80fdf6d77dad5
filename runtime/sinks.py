"""Where ticks go besides the robot: video, recording, viewer, as a configuration asks for.

On the lockstep clock the sinks work inside the run's process and lose nothing. On the wall
clock they live in a process of their own (`ObserverNode`) and drop, counted, rather than
delay anybody.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from runtime.collectors import SinkMetrics, WireMetrics
from runtime.config import RunConfig, validate
from runtime.exposition import Endpoint, serve
from runtime.recorder import Recorder
from runtime.status import StatusBoard
from runtime.stream import TOPIC, EveryReader, TickMessage
from runtime.types import CameraFrame
from runtime.video import Caption, VideoRecorder

QUIET_S = 0.3  # after this long without a tick, a run that has ended has been seen whole


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
            meta = {"config": config.model_dump(mode="json"), "seed": config.seed}
            self.parts["recording"] = Recorder(folder / "recording", meta, lossless=patient)
        if output.viewer:
            # Rerun is an extra of half a gigabyte: imported only here.
            from runtime.viewer import RerunViewer

            # A file that any Rerun viewer opens, also while it is being written.
            self.parts["viewer"] = RerunViewer(path=folder / "run.rrd", lossless=patient)

    @staticmethod
    def wanted(config: RunConfig) -> bool:
        """Whether there is any."""
        return config.output.video or config.output.record or config.output.viewer

    def close(self) -> dict[str, Any]:
        """Finish; return what each sink wrote and dropped. Twice is fine."""
        if self._summary is None:
            for part in self.parts.values():
                part.close()
            self._summary = {
                name: {"written": part.written, "dropped": part.dropped}
                for name, part in self.parts.items()
            }
        return self._summary


class ObserverNode:
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
        self._finish = threading.Event()
        self._finished = threading.Event()
        self._summary: dict[str, Any] = {}
        self._metrics: Endpoint | None = None

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
        while not stop.is_set() and not self._finish.is_set():
            self._reader.wait(0.1)
            self._take()
        while time.monotonic() - self._last_s < QUIET_S:
            self._reader.wait(0.05)
            self._take()
        lost = {"ticks_lost": self._reader.stats.gaps}
        self._summary = self._sinks.close() | lost
        self._finished.set()
        stop.wait()

    def health(self) -> dict[str, Any]:
        return {
            "ticks": self._reader.stats.delivered,
            "ticks_lost": self._reader.stats.gaps,
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
        if hasattr(self, "_sinks"):
            self._sinks.close()
        if hasattr(self, "_reader"):
            self._reader.close()

    def _take(self) -> None:
        for message in self._reader.poll():
            self._last_s = time.monotonic()
            tick = message.tick
            # Whoever looks at a tick sees the newest frame of every camera, as the loop did.
            self._frames = {**self._frames, **tick.observation.frames}
            self._board.take(message, self._frames)
            seen = replace(tick.observation, frames=self._frames)
            note = f"task {message.number}, step {message.steps}"
            self._caption = Caption(message.task, message.instruction, note)
            for sink in self._sinks.parts.values():
                sink(replace(tick, observation=seen))

    def _on_finish(self, _: dict[str, Any]) -> dict[str, Any]:
        """Write out everything; the answer comes when the files are whole."""
        self._finish.set()
        self._board.finished = True
        if not self._finished.wait(60.0):
            raise ValueError("the video or the recording could not be finished within 60 s")
        return self._summary
