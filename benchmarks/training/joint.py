"""Both systems in one training step: the paper's stage 1 and stage 2 (Appendix A.4).

The loss is the same in both: the auxiliary head's terms (omega 1 and 2) and the policy's
(omega 3 and 4), through the latent. The stages differ only in whether the policy learns. A
latent may be older than the frame it is for, as it is when the robot runs.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from openhelix.benchmarks.training.config import JointStage, TrainingConfig
from openhelix.benchmarks.training.feeds import Ages, Drawn, Feed
from openhelix.runtime.core.config import ConfigError
from openhelix.runtime.core.workers import ALONE, Workers
from openhelix.system1.checkpoint import Network
from openhelix.system1.data import Augment, Batch, Cache, relative_rows
from openhelix.system1.draws import Part, rand
from openhelix.system1.geometry import Inputs
from openhelix.system1.latent_adapter import nearest_task
from openhelix.system1.losses import LossParts
from openhelix.system1.train import seed_of
from openhelix.system1.train_loop import (
    BETAS,
    Ema,
    Optimizers,
    alike,
    clip_gradients,
    cosine_rate,
    trained,
)
from openhelix.system2.train import CHANGES, ActionTarget, LossWeights, Sample, System2Learner

Stage = Literal["stage1", "stage2"]


class Pair(nn.Module):
    """The two systems as one module, for one optimiser, average and state file."""

    def __init__(self, policy: Network, learner: System2Learner) -> None:
        super().__init__()
        self.policy = policy
        self.learner = learner

    def kept(self, name: str) -> bool:
        """Whether a tensor of this name can differ from the language model's own file."""
        if not name.startswith("learner.model."):
            return True
        return name in self._language

    @property
    def _language(self) -> set[str]:
        return {n for n, p in self.named_parameters() if p.requires_grad}


