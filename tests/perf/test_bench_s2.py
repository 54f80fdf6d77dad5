"""What the benchmark of System 2 says of read-outs: every kind, alone and in a batch."""

from __future__ import annotations

import numpy as np
import pytest

from openhelix.benchmarks.perf.bench_s2 import TEXTS, cosines, read
from openhelix.system2.latents import KINDS
from tests.system2.tiny import write_laptop_like


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    folder = tmp_path_factory.mktemp("s2")
    model = str(write_laptop_like(folder / "tiny"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENHELIX_CACHE", str(folder / "cache"))
        read("transformers", "float32", model, "", False, 2, str(folder / "found.npz"))
    return dict(np.load(folder / "found.npz"))


def test_every_read_out_is_there_alone_and_together(found: dict[str, np.ndarray]) -> None:
    assert set(found) == {
        "latent_ms",
        "latent_cpu_ms",
        *(f"{k}/{n}" for k in (*KINDS, "latent") for n in (1, 8)),
    }
    for kind in (*KINDS, "latent"):
        assert len(found[f"{kind}/8"]) == len(found[f"{kind}/1"]) == len(TEXTS)
        assert cosines(found[f"{kind}/8"], found[f"{kind}/1"]) > 0.9999


def test_the_least_cosine_counts() -> None:
    a = np.eye(3)[:, None]
    b = a.copy()
    b[1] = np.eye(3)[2]
    assert cosines(a, a) == pytest.approx(1.0) and cosines(a, b) == pytest.approx(0.0)
