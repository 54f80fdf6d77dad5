"""Who can reach an endpoint: keys beyond this host, folders and users on it; dead sockets."""

from __future__ import annotations

import os
import socket
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import zmq

from openhelix.runtime.transport import sockets
from openhelix.runtime.transport.sockets import (
    BindRefused,
    ConnectRefused,
    EndpointRefused,
    Port,
    check_bind,
    check_connect,
    is_listening,
    is_local,
    other_users,
    resolved,
    served,
)


@pytest.mark.parametrize(
    "endpoint",
    [
        "ipc://{private}/a.sock",
        "ipc://a",
        "inproc://a",
        "tcp://127.0.0.1:5",
        "tcp://127.3.2.1:*",
        "tcp://localhost:80",
        "tcp://[::1]:80",
    ],
)
def test_local_endpoints_need_no_keys(endpoint: str, tmp_path: Path) -> None:
    endpoint = endpoint.format(private=tmp_path)
    assert is_local(endpoint)
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


CHECKS = pytest.mark.parametrize("check", [check_bind, check_connect])


@CHECKS
@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o702])
def test_a_folder_that_others_can_write_to_is_refused(check, tmp_path: Path, mode: int) -> None:
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(EndpointRefused, match=r"other users can write to .*/shared.*ipc://NAME"):
        check(f"ipc://{folder}/system2", None)
    with pytest.raises(EndpointRefused):  # keys say nothing of who listens at a Unix socket
        check(f"ipc://{folder}/system2", "keys")
    inside = folder / "mine"
    inside.mkdir(mode=0o700)
    if mode & 0o1000:  # nobody else can put another folder in the place of this one
        check(f"ipc://{inside}/system2", None)
    else:
        with pytest.raises(EndpointRefused, match="other users can write to"):
            check(f"ipc://{inside}/system2", None)


@CHECKS
def test_the_systems_own_shared_folder_is_refused(check) -> None:
    with pytest.raises(EndpointRefused, match="/tmp"):
        check("ipc:///tmp/system2", None)


@CHECKS
def test_a_link_to_a_shared_folder_is_seen_through(check, tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o777)
    (tmp_path / "link").symlink_to(tmp_path / "shared")
    with pytest.raises(EndpointRefused, match="/shared"):
        check(f"ipc://{tmp_path}/link/system2", None)


