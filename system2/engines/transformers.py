"""The plain engine: transformers' own networks, one forward pass, no generation.

It gives every read-out, including middle layers, runs wherever torch runs, and is what the
served engine is checked against. Prompts of a batch are padded on the right: with causal
attention no real token can see the padding, and a family without it says so in its mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from openhelix.system2.engines.base import EngineBase
from openhelix.system2.families import act_scale, embedded, picture_tokens
from openhelix.system2.latents import KV, LatentConfig, stop_after
from openhelix.system2.model import load_model
from openhelix.system2.prompt import Prompt


class TransformersEngine(EngineBase):
    """System 2 on transformers' image-text models; options as in `EngineBase`.

    Args:
        device: "auto" (CUDA when there is one), "cpu", or any torch device.
    """

    name = "transformers"

    def __init__(self, model: str = "laptop", *, device: str = "auto", **options: Any) -> None:
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self._device = torch.device(device)
        super().__init__(model, **options)

    def _load(self, config: Any, max_instruction_tokens: int) -> None:
        family = self.checkpoint.family
        # The vocabulary's output layer is never read: the latent is a hidden state.
        core = family.core(load_model(self.checkpoint.path, self._dtype))
        self._model = core.eval().requires_grad_(False)
        self._language = family.language(core)
        wanted = config or LatentConfig()
        layers = wanted.layers_of(self.checkpoint.layers)
        stop_after(self._language, layers, self.checkpoint.layers, wanted.kind == KV)
        self._model.to(self._device)
        self._image_processor = self.checkpoint.image_processor()

    def _table(self) -> Tensor:
        table: Tensor = self._model.get_input_embeddings().weight
        return table.detach()

    def _write_act(self, rows: Sequence[int], act: Tensor) -> None:
        table = self._table()
        with torch.no_grad():
            table[list(rows)] = act.to(table)

    def _hidden(
        self, images: list[Image.Image], prompts: list[Prompt], sensed: Tensor | None = None
    ) -> list[Tensor]:
        features = self.image_features(images, prompts) if self._looks else None
        embeddings, _, further = embedded(
            self.checkpoint.family,
            self._model,
            prompts,
            self.checkpoint.image_token_id,
            features,
        )
        if sensed is not None:
            at = [prompt.layout.act[0] - 1 for prompt in prompts]
            embeddings[range(len(prompts)), at] = (sensed * act_scale(self._model)).to(embeddings)
        output = self._language(inputs_embeds=embeddings, use_cache=False, **further)
        states = output.last_hidden_state
        return [states[row, : prompt.layout.length] for row, prompt in enumerate(prompts)]

    def _sentence_states(self, rows: list[list[int]]) -> list[Tensor]:
        ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
        for row, tokens in zip(ids, rows, strict=True):
            row[: len(tokens)] = torch.tensor(tokens)
        embeddings = self._model.get_input_embeddings()(ids.to(self._device))
        output = self._language(inputs_embeds=embeddings, use_cache=False)
        states = output.last_hidden_state
        return [states[row, : len(tokens)] for row, tokens in enumerate(rows)]

    def image_features(self, images: list[Image.Image], prompts: Sequence[Prompt] = ()) -> Tensor:
        """Return the picture's tokens (B, n_image, hidden); some families look for what is asked."""
        return picture_tokens(
            self.checkpoint, self._model, self._image_processor, images, [p.text for p in prompts]
        )

    def close(self) -> None:
        super().close()
        self._model = self._language = None
