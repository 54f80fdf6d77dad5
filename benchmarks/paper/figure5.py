"""Figure 5: what a latent says in words while the scene changes, and both observations judged.

A scripted expert lifts the blue block; at one step the block is put farther to the left. The
same start is run again without that. System 2 reads images of both.

The paper compares the state at `<ACT>` with a predefined vocabulary. A latent that is read after
middle layers, or as a mean, does not live in the space of the model's output words. So the
vocabulary is said to System 2 itself, word by word over the same picture, and what becomes of a
word is where it lies: the projected latents, each group about its own mean, compared by cosine.
That holds for every read-out.

The paper shows one episode. Here several starts are taken, and each observation is tested
against a scale (`claims`): moving the block against saying something else, an instruction's own
words against the same words under other instructions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from openhelix.benchmarks.calvin.demonstrations import random_expert
from openhelix.benchmarks.calvin.env import PlayTableEnv
from openhelix.benchmarks.calvin.phrases import normalised, validation
from openhelix.benchmarks.calvin.starts import StartError, begin
from openhelix.benchmarks.calvin.tasks import TASKS, get_task
from openhelix.benchmarks.evaluation.measurement import cosine
from openhelix.benchmarks.evaluation.plots import (
    BAR,
    COLOURS,
    DIM,
    INK,
    PALE,
    Drawing,
    drawing,
)
from openhelix.benchmarks.evaluation.stats import mean_interval, paired_by_start
from openhelix.benchmarks.paper.judge import MISSING, measured
from openhelix.runtime.core.config import ConfigError
from openhelix.runtime.core.interfaces import F32, U8
from openhelix.system2.engines.base import EngineBase
from openhelix.system2.probe import SPATIAL_WORDS

# -- The drawing: what System 2 saw, the words nearest to its latent, words of space ---

SHOWN = 6
KIND_COLOURS = {"target": COLOURS[0], "relation": COLOURS[1], "action": COLOURS[2], "none": DIM}


def draw(made: Mapping[str, Any], moved: Sequence[U8], shift_at: int, title: str) -> Drawing:
    """Return the figure.

    Args:
        made: what `probe` returned.
        moved: images of the first start's episode, one a row of `made["episode"]`.
        shift_at: step at which the block was moved.
        title: of the figure.
    """
    episode = made["episode"]
    figure = Figure(figsize=(11, 7.6), dpi=100, layout="constrained")
    halves: Any = figure.subfigures(2, 1, height_ratios=(1.5, 1.0))
    above, below = halves
    grid = above.add_gridspec(2, SHOWN, height_ratios=(1.0, 1.1))
    sides = below.add_gridspec(1, 2, width_ratios=(1.7, 1.0))
    left, right = below.add_subplot(sides[0]), below.add_subplot(sides[1])
    chosen = np.linspace(0, len(episode) - 1, SHOWN).round().astype(int)
    after = next((i for i, row in enumerate(episode) if row["step"] >= shift_at), 1)
    chosen[1] = after
    own = content_words(made["instruction"])
    for column, row in enumerate(chosen):
        picture = above.add_subplot(grid[0, column])
        picture.imshow(moved[row])
        picture.set_axis_off()
        picture.set_title(f"step {episode[row]['step']}", fontsize=9, color=INK)
        words = above.add_subplot(grid[1, column])
        words.set_axis_off()
        for line, near in enumerate(episode[row]["nearest"]):
            words.text(
                0.05,
                0.98 - line / len(episode[row]["nearest"]),
                f"{near['word']} {near['cosine']:.2f}",
                va="top",
                fontsize=8,
                color=KIND_COLOURS[kind_of(near["word"])],
                weight="bold" if near["word"] in own else "normal",
            )
    above.supxlabel(
        "nearest words: of targets (blue), relations (orange), actions (green), "
        "others (grey); bold: said in the instruction",
        fontsize=8,
        color=DIM,
    )
    _words_of_space(left, episode, shift_at)
    _what_moves_it(right, made["distances"])
    figure.suptitle(title, fontsize=10, color=INK)
    return drawing(figure)


def _words_of_space(axes: Any, episode: Sequence[Mapping[str, Any]], shift_at: int) -> None:
    steps = [row["step"] for row in episode]
    for number, word in enumerate(SPATIAL_WORDS):
        colour = COLOURS[number % len(COLOURS)]
        style = "-" if number < len(COLOURS) else "--"
        values = [row["similarity"][word] for row in episode]
        axes.plot(steps, values, style, color=colour, label=word, lw=1.5)
    axes.axvline(shift_at, color=INK, lw=0.8, ls=":")
    axes.set_xlabel("environment step (dotted: the block is moved)", fontsize=9)
    axes.set_ylabel("cosine to the word", fontsize=9)
    axes.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes.grid(color=PALE, lw=0.5)


def _what_moves_it(axes: Any, distances: Mapping[str, Sequence[float]]) -> None:
    names = list(distances)
    at = np.arange(len(names))[::-1]
    axes.barh(at, [float(np.mean(distances[n])) for n in names], color=BAR, height=0.6)
    for y, name in zip(at, names, strict=True):
        axes.plot(distances[name], [y] * len(distances[name]), ".", color=INK, ms=3)
    axes.set_yticks(at, names, fontsize=8)
    axes.locator_params(axis="x", nbins=3)  # small numbers are long
    axes.set_xlabel("1 - cosine of the latent (dots: starts)", fontsize=9)
    axes.set_title("what moves the latent", fontsize=9, color=INK, loc="left")


# -- The vocabulary --------------------------------------------------------------------

VOCABULARY: Mapping[str, tuple[str, ...]] = {
    "target": (
        *("red", "blue", "pink", "block", "drawer", "slider", "door", "cabinet", "table"),
        *("handle", "light", "bulb", "lamp", "led", "button", "switch", "tower", "object"),
    ),
    "relation": (
        *("left", "right", "up", "down", "in", "on", "off", "into", "from", "above", "below"),
        *("front", "back", "top", "side", "inside"),
    ),
    "action": (
        *("lift", "grasp", "pick", "take", "push", "slide", "rotate", "turn", "open", "close"),
        *("pull", "place", "put", "store", "stack", "remove", "move", "press", "toggle", "sweep"),
    ),
    # Words that no instruction has: what "irrelevant" means.
    "none": (
        *("cat", "river", "music", "paper", "winter", "skin", "gold", "medical", "doctor", "fish"),
        *("city", "market", "history", "number", "green", "yellow", "seven", "mother", "window"),
        *("engine", "apple", "happy", "quickly", "because", "summer", "letter", "church", "horse"),
        *("school", "bread", "president", "mountain", "coffee", "queen", "sugar", "army", "moon"),
        *("money", "garden", "language", "correct", "wrong", "science", "blood", "sister", "train"),
    ),
}
WORDS = tuple(word for words in VOCABULARY.values() for word in words)
NEAREST = 10  # as many as the paper lists


def kind_of(word: str) -> str:
    """Return the vocabulary's kind of a word."""
    return next(kind for kind, words in VOCABULARY.items() if word in words)


