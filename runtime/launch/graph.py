"""The processes of a run, their endpoints, and how they are started.

    system2 <- requests -- control -- plans ---> system1
            -- latents --> control <-- chunks --
                           control -- actions -> world -- states -> camera
                           control <- states --- world
                           control <- frames ------------------------'
                           control -- ticks ---> observer

`build` lists the nodes, `Endpoints` their addresses, and `Graph` starts them, waits until all are
ready and ends them in order. All are plain processes, children of the command, which the kernel tells
when it dies; or, with Ray, the control loop and the observer are, and the node "ray" has Ray host the
others. Nodes on one host communicate over Unix sockets in a `ScratchFolder`, which is removed with
the run.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import socket
import stat
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import psutil

from openhelix.runtime.control.assembly import check_parts, make_trigger
from openhelix.runtime.core import plugins
from openhelix.runtime.core.config import (
    METRICS_PARTS,
    CommandFailed,
    ConfigError,
    Placement,
    RunConfig,
    TransportConfig,
)
from openhelix.runtime.core.interfaces import ActionSpec, CameraSpec, RobotSpec
from openhelix.runtime.core.targets import check_part, written_spec
from openhelix.runtime.launch.node import NodeSpec
from openhelix.runtime.launch.processes import ProcessHost
from openhelix.runtime.observe.observer import ObserverProcess
from openhelix.runtime.transport.rpc import RpcClient, RpcError, RpcRefused
from openhelix.runtime.transport.sockets import (
    EndpointRefused,
    check_bind,
    check_connect,
    check_keys,
    is_local,
    served,
)

PREFIX: Final = "openhelix-run-"
OWNER: Final = ".owner"
# Each channel and the node that binds it: always the side that control depends on, so that the
# control process and a restarted one only ever connect.
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
# These stay where `openhelix run` is called, as its own children: it shows and writes what they
# give, and the arm must stop with it, whatever becomes of Ray.
BESIDE = ("control", "observer")
MOVABLE = ("system2", "system1", "world", "camera")
RAY = "ray"  # the node that has Ray host the movable ones
RAY_PORT = 6379  # Ray's own default
RAY_DAEMON = "raylet"  # on each host of a cluster
PROBE_S = 3.0  # for a host to answer at all
# What begins a gRPC connection, and settings that change nothing; the server answers with its own.
GREETING: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
CONNECT_S = 10.0  # for a cluster to let this host in
CLOSE_S, RAY_CLOSE_S = 5.0, 15.0  # for processes to end in order; what hangs is killed
# A control loop that crashed must not start again by itself beside a moving arm, and a world
# that did would have forgotten its state.
RESTARTED = ("system1", "system2", "camera")
OBSERVER = Placement(cpus=0.2, nice=10)

# ------------------------------------------------------------------------------------------------
# The folder of a run


class ScratchFolder:
    """A new private folder, locked by this process; `close` removes it.

    A process that is killed removes nothing, so the next one does: whatever no living process
    holds. Who holds a folder has a lock on a file in it, which the kernel gives up with the
    process, whatever ended it; a process number could be another's by then.

    Attributes:
        path: of the folder.
    """

    def __init__(self) -> None:
        remove_abandoned()
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX))
        part = self.path / f"{OWNER}.part"
        self._lock = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        part.rename(self.path / OWNER)  # only now: nobody sees it without its lock

    def close(self) -> None:
        """Remove the folder and what is in it; again does nothing."""
        if self._lock >= 0:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *error: object) -> None:
        self.close()


def remove_abandoned() -> list[Path]:
    """Remove this user's folders whose process is gone; return them."""
    removed = []
    for path in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            if _is_own(path) and _remove_if_free(path):
                removed.append(path)
    return removed


def _is_own(path: Path) -> bool:
    """Whether it is a folder, no link to one, that this user alone can write to."""
    info = path.lstat()
    return stat.S_ISDIR(info.st_mode) and info.st_uid == os.getuid() and not info.st_mode & 0o077


def _remove_if_free(path: Path) -> bool:
    lock = os.open(path / OWNER, os.O_RDWR | os.O_NOFOLLOW)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError: its process lives
        shutil.rmtree(path)
    finally:
        os.close(lock)
    return True


# ------------------------------------------------------------------------------------------------
# Where the nodes listen


@dataclass(frozen=True, slots=True)
class Endpoints:
    """The address of every channel and of every node's control channel.

    Unix sockets on one host, TCP where it is another one's. A robot's own nodes talk over Unix
    sockets also when System 2 is on another host: what need not be on the network is not.
    """

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
    local = config.transport.host == "ipc" and node not in config.transport.hosts
    return node in BESIDE or local


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


