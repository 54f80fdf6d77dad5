"""Training System 1 from a cache of expert data; on a CPU in hours, on a GPU in minutes.

An observation is encoded once and gets `draws` noise draws (`openhelix.system1.losses`): the encoder
is most of the cost and the denoiser's draws share its keys and values, so a step of 8 draws
costs little more than one of 1 and its gradient is far less noisy.

`train(TrainConfig(cache, out))` trains; called again with the same settings it goes on where it
stopped, which is how `openhelix train policy` uses it. `out` holds a checkpoint folder of the average
weights (`openhelix.system1.checkpoint`), the training state, `train.json` and `loss.png`.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openhelix.runtime.core.config import ConfigError
from openhelix.runtime.core.files import BadFile, told_as
from openhelix.runtime.core.interfaces import LatentSpec
from openhelix.runtime.core.plugins import none_of
from openhelix.runtime.core.workers import ALONE, Workers
from openhelix.system1.cache import CacheError
from openhelix.system1.checkpoint import (
    Network,
    load_policy,
    rebuilt,
    save_policy,
    seeded_model,
    take_encoder,
)
from openhelix.system1.config import PRESETS, TACTILE, CameraConfig, PolicyConfig
from openhelix.system1.data import Augment, Batch, Cache
from openhelix.system1.diffusion import Normalizer
from openhelix.system1.draws import Part
from openhelix.system1.latent_adapter import adapt_to_latent, nearest_task, start_adapter
from openhelix.system1.losses import LossParts, trajectory_errors
from openhelix.system1.model import gaussian
from openhelix.system1.sentences import Sentences, told
from openhelix.system1.train_loop import (
    STATE,
    Ema,
    OptimizerName,
    Optimizers,
    Pace,
    Watch,
    clip_gradients,
    cosine_rate,
    deadline_after,
    keep_freed_memory,
    load_state,
    plot_history,
    run_loop,
    save_state,
    trained,
)
from openhelix.system1.vision import EfficientNetStack, load_imagenet

log = logging.getLogger(__name__)
TERMS = ("total", "position", "rotation", "gripper", "keypose")  # of a loss, as they are logged


def seed_of(seed: int, step: int, stream: int = 0) -> int:
    """Return the seed of a step's generator, one of four streams."""
    return (seed * 1_000_003 + step) * 4 + stream


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """One training run."""

    cache: Path | tuple[Path, ...]  # several folders are one
    out: Path
    mix: tuple[float, ...] = ()  # shares of the samples, one a folder; (): by their frames
    sentences: Path | None = None  # what tasks are told by, see `sentences`; None: by number
    held_sentences: Path | None = None  # ... what the held-out frames are told by
    sentence_noise: float = 0.0  # see `sentences.told`
    door_penalty: float = 3.0  # see `start_adapter`; for a policy that knew no sentences
    preset: str = "small"
    changes: dict[str, Any] = field(default_factory=dict)  # fields of PolicyConfig
    init: Path | None = None  # a checkpoint folder to start from
    encoder_from: Path | None = None  # ... to take the encoder from, where its weights fit
    freeze: tuple[str, ...] = ()  # prefixes of parameters that stay as they are
    steps: int = 20_000
    batch: int = 32  # of all workers together
    accumulate: int = 1  # parts in which a worker's share of a batch is worked on
    draws: int = 4
    optimizer: OptimizerName = "muon"
    lr: float = 1e-3
    weight_decay: float = 5e-3
    warmup: int = 200
    decay_to: float = 0.05  # the rate falls along a cosine to this share of itself
    ema: float = 0.999
    clip: float = 1.0
    bf16: bool = False
    device: str = "cpu"
    seed: int = 0
    validation: float = 0.05  # share of the episodes
    eval_every: int = 500
    eval_frames: int = 128
    save_every: int = 500
    log_every: int = 20
    time_limit_s: float = 0.0  # stop after this long, saved; 0 for none
    plan_s: float = 0.0  # the cosine ends, and the run, after so long of training; 0: after `steps`
    augment: Augment = field(default_factory=Augment)


