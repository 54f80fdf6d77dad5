"""The graph as Ray actors: Ray places them, watches them and starts them again.

Nothing of a run travels through Ray: each actor hosts a `NodeRunner`, which speaks
ZeroMQ. An actor that is killed is restarted by Ray with the same `NodeSpec`, binds the same
endpoints, and its peers reconnect by themselves.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence
from typing import Any

import ray

from runtime.node import NodeRunner, NodeSpec

log = logging.getLogger(__name__)


class NodeActor:
    """Hosts one node; created through `ray.remote`."""

    def __init__(self, spec_json: str) -> None:
        logging.basicConfig(level=logging.INFO)
        self._runner = NodeRunner(NodeSpec.from_json(spec_json))
        self._thread = threading.Thread(target=self._run, name="node")
        self._thread.start()

    def _run(self) -> None:
        if self._runner.run() == "failed":
            os._exit(1)  # a crash as Ray understands it: the actor is started again

    def alive(self) -> bool:
        """Whether the node is still working; also tells that the actor is placed."""
        return self._thread.is_alive()

    def stop(self) -> None:
        self._runner.stop()
        self._thread.join(timeout=5.0)


class RayHost:
    """Starts nodes as Ray actors, on a cluster that runs or on one made here."""

    def __init__(self, address: str | None, resources: dict[str, float]) -> None:
        self._actors: dict[str, Any] = {}
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if address is None:
            # A machine with few cores still hosts every process: shares, not limits.
            options |= {
                "num_cpus": max(4, os.cpu_count() or 1),
                "resources": resources,
                "include_dashboard": False,
            }
        else:
            options["address"] = address
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(**options)

    def start(self, specs: Sequence[NodeSpec]) -> None:
        for spec in specs:
            actor = ray.remote(NodeActor).options(
                name=f"openhelix-{os.getpid()}-{spec.name}",
                num_cpus=spec.cpus,
                num_gpus=spec.gpus,
                resources=spec.resources,
                max_restarts=-1 if spec.restart else 0,
                max_concurrency=4,
                runtime_env={"env_vars": spec.environment},
            )
            self._actors[spec.name] = actor.remote(spec.to_json())

    def close(self, timeout_s: float = 5.0) -> None:
        """Stop the actors, then this driver's part of Ray."""
        stops = [actor.stop.remote() for actor in self._actors.values()]
        ray.wait(stops, num_returns=len(stops), timeout=timeout_s) if stops else None
        for actor in self._actors.values():
            ray.kill(actor, no_restart=True)
        ray.shutdown()
