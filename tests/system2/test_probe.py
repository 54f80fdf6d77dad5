"""The probe: words, similarities, the command line, and one JSON object."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from openhelix.runtime.core.config import ConfigError
from openhelix.system2.engines.transformers import TransformersEngine
from openhelix.system2.probe import WordSpace, main, probe, probe_episode
from openhelix.system2.prompt import BadImage


@pytest.fixture(scope="module")
def engine(tiny_model: str) -> TransformersEngine:
    return TransformersEngine(tiny_model, dtype="float32", device="cpu")


@pytest.fixture
def picture(tmp_path: Path, images) -> Path:
    Image.fromarray(images[0]).save(tmp_path / "view.png")
    return tmp_path / "view.png"


def test_a_word_is_nearest_to_itself(engine) -> None:
    import torch

    space = WordSpace(engine.checkpoint)
    word = space._words[5]
    assert space.nearest(space._rows[5], 3)[0] == {
        "word": word,
        "cosine": pytest.approx(1.0, abs=1e-4),
    }
    similar = space.similarity(torch.randn(2, 64), ["left", "right"])
    assert similar.shape == (2, 2)
    assert similar.abs().max() <= 1.0


def test_an_episode_has_a_row_a_frame(engine, images) -> None:
    made = probe_episode(images, ["push it"] * 3, engine, words=("left", "right"), top=4)
    assert len(made["steps"]) == 3
    assert made["steps"][0]["drift"] == pytest.approx(1.0, abs=1e-5)
    for step in made["steps"]:
        assert set(step["similarity"]) == {"left", "right"}
        assert sum(step["probability"].values()) == pytest.approx(1.0, abs=1e-4)
        cosines = [n["cosine"] for n in step["nearest"]]
        assert len(cosines) == 4
        assert cosines == sorted(cosines, reverse=True)


def test_probe_gives_the_engines_latent(engine, picture: Path) -> None:
    made = probe(picture, "push it", engine)
    assert made["shape"] == [1, 512]
    direct = engine.encode([Image.open(picture).convert("RGB")], ["push it"])[0]
    assert np.allclose(made["latent"], direct, atol=1e-5)


def test_command_prints_one_json_object(picture: Path, tiny_model: str, capsys, tmp_path) -> None:
    words = ["--image", str(picture), str(picture), "--text", "push it", "--words", "left, right"]
    words += ["--engine", "transformers", "--model", tiny_model, "--json"]
    assert main([*words, "--plot", str(tmp_path / "p.png")]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["words"] == ["left", "right"]
    assert len(made["steps"]) == 2
    assert Image.open(tmp_path / "p.png").size[0] > 100


def test_command_refuses_bad_input(tmp_path: Path, picture: Path) -> None:
    with pytest.raises(BadImage, match="cannot read"):
        main(["--image", str(tmp_path / "none.png"), "--text", "push it"])
    with pytest.raises(ConfigError, match="--text"):
        main(["--image", str(picture)])
    with pytest.raises(ConfigError, match="unknown option"):
        main(["--image", str(picture), "--text", "a", "--frobnicate"])
