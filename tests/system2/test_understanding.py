"""The head that judges instructions: what it reads, what it is beside, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from openhelix.runtime.core.config import load
from openhelix.runtime.core.files import CheckpointError
from openhelix.runtime.core.interfaces import Judgement, judged
from openhelix.system2.engines.text import TextEngine
from openhelix.system2.engines.transformers import TransformersEngine
from openhelix.system2.latents import LatentConfig, LatentHead
from openhelix.system2.model import open_checkpoint
from openhelix.system2.prompt import BadInstruction
from openhelix.system2.text import TextReader, fitted_code
from openhelix.system2.understanding import FILE, PlainSentences, Understanding, beside
from tests.system2.conftest import TEXTS

LAYERS = (1, 2)


def head(tiny_model: str, layers: tuple[int, ...] = LAYERS, seed: int = 0) -> Understanding:
    """A head of random weights, with a spread of opinions."""
    checkpoint = open_checkpoint(tiny_model)
    torch.manual_seed(seed)
    made = Understanding(layers, checkpoint.hidden, 8, checkpoint.model_id, threshold=0.5)
    with torch.no_grad():
        made.last.weight.mul_(20)
    return made.eval().requires_grad_(False)


@pytest.fixture
def weights(tiny_model: str, tmp_path: Path) -> Path:
    """The latent's weights, with the head's beside them."""
    checkpoint = open_checkpoint(tiny_model)
    config = LatentConfig("lang_mean", layers=LAYERS)
    LatentHead.fresh(config, torch.randn(50, checkpoint.hidden)).save(
        tmp_path / "latent.safetensors"
    )
    head(tiny_model).save(tmp_path / FILE)
    return tmp_path / "latent.safetensors"


def test_an_engine_judges_by_the_head_beside_its_weights(
    tiny_model: str, weights: Path, images
) -> None:
    engine = TransformersEngine(tiny_model, latent_projector=weights, dtype="float32", device="cpu")
    reader = TextReader(tiny_model, LAYERS)
    expected = head(tiny_model).judge(reader.states(TEXTS), LAYERS)
    found = engine.judge(TEXTS)
    assert [j.refused for j in found] == [j.refused for j in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.understood == pytest.approx(other.understood, abs=1e-4)
    assert len({round(j.understood, 4) for j in found}) == len(TEXTS)
    alone = [engine.judge([text])[0] for text in reversed(TEXTS)][::-1]
    assert alone == found  # remembered, and what is said once stays said
    fresh = TransformersEngine(tiny_model, latent_projector=weights, dtype="float32", device="cpu")
    for text, one in zip(TEXTS, found, strict=True):
        assert fresh.judge([text])[0].understood == pytest.approx(one.understood, abs=1e-4)
    assert engine.encode(images, TEXTS).shape[0] == 3  # and it still encodes
    with pytest.raises(BadInstruction, match=r"instructions\[1\]"):
        engine.judge(["push it", ""])
    fresh.close()
    with pytest.raises(RuntimeError, match="closed"):
        fresh.judge(["something new"])


def test_without_a_head_everything_is_understood(tiny_model: str, weights: Path) -> None:
    off = TransformersEngine(
        tiny_model, latent_projector=weights, dtype="float32", device="cpu", understanding="off"
    )
    assert judged(off, TEXTS) == [Judgement()] * 3
    words = load(None, ["system2.engine.options.understanding=off"]).system2.engine.options
    assert beside(weights, words["understanding"]) is None  # as a command line says it
    (weights.parent / FILE).unlink()
    plain = TransformersEngine(tiny_model, latent_projector=weights, dtype="float32", device="cpu")
    assert judged(plain, TEXTS) == [Judgement()] * 3


def test_the_threshold_and_the_calibration_decide(tiny_model: str) -> None:
    made, states = head(tiny_model), TextReader(tiny_model, LAYERS).states(TEXTS)
    plain = [j.understood for j in made.judge(states, LAYERS)]
    made.threshold = sorted(plain)[1]
    assert sum(j.refused for j in made.judge(states, LAYERS)) == 1
    made.offset.fill_(3.0)
    assert all(j.understood > p for j, p in zip(made.judge(states, LAYERS), plain, strict=True))
    # Layers that the head does not read may be among those that there are.
    wide = TextReader(tiny_model, (0, 1, 2)).states(TEXTS)
    assert made.judge(wide, (0, 1, 2)) == made.judge(states, LAYERS)


def test_one_token_can_be_enough(tiny_model: str) -> None:
    """The maximum over the tokens: a sentence with a bad word is as bad with more good ones."""
    made = head(tiny_model, layers=(1,))
    with torch.no_grad():
        made.inner.weight.zero_()
        made.inner.weight[0, 0], made.inner.bias[:] = 1.0, 0.0
        made.last.weight.zero_()
        made.last.weight[0, 0] = -5.0
    good = torch.zeros(4, made.hidden)
    bad = good.clone()
    bad[1, 0] = 4.0
    longer = torch.cat([bad, torch.zeros(9, made.hidden)])
    p = made.probability([good, bad, longer])
    assert p[0] > 0.4 > p[1] and p[1] == pytest.approx(float(p[2]), abs=1e-6)


def test_a_policy_told_in_words_has_its_own(tiny_model: str, tmp_path: Path, images) -> None:
    reader = TextReader(tiny_model, LAYERS)
    fitted_code(reader, TEXTS, dim=4).save(tmp_path / "text.safetensors")
    assert judged(TextEngine(tmp_path, tiny_model), TEXTS) == [Judgement()] * 3
    head(tiny_model).save(tmp_path / FILE)
    engine = TextEngine(tmp_path, tiny_model)
    expected = head(tiny_model).judge(reader.states(TEXTS), LAYERS)
    for one, other in zip(engine.judge(TEXTS), expected, strict=True):
        assert one.understood == pytest.approx(other.understood, abs=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "another"}, "understanding: fitted to model another"),
        ({"layers": (1, 3)}, r"layers \[1, 3\], this read-out has those after \[1, 2\]"),
    ],
)
def test_a_head_of_something_else_is_refused(
    tiny_model: str, weights: Path, change: dict[str, Any], message: str
) -> None:
    made = head(tiny_model, change.get("layers", LAYERS))
    made.model = change.get("model", made.model)
    made.save(weights.parent / FILE)
    with pytest.raises(CheckpointError, match=message):
        TransformersEngine(tiny_model, latent_projector=weights, dtype="float32", device="cpu")


# -- By the latent itself ----------------------------------------------------------------------


def plain_of(engine: TransformersEngine, images, nothing: int = 1) -> PlainSentences:
    """Plain sentences whose latents are those of the texts, one of which is to say "do nothing"."""
    codes = torch.from_numpy(engine.encode(images, TEXTS)).mean(1)
    apart = torch.cdist(codes, codes) + torch.eye(len(codes)) * 1e9
    unit = float(apart.amin(1).square().mean())
    return PlainSentences(codes, nothing, unit, engine.checkpoint.model_id, tuple(TEXTS))


def test_an_engine_refuses_what_its_latent_calls_nothing(
    tiny_model: str, weights: Path, images
) -> None:
    def started(**more: Any) -> TransformersEngine:
        own = {"latent_projector": weights, "dtype": "float32", "device": "cpu"}
        return TransformersEngine(tiny_model, **own, **more)

    plain = plain_of(started(understanding="off"), images)
    plain.save(weights.parent / FILE)
    assert torch.equal(PlainSentences.load(weights.parent / FILE).codes, plain.codes)
    engine = started()
    assert engine.judges_latents and not started(understanding="off").judges_latents
    latents = engine.encode(images, TEXTS)
    found = judged(engine, TEXTS, latents)
    assert [one.refused for one in found] == [False, True, False]
    assert found[1].understood < 0.5 < min(found[0].understood, found[2].understood)
    assert max(one.understood for one in found) < 1.0  # 1 would say that nobody judged
    assert found == plain.judge(torch.from_numpy(latents))
    # Two robots that are told the same words are judged each by what it sees.
    twice = [TEXTS[1], TEXTS[1]]
    assert [one.refused for one in judged(engine, twice, latents[[1, 0]])] == [True, False]
    with pytest.raises(ValueError, match="latents: must be what encode gave"):
        judged(engine, TEXTS)
    # Without the projector there is no latent to judge.
    assert judged(started(raw=True), TEXTS) == [Judgement()] * 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "another"}, "understanding: fitted to model another"),
        ({"codes": torch.zeros(3, 5)}, "understanding: of latents of 5 numbers"),
        ({"nothing": 3}, "do not fit each other"),
        ({"codes": torch.zeros(2, 8)}, "do not fit each other"),
        ({"unit": 0.0}, "do not fit each other"),
        ({"codes": torch.full((3, 8), torch.nan)}, "not finite"),
    ],
)
def test_plain_sentences_of_something_else_are_refused(
    tiny_model: str, weights: Path, images, change: dict[str, Any], message: str
) -> None:
    own = {"latent_projector": weights, "dtype": "float32", "device": "cpu"}
    engine = TransformersEngine(tiny_model, **own, understanding="off")
    replace(plain_of(engine, images), **change).save(weights.parent / FILE)
    with pytest.raises(CheckpointError, match=message):
        TransformersEngine(tiny_model, **own)


def test_a_bare_sentence_has_no_latent_to_judge(tiny_model: str, tmp_path: Path) -> None:
    fitted_code(TextReader(tiny_model, LAYERS), TEXTS, dim=4).save(tmp_path / "text.safetensors")
    PlainSentences(torch.zeros(2, 4), 0, 1.0, "any", ("do nothing", "go")).save(tmp_path / FILE)
    with pytest.raises(CheckpointError, match="a base model's latents, not bare sentences"):
        TextEngine(tmp_path, tiny_model)


def test_files_that_hold_no_head(tmp_path: Path, tiny_model: str) -> None:
    assert beside(None, None) is None and beside(tmp_path / "latent.safetensors", None) is None
    with pytest.raises(CheckpointError, match=r"understanding: .*no such file"):
        beside(None, tmp_path / "nothing.safetensors")
    LatentHead(LatentConfig(), 8).save(tmp_path / "latent.safetensors")
    with pytest.raises(CheckpointError, match="its account of the head: not JSON"):
        Understanding.load(tmp_path / "latent.safetensors")
    broken = head(tiny_model)
    broken.mean[0] = torch.nan
    broken.save(tmp_path / FILE)
    with pytest.raises(CheckpointError, match="not finite"):
        Understanding.load(tmp_path / FILE)
