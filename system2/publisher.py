"""System 2's process: builds the engine, warms it up, then serves robots over ZeroMQ.

Requests come in on one bound socket from any number of robots, each on a topic of its own;
latents go out on one bound socket, on the topic `latents/<robot>`. Nothing here waits for a
robot, and no robot can make the process fail: what is wrong with a request is counted, told
in `health`, and the next one is served.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import zmq

from openhelix.runtime.control.assembly import make
from openhelix.runtime.core.clock import Clock, MonotonicClock
from openhelix.runtime.core.config import Part
from openhelix.runtime.core.interfaces import Engine, GoalRequest, LatentGoal
from openhelix.runtime.observe.collectors import PeerMetrics, System2Metrics, WireMetrics
from openhelix.runtime.observe.metrics import LOOPBACK, Endpoint, GpuMetrics, Library, serve
from openhelix.runtime.transport.codec import encode
from openhelix.runtime.transport.sockets import Port
from openhelix.runtime.transport.wire import ENVELOPE, NewestPerTopic, PeerWatch, topic_bytes
from openhelix.system2.scheduler import GoalScheduler, Limits, Totals, health_of

log = logging.getLogger(__name__)
IDLE_S = 0.05  # how often to look for a stop while nothing is due
MAX_NAMES = 4096  # of robots whose numbering is remembered
# A robot sends a few images per second, so few wait; and what waits is held in memory.
QUEUE = 32
MAX_REQUEST_BYTES = 32 << 20  # an RGB image of 4K has 25 MB


class LatentOutlet:
    """One bound PUB socket with a topic and a sequence for every robot.

    `openhelix.runtime.transport.wire.Publisher` has one topic per socket; many robots subscribe
    to this one address, each exactly to its own topic.
    """

    def __init__(self, endpoint: str, keys: Any = None, clock: Clock | None = None) -> None:
        # Latents are few and small; a reader that is gone for minutes needs only the newest.
        self._port = Port(zmq.PUB, endpoint, bind=True, keys=keys, options={zmq.SNDHWM: 1000})
        self._clock = clock or MonotonicClock()
        self._source = int.from_bytes(os.urandom(8), "little")
        self._seq: OrderedDict[str, int] = OrderedDict()  # the name used last comes last
        self._start = 0  # beyond every number of a name that was forgotten

    @property
    def port(self) -> Port:
        """The socket."""
        return self._port

    @property
    def bound(self) -> str:
        """The endpoint really bound."""
        return self._port.bound

    @property
    def source(self) -> str:
        """Identity of this publisher since its start."""
        return f"{self._source:016x}"

    def send(self, robot: str, goal: LatentGoal) -> None:
        """Publish a latent on `latents/<robot>`.

        Raises:
            WireError: the latent breaks its schema (shape, dtype, NaN); no number is used up.
            ValueError: the name cannot be a topic.
        """
        seq = self._seq.get(robot, self._start)
        envelope = ENVELOPE.pack(self._source, seq, self._clock.now_ns())
        frames = encode(goal, topic_bytes(f"latents/{robot}") + b"\0" + envelope)
        self._count(robot, seq + 1)
        self._port.socket.send_multipart(frames, zmq.NOBLOCK)

    def _count(self, robot: str, following: int) -> None:
        self._seq[robot] = following
        self._seq.move_to_end(robot)
        if len(self._seq) > MAX_NAMES:
            _, following = self._seq.popitem(last=False)
            self._start = max(self._start, following)  # should it return, its reader goes on

    def close(self) -> None:
        """Close the socket."""
        self._port.close()


class System2Process:
    """The node "system2" of a run's graph; see `openhelix.runtime.launch.node.Node`.

    Args:
        engine: {"target": "module:Class", "options": {…}}.
        hz: latents per second for each robot (HZ2).
        requests: endpoint to bind for requests.
        latents: endpoint to bind for latents.
        limits: fields of `scheduler.Limits` that differ from the defaults.
        keys: folder of CURVE keys, off this host.
        shared: whether several robots' clients reach it: none of them may change it for all.
        metrics_port: where Prometheus finds this process's metrics; 0 for a free port, None
            for no endpoint.
        metrics_host: the address that it binds.
    """

    def __init__(
        self,
        engine: Mapping[str, Any],
        hz: float,
        requests: str,
        latents: str,
        limits: Mapping[str, Any] | None = None,
        keys: str | None = None,
        shared: bool = False,
        metrics_port: int | None = None,
        metrics_host: str = LOOPBACK,
    ) -> None:
        self._metrics_port, self._metrics_host = metrics_port, metrics_host
        self._metrics: Endpoint | None = None
        self._engine_part = engine
        self._hz, self._requests, self._latents = hz, requests, latents
        self._limits = Limits(**(limits or {}))
        self._keys, self._shared = keys, shared
        self._watches: dict[str, PeerWatch] = {}
        self._told: Counter[str] = Counter()
        self._engine: Engine | None = None
        self._scheduler: GoalScheduler | None = None
        self._reader: NewestPerTopic[GoalRequest] | None = None
        self._outlet: LatentOutlet | None = None

    def setup(self) -> None:
        """Build and warm up the engine, bind; ready when it returns."""
        engine: Engine = make(Part(**self._engine_part))
        self._engine = engine
        engine.warm_up()
        clock = MonotonicClock()
        self._outlet = LatentOutlet(self._latents, self._keys, clock)
        self._reader = NewestPerTopic(
            self._requests,
            GoalRequest,
            bind=True,
            keys=self._keys,
            hwm=QUEUE,
            max_topics=self._limits.max_robots,
            first_stays=True,
            max_bytes=MAX_REQUEST_BYTES,
        )
        ports = {"requests": self._reader.port, "latents": self._outlet.port}
        self._watches = {name: PeerWatch(name, port) for name, port in ports.items()}
        self._scheduler = GoalScheduler(
            engine, self._outlet, clock, self._hz, self._limits, self._outlet.source
        )
        if self._metrics_port is not None:
            self._metrics = serve(
                self._metrics_port,
                System2Metrics(self._scheduler, self._hz, clock),
                WireMetrics({"requests": self._reader.stats}),
                PeerMetrics(self._watches),
                GpuMetrics(),
                Library("vllm:"),  # what vLLM counts of itself, in this process
                host=self._metrics_host,
            )

    def run(self, stop: threading.Event) -> None:
        """Serve until `stop` is set."""
        assert self._reader is not None
        assert self._scheduler is not None
        reader, scheduler, clock = self._reader, self._scheduler, MonotonicClock()
        while not stop.is_set():
            for topic, request in reader.poll().items():
                scheduler.offer(request, (topic, reader.sender(topic)), reader.key(topic))
            scheduler.forget_silent()
            self._tell()
            due = scheduler.next_due_ns()
            if due is not None and due <= clock.now_ns():
                scheduler.serve()
                continue
            wait_s = IDLE_S if due is None else min(IDLE_S, (due - clock.now_ns()) * 1e-9)
            # Until its deadline a robot's request may still be replaced by a newer one; another
            # instruction is due at once.
            reader.wait(wait_s)

    def health(self) -> dict[str, Any]:
        """Return counters, times, and what the latents are."""
        scheduler, engine, reader = self._scheduler, self._engine, self._reader
        spec = engine.spec if engine is not None else None
        return (scheduler.health() if scheduler else health_of(Totals(), {})) | {
            "hz": self._hz,
            "latent_spec": asdict(spec) if spec else None,
            "spec_id": spec.spec_id if spec else None,
            "device": str(getattr(engine, "device", "cpu")) if engine else None,
            "untrained": bool(getattr(engine, "untrained", False)),
            "metrics_url": self._metrics.url if self._metrics else None,
            "dropped": dict(reader.stats.dropped) if reader else {},
            "taken": reader.taken if reader else [],
            "refused_connections": {
                name: dict(watch.refused) for name, watch in self._watches.items()
            },
            "gaps": reader.stats.gaps if reader else 0,
        }

    def handlers(self) -> Mapping[str, Callable[[dict[str, Any]], dict[str, Any]]]:
        """Questions: `swap` takes other latent weights without a restart; `claim` a name."""
        return {"claim": self._claim} | ({} if self._shared else {"swap": self._swap})

    def _claim(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Reserve a name for a robot; the answer says why not, or ""."""
        if self._scheduler is None:
            return {"refused": "system2.connect: System 2 is not ready"}
        try:
            self._scheduler.claim(str(arguments["robot"]), str(arguments["run"]))
        except ValueError as error:
            return {"refused": str(error)}
        return {"refused": ""}

    def _tell(self) -> None:
        """Take in who came and went, and log the first of each kind of refused message."""
        for watch in self._watches.values():
            watch.poll()
        assert self._reader is not None
        for reason, count in self._reader.stats.dropped.items():
            if count >= 2 * self._told[reason] and reason != "repeat":
                self._told[reason] = count
                topics = f" ({', '.join(self._reader.taken)})" if reason == "taken" else ""
                log.warning("requests refused: %s%s, %d so far", reason, topics, count)

    def _swap(self, arguments: dict[str, Any]) -> dict[str, Any]:
        swap = getattr(self._engine, "swap", None)
        if swap is None:
            raise ValueError("swap: this engine has no latent weights to swap")
        return {"latent_spec": asdict(swap(str(arguments["path"])))}

    def close(self) -> None:
        """Release sockets and engine; safe to call twice."""
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None
        for part in (*self._watches.values(), self._reader, self._outlet, self._engine):
            if part is not None:
                part.close()
        self._watches = {}
        self._reader, self._outlet, self._engine = None, None, None
