"""3D Diffuser Actor's denoiser, with everything cached that a denoising loop repeats.

Sources: Ke et al. 2024, "3D Diffuser Actor", Sec. 3.3, and the shapes of the published
checkpoints. One network evaluation: trajectory tokens attend to language, then to all scene
tokens; trajectory and sampled scene tokens attend to each other in four layers, with
language between; a rotation and a position branch of two layers each; the gripper reads the
position branch.

`prepare` computes once a call what depends on the observation alone (keys and values of the
scene for cross-attention, keys and values of language for all layers, rotary codes, keys and
values of the scene tokens in the first self-attention layer when language is one token) or
on the timestep alone (all modulation tables). Inside the loop, rows that nobody reads are
skipped: the last layer of each branch computes the trajectory's rows only. All of it is
exact; the tests hold it against a plain implementation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from openhelix.system1.attention import official_frequencies, rotary_code, sinusoid
from openhelix.system1.config import PolicyConfig
from openhelix.system1.encoder import OfficialScene
from openhelix.system1.heads.base import Step
from openhelix.system1.layers import (
    CrossStack,
    KeyValue,
    LanguageStack,
    SelfStack,
    Table,
    Words,
    join,
    words_of,
)

LANGUAGE_LAYERS = 3  # of the shared stack, from the first
BRANCH_LAYERS = 2


class StackTables(NamedTuple):
    """The modulation of one stack: an entry a layer, each (..., 1, dim) twice."""

    language: list[Table]
    attention: list[Table]
    feed: list[Table]

    def steps(self) -> list[StackTables]:
        """Return the tables of each step, of tables made for all steps."""
        # Unbound at once: picking a step's rows one by one costs a millisecond a call.
        parts = [[zip(s.unbind(0), b.unbind(0), strict=True) for s, b in part] for part in self]
        layers = [list(zip(*part, strict=True)) for part in parts]
        count = max(len(part) for part in layers)
        return [
            StackTables(*(list(part[i]) if part else [] for part in layers)) for i in range(count)
        ]


class Tables(NamedTuple):
    """The modulation of the whole head."""

    cross: StackTables
    shared: StackTables
    rotation: StackTables
    position: StackTables

    def steps(self) -> list[Tables]:
        """Return the tables of each step."""
        parts = zip(*(part.steps() for part in self), strict=True)
        return [Tables(*part) for part in parts]


class Place(NamedTuple):
    """Where the tokens of self-attention are: the trajectory's first, then the scene's."""

    code: Tensor  # (B * k, T + K, dim), rotary
    mask: Tensor | None  # (B * k, T + K); None when every token is valid
    padding: int  # tokens at the end that only round the number; nobody sees them
    rows: int  # T


@dataclass(frozen=True, slots=True)
class Cache:
    """What depends on the observation alone."""

    scene: OfficialScene
    language: Words  # of the trajectory's own language layer
    context: list[KeyValue]  # of each cross-attention layer
    shared_language: list[Words]
    rotation_language: list[Words]
    position_language: list[Words]
    first: tuple[Tensor, KeyValue] | None  # scene tokens after the first language layer


class DiffuserActorHead(nn.Module):
    """The denoiser; parameter names as in the published checkpoints."""

    frequencies: Tensor
    rows: Tensor

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        dim, heads = config.dim, config.heads
        self.dim = dim
        self.published_batching = False  # see `words_for`
        self.traj_encoder = nn.Linear(9, dim)
        self.time_emb = nn.Sequential(
            nn.Identity(), nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim)
        )
        self.curr_gripper_emb = nn.Sequential(
            nn.Linear(dim * config.nhist, dim), nn.ReLU(), nn.Linear(dim, dim)
        )
        self.traj_lang_attention = nn.ModuleList([LanguageStack(dim, heads, 1)])
        self.cross_attn = CrossStack(dim, heads, 2, adaln=True)
        self.self_attn = SelfStack(dim, heads, config.layers, LANGUAGE_LAYERS)
        self.rotation_proj = nn.Linear(dim, dim)
        self.rotation_self_attn = SelfStack(dim, heads, BRANCH_LAYERS, 1)
        self.rotation_predictor = predictor(dim, 6)
        self.position_proj = nn.Linear(dim, dim)
        self.position_self_attn = SelfStack(dim, heads, BRANCH_LAYERS, 1)
        self.position_predictor = predictor(dim, 3)
        self.openess_predictor = predictor(dim, 1)
        self.register_buffer("frequencies", official_frequencies(dim), persistent=False)
        rows = sinusoid(torch.arange(config.horizon), dim)
        self.register_buffer("rows", rows, persistent=False)

    def forward(self, x: Tensor, t: Tensor, scene: OfficialScene) -> tuple[Tensor, Tensor]:
        """Predict noise and openness for mixed timesteps; see `heads.base.DiffusionHead`."""
        draws = len(x) // len(scene.context)
        signal = self.time_emb(sinusoid(t, self.dim).to(self.dtype))
        signal = signal + self.hand(scene).repeat_interleave(draws, 0)
        return self.denoise(x, self.tables(signal), self.cache(scene))

    def prepare(self, scene: OfficialScene, timesteps: Tensor) -> Step:
        """Fill the caches for the given steps; see `heads.base.DiffusionHead`."""
        signal = self.time_emb(sinusoid(timesteps, self.dim).to(self.dtype)).unsqueeze(
            1
        ) + self.hand(scene)
        tables = self.tables(signal)
        steps = tables.steps()
        cache = self.cache(scene)

        def step(i: int, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.denoise(x, steps[i], cache)

        return step

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the weights."""
        return self.traj_encoder.weight.dtype

    def hand(self, scene: OfficialScene) -> Tensor:
        """Return the gripper history's part of the modulation signal, (B, dim)."""
        return self.curr_gripper_emb(scene.gripper.flatten(1))

    def tables(self, signal: Tensor) -> Tables:
        """Return all modulations for signals (..., dim)."""
        pairs = self.cross_attn.pairs()
        cross = StackTables(
            [],
            [attention.adaln.table(signal) for attention, _ in pairs],
            [feed.adaln.table(signal) for _, feed in pairs],
        )
        stacks = (self.self_attn, self.rotation_self_attn, self.position_self_attn)
        return Tables(cross, *(stack_tables(stack, signal) for stack in stacks))

    def cache(self, scene: OfficialScene) -> Cache:
        """Compute what depends on the observation alone."""
        own: LanguageStack = self.traj_lang_attention[0]  # type: ignore[assignment]
        words = self.words_for(scene.language)
        shared = language_words(self.self_attn, words)
        first = None
        if words.shape[1] == 1:
            # One language token adds a constant, so the scene tokens that enter the first
            # self-attention do not depend on the step, and neither do their keys and values.
            language, attention, _ = self.self_attn.layers()[0]
            if language is not None:
                tokens = language(scene.sampled, shared[0])
                first = (tokens, attention.multihead_attn.key_value(tokens, scene.sampled_code))
        return Cache(
            scene,
            words_of(own.typed()[0].cross_12, scene.language),
            [
                attention.multihead_attn.key_value(scene.context, scene.code)
                for attention, _ in self.cross_attn.pairs()
            ],
            shared,
            language_words(self.rotation_self_attn, words),
            language_words(self.position_self_attn, words),
            first,
        )

    def words_for(self, language: Tensor) -> Tensor:
        """Return the language tokens that the stacks attend to, (B, n, dim).

        The published code hands these layers (batch, token) where they expect (token,
        batch). With one observation or one token that changes nothing; otherwise sample b
        reads tokens b, b + B, b + 2B, ... of the whole batch. We give every sample its own
        tokens; `published_batching` reproduces the other.
        """
        if not self.published_batching:
            return language
        batch, count, dim = language.shape
        return language.reshape(count, batch, dim).transpose(0, 1)

    def denoise(self, x: Tensor, tables: Tables, cache: Cache) -> tuple[Tensor, Tensor]:
        """Evaluate the network for noisy trajectories x (B * k, T, 9)."""
        scene, rows = cache.scene, x.shape[1]
        own: LanguageStack = self.traj_lang_attention[0]  # type: ignore[assignment]
        here = rotary_code(x[..., :3], self.frequencies)
        rows_at = self.rows.to(self.dtype)
        h = own.typed()[0].attend(self.traj_encoder(x.to(self.dtype)), cache.language, rows_at)
        h = h + rows_at
        for i, (attention, feed) in enumerate(self.cross_attn.pairs()):
            h = attention(h, cache.context[i], tables.cross.attention[i], here, scene.mask)
            h = feed(h, tables.cross.feed[i])
        code = join(here, scene.sampled_code)
        mask = None
        if scene.sampled_mask is not None:
            every = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
            mask = join(every, scene.sampled_mask)
        place = Place(code, mask, scene.padding, rows)
        h = self.shared(h, tables.shared, cache, place)
        turn = run_branch(
            self.rotation_self_attn, h, tables.rotation, cache.rotation_language, place
        )
        move = run_branch(
            self.position_self_attn, h, tables.position, cache.position_language, place
        )
        move = self.position_proj(move)
        rotation = self.rotation_predictor(self.rotation_proj(turn))
        noise = torch.cat((self.position_predictor(move), rotation), -1)
        return noise, self.openess_predictor(move)

    def shared(self, h: Tensor, tables: StackTables, cache: Cache, place: Place) -> Tensor:
        """Run the shared stack over trajectory and sampled scene tokens, (B * k, T + K, dim)."""
        for i, (language, attention, feed) in enumerate(self.self_attn.layers()):
            kv: KeyValue | None = None
            if i == 0:
                if cache.first is not None and language is not None:
                    tokens, (k, v) = cache.first
                    h = language(h, cache.shared_language[0])
                    own_k, own_v = attention.multihead_attn.key_value(
                        h, place.code[:, : h.shape[1]]
                    )
                    kv = join(own_k, k), join(own_v, v)
                    h = join(h, tokens)
                    language = None
                else:
                    h = join(h, cache.scene.sampled)
            if language is not None:
                h = language(h, cache.shared_language[i], tables.language[i])
            if kv is None:
                kv = attention.multihead_attn.key_value(h, place.code)
            h = attention(h, kv, tables.attention[i], place.code, place.mask, place.padding)
            h = feed(h, tables.feed[i])
        return h


