"""Which processes a run consists of, where they listen, and who starts them.

    system2  -- latents -->  control  -- actions -->  world  -- states -->  camera
       ^---- goal requests ----'  ^------ states, frames ------'-----------------'

Every channel is bound by the side that others depend on (System 2, the world, the camera),
so a robot or a restarted process only ever connects. `Graph` starts the nodes through a host
(Ray actors or plain processes), waits until all are ready and ends them in order.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from runtime.config import ConfigError, Placement, RunConfig
from runtime.node import NodeSpec
from runtime.rpc import RpcClient, RpcError

CHANNELS = ("requests", "latents", "actions", "states", "frames")
NODES = ("system2", "control", "world", "camera")


class GraphError(RuntimeError):
    """A node did not become ready; the message is one line and names it."""


class Host(Protocol):
    """Starts nodes and ends them; `runtime.actors.RayHost`, `runtime.processes.ProcessHost`."""

    def start(self, specs: Sequence[NodeSpec]) -> None: ...
    def close(self, timeout_s: float = 5.0) -> None: ...


@dataclass(frozen=True, slots=True)
class Endpoints:
    """The address of every channel and of every node's control channel."""

    channels: dict[str, str]
    control: dict[str, str]

    @classmethod
    def local(cls, folder: Path) -> Endpoints:
        """Unix sockets in a folder of this run."""
        return cls(
            {name: f"ipc://{folder}/{name}" for name in CHANNELS},
            {name: f"ipc://{folder}/{name}.rpc" for name in NODES},
        )

    @classmethod
    def network(cls, hosts: dict[str, str], base_port: int) -> Endpoints:
        """TCP ports; `hosts` says at which address each node is reached."""
        owner = dict(zip(CHANNELS, ("system2", "system2", "world", "world", "camera"), strict=True))

        def address(node: str, offset: int) -> str:
            return f"tcp://{hosts.get(node, '127.0.0.1')}:{base_port + offset}"

        return cls(
            {name: address(owner[name], i) for i, name in enumerate(CHANNELS)},
            {name: address(name, len(CHANNELS) + i) for i, name in enumerate(NODES)},
        )


def build(config: RunConfig, ends: Endpoints, control_options: dict[str, Any]) -> list[NodeSpec]:
    """Return the nodes of a run; the simulator's two only for the `sim` driver."""
    channels = ends.channels
    keys = str(config.transport.keys) if config.transport.keys else None

    def node(
        name: str, target: str, placement: Placement, options: dict[str, Any], restart: bool
    ) -> NodeSpec:
        return NodeSpec(
            name=name,
            target=target,
            control=ends.control[name],
            options=options,
            restart=restart,
            keys=keys,
            **placement.model_dump(),
        )

    nodes = [
        node(
            "system2",
            "system2.publisher:PublisherNode",
            config.system2.placement,
            {
                "engine": config.system2.engine.model_dump(),
                "hz": config.system2.hz,
                "requests": channels["requests"],
                "latents": channels["latents"],
            },
            restart=True,
        ),
        # A control loop that crashed must not start again by itself beside a moving arm.
        node(
            "control",
            "runtime.control:ControlNode",
            config.control.placement,
            {
                "config": config.model_dump(mode="json"),
                "channels": channels | {"world_control": ends.control["world"]},
            }
            | control_options,
            restart=False,
        ),
    ]
    if config.robot.name != "sim":
        return nodes
    world, scene = config.world, config.world.scene
    return [
        *nodes,
        node(
            "world",
            "benchmarks.playtable.host:WorldNode",
            world.placement,
            {"scene": scene, "actions": channels["actions"], "states": channels["states"]},
            restart=False,
        ),
        node(
            "camera",
            "benchmarks.playtable.host:CameraNode",
            world.camera_placement,
            {
                "scene": scene,
                "cameras": world.cameras,
                "hz": world.camera_hz,
                "states": channels["states"],
                "frames": channels["frames"],
            },
            restart=True,
        ),
    ]


class Graph:
    """The running processes of one run."""

    def __init__(
        self, config: RunConfig, control_options: dict[str, Any], log_folder: Path
    ) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="openhelix-"))
        transport = config.transport
        if transport.host == "ipc":
            self.endpoints = Endpoints.local(self._folder)
        else:
            hosts = dict.fromkeys(NODES, transport.host) | transport.hosts
            self.endpoints = Endpoints.network(hosts, transport.base_port)
        self.specs = build(config, self.endpoints, control_options)
        self._keys = str(transport.keys) if transport.keys else None
        self._clients: dict[str, RpcClient] = {}
        self._config, self._log_folder = config, log_folder
        self._host: Host | None = None

    def start(self) -> None:
        """Start every node; returns before they are ready."""
        if self._config.ray:
            # Ray takes half a second to import: only a run that uses it pays.
            from runtime.actors import RayHost

            resources = self._custom_resources()
            self._host = RayHost(self._config.ray_address, resources)
        else:
            from runtime.processes import ProcessHost

            self._host = ProcessHost(self._log_folder)
        self._host.start(self.specs)

    def health(self, name: str, timeout_s: float = 1.0) -> dict[str, Any]:
        """Ask one node; `{"state": "unreachable"}` while it does not answer."""
        try:
            return self._client(name).call("health", {}, timeout_s)
        except RpcError:
            return {"name": name, "state": "unreachable", "error": ""}

    def ask(
        self, name: str, question: str, timeout_s: float = 5.0, **arguments: Any
    ) -> dict[str, Any]:
        """Put a question to a node's part."""
        return self._client(name).call("ask", {"question": question, **arguments}, timeout_s)

    def tell_stop(self, name: str) -> None:
        """Ask a node to end; it may be gone already."""
        try:
            self._client(name).call("stop", {}, 2.0)
        except RpcError:
            return

    def wait_ready(
        self,
        timeout_s: float,
        tell: Callable[[dict[str, str]], None],
        give_up: threading.Event,
    ) -> None:
        """Block until all nodes are ready or `give_up` is set; `tell` hears the states.

        Raises:
            ConfigError: a node refused its input.
            GraphError: a node failed, or the time is over.
        """
        deadline = time.monotonic() + timeout_s
        while not give_up.is_set():
            states = {spec.name: self.health(spec.name, 0.5) for spec in self.specs}
            tell({name: health["state"] for name, health in states.items()})
            for name, health in states.items():
                if health["state"] == "refused":
                    raise ConfigError(f"{name}: {health['error']}")
                if health["state"] == "failed":
                    raise GraphError(f"{name} failed: {health['error']}")
            if all(health["state"] in ("ready", "done") for health in states.values()):
                return
            if time.monotonic() > deadline:
                late = [name for name, health in states.items() if health["state"] != "ready"]
                raise GraphError(f"not ready after {timeout_s:.0f} s: {', '.join(late)}")
            time.sleep(0.1)

    def close(self) -> None:
        """End all nodes, the control loop first, so that the robot is stopped by its own loop."""
        for name in ("control", "camera", "world", "system2"):
            if self._host is not None and any(spec.name == name for spec in self.specs):
                self.tell_stop(name)
        if self._host is not None:
            self._host.close()
            self._host = None
        for client in self._clients.values():
            client.close()
        self._clients.clear()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _client(self, name: str) -> RpcClient:
        if name not in self._clients:
            self._clients[name] = RpcClient(self.endpoints.control[name], keys=self._keys)
        return self._clients[name]

    def _custom_resources(self) -> dict[str, float]:
        total: dict[str, float] = {}
        for spec in self.specs:
            for resource, amount in spec.resources.items():
                total[resource] = total.get(resource, 0.0) + amount
        return total
