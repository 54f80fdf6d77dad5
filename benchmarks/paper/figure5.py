"""Figure 5: the words nearest to a latent while the scene changes.

A scripted expert lifts the blue block; at one step the block is put farther to the left. The
same start is run again without that. System 2 reads images of both, and the state at `<ACT>`
is compared with its own vocabulary, as the paper does.

The paper shows one episode. Here several starts are taken and the drift is given a scale: how
far the latent moves when the block is moved (same arm, same words), when time passes, and when
another sentence is said over the same image. A latent that is "static semantics" depends on
the sentence and hardly on the block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from openhelix.benchmarks.calvin.demonstrations import random_expert
from openhelix.benchmarks.calvin.env import PlayTableEnv
from openhelix.benchmarks.calvin.phrases import validation
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
from openhelix.benchmarks.evaluation.stats import mean_interval, paired_permutation
from openhelix.benchmarks.paper.judge import ALPHA, HOLDS, NOT, OPEN
from openhelix.runtime.core.config import ConfigError
from openhelix.runtime.core.interfaces import F32, U8
from openhelix.system2.engines.base import EngineBase
from openhelix.system2.probe import SPATIAL_WORDS, WordSpace

# -- The drawing: what System 2 saw, the words nearest to its latent, words of space ---

SHOWN = 6


def draw(made: Mapping[str, Any], moved: Sequence[U8], shift_at: int, title: str) -> Drawing:
    """Return the figure.

    Args:
        made: what `latent_probe.probe` returned.
        moved: images of the first start's episode, one a row of `made["episode"]`.
        shift_at: step at which the block was moved.
        title: of the figure.
    """
    episode = made["episode"]
    figure = Figure(figsize=(11, 7.6), dpi=100, layout="constrained")
    halves: Any = figure.subfigures(2, 1, height_ratios=(1.35, 1.0))
    above, below = halves
    grid = above.add_gridspec(2, SHOWN, height_ratios=(1.0, 0.85))
    sides = below.add_gridspec(1, 2, width_ratios=(1.7, 1.0))
    left, right = below.add_subplot(sides[0]), below.add_subplot(sides[1])
    chosen = np.linspace(0, len(episode) - 1, SHOWN).round().astype(int)
    after = next((i for i, row in enumerate(episode) if row["step"] >= shift_at), 1)
    chosen[1] = after
    for column, row in enumerate(chosen):
        picture = above.add_subplot(grid[0, column])
        picture.imshow(moved[row])
        picture.set_axis_off()
        picture.set_title(f"step {episode[row]['step']}", fontsize=9, color=INK)
        words = above.add_subplot(grid[1, column])
        words.set_axis_off()
        near, own = episode[row]["nearest"][:7], episode[row].get("above_others", [])[:7]
        lines = [f"{n['word'][:11]} {n['cosine']:.2f}" for n in near]
        words.text(0.0, 1.0, "\n".join(["nearest", *lines]), va="top", fontsize=7, color=DIM)
        lines = [f"{n['word'][:11]} {n['above']:+.2f}" for n in own]
        words.text(0.52, 1.0, "\n".join(["above others", *lines]), va="top", fontsize=7, color=INK)
    steps = [row["step"] for row in episode]
    for number, word in enumerate(made["words"]):
        colour = COLOURS[number % len(COLOURS)]
        style = "-" if number < len(COLOURS) else "--"
        values = [row["probability"][word] for row in episode]
        left.plot(steps, values, style, color=colour, label=word, lw=1.5)
    left.axvline(shift_at, color=INK, lw=0.8, ls=":")
    left.set_xlabel("environment step (dotted: the block is moved)", fontsize=9)
    left.set_ylabel("share among these words", fontsize=9)
    left.set_ylim(bottom=0)
    left.legend(fontsize=7, ncols=2, frameon=False)
    left.grid(color=PALE, lw=0.5)
    names = list(made["distances"])
    means = [float(np.mean(made["distances"][n])) for n in names]
    at = np.arange(len(names))[::-1]
    right.barh(at, means, color=BAR, height=0.6)
    for y, name in zip(at, names, strict=True):
        values = made["distances"][name]
        right.plot(values, [y] * len(values), ".", color=INK, ms=3)
    right.set_yticks(at, names, fontsize=8)
    right.locator_params(axis="x", nbins=3)  # small numbers are long
    right.set_xlabel("1 - cosine of the latent (dots: starts)", fontsize=9)
    right.set_title("what moves the latent", fontsize=9, color=INK, loc="left")
    figure.suptitle(title, fontsize=10, color=INK)
    return drawing(figure)


# -- The probe -------------------------------------------------------------------------

SHARP = 0.05  # temperature of the softmax over words, as `openhelix probe` has it
CLEAR_M = 0.09  # between the centres of the moved block and any other
OTHERS = {"another colour": "lift_red_block_table", "another task": "open_drawer"}
BASELINE = (  # tasks whose sentences say what is usual of a latent: one of each kind
    *("rotate_red_block_left", "push_pink_block_right", "lift_blue_block_table"),
    *("place_in_slider", "stack_block", "open_drawer", "move_slider_left", "turn_on_led"),
)
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
    starts: int = 8
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

    `distances` are 1 - cosine of the states at `<ACT>`, a list over the starts each:
    `block moved`, `time`, and one for each of `OTHERS`. `episode` has the nearest words and
    the probabilities of the words of space over the first start. The nearest words of any latent
    are much the same, so beside them are those that this one is nearer to than the latents of other
    tasks' sentences over the same picture are (`above_others`). `left_over_right` is by how
    much moving the block to the left raised the cosine to "left" above that to "right".
    """
    text = TASKS[options.task].sentence
    space = WordSpace(engine.checkpoint)
    first = pictures[0]
    episode = states(engine, first.moved, text)
    similar = space.similarity(torch.from_numpy(episode), SPATIAL_WORDS)
    said_else = [TASKS[name].sentence for name in BASELINE if TASKS[name].sentence != text]
    usual = np.concatenate([states(engine, first.moved[:1], other) for other in said_else])
    distances: dict[str, list[float]] = {"block moved": [], "time": []}
    distances |= {name: [] for name in OTHERS}
    lean: list[float] = []
    for picture in pictures:
        pair = states(engine, list(picture.instant), text)
        ends = states(engine, [picture.still[0], picture.still[-1]], text)
        distances["block moved"].append(1 - cosine(pair[0], pair[1]))
        distances["time"].append(1 - cosine(ends[0], ends[1]))
        for name, other in OTHERS.items():
            said = states(engine, [picture.still[0]], validation()[other][0])
            distances[name].append(1 - cosine(ends[0], said[0]))
        sides = space.similarity(torch.from_numpy(pair), ("left", "right")).numpy()
        lean.append(float((sides[0, 0] - sides[0, 1]) - (sides[1, 0] - sides[1, 1])))
    return {
        "instruction": text,
        "model": engine.checkpoint.model_id,
        "spec_id": engine.spec.spec_id,
        "n_starts": len(pictures),
        "words": list(SPATIAL_WORDS),
        "episode": [
            {
                "step": row * options.every,
                "nearest": nearest_words(space, state),
                "above_others": space.above(torch.from_numpy(state), torch.from_numpy(usual)),
                "similarity": _named(similar[row]),
                "probability": _named((similar[row] / SHARP).softmax(-1)),
            }
            for row, state in enumerate(episode)
        ],
        "distances": {k: [round(v, 8) for v in values] for k, values in distances.items()},
        "left_over_right": [round(v, 8) for v in lean],
    }


