"""The folder that vLLM is given: the same weights, a tokenizer of two words."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import AutoProcessor

from openhelix.system2.engines.serving import serving_folder
from openhelix.system2.model import open_checkpoint


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OPENHELIX_CACHE", str(tmp_path))
    return tmp_path


def test_an_image_becomes_the_same_tokens_and_pixels(tiny_model: str, cache: Path) -> None:
    checkpoint = open_checkpoint(tiny_model)
    served = serving_folder(checkpoint)
    assert Path(served).is_relative_to(cache)
    assert served == serving_folder(checkpoint)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8))
    full, lean = (AutoProcessor.from_pretrained(path) for path in (tiny_model, served))
    word = full.image_token
    assert lean.image_token == word
    theirs, ours = (p(text=word, images=[image], return_tensors="np") for p in (full, lean))
    tokens = [int(t) for t in np.asarray(ours["input_ids"]).ravel()]
    assert tokens == [checkpoint.image_token_id] * checkpoint.n_image
    assert tokens == [t for t in theirs["input_ids"].ravel() if t == checkpoint.image_token_id]
    assert np.array_equal(np.asarray(theirs["pixel_values"]), np.asarray(ours["pixel_values"]))
    assert len(lean.tokenizer) == 2


def test_weights_are_links_and_the_words_are_left_out(tiny_model: str, cache: Path) -> None:
    served = Path(serving_folder(open_checkpoint(tiny_model)))
    weights = list(served.glob("*.safetensors"))
    assert weights and all(file.is_symlink() and file.exists() for file in weights)
    assert not (served / "tokenizer.json").is_symlink()
    assert (served / "config.json").read_text() == (Path(tiny_model) / "config.json").read_text()


def test_what_is_no_folder_or_says_no_word_stays_as_it_is(tiny_model: str, cache: Path) -> None:
    checkpoint = open_checkpoint(tiny_model)
    bare = cache / "bare"
    bare.mkdir()
    for file in Path(tiny_model).iterdir():
        if file.name != "processor_config.json":
            (bare / file.name).symlink_to(file)
    for path in (str(bare), "owner/model"):
        assert serving_folder(replace(checkpoint, path=path)) == path
