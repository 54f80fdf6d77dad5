"""The catalogue: every table and figure is there, and a wrong entry is one line."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest

from openhelix.benchmarks.evaluation.suites import Suite
from openhelix.benchmarks.paper.catalogue import (
    FOLDER,
    NAMES,
    Published,
    Row,
    catalogue,
    load_catalogue,
)
from openhelix.benchmarks.paper.train_command import check_options
from openhelix.benchmarks.paper.trainings import check_samples, samples, trainings_of
from openhelix.runtime.core.config import ConfigError


def test_every_table_and_figure_is_there():
    assert tuple(catalogue().experiments) == NAMES
    assert {c.finding for e in catalogue().experiments.values() for c in e.contrasts} == {*range(6)}


def test_the_papers_figures_are_as_printed():
    row = catalogue().experiment("table2").row("ft_clip").paper
    assert row.in_a_row == (96, 83, 68, 58, 48) and row.avg_len == 3.53
    assert catalogue().experiment("table9").row("e_aux10").paper.avg_len == 2.26
    assert catalogue().experiment("table1").row("policy").paper.patterns["forward"] == 46
    assert catalogue().experiment("table7").row("ours").paper.avg_len == 4.08


def test_printed_averages_that_do_not_add_up_are_known():
    found = [
        (e.name, row.id)
        for e in catalogue().experiments.values()
        for row in e.rows
        if row.paper is not None and row.paper.disagrees
    ]
    assert found == [("table2", "frozen"), ("table2", "ft"), ("table3", "e_pt_clip")]
    assert Published(in_a_row=(88, 72, 56, 46, 30), avg_len=3.13).length == pytest.approx(2.92)


@pytest.mark.parametrize("scale", list(catalogue().scales))
def test_every_training_is_one_that_openhelix_train_knows(scale):
    for variant in catalogue().variants.values():
        training = trainings_of(variant, catalogue().scale(scale), "", {})
        check_options({k: v for k, v in training.options.items() if k != "policy.checkpoint"})


ARMS = """title: x
rows:
  - {id: a, name: a, variant: frozen}
  - {id: a2, name: a, variant: frozen}
  - {id: b, name: b, variant: frozen_clip}
  - {id: c, name: c, variant: lora_clip}
  - {id: q, name: q}
"""
MOVING = """title: x
rows:
  - {id: a, name: a, variant: frozen, suite: calvin-d, patterns: [left]}
  - {id: b, name: b, variant: frozen_clip, suite: calvin-d}
