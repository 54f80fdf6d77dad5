"""Sentences that name tasks, as a policy is told them: latents made once, drawn a frame.

One safetensors file: `latent` (S, n, d) float32, `task` (S,) int32 index into the tasks, and in
its metadata the spec of the latents and the texts. A frame of a task is told one of the task's
sentences, another one each time it is seen.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from openhelix.runtime.core.files import (
    BadFile,
    as_record,
    load_tensors,
    parse_object,
    save_tensors,
)
from openhelix.runtime.core.interfaces import LatentSpec
from openhelix.system1.config import RANGES
from openhelix.system1.data import Augment
from openhelix.system1.draws import rand, randn
from openhelix.system1.geometry import Inputs

OLDEST_S = 1.5  # a sentence does not age, but whoever acts says how long ago it was encoded


class SentenceError(BadFile):
    """Sentences that cannot be used; the message says which."""


class Sentences:
    """The sentences of all tasks.

    Args:
        latent: (S, n, d).
        task: (S,), 0 to n_tasks - 1.
        texts: S sentences.
        spec: of the latents.
        n_tasks: how many tasks there are.

    Raises:
        SentenceError: a task has no sentence, or shapes do not fit.
    """

    def __init__(
        self, latent: Tensor, task: Tensor, texts: Sequence[str], spec: LatentSpec, n_tasks: int
    ) -> None:
        low, high = RANGES["n_tasks"]
        if not low <= n_tasks <= high:
            raise SentenceError(f"tasks: {n_tasks} is not in {low}..{high}")
        if latent.shape[1:] != (spec.n_tokens, spec.dim):
            raise SentenceError(
                f"latent: {tuple(latent.shape[1:])} a sentence, its spec says "
                f"{(spec.n_tokens, spec.dim)}"
            )
        if len(latent) != len(task) or len(latent) != len(texts):
            raise SentenceError(f"sentences: {len(latent)} latents for {len(texts)} texts")
        self.count = torch.bincount(task.long(), minlength=n_tasks)
        if len(self.count) > n_tasks or bool((self.count == 0).any()):
            none = torch.nonzero(self.count[:n_tasks] == 0).flatten().tolist()
            raise SentenceError(f"sentences: no sentence for the tasks numbered {none}")
        self.order = torch.argsort(task.long(), stable=True)
        self.first = torch.cumsum(self.count, 0) - self.count
        self.latent, self.task = latent.float(), task.long()
        self.texts, self.spec = list(texts), spec

    def draw(self, task: Tensor, generator: torch.Generator) -> Tensor:
        """Return one of each task's sentences (B,), for tasks (B,)."""
        share = rand(len(task), generator=generator)
        which = (share * self.count[task]).long().clamp_max(self.count[task] - 1)
        return self.order[self.first[task] + which]

    def save(self, path: Path) -> None:
        """Write the file, first under another name."""
        about = {"spec": asdict(self.spec), "texts": self.texts, "tasks": len(self.count)}
        tensors = {"latent": self.latent, "task": self.task.int()}
        save_tensors(path, tensors, {"sentences": json.dumps(about)})

    @staticmethod
    def load(path: Path | str) -> Sentences:
        """Read what `save` wrote.

        Raises:
            BadFile: not such a file, or its sentences do not fit.
        """
        tensors, metadata = load_tensors(path, ("latent", "task"))
        where = f"{path}: its account of the sentences"
        about = as_record(_About, parse_object(metadata.get("sentences", ""), where), where)
        task = tensors["task"].long()
        if len(task) and not 0 <= int(task.min()) <= int(task.max()) < about.tasks:
            raise SentenceError(f"{path}: task: outside 0..{about.tasks - 1}")
        try:
            return Sentences(tensors["latent"], task, about.texts, about.spec, about.tasks)
        except SentenceError as error:
            raise SentenceError(f"{path}: {error}") from None


@dataclass(frozen=True, slots=True)
class _About:
    """What a file of sentences says of itself."""

    spec: LatentSpec
    texts: tuple[str, ...]
    tasks: int


def told(
    inputs: Inputs,
    task: Tensor,
    sentences: Sentences,
    generator: torch.Generator,
    augment: Augment | None = None,
    noise: float = 0.0,
) -> Inputs:
    """Return observations that are told a sentence of their tasks (B,).

    With `augment`, a share of them is told the task's number instead, the sentence is of any
    age, and Gaussian noise of `noise` times the latents' own spread is added to it: with few
    sentences a task that is what keeps the adapter from learning them by heart.
    """
    device = inputs.proprio.device
    latent = sentences.latent[sentences.draw(task, generator)].unsqueeze(1)
    age = torch.zeros(len(task), 1)
    null = torch.zeros(len(task), dtype=torch.bool)
    if augment is not None:
        age = OLDEST_S * rand(len(task), 1, generator=generator)
        null = rand(len(task), generator=generator) < augment.null_latent
        if noise:
            drawn = randn(*latent.shape, generator=generator)
            latent = latent + noise * sentences.latent.std(0) * drawn
    return replace(
        inputs,
        latent=latent.to(device),
        latent_age_s=age.to(device),
        latent_mask=~null.unsqueeze(1).to(device),
        task=torch.where(null, task, -1).to(device),
    )
