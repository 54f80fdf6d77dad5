"""Checkpoints: assembled once, described, taken as they are at full size, refused when unfit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration

from openhelix.system2 import model
from openhelix.system2.model import (
    MANIFEST,
    CheckpointError,
    act_token,
    load_tokenizer,
    load_vision,
    open_checkpoint,
    vision_state,
)
from tests.system2 import tiny


def test_act_is_a_word_of_tokenizer_and_table(tiny_model: str) -> None:
    checkpoint = open_checkpoint(tiny_model, n_act=4)
    tokenizer = load_tokenizer(tiny_model)
    assert tokenizer.convert_tokens_to_ids(act_token(0)) == checkpoint.act_ids[0]
    assert tokenizer.convert_tokens_to_ids(act_token(3)) == checkpoint.act_ids[3]
    assert tokenizer("<ACT>", add_special_tokens=False)["input_ids"] == [checkpoint.act_ids[0]]
    model = LlavaForConditionalGeneration.from_pretrained(tiny_model)
    assert model.get_input_embeddings().weight.shape[0] > max(checkpoint.act_ids)
    assert (checkpoint.n_image, checkpoint.hidden, checkpoint.layers) == (4, 64, 4)


def test_llava_15_gives_act_its_spare_rows(tmp_path: Path) -> None:
    path = str(tiny.write_llava_15_like(tmp_path / "llava", vocab=384))
    checkpoint = open_checkpoint(path)
    assert checkpoint.path == path  # 14 GB at full size: nothing is copied
    assert checkpoint.act_ids[0] >= len(load_tokenizer(path))
    assert max(checkpoint.act_ids) < 384
    assert checkpoint.template.name == "llava_v1"
    assert open_checkpoint(path).model_id == checkpoint.model_id


def test_a_full_table_is_written_anew_with_rows_for_act(tmp_path: Path) -> None:
    words = len(tiny.tokenizer(["<s>", "</s>"])) + 2
    path = str(tiny.write_llava_15_like(tmp_path / "llava", vocab=words))
    checkpoint = open_checkpoint(path, n_act=2)
    assert checkpoint.path != path
    assert len(checkpoint.act_ids) >= 2
    old = LlavaForConditionalGeneration.from_pretrained(path).get_input_embeddings().weight
    new = (
        LlavaForConditionalGeneration.from_pretrained(checkpoint.path).get_input_embeddings().weight
    )
    assert torch.equal(new[:words], old)
    assert new.shape[0] > max(checkpoint.act_ids)


def test_vision_weights_round_trip_and_are_strict(tiny_model: str) -> None:
    model = LlavaForConditionalGeneration.from_pretrained(tiny_model)
    state = vision_state(model)
    changed = {key: value + 1 for key, value in state.items()}
    load_vision(model, changed)
    for key, value in vision_state(model).items():
        assert torch.equal(value, changed[key])
    changed.pop(next(iter(changed)))
    with pytest.raises(CheckpointError, match="does not fit"):
        load_vision(model, changed)


def test_tower_names_are_those_that_vllm_reads(tiny_model: str) -> None:
    keys = load_file(Path(tiny_model) / "model.safetensors").keys()
    tower = [key for key in keys if "vision_tower." in key]
    assert tower
    assert all("vision_tower.vision_model." in key for key in tower)
    config = json.loads((Path(tiny_model) / "config.json").read_text())
    assert "quantization_config" not in config["text_config"]
    assert (Path(tiny_model) / MANIFEST).is_file()


def test_what_is_no_llava_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no folder"):
        open_checkpoint(str(tmp_path / "missing"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match="want a 'llava'"):
        open_checkpoint(str(tmp_path / "other"))


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Warnings of `openhelix.system2.model`."""
    return [r.getMessage() for r in caplog.records if r.name == "openhelix.system2.model"]


def test_a_missing_shipped_tower_is_told_and_a_chosen_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    language = tmp_path / "language.gguf"
    language.write_bytes(b"words")
    taken: list[Path | None] = []
    monkeypatch.setattr(model, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(model, "language_model_file", lambda: language)
    monkeypatch.setattr(model, "_assemble", lambda *args: taken.append(args[3]))
    folder = model.build()
    again = model.build()  # assembled already, and as untrained as before
    assert folder == again and taken == [None]
    missing = tmp_path / "shipped" / "vision.safetensors"
    assert len(told(caplog)) == 2
    assert all(str(missing) in line and "random weights" in line for line in told(caplog))
    caplog.clear()
    model.build(vision=model.VisionShape(layers=1))
    missing.parent.mkdir()
    missing.write_bytes(b"weights")
    assert model.build() != folder
    assert taken == [None, None, missing] and not told(caplog)


@pytest.mark.slow
def test_the_laptop_model_is_assembled_and_found_again() -> None:
    first = open_checkpoint("laptop")
    assert (first.n_image, first.hidden, first.layers) == (64, 576, 30)
    assert open_checkpoint("laptop") == first