class Joint:
    """The step, the groups of the optimiser, and the evaluation of one stage.

    Args:
        config: of the whole training.
        stage: "stage1" or "stage2".
        cache: the frames, opened without latents.
        policy: with an adapter for the learner's latents.
        learner: System 2.
        feed: where latents come from.
        clip_text: what the alignment loss pulls latents to, (n_tasks, dim) by task or
            (n_sentences, dim) by sentence, as `latent.clip_to` says.
        workers: that train together; what is learned is the same with any number of them, but
            for the alignment loss, which compares the samples of a part with each other alone.
    """

    def __init__(
        self,
        config: TrainingConfig,
        stage: Stage,
        cache: Cache,
        policy: Network,
        learner: System2Learner,
        feed: Feed,
        clip_text: Tensor | None = None,
        workers: Workers = ALONE,
    ) -> None:
        self.workers = workers
        self.config, self.stage, self.section = config, stage, getattr(config, stage)
        self.cache, self.feed, self.clip_text = cache, feed, clip_text
        self.parts = workers.parts(self.section.batch, config.accumulate, f"{stage}.batch")
        self.device = torch.device(config.device)
        self.frozen = stage == "stage1" and config.stage1.policy == "frozen"
        if self.frozen:
            policy.requires_grad_(False)
        self.pair = Pair(policy, learner).to(self.device)
        self.policy, self.learner = policy, learner
        self.sharded = config.latent.shard and learner.regime in ("lora", "full")
        if self.sharded:
            language = learner.model.language_model
            workers.shard([language.embed_tokens, *language.layers])
        if not config.latent.aux:
            learner.aux.requires_grad_(False)
        train, held = cache.split(config.validation, config.seed)
        self.train_rows = rows_among(feed.frames, train)
        self.val_rows = rows_among(feed.frames, held)
        self.ages = Ages(cache, feed.frames, config.latent.lag_steps)
        self.train_frames = self.ages.reachable(train)
        self.val_frames = self.ages.reachable(held)
        if len(self.train_frames) == 0:
            raise ConfigError("latent.frames: no frame has a latent within latent.lag_steps")
        self.act_seed: Tensor | None = None  # (n_act, hidden), to say how far it has moved from
        self.ema = Ema(self.pair, self.section.ema)
        self.optimizers = self.made_optimizers()

    def made_optimizers(self) -> list[torch.optim.Optimizer]:
        """Return the optimisers; each group has its own top rate, in `top`."""
        s: JointStage = self.section
        found: list[torch.optim.Optimizer] = []
        policy = trained(self.policy)
        if policy:
            found += Optimizers(policy, s.optimizer, s.lr_policy, s.weight_decay).parts
        learned = self.learner.learned()
        head = [p for p in learned.head if p.requires_grad]
        rows = [
            (head, s.lr_head, 1e-5),  # the paper's decay for the language side
            (learned.act, s.lr_act, 0.0),
            *(
                (list(lot.values()), s.lr_language, 1e-5)
                for lot in alike({str(i): p for i, p in enumerate(learned.language)})
            ),
        ]
        groups = [
            {"params": params, "lr": rate, "weight_decay": decay}
            for params, rate, decay in rows
            if params
        ]
        if groups:
            found.append(torch.optim.AdamW(groups, betas=BETAS))
        for group in (g for part in found for g in part.param_groups):
            group["top"] = group["lr"]
        return found

    def generator(self, step: int, stream: int = 0) -> torch.Generator:
        """Return the generator of a step; its numbers depend on nothing else."""
        return torch.Generator().manual_seed(seed_of(self.config.seed, step, stream))

    def precision(self) -> contextlib.AbstractContextManager[Any]:
        """Return the autocast context that the run asks for."""
        if not self.config.computes_bf16:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def step(self, number: int) -> dict[str, float]:
        """Take step `number`; return its losses, gradient norm and rate.

        Raises:
            FloatingPointError: the loss is not finite; the weights are as before.
        """
        s, values = self.section, dict[str, float]()
        self.policy.train(not self.frozen)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        count = self.workers.count * len(self.parts)
        for rows in self.parts:
            for name, value in self._learned_from(number, rows, count).items():
                values[name] = values.get(name, 0.0) + value / count
        names = list(values)
        values = dict(
            zip(names, self.workers.summed([values[name] for name in names]), strict=True)
        )
        loss = sum(value for name, value in values.items() if name in COUNTED)
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss of step {number} is {loss}")
        learned = list(trained(self.pair).values())
        self.workers.add_gradients(learned)
        act = self.act_row()
        norm = clip_gradients(learned, s.clip_norm)
        share = cosine_rate(number, s.warmup, s.steps)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["top"] * share
            optimizer.step()
        self.ema.update(self.pair, number)
        return {"step": number + 1, "loss": loss, **values, **act, "grad_norm": float(norm)}

    def _frames_of(self, number: int, rows: slice) -> tuple[Tensor, torch.Generator]:
        """Return the frames (batch,) of a step, and the generator of what some rows draw next."""
        batch = self.section.batch
        generator = Part.of(rows, batch, seed_of(self.config.seed, number))
        picks = torch.randint(len(self.train_frames), (batch,), generator=generator)
        return self.train_frames[picks], generator

    def drawn(self, number: int) -> tuple[Sample, Tensor]:
        """Return what step `number` draws of System 2, without gradients, and its tasks (batch,)."""
        frames, generator = self._frames_of(number, slice(0, self.section.batch))
        rows, _ = self.ages.draw(frames, generator)
        return sample_of(self, rows, generator)

    def _learned_from(self, number: int, rows: slice, count: int) -> dict[str, float]:
        """Collect the gradients of one of a step's `count` parts; return its terms."""
        s = self.section
        frames, generator = self._frames_of(number, rows)
        terms, _ = self.terms(frames[rows], generator, Augment(), s.draws, whole=(frames, count))
        loss = torch.stack([value for name, value in terms.items() if name in COUNTED]).sum()
        (loss / count).backward()
        return {name: float(value.detach()) for name, value in terms.items()}

    def act_row(self) -> dict[str, float]:
        """Return how far `<ACT>` is from its seed, and its gradient; nothing where it does not learn.

        `act_cosine` is the mean over the tokens, `act_moved` in units of the seed's length.
        """
        act = self.learner.head.act
        if not act.requires_grad or self.act_seed is None:
            return {}
        now, seed = act.detach().float(), self.act_seed.to(act.device)
        return {
            "act_cosine": float(nn.functional.cosine_similarity(now, seed, dim=-1).mean()),
            "act_moved": float((now - seed).norm() / seed.norm()),
            "act_grad": 0.0 if act.grad is None else float(act.grad.norm()),
        }

    def act_gradients(self) -> dict[str, float]:
        """Return what reaches `<ACT>` of the auxiliary head's loss and of the policy's: the norms.

        Of one batch of training frames, by its own generator; weights and gradients stay as
        they are.
        """
        act = self.learner.head.act
        if not act.requires_grad:
            return {}
        generator = self.generator(0, 2)
        picks = torch.randint(len(self.train_frames), (self.section.batch,), generator=generator)
        terms, _ = self.terms(self.train_frames[picks], generator, None, 1)
        groups = {
            "aux": [v for k, v in terms.items() if k.startswith("aux_")],
            "policy": [terms["policy"]],
        }
        found = {}
        for name, parts in groups.items():
            if parts:
                (grad,) = torch.autograd.grad(torch.stack(parts).sum(), act, retain_graph=True)
                found[f"act_grad_{name}"] = float(grad.norm())
        return found

    def terms(
        self,
        frames: Tensor,
        generator: torch.Generator,
        augment: Augment | None,
        draws: int,
        noise: torch.Generator | None = None,
        whole: tuple[Tensor, int] | None = None,
    ) -> tuple[dict[str, Tensor], tuple[Batch, Drawn, Inputs]]:
        """Return the terms of the loss for frames (B,), and what they were made from.

        Without `augment` nothing is varied and latents are the newest there are. `noise` is the
        diffusion's; the other generator when None. `whole`, the frames of a batch and into how
        many parts it is divided, scales the policy's terms for the mean over the parts.
        """
        c = self.config.latent
        if augment is None:
            rows, age = self.ages.newest(frames)
        else:
            rows, age = self.ages.draw(frames, generator)
        with self.language_precision():
            drawn = self.feed.draw(rows, generator)
        rotation = self.policy.config.rotation
        batch = self.cache.batch(frames, generator, augment, rotation, self.device)
        null = torch.zeros(len(frames), dtype=torch.bool)
        if augment is not None:
            null = rand(len(frames), generator=generator) < c.null
        inputs = with_latent(batch.inputs, drawn.sample.z, age, null)
        parts: list[LossParts] = []

        def policy_loss(z: Tensor) -> Tensor:
            given, source, real = replace(inputs, latent=z.unsqueeze(1)), noise or generator, 0.0
            if whole is not None:
                real = self.policy.real_rows(self.cache.mask(whole[0]), draws, source)
            with self.precision():
                found = self.policy.loss(
                    given,
                    batch.rows,
                    batch.openness,
                    batch.mask,
                    draws,
                    source,
                    batch.keyposes,
                )
            parts.append(found if whole is None else found.within(real, whole[1]))
            return parts[0].total

        task, text = self.task(drawn.frames), None
        if self.clip_text is not None:
            by_task = c.clip_to == "table"
            text = self.clip_text[task if by_task else drawn.instruction.to(self.device)]
        terms = self.learner.losses(
            drawn.sample,
            self.target(drawn.frames) if c.aux else None,
            policy_loss,
            text=text,
            labels=task,
            weights=LossWeights(clip=c.clip, answer=c.answer),
        )
        found = parts[0]
        terms |= {"position": found.position, "rotation": found.rotation, "gripper": found.gripper}
        return terms, (batch, drawn, inputs)

    def language_precision(self) -> contextlib.AbstractContextManager[Any]:
        """Return autocast for a language model that learns in float32."""
        if self.config.computes_bf16 and self.config.latent.regime in CHANGES:
            return torch.autocast(self.device.type, torch.bfloat16)
        return contextlib.nullcontext()

    def task(self, frames: Tensor) -> Tensor:
        """Return the tasks of frames (B,), on the device."""
        return self.cache.task[frames].to(self.device)

    def target(self, frames: Tensor) -> ActionTarget:
        """Return what the auxiliary head is to predict: the end of the chunk of what was seen.

        In the policy's normalised space, where the paper's weights of the two heads are meant
        to be compared.
        """
        poses = self.cache.gather("target_pose", frames)
        now = self.cache.gather("proprio", frames)[:, -1, :7]
        mask = self.cache.gather("target_mask", frames).bool()
        last = (mask.sum(1) - 1).clamp_min(0)
        at = torch.arange(len(frames))
        rows = relative_rows(poses, now, self.policy.config.rotation).to(self.device)
        end = self.policy.normalizer.normalize(rows)[at, last]
        opened = self.cache.gather("target_open", frames)[at, last].to(self.device)
        return ActionTarget(end[:, :3], end[:, 3:], opened)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Return held-out losses, average weights: told by latents, and told the task by name.

        `val_task_top1` is the share of latents that come nearest to their task's row in the
        policy's table, `val_answer_right` that of answers in words in which every token is right.
        """
        c, s = self.config, self.section
        frames = self.val_frames if len(self.val_frames) else self.train_frames
        order = torch.randperm(len(frames), generator=self.generator(0, 1))[: c.eval_frames]
        self.ema.swap(self.pair)
        self.policy.eval()
        sums: dict[str, float] = {}
        for start in range(0, len(order), s.batch):
            chosen = frames[order[start : start + s.batch]]
            generator, noise = self.generator(start, 2), self.generator(start, 3)
            terms, (batch, drawn, inputs) = self.terms(chosen, generator, None, 4, noise)
            values = {f"val_{k}": float(v) for k, v in terms.items()}
            if drawn.sample.answered is not None:
                values["val_answer_right"] = float(drawn.sample.answered.mean())
            named = replace(
                inputs.without_latent(), task=self.cache.task[drawn.frames].to(self.device)
            )
            told = self.policy.loss(
                named,
                batch.rows,
                batch.openness,
                batch.mask,
                4,
                self.generator(start, 3),
                batch.keyposes,
            )
            values["val_policy_named"] = float(told.total)
            guess = nearest_task(self.policy, drawn.sample.z)
            if guess is not None:
                values["val_task_top1"] = float((guess == named.task).float().mean())
            for name, value in values.items():
                sums[name] = sums.get(name, 0.0) + value * len(chosen) / len(order)
        self.ema.swap(self.pair)
        sums["val_loss"] = sum(v for k, v in sums.items() if k.removeprefix("val_") in COUNTED)
        return sums


COUNTED = ("aux_position", "aux_rotation", "aux_gripper", "clip", "answer", "policy")


def with_latent(inputs: Inputs, z: Tensor, age_s: Tensor, null: Tensor) -> Inputs:
    """Return observations told by latents (B, n, dim); where `null` (B,), by the task's name."""
    device = z.device
    task = torch.where(null.to(device), inputs.task, -1)
    return replace(
        inputs,
        latent=z.unsqueeze(1),
        latent_age_s=age_s.unsqueeze(1).to(device),
        latent_mask=~null.unsqueeze(1).to(device),
        task=task,
    )


def rows_among(frames: Tensor, wanted: Tensor) -> Tensor:
    """Return the rows of `frames` (N,) whose frame is among `wanted`."""
    return torch.nonzero(torch.isin(frames, wanted))[:, 0]


def sample_of(joint: Joint, rows: Tensor, generator: torch.Generator) -> tuple[Sample, Tensor]:
    """Return samples of some rows, without gradient, and their tasks."""
    with torch.no_grad(), joint.language_precision():
        drawn = joint.feed.draw(rows, generator)
    return drawn.sample, joint.task(drawn.frames)
