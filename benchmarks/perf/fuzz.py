"""Fuzzing: whatever arrives becomes a whole message or is refused by name, and nothing else happens.

    python -m openhelix.benchmarks.perf.fuzz [--frames 1000000] [--seed 0] [--only page files ...]

Each surface begins with valid inputs, of which the records are drawn by hypothesis, and changes them
as libFuzzer does: bits, bytes, numbers at the ends of their range, cuts, repeats, pieces of other
inputs; where a format has a checksum or a structure, also beneath it. An input that is refused in a
way not seen before joins those that are changed further. A *finding* is anything but a message or
the format's own refusal: another exception, an answer that takes longer than `LIMIT_S`, more memory
than `LIMIT_MB`, a robot that a stranger stopped. Findings are written beside the result, and the exit
code is then 1.

    records   the codec: all kinds of records      page         the status page's HTTP
    messages  the codec: free-form messages        recordings   MCAP files
    reader    a reader's socket and its counts     files        checkpoints, arrays, JSON
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import random
import re
import resource
import select
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

import msgspec
import numpy as np
import torch
import zmq
from hypothesis import HealthCheck, given, settings
from hypothesis import seed as seeded
from mcap.writer import CompressionType, Writer

from openhelix.benchmarks.perf.places import results_file
from openhelix.runtime.core.config import ConfigError
from openhelix.runtime.core.files import (
    BadFile,
    load_tensors,
    load_torch,
    read_arrays,
    read_json,
    save_tensors,
)
from openhelix.runtime.core.interfaces import LatentGoal
from openhelix.runtime.observe.recorder import (
    MAX_MESSAGE_BYTES,
    PROFILE,
    SUMMARY,
    Reader,
    Recorder,
    RecordingError,
    playback,
)
from openhelix.runtime.observe.status_server import StatusServer
from openhelix.runtime.transport import codec
from openhelix.runtime.transport.codec import WireError, decode, decode_dict, encode, encode_dict
from openhelix.runtime.transport.sockets import Port
from openhelix.runtime.transport.wire import ENVELOPE, NewestReader
from openhelix.system1.checkpoint import build_model, load_policy, save_policy
from openhelix.system1.config import CameraConfig, small
from openhelix.system1.diffusion import Normalizer
from tests.runtime.codec_records import MESSAGES
from tests.runtime.ticks import ticks, told

LIMIT_S: Final = 10.0  # for one input
LIMIT_MB: Final = 512.0  # by which the process may grow: the most that a .npz may unpack to
KEPT: Final = 4000  # inputs of a corpus
SLOWER: Final = 200  # frames of the codec for each input of a slow surface
_EDGES: Final = (0, 1, 2, 127, 128, 255, 256, 32767, 32768, 65535, 65536, 2**31 - 1, 2**31)
_EDGES_64: Final = (*_EDGES, 2**32 - 1, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1)

Input = list[bytes]  # frames of a message, or a file


class Surface(Protocol):
    """Something that takes what strangers made."""

    corpus: list[Input]

    def change(self, given: Input, random: Changes) -> Input:
        """Return another input made from one."""

    def feed(self, given: Input) -> str:
        """Put it in; return how it was refused, "" for taken. Any exception is a finding."""


# Changing inputs ---------------------------------------------------------------------------------


class Changes:
    """Draws changes from one stream of random numbers."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def of_bytes(self, given: bytes, other: bytes) -> bytes:
        """Return `given` with one to four changes; `other` lends pieces."""
        made, draw = bytearray(given), self.random
        for _ in range(1 + draw.getrandbits(2)):
            at = draw.randrange(len(made) + 1)
            size = 1 + draw.randrange(1 << draw.randrange(8))
            match draw.randrange(9):
                case 0 if at < len(made):
                    made[at] ^= 1 << draw.randrange(8)
                case 1 if at < len(made):
                    made[at] = draw.randrange(256)
                case 2:
                    width = draw.choice((1, 2, 4, 8))
                    edge = draw.choice(_EDGES_64) & ((1 << 8 * width) - 1)
                    order: Any = draw.choice(("little", "big"))
                    made[at : at + width] = edge.to_bytes(width, order)
                case 3:
                    del made[at:]
                case 4:
                    del made[at : at + size]
                case 5:
                    made[at:at] = draw.randbytes(size)
                case 6:
                    made[at:at] = bytes((draw.randrange(256),)) * size
                case 7:
                    start = draw.randrange(len(made) + 1)
                    made[at:at] = made[start : start + size]
                case 8 if other:
                    start = draw.randrange(len(other))
                    made[at : at + size] = other[start : start + size]
        return bytes(made)

    def of_frames(self, given: Input, other: Input) -> Input:
        """Return frames of which one is changed, missing, doubled or another message's."""
        made, draw = list(given), self.random
        at = draw.randrange(len(made)) if made else 0
        match draw.randrange(12):
            case 0 if len(made) > 1:
                del made[at]
            case 1 if len(made) < codec.MAX_FRAMES + 2:
                made.insert(at, draw.choice(other or made or [b""]))
            case _ if made:
                made[at] = self.of_bytes(made[at], draw.choice(other or [b""]))
        return made

    def of_value(self, value: Any, depth: int = 0) -> Any:
        """Return plain data (as msgpack or JSON hold it) with one part changed."""
        draw = self.random
        if depth < 8 and value and draw.random() < 0.85:
            if isinstance(value, list):
                made, at = list(value), draw.randrange(len(value))
                made[at] = self.of_value(made[at], depth + 1)
                return made
            if isinstance(value, dict):
                key = draw.choice(list(value))
                return {**value, key: self.of_value(value[key], depth + 1)}
        match draw.randrange(10):
            case 0:
                return None
            case 1:
                return draw.choice((True, False))
            case 2 | 3:
                return draw.choice((-1, 1)) * draw.choice(_EDGES)
            case 4:
                return draw.choice((float("nan"), float("inf"), -0.0, 1e308, 5e-324, 0.5))
            case 5:
                return "\u0000é" * draw.randrange(3)
            case 6:
                return draw.randbytes(draw.randrange(40))
            case 7:
                return [value] * draw.randrange(4)
            case 8:
                return {"a": value}
            case _:
                deep: Any = value
                for _ in range(draw.choice((1, 3, 70, 2000))):
                    deep = [deep]
                return deep


