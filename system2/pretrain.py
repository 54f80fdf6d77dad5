"""Vision pretraining: a small tower and projector learn to show a frozen language model a scene.

Training a tower through a frozen language model on questions alone costs the language model
forwards and backwards for every answer, which two CPU cores cannot pay. Captions give the
same at a hundredth of the cost: caption word i is what image token i should say, so tower
and projector are trained to put the *input embeddings* of the caption's words where the
language model will read them. The language model then reads the image as it reads text, and
answers questions it was never trained on here. A linear read-out of the scene's numbers,
trained beside it, keeps positions in the tokens that words round off.

`dataset folder`: `images.npy` (N, S, S, 3) u8 at the tower's size and `records.jsonl` with
`row`, `group`, `caption`, `questions` [[kind, question, answer, choices]], `numbers`.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from openhelix.runtime.core.files import CheckpointError
from openhelix.system2.model import (
    Checkpoint,
    VisionShape,
    build,
    load_llava,
    load_processor,
    load_tokenizer,
    load_vision,
    open_checkpoint,
    vision_state,
)
from openhelix.system2.train import Prefix, compute_prefix, states_after

# ------------------------------------------------------------------------------------------------
# Soft captions: the wording in which a frozen language model reads an image best.
#
# A language model of 135 million parameters answers questions about a caption in plain words
# little better than by guessing. Its input embeddings need not be words, though. Here every
# place of the caption and every word that may stand there gets an embedding of its own, which
# starts as the word's and is tuned, through the frozen language model, until questions about
# captions are answered. A hundred vectors are learned, without any image; the tower is then
# trained to write in this wording (`pretrain`).


@dataclass(frozen=True, slots=True)
class WordingConfig:
    """Numbers of one run: captions a step, questions a caption, steps, Adam's rate.

    `full_weight` is that of the cross-entropy over the whole vocabulary, beside the one
    among the question's choices.
    """

    steps: int = 300
    captions: int = 4
    questions: int = 6
    lr: float = 4e-3
    full_weight: float = 0.1
    save_every: int = 25
    seed: int = 0


class SoftCaption(nn.Module):
    """Embeddings of caption words by place.

    Args:
        table: (V, hidden) input embeddings of the words that captions use.
        candidates: (n_image, V) bool: which words stand at each place.
    """

    def __init__(self, table: Tensor, candidates: Tensor) -> None:
        super().__init__()
        place, word = candidates.nonzero(as_tuple=True)
        slots = torch.full(candidates.shape, -1, dtype=torch.long)
        slots[place, word] = torch.arange(len(place))
        self.slots: Tensor
        self.register_buffer("slots", slots)  # (n_image, V) row of `rows`, -1 for none
        self.rows = nn.Parameter(table[word].clone())  # (candidates, hidden)

    def forward(self, index: Tensor) -> Tensor:
        """Word indices (B, n_image) to embeddings (B, n_image, hidden)."""
        places = torch.arange(index.shape[1], device=index.device)
        return self.rows[self.slots[places, index]]

    def dense(self) -> Tensor:
        """(n_image, V, hidden); zeros where a word never stands."""
        filled = self.slots.clamp(min=0)
        return self.rows[filled] * (self.slots >= 0).unsqueeze(-1)


def pack(prefix: Tensor, questions: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Put one prefix and several questions about it into one sequence.

    Each question sees the prefix and itself, as if it had followed the prefix alone.

    Args:
        prefix: (T, hidden).
        questions: each (t_i, hidden).

    Returns:
        embeddings (N, hidden), mask (N, N) bool, positions (N,), ends (len(questions),).
    """
    start = prefix.shape[0]
    lengths = [len(q) for q in questions]
    owner = torch.repeat_interleave(torch.arange(len(questions)), torch.tensor(lengths))
    owner = torch.cat([torch.full((start,), -1), owner])
    within = torch.cat([torch.arange(n) for n in lengths])
    positions = torch.cat([torch.arange(start), start + within])
    same = (owner[:, None] == owner[None, :]) | (owner[None, :] == -1)
    mask = same & torch.ones(len(owner), len(owner), dtype=torch.bool).tril()
    ends = start + torch.tensor(lengths).cumsum(0) - 1
    return torch.cat([prefix, *questions]), mask, positions, ends


