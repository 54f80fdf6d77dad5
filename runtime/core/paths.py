"""Locates the files shipped with the project, in a checkout and in an installed wheel.

Both have the same folders side by side (`runtime/`, `configs/`, `checkpoints/`, …): at the top
of a checkout, and inside the installed package `openhelix`. Whatever is written goes elsewhere:
results to the working directory, downloads and built models to the cache.
"""

from __future__ import annotations

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