def policy_config(
    config: TrainConfig, cache: Cache, told_by: LatentSpec | None = None
) -> PolicyConfig:
    """Return the policy's configuration: the preset, the cache's interface, the changes.

    Args:
        config: of the run.
        cache: the data.
        told_by: spec of the sentences that tasks are told by; None: by their numbers.

    Raises:
        ConfigError: the preset is unknown or a change contradicts the cache.
    """
    if config.preset not in PRESETS:
        raise ConfigError(f"policy.preset: {none_of(config.preset, PRESETS)}")
    meta = cache.meta
    taken: dict[str, Any] = {
        "cameras": cameras_for(config.changes.get("sensors", ()), meta["cameras"]),
        "horizon": meta["horizon"],
        "hz": meta["hz"],
        "nhist": meta["nhist"],
        "n_tasks": len(meta["tasks"]),
        "use_latent": told_by is not None,
    }
    if told_by is not None:
        taken |= {
            "latent_kind": told_by.kind,
            "latent_tokens": told_by.n_tokens,
            "latent_dim": told_by.dim,
            "latent_model_id": told_by.model_id,
        }
    for name, value in config.changes.items():
        if name in taken and taken[name] != value:
            raise ConfigError(
                f"policy.changes.{name}: {value!r} contradicts the cache, which has {taken[name]!r}"
            )
    return PRESETS[config.preset](**{**taken, **config.changes})


def cameras_for(
    sensors: Sequence[str], cameras: Sequence[Mapping[str, Any]]
) -> tuple[CameraConfig, ...]:
    """Return the cameras of a cache that a policy with these sensors looks at.

    Raises:
        ConfigError: it is to feel, and the data has no such picture.
    """
    found = tuple(CameraConfig(**c) for c in cameras if c["name"] != TACTILE or TACTILE in sensors)
    if TACTILE in sensors and all(camera.name != TACTILE for camera in found):
        names = ", ".join(c["name"] for c in cameras)
        raise ConfigError(
            f"policy.changes.sensors: the data has no camera {TACTILE!r}, only {names}"
        )
    return found


def grown(model: Network, changes: Mapping[str, Any], seed: int) -> Network:
    """Return a trained network with fields of its configuration changed.

    Parts that it did not have are fresh, all others as they were.

    Raises:
        ConfigError: a change gives weights that are there another shape, or loses some.
    """
    config = replace(model.config, **changes)
    if config == model.config:
        return model
    made, lost = rebuilt(model, config, seed)
    if lost:
        raise ConfigError(f"policy.changes: {', '.join(sorted(changes))} would lose {lost[0]}")
    return made


def fresh_network(
    config: PolicyConfig,
    cache: Cache,
    frames: Tensor,
    seed: int,
    encoder_of: Network | None = None,
) -> Network:
    """Return an untrained network whose normaliser is fitted to some frames of a cache.

    Args:
        config: of the network.
        cache, frames: what the normaliser is fitted to.
        seed: of the weights.
        encoder_of: its encoder's weights are taken where they fit.

    Raises:
        ConfigError: none of them fits.
    """
    model = seeded_model(config, seed)
    if config.encoder == "efficientnet":
        for module in model.modules():
            if isinstance(module, EfficientNetStack):
                load_imagenet(module)
    if config.head != "diffuser_actor":
        model.set_normalizer(Normalizer.fit(*cache.all_rows(frames, config.rotation)))
    if encoder_of is not None and not take_encoder(model, encoder_of):
        raise ConfigError("policy.encoder_from: no weight of that policy fits this encoder")
    return model


def opened_encoder(folder: Path | None) -> Network | None:
    """Return the policy whose encoder a fresh one begins with.

    Raises:
        BadFile: it cannot be read.
    """
    if folder is None:
        return None
    with told_as(BadFile, "policy.encoder_from"):
        return load_policy(folder)


def opened_sentences(
    config: TrainConfig, cache: Cache
) -> tuple[Sentences | None, Sentences | None]:
    """Return the sentences that frames are told in training, and those of held-out frames.

    Raises:
        ConfigError: they are of other tasks than the cache, or of two different codes.
    """
    if config.sentences is None:
        return None, None
    said = Sentences.load(config.sentences)
    held = said if config.held_sentences is None else Sentences.load(config.held_sentences)
    for name, found in (("sentences", said), ("held_sentences", held)):
        if len(found.count) != len(cache.meta["tasks"]):
            raise ConfigError(
                f"{name}: for {len(found.count)} tasks, the data has {len(cache.meta['tasks'])}"
            )
        if found.spec != said.spec:
            raise ConfigError(f"held_sentences: {found.spec}, the sentences are {said.spec}")
    return said, held


