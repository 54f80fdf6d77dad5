"""Does an instruction name something that can be done? Two ways to judge, a file for either.

`PlainSentences` belongs to a base model that learned instructions (`vlm.tune.goals`): one of the
plain sentences that its latents are pulled towards is "do nothing", said of what is not to be
done, is not on the table, or means nothing. A latent nearest to it is refused. The judgement is
of that latent, so it sees the picture.

`Understanding` is a small head for a language model that stays as it is.
The latent says *what* is asked for; of "sing" or "do not open the drawer" it still says something,
and a policy would act on it. So the bare sentence (no image, no chat) goes through the language
model's first layers once more, and a head with one hidden layer gives the probability that it
names a task of the table. One word can be enough that it does not (a "never", an "umbrella"), and
changes little of the sentence's mean: the hidden layer looks at every token, and what it finds is
read as the maximum over the tokens, as their mean, and at the last, which has read the whole.

The probability is calibrated (`scale` and `offset`, on sentences that the head was not fitted
to). Below `threshold` the instruction is refused. This judgement depends on the sentence alone, so
it is made once for each, and does not flicker from picture to picture.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from openhelix.runtime.core.files import (
    CheckpointError,
    as_record,
    check_kinds,
    load_tensors,
    parse_object,
    save_tensors,
    tensor_header,
    told_as,
)
from openhelix.runtime.core.interfaces import Judgement
from openhelix.system2.latents import load_strictly
from openhelix.system2.model import Checkpoint

FILE = "understanding.safetensors"  # beside `latent.safetensors`, or in a policy's folder
OFF = "off"
KEPT = 4096  # sentences whose judgement is remembered
CERTAIN = 1 - 1e-6  # a probability of 1 says that nobody has judged


class Understanding(nn.Module):
    """The head.

    Args:
        layers: after which of the language model's layers states are read, ascending.
        hidden: the language model's width.
        width: of the head's hidden layer.
        model: `Checkpoint.model_id` of the language model that it was fitted to.
        threshold: instructions less probable than this are refused.
        note: what the fit says of itself.
    """

    def __init__(
        self,
        layers: Sequence[int],
        hidden: int,
        width: int,
        model: str,
        threshold: float = 0.5,
        note: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.layers, self.hidden, self.model = tuple(layers), hidden, model
        self.threshold, self.note = threshold, dict(note or {})
        read = len(self.layers) * hidden
        self.mean: Tensor
        self.spread: Tensor
        self.scale: Tensor
        self.offset: Tensor
        self.register_buffer("mean", torch.zeros(read))
        self.register_buffer("spread", torch.ones(read))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("offset", torch.zeros(()))
        self.inner = nn.Linear(read, width)
        self.last = nn.Linear(3 * width, 1)

    def forward(self, tokens: Tensor, lengths: Tensor, dropout: float = 0.0) -> Tensor:
        """Return uncalibrated log odds (N,) that sentences name a task.

        Args:
            tokens: (sum of lengths, len(layers) * hidden), one sentence after the other.
            lengths: (N,) tokens of each.
            dropout: of the states' channels and of what is found, while it is fitted.
        """
        z = nn.functional.dropout((tokens.float() - self.mean) / self.spread, dropout)
        found = nn.functional.gelu(self.inner(z))
        of = torch.repeat_interleave(torch.arange(len(lengths), device=z.device), lengths)
        shape = (len(lengths), found.shape[1])
        index = of.unsqueeze(-1).expand_as(found)
        most = found.new_full(shape, -torch.inf).scatter_reduce(0, index, found, "amax")
        mean = found.new_zeros(shape).index_add(0, of, found) / lengths[:, None]
        read = torch.cat([most, mean, found[lengths.cumsum(0) - 1]], -1)
        return self.last(nn.functional.dropout(read, dropout))[:, 0]

    @torch.no_grad()
    def probability(self, states: Sequence[Tensor]) -> Tensor:
        """Return calibrated probabilities (N,) of sentences' states (T, len(layers) * hidden)."""
        return torch.sigmoid(self.scale * self(*joined(states)) + self.offset)

    def judge(self, states: Sequence[Tensor], layers: Sequence[int]) -> list[Judgement]:
        """Judge sentences by their states.

        Args:
            states: of each (T, len(layers) * hidden).
            layers: those after which they were read, at least the head's own.
        """
        found = self.probability([self._of_mine(s, layers) for s in states]).tolist()
        return [Judgement(p, p < self.threshold) for p in found]

    def _of_mine(self, states: Tensor, layers: Sequence[int]) -> Tensor:
        at = [list(layers).index(layer) for layer in self.layers]
        return torch.cat([states[:, i * self.hidden : (i + 1) * self.hidden] for i in at], -1)

    def check(self, checkpoint: Checkpoint, layers: Sequence[int]) -> None:
        """Raise CheckpointError unless this is of a model and of states that an engine has."""
        if self.model != checkpoint.model_id:
            raise CheckpointError(
                f"understanding: fitted to model {self.model}, this is {checkpoint.model_id}"
            )
        missing = [layer for layer in self.layers if layer not in layers]
        if missing:
            raise CheckpointError(
                f"understanding: reads the states after layers {list(self.layers)}, this read-out "
                f"has those after {list(layers)}; understanding={OFF} does without"
            )

    def save(self, path: Path) -> None:
        """Write the head, first under another name."""
        about = {
            "layers": list(self.layers),
            "hidden": self.hidden,
            "width": self.inner.out_features,
            "model": self.model,
            "threshold": self.threshold,
            "note": self.note,
        }
        save_tensors(path, self.state_dict(), {"understanding": json.dumps(about, sort_keys=True)})

    @classmethod
    def load(cls, path: Path | str) -> Understanding:
        """Read what `save` wrote.

        Raises:
            BadFile: not such a file, or not finite; one line names it.
        """
        with told_as(CheckpointError, "understanding"):
            state, metadata = load_tensors(path)
            where = f"{path}: its account of the head"
            about = as_record(_About, parse_object(metadata.get("understanding", ""), where), where)
            inner = state.get("inner.weight")
            # Compared before anything of that size is made.
            if inner is None or inner.shape != (about.width, len(about.layers) * about.hidden):
                raise CheckpointError(f"{path}: its tensors and its account do not fit each other")
            check_kinds(state, str(path))
            head = cls(**{name: getattr(about, name) for name in _About.__slots__})
            load_strictly(head, {name: tensor.float() for name, tensor in state.items()}, str(path))
        return head.eval().requires_grad_(False)


