"""Questions are answered once, in time or not at all; nothing kills the server."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from openhelix.runtime.core.config import ConfigError
from openhelix.runtime.transport.codec import WireError, encode_dict
from openhelix.runtime.transport.rpc import (
    RpcClient,
    RpcError,
    RpcInvalid,
    RpcLost,
    RpcServer,
    RpcTimeout,
)
from openhelix.runtime.transport.sockets import BindRefused

PATIENCE_S = 20.0


class Service:
    """Handlers that remember what they were asked."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.gate = threading.Event()

    def handlers(self) -> dict[str, Callable[[dict[str, Any]], dict[str, Any]]]:
        return {
            "echo": self.echo,
            "crash": self.crash,
            "refuse": self.refuse,
            "forbid": self.forbid,
            "nothing": lambda args: None,  # type: ignore[dict-item,return-value]
            "opaque": lambda args: {"x": object()},
            "block": self.block,
        }

    def echo(self, args: dict[str, Any]) -> dict[str, Any]:
        self.asked.append(args)
        return args

    def crash(self, args: dict[str, Any]) -> dict[str, Any]:
        raise RuntimeError("first line\nsecond line")

    def refuse(self, args: dict[str, Any]) -> dict[str, Any]:
        raise ValueError("speed: 9 is above 2")

    def forbid(self, args: dict[str, Any]) -> dict[str, Any]:
        raise ConfigError("speed: 9 is above 2\nat most 2")

    def block(self, args: dict[str, Any]) -> dict[str, Any]:
        self.gate.wait(PATIENCE_S)
        return {}


@pytest.fixture
def service() -> Service:
    return Service()


@pytest.fixture
def endpoint(tmp_path: Path) -> str:
    return f"ipc://{tmp_path}/rpc"


@pytest.fixture
def server(service: Service, endpoint: str) -> Iterator[RpcServer]:
    server = RpcServer(endpoint, service.handlers())
    server.start()
    yield server
    service.gate.set()
    server.close()


@pytest.fixture
def client(server: RpcServer, endpoint: str) -> Iterator[RpcClient]:
    client = RpcClient(endpoint)
    yield client
    client.close()


def test_values_and_arrays_go_there_and_back(client: RpcClient) -> None:
    args = {"n": 3, "list": [1, {"deep": None}], "z": np.arange(1000.0), "text": "ü"}
    got = client.call("echo", args, timeout_s=PATIENCE_S)
    assert (got["z"] == args["z"]).all()
    assert (got["n"], got["list"], got["text"]) == (3, [1, {"deep": None}], "ü")
    assert client.call("echo", timeout_s=PATIENCE_S) == {}


def test_ping_and_time_are_always_there(client: RpcClient) -> None:
    ping = client.call("ping", timeout_s=PATIENCE_S)
    times = client.call("time", timeout_s=PATIENCE_S)
    assert ping["source"] == times["source"]
    assert times["t_received_ns"] <= times["t_sent_ns"] <= time.monotonic_ns()


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("crash", r"^RuntimeError: first line second line$"),
        ("refuse", r"^ValueError: speed: 9 is above 2$"),
        ("missing", r"no method 'missing'; there are .*echo"),
        ("nothing", r"not a dict"),
        ("opaque", r"object cannot travel"),
    ],
)
def test_errors_come_back_as_one_line(client: RpcClient, method: str, message: str) -> None:
    with pytest.raises(RpcError, match=message):
        client.call(method, timeout_s=PATIENCE_S)
    assert client.call("echo", {"still": "alive"}, timeout_s=PATIENCE_S) == {"still": "alive"}


def test_what_is_wrong_with_the_request_is_told_without_a_type(client: RpcClient) -> None:
    with pytest.raises(RpcInvalid, match=r"^speed: 9 is above 2 at most 2$"):
        client.call("forbid", timeout_s=PATIENCE_S)
    with pytest.raises(RpcError) as other:
        client.call("refuse", timeout_s=PATIENCE_S)
    assert not isinstance(other.value, RpcInvalid)


def test_arguments_that_cannot_travel_are_refused_here(client: RpcClient) -> None:
    with pytest.raises(WireError):
        client.call("echo", {"x": object()})
    assert client.call("echo", {}, timeout_s=PATIENCE_S) == {}


def test_a_late_answer_belongs_to_no_later_question(client: RpcClient, service: Service) -> None:
    with pytest.raises(RpcTimeout, match=r"'block' within 0\.05 s"):
        client.call("block", timeout_s=0.05)
    service.gate.set()
    assert client.call("echo", {"n": 1}, timeout_s=PATIENCE_S) == {"n": 1}


def test_a_question_that_timed_out_is_never_delivered(service: Service, endpoint: str) -> None:
    client = RpcClient(endpoint)
    with pytest.raises(RpcTimeout):
        client.call("echo", {"late": True}, timeout_s=0.05)
    server = RpcServer(endpoint, service.handlers())
    server.start()
    try:
        assert client.call("echo", {"late": False}, timeout_s=PATIENCE_S) == {"late": False}
        assert service.asked == [{"late": False}]
    finally:
        client.close()
        server.close()


