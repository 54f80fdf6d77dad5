"""Figure 5: the same start with and without the block's move, and what a latent makes of it."""

from __future__ import annotations

import numpy as np
import pytest

from openhelix.benchmarks.calvin.phrases import normalised, validation
from openhelix.benchmarks.evaluation.stats import Paired
from openhelix.benchmarks.paper import figure5 as latent_probe
from openhelix.benchmarks.paper.figure5 import (
    OTHERS,
    VOCABULARY,
    WORDS,
    ProbeOptions,
    SaidWords,
    claims,
    content_words,
    distance_table,
    draw,
    kind_of,
    own_words,
    probe,
    take_pictures,
)
from openhelix.benchmarks.paper.judge import decide
from openhelix.runtime.core.config import ConfigError
from openhelix.system2.engines.transformers import TransformersEngine
from openhelix.system2.probe import SPATIAL_WORDS
from tests.system2.tiny import write_laptop_like

OPTIONS = ProbeOptions(starts=2, steps=8)


@pytest.fixture(scope="module")
def pictures():
    return take_pictures(OPTIONS)


@pytest.fixture(scope="module")
def made(pictures, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENHELIX_CACHE", str(tmp_path_factory.mktemp("cache")))
        model = str(write_laptop_like(tmp_path_factory.mktemp("model") / "tiny"))
        engine = TransformersEngine(model, dtype="float32", device="cpu")
        found = probe(pictures, engine, OPTIONS)
        engine.close()
    return found


def test_nothing_but_the_block_differs_right_after_the_move(pictures):
    assert len(pictures) == 2
    for picture in pictures:
        assert len(picture.moved) == len(picture.still) == 4
        for step in (0, 1):  # environment steps 0 and 2: before the move
            assert np.array_equal(picture.moved[step], picture.still[step])
        after, before = picture.instant
        different = (after.astype(int) - before).any(axis=-1)
        assert 0.001 < different.mean() < 0.1  # two places, block-sized
        assert not np.array_equal(picture.moved[-1], picture.still[-1])


def test_the_same_seed_gives_the_same_pictures(pictures):
    again = take_pictures(OPTIONS)
    for one, other in zip(pictures, again, strict=True):
        assert np.array_equal(one.instant[0], other.instant[0])
        assert all(np.array_equal(a, b) for a, b in zip(one.moved, other.moved, strict=True))


def test_what_is_measured(made):
    assert [row["step"] for row in made["episode"]] == [0, 2, 4, 6]
    assert set(made["distances"]) == {"block moved", "time", *OTHERS}
    assert all(len(v) == 2 for v in made["distances"].values())
    assert all(d >= -1e-6 for values in made["distances"].values() for d in values)
    for row in made["episode"]:
        assert len(row["nearest"]) == 10 and set(row["similarity"]) == set(SPATIAL_WORDS)
        assert all(-1 <= n["cosine"] <= 1 for n in row["nearest"])
    assert all(len(values) == 2 for values in made["spatial"].values())
    own = made["own_words"]
    assert len(own["own"]) == len(own["others"]) == 34
    assert all(0 <= share <= 1 for share in (*own["own"], *own["others"]))
    assert sum(own["kinds"].values()) == pytest.approx(10, abs=0.01)
    header, rows = distance_table(made)
    assert len(rows) == 4 and len(header) == 4


def test_an_instructions_words_are_those_of_the_vocabulary():
    assert content_words("Push the sliding door to the left side.") == {
        "push", "door", "left", "side",
    }  # fmt: skip
    assert content_words("pick up the blue blocks") == {"pick", "up", "blue", "block"}
    assert content_words("sing of cats and rivers") == set()
    assert {kind_of(word) for word in SPATIAL_WORDS} == {"relation"}
    assert len(set(WORDS)) == len(WORDS)
    said = [sentence for sentences in validation().values() for sentence in sentences]
    spoken = {word for sentence in said for word in normalised(sentence).split()}
    assert not spoken & set(VOCABULARY["none"])
    counts = [len(content_words(sentence)) for sentence in said]
    assert min(counts) >= 1 and np.mean(counts) > 3


class Bag:
    """A System 2 that is a bag of the vocabulary's words; pictures mean nothing to it."""

    def encode(self, images, instructions):
        rows = [[word in text.split() for word in WORDS] for text in instructions]
        return np.array(rows, np.float32)[:, None]


def test_a_latent_that_is_its_words_is_nearest_to_them():
    texts = ["lift the red block", "open the drawer", "turn on the lamp", "close the cabinet"]
    space = SaidWords(Bag(), np.zeros((4, 4, 3), np.uint8), WORDS, texts)  # type: ignore[arg-type]
    found = own_words(space, texts)
    assert found["own"] == [1.0] * 4 and max(found["others"]) < 0.2
    near = space.nearest(space.similarity(space.usual[1:2])[0], 2)
    assert {n["word"] for n in near} == {"open", "drawer"}


def test_each_observation_is_judged_and_two_starts_prove_nothing(made):
    found = claims(made, "tiny")
    assert len(found) == 3 + len(OTHERS) and {c["finding"] for c in found} == {5}
    few = [c for c in found if c["n_pairs"] == 2]
    decide(found)
    assert len(few) == 2 + len(OTHERS) and {c["verdict"] for c in few} == {"undecided"}


def test_verdicts_follow_the_test(made, monkeypatch):
    for difference, verdict in ((0.1, "holds"), (-0.1, "contradicted")):
        fake = Paired(9, 9, difference, (difference, difference), 0.001, 0.01, 0.0, 9, 0)
        monkeypatch.setattr(latent_probe, "paired_by_start", lambda *_, fake=fake: fake)
        found = claims(made, "x")
        decide(found)
        assert {c["verdict"] for c in found} == {verdict}


def test_the_figure_is_drawn(made, pictures):
    drawing = draw(made, pictures[0].moved, OPTIONS.shift_at, "tiny")
    assert drawing.png.startswith(b"\x89PNG") and drawing.pdf.startswith(b"%PDF")


def test_a_move_that_no_start_has_room_for_is_refused():
    with pytest.raises(ConfigError, match="figure5: 0 of 2 starts"):
        take_pictures(ProbeOptions(starts=2, shift_m=2.0))