# The codec ---------------------------------------------------------------------------------------


def drawn(count: int, seed: int) -> list[Any]:
    """Return valid records of all kinds, as hypothesis makes them."""
    found: list[Any] = []

    @seeded(seed)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(MESSAGES)
    def collect(message: Any) -> None:
        with suppress(WireError):  # not finite: nobody sends it
            encode(message)
            found.append(message)

    collect()
    return found


class Records:
    """Records of every kind; the first frame of an input is the number of its class."""

    def __init__(self, seed: int) -> None:
        messages = drawn(300, seed)
        self._kinds = sorted({type(m) for m in messages}, key=lambda cls: cls.__name__)
        self.corpus: list[Input] = [
            [bytes((self._kinds.index(type(m)),)), *map(bytes, encode(m))] for m in messages
        ]

    def change(self, given: Input, random: Changes) -> Input:
        kind, *frames = given
        if random.random.random() < 0.3:
            return [kind, *self._within(frames, random)]
        _, *other = random.random.choice(self.corpus)
        return [kind, *random.of_frames(frames, other)]

    def _within(self, frames: Input, random: Changes) -> Input:
        """Change a value and write a header that is right as such."""
        try:
            _, _, pad, size = codec.HEAD.unpack_from(frames[0])
            body = frames[0][codec.HEAD.size :][:size]
            head = msgspec.msgpack.decode(body)
            made = msgspec.msgpack.encode([*head[:2], random.of_value(head[2])])
        except Exception:  # it is not a right one
            return random.of_frames(frames, frames)
        tail = frames[0][codec.HEAD.size + size + pad :]
        pad = codec.padded(codec.HEAD.size + len(made)) - codec.HEAD.size - len(made)
        pad = pad if tail else 0
        head = codec.HEAD.pack(codec.MAGIC, codec.VERSION, pad, len(made)) + made
        return [head + bytes(pad) + tail, *frames[1:]]

    def feed(self, given: Input) -> str:
        cls = self._kinds[given[0][0]]
        try:
            message = decode(given[1:], cls)
        except WireError as error:
            return told_of(error.reason, error)
        # What is taken is whole: of its class, finite where it must be, and can be sent on.
        assert type(message) is cls
        if cls is LatentGoal:
            assert np.isfinite(message.z).all() and not message.z.flags.writeable
            assert np.isfinite((message.compute_s, message.understood)).all()
        encode(message)
        return ""


