"""Where a step's latents come from: the live language model, cached prefixes, cached states.

All three feeds give the same thing (a `Sample` of System 2 for some frames), and differ in what
may learn: everything, `<ACT>` alone, or nothing of the language model. `Ages` says which
observation a frame's latent comes from, `Pictures` and `Sentences` provide System 2's inputs
there, and a `Store` caches the frozen language model's outputs.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from openhelix.benchmarks.calvin.goals import plain
from openhelix.benchmarks.calvin.phrases import PhraseError, development
from openhelix.benchmarks.calvin.tasks import TASKS
from openhelix.benchmarks.calvin.wordings import wordings as drawn_wordings
from openhelix.benchmarks.training.config import REGIMES, LatentSection
from openhelix.runtime.core.config import ConfigError
from openhelix.runtime.core.files import load_tensors, replace_file, save_tensors, tensor_header
from openhelix.runtime.core.workers import ALONE, Workers
from openhelix.system1.data import Cache
from openhelix.system1.draws import rand, randint
from openhelix.system2.latents import KV, digest
from openhelix.system2.train import (
    CACHEABLE,
    CHANGES,
    Prefix,
    Regime,
    Sample,
    System2Learner,
    encode_states,
)

# -- Ages: which observation a frame's latent comes from -------------------------------
#
# At run time a latent is older than the frame that it steers. So in training every frame is
# drawn equally often, and its latent comes from any observation of its episode that has one and
# is at most `lag` environment steps older. That is also why not every frame needs a latent.


class Ages:
    """Matches frames with older ones that have a latent.

    Args:
        cache: whose episodes lie one after the other, each in time order.
        sources: (N,) ascending, the frames that have a latent.
        lag: most environment steps between the two.
    """

    def __init__(self, cache: Cache, sources: Tensor, lag: int) -> None:
        self._step, self._hz = cache.step, cache.hz
        self._sources = sources = sources.contiguous()  # torch warns of a slice
        step = cache.step
        ordinal = episode_ordinals(cache)
        # Wider than an episode and the lag together, so that no window reaches another episode.
        width = int(step.max()) + lag + 1
        key = ordinal * width + step
        self._first = torch.searchsorted(key[sources], torch.maximum(key - lag, ordinal * width))
        self._last = torch.searchsorted(sources, torch.arange(len(cache)), right=True) - 1

    def reachable(self, frames: Tensor) -> Tensor:
        """Return those of frames (B,) that have a source."""
        return frames[self._first[frames] <= self._last[frames]]

    def draw(self, frames: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return a source's row (B,) for each frame, evenly over those it has, and its age."""
        first, last = self._first[frames], self._last[frames]
        share = rand(len(frames), generator=generator)
        rows = first + (share * (last - first + 1)).long()
        return rows, self.age_s(frames, rows)

    def newest(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Return the newest source's row (B,) for each frame, and its age."""
        rows = self._last[frames]
        return rows, self.age_s(frames, rows)

    def age_s(self, frames: Tensor, rows: Tensor) -> Tensor:
        """Return how many seconds lie between sources and frames, (B,)."""
        return (self._step[frames] - self._step[self._sources[rows]]).float() / self._hz


def episode_ordinals(cache: Cache) -> Tensor:
    """Return each frame's episode (N,), counted from 0 in the order of the frames."""
    changes = torch.ones(len(cache), dtype=torch.long)
    changes[1:] = (cache.episode[1:] != cache.episode[:-1]).long()
    return changes.cumsum(0) - 1


def spread(cache: Cache, stride: int) -> Tensor:
    """Return each episode's first frame and every `stride`-th after it, ascending."""
    ordinal = episode_ordinals(cache)
    starts = torch.searchsorted(ordinal, ordinal)  # the first frame of each frame's episode
    return torch.nonzero((torch.arange(len(cache)) - starts) % stride == 0)[:, 0]


def at_most(cache: Cache, count: int) -> Tensor:
    """Return about `count` frames, no more, as evenly over the episodes as they go.

    Every episode has its first frame among them, unless there are more episodes than `count`:
    then some episodes have none.
    """
    longest = int(torch.bincount(episode_ordinals(cache)).max())
    for stride in range(1, longest + 1):
        frames = spread(cache, stride)
        if len(frames) <= count:
            return frames
    return frames[:: -(-len(frames) // count)]


# -- Pictures and sentences: what System 2 sees and is told about a frame --------------
#
# Its pictures are those that `openhelix collect frames.system2_px=200` draws beside the cache,
# at the size that the camera delivers; without them the policy's own smaller pictures of the
# same camera are taken. Its sentences are all that the cache uses for the frame's task, and with
# `latent.wordings` as many more from the grammar; frames that are held out are then told
# sentences of the development list, whose words neither of the two has.

log = logging.getLogger(__name__)
DRAWN = "system2"


class Pictures:
    """System 2's pictures of the frames of a cache.

    Args:
        cache: the frames.
        wanted: False for a System 2 without vision, which asks for none.

    Raises:
        ConfigError: some of them are missing, or the cache has no static camera.
    """

    def __init__(self, cache: Cache, wanted: bool = True) -> None:
        self._cache = cache
        self._parts: list[Any] = []
        self.source = "none"
        if not wanted:
            return
        drawn = [place.parent / DRAWN / place.name for place in cache.places]
        sizes = [int(shard["frames"]) for shard in cache.meta["shards"]]
        self._starts = np.cumsum([0, *sizes])
        self.source = "the policy's, enlarged"
        if any(place.parent.is_dir() for place in drawn):
            missing = [place for place in drawn if not place.is_file()]
            if missing:
                raise ConfigError(
                    f"data: {missing[0].parent} lacks {missing[0].name}; run `openhelix collect` "
                    "again"
                )
            for place in drawn:
                if "rgb" not in tensor_header(place)[0]:
                    raise ConfigError(f"data: {place}: holds no images")
            self._parts = [safe_open(place, framework="pt").get_slice("rgb") for place in drawn]
            self.source = "drawn at the camera's size"
        elif "static" not in cache.cameras:
            raise ConfigError(
                f"data: {cache.folder} has no camera 'static' for System 2 to look at"
            )
        else:
            log.info("System 2 sees the policy's small pictures: no %s", drawn[0].parent)

    def __call__(self, frames: Tensor) -> list[Image.Image]:
        """Return the pictures of frames (B,)."""
        if not self._parts:
            rgb = self._cache.gather("rgb.static", frames)
            return [Image.fromarray(image.numpy()) for image in rgb]
        out = []
        for frame in frames.tolist():
            shard = int(np.searchsorted(self._starts, frame, side="right")) - 1
            row = frame - int(self._starts[shard])
            out.append(Image.fromarray(self._parts[shard][row : row + 1][0].numpy()))
        return out


class Sentences:
    """Which instructions belong to which task, and a frame's choice of them.

    Args:
        cache: the frames.
        seed: of the choice.
        wordings: sentences a task from the grammar, beside the cache's own.
        held: (N,) frames that are told sentences of the development list where there are
            `wordings`.
    """

    def __init__(
        self, cache: Cache, seed: int, wordings: int = 0, held: Tensor | None = None
    ) -> None:
        self.texts: list[str] = list(cache.meta["instructions"])
        self._seed = seed
        self._names: list[str] = cache.meta["tasks"]
        self._held = torch.zeros(len(cache), dtype=torch.bool)
        self._task = cache.task
        said = cache.gather("instruction", torch.arange(len(cache))).long()
        pairs = torch.stack((cache.task, said), 1).unique(dim=0)
        tasks = range(len(cache.meta["tasks"]))
        self._of = {t: pairs[pairs[:, 0] == t, 1].numpy() for t in tasks}
        self._of_held = self._of
        if wordings:
            names = cache.meta["tasks"]
            unknown = [name for name in names if name not in TASKS]
            if unknown:
                raise ConfigError(f"latent.wordings: the grammar has no task {unknown[0]!r}")
            try:
                extra = drawn_wordings(wordings, seed)
            except PhraseError as error:
                raise ConfigError(f"latent.wordings: {error}") from None
            self._of = {
                t: np.concatenate([self._of[t], self._added(extra[names[t]])]) for t in tasks
            }
            if held is not None:
                self._held[held] = True
                kept = development()
                self._of_held = {t: self._added(kept[names[t]]) for t in tasks}

    def _added(self, sentences: Sequence[str]) -> np.ndarray:
        first = len(self.texts)
        self.texts += sentences
        return np.arange(first, len(self.texts))

    @property
    def digest(self) -> str:
        """Twelve digits that change with any sentence."""
        return hashlib.sha256("\n".join(self.texts).encode()).hexdigest()[:12]

    def _choices(self, frame: int) -> np.ndarray:
        """Return the instructions that a frame may be told."""
        of = self._of_held if self._held[frame] else self._of
        return of[int(self._task[frame])]

    def of_frames(self, frames: Tensor, each: int) -> Tensor:
        """Return instructions (B, each) for frames (B,): different ones while there are enough.

        A frame's choice depends on the seed and the frame alone.
        """
        out = np.empty((len(frames), each), np.int64)
        for row, frame in enumerate(frames.tolist()):
            have = self._choices(frame)
            rng = np.random.default_rng([self._seed, frame])
            order = rng.permutation(have)
            out[row] = np.resize(order, each)
        return torch.from_numpy(out)

    def drawn(self, frames: Tensor, generator: torch.Generator) -> Tensor:
        """Return one instruction (B,) a frame, drawn anew."""
        shares = rand(len(frames), generator=generator)
        picked = [
            self._choices(frame)[int(share * len(self._choices(frame)))]
            for frame, share in zip(frames.tolist(), shares.tolist(), strict=True)
        ]
        return torch.tensor(picked)

    def first(self, task: int) -> str:
        """Return one sentence of a task; its name where the cache has none."""
        have = self._of[task]
        return self.texts[int(have[0])] if len(have) else f"task {task}"

    def of_tasks(self) -> tuple[Tensor, list[str]]:
        """Return each task's number (S,) and its sentences, one after the other."""
        pairs = [(task, self.texts[int(i)]) for task, of in self._of.items() for i in of]
        return torch.tensor([task for task, _ in pairs]), [text for _, text in pairs]

    def answers(self, tasks: Tensor) -> list[str]:
        """Return what System 2 is to say of tasks (B,): the plain sentence of each.

        That is what its base model was taught to answer; of tasks that are not the table's, one
        of their sentences.
        """
        names = self._names
        return [plain(names[t]) if names[t] in TASKS else self.first(t) for t in tasks.tolist()]

    def __getitem__(self, index: Tensor) -> list[str]:
        """Return the sentences of indices (B,)."""
        return [self.texts[i] for i in index.tolist()]


# -- Stores: what the frozen language model makes of the frames, computed once ---------
#
# Two kinds, each in a folder named by everything that it depends on, so that what was made for
# other settings is never read:
#
# - `prefix`: keys and values of image and sentence before `<ACT>` (`openhelix.system2.train`), with
#   which `<ACT>` can be trained exactly. For SmolLM2-135M 2.2 MB per frame in bfloat16.
# - `states`: read-outs at an `<ACT>` that no longer learns, one kilobyte each.

ABOUT = "about.json"
Encode = Callable[[Tensor, Tensor], dict[str, Tensor]]


@dataclass(frozen=True, slots=True)
class StoreLayout:
    """Which frames, and which sentences for each.

    Attributes:
        frames: (N,) ascending.
        instructions: (N, P).
        bytes_each: disk a frame takes, at most.
        part: frames a file.
    """

    frames: Tensor
    instructions: Tensor
    bytes_each: int
    part: int

    @property
    def parts(self) -> int:
        """How many files."""
        return -(-len(self.frames) // self.part)

    def rows(self, part: int) -> slice:
        """Return the rows of a file."""
        return slice(part * self.part, min((part + 1) * self.part, len(self.frames)))


class Store:
    """A folder of part files and what lies where in them."""

    def __init__(
        self, root: Path, kind: str, identity: dict[str, Any], layout: StoreLayout
    ) -> None:
        self.layout, self.kind = layout, kind
        self.identity = identity | {"frames": len(layout.frames), "part": layout.part}
        text = json.dumps(self.identity, sort_keys=True)
        chosen = hashlib.sha256(layout.instructions.numpy().tobytes())
        chosen.update(layout.frames.numpy().tobytes())
        name = hashlib.sha256((text + chosen.hexdigest()).encode()).hexdigest()[:12]
        self.folder = root / f"{kind}-{name}"
        self._files: dict[int, Any] = {}

    def path(self, part: int) -> Path:
        """Return a part's file."""
        return self.folder / f"part-{part:05d}.safetensors"

    def missing(self) -> list[int]:
        """Return the parts still to do."""
        return [part for part in range(self.layout.parts) if not self.path(part).is_file()]

    def check_disk(self, max_gb: float) -> None:
        """Refuse what does not fit beside the other stores.

        Raises:
            ConfigError: more is needed than allowed or free.
        """
        todo = sum(self.layout.rows(p).stop - self.layout.rows(p).start for p in self.missing())
        need = todo * self.layout.bytes_each
        root = self.folder.parent
        root.mkdir(parents=True, exist_ok=True)
        files = [f for f in root.rglob("*.safetensors") if not f.parent.name.startswith(KEPT)]
        there = sum(f.stat().st_size for f in files)
        if there + need > max_gb * 1e9:
            raise ConfigError(
                f"latent.max_gb: {(there + need) / 1e9:.2f} GB would lie in {root}, {max_gb:g} are "
                "allowed; take fewer latent.frames, a larger latent.stride, or remove old folders"
            )
        free = shutil.disk_usage(root).free
        if need > free:
            raise ConfigError(f"out: {need / 1e9:.2f} GB are needed, {free / 1e9:.2f} are free")

    def build(
        self, encode: Encode, max_gb: float, deadline_ns: int = 0, workers: Workers = ALONE
    ) -> bool:
        """Make what is missing, each worker its share; return whether all is there.

        Args:
            encode: frames (B,) and instructions (B, P) to tensors with a row a frame.
            max_gb: most that may lie in the folder above, beside what is `Kept`.
            deadline_ns: monotonic time after which no further part is begun; 0 for none.
        """
        todo = self.missing()
        workers.wait()  # until all have looked
        if not todo:
            return True
        self.check_disk(max_gb)
        missing, todo = todo, todo[workers.rank :: workers.count]
        replace_file(self.folder / ABOUT, (json.dumps(self.identity, indent=1) + "\n").encode())
        size = len(self.layout.frames) * self.layout.bytes_each / 1e9
        log.info("%s: %d frames, at most %.2f GB", self.kind, len(self.layout.frames), size)
        begun, done = time.monotonic_ns(), 0
        for part in todo:
            if deadline_ns and time.monotonic_ns() >= deadline_ns:
                break
            rows = self.layout.rows(part)
            tensors = encode(self.layout.frames[rows], self.layout.instructions[rows])
            save_tensors(self.path(part), tensors)
            done += rows.stop - rows.start
            each = (time.monotonic_ns() - begun) * 1e-9 / done
            left = sum(self.layout.rows(p).stop - self.layout.rows(p).start for p in todo) - done
            log.info(
                "%s: %d left, %.3f s a frame, %.1f min to go",
                self.kind,
                left,
                each,
                left * each / 60,
            )
        workers.wait()
        return not any(not self.path(part).is_file() for part in missing)

    def read(self, rows: Tensor) -> list[dict[str, Tensor]]:
        """Return the tensors of some rows (B,), one dictionary a row."""
        out = []
        for row in rows.tolist():
            part, at = divmod(row, self.layout.part)
            if part not in self._files:
                tensor_header(self.path(part))  # says which file it is, if it is damaged
                self._files[part] = safe_open(self.path(part), framework="pt")
            file = self._files[part]
            out.append({k: file.get_slice(k)[at : at + 1][0] for k in file.keys()})  # noqa: SIM118
        return out

    def whole(self) -> dict[str, Tensor]:
        """Return every tensor of the store in memory, in the layout's order."""
        parts = []
        for part in range(self.layout.parts):
            parts.append(load_tensors(self.path(part))[0])
        return {k: torch.cat([p[k] for p in parts]) for k in parts[0]}


PREFIX_PART, STATES_PART = 64, 512  # frames a file
KEPT = "drawn"  # so begin the names of folders of what was kept, which has a limit of its own
SPARE_BYTES = 2_000_000_000  # of the disk, which kept prefixes leave alone


class Kept(ABC):
    """What a frozen language model says of drawn frames and sentences, on disk, a file each.

    Trainings with the same model and the same seed draw the same ones, so that the second takes
    from here what the first computed, in less time than a forward pass. Each is computed by
    itself, never in a batch: its bits do not depend on what was kept before. What
    `max_bytes` or the disk has no room for is computed every time.

    Args:
        root: holds a folder for each model, read-out and set of data.
        learner: whose language model.
        source: frames and sentences.
        section: what else they depend on.
        max_bytes: most that may lie in the folder.
    """

    kind = KEPT

    def __init__(
        self,
        root: Path,
        learner: System2Learner,
        source: Source,
        section: LatentSection,
        max_bytes: float,
    ) -> None:
        self._learner, self._source = learner, source
        identity = about(learner, source, section) | {
            "kind": self.kind,
            "read_out": asdict(learner.head.config),
            "sentences": source.sentences.digest,
        }
        text = json.dumps(identity, sort_keys=True)
        self.folder = root / f"{self.kind}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
        self.folder.mkdir(parents=True, exist_ok=True)
        replace_file(self.folder / ABOUT, (json.dumps(identity, indent=1) + "\n").encode())
        there = sum(f.stat().st_size for f in self.folder.glob("*.safetensors"))
        self._room = max_bytes - there

    def sample(self, frames: Tensor, said: Tensor, pictures: Callable[[Tensor], Any]) -> Sample:
        """Return the samples of frames (B,) and sentences (B,).

        Args:
            frames: of the cache.
            said: rows of the source's sentences.
            pictures: of frames (B,), as `System2Learner` takes them.
        """
        rows = [self._one(*pair, pictures) for pair in zip(frames, said, strict=True)]
        return self._from(rows)

    @abstractmethod
    def _encoded(self, pictures: Any, texts: Sequence[str]) -> dict[str, Tensor]:
        """Return what is kept of one frame and sentence, a batch of one."""

    @abstractmethod
    def _from(self, rows: list[dict[str, Tensor]]) -> Sample:
        """Return the samples of rows that were kept."""

    def _one(
        self, frame: Tensor, said: Tensor, pictures: Callable[[Tensor], Any]
    ) -> dict[str, Tensor]:
        path = self.folder / f"{int(frame):07d}-{int(said):06d}.safetensors"
        if path.is_file():
            return load_tensors(path)[0]
        texts = self._source.sentences[said[None]]
        rows = self._encoded(pictures(frame[None]), texts)
        row = {name: tensor[0] for name, tensor in rows.items()}
        size = sum(tensor.nbytes for tensor in row.values())
        if size <= self._room and shutil.disk_usage(self.folder).free - size > SPARE_BYTES:
            save_tensors(path, row)
            self._room -= size
        elif self._room > 0:
            self._room = 0
            log.info("%s: full; all further ones are computed each time", self.folder)
        return row


class KeptPrefixes(Kept):
    """Keys and values before `<ACT>`, for read-outs of `<ACT>`, which may learn."""

    def _encoded(self, pictures: Any, texts: Sequence[str]) -> dict[str, Tensor]:
        return prefix_rows(
            self._learner.prefix(pictures, texts).at("cpu"), self._learner.model.dtype
        )

    def _from(self, rows: list[dict[str, Tensor]]) -> Sample:
        return self._learner.from_prefix(joined(rows).at(self._learner.model.device))


class KeptStates(Kept):
    """Read-outs themselves, where nothing before the projector learns."""

    kind = f"{KEPT}-states"

    def _encoded(self, pictures: Any, texts: Sequence[str]) -> dict[str, Tensor]:
        with torch.no_grad():
            sample = self._learner(pictures, texts)
        return {"state": sample.state.cpu(), "filled": sample.filled.cpu()}

    def _from(self, rows: list[dict[str, Tensor]]) -> Sample:
        device = self._learner.model.device
        state, filled = (torch.stack([r[n] for r in rows]).to(device) for n in ("state", "filled"))
        return self._learner.from_states(state.float(), filled)


def kept_of(
    root: Path, learner: System2Learner, source: Source, section: LatentSection
) -> Kept | None:
    """Return where a live feed's samples are kept; None where they change, or none are wanted."""
    if not section.prefix_gb:
        return None
    room = section.prefix_gb * 1e9
    if learner.cacheable and learner.family.causal:
        return KeptPrefixes(root, learner, source, section, room)
    learns = section.kind in ("pool_map", KV) or section.proprio  # before the projector
    if learner.regime == "frozen" and not learns:
        return KeptStates(root, learner, source, section, room)
    return None


# -- Feeds -----------------------------------------------------------------------------


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
    def open(
        cache: Cache,
        seed: int,
        vision: bool = True,
        wordings: int = 0,
        held: Tensor | None = None,
    ) -> Source:
        """Open it; see `Pictures` and `Sentences` for the arguments and errors."""
        return Source(cache, Pictures(cache, vision), Sentences(cache, seed, wordings, held))


class LiveFeed:
    """The language model runs in every step, with gradients to whatever its regime trains.

    Where that is `<ACT>` alone, they are exact through `<ACT>`'s own tokens: what stands before it is
    computed without any (`openhelix.system2.train`), which takes half the time. With `kept`, what
    does not change (`kept_of`) is computed once for each frame and sentence.
    Tower and vision projector learn in regime "full" alone; else a picture's tokens are kept
    from the first time it is seen, where all pictures' fit into `max_bytes` and are the same
    whatever is asked of them. With `answers` the model is asked for words, too.
    """

    def __init__(
        self,
        learner: System2Learner,
        source: Source,
        max_bytes: float,
        answers: bool = False,
        kept: Kept | None = None,
    ) -> None:
        self._learner, self._source, self._answers = learner, source, answers
        self.frames = torch.arange(len(source.cache))
        shape = (len(self.frames), learner.checkpoint.n_image, learner.checkpoint.hidden)
        fixed = learner.cacheable and learner.family.causal
        self._act_alone = fixed and learner.regime == "prompt"
        self._kept = kept
        small = shape[0] * shape[1] * shape[2] * learner.model.dtype.itemsize <= max_bytes
        self._tokens: Tensor | None = None
        same = learner.regime != "full" and not learner.family.reads_words
        if small and learner.head.config.vision and same:
            self._tokens = torch.empty(
                shape, dtype=learner.model.dtype, device=learner.model.device
            )
        self._seen = torch.zeros(len(self.frames), dtype=torch.bool)

    def draw(self, rows: Tensor, generator: torch.Generator) -> Drawn:
        """See `Feed.draw`; the sentence is drawn anew each time."""
        frames = self.frames[rows]
        said = self._source.sentences.drawn(frames, generator)
        texts, answers = self._source.sentences[said], list[str]()
        if self._kept is not None:
            return Drawn(frames, said, self._kept.sample(frames, said, self._pictures))
        if self._act_alone:
            prefix = self._learner.prefix(self._pictures(frames), texts)
            return Drawn(frames, said, self._learner.from_prefix(prefix))
        if self._answers:
            answers = self._source.sentences.answers(self._source.cache.task[frames])
        own = None
        if self._learner.head.config.proprio:
            own = self._source.cache.gather("proprio", frames)[:, -1].float()
        sample = self._learner(self._pictures(frames), texts, answers=answers, proprio=own)
        return Drawn(frames, said, sample)

    def _pictures(self, frames: Tensor) -> Any:
        if not self._learner.head.config.vision:
            return []
        if self._tokens is None:
            return self._source.pictures(frames)
        new = frames[~self._seen[frames]].unique()
        if len(new):
            with torch.no_grad():
                tokens = self._learner.image_tokens(self._source.pictures(new))
            self._tokens[new] = tokens.to(self._tokens.dtype)
            self._seen[new] = True
        return self._tokens[frames]


class PrefixFeed:
    """`<ACT>` runs over cached keys and values: exact, at the price of one token."""

    def __init__(self, learner: System2Learner, store: Store) -> None:
        self._learner, self._store = learner, store
        self.frames = store.layout.frames

    def draw(self, rows: Tensor, generator: torch.Generator) -> Drawn:
        """See `Feed.draw`."""
        prefix = joined(self._store.read(rows)).at(self._learner.model.device)
        sample = self._learner.from_prefix(prefix)
        return Drawn(self.frames[rows], self._store.layout.instructions[rows, 0], sample)


class StateFeed:
    """Read-outs that were kept; only what comes after them learns."""

    def __init__(self, learner: System2Learner, store: Store) -> None:
        self._learner, self._layout = learner, store.layout
        self.frames = store.layout.frames
        self._kept = store.whole()
        learner.head.act.requires_grad_(False)

    def draw(self, rows: Tensor, generator: torch.Generator) -> Drawn:
        """See `Feed.draw`; one of the kept sentences is drawn."""
        most = self._layout.instructions.shape[1]
        which = randint(0, most, len(rows), generator=generator)
        device = self._learner.head.act.device
        state = self._kept["state"][rows, which].float().to(device)
        filled = self._kept["filled"][rows, which].to(device)
        said = self._layout.instructions[rows, which]
        return Drawn(self.frames[rows], said, self._learner.from_states(state, filled))


def joined(rows: list[dict[str, Tensor]]) -> Prefix:
    """Return stored prefixes as one batch, cut to the longest."""
    lengths = torch.stack([row["length"] for row in rows])
    longest = int(lengths.max())
    kv = torch.stack([fitted(row["kv"], longest) for row in rows], 2)  # (2, layers, B, kv, T, d)
    names = ("rest", "filled") if "rest" in rows[0] else ()
    return Prefix(kv[0], kv[1], lengths, *(torch.stack([r[n] for r in rows]) for n in names))


def fitted(kv: Tensor, longest: int) -> Tensor:
    """Return (…, T, d) cut or filled up to `longest` positions."""
    kv = kv[..., :longest, :]
    return torch.nn.functional.pad(kv, (0, 0, 0, longest - kv.shape[-2]))


def regime_of(section: LatentSection, stage: str) -> Regime:
    """Return what of System 2 a stage trains: the language model is frozen in the first."""
    regime: Regime = REGIMES[section.regime]
    return "prompt" if stage == "stage1" and regime in CHANGES else regime


def feed_kind(section: LatentSection, stage: str, device: str) -> str:
    """Return which feed a stage takes.

    Raises:
        ConfigError: the one asked for cannot train what the regime says.
    """
    regime, wanted = regime_of(section, stage), section.feed
    learns_before_act = regime in CHANGES or section.proprio
    if wanted == "auto":
        if learns_before_act or section.kind == "pool_map":
            return "live"
        if regime == "frozen":
            return "states" if device == "cpu" else "live"
        if device != "cpu":
            return "live"
        return "prefix" if section.kind in CACHEABLE else "states"
    if wanted != "live" and learns_before_act:
        raise ConfigError(
            f"latent.feed: {wanted!r} keeps what regime {regime!r} "
            f"{'and latent.proprio train' if section.proprio else 'trains'}; use live or auto"
        )
    if wanted == "prefix" and (section.kind not in CACHEABLE or regime == "frozen"):
        raise ConfigError(
            f"latent.feed: 'prefix' trains <ACT>: it needs latent.kind={'|'.join(CACHEABLE)} and "
            "latent.regime=prompt_tuning"
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
    config = learner.head.config
    beside = {"act_words": 1, "act_lang": config.text_rows}.get(config.kind, 0)
    each += beside * learner.checkpoint.hidden * config.width
    each *= torch.finfo(learner.model.dtype).bits // 8
    identity = about(learner, source, section) | {"kind": "prefix", "read_out": asdict(config)}
    return Store(root, "prefix", identity, StoreLayout(frames, said, each, PREFIX_PART))


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
    }
    if config.kind.startswith(("act", "hidden")):  # the others stand before <ACT>
        identity["act"] = digest({"act": learner.head.act})
    layout = StoreLayout(frames, said, rows * (2 * config.numbers(checkpoint) + 1), STATES_PART)
    return Store(root, "states", identity, layout)


def about(learner: System2Learner, source: Source, section: LatentSection) -> dict[str, Any]:
    """Return what every kept tensor depends on."""
    return {
        "model": learner.checkpoint.model_id,
        "prompt": learner.checkpoint.template.name,
        "n_act": section.n_act,
        "vision": section.vision,
        "dtype": str(learner.model.dtype),
        "pictures": source.pictures.source,
        "cache": [str(source.cache.meta["notes"]), source.cache.meta["shards"]],
    } | ({"sentences": source.sentences.digest} if section.wordings else {})


def encode_prefix(
    learner: System2Learner, source: Source, batch: int, frames: Tensor, said: Tensor
) -> dict[str, Tensor]:
    """Return a part of the prefix store."""
    parts = []
    for start in range(0, len(frames), batch):
        rows = slice(start, start + batch)
        pictures = source.pictures(frames[rows]) if learner.head.config.vision else []
        parts.append(learner.prefix(pictures, source.sentences[said[rows, 0]]).at("cpu"))
    return prefix_rows(Prefix.join(parts), learner.model.dtype)


def prefix_rows(prefix: Prefix, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return a batch of prefixes as stores keep them, a row each."""
    kv = torch.stack((prefix.keys, prefix.values)).permute(2, 0, 1, 3, 4, 5)
    found = {"kv": kv.to(dtype), "length": prefix.lengths}
    if prefix.rest is not None and prefix.filled is not None:
        found |= {"rest": prefix.rest.to(dtype), "filled": prefix.filled}
    return found


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
