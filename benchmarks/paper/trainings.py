"""The trainings behind each variant, named so that none is done twice.

A training is identified by a hash of everything that determines it: its options, its data and
the training it builds on. Identical variants of different tables share it, as do variants that
start from the same pretrained policy. It lives in a folder `<stage>-<hash>`, whose `trained.json`
records that it is finished, how long it took and the settings with which a run uses it.

`Trainer` does the training: `openhelix train` in its own process (`TrainCommand`), or a small
stand-in where only the plumbing is of interest.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from openhelix.benchmarks.evaluation.evaluation import content
from openhelix.benchmarks.paper.catalogue import BATCHES, Experiment, Scale, Variant, named
from openhelix.benchmarks.training.config import LatentSection, PolicyStage, TrainingConfig
from openhelix.benchmarks.training.export import SYSTEM1, TEXT
from openhelix.runtime.core.config import CommandFailed, ConfigError
from openhelix.runtime.core.files import read_json, replace_file
from openhelix.runtime.core.paths import ROOT
from openhelix.system1.checkpoint import CONFIG
from openhelix.system1.config import PRESETS, PolicyConfig
from openhelix.system2.model import LANGUAGE, VISION
from openhelix.system2.text import FILE as TEXT_CODE

TRAINED, FAILED, CLOCK = "trained.json", "failed.json", "clock.json"
GIVEN = "policy.checkpoint"
FIT_SAMPLES = 2048  # that a fitted projector begins with
STRIDE = 4  # of the frames whose states a `longer` training keeps
LIVE_SAMPLES = 20_000  # so few are sooner computed than the states of a whole collection
UNSHAPING = ("latent.prefix_gb",)  # options that make a training faster, not another
PROJECTOR_WIDTH = LatentSection().projector_width
SHIPPED = ROOT / "checkpoints"
SHIPPED_POLICY = SHIPPED / SYSTEM1
SHIPPED_TEXT = SHIPPED / TEXT  # the frozen text encoder that told it sentences
SHIPPED_MODEL = [SHIPPED / "system2-laptop" / name for name in (VISION, LANGUAGE)]
# What a policy's own config.json may say other than its preset; the rest is the data's or the pair's.
OWN = (
    *("head", "encoder", "dim", "heads", "encoder_width", "context_layers", "layers", "ffn_mult"),
    *("scene_tokens", "keyposes", "dropout", "given_rows", "train_steps", "position_schedule"),
    *("rotation_schedule", "prediction", "sampler", "sample_steps", "clip_sample"),
)
Say = Callable[[str], None]


class OutOfTime(Exception):
    """The time that was given is over; all that is finished is kept."""


@dataclass(frozen=True)
class Training:
    """One training.

    Attributes:
        stage: "policy" is System 1 alone, "pair" both systems together, "shipped" the project's
            own pair, which is there.
        options: of `openhelix train`, by their dotted names.
        data: what identifies the data: a hash, or the path of data that cannot be hashed.
        parent: the policy that a pair begins with, or a policy's encoder.
        weights: a hash of the weights that it is given, and that may be others tomorrow.
    """

    stage: Literal["policy", "pair", "shipped"]
    options: Mapping[str, Any] = field(default_factory=dict)
    data: str = ""
    parent: Training | None = None
    weights: str = ""

    @property
    def ancestors(self) -> list[Training]:
        """What it begins with, and what that began with, the nearest first."""
        return [] if self.parent is None else [self.parent, *self.parent.ancestors]

    @property
    def given(self) -> Path | None:
        """The trained policy that it is given."""
        path = self.options.get(GIVEN) if self.stage == "policy" else None
        return None if path is None else Path(path)

    @property
    def shown_options(self) -> dict[str, Any]:
        """The options as results name them: a policy of the project by its place in it."""
        given = self.given
        if given is None or not given.is_relative_to(ROOT):
            return dict(self.options)
        return {**self.options, GIVEN: str(given.relative_to(ROOT))}

    @property
    def reads_data(self) -> bool:
        """Whether something is trained, for which there must be data."""
        return self.stage == "pair" or (self.stage == "policy" and self.given is None)

    @property
    def key(self) -> str:
        """The hash of all that shapes it."""
        text = json.dumps(self.to_json(), sort_keys=True, default=str)
        return f"{self.stage}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        shaping = {k: v for k, v in self.options.items() if k not in UNSHAPING}
        options = {k: v for k, v in shaping.items() if k != GIVEN or not self.weights}
        return {
            "stage": self.stage,
            "options": options,
            "data": self.data,
            "parent": None if self.parent is None else self.parent.key,
            "weights": self.weights,
        }


class Trainer(Protocol):
    """Trains, and says what a run is told to use the result."""

    def train(self, training: Training, folder: Path, parent: Path | None, say: Say) -> None:
        """Train into a folder; called again after a kill, it goes on.

        Args:
            training: what.
            folder: where to.
            parent: folder of the training that it begins with.
            say: told of the progress.

        Raises:
            ValueError: the training is refused; one line.
            CommandFailed: it failed.
            OutOfTime: it is not finished; called again, it goes on.
        """

    def overrides(self, training: Training, folder: Path) -> list[str]:
        """Return what a run is told (`section.field=value`) to use what a folder holds."""

    def seconds(self, training: Training) -> float | None:
        """Return how long it will take on this machine, or None if nothing is known."""


def trainings_of(variant: Variant, scale: Scale, data: str, changes: Mapping[str, Any]) -> Training:
    """Return the training of a variant; those it begins with hang on it.

    Args:
        variant: what to build.
        scale: how much.
        data: what identifies the data.
        changes: options that the user changed; they win.
    """
    if variant.policy == "shipped":
        return Training("shipped", weights=_digest(SHIPPED))
    base = dict(scale.train)
    network = variant.network
    if GIVEN not in changes and any(map(_of_policy, changes)):
        base.pop(GIVEN, None)  # who says how the policy is trained wants it trained
    if variant.policy == "untrained":
        network = _network_of({**base, **changes}, network)
    given = {**base, **changes}
    own = dict(given)
    if variant.policy == "encoder":
        told = {"policy.told": "sentence", "policy.steps": scale.own_steps}
        if _told_sentences(given):  # and so does System 2 speak to the base's encoder
            told |= {"policy.text_code": "encoder"}
        own = {**base, **told, **changes}
    if network or variant.policy == "encoder":
        own.pop(GIVEN, None)  # what is given is another network
    policy = _policy_training({**own, **network}, data)
    if variant.policy == "encoder":
        policy = replace(policy, parent=_policy_training(given, data))
    model = ""
    if variant.model == Variant.model_fields["model"].default:
        model = "".join(content(p).hex()[:8] for p in SHIPPED_MODEL if p.is_file())
    if variant.policy == "only":
        return policy
    options: dict[str, Any] = dict(base)
    options |= {
        "latent.regime": variant.regime,
        "latent.clip": 1.0 if variant.clip else 0.0,
        "latent.clip_to": variant.clip_to,
        "latent.answer": 1.0 if variant.answer else 0.0,
        "latent.aux": variant.aux,
        "latent.vision": variant.vision,
        "latent.kind": variant.latent,
        "latent.layer": variant.layer,
        "latent.n_act": variant.n_act,
        "latent.proprio": variant.proprio,
        "latent.model": variant.model,
        "latent.lag_steps": variant.lag,
        "latent.projector_width": 0 if variant.projector == "linear" else PROJECTOR_WIDTH,
        "stage1.start": "random",
        "stage2.start": "random",
        "stage1.policy": "learns" if variant.aligned == "learning" else "frozen",
    }
    if variant.fitted:
        first = "stage1" if variant.prealign else "stage2"
        options |= {f"{first}.start": "table", f"{first}.start_samples": FIT_SAMPLES}
    options |= changes
    if variant.longer > 1:
        options |= _longer(options, variant.longer)
    if variant.policy == "kept":
        options |= {"stage1.steps": _steps_of_both(options, "stage1"), "stage2.steps": 0}
    if not variant.prealign:
        options |= {"stage1.steps": 0, "stage2.steps": _steps_of_both(options)}
        if variant.regime == "prompt" and options.get("latent.feed", "auto") == "auto":
            options["latent.feed"] = "prefix"  # else only stage 1 would train <ACT>
    options |= network
    if variant.policy in ("pretrained", "encoder", "kept"):
        # The policy's own training is the parent's; only what the pair does shapes the pair.
        kept = {k: v for k, v in options.items() if not _of_policy(k)}
        return Training("pair", kept, data, policy, model)
    kept = {k: v for k, v in options.items() if k not in (GIVEN, "policy.told", "policy.steps")}
    return Training("pair", kept | {"policy.pretrained": False}, data, weights=model)


def _network_of(options: Mapping[str, Any], network: Mapping[str, Any]) -> dict[str, Any]:
    """Return `network` with what the policy that arms begin from has other than its preset."""
    given = options.get(GIVEN)
    if given is None:
        return dict(network)  # it is trained by that very preset
    config = PolicyConfig.from_json(read_json(_folder(given) / CONFIG), str(given))
    usual = PRESETS[str(options.get("policy.preset", PolicyStage().preset))]()
    own = {n: getattr(config, n) for n in OWN if getattr(config, n) != getattr(usual, n)}
    own |= network.get("policy.changes", {})
    return {**network, **({"policy.changes": own} if own else {})}


def _told_sentences(options: Mapping[str, Any]) -> bool:
    """Whether the policy that arms begin from was told sentences."""
    given = options.get(GIVEN)
    if given is None:
        return options.get("policy.told") == "sentence"
    return given == "shipped" or (_folder(given) / TEXT_CODE).is_file()


def _longer(options: Mapping[str, Any], times: int) -> dict[str, Any]:
    """Return both stages at so many times the samples, as a policy learns alone."""
    default, alone = TrainingConfig(), PolicyStage()
    found: dict[str, Any] = {}
    for stage in ("stage1", "stage2"):
        for name, by in (("batch", BATCHES), ("steps", times // BATCHES)):
            usual = getattr(getattr(default, stage), name)
            found[f"{stage}.{name}"] = by * int(options.get(f"{stage}.{name}", usual))
    total = sum(found[f"{stage}.batch"] * found[f"{stage}.steps"] for stage in ("stage1", "stage2"))
    if total > LIVE_SAMPLES:
        found |= {"latent.feed": "states", "latent.stride": STRIDE}
    found |= {"stage2.optimizer": alone.optimizer, "stage2.lr_policy": alone.lr}
    return found | {"stage2.warmup": alone.warmup, "stage2.ema": alone.ema}


def _steps_of_both(options: Mapping[str, Any], alone: str = "stage2") -> int:
    """Return the steps in which one stage alone sees the samples of both stages."""
    default = TrainingConfig()

    def of(stage: str, name: str) -> int:
        return int(options.get(f"{stage}.{name}", getattr(getattr(default, stage), name)))

    other = "stage1" if alone == "stage2" else "stage2"
    return of(alone, "steps") + of(other, "steps") * of(other, "batch") // of(alone, "batch")


def _policy_training(options: Mapping[str, Any], data: str) -> Training:
    """Return the training of the policy alone; a policy that is given needs no data."""
    common = {k: v for k, v in options.items() if not _of_pair(k)}
    given = common.pop(GIVEN, None)
    if given is None:
        return Training("policy", common, data)
    path = _folder(given)
    weights = _digest(path) + (_digest(SHIPPED_TEXT) if path == SHIPPED_POLICY else "")
    return Training("policy", {GIVEN: str(path)}, weights=weights)


def _folder(given: str) -> Path:
    return SHIPPED_POLICY if given == "shipped" else Path(given).expanduser()


def _digest(folder: Path) -> str:
    return content(folder).hex()[:16] if folder.is_dir() else ""


def _of_pair(key: str) -> bool:
    return key.split(".")[0] in ("latent", "stage1", "stage2")


def _of_policy(key: str) -> bool:
    return key.split(".")[0] == "policy"


def check_samples(experiment: Experiment, trainings: Mapping[str, Training]) -> None:
    """Refuse a contrast whose arms learn together from different numbers of samples.

    Args:
        experiment: whose contrasts are looked at.
        trainings: of its variants, by name.

    Raises:
        ConfigError: one line names contrast and samples.
    """
    for contrast in experiment.contrasts:
        counts = []
        for name in (contrast.a, contrast.b):
            variant = experiment.row(name).variant
            assert variant is not None
            counts.append(samples(trainings[variant]))
        if counts[0] != counts[1]:
            raise ConfigError(
                f"{experiment.name}.yaml: {named(contrast)}: {counts[0]} and {counts[1]} samples; "
                "arms that are compared learn from as many"
            )


def samples(training: Training) -> int:
    """Return how many samples the two systems see together; the policy's own come before.

    A policy by itself, and a pair that is there already, have none.
    """
    if training.stage != "pair":
        return 0
    default = TrainingConfig()
    total = 0
    for stage in ("stage1", "stage2"):
        section: Any = getattr(default, stage)
        steps, batch = (
            int(training.options.get(f"{stage}.{name}", getattr(section, name)))
            for name in ("steps", "batch")
        )
        total += steps * batch
    return total


def in_order(trainings: Iterable[Training]) -> list[Training]:
    """Return all that must be trained, each once, parents first."""
    found: dict[str, Training] = {}
    for training in trainings:
        for one in (*reversed(training.ancestors), training):
            found.setdefault(one.key, one)
    return list(found.values())


class Trainings:
    """Trainings in a folder.

    Args:
        folder: of all of them.
        trainer: does what is not there.
    """

    def __init__(self, folder: Path, trainer: Trainer) -> None:
        self._folder, self._trainer = folder, trainer

    def place(self, training: Training) -> Path:
        """Return the folder of a training."""
        return self._folder / training.key

    def done(self, training: Training) -> dict[str, Any] | None:
        """Return what `trained.json` says, or None if it is not finished.

        Raises:
            ConfigError: the file is damaged.
        """
        path = self.place(training) / TRAINED
        if not path.exists():
            return None
        try:
            found = dict(json.loads(path.read_text(encoding="utf-8")))
            if found["training"] != json.loads(json.dumps(training.to_json(), default=str)):
                raise ValueError
        except (ValueError, KeyError):
            raise ConfigError(f"{path}: damaged; delete {path.parent} to train it again") from None
        return found

    def ensure(self, training: Training, say: Say) -> dict[str, Any]:
        """Train what is not finished, parents first; return what `trained.json` says."""
        found = self.done(training)
        if found is not None:
            return found
        parent = None
        if training.parent is not None:
            self.ensure(training.parent, say)
            parent = self.place(training.parent)
        folder = self.place(training)
        folder.mkdir(parents=True, exist_ok=True)
        clock, begun_s = folder / CLOCK, time.monotonic()
        before_s = float(json.loads(clock.read_text())["seconds"]) if clock.exists() else 0.0
        try:
            self._trainer.train(training, folder, parent, say)
        except CommandFailed as error:
            replace_file(folder / FAILED, json.dumps({"why": str(error)}).encode())
            raise
        finally:
            seconds = before_s + time.monotonic() - begun_s
            replace_file(clock, json.dumps({"seconds": seconds}).encode())
        found = {
            "training": json.loads(json.dumps(training.to_json(), default=str)),
            "seconds": round(seconds, 1),
            "overrides": self._trainer.overrides(training, folder),
        }
        replace_file(folder / TRAINED, json.dumps(found, indent=1).encode() + b"\n")
        return found

    def failure(self, training: Training) -> str | None:
        """Return why a training failed when it was last tried, or None."""
        path = self.place(training) / FAILED
        if self.done(training) is not None or not path.exists():
            return None
        return str(json.loads(path.read_text(encoding="utf-8"))["why"])

    def seconds(self, training: Training) -> float | None:
        """Return how long a training is still going to take; 0 if it is finished."""
        return 0.0 if self.done(training) is not None else self._trainer.seconds(training)