# ------------------------------------------------------------------------------------------------
# The nodes and the graph that they make


class GraphError(RuntimeError):
    """A node did not become ready; the message is one line and names it."""


def build(config: RunConfig, ends: Endpoints, job: dict[str, Any], folder: str) -> list[NodeSpec]:
    """Return the nodes of a run.

    Args:
        config: of the run.
        ends: where everything listens.
        job: what the control node is to do: `assignments` and `initial`.
        folder: where files go.
    """
    channels = ends.channels
    keys = str(config.transport.keys) if config.transport.keys else None
    data = config.model_dump(mode="json")
    system1, system2, world = config.system1, config.system2, config.world

    def own(name: str, **options: Any) -> dict[str, Any]:
        """Return a node's options with the channels that it binds."""
        bound = {channel: channels[channel] for channel, owner in CHANNELS.items() if owner == name}
        return options | bound | {"keys": keys}

    def metrics(name: str) -> dict[str, Any]:
        output = config.output
        return {"metrics_port": output.metrics_port_of(name), "metrics_host": output.metrics_host}

    engine, policy = system2.engine.model_dump(), system1.policy.model_dump()
    asked = ("world", "system1", "system2")
    reach = channels | {f"{name}_control": ends.control[name] for name in asked}
    parts: list[tuple[str, str, Placement, dict[str, Any]]] = [
        (
            "system1",
            "openhelix.runtime.launch.parts:System1Process",
            system1.placement,
            own("system1", policy=policy, **metrics("system1")),
        ),
        (
            "control",
            "openhelix.runtime.launch.parts:ControlProcess",
            config.control.placement,
            {"config": data, "channels": reach} | job,
        ),
    ]
    if system2.connect is None:
        serves = own("system2", engine=engine, hz=1 / system2.shortest_s, **metrics("system2"))
        parts.append(
            ("system2", plugins.entries(plugins.NODES)["system2"], system2.placement, serves)
        )
    if ObserverProcess.wanted(config):
        look = own("observer", config=data, cameras=world.cameras, folder=folder)
        parts.append(
            ("observer", "openhelix.runtime.observe.observer:ObserverProcess", OBSERVER, look)
        )
    if config.robot.name == "sim":
        scene = own("world", scene=world.scene, seed=world.seed, hz=config.control.hz)
        stands = world.static_camera.model_dump() if world.static_camera is not None else None
        view = own(
            "camera",
            scene=world.scene,
            static_camera=stands,
            cameras=world.cameras,
            hz=world.camera_hz,
            states=channels["states"],
        )
        runs = plugins.find(plugins.WORLDS, world.name).processes
        if not runs:
            raise ConfigError(
                f"world.name: {world.name!r} has no real-time processes; say control.clock=lockstep"
            )
        parts.append(("world", runs["world"], world.placement, scene))
        parts.append(("camera", runs["camera"], world.camera_placement, view))
    return [
        NodeSpec(
            name=name,
            target=target,
            control=ends.control[name],
            options=options,
            restart=name in RESTARTED,
            keys=keys,
            here=stays(config, name),
            **placement.model_dump(),
        )
        for name, target, placement, options in parts
    ]


def require_parts(config: RunConfig) -> None:
    """Refuse parts that this host does not have, as far as that can be told without loading them.

    Parts that another host may run are looked at there.

    Raises:
        ConfigError: in one line, the field and what is valid.
    """
    here = not (config.ray and config.ray_address) or config.control.clock == "lockstep"
    if here or stays(config, "system1"):
        check_part("system1.policy", config.system1.policy)
        spec = written_spec(config.system1.policy)
        if spec is not None and config.robot.name == "sim":
            sizes = plugins.resolve("openhelix.runtime.robots.sim:CAMERA_SIZES")
            cameras = tuple(CameraSpec(name, *sizes[name]) for name in config.world.cameras)
            check_parts(config, RobotSpec(cameras, ActionSpec(hz=config.control.hz)), spec)
    if config.system2.connect is not None:
        try:
            is_local(config.system2.connect)
        except EndpointRefused as error:
            raise ConfigError(f"system2.connect: {error}") from None
    elif here or stays(config, "system2"):
        check_part("system2.engine", config.system2.engine)
    if here or stays(config, "control"):
        make_trigger(config)  # the gate that it names is there


