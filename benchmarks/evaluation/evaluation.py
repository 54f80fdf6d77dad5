"""An evaluation: runs the missing episodes, keeps the finished ones, and summarises all."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TextIO

from openhelix.benchmarks.evaluation.oracle import TARGET as TELLER
from openhelix.benchmarks.evaluation.pool import Job, LocalPool, Pool, on_gpu
from openhelix.benchmarks.evaluation.realtime_pool import RealtimePool
from openhelix.benchmarks.evaluation.results import ResultsError, Store, summarise
from openhelix.benchmarks.evaluation.runner import Conditions, Film
from openhelix.benchmarks.evaluation.suites import Suite, spread
from openhelix.runtime.control.assembly import gate_file
from openhelix.runtime.control.episodes import versions
from openhelix.runtime.core import plugins
from openhelix.runtime.core.clock import duration_text
from openhelix.runtime.core.config import CommandFailed, ConfigError, Part, PolicyPart, RunConfig
from openhelix.runtime.core.files import NO_ROOM, replace_file
from openhelix.runtime.core.paths import ROOT
from openhelix.system1.config import SHIPPED

SOURCES = ("runtime", "system1", "system2", "benchmarks/calvin", "benchmarks/evaluation")
Progress = Callable[[int, int, Mapping[str, Any]], None]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One evaluation, complete.

    Attributes:
        suite: the episodes.
        conditions: how they are run.
        config: what is evaluated.
        threads: of torch.
        sees: what System 2 is shown, one of `oracle.SEES`; the configuration says it to the engine.
        videos: how many episodes are filmed, evenly spread over the list.
        filmed: keys of episodes that are filmed besides.
        failures: whether every episode that fails is filmed.
    """

    suite: Suite
    conditions: Conditions
    config: RunConfig
    threads: int = 1
    sees: str = "image"
    videos: int = 0
    filmed: tuple[str, ...] = ()
    failures: bool = False

    def identity(self) -> dict[str, Any]:
        """Return all that shapes the results, as plain data."""
        config = self.config
        return {
            **self.suite.identity(),
            "clock": config.control.clock,
            "hz2": config.system2.hz if config.control.clock == "realtime" else None,
            "steps_limit": self.conditions.steps_limit,
            "interval": self.conditions.interval,
            "latency": self.conditions.latency,
            "delay": self.conditions.delay,
            "drift": self.conditions.drift,
            "policy": config.system1.policy.model_dump(mode="json"),
            "policy_sha256": fingerprint(config.system1.policy),
            "system2": config.system2.engine.model_dump(mode="json"),
            "system2_sha256": fingerprint(config.system2.engine),
            "camera": config.system2.camera,
            "replan_steps": config.system1.replan_steps,
            "blend_s": config.system1.blend_s,
            "join": config.system1.join,
            "slow_after": config.system1.slow_after,
            "latent_memory": config.system1.latent_memory,
            "control_hz": config.control.hz,
            "safety": _plain(config.model_dump(mode="json")["safety"]),
            "threads": self.threads,
            **self._stand(),
            **_asked(config),
        }

    def _stand(self) -> dict[str, Any]:
        """Return where the static camera stands, if it is not the scene's own."""
        camera = self.config.world.static_camera
        return {} if camera is None else {"static_camera": camera.model_dump(mode="json")}


def _asked(config: RunConfig) -> dict[str, Any]:
    """Return when System 2 is asked, if not at its cadence."""
    system2 = config.system2
    if system2.trigger == "cadence":
        return {}
    names = ("trigger", "trigger_floor_s", "trigger_ceiling_s", "trigger_base_m")
    asked = {name: getattr(system2, name) for name in names}
    if system2.trigger == "learned":
        asked["trigger_sha256"] = hashlib.sha256(gate_file(config).read_bytes()).hexdigest()[:16]
    return asked


