"""Results on disk, in a folder from which an interrupted evaluation resumes, and their summary.

    run.json             the evaluation's settings, which must match on resuming
    shards/0000.jsonl    32 episodes per file, one line each: a checksum and the result
    videos/<key>.mp4
    report.{json,md,html}

A shard is written anew, whole, with every episode that is finished (a rename replaces the old
one), so no kill can leave half a line; a line that does not fit is damage, and a damaged
folder is refused before anything in it is touched. `summarise` sums episodes up, every rate
with its interval.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from openhelix.benchmarks.calvin.sequences import LENGTH
from openhelix.benchmarks.calvin.tasks import TASK_NAMES
from openhelix.benchmarks.evaluation.stats import chain_interval, clustered_rate
from openhelix.benchmarks.evaluation.suites import Episode, Suite
from openhelix.runtime.core.config import ConfigError
from openhelix.runtime.core.files import NO_ROOM, replace_file

SHARD = 32
FORMAT = 2
RUN, SHARDS, VIDEOS, REPORT, LOCK = "run.json", "shards", "videos", "report.json", ".lock"
FIELDS = {
    *("index", "key", "scene", "start", "groups", "in_a_row", "success", "error", "tasks"),
    *("renders", "drift", "timing"),
}


class ResultsError(ConfigError):
    """A folder that cannot be used; one line says which file, and what is wrong with it."""


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
    except (ValueError, KeyError, TypeError, RecursionError):
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
        self.films_lost = 0
        self._made = not (folder / RUN).exists()
        self._open(code)

    def _open(self, code: str) -> None:
        run = self.folder / RUN
        if run.exists():
            self._check_run(read_run(self.folder), code)
        elif self.folder.exists() and not _empty(self.folder):
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
        replace_file(run, json.dumps(data, indent=1).encode() + b"\n", sync=True)

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
        """Keep a finished episode; a film for which there is no room is counted, and left out.

        Raises:
            OSError: the disk refuses the result; those before it are kept.
        """
        if video is not None:
            folder = self.folder / VIDEOS
            try:
                replace_file(folder / f"{str(result['key']).replace('/', '-')}.mp4", video)
            except OSError as error:
                if error.errno not in NO_ROOM:
                    raise
                self.films_lost += 1
        self._results[result["index"]] = dict(result)
        shard = result["index"] // SHARD
        span = range(shard * SHARD, (shard + 1) * SHARD)
        lines = [line_of(self._results[index]) for index in span if index in self._results]
        path = self.folder / SHARDS / f"{shard:04d}.jsonl"
        replace_file(path, ("\n".join(lines) + "\n").encode(), sync=True)

    def finish(self, report: Mapping[str, Any]) -> None:
        """Write `report.json`: the evaluation is complete."""
        replace_file(self.folder / REPORT, json.dumps(report, indent=1).encode() + b"\n", sync=True)

    def close(self) -> None:
        """Let others use the folder; one that got no result is removed. Twice is fine."""
        if self._lock is None:
            return
        if self._made and not self._results:
            shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.close()
        self._lock = None


def _empty(folder: Path) -> bool:
    """Whether a folder holds nothing but what an evaluation that was killed at once leaves."""
    if not folder.is_dir():
        return False
    left = [path for path in folder.rglob("*") if path.name not in (LOCK, SHARDS)]
    return all(path.name.startswith(f".{RUN}.") and path.suffix == ".part" for path in left)


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
    except (ValueError, KeyError, TypeError, RecursionError) as error:
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


# -- The summary -----------------------------------------------------------------------

Result = Mapping[str, Any]
ERRORS_SHOWN = 20


def start_of(result: Result) -> str:
    """Return the state that an episode began in, by a name: the unit of all statistics."""
    return str(result["start"])


def rate(successes: Sequence[bool], starts: Sequence[str]) -> dict[str, Any]:
    """Return a success rate with its 95 % interval by start; null without trials.

    Args:
        successes: of the episodes.
        starts: of the episodes, by name.
    """
    n, good = len(successes), sum(successes)
    return {
        "success_rate": good / n if n else None,
        "n_episodes": n,
        "n_starts": len(set(starts)),
        "n_success": good,
        "ci95": list(clustered_rate(successes, starts)),
    }


def summarise(suite: Suite, results: Sequence[Result]) -> dict[str, Any]:
    """Return the scores of a suite.

    `success_rate` and `n_episodes`, or `avg_len`, `success_in_a_row` and `n_sequences`, each
    with `ci95`; `per_task` (of chains: of the attempts at it), `per_scene` and the groups.
    """
    found = chains(results) if suite.is_chain else rates(results)
    found["per_task"] = _per_task(results)
    score = chains if suite.is_chain else rates
    found["per_scene"] = _grouped(results, lambda r: r["scene"], score)
    for group in sorted({name for r in results for name in r["groups"]}):
        found[f"per_{group}"] = _grouped(results, _place_in(group), score)
    broken = [{"key": r["key"], "error": r["error"]} for r in results if r["error"]]
    return found | {
        "n_errors": len(broken),
        "errors": broken[:ERRORS_SHOWN],
        "work": work(results),
        "timing": timing(results),
    }


def _place_in(group: str) -> Callable[[Result], str]:
    return lambda result: str(result["groups"][group])


def rates(results: Sequence[Result]) -> dict[str, Any]:
    """Return the score of episodes of single tasks, with its interval by start."""
    return rate([r["success"] for r in results], [start_of(r) for r in results])


def chains(results: Sequence[Result]) -> dict[str, Any]:
    """Return the score of chains, with its intervals by start."""
    lengths, starts = [int(r["in_a_row"]) for r in results], [start_of(r) for r in results]
    reached = [rate([n > k for n in lengths], starts) for k in range(LENGTH)]
    interval = list(chain_interval(lengths, LENGTH, starts)) if lengths else None
    return {
        "avg_len": float(np.mean(lengths)) if lengths else None,
        "ci95": interval,
        "success_in_a_row": [row["success_rate"] for row in reached],
        "success_in_a_row_ci95": [row["ci95"] for row in reached],
        "n_sequences": len(lengths),
        "n_starts": len(set(starts)),
    }


def _per_task(results: Sequence[Result]) -> dict[str, Any]:
    rows: dict[str, list[tuple[str, Mapping[str, Any]]]] = {}
    for result in results:
        for row in result["tasks"]:
            rows.setdefault(row["task"], []).append((start_of(result), row))
    order = [name for name in TASK_NAMES if name in rows]
    return {name: _task(rows[name]) for name in order}


def _task(rows: Sequence[tuple[str, Mapping[str, Any]]]) -> dict[str, Any]:
    steps = [row["env_steps"] for _, row in rows if row["success"]]
    found = rate([row["success"] for _, row in rows], [start for start, _ in rows])
    return found | {"median_steps": float(np.median(steps)) if steps else None}


def _grouped(
    results: Sequence[Result],
    key: Callable[[Result], str],
    score: Callable[[Sequence[Result]], dict[str, Any]],
) -> dict[str, Any]:
    names = list(dict.fromkeys(key(r) for r in results))
    return {name: score([r for r in results if key(r) == name]) for name in names}


def work(results: Sequence[Result]) -> dict[str, Any]:
    """What was computed, counted: the same on every machine."""
    rows = [row for r in results for row in r["tasks"]]
    ages = [row["latent_age_steps"]["mean"] for row in rows if row["latent_age_steps"]]
    oldest = [row["latent_age_steps"]["max"] for row in rows if row["latent_age_steps"]]
    samples = [sample for r in results for sample in r["drift"]]
    return {
        "tasks_attempted": len(rows),
        "env_steps": sum(row["env_steps"] for row in rows),
        "hold_steps": sum(row["hold_steps"] for row in rows),
        "plans": sum(row["plans"] for row in rows),
        "latents": sum(row["latents"] for row in rows),
        "latents_encoded": sum(row["encoded"] for row in rows),
        "latents_per_task": _mean([row["latents"] for row in rows]),
        "renders": sum(r["renders"] for r in results),
        "steps_to_success": _mean([row["env_steps"] for row in rows if row["success"]]),
        "motion": motion([row["motion"] for row in rows if row.get("motion")]),
        **reaction([row["reaction_steps"] for row in rows if "reaction_steps" in row]),
        **changes([row for row in rows if "looked_steps" in row]),
        **alarms([row["alarms"] for row in rows if "alarms" in row]),
        "latent_age_steps": {"mean": _mean(ages), "max": max(oldest, default=None)},
        "drift": {
            "n": len(samples),
            "cosine_mean": _mean([cosine for _, cosine in samples]),
            "cosine_p05": float(np.quantile([c for _, c in samples], 0.05)) if samples else None,
            "age_steps_mean": _mean([age for age, _ in samples]),
        },
    }


def reaction(steps: Sequence[int | None]) -> dict[str, Any]:
    """How soon plans knew of a change of what is meant; nothing where none came."""
    seen = [n for n in steps if n is not None]
    if not steps:
        return {}
    p50, p90 = np.quantile(seen, (0.5, 0.9), method="higher") if seen else (None, None)
    return {
        "reaction_steps": {
            "n": len(steps),
            "never": len(steps) - len(seen),
            "p50": None if p50 is None else int(p50),
            "p90": None if p90 is None else int(p90),
        }
    }


def changes(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How many changes of what is meant System 2 was shown, and after how many steps.

    `succeeded` counts the episodes in which one came and what was meant from then on was done. Nothing where none came. A change is missed when System 2 was not asked again before the
    episode was over.
    """
    if not rows:
        return {}
    kinds = {row["change"]: [r for r in rows if r["change"] == row["change"]] for row in rows}
    steps = [row["looked_steps"] for row in rows]
    spread = reaction(steps)["reaction_steps"]
    return {
        "changes": {
            "n": len(rows),
            "seen": len(rows) - spread["never"],
            "missed": spread["never"],
            "p50": spread["p50"],
            "p90": spread["p90"],
            "succeeded": sum(bool(row["success"]) for row in rows),
            "by_kind": {
                kind: {"n": len(own), "seen": sum(r["looked_steps"] is not None for r in own)}
                for kind, own in sorted(kinds.items())
            },
        }
    }


