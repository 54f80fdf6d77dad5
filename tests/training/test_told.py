"""Policies told by sentences, from lists in files to System 2 in the sentences' place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from openhelix.benchmarks.evaluation.eval import TEXT_CODE, TEXT_ENGINE, told_in_words
from openhelix.benchmarks.paper.train_command import told_by_name
from openhelix.benchmarks.training import export as export_module
from openhelix.benchmarks.training.export import SYSTEM1, export
from openhelix.benchmarks.training.stages import JointRun, run_policy
from openhelix.benchmarks.training.told import prepare_told, sentences_of
from openhelix.runtime.core.config import ConfigError
from openhelix.system1.checkpoint import load_policy
from openhelix.system1.latent_adapter import adapter_tokens
from openhelix.system1.policy import DiffusionPolicy
from openhelix.system1.sentences import Sentences
from openhelix.system2.engines.text import TextEngine
from openhelix.system2.text import FILE, TextCode, TextReader
from tests.system1.synthetic import make_cache
from tests.system1.test_policy import tiny
from tests.training.conftest import settings

TASKS = ("open_drawer", "close_drawer")
LISTS = {
    "open_drawer": ["open the drawer", "pull the drawer", "draw the drawer open", "drawer open"],
    "close_drawer": ["close the drawer", "push the drawer", "shut the drawer", "drawer shut"],
}
WORDS = ("policy.told=sentence", "policy.text_layers=[1,2]", "policy.sentence_noise=0.1")


@pytest.fixture(scope="module")
def named(tmp_path_factory) -> Path:
    """Frames of two of the table's tasks."""
    folder = tmp_path_factory.mktemp("named") / "frames"
    make_cache(folder, tiny(n_tasks=2), episodes=10, frames=6)
    index = folder / "cache.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"tasks": list(TASKS)}))
    return folder


