"""The prompt under a run's live view: where a person types what the robot is to do.

With a terminal it has a history and editing, and the live view stays above it. Without one every
line of standard input is said as it comes, so that a script can talk. The end of the input (Ctrl-D,
a pipe that ends) lets the robot finish what it does and ends the run; Ctrl-C ends it at once.
"""

from __future__ import annotations

import contextlib
import getpass
import logging
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from openhelix.runtime.core.paths import cache_folder, make_in_cache

log = logging.getLogger(__name__)
HELP: Final = (
    'type what the robot is to do; "stop", "wait" and "go on" are obeyed at once; '
    "Ctrl-D ends the run"
)
LEFT: Final = "the run ends when the robot has done what it does; Ctrl-C ends it at once"
HISTORY: Final = "said.txt"
ENDINGS: Final = ("quit", "exit")
Say = Callable[[str, str], Mapping[str, Any]]


def myself() -> str:
    """Return what others are told of who is talking."""
    with contextlib.suppress(Exception):  # a container's user may have no name
        return getpass.getuser()
    return "somebody"


class Prompt:
    """Reads what a person types, in a thread of its own.

    Args:
        show: prints a line above the prompt.
    """

    def __init__(self, show: Callable[[str], None]) -> None:
        self._show = show
        self._lines: tuple[str, ...] = ()  # the live view; replaced, never changed
        self._say: Say | None = None
        self._ended = threading.Event()
        self._session: Any = None
        self.left = False  # the input has ended

    @property
    def is_terminal(self) -> bool:
        """Whether a person sits before it."""
        return sys.stdin is not None and sys.stdin.isatty() and sys.stderr.isatty()

    def view(self, lines: tuple[str, ...]) -> None:
        """Show these lines above the prompt."""
        self._lines = lines

    @contextmanager
    def listening(
        self, say: Say, leave: Callable[[], None], interrupt: Callable[[], None]
    ) -> Iterator[None]:
        """Take what is typed while the block runs.

        Args:
            say: tells the robot; a ValueError is what is wrong with the sentence.
            leave: called when nothing more will be typed.
            interrupt: called at Ctrl-C, which a prompt takes before it is a signal.
        """
        self._say, self._leave, self._interrupt = say, leave, interrupt
        self._show(HELP)
        read = self._edit if self.is_terminal else self._read
        thread = threading.Thread(target=read, name="prompt", daemon=True)
        with contextlib.ExitStack() as stack:
            if self.is_terminal:
                # Lines that are printed meanwhile go above the prompt instead of through it.
                from prompt_toolkit.patch_stdout import patch_stdout

                stack.enter_context(patch_stdout(raw=True))
            thread.start()
            try:
                yield
            finally:
                self._end()
                thread.join(2.0)

    def _end(self) -> None:
        self._ended.set()
        app = getattr(self._session, "app", None)
        if app is not None and app.is_running and app.loop is not None:
            app.loop.call_soon_threadsafe(self._exit, app)

    @staticmethod
    def _exit(app: Any) -> None:
        with contextlib.suppress(Exception):  # it has just ended by itself
            app.exit(result="")

    def _read(self) -> None:
        """Say every line of the input."""
        try:
            for line in sys.stdin:
                if self._ended.is_set():
                    return
                if line.strip():
                    self._take(line)
        except (OSError, ValueError) as error:  # closed, or not text
            log.info("standard input: %s", error)
        self._finish()

    def _edit(self) -> None:
        """Let a person edit lines, with a history over runs."""
        # The editor takes a tenth of a second to import; only who talks pays.
        from prompt_toolkit import PromptSession
        from prompt_toolkit.formatted_text import ANSI

        def above() -> ANSI:
            return ANSI("".join(f"{line}\n" for line in self._lines) + "\x1b[1m> \x1b[0m")

        self._session = PromptSession(history=_history(), refresh_interval=0.25)
        while not self._ended.is_set():
            try:
                line = self._session.prompt(above, handle_sigint=False)
            except KeyboardInterrupt:
                self._interrupt()
                return
            except EOFError:
                break
            except Exception as error:  # the terminal is gone
                log.info("the terminal: %s", error)
                break
            if line.strip().lower() in ENDINGS:
                break
            if line.strip():
                self._take(line)
        if not self._ended.is_set():
            self._show(LEFT)
            self._finish()

    def _take(self, line: str) -> None:
        assert self._say is not None
        try:
            answer = self._say(line, myself())
        except (ValueError, RuntimeError) as error:  # what was typed is wrong, or nobody hears it
            self._show(" ".join(str(error).split()))
            return
        if answer.get("replaces") and answer["replaces_who"] not in ("", myself()):
            self._show(f"replaces {answer['replaces']!r}, which {answer['replaces_who']} said")

    def _finish(self) -> None:
        self.left = True
        self._leave()


def _history() -> Any:
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    folder: Path = cache_folder()
    try:
        make_in_cache(folder)
        return FileHistory(str(folder / HISTORY))
    except (OSError, ValueError):  # a home that may not be written to
        return InMemoryHistory()
