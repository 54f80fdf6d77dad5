"""Gives a run's loop the subscribers that its configuration asks for, and ends them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from runtime.assembly import Rig
from runtime.collectors import LoopMetrics, SinkMetrics, loop_wire
from runtime.config import RunConfig
from runtime.exposition import Endpoint, serve
from runtime.realtime import RealtimeStatus
from runtime.sinks import Sinks
from runtime.statistics import LoopStatistics
from runtime.stream import TOPIC, TickPublisher
from runtime.video import Caption
from runtime.wire import Publisher


class Subscribers:
    """Figures and metrics always; sinks inside the process (lockstep) or a tick stream.

    Args:
        config: what is wanted.
        folder: where files go.
        rig: whose loop they subscribe to.
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
        rig: Rig,
        ticks: str | None = None,
        realtime: Callable[[], RealtimeStatus | None] = lambda: None,
        tasks: Sequence[str] = (),
    ) -> None:
        self._rig = rig
        self.statistics = LoopStatistics(rig)
        rig.loop.subscribers.append(self.statistics)
        self._sinks: Sinks | None = None
        self._publisher: Publisher | None = None
        self._endpoint: Endpoint | None = None
        if ticks is not None:
            keys = str(config.transport.keys) if config.transport.keys else None
            self._publisher = Publisher(ticks, TOPIC, bind=False, keys=keys)
            rig.loop.subscribers.append(TickPublisher(self._publisher, rig.director))
        else:
            cameras = [camera.name for camera in rig.loop.robot.spec.cameras]
            self._sinks = Sinks(config, folder, cameras, self._caption, patient=True)
            rig.loop.subscribers += self._sinks.parts.values()
        port = config.output.metrics_port
        if port is not None and config.control.clock == "realtime":
            period_s = 1.0 / config.system2.hz
            metrics = LoopMetrics(rig.loop, rig.pacer, rig.director, realtime, tasks, period_s)
            rig.loop.subscribers.append(metrics)
            parts: list[Any] = [metrics, loop_wire(rig.loop, self._publisher)]
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

    def close(self) -> dict[str, Any]:
        """End them; return what each sink inside this process wrote. Twice is fine."""
        if self._endpoint is not None:
            self._endpoint.close()
            self._endpoint = None
        if self._publisher is not None:
            self._publisher.close()
            self._publisher = None
        return self._sinks.close() if self._sinks else {}

    def _caption(self) -> Caption:
        director = self._rig.director
        current = director.current
        if current is None:
            return Caption()
        number = len(director.results) + 1
        return Caption(current.task, current.instruction, f"task {number}, step {director.steps}")
