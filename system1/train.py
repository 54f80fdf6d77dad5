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
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openhelix.system1.cache import CacheError
from openhelix.system1.checkpoint import Network, load_policy, rebuilt, save_policy, seeded_model
from openhelix.system1.config import PRESETS, CameraConfig, ConfigError, PolicyConfig
from openhelix.system1.data import Augment, Batch, Cache
from openhelix.system1.latent_adapter import adapt_to_latent
from openhelix.system1.losses import trajectory_errors
from openhelix.system1.model import gaussian
from openhelix.system1.normalizer import Normalizer
from openhelix.system1.train_loop import (
    STATE,
    Ema,
    OptimizerName,
    Optimizers,
    Pace,
    cosine_rate,
    deadline_after,
    load_state,
    plot_history,
    run_loop,
    save_state,
    trained,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """One training run."""

    cache: Path
    out: Path
    latents: str | None = None  # name of a latents folder of the cache; None: policy only
    preset: str = "small"
    changes: dict[str, Any] = field(default_factory=dict)  # fields of PolicyConfig
    init: Path | None = None  # a checkpoint folder to start from
    freeze: tuple[str, ...] = ()  # prefixes of parameters that stay as they are
    steps: int = 20_000
    batch: int = 32
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
    augment: Augment = field(default_factory=Augment)


def policy_config(config: TrainConfig, cache: Cache) -> PolicyConfig:
    """Return the policy's configuration: the preset, the cache's interface, the changes.

    Raises:
        ConfigError: the preset is unknown or a change contradicts the cache.
    """
    if config.preset not in PRESETS:
        raise ConfigError(f"preset: {config.preset!r} is not one of {', '.join(sorted(PRESETS))}")
    meta = cache.meta
    taken: dict[str, Any] = {
        "cameras": tuple(CameraConfig(**c) for c in meta["cameras"]),
        "horizon": meta["horizon"],
        "hz": meta["hz"],
        "nhist": meta["nhist"],
        "n_tasks": len(meta["tasks"]),
        "use_latent": cache.latent_spec is not None,
    }
    if cache.latent_spec is not None:
        spec = cache.latent_spec
        taken |= {
            "latent_kind": spec.kind,
            "latent_tokens": spec.n_tokens,
            "latent_dim": spec.dim,
            "latent_model_id": spec.model_id,
        }
    for name, value in config.changes.items():
        if name in taken and taken[name] != value:
            raise ConfigError(f"{name}: {value!r} contradicts the cache, which has {taken[name]!r}")
    return PRESETS[config.preset](**{**taken, **config.changes})


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
        raise ConfigError(f"changes: {', '.join(sorted(changes))} would lose {lost[0]}")
    return made


def fresh_network(config: PolicyConfig, cache: Cache, frames: Tensor, seed: int) -> Network:
    """Return an untrained network whose normaliser is fitted to some frames of a cache."""
    model = seeded_model(config, seed)
    if config.head != "diffuser_actor":
        model.set_normalizer(Normalizer.fit(*cache.all_rows(frames, config.rotation)))
    return model


class Trainer:
    """A run: its data, network, optimiser and history."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.cache = Cache(config.cache, config.latents)
        self.policy_config = policy_config(config, self.cache)
        self.train_frames, self.val_frames = self.cache.split(config.validation, config.seed)
        if len(self.train_frames) == 0:
            raise CacheError(f"{config.cache}: no episode is left to train on")
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
        config.out.mkdir(parents=True, exist_ok=True)
        if (config.out / STATE).is_file():
            self.step, self.history = load_state(
                config.out, self.model, self.ema, self.optimizers.parts
            )
            log.info("going on at step %d", self.step)

    def _network(self) -> Network:
        config = self.config
        if config.init is not None:
            model = grown(load_policy(config.init), config.changes, config.seed)
            spec = self.cache.latent_spec
            if spec is not None:
                model = adapt_to_latent(model, spec, config.seed)
            elif model.config.use_latent:
                model.config = replace(model.config, use_latent=False)
            self.policy_config = model.config
            return model
        return fresh_network(self.policy_config, self.cache, self.train_frames, config.seed)

    def rate(self, step: int) -> float:
        """Return the learning rate of a step: linear warm-up, then a cosine."""
        c = self.config
        return c.lr * cosine_rate(step, c.warmup, c.steps, c.decay_to)

    def generator(self, step: int, stream: int = 0) -> torch.Generator:
        """Return the generator of a step; its numbers depend on nothing else."""
        seed = (self.config.seed * 1_000_003 + step) * 4 + stream
        return torch.Generator().manual_seed(seed)

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
        c, generator = self.config, self.generator(self.step)
        self.model.train()
        picks = torch.randint(len(self.train_frames), (c.batch,), generator=generator)
        batch = self._batch(self.train_frames[picks], generator, c.augment)
        with self.precision():
            parts = self.model.loss(
                batch.inputs,
                batch.rows,
                batch.openness,
                batch.mask,
                c.draws,
                generator,
                batch.keyposes,
            )
        loss = parts.total
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss of step {self.step} is {loss.item()}")
        self.optimizers.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(list(trained(self.model).values()), c.clip)
        self.optimizers.step(self.rate(self.step))
        self.ema.update(self.model, self.step)
        self.step += 1
        return {
            "step": self.step,
            "loss": float(loss.detach()),
            "position": float(parts.position.detach()),
            "rotation": float(parts.rotation.detach()),
            "gripper": float(parts.gripper.detach()),
            "keypose": float(torch.as_tensor(parts.keypose).detach()),
            "grad_norm": float(norm),
            "lr": self.rate(self.step - 1),
        }

    def _batch(self, frames: Tensor, generator: torch.Generator, augment: Augment | None) -> Batch:
        return self.cache.batch(
            frames, generator, augment, self.policy_config.rotation, self.device
        )

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
        sums = torch.zeros(5, dtype=torch.float64)
        for start in range(0, len(picks), c.batch):
            chosen = frames[picks[start : start + c.batch]]
            batch = self._batch(chosen, generator, None)
            parts = self.model.loss(
                batch.inputs, batch.rows, batch.openness, batch.mask, 4, generator
            )
            out = self.model.sample_inputs(batch.inputs, gaussian(generator, self.device))
            errors = trajectory_errors(out, batch.rows, batch.openness, batch.mask)
            real = float(batch.mask.sum())
            values = (float(parts.total) * real, *errors, real)
            sums += torch.tensor(values, dtype=torch.float64)
        self.ema.swap(self.model)
        loss, position, rotation, gripper = (sums[:4] / sums[4]).tolist()
        return {
            "val_loss": loss,
            "val_position_m": position,
            "val_rotation_rad": rotation,
            "val_gripper_error": gripper,
        }

    def save(self) -> None:
        """Write the checkpoint of the average weights, then the state, then the plot.

        In this order: a run killed in between never counts a step as done whose checkpoint
        was not written.
        """
        out = self.config.out
        self.ema.swap(self.model)
        save_policy(out, self.policy_config, self.model.state_dict(), self.model.normalizer)
        self.ema.swap(self.model)
        save_state(out, self.model, self.ema, self.optimizers.parts, self.step, self.history)
        try:
            plot_history(out / "loss.png", self.history)
        except ImportError:
            log.warning("matplotlib is not installed: no loss.png")

    def run(self) -> list[dict[str, Any]]:
        """Train to the last step or the time limit; return the history."""
        c = self.config
        deadline = deadline_after(c.time_limit_s)
        run_loop(self, Pace(c.steps, c.eval_every, c.save_every, c.log_every, deadline))
        return self.history


def train(config: TrainConfig) -> list[dict[str, Any]]:
    """Run a training to its end; see `TrainConfig`."""
    return Trainer(config).run()
