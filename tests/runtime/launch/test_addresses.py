"""What is beside the robot listens on Unix sockets; what is elsewhere on TCP."""

from __future__ import annotations

from pathlib import Path

import pytest

from openhelix.runtime.core.config import ConfigError, RunConfig, load
from openhelix.runtime.launch.graph import CHANNELS, NODES, Endpoints, Graph, stays
from openhelix.runtime.transport.sockets import BindRefused, ConnectRefused

CLUSTER = ("ray_address=auto", "transport.keys=~/keys")


def config(*overrides: str) -> RunConfig:
    return load(None, overrides)


def test_on_one_host_everything_is_a_unix_socket(tmp_path: Path) -> None:
    ends = Endpoints.of(config(), tmp_path)
    addresses = [*ends.channels.values(), *ends.control.values()]
    assert all(address.startswith(f"ipc://{tmp_path}/") for address in addresses)
    assert len(set(addresses)) == len(CHANNELS) + len(NODES)
    assert all(stays(config(), name) for name in NODES)


def test_only_what_is_elsewhere_is_on_the_network(tmp_path: Path) -> None:
    run = config(*CLUSTER, "transport.hosts={system2: 10.0.0.2}", "transport.base_port=7000")
    ends = Endpoints.of(run, tmp_path)
    assert ends.channels["requests"] == "tcp://10.0.0.2:7000"
    assert ends.channels["latents"] == "tcp://10.0.0.2:7001"
    assert ends.control["system2"].startswith("tcp://10.0.0.2:")
    others = [a for name, a in ends.channels.items() if CHANNELS[name] != "system2"]
    others += [a for name, a in ends.control.items() if name != "system2"]
    assert len(others) == 11 and all(address.startswith("ipc://") for address in others)
    assert [name for name in NODES if not stays(run, name)] == ["system2"]


def test_ports_never_meet(tmp_path: Path) -> None:
    ends = Endpoints.of(config(*CLUSTER, "transport.host=10.0.0.1"), tmp_path)
    addresses = [*ends.channels.values(), *ends.control.values()]
    assert len(set(addresses)) == len(addresses)
    run = config("transport.host=10.0.0.1")
    assert [name for name in NODES if stays(run, name)] == ["control", "observer"]


def test_a_shared_system2_replaces_the_own_one(tmp_path: Path) -> None:
    ends = Endpoints.of(config("system2.connect=tcp://10.0.0.2:5800"), tmp_path)
    assert ends.control["system2"] == "tcp://10.0.0.2:5800"
    assert ends.channels["requests"] == "tcp://10.0.0.2:5801"
    assert ends.channels["latents"] == "tcp://10.0.0.2:5802"
    assert ends.channels["plans"].startswith("ipc://")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["transport.hosts={sytem2: 10.0.0.2}"], r"transport\.hosts\.sytem2: no such node"),
        (["transport.hosts={control: 10.0.0.2}"], r"transport\.hosts\.control: stays"),
        (["transport.hosts={world: 10.0.0.2}"], "world and camera go together"),
        (["transport.hosts={system2: 10.0.0.2}", "ray_address=null"], "takes a cluster"),
        (["transport.hosts={system2: 10.0.0.2}", "ray=false"], "takes a cluster"),
    ],
)
def test_hosts_that_cannot_work_are_refused(
    tmp_path: Path, overrides: list[str], expected: str
) -> None:
    with pytest.raises(ConfigError, match=expected):
        Endpoints.of(config(*CLUSTER, *overrides), tmp_path)


def test_without_keys_no_run_listens_to_others_or_trusts_a_system2_elsewhere(
    tmp_path: Path,
) -> None:
    job = {"assignments": [], "initial": None}
    with pytest.raises(ConnectRefused, match="refusing to trust another host"):
        Graph(config("system2.connect=tcp://10.0.0.2:5800"), job, tmp_path)
    with pytest.raises(BindRefused, match="refusing to bind beyond this host"):
        Graph(config("transport.host=0.0.0.0"), job, tmp_path)