def content_words(sentence: str) -> set[str]:
    """Return a sentence's words of target, relation and action."""
    said = {form for word in normalised(sentence).split() for form in (word, word.rstrip("s"))}
    return {word for word in said if word in WORDS and kind_of(word) != "none"}


class SaidWords:
    """Where System 2 puts words, and how near latents are to them.

    Args:
        engine: System 2.
        picture: over which everything is said, (H, W, 3).
        words: the vocabulary.
        sentences: instructions whose mean is the middle of all latents of instructions.
    """

    def __init__(
        self, engine: EngineBase, picture: U8, words: Sequence[str], sentences: Sequence[str]
    ) -> None:
        self._engine, self.words = engine, tuple(words)
        found = latents(engine, [picture] * len(words), words)
        self._rows = _unit(found - found.mean(0))
        self.usual = latents(engine, [picture] * len(sentences), sentences)
        self._middle = self.usual.mean(0)

    def similarity(self, found: F32) -> F32:
        """Return cosines (N, words) of latents (N, d)."""
        near: F32 = _unit(found - self._middle) @ self._rows.T
        return near

    def nearest(self, similar: F32, count: int = NEAREST) -> list[dict[str, Any]]:
        """Return the words of the highest of some cosines (words,)."""
        best = np.argsort(-similar, kind="stable")[:count]
        return [{"word": self.words[i], "cosine": round(float(similar[i]), 6)} for i in best]


