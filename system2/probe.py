"""Describe a latent in words: nearest vocabulary and similarity to a given list (paper Fig. 5).

The state at `<ACT>` lives in the space from which the language model predicts its next word, so
it is compared with the rows of the output embedding table. Over an episode, the similarity to
words such as left and right shows whether System 2 follows what it sees or only repeats the
instruction, which is what the paper found.

Two other modes have options of their own, among them `--scene`, which their own `--help` lists:
`--ask QUESTION` answers in words; `--sentences LIST` names the task of every sentence in a list.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from openhelix.runtime.cli.arguments import Many, Options, Words, option, parse
from openhelix.runtime.core.config import ConfigError, RunConfig, load
from openhelix.runtime.core.files import CheckpointError, read_json
from openhelix.runtime.core.output import answer
from openhelix.runtime.core.plugins import resolve
from openhelix.system2.engines.base import EngineBase
from openhelix.system2.model import Checkpoint, load_tokenizer
from openhelix.system2.prompt import BadImage

SPATIAL_WORDS = ("left", "right", "up", "down", "front", "back", "above", "below", "in", "on")
ENGINES = {
    "vllm": "openhelix.system2.engines.vllm:VllmEngine",
    "transformers": "openhelix.system2.engines.transformers:TransformersEngine",
}


def output_table(checkpoint: Checkpoint) -> Tensor:
    """Return the output word table (V, hidden) of a checkpoint, from its files alone.

    Raises:
        CheckpointError: the files hold none.
    """
    from safetensors import safe_open
    from transformers.utils import cached_file

    names: tuple[str, ...] = ("lm_head.weight", "language_model.lm_head.weight")
    names += (
        "model.language_model.embed_tokens.weight",
        "language_model.model.embed_tokens.weight",
    )
    try:
        index = cached_file(checkpoint.path, "model.safetensors.index.json")
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict):
            raise CheckpointError(f"model: {index}: has no weight_map")
    except OSError:
        single = cached_file(checkpoint.path, "model.safetensors")
        with safe_open(single, framework="pt") as stream:
            shards = dict.fromkeys(stream.keys(), "model.safetensors")
    for name in names:
        if name in shards:
            file = cached_file(checkpoint.path, shards[name])
            with safe_open(file, framework="pt") as stream:
                return stream.get_tensor(name).float()
    raise CheckpointError(f"model: {checkpoint.path!r} has no output table to compare words with")


class WordSpace:
    """The output table's whole words, ready to compare with.

    Args:
        checkpoint: of the engine whose latents are probed.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._tokenizer = load_tokenizer(checkpoint.path)
        table = output_table(checkpoint)
        marks = ("\u0120", "\u2581")  # how byte-level BPE and SentencePiece write a leading space
        words = {
            token[1:]: index
            for token, index in self._tokenizer.get_vocab().items()
            if token[:1] in marks and token[1:].isalpha() and index < len(table)
        }
        self._words = [word for word, index in words.items()]
        self._rows = torch.nn.functional.normalize(table[list(words.values())], dim=-1)
        self._table = torch.nn.functional.normalize(table, dim=-1)

    def nearest(self, state: Tensor, n: int = 10) -> list[dict[str, Any]]:
        """Return the `n` whole words of the highest cosine with a state (hidden,)."""
        scores = self._rows @ torch.nn.functional.normalize(state, dim=-1)
        best = scores.topk(min(n, len(self._words)))
        return [
            {"word": self._words[i], "cosine": round(float(v), 6)}
            for v, i in zip(best.values, best.indices.tolist(), strict=True)
        ]

    def above(self, state: Tensor, others: Tensor, n: int = 10) -> list[dict[str, Any]]:
        """Return the whole words that a state is nearer to than other states are on average.

        Args:
            state: (hidden,).
            others: (N, hidden), of which the mean cosine to each word is what is usual.
            n: how many words.
        """
        normal = torch.nn.functional.normalize
        own, usual = self._rows @ normal(state, dim=-1), self._rows @ normal(others, dim=-1).T
        more = own - usual.mean(dim=1)
        best = more.topk(min(20 * n, len(self._words)))
        found = [
            {
                "word": self._words[i],
                "cosine": round(float(own[i]), 6),
                "above": round(float(v), 6),
            }
            for v, i in zip(best.values, best.indices.tolist(), strict=True)
        ]
        return [row for row in found if row["word"].isascii() and len(row["word"]) > 1][:n]

    def similarity(self, states: Tensor, words: Sequence[str]) -> Tensor:
        """Return cosines (B, len(words)); a word of several tokens counts with their mean."""
        rows = []
        for word in words:
            ids = self._tokenizer(" " + word.strip(), add_special_tokens=False)["input_ids"]
            if not ids:
                raise ConfigError(f"words: {word!r} is no word")
            rows.append(self._table[ids].mean(dim=0))
        return (
            torch.nn.functional.normalize(states, dim=-1)
            @ torch.nn.functional.normalize(torch.stack(rows), dim=-1).T
        )


