"""Results on disk: a folder that a killed evaluation is continued in.

    run.json             what is evaluated; whoever continues must want the same
    shards/0000.jsonl    32 episodes a file, one line each: a checksum and the result
    videos/<key>.mp4
    report.{json,md,html}

A shard is written anew, whole, with every episode that is finished (a rename replaces the old
one), so no kill can leave half a line; a line that does not fit is damage, and a damaged
folder is refused before anything in it is touched.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from benchmarks.dsvlabench.suites import Episode
from runtime.config import ConfigError

SHARD = 32
FORMAT = 1
RUN, SHARDS, VIDEOS, REPORT, LOCK = "run.json", "shards", "videos", "report.json", ".lock"
FIELDS = {
    *("index", "key", "scene", "groups", "in_a_row", "success", "error", "tasks"),
    *("renders", "drift", "timing"),
}


class ResultsError(ConfigError):
    """A folder that cannot be used; one line says which file, and what is wrong with it."""


def replace_file(path: Path, data: bytes) -> None:
    """Write a file whole or not at all, also when the machine stops."""
    part = path.with_name(f".{path.name}.part")
    with part.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    part.replace(path)


def line_of(result: Mapping[str, Any]) -> str:
    """Return a result as the line that stands for it."""
    text = json.dumps(result, separators=(",", ":"), ensure_ascii=False)
    return json.dumps({"sha256": _digest(text)})[:-1] + f',"episode":{text}}}'


def parse_line(line: str, where: str) -> dict[str, Any]:
    """Return the result that a line stands for.

    Raises:
        ResultsError: the line is damaged.
    """
    try:
        data = json.loads(line)
        result = data["episode"]
        text = json.dumps(result, separators=(",", ":"), ensure_ascii=False)
        whole = data["sha256"] == _digest(text) and set(result) == FIELDS
    except (ValueError, KeyError, TypeError):
        whole, result = False, {}
    if not whole:
        raise ResultsError(
            f"{where}: damaged; put the file right, or delete it to run its episodes again"
        )
    return dict(result)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Store:
    """The results of one evaluation.

    Args:
        folder: made if it is not there.
        identity: what is evaluated, as plain data.
        episodes: all of them.
        code: hash of the program, noted beside the results.

    Raises:
        ResultsError: the folder holds something else or damaged results, or is in use.
    """

    def __init__(
        self, folder: Path, identity: Mapping[str, Any], episodes: Sequence[Episode], code: str
    ) -> None:
        self.folder = folder
        self._episodes = list(episodes)
        self._identity = json.loads(json.dumps(identity))
        self.codes: list[str] = [code]
        self._lock: IO[bytes] | None = None
        self._made = not (folder / RUN).exists()
        self._open(code)

    def _open(self, code: str) -> None:
        run = self.folder / RUN
        if run.exists():
            self._check_run(read_run(self.folder), code)
        elif self.folder.exists() and (
            not self.folder.is_dir() or any(path.name != LOCK for path in self.folder.iterdir())
        ):
            raise ResultsError(f"--out: {self.folder} holds other files; choose another folder")
        try:
            (self.folder / SHARDS).mkdir(parents=True, exist_ok=True)
            self._lock = (self.folder / LOCK).open("wb")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ResultsError(f"--out: {self.folder} is in use by another evaluation") from None
        except OSError as error:
            raise ResultsError(f"--out: cannot write to {self.folder}: {error.strerror}") from None
        self._results = self._read()
        data = {"format": FORMAT, "identity": self._identity, "code": self.codes}
        replace_file(run, json.dumps(data, indent=1).encode() + b"\n")

    def _check_run(self, before: Mapping[str, Any], code: str) -> None:
        for key in sorted(set(self._identity) | set(before["identity"])):
            then, now = before["identity"].get(key), self._identity.get(key)
            if then != now:
                raise ResultsError(
                    f"--out: {self.folder} was begun with {key} = {_short(then)}, now it is "
                    f"{_short(now)}; choose another folder"
                )
        self.codes = list(dict.fromkeys([*before["code"], code]))

    def _read(self) -> dict[int, dict[str, Any]]:
        results: dict[int, dict[str, Any]] = {}
        by_index = {episode.index: episode for episode in self._episodes}
        for path in sorted((self.folder / SHARDS).glob("*.jsonl")):
            for result in read_shard(path):
                episode = by_index.get(result["index"])
                fits = episode is not None and episode.key == result["key"]
                if not fits or result["index"] in results:
                    raise ResultsError(
                        f"{path}: damaged: episode {result['index']} is out of place"
                    )
                results[result["index"]] = result
        return results

    @property
    def results(self) -> list[dict[str, Any]]:
        """Finished episodes, in the suite's order."""
        return [self._results[index] for index in sorted(self._results)]

    @property
    def missing(self) -> list[Episode]:
        """Episodes still to run."""
        return [episode for episode in self._episodes if episode.index not in self._results]

    def add(self, result: Mapping[str, Any], video: bytes | None = None) -> None:
        """Keep a finished episode."""
        if video is not None:
            folder = self.folder / VIDEOS
            folder.mkdir(exist_ok=True)
            replace_file(folder / f"{str(result['key']).replace('/', '-')}.mp4", video)
        self._results[result["index"]] = dict(result)
        shard = result["index"] // SHARD
        span = range(shard * SHARD, (shard + 1) * SHARD)
        lines = [line_of(self._results[index]) for index in span if index in self._results]
        path = self.folder / SHARDS / f"{shard:04d}.jsonl"
        replace_file(path, ("\n".join(lines) + "\n").encode())

    def finish(self, report: Mapping[str, Any]) -> None:
        """Write `report.json`: the evaluation is complete."""
        replace_file(self.folder / REPORT, json.dumps(report, indent=1).encode() + b"\n")

    def close(self) -> None:
        """Let others use the folder; one that got no result is removed. Twice is fine."""
        if self._lock is None:
            return
        if self._made and not self._results:
            shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.close()
        self._lock = None


def read_run(folder: Path) -> dict[str, Any]:
    """Return what `run.json` holds.

    Raises:
        ResultsError: there is none, or it is damaged.
    """
    path = folder / RUN
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["format"] != FORMAT:
            raise ResultsError(f"{path}: written in format {data['format']}, this is {FORMAT}")
        if not isinstance(data["identity"], dict) or not isinstance(data["code"], list):
            raise TypeError
    except FileNotFoundError:
        raise ResultsError(f"{folder}: no {RUN} here, so no evaluation") from None
    except OSError as error:
        raise ResultsError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, ResultsError):
            raise
        raise ResultsError(f"{path}: damaged; choose another folder") from None
    return dict(data)


def read_shard(path: Path) -> list[dict[str, Any]]:
    """Return the results in one shard.

    Raises:
        ResultsError: the file is damaged or cannot be read.
    """
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise ResultsError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ResultsError(f"{path}: damaged; delete it to run its episodes again") from None
    lines = text.split("\n")
    if lines[-1]:
        raise ResultsError(f"{path}:{len(lines)}: damaged; delete it to run its episodes again")
    return [parse_line(line, f"{path}:{n}") for n, line in enumerate(lines[:-1], 1)]


def read_results(folder: Path) -> list[dict[str, Any]]:
    """Return the finished episodes of an evaluation, in order.

    Raises:
        ResultsError: it is no evaluation, or damaged.
    """
    read_run(folder)
    found = [r for path in sorted((folder / SHARDS).glob("*.jsonl")) for r in read_shard(path)]
    return sorted(found, key=lambda result: int(result["index"]))


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
