"""Right keys get in, wrong ones and none do not, and both are counted."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import zmq

from openhelix.runtime.core.interfaces import LatentGoal
from openhelix.runtime.transport.rpc import RpcClient, RpcRefused, RpcServer, RpcTimeout
from openhelix.runtime.transport.sockets import (
    CurveClient,
    CurveServer,
    KeyFileError,
    generate,
    load,
)
from openhelix.runtime.transport.wire import NewestReader, Publisher
from tests.keys import key_folders
from tests.runtime.wire_ports import PATIENCE_S, until

LATENT = LatentGoal(np.zeros((1, 4), np.float32), 0, 0, 0, 0, "")


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    return key_folders(tmp_path)


def test_keys_are_written_for_their_owner_alone(tmp_path: Path) -> None:
    pair = generate(tmp_path / "keys", "arm1")
    secret = tmp_path / "keys" / "arm1.secret"
    assert secret.stat().st_mode & 0o777 == 0o600
    assert load(tmp_path / "keys", "arm1") == pair
    assert pair.secret.decode() not in repr(pair)
    with pytest.raises(KeyFileError, match="exists already"):
        generate(tmp_path / "keys", "arm1")
    assert load(tmp_path / "keys", "arm1") == pair


@pytest.mark.parametrize("name", ["", "../x", "a b", "x" * 65])
def test_names_are_plain(tmp_path: Path, name: str) -> None:
    with pytest.raises(KeyFileError, match="name"):
        generate(tmp_path, name)


def test_unusable_keys_are_named(tmp_path: Path) -> None:
    with pytest.raises(KeyFileError, match=r"server\.secret.*openhelix keys"):
        CurveServer(tmp_path)
    with pytest.raises(KeyFileError, match=r"server\.public"):
        CurveClient(tmp_path)
    generate(tmp_path, "a")
    (tmp_path / "a.secret").chmod(0o644)
    with pytest.raises(KeyFileError, match="chmod 600"):
        load(tmp_path, "a")
    (tmp_path / "a.secret").chmod(0o600)
    (tmp_path / "a.public").write_bytes(zmq.curve_keypair()[0])
    with pytest.raises(KeyFileError, match="does not belong"):
        load(tmp_path, "a")
    (tmp_path / "b.secret").write_text("short")
    with pytest.raises(KeyFileError, match="40 characters"):
        load(tmp_path, "b")


def test_a_client_with_several_secrets_must_choose(folders: dict[str, Path]) -> None:
    generate(folders["known"], "second")
    with pytest.raises(KeyFileError, match="known, second"):
        CurveClient(folders["known"])
    CurveClient(folders["known"], "known").close()


def test_only_listed_clients_are_answered(folders: dict[str, Path]) -> None:
    gate = CurveServer(folders["server"])
    server = RpcServer("tcp://127.0.0.1:*", {"echo": lambda args: args}, keys=gate)
    server.start()
    known = RpcClient(server.bound, keys=folders["known"])
    assert known.call("echo", {"n": 1}, timeout_s=PATIENCE_S) == {"n": 1}
    assert gate.admitted["known"] >= 1
    for keys, reason in (
        (folders["unknown"], "refuses this host's CURVE key"),
        (folders["misled"], r"not the server of server\.public"),
        (None, "no answer"),
    ):
        stranger = RpcClient(server.bound, keys=keys)

        def told(stranger: RpcClient = stranger) -> RpcTimeout:
            with pytest.raises(RpcTimeout) as error:
                stranger.call("echo", {"n": 2}, timeout_s=0.6)
            return error.value

        if keys is not None:  # a machine may take longer than one call to refuse
            until(lambda told=told: isinstance(told(), RpcRefused))
        said = told()
        assert isinstance(said, RpcRefused) == (keys is not None)
        assert re.search(reason, str(said))
        stranger.close()
    until(lambda: gate.refused >= 1)
    assert gate.admitted.keys() == {"known"}
    assert known.call("echo", {"n": 3}, timeout_s=PATIENCE_S) == {"n": 3}
    known.close()
    server.close()
    gate.close()
    gate.close()  # twice is fine


class SlowWay:
    """A TCP port that leads to another one; every piece of data takes `delay_s` longer."""

    def __init__(self, port: int, delay_s: float) -> None:
        self._port, self._delay_s = port, delay_s
        self._door = socket.create_server(("127.0.0.1", 0))
        self.port = self._door.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._door.accept()
                far = socket.create_connection(("127.0.0.1", self._port))
                for ends in ((near, far), (far, near)):
                    threading.Thread(target=self._carry, args=ends, daemon=True).start()

    def _carry(self, come: socket.socket, go: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := come.recv(65536):
                time.sleep(self._delay_s)
                go.sendall(data)
            go.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self._door.close()


def test_on_a_slow_way_a_connection_comes_about_over_several_calls(
    folders: dict[str, Path],
) -> None:
    server = RpcServer("tcp://127.0.0.1:*", {"echo": lambda args: args}, keys=folders["server"])
    server.start()
    way = SlowWay(int(server.bound.rpartition(":")[2]), delay_s=0.1)
    client = RpcClient(f"tcp://127.0.0.1:{way.port}", keys=folders["known"])
    with pytest.raises(RpcTimeout):
        client.call("echo", {"n": 1}, timeout_s=0.1)  # the handshake alone takes longer

    def heard() -> bool:
        try:
            return client.call("echo", {"n": 2}, timeout_s=0.3) == {"n": 2}
        except RpcRefused:
            raise
        except RpcTimeout:
            return False

    until(heard)
    client.close()
    way.close()
    server.close()


def test_only_listed_readers_hear_a_publisher(folders: dict[str, Path]) -> None:
    publisher = Publisher("tcp://127.0.0.1:*", "z", keys=folders["server"])
    known = NewestReader(publisher.bound, "z", LatentGoal, keys=folders["known"])
    others = [
        NewestReader(publisher.bound, "z", LatentGoal, keys=keys)
        for keys in (folders["unknown"], folders["misled"], None)
    ]
    heard = 0

    def often() -> bool:
        nonlocal heard
        publisher.send(LATENT)
        heard += known.poll() is not None
        assert all(reader.poll() is None for reader in others)
        return heard > 20

    until(often)
    for port in (publisher, known, *others):
        port.close()


def test_robots_reach_a_server_that_binds_the_readers(folders: dict[str, Path]) -> None:
    reader = NewestReader("tcp://127.0.0.1:*", "z", LatentGoal, bind=True, keys=folders["server"])
    stranger = Publisher(reader.bound, "z", bind=False, keys=folders["unknown"])
    known = Publisher(reader.bound, "z", bind=False, keys=folders["known"])

    def heard() -> bool:
        stranger.send(LATENT)
        known.send(LATENT)
        return reader.poll() is not None and reader.stats.delivered > 20

    until(heard)
    assert reader.stats.restarts == 0  # one publisher only was ever heard
    assert reader.envelope is not None
    assert f"{reader.envelope.source:016x}" == known.source
    for port in (reader, stranger, known):
        port.close()
