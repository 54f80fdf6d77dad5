"""Folders made once and named by their content, safe when several processes start together.

A checkpoint that is assembled from parts costs half a minute; every later start should cost
nothing, and a half-written folder must never be mistaken for a whole one. So a folder is
built under a temporary name, renamed into place in one step, and a file lock keeps a second
process waiting instead of building it again.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def cache_dir() -> Path:
    """Return OPENHELIX_CACHE, or `~/.cache/openhelix`."""
    named = os.environ.get("OPENHELIX_CACHE")
    return Path(named) if named else Path.home() / ".cache" / "openhelix"


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes as hexadecimal digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on `path` (created if missing) while the block runs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(stream, fcntl.LOCK_UN)


def build_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """Return `folder`, made by `build(empty temporary folder)` unless it is there already.

    Several processes may call this at once: one builds, the others wait and find it done. A
    build that fails leaves nothing behind.
    """
    if folder.is_dir():
        return folder
    with locked(folder.with_name(folder.name + ".lock")):
        if folder.is_dir():
            return folder
        staging = Path(tempfile.mkdtemp(prefix=folder.name + ".", dir=folder.parent))
        try:
            build(staging)
            staging.chmod(0o755)
            staging.rename(folder)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
    return folder
