"""Checkpoints: assembled once, described, taken as they are at full size, refused when unfit."""

from __future__ import annotations

import json
import re
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration

from openhelix.runtime.core.files import BadFile, CheckpointError
from openhelix.system2 import model
from openhelix.system2.engines.transformers import TransformersEngine
from openhelix.system2.engines.vllm import VllmEngine
from openhelix.system2.model import (
    MANIFEST,
    act_token,
    layers_at_hand,
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
    template = checkpoint.template
    assert (template.head, template.body, template.tail) == ("USER: ", "\n", " ASSISTANT:")
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
    with pytest.raises(CheckpointError, match="is a 'llama', known families are llava"):
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
    assert layers_at_hand("laptop") == layers_at_hand("smollm2") == first.layers


# ------------------------------------------------------------------------------------------------
# What is damaged, hostile or not whole


def changed(tiny_model: str, folder: Path, edit: Any = None, **config: Any) -> str:
    """A copy of a LLaVA with other weights, or other sizes in its description."""
    shutil.copytree(tiny_model, folder)
    file = folder / "model.safetensors"
    if edit is not None:
        state = load_file(file)
        edit(state)
        save_file(state, file, metadata={"format": "pt"})
    if config:
        about = json.loads((folder / "config.json").read_text())
        for section, values in config.items():
            (about[section] if section else about).update(values)
        (folder / "config.json").write_text(json.dumps(about))
    return str(folder)


def without(word: str) -> Any:
    def edit(state: dict[str, torch.Tensor]) -> None:
        for name in [name for name in state if word in name]:
            del state[name]

    return edit


def misnamed(state: dict[str, torch.Tensor]) -> None:
    name = next(name for name in state if name.endswith("self_attn.q_proj.weight"))
    state[name.replace("q_proj", "q_prog")] = state.pop(name)


def narrower(state: dict[str, torch.Tensor]) -> None:
    name = next(name for name in state if name.endswith("mlp.down_proj.weight"))
    state[name] = state[name][:-1].contiguous()


@pytest.mark.parametrize("engine", [TransformersEngine, VllmEngine])
@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (without("vision_tower."), r"missing model\.vision_tower\.embeddings\.class_embedding"),
        (without("multi_modal_projector"), r"missing model\.multi_modal_projector\.linear_1"),
        (misnamed, r"2 weights do not fit: missing .*q_proj\.weight; unknown .*q_prog\.weight"),
        (narrower, r"down_proj\.weight has shape \(63, 128\), needs \(64, 128\)"),
        (lambda state: state.update(more=torch.zeros(3)), r"unknown .*more"),
    ],
)
def test_no_engine_serves_weights_that_are_not_all_there(
    tiny_model: str, tmp_path: Path, engine: Any, edit: Any, said: str
) -> None:
    folder = changed(tiny_model, tmp_path / "llava", edit)
    with pytest.raises(CheckpointError, match=f"{re.escape(folder)}.*{said}") as caught:
        engine(folder, untrained=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(tiny_model: str, tmp_path: Path, bad: float) -> None:
    def edit(state: dict[str, torch.Tensor]) -> None:
        name = next(name for name in state if name.endswith("mlp.down_proj.weight"))
        state[name].view(-1)[3] = bad

    folder = changed(tiny_model, tmp_path / "llava", edit)
    with pytest.raises(BadFile, match=r"down_proj\.weight has values that are not finite"):
        TransformersEngine(folder, untrained=True)


def test_weights_of_whole_numbers_are_refused_by_name(tiny_model: str, tmp_path: Path) -> None:
    def edit(state: dict[str, torch.Tensor]) -> None:
        name = next(name for name in state if name.endswith("mlp.down_proj.weight"))
        state[name] = state[name].float().view(torch.int32)

    folder = changed(tiny_model, tmp_path / "llava", edit)
    with pytest.raises(CheckpointError, match=r"safetensors: .*down_proj\.weight is I32, needs fr"):
        TransformersEngine(folder, untrained=True)


@pytest.mark.parametrize("name", ["tokenizer.json", "processor_config.json"])
def test_an_engine_without_its_processor_says_so_in_a_line(
    tiny_model: str, tmp_path: Path, name: str
) -> None:
    folder = changed(tiny_model, tmp_path / "llava")
    (tmp_path / "llava" / name).write_bytes(b'{"version"')
    with pytest.raises(BadFile) as caught:
        TransformersEngine(folder, untrained=True)
    assert folder in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("section", "values", "said"),
    [
        ("text_config", {"vocab_size": 10**9}, "text_config.vocab_size: 1000000000 is not in"),
        ("text_config", {"num_hidden_layers": 10**6}, "num_hidden_layers: 1000000 is not in"),
        ("text_config", {"num_hidden_layers": 250}, "describes at least"),
        ("text_config", {"num_hidden_layers": 5}, r"missing .*layers\.4\."),
        ("text_config", {"hidden_size": 32_000}, "describes at least"),
        ("text_config", {"hidden_size": "64"}, "hidden_size"),
        ("vision_config", {"image_size": 10**6}, "vision_config.image_size: 1000000 is not in"),
        ("vision_config", {"patch_size": 0}, "vision_config.patch_size: 0 is not in"),
        ("vision_config", {"num_hidden_layers": -1}, "num_hidden_layers: -1 is not in"),
        ("", {"image_token_index": 10**6}, "image_token_index: 1000000 is no row of a table of"),
        ("", {"image_token_index": -1}, "image_token_index: -1 is no row of a table of"),
        ("", {"vision_feature_layer": -99}, "vision_feature_layer: -99 is not in -3..2"),
        ("", {"vision_feature_layer": [1, 99]}, "vision_feature_layer: 99 is not in -3..2"),
    ],
)
def test_a_description_beyond_reason_is_refused_before_anything_is_built(
    tiny_model: str, tmp_path: Path, section: str, values: dict[str, Any], said: str
) -> None:
    folder = changed(tiny_model, tmp_path / "llava", **{section: values})
    with pytest.raises(CheckpointError, match=said) as caught:
        open_checkpoint(folder)
    assert folder in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("config.json", b"{", "config.json: not JSON"),
        ("config.json", b"[]", "holds list, must be a JSON object"),
        ("config.json", b"", "config.json: not JSON"),
        ("model.safetensors", b"", "not safetensors: 0 bytes"),
        ("model.safetensors", struct.pack("<Q", 2**62) + b"{}", "claims a header"),
        ("model.safetensors", None, "holds no weights: neither .safetensors"),
        ("tokenizer.json", b"{", "has no tokenizer"),
        ("openhelix.json", b"[]", "holds list"),
        ("openhelix.json", b"{", "not JSON"),
        ("openhelix.json", b'{"act_ids": [99999999]}', "is no row of a table of"),
        ("openhelix.json", b'{"act_ids": "x"}', "act_ids: must be a list"),
        ("openhelix.json", b'{"model_id": 3}', "model_id: must be text"),
        ("openhelix.json", b'{"template": "nope"}', "template: 'nope' is none of"),
        (
            "processor_config.json",
            b'{"image_processor": {"size": {"height": 1000000, "width": 3}}}',
            "size: 1000000 is not in",
        ),
    ],
)
def test_a_damaged_file_of_a_llava_is_named(
    tiny_model: str, tmp_path: Path, name: str, content: bytes | None, said: str
) -> None:
    folder = changed(tiny_model, tmp_path / "llava")
    if content is None:
        (tmp_path / "llava" / name).unlink()
    else:
        (tmp_path / "llava" / name).write_bytes(content)
    with pytest.raises(BadFile, match=re.escape(said)) as caught:
        open_checkpoint(folder).prompts(1)
    assert folder in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "about",
    [
        "{",
        "[]",
        json.dumps({"shipped": False}),
        json.dumps({f: 10**9 for f in ("image_size", "patch_size", "width", "layers", "heads")}),
        json.dumps({f: "1" for f in ("image_size", "patch_size", "width", "layers", "heads")}),
    ],
)
def test_a_small_base_model_with_a_false_account_is_named(tmp_path: Path, about: str) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "vision.safetensors", metadata={"tower": about})
    with pytest.raises(BadFile, match=r"vision\.safetensors: its account of the tower"):
        open_checkpoint(str(tmp_path))


def test_layers_are_known_without_weights_where_a_file_says_them(
    tiny_model: str, tmp_path: Path
) -> None:
    assert layers_at_hand(tiny_model) == open_checkpoint(tiny_model).layers
    assert layers_at_hand(str(tmp_path)) is None and layers_at_hand("owner/name") is None
    with pytest.raises(CheckpointError, match="model: no folder 'nosuch'; valid: laptop, smollm2"):
        layers_at_hand("nosuch")