def latents(engine: EngineBase, images: Sequence[U8], texts: Sequence[str]) -> F32:
    """Return projected latents (N, d); several tokens are one meaning: their mean."""
    parts = [
        engine.encode(images[i : i + BATCH], texts[i : i + BATCH])
        for i in range(0, len(texts), BATCH)
    ]
    found: F32 = np.concatenate(parts).mean(axis=1)
    return found


def _unit(rows: F32) -> F32:
    length = np.linalg.norm(rows, axis=-1, keepdims=True)
    unit: F32 = rows / np.maximum(length, 1e-12)
    return unit


# -- The probe -------------------------------------------------------------------------

CLEAR_M = 0.09  # between the centres of the moved block and any other
OTHERS = {"another colour": "lift_red_block_table", "another task": "open_drawer"}
SIDES = ("push_{colour}_block_left", "push_{colour}_block_right")
TRIES = 60
BATCH = 8


@dataclass(frozen=True)
class ProbeOptions:
    """What is looked at.

    Attributes:
        task, scene: of the episodes; the task lifts a block from the table.
        shift_at: environment step at which the block is moved.
        shift_m: how far to the left.
        steps, every: an image at every so many-th step, up to so many steps.
        starts: episodes.
        seed: of the starts.
    """

    task: str = "lift_blue_block_table"
    scene: str = "D"
    shift_at: int = 3
    shift_m: float = 0.10
    steps: int = 40
    every: int = 2
    starts: int = 16
    seed: int = 0


@dataclass(frozen=True)
class Pictures:
    """One start, seen twice.

    Attributes:
        moved, still: images of the episode with and without the shift, (200, 200, 3).
        instant: the two images right after the shift, arm and all else alike.
    """

    moved: list[U8]
    still: list[U8]
    instant: tuple[U8, U8]


def take_pictures(options: ProbeOptions) -> list[Pictures]:
    """Run the expert from every start, with and without the shift.

    Raises:
        ConfigError: no start in which the block can be moved was found.
    """
    block = get_task(options.task).target
    found: list[Pictures] = []
    with PlayTableEnv(options.scene, cameras=("static",)) as env:
        low = dict(env.scene.surfaces)["table"].x[0]
        for attempt in range(TRIES):
            rng = np.random.default_rng([options.seed, attempt])
            try:
                begin(env, options.task, rng)
            except StartError:
                continue
            place = np.array(env.world.block_pose(block)[0])
            goal = place - (options.shift_m, 0.0, 0.0)
            others = [np.array(env.world.block_pose(n)[0]) for n in env.scene.blocks if n != block]
            crowded = any(np.linalg.norm(goal - other) < CLEAR_M for other in others)
            if goal[0] < low or crowded:
                continue
            start, seed = env.state(), int(rng.integers(2**31))
            still, before = _episode(env, options, seed, None)
            env.restore(start)
            moved, after = _episode(env, options, seed, tuple(goal))
            found.append(Pictures(moved, still, (after, before)))
            if len(found) == options.starts:
                return found
    raise ConfigError(f"figure5: {len(found)} of {options.starts} starts in {TRIES} draws")


