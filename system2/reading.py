"""How much a frozen language model understands of an image: questions with short answers.

The answering sentence is begun ("The drawer is") and its next word chosen among the
question's choices by probability, so a model that sees nothing scores what guessing scores. Three controls stand beside the image:
none at all, another picture's, and the caption as text, which is the most that this language
model could read out of a perfect tower.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from system2.model import Checkpoint
from system2.prefix import Prefix, compute_prefix, states_after

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