"""


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("table4.yaml", "title: x\nrows: [{id: a, name: a, variant: nobody}]", "variant 'nobody'"),
        ("table4.yaml", "title: x\nrowz: []", "did you mean 'rows'"),
        ("table4.yaml", "title: x\nrows: [{id: a, name: a}, {id: a, name: b}]", "occurs twice"),
        (
            "table4.yaml",
            "title: x\ncontrasts: [{a: q, b: r, axis: clip, margin: 1, finding: 1, says: x}]",
            "contrast names row 'q'",
        ),
        (
            "table4.yaml",
            f"{ARMS}contrasts: [{{a: a, b: b, axis: clip, finding: 1, says: x}}]",
            "contrasts.0.margin",
        ),
        (
            "table4.yaml",
            f"{ARMS}contrasts: [{{a: a, b: c, axis: clip, margin: 1, finding: 1, says: x}}]",
            "a and c: differ in regime beside the axis 'clip'",
        ),
        (
            "table4.yaml",
            f"{ARMS}contrasts: [{{a: a, b: b, axis: taste, margin: 1, finding: 1, says: x}}]",
            "axis: 'taste' is none of aligned, answer",
        ),
        (
            "table4.yaml",
            f"{ARMS}contrasts: [{{a: a, b: a2, axis: clip, margin: 1, finding: 1, says: x}}]",
            "a and a2: do not differ in 'clip'",
        ),
        (
            "table4.yaml",
            f"{ARMS}contrasts: [{{a: a, b: q, axis: clip, margin: 1, finding: 1, says: x}}]",
            "q is only quoted",
        ),
        (
            "table4.yaml",
            f"{MOVING}contrasts: [{{a: a, b: b, axis: clip, margin: 1, finding: 1, says: x}}]",
            "without the static pattern",
        ),
        ("table4.yaml", "title: x\nbase: z\nrows: [{id: a, name: a}]", "base names row 'z'"),
        ("variants.yaml", "v: {says: x, regime: hypnosis}", "variants.yaml: v: regime"),
        ("variants.yaml", "v: {says: x, latent: gossip}", "latent.kind: 'gossip', want one of"),
        ("variants.yaml", "v: {says: x, latent: lang, proprio: true}", "latent.proprio: 'lang'"),
        ("variants.yaml", "v: {says: x, policy: kept, regime: lora}", "policy: kept has a stage 1"),
        (
            "variants.yaml",
            "v: {says: x, aligned: learning, prealign: false}",
            "aligned: there is no stage 1",
        ),
        ("variants.yaml", "v: {says: x, head: expert}", "head: 'expert' on latent 'act_last'"),
        ("variants.yaml", "v: {says: x, answer: true}", "answer: regime 'prompt' leaves"),
        ("variants.yaml", "v: {says: x, clip_to: sentence}", "clip_to: there is no alignment loss"),
        (
            "variants.yaml",
            "v: {says: x, fitted: true, latent: kv, head: expert}",
            "fitted: read-out 'kv' has no projector",
        ),
        (
            "variants.yaml",
            "v: {says: x, fitted: true, policy: scratch}",
            "fitted: policy 'scratch'",
        ),
        ("variants.yaml", "v: {says: x, longer: 6, regime: frozen}", "longer: 6, want 1 or"),
        ("variants.yaml", "v: {says: x, longer: 8}", "longer: regime 'prompt'"),
        ("scales.yaml", "laptop: {says: x}", "scales.yaml: laptop: sequences"),
    ],
)
def test_a_wrong_entry_is_one_line(tmp_path, file, text, message):
    folder = shutil.copytree(FOLDER, tmp_path / "paper")
    (folder / file).write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_catalogue(folder)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_unknown_names_are_told_with_the_valid_ones():
    with pytest.raises(ConfigError, match=r"no experiment 'table10'; did you mean 'table1'"):
        catalogue().experiment("table10")
    with pytest.raises(ConfigError, match="'huge' is none of smoke, quick, laptop"):
        catalogue().scale("huge")


def made(variant, scale="laptop"):
    return trainings_of(catalogue().variants[variant], catalogue().scale(scale), "", {})


@pytest.mark.parametrize("scale", list(catalogue().scales))
def test_arms_that_are_compared_learn_from_as_many_samples(scale):
    for experiment in catalogue().experiments.values():
        names = {row.variant for row in experiment.rows if row.variant}
        check_samples(experiment, {name: made(name, scale) for name in names})


def test_what_stage_1_is_spared_stage_2_sees():
    assert samples(made("prompt")) == samples(made("e2e_prompt")) == 400 * 8 + 600 * 8
    assert samples(made("lora_clip")) == samples(made("scratch_lora_clip"))
    assert samples(made("base")) == samples(made("shipped")) == 0
    options = made("e2e_lora_clip").options
    assert options["stage1.steps"] == 0 and options["stage2.steps"] == 1000
    for name in ("stage1.start", "stage2.start", "latent.feed", "latent.lag_steps"):
        assert options[name] == made("lora_clip").options[name]


def test_a_policy_that_is_kept_has_all_samples_in_stage_1():
    kept, aligned = made("prompt_kept"), made("prompt_aligned")
    assert samples(kept) == samples(aligned) == samples(made("prompt"))
    assert (kept.options["stage1.steps"], kept.options["stage2.steps"]) == (1000, 0)
    assert kept.parent == made("prompt").parent
    assert aligned.options["stage1.policy"] == "learns"
    assert made("prompt").options["stage1.policy"] == "frozen"


def test_arms_with_other_samples_are_refused():
    table = catalogue().experiment("table6")
    trainings = {name: made(name) for name in ("prompt", "prompt_aux", "prompt_novision", "base")}
    fewer = {**trainings["prompt_aux"].options, "stage2.steps": 5}
    trainings["prompt_aux"] = replace(trainings["prompt_aux"], options=fewer)
    with pytest.raises(ConfigError, match=r"table6.yaml: pt and aux: 8000 and 3240 samples"):
        check_samples(table, trainings)


def test_laptop_measures_enough_starts():
    scale = catalogue().scale("laptop")
    moving = Suite("calvin-d", count=scale.episodes_per_task)
    assert len({e.start for e in moving.episodes()}) >= 60
    assert min(scale.sequences, scale.final_sequences) >= 100


def test_rows_have_the_papers_protocol():
    rows: list[Row] = [r for e in catalogue().experiments.values() for r in e.rows if r.variant]
    assert {row.steps for row in rows} == {60, 360}  # environment steps, never policy calls
    assert all(row.suite == "calvin-d" for row in catalogue().experiment("figure4").rows)
    intervals = [row.interval for row in catalogue().experiment("figure4").rows]
    assert intervals == [1, 2, 5, 10, 20, 30, 60]