@CHECKS
@pytest.mark.parametrize("what", ["folder", "above", "socket"])
def test_what_belongs_to_another_user_is_refused(
    check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    folder = tmp_path / "above" / "folder"
    folder.mkdir(parents=True)
    place = {"folder": folder, "above": tmp_path / "above", "socket": folder / "system2"}[what]
    bound = socket.socket(socket.AF_UNIX)
    bound.bind(str(folder / "system2"))
    check(f"ipc://{folder}/system2", None)
    belongs_to_another(monkeypatch, place)
    with pytest.raises(EndpointRefused, match="another user"):
        check(f"ipc://{folder}/system2", None)
    bound.close()


def belongs_to_another(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    """Let the system say that a file is another user's, which takes root to bring about."""
    for name in ("stat", "lstat"):
        real = getattr(os, name)

        def told(path, *words, real=real, **more):
            found = real(path, *words, **more)
            if str(path) != str(place):
                return found
            return SimpleNamespace(st_uid=os.geteuid() + 4242, st_gid=0, st_mode=found.st_mode)

        monkeypatch.setattr(f"openhelix.runtime.transport.sockets.os.{name}", told)


@CHECKS
@pytest.mark.parametrize("endpoint", ["ipc://@system2", "ipc://*", "ipc:///no/such/folder/x"])
def test_names_without_a_folder_are_refused(check, endpoint: str) -> None:
    with pytest.raises(EndpointRefused):
        check(endpoint, None)


def test_a_name_is_in_the_users_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert resolved("ipc://system2.requests") == f"ipc://{tmp_path}/openhelix/system2.requests"
    assert (tmp_path / "openhelix").stat().st_mode & 0o777 == 0o700
    assert served("ipc://system2") == {
        "control": f"ipc://{tmp_path}/openhelix/system2",
        "requests": f"ipc://{tmp_path}/openhelix/system2.requests",
        "latents": f"ipc://{tmp_path}/openhelix/system2.latents",
    }
    for other in ("ipc:///a/b", "ipc://a/b", "tcp://127.0.0.1:5", "ipc://*"):
        assert resolved(other) == other
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert resolved("ipc://x") == f"ipc://{tmp_path}/openhelix-{os.geteuid()}/x"


def test_a_runtime_folder_that_somebody_else_made_first_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    (tmp_path / "openhelix").mkdir()
    (tmp_path / "openhelix").chmod(0o777)
    with pytest.raises(EndpointRefused, match="other users can write"):
        Port(zmq.PUB, "ipc://x", bind=True)


def test_a_bound_socket_is_this_users_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        port = Port(zmq.PUB, f"ipc://{tmp_path}/x", bind=True)
    finally:
        os.umask(before)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o600
    peer = Port(zmq.SUB, f"ipc://{tmp_path}/x", bind=False)
    peer.close()
    port.close()


class User(NamedTuple):
    pw_name: str
    pw_uid: int
    pw_dir: str
    pw_shell: str = "/bin/bash"
    pw_gid: int = 4242


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[User]:
    """A host whose accounts a test says."""
    users: list[User] = []
    monkeypatch.delenv(sockets.TRUST_HOST)
    monkeypatch.setattr(sockets.pwd, "getpwall", lambda: users)
    monkeypatch.setattr(sockets.psutil, "process_iter", lambda _: [])
    return users


@CHECKS
def test_loopback_needs_keys_where_others_can_log_in(check, shared: list[User]) -> None:
    check("tcp://127.0.0.1:5", None)
    shared.append(User("alice", os.geteuid() + 2000, "/nowhere"))
    for endpoint in ("tcp://127.0.0.1:5", "tcp://localhost:5", "tcp://[::1]:5"):
        with pytest.raises(EndpointRefused, match=r"alice can log in.*OPENHELIX_TRUST_HOST=1"):
            check(endpoint, None)
        check(endpoint, "keys")
    check("inproc://a", None)


def test_who_counts_as_another_user(
    shared: list[User], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sockets.os, "geteuid", lambda: 1000)
    shared += [
        User("me", 1000, str(tmp_path)),
        User("root", 0, "/root"),
        User("www-data", 33, "/var/www", "/bin/sh"),
        User("nobody", 65534, "/", "/usr/sbin/nologin"),
        User("backup", 1001, "/", "/usr/sbin/nologin"),
        User("ftp", 1002, "/", "/bin/false"),
    ]
    assert other_users() == []
    shared.append(User("bob", 1003, str(tmp_path)))
    assert other_users() == ["bob"]
    monkeypatch.setenv(sockets.TRUST_HOST, "1")
    assert other_users() == []


def test_who_runs_a_program_here_counts_though_no_list_names_them(
    shared: list[User], monkeypatch: pytest.MonkeyPatch
) -> None:
    uids = SimpleNamespace(real=os.geteuid() + 5000)
    monkeypatch.setattr(
        sockets.psutil, "process_iter", lambda _: [SimpleNamespace(info={"uids": uids})]
    )
    monkeypatch.setattr(sockets.pwd, "getpwuid", lambda _: User("carol", uids.real, "/"))
    assert other_users() == ["carol"]


@pytest.mark.parametrize(("key", "counts"), [(False, False), (True, True)])
def test_a_locked_account_counts_only_with_a_key(
    shared: list[User], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: bool, counts: bool
) -> None:
    shadow = tmp_path / "shadow"
    shadow.write_text("root:*:1::::::\ndave:!:20263::::::\n")
    real = open
    monkeypatch.setattr(
        "builtins.open", lambda f, *a, **k: real(shadow if f == "/etc/shadow" else f, *a, **k)
    )
    shared.append(User("dave", os.geteuid() + 2000, str(tmp_path)))
    if key:
        (tmp_path / ".ssh").mkdir()
        (tmp_path / ".ssh" / "authorized_keys").touch()
    assert other_users() == (["dave"] if counts else [])


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
