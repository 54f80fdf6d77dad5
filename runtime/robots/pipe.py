"""Messages between this project and a process under another interpreter.

calvin_env and LeRobot need packages, or a Python, that the project does not have, so they live in
processes of their own and talk over a socket: a length, a JSON header, then the arrays' raw bytes.
Nothing on the wire can run code. A child loads this file by its path, so it uses the standard
library and NumPy only.
"""

from __future__ import annotations

import json
import socket
import struct
import subprocess
import tempfile
from typing import IO, Any

import numpy as np

PREFIX = struct.Struct("<IQ")  # bytes of the header, bytes of the buffers
ARRAY = "__array__"


def start(
    python: str, script: str, *words: str
) -> tuple[subprocess.Popen[bytes], socket.socket, IO[bytes]]:
    """Start a child; return it, our end of the socket, and the file that its output goes to.

    Args:
        python: interpreter.
        script: what it runs, with the number of its end of the socket as the first argument.
        words: the arguments after that.

    Raises:
        OSError: the interpreter cannot be run.
    """
    pipe, theirs = socket.socketpair()
    log = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the child
    try:
        process = subprocess.Popen(
            [python, script, str(theirs.fileno()), *words],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=(theirs.fileno(),),
        )
    except OSError:
        pipe.close()
        log.close()
        raise
    finally:
        theirs.close()
    return process, pipe, log


def end(
    process: subprocess.Popen[bytes], pipe: socket.socket, log: IO[bytes], patience_s: float
) -> None:
    """Let go of a child and reap it, whatever state it is in."""
    pipe.close()  # it reads the end of the stream and leaves
    try:
        process.wait(patience_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    log.close()


def pack(message: Any) -> bytes:
    """A tree of dicts, sequences, numbers, strings and arrays as bytes.

    Tuples become lists; arrays keep dtype, shape and every bit.
    """
    buffers: list[bytes] = []

    def encode(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            data = np.ascontiguousarray(value)
            buffers.append(data.tobytes())
            return {ARRAY: [data.dtype.str, list(data.shape)]}
        if isinstance(value, np.generic):
            return value.item()
        raise TypeError(f"message: {type(value).__name__} cannot be sent")

    header = json.dumps(message, default=encode, separators=(",", ":")).encode()
    body = b"".join(buffers)
    return PREFIX.pack(len(header), len(body)) + header + body


def unpack(header: bytes, body: bytes) -> Any:
    """The inverse of `pack`; arrays come back writable, tuples as lists."""
    offset = 0

    def decode(node: dict[str, Any]) -> Any:
        nonlocal offset
        if set(node) != {ARRAY}:
            return node
        dtype, shape = np.dtype(node[ARRAY][0]), tuple(node[ARRAY][1])
        count = int(np.prod(shape, dtype=np.int64))
        array = np.frombuffer(body, dtype, count, offset).reshape(shape).copy()
        offset += count * dtype.itemsize
        return array

    # json calls the hook in the order in which the arrays were written
    return json.loads(header, object_hook=decode)


def receive(pipe: socket.socket) -> Any:
    """Wait for one message.

    Raises:
        EOFError: The other side is gone.
    """
    header, body = PREFIX.unpack(_exactly(pipe, PREFIX.size))
    return unpack(_exactly(pipe, header), _exactly(pipe, body))


def _exactly(pipe: socket.socket, count: int) -> bytes:
    data = bytearray(count)
    view, done = memoryview(data), 0
    while done < count:
        got = pipe.recv_into(view[done:])
        if not got:
            raise EOFError("the other process closed the connection")
        done += got
    return bytes(data)
