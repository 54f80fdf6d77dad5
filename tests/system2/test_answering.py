"""Both engines write the same words, up to the closing token; bad questions are one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration

from openhelix.benchmarks.evaluation import asking
from openhelix.runtime.cli.main import main
from openhelix.system2.answering import MAX_WORDS, TransformersAnswerer
from openhelix.system2.engines.vllm import VllmAnswerer
from openhelix.system2.latents import LatentConfig, LatentHead
from openhelix.system2.model import load_tokenizer
from openhelix.system2.prompt import BadInstruction

QUESTIONS = ["where is the red block?", "open?", "what is on the left"]


@pytest.fixture(scope="module")
def talker(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny model without its liking for special tokens, so that it says words."""
    folder = tmp_path_factory.mktemp("talker") / "model"
    shutil.copytree(tiny_model, folder)
    state = load_file(folder / "model.safetensors")
    special = sorted(load_tokenizer(tiny_model).get_added_vocab().values())
    for name, value in state.items():
        if "embed_tokens" in name or "lm_head" in name:
            value *= 8.0
            value[special] = 0.0
        elif "layers" in name and "proj" in name:
            value *= 6.0
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    about = json.loads((folder / "openhelix.json").read_text())
    (folder / "openhelix.json").write_text(json.dumps({**about, "model_id": "talker"}))
    return str(folder)


@pytest.fixture(scope="module")
def plain(talker: str) -> TransformersAnswerer:
    return TransformersAnswerer(talker, dtype="float32", device="cpu")


def test_vllm_writes_what_transformers_writes(talker: str, plain, images) -> None:
    served = VllmAnswerer(talker, dtype="float32", max_batch=4)
    try:
        said = plain.answer(images, QUESTIONS)
        assert served.answer(images, QUESTIONS) == said and all(said)
    finally:
        served.close()


def test_an_answer_ends_with_the_closing_token(talker: str, images) -> None:
    answerer = TransformersAnswerer(talker, dtype="float32", device="cpu")
    before = answerer.answer(images[:1], QUESTIONS[:1])[0]
    tokenizer = load_tokenizer(talker)
    assert len(tokenizer(before)["input_ids"]) > MAX_WORDS / 2
    # A model that closes at once says nothing.
    model: LlavaForConditionalGeneration = answerer._model
    end = tokenizer.eos_token_id
    model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight))
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(len(model.lm_head.weight)))
    with torch.no_grad():
        model.lm_head.bias[end] = 1.0
    assert answerer.answer(images[:1], QUESTIONS[:1]) == [""]


def test_the_picture_and_the_question_count(plain, images) -> None:
    black = np.zeros_like(images[0])
    answers = plain.answer([images[0], black, images[0]], [*QUESTIONS[:1] * 2, QUESTIONS[2]])
    assert answers[0] != answers[1] and answers[0] != answers[2]


def test_bad_questions_are_refused(plain, images) -> None:
    with pytest.raises(BadInstruction, match=r"^ask: empty"):
        plain.answer(images[:1], [" "])
    with pytest.raises(BadInstruction, match="control token"):
        plain.answer(images[:1], ["where is <image>?"])


def test_probe_ask_prints_answers(tiny_model: str, tmp_path: Path, capsys) -> None:
    picture = tmp_path / "table.png"
    Image.fromarray(np.full((60, 60, 3), 90, np.uint8)).save(picture)
    words = ["probe", "--ask", "where?", "--ask", "open?", "--image", str(picture)]
    words += ["--model", tiny_model, "--engine", "transformers", "--json"]
    assert main(words) == 0
    made = json.loads(capsys.readouterr().out)
    assert [row["question"] for row in made["answers"]] == ["where?", "open?"]
    assert made["engine"] == "transformers" and made["image"] == str(picture)


def test_an_answer_beside_the_latent_comes_behind_its_act(
    tiny_model: str, talker: str, images, tmp_path: Path, capsys
) -> None:
    table = LlavaForConditionalGeneration.from_pretrained(talker).get_input_embeddings().weight
    said = []
    for seed in (1, 2):
        head = LatentHead.fresh(LatentConfig(n_act=2), table.float(), seed=seed)
        head.act.data *= 20
        head.save(tmp_path / f"{seed}.safetensors")
        answerer = TransformersAnswerer(
            talker, dtype="float32", device="cpu", latent=tmp_path / f"{seed}.safetensors"
        )
        said += answerer.answer(images[:1], ["lift the red block"])
        prompt = answerer._prompts("lift the red block")
        assert prompt.ids[-2:] == answerer.checkpoint.act_ids[:2]
        assert "can you lift the red block" in prompt.text.lower()
    assert said[0] != said[1]  # another <ACT>, another answer
    picture = tmp_path / "table.png"
    Image.fromarray(images[0]).save(picture)
    words = ["--ask", "lift the red block", "--image", str(picture), "--model", talker]
    words += ["--latent", str(tmp_path / "1.safetensors"), "system2.engine.options.dtype=float32"]
    assert asking.main([*words, "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["engine"] == "transformers" and made["answers"][0]["answer"] == said[0]


def test_probe_ask_shows_a_scene(tiny_model: str, tmp_path: Path, capsys) -> None:
    saved = [tmp_path / f"{seed}.png" for seed in (1, 1, 2)]
    for path, seed in zip(saved, ("1", "1", "2"), strict=True):
        words = ["--ask", "where?", "--scene", "A", "--seed", seed, "--save", str(path)]
        assert asking.main([*words, "--model", tiny_model, "--engine", "transformers"]) == 0
    assert saved[0].read_bytes() == saved[1].read_bytes() != saved[2].read_bytes()
    assert capsys.readouterr().out.count("where?") == 3


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--ask", "where?"], "--scene A..D or --image FILE"),
        (["--ask", "where?", "--scene", "D", "--image", "x.png"], "name one picture"),
        (["--ask", "where?", "--scene", "Z"], "scene: 'Z' is not one of A, B, C, D"),
        (["--ask", "where?", "--scene", "D", "--engine", "magic"], "engine: 'magic'"),
        (["--ask", "where?", "--scene", "D", "--seed", "-1"], "--seed: input should be greater"),
        (
            ["--ask", "lift it", "--scene", "D", "--engine", "vllm", "--latent", "x.safetensors"],
            "latent: vllm answers without <ACT>; say --engine transformers",
        ),
        (["--ask", "lift it", "--scene", "D", "--latent", "no.safetensors"], "no.safetensors"),
    ],
)
def test_bad_words_are_one_line(words: list[str], said: str, capsys) -> None:
    with pytest.raises(ValueError, match=said):  # a ConfigError or a SceneError
        asking.main(words)
    assert main(["probe", *words]) == 2
    assert said.replace("\\", "") in capsys.readouterr().err