@dataclass(frozen=True, slots=True)
class PlainSentences:
    """The plain sentences of a base model, and which of them says that there is nothing to do.

    Attributes:
        codes: (N, dim), what their latents are to be.
        nothing: row of "do nothing".
        unit: squared distance between neighbours; training's own temperature.
        model: `Checkpoint.model_id` of the base model.
        threshold: instructions less probable than this to name something are refused.
        sentences: the N sentences.
    """

    codes: Tensor
    nothing: int
    unit: float
    model: str
    sentences: tuple[str, ...]
    threshold: float = 0.5

    def judge(self, latents: Tensor) -> list[Judgement]:
        """Judge instructions by their latents (B, n, dim): as probable as the loss had it."""
        squared = torch.cdist(latents.float().mean(1), self.codes).square() / self.unit
        sure = 1.0 - (-2.0 * squared).softmax(-1)[:, self.nothing]
        found = sure.clamp_max(CERTAIN).tolist()
        return [Judgement(p, p < self.threshold) for p in found]

    def check(self, model_id: str, dim: int) -> None:
        """Raise CheckpointError unless this is of a model, and of latents of that width."""
        if self.model != model_id:
            raise CheckpointError(
                f"understanding: fitted to model {self.model}, this is {model_id}"
            )
        if self.codes.shape[1] != dim:
            raise CheckpointError(
                f"understanding: of latents of {self.codes.shape[1]} numbers, these have {dim}"
            )

    def save(self, path: Path) -> None:
        """Write the sentences, first under another name."""
        about = {n: getattr(self, n) for n in _AboutPlain.__slots__}
        save_tensors(
            path, {"codes": self.codes.contiguous()}, {PLAIN: json.dumps(about, sort_keys=True)}
        )

    @classmethod
    def load(cls, path: Path | str) -> PlainSentences:
        """Read what `save` wrote.

        Raises:
            BadFile: not such a file, or not finite; one line names it.
        """
        with told_as(CheckpointError, "understanding"):
            state, metadata = load_tensors(path, ("codes",))
            where = f"{path}: its account of the sentences"
            about = as_record(_AboutPlain, parse_object(metadata.get(PLAIN, ""), where), where)
            check_kinds(state, str(path))
            codes = state["codes"].float()
            if (
                codes.ndim != 2
                or len(codes) != len(about.sentences)
                or not 0 <= about.nothing < len(codes)
                or not about.unit > 0
            ):
                raise CheckpointError(f"{path}: its tensors and its account do not fit each other")
        return cls(codes, **{name: getattr(about, name) for name in _AboutPlain.__slots__})


PLAIN = "plain_sentences"


@dataclass(frozen=True, slots=True)
class _AboutPlain:
    """What a file says of its plain sentences."""

    nothing: int
    unit: float
    model: str
    sentences: tuple[str, ...]
    threshold: float


@dataclass(frozen=True, slots=True)
class _About:
    """What a file says of its head."""

    layers: tuple[int, ...]
    hidden: int
    width: int
    model: str
    threshold: float
    note: dict[str, Any]


def joined(states: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return sentences' states (T, F) one after the other, and their lengths (N,)."""
    lengths = torch.tensor([len(s) for s in states], device=states[0].device)
    return torch.cat(list(states)), lengths


def beside(
    weights: Path | str | None, wanted: Path | str | bool | None
) -> Understanding | PlainSentences | None:
    """Return what an engine is to judge by.

    Args:
        weights: the file that the engine's other weights come from; None for none.
        wanted: a file; `OFF`, which YAML and so a command line reads as False; or None for the
            one beside `weights`, where there is one.

    Raises:
        CheckpointError: the file cannot be used.
    """
    if wanted is None and weights is not None:
        found = Path(weights).with_name(FILE)
        return _loaded(found) if found.is_file() else None
    return None if wanted in (None, OFF, False) else _loaded(Path(str(wanted)).expanduser())


def _loaded(path: Path) -> Understanding | PlainSentences:
    with told_as(CheckpointError, "understanding"):
        _, metadata = tensor_header(path)
    return PlainSentences.load(path) if PLAIN in metadata else Understanding.load(path)
