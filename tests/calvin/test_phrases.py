"""The instruction lists: complete, without duplicates, and each about its own task."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from openhelix.benchmarks.calvin import phrases
from openhelix.benchmarks.calvin.phrases import PhraseError
from openhelix.benchmarks.calvin.tasks import TASK_NAMES, TASKS

LISTS = {
    "training": phrases.training(),
    "seen": phrases.calvin_e("seen"),
    "unseen": phrases.calvin_e("unseen"),
}
COLORS = {"red", "blue", "pink"}
SLIDE = r"\b(slider|sliding|door|cabinet|cupboard'?s?)\b"
CABINET = r"\b(slider|cabinet'?s?|cupboard'?s?)\b"
DRAWER = r"\bdrawer'?s?\b"
TABLE = r"\b(table|tabletop|desk|worktop)\b"
BULB = r"\b(bulb'?s?|yellow|switch)\b"
LED = r"\b(led'?s?|green)\b"
ON = (
    r"\bon\b|\b(up|upwards|upper|top|raise|lights|lit|shines?|glow|life|start)\b"
    r"|light the|some (yellow|green) light|illuminate|enable|energise|\bactivate"
)
OFF = (
    r"\boff\b|\b(down|downwards|lower|lowering|bottom|dark|darken|out|stop)\b"
    r"|no more|extinguish|disable|deactivate"
)
UP_ONLY, DOWN_ONLY = r"\b(up|upwards|raise|raises)\b", r"\b(down|downwards)\b"

# family or task: (must match, must not match)
RULES: dict[str, tuple[str, str]] = {
    "rotate": (
        r"rotat|turn|twist|spin|spun|swivel|pivot|orient|wind|angle|face|point",
        rf"\b(push|shove)\b|{DRAWER}|{CABINET}",
    ),
    "push": (
        r"push|slide|slid|shove|nudge|shift|sweep|drive|glide|press|bring|displace|scoot",
        rf"rotat|turn|{DRAWER}|{CABINET}",
    ),
    "move_slider": (SLIDE, rf"{DRAWER}|\bblock\b"),
    "open_drawer": (DRAWER, r"\b(clos\w*|shut|push)\b"),
    "close_drawer": (DRAWER, r"\b(open|pull)\b"),
    "lift_table": (TABLE, rf"{DRAWER}|{CABINET}"),
    "lift_slider": (CABINET, rf"{DRAWER}|{TABLE}"),
    "lift_drawer": (DRAWER, rf"{CABINET}|{TABLE}"),
    "place_in_slider": (CABINET, DRAWER),
    "place_in_drawer": (DRAWER, CABINET),
    "stack_block": (r"stack|top|another|other|second|tower|pile", rf"unstack|{DRAWER}|{CABINET}"),
    "unstack_block": (
        r"stack|tower|pile|top|upper|on another|upon the other",
        rf"{DRAWER}|{CABINET}",
    ),
    "turn_on_lightbulb": (BULB, rf"{LED}|\boff\b|{DOWN_ONLY}"),
    "turn_off_lightbulb": (BULB, rf"{LED}|\bon\b|{UP_ONLY}"),
    "turn_on_led": (LED, rf"{BULB}(?<!switch)|\boff\b"),
    "turn_off_led": (LED, rf"{BULB}(?<!switch)|\bon\b(?! the button)"),
    "push_into_drawer": (DRAWER, CABINET),
}


def rule(task: str) -> tuple[str, str]:
    if task in RULES:
        return RULES[task]
    head, *_, tail = task.split("_")
    return RULES[{"lift": f"lift_{tail}", "move": "move_slider"}.get(head, head)]


def everything() -> list[tuple[str, str, str]]:
    return [(n, t, s) for n, lists in LISTS.items() for t, ss in lists.items() for s in ss]


def test_every_task_has_enough() -> None:
    for lists in LISTS.values():
        assert tuple(lists) == TASK_NAMES
    for task in TASK_NAMES:
        assert len(LISTS["training"][task]) >= 20
        assert len(LISTS["seen"][task]) >= 10
        assert len(LISTS["unseen"][task]) >= 15
        assert len(phrases.calvin_e()[task]) >= 30


def test_no_sentence_occurs_twice_anywhere() -> None:
    seen: dict[str, tuple[str, str]] = {
        phrases.normalised(task.sentence): ("validation", name) for name, task in TASKS.items()
    }
    for name, task, sentence in everything():
        key = phrases.normalised(sentence)
        assert key not in seen, f"{sentence!r}: {name} {task} and {seen[key]}"
        seen[key] = (name, task)


def test_the_split_is_by_words() -> None:
    known = {w for ss in LISTS["training"].values() for s in ss for w in phrases.words(s)}
    for ss in LISTS["seen"].values():
        for sentence in ss:
            assert phrases.words(sentence) <= known, sentence
    for ss in LISTS["unseen"].values():
        for sentence in ss:
            assert phrases.words(sentence) - known, sentence


@pytest.mark.parametrize("task", TASK_NAMES)
def test_key_words_are_present_and_unambiguous(task: str) -> None:
    color = TASKS[task].target.removeprefix("block_")
    must, must_not = rule(task)
    for _, name, sentence in everything():
        if name != task:
            continue
        text = sentence.lower()
        assert phrases.words(text) & COLORS == ({color} & COLORS), sentence
        assert re.search(must, text), sentence
        assert not re.search(must_not, text), sentence
        sides = set(re.findall(r"\b(right|left)(?:wards)?\b", text))
        wanted = {"right", "left"} & set(task.split("_"))
        assert sides == wanted, sentence
        if "clockwise" in text:
            assert ("counterclockwise" in text) == (wanted == {"left"}), sentence
        if task.startswith(("turn_on", "turn_off")):
            assert re.search(ON if "_on_" in task else OFF, text), sentence


def test_wording_length_and_politeness_vary() -> None:
    for task, sentences in phrases.calvin_e().items():
        lengths = [len(s.split()) for s in sentences]
        assert min(lengths) <= 7, task
        assert max(lengths) >= 10, task
        polite = r"please|could you|would you|kindly|can you|i would like|it would"
        share = np.mean([bool(re.search(polite, s.lower())) for s in sentences])
        assert 0.1 < share < 0.7, task
        assert len({s.split()[0].lower() for s in sentences}) >= 12, task


def test_plain_text() -> None:
    for _, _, sentence in everything():
        assert sentence == sentence.strip()
        assert sentence.isascii()
        assert "  " not in sentence
        assert not re.search(r"[{}<>\[\]]", sentence)


def test_a_users_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"open_drawer": ["  open it  ", "pull"]}))
    mine = phrases.load(path)
    assert mine == {"open_drawer": ("open it", "pull")}
    rng = np.random.default_rng(0)
    assert {phrases.choose(mine, "open_drawer", rng) for _ in range(30)} == {"open it", "pull"}
    with pytest.raises(PhraseError, match="no phrase for 'turn_on_led'"):
        phrases.choose(mine, "turn_on_led", rng)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ([], "wants"),
        ({}, "wants"),
        ({"fly": ["fly"]}, "task 'fly'"),
        ({"open_drawer": "open it"}, "open_drawer: wants a list"),
        ({"open_drawer": []}, "open_drawer: wants a list"),
        ({"open_drawer": ["open", ""]}, "no sentence"),
        ({"open_drawer": ["open", 3]}, "3 is no sentence"),
        ({"open_drawer": ["x" * 400]}, "no sentence"),
    ],
)
def test_a_bad_file_is_one_clear_error(tmp_path: Path, content: Any, what: str) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(content))
    with pytest.raises(PhraseError, match=rf"mine\.json: .*{what}"):
        phrases.load(path)


def test_of_a_sentence_that_occurs_again_one_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "again.json"
    path.write_text(json.dumps({"open_drawer": ["Open it!", "open it", "OPEN  it.", "pull"]}))
    assert phrases.load(path) == {"open_drawer": ("Open it!", "pull")}
    said = capsys.readouterr().err
    assert said.startswith("again.json: 2 sentences occur again")
    assert said.count("\n") == 1
    with pytest.raises(PhraseError, match="open_drawer: 'open it' occurs twice"):
        phrases.checked({"open_drawer": ["Open it!", "open it"]}, "ours")


@pytest.mark.parametrize(
    "pair",
    [
        ("打开抽屉", "拉开抽屉"),
        ("открой ящик", "закрой ящик"),
        ("दराज खोलो", "दराज खोले"),  # they differ in a vowel sign alone
        ("öffne die Schublade", "offne die Schublade"),
    ],
)
def test_every_script_counts(pair: tuple[str, str]) -> None:
    one, other = (phrases.normalised(sentence) for sentence in pair)
    assert one != other
    assert phrases.normalised(f" {pair[0].upper()}!  ") == one
    content = {"open_drawer": list(pair)}
    assert phrases.checked(content, "x") == {"open_drawer": pair}


def test_the_development_list_is_apart_from_all_others() -> None:
    kept = {phrases.normalised(s) for ss in phrases.development().values() for s in ss}
    assert len(kept) == 340
    others = (phrases.validation(), phrases.training(), phrases.calvin_e())
    assert not kept & {phrases.normalised(s) for each in others for ss in each.values() for s in ss}


def test_no_file_no_json_no_split(tmp_path: Path) -> None:
    with pytest.raises(PhraseError, match="cannot be read"):
        phrases.load(tmp_path / "nowhere.json")
    for text in ("{", "[" * 100_000):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(PhraseError, match="not JSON"):
            phrases.load(tmp_path / "bad.json")
    with pytest.raises(PhraseError, match="split: 'train' is none of"):
        phrases.calvin_e("train")


def test_validation_is_calvins() -> None:
    assert phrases.validation()["open_drawer"] == ("pull the handle to open the drawer",)
    assert len(phrases.validation()) == 34
