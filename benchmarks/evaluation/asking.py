"""What does System 2 see? Questions about a picture, answered in words.

    openhelix probe --ask "where is the red block?" --scene D
    openhelix probe --ask "is the drawer open?" --image table.png --model FOLDER --engine transformers
    openhelix probe --ask "lift the red block" --scene D --model SHIP/llava --latent SHIP/latent.safetensors

With `--latent` each ASK is an instruction, put as a robot's System 2 is asked, and the answer is
what it says beside its latent (a pair trained with `latent.answer`); that is for transformers.

`--scene` draws a state of that scene from `--seed` and shows it to System 2; `--save` keeps the
picture. The model is the configuration's, or `--model`. Use one trained with `openhelix train
vlm`: the plain laptop model was never trained to answer questions.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from PIL import Image
from pydantic import Field

from openhelix.runtime.cli.arguments import Many, Options, option, parse
from openhelix.runtime.core.config import ConfigError, Part, RunConfig, load
from openhelix.runtime.core.output import answer
from openhelix.runtime.core.plugins import none_of, resolve
from openhelix.system2.answering import ANSWERERS, Answerer
from openhelix.system2.probe import read_image

SETTINGS = ("model", "dtype", "threads")  # of an engine's options, those that an answer needs


class AskOptions(Options):
    """Options of `probe --ask`; the engine's are those of `RunConfig`."""

    ask: Annotated[tuple[str, ...], Many()] = option(..., "one or more", "QUESTION")
    scene: str | None = option(None, "show a state of this scene", "SCENE")
    image: Path | None = option(None, "show this picture", "FILE")
    seed: Annotated[int, Field(ge=0)] = option(0, "of the state shown (0)", "N")
    save: Path | None = option(None, "write the picture that was shown", "PNG")
    blind: bool = option(False, "show a black picture")
    engine: str | None = option(None, f"{' or '.join(ANSWERERS)} (the settings')")
    model: str | None = option(None, "laptop, a LLaVA folder, or a hub name (the settings')")
    latent: Path | None = option(None, "answer behind the <ACT> of this latent.safetensors", "FILE")


def main(argv: Sequence[str]) -> int:
    """`openhelix probe --ask`: print answers; 0 when done.

    Raises:
        ConfigError: bad input, in one line.
    """
    options, overrides = parse(
        "probe", AskOptions, argv, __doc__ or "", RunConfig, ("system2.engine",)
    )
    if (options.image is None) == (options.scene is None):
        raise ConfigError("ask: name one picture, --scene A..D or --image FILE")
    part = load(options.config, overrides).system2.engine
    image = read_image(options.image) if options.image else draw(options.scene or "", options.seed)
    if options.save is not None:
        image.save(options.save)
    shown = Image.new("RGB", image.size) if options.blind else image
    named = options.engine or ("transformers" if options.latent else None)
    name, settings = answering(part, named, options.model)
    if options.latent:
        if name != "transformers":
            raise ConfigError(f"latent: {name} answers without <ACT>; say --engine transformers")
        settings["latent"] = options.latent
    answerer: Answerer = resolve(ANSWERERS[name])(**settings)
    try:
        answers = answerer.answer([shown] * len(options.ask), list(options.ask))
    finally:
        answerer.close()
    made = {
        "engine": name,
        "model": settings.get("model", "laptop"),
        "model_id": answerer.checkpoint.model_id,
        "scene": options.scene,
        "image": str(options.image) if options.image else None,
        "blind": options.blind,
        "answers": [
            {"question": q, "answer": a} for q, a in zip(options.ask, answers, strict=True)
        ],
    }
    text = [f"{row['question']}\n   {row['answer']}" for row in made["answers"]]
    answer(json.dumps(made) if options.as_json else "\n".join(text))
    return 0


def answering(part: Part, engine: str | None, model: str | None) -> tuple[str, dict[str, Any]]:
    """Return which of `ANSWERERS` answers in an engine's place, and its settings.

    Raises:
        ConfigError: there is no such engine.
    """
    name = engine or next((n for n in ANSWERERS if n in part.target.lower()), "vllm")
    if name not in ANSWERERS:
        raise ConfigError(f"engine: {none_of(name, ANSWERERS)}")
    settings: dict[str, Any] = {k: v for k, v in part.options.items() if k in SETTINGS}
    return name, settings | ({"model": model} if model else {})


def draw(scene: str, seed: int) -> Image.Image:
    """Return the static camera's picture of a random state of a scene."""
    from openhelix.benchmarks.calvin.cameras import SceneRenderer
    from openhelix.benchmarks.calvin.captions import StateMaker

    maker = StateMaker(scene, np.random.default_rng(seed))
    try:
        state, _ = maker.draw()
    finally:
        maker.close()
    frame = SceneRenderer(scene, ("static",)).render(state)["static"]
    return Image.fromarray(frame.rgb)
