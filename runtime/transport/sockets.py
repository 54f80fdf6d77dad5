"""Opens all of the project's ZeroMQ sockets in one way: checked, capped, never lingering.

Whoever can reach a socket can stop a robot or tell it where to go, so that every endpoint is checked
before it is opened, when binding and when connecting alike:

    ipc://PATH    the folder must be one that only this user (or root) can write to; a stranger could
                  otherwise listen there first, and be believed. The socket is this user's alone.
    ipc://NAME    the same in the user's own runtime folder, see `runtime_folder`
    tcp://, on this host    free to use where nobody else can log in (`other_users`); else with keys
    tcp://, elsewhere       CURVE keys

A folder of keys holds `NAME.public` and `NAME.secret` (Z85 text; the secret readable by its
owner alone). The name `server` is the binding side's. On the binding side every other
`.public` in the folder is a client that is let in, under its file's name; all others are
refused and counted. A connecting side needs `server.public` and one secret of its own. Both
sides prove who they are, and the traffic is encrypted. A `~` in a folder's name is the home
folder of the user who reads it, so that one configuration serves hosts with different users.
"""

from __future__ import annotations

import contextlib
import errno
import grp
import ipaddress
import logging
import os
import pwd
import re
import socket
import stat
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil
import zmq
import zmq.auth
from zmq.auth.thread import ThreadAuthenticator

from openhelix.runtime.transport.codec import MAX_FRAME_BYTES

SERVER: Final = "server"
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_KEY: Final = re.compile(rb"[0-9A-Za-z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")
_DOMAIN: Final = "openhelix"
MAX_IPC_PATH: Final = 107  # bytes of sockaddr_un.sun_path, less the final zero
IN_USE_WAIT_NS: Final = 2_000_000_000
TRUST_HOST: Final = "OPENHELIX_TRUST_HOST"
_FIRST_PERSON, _FIRST_SERVICE = 1000, 60_000  # numbers of users, as login.defs has them
_TCP_OPTIONS: Final = {  # a half-open connection is found out and made anew
    zmq.HEARTBEAT_IVL: 1_000,
    zmq.HEARTBEAT_TIMEOUT: 3_000,
    zmq.RECONNECT_IVL_MAX: 1_000,
    zmq.TCP_KEEPALIVE: 1,
}
log = logging.getLogger(__name__)


# Endpoints ---------------------------------------------------------------------------------------


class EndpointRefused(ValueError):
    """An endpoint breaks the policy; the message is one line that says what to do."""


class BindRefused(EndpointRefused):
    """Binding there would open an unauthenticated socket to the network."""


class ConnectRefused(EndpointRefused):
    """Connecting there would trust whoever answers."""


def runtime_folder() -> Path:
    """Return this user's own folder for sockets, made if it is not there yet.

    In XDG_RUNTIME_DIR, which the login manager makes for each user; without one in the system's
    folder for temporary files, where `check_private` finds out whether somebody else was first.
    """
    base = os.environ.get("XDG_RUNTIME_DIR")
    if base and os.path.isdir(base):
        folder = Path(base) / "openhelix"
    else:
        folder = Path(tempfile.gettempdir()) / f"openhelix-{os.geteuid()}"
    with contextlib.suppress(OSError):  # the check says what is wrong with it
        folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def resolved(endpoint: str) -> str:
    """Return the endpoint with the whole path of an `ipc://NAME`; others as they are."""
    name = endpoint.removeprefix("ipc://")
    if name == endpoint or not name or "/" in name or not _NAME.fullmatch(name.partition(".")[0]):
        return endpoint
    return f"ipc://{runtime_folder() / name}"


