"""What the engines share: options, checks, and the way from hidden states to a latent.

An engine differs only in how hidden states are computed; everything before (prompt, images)
and after (read-out, projector) is here, so that two engines cannot drift apart.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from openhelix.runtime.core.files import CheckpointError
from openhelix.runtime.core.interfaces import F32, U8, Judgement, LatentSpec
from openhelix.runtime.core.precision import pick_dtype
from openhelix.system2.latents import (
    NEEDS_VISION,
    PROPRIO,
    BadReadOut,
    LatentConfig,
    LatentHead,
    check_fit,
    head_for,
    with_act,
)
from openhelix.system2.model import (
    FROM_CHECKPOINT,
    SHIPPED,
    load_tokenizer,
    open_checkpoint,
)
from openhelix.system2.prompt import BadInstruction, Layout, Prompt, as_batch
from openhelix.system2.text import sentence_ids
from openhelix.system2.understanding import KEPT, PlainSentences, Understanding, beside

JUDGED_TOGETHER = 32  # sentences, at most


class EncodeError(RuntimeError):
    """The model did not give the latents that were asked for."""

    reason = "engine"  # as it is counted


class NotFinite(EncodeError):
    """The model gave a latent that is not finite."""

    reason = "nonfinite"


class EngineBase:
    """An engine without its model; see `openhelix.runtime.core.interfaces.Engine`.

    Args:
        model: "laptop", "smollm2", a model's folder, or a hub name; of any family in
            `openhelix.system2.families` that this engine gives.
        kind, n_act, layer, text_rows, vision, layers: the read-out, see `latents.LatentConfig`;
            what is None comes from `latent_projector`, or is the default.
        latent_projector: file with `<ACT>` and projector; None takes the shipped one for the
            laptop model when there is one, else untrained weights.
        raw: return the hidden states without the projector.
        dtype: "auto", "float32", "bfloat16" or "float16".
        threads: CPU threads; 0 leaves torch's own number.
        max_instruction_tokens: longer instructions are refused.
        seed: of untrained weights.
        proprio: the robot's own state is read, too; see `latents.LatentConfig`.
        shown: "given", or "none" to leave the image out of the prompt of a read-out that was
            trained with it, or a `.npy` file of other pictures (N, H, W, 3) uint8, one of which is
            shown in the place of each that is given: what System 2 does without seeing.
        blind: show the model black pictures instead of those that are given.
        understanding: file of what judges which instructions are understood; None takes
            the one beside the latent's weights, where there is one, and "off" judges none.
        untrained: take random `<ACT>` and projector where no `latent_projector` is given, not the
            shipped ones; a run refuses random ones that nobody asked for
            (`openhelix.runtime.control.assembly.make`).
        prompt: "checkpoint" asks in the words of the checkpoint's own chat template; else a name in
            `prompt.TEMPLATES`.
        image_side: pixels of the square that pictures are brought to, where the family leaves it
            open; 0 takes its own.

    Attributes:
        untrained: whether `<ACT>` and projector are random.
        judges_latents: whether `judge` is by an instruction's latent.
    """

    name = ""  # as a family lists the engines that give it

    def __init__(
        self,
        model: str = "laptop",
        *,
        kind: str | None = None,
        n_act: int | None = None,
        layer: int | None = None,
        text_rows: int | None = None,
        vision: bool | None = None,
        latent_projector: LatentHead | Path | str | None = None,
        raw: bool = False,
        dtype: str = "auto",
        threads: int = 0,
        max_instruction_tokens: int = 96,
        seed: int = 0,
        untrained: bool = False,
        layers: Sequence[int] | None = None,
        blind: bool = False,
        understanding: Path | str | bool | None = None,
        shown: str = "given",
        prompt: str = FROM_CHECKPOINT,
        image_side: int = 0,
        proprio: bool | None = None,
    ) -> None:
        config = with_act(
            None,
            kind=kind,
            n_act=n_act,
            layer=layer,
            text_rows=text_rows,
            vision=vision,
            layers=None if layers is None else tuple(layers),
            proprio=proprio,
        )
        if latent_projector is None and not untrained and model == "laptop" and config is None:
            shipped = SHIPPED / "latent.safetensors"
            latent_projector = shipped if shipped.is_file() else None
        weights = None if isinstance(latent_projector, LatentHead) else latent_projector
        judge = beside(weights, understanding)
        self._understanding = judge if isinstance(judge, Understanding) else None
        self._plain = judge if isinstance(judge, PlainSentences) and not raw else None
        self.judges_latents = self._plain is not None
        self._judged: dict[str, Judgement] = {}
        if latent_projector is not None and not isinstance(latent_projector, LatentHead):
            latent_projector = LatentHead.load(latent_projector)
        self.untrained = latent_projector is None and not raw
        self._dtype = pick_dtype(dtype)
        self._raw, self._blind = raw, blind
        self._others = _pictures(shown)
        self._leaves_out = shown == "none"
        wanted = latent_projector.config if latent_projector is not None else config
        if wanted is not None and wanted.plain_only and self.name != "transformers":
            what = "latent.proprio" if wanted.proprio else f"latent.kind: {wanted.kind!r}"
            raise CheckpointError(
                f"{what}: given by openhelix.system2.engines.transformers:TransformersEngine alone, "
                f"not by {self.name}"
            )
        self.checkpoint = open_checkpoint(
            model, wanted.rows if wanted is not None else 1, prompt, image_side
        )
        if self.name not in self.checkpoint.family.engines:
            raise CheckpointError(
                f"model: a {self.checkpoint.kind!r} is given by the engine "
                f"{' or '.join(self.checkpoint.family.engines)}, not by {self.name}"
            )
        if threads:
            torch.set_num_threads(threads)
        self._lock = threading.Lock()
        self._closed = False
        if wanted is not None:
            wanted.layers_of(self.checkpoint.layers)  # before a model is loaded for nothing
        self._layers = (wanted or LatentConfig()).layers_of(self.checkpoint.layers)
        if self._understanding is not None:
            self._check_understanding(wanted or LatentConfig())
        self._load(wanted, max_instruction_tokens)
        self._max_instruction_tokens = max_instruction_tokens
        # Without the padding that an engine may add, so that every engine starts alike.
        words = self._table()[: self.checkpoint.act_ids[0]]
        head = head_for(self.checkpoint, config, latent_projector, words, seed)
        self._adopt(head)

    # What a subclass supplies.

    def _load(self, config: Any, max_instruction_tokens: int) -> None:
        raise TypeError("an engine says how its model is loaded")

    def _table(self) -> Tensor:
        """Return the embedding table (V, hidden)."""
        raise TypeError("an engine says where its embedding table is")

    def _write_act(self, rows: Sequence[int], act: Tensor) -> None:
        """Write `<ACT>` (n, hidden) into the rows of the embedding table."""
        raise TypeError("an engine says how <ACT> is written")

    def _hidden(
        self, images: list[Image.Image], prompts: list[Prompt], sensed: Tensor | None = None
    ) -> list[Tensor]:
        """Return each sequence's states (T, hidden), or only the last (1, hidden) if that is read.

        `sensed` (B, hidden) are the tokens of the robots' states, where the read-out has one.
        """
        raise TypeError("an engine says how hidden states are computed")

    def _sentence_states(self, rows: list[list[int]]) -> list[Tensor]:
        """Return each bare sentence's states (T, width) at all of its tokens."""
        raise TypeError("an engine says how a sentence's states are computed")

    # What users call.

    @property
    def spec(self) -> LatentSpec:
        """What this engine's latents are; changes when `swap` changes the weights."""
        return self._spec

    @property
    def device(self) -> str:
        """Where the model runs, in words."""
        return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"

    @property
    def head(self) -> LatentHead:
        """`<ACT>`, projector and pooling in use."""
        return self._head

    def swap(self, latent_projector: LatentHead | Path | str) -> LatentSpec:
        """Take other `<ACT>` and projector weights without a restart; return the new spec.

        Calls of `encode` see either the old weights or the new ones, never a mixture.

        Raises:
            CheckpointError: they do not fit this model or need another read-out.
        """
        if not isinstance(latent_projector, LatentHead):
            latent_projector = LatentHead.load(latent_projector)
        check_fit(latent_projector, self.checkpoint)
        if latent_projector.config != self._head.config:
            raise CheckpointError(
                f"latent_projector: for {latent_projector.config}, "
                f"this engine was started with {self._head.config}"
            )
        with self._lock:
            self._adopt(latent_projector.eval().requires_grad_(False))
        return self._spec

    def warm_up(self) -> None:
        """Encode one made-up request, so that the first real one is not the slow one."""
        side = np.zeros((64, 64, 3), dtype=np.uint8)
        self.encode([side], ["move"], *self._still(1))

    def _still(self, count: int) -> tuple[list[F32], ...]:
        """Return made-up states of robots, for a read-out that needs some."""
        still = np.zeros(PROPRIO, np.float32)
        still[6] = 1.0
        return ([still] * count,) if self._head.config.proprio else ()

    def encode(
        self,
        images: Sequence[Any],
        instructions: Sequence[str],
        proprio: Sequence[Any] | None = None,
    ) -> F32:
        """Return latents (B, n_tokens, dim) float32; see `openhelix.runtime.core.interfaces.Engine`.

        Args:
            images, instructions: see there.
            proprio: the robots' states (9,), for a read-out that has them
                (`openhelix.runtime.core.interfaces.proprio_of`).

        Raises:
            ValueError: an image, instruction or state is unusable; the message names which.
            EncodeError: the model's output is not finite.
        """
        return self._run(images, instructions, self._raw, proprio)

    def judge(self, instructions: Sequence[str], latents: F32 | None = None) -> list[Judgement]:
        """Return whether instructions name something that can be done.

        By the words alone, or where the base model has learned it, by what `encode` gave.

        Args:
            instructions: B texts.
            latents: of these texts, each with its picture (B, n_tokens, dim).

        Raises:
            ValueError: an instruction is unusable, or the latents that it takes are not there; the
                message names which.
            EncodeError: the engine is closed.
        """
        if self._plain is not None:
            if latents is None or len(latents) != len(instructions):
                raise ValueError("latents: must be what encode gave, one for each instruction")
            return self._plain.judge(torch.from_numpy(latents))
        if self._understanding is None:
            return [Judgement()] * len(instructions)
        if self._closed:
            raise EncodeError("the engine is closed")
        new = list(dict.fromkeys(text for text in instructions if text not in self._judged))
        if new:
            found = self._judge(new)
            if len(self._judged) + len(new) > KEPT:
                self._judged = {t: j for t, j in self._judged.items() if t in instructions}
            self._judged = self._judged | dict(zip(new, found, strict=True))
        return [self._judged[text] for text in instructions]

    def _judge(self, texts: list[str]) -> list[Judgement]:
        assert self._understanding is not None
        prompts, rows = self._prompts, []
        for index, text in enumerate(texts):
            try:
                most = self._max_instruction_tokens
                rows.append(sentence_ids(self._tokenizer, text, prompts.special, most))
            except BadInstruction as error:
                raise BadInstruction(f"instructions[{index}]: {error}") from error
        found: list[Judgement] = []
        with self._lock, torch.inference_mode():
            for start in range(0, len(rows), JUDGED_TOGETHER):
                states = self._sentence_states(rows[start : start + JUDGED_TOGETHER])
                states = [s.to("cpu", torch.float32) for s in states]
                found += self._understanding.judge(states, self._layers)
        return found

    def states(
        self,
        images: Sequence[Any],
        instructions: Sequence[str],
        proprio: Sequence[Any] | None = None,
    ) -> F32:
        """Return the read-out before the projector (B, n_tokens, hidden); as `encode` else."""
        return self._run(images, instructions, True, proprio)

    def _run(
        self,
        images: Sequence[Any],
        instructions: Sequence[str],
        raw: bool,
        proprio: Sequence[Any] | None,
    ) -> F32:
        if self._closed:
            raise EncodeError("the engine is closed")
        checked, texts = as_batch(images, instructions)
        checked = [self._seen(image) for image in checked]
        with self._lock, torch.inference_mode():
            prompts = self._prompted(texts)
            hidden = self._hidden(checked, prompts, self._sensed(proprio, len(texts)))
            rows = [self._read(states, p, raw) for states, p in zip(hidden, prompts, strict=True)]
            latents = torch.stack(rows).to("cpu", torch.float32).numpy()
        if not np.isfinite(latents).all():
            raise NotFinite("the latent is not finite")
        return latents

    def _sensed(self, proprio: Sequence[Any] | None, count: int) -> Tensor | None:
        """Return the tokens (B, hidden) of the robots' states; None for a read-out without."""
        if self._head.sense is None:
            if proprio is not None:
                raise ValueError("proprio: this System 2 reads no robot's state")
            return None
        if proprio is None:
            raise ValueError("proprio: this System 2 also reads the robot's state; none was given")
        rows = np.asarray([np.zeros(0) if p is None else p for p in proprio], np.float32)
        if rows.shape != (count, PROPRIO) or not np.isfinite(rows).all():
            raise ValueError(
                f"proprio: {rows.shape}, want ({count}, {PROPRIO}) finite numbers: TCP xyz, "
                "quaternion xyzw, width, open"
            )
        found: Tensor = self._head.sense(torch.from_numpy(rows))
        return found

    def hidden(self, images: Sequence[Any], instructions: Sequence[str]) -> list[Tensor]:
        """Return what every read-out is made of: each sequence's states (T, width) float32.

        With a read-out of the last token alone only its state may be there, (1, width).
        """
        checked, texts = as_batch(images, instructions)
        with self._lock, torch.inference_mode():
            shown = [self._seen(image) for image in checked]
            found = self._hidden(shown, self._prompted(texts), self._sensed(None, len(texts)))
            return [states.to("cpu", torch.float32) for states in found]

    def layout(self, instruction: str) -> Layout:
        """Return where image, words and `<ACT>` lie in an instruction's sequence."""
        return self._prompts(instruction).layout

    def _prompted(self, texts: Sequence[str]) -> list[Prompt]:
        prompts = []
        for index, text in enumerate(texts):
            try:
                prompts.append(self._prompts(text))
            except BadInstruction as error:
                raise BadInstruction(f"instructions[{index}]: {error}") from error
        return prompts

    def _seen(self, image: Image.Image) -> Image.Image:
        """Return what is shown in the place of an image."""
        if self._blind:
            return Image.new("RGB", image.size)
        if self._others is not None:
            return Image.fromarray(self._others[zlib.crc32(image.tobytes()) % len(self._others)])
        return image

    def close(self) -> None:
        """Let go of the model; later calls of `encode` fail."""
        self._closed = True

    def _check_understanding(self, config: LatentConfig) -> None:
        """Raise CheckpointError unless the head can be given the states that it reads."""
        assert self._understanding is not None
        self._understanding.check(self.checkpoint, self._layers)
        self._tokenizer = load_tokenizer(self.checkpoint.path)

    def _adopt(self, head: LatentHead) -> None:
        self._head = head
        config = head.config
        self._looks = config.vision and not self._leaves_out
        if self._leaves_out and config.kind in NEEDS_VISION:
            raise BadReadOut(f"shown: {config.kind!r} reads the image's states; it needs one")
        self._prompts = self.checkpoint.prompts(
            config.n_act, self._looks, self._max_instruction_tokens, config.proprio
        )
        self._write_act(self.checkpoint.act_ids[: config.n_act], head.act.detach())
        self._spec = head.spec(self.checkpoint, self._raw)
        if self._plain is not None:
            self._plain.check(self.checkpoint.model_id, self._spec.dim)

    def _read(self, states: Tensor, prompt: Prompt, raw: bool) -> Tensor:
        head, layout = self._head, prompt.layout
        states = states.to("cpu", torch.float32)
        if head.config.last_token_only and states.shape[0] == 1:
            return states if raw else head.project(states, torch.ones(1, dtype=torch.bool))
        return head(states, layout, raw=raw)


def _pictures(shown: str) -> U8 | None:
    """Return the pictures of a file that `shown` names; None for its two words.

    Raises:
        ValueError: it cannot be read, or holds something else.
    """
    if shown in ("given", "none"):
        return None
    try:
        found = np.load(Path(shown).expanduser(), allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"shown: {shown!r} is neither given, none, nor a .npy file: {error}"
        ) from None
    if found.dtype != np.uint8 or found.ndim != 4 or found.shape[3] != 3 or not len(found):
        raise ValueError(
            f"shown: {shown!r} holds {found.dtype}{found.shape}, want uint8 (N, H, W, 3)"
        )
    pictures: U8 = found
    return pictures