def probe_episode(
    images: Sequence[Any],
    texts: Sequence[str],
    engine: EngineBase,
    words: Sequence[str] = SPATIAL_WORDS,
    top: int = 10,
    batch: int = 8,
) -> dict[str, Any]:
    """Probe every frame of an episode.

    Returns:
        `steps` [{`instruction`, `nearest` [{`word`, `cosine`}], `similarity` {word: cosine},
        `probability` {word: softmax over the list}, `drift`: cosine to the first step}],
        `words`, `spec`, `spec_id`.
    """
    space = WordSpace(engine.checkpoint)
    parts = [
        engine.states(images[i : i + batch], texts[i : i + batch])
        for i in range(0, len(images), batch)
    ]
    # Several tokens are one meaning here: their mean. Of several layers the last is compared.
    states = torch.from_numpy(np.concatenate(parts)).mean(dim=1)[:, -engine.checkpoint.hidden :]
    similar = space.similarity(states, words)
    sharp = (similar / 0.05).softmax(dim=-1)
    drift = torch.nn.functional.cosine_similarity(states, states[:1], dim=-1)

    def table(values: Tensor) -> dict[str, float]:
        return {word: round(float(v), 6) for word, v in zip(words, values, strict=True)}

    return {
        "words": list(words),
        "spec": asdict(engine.spec),
        "spec_id": engine.spec.spec_id,
        "steps": [
            {
                "instruction": text,
                "nearest": space.nearest(states[row], top),
                "similarity": table(similar[row]),
                "probability": table(sharp[row]),
                "drift": round(float(drift[row]), 6),
            }
            for row, text in enumerate(texts)
        ],
    }


def probe(
    image_path: Path | str,
    text: str,
    engine: EngineBase,
    words: Sequence[str] = SPATIAL_WORDS,
) -> dict[str, Any]:
    """Probe one image and instruction; also gives the latent itself as `latent` (n_tokens, dim).

    Raises:
        BadImage: no readable image there.
    """
    image = read_image(image_path)
    made = probe_episode([image], [text], engine, words)
    latent = engine.encode([image], [text])[0]
    return made["steps"][0] | {
        "image": str(image_path),
        "spec": made["spec"],
        "spec_id": made["spec_id"],
        "shape": list(latent.shape),
        "latent": [[round(float(v), 6) for v in row] for row in latent],
    }


def read_image(path: Path | str) -> Image.Image:
    """Return an RGB image from a file.

    Raises:
        BadImage: it cannot be read.
    """
    try:
        with Image.open(path) as opened:
            return opened.convert("RGB")
    except OSError as error:
        raise BadImage(f"image: cannot read {str(path)!r}: {error}") from error


def plot(made: dict[str, Any], path: Path) -> None:
    """Draw an episode's similarities over time, with the first and last nearest words."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    steps = made["steps"]
    for word in made["words"]:
        axes.plot([step["similarity"][word] for step in steps], label=word, marker=".")
    axes.set_xlabel("latent")
    axes.set_ylabel("cosine similarity")
    lists = [", ".join(n["word"] for n in steps[i]["nearest"][:8]) for i in (0, -1)]
    axes.set_title(f"first: {lists[0]}\nlast: {lists[1]}", fontsize=9)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)
    figure.savefig(path, dpi=120)


class ProbeOptions(Options):
    """Options of `probe`; the engine's are those of `RunConfig`."""

    image: Annotated[tuple[Path, ...], Many()] = option(..., "several: an episode", "FILE")
    text: str = option(..., "the instruction")
    engine: str | None = option(None, "vllm, transformers, or module:Class (the settings')")
    model: str | None = option(None, "laptop, a LLaVA folder, or a hub name")
    words: Words = option(SPATIAL_WORDS, "words to compare with", "WORD,...")
    blind: bool = option(False, "show System 2 a black picture")
    plot: Path | None = option(None, "draw the similarities", "PNG")


def main(argv: Sequence[str]) -> int:
    """Show what System 2 makes of an image and an instruction."""
    options, overrides = parse(
        "probe", ProbeOptions, argv, __doc__ or "", RunConfig, ("system2.engine",)
    )
    if options.blind:
        overrides.append("system2.blind=true")
    part = load(options.config, overrides).system2.engine
    target = ENGINES.get(options.engine or "", options.engine or part.target)
    settings = dict(part.options)
    if options.model:
        settings["model"] = options.model
    words = list(options.words)
    images = [read_image(path) for path in options.image]  # before a model is loaded for nothing
    engine = resolve(target)(**settings)
    try:
        if len(images) == 1:
            made = probe(options.image[0], options.text, engine, words)
            episode = {"words": words, "steps": [made]}
        else:
            made = episode = probe_episode(images, [options.text] * len(images), engine, words)
    finally:
        engine.close()
    if options.plot:
        plot(episode, options.plot)
    answer(json.dumps(made) if options.as_json else _page(episode))
    return 0


def _page(made: dict[str, Any]) -> str:
    lines = []
    for index, step in enumerate(made["steps"]):
        nearest = ", ".join(f"{n['word']} {n['cosine']:.3f}" for n in step["nearest"])
        ranked = sorted(step["similarity"].items(), key=lambda item: -item[1])
        lines.append(f"{index}: {step['instruction']}")
        lines.append(f"   nearest words: {nearest}")
        lines.append("   similarity: " + ", ".join(f"{word} {value:.3f}" for word, value in ranked))
    return "\n".join(lines) + "\n"
