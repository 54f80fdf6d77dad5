"""How precisely does System 2 know where a block is? A linear read-out of its states.

    openhelix probe --places 1500 --scene ABC

A policy without a live image learns of a block's place from System 2 alone (the paper's pseudo dual
systems), so this says how near to a block such a policy can come. In each of so many starts one block
lies free on the table and the sentence says to lift it. For each colour a ridge regression from
System 2's states to the block's place is fitted to three quarters of its starts; its error is that
on the others. A policy of several layers that sees many more samples may read more than this linear map.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Protocol

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from openhelix.benchmarks.calvin.scene import SceneError, scene_names, written
from openhelix.benchmarks.calvin.table_talk import COLOURS
from openhelix.benchmarks.evaluation.eval import load_config
from openhelix.runtime.cli.arguments import Options, option, parse
from openhelix.runtime.control.assembly import make
from openhelix.runtime.core.config import ConfigError, RunConfig
from openhelix.runtime.core.interfaces import F32, U8
from openhelix.runtime.core.output import answer
from openhelix.system2.prompt import Layout

BATCH = 8
FEWEST = 8 * len(COLOURS)
HELD_OUT = 4  # one start in so many, and of the others one in so many chooses the penalty
NEAR_M = 0.02  # the gripper opens 8 cm, and a block is 5 cm wide
PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # in units of the Gram matrix's mean diagonal


class Reader(Protocol):
    """The part of an engine that is used here."""

    def encode(self, images: Sequence[Any], instructions: Sequence[str]) -> F32: ...

    def hidden(self, images: Sequence[Any], instructions: Sequence[str]) -> list[Tensor]: ...

    def layout(self, instruction: str) -> Layout: ...


class PlacingOptions(Options):
    """Options of `probe --places`; all else is `RunConfig.system2`."""

    places: int = option(..., f"starts to look at, at least {FEWEST}", "N")
    scene: str = option("ABC", "one or more: D, ABC, R17, random:0-9 (ABC)", "SCENES")
    blind: bool = option(False, "show black pictures")
    seed: Annotated[int, Field(ge=0)] = option(0, "of the states shown (0)", "N")


def main(argv: Sequence[str]) -> int:
    """Say how far from a block a linear read-out of System 2's states is.

    Raises:
        ValueError: bad input, in one line.
    """
    options, overrides = parse(
        "probe", PlacingOptions, argv, __doc__ or "", RunConfig, ("system2",)
    )
    for key in (word.partition("=")[0] for word in overrides):
        if key.partition(".")[0] != "system2":
            raise ConfigError(f"{key}: --places looks at System 2 alone; say system2.FIELD=VALUE")
    if options.places < FEWEST:
        raise ConfigError(f"--places: {options.places}, want {FEWEST} or more")
    try:
        scenes = scene_names(options.scene)
    except SceneError as error:
        raise SceneError(f"--scene: {error}") from None
    if options.blind:
        overrides.append("system2.blind=true")
    config = load_config(overrides, options.config, scene=options.scene)
    engine = make(config.system2.engine)
    try:
        if not hasattr(engine, "hidden"):
            raise ConfigError(f"system2.engine: {config.system2.engine.target} shows no states")
        report = placed(engine, list(starts(scenes, options.places, options.seed)))
    finally:
        engine.close()
    report |= {
        "scene": written(scenes),
        "seed": options.seed,
        "blind": config.system2.blind,
        "spec_id": engine.spec.spec_id,
    }
    answer(json.dumps(report) if options.as_json else page(report))
    return 0


def starts(
    scenes: Sequence[str], count: int, seed: int
) -> Iterator[tuple[str, U8, tuple[float, float]]]:
    """Yield a colour, the static camera's picture (H, W, 3) and that block's x and y (m, world).

    The block lies free on the table, as CALVIN's `lift_<colour>_block_table` begins; colours and
    scenes take turns.

    Raises:
        ConfigError: a scene has no such start.
    """
    from openhelix.benchmarks.calvin.env import PlayTableEnv
    from openhelix.benchmarks.calvin.starts import StartError, begin

    for place, scene in enumerate(scenes):
        with PlayTableEnv(scene, cameras=("static",)) as env:
            for number in range(place, count, len(scenes)):
                colour = COLOURS[number // len(scenes) % len(COLOURS)]
                rng = np.random.default_rng([seed, number])
                try:
                    info = begin(env, f"lift_{colour}_block_table", rng)
                except StartError as error:
                    raise ConfigError(f"--scene: {error}") from None
                block = info["scene_info"]["movable_objects"][f"block_{colour}"]
                x, y, _ = block["current_pos"]
                yield colour, np.array(env.render()), (float(x), float(y))


def placed(engine: Reader, seen: Sequence[tuple[str, U8, tuple[float, float]]]) -> dict[str, Any]:
    """Return how far from its block a linear read-out is.

    Args:
        engine: System 2.
        seen: colours, pictures and places, as `starts` yields them.

    Returns:
        `read_outs` {name: {`median_cm`, `within_2_cm`}}: of all states of the image, of the mean over
        the instruction's words, of `<ACT>`, and of the latent that is published; `guess`: the same of
        the mean place; `n`: starts that they are measured on.
    """
    rows: dict[str, list[Tensor]] = {}
    for first in range(0, len(seen), BATCH):
        part = seen[first : first + BATCH]
        shown = [image for _, image, _ in part]
        texts = [f"lift the {colour} block" for colour, *_ in part]
        latents = engine.encode(shown, texts)
        for text, states, latent in zip(texts, engine.hidden(shown, texts), latents, strict=True):
            for name, row in read_outs(states, engine.layout(text)).items():
                rows.setdefault(name, []).append(row)
            rows.setdefault("latent", []).append(torch.from_numpy(latent).flatten())
    places = torch.tensor([place for *_, place in seen], dtype=torch.float64)
    said = [colour for colour, *_ in seen]
    found = {name: torch.stack(states) for name, states in rows.items()}
    constant = torch.zeros(len(seen), 1)
    errors = {name: held_out_errors(states, places, said) for name, states in found.items()}
    guess = held_out_errors(constant, places, said)
    return {
        "n": len(guess),
        "guess": _summary(guess),
        "read_outs": {name: _summary(error) for name, error in errors.items()},
    }


def read_outs(states: Tensor, layout: Layout) -> dict[str, Tensor]:
    """Return what of a sequence's states (T, width) is read, each as one vector.

    Raises:
        ConfigError: they are not all there.
    """
    if len(states) != layout.length:
        raise ConfigError(
            "system2.engine: shows only the last state; say --places with the engine "
            "openhelix.system2.engines.transformers:TransformersEngine"
        )
    found = {"words": states[slice(*layout.words)].mean(0), "<ACT>": states[layout.act[0]]}
    image = states[slice(*layout.image)].flatten()
    return {"image": image, **found} if len(image) else found


def held_out_errors(states: Tensor, places: Tensor, said: Sequence[str]) -> Tensor:
    """Return how far from their places (m) held-out rows are put, each colour by its own regression.

    Args:
        states: (N, width).
        places: (N, 2), m.
        said: the colour of each.
    """
    errors = []
    for colour in COLOURS:
        rows = torch.tensor([i for i, other in enumerate(said) if other == colour])
        held = torch.arange(len(rows)) % HELD_OUT == 0
        learn, test = rows[~held], rows[held]
        chooses = torch.arange(len(learn)) % HELD_OUT == 0
        fit, choose = learn[~chooses], learn[chooses]
        tried = {float(_off(states, places, fit, choose, p).median()): p for p in PENALTIES}
        errors.append(_off(states, places, learn, test, tried[min(tried)]))
    return torch.cat(errors)


def _off(states: Tensor, places: Tensor, fit: Tensor, ask: Tensor, penalty: float) -> Tensor:
    """Return how far off (M,) rows `ask` are by a ridge regression on rows `fit`.

    There are more columns than rows, so it is solved in the space of rows.
    """
    x, y = states[fit].double(), places[fit]
    mean, spread, middle = x.mean(0), x.std(0).clamp_min(1e-6), y.mean(0)
    x = (x - mean) / spread
    gram = x @ x.T
    scale = gram.diagonal().mean().clamp_min(1e-12)
    gram += penalty * scale * torch.eye(len(gram), dtype=gram.dtype)
    weight = x.T @ torch.linalg.solve(gram, y - middle)
    guess = (states[ask].double() - mean) / spread @ weight + middle
    return (guess - places[ask]).norm(dim=1)


def _summary(errors: Tensor) -> dict[str, float]:
    return {
        "median_cm": round(100 * float(errors.median()), 1),
        "within_2_cm": round(float((errors < NEAR_M).double().mean()), 4),
    }


def page(report: Mapping[str, Any]) -> str:
    """Return the few lines that a person wants to see."""
    rows = {"the mean place": report["guess"], **report["read_outs"]}
    lines = [f"a block's place, read out linearly, {report['n']} held-out starts:"]
    lines += [
        f"  {name}: {row['median_cm']:.1f} cm off (median), "
        f"{100 * row['within_2_cm']:.0f} % within {100 * NEAR_M:.0f} cm"
        for name, row in rows.items()
    ]
    return "\n".join(lines) + "\n"