def with_free_ports(config: RunConfig) -> tuple[RunConfig, str]:
    """Return the configuration with ports that nobody has, and what to say of it ("" for nothing).

    Another run on this host has the default ports of the metrics: the next free ones are taken. Ports
    that were asked for are not exchanged for others.

    Raises:
        ConfigError: a port that was asked for is taken; the line names a free one.
    """
    transport, output = config.transport, config.output
    for node in NODES:
        host = transport.hosts.get(node, transport.host)
        if host == "ipc" or not is_local(f"tcp://{host}:1"):
            continue
        first, count = transport.base_port, len(CHANNELS) + len(NODES)
        if _taken(host, first, count):
            free = next(p for p in range(first + 100, 65_000, 100) if not _taken(host, p, count))
            raise ConfigError(f"transport.base_port: {first} at {host} is in use; {free} is free")
        break
    port, host = output.metrics_port, output.metrics_host
    count = len(METRICS_PARTS)
    if not port or not _taken(host, port, count):
        return config, ""
    free = next(p for p in range(port + 10, 65_000, 10) if not _taken(host, p, count))
    if "metrics_port" in output.model_fields_set:
        raise ConfigError(f"output.metrics_port: {port} at {host} is in use; {free} is free")
    ported = output.model_copy(update={"metrics_port": free})
    told = (
        f"metrics are at port {free} and those after it: {port} is in use, by another run perhaps"
    )
    return config.model_copy(update={"output": ported}), told


def _taken(host: str, first: int, count: int) -> bool:
    """Whether any of so many TCP ports in a row is in use."""
    for port in range(first, first + count):
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            # As the servers do: a port whose last connection is only just closed is free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    return True  # what else is wrong with an address, its server says
    return False


# ------------------------------------------------------------------------------------------------
# A cluster that is there already


def no_cluster(address: str) -> str:
    """Return the line that tells that nothing answers at `ray_address`."""
    return f"ray_address: no Ray cluster answers at {address!r}; `ray up` starts one"


def cluster_address(text: str) -> str:
    """Return `ray_address` as Ray takes it.

    Raises:
        ConfigError: it is no address of a cluster.
    """
    if text == "auto":
        return text
    host, sign, port = text.rpartition(":")
    if not sign:
        host, port = text, str(RAY_PORT)
    if "/" in text or not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(
            f"ray_address: {text!r}; write auto, HOST or HOST:PORT of a cluster that this host is in"
        )
    return f"{'127.0.0.1' if host == 'localhost' else host}:{port}"


def probe_cluster(address: str) -> None:
    """Find out at once whether a cluster listens: Ray itself takes minutes to give up.

    Raises:
        CommandFailed: nobody does, or who does speaks another protocol than Ray.
    """
    if address == "auto":
        # Ray looks for it on this host; whoever joins a cluster needs Ray's own daemon beside him.
        if os.environ.get("RAY_ADDRESS") or _runs(RAY_DAEMON):
            return
        raise CommandFailed(no_cluster(address))
    host, _, port = address.rpartition(":")
    # A cluster of this host may listen at its name's address alone.
    hosts = [host, socket.gethostname()] if is_local(f"tcp://{address}") else [host]
    for name in hosts:
        with (
            contextlib.suppress(OSError),
            socket.create_connection((name, int(port)), PROBE_S) as peer,
        ):
            if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true") or _greets(peer):
                return
    raise CommandFailed(no_cluster(address))


def _greets(peer: socket.socket) -> bool:
    """Whether who listens begins as a gRPC server does, within `PROBE_S`.

    Raises:
        OSError: the connection breaks, or nothing comes.
    """
    peer.sendall(GREETING)
    head = b""
    while len(head) < 9 and (part := peer.recv(9 - len(head))):
        head += part
    return len(head) == 9 and head[3] == 4 and head[5:] == bytes(4)  # settings, of no stream


def _runs(name: str) -> bool:
    """Whether a program of that name runs on this host."""
    return any(process.info["name"] == name for process in psutil.process_iter(["name"]))


# ------------------------------------------------------------------------------------------------
# The graph


