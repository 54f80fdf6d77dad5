"""System 2's side of training: what is learned, by which regime, and its own losses.

The paper compares four ways to train the multimodal model (Tables 2 and 3): frozen, prompt
tuning (its choice), LoRA and full fine-tuning; its wording of prompt tuning, "only the language
modeling head", is a fifth. Here they differ only in which parameters
require gradients. The losses of System 2 are the auxiliary action head (Eq. 1 and 2) and the
CLIP-style alignment of earlier work, and LCB's answer in words beside `<ACT>`; the policy's loss is
a callable on the latent, so that this package need not know System 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from openhelix.system2.families import act_scale, embedded, picture_tokens
from openhelix.system2.latents import (
    KV,
    NEEDS_VISION,
    LatentConfig,
    LatentHead,
    read_out,
    stop_after,
)
from openhelix.system2.model import Checkpoint, load_tokenizer
from openhelix.system2.prompt import QUESTIONS, Layout, Prompt

# ------------------------------------------------------------------------------------------------
# Prompt tuning through a cached prefix: exact gradients at the price of a few tokens.
#
# `<ACT>` stands last and attention is causal, so the keys and values of image and instruction
# do not depend on it. With everything but `<ACT>` frozen (the paper's prompt tuning) they are
# constants of a sample: computed once, without gradient, and kept. Every later step runs
# forward and backward over the `<ACT>` tokens alone. So are the states at the instruction, which
# some read-outs put beside those at `<ACT>`.

CACHEABLE = ("act_last", "act_mid", "act_lang", "act_words")  # read nothing but these two


@dataclass(frozen=True, slots=True)
class Prefix:
    """Keys and values of a batch of prompts without their `<ACT>` tokens.

    Attributes:
        keys, values: (layers, B, kv_heads, T, head_dim); rows of shorter prompts are filled
            up on the right with zeros.
        lengths: (B,) real tokens of each prompt.
        rest, filled: (B, R, width) states that the read-out puts beside those at `<ACT>`, and
            (B, R) which of them are not padding; None for a read-out of `<ACT>` alone.
    """

    keys: Tensor
    values: Tensor
    lengths: Tensor
    rest: Tensor | None = None
    filled: Tensor | None = None

    def __len__(self) -> int:
        return int(self.lengths.shape[0])

    def rows(self, index: Tensor) -> Prefix:
        """Return some of the samples, cut to the longest among them."""
        lengths = self.lengths[index]
        longest = int(lengths.max())
        keys, values = (kv[:, index, :, :longest] for kv in (self.keys, self.values))
        return Prefix(keys, values, lengths, *(_of(x, index) for x in (self.rest, self.filled)))

    def to(self, dtype: torch.dtype) -> Prefix:
        """Return it in another precision; bfloat16 halves the memory."""
        rest = None if self.rest is None else self.rest.to(dtype)
        return replace(self, keys=self.keys.to(dtype), values=self.values.to(dtype), rest=rest)

    def at(self, device: torch.device | str) -> Prefix:
        """Return it on a device."""
        kept = (self.keys, self.values, self.lengths, self.rest, self.filled)
        return Prefix(*(None if x is None else x.to(device) for x in kept))  # type: ignore[arg-type]

    @staticmethod
    def join(parts: Sequence[Prefix]) -> Prefix:
        """Return several batches as one."""
        longest = max(part.keys.shape[3] for part in parts)

        def wide(tensor: Tensor) -> Tensor:
            return torch.nn.functional.pad(tensor, (0, 0, 0, longest - tensor.shape[3]))

        return Prefix(
            torch.cat([wide(part.keys) for part in parts], dim=1),
            torch.cat([wide(part.values) for part in parts], dim=1),
            torch.cat([part.lengths for part in parts]),
            _joined([part.rest for part in parts]),
            _joined([part.filled for part in parts]),
        )


def _of(rows: Tensor | None, index: Tensor) -> Tensor | None:
    return None if rows is None else rows[index]


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    there = [part for part in parts if part is not None]
    return torch.cat(there) if there else None


@torch.no_grad()
def compute_prefix(
    language_model: Any,
    embeddings: Tensor,
    lengths: Tensor,
    rest: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None,
    further: dict[str, Tensor] | None = None,
) -> Prefix:
    """Run the frozen language model over the prompts' embeddings (B, T, hidden).

    `rest` makes of the states (B, T, width) what is kept of them, and which rows are filled;
    `further` is the family's positions and mask, of which the first T are used.
    """
    from transformers import DynamicCache

    cache = DynamicCache(config=language_model.config)
    until = embeddings.shape[1]
    output = language_model(
        inputs_embeds=embeddings,
        past_key_values=cache,
        use_cache=True,
        **{
            name: value[..., :until] if name == "position_ids" else value[..., :until, :until]
            for name, value in (further or {}).items()
        },
    )
    keys = torch.stack([layer.keys for layer in cache.layers])
    values = torch.stack([layer.values for layer in cache.layers])
    real = torch.arange(keys.shape[3], device=keys.device) < lengths[:, None]  # (B, T)
    real = real[None, :, None, :, None]
    kept = () if rest is None else rest(output.last_hidden_state)
    return Prefix(keys * real, values * real, lengths, *kept)


def states_after(language_model: Any, prefix: Prefix, act: Tensor, shift: int = 0) -> Tensor:
    """Return the final states (B, n_act, hidden) of `<ACT>` after each prefix.

    Args:
        language_model: the frozen `LlamaModel`.
        prefix: of B samples.
        act: (n_act, hidden) embeddings shared by the batch, or (B, n_act, hidden); gradients
            flow to it and, where they are trainable, to the model's weights at these tokens.
        shift: by how much their positions differ from their places in the sequence.
    """
    from transformers import DynamicCache

    batch, n_act = len(prefix), act.shape[-2]
    act = act.expand(batch, n_act, act.shape[-1])
    dtype, device = act.dtype, act.device
    cache = DynamicCache(config=language_model.config)
    for layer, (keys, values) in enumerate(zip(prefix.keys, prefix.values, strict=True)):
        cache.update(keys.to(device, dtype), values.to(device, dtype), layer)
    longest = prefix.keys.shape[3]
    real = torch.arange(longest, device=device) < prefix.lengths.to(device)[:, None]
    past = real[:, None, :].expand(batch, n_act, longest)
    causal = torch.ones(n_act, n_act, dtype=torch.bool, device=device).tril()
    mask = torch.cat([past, causal.expand(batch, n_act, n_act)], dim=2)[:, None]
    positions = prefix.lengths.to(device)[:, None] + shift
    positions = positions + torch.arange(n_act, device=device)
    output = language_model(
        inputs_embeds=act,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
    )
    return output.last_hidden_state


Regime = Literal["frozen", "prompt", "lora", "full", "vocabulary"]
REGIMES = ("frozen", "prompt", "lora", "full", "vocabulary")
CHANGES = (
    "lora",
    "full",
    "vocabulary",
)  # regimes in which the language model is another afterwards


class RegimeError(ValueError):
    """A way of training that does not exist or does not fit the read-out."""


class ActionHead(nn.Module):
    """The auxiliary head: two-layer MLP from the state at `<ACT>` to one action (Sec. 6).

    The hidden layer is half the model's width, as in the paper's recipe (4096 to 2048).
    """

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(hidden, hidden // 2), nn.ReLU())
        self.position = nn.Linear(hidden // 2, 3)
        self.rotation = nn.Linear(hidden // 2, 6)
        self.gripper = nn.Linear(hidden // 2, 1)

    def forward(self, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, hidden) to position (B, 3) m, rotation (B, 6), gripper logit (B,)."""
        trunk = self.trunk(state)
        return self.position(trunk), self.rotation(trunk), self.gripper(trunk).squeeze(-1)


