"""A policy that is told its tasks by sentences, and collections trained on together."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from openhelix.runtime.core.config import ConfigError
from openhelix.runtime.core.files import BadFile
from openhelix.runtime.core.interfaces import LatentSpec
from openhelix.system1.cache import CacheError
from openhelix.system1.data import Augment, Cache, joined_index, read_index
from openhelix.system1.latent_adapter import adapt_to_latent, nearest_task, start_adapter
from openhelix.system1.policy import DiffusionPolicy
from openhelix.system1.sentences import OLDEST_S, SentenceError, Sentences, told
from openhelix.system1.train import Trainer
from tests.system1.synthetic import make_cache
from tests.system1.test_policy import tiny
from tests.system1.test_train import run_config

DIM = tiny().latent_dim
SPEC = LatentSpec("text@1", 1, DIM, "words0")


def sentences(each: int = 6, seed: int = 0, spread: float = 0.3, spec=SPEC) -> Sentences:
    """Two tasks, each with sentences around a point of its own."""
    rng = np.random.default_rng(seed)
    middle = np.random.default_rng(9).normal(size=(2, spec.n_tokens, spec.dim))
    task = np.repeat([0, 1], each)
    latent = middle[task] + spread * rng.normal(size=(2 * each, spec.n_tokens, spec.dim))
    texts = [f"task {t}, wording {i}" for i, t in enumerate(task)]
    return Sentences(torch.tensor(latent, dtype=torch.float32), torch.tensor(task), texts, spec, 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("cache")
    make_cache(path, tiny(n_tasks=2))
    return path


@pytest.fixture
def lists(tmp_path):
    sentences().save(tmp_path / "said.safetensors")
    sentences(seed=1).save(tmp_path / "held.safetensors")
    return tmp_path / "said.safetensors", tmp_path / "held.safetensors"


def told_config(folder, out, lists, **changes):
    return run_config(folder, out, sentences=lists[0], held_sentences=lists[1], **changes)


def test_a_task_is_told_all_of_its_sentences_and_no_others():
    said = sentences(each=3)
    drawn = said.draw(torch.tensor([0, 1] * 200), torch.Generator().manual_seed(0))
    assert set(drawn[0::2].tolist()) == {0, 1, 2}
    assert set(drawn[1::2].tolist()) == {3, 4, 5}
    again = said.draw(torch.tensor([0, 1] * 200), torch.Generator().manual_seed(0))
    assert torch.equal(drawn, again)


def test_sentences_come_back_from_their_file(tmp_path):
    said = sentences()
    said.save(tmp_path / "said.safetensors")
    back = Sentences.load(tmp_path / "said.safetensors")
    assert back.texts == said.texts and back.spec == SPEC
    assert torch.equal(back.latent, said.latent) and torch.equal(back.task, said.task)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": torch.zeros(12)}, r"no sentence for the tasks numbered \[1\]"),
        ({"texts": ["one"]}, "12 latents for 1 texts"),
        ({"spec": replace(SPEC, n_tokens=2)}, "its spec says"),
    ],
)
def test_sentences_that_do_not_fit_are_refused(change, message):
    said = sentences()
    given = {"latent": said.latent, "task": said.task, "texts": said.texts, "spec": SPEC}
    with pytest.raises(SentenceError, match=message):
        Sentences(**(given | change), n_tasks=2)


ABOUT = {"spec": asdict(SPEC), "texts": ["a", "b"], "tasks": 2}
GOOD = {"latent": torch.ones(2, 1, DIM), "task": torch.tensor([0, 1])}


@pytest.mark.parametrize(
    ("tensors", "about"),
    [
        (GOOD, {}),
        (GOOD, {"sentences": "{"}),
        (GOOD, {"sentences": "[]"}),
        *(
            (GOOD, {"sentences": json.dumps(ABOUT | change)})
            for change in (
                {"spec": 3},
                {"spec": {"kind": "x"}},
                {"spec": asdict(SPEC) | {"dim": "12"}},
                {"texts": "a"},
                {"texts": ["a"]},
                {"tasks": 10**9},
                {"tasks": 1},
                {"tasks": None},
            )
        ),
        *(
            (GOOD | change, {"sentences": json.dumps(ABOUT)})
            for change in (
                {"task": torch.tensor([0, 10**9])},
                {"task": torch.tensor([0, -1])},
                {"task": torch.tensor([0])},
                {"latent": torch.ones(2, 1, DIM + 1)},
                {"latent": torch.full((2, 1, DIM), float("nan"))},
                {"more": torch.ones(1)},
            )
        ),
        ({"latent": torch.ones(2, 1, DIM)}, {"sentences": json.dumps(ABOUT)}),
    ],
)
def test_a_file_of_something_else_is_refused_in_one_line(tmp_path, tensors, about):
    path = tmp_path / "x.safetensors"
    save_file(tensors, path, metadata=about)
    with pytest.raises(BadFile) as caught:
        Sentences.load(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(BadFile, match="not safetensors"):
        Sentences.load(path)


def test_a_whole_file_is_read(tmp_path):
    save_file(GOOD, tmp_path / "x.safetensors", metadata={"sentences": json.dumps(ABOUT)})
    assert Sentences.load(tmp_path / "x.safetensors").texts == ["a", "b"]


def test_told_leaves_a_share_to_the_number_and_the_rest_to_the_sentence(folder):
    cache, said = Cache(folder), sentences()
    frames = torch.arange(96)
    generator = torch.Generator().manual_seed(0)
    batch = cache.batch(frames, generator)
    inputs = told(batch.inputs, cache.task[frames], said, generator, Augment(null_latent=0.5))
    assert inputs.latent_mask is not None and inputs.latent_age_s is not None
    by_sentence = inputs.latent_mask[:, 0]
    assert 30 < int(by_sentence.sum()) < 66
    assert bool((inputs.task[by_sentence] == -1).all())
    assert torch.equal(inputs.task[~by_sentence], cache.task[frames][~by_sentence])
    assert 0 < float(inputs.latent_age_s.max()) <= OLDEST_S
    plain = told(batch.inputs, cache.task[frames], said, generator)
    assert plain.latent is not None and plain.latent_mask is not None
    known = {row.numpy().tobytes() for row in said.latent}
    assert all(row[0].numpy().tobytes() in known for row in plain.latent)
    assert bool(plain.latent_mask.all()) and bool((plain.task == -1).all())


def test_noise_is_in_units_of_the_sentences_spread(folder):
    cache, said = Cache(folder), sentences(spread=0.0)
    frames = torch.zeros(400, dtype=torch.long)
    generator = torch.Generator().manual_seed(0)
    batch = cache.batch(frames, generator)
    inputs = told(batch.inputs, cache.task[frames], said, generator, Augment(), noise=0.5)
    assert inputs.latent is not None
    moved = (inputs.latent[:, 0] - said.latent[said.task == int(cache.task[0])][0]).std(0)
    assert torch.allclose(moved.mean(), 0.5 * said.latent.std(0).mean(), rtol=0.1)


def test_the_door_starts_by_saying_what_the_table_says():
    said, other = sentences(each=20), sentences(each=20, seed=3)
    model = DiffusionPolicy.build(tiny(n_tasks=2), 0).model
    model = adapt_to_latent(model, SPEC)
    assert start_adapter(model, said.latent, said.task, 1.0)
    assert bool((nearest_task(model, other.latent) == other.task).all())
    condition = model.encoder.condition
    tokens = condition.embed(other.latent.unsqueeze(1), None, None)[0][:, 0]
    rows = condition.table.weight[1:][other.task]
    middle = condition.table.weight[1:].mean(0)
    along = ((tokens - middle) * (rows - middle)).sum(1) / (rows - middle).square().sum(1)
    assert 0.7 < float(along.mean()) < 1.3  # reached on average


def test_a_policy_learns_from_sentences_and_says_so(folder, tmp_path, lists):
    run = Trainer(told_config(folder, tmp_path / "a", lists, steps=25, eval_every=25, ema=0.8))
    history = run.run()
    assert history[-1]["loss"] < 0.96 * history[0]["loss"]
    assert {"val_loss", "val_loss_by_number", "val_sentence_top1"} <= set(history[-1])
    policy = DiffusionPolicy.load(tmp_path / "a")
    assert policy.spec.latent == SPEC
    assert policy.config.n_tasks == 2


def test_a_policy_that_knew_numbers_understands_sentences_at_once(folder, tmp_path, lists):
    first = Trainer(run_config(folder, tmp_path / "numbers", sentences=None, steps=6))
    first.run()
    config = told_config(folder, tmp_path / "words", lists, init=tmp_path / "numbers")
    config = replace(config, changes={}, freeze=("encoder.condition.project",))
    run = Trainer(config)
    begun = run.model.encoder.condition.project.weight.clone()
    assert run.evaluate()["val_sentence_top1"] == 1.0
    run.run()
    assert torch.equal(run.model.encoder.condition.project.weight, begun)
    # Continued from here, the adapter is as it was learned, not fitted anew.
    again = Trainer(replace(config, init=tmp_path / "words", out=tmp_path / "more", freeze=()))
    assert torch.equal(again.model.encoder.condition.project.weight, begun)


def test_a_told_run_goes_on_as_if_it_had_not_stopped(folder, tmp_path, lists):
    whole = Trainer(told_config(folder, tmp_path / "a", lists))
    whole.run()
    first = Trainer(told_config(folder, tmp_path / "b", lists))
    for _ in range(3):
        first.train_step()
    first.save()
    second = Trainer(told_config(folder, tmp_path / "b", lists))
    second.run()
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, second.model.state_dict()[name]), name


def test_sentences_of_another_code_are_refused(folder, tmp_path, lists):
    sentences(spec=replace(SPEC, model_id="other")).save(lists[1])
    with pytest.raises(ConfigError, match="held_sentences"):
        Trainer(told_config(folder, tmp_path, lists))


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    places = [tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("other")]
    make_cache(places[0], tiny(n_tasks=2), episodes=12)
    make_cache(places[1], tiny(n_tasks=2), episodes=5)
    return places


def test_two_collections_are_one_cache(two):
    one, other, both = Cache(two[0]), Cache(two[1]), Cache(two)
    assert len(both) == len(one) + len(other)
    assert len(both.episode.unique()) == 12 + 5
    assert both.places == [p / "shard-00000.safetensors" for p in two]
    at = torch.tensor([0, len(one) - 1, len(one), len(both) - 1])
    rows = both.gather("proprio", at)
    assert torch.equal(rows[:2], one.gather("proprio", at[:2]))
    assert torch.equal(rows[2:], other.gather("proprio", at[2:] - len(one)))
    said = both.gather("instruction", at).long()
    texts = [both.meta["instructions"][i] for i in said.tolist()]
    assert texts == [("open", "close")[int(t)] for t in both.task[at]]


def test_shares_decide_how_often_a_collection_is_seen(two, tmp_path):
    config = run_config(two[0], tmp_path, sentences=None)
    config = replace(config, cache=tuple(two), mix=(1.0, 3.0), batch=400)
    run = Trainer(config)
    picked = run._picked(torch.Generator().manual_seed(0))
    assert 260 < int((run.cache.part[picked] == 1).sum()) < 340
    assert bool(torch.isin(picked, run.train_frames).all())
    run = Trainer(replace(config, mix=(), out=tmp_path / "even"))
    picked = run._picked(torch.Generator().manual_seed(0))
    assert 60 < int((run.cache.part[picked] == 1).sum()) < 180


@pytest.mark.parametrize("mix", [(1.0,), (1.0, -1.0), (0.0, 0.0)])
def test_shares_that_make_no_sense_are_refused(two, tmp_path, mix):
    config = run_config(two[0], tmp_path, sentences=None)
    with pytest.raises(ConfigError, match="mix"):
        Trainer(replace(config, cache=tuple(two), mix=mix))


def test_collections_of_different_policies_do_not_mix(two, tmp_path):
    make_cache(tmp_path / "c", tiny(n_tasks=2), episodes=2)
    index = tmp_path / "c" / "cache.json"
    meta = json.loads(index.read_text())
    meta["cameras"][0]["work_width"] += 1
    index.write_text(json.dumps(meta))
    with pytest.raises(CacheError, match="its cameras are not those of"):
        Cache([two[0], tmp_path / "c"])


def test_of_collections_that_mix_the_cameras_count_that_all_have(two, tmp_path):
    make_cache(tmp_path / "c", tiny(n_tasks=2), episodes=2)
    index = tmp_path / "c" / "cache.json"
    meta = json.loads(index.read_text())
    all_of_them = [camera["name"] for camera in meta["cameras"]]
    meta["cameras"] = meta["cameras"][:1]
    index.write_text(json.dumps(meta))
    for order in ([two[0], tmp_path / "c"], [tmp_path / "c", two[0]]):
        assert Cache(order).cameras == all_of_them[:1]
    meta["cameras"][0]["name"] = "elsewhere"
    index.write_text(json.dumps(meta))
    with pytest.raises(CacheError, match="none of the cameras of"):
        joined_index([two[0], tmp_path / "c"], [read_index(two[0]), read_index(tmp_path / "c")])