class Graph:
    """The running processes of one run."""

    def __init__(self, config: RunConfig, job: dict[str, Any], folder: Path) -> None:
        check_keys(config.transport.keys)
        self._keys = str(config.transport.keys) if config.transport.keys else None
        self._scratch = ScratchFolder()
        try:
            self.endpoints = ends = Endpoints.of(config, self._scratch.path)
            elsewhere = config.system2.connect
            theirs = set(served(elsewhere).values()) if elsewhere is not None else set()
            for endpoint in (*ends.channels.values(), *ends.control.values()):
                check = check_connect if endpoint in theirs else check_bind
                check(endpoint, self._keys)  # here too, before anything is started
            self.specs = build(config, ends, job, str(folder))
            self._address = cluster_address(config.ray_address) if config.ray_address else None
            self._own = self._with_ray() if config.ray else self.specs  # children of this process
        except Exception:
            self._scratch.close()
            raise
        self._clients: dict[str, RpcClient] = {}
        self._fields: dict[str, dict[str, None]] = {}  # of each node's health
        self._run = uuid.uuid4().hex
        self._config, self._log_folder = config, folder / "logs"
        self._host: ProcessHost | None = None
        self._connected = False  # Ray is there

    def start(self) -> None:
        """Start every node; returns before they are ready.

        Raises:
            ConfigError: a part that is named does not exist, or the System 2 that others run
                refuses this robot.
            CommandFailed: there is no cluster at `ray_address`.
        """
        require_parts(self._config)
        if self._config.ray and self._address is not None:
            probe_cluster(self._address)
        if self._config.system2.connect is not None:
            self._require_system2(patient=True)
        self._host = ProcessHost(self._log_folder)
        self._host.start(self._own)

    def health(self, name: str, timeout_s: float = 1.0) -> dict[str, Any]:
        """Ask one node how it is.

        While it does not answer its state is "unreachable" and all that it has ever told is
        None, so that a record has its fields whenever it is looked at.
        """
        try:
            health = self._client(name).call("health", {}, timeout_s)
        except RpcRefused as error:
            known = {"state": "refused", "error": str(error)}
        except RpcError:
            known = {"state": "unreachable", "error": ""}
        else:
            self._fields[name] = dict.fromkeys(health)
            return health
        return {"pid": None, **self._fields.get(name, {}), "name": name, **known}

    def ask(
        self, name: str, question: str, timeout_s: float = 5.0, **arguments: Any
    ) -> dict[str, Any]:
        """Put a question to a node's part."""
        return self._client(name).call("ask", {"question": question, **arguments}, timeout_s)

    def has(self, name: str) -> bool:
        """Whether the run has that node."""
        return any(spec.name == name for spec in self.specs)

    @property
    def node_names(self) -> list[str]:
        """All nodes of the run, with the one that has Ray host others."""
        return list(dict.fromkeys(spec.name for spec in (*self._own, *self.specs)))

    def beside(self, name: str) -> bool:
        """Whether a node is on this host."""
        return name == RAY or is_local(self.endpoints.control[name])

    def ended(self) -> dict[str, str]:
        """Return which of our own processes are gone for good before their time, and how."""
        return self._host.ended() if self._host is not None else {}

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
        names = self.node_names
        connecting_s: float | None = None  # since when Ray has been asked to let us in
        while not give_up.is_set():
            # Those that do not listen yet must not hold up the news of the others for long.
            states = {name: self.health(name, 0.25) for name in names}
            tell({name: health["state"] for name, health in states.items()})
            for name, health in states.items():
                if health["state"] == "refused":
                    raise ConfigError(_told(name, ": ", health["error"]))
                if health["state"] == "failed":
                    raise GraphError(_told(name, " failed: ", health["error"]))
            ray = states.get(RAY, {})
            self._connected = self._connected or bool(ray.get("connected"))
            for name, how in (self.ended() | (ray.get("ended") or {})).items():
                raise GraphError(f"{name} {how} while it started; its log is in logs/")
            if self._address is not None and ray.get("connected") is False:
                connecting_s = connecting_s or time.monotonic()
                if time.monotonic() - connecting_s > CONNECT_S:
                    raise GraphError(no_cluster(self._address))
            if all(health["state"] in ("ready", "done") for health in states.values()):
                self._require_system2()
                return
            if time.monotonic() > deadline:
                late = [name for name, health in states.items() if health["state"] != "ready"]
                raise GraphError(f"not ready after {timeout_s:.0f} s: {', '.join(late)}")
            time.sleep(0.1)

    def await_system2(
        self,
        tell: Callable[[str], None],
        say: Callable[[str], None],
        give_up: threading.Event,
    ) -> None:
        """Block until the System 2 that others run answers, or `give_up` is set.

        Args:
            tell: hears, again and again, what is waited for.
            say: hears it once, where there is something to wait for.
            give_up: ends the wait.

        Raises:
            ConfigError: it refuses this host's keys.
            GraphError: it has failed, or `system2.connect_timeout_s` are over.
        """
        address, patience_s = self._config.system2.connect, self._config.system2.connect_timeout_s
        deadline_s = time.monotonic() + patience_s
        said = False
        while not give_up.is_set():
            health = self.health("system2", min(1.0, patience_s / 4))
            state, left_s = health["state"], deadline_s - time.monotonic()
            if state == "ready":
                return
            if state == "refused":
                raise ConfigError(f"system2: {health['error']}")
            if state == "failed":
                raise GraphError(f"system2 at {address} failed: {health['error']}")
            if left_s <= 0:
                raise GraphError(
                    f"system2 at {address} is {state} after system2.connect_timeout_s="
                    f"{patience_s:g}; `openhelix serve` runs one"
                )
            if not said:
                say(
                    f"waiting for System 2 at {address}, which is {state}; "
                    f"system2.connect_timeout_s={patience_s:g}"
                )
            said = True
            tell(f"System 2 at {address} ({state}, {left_s:.0f} s left)")
            give_up.wait(0.2)

    def latent_spec(self, patience_s: float = 60.0) -> dict[str, Any]:
        """Return the spec of System 2's latents, as soon as it answers.

        Raises:
            GraphError: it does not within the time.
        """
        deadline_s = time.monotonic() + patience_s
        while time.monotonic() < deadline_s:
            spec = self.health("system2").get("latent_spec")
            if spec is not None:
                return dict(spec)
            time.sleep(0.1)  # it has just died and is started again
        raise GraphError(f"system2: has not answered for {patience_s:.0f} s; its log is in logs/")

    def _require_system2(self, patient: bool = False) -> None:
        """A System 2 that others run must be there and have this robot's name free.

        Args:
            patient: it may still be on its way; what it refuses is told all the same.
        """
        health = self.health("system2", 5.0)
        if health["state"] == "refused":
            raise ConfigError(f"system2: {health['error']}")
        if health["state"] != "ready":
            if patient:
                return
            address = self.endpoints.control["system2"]
            raise GraphError(
                f"system2 at {address} is {health['state']}; `openhelix serve` runs one"
            )
        if self._config.system2.connect is not None:
            robot = self._config.robot.id
            answer = self.ask("system2", "claim", robot=robot, run=self._run)
            if answer["refused"]:
                raise ConfigError(answer["refused"])

    def close(self) -> None:
        """End all nodes, the control loop first, so that the robot is stopped by its own loop.

        What does not answer (it is importing, hung or gone) is left to the host, which ends
        all the others at once.
        """
        if self._host is not None:
            with contextlib.suppress(RpcError):
                if "control" not in self.ended():
                    self._client("control").call("stop", {}, 2.0)
            patience_s = RAY_CLOSE_S if self._connected else CLOSE_S
            if self._config.ray and not self._connected:
                patience_s = 1.0  # it may be deaf for a minute, and nothing is placed yet
            self._host.close(patience_s)
            self._host = None
        for client in self._clients.values():
            client.close()
        self._clients.clear()
        self._scratch.close()

    def _client(self, name: str) -> RpcClient:
        if name not in self._clients:
            endpoint = self._ray_control if name == RAY else self.endpoints.control[name]
            self._clients[name] = RpcClient(endpoint, keys=self._keys)
        return self._clients[name]

    @property
    def _ray_control(self) -> str:
        return f"ipc://{self._scratch.path}/{RAY}.rpc"

    def _with_ray(self) -> list[NodeSpec]:
        """Return what is a process beside Ray, and the node that has Ray host the others."""
        beside = [spec for spec in self.specs if spec.name in BESIDE]
        options = {
            "specs": [spec.to_json() for spec in self.specs if spec.name not in BESIDE],
            "beside": [spec.to_json() for spec in beside],
            "address": self._address,
            "resources": self._custom_resources(),
        }
        target = "openhelix.runtime.launch.actors:RayNode"
        return [*beside, NodeSpec(RAY, target, self._ray_control, options, restart=False)]

    def _custom_resources(self) -> dict[str, float]:
        total: dict[str, float] = {}
        for spec in self.specs:
            for resource, amount in spec.resources.items():
                total[resource] = total.get(resource, 0.0) + amount
        return total


def _told(name: str, verb: str, error: str) -> str:
    """Return a node's error with its name; what Ray refuses names the part itself."""
    return error if name == RAY else f"{name}{verb}{error}"
