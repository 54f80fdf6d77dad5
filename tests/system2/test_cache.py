"""Folders built once; a module of its own, since its child processes import it."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest

from openhelix.runtime.core.paths import cache_folder
from openhelix.system2.model import build_once, sha256_file


def _build_slowly(folder: str, log: str) -> None:
    def build(out: Path) -> None:
        with Path(log).open("a") as stream:
            stream.write("built\n")
        for index in range(20):
            (out / f"{index}").write_text("x" * 1000)

    made = build_once(Path(folder), build)
    assert len(list(made.iterdir())) == 20


def test_processes_that_start_together_build_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    target, log = str(tmp_path / "made"), str(tmp_path / "log")
    workers = [context.Process(target=_build_slowly, args=(target, log)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert Path(log).read_text() == "built\n"


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def fail(out: Path) -> None:
        (out / "half").write_text("")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        build_once(tmp_path / "made", fail)
    assert {path.name for path in tmp_path.iterdir()} <= {"made.lock"}


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OPENHELIX_CACHE", str(tmp_path / "here"))
    assert cache_folder() == tmp_path / "here"
    monkeypatch.delenv("OPENHELIX_CACHE")
    assert cache_folder() == Path.home() / ".cache" / "openhelix"


def test_digest_is_sha256(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    assert sha256_file(tmp_path / "f").startswith("ba7816bf8f01cfea")
