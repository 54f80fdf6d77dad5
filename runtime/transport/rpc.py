"""Low-rate request and reply: the control plane.

ROUTER and DEALER with numbered requests instead of REQ and REP, so that a lost answer, a
late answer or a restarted server never leaves either side stuck. A request that timed out is
taken back: its socket is dropped with everything still queued on it, so a command cannot
arrive after its sender has given up. Arguments and results are dicts of plain values and
arrays (`codec.encode_dict`). A handler that raises is answered with one line.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Final

import zmq
from zmq.utils.monitor import recv_monitor_message

from openhelix.runtime.core.config import ConfigError
from openhelix.runtime.transport.codec import (
    MAX_FRAMES,
    VERSION,
    Buffer,
    WireError,
    decode_dict,
    encode_dict,
)
from openhelix.runtime.transport.sockets import Keys, Port

Handler = Callable[[dict[str, Any]], dict[str, Any]]
MAX_PER_POLL: Final = 64
_POLL_S: Final = 0.1  # how soon the server's thread notices that it should stop
_JOIN_S: Final = 5.0
_LOOK_MS: Final = 100  # how soon one who waits notices that its server has gone
_HANDSHAKES: Final = 3  # that fail one after the other, until the keys are to blame
_FAILED: Final = (
    zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)
log = logging.getLogger(__name__)


class RpcError(RuntimeError):
    """The server refused or failed; the message is its one line."""


class RpcInvalid(RpcError):
    """What was asked for is wrong; the message names the field and what is valid."""


class RpcTimeout(RpcError):
    """No answer came in time."""


class RpcLost(RpcTimeout):
    """The connection broke after the question was sent: its answer will not come."""


class RpcRefused(RpcTimeout):
    """There is no secure connection, and trying again with the same keys will not make one."""


class RpcServer:
    """Answers requests, either in a thread of its own (`start`) or inside a loop (`poll`).

    Two methods are always there: `ping`, and `time`, from which a client can estimate the
    offset of its clock. A slow handler delays the others.

    Args:
        endpoint: where to bind; beyond this host only with keys.
        handlers: by method name.
        keys: CURVE keys; a folder, or an object that several sockets share.

    Raises:
        EndpointRefused: the endpoint needs keys, or cannot be used.
        ValueError: the endpoint is in use.
    """

    def __init__(
        self, endpoint: str, handlers: Mapping[str, Handler], *, keys: Keys | None = None
    ) -> None:
        self._port = Port(zmq.ROUTER, endpoint, bind=True, keys=keys)
        self._source = os.urandom(8).hex()
        self._handlers: dict[str, Handler] = {"ping": self._ping, **handlers}
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.served = 0
        self.dropped: Counter[str] = Counter()  # requests that could not be read, by reason

    @property
    def bound(self) -> str:
        """The endpoint really bound, for example after asking for port `*`."""
        return self._port.bound

    def start(self) -> None:
        """Answer from a daemon thread until `close`."""
        if self._thread is not None:
            raise RuntimeError("the server has started already")
        self._thread = threading.Thread(target=self._serve, name="rpc", daemon=True)
        self._thread.start()

    def poll(self, timeout_s: float = 0.0) -> int:
        """Answer what is waiting, at most `MAX_PER_POLL`; return how many requests came.

        Do not mix with `start`.
        """
        if not self._port.socket.poll(max(0, round(timeout_s * 1e3))):
            return 0
        for count in range(MAX_PER_POLL):
            try:
                frames = self._port.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return count
            self._answer(frames, time.monotonic_ns())
        return MAX_PER_POLL

    def close(self) -> None:
        """Stop answering and release the endpoint; safe to call twice."""
        self._stop.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(_JOIN_S)
            if self._thread.is_alive():  # a handler hangs; its socket is not ours to close
                log.warning("rpc: a handler has not returned for %g s", _JOIN_S)
                return
            self._thread = None
        self._port.close()

    def _serve(self) -> None:
        while not self._stop.is_set():
            try:
                self.poll(_POLL_S)
            except zmq.ZMQError as error:
                if self._stop.is_set() or error.errno in (zmq.ETERM, zmq.ENOTSOCK):
                    return
                log.warning("rpc: %s", error)
                time.sleep(_POLL_S)

    def _answer(self, frames: list[bytes], t_received_ns: int) -> None:
        if len(frames) < 3 or len(frames[1]) != 8:
            self.dropped["truncated"] += 1
            return
        route, body = frames[:2], frames[2:]
        try:
            request = decode_dict(body[: MAX_FRAMES + 1], "call")
            method, args = request.get("method"), request.get("args")
            if type(method) is not str or type(args) is not dict:
                raise WireError("field", "a request has a method and args")
        except WireError as error:
            self.dropped[error.reason] += 1
            reply = encode_dict("error", {"message": f"unreadable request ({error.reason})"})
        else:
            reply = self._reply(method, args, t_received_ns)
        self.served += 1
        try:
            self._port.socket.send_multipart([*route, *reply], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            self.dropped["unsent"] += 1
            log.warning("rpc: an answer could not be sent: %s", error)

    def _reply(self, method: str, args: dict[str, Any], t_received_ns: int) -> list[Buffer]:
        if method == "time":
            times = {"t_received_ns": t_received_ns, "t_sent_ns": time.monotonic_ns()}
            return encode_dict("ok", {"result": times | {"source": self._source}})
        handler = self._handlers.get(method)
        try:
            if handler is None:
                names = ", ".join(sorted([*self._handlers, "time"]))
                raise LookupError(f"no method {method[:80]!r}; there are {names}")
            return encode_dict("ok", {"result": handler(args)})
        except ConfigError as error:  # the asker's mistake: its line is all there is to say
            return encode_dict("error", {"message": _line(error), "invalid": True})
        except Exception as error:  # whatever a handler does, the server answers and lives on
            if not isinstance(error, (LookupError, ValueError)):
                log.warning("rpc: %s failed", method, exc_info=True)
            return encode_dict("error", {"message": f"{type(error).__name__}: {_line(error)}"})

    def _ping(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"version": VERSION, "source": self._source, "pid": os.getpid()}


class RpcClient:
    """Asks one server; reconnects by itself. One thread at a time is served, others wait.

    Args:
        endpoint: the server's.
        keys: CURVE keys; a folder, or an object that several sockets share.
    """

    def __init__(self, endpoint: str, *, keys: Keys | None = None) -> None:
        self._endpoint, self._keys = endpoint, keys
        self._lock = threading.Lock()
        self._next = 0
        self._events: zmq.Socket[bytes] | None = None
        self._failed: Counter[int] = Counter()  # handshakes since the last answer
        self._port: Port | None = self._connect()

    def call(
        self, method: str, args: Mapping[str, Any] | None = None, timeout_s: float = 2.0
    ) -> dict[str, Any]:
        """Ask and wait for the answer.

        Raises:
            RpcTimeout: nothing came within `timeout_s`.
            RpcLost: nothing will come, for the server has ended or the way to it broke.
            RpcRefused: nothing came because the keys do not fit.
            RpcInvalid: the server says what is wrong with the arguments.
            RpcError: the server says why not.
            WireError: `args` cannot travel.
        """
        request = encode_dict("call", {"method": method, "args": dict(args or {})})
        with self._lock:
            return self._exchange(method, request, timeout_s)

    def close(self) -> None:
        """Close the socket; a later call opens it again."""
        with self._lock:
            self._drop()

    def _exchange(self, method: str, request: list[Buffer], timeout_s: float) -> dict[str, Any]:
        deadline_ns = time.monotonic_ns() + round(timeout_s * 1e9)
        if self._port is None:
            self._port = self._connect()
        socket = self._port.socket
        self._next += 1
        number = self._next.to_bytes(8, "little")
        pending = False
        try:
            # IMMEDIATE: without a connection nothing is queued, so wait for one. It goes on
            # coming about after a time-out: on a slow way it takes longer than one call may.
            self._await_connection(socket, method, deadline_ns, timeout_s)
            pending = True
            socket.send_multipart([number, *request], zmq.NOBLOCK)
            while True:
                self._await_answer(socket, method, deadline_ns, timeout_s)
                frames = socket.recv_multipart(zmq.NOBLOCK)
                if frames[0] == number:
                    pending = False
                    self._failed.clear()
                    return _result(method, frames[1:])
        except zmq.Again:
            raise self._timeout(method, timeout_s) from None
        finally:
            if pending:
                self._drop()

    def _await_connection(
        self, socket: zmq.Socket[bytes], method: str, deadline_ns: int, timeout_s: float
    ) -> None:
        left_ms = -((time.monotonic_ns() - deadline_ns) // 1_000_000)
        if left_ms <= 0 or not socket.poll(left_ms, zmq.POLLOUT):
            raise self._timeout(method, timeout_s)

    def _await_answer(
        self, socket: zmq.Socket[bytes], method: str, deadline_ns: int, timeout_s: float
    ) -> None:
        while True:
            left_ms = -((time.monotonic_ns() - deadline_ns) // 1_000_000)
            if left_ms <= 0:
                raise self._timeout(method, timeout_s)
            if socket.poll(min(left_ms, _LOOK_MS), zmq.POLLIN):
                return
            # With IMMEDIATE a socket takes messages only while it is connected. What a server
            # said last may have come in between, so look once more before giving up.
            if not socket.poll(0, zmq.POLLOUT) and not socket.poll(0, zmq.POLLIN):
                raise RpcLost(f"{self._endpoint}: it went away before it answered {method!r}")

    def _timeout(self, method: str, timeout_s: float) -> RpcTimeout:
        refusal = self._refusal()
        if refusal:
            return RpcRefused(f"{self._endpoint}: {refusal}")
        return RpcTimeout(f"{self._endpoint}: no answer to {method!r} within {timeout_s:g} s")

    def _refusal(self) -> str:
        """Return why there is no secure connection; empty where keys are not the reason."""
        failed = self._failed
        while self._events is not None and self._events.poll(0):
            failed[int(recv_monitor_message(self._events, zmq.NOBLOCK)["event"])] += 1
        if failed[zmq.EVENT_HANDSHAKE_FAILED_AUTH]:
            return (
                "it refuses this host's CURVE key; copy its .public over and start the other anew"
            )
        # A server that dies within a handshake looks the same, but not again and again.
        if failed.total() >= _HANDSHAKES:
            return "it is not the server of server.public, or uses no CURVE keys"
        return ""

    def _connect(self) -> Port:
        port = Port(
            zmq.DEALER,
            self._endpoint,
            bind=False,
            keys=self._keys,
            options={zmq.IMMEDIATE: 1, zmq.RECONNECT_IVL: 20},
        )
        if port.security is not None:
            self._events = port.socket.get_monitor_socket(int(_FAILED))
        return port

    def _drop(self) -> None:
        if self._port is not None:
            if self._events is not None:
                self._port.socket.disable_monitor()
                self._events = None
            self._port.close()
            self._port = None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:500]


def _result(method: str, frames: list[bytes]) -> dict[str, Any]:
    try:
        body = decode_dict(frames, "ok")
    except WireError as error:
        if error.reason != "kind":
            raise RpcError(f"{method}: unreadable answer ({error.reason})") from None
        try:
            refusal = decode_dict(frames, "error")
        except WireError as second:
            raise RpcError(f"{method}: unreadable answer ({second.reason})") from None
        kind = RpcInvalid if refusal.get("invalid") is True else RpcError
        raise kind(str(refusal.get("message"))) from None
    result = body.get("result")
    if type(result) is not dict:
        raise RpcError(f"{method}: the answer is not a dict")
    return result
