"""The plain engine: transformers' own LLaVA, one forward pass, no generation.

It gives every read-out, including middle layers, runs wherever torch runs, and is what the
served engine is checked against. Prompts of a batch are padded on the right: with causal
attention no real token can see the padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from openhelix.system2.engines.base import EngineBase
from openhelix.system2.latents import LatentConfig, stop_after
from openhelix.system2.model import load_llava, load_processor
from openhelix.system2.prompt import Prompt


class TransformersEngine(EngineBase):
    """System 2 on `LlavaForConditionalGeneration`; options as in `EngineBase`.

    Args:
        device: "auto" (CUDA when there is one), "cpu", or any torch device.
    """

    def __init__(self, model: str = "laptop", *, device: str = "auto", **options: Any) -> None:
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self._device = torch.device(device)
        super().__init__(model, **options)

    def _load(self, config: Any, max_instruction_tokens: int) -> None:
        model = load_llava(self.checkpoint.path, self._dtype)
        # The vocabulary's output layer is never read: the latent is a hidden state.
        self._model = model.model.eval().requires_grad_(False)
        layers = (config or LatentConfig()).layers_of(self.checkpoint.layers)
        stop_after(self._model.language_model, layers, self.checkpoint.layers)
        self._model.to(self._device)
        self._image_processor = load_processor(self.checkpoint.path).image_processor

    def _table(self) -> Tensor:
        return self._model.language_model.embed_tokens.weight.detach()

    def _write_act(self, rows: Sequence[int], act: Tensor) -> None:
        table = self._table()
        with torch.no_grad():
            table[list(rows)] = act.to(table)

    def _hidden(self, images: list[Image.Image], prompts: list[Prompt]) -> list[Tensor]:
        longest = max(prompt.layout.length for prompt in prompts)
        ids = torch.zeros(len(prompts), longest, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids[row, : prompt.layout.length] = torch.tensor(
                prompt.expanded(self.checkpoint.image_token_id)
            )
        embeddings = self._model.get_input_embeddings()(ids.to(self._device))
        if self._looks:
            features = self.image_features(images)
            start, stop = prompts[0].layout.image
            embeddings[:, start:stop] = features
        output = self._model.language_model(inputs_embeds=embeddings, use_cache=False)
        states = output.last_hidden_state
        return [states[row, : prompt.layout.length] for row, prompt in enumerate(prompts)]

    def _sentence_states(self, rows: list[list[int]]) -> list[Tensor]:
        ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
        for row, tokens in zip(ids, rows, strict=True):
            row[: len(tokens)] = torch.tensor(tokens)
        embeddings = self._model.get_input_embeddings()(ids.to(self._device))
        output = self._model.language_model(inputs_embeds=embeddings, use_cache=False)
        states = output.last_hidden_state
        return [states[row, : len(tokens)] for row, tokens in enumerate(rows)]

    def image_features(self, images: list[Image.Image]) -> Tensor:
        """Return the projected image tokens (B, n_image, hidden)."""
        pixels = self._image_processor(images, return_tensors="pt")["pixel_values"]
        output = self._model.get_image_features(
            pixel_values=pixels.to(self._device, self._dtype), return_dict=True
        )
        return torch.stack(list(output.pooler_output))

    def close(self) -> None:
        super().close()
        self._model = None