class FreeForm:
    """Free-form messages, as questions and answers are."""

    def __init__(self, seed: int) -> None:
        bodies: list[dict[str, Any]] = [
            {"method": "ask", "args": {"question": "say", "text": "open", "who": "x"}},
            {"result": {"t_ns": 3, "rgb": np.zeros((40, 40, 3), np.uint8), "names": ["a", "b"]}},
            {"args": {"deep": [[[{"x": 1.5, "y": None, "z": b"raw"}]]], "on": True}},
            {"big": np.ones(40_000, np.float32), "small": np.arange(3), "n": -(2**63)},
        ]
        self.corpus: list[Input] = [list(map(bytes, encode_dict("call", b))) for b in bodies]

    def change(self, given: Input, random: Changes) -> Input:
        return random.of_frames(given, random.random.choice(self.corpus))

    def feed(self, given: Input) -> str:
        try:
            body = decode_dict(given, "call")
        except WireError as error:
            return told_of(error.reason, error)
        assert type(body) is dict
        encode_dict("call", body)
        return ""


class Wire:
    """A reader's socket: nothing that is sent to it is lost without being counted."""

    def __init__(self, seed: int) -> None:
        z = np.linspace(0, 1, 512, dtype=np.float32)[None]
        self._source, self._sent = 7, 0
        address = f"inproc://fuzz-{id(self)}"
        self._port = Port(zmq.PUB, address, bind=True, options={zmq.SNDHWM: 0})
        self._reader = NewestReader(address, "latents/x", LatentGoal)
        give_up_s = time.monotonic() + 10.0
        while self._reader.stats.received == 0:  # until it has subscribed
            assert time.monotonic() < give_up_s
            self._port.socket.send_multipart([b"latents/x\0"])
            time.sleep(0.01)
            self._reader.poll()
        latents = [LatentGoal(z, n, 1, n, n, "spec", "me") for n in range(8)]
        begin = b"latents/x\0"
        self.corpus: list[Input] = [
            list(map(bytes, encode(one, begin + ENVELOPE.pack(self._source, one.seq, 0))))
            for one in latents
        ]

    def change(self, given: Input, random: Changes) -> Input:
        draw = random.random
        if draw.random() < 0.4:  # only who sent it, and its number
            number = draw.choice((self._sent, *_EDGES_64)) % 2**64
            stamp = ENVELOPE.pack(draw.choice((7, 7, 8, draw.getrandbits(64))), number, 0)
            return [given[0][:10] + stamp + given[0][10 + ENVELOPE.size :], *given[1:]]
        made = random.of_frames(given, draw.choice(self.corpus))
        # ZeroMQ itself keeps back what is for another topic.
        return made if made[0].startswith(b"latents/x\0") else [b"latents/x\0" + made[0], *made[1:]]

    def feed(self, given: Input) -> str:
        stats, before = self._reader.stats, dict(self._reader.stats.dropped)
        received, delivered = stats.received, stats.delivered
        self._port.socket.send_multipart(given)
        self._sent += 1
        self._reader.wait(5.0)
        message = self._reader.poll()
        grown = {n: c - before.get(n, 0) for n, c in stats.dropped.items() if c > before.get(n, 0)}
        assert (message is not None) == (stats.delivered > delivered)
        assert sum(grown.values()) + (message is not None) == 1, grown
        assert stats.received - received <= 1
        return ",".join(grown)