def check_private(endpoint: str) -> None:
    """Raise `EndpointRefused` unless nobody but this user and root can listen at an ipc endpoint.

    A folder like /tmp will not do, whoever owns what is in it now: a process that starts again
    leaves the name free for a moment.
    """
    path = Path(endpoint.removeprefix("ipc://"))
    use = "use ipc://NAME, which is in your own runtime folder, or a folder of mode 700"
    if str(path).startswith("@") or path.name == "*":
        raise EndpointRefused(f"endpoint {endpoint!r}: anybody may listen at such a name; {use}")
    trusted, folder = _trusted_users(), Path(os.path.realpath(path.parent))
    for place in (folder, *folder.parents):
        try:
            about = os.stat(place)
        except OSError as error:
            raise EndpointRefused(f"endpoint {endpoint!r}: {place}: {error.strerror}") from None
        shared = about.st_mode & stat.S_IWOTH or (
            about.st_mode & stat.S_IWGRP and not _is_own_group(about.st_gid)
        )
        if about.st_uid not in trusted:
            raise EndpointRefused(f"endpoint {endpoint!r}: {place} is another user's; {use}")
        if shared and (place == folder or not about.st_mode & stat.S_ISVTX):
            raise EndpointRefused(
                f"endpoint {endpoint!r}: other users can write to {place}, and listen there in "
                f"your name; {use}"
            )
    with contextlib.suppress(FileNotFoundError):
        about = os.lstat(path)
        if about.st_uid not in trusted or stat.S_ISLNK(about.st_mode):
            raise EndpointRefused(f"endpoint {endpoint!r}: is another user's, or a link; {use}")


def _trusted_users() -> set[int]:
    """Return who may own what leads to a socket: this user, root, and root seen from a container."""
    trusted = {0, os.geteuid()}
    with contextlib.suppress(OSError, ValueError):
        if Path("/proc/self/uid_map").read_text().split()[2] != str(2**32 - 1):
            trusted.add(int(Path("/proc/sys/kernel/overflowuid").read_text()))
    return trusted


def _is_own_group(number: int) -> bool:
    """Whether nobody but this user and root is in a group, as in one that bears the user's name."""
    try:
        members = set(grp.getgrgid(number).gr_mem)
        mine = {pwd.getpwuid(os.geteuid()).pw_name, "root"}
    except KeyError:
        return False
    members |= {user.pw_name for user in pwd.getpwall() if user.pw_gid == number}
    return members <= mine


def other_users() -> list[str]:
    """Return who else can log in on this host or runs a program on it, as far as can be told.

    People, not services: those may reach loopback as well. With OPENHELIX_TRUST_HOST=1 in the
    environment nobody counts, for a container or a host whose users all trust each other.
    """
    if os.environ.get(TRUST_HOST) == "1":
        return []
    people = {user.pw_uid: user.pw_name for user in pwd.getpwall() if _can_log_in(user)}
    for process in psutil.process_iter(["uids"]):
        uids = process.info["uids"]
        if uids is not None and _FIRST_PERSON <= uids.real < _FIRST_SERVICE:
            with contextlib.suppress(KeyError):
                people[uids.real] = pwd.getpwuid(uids.real).pw_name
    return sorted(name for uid, name in people.items() if uid != os.geteuid())


def _can_log_in(user: pwd.struct_passwd) -> bool:
    if not _FIRST_PERSON <= user.pw_uid < _FIRST_SERVICE:
        return False
    if os.path.basename(user.pw_shell) in ("nologin", "false"):
        return False
    try:  # root can see more: a locked account without a key is nobody's
        with open("/etc/shadow") as shadow:
            locked = {row.split(":")[0] for row in shadow if row.split(":")[1][:1] in "!*"}
        keys = Path(user.pw_dir, ".ssh", "authorized_keys")
        return user.pw_name not in locked or keys.exists()
    except (OSError, IndexError):
        return True


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
    if scheme == "ipc" and len(os.fsencode(resolved(endpoint))) - len("ipc://") > MAX_IPC_PATH:
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
    """Raise `EndpointRefused` unless nobody unknown can reach what is bound there."""
    if keys is None and not is_local(endpoint):
        raise BindRefused(
            f"endpoint {endpoint!r}: refusing to bind beyond this host without CURVE keys; "
            "make some with `openhelix keys`, or bind ipc://NAME"
        )
    _check_this_host(endpoint, keys)


def check_connect(endpoint: str, keys: object | None) -> None:
    """Raise `EndpointRefused` unless nobody unknown can be who answers there."""
    if keys is None and not is_local(endpoint):
        raise ConnectRefused(
            f"endpoint {endpoint!r}: refusing to trust another host without CURVE keys; "
            "make some with `openhelix keys`"
        )
    _check_this_host(endpoint, keys)


