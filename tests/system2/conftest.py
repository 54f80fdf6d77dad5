"""A tiny checkpoint for each session, and a cache folder of its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.system2 import tiny


@pytest.fixture(scope="session", autouse=True)
def thrown_away(own_cache: Path) -> None:
    """What these tests write to the cache is thrown away."""


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.write_laptop_like(tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture(scope="session")
def images() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 255, (60, 80, 3), dtype=np.uint8) for _ in range(3)]


TEXTS = ["lift the red block", "open the drawer", "turn on the light bulb, then move left"]
