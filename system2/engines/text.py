"""The engine of a policy that is told in words and has no System 2: a sentence in, its code out.

It looks at no image and runs a few layers of the language model, once a sentence: what comes
after is a look-up, so it costs nothing however often it is asked.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from openhelix.runtime.core.files import CheckpointError
from openhelix.runtime.core.interfaces import F32, Judgement, LatentSpec
from openhelix.system2.prompt import BadInstruction, as_batch
from openhelix.system2.text import FILE, TextCode, TextReader, builtin_of
from openhelix.system2.understanding import KEPT, PlainSentences, beside


class TextEngine:
    """Implements `openhelix.runtime.core.interfaces.Engine`.

    Args:
        path: a policy's folder with `text.safetensors`, or that file.
        model: a LLaVA's folder, or a hub name; the one that the code was fitted to. None: the
            one of the project's own that it was fitted to.
        device: any torch device.
        understanding: as of `openhelix.system2.engines.base.EngineBase`.

    Raises:
        TextError: no such file, or it is of another model.
        CheckpointError: `understanding` is of another model, or reads other layers.
    """

    def __init__(
        self,
        path: str | Path,
        model: str | None = None,
        device: str = "cpu",
        understanding: Path | str | bool | None = None,
    ) -> None:
        file = Path(path).expanduser()
        file = file / FILE if file.is_dir() else file
        self._code = TextCode.load(file)
        self._reader = TextReader(model or builtin_of(self._code), self._code.layers, device)
        judge = beside(file, understanding)
        if isinstance(judge, PlainSentences):
            raise CheckpointError(
                "understanding: judges a base model's latents, not bare sentences"
            )
        self._understanding = judge
        if self._understanding is not None:
            self._understanding.check(self._reader.checkpoint, self._reader.layers)
        self._judged: dict[str, Judgement] = {}
        self._reader.encode(self._code, ["move"])  # refuses a code of another model
        self._kept: dict[str, F32] = {}
        self._lock = threading.Lock()

    @property
    def spec(self) -> LatentSpec:
        """What the latents are."""
        return self._code.spec

    def warm_up(self) -> None:
        """Encode a made-up sentence."""
        self.encode([np.zeros((64, 64, 3), np.uint8)], ["move"])

    def encode(self, images: Sequence[Any], instructions: Sequence[str]) -> F32:
        """Return latents (B, n_tokens, dim); see `openhelix.runtime.core.interfaces.Engine`.

        Raises:
            ValueError: an image or instruction is unusable; the message names which.
        """
        _, texts = as_batch(images, instructions)
        with self._lock:
            return np.stack([self._latent(index, text) for index, text in enumerate(texts)])

    def judge(self, instructions: Sequence[str], latents: F32 | None = None) -> list[Judgement]:
        """Return whether instructions name something that can be done, by their words alone.

        Raises:
            ValueError: an instruction is unusable.
        """
        if self._understanding is None:
            return [Judgement()] * len(instructions)
        with self._lock:
            if len(self._judged) >= KEPT:
                self._judged.clear()
            for text in instructions:
                if text not in self._judged:
                    states = self._reader.states([text])
                    self._judged[text] = self._understanding.judge(states, self._code.layers)[0]
            return [self._judged[text] for text in instructions]

    def _latent(self, index: int, text: Any) -> F32:
        found = self._kept.get(text) if isinstance(text, str) else None
        if found is None:
            try:
                latent = self._reader.encode(self._code, [text])[0]
            except BadInstruction as error:
                raise BadInstruction(f"instructions[{index}]: {error}") from error
            found = latent.to(torch.float32).numpy()
            if len(self._kept) >= KEPT:
                self._kept.clear()
            self._kept[text] = found
        return found

    def close(self) -> None:
        """Nothing to let go of."""