def _check_this_host(endpoint: str, keys: object | None) -> None:
    """Refuse what other users of this host can reach."""
    if endpoint.startswith("ipc://"):
        check_private(resolved(endpoint))
    elif endpoint.startswith("tcp://") and keys is None and (others := other_users()):
        names = ", ".join(others[:3]) + (" and more" if others[3:] else "")
        raise EndpointRefused(
            f"endpoint {endpoint!r}: {names} can log in on this host and reach it too; use "
            f"ipc://NAME, make keys with `openhelix keys`, or say {TRUST_HOST}=1 if you trust them"
        )


def check_keys(folder: object | None) -> None:
    """Raise `KeyFileError` unless `transport.keys` is a folder, or None."""
    if folder is not None and not Path(str(folder)).expanduser().is_dir():
        raise KeyFileError(
            f"transport.keys: no folder {folder}; `openhelix keys {folder}` makes one"
        )


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
            two ports after it, `ipc://PATH` or `ipc://NAME` at two paths beside it.

    Raises:
        EndpointRefused: the address cannot be used.
    """
    is_local(address)
    address, names = resolved(address), ("requests", "latents")
    if not address.startswith("tcp://"):
        return {"control": address} | {name: f"{address}.{name}" for name in names}
    host, _, port = address.rpartition(":")
    if not port.isdigit() or not 0 < int(port) < 65534:
        raise EndpointRefused(f"endpoint {address!r}: expected tcp://HOST:PORT")
    ports = {name: f"{host}:{int(port) + i}" for i, name in enumerate(names, start=1)}
    return {"control": address} | ports


# CURVE keys --------------------------------------------------------------------------------------


class KeyFileError(ValueError):
    """A key is missing or unusable; the message names the file and what to do."""


@dataclass(frozen=True, slots=True)
class KeyPair:
    """One identity, as Z85 text of 40 bytes each."""

    name: str
    public: bytes
    secret: bytes

    def __repr__(self) -> str:  # a secret must not reach a log
        return f"KeyPair({self.name!r})"


def check_name(name: str) -> None:
    """Raise `KeyFileError` unless it is a plain name of a key pair."""
    if not _NAME.fullmatch(name):
        raise KeyFileError(f"name: {name!r} must be letters, digits, `-` and `_`, at most 64")


def generate(folder: str | Path, name: str) -> KeyPair:
    """Make a key pair and write it to `folder`; an existing one is never overwritten.

    Raises:
        KeyFileError: the name is not a plain one, or has keys already.
    """
    check_name(name)
    folder = Path(folder).expanduser()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    public, secret = zmq.curve_keypair()
    for suffix, key, mode in (("secret", secret, 0o600), ("public", public, 0o644)):
        path = folder / f"{name}.{suffix}"
        try:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        except FileExistsError:
            raise KeyFileError(f"{path}: exists already; remove it to make a new key") from None
        with os.fdopen(handle, "wb") as file:
            file.write(key + b"\n")
    return KeyPair(name, public, secret)


def load(folder: str | Path, name: str) -> KeyPair:
    """Read a key pair.

    Raises:
        KeyFileError: a file is missing or unusable, or others can read the secret.
    """
    folder = Path(folder).expanduser()
    path = folder / f"{name}.secret"
    secret = _read(path)
    if path.stat().st_mode & 0o077:
        raise KeyFileError(f"{path}: other users can read it; run `chmod 600 {path}`")
    public = zmq.curve_public(secret)
    if (folder / f"{name}.public").exists() and _read(folder / f"{name}.public") != public:
        raise KeyFileError(f"{folder}/{name}.public: does not belong to {name}.secret")
    return KeyPair(name, public, secret)


def _read(path: Path) -> bytes:
    try:
        key = path.read_bytes().strip()
    except OSError as error:
        raise KeyFileError(
            f"{path}: {error.strerror}; make keys with `openhelix keys`, and copy over those "
            "of the other side that end in .public"
        ) from None
    if not _KEY.fullmatch(key):
        raise KeyFileError(f"{path}: not a CURVE key of 40 characters")
    return key


class CurveServer:
    """The binding side: its keys, the clients it lets in, and a context that asks them.

    Sockets must be made in `context`: the gatekeeper answers for that context alone.

    Args:
        folder: holds `server.secret` and one `.public` for each client.
    """

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder).expanduser()
        self._keys = load(folder, SERVER)
        self._clients = {
            _read(path): path.stem
            for path in sorted(folder.glob("*.public"))
            if path.stem != SERVER
        }
        self.admitted: Counter[str] = Counter()  # handshakes by client name
        self.refused = 0  # handshakes with a key that is not on the list
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._gate = ThreadAuthenticator(self.context, log=log)
        self._gate.start()
        self._gate.configure_curve_callback(_DOMAIN, credentials_provider=self)

    def callback(self, domain: str, key: bytes) -> bool:
        """Decide on a handshake; called by the gatekeeper's thread with a Z85 key."""
        name = self._clients.get(key)
        if name is None:
            self.refused += 1
            if self.refused & (self.refused - 1) == 0:  # it will try again and again
                log.warning("refused a client with an unknown key, %d times now", self.refused)
            return False
        self.admitted[name] += 1
        return True

    def secure(self, socket: zmq.Socket[bytes]) -> None:
        """Make a socket of `context` demand a listed key; call it before binding."""
        socket.curve_server = True
        socket.curve_secretkey = self._keys.secret
        socket.curve_publickey = self._keys.public
        socket.zap_domain = _DOMAIN.encode()

    def close(self) -> None:
        """Stop the gatekeeper; sockets of `context` must be closed already."""
        if self._gate.is_alive():
            self._gate.stop()
        self.context.term()


