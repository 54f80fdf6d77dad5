"""Opens ZeroMQ sockets the one way this project uses them: checked, capped, never lingering."""

from __future__ import annotations

import errno
import time
from collections.abc import Sequence
from typing import Final

import zmq

from runtime.codec import MAX_FRAME_BYTES
from runtime.curve import CurveClient, CurveServer, Keys
from runtime.endpoints import check_bind, check_connect, is_listening

IN_USE_WAIT_NS: Final = 2_000_000_000
_TCP_OPTIONS: Final = {  # a half-open connection is found out and made anew
    zmq.HEARTBEAT_IVL: 1_000,
    zmq.HEARTBEAT_TIMEOUT: 3_000,
    zmq.RECONNECT_IVL_MAX: 1_000,
    zmq.TCP_KEEPALIVE: 1,
}


class Port:
    """One socket with its endpoints and keys.

    Args:
        kind: a ZeroMQ socket type, for example `zmq.PUB`.
        endpoints: one or several; all are bound or all are connected to.
        bind: whether this side binds.
        keys: a folder of CURVE keys, or a shared `CurveServer` or `CurveClient`. Used for TCP
            alone: who may open a Unix socket is for the file system to say.
        options: ZeroMQ socket options, set before binding or connecting.

    Raises:
        EndpointRefused: the endpoint needs keys, or cannot be used.
        KeyFileError: the keys are missing or unusable.
        ValueError: the endpoint is in use or the host has no such address.
    """

    def __init__(
        self,
        kind: int,
        endpoints: str | Sequence[str],
        *,
        bind: bool,
        keys: Keys | None = None,
        options: dict[int, int | bytes] | None = None,
    ) -> None:
        self.endpoints = (endpoints,) if isinstance(endpoints, str) else tuple(endpoints)
        for endpoint in self.endpoints:
            (check_bind if bind else check_connect)(endpoint, keys)
        if not any(endpoint.startswith("tcp://") for endpoint in self.endpoints):
            keys = None
        shared = isinstance(keys, CurveServer | CurveClient)
        self.security = _security(keys, bind)
        self._owned = None if shared else self.security
        context = self.security.context if self.security else zmq.Context.instance()
        self.socket: zmq.Socket[bytes] = context.socket(kind)
        try:
            self.socket.linger = 0
            self.socket.maxmsgsize = MAX_FRAME_BYTES
            if any(endpoint.startswith("tcp://") for endpoint in self.endpoints):
                for option, number in _TCP_OPTIONS.items():
                    self.socket.set(option, number)
            if any(endpoint.startswith("tcp://[") for endpoint in self.endpoints):
                self.socket.ipv6 = True
            for name, value in (options or {}).items():
                self.socket.set(name, value)
            if self.security:
                self.security.secure(self.socket)
            self._attach(bind)
        except BaseException:
            self.close()
            raise

    def _attach(self, bind: bool) -> None:
        for endpoint in self.endpoints:
            if bind:
                self._bind(endpoint)
                continue
            try:
                self.socket.connect(endpoint)
            except zmq.ZMQError as error:
                raise ValueError(f"endpoint {endpoint!r}: cannot connect: {error}") from None

    def _bind(self, endpoint: str) -> None:
        """Bind, and give a predecessor that is just closing a moment to do so."""
        give_up_ns = time.monotonic_ns() + IN_USE_WAIT_NS
        while True:
            try:
                if is_listening(endpoint):
                    raise zmq.ZMQError(errno.EADDRINUSE)
                self.socket.bind(endpoint)
                return
            except zmq.ZMQError as error:
                if error.errno != errno.EADDRINUSE or time.monotonic_ns() > give_up_ns:
                    raise ValueError(f"endpoint {endpoint!r}: cannot bind: {error}") from None
            time.sleep(0.05)

    @property
    def bound(self) -> str:
        """The endpoint that the last bind really got, for example with `tcp://127.0.0.1:*`."""
        raw = self.socket.get(zmq.LAST_ENDPOINT)
        return raw.rstrip(b"\0").decode() if isinstance(raw, bytes) else str(raw)

    def close(self) -> None:
        """Close; safe to call twice."""
        self.socket.close(linger=0)
        if self._owned is not None:
            self._owned.close()
            self._owned = None


def _security(keys: Keys | None, bind: bool) -> CurveServer | CurveClient | None:
    if keys is None or isinstance(keys, CurveServer | CurveClient):
        return keys
    return CurveServer(keys) if bind else CurveClient(keys)