def evaluate(
    plan: Evaluation, pool: Pool, folder: Path, progress: Progress | None = None
) -> dict[str, Any]:
    """Run what is missing; return the summary, which is also written to the folder.

    Args:
        plan: what to evaluate.
        pool: runs the episodes; started here, closed by its owner.
        folder: of the results; continued if it holds some of this very evaluation.
        progress: told after each episode how many are finished, of how many, and the last.

    Returns:
        The summary; where the disk had no room for it, `unwritten` says so.

    Raises:
        ValueError: something is refused; one line says what. Nothing was overwritten.
        CommandFailed: the disk has no room for a result.
    """
    episodes = plan.suite.episodes()
    store = Store(folder, plan.identity(), episodes, code_hash())
    begun_s = time.monotonic()
    try:
        missing, resumed = store.missing, len(store.results)
        if missing:
            plugins.find(plugins.WORLDS, plan.suite.world).require()
        about = pool.start() if missing or not (folder / "about.json").exists() else None
        about = _about(folder, about, resumed > 0)
        films = spread(episodes, plan.videos)
        films |= {e.index for e in episodes if e.key in plan.filmed}
        others: Film = "failed" if plan.failures else "no"
        ready_s = time.monotonic()
        jobs = [Job(e, plan.conditions, "yes" if e.index in films else others) for e in missing]
        for _, outcome in pool.run(jobs) if jobs else ():
            try:
                store.add(outcome.result, outcome.video)
            except OSError as error:
                if error.errno not in NO_ROOM:
                    raise
                kept = len(store.results) - 1
                raise CommandFailed(
                    f"{error.filename}: {error.strerror}; {kept} of {len(episodes)} episodes are "
                    "kept, and the same command goes on"
                ) from None
            if progress is not None:
                progress(len(store.results), len(episodes), outcome.result)
        report = summarise(plan.suite, store.results) | {
            **header(plan, about),
            "code": store.codes,
            "folder": str(folder),
            "workers": pool.workers,
            "resumed_episodes": resumed,
            "load_s": round(ready_s - begun_s, 2),
            "wall_s": round(time.monotonic() - ready_s, 2),
            "versions": versions(),
        }
        if store.films_lost:
            report["films_lost"] = store.films_lost
        try:
            store.finish(report)
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            report["unwritten"] = f"{error.filename}: {error.strerror}"
        return report
    finally:
        store.close()


# ------------------------------------------------------------------------------------------------
# Which pool runs it: this process, Ray workers, or the processes of a real-time run


def shares_engine(config: RunConfig) -> bool:
    """Whether workers are to share one System 2 instead of loading one each.

    vLLM takes half a minute to start, and a big model fits a GPU once; a small one on CPU is
    quicker beside its worker, where it has a core of its own.
    """
    engine = config.system2.engine
    if engine.target == TELLER:
        return False  # it looks into the world, which is the worker's
    return "vllm" in engine.target.lower() or on_gpu(engine) or _gpu_present(engine)


def _gpu_present(engine: Part) -> bool:
    import torch

    return str(engine.options.get("device", "auto")) == "auto" and torch.cuda.is_available()


def open_pool(
    config: RunConfig, workers: int, threads: int = 1, shared: bool | None = None
) -> Pool:
    """Return a pool that has not started yet.

    Args:
        config: of the run.
        workers: 1 runs in this process; more are Ray actors.
        threads: of torch, for each worker.
        shared: one System 2 for all workers; None decides by `shares_engine`.

    Raises:
        ConfigError: the wall clock has one robot and cannot be shared out.
    """
    if config.control.clock == "realtime":
        return RealtimePool(config, workers)
    if workers == 1:
        return LocalPool(config, threads)
    # Ray takes a second to import and may be left out.
    from openhelix.benchmarks.evaluation.ray_pool import RayPool

    return RayPool(config, workers, threads, shares_engine(config) if shared is None else shared)


# ------------------------------------------------------------------------------------------------
# What it is of


def _about(folder: Path, about: dict[str, Any] | None, resumed: bool) -> dict[str, Any]:
    """Keep what a pool said of itself; a finished evaluation need not load anything again.

    Raises:
        ResultsError: the model behind the same configuration is another one by now.
    """
    path = folder / "about.json"
    if path.exists():
        try:
            before = dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError, RecursionError):
            raise ResultsError(f"{path}: damaged; choose another folder") from None
        if about is None:
            return before
        if resumed and before != _plain(about):
            differs = [k for k in about if before.get(k) != _plain(about[k])]
            raise ResultsError(
                f"--out: {folder} was begun with another model: {', '.join(differs)} differ; "
                "choose another folder"
            )
    assert about is not None
    replace_file(path, json.dumps(about, indent=1).encode() + b"\n")
    return dict(_plain(about))


def header(plan: Evaluation, about: Mapping[str, Any]) -> dict[str, Any]:
    """Return what every score must say of itself."""
    policy, engine = plan.config.system1.policy, plan.config.system2.engine
    wall = plan.config.control.clock == "realtime"
    uses_system2 = about["policy_spec"]["latent"] is not None
    return {
        "suite": plan.suite.name,
        "world": plan.suite.world,
        "scene": ",".join(plan.suite.scenes),
        "seed": plan.suite.seed,
        "sees": plan.sees,
        "clock": plan.config.control.clock,
        "steps_limit": plan.conditions.steps_limit,
        "interval": None if wall else plan.conditions.interval,
        "latency": None if wall else plan.conditions.latency,
        "delay": None if wall else plan.conditions.delay,
        "hz2": plan.config.system2.hz if wall else None,
        **_asked(plan.config),
        "replan_steps": plan.config.system1.replan_steps,
        "join": plan.config.system1.join,
        "untrained": about.get("untrained", []),
        "policy": {
            "target": policy.target,
            "checkpoint": checkpoint_of(policy),
            "sha256": fingerprint(policy),
            "spec": about["policy_spec"],
        },
        "system2": {
            "target": engine.target,
            "options": _plain(engine.options),
            "sha256": fingerprint(engine),
            "spec": about["latent_spec"],
            "spec_id": about["spec_id"],
        }
        if uses_system2
        else None,
    }