# The page ----------------------------------------------------------------------------------------


class Robot:
    """What the page asks; counts who stops it or tells it something."""

    token = "the-one-that-nobody-has"

    def __init__(self) -> None:
        self.touched = 0

    def snapshot(self) -> dict[str, Any]:
        return {"robot": "arm"}

    def frame(self, camera: str) -> dict[str, Any]:
        encode_dict("ask", {"camera": camera})  # as on its way to the observer
        shown = {"t_ns": 1, "rgb": np.zeros((8, 8, 3), np.uint8)}
        return shown if camera == "static" else {}

    def fleet(self) -> dict[str, Any]:
        return {"runs": [], "system2": None}

    def say(self, text: object, who: str) -> dict[str, Any]:
        self.touched += 1
        return {}

    def stop(self, who: str) -> None:
        self.touched += 1


class Errors(logging.Handler):
    """Keeps what is logged as a defect; refusals are warnings, and are not shown."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.ERROR:
            self.heard.append(f"{record.getMessage()}: {record.exc_info and record.exc_info[1]!r}")


class Page:
    """The status page's server, from a stranger's socket."""

    STATUSES: Final = (200, 400, 401, 403, 404, 405, 413, 417, 421, 431)

    def __init__(self, seed: int) -> None:
        self._robot = Robot()
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._server = StatusServer(self._robot)  # type: ignore[arg-type]
        self._server.open = True  # as where nobody else can log in: more can be reached
        self._errors = Errors()
        logging.getLogger().addHandler(self._errors)
        starting = asyncio.run_coroutine_threadsafe(self._server.start(), self._loop)
        self._port = int(starting.result(30).rsplit(":", 1)[1].strip("/"))
        where = f"Host: 127.0.0.1:{self._port}\r\n"
        body = '{"text": "open the drawer", "who": "me"}'
        claims = (
            "Authorization: Bearer the-one-that-nobody-haz\r\nContent-Type: application/json\r\n"
        )
        tails = f"Content-Length: {len(body)}\r\n\r\n{body}"
        chunked = f"Transfer-Encoding: chunked\r\n\r\n{len(body):x}\r\n{body}\r\n0\r\n\r\n"
        self.corpus: list[Input] = [
            [text.encode()]
            for text in (
                *(f"GET {path} HTTP/1.1\r\n{where}\r\n" for path in ("/", "/page.js", "/nowhere")),
                f"GET /api/status HTTP/1.1\r\n{where}Origin: http://127.0.0.1:{self._port}\r\n\r\n",
                f"GET /api/camera/static HTTP/1.0\r\n{where}Connection: keep-alive\r\n\r\n",
                f"GET /api/fleet HTTP/1.1\r\nHost: [::1]:{self._port}\r\nAccept: */*\r\n\r\n",
                f"POST /api/stop HTTP/1.1\r\n{where}{claims}Content-Length: 2\r\n\r\n{{}}",
                f"POST /api/say HTTP/1.1\r\n{where}{claims}{tails}",
                f"POST /api/say HTTP/1.1\r\n{where}{claims}{chunked}",
                f"OPTIONS * HTTP/1.1\r\n{where}\r\n",
                f"GET / HTTP/1.1\r\n{where}Upgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
            )
        ]

        self._valid = list(self.corpus)

    def change(self, given: Input, random: Changes) -> Input:
        (other,) = random.random.choice(self.corpus)
        return [random.of_bytes(given[0], other)]

    def feed(self, given: Input) -> str:
        answer = b""
        patience_s = LIMIT_S if given in self._valid else 0.05
        end = socket.create_connection(("127.0.0.1", self._port), LIMIT_S)
        with end, suppress(ConnectionError):  # it may have closed already: that is an answer
            end.sendall(given[0])
            # Whoever hangs up before the answer gets none, so hang up on one that is waiting.
            if not select.select([end], [], [], patience_s)[0]:
                end.shutdown(socket.SHUT_WR)
            answer = end.recv(4096)
        found = re.findall(rb"HTTP/\d\.\d (\d{3}) ", answer[:64])
        assert not self._robot.touched, "a stranger's word has reached the robot"
        assert not self._errors.heard, self._errors.heard.pop()
        if not found:
            assert not answer, answer[:80]
            return "closed"
        status = int(found[0])
        assert status in self.STATUSES, answer[:300]
        return "" if status == 200 else str(status)

    def close(self) -> None:
        """Ask once more, as somebody who may; then end."""
        logging.getLogger().removeHandler(self._errors)
        assert self.feed(self._valid[3]) == ""
        asyncio.run_coroutine_threadsafe(self._server.close(), self._loop).result(30)
        self._loop.call_soon_threadsafe(self._loop.stop)


# Files -------------------------------------------------------------------------------------------


class Recordings:
    """MCAP files: raw, and written anew around a changed message so that checksums are right."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "recording.mcap"
        recorder = Recorder(self._path, meta={"config": {}, "seed": 0}, lossless=True)
        for message in told(ticks(6)):
            recorder(message)
        recorder.close()
        self.corpus: list[Input] = [[b"raw", self._path.read_bytes()]]
        for topic, t_ns, data in Reader(self._path)._messages():
            self.corpus.append([b"message", topic.encode(), str(t_ns).encode(), data])
        self._whole = [given[1:] for given in self.corpus[1:]]

    def change(self, given: Input, random: Changes) -> Input:
        other = random.random.choice(self.corpus)[-1]
        if given[0] == b"message" and given[3][:1] == b"{" and random.random.random() < 0.5:
            with suppress(ValueError, RecursionError):
                made = random.of_value(json.loads(given[3]))
                return [*given[:3], as_json(made)]
        return [*given[:-1], random.of_bytes(given[-1], other)]

    def feed(self, given: Input) -> str:
        if given[0] == b"raw":
            self._path.write_bytes(given[1])
        else:
            self._write(given[1:])
        try:
            reader = Reader(self._path)
            with suppress(ConfigError, RecordingError):
                reader.config()
            kept = sum(1 for _ in reader)
            for _ in playback(self._path):
                pass
        except RecordingError as error:
            return told_of("refused", error)
        assert kept <= len(self._whole) + 1
        return "" if reader.complete else f"{reader.bad} bad, {'cut' if reader.cut else 'whole'}"

    def _write(self, changed: Input) -> None:
        with self._path.open("wb") as file:
            writer = Writer(file, compression=CompressionType.NONE)
            writer.start(PROFILE)
            writer.add_metadata(PROFILE, {})
            channels: dict[bytes, int] = {}
            for number, (topic, t_ns, data) in enumerate(self._whole):
                if (topic, t_ns) == (changed[0], changed[1]):
                    data = changed[2]
                if topic not in channels:
                    channels[topic] = writer.register_channel(topic.decode(), "json", 0)
                assert len(data) < MAX_MESSAGE_BYTES
                writer.add_message(channels[topic], int(t_ns), data, int(t_ns), sequence=number)
            writer.add_metadata(SUMMARY, {"complete": "true"})
            writer.finish()


