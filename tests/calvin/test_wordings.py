"""The grammar: many different sentences a task, none that is for measuring, all in plain English."""

from __future__ import annotations

import re

import numpy as np
import pytest

from openhelix.benchmarks.calvin import phrases
from openhelix.benchmarks.calvin.phrases import PhraseError, normalised
from openhelix.benchmarks.calvin.tasks import TASK_NAMES, TASKS
from openhelix.benchmarks.calvin.wordings import (
    HUES,
    expand,
    family_of,
    rules_of,
    say,
    say_nothing,
    wordings,
)

COUNT = 300


@pytest.fixture(scope="module")
def many() -> phrases.Phrases:
    return wordings(COUNT, seed=3)


def test_hundreds_of_different_sentences_for_every_task(many: phrases.Phrases) -> None:
    assert tuple(many) == TASK_NAMES
    tasks: dict[str, str] = {}
    for task, sentences in many.items():
        assert len({normalised(sentence) for sentence in sentences}) == COUNT
        for sentence in sentences:
            assert tasks.setdefault(normalised(sentence), task) == task, sentence


def test_none_is_for_measuring(many: phrases.Phrases) -> None:
    made = {normalised(s) for sentences in many.values() for s in sentences}
    for measured in (phrases.validation(), phrases.calvin_e(), phrases.development()):
        assert not made & {normalised(s) for ss in measured.values() for s in ss}


def test_nothing_of_the_grammar_is_left_in_a_sentence(many: phrases.Phrases) -> None:
    for sentences in many.values():
        for sentence in sentences:
            assert re.fullmatch(r"[A-Za-z0-9',.\- ]+", sentence), sentence
            assert "  " not in sentence
            assert not re.search(r"\b(\w+) \1\b|\ba [aeiou]", sentence.lower()), sentence


def test_colours_and_sides_are_the_tasks_own(many: phrases.Phrases) -> None:
    hues = {c: {w for hue in said for w in re.findall(r"[a-z]+", hue)} for c, said in HUES.items()}
    common = {"coloured", "colored", "bright", "light", "dark"}
    for task, sentences in many.items():
        color = TASKS[task].target.removeprefix("block_")
        for sentence in sentences:
            words = set(re.findall(r"[a-z]+", sentence.lower()))
            for other, names in hues.items():
                if other != color:
                    assert not words & (names - common), sentence
            if color in hues:
                assert words & (hues[color] - common), sentence
        if "right" in task.split("_"):
            assert not any(re.search(r"left|counter|anti", s) for s in sentences)
        if "left" in task.split("_"):
            assert not any("right" in s.replace("bright", "") for s in sentences)


def test_equal_arguments_give_equal_sentences_and_seeds_differ() -> None:
    assert say("open_drawer", 40, 1) == say("open_drawer", 40, 1)
    assert set(say("open_drawer", 40, 1)) != set(say("open_drawer", 40, 2))


def test_every_pattern_can_be_said() -> None:
    for task in TASK_NAMES:
        rules = rules_of(task)
        for name in ("do", "wish", "before", "after"):
            for pattern in rules[name]:
                for seed in range(5):
                    text = expand(pattern, rules, np.random.default_rng(seed))
                    assert not re.search(r"[<>()\[\]|]", text), (task, text)


def test_sentences_that_name_no_task_are_apart_from_those_that_do(many: phrases.Phrases) -> None:
    nothing = say_nothing(300)
    assert nothing == say_nothing(300)
    keys = {normalised(sentence) for sentence in nothing}
    assert len(keys) == 300
    assert not keys & {normalised(s) for sentences in many.values() for s in sentences}
    kept = {normalised(sentence) for sentence in phrases.development_nothing()}
    assert len(kept) == 40
    assert not keys & kept
    assert not any(re.search(r"[<>()\[\]|]", sentence) for sentence in nothing)


def test_families() -> None:
    assert family_of("lift_red_block_slider") == "lift_slider"
    assert family_of("push_blue_block_left") == "push"
    assert family_of("push_into_drawer") == "push_into_drawer"
    assert family_of("move_slider_left") == "move_slider"


def test_what_cannot_be_said_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PhraseError, match="task: 'fly' is none of"):
        say("fly", 3)
    monkeypatch.setattr("openhelix.benchmarks.calvin.wordings.drawn", lambda task, rng: "go on")
    with pytest.raises(PhraseError, match="4 sentences for turn_off_led wanted, 1 found"):
        say("turn_off_led", 4)
