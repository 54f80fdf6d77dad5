"""Where sockets may live: ipc and loopback freely, anything else only with CURVE keys.

Also builds ipc endpoints that fit a Unix socket's 107 bytes, and clears away the socket
files of processes that died.
"""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
import os
import socket
import stat
import tempfile
from pathlib import Path
from typing import Final

MAX_IPC_PATH: Final = 107  # bytes of sockaddr_un.sun_path, less the final zero


class EndpointRefused(ValueError):
    """An endpoint breaks the policy; the message is one line that says what to do."""


class BindRefused(EndpointRefused):
    """Binding there would open an unauthenticated socket to the network."""


class ConnectRefused(EndpointRefused):
    """Connecting there would trust whoever answers."""


def is_local(endpoint: str) -> bool:
    """Whether only this host can reach the endpoint.

    Raises:
        EndpointRefused: the endpoint is not one that can be used at all.
    """
    scheme, separator, rest = endpoint.partition("://")
    if not separator or not rest or scheme not in ("ipc", "inproc", "tcp"):
        raise EndpointRefused(
            f"endpoint {endpoint!r}: expected ipc://PATH, tcp://HOST:PORT or inproc://NAME"
        )
    if scheme == "ipc" and len(os.fsencode(rest)) > MAX_IPC_PATH:
        raise EndpointRefused(
            f"endpoint {endpoint!r}: a socket's path has at most {MAX_IPC_PATH} bytes; "
            "use a shorter run directory"
        )
    if scheme != "tcp":
        return True
    address = rest.rpartition(";")[2]  # a source address may come first
    if "@" in address or ";" in rest:
        return False
    host = address.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return False  # a name, an interface or `*`: assume that others can reach it


def check_bind(endpoint: str, keys: object | None) -> None:
    """Raise `BindRefused` unless the endpoint is local or the socket has CURVE keys."""
    if keys is None and not is_local(endpoint):
        raise BindRefused(
            f"endpoint {endpoint!r}: refusing to bind beyond this host without CURVE keys; "
            "make some with `openhelix keys`, or bind ipc:// or tcp://127.0.0.1"
        )


def check_connect(endpoint: str, keys: object | None) -> None:
    """Raise `ConnectRefused` unless the endpoint is local or the socket has CURVE keys."""
    if keys is None and not is_local(endpoint):
        raise ConnectRefused(
            f"endpoint {endpoint!r}: refusing to trust another host without CURVE keys; "
            "make some with `openhelix keys`"
        )


def ipc_endpoint(run_dir: str | Path, name: str) -> str:
    """Return an ipc endpoint for `name` within `run_dir`, which is made if it is missing.

    Where the path would not fit a Unix socket, a private directory of the user under the
    temporary one takes its place; the same arguments always give the same endpoint.

    Raises:
        ValueError: `name` is not a plain file name.
    """
    if not name or "/" in name or name.startswith("."):
        raise ValueError(f"name: {name!r} must be a plain file name")
    folder = Path(run_dir).resolve()
    path = folder / f"{name}.sock"
    if len(os.fsencode(path)) > MAX_IPC_PATH:
        digest = hashlib.sha256(os.fsencode(path)).hexdigest()[:16]
        folder = _private_folder()
        path = folder / f"{digest}.sock"
    folder.mkdir(parents=True, exist_ok=True)
    return f"ipc://{path}"


def _private_folder() -> Path:
    """Return a directory that no other user can write to or replace."""
    folder = Path(tempfile.gettempdir()) / f"openhelix-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    info = folder.lstat()
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid() or info.st_mode & 0o077:
        raise ValueError(f"{folder}: not a private directory of this user; remove it")
    return folder


def is_listening(endpoint: str) -> bool:
    """Whether a process listens on an ipc endpoint; a dead one's socket file is removed.

    libzmq takes over the socket file of a live process without a word, and that process's
    peers then never hear of it again, so a binding side asks first.
    """
    scheme, _, path = endpoint.partition("://")
    try:
        if scheme != "ipc" or not stat.S_ISSOCK(os.lstat(path).st_mode):
            return False
    except OSError:
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            with contextlib.suppress(OSError):
                os.unlink(path)
            return False
        except OSError:
            return True  # its backlog is full, or it is not ours to judge
    return True


def served(address: str) -> dict[str, str]:
    """Return the endpoints of a shared System 2 by what they carry.

    Args:
        address: its control endpoint. `tcp://HOST:PORT` has its requests and latents on the
            two ports after it, `ipc://PATH` at two paths beside it.

    Raises:
        EndpointRefused: the address cannot be used.
    """
    is_local(address)
    names = ("requests", "latents")
    if not address.startswith("tcp://"):
        return {"control": address} | {name: f"{address}.{name}" for name in names}
    host, _, port = address.rpartition(":")
    if not port.isdigit() or not 0 < int(port) < 65534:
        raise EndpointRefused(f"endpoint {address!r}: expected tcp://HOST:PORT")
    ports = {name: f"{host}:{int(port) + i}" for i, name in enumerate(names, start=1)}
    return {"control": address} | ports