def _episode(
    env: PlayTableEnv, options: ProbeOptions, seed: int, goal: tuple[float, ...] | None
) -> tuple[list[U8], U8]:
    """Return the images of one episode and the one right after the shift (or in its place)."""
    block = get_task(options.task).target
    expert = random_expert(env, options.task, np.random.default_rng(seed))
    images, instant = [], env.render()
    for step in range(options.steps):
        if step == options.shift_at:
            if goal is not None:
                env.world.set_block_pose(block, goal, env.world.block_pose(block)[1])
            instant = env.render()
        if step % options.every == 0:
            images.append(instant if step == options.shift_at else env.render())
        env.advance(expert.act(env.get_info()).action())
    return images, instant


def probe(
    pictures: Sequence[Pictures], engine: EngineBase, options: ProbeOptions
) -> dict[str, Any]:
    """Return what System 2 makes of the pictures, as plain data.

    `episode` has the nearest words and the cosines to words of space over the first start.
    `distances` are 1 - cosine of the latents, a list over the starts each: `block moved`, `time`,
    and one for each of `OTHERS`. `spatial` says of every start how far the cosines to words of
    space move (mean absolute difference) when the block is moved and when the other side is
    said, and how much nearer the latent is to "right" than to "left" on average. `own_words` says
    of every task which share of its instruction's words is among the ten nearest, and which
    share is so under the other instructions.
    """
    text = TASKS[options.task].sentence
    tasks = [sentences[0] for sentences in validation().values()]
    first = pictures[0]
    space = SaidWords(engine, first.still[0], WORDS, tasks)
    episode = space.similarity(latents(engine, first.moved, [text] * len(first.moved)))
    distances: dict[str, list[float]] = {"block moved": [], "time": []}
    distances |= {name: [] for name in OTHERS}
    spatial: dict[str, list[float]] = {
        name: [] for name in ("block moved", "other side said", "left", "right")
    }
    for picture in pictures:
        found = _one_start(engine, space, picture, options, text)
        for name, value in found["distances"].items():
            distances[name].append(round(value, 8))
        for name, value in found["spatial"].items():
            spatial[name].append(round(value, 8))
    return {
        "instruction": text,
        "model": engine.checkpoint.model_id,
        "spec_id": engine.spec.spec_id,
        "n_starts": len(pictures),
        "words": {kind: list(words) for kind, words in VOCABULARY.items()},
        "episode": [
            {
                "step": row * options.every,
                "nearest": space.nearest(similar),
                "similarity": _of_space(similar),
            }
            for row, similar in enumerate(episode)
        ],
        "distances": distances,
        "spatial": spatial,
        "own_words": own_words(space, tasks),
    }


def _one_start(
    engine: EngineBase, space: SaidWords, picture: Pictures, options: ProbeOptions, text: str
) -> dict[str, dict[str, float]]:
    colour = get_task(options.task).target.removeprefix("block_")
    sides = [TASKS[name.format(colour=colour)].sentence for name in SIDES]
    others = [validation()[name][0] for name in OTHERS.values()]
    start, end = picture.still[0], picture.still[-1]
    images = [*picture.instant, start, end, *[start] * (len(sides) + len(others)), *picture.still]
    texts = [text] * 4 + sides + others + [text] * len(picture.still)
    z = latents(engine, images, texts)
    at = [space.words.index(word) for word in SPATIAL_WORDS]
    similar = space.similarity(z)
    side, episode = similar[4:6][:, at], similar[6 + len(others) :]
    left, right = (space.words.index(word) for word in ("left", "right"))
    distances = {"block moved": 1 - cosine(z[0], z[1]), "time": 1 - cosine(z[2], z[3])}
    distances |= {name: 1 - cosine(z[2], z[6 + i]) for i, name in enumerate(OTHERS)}
    return {
        "distances": distances,
        "spatial": {
            "block moved": float(np.abs(similar[0, at] - similar[1, at]).mean()),
            "other side said": float(np.abs(side[0] - side[1]).mean()),
            "left": float(episode[:, left].mean()),
            "right": float(episode[:, right].mean()),
        },
    }


