"""Kept prefixes and states are what the model gives; a killed build goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from openhelix.benchmarks.training import feeds
from openhelix.benchmarks.training.config import LatentSection
from openhelix.benchmarks.training.feeds import (
    Drawn,
    Kept,
    KeptPrefixes,
    KeptStates,
    LiveFeed,
    PrefixFeed,
    Sentences,
    Source,
    StateFeed,
    Store,
    StoreLayout,
    encode_prefix,
    encode_read_outs,
    feed_kind,
    kept_of,
    prefix_store,
    states_store,
)
from openhelix.runtime.core.config import ConfigError
from openhelix.system1.data import Cache
from openhelix.system2.latents import LatentConfig, LatentHead
from openhelix.system2.model import open_checkpoint
from openhelix.system2.train import System2Learner, encode_states


def learner(llava: str, regime: str = "prompt", **config) -> System2Learner:
    checkpoint = open_checkpoint(llava)
    model = LlavaForConditionalGeneration.from_pretrained(llava, dtype=torch.float32).model
    table = model.get_input_embeddings().weight[: checkpoint.act_ids[0]]
    head = LatentHead.fresh(LatentConfig(**config), table, seed=3)
    return System2Learner(model.eval(), checkpoint, head, regime)


@pytest.fixture(autouse=True)
def room(monkeypatch) -> None:
    """What is kept here is small, whatever the machine's disk has left."""
    monkeypatch.setattr(feeds, "SPARE_BYTES", 0)


@pytest.fixture(scope="module")
def source(frames) -> Source:
    return Source.open(Cache(frames), 0)


def build(store: Store, encode, made: System2Learner, source: Source) -> Store:
    assert store.build(lambda f, s: encode(made, source, 4, f, s), max_gb=1.0)
    return store


@pytest.mark.parametrize("n_act", [1, 2])
def test_a_prefix_read_back_gives_the_state_itself(llava, source, tmp_path, n_act) -> None:
    made = learner(llava, n_act=n_act)
    section = LatentSection(model=llava, frames=20, n_act=n_act)
    store = build(prefix_store(tmp_path, made, source, section), encode_prefix, made, source)
    assert len(store.layout.frames) == 20
    size = sum(f.stat().st_size for f in store.folder.glob("*.safetensors"))
    assert size <= 20 * store.layout.bytes_each + 4096 * store.layout.parts
    rows = torch.tensor([17, 0, 5])
    drawn = PrefixFeed(made, store).draw(rows, torch.Generator())
    pictures = source.pictures(drawn.frames)
    direct = made(pictures, source.sentences[drawn.instruction])
    assert torch.allclose(drawn.sample.state, direct.state, atol=1e-5)
    assert torch.allclose(drawn.sample.z, direct.z, atol=1e-5)


@pytest.mark.parametrize(
    "config",
    [{}, {"n_act": 2}, {"vision": False}, {"kind": "act_lang"}, {"kind": "hidden_all"},
     {"kind": "act_mid"}, {"kind": "lang"}, {"kind": "lang_mean", "layers": (1, 3)}],
)  # fmt: skip
def test_kept_states_are_those_of_the_model(llava, source, tmp_path, config) -> None:
    made = learner(llava, **config)
    section = LatentSection(model=llava, stride=7, phrasings=2, **config)
    store = build(states_store(tmp_path, made, source, section), encode_read_outs, made, source)
    drawn = StateFeed(made, store).draw(torch.tensor([3, 1]), torch.Generator().manual_seed(0))
    direct = made(source.pictures(drawn.frames), source.sentences[drawn.instruction])
    assert torch.equal(drawn.sample.filled, direct.filled)
    assert torch.allclose(drawn.sample.state, direct.state, atol=4e-3)  # half precision
    assert not made.head.act.requires_grad


def test_a_picture_is_read_once_for_all_its_sentences(llava, source) -> None:
    made = learner(llava)
    frames = torch.tensor([0, 9, 30])
    texts = [["open", "close the drawer"], ["close", "lift it"], ["push the red block", "open"]]
    state, filled = encode_states(made, source.pictures(frames), texts)
    assert state.shape == (3, 2, 1, 64) and filled.all()
    for column in (0, 1):
        direct = made(source.pictures(frames), [row[column] for row in texts]).state
        assert torch.allclose(state[:, column], direct, atol=1e-5)


def test_kept_pictures_change_nothing(llava, source) -> None:
    made = learner(llava)
    kept, fresh = LiveFeed(made, source, 1e9), LiveFeed(made, source, 0)
    for rows in ([3, 3, 40], [40, 7, 3]):
        a, b = (
            feed.draw(torch.tensor(rows), torch.Generator().manual_seed(1))
            for feed in (kept, fresh)
        )
        assert torch.equal(a.instruction, b.instruction)
        assert torch.allclose(a.sample.z, b.sample.z, atol=1e-5)


