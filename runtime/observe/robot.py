"""A robot that is running, from outside: talk to it, look at it, stop it.

    robot = openhelix.Robot()                      # the newest run below outputs/
    told = robot.say("open the drawer")            # back when the first action is sent
    print(told.first_action_s, told.answer)
    for entry in robot.events(timeout_s=10): print(entry["line"])
    robot.stop()                                   # for good, as the stop button does

It needs to be able to read the run's folder, and neither torch nor a simulator.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from openhelix.runtime.core.config import RunConfig
from openhelix.runtime.core.interfaces import U8
from openhelix.runtime.observe.prompt import myself
from openhelix.runtime.observe.status_source import NoRun, RunSource

POLL_S: Final = 0.02
PATIENCE_S: Final = 5.0  # for an answer, on a busy machine


@dataclass(frozen=True, slots=True)
class Told:
    """What became of something that was said.

    Attributes:
        text: as it was taken.
        word: "stop", "wait" or "go on" if it is one of the runtime's words; "" for an instruction.
        replaces: the instruction that was in force; "" for none.
        replaces_who: who had said that; "" where it was there from the start.
        answer: what System 2 says of the instruction, where it can tell; "" otherwise.
        refused: whether it does not understand it: the robot holds still.
        first_action_s: from saying it to the first action of the new instruction; None if there was
            none in time.
        replaced: what somebody else said before that, as "who: text"; "" for nothing.
        came_of_it: of a word, in a sentence; "" otherwise.
        said: its number in the journal.
    """

    text: str
    word: str
    replaces: str
    replaces_who: str
    answer: str
    refused: bool
    first_action_s: float | None
    replaced: str
    came_of_it: str
    said: int


class Robot:
    """A robot that a run drives.

    Args:
        run: the run's folder; None for the newest that is alive below `outputs`.
        outputs: folder of all runs.
        who: name that the others who talk to the robot are told.
    """

    def __init__(
        self,
        run: str | Path | None = None,
        *,
        outputs: str | Path | None = None,
        who: str | None = None,
    ) -> None:
        base = Path(outputs) if outputs is not None else RunConfig().output.folder
        folder = Path(run) if run is not None else None
        self._source = RunSource(base, folder, timeout_s=PATIENCE_S)
        self._who = who or myself()

    def say(self, text: str, timeout_s: float = 15.0) -> Told:
        """Tell the robot something, and wait until it acts on it.

        A sentence is an instruction: it replaces the one before within a tick. "stop", "wait" and
        "go on" are obeyed by the runtime itself.

        Args:
            text: at most 500 characters, without control characters.
            timeout_s: how long to wait for its first action; 0 to come back at once.

        Raises:
            ConfigError: the text is no sentence; one line says why.
            NoRun: no run is alive.
        """
        seen = self._last()
        begun_s = time.monotonic()
        taken = self._source.say(text, self._who)
        found: dict[str, Any] = {
            **{"answer": "", "refused": False, "first": None},
            **{"replaced": "", "came": ""},
        }
        while time.monotonic() - begun_s < timeout_s:
            entries = self._source.journal(seen)
            for entry in entries:
                seen = entry["number"]
                self._note(entry, taken, found)
            ended = found["came"] or found["replaced"] or found["refused"]
            if ended or found["first"] is not None:
                break
            time.sleep(POLL_S)
        return Told(
            text=taken["text"],
            word=taken["word"],
            replaces=taken.get("replaces", ""),
            replaces_who=taken.get("replaces_who", ""),
            answer=found["answer"],
            refused=found["refused"],
            first_action_s=found["first"],
            replaced=found["replaced"],
            came_of_it=found["came"],
            said=taken["said"],
        )

    def events(
        self,
        since: int = 0,
        timeout_s: float | None = None,
        over: Callable[[], bool] | None = None,
    ) -> Iterator[dict[str, Any]]:
        """Yield what happens, as it happens; each has a `line` for a person.

        Args:
            since: number of the last entry that is known already.
            timeout_s: end when nothing has happened for so long; None goes on until the run ends.
            over: asked several times per second, also while nothing happens: true ends it.
        """
        heard_s = time.monotonic()
        while timeout_s is None or time.monotonic() - heard_s < timeout_s:
            if over is not None and over():
                return
            try:
                entries = self._source.journal(since)
            except NoRun:
                return
            for entry in entries:
                since, heard_s = entry["number"], time.monotonic()
                yield entry
            time.sleep(POLL_S)

    def status(self) -> dict[str, Any]:
        """Return how the robot is doing, as the status page shows it.

        Raises:
            NoRun: no run is alive.
        """
        return self._source.snapshot()

    def image(self, camera: str = "static") -> U8 | None:
        """Return what a camera sees, (h, w, 3) u8; None for no such camera, or no image yet.

        Raises:
            NoRun: no run is alive.
        """
        image: U8 | None = self._source.frame(camera).get("rgb")
        return image

    def stop(self) -> None:
        """Stop the robot for good; only a new run moves it again.

        Raises:
            NoRun: no run is alive, or it does not answer: the robot may still move.
        """
        self._source.stop(self._who)

    def close(self) -> None:
        """Let go of the run, which goes on; safe to call twice."""
        self._source.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _last(self) -> int:
        entries = self._source.snapshot()["entries"]
        return int(entries[-1]["number"]) if entries else 0

    def _note(self, entry: dict[str, Any], taken: dict[str, Any], found: dict[str, Any]) -> None:
        own = entry["said"] == taken["said"]
        if own and entry["kind"] == "acting":
            found["first"] = entry["seconds"]
        elif own and entry["kind"] == "answer":
            found["answer"], found["refused"] = entry["text"], entry["success"] is False
        elif own and entry["kind"] == "held":
            found["came"] = entry["text"]
        elif entry["kind"] == "said" and entry["said"] > taken["said"] and not taken["word"]:
            found["replaced"] = entry["line"]
