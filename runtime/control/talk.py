"""Talking with a running robot: what persons say to it, and what it did, in words.

Anybody who may reach the control process can say something, at any time and from any thread
(`Talk.say`); the loop's thread takes it before its next tick. A sentence is an instruction for
System 2, and replaces the one before. Three things are not for a model to interpret:

    stop     the arm stops, the instruction is dropped; it moves again when told what to do
    wait     the arm holds still and keeps its instruction
    go on    after "wait" it continues, after "stop" it takes the instruction up again

"Stop" here is a word in a conversation. The stop button and `openhelix status --stop` stop the robot
for good.

The journal is what happened, in order: the terminal, the status page, the film, the viewer and the
report tell the same story because they read the same entries.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from difflib import SequenceMatcher
from typing import Any, Final, Literal

from openhelix.runtime.core.config import ConfigError, checked_sentence
from openhelix.runtime.core.interfaces import LatentGoal

# ------------------------------------------------------------------------------------------------
# What happened

Kind = Literal[
    "said",  # a person told the robot something
    "begun",  # the robot follows an instruction from here on
    "answer",  # what System 2 made of it
    "acting",  # the first target of a plan for it was sent
    "seen",  # the world saw a task done
    "ended",  # the robot no longer follows it; `text` says why
    "held",  # what came of "stop", "wait" and "go on"
]
KEPT: Final = 2000  # entries; a run that is talked to for hours must not grow for ever


@dataclass(frozen=True, slots=True)
class Entry:
    """One thing that happened."""

    number: int  # counts the entries of a run, from 1
    t_ns: int  # of the tick before which, or in which, it happened
    kind: Kind
    text: str = ""
    who: str = ""  # who said it; "" for the run itself
    task: str = ""  # the oracle's name, where there is one
    steps: int = 0  # environment steps of the instruction so far
    said: int = 0  # the saying (`Said.number`) that it belongs to; 0 for none
    success: bool | None = None  # of "ended", None where nobody judged; of "answer", understood
    seconds: float | None = None  # of "acting": since the instruction was given

    def line(self) -> str:
        """Return the entry as a person reads it."""
        if self.kind == "said":
            return f"{self.who}: {self.text}"
        if self.kind == "begun":
            return f"follows: {self.text}"
        if self.kind == "answer":
            return f"System 2: {self.text}"
        if self.kind == "acting":
            return f"first action after {self.seconds or 0.0:.2f} s"
        if self.kind == "seen":
            return f"{self.task} after {self.steps} steps"
        if self.kind == "ended":
            named = f"{self.task}: " if self.task else ""
            return f"{named}{self.text} after {self.steps} steps"
        return self.text


class Journal:
    """The entries of one run; one thread writes, any may read."""

    def __init__(self) -> None:
        self._entries: tuple[Entry, ...] = ()  # replaced, never changed
        self.count = 0

    def add(self, t_ns: int, kind: Kind, text: str = "", **more: Any) -> None:
        """Append an entry; `more` are the fields of `Entry` by name."""
        self.count += 1
        entry = Entry(self.count, t_ns, kind, text, **more)
        self._entries = (*self._entries[-KEPT + 1 :], entry)

    def since(self, number: int) -> tuple[Entry, ...]:
        """Return the entries after that number, oldest first; those still kept."""
        entries = self._entries
        if not entries or number >= entries[-1].number:
            return ()
        return entries[max(0, number - entries[0].number + 1) :]

    def rows(self, last: int = KEPT) -> list[dict[str, Any]]:
        """Return the newest entries as plain data; see `row`."""
        return [row(entry) for entry in self.since(max(0, self.count - last))]


def row(entry: Entry) -> dict[str, Any]:
    """Return an entry as plain data, with its `line`."""
    return {**asdict(entry), "line": entry.line()}


def answer_of(latent: LatentGoal) -> str:
    """Return what System 2 says of the instruction that a latent is for; "" where nobody judges."""
    sure = f"{100 * latent.understood:.0f} %"
    if latent.refused:
        return f"does not understand it ({sure}); say it in other words"
    return f"understood ({sure})" if latent.understood < 1.0 else ""


# ------------------------------------------------------------------------------------------------
# What is said

Word = Literal["", "stop", "wait", "go on"]
WORDS: Final[dict[str, Word]] = {
    **dict.fromkeys(("stop", "halt", "freeze", "stop now", "stop it", "stop moving"), "stop"),
    **dict.fromkeys(("stop the robot", "stop the arm", "do not move", "don't move"), "stop"),
    **dict.fromkeys(("wait", "hold", "hold on", "hold still", "pause", "wait a moment"), "wait"),
    **dict.fromkeys(("go on", "go ahead", "continue", "resume", "carry on", "proceed"), "go on"),
}
ALIKE: Final = 0.8  # of two words: one letter too many, or another one, in five
WHO_CHARS: Final = 60


def word_of(text: str) -> Word:
    """Return which of the runtime's own words a text is; "" for an instruction.

    A slip of the keyboard must not make an instruction of "stop": "stopp" and "wiat" are obeyed, for
    to hold still is safe.

    Raises:
        ConfigError: it is nearly "go on"; one line asks.
    """
    plain = _plain(text)
    if plain in WORDS:
        return WORDS[plain]
    meant = next((word for word in WORDS if _is_slip(plain, word)), "")
    if WORDS.get(meant) == "go on":
        raise ConfigError(f"text: {plain!r}: did you mean {meant!r}?")
    return WORDS.get(meant, "")


def _plain(text: str) -> str:
    plain = " ".join(text.lower().split()).strip(" .,!")
    return plain.removeprefix("please ").removesuffix(" please").strip(" ,")


def _is_slip(plain: str, word: str) -> bool:
    words = len(word.split())
    if words > 2 or words != len(plain.split()):
        return False
    swapped = sorted(plain) == sorted(word)
    return swapped or SequenceMatcher(None, plain, word).ratio() >= ALIKE


@dataclass(frozen=True, slots=True)
class Said:
    """One thing that a person said."""

    number: int  # counts the sayings of a run, from 1
    t_ns: int  # when it arrived, monotonic
    text: str
    who: str
    word: Word  # "" for an instruction

    @property
    def heard_as(self) -> str:
        """How a slip of the keyboard was taken, in words; "" where nothing was to be guessed."""
        if not self.word or _plain(self.text) in WORDS:
            return ""
        return f'"{self.text}" taken as "{self.word}": '


class Talk:
    """What persons say to one robot; any thread may say, the loop's thread takes.

    Args:
        now_ns: the loop's clock.
    """

    def __init__(self, now_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self._now_ns = now_ns
        self._lock = threading.Lock()
        self._waiting: deque[Said] = deque()
        self._arrived = threading.Event()
        self._count = 0
        self._following = ("", "")  # the instruction in force, and who gave it
        self._over = False
        self.closed = False  # a run that has nothing left to do ends

    def say(self, text: str, who: str = "somebody") -> dict[str, Any]:
        """Say something; returns at once, the loop hears it before its next tick.

        Args:
            text: a sentence, or one of the runtime's words.
            who: says it, as others are told.

        Returns:
            `said` (its number), `text` as it was taken, `word` ("" for an instruction), and of
            an instruction `replaces` and `replaces_who`: the one that was in force until now.

        Raises:
            ConfigError: the text is no sentence; one line says why.
        """
        said = checked_sentence(text, "text")
        name = " ".join(str(who).split())[:WHO_CHARS] or "somebody"
        name = "".join(c for c in name if c.isprintable())
        word = word_of(said)
        with self._lock:
            if self._over:
                raise ConfigError("text: not heard: the run has ended")
            self._count += 1
            one = Said(self._count, self._now_ns(), said, name, word)
            before, by = self._following
            if not one.word:
                self._following = (said, name)
            self._waiting.append(one)
        self._arrived.set()
        replaces = {} if one.word else {"replaces": before, "replaces_who": by}
        return {"said": one.number, "text": said, "word": one.word, **replaces}

    def take(self) -> list[Said]:
        """Return what was said since the last call, oldest first; never waits."""
        if not self._waiting:  # read without the lock, as a tick does 30 times a second
            return []
        with self._lock:
            heard, self._waiting = list(self._waiting), deque()
            self._arrived.clear()
        return heard

    def follows(self, text: str, who: str = "") -> None:
        """Note the instruction in force; "" for none. What is waiting to be taken comes first."""
        with self._lock:
            if not any(not said.word for said in self._waiting):
                self._following = (text, who)

    def wait(self, timeout_s: float) -> None:
        """Sleep until somebody says something or nobody will, at most `timeout_s`."""
        self._arrived.wait(timeout_s)

    def close(self) -> None:
        """Do not wait for words any more: with nothing left to do the run ends."""
        self.closed = True
        self._arrived.set()

    def end(self) -> None:
        """The run has ended: whoever says something now is told so."""
        with self._lock:
            self._over = self.closed = True
