"""How a process outside a run finds it, queries its status, and stops it.

A run on the wall clock leaves a record in its folder while it lives: where its observer and
its control loop answer, and the token without which a page must not stop the robot. Only the
run's own user can read it. Queries go to the observer; the only message to
the control process is "stop".
"""

from __future__ import annotations

import json
import os
import secrets
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from openhelix.runtime.core.config import (
    CommandFailed,
    ConfigError,
    RunConfig,
    checked_sentence,
)
from openhelix.runtime.core.files import BadFile, as_record, read_json, written
from openhelix.runtime.transport.rpc import RpcClient, RpcError, RpcInvalid, RpcTimeout
from openhelix.runtime.transport.sockets import check_connect, served

RECORD = "status.json"
ASK_TIMEOUT_S = 1.0
STOP_TIMEOUT_S = 3.0
VIEW_TIMEOUT_S = 120.0  # Rerun takes seconds to begin, on a busy machine many


class NoRun(CommandFailed):
    """There is no run to show; one line says why."""


@dataclass(frozen=True, slots=True)
class StatusRecord:
    """Where a run can be asked, and what proves that somebody may stop it."""

    robot: str
    observer: str | None  # endpoint; None where nobody looks on
    control: str  # endpoint
    keys: str | None  # folder of CURVE keys, off this host
    token: str

    @classmethod
    def of(cls, ends: Mapping[str, str], observed: bool, config: RunConfig) -> StatusRecord:
        """Return the record of a run that is about to start, with a token of its own.

        Args:
            ends: endpoint on which each node answers questions.
            observed: whether the run has an observer.
            config: of the run.
        """
        keys = config.transport.keys
        return cls(
            robot=config.robot.id,
            observer=ends["observer"] if observed else None,
            control=ends["control"],
            keys=str(keys.expanduser().resolve()) if keys else None,
            token=secrets.token_urlsafe(18),
        )

    @classmethod
    def read(cls, folder: Path) -> StatusRecord:
        """Read the record in a run's folder.

        Raises:
            NoRun: there is none, or it is not readable.
        """
        path = folder / RECORD
        if not path.exists():
            raise NoRun(f"{folder}: no run is alive there")
        try:
            return as_record(cls, read_json(path), str(path))
        except BadFile as error:
            raise NoRun(str(error)) from None

    @contextmanager
    def kept(self, folder: Path) -> Iterator[None]:
        """Keep the record in `folder` for as long as the run lives."""
        path = folder / RECORD
        with written(path) as part, open(part, "w", opener=_private) as file:
            json.dump(asdict(self), file)
        try:
            yield
        finally:
            with suppress(OSError):
                path.unlink()


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def newest_run(base: Path) -> Path:
    """Return the folder of the newest run that is alive below `base`.

    Raises:
        NoRun: there is none.
    """
    records = []
    for path in base.glob(f"run-*/{RECORD}"):
        with suppress(OSError):  # it ended just now
            records.append((path.stat().st_mtime_ns, path.parent))
    if not records:
        raise NoRun(f"{base}: no run is alive there (lockstep runs are not shown)")
    return max(records)[1]


