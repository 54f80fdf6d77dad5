"""`openhelix train understanding`: a head, its calibration, its threshold, and what it says of itself."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from openhelix.benchmarks.calvin import refusals
from openhelix.benchmarks.calvin.tasks import TASKS
from openhelix.benchmarks.training import understanding as u
from openhelix.benchmarks.training.config import TrainingConfig
from openhelix.runtime.cli.main import main
from openhelix.system2.latents import LatentConfig, LatentHead
from openhelix.system2.model import SHIPPED, open_checkpoint
from openhelix.system2.understanding import FILE, PlainSentences, Understanding
from openhelix.system2.vlm import NOTHING

FEW = (
    "understanding.requests=1000", "understanding.refusals=140", "understanding.steps=60",
    "understanding.folds=2", "understanding.width=8", "understanding.layers=[1,2]",
)  # fmt: skip


def test_the_stage_writes_a_head_and_what_was_measured(llava, tmp_path, capsys) -> None:
    words = [f"latent.model={llava}", f"out={tmp_path}", *FEW, "--json"]
    assert main(["train", "understanding", *words]) == 0
    report = json.loads(capsys.readouterr().out)["stages"][0]
    head = Understanding.load(tmp_path / FILE)
    assert head.layers == (1, 2) and head.model == open_checkpoint(llava).model_id
    assert head.threshold == report["threshold"] and 0 < head.threshold < 1
    assert json.loads((tmp_path / u.REPORT).read_text())["measured"] == report["measured"]
    measured = report["measured"]
    assert measured["seen"]["n"] == 472 and set(measured["refusals"]["by kind"]) == set(
        refusals.held_out()
    )
    assert 0 <= measured["refusals"]["refused"] <= 1
    by_kind = report["unseen patterns"]["refused, by kind"]
    # Chosen so that few requests are refused, of the patterns not seen and of the other list.
    assert by_kind["plain"] <= 0.05 and report["chosen by"]["development"]["refused"] <= 0.01


def test_calibration_makes_odds_probabilities() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.rand(4000, generator=generator)
    named = (torch.rand(4000, generator=generator) < truth).float()
    odds = 3 * torch.logit(truth.clamp(0.01, 0.99)) + 2  # overconfident, and shifted
    assert u.calibration_error(torch.sigmoid(odds), named) > 0.1
    scale, offset = u.calibrated(odds, named)
    assert u.calibration_error(torch.sigmoid(scale * odds + offset), named) < 0.03
    assert scale == pytest.approx(1 / 3, rel=0.15) and offset == pytest.approx(-2 / 3, abs=0.2)


def test_a_pattern_is_in_one_fold() -> None:
    patterns = [one.pattern for one in refusals.refusals(300)]
    folds = u.fold_of(patterns, 4, seed=1)
    assert len({(p, f) for p, f in zip(patterns, folds, strict=True)}) == len(set(patterns))
    assert set(folds) == {0, 1, 2, 3} and folds != u.fold_of(patterns, 4, seed=2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("understanding.layers=[1,99]",), "understanding.layers: [1, 99] is not within"),
        (("latent.model=/nowhere",), "latent.model: no folder '/nowhere'"),
        (("understanding.requests=3",), "understanding.requests"),
    ],
)
def test_mistakes_are_one_line(llava, tmp_path, words, message, capsys) -> None:
    given = [f"latent.model={llava}", f"out={tmp_path}", *words]
    assert main(["train", "understanding", *given]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in said
    assert not (tmp_path / FILE).exists()


def test_it_reads_middle_layers_that_the_latent_reads(llava, tmp_path) -> None:
    depth = open_checkpoint(llava).layers

    def chosen(**latent: Any) -> tuple[int, ...]:
        return u.layers_for(TrainingConfig(latent={"model": llava, **latent}))

    assert depth == 4 and chosen() == (4,)  # the last state is all that there is
    assert chosen(kind="lang_mean", layers=(1, 2, 3)) == (1, 2)
    file = tmp_path / "latent.safetensors"
    LatentHead(LatentConfig("lang_mean", layers=(2, 4)), 8).save(file)
    assert chosen(init=file) == (2,)
    assert u.layers_for(TrainingConfig(latent={"model": "laptop"})) == (8, 16)


def test_what_is_shipped_judges_the_shipped_models_latents() -> None:
    judge = PlainSentences.load(SHIPPED / FILE)
    head = LatentHead.load(SHIPPED / "latent.safetensors")
    judge.check(open_checkpoint("laptop", head.config.n_act).model_id, judge.codes.shape[1])
    assert judge.sentences[judge.nothing] == NOTHING and len(judge.sentences) == 1 + len(TASKS)


def test_it_needs_no_collection() -> None:
    config = TrainingConfig(data="/nowhere")
    assert u.understanding_folder(config).name == "understanding"
