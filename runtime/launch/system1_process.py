"""System 1's process: the policy, asked over ZeroMQ, always with the newest request.

A policy that raises is answered for (`PlanReply.chunk` is None) and asked again at the next
request: the loop runs out of actions and holds, it does not die.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from openhelix.runtime.control.assembly import make_policy
from openhelix.runtime.control.planner import PlanReply, PlanRequest, checked_chunk
from openhelix.runtime.core.config import Part
from openhelix.runtime.core.interfaces import Policy
from openhelix.runtime.core.types import ActionChunk
from openhelix.runtime.observe.collectors import WireMetrics
from openhelix.runtime.observe.metrics import LOOPBACK, Endpoint, GpuMetrics, serve
from openhelix.runtime.transport.wire import NewestReader, Publisher

log = logging.getLogger(__name__)


class System1Process:
    """The node "system1" of a run's graph; see `openhelix.runtime.launch.node.Node`.

    Args:
        policy: {"target": "module:Class", "options": {...}}.
        plans: endpoint on which requests arrive (bound here).
        chunks: endpoint on which replies go out (bound here).
        keys: folder of CURVE keys, off loopback.
        metrics_port: where Prometheus finds this process's metrics; 0 for a free port, None
            for no endpoint.
        metrics_host: the address that it binds.
    """

    def __init__(
        self,
        policy: dict[str, Any],
        plans: str,
        chunks: str,
        keys: str | None = None,
        metrics_port: int | None = None,
        metrics_host: str = LOOPBACK,
    ) -> None:
        self._metrics_at = (metrics_port, metrics_host)
        self._metrics: Endpoint | None = None
        self._part = Part(**policy)
        self._endpoints, self._keys = (plans, chunks), keys
        self._policy: Policy | None = None
        self._reader: NewestReader[PlanRequest] | None = None
        self._replies: Publisher | None = None
        self._reset_for: tuple[int, int] | None = None  # instruction and seed
        self._planned = 0
        self._failed = 0
        self._compute_s = 0.0

    def setup(self) -> None:
        policy = make_policy(self._part)
        self._policy = policy  # known from here on: what it needs is compared while it warms up
        policy.warm_up()
        plans, chunks = self._endpoints
        self._reader = NewestReader(plans, "plans", PlanRequest, bind=True, keys=self._keys)
        self._replies = Publisher(chunks, "chunks", keys=self._keys)
        port, host = self._metrics_at
        if port is not None:
            wire = WireMetrics({"plans": self._reader.stats}, {"chunks": self._replies})
            self._metrics = serve(port, wire, GpuMetrics(), host=host)

    def run(self, stop: threading.Event) -> None:
        assert self._reader is not None
        while not stop.is_set():
            self._reader.wait(0.05)
            request = self._reader.poll()
            if request is not None:
                self._answer(request)

    def health(self) -> dict[str, Any]:
        policy, reader = self._policy, self._reader
        return {
            "planned": self._planned,
            "failed": self._failed,
            "compute_s": self._compute_s,
            "policy_spec": asdict(policy.spec) if policy else None,
            "device": str(getattr(policy, "device", "cpu")) if policy else None,
            "untrained": bool(getattr(policy, "untrained", False)),
            "dropped": dict(reader.stats.dropped) if reader else {},
            "metrics_url": self._metrics.url if self._metrics else None,
        }

    def handlers(self) -> Mapping[str, Callable[[dict[str, Any]], dict[str, Any]]]:
        return {}

    def close(self) -> None:
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None
        for part in (self._reader, self._replies):
            if part is not None:
                part.close()

    def _answer(self, request: PlanRequest) -> None:
        assert self._policy is not None and self._replies is not None
        observation = request.observation
        start_s = time.perf_counter()
        chunk: ActionChunk | None = None
        try:
            # A restarted control process counts instructions from 1 again, with another seed.
            if self._reset_for != (observation.instruction_id, request.seed):
                self._reset_for = (observation.instruction_id, request.seed)
                self._policy.reset(request.seed)
            chunk = checked_chunk(self._policy.act(observation, request.latents))
            self._planned += 1
        except Exception:
            self._failed += 1
            log.exception("System 1 failed; the loop goes on without this chunk")
        self._compute_s = time.perf_counter() - start_s
        self._replies.send(
            PlanReply(observation.instruction_id, observation.t_ns, chunk, self._compute_s)
        )
