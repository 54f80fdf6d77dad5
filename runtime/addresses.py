"""Where the nodes of a run listen: Unix sockets on one host, TCP where it is another one's.

Every channel is bound by the side that control depends on, so that the control process and a
restarted one only ever connect. A robot's own nodes talk over Unix sockets also when System 2
is on another host: what need not be on the network is not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from runtime.config import ConfigError, RunConfig, TransportConfig
from runtime.endpoints import is_local, served

# Each channel and the node that binds it.
CHANNELS = {
    "requests": "system2",
    "latents": "system2",
    "plans": "system1",
    "chunks": "system1",
    "actions": "world",
    "states": "world",
    "frames": "camera",
    "ticks": "observer",
}
NODES = ("control", "observer", "camera", "world", "system1", "system2")  # in order of ending
# control and observer stay where `openhelix run` is called: it shows and writes what they give.
MOVABLE = ("system2", "system1", "world", "camera")


@dataclass(frozen=True, slots=True)
class Endpoints:
    """The address of every channel and of every node's control channel."""

    channels: dict[str, str]
    control: dict[str, str]

    @classmethod
    def of(cls, config: RunConfig, folder: Path) -> Endpoints:
        """Return where the nodes of a run listen.

        Args:
            config: of the run.
            folder: of this run, for Unix sockets.

        Raises:
            ConfigError: `transport.hosts` names what cannot be elsewhere.
        """
        transport = config.transport
        _check(transport)
        if not (config.ray and config.ray_address):
            for name, host in transport.hosts.items():
                if not is_local(f"tcp://{host}:1"):
                    raise ConfigError(
                        f"transport.hosts.{name}: {host} is another host, which takes a cluster: "
                        "ray=true and ray_address=auto"
                    )
        if config.system2.connect is not None:
            return cls._nodes(transport, folder).with_served(config.system2.connect)
        return cls._nodes(transport, folder)

    @classmethod
    def _nodes(cls, transport: TransportConfig, folder: Path) -> Endpoints:
        if transport.host == "ipc":
            return cls.local(folder).moved(transport.hosts, transport.base_port)
        hosts = dict.fromkeys(NODES, transport.host) | transport.hosts
        return cls.network(hosts, transport.base_port)

    @classmethod
    def local(cls, folder: Path) -> Endpoints:
        """Unix sockets in a folder of this run."""
        return cls(
            {name: f"ipc://{folder}/{name}" for name in CHANNELS},
            {name: f"ipc://{folder}/{name}.rpc" for name in NODES},
        )

    @classmethod
    def network(cls, hosts: Mapping[str, str], base_port: int) -> Endpoints:
        """TCP ports; `hosts` says at which address each node is reached."""

        def address(node: str, offset: int) -> str:
            return f"tcp://{hosts.get(node, '127.0.0.1')}:{base_port + offset}"

        return cls(
            {name: address(owner, i) for i, (name, owner) in enumerate(CHANNELS.items())},
            {name: address(name, len(CHANNELS) + i) for i, name in enumerate(NODES)},
        )

    def moved(self, hosts: Mapping[str, str], base_port: int) -> Endpoints:
        """Return these, but TCP for the nodes in `hosts`."""
        there = Endpoints.network(hosts, base_port)
        channels = {name: there.channels[name] for name, node in CHANNELS.items() if node in hosts}
        control = {name: there.control[name] for name in NODES if name in hosts}
        return Endpoints(self.channels | channels, self.control | control)

    def with_served(self, address: str) -> Endpoints:
        """Return these, but leading to a shared System 2."""
        there = served(address)
        channels = self.channels | {name: there[name] for name in ("requests", "latents")}
        return Endpoints(channels, self.control | {"system2": there["control"]})


def stays(config: RunConfig, node: str) -> bool:
    """Whether a node must be on the host where the run is started."""
    return config.transport.host == "ipc" and node not in config.transport.hosts


def _check(transport: TransportConfig) -> None:
    """Refuse hosts that would leave a node without its peers."""
    for name in transport.hosts:
        if name not in NODES:
            raise ConfigError(f"transport.hosts.{name}: no such node; valid: {', '.join(NODES)}")
        if transport.host == "ipc" and name not in MOVABLE:
            raise ConfigError(
                f"transport.hosts.{name}: stays beside the robot, where `openhelix run` is called; "
                f"only {', '.join(MOVABLE)} can be on another host"
            )
    if transport.host == "ipc" and ("world" in transport.hosts) != ("camera" in transport.hosts):
        raise ConfigError("transport.hosts: world and camera go together, or stay both")