class CurveClient:
    """The connecting side: its own keys and the server's public one.

    Args:
        folder: holds `server.public` and the client's secret.
        name: which secret to use; may be left out where there is only one.
    """

    def __init__(self, folder: str | Path, name: str | None = None) -> None:
        folder = Path(folder).expanduser()
        self._server = _read(folder / f"{SERVER}.public")
        if name is None:
            names = sorted(p.stem for p in folder.glob("*.secret") if p.stem != SERVER)
            if len(names) != 1:
                have = ", ".join(names) or "none"
                raise KeyFileError(f"{folder}: expected one client's .secret, found {have}")
            name = names[0]
        self._keys = load(folder, name)
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()

    def secure(self, socket: zmq.Socket[bytes]) -> None:
        """Give a socket the keys; call it before connecting."""
        socket.curve_serverkey = self._server
        socket.curve_secretkey = self._keys.secret
        socket.curve_publickey = self._keys.public

    def close(self) -> None:
        """Nothing to release; here so that both sides close alike."""


Keys = str | Path | CurveServer | CurveClient
"""What sockets accept: a folder of keys, or an object that several sockets share."""


# Sockets -----------------------------------------------------------------------------------------


class Port:
    """One socket with its endpoints and keys.

    Args:
        kind: a ZeroMQ socket type, for example `zmq.PUB`.
        endpoints: one or several; all are bound or all are connected to.
        bind: whether this side binds.
        keys: a folder of CURVE keys, or a shared `CurveServer` or `CurveClient`. Used for TCP
            alone: who may open a Unix socket is for its folder to say, see `check_private`.
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
        named = (endpoints,) if isinstance(endpoints, str) else tuple(endpoints)
        self.endpoints = tuple(resolved(endpoint) for endpoint in named)
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

    def reconnect(self) -> None:
        """Connect anew, at once: an attempt that failed is repeated only after a while.

        For a side that connects, once the other is known to be bound.
        """
        for endpoint in self.endpoints:
            self.socket.disconnect(endpoint)
        self._attach(bind=False)

    def _bind(self, endpoint: str) -> None:
        """Bind, and give a predecessor that is just closing a moment to do so."""
        give_up_ns = time.monotonic_ns() + IN_USE_WAIT_NS
        while True:
            try:
                if is_listening(endpoint):
                    raise zmq.ZMQError(errno.EADDRINUSE)
                self.socket.bind(endpoint)
                if endpoint.startswith("ipc://"):
                    os.chmod(endpoint.removeprefix("ipc://"), 0o600)
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