def predictor(dim: int, out: int) -> nn.Sequential:
    """Return the two-layer output network."""
    return nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, out))


def stack_tables(stack: SelfStack, signal: Tensor) -> StackTables:
    """Return one stack's modulations for signals (..., dim)."""
    layers = stack.layers()
    return StackTables(
        [language.adaln.table(signal) for language, _, _ in layers if language is not None],
        [attention.adaln.table(signal) for _, attention, _ in layers],
        [feed.adaln.table(signal) for _, _, feed in layers],
    )


def language_words(stack: SelfStack, words: Tensor) -> list[Words]:
    """Return what each of a stack's layers needs of language."""
    return [
        words_of(language.multihead_attn, words)
        for language, _, _ in stack.layers()
        if language is not None
    ]


def run_branch(
    stack: SelfStack,
    h: Tensor,
    tables: StackTables,
    words: list[Words],
    place: Place,
) -> Tensor:
    """Run an output branch; return the trajectory's rows only, (B * k, rows, dim)."""
    code = place.code
    layers = stack.layers()
    for i, (language, attention, feed) in enumerate(layers):
        if language is not None:
            h = language(h, words[i], tables.language[i])
        kv = attention.multihead_attn.key_value(h, code)
        if i == len(layers) - 1:
            h, code = h[:, : place.rows], code[:, : place.rows]
        h = attention(h, kv, tables.attention[i], code, place.mask, place.padding)
        h = feed(h, tables.feed[i])
    return h
