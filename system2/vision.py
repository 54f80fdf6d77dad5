"""The whole recipe for the laptop model's eyes, stage by stage, resumable at each.

    python -m benchmarks.playtable.captions --out DATA     # pictures with words
    python -m system2.vision --data DATA --out OUT         # the four stages below
    python -m system2.vision --data DATA --out OUT --stage evaluate --limit 100

1. `words`: tower and projector learn to write captions in plain word embeddings.
2. `wording`: the embeddings themselves are tuned, without images, until the frozen language
   model answers questions about captions.
3. `retarget`: tower and projector learn to write in that wording.
4. `evaluate`: questions about held-out states and a held-out scene, with the image, without
   it, with another picture's, and with the perfect caption.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from system2.model import Checkpoint, VisionShape, build, load_vision, open_checkpoint
from system2.pretrain import (
    Captions,
    PretrainConfig,
    VisionLearner,
    caption_accuracy,
    open_for_training,
    train,
)
from system2.reading import Reader
from system2.wording import SoftCaption, WordingConfig, WordingTrainer

log = logging.getLogger(__name__)
STAGES = ("words", "wording", "retarget", "evaluate")
HELD_OUT = ("test-states", "test-scene")


class Recipe:
    """The stages, sharing data folders and one output folder.

    Args:
        data: holds `train`, `test-states` and `test-scene`.
        out: each stage has a folder in it.
        seed: of the untrained tower.
    """

    def __init__(self, data: Path, out: Path, seed: int = 0) -> None:
        self._data, self._out = data, out
        # An explicit shape: from an untrained tower, not from the shipped weights.
        self._path = str(build(vision=VisionShape(), seed=seed))
        self._checkpoint: Checkpoint = open_checkpoint(self._path)

    def words(self, config: PretrainConfig) -> VisionLearner:
        """Stage 1."""
        model, processor, tokenize = open_for_training(self._path)
        data = self._captions("train", tokenize)
        return train(model, processor, data, config, self._out / "words", _tell)

    def wording(self, config: WordingConfig) -> None:
        """Stage 2."""
        model, processor, tokenize = open_for_training(self._path)
        data = self._captions("train", tokenize)
        learner = VisionLearner(model, processor, data)
        soft = SoftCaption(learner.table[0], learner.candidates)
        index = torch.searchsorted(learner.vocabulary, data.words)
        trainer = WordingTrainer(model.to(torch.bfloat16), self._checkpoint, soft)
        trainer.train(index, data.records, config, self._out / "wording", _tell)

    def tuned(self, learner: VisionLearner) -> Tensor:
        """Return stage 2's embeddings (n_image, V, hidden)."""
        soft = SoftCaption(learner.table[0], learner.candidates)
        rows = load_file(self._out / "wording" / "wording.safetensors")["rows"]
        soft.rows.data.copy_(rows)
        return soft.dense().detach()

    def retarget(self, config: PretrainConfig) -> VisionLearner:
        """Stage 3."""
        model, processor, tokenize = open_for_training(self._path)
        data = self._captions("train", tokenize)
        wording = self.tuned(VisionLearner(model, processor, data))
        folder = self._out / "retarget"
        return train(model, processor, data, config, folder, _tell, wording, self._out / "words")

    def evaluate(self, limit: int, controls: int, stage: str = "retarget") -> dict[str, Any]:
        """Stage 4: accuracies with the number of questions asked.

        Args:
            limit: pictures a held-out set for which questions are asked with the image.
            controls: pictures for each control.
            stage: whose weights.
        """
        weights = self._out / stage / "vision.safetensors"
        model, processor, tokenize = open_for_training(self._path, weights)
        learner = VisionLearner(model, processor, self._captions("train", tokenize))
        if stage == "retarget":
            learner.table = self.tuned(learner)
        reader_model = open_for_training(self._path)[0].to(torch.bfloat16)
        load_vision(reader_model, load_file(weights))
        reader = Reader(reader_model, self._checkpoint)
        report: dict[str, Any] = {}
        for name in HELD_OUT:
            data = self._captions(name, tokenize)
            perfect = torch.searchsorted(learner.vocabulary, data.words)
            shown: dict[str, Callable[[int], Tensor]] = {
                "image": partial(_seen, learner, data),
                "other": partial(_seen, learner, data),
                "none": partial(_written, learner, perfect),
                "perfect_caption": partial(_written, learner, perfect),
            }
            result: dict[str, Any] = {"caption_words": caption_accuracy(learner, data)}
            for source, tokens in shown.items():
                some = data.records[: limit if source == "image" else controls]
                kind: Any = "image" if source == "perfect_caption" else source
                scores = reader.accuracy(some, kind, tokens)
                result[source] = {
                    k: {"accuracy": round(s.accuracy, 4), "asked": s.asked}
                    for k, s in scores.items()
                }
                log.info("%s %s %s", name, source, result[source]["all"])
            report[name] = result
        (self._out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
        return report

    def _captions(self, name: str, tokenize: Callable[[str], list[int]]) -> Captions:
        return Captions(self._data / name, tokenize, self._checkpoint.n_image)


@torch.inference_mode()
def _seen(learner: VisionLearner, data: Captions, row: int) -> Tensor:
    """What the tower makes of a picture."""
    return learner(data.pixels(np.array([row])))[0]


def _written(learner: VisionLearner, index: Tensor, row: int) -> Tensor:
    """What a perfect tower would have made of it."""
    return learner.table[torch.arange(index.shape[1]), index[row]]


def _tell(row: dict[str, float]) -> None:
    log.info("%s", {key: round(value, 4) for key, value in row.items()})


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages; each goes on where it stopped."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--stage", choices=STAGES, nargs="+", default=list(STAGES))
    parser.add_argument("--steps", type=int, default=3000, help="of words")
    parser.add_argument("--wording-steps", type=int, default=150)
    parser.add_argument("--retarget-steps", type=int, default=1000)
    parser.add_argument("--limit", type=int, default=100, help="pictures asked about")
    parser.add_argument("--controls", type=int, default=40, help="pictures asked about in controls")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bf16", action="store_true", help="autocast the tower's training")
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(options.threads)
    recipe = Recipe(options.data, options.out)
    vision = PretrainConfig(steps=options.steps, bf16=options.bf16)
    if "words" in options.stage:
        recipe.words(vision)
    if "wording" in options.stage:
        recipe.wording(WordingConfig(steps=options.wording_steps, captions=3, save_every=10))
    if "retarget" in options.stage:
        recipe.retarget(replace(vision, steps=options.retarget_steps, lr=5e-4, warmup=50, seed=1))
    if "evaluate" in options.stage:
        recipe.evaluate(options.limit, options.controls)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