@pytest.fixture(scope="module")
def lists(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("lists") / "said.json"
    path.write_text(json.dumps(LISTS))
    return path


@pytest.fixture(scope="module")
def told_policy(named, llava, lists, tmp_path_factory) -> Path:
    """The folder of a training of a few steps."""
    out = tmp_path_factory.mktemp("told")
    run_policy(configured(named, llava, lists, out), 0)
    return out / "policy"


def configured(frames, llava, lists, out, *more):
    own = (f"policy.sentences={lists}", f"policy.text_model={llava}")
    return settings(frames, llava, out, *WORDS, *own, *more)


def test_lists_are_encoded_once_and_a_part_is_held_out(named, llava, lists, tmp_path) -> None:
    config = configured(named, llava, lists, tmp_path)
    files = prepare_told(config)
    said, held = Sentences.load(files.sentences), Sentences.load(files.held)
    assert said.texts == [t for task in TASKS for t in LISTS[task][1:]]
    assert held.texts == ["open the drawer", "close the drawer"]
    before = files.held.stat().st_mtime_ns
    assert prepare_told(config) == files and files.held.stat().st_mtime_ns == before
    assert (
        prepare_told(configured(named, llava, lists, tmp_path, "policy.text_layers=[2]")) != files
    )


def test_a_told_policy_acts_on_the_engine_beside_it(told_policy, llava) -> None:
    policy = DiffusionPolicy.load(told_policy)
    engine = TextEngine(told_policy, llava)
    assert engine.spec == policy.spec.latent
    history = json.loads((told_policy / "train.json").read_text())["history"]
    assert 0 <= history[-1]["val_sentence_top1"] <= 1


def test_how_a_policy_reads_sentences_stands_beside_it(told_policy) -> None:
    adapter = load_policy(told_policy).encoder.condition.project
    reading = TextCode.load(told_policy / TEXT_CODE).reading
    assert reading is not None and torch.equal(reading, adapter.weight)


@pytest.mark.parametrize("labels", [(), ("pull the drawer",), ("pull the drawer", "drawer shut")])
def test_an_exported_policys_tasks_are_its_sentences(
    named, llava, lists, told_policy, tmp_path, labels, monkeypatch
) -> None:
    """Those that demonstrations are labelled with, where every task has one, else all."""
    monkeypatch.setattr(export_module, "training", lambda: {"any": labels})
    config = configured(named, llava, lists, tmp_path, f"policy.checkpoint={told_policy}")
    shipped = load_policy(Path(export(config)["folder"]) / SYSTEM1)
    said = Sentences.load(prepare_told(config).sentences)
    tokens = adapter_tokens(load_policy(told_policy), said.latent).mean(1)
    own = torch.tensor([len(labels) < 2 or text in labels for text in said.texts])
    for number in range(len(TASKS)):
        row = shipped.encoder.condition.table.weight[1 + number]
        wanted = tokens[own & (said.task == number)].mean(0)
        assert torch.allclose(row, wanted, atol=5e-3)  # halves


def test_an_evaluation_finds_that_engine_by_itself(told_policy) -> None:
    data = {"system1": {"policy": {"options": {"path": str(told_policy)}}}, "system2": {"hz": 2}}
    engine = {"target": TEXT_ENGINE, "options": {"path": str(told_policy / TEXT_CODE)}}
    assert told_in_words(data)["system2"] == {"hz": 2, "engine": engine}
    other = {"system1": {"policy": {"options": {"path": str(told_policy.parent)}}}}
    assert told_in_words(other) == other
    assert told_in_words({}) == {}


def test_an_experiment_uses_it_as_it_is(told_policy, tmp_path) -> None:
    told_by_name(told_policy, tmp_path / "alone")
    assert not (tmp_path / "alone").exists()


def test_a_policy_may_be_told_in_the_code_of_the_encoder_it_begins_with(
    named, llava, lists, told_policy, tmp_path
) -> None:
    other = {t: [*texts[1:], f"now {texts[0]}", f"{texts[2]} now"] for t, texts in LISTS.items()}
    (tmp_path / "other.json").write_text(json.dumps(other))
    begin = (named, llava, tmp_path / "other.json")
    behind = (f"policy.encoder_from={told_policy}", "policy.text_layers=[2]")
    own = prepare_told(configured(*begin, tmp_path / "own", *behind))
    assert TextCode.load(own.code).spec != TextCode.load(told_policy / TEXT_CODE).spec
    config = configured(*begin, tmp_path / "same", *behind, "policy.text_code=encoder")
    told = prepare_told(config)
    spec = TextCode.load(told_policy / TEXT_CODE).spec
    assert Sentences.load(told.sentences).spec == Sentences.load(told.held).spec == spec
    run_policy(config, 0)
    assert load_policy(tmp_path / "same" / "policy").config.latent_model_id == spec.model_id
    assert TextCode.load(tmp_path / "same" / "policy" / TEXT_CODE).spec == spec
    with pytest.raises(ConfigError, match=r"policy\.text_code: encoder is that of policy\.encoder"):
        prepare_told(configured(*begin, tmp_path / "c", "policy.text_code=encoder"))
    (tmp_path / "untold").mkdir()
    nothing = (f"policy.encoder_from={tmp_path / 'untold'}", "policy.text_code=encoder")
    with pytest.raises(ConfigError, match=r"policy\.text_code: no text\.safetensors in .*untold"):
        prepare_told(configured(*begin, tmp_path / "d", *nothing))


def test_a_start_fits_to_what_a_told_policy_makes_of_the_datas_sentences(
    named, llava, lists, told_policy, tmp_path
) -> None:
    more = (f"policy.checkpoint={told_policy}", "stage1.steps=2")
    run = JointRun(configured(named, llava, lists, tmp_path, *more), "stage1")
    number, texts = run.source.sentences.of_tasks()
    assert set(texts) == set(run.source.cache.meta["instructions"])
    base = load_policy(told_policy)
    code = TextCode.load(told_policy / TEXT_CODE)
    said = TextReader(llava, code.layers).encode(code, texts)
    wanted = adapter_tokens(base, said).mean(1)
    table = run.joint.policy.encoder.condition.table.weight
    for task in range(len(TASKS)):
        assert torch.allclose(table[1 + task], wanted[number == task].mean(0), atol=1e-5)
    assert torch.equal(table[0], base.encoder.condition.table.weight[0])
    plain = configured(named, llava, lists, tmp_path / "b", *more, "stage1.start=random")
    kept = JointRun(plain, "stage1").joint.policy.encoder.condition.table.weight
    assert torch.equal(kept, base.encoder.condition.table.weight)


@pytest.mark.parametrize("start", ["table", "random"])
def test_system_2_takes_the_place_of_the_sentences(
    named, llava, lists, told_policy, tmp_path, start
) -> None:
    more = (f"policy.checkpoint={told_policy}", f"stage1.start={start}", "stage1.steps=2")
    run = JointRun(configured(named, llava, lists, tmp_path, *more), "stage1")
    base = load_policy(told_policy)
    learned = base.encoder.condition.project.weight
    assert torch.equal(run.joint.policy.encoder.condition.project.weight, learned)
    projector = run.learner.head.projector.weight.detach().clone()
    run.run()
    assert torch.equal(run.joint.policy.encoder.condition.project.weight, learned)
    assert not torch.equal(run.learner.head.projector.weight, projector)
    shipped = DiffusionPolicy.load(tmp_path / "stage1")
    assert shipped.spec.latent.kind == "act_last"
    assert not (tmp_path / "stage1" / FILE).exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"open_drawer": LISTS["open_drawer"]}, "policy.sentences: no sentence for close_drawer"),
        ({"fly": ["fly"]}, "policy.sentences: .*task 'fly' is none of"),
        ({"open_drawer": ["open"], "close_drawer": ["close", "shut"]}, "none to hold out"),
    ],
)
def test_lists_that_cannot_be_used_are_refused(named, llava, tmp_path, content, message) -> None:
    path = tmp_path / "said.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=message):
        prepare_told(configured(named, llava, path, tmp_path))


def test_a_held_out_list_of_its_own_leaves_all_others_to_training(
    named, llava, lists, tmp_path
) -> None:
    more = tmp_path / "held.json"
    more.write_text(json.dumps({t: [f"please {texts[0]}"] for t, texts in LISTS.items()}))
    config = configured(named, llava, lists, tmp_path, f"policy.held_sentences={more}")
    said, held = sentences_of(config.policy)
    assert said == {t: tuple(texts) for t, texts in LISTS.items()}
    assert held["open_drawer"] == ("please open the drawer",)


def test_several_collections_are_named_with_commas(named, llava, lists, tmp_path) -> None:
    other = tmp_path / "other" / "frames"
    make_cache(other, tiny(n_tasks=2), episodes=4, frames=6)
    index = other / "cache.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"tasks": list(TASKS)}))
    config = configured(
        named, llava, lists, tmp_path / "out", f"data=[{named}, {other.parent}]", "mix=[1, 1]"
    )
    assert config.frames_folders() == (named, other)
    run_policy(config, 0)
    assert json.loads((tmp_path / "out" / "policy" / "train.json").read_text())["step"] == 4
    with pytest.raises(ConfigError, match="twice"):
        configured(named, llava, lists, tmp_path, f"data={named},{named}").frames_folders()
    with pytest.raises(ConfigError, match="no folder"):
        configured(named, llava, lists, tmp_path, f"data={named},nowhere").frames_folders()
