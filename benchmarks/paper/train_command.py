"""Trainings by `openhelix train`, each in its own process.

Its own process, so that a training's memory is released before an evaluation begins, and so that
a kill ends one training and nothing else. The output of `openhelix train` goes to `train.log` in
the training's folder.

All pairs share one folder of prepared states: it is named by content there, and frozen models
prepare the same states whatever the policy is taught with them.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from openhelix.benchmarks.paper.costs import training_s
from openhelix.benchmarks.paper.trainings import (
    GIVEN,
    SHIPPED_POLICY,
    SHIPPED_TEXT,
    OutOfTime,
    Say,
    Training,
)
from openhelix.benchmarks.training.config import (
    LATENT,
    TrainingConfig,
    check_model,
    check_policy,
)
from openhelix.benchmarks.training.export import SHIP, SYSTEM1, SYSTEM2
from openhelix.runtime.core.config import CommandFailed, ConfigError, apply_overrides, validate
from openhelix.runtime.launch.processes import end_with
from openhelix.system1.checkpoint import CONFIG, load_policy, save_policy
from openhelix.system1.config import TACTILE
from openhelix.system1.latent_adapter import with_latent
from openhelix.system1.model import VisuomotorPolicy
from openhelix.system2.latents import LatentConfig
from openhelix.system2.text import FILE as TEXT_CODE
from openhelix.system2.text import TextCode

# No trained arm refuses a sentence, so the shipped pair does not either. A judge by latents also
# has every step's latent computed, whether a plan reads it or not.
UNJUDGED = "system2.engine.options.understanding=off"
PLAIN = "openhelix.system2.engines.transformers:TransformersEngine"
PREFIX_GB = 24.0  # arms with one seed draw the same: 4,800 samples at laptop scale
LEAST_S = 60.0  # in which a training that loads its models gets anywhere
LOG, PREPARED, POLICY = "train.log", "prepared", "policy"
Command = Sequence[str]


class TrainCommand:
    """`openhelix train`.

    Args:
        data: the collection, or its frames.
        root: holds what trainings share.
        command: the program's first words.
        until_s: on `time.monotonic`; a training stops before it, to be gone on with.
    """

    def __init__(
        self,
        data: Path,
        root: Path,
        command: Command = (sys.executable, "-m", "openhelix.runtime.cli.main", "train"),
        until_s: float | None = None,
    ) -> None:
        self._data, self._root, self._command = data, root, tuple(command)
        self._until_s = until_s

    def train(self, training: Training, folder: Path, parent: Path | None, say: Say) -> None:
        """See `Trainer.train`."""
        if training.stage == "shipped":
            return
        if training.given is not None:
            if training.given == SHIPPED_POLICY:
                told_by_sentence(training.given, SHIPPED_TEXT / TEXT_CODE, folder / POLICY)
            else:
                told_by_name(training.given, folder / POLICY)
            return
        options = dict(training.options) | {"data": str(self._data), "out": str(folder)}
        if training.stage == "pair":
            self._share(folder)
            options.setdefault("latent.prefix_gb", PREFIX_GB)
        if parent is not None:
            name = "policy.checkpoint" if training.stage == "pair" else "policy.encoder_from"
            options[name] = str(self._policy_of(training.parent, parent))
        if self._until_s is not None:
            left_s = self._until_s - time.monotonic()
            if left_s < LEAST_S:
                raise OutOfTime
            options["time_limit_s"] = round(left_s, 1)
        stage = "policy" if training.stage == "policy" else "all"
        words = [*self._command, stage, *map(_word, options.items()), "--json"]
        say(f"log in {folder / LOG}")
        with (folder / LOG).open("ab") as log:
            done = subprocess.run(
                words,
                stdout=subprocess.PIPE,
                stderr=log,
                check=False,
                # Beside other work, threads that wait by spinning cost as much again as the work.
                env={"OMP_WAIT_POLICY": "PASSIVE", **os.environ},
                # Else it would go on after we were killed, beside the one that resumes it.
                preexec_fn=partial(end_with, os.getpid()),
            )
        if done.returncode != 0:
            last = ((folder / LOG).read_text(errors="replace").strip() or "no word").splitlines()[
                -1
            ]
            raise CommandFailed(
                f"{training.key}: openhelix train ended with {done.returncode}: {last}"
            )
        if not json.loads(done.stdout.decode().strip().splitlines()[-1])["finished"]:
            if self._until_s is not None:
                raise OutOfTime
            raise CommandFailed(f"{training.key}: not finished within its time limit")

    def overrides(self, training: Training, folder: Path) -> list[str]:
        """See `Trainer.overrides`."""
        if training.stage == "shipped":
            return [UNJUDGED]
        if training.stage == "policy":
            alone = folder / POLICY
            path = alone if alone.is_dir() else self._policy_of(training, folder)
            return [f"system1.policy.options.path={path}"]
        before = {} if training.parent is None else training.parent.options
        made_of = {**before, **training.options}
        return exported(folder) + engine_of(training.options) + cameras_of(made_of)

    def seconds(self, training: Training) -> float | None:
        """See `Trainer.seconds`."""
        return training_s(training, self._frames())

    def _frames(self) -> int:
        """Return how many frames the data has; 0 where there is none."""
        try:
            index = TrainingConfig(data=self._data).frames_folder() / "cache.json"
        except ConfigError:
            return 0
        return sum(int(shard["frames"]) for shard in json.loads(index.read_text())["shards"])

    def _policy_of(self, training: Training | None, folder: Path) -> Path:
        """Return the policy that pairs begin with: as it was given, unless its text encoder lay apart."""
        assert training is not None
        if training.given is None or training.given == SHIPPED_POLICY:
            return folder / POLICY
        return training.given

    def _share(self, folder: Path) -> None:
        shared = (self._root / PREPARED).resolve()
        shared.mkdir(parents=True, exist_ok=True)
        link = folder / PREPARED
        if not link.exists():
            link.symlink_to(shared, target_is_directory=True)


def told_by_sentence(given: Path, code: Path, out: Path) -> None:
    """Write a policy with its text encoder beside it, which tells it sentences in System 2's place.

    The shipped one was trained so, and shipped with a System 2 that speaks in this code.
    """
    policy = load_policy(given)
    policy.config = with_latent(policy.config, TextCode.load(code).spec)
    save_policy(out, policy.config, policy.state_dict(), policy.normalizer)
    shutil.copyfile(code, out / TEXT_CODE)


def told_by_name(given: Path, out: Path) -> None:
    """Write a policy that takes latents as one that is told its task's number instead.

    Its table of tasks is still there: in a tenth of the samples of its training the latent was
    left out. A policy that takes none, or that is told sentences, is used where it is.
    """
    if not (given / CONFIG).is_file() or (given / TEXT_CODE).is_file():
        return
    policy = load_policy(given)
    if isinstance(policy, VisuomotorPolicy) and policy.config.use_latent:
        config = replace(policy.config, use_latent=False)
        save_policy(out, config, policy.state_dict(), policy.normalizer)


def exported(folder: Path) -> list[str]:
    """Return what a run is told to use an exported pair.

    Raises:
        CommandFailed: it is not as expected.
    """
    place = folder / SHIP
    policy, latent, llava = place / SYSTEM1, place / SYSTEM2 / LATENT, place / SYSTEM2 / "llava"
    for path in (policy, latent):
        if not path.exists():
            raise CommandFailed(f"{place}: openhelix train left no {path.relative_to(place)}")
    model = [f"system2.engine.options.model={llava}"] if llava.is_dir() else []
    return [
        f"system1.policy.options.path={policy}",
        f"system2.engine.options.latent_projector={latent}",
        *model,
    ]


def engine_of(options: Mapping[str, Any]) -> list[str]:
    """Return what a run is told of System 2's engine, where not every one gives the read-out."""
    names = ("kind", "n_act", "proprio")
    given = {n: options[f"latent.{n}"] for n in names if f"latent.{n}" in options}
    return [f"system2.engine.target={PLAIN}"] if LatentConfig(**given).plain_only else []