def states(engine: EngineBase, images: Sequence[U8], text: str) -> F32:
    """Return the read-outs (N, hidden); several tokens are one meaning: their mean.

    Of several layers the last is taken, as `openhelix probe` does.
    """
    parts = [
        engine.states(images[i : i + BATCH], [text] * len(images[i : i + BATCH]))
        for i in range(0, len(images), BATCH)
    ]
    return np.concatenate(parts).mean(axis=1)[:, -engine.checkpoint.hidden :]


def nearest_words(space: WordSpace, state: F32, count: int = 10) -> list[dict[str, Any]]:
    """Return the nearest words; letters and pieces of other scripts' bytes are none."""
    found = space.nearest(torch.from_numpy(state), 20 * count)
    return [n for n in found if n["word"].isascii() and len(n["word"]) > 1][:count]


def _named(values: torch.Tensor) -> dict[str, float]:
    return {word: round(float(v), 6) for word, v in zip(SPATIAL_WORDS, values, strict=True)}


def claims(made: Mapping[str, Any], who: str) -> list[dict[str, Any]]:
    """Return the verdicts that a probe gives, in the form of `judge`'s."""
    moved = made["distances"]["block moved"]
    found = []
    for name in OTHERS:
        test = paired_permutation(moved, made["distances"][name])
        verdict = OPEN
        if test.p < ALPHA:
            verdict = HOLDS if test.difference > 0 else NOT
        found.append(
            {
                "a": "block moved",
                "b": name,
                "says": f"{who}: the block's move changes the latent less than {name} does",
                "finding": 5,
                "expect": "b_better",
                "verdict": verdict,
                "n_pairs": test.n,
                "difference": test.difference,
                "ci95": list(test.ci95),
                "p": test.p,
                "test": test.test,
                "unit": "1 - cosine",
                "paper_difference": None,
            }
        )
    return found


def distance_table(made: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return how far the latent moves, and by what, as a table."""
    rows = []
    for name, values in made["distances"].items():
        low, high = mean_interval(values)
        rows.append([name, f"{np.mean(values):.5f}", f"{low:.5f} to {high:.5f}", str(len(values))])
    return ["what changes", "1 - cosine", "95 % interval", "starts"], rows
