"""What a frozen language model makes of a bare sentence: the condition of a policy without System 2.

3D Diffuser Actor gives its policy a frozen CLIP's text tokens through a linear layer. Here
System 2's own language model takes that place: the sentence alone, no image, no chat, no
`<ACT>`; the mean of its tokens after some of the middle layers, and, where `words` asks for
them, the tokens themselves. A policy trained on it can be told in words with no System 2
running, and the adapter that reads it is where System 2's latent comes in later: same width, same tokens.

A language model's states have a few huge channels, so each is brought to its own mean and
spread over some sentences first, and turned to the `dim` directions in which these differ
most. That is the `TextCode`: fixed, fitted once, kept beside the policy as `text.safetensors`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from openhelix.runtime.core.files import (
    BadFile,
    as_record,
    check_kinds,
    load_tensors,
    parse_object,
    save_tensors,
    told_as,
)
from openhelix.runtime.core.interfaces import LatentSpec
from openhelix.system2.latents import LATENT_DIM, digest
from openhelix.system2.model import BUILTIN, Checkpoint, load_llava, load_tokenizer, open_checkpoint
from openhelix.system2.prompt import BadInstruction, clean_instruction

KIND = "text"  # how the `kind` of such a latent begins
FILE = "text.safetensors"  # of a code, in a policy's folder
LAYERS = (1, 8)
MOST_TOKENS = 96
LEAST_SPREAD = 1e-6


class TextError(BadFile):
    """Sentences or a code that cannot be used; the message says which."""


@dataclass(frozen=True, slots=True)
class TextCode:
    """From a language model's states to a policy's latent.

    Attributes:
        layers: after which the states are read, ascending; their means stand side by side.
        words: how many of the sentence's tokens follow the mean, each a token of its own.
        model: `Checkpoint.model_id` of the language model.
        mean, spread: (len(layers) * hidden,) of the sentences that it was fitted to.
        basis: (dim, len(layers) * hidden), orthonormal rows.
        reading: (width, dim) what the policy multiplies a code with, once the code is normalised:
            sentences that this brings together are one to the policy. None before one is trained.
    """

    layers: tuple[int, ...]
    words: int
    model: str
    mean: Tensor
    spread: Tensor
    basis: Tensor
    reading: Tensor | None = None

    @staticmethod
    def fit(
        states: Tensor, layers: Sequence[int], words: int, model: str, dim: int = LATENT_DIM
    ) -> TextCode:
        """Return the code of some sentences' mean states (S, len(layers) * hidden).

        Raises:
            TextError: too few sentences to say what differs.
        """
        if len(states) < 2:
            raise TextError(f"sentences: {len(states)}, at least 2 are needed to fit a code")
        x = states.double()
        mean, spread = x.mean(0), x.std(0).clamp_min(LEAST_SPREAD)
        z = (x - mean) / spread
        _, vectors = torch.linalg.eigh(z.T @ z)  # ascending
        basis = vectors.T.flip(0)[:dim]
        # A direction's sign is nobody's business, but it must be the same on every machine.
        top = basis.abs().argmax(1, keepdim=True)
        basis = basis * basis.gather(1, top).sign()
        basis = pad(basis, (0, 0, 0, dim - len(basis)))
        return TextCode(
            tuple(layers), words, model, mean.float(), spread.float(), basis.float().contiguous()
        )

    def __call__(self, states: Tensor) -> Tensor:
        """Return (..., dim) of states (..., len(layers) * hidden)."""
        return ((states.float() - self.mean) / self.spread) @ self.basis.T

    @property
    def spec(self) -> LatentSpec:
        """What a policy is told by this code."""
        kind = f"{KIND}@{'+'.join(map(str, self.layers))}"
        return LatentSpec(
            kind, 1 + self.words, len(self.basis), f"{self.model}-{digest(self._tensors())}"
        )

    def _tensors(self) -> dict[str, Tensor]:
        return {"mean": self.mean, "spread": self.spread, "basis": self.basis}

    def save(self, path: Path, dtype: torch.dtype = torch.float32) -> None:
        """Write the code, first under another name; in half precision it is another code."""
        about = {"layers": list(self.layers), "words": self.words, "model": self.model}
        read = {} if self.reading is None else {"reading": self.reading.contiguous()}
        tensors = {k: v.to(dtype) for k, v in (self._tensors() | read).items()}
        save_tensors(path, tensors, {"text": json.dumps(about)})

    @staticmethod
    def load(path: Path | str) -> TextCode:
        """Read what `save` wrote.

        Raises:
            BadFile: not such a file; one line names it.
        """
        with told_as(TextError, "text"):
            tensors, metadata = load_tensors(path, ("mean", "spread", "basis"), ("reading",))
            check_kinds(tensors, str(path))
            where = f"{path}: its account of the code"
            about = as_record(_About, parse_object(metadata.get("text", ""), where), where)
            width, reading = tensors["mean"].numel(), tensors.get("reading")
            if (
                tensors["mean"].shape != (width,)
                or tensors["spread"].shape != (width,)
                or tensors["basis"].shape[1:] != (width,)
                or width % max(1, len(about.layers))
                or not 0 <= about.words <= MOST_TOKENS
                or (reading is not None and reading.shape[1:] != tensors["basis"].shape[:1])
            ):
                raise TextError(f"{path}: its tensors and its account do not fit each other")
        single = {name: tensor.float() for name, tensor in tensors.items()}  # some are kept in half
        return TextCode(about.layers, about.words, about.model, **single)


@dataclass(frozen=True, slots=True)
class _About:
    """What a file says of its code."""

    layers: tuple[int, ...]
    words: int
    model: str


def sentence_ids(
    tokenizer: Any, sentence: str, special: Sequence[str], most: int = MOST_TOKENS
) -> list[int]:
    """Return the tokens of a bare sentence.

    Args:
        tokenizer: of the language model.
        sentence: an instruction.
        special: words that it must not hold, see `prompt.clean_instruction`.
        most: tokens that are allowed.

    Raises:
        BadInstruction: see `prompt.clean_instruction`; or too long.
    """
    clean = clean_instruction(sentence, special)
    found: list[int] = tokenizer(clean, add_special_tokens=False)["input_ids"]
    if len(found) > most:
        raise BadInstruction(f"instruction: {len(found)} tokens, at most {most} are allowed")
    return found


class TextReader:
    """The language model up to the last layer that is read, in float32.

    Args:
        model: "laptop", "smollm2", a LLaVA's folder, or a hub name.
        layers: after which to read; 0 is the word's embedding.
        device: any torch device.
        most: tokens that a sentence may have.

    Raises:
        TextError: the model has no such layer.
    """

    def __init__(
        self,
        model: str = "laptop",
        layers: Sequence[int] = LAYERS,
        device: str = "cpu",
        most: int = MOST_TOKENS,
    ) -> None:
        self.checkpoint: Checkpoint = open_checkpoint(model)
        self.layers, self._most = tuple(layers), most
        if not self.layers or sorted(set(self.layers)) != list(self.layers):
            raise TextError(f"layers: {list(layers)}, want ascending numbers")
        if not 0 <= self.layers[0] <= self.layers[-1] <= self.checkpoint.layers:
            raise TextError(f"layers: {list(layers)} is not within 0..{self.checkpoint.layers}")
        whole = load_llava(self.checkpoint.path, torch.float32)
        self._model: Any = whole.model.language_model.to(device).eval().requires_grad_(False)
        self._model.layers = self._model.layers[: self.layers[-1]]
        self._tokenizer = load_tokenizer(self.checkpoint.path)
        self._special = tuple(str(token) for token in self._tokenizer.get_added_vocab())
        self._device = torch.device(device)
        self._seen: dict[int, Tensor] = {}
        for index, layer in enumerate(self._model.layers, 1):
            if index in self.layers:
                layer.register_forward_hook(self._keep(index))

    def _keep(self, index: int) -> Any:
        def hook(module: nn.Module, given: Any, made: Any) -> None:
            self._seen[index] = made[0] if isinstance(made, tuple) else made

        return hook

    def ids(self, sentence: str) -> list[int]:
        """Return a sentence's tokens.

        Raises:
            BadInstruction: see `prompt.clean_instruction`; or too long.
        """
        return sentence_ids(self._tokenizer, sentence, self._special, self._most)

    @torch.inference_mode()
    def states(self, sentences: Sequence[str]) -> list[Tensor]:
        """Return each sentence's states (T, len(layers) * hidden)."""
        rows = [self.ids(sentence) for sentence in sentences]
        longest = max(map(len, rows))
        # Filled up on the right: with causal attention no real token sees it.
        padded = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        embeddings = self._model.embed_tokens(padded.to(self._device))
        self._seen = {0: embeddings}
        if self.layers[-1] > 0:
            self._model(inputs_embeds=embeddings, use_cache=False)
        whole = torch.cat([self._seen[layer] for layer in self.layers], -1).cpu()
        self._seen = {}
        return [states[: len(row)].clone() for states, row in zip(whole, rows, strict=True)]

    def means(self, sentences: Sequence[str], batch: int = 64) -> Tensor:
        """Return the means over tokens (S, len(layers) * hidden)."""
        found = []
        for start in range(0, len(sentences), batch):
            found += [s.mean(0) for s in self.states(sentences[start : start + batch])]
        return torch.stack(found)

    def encode(self, code: TextCode, sentences: Sequence[str], batch: int = 64) -> Tensor:
        """Return latents (S, 1 + code.words, dim); words that are not there are zero.

        Raises:
            TextError: the code was fitted to another model or other layers.
        """
        if (code.model, code.layers) != (self.checkpoint.model_id, self.layers):
            raise TextError(
                f"text: the code is for layers {code.layers} of {code.model}, this is "
                f"{self.layers} of {self.checkpoint.model_id}"
            )
        found = []
        for start in range(0, len(sentences), batch):
            for states in self.states(sentences[start : start + batch]):
                tokens = code(torch.cat((states.mean(0, keepdim=True), states[: code.words])))
                found.append(pad(tokens, (0, 0, 0, 1 + code.words - len(tokens))))
        return torch.stack(found)


def builtin_of(code: TextCode) -> str:
    """Return which of the project's own models a code was fitted to.

    Raises:
        TextError: to neither.
    """
    for name in reversed(BUILTIN):  # most are fitted to the model as its package delivers it
        if open_checkpoint(name).model_id == code.model:
            return name
    raise TextError(
        f"text: the code is for {code.model}, which is none of {', '.join(BUILTIN)}; name its model"
    )


def fitted_code(
    reader: TextReader, sentences: Sequence[str], words: int = 0, dim: int = LATENT_DIM
) -> TextCode:
    """Return the code of some sentences, for a reader's model and layers."""
    model = reader.checkpoint.model_id
    return TextCode.fit(reader.means(sentences), reader.layers, words, model, dim)


def text_id(sentences: Sequence[str], *about: Any) -> str:
    """Return sixteen digits that change with any sentence and anything else named."""
    made = json.dumps([list(sentences), [str(a) for a in about]])
    return hashlib.sha256(made.encode()).hexdigest()[:16]
