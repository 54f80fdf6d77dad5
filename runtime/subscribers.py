"""The subscribers that a configuration asks for: figures, metrics, recording, video, viewer.

Each does its work off the control thread and drops, counted, rather than delay a tick; on the
lockstep clock, where nothing is late, they wait instead and lose nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from runtime.assembly import Rig
from runtime.collectors import LoopMetrics, Sink, SinkMetrics
from runtime.config import RunConfig
from runtime.metrics import Endpoint, serve
from runtime.realtime import RealtimeStatus
from runtime.recorder import Recorder
from runtime.statistics import LoopStatistics
from runtime.video import Caption, VideoRecorder


class Subscribers:
    """Builds the subscribers of one run, gives them to its loop and ends them.

    Args:
        config: what is wanted.
        folder: where files go.
        rig: whose loop they subscribe to.
        realtime: what the system granted to the control thread, once that is known.

    Raises:
        ValueError: a port is taken, or a package that was asked for is not installed.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        rig: Rig,
        realtime: Callable[[], RealtimeStatus | None] = lambda: None,
    ) -> None:
        output = config.output
        patient = config.control.clock == "lockstep"
        self.statistics = LoopStatistics(rig)
        self._rig, self._total = rig, 0
        self._sinks: dict[str, Any] = {}
        self._endpoint: Endpoint | None = None
        self._summaries: dict[str, Any] | None = None
        if output.video:
            self._sinks["video"] = VideoRecorder(
                folder / "video.mp4",
                [camera.name for camera in rig.loop.robot.spec.cameras],
                self._caption,
                fps=config.control.hz if patient else config.world.camera_hz,
                lossless=patient,
            )
        if output.record:
            self._sinks["recording"] = Recorder(
                folder / "recording",
                {"config": config.model_dump(mode="json"), "seed": config.seed},
                lossless=patient,
            )
        if output.viewer:
            # Rerun is an extra of half a gigabyte: imported only here.
            from runtime.viewer import RerunViewer

            self._sinks["viewer"] = RerunViewer()
        rig.loop.subscribers += [self.statistics, *self._sinks.values()]
        if output.metrics_port is not None and not patient:
            metrics = LoopMetrics(rig.loop, rig.pacer, rig.director, realtime)
            rig.loop.subscribers.append(metrics)
            self._endpoint = serve(output.metrics_port, metrics, SinkMetrics(self._sinks))

    @property
    def metrics_url(self) -> str | None:
        """Where Prometheus finds the metrics."""
        return self._endpoint.url if self._endpoint else None

    def close(self) -> dict[str, Any]:
        """Finish files and threads; return what each sink wrote and dropped. Twice is fine."""
        if self._summaries is None:
            for sink in self._sinks.values():
                sink.close()
            self._summaries = {name: _summary(sink) for name, sink in self._sinks.items()}
            if self._endpoint is not None:
                self._endpoint.close()
        return self._summaries

    def _caption(self) -> Caption:
        director = self._rig.director
        current = director.current
        if current is None:
            return Caption()
        number = len(director.results) + 1
        return Caption(current.task, current.instruction, f"task {number}, step {director.steps}")


def _summary(sink: Sink) -> dict[str, int]:
    return {"written": sink.written, "dropped": sink.dropped}