def own_words(space: SaidWords, sentences: Sequence[str]) -> dict[str, Any]:
    """Return which share of its own words is among an instruction's ten nearest.

    `own` and `others` are lists over the sentences that have such words: under the instruction
    itself, and on average under the others that do not have the word. `kinds` is what the ten
    nearest words are, on average.
    """
    similar = space.similarity(space.usual)
    near = [{n["word"] for n in space.nearest(row)} for row in similar]
    said = [content_words(sentence) for sentence in sentences]
    own, others = [], []
    for row, words in enumerate(said):
        elsewhere = [
            np.mean([word in near[other] for other in range(len(said)) if word not in said[other]])
            for word in sorted(words)
            if any(word not in some for some in said)
        ]
        if elsewhere:
            own.append(round(float(np.mean([word in near[row] for word in sorted(words)])), 6))
            others.append(round(float(np.mean(elsewhere)), 6))
    kinds = {
        kind: round(float(np.mean([len(found & set(words)) for found in near])), 4)
        for kind, words in VOCABULARY.items()
    }
    return {"own": own, "others": others, "kinds": kinds}


def _of_space(similar: F32) -> dict[str, float]:
    return {word: round(float(similar[WORDS.index(word)]), 6) for word in SPATIAL_WORDS}


MOVE_SAYS = "the block's move changes the latent less than {name} does"
CLAIMS = (
    (
        *("block moved", "other side said"),
        "the block's move changes the cosines to words of space less than saying the other side "
        "does",
    ),
    (
        *("left", "right"),
        "the latent is nearer to 'right' than to 'left' throughout, though the sentence names no "
        "side",
    ),
    (
        *("under other instructions", "under its own"),
        "an instruction's target, relation and action are among the ten words nearest to its "
        "latent, more than under other instructions",
    ),
    *(("block moved", name, MOVE_SAYS.format(name=name)) for name in OTHERS),
)


def planned(who: str) -> list[dict[str, Any]]:
    """Return the claims about a System 2 that has not been probed, in the form of `judge`'s.

    The paper's first observation (words of space are static, "right" always before "left") and its
    second (the latent mirrors the instruction, not what changes in the scene).
    """
    return [
        {
            "a": a,
            "b": b,
            "axis": "what changes",
            "says": f"{who}: {says}",
            "finding": 5,
            "expect": "b_better",
            "margin": None,
            "not_testable": "",
            "n_pairs": 0,
            "verdict": MISSING,
            "paper_difference": None,
        }
        for a, b, says in CLAIMS
    ]


def claims(made: Mapping[str, Any], who: str) -> list[dict[str, Any]]:
    """Return what a probe says of the same claims; `decide` gives the verdicts."""
    moved, spatial, own = made["distances"]["block moved"], made["spatial"], made["own_words"]
    pairs = [
        (spatial["block moved"], spatial["other side said"]),
        (spatial["left"], spatial["right"]),
        (own["others"], own["own"]),
        *((moved, made["distances"][name]) for name in OTHERS),
    ]
    found = []
    for claim, (first, second) in zip(planned(who), pairs, strict=True):
        del claim["verdict"]
        test = measured(paired_by_start(first, second), 0.0)
        found.append({**claim, **test, "unit": "cosine, or share of words"})
    return found


def distance_table(made: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return how far the latent moves, and by what, as a table."""
    rows = []
    for name, values in made["distances"].items():
        low, high = mean_interval(values)
        rows.append([name, f"{np.mean(values):.5f}", f"{low:.5f} to {high:.5f}", str(len(values))])
    return ["what changes", "1 - cosine", "95 % interval", "starts"], rows