def answered(client: RpcClient) -> dict[str, Any]:
    """Ask again: what was sent before the client knew that its server had gone is lost."""
    for _ in range(round(PATIENCE_S)):
        with contextlib.suppress(RpcTimeout):
            return client.call("ping", timeout_s=1.0)
    raise AssertionError("no answer")


def test_a_client_survives_restarts_of_its_server(service: Service, endpoint: str) -> None:
    client = RpcClient(endpoint)
    sources = set()
    for _ in range(3):
        server = RpcServer(endpoint, service.handlers())
        server.start()
        sources.add(answered(client)["source"])
        server.close()
    client.close()
    assert len(sources) == 3


def test_who_waits_for_a_server_that_ends_is_told_at_once(endpoint: str) -> None:
    """Whoever asked may have a robot to stop: it must not wait out its whole time."""
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.bind(endpoint)
        client = RpcClient(endpoint)

        def end() -> None:
            router.recv_multipart()
            router.close(linger=0)

        ending = threading.Thread(target=end)
        ending.start()
        begun_s = time.monotonic()
        with pytest.raises(RpcLost, match="went away before it answered 'echo'"):
            client.call("echo", timeout_s=10 * PATIENCE_S)
        assert time.monotonic() - begun_s < PATIENCE_S
        ending.join()
        client.close()


def test_a_closed_client_opens_again(client: RpcClient) -> None:
    client.close()
    assert client.call("echo", {"n": 2}, timeout_s=PATIENCE_S) == {"n": 2}


def test_threads_share_a_client(client: RpcClient) -> None:
    wrong: list[int] = []

    def ask(n: int) -> None:
        for _ in range(20):
            if client.call("echo", {"n": n}, timeout_s=PATIENCE_S) != {"n": n}:
                wrong.append(n)

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_server_can_be_polled_from_a_loop(service: Service, endpoint: str) -> None:
    server = RpcServer(endpoint, service.handlers())
    client = RpcClient(endpoint)
    answers: list[dict[str, Any]] = []
    thread = threading.Thread(
        target=lambda: answers.append(client.call("echo", {"n": 1}, timeout_s=PATIENCE_S))
    )
    thread.start()
    while thread.is_alive():
        server.poll(0.01)
    assert answers == [{"n": 1}]
    assert server.poll() == 0
    client.close()
    server.close()
    server.close()  # twice is fine


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.lists(st.lists(st.binary(max_size=60), min_size=1, max_size=5), min_size=1, max_size=4))
def test_hostile_requests_are_counted_and_survived(
    server: RpcServer, client: RpcClient, endpoint: str, messages: list[list[bytes]]
) -> None:
    raw = zmq.Context.instance().socket(zmq.DEALER)
    raw.connect(endpoint)
    for frames in messages:
        raw.send_multipart(frames)
    before = sum(server.dropped.values())
    raw.send_multipart([b"12345678", b"OH"])  # surely bad, and answered when all else was read
    assert raw.poll(int(PATIENCE_S * 1e3))
    while raw.recv_multipart()[0] != b"12345678":
        assert raw.poll(int(PATIENCE_S * 1e3))
    assert sum(server.dropped.values()) > before
    assert client.call("echo", {"n": 1}, timeout_s=PATIENCE_S) == {"n": 1}
    raw.close(linger=0)


@pytest.mark.parametrize("body", [{}, {"method": 1, "args": {}}, {"method": "echo", "args": []}])
def test_incomplete_requests_are_answered(
    server: RpcServer, endpoint: str, body: dict[str, Any]
) -> None:
    raw = zmq.Context.instance().socket(zmq.DEALER)
    raw.connect(endpoint)
    raw.send_multipart([b"12345678", *encode_dict("call", body)])
    assert raw.poll(int(PATIENCE_S * 1e3))
    assert b"unreadable request (field)" in raw.recv_multipart()[1]
    raw.close(linger=0)


def test_a_lying_server_is_an_error(endpoint: str) -> None:
    raw = zmq.Context.instance().socket(zmq.ROUTER)
    raw.bind(endpoint)
    replies = [
        [b"garbage"],
        [],
        [bytes(f) for f in encode_dict("ok", {"result": 5})],
        [bytes(f) for f in encode_dict("ok", {})],
        [bytes(f) for f in encode_dict("other", {})],
    ]

    def lie() -> None:
        for reply in replies:
            route, number, *_ = raw.recv_multipart()
            raw.send_multipart([route, b"\xff" * 8, b"not yours"])
            raw.send_multipart([route, number, *reply])

    thread = threading.Thread(target=lie)
    thread.start()
    client = RpcClient(endpoint)
    for _ in replies:
        with pytest.raises(RpcError, match=r"unreadable answer|not a dict"):
            client.call("echo", timeout_s=PATIENCE_S)
    thread.join()
    client.close()
    raw.close(linger=0)


def test_an_endpoint_in_use_is_named(server: RpcServer, endpoint: str) -> None:
    with pytest.raises(ValueError, match="in use"):
        RpcServer(endpoint, {})


def test_the_network_needs_keys() -> None:
    with pytest.raises(BindRefused, match="openhelix keys"):
        RpcServer("tcp://*:5998", {})
