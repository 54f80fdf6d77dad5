"""Instruction lists: CALVIN-E's paraphrases and the sentences used for training.

Three lists of our own, each {task: [sentence]}, for all 34 tasks:

- `training`: 20 plain sentences a task, what demonstrations are labelled with;
- CALVIN-E `seen`: none of those sentences, but made only of words that occur among them;
- CALVIN-E `unseen`: each has at least one word that no training sentence has.

None of them is one of CALVIN's validation sentences, so all four can be compared. A fifth list,
`development`, has words and structures that neither the training sentences nor the grammar of
`wordings.py` has: models are selected on it, so that CALVIN-E is used for measuring only.
The paper's own list (GPT-4's) was never published; a user's file of the same form is read by
`load`.
"""

from __future__ import annotations

import functools
import json
import sys
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from openhelix.benchmarks.calvin.tasks import TASK_NAMES, TASKS
from openhelix.runtime.core.plugins import none_of

Phrases = dict[str, tuple[str, ...]]

FOLDER = Path(__file__).parent / "instructions"
TRAINING, CALVIN_E = FOLDER / "training.json", FOLDER / "calvin_e.json"
DEVELOPMENT = FOLDER / "development.json"
DEVELOPMENT_NOTHING = FOLDER / "development_nothing.json"
SPLITS = ("seen", "unseen", "all")
MAX_CHARS = 300


class PhraseError(ValueError):
    """A list of phrases that cannot be used; the message says which entry."""


def words(sentence: str) -> frozenset[str]:
    """The words of a sentence, in small letters; numbers are none."""
    return frozenset(word for word in normalised(sentence).split() if not word.isdecimal())


def normalised(sentence: str) -> str:
    """A sentence without case, punctuation and spacing: equal means the same sentence.

    Letters, marks and digits of every script count.
    """
    text = unicodedata.normalize("NFKC", sentence).casefold().replace("\u2019", "'")
    return " ".join(
        "".join(c if c == "'" or unicodedata.category(c)[0] in "LMN" else " " for c in text).split()
    )


def checked(content: Any, where: str, repeated: list[str] | None = None) -> Phrases:
    """Turn {task: [sentence]} into phrases.

    Args:
        content: What a JSON file held; it need not name every task.
        where: Name of the file, for messages.
        repeated: Takes the sentences that occur again under their task, which are then left
            out; None: they are refused.

    Raises:
        PhraseError: Not of this form, an unknown task, an empty, overlong or repeated sentence.
    """
    if not isinstance(content, Mapping) or not content:
        raise PhraseError(f"{where}: wants {{task: [sentence, ...]}}")
    phrases: Phrases = {}
    for task, sentences in content.items():
        if task not in TASKS:
            raise PhraseError(f"{where}: task {none_of(task, TASK_NAMES)}")
        if not isinstance(sentences, list) or not sentences:
            raise PhraseError(f"{where}: {task}: wants a list of sentences")
        known: set[str] = set()
        kept: list[str] = []
        for sentence in sentences:
            if not isinstance(sentence, str) or not 0 < len(sentence.strip()) <= MAX_CHARS:
                raise PhraseError(
                    f"{where}: {task}: {sentence!r} is no sentence of 1 to {MAX_CHARS} characters"
                )
            plain = normalised(sentence)
            if plain in known:
                if repeated is None:
                    raise PhraseError(f"{where}: {task}: {sentence!r} occurs twice")
                repeated.append(sentence)
                continue
            known.add(plain)
            kept.append(sentence.strip())
        phrases[task] = tuple(kept)
    return phrases


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PhraseError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise PhraseError(f"{path}: not JSON ({error})") from error


def load(path: Path | str) -> Phrases:
    """A user's `{task: [sentence, ...]}` file, as the paper's CALVIN-E file is.

    A sentence that occurs again under its task (but for capitals, punctuation and spacing) is
    left out, and a line on standard error says so.

    Raises:
        PhraseError: Missing, or not of this form; see `checked`.
    """
    repeated: list[str] = []
    phrases = checked(_read(Path(path)), Path(path).name, repeated)
    if repeated:
        _tell(
            f"{Path(path).name}: {len(repeated)} sentences occur again under their task "
            f"({repeated[0]!r}); one of each is kept"
        )
    return phrases


@functools.cache
def _tell(line: str) -> None:
    """Say something on standard error, once."""
    sys.stderr.write(line + "\n")


def validation() -> Phrases:
    """CALVIN's own validation sentences, one per task."""
    return {name: (task.sentence,) for name, task in TASKS.items()}


def training() -> Phrases:
    """Sentences to label demonstrations with."""
    return checked(_read(TRAINING), TRAINING.name)


def development() -> Phrases:
    """Sentences to choose by: ten a task, in words that training does not have."""
    return checked(_read(DEVELOPMENT), DEVELOPMENT.name)


def development_nothing() -> tuple[str, ...]:
    """Sentences to choose by that name no task."""
    found = _read(DEVELOPMENT_NOTHING)
    return tuple(str(sentence) for sentence in found)


def calvin_e(split: str = "all") -> Phrases:
    """CALVIN-E's sentences.

    Args:
        split: "seen" (known words), "unseen" (at least one new word) or "all".

    Raises:
        PhraseError: Unknown split.
    """
    if split not in SPLITS:
        raise PhraseError(f"split: {none_of(split, SPLITS)}")
    return dict(_calvin_e(split))


@functools.cache
def _calvin_e(split: str) -> Phrases:
    parts = SPLITS[:2] if split == "all" else (split,)
    content = {
        task: [sentence for part in parts for sentence in lists[part]]
        for task, lists in _read(CALVIN_E).items()
    }
    return checked(content, CALVIN_E.name)


def choose(phrases: Mapping[str, tuple[str, ...]], task: str, rng: np.random.Generator) -> str:
    """Draw one sentence for a task.

    Raises:
        PhraseError: The phrases have none for it.
    """
    if task not in phrases:
        raise PhraseError(f"task: no phrase for {task!r}")
    return phrases[task][int(rng.integers(len(phrases[task])))]
