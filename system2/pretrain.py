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

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from system2.model import CheckpointError, load_tokenizer, load_vision, vision_state


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
        wording: tuned embeddings (n_image, V, hidden) of `system2.wording`; None for the
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


def augment(pixels: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Brightness, contrast, noise and a shift of up to 2 pixels; (B, 3, S, S) in [0, 1]."""
    if strength == 0:
        return pixels

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator) * 2 - 1

    batch = pixels.shape[0]
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
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(model_path, dtype=torch.float32)
    model.requires_grad_(False)
    if vision_weights is not None:
        load_vision(model, load_file(vision_weights))
    processor = AutoProcessor.from_pretrained(model_path).image_processor
    tokenizer = load_tokenizer(model_path)

    def tokenize(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    return model, processor, tokenize