@dataclass(frozen=True, slots=True)
class ActionTarget:
    """What the auxiliary head is to predict: the target action of the dataset.

    position (B, 3) m, rotation (B, 6), gripper (B,) 0 closed or 1 open.
    """

    position: Tensor
    rotation: Tensor
    gripper: Tensor


@dataclass(frozen=True, slots=True)
class LossWeights:
    """Weights of Eq. 1 and 2 (omega_1 = 6, omega_2 = 2) and of the terms beside them.

    The paper's equation has no gripper term though its head predicts the gripper; 0.2 is the
    ratio of its auxiliary to its policy terms (6 / 30), applied to the policy's gripper loss.
    """

    position: float = 6.0
    rotation: float = 2.0
    gripper: float = 0.2
    clip: float = 0.0
    answer: float = 0.0


def action_loss(
    predicted: tuple[Tensor, Tensor, Tensor], target: ActionTarget, weights: LossWeights
) -> dict[str, Tensor]:
    """Return L_lm of Eq. 1 as its terms: L1 of position and rotation, cross-entropy of the gripper."""
    position, rotation, gripper = predicted
    return {
        "aux_position": weights.position * F.l1_loss(position, target.position),
        "aux_rotation": weights.rotation * F.l1_loss(rotation, target.rotation),
        "aux_gripper": weights.gripper
        * F.binary_cross_entropy_with_logits(gripper, target.gripper.to(gripper)),
    }