def pools(mix: tuple[float, ...], cache: Cache, frames: Tensor) -> list[tuple[Tensor, float]]:
    """Return the frames of each folder with its share of the samples.

    Raises:
        ConfigError: not a share for each folder, or a share of a folder without frames.
    """
    if not mix:
        return [(frames, 1.0)]
    count = int(cache.part.max()) + 1
    if len(mix) != count or min(mix) < 0 or sum(mix) <= 0:
        raise ConfigError(f"mix: {list(mix)}, want {count} shares, one for each folder of the data")
    found = [(frames[cache.part[frames] == part], share) for part, share in enumerate(mix) if share]
    if any(len(own) == 0 for own, _ in found):
        raise ConfigError(f"mix: {list(mix)} gives a share to a folder without training episodes")
    return found


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a step's batch, ready to learn from.

    Attributes:
        batch: its samples.
        generator: of what is drawn next.
        rows: real rows of the whole batch, as the network's loss will count them.
    """

    batch: Batch
    generator: torch.Generator
    rows: float


class Trainer:
    """A run: its data, network, optimiser and history.

    With several workers each of them has one; what is learned is the same with any number, up to
    the rounding of sums.
    """

    def __init__(self, config: TrainConfig, workers: Workers = ALONE) -> None:
        self.config, self.workers = config, workers
        self.parts = workers.parts(config.batch, config.accumulate, "policy.batch")
        if config.device == "cpu":
            keep_freed_memory()
        self.cache = Cache(config.cache)
        self.sentences, self.held_sentences = opened_sentences(config, self.cache)
        self.told_by = None if self.sentences is None else self.sentences.spec
        self.policy_config = policy_config(config, self.cache, self.told_by)
        self.train_frames, self.val_frames = self.cache.split(config.validation, config.seed)
        if len(self.train_frames) == 0:
            raise CacheError(f"{self.cache.folder}: no episode is left to train on")
        self.pools = pools(config.mix, self.cache, self.train_frames)
        self.device = torch.device(config.device)
        self.model = self._network().to(self.device)
        for name, p in self.model.named_parameters():
            if name.startswith(tuple(config.freeze)):
                p.requires_grad_(False)
        self.ema = Ema(self.model, config.ema)
        self.optimizers = Optimizers(
            trained(self.model), config.optimizer, config.lr, config.weight_decay
        )
        self.step = 0
        self.history: list[dict[str, Any]] = []
        self._loader = ThreadPoolExecutor(1, "batches")
        self._ahead: tuple[int, Future[list[Piece]]] | None = None
        config.out.mkdir(parents=True, exist_ok=True)
        if (config.out / STATE).is_file():
            self.step, self.history = load_state(
                config.out, self.model, self.ema, self.optimizers.parts
            )
            log.info("going on at step %d", self.step)
        workers.same([*self.model.state_dict().values(), *self.ema.values.values()])
        self._before_s = float(self.history[-1]["seconds"]) if self.history else 0.0
        self._begun_s = time.monotonic()

    def _network(self) -> Network:
        config = self.config
        if config.init is not None:
            model = grown(load_policy(config.init), config.changes, config.seed)
            spec = self.told_by
            if spec is not None:
                known = model.config.latent_model_id
                model = adapt_to_latent(model, spec, config.seed)
                self._begin_adapter(model, known)
            elif model.config.use_latent:
                model.config = replace(model.config, use_latent=False)
            self.policy_config = model.config
            return model
        source = opened_encoder(config.encoder_from)
        model = fresh_network(
            self.policy_config, self.cache, self.train_frames, config.seed, source
        )
        if source is not None:
            self._begin_adapter(model, source.config.latent_model_id)
        return model

    def _begin_adapter(self, model: Network, known: str) -> None:
        """Begin the map of sentences of a network that knew those of the code `known`."""
        said = self.sentences
        if said is not None and said.spec.model_id != known:
            start_adapter(model, said.latent, said.task, self.config.door_penalty)

    def rate(self, step: int) -> float:
        """Return the learning rate of a step: linear warm-up, then a cosine.

        Along the steps, or with `plan_s` along the time spent training, in all runs together:
        for a machine of which nobody knows how many steps it will spare.
        """
        c = self.config
        if not c.plan_s:
            return c.lr * cosine_rate(step, c.warmup, c.steps, c.decay_to)
        warm = min(1.0, (step + 1) / max(1, c.warmup))
        return c.lr * warm * cosine_rate(round(self.seconds), 0, round(c.plan_s), c.decay_to)

    @property
    def seconds(self) -> float:
        """Time spent training, in all runs together."""
        return self._before_s + (time.monotonic() - self._begun_s)

    def generator(self, step: int, stream: int = 0) -> torch.Generator:
        """Return the generator of a step; its numbers depend on nothing else."""
        return torch.Generator().manual_seed(seed_of(self.config.seed, step, stream))

    def precision(self) -> contextlib.AbstractContextManager[Any]:
        """Return the autocast context that the run asks for."""
        if not self.config.bf16:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def train_step(self) -> dict[str, float]:
        """Take one step; return its loss, parts, gradient norm and rate.

        Raises:
            FloatingPointError: the loss is not finite; the weights are as before.
        """
        c = self.config
        self.model.train()
        self.optimizers.zero_grad()
        count = self.workers.count * len(self.parts)
        sums = torch.zeros(len(TERMS), dtype=torch.float64)
        for piece in self._next():
            parts = self._loss(piece).within(piece.rows, count)
            (parts.total / count).backward()
            terms = [torch.as_tensor(getattr(parts, name)).detach() for name in TERMS]
            sums += torch.tensor([float(term) / count for term in terms], dtype=torch.float64)
        row = dict(zip(TERMS, self.workers.summed(sums.tolist()), strict=True))
        if not math.isfinite(row["total"]):
            raise FloatingPointError(f"the loss of step {self.step} is {row['total']}")
        learned = list(trained(self.model).values())
        self.workers.add_gradients(learned)
        norm = clip_gradients(learned, c.clip)
        rate = self.workers.firsts(self.rate(self.step))
        self.optimizers.step(rate)
        self.ema.update(self.model, self.step)
        self.step += 1
        loss = row.pop("total")
        return {"step": self.step, "loss": loss, **row, "grad_norm": float(norm), "lr": rate}

    def _loss(self, piece: Piece) -> LossParts:
        batch = piece.batch
        with self.precision():
            return self.model.loss(
                batch.inputs,
                batch.rows,
                batch.openness,
                batch.mask,
                self.config.draws,
                piece.generator,
                batch.keyposes,
            )

    def _next(self) -> list[Piece]:
        """Return this worker's parts of the step's batch, and let the next be made meanwhile.

        A step's numbers come from its own generator, so it does not matter when it is made.
        """
        step, ahead = self.step, self._ahead
        ready = ahead[1].result() if ahead is not None and ahead[0] == step else self._made(step)
        more = step + 1 < self.config.steps
        self._ahead = (step + 1, self._loader.submit(self._made, step + 1)) if more else None
        return ready

    def _made(self, step: int) -> list[Piece]:
        return [self._piece(step, rows) for rows in self.parts]

    def _piece(self, step: int, rows: slice) -> Piece:
        generator = Part.of(rows, self.config.batch, seed_of(self.config.seed, step))
        frames = self._picked(generator)
        batch = self._batch(frames[rows], generator, self.config.augment)
        mask = batch.mask if len(batch.mask) == len(frames) else self.cache.mask(frames)
        return Piece(batch, generator, self.model.real_rows(mask, self.config.draws, generator))

    def _picked(self, generator: torch.Generator) -> Tensor:
        """Return the frames (B,) of a step, of all workers."""
        count = self.config.batch
        if len(self.pools) == 1:
            only = self.pools[0][0]
            return only[torch.randint(len(only), (count,), generator=generator)]
        shares = torch.tensor([share for _, share in self.pools])
        which = torch.multinomial(shares, count, replacement=True, generator=generator)
        place = torch.rand(count, generator=generator, dtype=torch.float64)
        picked = [
            self.pools[pool][0][int(at * len(self.pools[pool][0]))]
            for pool, at in zip(which.tolist(), place.tolist(), strict=True)
        ]
        return torch.stack(picked)

    def _batch(self, frames: Tensor, generator: torch.Generator, augment: Augment | None) -> Batch:
        batch = self.cache.batch(
            frames, generator, augment, self.policy_config.rotation, self.device
        )
        said = self.sentences if augment is not None else self.held_sentences
        if said is None:
            return batch
        task, noise = self.cache.task[frames], self.config.sentence_noise
        return replace(batch, inputs=told(batch.inputs, task, said, generator, augment, noise))

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Return validation loss and the errors of sampled trajectories, average weights.

        Errors are means over real rows: metres, radians, share of wrong gripper states.
        """
        c = self.config
        frames = self.val_frames if len(self.val_frames) else self.train_frames
        generator = self.generator(0, stream=1)
        picks = torch.randperm(len(frames), generator=generator)[: c.eval_frames]
        self.ema.swap(self.model)
        self.model.eval()
        sums = torch.zeros(6, dtype=torch.float64)
        for start in range(0, len(picks), c.batch):
            chosen = frames[picks[start : start + c.batch]]
            batch = self._batch(chosen, generator, None)
            noise = generator.get_state()
            parts = self.model.loss(
                batch.inputs, batch.rows, batch.openness, batch.mask, 4, generator
            )
            named = float(parts.total)
            if self.sentences is not None:
                again = torch.Generator()
                again.set_state(noise)
                by_number = replace(
                    batch.inputs.without_latent(), task=self.cache.task[chosen].to(self.device)
                )
                named = float(
                    self.model.loss(
                        by_number, batch.rows, batch.openness, batch.mask, 4, again
                    ).total
                )
            out = self.model.sample_inputs(batch.inputs, gaussian(generator, self.device))
            errors = trajectory_errors(out, batch.rows, batch.openness, batch.mask)
            real = float(batch.mask.sum())
            values = (float(parts.total) * real, *errors, real, named * real)
            sums += torch.tensor(values, dtype=torch.float64)
        said = self._told_figures(float(sums[5] / sums[4]))
        self.ema.swap(self.model)
        loss, position, rotation, gripper = (sums[:4] / sums[4]).tolist()
        return {
            "val_loss": loss,
            "val_position_m": position,
            "val_rotation_rad": rotation,
            "val_gripper_error": gripper,
            **said,
        }

    def _told_figures(self, by_number: float) -> dict[str, float]:
        """Return what else is measured of a policy that is told by sentences.

        `val_loss_by_number` is the held-out loss with the task's number in the sentence's place,
        `val_sentence_top1` the share of held-out sentences nearest to their task's row.
        """
        said = self.held_sentences
        if said is None:
            return {}
        guess = nearest_task(self.model, said.latent.to(self.device))
        figures = {"val_loss_by_number": by_number}
        if guess is not None:
            figures["val_sentence_top1"] = float((guess.cpu() == said.task).float().mean())
        return figures

    def save(self) -> None:
        """Write the checkpoint of the average weights, then the state, then the plot.

        The first worker does. In this order: a run killed in between never counts a step as done whose checkpoint
        was not written.
        """
        if not self.workers.first:
            return
        out = self.config.out
        self.ema.swap(self.model)
        try:
            save_policy(out, self.policy_config, self.model.state_dict(), self.model.normalizer)
        finally:
            self.ema.swap(self.model)
        save_state(out, self.model, self.ema, self.optimizers.parts, self.step, self.history)
        try:
            plot_history(out / "loss.png", self.history)
        except ImportError:
            log.warning("matplotlib is not installed: no loss.png")
        except OSError as error:  # a picture is no reason to stop
            log.warning("no loss.png: %s", error)

    def run(self, watch: Watch | None = None) -> list[dict[str, Any]]:
        """Train to the last step or the time limit; return the history.

        Args:
            watch: is shown every step.
        """
        c = self.config
        if c.plan_s and self.workers.firsts(self.seconds) >= c.plan_s:
            return self.history  # finished before
        limits = [s for s in (c.time_limit_s, c.plan_s and max(c.plan_s - self.seconds, 1e-6)) if s]
        deadline = deadline_after(min(limits, default=0.0))
        pace = Pace(c.steps, c.eval_every, c.save_every, c.log_every, deadline)
        run_loop(self, pace, watch, self.workers)
        return self.history


def train(config: TrainConfig) -> list[dict[str, Any]]:
    """Run a training to its end; see `TrainConfig`."""
    return Trainer(config).run()