def alarms(counts: Sequence[int]) -> dict[str, Any]:
    """How often System 2 was asked though nobody had changed what is meant."""
    return {"alarms": sum(counts), "alarms_per_task": _mean(counts)} if counts else {}


def motion(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How smoothly the arm was led, over all tasks; see `measurement.Motion`."""
    squares = [row["jerk_m_s3"] ** 2 for row in rows if row["jerk_m_s3"] is not None]
    borders = sum(row["borders"] for row in rows)
    met = [row for row in rows if row["borders"]]
    jumps = {
        name: sum(row[name] * row["borders"] for row in met) / borders if borders else None
        for name in ("jump_m", "jump_rad")
    }
    return {
        "jerk_m_s3": float(np.mean(squares)) ** 0.5 if squares else None,
        "borders": borders,
        **jumps,
        "limited": sum(row["limited"] for row in rows),
    }


def timing(results: Sequence[Result]) -> dict[str, Any]:
    """What it took on this machine.

    System 2's time for a task is that of all the latents which the schedule asked for, at what
    those that were computed took on average. `cpu_s_per_step` and `s2_cpu_s_per_latent` are
    the processor time of the process that ran the episodes: what another program on the machine
    does not change. They are null on the wall clock and where a GPU or a server does the work.
    """
    done = work(results)
    tasks, steps = done["tasks_attempted"], done["env_steps"] + done["hold_steps"]
    totals = {k: sum(r["timing"][k] for r in results) for k in ("wall_s", "s1_s", "s2_s")}
    cpu = {k: sum(r["timing"].get(k, 0.0) for r in results) for k in ("cpu_s", "s2_cpu_s")}
    call_s = totals["s2_s"] / done["latents_encoded"] if done["latents_encoded"] else None
    call_cpu_s = cpu["s2_cpu_s"] / done["latents_encoded"] if cpu["s2_cpu_s"] else None
    return {
        "episode_s_mean": _mean([r["timing"]["wall_s"] for r in results]),
        "s1_s_per_task": totals["s1_s"] / tasks if tasks else None,
        "s2_s_per_latent": call_s,
        "s2_s_per_task": call_s * done["latents_per_task"] if call_s else 0.0,
        "s2_cpu_s_per_latent": call_cpu_s,
        "s2_cpu_s_per_task": call_cpu_s * done["latents_per_task"] if call_cpu_s else None,
        "cpu_s_per_step": cpu["cpu_s"] / steps if steps and cpu["cpu_s"] else None,
        "steps_per_s": steps / totals["wall_s"] if totals["wall_s"] > 0 else None,
    }


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None
