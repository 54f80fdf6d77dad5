"""A LLaVA that answers in words, on either engine; what `openhelix probe --ask` calls.

Prompts are made as everywhere in System 2: ids from one place, so that both engines read the
same sequence. The engines of `openhelix.system2.engines` give hidden states and hold no output layer;
these give words.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from openhelix.system2.model import (
    Checkpoint,
    load_llava,
    load_processor,
    load_tokenizer,
    open_checkpoint,
    pick_dtype,
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
    """Questions to prompts, token ids to words."""

    def __init__(self, model: str, vision: bool) -> None:
        self.checkpoint = open_checkpoint(model)
        self.vision = vision
        self._builder = self.checkpoint.prompts(1, vision)
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
    """

    def __init__(
        self,
        model: str = "laptop",
        *,
        device: str = "auto",
        dtype: str = "auto",
        vision: bool = True,
        threads: int = 0,
    ) -> None:
        if threads:
            torch.set_num_threads(threads)
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self._prompts = AnswerPrompts(model, vision)
        self.checkpoint = self._prompts.checkpoint
        path = self.checkpoint.path
        loaded = load_llava(path, pick_dtype(dtype))
        self._model = loaded.to(device).eval()
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
