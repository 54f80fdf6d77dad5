"""CURVE keys: who may talk to a socket that other hosts can reach.

A folder holds `NAME.public` and `NAME.secret` (Z85 text; the secret readable by its owner
alone). The name `server` is the binding side's. On the binding side every other `.public`
in the folder is a client that is let in, under its file's name; all others are refused and
counted. A connecting side needs `server.public` and one secret of its own. Both sides prove
who they are, and the traffic is encrypted. A `~` in a folder's name is the home of whoever
reads it, so that one configuration serves hosts with different users.
"""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import zmq
import zmq.auth
from zmq.auth.thread import ThreadAuthenticator

SERVER: Final = "server"
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_KEY: Final = re.compile(rb"[0-9A-Za-z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")
_DOMAIN: Final = "openhelix"
log = logging.getLogger(__name__)


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


def generate(folder: str | Path, name: str) -> KeyPair:
    """Make a key pair and write it to `folder`; an existing one is never overwritten.

    Raises:
        KeyFileError: the name is not a plain one, or has keys already.
    """
    if not _NAME.fullmatch(name):
        raise KeyFileError(f"name: {name!r} must be letters, digits, `-` and `_`, at most 64")
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

    @property
    def clients(self) -> tuple[str, ...]:
        """Names of those who are let in."""
        return tuple(sorted(self._clients.values()))

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