class Files:
    """Checkpoints, arrays and JSON; the first frame of an input is the name of the file."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "files"
        cameras = (CameraConfig("static", 32, 32, 16, 16), CameraConfig("gripper", 16, 16, 16, 16))
        sizes = {"dim": 12, "heads": 2, "encoder_width": 8, "layers": 1, "latent_dim": 4}
        config = small(cameras=cameras, horizon=4, **sizes)
        model = build_model(config, Normalizer(torch.zeros(1, 9), torch.ones(1, 9)))
        save_policy(self._folder / "policy", config, model.state_dict(), model.normalizer)
        save_tensors(self._folder / "few.safetensors", {"a": torch.ones(3), "b": torch.eye(2)})
        np.savez_compressed(self._folder / "unit.npz", a=np.zeros((9, 9)), b=np.arange(4))
        torch.save({"weight": {"module.a": torch.ones(4)}}, self._folder / "old.pth")
        (self._folder / "log.json").write_text(json.dumps({"step": 3, "loss": [0.5, 0.25]}))
        self._load: dict[str, Callable[[Path], Any]] = {
            "policy": load_policy,
            "few.safetensors": load_tensors,
            "unit.npz": read_arrays,
            "old.pth": lambda path: load_torch(path, torch.load),
            "log.json": read_json,
        }
        paths = [path for path in sorted(self._folder.rglob("*")) if path.is_file()]
        self._whole = {str(p.relative_to(self._folder)): p.read_bytes() for p in paths}
        self.corpus: list[Input] = [[n.encode(), data] for n, data in self._whole.items()]

    def change(self, given: Input, random: Changes) -> Input:
        name, data = given
        if name.endswith(b".json") and random.random.random() < 0.7:
            with suppress(ValueError, RecursionError):
                return [name, as_json(random.of_value(json.loads(data)))]
        if name.endswith(b".safetensors") and random.random.random() < 0.5:
            with suppress(ValueError, OverflowError, RecursionError):
                size = int.from_bytes(data[:8], "little")
                text = as_json(random.of_value(json.loads(data[8 : 8 + size])))
                return [name, len(text).to_bytes(8, "little") + text + data[8 + size :]]
        return [name, random.of_bytes(data, random.random.choice(self.corpus)[1])]

    def feed(self, given: Input) -> str:
        name = given[0].decode()
        path = self._folder / name
        top = name.split("/", 1)[0]
        path.write_bytes(given[1])
        try:
            self._load[top](self._folder / top)
        except BadFile as error:
            said = str(error)
            assert "\n" not in said and str(self._folder) in said, said
            return told_of(name, error)
        finally:
            path.write_bytes(self._whole[name])
        return ""


def as_json(value: Any) -> bytes:
    """Return JSON, of values that have no JSON as well."""
    try:
        return json.dumps(value, default=repr).encode()
    except RecursionError:
        return b"[" * 5000 + b"]" * 5000


def told_of(kind: str, error: Exception) -> str:
    """Return a refusal without what differs from input to input, to know a new one by."""
    text = re.sub(r"(['\"]).*?\1|b'.*|/\S+", "", str(error))
    return f"{kind}: {re.sub(r'[-+.0-9e]+', '#', text)[:80]}"


# The work ----------------------------------------------------------------------------------------


@dataclass
class Result:
    """What came of one surface."""

    surface: str
    inputs: int = 0
    taken: int = 0  # accepted as a whole message or file
    refused: dict[str, int] = field(default_factory=dict)  # by the word before the colon
    ways: int = 0  # to be refused, told apart by their text
    findings: list[str] = field(default_factory=list)
    slowest_s: float = 0.0
    grown_mb: float = 0.0  # the process' largest size, above that at the start
    seconds: float = 0.0


def try_out(name: str, surface: Surface, count: int, seed: int, beside: Path) -> Result:
    """Feed a surface so many inputs; its findings are written as files beside the result."""
    result, changes = Result(name), Changes(seed)
    ways: set[str] = set()
    refused: Counter[str] = Counter()
    grown = _peak_mb()
    began_s = time.monotonic()
    valid = list(surface.corpus)
    # Unchanged first: what is valid must be taken, or nothing is learned from the rest.
    for number in range(-min(len(valid), count), count):
        # Half are but one step from what is right, the others wander.
        bases = valid if number % 2 else surface.corpus
        base = valid[number] if number < 0 else changes.random.choice(bases)
        given = base if number < 0 else surface.change(base, changes)
        start_s = time.monotonic()
        try:
            with _in_time():
                outcome = surface.feed(given)
        except Exception as error:
            words = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            result.findings.append(words)
            if len(result.findings) <= 20:
                beside.mkdir(parents=True, exist_ok=True)
                place = beside / f"{name}-{len(result.findings):02d}.msgpack"
                place.write_bytes(msgspec.msgpack.encode(given))
            continue
        result.inputs += 1
        result.slowest_s = max(result.slowest_s, time.monotonic() - start_s)
        if not outcome:
            result.taken += 1
            continue
        refused[outcome.partition(":")[0]] += 1
        if outcome not in ways and len(surface.corpus) < KEPT:
            ways.add(outcome)
            surface.corpus.append(given)
    result.refused, result.ways = dict(refused.most_common()), len(ways)
    result.grown_mb = _peak_mb() - grown
    result.seconds = time.monotonic() - began_s
    if result.grown_mb > LIMIT_MB:
        result.findings.append(f"took {result.grown_mb:.0f} MB more")
    return result


@contextmanager
def _in_time() -> Iterator[None]:
    """Raise TimeoutError in a block that takes longer than `LIMIT_S`."""

    def late(*_: object) -> None:
        raise TimeoutError(f"not done within {LIMIT_S:g} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


# Of the frames, the share of each; the slow ones get one for `SLOWER`.
SHARES: Final = {"records": 0.6, "messages": 0.2, "reader": 0.2}
SLOW: Final = ("page", "recordings", "files")


def fuzz(frames: int, seed: int, only: Sequence[str], findings: Path) -> Iterator[Result]:
    """Try all surfaces, or those in `only`; yield each result as soon as it is there."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="openhelix-fuzz-")))
        makers: dict[str, Callable[[], Any]] = {
            "records": lambda: Records(seed),
            "messages": lambda: FreeForm(seed),
            "reader": lambda: Wire(seed),
            "page": lambda: Page(seed),
            "recordings": lambda: Recordings(folder),
            "files": lambda: Files(folder),
        }
        for name, make in makers.items():
            if only and name not in only:
                continue
            count = round(frames * SHARES[name]) if name in SHARES else max(1, frames // SLOWER)
            surface = make()
            yield try_out(name, surface, count, seed, findings)
            if hasattr(surface, "close"):
                surface.close()


def table(results: Sequence[Result], seed: int, frames: int) -> str:
    """Return the results as Markdown."""
    lines = [
        "# Fuzzing",
        "",
        f"Written by `python -m openhelix.benchmarks.perf.fuzz --frames {frames} --seed {seed}`, which",
        "says how. *Ways*: refusals told apart by their text. *Slowest*: one input. *Grown*: the "
        "process.",
        "",
        "| surface | inputs | taken | refused | ways | slowest | grown | findings |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r.surface} | {r.inputs:,} | {r.taken:,} | {sum(r.refused.values()):,} | {r.ways} "
        f"| {r.slowest_s * 1e3:.0f} ms | {r.grown_mb:.0f} MB | {len(r.findings)} |"
        for r in results
    ]
    total, found = sum(r.inputs for r in results), sum(len(r.findings) for r in results)
    lines += ["", f"{total:,} inputs, {found} findings."]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Write the result; 1 where something was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--frames", type=int, default=1_000_000, help="of the codec")
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn")
    parser.add_argument("--only", nargs="+", default=[], choices=(*SHARES, *SLOW))
    parser.add_argument("--out", type=Path, help="folder for fuzz.md, fuzz.json and findings")
    options = parser.parse_args()
    folder = options.out or results_file("fuzz.json").parent
    folder.mkdir(parents=True, exist_ok=True)
    results: list[Result] = []
    about = {"seed": options.seed, "frames": options.frames}
    for result in fuzz(options.frames, options.seed, options.only, folder / "findings"):
        results.append(result)
        for words in result.findings[:10]:
            print(f"{result.surface}: {words}", file=sys.stderr, flush=True)
        text = table(results, options.seed, options.frames)
        (folder / "fuzz.md").write_text(text)
        data = about | {"surfaces": list(map(asdict, results))}
        (folder / "fuzz.json").write_text(json.dumps(data, indent=2) + "\n")
    print(text)
    return int(any(r.findings for r in results))


if __name__ == "__main__":
    raise SystemExit(main())