class RunSource:
    """Asks one run, or whichever is the newest; any thread may call it.

    Args:
        base: folder of all runs, searched again whenever the one that was shown has ended.
        folder: of one run, to show that and no other.
        system2: address of an `openhelix serve`, whose robots `fleet` lists too.
        keys: folder of CURVE keys for it, off this host.
        timeout_s: how long to wait for an answer; a page that is redrawn all the time waits for
            less than a person who asked once.
    """

    def __init__(
        self,
        base: Path,
        folder: Path | None = None,
        system2: str | None = None,
        keys: Path | None = None,
        timeout_s: float = ASK_TIMEOUT_S,
    ) -> None:
        self._base, self._folder, self._timeout_s = base, folder, timeout_s
        self._shared: RpcClient | None = None
        if system2 is not None:
            endpoint = served(system2)["control"]
            check_connect(endpoint, keys)
            self._shared = RpcClient(endpoint, keys=str(keys) if keys else None)
        self._lock = threading.Lock()
        self._shown: Path | None = None
        self._record: StatusRecord | None = None
        self._observer: RpcClient | None = None

    @property
    def token(self) -> str | None:
        """The token of the run that is alive now; None without one."""
        try:
            return self.record().token
        except NoRun:
            return None

    def record(self) -> StatusRecord:
        """Return the record of the run that is alive now; waits for nobody.

        Raises:
            NoRun: there is none.
        """
        return StatusRecord.read(self._folder or newest_run(self._base))

    def snapshot(self) -> dict[str, Any]:
        """Return `StatusBoard.snapshot` of the run, with the name of its folder.

        Raises:
            NoRun: there is none, or it does not answer.
        """
        answer = self._ask("status")
        return answer | {"run": self._shown.name if self._shown else ""}

    def frame(self, camera: str) -> dict[str, Any]:
        """Return `StatusBoard.frame` of a camera.

        Raises:
            NoRun: there is no run, or it does not answer.
        """
        return self._ask("frame", camera=camera)

    def latent(self) -> dict[str, Any]:
        """Return `StatusBoard.latent`: the newest latent, and what it was made from.

        Raises:
            NoRun: there is no run, or it does not answer.
        """
        return self._ask("latent")

    def journal(self, since: int = 0) -> list[dict[str, Any]]:
        """Return what happened after the entry of that number; see `talk.row`.

        Raises:
            NoRun: there is no run, or it does not answer.
        """
        return list(self._ask("journal", since=since)["entries"])

    def fleet(self) -> dict[str, Any]:
        """Return the runs on this host, and the robots of a shared System 2 if there is one.

        Returns:
            "runs": of each its folder, robot, instruction, state and latent age; "system2": its
            address' health, None without one; "error" where it does not answer.
        """
        runs = []
        for path in sorted(self._base.glob(f"run-*/{RECORD}")):
            source = RunSource(self._base, path.parent)
            try:
                seen = source.snapshot()
                kept = (
                    "run",
                    "robot",
                    "instruction",
                    "state",
                    "reason",
                    "latent_age_s",
                    "finished",
                )
                runs.append({name: seen[name] for name in kept})
            except NoRun as error:
                runs.append({"run": path.parent.name, "error": str(error)})
            finally:
                source.close()
        if self._shared is None:
            return {"runs": runs, "system2": None}
        try:
            return {"runs": runs, "system2": self._shared.call("health", {}, ASK_TIMEOUT_S)}
        except RpcError as error:
            return {"runs": runs, "system2": {"error": str(error), "robots": {}}}

    def view(self) -> str:
        """Let the run show itself in Rerun; return where, once it does.

        Raises:
            NoRun: there is no run, or it cannot.
        """
        end_s = time.monotonic() + VIEW_TIMEOUT_S
        while (now_s := time.monotonic()) < end_s:
            # To import Rerun can keep a whole process from answering.
            told = self._ask("view", timeout_s=end_s - now_s)
            if told["error"]:
                raise NoRun(f"{self.record().robot}: {told['error']}")
            if told["url"]:
                return str(told["url"])
            time.sleep(0.2)
        raise NoRun(f"{self.record().robot}: Rerun has not begun within {VIEW_TIMEOUT_S:g} s")

    def say(self, text: object, who: str) -> dict[str, Any]:
        """Tell the robot something; see `openhelix.runtime.control.talk.Talk.say`.

        Raises:
            ConfigError: the text is no sentence.
            NoRun: there is no run, or it does not answer: it may have been heard.
        """
        sentence = checked_sentence(text, "text")  # here already: no need to bother the robot
        record = self.record()
        try:
            return self._order(record, "say", text=sentence, who=who)
        except RpcInvalid as error:
            raise ConfigError(str(error)) from None
        except RpcTimeout as error:
            raise NoRun(f"{record.robot}: does not answer ({error})") from None
        except RpcError as error:
            raise NoRun(f"{record.robot}: {error}") from None

    def stop(self, who: str) -> None:
        """Stop the robot for good.

        Raises:
            NoRun: there is no run, or it does not answer: the robot may still move.
        """
        record = self.record()
        try:
            self._order(record, "safe_stop", who=who)
        except RpcError as error:
            raise NoRun(f"{record.robot}: NOT stopped: {error}") from None

    @staticmethod
    def _order(record: StatusRecord, question: str, **arguments: Any) -> dict[str, Any]:
        """Tell the control process, which answers at once or not at all."""
        client = RpcClient(record.control, keys=record.keys)
        try:
            return client.call("ask", {"question": question, **arguments}, STOP_TIMEOUT_S)
        finally:
            client.close()

    def close(self) -> None:
        """Release the connection; safe to call twice."""
        with self._lock:
            self._forget()
        if self._shared is not None:
            self._shared.close()

    def _ask(
        self, question: str, timeout_s: float | None = None, **arguments: Any
    ) -> dict[str, Any]:
        with self._lock:
            record = self._find()
            if record.observer is None:
                raise NoRun(
                    f"{record.robot}: nobody looks on at this run; start it with output.status=true"
                )
            if self._observer is None:
                self._observer = RpcClient(record.observer, keys=record.keys)
            try:
                return self._observer.call(
                    "ask", {"question": question, **arguments}, timeout_s or self._timeout_s
                )
            except RpcError as error:
                self._forget()
                raise NoRun(f"{record.robot}: does not answer ({error})") from None

    def _find(self) -> StatusRecord:
        """Return the record, read again when the run that it is of has ended."""
        folder = self._folder or newest_run(self._base)
        if folder != self._shown or self._record is None:
            self._forget()
            self._record, self._shown = StatusRecord.read(folder), folder
        elif not (folder / RECORD).exists():
            self._forget()
            raise NoRun(f"{folder}: the run has ended")
        return self._record

    def _forget(self) -> None:
        if self._observer is not None:
            self._observer.close()
        self._observer, self._record, self._shown = None, None, None
