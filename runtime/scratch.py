"""A folder for as long as this process lives, for sockets and the like.

A process that is killed removes nothing, so the next one does: whatever no living process
holds. Who holds a folder has a lock on a file in it, which the kernel gives up with the
process, whatever ended it; a process number could be another's by then.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
from pathlib import Path
from typing import Final

PREFIX: Final = "openhelix-run-"
OWNER: Final = ".owner"


class ScratchFolder:
    """A new private folder, locked by this process; `close` removes it.

    Attributes:
        path: of the folder.
    """

    def __init__(self) -> None:
        remove_abandoned()
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX))
        part = self.path / f"{OWNER}.part"
        self._lock = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        part.rename(self.path / OWNER)  # only now: nobody sees it without its lock

    def close(self) -> None:
        """Remove the folder and what is in it; again does nothing."""
        if self._lock >= 0:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *error: object) -> None:
        self.close()


def remove_abandoned() -> list[Path]:
    """Remove this user's folders whose process is gone; return them."""
    removed = []
    for path in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            if _is_own(path) and _remove_if_free(path):
                removed.append(path)
    return removed


def _is_own(path: Path) -> bool:
    """Whether it is a folder, no link to one, that this user alone can write to."""
    info = path.lstat()
    return stat.S_ISDIR(info.st_mode) and info.st_uid == os.getuid() and not info.st_mode & 0o077


def _remove_if_free(path: Path) -> bool:
    lock = os.open(path / OWNER, os.O_RDWR | os.O_NOFOLLOW)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError: its process lives
        shutil.rmtree(path)
    finally:
        os.close(lock)
    return True