class WordingTrainer:
    """Tunes a `SoftCaption` through a frozen LLaVA.

    Args:
        model: `LlavaForConditionalGeneration`, frozen; bfloat16 does.
        checkpoint: its description.
        soft: what is tuned.
    """

    def __init__(self, model: Any, checkpoint: Checkpoint, soft: SoftCaption) -> None:
        self._model, self._soft = model.requires_grad_(False), soft
        builder = checkpoint.prompts(1)
        self._template = builder.template
        self._ids: Callable[[str], list[int]] = lambda text: builder.tokenize(text)[0]
        self._head = self._embed(self._template.head)

    def _embed(self, text: str) -> Tensor:
        return self._model.get_input_embeddings()(torch.tensor(self._ids(text)))

    def loss(
        self, index: Tensor, asked: Sequence[Sequence[Any]], full_weight: float
    ) -> tuple[Tensor, float]:
        """Return the loss on one caption's questions, and the fraction answered rightly.

        Args:
            index: (n_image,) word indices.
            asked: questions of a record.
            full_weight: see `WordingConfig`.
        """
        soft = self._soft(index[None])[0]
        template = self._template
        texts = [f"{template.body}{q}{template.tail}{opening}" for _, q, opening, _, _ in asked]
        prefix = torch.cat([self._head, soft.to(self._head.dtype)])
        rows, mask, positions, ends = pack(prefix, [self._embed(text) for text in texts])
        states = self._model.model.language_model(
            inputs_embeds=rows[None],
            attention_mask=mask[None, None],
            position_ids=positions[None],
            use_cache=False,
        ).last_hidden_state[0, ends]
        logits = self._model.lm_head(states).float()
        terms, right = [], 0
        for row, (_, _, _, wanted, choices) in zip(logits, asked, strict=True):
            first = [self._ids(" " + choice)[0] for choice in choices]
            answer = torch.tensor(choices.index(wanted))
            among = F.cross_entropy(row[first], answer)
            whole = F.cross_entropy(row, torch.tensor(first[int(answer)]))
            terms.append(among + full_weight * whole)
            right += int(row[first].argmax() == answer)
        return torch.stack(terms).mean(), right / len(asked)

    def train(
        self,
        words: Tensor,
        records: Sequence[dict[str, Any]],
        config: WordingConfig,
        out: Path,
        tell: Callable[[dict[str, float]], None] = lambda _: None,
    ) -> None:
        """Tune in place; resumes from `out/wording.safetensors`.

        Args:
            words: (N, n_image) word indices of the captions.
            records: N records with `questions`.
            config: numbers of the run.
            out: where it is saved.
            tell: hears loss and accuracy of each step.
        """
        out.mkdir(parents=True, exist_ok=True)
        file, first = out / "wording.safetensors", 0
        optimiser = torch.optim.Adam(self._soft.parameters(), lr=config.lr, betas=(0.9, 0.98))
        if file.is_file():
            state = load_file(file)
            first = int(state["step"])
            with torch.no_grad():
                self._soft.rows.copy_(state["rows"])
            moments = {
                "step": state["step"].float(),
                "exp_avg": state["m"],
                "exp_avg_sq": state["v"],
            }
            optimiser.state[self._soft.rows] = moments
        for step in range(first, config.steps):
            started = time.monotonic()
            generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
            for group in optimiser.param_groups:
                group["lr"] = (
                    config.lr * min(1.0, (step + 1) / 10) * (1 - 0.9 * step / config.steps)
                )
            losses, rights = [], []
            for row in torch.randint(
                len(records), (config.captions,), generator=generator
            ).tolist():
                every = records[row]["questions"]
                some = torch.randperm(len(every), generator=generator)[: config.questions]
                loss, right = self.loss(words[row], [every[i] for i in some], config.full_weight)
                (loss / config.captions).backward()
                losses.append(loss.item())
                rights.append(right)
            optimiser.step()
            optimiser.zero_grad()
            row = {"step": step + 1, "loss": sum(losses) / len(losses)}
            row |= {"right": sum(rights) / len(rights), "took_s": time.monotonic() - started}
            tell(row)
            with (out / "wording.jsonl").open("a") as log:
                log.write(json.dumps(row) + "\n")
            if (step + 1) % config.save_every == 0 or step + 1 == config.steps:
                moments = optimiser.state[self._soft.rows]
                state = {"rows": self._soft.rows.detach(), "step": torch.tensor(step + 1)}
                state |= {"m": moments["exp_avg"], "v": moments["exp_avg_sq"]}
                save_file(state, out / "wording.part")
                (out / "wording.part").rename(file)


