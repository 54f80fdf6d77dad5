"""A killed process's folder goes with the next start; nothing else does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from openhelix.runtime.launch.graph import OWNER, PREFIX, ScratchFolder, remove_abandoned

HOLD = """
import sys
from openhelix.runtime.launch.graph import ScratchFolder
folder = ScratchFolder()
(folder.path / "a.sock").touch()
print(folder.path, flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def own_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


@pytest.fixture
def holder() -> Iterator[tuple[subprocess.Popen[str], Path]]:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        yield process, Path(process.stdout.readline().strip())
        process.kill()


def test_a_killed_processs_folder_goes_and_a_living_ones_stays(
    holder: tuple[subprocess.Popen[str], Path], own_tmp: Path
) -> None:
    process, folder = holder
    assert folder.parent == own_tmp
    assert not remove_abandoned() and (folder / "a.sock").exists()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert folder.exists()
    with ScratchFolder() as own:
        assert not folder.exists() and own.exists()
        assert own.stat().st_mode & 0o777 == 0o700
        assert not remove_abandoned() and own.exists()
    assert not list(own_tmp.iterdir())


def test_what_is_not_such_a_folder_is_left_alone(
    own_tmp: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    elsewhere.chmod(0o700)
    (elsewhere / OWNER).touch()
    (own_tmp / f"{PREFIX}link").symlink_to(elsewhere)
    linked = own_tmp / f"{PREFIX}linked-owner"
    linked.mkdir(mode=0o700)
    (linked / OWNER).symlink_to(elsewhere / OWNER)
    (own_tmp / f"{PREFIX}file").touch()
    (own_tmp / f"{PREFIX}new").mkdir(mode=0o700)  # its process has not locked it yet
    shared = own_tmp / f"{PREFIX}shared"
    shared.mkdir()
    shared.chmod(0o777)
    (shared / OWNER).touch()
    private = own_tmp / f"openhelix-{os.getuid()}"  # sockets with long names, of any process
    private.mkdir(mode=0o700)
    (private / OWNER).touch()
    before = sorted(own_tmp.iterdir())
    assert not remove_abandoned()
    assert sorted(own_tmp.iterdir()) == before and (elsewhere / OWNER).exists()


def test_it_is_closed_twice_without_harm() -> None:
    folder = ScratchFolder()
    folder.close()
    folder.close()
    assert not folder.path.exists()
