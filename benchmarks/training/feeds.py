"""Where a step's latents come from: the living language model, cached prefixes, cached states.

All three give the same thing (a `Sample` of System 2 for some frames), and differ in what may
learn: everything, `<ACT>` alone, or nothing of the language model.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks.training.ages import at_most, spread
from benchmarks.training.config import REGIMES, LatentSection
from benchmarks.training.pictures import Pictures, Sentences
from benchmarks.training.store import Plan, Store
from runtime.config import ConfigError
from system1.data import Cache
from system2.latents import digest
from system2.prefix import Prefix
from system2.states import encode_states
from system2.train import Regime, Sample, System2Learner

PREFIX_PART, STATES_PART = 64, 512  # frames a file


@dataclass(frozen=True, slots=True)
class Drawn:
    """One batch of System 2: which frames it saw, what it was told, what came out."""

    frames: Tensor  # (B,)
    instruction: Tensor  # (B,)
    sample: Sample


class Feed(Protocol):
    """A source of latents; `frames` (N,) are those it can give them for."""

    frames: Tensor

    def draw(self, rows: Tensor, generator: torch.Generator) -> Drawn:
        """Return the samples of some of the frames, by their rows (B,) in `frames`."""


@dataclass(frozen=True, slots=True)
class Source:
    """The cache as System 2 reads it."""

    cache: Cache
    pictures: Pictures
    sentences: Sentences

    @staticmethod
    def open(cache: Cache, seed: int, vision: bool = True) -> Source:
        """Open it; see `Pictures` for the errors."""
        return Source(cache, Pictures(cache, vision), Sentences(cache, seed))


class LiveFeed:
    """The language model runs in every step, with gradients to whatever its regime trains.

    Tower and vision projector learn in regime "full" alone; else a picture's tokens are kept
    from the first time it is seen, where all pictures' fit into `max_bytes`.
    """

    def __init__(self, learner: System2Learner, source: Source, max_bytes: float) -> None:
        self._learner, self._source = learner, source
        self.frames = torch.arange(len(source.cache))
        shape = (len(self.frames), learner.checkpoint.n_image, learner.checkpoint.hidden)
        small = shape[0] * shape[1] * shape[2] * learner.model.dtype.itemsize <= max_bytes
        self._kept: Tensor | None = None
        if small and learner.head.config.vision and learner.regime != "full":
            self._kept = torch.empty(shape, dtype=learner.model.dtype, device=learner.model.device)
        self._seen = torch.zeros(len(self.frames), dtype=torch.bool)

    def draw(self, rows: Tensor, generator: torch.Generator) -> Drawn:
        """See `Feed.draw`; the sentence is drawn anew each time."""
        frames = self.frames[rows]
        said = self._source.sentences.drawn(frames, generator)
        sample = self._learner(self._pictures(frames), self._source.sentences[said])
        return Drawn(frames, said, sample)

    def _pictures(self, frames: Tensor) -> Any:
        if not self._learner.head.config.vision:
            return []
        if self._kept is None:
            return self._source.pictures(frames)
        new = frames[~self._seen[frames]].unique()
        if len(new):
            with torch.no_grad():
                tokens = self._learner.image_tokens(self._source.pictures(new))
            self._kept[new] = tokens.to(self._kept.dtype)
            self._seen[new] = True
        return self._kept[frames]


class PrefixFeed:
    """`<ACT>` runs over cached keys and values: exact, at the price of one token."""

    def __init__(self, learner: System2Learner, store: Store) -> None:
        self._learner, self._store = learner, store
        self.frames = store.plan.frames

    def draw(self, rows: Tensor, generator: torch.Generator) -> Drawn:
        """See `Feed.draw`."""
        prefix = joined(self._store.read(rows)).at(self._learner.model.device)
        sample = self._learner.from_prefix(prefix)
        return Drawn(self.frames[rows], self._store.plan.instructions[rows, 0], sample)


class StateFeed:
    """Read-outs that were kept; only what comes after them learns."""

    def __init__(self, learner: System2Learner, store: Store) -> None:
        self._learner, self._plan = learner, store.plan
        self.frames = store.plan.frames
        self._kept = store.whole()
        learner.head.act.requires_grad_(False)

    def draw(self, rows: Tensor, generator: torch.Generator) -> Drawn:
        """See `Feed.draw`; one of the kept sentences is drawn."""
        which = torch.randint(self._plan.instructions.shape[1], rows.shape, generator=generator)
        device = self._learner.head.act.device
        state = self._kept["state"][rows, which].float().to(device)
        filled = self._kept["filled"][rows, which].to(device)
        said = self._plan.instructions[rows, which]
        return Drawn(self.frames[rows], said, self._learner.from_states(state, filled))


def joined(rows: list[dict[str, Tensor]]) -> Prefix:
    """Return stored prefixes as one batch, cut to the longest."""
    lengths = torch.stack([row["length"] for row in rows])
    longest = int(lengths.max())
    kv = torch.stack([fitted(row["kv"], longest) for row in rows], 2)  # (2, layers, B, kv, T, d)
    return Prefix(kv[0], kv[1], lengths)


def fitted(kv: Tensor, longest: int) -> Tensor:
    """Return (…, T, d) cut or filled up to `longest` positions."""
    kv = kv[..., :longest, :]
    return torch.nn.functional.pad(kv, (0, 0, 0, longest - kv.shape[-2]))


def regime_of(section: LatentSection, stage: str) -> Regime:
    """Return what of System 2 a stage trains: the language model is frozen in the first."""
    regime: Regime = REGIMES[section.regime]
    return "prompt" if stage == "stage1" and regime in ("lora", "full") else regime


def feed_kind(section: LatentSection, stage: str, device: str) -> str:
    """Return which feed a stage takes.

    Raises:
        ConfigError: the one asked for cannot train what the regime says.
    """
    regime, wanted = regime_of(section, stage), section.feed
    learns_before_act = regime in ("lora", "full")
    if wanted == "auto":
        if learns_before_act or section.kind == "pool_map":
            return "live"
        if regime == "frozen":
            return "states" if device == "cpu" else "live"
        if device != "cpu":
            return "live"
        return "prefix" if stage == "stage1" and section.kind == "act_last" else "states"
    if wanted != "live" and learns_before_act:
        raise ConfigError(
            f"latent.feed: {wanted!r} keeps what regime {regime!r} trains; use live or auto"
        )
    if wanted == "prefix" and (section.kind != "act_last" or regime == "frozen"):
        raise ConfigError(
            "latent.feed: 'prefix' trains <ACT> at the last layer: it needs latent.kind=act_last "
            "and latent.regime=prompt_tuning"
        )
    if wanted == "states" and section.kind == "pool_map":
        raise ConfigError("latent.feed: 'states' cannot train the pooling of 'pool_map'; use live")
    return wanted


def prefix_store(
    root: Path, learner: System2Learner, source: Source, section: LatentSection
) -> Store:
    """Return the store of prefixes for at most `section.frames` frames, evenly over the cache."""
    frames = at_most(source.cache, section.frames)
    said = source.sentences.of_frames(frames, 1)
    text = learner.model.config.text_config
    longest = max(learner.prompts(t).layout.length for t in source.sentences[said[:, 0].unique()])
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    each = 2 * text.num_hidden_layers * text.num_key_value_heads * width * longest
    each *= torch.finfo(learner.model.dtype).bits // 8
    identity = about(learner, source, section) | {"kind": "prefix"}
    return Store(root, "prefix", identity, Plan(frames, said, each, PREFIX_PART))


def states_store(
    root: Path, learner: System2Learner, source: Source, section: LatentSection
) -> Store:
    """Return the store of states at the learner's `<ACT>`, every `section.stride`-th frame."""
    frames = spread(source.cache, section.stride)
    said = source.sentences.of_frames(frames, section.phrasings)
    config, checkpoint = learner.head.config, learner.checkpoint
    rows = config.n_tokens(checkpoint.n_image) * section.phrasings
    identity = about(learner, source, section) | {
        "kind": "states",
        "read_out": asdict(config),
        "act": digest({"act": learner.head.act}),
    }
    plan = Plan(frames, said, rows * (2 * checkpoint.hidden + 1), STATES_PART)
    return Store(root, "states", identity, plan)


