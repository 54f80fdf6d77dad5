"""What a robot may meet on the wire: a System 2 that lies, and a line that is cut or slow.

Both stand between `faults.py` and a run: `Peer` is a System 2 that sends what it is told to,
`Line` forwards TCP connections and treats them as badly as it is told to.
"""

from __future__ import annotations

import selectors
import socket
import threading
import time
from collections import Counter, deque
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import zmq

from openhelix.runtime.core.interfaces import GoalRequest, LatentGoal, LatentSpec
from openhelix.runtime.robots.fake import LATENT, PointEngine
from openhelix.runtime.transport.codec import encode
from openhelix.runtime.transport.rpc import RpcServer
from openhelix.runtime.transport.sockets import CurveServer, Port, served
from openhelix.runtime.transport.wire import ENVELOPE, NewestPerTopic, topic_bytes

HOUR_NS = 3600 * 10**9
INT64_MAX = (1 << 63) - 1


class Peer:
    """A System 2 whose latents are wrong in the way that `mode` says.

    "good" for those of an honest one. Of the others, those in `BESIDE` send an honest latent a moment
    after every wrong one: they must be told apart. Those in `FLOODING` do so too, but nothing gets
    through. The rest send nothing that is right.

    Args:
        address: where it is served; see `served`.
        keys: folder of CURVE keys.
        hz: latents per second.
    """

    BESIDE = ("jump", "garbage", "replay", "shape", "nan_beside", "future_beside")
    FLOODING = ("flood", "huge")
    INSTEAD = ("silent", "future", "int64", "old", "nan", "inf")

    def __init__(self, address: str, keys: str | Path, hz: float = 5.0) -> None:
        self.mode = "good"
        self.sent: Counter[str] = Counter()  # wrong messages by mode
        self._period_s = 1.0 / hz
        self._engine = PointEngine()
        self._source = int.from_bytes(b"honestly", "little")
        self._seq = 0
        self._first: list[bytes] | None = None
        self._published = 0
        ends = served(address)
        self._keys = CurveServer(keys) if address.startswith("tcp://") else None
        secured: Any = self._keys
        self._requests = NewestPerTopic(ends["requests"], GoalRequest, bind=True, keys=secured)
        options: dict[int, int | bytes] = {zmq.SNDHWM: 100_000}
        self._latents = Port(zmq.PUB, ends["latents"], bind=True, keys=secured, options=options)
        handlers = {"health": self._health, "ask": lambda _: {"refused": ""}}
        self._rpc = RpcServer(ends["control"], handlers, keys=secured)
        self._stop = threading.Event()
        self._rpc.start()
        self._thread = threading.Thread(target=self._serve, name="peer", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop serving."""
        self._stop.set()
        self._thread.join(10.0)
        self._rpc.close()
        self._requests.close()
        self._latents.close()
        if self._keys is not None:
            self._keys.close()

    def _health(self, _: dict[str, Any]) -> dict[str, Any]:
        return {
            "name": "system2",
            "state": "ready",
            "error": "",
            "pid": None,
            "latent_spec": asdict(LATENT),
            "spec_id": LATENT.spec_id,
            "published": self._published,
            "skipped": 0,
            "device": "peer",
        }

    def _serve(self) -> None:
        newest: GoalRequest | None = None
        while not self._stop.wait(self._period_s):
            for request in self._requests.poll().values():
                newest = request
            if newest is not None:
                self._answer(newest)

    def _answer(self, request: GoalRequest) -> None:
        mode = self.mode
        if mode != "good":
            self._wrong(mode, request)
        if mode in self.BESIDE:
            time.sleep(self._period_s / 2)  # of two at once only the newer is looked at
        if mode == "good" or mode in (*self.BESIDE, *self.FLOODING):
            frames = self._frames(request, self._latent(request))
            self._first = self._first or frames
            self._send(frames)
            self._published += 1

    def _latent(self, request: GoalRequest, t_obs_ns: int | None = None, **changes: Any) -> Any:
        z = self._engine.encode([request.rgb], [request.instruction])[0]
        fields = {
            "z": z,
            "seq": self._seq,
            "instruction_id": request.instruction_id,
            "t_obs_ns": request.t_obs_ns if t_obs_ns is None else t_obs_ns,
            "t_pub_ns": time.monotonic_ns(),
            "spec_id": LATENT.spec_id,
            "source": "peer",
        }
        return LatentGoal(**(fields | changes))

    def _frames(
        self, request: GoalRequest, latent: LatentGoal, seq: int | None = None
    ) -> list[bytes]:
        if seq is None:
            seq, self._seq = self._seq, self._seq + 1
        topic = topic_bytes(f"latents/{request.robot}") + b"\0"
        envelope = ENVELOPE.pack(self._source, seq, time.monotonic_ns())
        return [bytes(frame) for frame in encode(latent, topic + envelope)]

    def _wrong(self, mode: str, request: GoalRequest) -> None:
        messages: list[list[bytes]] = []
        stamps = {"future": HOUR_NS, "old": -HOUR_NS}
        kind = mode.removesuffix("_beside")
        if kind in stamps:
            t_ns = request.t_obs_ns + stamps[kind]
            messages.append(self._frames(request, self._latent(request, t_ns)))
        elif kind == "int64":
            messages.append(self._frames(request, self._latent(request, INT64_MAX)))
        elif kind in ("nan", "inf"):
            messages.append(self._spoilt(request, np.nan if kind == "nan" else np.inf))
        elif kind == "other_model":
            other = LatentSpec("act_last", 1, 8, model_id="other").spec_id
            messages.append(self._frames(request, self._latent(request, spec_id=other)))
        elif kind == "jump":
            if not self.sent[mode]:  # one is enough to silence who believes it
                latent = self._latent(request)
                messages.append(self._frames(request, latent, self._seq + 2**31))
        elif kind == "shape":
            z = np.zeros((3, 5), np.float32)
            messages.append(self._frames(request, self._latent(request, z=z)))
        elif kind == "replay":
            messages += [self._first] if self._first else []
        elif kind == "garbage":
            for n in range(20):
                head = self._frames(request, self._latent(request))[0][:-40]
                messages.append([head + bytes([n]) * n])
        elif kind == "flood":
            frames = self._frames(request, self._latent(request), 0)
            messages += [frames] * 4000
        elif kind == "huge":
            head = self._frames(request, self._latent(request))[0]
            messages.append([head, bytes(32 << 20)])
        for frames in messages:
            self._send(frames)
        self.sent[mode] += len(messages)

    def _spoilt(self, request: GoalRequest, value: float) -> list[bytes]:
        """Return a latent with a number that no honest sender can encode."""
        mark = np.float32(12345.678)
        latent = self._latent(request, z=np.full((1, 8), mark, np.float32))
        frames = self._frames(request, latent)
        return [frame.replace(mark.tobytes(), np.float32(value).tobytes()) for frame in frames]

    def _send(self, frames: list[bytes]) -> None:
        try:
            self._latents.socket.send_multipart(frames, zmq.NOBLOCK)
        except zmq.Again:
            self.sent["not sent"] += 1


@dataclass(slots=True, eq=False)
class _Pipe:
    """One direction of one connection."""

    source: socket.socket
    sink: socket.socket
    waiting: deque[tuple[float, bytes]] = field(default_factory=deque)  # when due, what


class Line:
    """Forwards a few TCP ports to others; `mode` says how well.

    "good": at once. "cut": connections are reset and new ones refused. "hole": connections
    stay, and nothing passes, as when a cable is pulled. A number: each byte is so many seconds
    late.

    Args:
        ports: those listened on, on loopback, with the port behind each.
    """

    def __init__(self, ports: dict[int, int]) -> None:
        self._mode: str | float = "good"
        self._ports = ports
        self._listeners: dict[int, socket.socket] = {}
        self._pipes: list[_Pipe] = []
        self._stop = threading.Event()
        self._selector = selectors.DefaultSelector()
        self._thread = threading.Thread(target=self._forward, name="line", daemon=True)
        self._thread.start()

    @property
    def mode(self) -> str | float:
        """How well it forwards."""
        return self._mode

    @mode.setter
    def mode(self, mode: str | float) -> None:
        self._mode = mode

    def close(self) -> None:
        """Stop forwarding."""
        self._stop.set()
        self._thread.join(10.0)

    def _forward(self) -> None:
        while not self._stop.is_set():
            if self._mode == "cut":
                self._drop_all()
                time.sleep(0.02)
                continue
            self._listen()
            hole = self._mode == "hole"
            for key, _ in self._selector.select(0.005):
                if isinstance(key.data, int):
                    self._accept(key.data)
                elif not hole:
                    self._take(key.data)
            if hole:
                time.sleep(0.02)
            else:
                self._pass_on()
        self._drop_all()

    def _listen(self) -> None:
        for port in self._ports.keys() - self._listeners.keys():
            listener = socket.create_server(("127.0.0.1", port))
            listener.setblocking(False)
            self._listeners[port] = listener
            self._selector.register(listener, selectors.EVENT_READ, port)

    def _accept(self, port: int) -> None:
        near, _ = self._listeners[port].accept()
        try:
            far = socket.create_connection(("127.0.0.1", self._ports[port]), 2.0)
        except OSError:
            near.close()
            return
        for end in (near, far):
            end.setblocking(False)
        for pipe in (_Pipe(near, far), _Pipe(far, near)):
            self._pipes.append(pipe)
            self._selector.register(pipe.source, selectors.EVENT_READ, pipe)

    def _take(self, pipe: _Pipe) -> None:
        try:
            data = pipe.source.recv(1 << 20)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._drop(pipe)
            return
        late_s = self._mode if isinstance(self._mode, float) else 0.0
        pipe.waiting.append((time.monotonic() + late_s, data))

    def _pass_on(self) -> None:
        now_s = time.monotonic()
        for pipe in tuple(self._pipes):
            while pipe.waiting and pipe.waiting[0][0] <= now_s:
                due_s, data = pipe.waiting.popleft()
                try:
                    sent = pipe.sink.send(data)
                except BlockingIOError:
                    sent = 0
                except OSError:
                    self._drop(pipe)
                    break
                if sent < len(data):
                    pipe.waiting.appendleft((due_s, data[sent:]))
                    break

    def _drop(self, pipe: _Pipe) -> None:
        ends = {pipe.source, pipe.sink}
        for other in [p for p in self._pipes if p.source in ends]:
            self._pipes.remove(other)
            self._selector.unregister(other.source)
        for end in ends:
            end.close()

    def _drop_all(self) -> None:
        for port, listener in tuple(self._listeners.items()):
            self._selector.unregister(listener)
            listener.close()
            del self._listeners[port]
        while self._pipes:
            self._drop(self._pipes[0])
