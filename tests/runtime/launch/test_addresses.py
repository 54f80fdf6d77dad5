"""What is beside the robot listens on Unix sockets; what is elsewhere on TCP."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from openhelix.runtime.core.config import ConfigError, RunConfig, load
from openhelix.runtime.launch import graph
from openhelix.runtime.launch.graph import (
    CHANNELS,
    NODES,
    Endpoints,
    Graph,
    stays,
    with_free_ports,
)
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


# Ports -------------------------------------------------------------------------------------------


@pytest.fixture
def taken() -> Iterator[int]:
    """The third of five ports in a row that nobody else has."""
    for first in range(21_000, 29_000, 10):
        with ExitStack() as stack:
            try:
                for port in range(first, first + 10):
                    probe = stack.enter_context(socket.socket())
                    probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        with socket.socket() as mine:
            mine.bind(("127.0.0.1", first + 2))
            mine.listen()
            yield first
            return
    raise AssertionError("no ports are free")


def test_a_second_run_takes_the_next_free_ports_and_says_so(
    taken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph, "METRICS_PARTS", ("a", "b", "c"))
    plain = config()
    unasked = plain.output.model_copy(update={"metrics_port": taken})
    unasked.model_fields_set.discard("metrics_port")  # as if it were the default
    found, told = with_free_ports(plain.model_copy(update={"output": unasked}))
    assert found.output.metrics_port is not None and found.output.metrics_port >= taken + 10
    assert f"{taken} is in use" in told and str(found.output.metrics_port) in told
    assert with_free_ports(found) == (found, "")


def test_a_port_that_was_asked_for_is_not_exchanged_for_another(taken: int) -> None:
    with pytest.raises(ConfigError, match=rf"output.metrics_port: {taken} .* in use; \d+ is free"):
        with_free_ports(config(f"output.metrics_port={taken}"))
    for port in ("0", "null"):
        assert with_free_ports(config(f"output.metrics_port={port}"))[1] == ""


def test_taken_ports_of_the_processes_are_told_before_anything_starts(taken: int) -> None:
    words = ("transport.host=127.0.0.1", f"transport.base_port={taken}", "output.metrics_port=0")
    with pytest.raises(ConfigError, match=rf"transport.base_port: {taken} at 127.0.0.1 is in use"):
        with_free_ports(config(*words))
