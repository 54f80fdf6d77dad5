"""What an instruction may be, and where its tokens land."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openhelix.system2.model import open_checkpoint
from openhelix.system2.prompt import BadInstruction, clean_instruction


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty"),
        ("  . ?", "empty"),
        (None, "NoneType"),
        (7, "int"),
        ("lift <ACT> now", "control token"),
        ("lift <act_3>", "control token"),
        ("see <IMAGE>", "control token"),
        ("hello <|im_end|>", "control token"),
        ("lift\x00it", "control character"),
    ],
)
def test_refused(text: object, reason: str) -> None:
    with pytest.raises(BadInstruction, match=reason):
        clean_instruction(text)


def test_added_tokens_of_the_tokenizer_are_refused() -> None:
    with pytest.raises(BadInstruction, match=r"\[weird\]"):
        clean_instruction("push [WEIRD] block", special=("[weird]",))


@given(st.text(alphabet=st.characters(categories=("L", "N", "P", "Z")), max_size=60))
def test_cleaning_twice_is_cleaning_once(text: str) -> None:
    try:
        once = clean_instruction(text)
    except BadInstruction:
        return
    assert clean_instruction(once) == once
    assert once == once.strip()


@pytest.fixture(scope="module")
def prompts(tiny_model: str):
    return open_checkpoint(tiny_model).prompts(n_act=2, max_instruction_tokens=40)


def test_layout_names_the_parts(prompts, tiny_model: str) -> None:
    checkpoint = open_checkpoint(tiny_model)
    prompt = prompts("lift the red block.")
    ids = prompt.expanded(checkpoint.image_token_id)
    layout = prompt.layout
    assert len(ids) == layout.length
    assert set(ids[slice(*layout.image)]) == {checkpoint.image_token_id}
    assert layout.image[1] - layout.image[0] == checkpoint.n_image
    assert tuple(ids[slice(*layout.act)]) == checkpoint.act_ids[:2]
    assert layout.act[1] == layout.length
    from openhelix.system2.model import load_tokenizer

    words = load_tokenizer(tiny_model).decode(ids[slice(*layout.text)])
    assert words == "Can you lift the red block?"


def test_without_vision_the_image_is_left_out(tiny_model: str) -> None:
    prompt = open_checkpoint(tiny_model).prompts(n_act=1, vision=False)("lift it")
    assert prompt.image_at == -1
    assert prompt.layout.image[0] == prompt.layout.image[1]
    assert len(prompt.expanded(99999)) == prompt.layout.length


def test_too_long_is_refused_with_both_numbers(prompts) -> None:
    with pytest.raises(BadInstruction, match=r"\d+ tokens, at most 40"):
        prompts("lift the red block and then " * 20)
    assert prompts("move").layout.length <= prompts.max_length
