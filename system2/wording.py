"""Soft captions: the wording in which a frozen language model reads an image best.

A language model of 135 million parameters answers questions about a caption in plain words
little better than by guessing. Its input embeddings need not be words, though. Here every
place of the caption and every word that may stand there gets an embedding of its own, which
starts as the word's and is tuned, through the frozen language model, until questions about
captions are answered. A hundred vectors are learned, without any image; the tower is then
trained to write in this wording (`pretrain`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from system2.model import Checkpoint


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