def clip_loss(latent: Tensor, text: Tensor, labels: Tensor, temperature: float = 0.07) -> Tensor:
    """Symmetric contrastive loss between latents and embeddings of their instructions.

    Args:
        latent: (B, d).
        text: (B, d), the instruction's embedding in the policy's own text space.
        labels: (B,) equal for equal instructions, which are then no negatives of each other.
        temperature: of the cosine similarities.
    """
    similar = F.normalize(latent, dim=-1) @ F.normalize(text, dim=-1).T / temperature
    same = (labels[:, None] == labels[None, :]).to(similar)
    target = same / same.sum(dim=1, keepdim=True)
    one = -(target * F.log_softmax(similar, dim=1)).sum(dim=1).mean()
    other = -(target * F.log_softmax(similar.T, dim=1)).sum(dim=1).mean()
    return (one + other) / 2


@dataclass(slots=True)
class Sample:
    """What one batch gives to the losses.

    Attributes:
        state: (B, n_tokens, hidden) raw read-out.
        z: (B, n_tokens, dim) latent goal, as the policy gets it.
        filled: (B, n_tokens) bool, False for rows that the instruction does not fill.
        answer: scalar, mean cross-entropy of the answers' tokens; None where none was asked for.
        answered: (B,), 1 where every token of the answer is the likeliest one, else 0.
    """

    state: Tensor
    z: Tensor
    filled: Tensor
    answer: Tensor | None = None
    answered: Tensor | None = None


def answered(prompt: Prompt, answer: Sequence[int]) -> Prompt:
    """Return a prompt that goes on with an answer's tokens behind `<ACT>`."""
    layout = replace(prompt.layout, length=prompt.layout.length + len(answer))
    return replace(prompt, ids=(*prompt.ids, *answer), layout=layout)


def check_answers(checkpoint: Checkpoint, config: LatentConfig, regime: Regime) -> None:
    """Raise RegimeError where an answer beside the latent would teach nothing, or cannot be had."""
    if regime not in ("lora", "full"):
        raise RegimeError(
            f"answer: regime {regime!r} leaves the language model as it is, and so its answers; "
            "it needs lora or full"
        )
    if config.layers_of(checkpoint.layers)[-1] != checkpoint.layers:
        raise RegimeError(
            f"answer: words come after layer {checkpoint.layers}, and the read-out "
            f"{config.name!r} ends before; read the last layer, too"
        )
    if not checkpoint.family.causal:
        raise RegimeError(
            f"answer: in a {checkpoint.kind!r} <ACT> would see the answer behind it; take a "
            "model that is causal"
        )


@dataclass(slots=True)
class Learned:
    """Which parameters a regime trains, by the group that they belong to."""

    head: list[nn.Parameter] = field(default_factory=list)
    act: list[nn.Parameter] = field(default_factory=list)
    language: list[nn.Parameter] = field(default_factory=list)


