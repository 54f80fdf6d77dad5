"""Only local endpoints go without keys; ipc paths fit, and dead sockets are cleared away."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from openhelix.runtime.transport.sockets import (
    BindRefused,
    ConnectRefused,
    EndpointRefused,
    check_bind,
    check_connect,
    is_listening,
    is_local,
)


@pytest.mark.parametrize(
    "endpoint",
    [
        "ipc:///tmp/a.sock",
        "inproc://a",
        "tcp://127.0.0.1:5",
        "tcp://127.3.2.1:*",
        "tcp://localhost:80",
        "tcp://[::1]:80",
    ],
)
def test_local_endpoints_need_no_keys(endpoint: str) -> None:
    check_bind(endpoint, None)
    check_connect(endpoint, None)


@pytest.mark.parametrize(
    "endpoint",
    [
        "tcp://*:5",
        "tcp://0.0.0.0:5",
        "tcp://[::]:5",
        "tcp://192.168.1.4:5",
        "tcp://robot.example:5",
        "tcp://eth0:5",
        "tcp://localhost.example:5",
        "tcp://127.0.0.1;10.0.0.1:5",
        "tcp://10.0.0.1;127.0.0.1:5",
        "tcp://127.0.0.1:5@10.0.0.1:5",
    ],
)
def test_others_need_keys(endpoint: str) -> None:
    with pytest.raises(BindRefused, match="openhelix keys"):
        check_bind(endpoint, None)
    with pytest.raises(ConnectRefused, match="openhelix keys"):
        check_connect(endpoint, None)
    check_bind(endpoint, "keys")
    check_connect(endpoint, "keys")


@pytest.mark.parametrize(
    "endpoint", ["", "tcp:", "http://x", "udp://1.2.3.4:5", "ipc://", "ipc:///" + "x" * 120]
)
def test_unusable_endpoints_are_refused_in_one_line(endpoint: str) -> None:
    with pytest.raises(EndpointRefused) as caught:
        is_local(endpoint)
    assert "\n" not in str(caught.value)


def test_dead_sockets_are_removed_and_living_ones_kept(tmp_path: Path) -> None:
    path = tmp_path / "s.sock"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    assert is_listening(f"ipc://{path}")
    assert path.exists()
    listener.close()
    assert not is_listening(f"ipc://{path}")
    assert not path.exists()


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "s.sock"
    path.write_text("mine")
    assert not is_listening(f"ipc://{path}")
    assert not is_listening(f"ipc://{tmp_path / 'missing'}")
    assert not is_listening("tcp://127.0.0.1:1")
    assert path.read_text() == "mine"
