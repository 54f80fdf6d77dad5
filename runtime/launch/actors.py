"""The graph as Ray actors: Ray places, monitors and restarts them.

Ray's driver is a process of its own, the node "ray" of the run's graph (`RayNode`). What befalls
Ray (a lost GCS ends its drivers on the spot, a dead agent all its workers) or takes it long
(a cluster that does not answer) does not befall the command. The command, the control loop and the
observer are no actors: the robot stops whatever becomes of Ray.

Nothing of a run travels through Ray: each actor hosts a `NodeRunner`, which speaks
ZeroMQ. An actor that is killed is restarted by Ray with the same `NodeSpec`, binds the same
endpoints, and its peers reconnect automatically. On a cluster the same applies to a lost host:
the actor waits until a host with its resources is available again.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import psutil
import ray
from ray._private.services import canonicalize_bootstrap_address_or_die
from ray.exceptions import AuthenticationError, RayActorError, RpcError
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from openhelix.runtime.core.config import CommandFailed, ConfigError
from openhelix.runtime.launch.graph import no_cluster
from openhelix.runtime.launch.node import NodeRunner, NodeSpec

log = logging.getLogger(__name__)
RELEASE_S = 10.0  # how long a run that has just ended may take to give back its resources
# Until Ray's processes give up a GCS that is gone. Its agents outlive their Ray by as much.
RECONNECT_S = 2
DAEMONS = ("raylet", "gcs_server")  # without one of them nothing of Ray goes on
CLOSE_S = 2.0  # for actors to end in order; what hangs is killed


class NodeActor:
    """Hosts one node; created through `ray.remote`."""

    def __init__(self, spec_json: str) -> None:
        logging.basicConfig(level=logging.INFO)
        spec = NodeSpec.from_json(spec_json)
        # Before the libraries that read it are imported, and not as Ray's `runtime_env`: a worker
        # with one is started only for its actor, and only once Ray's agent for such is up.
        os.environ.update(spec.environment)
        again = ray.get_runtime_context().was_current_actor_reconstructed
        self._runner = NodeRunner(spec, again=again)
        self._thread = threading.Thread(target=self._run, name="node")
        self._thread.start()

    def _run(self) -> None:
        if self._runner.run() == "failed":
            os._exit(1)  # a crash as Ray understands it: the actor is started again

    def alive(self) -> bool:
        """Whether the node is still working; also tells that the actor is placed."""
        return self._thread.is_alive()

    def watch(self) -> None:
        """Return when the node has ended."""
        self._thread.join()

    def stop(self) -> None:
        self._runner.stop()
        self._thread.join(timeout=5.0)


class RayNode:
    """The node "ray" of a run's graph: has Ray host the others; see `node.Node`.

    Args:
        specs: what Ray is to host, as `NodeSpec.to_json` gives it.
        beside: the nodes that the command hosts itself; their resources are reserved.
        address: of a cluster, "auto" or "HOST:PORT"; None makes one on this host.
        resources: custom resources that a cluster made here offers.
    """

    def __init__(
        self,
        specs: Sequence[str],
        beside: Sequence[str],
        address: str | None,
        resources: dict[str, float],
    ) -> None:
        self._specs = [NodeSpec.from_json(text) for text in specs]
        self._beside = [NodeSpec.from_json(text) for text in beside]
        self._address, self._resources = address, resources
        self._connected = False
        self._actors: dict[str, Any] = {}
        self._watches: dict[str, Any] = {}  # of the nodes that are not started again
        self._ended: dict[str, str] = {}
        self._daemons: dict[str, psutil.Process] = {}  # of a cluster made here

    def setup(self) -> None:
        """Connect and place the nodes.

        Raises:
            CommandFailed: no cluster answers, or it does not take this host's token.
            ConfigError: no host of the cluster offers what a node asks for.
        """
        on_sigterm = signal.getsignal(signal.SIGTERM)
        self._connect()
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray has taken it
        self._connected = True
        if self._address is None:
            children = psutil.Process().children()
            self._daemons = {p.name(): p for p in children if p.name() in DAEMONS}
        here = ray.get_runtime_context().get_node_id()
        everywhere = [*self._specs, *self._beside]
        if self._address is not None:
            check_offers(everywhere, ray.nodes(), here)
            check_free(everywhere, ray.available_resources)
            for spec in self._beside:
                reserve(spec, here)
        for spec in self._specs:
            self._place(spec, here)

    def run(self, stop: threading.Event) -> None:
        while not stop.wait(0.1):
            gone = [name for name, process in self._daemons.items() if not _lives(process)]
            if gone:
                # Its workers die with it and are not started again, which Ray's driver does not
                # notice for long; and to be shut down takes it as long.
                log.error("Ray's %s has ended, and what it hosted with it", " and ".join(gone))
                os._exit(1)
            self._ended = self._find_ended()

    def health(self) -> dict[str, Any]:
        """Return whether Ray is there, and which nodes died that are not started again."""
        return {"connected": self._connected, "ended": dict(self._ended)}

    def handlers(self) -> Mapping[str, Callable[[dict[str, Any]], dict[str, Any]]]:
        return {}

    def close(self) -> None:
        """Stop the actors, then this driver's part of Ray."""
        if not self._connected:
            return
        self._connected = False
        stops = [actor.stop.remote() for actor in self._actors.values()]
        ray.wait(stops, num_returns=len(stops), timeout=CLOSE_S) if stops else None
        for actor in self._actors.values():
            ray.kill(actor, no_restart=True)
        ray.shutdown()

    def _connect(self) -> None:
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if self._address is None:
            os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", str(RECONNECT_S))
            # A machine with few cores still hosts every process: shares, not limits.
            options |= {
                "address": "local",
                "num_cpus": max(4, os.cpu_count() or 1),
                "resources": self._resources,
                "include_dashboard": False,
            }
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        if self._address is None:
            ray.init(**options)
        else:
            join(self._address, **options)

    def _place(self, spec: NodeSpec, here: str) -> None:
        pinned = self._address is not None and spec.here
        actor = ray.remote(NodeActor).options(
            name=f"openhelix-{os.getpid()}-{spec.name}",
            num_cpus=spec.cpus,
            num_gpus=spec.gpus,
            resources=spec.resources,
            max_restarts=-1 if spec.restart else 0,
            max_concurrency=4,
            scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=False)
            if pinned
            else "DEFAULT",
        )
        self._actors[spec.name] = actor.remote(spec.to_json())
        if not spec.restart:
            self._watches[spec.name] = self._actors[spec.name].watch.remote()

    def _find_ended(self) -> dict[str, str]:
        found = {}
        for name, watch in self._watches.items():
            if ray.wait([watch], timeout=0)[0]:
                try:
                    ray.get(watch)
                except RayActorError:
                    found[name] = "died"
        return found


