"""A tower learns to write captions, a language model to be read by, and resuming is exact."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration

from openhelix.runtime.core.files import CheckpointError
from openhelix.system2.model import open_checkpoint
from openhelix.system2.pretrain import (
    Captions,
    PretrainConfig,
    Reader,
    SoftCaption,
    VisionLearner,
    WordingConfig,
    WordingTrainer,
    augment,
    caption_accuracy,
    open_for_training,
    pack,
    train,
)


def write_dataset(folder: Path, n: int = 64) -> Path:
    """Pictures that are dark or bright; the caption is one of two letters."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    bright = rng.integers(0, 2, n)
    images = rng.integers(0, 60, (n, 32, 32, 3)) + 180 * bright[:, None, None, None]
    np.save(folder / "images.npy", images.astype(np.uint8))
    with (folder / "records.jsonl").open("w") as out:
        for row in range(n):
            word = "ab"[bright[row]]
            record = {
                "row": row,
                "group": "x",
                "caption": f"x{word}",
                "questions": [["kind", "which", "it is", word, ["a", "b"]]],
                "numbers": [float(bright[row]), 1.0],
            }
            out.write(json.dumps(record) + "\n")
    return folder


@pytest.fixture(scope="module")
def opened(tiny_model: str, tmp_path_factory) -> tuple[Any, Any, Captions]:
    model, processor, tokenize = open_for_training(tiny_model)
    folder = write_dataset(tmp_path_factory.mktemp("data") / "train")
    return model, processor, Captions(folder, tokenize, 4)


def fresh(tiny_model: str) -> Any:
    return open_for_training(tiny_model)[0]


def test_the_tower_learns_and_the_language_model_does_not(
    tiny_model: str, opened, tmp_path: Path
) -> None:
    _, processor, data = opened
    model = fresh(tiny_model)
    before = {n: p.clone() for n, p in model.model.language_model.named_parameters()}
    start = caption_accuracy(VisionLearner(model, processor, data), data)["all"]
    config = PretrainConfig(steps=60, batch=16, lr=3e-3, warmup=5, save_every=60)
    learner = train(model, processor, data, config, tmp_path)
    assert caption_accuracy(learner, data)["all"] > max(0.95, start)
    for name, value in model.model.language_model.named_parameters():
        assert torch.equal(value, before[name])
    again = open_for_training(tiny_model, tmp_path / "vision.safetensors")[0]
    pixels = data.pixels(np.arange(4))
    other = VisionLearner(again, processor, data)(pixels)
    assert torch.nn.functional.cosine_similarity(other, learner(pixels), dim=-1).min() > 0.99


def test_a_resumed_run_is_the_unbroken_one(
    tiny_model: str, opened, tmp_path: Path, monkeypatch
) -> None:
    _, processor, data = opened
    config = PretrainConfig(steps=6, batch=8, warmup=2, save_every=3)
    whole = train(fresh(tiny_model), processor, data, config, tmp_path / "whole")

    class Stop(Exception):
        pass

    real, calls = torch.nn.utils.clip_grad_norm_, []

    def fifth_fails(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 5:
            raise Stop
        return real(*arguments)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", fifth_fails)
    with pytest.raises(Stop):
        train(fresh(tiny_model), processor, data, config, tmp_path / "parts")
    parts = train(fresh(tiny_model), processor, data, config, tmp_path / "parts")
    for (name, a), (_, b) in zip(whole.named_parameters(), parts.named_parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6), name


def test_captions_of_unequal_length_are_refused(tiny_model: str, tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "bad", 4)
    lines = (folder / "records.jsonl").read_text().replace('"xa"', '"xaaz"', 1)
    (folder / "records.jsonl").write_text(lines.replace('"xb"', '"xbqq b"', 1))
    with pytest.raises(CheckpointError, match="captions"):
        Captions(folder, open_for_training(tiny_model)[2], 4)


def test_augmentation_keeps_shape_and_range() -> None:
    pixels = torch.rand(3, 3, 32, 32)
    made = augment(pixels, 1.0, torch.Generator().manual_seed(0))
    assert made.shape == pixels.shape
    assert made.min() >= 0
    assert made.max() <= 1
    assert torch.equal(augment(pixels, 0.0, torch.Generator()), pixels)


def test_packed_questions_are_answered_as_if_alone(tiny_model: str) -> None:
    model = LlavaForConditionalGeneration.from_pretrained(tiny_model, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    prefix = torch.randn(7, 64, generator=generator)
    questions = [torch.randn(n, 64, generator=generator) for n in (3, 5, 1)]
    rows, mask, positions, ends = pack(prefix, questions)
    language = model.model.language_model
    with torch.no_grad():
        packed = language(
            inputs_embeds=rows[None],
            attention_mask=mask[None, None],
            position_ids=positions[None],
            use_cache=False,
        ).last_hidden_state[0, ends]
        for row, question in enumerate(questions):
            alone = language(inputs_embeds=torch.cat([prefix, question])[None]).last_hidden_state
            assert torch.allclose(packed[row], alone[0, -1], atol=1e-5)


def test_wording_makes_captions_readable_and_resumes(
    tiny_model: str, opened, tmp_path: Path
) -> None:
    model, processor, data = opened
    learner = VisionLearner(model, processor, data)
    index = torch.searchsorted(learner.vocabulary, data.words)
    soft = SoftCaption(learner.table[0], learner.candidates)
    assert torch.equal(soft(index), learner.table[torch.arange(4), index])
    trainer = WordingTrainer(fresh(tiny_model), open_checkpoint(tiny_model), soft)
    told: list[dict[str, float]] = []
    config = WordingConfig(steps=40, captions=4, questions=1, lr=0.05, save_every=40)
    trainer.train(index, data.records, config, tmp_path, told.append)
    assert np.mean([row["right"] for row in told[-8:]]) > 0.9
    again = SoftCaption(learner.table[0], learner.candidates)
    WordingTrainer(fresh(tiny_model), open_checkpoint(tiny_model), again).train(
        index, data.records, config, tmp_path
    )
    assert torch.equal(again.rows, load_file(tmp_path / "wording.safetensors")["rows"])


def test_reader_scores_what_it_is_shown(tiny_model: str, opened, tmp_path: Path) -> None:
    model, processor, data = opened
    learner = VisionLearner(model, processor, data)
    index = torch.searchsorted(learner.vocabulary, data.words)
    soft = SoftCaption(learner.table[0], learner.candidates)
    plain = fresh(tiny_model)
    config = WordingConfig(steps=40, captions=4, questions=1, lr=0.05, save_every=40)
    WordingTrainer(plain, open_checkpoint(tiny_model), soft).train(
        index, data.records, config, tmp_path
    )
    reader = Reader(plain, open_checkpoint(tiny_model))
    table, places = soft.dense().detach(), torch.arange(4)

    def tokens(row: int) -> torch.Tensor:
        return table[places, index[row]]

    records = data.records[:20]
    scores = {s: reader.accuracy(records, s, tokens) for s in ("image", "none", "other")}
    assert scores["image"]["all"].accuracy > 0.9
    assert scores["image"]["kind"].asked == 20
    share = sum(r["questions"][0][3] == "a" for r in records) / 20
    assert scores["none"]["all"].accuracy == pytest.approx(share) or scores["none"][
        "all"
    ].accuracy == pytest.approx(1 - share)
    assert scores["other"]["all"].accuracy < 0.9
