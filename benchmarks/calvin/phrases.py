"""Instructions in other words: CALVIN-E's enriched language and the phrases to train on.

Three lists of our own, each {task: [sentence]}, for all 34 tasks:

- `training`: 20 plain sentences a task, what demonstrations are labelled with;
- CALVIN-E `seen`: none of those sentences, but made only of words that occur among them;
- CALVIN-E `unseen`: each has at least one word that no training sentence has.

None of them is one of CALVIN's validation sentences, so all four can be compared. The paper's
own list (GPT-4's) was never published; a user's file of the same form is read by `load`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from openhelix.benchmarks.calvin.tasks import TASK_NAMES, TASKS

Phrases = dict[str, tuple[str, ...]]

FOLDER = Path(__file__).parent / "instructions"
TRAINING, CALVIN_E = FOLDER / "training.json", FOLDER / "calvin_e.json"
SPLITS = ("seen", "unseen", "all")
MAX_CHARS = 300


class PhraseError(ValueError):
    """A list of phrases that cannot be used; the message says which entry."""


def words(sentence: str) -> frozenset[str]:
    """The words of a sentence, in small letters."""
    return frozenset(re.findall(r"[a-z']+", sentence.lower()))


def normalised(sentence: str) -> str:
    """A sentence without case, punctuation and spacing: equal means the same sentence."""
    return " ".join(re.findall(r"[a-z0-9']+", sentence.lower()))


def checked(content: Any, where: str) -> Phrases:
    """Turn {task: [sentence]} into phrases.

    Args:
        content: What a JSON file held; it need not name every task.
        where: Name of the file, for messages.

    Raises:
        PhraseError: Not of this form, an unknown task, an empty, overlong or repeated sentence.
    """
    if not isinstance(content, Mapping) or not content:
        raise PhraseError(f"{where}: wants {{task: [sentence, ...]}}")
    phrases: Phrases = {}
    for task, sentences in content.items():
        if task not in TASKS:
            raise PhraseError(f"{where}: task {task!r} is none of {', '.join(TASK_NAMES)}")
        if not isinstance(sentences, list) or not sentences:
            raise PhraseError(f"{where}: {task}: wants a list of sentences")
        known: set[str] = set()
        for sentence in sentences:
            if not isinstance(sentence, str) or not 0 < len(sentence.strip()) <= MAX_CHARS:
                raise PhraseError(
                    f"{where}: {task}: {sentence!r} is no sentence of 1 to {MAX_CHARS} characters"
                )
            if normalised(sentence) in known:
                raise PhraseError(f"{where}: {task}: {sentence!r} occurs twice")
            known.add(normalised(sentence))
        phrases[task] = tuple(sentence.strip() for sentence in sentences)
    return phrases


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PhraseError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise PhraseError(f"{path}: not JSON ({error})") from error


def load(path: Path | str) -> Phrases:
    """A user's `{task: [sentence, ...]}` file, as the paper's CALVIN-E file is.

    Raises:
        PhraseError: Missing, or not of this form; see `checked`.
    """
    return checked(_read(Path(path)), Path(path).name)


def validation() -> Phrases:
    """CALVIN's own validation sentences, one per task."""
    return {name: (task.sentence,) for name, task in TASKS.items()}


def training() -> Phrases:
    """Sentences to label demonstrations with."""
    return checked(_read(TRAINING), TRAINING.name)


def calvin_e(split: str = "all") -> Phrases:
    """CALVIN-E's sentences.

    Args:
        split: "seen" (known words), "unseen" (at least one new word) or "all".

    Raises:
        PhraseError: Unknown split.
    """
    if split not in SPLITS:
        raise PhraseError(f"split: {split!r} is none of {', '.join(SPLITS)}")
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