def cameras_of(options: Mapping[str, Any]) -> list[str]:
    """Return what a run is told of the world's cameras, where System 1 wants more than usual."""
    feels = TACTILE in options.get("policy.changes", {}).get("sensors", ())
    return [f'world.cameras=["static", "gripper", "{TACTILE}"]'] if feels else []


def _word(item: tuple[str, Any]) -> str:
    key, value = item
    return f"{key}={value if isinstance(value, str) else json.dumps(value, default=str)}"


def data_id(frames: Path) -> str:
    """Return what identifies training data: a hash of its index, which lists every shard.

    Raises:
        ConfigError: the index cannot be read.
    """
    try:
        return hashlib.sha256((frames / "cache.json").read_bytes()).hexdigest()[:16]
    except OSError as error:
        raise ConfigError(f"--data: {frames}: no cache.json ({error.strerror})") from None


def changed(overrides: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Split overrides: `train.KEY=VALUE` for the training, the rest for the run."""
    train: dict[str, Any] = {}
    run: list[str] = []
    for text in overrides:
        key, _, value = text.partition("=")
        if key.startswith("train."):
            train[key.removeprefix("train.")] = _read(value)
        else:
            run.append(text)
    return train, run


def _read(value: str) -> Any:
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError:
        return value  # for the field to refuse


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse training options that `openhelix train` does not have, and what they name in vain.

    Raises:
        ConfigError: one line names the option.
    """
    named = {k: v for k, v in options.items() if (k, v) != (GIVEN, "shipped")}
    words = [_word(item) for item in named.items()]
    config = validate(TrainingConfig, apply_overrides({}, words))
    check_model(config.latent)
    check_policy(config.policy)