def test_act_alone_learns_as_through_the_whole_sequence(llava, source) -> None:
    made = learner(llava)
    feed = LiveFeed(made, source, 1e9)
    drawn = feed.draw(torch.tensor([3, 40]), torch.Generator().manual_seed(1))
    direct = made(source.pictures(drawn.frames), source.sentences[drawn.instruction])
    assert torch.allclose(drawn.sample.z, direct.z, atol=1e-5)
    found = [
        torch.autograd.grad(s.z.square().sum(), made.head.act)[0] for s in (drawn.sample, direct)
    ]
    assert found[0].abs().max() > 1e-6 and torch.allclose(*found, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("config", [{}, {"n_act": 2}, {"kind": "act_lang"}, {"kind": "act_words"}])
def test_a_prefix_kept_on_disk_gives_what_was_computed(llava, source, tmp_path, config) -> None:
    made, rows = learner(llava, **config), torch.tensor([3, 40])
    section = LatentSection(model=llava, **config)

    def drawn(kept: Kept | None) -> Drawn:
        feed = LiveFeed(made, source, 1e9, kept=kept)
        return feed.draw(rows, torch.Generator().manual_seed(1))

    plain = drawn(None)
    first = drawn(KeptPrefixes(tmp_path, made, source, section, 1e9))
    (folder,) = tmp_path.iterdir()
    assert len(list(folder.glob("*.safetensors"))) == 2
    made.prefix = None  # what is kept is not computed again
    again = drawn(KeptPrefixes(tmp_path, made, source, section, 1e9))
    assert torch.equal(first.sample.z, again.sample.z)
    assert torch.equal(plain.instruction, first.instruction)
    assert torch.allclose(plain.sample.z, first.sample.z, atol=1e-5)
    grads = [
        torch.autograd.grad(d.sample.z.square().sum(), made.head.act)[0] for d in (plain, again)
    ]
    assert grads[0].abs().max() > 1e-6 and torch.allclose(*grads, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", ["lang", "hidden_all", "pool_max", "act_lang"])
def test_read_outs_of_a_frozen_model_are_kept_as_they_were_computed(
    llava, source, tmp_path, kind
) -> None:
    section = LatentSection(model=llava, kind=kind, regime="frozen", prefix_gb=1)
    made, rows = learner(llava, regime="frozen", kind=kind), torch.tensor([3, 40])

    def drawn() -> Drawn:
        feed = LiveFeed(made, source, 1e9, kept=kept_of(tmp_path, made, source, section))
        return feed.draw(rows, torch.Generator().manual_seed(1))

    plain = LiveFeed(made, source, 1e9).draw(rows, torch.Generator().manual_seed(1))
    first = drawn()
    made.prefix = made._embed = None  # what is kept is not computed again
    again = drawn()
    assert torch.equal(first.sample.z, again.sample.z)
    assert torch.equal(first.sample.filled, plain.sample.filled)
    assert torch.allclose(plain.sample.z, first.sample.z, atol=1e-5)
    weight = made.head.projector.weight
    grads = [torch.autograd.grad(d.sample.z.square().sum(), weight)[0] for d in (plain, again)]
    assert torch.allclose(*grads, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "regime", "kept"),
    [
        ({}, "prompt", KeptPrefixes),
        ({"kind": "lang"}, "prompt", type(None)),
        ({"kind": "lang"}, "frozen", KeptStates),
        ({"kind": "pool_map"}, "frozen", type(None)),
        ({"proprio": True}, "frozen", type(None)),
    ],
)
def test_what_may_be_kept(llava, source, tmp_path, config, regime, kept) -> None:
    section = LatentSection(model=llava, regime=regime, prefix_gb=1, **config)
    made = learner(llava, regime=regime, **config)
    assert type(kept_of(tmp_path, made, source, section)) is kept
    none = section.model_copy(update={"prefix_gb": 0})
    assert kept_of(tmp_path, made, source, none) is None


def test_no_more_prefixes_are_kept_than_there_is_room_for(llava, source, tmp_path) -> None:
    made, section = learner(llava), LatentSection(model=llava)
    kept = KeptPrefixes(tmp_path, made, source, section, 1e9)
    LiveFeed(made, source, 1e9, kept=kept).draw(torch.tensor([3]), torch.Generator().manual_seed(1))
    (one,) = kept.folder.glob("*.safetensors")
    full = KeptPrefixes(tmp_path, made, source, section, 1.5 * one.stat().st_size)
    feed = LiveFeed(made, source, 1e9, kept=full)
    plain = LiveFeed(made, source, 1e9)
    a, b = (f.draw(torch.tensor([3, 40]), torch.Generator().manual_seed(1)) for f in (feed, plain))
    assert torch.allclose(a.sample.z, b.sample.z, atol=1e-5)
    assert list(kept.folder.glob("*.safetensors")) == [one]


def test_a_disk_that_is_nearly_full_is_left_alone(llava, source, tmp_path, monkeypatch) -> None:
    made, section = learner(llava), LatentSection(model=llava)
    monkeypatch.setattr(feeds, "SPARE_BYTES", 10**18)
    kept = KeptPrefixes(tmp_path, made, source, section, 1e9)
    feed = LiveFeed(made, source, 1e9, kept=kept)
    feed.draw(torch.tensor([3]), torch.Generator().manual_seed(1))
    assert not list(kept.folder.glob("*.safetensors"))


def layout(n: int = 10) -> StoreLayout:
    return StoreLayout(torch.arange(n), torch.zeros(n, 1, dtype=torch.long), 64, 4)


def test_a_killed_build_goes_on_and_nothing_is_done_twice(tmp_path) -> None:
    asked: list[int] = []

    def encode(frames, said):
        if len(asked) == 1:
            raise RuntimeError("killed")
        asked.append(len(frames))
        return {"x": frames.float()}

    store = Store(tmp_path, "states", {"of": "a"}, layout())
    with pytest.raises(RuntimeError, match="killed"):
        store.build(encode, 1.0)
    assert store.missing() == [1, 2]
    asked += [0]
    assert store.build(encode, 1.0)
    assert asked == [4, 0, 4, 2]
    assert store.whole()["x"].tolist() == list(range(10))
    rows = store.read(torch.tensor([9, 0, 4]))
    assert [float(r["x"]) for r in rows] == [9, 0, 4]
    assert Store(tmp_path, "states", {"of": "b"}, layout()).missing() == [0, 1, 2]


def test_what_does_not_fit_is_refused_before_it_begins(tmp_path) -> None:
    store = Store(tmp_path, "prefix", {}, layout(1000))
    with pytest.raises(ConfigError, match=r"latent\.max_gb: 0\.00 GB would lie in"):
        store.build(lambda f, s: {}, 1e-9)
    assert not list(Path(tmp_path).rglob("*.safetensors"))


def test_what_is_kept_of_drawn_samples_leaves_a_store_its_own_room(llava, source, tmp_path) -> None:
    made, section = learner(llava), LatentSection(model=llava, stride=7, phrasings=2)
    kept = KeptPrefixes(tmp_path, made, source, section, 1e9)
    LiveFeed(made, source, 1e9, kept=kept).draw(torch.tensor([3, 40]), torch.Generator())
    lies = sum(f.stat().st_size for f in kept.folder.glob("*.safetensors"))
    store = states_store(tmp_path, made, source, section)
    need = len(store.layout.frames) * store.layout.bytes_each
    store.check_disk((need + lies / 2) / 1e9)
    with pytest.raises(ConfigError, match=r"latent\.max_gb"):
        store.check_disk(need / 2e9)


@pytest.mark.parametrize(
    ("section", "stage", "device", "kind"),
    [
        ({}, "stage1", "cpu", "prefix"),
        ({}, "stage2", "cpu", "prefix"),
        ({}, "stage1", "cuda", "live"),
        ({"regime": "frozen"}, "stage1", "cpu", "states"),
        ({"regime": "lora"}, "stage1", "cpu", "prefix"),
        ({"regime": "lora"}, "stage2", "cpu", "live"),
        ({"kind": "act_lang"}, "stage1", "cpu", "prefix"),
        ({"feed": "live"}, "stage1", "cpu", "live"),
    ],
)
def test_the_feed_that_a_stage_takes(section, stage, device, kind) -> None:
    assert feed_kind(LatentSection(**section), stage, device) == kind


def test_many_wordings_and_held_out_words_for_held_out_frames(source, monkeypatch) -> None:
    from openhelix.benchmarks.calvin.phrases import development
    from openhelix.benchmarks.calvin.wordings import wordings

    cache = source.cache
    with pytest.raises(ConfigError, match="the grammar has no task 'open it'"):
        Sentences(cache, 0, 5)
    monkeypatch.setitem(cache.meta, "tasks", ["open_drawer", "close_drawer"])
    held = torch.tensor([0, 3, 4])
    said = Sentences(cache, 0, 5, held)
    plain = Sentences(cache, 0)
    assert said.digest != plain.digest
    frames = torch.arange(len(cache))
    for sentences in (said.of_frames(frames, 6), said.drawn(frames, torch.Generator())[:, None]):
        for frame, row in enumerate(sentences.tolist()):
            task = cache.meta["tasks"][int(cache.task[frame])]
            known = set(development()[task])
            if frame not in held:
                known = {*wordings(5)[task], plain.texts[int(cache.task[frame])]}
            assert {said.texts[index] for index in row} <= known


def test_sentences_belong_to_their_task(source) -> None:
    frames = torch.arange(len(source.cache))
    said = source.sentences.of_frames(frames, 3)
    assert (said == source.cache.task[:, None]).all()  # one sentence a task in this cache
    again = Source.open(source.cache, 0).sentences.of_frames(frames[5:6], 3)
    assert torch.equal(again, said[5:6])
    drawn = source.sentences.drawn(frames, torch.Generator().manual_seed(0))
    assert torch.equal(drawn, source.cache.task)
