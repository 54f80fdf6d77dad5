"""Generated URDF and OBJ files, in a cache named by their content.

Bullet reads shapes from files only. They are written once per content: into a folder named
by a hash of what goes in, made beside its final place and moved there in one step, so that
any number of processes may start at once and a changed dimension never meets a stale file.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path


def cache_dir() -> Path:
    """The project's cache folder: OPENHELIX_CACHE, else ~/.cache/openhelix."""
    root = os.environ.get("OPENHELIX_CACHE")
    return Path(root) if root else Path.home() / ".cache" / "openhelix"


def content_folder(kind: str, files: Mapping[str, bytes]) -> Path:
    """Return the folder that holds exactly `files`, writing it if it is not there yet.

    Args:
        kind: what they are; a folder name under the cache.
        files: contents by relative file name.
    """
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(f"{name}\0{len(files[name])}\0".encode())
        digest.update(files[name])
    final = cache_dir() / "playtable" / kind / digest.hexdigest()[:20]
    if final.is_dir():
        return final
    final.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=".new-", dir=final.parent))
    try:
        for name, data in files.items():
            (made / name).write_bytes(data)
        made.chmod(0o755)
        made.rename(final)
    except OSError:
        if not final.is_dir():  # a rename onto a folder that another process just made is fine
            raise
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return final
