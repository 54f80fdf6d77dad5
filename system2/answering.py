"""A LLaVA that answers in words, on either engine; what `openhelix probe --ask` calls.

Prompts are made as everywhere in System 2: ids from one place, so that both engines read the
same sequence. The engines of `openhelix.system2.engines` give hidden states and hold no output layer;
these give words.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from openhelix.runtime.core.files import CheckpointError
from openhelix.runtime.core.precision import pick_dtype
from openhelix.system2.latents import LatentHead, check_fit
from openhelix.system2.model import (
    Checkpoint,
    load_llava,
    load_processor,
    load_tokenizer,
    open_checkpoint,
)
from openhelix.system2.prompt import BadInstruction, Prompt, as_batch, clean_instruction

MAX_WORDS = 96  # tokens of an answer


class Answerer(Protocol):
    """Answers questions about images."""

    checkpoint: Checkpoint

    def answer(self, images: Sequence[Any], questions: Sequence[str]) -> list[str]:
        """Return one answer a pair of image and question."""

    def close(self) -> None:
        """Let go of the model."""


class AnswerPrompts:
    """Questions to prompts, token ids to words.

    Args:
        model: "laptop", "smollm2", a LLaVA folder, or a hub name.
        vision: False leaves the image out.
        head: of a trained pair: instructions are then put as the robot's System 2 is asked, up to
            its `<ACT>`, and what follows is what it says beside its latent.

    Raises:
        CheckpointError: the head is of another model.
    """

    def __init__(self, model: str, vision: bool, head: LatentHead | None = None) -> None:
        if head is not None and head.config.proprio:
            raise CheckpointError("latent: its System 2 is told the robot's state, too; none here")
        self.head = head
        n_act = 1 if head is None else head.config.n_act
        self.checkpoint = open_checkpoint(model, n_act)
        if head is not None:
            check_fit(head, self.checkpoint)
        self.vision = vision and (head is None or head.config.vision)
        self._builder = self.checkpoint.prompts(n_act, self.vision)
        self._tokenizer = load_tokenizer(self.checkpoint.path)
        self.end = int(self._tokenizer.eos_token_id)

    def __call__(self, question: str) -> Prompt:
        """Return the prompt of one question.

        Raises:
            BadInstruction: it is empty, or holds control tokens.
        """
        try:
            clean_instruction(question, self._builder.special)
        except BadInstruction as error:
            raise BadInstruction(f"ask: {str(error).removeprefix('instruction: ')}") from None
        if self.head is not None:
            return self._builder(question)
        return self._builder.assemble(" ".join(question.split()), ())

    def words(self, ids: Sequence[int]) -> str:
        """Return generated ids as text, up to the closing token."""
        kept = list(ids)
        if self.end in kept:
            kept = kept[: kept.index(self.end)]
        return str(self._tokenizer.decode(kept, skip_special_tokens=True)).strip()


class TransformersAnswerer:
    """On transformers' own `generate`, greedy.

    Args:
        model: "laptop", "smollm2", a LLaVA folder, or a hub name.
        device: "auto" (CUDA when there is one) or any torch device.
        dtype: as in `openhelix.system2.engines.base`.
        vision: False leaves the image out.
        threads: CPU threads; 0 leaves torch's own number.
        latent: a `latent.safetensors`: answer behind its `<ACT>`, see `AnswerPrompts`.
    """

    def __init__(
        self,
        model: str = "laptop",
        *,
        device: str = "auto",
        dtype: str = "auto",
        vision: bool = True,
        threads: int = 0,
        latent: Path | str | None = None,
    ) -> None:
        if threads:
            torch.set_num_threads(threads)
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        head = None if latent is None else LatentHead.load(latent)
        self._prompts = AnswerPrompts(model, vision, head)
        self.checkpoint = self._prompts.checkpoint
        path = self.checkpoint.path
        loaded = load_llava(path, pick_dtype(dtype))
        self._model = loaded.to(device).eval()
        if head is not None:
            rows = list(self.checkpoint.act_ids[: head.config.n_act])
            table = self._model.get_input_embeddings().weight
            with torch.no_grad():
                table[rows] = head.act.to(table)
        self._processor = load_processor(path).image_processor

    @torch.inference_mode()
    def answer(self, images: Sequence[Any], questions: Sequence[str]) -> list[str]:
        """Return one answer a pair of image and question."""
        checked, texts = as_batch(images, questions)
        answers = []
        for image, text in zip(checked, texts, strict=True):
            prompt = self._prompts(text)
            device = self._model.device
            ids = torch.tensor([prompt.expanded(self.checkpoint.image_token_id)], device=device)
            shown = {}
            if self._prompts.vision:
                pixels = self._processor(image, return_tensors="pt")["pixel_values"]
                shown["pixel_values"] = pixels.to(device, self._model.dtype)
            made = self._model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                **shown,
                do_sample=False,
                max_new_tokens=MAX_WORDS,
                suppress_tokens=list(self.checkpoint.act_ids),
                eos_token_id=self._prompts.end,
                pad_token_id=self._prompts.end,
            )
            answers.append(self._prompts.words(made[0, ids.shape[1] :].tolist()))
        return answers

    def close(self) -> None:
        """Let go of the model."""
        self._model = None


ANSWERERS = {
    "vllm": "openhelix.system2.engines.vllm:VllmAnswerer",
    "transformers": "openhelix.system2.answering:TransformersAnswerer",
}