def join(address: str, **options: Any) -> None:
    """Make this process a driver of a cluster that runs.

    Args:
        address: as `graph.cluster_address` gives it, and looked at by `graph.probe_cluster`.
        options: of `ray.init`.

    Raises:
        CommandFailed: no cluster answers, or it does not take this host's token.
    """
    try:
        # `init` would ask again for half a minute before it says that a token is wrong.
        ray._raylet.GcsClient(address=canonicalize_bootstrap_address_or_die(address))
        ray.init(address=address, **options)
    except AuthenticationError as error:
        text = " ".join(str(error).split(".")[0].split())
        raise CommandFailed(
            f"ray_address: {text}; this host needs the cluster's token in ~/.ray/auth_token, and "
            "RAY_AUTH_MODE=token in the environment"
        ) from None
    except (ConnectionError, RpcError):
        raise CommandFailed(no_cluster(address)) from None


def _lives(process: psutil.Process) -> bool:
    """Whether it works; one that has ended is there until its parent, Ray, asks for it."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def reserve(spec: NodeSpec, here: str) -> None:
    """Hold what a node on this host asks of the cluster, for as long as this driver lives.

    Raises:
        ConfigError: another run has just taken it.
    """
    bundle = {name: amount for name, amount in _wanted(spec).items() if name != "CPU"}
    if not bundle:
        return
    (address,) = [host["NodeManagerAddress"] for host in ray.nodes() if host["NodeID"] == here]
    group = placement_group([bundle | {f"node:{address}": 0.001}])
    if not group.wait(RELEASE_S):
        raise ConfigError(f"{spec.name}.placement: {next(iter(bundle))} is in use by another run")


def check_offers(specs: Iterable[NodeSpec], hosts: Sequence[Mapping[str, Any]], here: str) -> None:
    """Refuse nodes for which there is no host, rather than let Ray wait for one for ever.

    Args:
        specs: the nodes.
        hosts: as `ray.nodes()` gives them.
        here: Ray's identity of this host.

    Raises:
        ConfigError: names the node, what it asks for, and what there is.
    """
    alive = [host for host in hosts if host["Alive"]]
    for spec in specs:
        wanted = _wanted(spec)
        able = [host for host in alive if not spec.here or host["NodeID"] == here]
        if not any(_offers(host["Resources"], wanted) for host in able):
            where = "this host does not offer" if spec.here else "no host of the cluster offers"
            raise ConfigError(
                f"{spec.name}.placement: {where} {_written(wanted)}; there are "
                + "; ".join(
                    f"{host['NodeManagerAddress']} with {_written(host['Resources'])}"
                    for host in able
                )
            )


def check_free(
    specs: Iterable[NodeSpec],
    available: Callable[[], Mapping[str, float]],
    patience_s: float = RELEASE_S,
) -> None:
    """Refuse custom resources and GPUs that other runs hold.

    Args:
        specs: the nodes.
        available: what the whole cluster has free now.
        patience_s: how long to wait for what is just being given back.

    Raises:
        ConfigError: names the node and the resource.
    """
    give_up_s = time.monotonic() + patience_s
    wanted: dict[str, tuple[str, float]] = {}
    for spec in specs:
        for name, amount in _wanted(spec).items():
            if name != "CPU":  # shares, which several runs may overdraw one after the other
                wanted[name] = (spec.name, wanted.get(name, ("", 0.0))[1] + amount)
    while True:
        free = available()
        short = [name for name, (_, amount) in wanted.items() if free.get(name, 0.0) < amount]
        if not short:
            return
        if time.monotonic() > give_up_s:
            raise ConfigError(
                f"{wanted[short[0]][0]}.placement: {short[0]} is in use by another run"
            )
        time.sleep(0.25)


def _wanted(spec: NodeSpec) -> dict[str, float]:
    asked = {"CPU": spec.cpus, "GPU": spec.gpus, **spec.resources}
    return {name: amount for name, amount in asked.items() if amount > 0}


def _offers(offered: Mapping[str, float], wanted: Mapping[str, float]) -> bool:
    return all(offered.get(name, 0.0) >= amount for name, amount in wanted.items())


def _written(resources: Mapping[str, float]) -> str:
    """Return what a person cares for: no memory, no names of single hosts."""
    shown = {
        name: amount
        for name, amount in sorted(resources.items())
        if ":" not in name and not name.endswith("memory")
    }
    return ", ".join(f"{name} {amount:g}" for name, amount in shown.items()) or "nothing"
