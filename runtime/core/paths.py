"""Locates the files shipped with the project, in a checkout and in an installed wheel.

Both have the same folders side by side (`runtime/`, `configs/`, `checkpoints/`, …): at the top
of a checkout, and inside the installed package `openhelix`. Whatever is written goes elsewhere:
results to the working directory, downloads and built models to the cache.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[2]
CHECKOUT: Final = ROOT if (ROOT / "openhelix" / "__init__.py").is_file() else None
CONFIGS: Final = ROOT / "configs"
CHECKPOINTS: Final = ROOT / "checkpoints"


def cache_folder() -> Path:
    """Return the folder of downloads, data and built models: OPENHELIX_CACHE or ~/.cache/openhelix."""
    return Path(os.environ.get("OPENHELIX_CACHE") or Path.home() / ".cache" / "openhelix")


class CacheFolderError(ValueError):
    """The cache cannot be written; the one line names OPENHELIX_CACHE, which says where it is."""


def make_in_cache(folder: Path) -> Path:
    """Return a folder of the cache, made if it is not there yet.

    Raises:
        CacheFolderError: it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise CacheFolderError(
            f"OPENHELIX_CACHE: cannot write to {cache_folder()}: {error.strerror}; "
            "name a folder that can be written"
        ) from None
    return folder