# ------------------------------------------------------------------------------------------------
# How much a frozen language model understands of an image: questions with short answers.
#
# The answering sentence is begun ("The drawer is") and its next word chosen among the
# question's choices by probability, so a model that sees nothing scores what guessing scores. Three controls stand beside the image:
# none at all, another picture's, and the caption as text, which is the most that this language
# model could read out of a perfect tower.


Source = Literal["image", "none", "other", "caption"]


@dataclass(frozen=True, slots=True)
class Score:
    """Right answers and questions asked."""

    right: int
    asked: int

    @property
    def accuracy(self) -> float:
        return self.right / max(1, self.asked)


class Reader:
    """Asks a LLaVA's language model about images.

    Args:
        model: transformers' `LlavaForConditionalGeneration`.
        checkpoint: its description.
    """

    def __init__(self, model: Any, checkpoint: Checkpoint) -> None:
        self._model, self._checkpoint = model, checkpoint
        builder = checkpoint.prompts(1)
        self._template, self._bos = builder.template, builder.bos
        self._ids: Callable[[str], list[int]] = lambda text: builder.tokenize(text)[0]

    @torch.inference_mode()
    def answer(self, shown: Tensor | str | None, questions: Sequence[Sequence[Any]]) -> list[int]:
        """Return the index of the chosen answer for each question of a record.

        Args:
            shown: projected image tokens (n_image, hidden), a text in its place, or None.
            questions: about what is shown.
        """
        prefix = self._prefix(shown)
        body = "" if shown is None else self._template.body
        tail = self._template.tail
        rows = [self._ids(f"{body}{q}{tail}{opening}") for _, q, opening, _, _ in questions]
        longest = max(map(len, rows))
        padded = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        table = self._model.get_input_embeddings()
        states = states_after(
            self._model.model.language_model,
            prefix.rows(torch.zeros(len(rows), dtype=torch.long)),
            table(padded),
        )
        ends = torch.tensor([len(row) - 1 for row in rows])
        logits = self._model.lm_head(states[torch.arange(len(rows)), ends]).float()
        chosen = []
        for row, (*_, choices) in enumerate(questions):
            first = [self._ids(" " + choice)[0] for choice in choices]
            chosen.append(int(logits[row, first].argmax()))
        return chosen

    def _prefix(self, shown: Tensor | str | None) -> Prefix:
        head = [] if self._bos is None else [self._bos]
        head += self._ids(self._template.head)
        if isinstance(shown, str):
            head += self._ids(shown)
        embeddings = self._model.get_input_embeddings()(torch.tensor([head]))
        if isinstance(shown, Tensor):
            embeddings = torch.cat([embeddings, shown[None].to(embeddings.dtype)], dim=1)
        lengths = torch.tensor([embeddings.shape[1]])
        return compute_prefix(self._model.model.language_model, embeddings, lengths)

    def accuracy(
        self,
        records: Sequence[dict[str, Any]],
        source: Source,
        tokens: Callable[[int], Tensor],
    ) -> dict[str, Score]:
        """Ask every question of every record; return the scores by kind and under "all".

        Args:
            records: with `row`, `caption` and `questions`.
            source: what is shown.
            tokens: a row's projected image tokens.
        """
        right: dict[str, int] = defaultdict(int)
        asked: dict[str, int] = defaultdict(int)
        for index, record in enumerate(records):
            shown: Tensor | str | None = None
            if source == "caption":
                shown = record["caption"]
            elif source != "none":
                # "other": the picture half the set away, which has another state.
                at = index if source == "image" else (index + len(records) // 2) % len(records)
                shown = tokens(records[at]["row"])
            asks = record["questions"]
            chosen = self.answer(shown, asks)
            for (kind, _, _, wanted, choices), got in zip(asks, chosen, strict=True):
                for name in (kind, "all"):
                    asked[name] += 1
                    right[name] += choices[got] == wanted
        return {name: Score(right[name], asked[name]) for name in sorted(asked)}


@dataclass(frozen=True, slots=True)
class PretrainConfig:
    """Numbers of one pretraining run.

    Attributes:
        steps, batch: optimiser steps and pictures a step.
        lr, weight_decay, warmup: AdamW; cosine to a twentieth of `lr`.
        temperature: of the cosine between image token and candidate words.
        words_weight, embed_weight, numbers_weight: of the three losses.
        jitter: strength of brightness, contrast and shift augmentation; 0 for none.
        bf16: autocast; right where the CPU multiplies bfloat16 natively.
        save_every: steps between checkpoints.
    """

    steps: int = 4000
    batch: int = 32
    lr: float = 1e-3
    weight_decay: float = 0.05
    warmup: int = 200
    temperature: float = 0.07
    words_weight: float = 1.0
    embed_weight: float = 1.0
    numbers_weight: float = 1.0
    jitter: float = 1.0
    bf16: bool = False
    save_every: int = 200
    seed: int = 0


class Captions:
    """A dataset folder in memory, with captions as word ids.

    Args:
        folder: see the module's text.
        tokenize: words to ids.
        n_image: image tokens; captions are filled up to it with `filler`.

    Raises:
        CheckpointError: captions of unequal length, or longer than `n_image`.
    """

    def __init__(self, folder: Path, tokenize: Callable[[str], list[int]], n_image: int) -> None:
        self.images = np.load(folder / "images.npy", mmap_mode="r")
        with (folder / "records.jsonl").open() as lines:
            self.records = sorted((json.loads(line) for line in lines), key=lambda r: r["row"])
        filler = tokenize("\n")[0]
        ids = [tokenize(record["caption"]) for record in self.records]
        lengths = {len(row) for row in ids}
        if len(lengths) != 1 or max(lengths) > n_image:
            raise CheckpointError(
                f"captions: {sorted(lengths)} words, want one length of at most {n_image}"
            )
        self.length = max(lengths)
        self.words = torch.tensor([row + [filler] * (n_image - self.length) for row in ids])
        self.numbers = torch.tensor([record["numbers"] for record in self.records])

    def __len__(self) -> int:
        return len(self.records)

    def pixels(self, rows: Any) -> Tensor:
        """Return (B, 3, S, S) in [0, 1]."""
        return torch.from_numpy(self.images[rows].astype(np.float32)).permute(0, 3, 1, 2) / 255


class VisionLearner(nn.Module):
    """Tower and projector of a LLaVA, what they are to write, and the read-out of numbers.

    Args:
        model: transformers' `LlavaForConditionalGeneration`.
        processor: its image processor.
        data: captions that the words are taken from.
        wording: tuned embeddings (n_image, V, hidden) of `openhelix.system2.pretrain`; None for the
            words' own.
    """

    vocabulary: Tensor  # (V,) ids of the words that captions use, ascending
    table: Tensor  # (n_image, V, hidden) what each word's embedding is to be at each place
    candidates: Tensor  # (n_image, V) bool: which words stand at each place
    mean: Tensor
    std: Tensor
    shift: Tensor
    scale: Tensor

    def __init__(
        self, model: Any, processor: Any, data: Captions, wording: Tensor | None = None
    ) -> None:
        super().__init__()
        self.tower = model.model.vision_tower
        self.projector = model.model.multi_modal_projector
        words = model.get_input_embeddings().weight.detach().float()
        vocabulary = data.words.unique()
        n_image, hidden = data.words.shape[1], words.shape[1]
        index = torch.searchsorted(vocabulary, data.words)
        candidates = torch.zeros(n_image, len(vocabulary), dtype=torch.bool)
        for place in range(n_image):
            candidates[place, index[:, place].unique()] = True
        own = words[vocabulary].expand(n_image, -1, -1)
        buffers = {
            "vocabulary": vocabulary,
            "candidates": candidates,
            "table": own if wording is None else wording,
            "mean": torch.tensor(processor.image_mean).view(1, 3, 1, 1),
            "std": torch.tensor(processor.image_std).view(1, 3, 1, 1),
            "shift": data.numbers.mean(dim=0),
            "scale": data.numbers.std(dim=0) + 1e-3,
        }
        for name, value in buffers.items():
            self.register_buffer(name, value, persistent=False)
        self.read = nn.Linear(n_image * hidden, data.numbers.shape[1])

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, S, S) in [0, 1] to projected image tokens (B, n_image, hidden)."""
        states = self.tower((pixels - self.mean) / self.std).last_hidden_state
        return self.projector(states[:, 1:])  # without the class token

    def word_scores(self, tokens: Tensor, temperature: float) -> Tensor:
        """Cosine scores (B, n_image, V); words that never stand at a place get -inf."""
        words = F.normalize(self.table, dim=-1)
        scores = torch.einsum("bph,pvh->bpv", F.normalize(tokens.float(), dim=-1), words)
        scores = scores / temperature
        return scores.masked_fill(~self.candidates, float("-inf"))

    def losses(self, tokens: Tensor, words: Tensor, numbers: Tensor, t: float) -> dict[str, Tensor]:
        """Return the three losses as tensors."""
        index = torch.searchsorted(self.vocabulary, words)
        open_places = self.candidates.sum(dim=1) > 1
        scores = self.word_scores(tokens, t)
        target = self.table[torch.arange(index.shape[1]), index]
        wanted = (numbers - self.shift) / self.scale
        return {
            "words": F.cross_entropy(
                scores[:, open_places].flatten(0, 1), index[:, open_places].flatten()
            ),
            "embed": F.mse_loss(tokens.float(), target) / target.var(),
            "numbers": F.smooth_l1_loss(self.read(tokens.float().flatten(1)), wanted),
        }


def augment(
    pixels: Tensor,
    strength: float,
    generator: torch.Generator,
    rows: slice | None = None,
    batch: int | None = None,
) -> Tensor:
    """Brightness, contrast, noise and a shift of up to 2 pixels; (B, 3, S, S) in [0, 1].

    Pixels of some `rows` of a `batch` are varied as they are when the whole of it is.
    """
    if strength == 0:
        return pixels
    batch = len(pixels) if batch is None else batch

    def draw(*shape: int) -> Tensor:
        drawn = torch.rand(*shape, generator=generator) * 2 - 1
        return drawn if rows is None else drawn[rows]

    gain = 1 + 0.2 * strength * draw(batch, 1, 1, 1)
    tint = 1 + 0.05 * strength * draw(batch, 3, 1, 1)
    pixels = (pixels * gain * tint + 0.08 * strength * draw(batch, 1, 1, 1)).clamp(0, 1)
    dx, dy = (int(v) for v in torch.randint(-2, 3, (2,), generator=generator))
    return torch.roll(F.pad(pixels, (2, 2, 2, 2), mode="replicate"), (dy, dx), (2, 3))[
        ..., 2:-2, 2:-2
    ]


def train(
    model: Any,
    processor: Any,
    data: Captions,
    config: PretrainConfig,
    out: Path,
    tell: Callable[[dict[str, float]], None] = lambda _: None,
    wording: Tensor | None = None,
    begin_from: Path | None = None,
) -> VisionLearner:
    """Train tower and projector of `model` in place; resumes from `out` where it stopped.

    `begin_from` is the folder of an earlier run whose weights this one starts with. Writes `vision.safetensors` (what `model.build` takes), `state.safetensors` and `log.jsonl`.
    """
    torch.manual_seed(config.seed)
    learner = VisionLearner(model, processor, data, wording)
    learner.requires_grad_(True)
    if begin_from is not None:
        _load_weights(learner, load_file(begin_from / "state.safetensors"))
    decay = [p for p in learner.parameters() if p.ndim > 1]
    rest = [p for p in learner.parameters() if p.ndim <= 1]
    groups = [
        {"params": decay, "weight_decay": config.weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.98))
    out.mkdir(parents=True, exist_ok=True)
    first = _resume(learner, optimiser, out)
    started = time.monotonic()
    for step in range(first, config.steps):
        # One stream of draws per step: a resumed run sees what an unbroken one would have.
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        rows = torch.randint(len(data), (config.batch,), generator=generator)
        pixels = augment(data.pixels(rows.numpy()), config.jitter, generator)
        for group in optimiser.param_groups:
            group["lr"] = config.lr * _schedule(step, config)
        with torch.autocast("cpu", torch.bfloat16, enabled=config.bf16):
            tokens = learner(pixels)
        losses = learner.losses(tokens, data.words[rows], data.numbers[rows], config.temperature)
        loss = sum(getattr(config, f"{name}_weight") * value for name, value in losses.items())
        assert isinstance(loss, Tensor)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
        optimiser.step()
        if step % 50 == 49 or step + 1 == config.steps:
            row = {name: value.item() for name, value in losses.items()}
            row |= {"step": step + 1, "elapsed_s": time.monotonic() - started}
            tell(row)
            with (out / "log.jsonl").open("a") as log:
                log.write(json.dumps(row) + "\n")
        if (step + 1) % config.save_every == 0 or step + 1 == config.steps:
            _save(model, learner, optimiser, out, step + 1, config)
    return learner


def _schedule(step: int, config: PretrainConfig) -> float:
    if step < config.warmup:
        return (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    return 0.05 + 0.95 * 0.5 * (1 + float(np.cos(np.pi * done)))


def _save(
    model: Any, learner: VisionLearner, optimiser: Any, out: Path, step: int, config: PretrainConfig
) -> None:
    half = {key: value.to(torch.bfloat16) for key, value in vision_state(model).items()}
    save_file(
        half,
        out / "vision.part",
        metadata={"step": str(step), "config": json.dumps(asdict(config))},
    )
    (out / "vision.part").rename(out / "vision.safetensors")
    state = {f"learner.{k}": v for k, v in learner.state_dict().items()}
    parameters = list(learner.parameters())
    for index, parameter in enumerate(parameters):
        for name, value in optimiser.state[parameter].items():
            state[f"optimiser.{index}.{name}"] = torch.as_tensor(value)
    state["step"] = torch.tensor(step)
    save_file({k: v.contiguous().clone() for k, v in state.items()}, out / "state.part")
    (out / "state.part").rename(out / "state.safetensors")


def _load_weights(learner: VisionLearner, state: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in learner.named_parameters():
            parameter.copy_(state[f"learner.{name}"])


def _resume(learner: VisionLearner, optimiser: Any, out: Path) -> int:
    file = out / "state.safetensors"
    if not file.is_file():
        return 0
    state = load_file(file)
    _load_weights(learner, state)
    for index, parameter in enumerate(learner.parameters()):
        prefix = f"optimiser.{index}."
        kept = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        if kept:
            optimiser.state[parameter] = kept
    return int(state["step"])


@torch.inference_mode()
def caption_accuracy(learner: VisionLearner, data: Captions, batch: int = 64) -> dict[str, float]:
    """Fraction of the places with alternatives that get the right word; per place and in all."""
    open_places = (learner.candidates.sum(dim=1) > 1).nonzero().flatten()
    right = []
    for start in range(0, len(data), batch):
        rows = np.arange(start, min(start + batch, len(data)))
        best = learner.word_scores(learner(data.pixels(rows)), 1.0).argmax(dim=-1)
        right.append((learner.vocabulary[best] == data.words[rows])[:, open_places])
    hits = torch.cat(right).float()
    return {"all": float(hits.mean()), "whole_caption": float(hits.all(dim=1).float().mean())} | {
        f"place_{int(place)}": float(value)
        for place, value in zip(open_places, hits.mean(dim=0), strict=True)
    }


def open_for_training(
    model_path: str, vision_weights: Path | None = None
) -> tuple[Any, Any, Callable[[str], list[int]]]:
    """Return a LLaVA in fp32 with a fresh or given tower, its image processor, and words to ids."""

    model = load_llava(model_path, torch.float32)
    model.requires_grad_(False)
    if vision_weights is not None:
        load_vision(model, load_file(vision_weights))
    processor = load_processor(model_path).image_processor
    tokenizer = load_tokenizer(model_path)

    def tokenize(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    return model, processor, tokenize


# ------------------------------------------------------------------------------------------------
# The whole recipe for the laptop model's eyes, stage by stage, resumable at each.
#
#     python -m openhelix.benchmarks.calvin.captions --out DATA     # pictures with words
#     python -m openhelix.system2.pretrain --data DATA --out OUT         # the four stages below
#     python -m openhelix.system2.pretrain --data DATA --out OUT --stage evaluate --limit 100
#
# 1. `words`: tower and projector learn to write captions in plain word embeddings.
# 2. `wording`: the embeddings themselves are tuned, without images, until the frozen language
#    model answers questions about captions.
# 3. `retarget`: tower and projector learn to write in that wording.
# 4. `evaluate`: questions about held-out states and a held-out scene, with the image, without
#    it, with another picture's, and with the perfect caption.


log = logging.getLogger(__name__)
STAGES = ("words", "wording", "retarget", "evaluate")
HELD_OUT = ("test-states", "test-scene")


class Recipe:
    """The stages, sharing data folders and one output folder.

    Args:
        data: holds `train`, `test-states` and `test-scene`.
        out: each stage has a folder in it.
        seed: of the untrained tower.
    """

    def __init__(self, data: Path, out: Path, seed: int = 0) -> None:
        self._data, self._out = data, out
        # An explicit shape: from an untrained tower, not from the shipped weights.
        self._path = str(build(vision=VisionShape(), seed=seed))
        self._checkpoint: Checkpoint = open_checkpoint(self._path)

    def words(self, config: PretrainConfig) -> VisionLearner:
        """Stage 1."""
        model, processor, tokenize = open_for_training(self._path)
        data = self._captions("train", tokenize)
        return train(model, processor, data, config, self._out / "words", _tell)

    def wording(self, config: WordingConfig) -> None:
        """Stage 2."""
        model, processor, tokenize = open_for_training(self._path)
        data = self._captions("train", tokenize)
        learner = VisionLearner(model, processor, data)
        soft = SoftCaption(learner.table[0], learner.candidates)
        index = torch.searchsorted(learner.vocabulary, data.words)
        trainer = WordingTrainer(model.to(torch.bfloat16), self._checkpoint, soft)
        trainer.train(index, data.records, config, self._out / "wording", _tell)

    def tuned(self, learner: VisionLearner) -> Tensor:
        """Return stage 2's embeddings (n_image, V, hidden)."""
        soft = SoftCaption(learner.table[0], learner.candidates)
        rows = load_file(self._out / "wording" / "wording.safetensors")["rows"]
        soft.rows.data.copy_(rows)
        return soft.dense().detach()

    def retarget(self, config: PretrainConfig) -> VisionLearner:
        """Stage 3."""
        model, processor, tokenize = open_for_training(self._path)
        data = self._captions("train", tokenize)
        wording = self.tuned(VisionLearner(model, processor, data))
        folder = self._out / "retarget"
        return train(model, processor, data, config, folder, _tell, wording, self._out / "words")

    def evaluate(self, limit: int, controls: int, stage: str = "retarget") -> dict[str, Any]:
        """Stage 4: accuracies with the number of questions asked.

        Args:
            limit: pictures a held-out set for which questions are asked with the image.
            controls: pictures for each control.
            stage: whose weights.
        """
        weights = self._out / stage / "vision.safetensors"
        model, processor, tokenize = open_for_training(self._path, weights)
        learner = VisionLearner(model, processor, self._captions("train", tokenize))
        if stage == "retarget":
            learner.table = self.tuned(learner)
        reader_model = open_for_training(self._path)[0].to(torch.bfloat16)
        load_vision(reader_model, load_file(weights))
        reader = Reader(reader_model, self._checkpoint)
        report: dict[str, Any] = {}
        for name in HELD_OUT:
            data = self._captions(name, tokenize)
            perfect = torch.searchsorted(learner.vocabulary, data.words)
            shown: dict[str, Callable[[int], Tensor]] = {
                "image": partial(_seen, learner, data),
                "other": partial(_seen, learner, data),
                "none": partial(_written, learner, perfect),
                "perfect_caption": partial(_written, learner, perfect),
            }
            result: dict[str, Any] = {"caption_words": caption_accuracy(learner, data)}
            for source, tokens in shown.items():
                some = data.records[: limit if source == "image" else controls]
                kind: Any = "image" if source == "perfect_caption" else source
                scores = reader.accuracy(some, kind, tokens)
                result[source] = {
                    k: {"accuracy": round(s.accuracy, 4), "asked": s.asked}
                    for k, s in scores.items()
                }
                log.info("%s %s %s", name, source, result[source]["all"])
            report[name] = result
        (self._out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
        return report

    def _captions(self, name: str, tokenize: Callable[[str], list[int]]) -> Captions:
        return Captions(self._data / name, tokenize, self._checkpoint.n_image)


@torch.inference_mode()
def _seen(learner: VisionLearner, data: Captions, row: int) -> Tensor:
    """What the tower makes of a picture."""
    return learner(data.pixels(np.array([row])))[0]


def _written(learner: VisionLearner, index: Tensor, row: int) -> Tensor:
    """What a perfect tower would have made of it."""
    return learner.table[torch.arange(index.shape[1]), index[row]]


def _tell(row: dict[str, float]) -> None:
    log.info("%s", {key: round(value, 4) for key, value in row.items()})


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages; each goes on where it stopped."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--stage", choices=STAGES, nargs="+", default=list(STAGES))
    parser.add_argument("--steps", type=int, default=3000, help="of words")
    parser.add_argument("--wording-steps", type=int, default=150)
    parser.add_argument("--retarget-steps", type=int, default=1000)
    parser.add_argument("--limit", type=int, default=100, help="pictures asked about")
    parser.add_argument("--controls", type=int, default=40, help="pictures asked about in controls")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bf16", action="store_true", help="autocast the tower's training")
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(options.threads)
    recipe = Recipe(options.data, options.out)
    vision = PretrainConfig(steps=options.steps, bf16=options.bf16)
    if "words" in options.stage:
        recipe.words(vision)
    if "wording" in options.stage:
        recipe.wording(WordingConfig(steps=options.wording_steps, captions=3, save_every=10))
    if "retarget" in options.stage:
        recipe.retarget(replace(vision, steps=options.retarget_steps, lr=5e-4, warmup=50, seed=1))
    if "evaluate" in options.stage:
        recipe.evaluate(options.limit, options.controls)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
