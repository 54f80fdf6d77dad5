"""What happened in a run, in words: what it was told, what it began, what the world saw.

The loop's thread writes the journal, whoever shows a run reads it: the terminal, the status page,
the film, the viewer and the report tell the same story because they read the same entries.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Kind = Literal[
    "said",  # a person told the robot something
    "begun",  # the robot follows an instruction from here on
    "answer",  # what System 2 made of it
    "acting",  # the first target of a plan for it was sent
    "seen",  # the world saw a task done
    "ended",  # the robot no longer follows it; `text` says why
    "held",  # a person made the robot wait, go on or stop
]
KEPT = 2000  # entries; a run that is talked to for hours must not grow for ever


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
    instruction_id: int = 0
    success: bool | None = None  # of "ended"; None where nobody judges
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

    def add(self, t_ns: int, kind: Kind, text: str = "", **more: object) -> Entry:
        """Append an entry; `more` are the fields of `Entry` by name."""
        self.count += 1
        entry = Entry(self.count, t_ns, kind, text, **more)  # type: ignore[arg-type]
        self._entries = (*self._entries[-KEPT + 1 :], entry)
        return entry

    def since(self, number: int) -> tuple[Entry, ...]:
        """Return the entries after that number, oldest first; those still kept."""
        entries = self._entries
        if not entries or number >= entries[-1].number:
            return ()
        return entries[max(0, number - entries[0].number + 1) :]


def told_lines(journal: Journal, last: int = 30) -> list[dict[str, Any]]:
    """Return the newest entries as plain data, each with its `line`."""
    newest = journal.since(max(0, journal.count - last))
    return [{**asdict(entry), "line": entry.line()} for entry in newest]