def about(learner: System2Learner, source: Source, section: LatentSection) -> dict[str, Any]:
    """Return what every kept tensor depends on."""
    return {
        "model": learner.checkpoint.model_id,
        "n_act": section.n_act,
        "vision": section.vision,
        "dtype": str(learner.model.dtype),
        "pictures": source.pictures.source,
        "cache": [str(source.cache.meta["notes"]), source.cache.meta["shards"]],
    }


def encode_prefix(
    learner: System2Learner, source: Source, batch: int, frames: Tensor, said: Tensor
) -> dict[str, Tensor]:
    """Return a part of the prefix store."""
    parts = []
    for start in range(0, len(frames), batch):
        rows = slice(start, start + batch)
        pictures = source.pictures(frames[rows]) if learner.head.config.vision else []
        parts.append(learner.prefix(pictures, source.sentences[said[rows, 0]]).at("cpu"))
    whole = Prefix.join(parts)
    kv = torch.stack((whole.keys, whole.values)).permute(2, 0, 1, 3, 4, 5)
    return {"kv": kv.to(learner.model.dtype), "length": whole.lengths}


def encode_read_outs(
    learner: System2Learner, source: Source, batch: int, frames: Tensor, said: Tensor
) -> dict[str, Tensor]:
    """Return a part of the states store.

    Half precision has a range of 65504, far above any state's, and three digits: as many as
    the bfloat16 model that made them.
    """
    states, marks = [], []
    for start in range(0, len(frames), batch):
        rows = slice(start, start + batch)
        pictures = source.pictures(frames[rows]) if learner.head.config.vision else []
        texts = [source.sentences[row] for row in said[rows]]
        state, filled = encode_states(learner, pictures, texts)
        states.append(state.to("cpu", torch.float16))
        marks.append(filled.cpu())
    return {"state": torch.cat(states), "filled": torch.cat(marks)}
