"""Sentences that name no task: drawn alike everywhere, of every kind, apart from what measures."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping

import numpy as np

from openhelix.benchmarks.calvin import phrases, refusals, wordings
from openhelix.benchmarks.calvin.phrases import normalised
from openhelix.benchmarks.evaluation.referring import REFERENCES


def test_equal_arguments_give_equal_sentences() -> None:
    assert refusals.refusals(70, 3) == refusals.refusals(70, 3) != refusals.refusals(70, 4)
    assert refusals.requests(800, 3) == refusals.requests(800, 3) != refusals.requests(800, 4)


def test_every_kind_and_pattern_comes_up() -> None:
    drawn = refusals.refusals(7 * 60)
    assert set(Counter(one.kind for one in drawn).values()) == {60}
    patterns = {one.pattern for one in drawn}
    assert all(set(options) <= patterns for options in refusals.KINDS.values())
    asked = Counter(one.kind for one in refusals.requests(1500))
    assert asked["plain"] == 680 and min(asked["although"], asked["referring"]) >= 90


def test_one_is_drawn_of_any_kind() -> None:
    rng = np.random.default_rng(1)
    drawn = {normalised(refusals.nothing(rng)) for _ in range(300)}
    assert len(drawn) > 250 and not drawn & refusals.for_measuring()


def test_a_not_that_asks_for_something_keeps_its_task() -> None:
    rng = np.random.default_rng(4)
    said = [refusals.although("open_drawer", rng).lower() for _ in range(60)]
    assert any("not" in s or "n't" in s for s in said) and len(set(said)) > 50
    assert not {normalised(s) for s in said} & refusals.for_measuring()
    drawer = ("drawer", "tray", "pull-out", "sliding box")
    assert sum(any(word in s for word in drawer) for s in said) > 50


def test_no_sentence_is_drawn_twice_or_kept_for_measuring() -> None:
    drawn = [*refusals.refusals(700), *refusals.requests(1500)]
    keys = [normalised(one.text) for one in drawn]
    assert len(set(keys)) == len(keys)
    assert not set(keys) & refusals.for_measuring()
    referring = {normalised(s) for r in REFERENCES.values() for s in r.sentences}
    plain = {normalised(s) for said in phrases.training().values() for s in said}
    assert not (set(keys) - plain) & referring


def test_what_is_held_out_is_said_in_other_words() -> None:
    held = refusals.held_out()
    assert set(held) == set(refusals.KINDS) and sum(map(len, held.values())) > 350
    said = [normalised(s) for sentences in held.values() for s in sentences]
    assert len(set(said)) == len(said)
    lists = (phrases.training(), phrases.validation(), phrases.development(), phrases.calvin_e())
    requests = {normalised(s) for each in lists for row in each.values() for s in row}
    assert not set(said) & requests
    words = {word for sentence in said for word in sentence.split()}
    assert not words & set(refusals.NOUNS)  # things that training has are not in it
    fitted = words_of(refusals.KINDS, refusals.WORDS, refusals.SYNONYMS, refusals.REFERRING)
    fitted |= words_of(refusals.ALTHOUGH, wordings.COMMON, wordings.FRAMES, wordings.FAMILIES)
    fitted |= words_of(phrases.training())
    assert [s for s in said if set(s.split()) <= fitted] == []  # each has a word of its own


def test_no_pattern_that_is_held_out_is_drawn() -> None:
    """A pattern is what is left of a sentence without the words that requests have too."""
    common = {w for one in refusals.requests(3000) for w in normalised(one.text).split()}

    def pattern(sentence: str) -> str:
        words = ("_" if word in common else word for word in normalised(sentence).split())
        return re.sub(r"_( _)+", "_", " ".join(words))

    drawn = {pattern(one.text) for one in refusals.refusals(7 * 800)}
    held = [s for sentences in refusals.held_out().values() for s in sentences]
    assert [s for s in held if pattern(s) in drawn] == []
    assert pattern("do not open the drawer") in drawn  # such a one would be found


def words_of(*rules: object) -> set[str]:
    """Every word that patterns can come to."""
    found: set[str] = set()
    for rule in rules:
        if isinstance(rule, str):
            found |= set(normalised(re.sub(r"<\w+>|[()|\[\]]", " ", rule)).split())
        elif isinstance(rule, Mapping):
            found |= words_of(*rule, *rule.values())
        elif isinstance(rule, Iterable):
            found |= words_of(*rule)
    return found


def test_other_words_change_no_kind() -> None:
    rng = np.random.default_rng(0)
    found = {refusals.reworded("please lift the red block from the table", rng) for _ in range(60)}
    assert "please lift the red block from the table" in found and len(found) > 10
    assert all("from the" in text for text in found)
