"""The bare sentence as a policy is told it: states, code, engine."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from openhelix.runtime.core.files import CheckpointError
from openhelix.system2.engines.text import TextEngine
from openhelix.system2.prompt import BadInstruction
from openhelix.system2.text import FILE, TextCode, TextError, TextReader, fitted_code
from openhelix.system2.understanding import Understanding
from tests.system2.tiny import write_laptop_like

SAID = [
    "lift the red block",
    "move the slider to the left",
    "open the drawer",
    "turn on the light",
    "push the blue block right",
]
IMAGE = np.zeros((64, 64, 3), np.uint8)


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return str(write_laptop_like(tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture(scope="module")
def reader(llava):
    return TextReader(llava, (1, 3))


@pytest.fixture(scope="module")
def code(reader):
    return fitted_code(reader, SAID, words=2, dim=8)


def test_states_are_the_language_models_own(llava, reader):
    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(llava, dtype=torch.float32)
    ids = torch.tensor([reader.ids(SAID[0])])
    with torch.inference_mode():
        out = model.model.language_model(input_ids=ids, output_hidden_states=True)
    want = torch.cat((out.hidden_states[1], out.hidden_states[3]), -1)[0]
    assert torch.allclose(reader.states(SAID[:1])[0], want, atol=1e-5)


def test_a_sentence_is_the_same_in_any_company(reader, code):
    together = reader.encode(code, SAID)
    for row, text in zip(together, SAID, strict=True):
        assert torch.allclose(row, reader.encode(code, [text])[0], atol=1e-4)


def test_a_code_gives_every_channel_its_own_scale_and_keeps_what_differs(reader):
    code = fitted_code(reader, SAID, dim=8)
    means = reader.means(SAID)
    z = (means - code.mean) / code.spread
    assert torch.allclose(z.mean(0), torch.zeros_like(code.mean), atol=1e-4)
    told = code(means)
    # Five points differ in four directions: nothing of their distances is lost in eight.
    assert torch.allclose(torch.cdist(told, told), torch.cdist(z, z), rtol=1e-3, atol=1e-3)
    kept = code.basis[:4] @ code.basis[:4].T
    assert torch.allclose(kept, torch.eye(4), atol=1e-4)


def test_words_follow_the_mean_and_missing_ones_are_zero(reader, code):
    latent = reader.encode(code, ["go"])[0]
    count = min(2, len(reader.ids("go")))
    assert latent.shape == (3, 8)
    states = reader.states(["go"])[0]
    assert torch.allclose(latent[0], code(states.mean(0)), atol=1e-4)
    assert torch.allclose(latent[1 : 1 + count], code(states[:count]), atol=1e-4)
    assert not latent[1 + count :].any()
    assert code.spec.n_tokens == 3 and code.spec.dim == 8 and code.spec.kind == "text@1+3"


def test_a_code_comes_back_from_its_file_and_no_other_has_its_name(code, tmp_path):
    code.save(tmp_path / FILE)
    back = TextCode.load(tmp_path / FILE)
    assert back.spec == code.spec and torch.equal(back.basis, code.basis)
    assert replace(code, mean=code.mean + 1).spec.model_id != code.spec.model_id
    (tmp_path / "junk").write_bytes(b"junk")
    with pytest.raises(TextError, match=r"text: .*junk: not safetensors"):
        TextCode.load(tmp_path / "junk")


def test_how_a_policy_reads_a_code_comes_back_and_changes_no_name(code, tmp_path):
    read = replace(code, reading=torch.randn(6, len(code.basis)))
    read.save(tmp_path / FILE)
    again = TextCode.load(tmp_path / FILE)
    assert torch.equal(again.reading, read.reading) and again.spec == code.spec
    replace(code, reading=torch.randn(6, len(code.basis) + 1)).save(tmp_path / FILE)
    with pytest.raises(TextError, match="do not fit each other"):
        TextCode.load(tmp_path / FILE)


def test_the_engine_says_what_the_reader_says(llava, reader, code, tmp_path):
    code.save(tmp_path / FILE)
    engine = TextEngine(tmp_path, llava)
    engine.warm_up()
    assert engine.spec == code.spec
    latents = engine.encode([IMAGE, IMAGE], SAID[:2])
    assert latents.dtype == np.float32 and latents.shape == (2, 3, 8)
    assert np.allclose(latents, reader.encode(code, SAID[:2]).numpy(), atol=1e-4)
    again = engine.encode([IMAGE + 9], SAID[:1])  # whatever it sees, however often it is asked
    assert np.array_equal(again[0], latents[0])
    with pytest.raises(BadInstruction, match=r"instructions\[1\]: .*empty"):
        engine.encode([IMAGE, IMAGE], ["lift", "  "])


@pytest.mark.parametrize("layers", [(), (3, 1), (1, 1), (0, 99), (-1,)])
def test_layers_that_are_not_there_are_refused(llava, layers):
    with pytest.raises(TextError, match="layers"):
        TextReader(llava, layers)


def test_a_code_of_other_layers_is_refused(reader, code):
    with pytest.raises(TextError, match="the code is for layers"):
        reader.encode(replace(code, layers=(1, 2)), ["go"])
    with pytest.raises(TextError, match="at least 2"):
        fitted_code(reader, SAID[:1])


TEXT = {"layers": [1, 3], "words": 2, "model": "m"}
CODE = {"mean": torch.zeros(8), "spread": torch.ones(8), "basis": torch.eye(8)[:4].clone()}
JUDGE = {"layers": [2], "hidden": 4, "width": 3, "model": "m", "threshold": 0.5, "note": {}}


@pytest.mark.parametrize(
    ("about", "change"),
    [
        ("{", {}),
        ("[]", {}),
        (json.dumps(TEXT | {"layers": "1"}), {}),
        (json.dumps(TEXT | {"words": 10**9}), {}),
        (json.dumps(TEXT | {"words": "2"}), {}),
        (json.dumps({"words": 2}), {}),
        (json.dumps(TEXT | {"layers": [1, 2, 3]}), {}),
        (json.dumps(TEXT), {"mean": torch.zeros(3)}),
        (json.dumps(TEXT), {"basis": torch.zeros(4, 7)}),
        (json.dumps(TEXT), {"basis": torch.full((4, 8), float("nan"))}),
        (json.dumps(TEXT), {"basis": torch.ones(4, 8, dtype=torch.int32)}),
        (json.dumps(TEXT), {"more": torch.zeros(1)}),
    ],
)
def test_a_code_that_is_not_as_it_says_is_refused_in_one_line(tmp_path, about, change):
    path = tmp_path / "text.safetensors"
    save_file(CODE, path, metadata={"text": json.dumps(TEXT)})
    assert TextCode.load(path).layers == (1, 3)
    save_file(CODE | change, path, metadata={"text": about})
    with pytest.raises(TextError) as caught:
        TextCode.load(path)
    assert str(caught.value).startswith(f"text: {path}: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("about", "change"),
    [
        ("{", {}),
        ("null", {}),
        (json.dumps(JUDGE | {"width": 10**9}), {}),
        (json.dumps(JUDGE | {"hidden": 10**9}), {}),
        (json.dumps(JUDGE | {"threshold": "0.5"}), {}),
        (json.dumps({"layers": [2]}), {}),
        (json.dumps(JUDGE), {"mean": torch.zeros(3)}),
        (json.dumps(JUDGE), {"inner.weight": torch.full((3, 8), float("inf"))}),
        (json.dumps(JUDGE), {"more": torch.zeros(1)}),
    ],
)
def test_a_judge_that_is_not_as_it_says_is_refused_in_one_line(tmp_path, about, change):
    path = tmp_path / "understanding.safetensors"
    head = Understanding([2], 4, 3, "m")
    head.save(path)
    assert Understanding.load(path).layers == (2,)
    save_file(load_file(path) | change, path, metadata={"understanding": about})
    with pytest.raises(CheckpointError) as caught:
        Understanding.load(path)
    assert str(caught.value).startswith(f"understanding: {path}: ")
    assert "\n" not in str(caught.value)