def checkpoint_of(policy: Part) -> str | None:
    """Return the folder that a policy is read from, "shipped", or None for one without."""
    if policy.target == PolicyPart().target and not policy.options.get("untrained"):
        return str(policy.options.get("path", "shipped"))
    found = policy.options.get("path")
    return None if found is None else str(found)


def fingerprint(part: Part) -> str:
    """Return a hash of a part: its target, with its code if that is not OpenHelix's, and its options,
    files and folders by their content.

    Raises:
        ConfigError: `options.path` names nothing.
    """
    digest = hashlib.sha256(part.target.encode())
    for code in _code_of(part.target):
        digest.update(content(code))
    options = dict(part.options)
    if part.target == PolicyPart().target and not options.get("untrained"):
        options.setdefault("path", "shipped")
    for name, value in sorted(options.items()):
        digest.update(f"\0{name}\0".encode())
        path = Path(value) if isinstance(value, str) and value else None
        if name == "path" and value == "shipped":
            path = SHIPPED
        if path is not None and path.exists():
            digest.update(content(path))
        elif name == "path" and value not in (None, "shipped"):
            raise ConfigError(f"system1.policy.options.path: no checkpoint at {value}")
        else:
            digest.update(json.dumps(_plain(value), sort_keys=True).encode())
    return digest.hexdigest()[:16]


def _code_of(target: str) -> list[Path]:
    """Return the files of a target's package or module; none for OpenHelix's own, see `code_hash`."""
    name = target.partition(":")[0].partition(".")[0]
    if name == "openhelix":
        return []
    if (module := sys.modules.get(name)) is not None:  # a script's own has no spec
        places = list(getattr(module, "__path__", ())) or [getattr(module, "__file__", None) or ""]
    elif (found := plugins.find_module(name)) is not None:
        places = list(found.submodule_search_locations or [found.origin or ""])
    else:
        return []
    return [
        file
        for place in map(Path, filter(None, places))
        for file in ([place] if place.is_file() else sorted(place.rglob("*.py")))
    ]


def content(path: Path) -> bytes:
    """Return a hash of a file, or of a folder's files and their names."""
    digest = hashlib.sha256()
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    for file in files:
        found = file.stat()
        digest.update(file.relative_to(path).as_posix().encode() + b"\0")
        digest.update(_file_hash(file.absolute(), found.st_ino, found.st_mtime_ns, found.st_size))
    return digest.digest()


@cache
def _file_hash(path: Path, *state: int) -> bytes:
    """Return a file's hash; `state` changes when it is written anew. Studies ask for weights often."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()


def code_hash() -> str:
    """Return a hash of the program: results of different programs are not one evaluation."""
    digest = hashlib.sha256()
    for folder in SOURCES:
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))


class Console:
    """Tells a person how far it is, on standard error: a line that is rewritten, or lines.

    Args:
        what: first word of the line.
        stream: where to.
        every_s: seconds between lines where they cannot be rewritten.
    """

    def __init__(self, what: str, stream: TextIO | None = None, every_s: float = 10.0) -> None:
        self._what, self._stream = what, stream or sys.stderr
        self._live = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self._every_s = 0.2 if self._live else every_s
        self._begun_s = time.monotonic()
        self._next_s = 0.0
        self._first: int | None = None
        self._good = self._seen = 0

    def say(self, text: str) -> None:
        """Write one line."""
        self._stream.write(f"{self._what}: {text}\n")
        self._stream.flush()

    def __call__(self, done: int, total: int, result: Mapping[str, Any]) -> None:
        now_s = time.monotonic()
        self._first = done - 1 if self._first is None else self._first
        self._seen += 1
        self._good += result["in_a_row"]
        if result["error"]:
            self.say(f"{result['key']} failed: {result['error']}")
        if now_s < self._next_s and done < total:
            return
        self._next_s = now_s + self._every_s
        left_s = (now_s - self._begun_s) / (done - self._first) * (total - done)
        text = (
            f"{self._what}: {done} of {total} episodes, {self._good / self._seen:.2f} tasks each, "
            f"{duration_text(left_s)} to go"
        )
        self._stream.write(f"\r\x1b[K{text}" if self._live else f"{text}\n")
        if self._live and done == total:
            self._stream.write("\n")
        self._stream.flush()