class System2Learner(nn.Module):
    """A vision-language model with its latent and auxiliary head, under one training regime.

    Args:
        model: transformers' network without the vocabulary layer (`Family.core`).
        checkpoint: what it was loaded from.
        head: `<ACT>`, projector and pooling; trained in place.
        regime: "frozen" trains projector (and pooling) alone, "prompt" also `<ACT>`, "lora"
            also low-rank adapters in the language model, "full" also the whole language
            model and the vision projector, "vocabulary" also the language-modelling head, which
            is the table of words of a model that ties the two (the paper's Sec. 5.2 by its words);
            the vision tower is always frozen, as in LLaVA.
        lora_rank: of "lora".
        words: the model's vocabulary layer, with which it can be asked for answers.

    Raises:
        RegimeError: an unknown regime, or answers that cannot be had with it or the read-out.
    """

    def __init__(
        self,
        model: Any,
        checkpoint: Checkpoint,
        head: LatentHead,
        regime: Regime = "prompt",
        lora_rank: int = 16,
        words: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if regime not in REGIMES:
            raise RegimeError(f"regime: {regime!r}, want one of {', '.join(REGIMES)}")
        if words is not None:
            check_answers(checkpoint, head.config, regime)
        # Not a part of the module: most models share it with their embedding table.
        self._words: tuple[nn.Module, ...] = () if words is None else (words,)
        self.regime = regime
        self.checkpoint = checkpoint
        self.head = head.requires_grad_(True)
        self.aux = ActionHead(checkpoint.hidden * head.config.width)
        self.model = model.requires_grad_(False)
        layers = head.config.layers_of(checkpoint.layers)
        self.family = checkpoint.family
        if regime == "lora":
            self._add_lora(lora_rank)  # before anything listens to the layers that it replaces
        stop_after(self.language, layers, checkpoint.layers, head.config.kind == KV)
        self.prompts = checkpoint.prompts(
            head.config.n_act, head.config.vision, proprio=head.config.proprio
        )
        self._end = load_tokenizer(checkpoint.path).eos_token_id if self._words else 0
        self._processor: Any = None  # loaded when the first image comes
        if regime == "frozen":
            head.act.requires_grad_(False)
        elif regime == "vocabulary":
            if not getattr(self.model.config, "tie_word_embeddings", False):
                raise RegimeError(
                    "regime: 'vocabulary' trains the language-modelling head, which in this model is "
                    "no table of words: no latent would change"
                )
            self.model.get_input_embeddings().requires_grad_(True)
        elif regime == "full":
            self.language.requires_grad_(True)
            self.family.projector(self.model).requires_grad_(True)

    @property
    def language(self) -> Any:
        """The stack of language-model layers."""
        return self.family.language(self.model)

    def act(self) -> Tensor:
        """Return `<ACT>` (n_act, hidden) as the language model's layers are given it."""
        scaled = self.head.act * act_scale(self.model)
        return scaled.to(self.model.get_input_embeddings().weight.dtype)

    def _add_lora(self, rank: int) -> None:
        from peft import LoraConfig, inject_adapter_in_model

        names = ["q_proj", "k_proj", "v_proj", "o_proj"]
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names)
        inject_adapter_in_model(config, self.language)
        for name, parameter in self.language.named_parameters():
            parameter.requires_grad_("lora_" in name)

    @property
    def cacheable(self) -> bool:
        """Whether samples can go through a cached prefix: nothing before `<ACT>` learns."""
        config = self.head.config
        fixed = self.regime in ("frozen", "prompt") and not config.proprio
        return fixed and config.kind in CACHEABLE

    def learned(self) -> Learned:
        """Return the trainable parameters by group; the paper gives them different rates."""
        act = [self.head.act] if self.head.act.requires_grad else []
        rest = [p for n, p in self.head.named_parameters() if n != "act"]
        language = [p for p in self.model.parameters() if p.requires_grad]
        return Learned(head=[*rest, *self.aux.parameters()], act=act, language=language)

    @torch.no_grad()
    def prefix(self, images: Sequence[Image.Image] | Tensor, texts: Sequence[str]) -> Prefix:
        """Return the cacheable part of samples; compute it once and keep it.

        Args:
            images: PIL images, or projected image tokens (B, n_image, hidden).
            texts: instructions.

        Raises:
            RegimeError: something before `<ACT>` is being trained, so nothing may be kept.
        """
        if not self.cacheable:
            raise RegimeError(
                f"prefix: with regime {self.regime!r} and read-out {self.head.config.kind!r} "
                "the prefix changes as training goes on"
            )
        embeddings, lengths, further = self._embed(images, [self.prompts(text) for text in texts])
        n_act, kind = self.head.config.n_act, self.head.config.kind
        layouts = [self.prompts(text).layout for text in texts]

        def rest(states: Tensor) -> tuple[Tensor, Tensor]:
            if kind == "act_words":
                rows = [s[slice(*at.words)].mean(0) for s, at in zip(states, layouts, strict=True)]
                means = torch.stack(rows).unsqueeze(1)
                return means, torch.ones_like(means[..., 0], dtype=torch.bool)
            each = self.head.config.text_rows
            said = [s[slice(*at.text)][:each] for s, at in zip(states, layouts, strict=True)]
            filled = torch.tensor([[i < len(s) for i in range(each)] for s in said])
            padded = torch.stack([F.pad(s, (0, 0, 0, each - len(s))) for s in said])
            return padded, filled.to(padded.device)

        return compute_prefix(
            self.language,
            embeddings[:, : int(lengths.max()) - n_act],
            lengths - n_act,
            rest if kind in ("act_words", "act_lang") else None,
            further,
        )

    @property
    def shift(self) -> int:
        """By how much positions behind the picture differ from places in the sequence."""
        return self.family.shift(self.checkpoint.n_image if self.head.config.vision else 0)

    def from_prefix(self, prefix: Prefix) -> Sample:
        """Return read-out and latent of cached samples, with exact gradients."""
        state = states_after(self.language, prefix, self.act(), self.shift).float()
        if prefix.rest is None or prefix.filled is None:
            return self.from_states(state, torch.ones_like(state[..., 0], dtype=torch.bool))
        rest = prefix.rest.to(state)
        if self.head.config.kind == "act_words":
            state = torch.cat([state.flatten(1), rest[:, 0]], 1).unsqueeze(1)
            return self.from_states(state, prefix.filled.to(state.device))
        full = torch.ones_like(state[..., 0], dtype=torch.bool)
        filled = torch.cat([full, prefix.filled.to(state.device)], 1)
        return self.from_states(torch.cat([state, rest], 1), filled)

    def from_states(self, state: Tensor, filled: Tensor) -> Sample:
        """Return the latent of raw read-outs (B, n_tokens, hidden) that were kept."""
        return Sample(state, self.head.project(state, filled), filled)

    def forward(
        self,
        images: Sequence[Image.Image] | Tensor,
        texts: Sequence[str],
        question: int = 0,
        answers: Sequence[str] = (),
        proprio: Tensor | None = None,
    ) -> Sample:
        """Return read-out and latent with gradients to everything that the regime trains.

        With `answers`, one a text, the sequence goes on with them behind `<ACT>`, which attends
        to none of it, and the sample has their loss. A read-out with `proprio` needs the robot's
        states (B, 9).
        """
        prompts = [self.prompts(text, QUESTIONS[question]) for text in texts]
        if answers:
            ids = [(*self.prompts.tokenize(answer)[0], self._end) for answer in answers]
            prompts = [answered(p, row) for p, row in zip(prompts, ids, strict=True)]
        embeddings, _, further = self._embed(images, prompts)
        config = self.head.config
        # <ACT> in the table is a copy; put the learned one in its place.
        rows = torch.arange(len(texts), device=embeddings.device)[:, None]
        first = torch.tensor([p.layout.act[0] for p in prompts], device=embeddings.device)
        places = first[:, None] + torch.arange(config.n_act, device=embeddings.device)
        act = self.act().expand(len(texts), -1, -1)
        embeddings = embeddings.index_put((rows, places), act)
        if self.head.sense is not None:
            if proprio is None:
                raise RegimeError("proprio: this read-out also reads the robot's state; none given")
            state = self.head.sense(proprio.to(embeddings.device)) * act_scale(self.model)
            at = (rows[:, 0], first - 1)
            embeddings = embeddings.index_put(at, state.to(embeddings.dtype))
        output = self.language(inputs_embeds=embeddings, use_cache=False, **further)
        states = output.last_hidden_state
        raw, filled = zip(
            *(
                read_out(config, states[row, : p.layout.length].float(), p.layout, self.head.pool)
                for row, p in enumerate(prompts)
            ),
            strict=True,
        )
        sample = self.from_states(torch.stack(raw), torch.stack(filled))
        return self._with_answers(sample, states, prompts) if answers else sample

    def _with_answers(self, sample: Sample, states: Tensor, prompts: Sequence[Prompt]) -> Sample:
        """Return a sample with what it says in words, of states (B, T, width)."""
        (words,) = self._words
        last = states[..., -self.checkpoint.hidden :]  # of several layers the final one
        spans = [(p.layout.act[1], p.layout.length) for p in prompts]
        before = torch.cat([last[row, a - 1 : b - 1] for row, (a, b) in enumerate(spans)])
        wanted = torch.tensor(
            [i for p, (a, b) in zip(prompts, spans, strict=True) for i in p.ids[a - b :]],
            device=states.device,
        )
        logits = words.to(states.device)(before).float()
        hits = (logits.detach().argmax(1) == wanted).split([b - a for a, b in spans])
        right = torch.stack([hit.all().float() for hit in hits])
        return replace(sample, answer=F.cross_entropy(logits, wanted), answered=right)

    def _embed(
        self, images: Sequence[Image.Image] | Tensor, prompts: Sequence[Prompt]
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        features = None
        if self.head.config.vision:
            asked = [prompt.text for prompt in prompts]
            features = images if isinstance(images, Tensor) else self.image_tokens(images, asked)
        return embedded(self.family, self.model, prompts, self.checkpoint.image_token_id, features)

    def image_tokens(self, images: Sequence[Image.Image], asked: Sequence[str] = ()) -> Tensor:
        """Return projected image tokens (B, n_image, hidden).

        `asked` is what each picture is asked, which some families look for (`reads_words`).
        """
        if self._processor is None:
            self._processor = self.checkpoint.image_processor()
        return picture_tokens(self.checkpoint, self.model, self._processor, images, asked)

    @torch.no_grad()
    def text_embedding(self, texts: Sequence[str]) -> Tensor:
        """Embed instructions with the language model alone: mean of the final states (B, hidden).

        For the alignment loss where no CLIP text encoder is at hand.
        """
        rows = []
        for text in texts:
            ids = torch.tensor([self.prompts.tokenize(text)[0]], device=self.model.device)
            rows.append(self.language(input_ids=ids).last_hidden_state[0].mean(dim=0))
        return torch.stack(rows).float()

    def losses(
        self,
        sample: Sample,
        target: ActionTarget | None = None,
        policy_loss: Callable[[Tensor], Tensor] | None = None,
        text: Tensor | None = None,
        labels: Tensor | None = None,
        weights: LossWeights | None = None,
    ) -> dict[str, Tensor]:
        """Return every term of the total loss (Eq. 4) as a weighted scalar; their sum is the loss.

        Args:
            sample: of `forward` or `from_prefix`.
            target: for the auxiliary action head.
            policy_loss: latent (B, n_tokens, dim) to the policy's weighted loss.
            text, labels: for `clip_loss`, with `weights.clip` above 0.
            weights: of the terms.
        """
        weights = weights or LossWeights()
        terms: dict[str, Tensor] = {}
        if target is not None:
            if self.head.config.kind == KV:
                raise RegimeError("aux: keys and values hold no state to predict an action from")
            terms |= action_loss(self.aux(sample.state[:, 0]), target, weights)
        if weights.clip > 0:
            if text is None or labels is None:
                raise RegimeError("clip: the alignment loss needs `text` and `labels`")
            terms["clip"] = weights.clip * clip_loss(sample.z[:, 0], text, labels)
        if weights.answer > 0 and sample.answer is not None:
            terms["answer"] = weights.answer * sample.answer
        if policy_loss is not None:
            terms["policy"] = policy_loss(sample.z)
        return terms


# ------------------------------------------------------------------------------------------------
# Read-outs of many sentences about one picture, for a language model that does not learn.
#
# Image before text and causal attention: the image's keys and values are the same for every
# sentence about it. They are computed once, and each sentence costs its own tokens alone.


@torch.no_grad()
def encode_states(
    learner: System2Learner, images: Sequence[Image.Image] | Tensor, texts: Sequence[Sequence[str]]
) -> tuple[Tensor, Tensor]:
    """Return raw read-outs and which of their rows are filled.

    Args:
        learner: with the `<ACT>` to read at.
        images: B pictures, or their projected tokens (B, n_image, hidden); not looked at by a
            read-out without vision.
        texts: for each picture P instructions.

    Returns:
        states (B, P, n_tokens, hidden) float32 and (B, P, n_tokens) bool.
    """
    config, each = learner.head.config, len(texts[0])
    flat = [text for row in texts for text in row]
    apart = not learner.family.causal or learner.family.reads_words
    if not config.vision or config.kind in NEEDS_VISION or apart:
        pictures: Sequence[Image.Image] | Tensor = images
        if config.vision and not isinstance(images, Tensor):
            if learner.family.reads_words:
                pictures = [image for image in images for _ in range(each)]
            else:
                pictures = learner.image_tokens(images).repeat_interleave(each, 0)
        elif isinstance(images, Tensor):
            pictures = images.repeat_interleave(each, 0)
        sample = learner(pictures, flat)
        return sample.state.unflatten(0, (-1, each)), sample.filled.unflatten(0, (-1, each))
    prompts = [learner.prompts(text) for text in flat]
    prefix = image_prefix(learner, images, prompts[::each])
    tail = sentence_tail(learner, prompts)
    if config.kind == "lang_mean":  # nothing behind the words is read
        tail = tail[:, : max(shifted(prompt.layout).words[1] for prompt in prompts)]
    repeated = prefix.rows(torch.arange(len(texts)).repeat_interleave(each))
    states = states_after(learner.language, repeated, tail, learner.shift).float()
    raw, marks = [], []
    for row, prompt in enumerate(prompts):
        layout = shifted(prompt.layout)
        state, mark = read_out(config, states[row, : layout.length], layout, learner.head.pool)
        raw.append(state)
        marks.append(mark)
    return torch.stack(raw).unflatten(0, (-1, each)), torch.stack(marks).unflatten(0, (-1, each))


def image_prefix(
    learner: System2Learner, images: Sequence[Image.Image] | Tensor, prompts: Sequence[Prompt]
) -> Prefix:
    """Return keys and values of the prompts' words before the image and of the image (B)."""
    features = images if isinstance(images, Tensor) else learner.image_tokens(images)
    embeddings, _, further = embedded(
        learner.family, learner.model, prompts, learner.checkpoint.image_token_id, features
    )
    stop = prompts[0].layout.image[1]
    lengths = torch.full((len(prompts),), stop, device=embeddings.device)
    return compute_prefix(learner.language, embeddings[:, :stop], lengths, further=further)


def sentence_tail(learner: System2Learner, prompts: Sequence[Prompt]) -> Tensor:
    """Return the embeddings (B, T, hidden) of what follows the image, padded on the right."""
    table = learner.model.get_input_embeddings()
    act = learner.act()
    longest = max(p.layout.length - p.layout.image[1] for p in prompts)
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        rest = (*prompt.around[1], *prompt.ids[prompt.image_at + 1 :])
        ids[row, : len(rest)] = torch.tensor(rest)
    tail = table(ids.to(table.weight.device))
    for row, prompt in enumerate(prompts):
        start, stop = shifted(prompt.layout).act
        tail[row, start:stop] = act
    return tail


def shifted(layout: Layout) -> Layout:
    """Return the layout of what follows the image, counted from there."""
    by = layout.image[1]
    return replace(
        layout,
        length=layout.length - by,
        image=(0, 0),
        text=(layout.text[0] - by, layout.text[1] - by),
        act=(layout.act[0] - by, layout.act[1] - by),
        words=(layout.words[0] - by, layout.words[1] - by),
    )
