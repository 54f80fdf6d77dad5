"""How well policies do on held-out caches: loss and errors of sampled trajectories, on all frames.

    python -m openhelix.benchmarks.perf.compare_policies --policies a/policy b/policy --caches FOLDER

`--layouts FOLDER` makes what it compares: the same demonstrations kept as a collection with its own
cache and in CALVIN's layout, trainings of equal steps on each, from each of some seeds, and other
demonstrations that neither has seen, in both layouts:

    python -m openhelix.benchmarks.perf.compare_policies --layouts FOLDER --per-task 25 --steps 300

`compared` has each layout's errors on unseen demonstrations in its own layout, averaged over the
seeds, and their difference with its 95 % interval over demonstrations (bootstrap). The two have
other targets: the collection's what was commanded, CALVIN's where the hand was one frame later. The
same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openhelix.system1.checkpoint import load_policy
from openhelix.system1.data import Cache
from openhelix.system1.losses import trajectory_errors
from openhelix.system1.model import gaussian

BATCH, DRAWS = 32, 4
FIGURES = ("loss", "position_m", "rotation_rad", "gripper_error")
TASKS = (
    "open_drawer",
    "close_drawer",
    "turn_on_led",
    "turn_off_led",
    "move_slider_left",
    "lift_red_block_table",
    "push_blue_block_left",
    "rotate_pink_block_right",
)
UNSEEN_SEED, UNSEEN_PER_TASK = 7, 4
RESAMPLED = 4000


@torch.no_grad()
def sums_of(policy: Path, folder: Path) -> Tensor:
    """Return (demonstrations, 5): summed loss and errors of `FIGURES` over real rows, and rows."""
    cache, model = Cache(folder), load_policy(policy).eval()
    generator = torch.Generator().manual_seed(0)
    found: list[Tensor] = []
    for group in cache.group.unique():
        sums = torch.zeros(5, dtype=torch.float64)
        for frames in torch.nonzero(cache.group == group)[:, 0].split(BATCH):
            batch = cache.batch(frames, generator, None, model.config.rotation)
            parts = model.loss(
                batch.inputs, batch.rows, batch.openness, batch.mask, DRAWS, generator
            )
            out = model.sample_inputs(batch.inputs, gaussian(generator, torch.device("cpu")))
            errors = trajectory_errors(out, batch.rows, batch.openness, batch.mask)
            rows = float(batch.mask.sum())
            values = (float(parts.total) * rows, *errors, rows)
            sums += torch.tensor(values, dtype=torch.float64)
        found.append(sums)
    return torch.stack(found)


def means(sums: Tensor) -> dict[str, float]:
    """Return the figures of summed rows (…, demonstrations, 5)."""
    whole = sums.flatten(0, -2).sum(0)
    found = (whole[:4] / whole[4]).tolist()
    return {name: round(value, 4) for name, value in zip(FIGURES, found, strict=True)}


def compared(first: Tensor, second: Tensor) -> dict[str, dict[str, Any]]:
    """Return each figure of two kinds of policies, and their difference with its interval.

    Args:
        first, second: (seeds, demonstrations, 5), the demonstrations of each its own.
    """
    generator = torch.Generator().manual_seed(0)

    def resampled(sums: Tensor) -> Tensor:
        each = sums.sum(0)
        picks = torch.randint(len(each), (RESAMPLED, len(each)), generator=generator)
        whole = each[picks].sum(1)
        return whole[:, :4] / whole[:, 4:]

    gaps = resampled(second) - resampled(first)
    low, high = gaps.quantile(torch.tensor([0.025, 0.975], dtype=gaps.dtype), dim=0)
    a, b = means(first), means(second)
    return {
        name: {
            "collection": a[name],
            "calvin": b[name],
            "difference": round(b[name] - a[name], 4),
            "interval_95": [round(float(low[i]), 4), round(float(high[i]), 4)],
        }
        for i, name in enumerate(FIGURES)
    }


def openhelix(*words: object) -> None:
    """Run a command of ours; what it says of itself goes to standard error."""
    command = [sys.executable, "-m", "openhelix", *map(str, words)]
    subprocess.run(command, check=True, stdout=sys.stderr)


def collected(folder: Path, per_task: int, seed: int, every: int) -> dict[str, Path]:
    """Make demonstrations in both layouts; return the cache of each."""
    tasks = f"tasks=[{','.join(TASKS)}]"
    common = ("scenes=A", tasks, f"per_task={per_task}", f"seed={seed}", "disturbed=0", "jobs=1")
    states = folder / "states"
    if not (folder / "training").is_dir():
        openhelix("collect", "format=calvin", *common, "compress=false", f"out={folder}")
    openhelix("collect", *common, f"out={states}", "frames.plain=1", f"frames.every={every}")
    openhelix(
        "data", "cache", folder / "training", folder / "cache", "jobs=1", f"every={every}"
    )  # goes on, or is there
    return {"collection": states / "frames", "calvin": folder / "cache"}


def layouts(
    folder: Path, per_task: int, steps: int, seeds: int, every: int, changes: str
) -> dict[str, Any]:
    """Make, train and measure; see the module."""
    seen = collected(folder / "seen", per_task, 0, every)
    unseen = collected(folder / "unseen", UNSEEN_PER_TASK, UNSEEN_SEED, every)
    sums: dict[tuple[str, str], list[Tensor]] = {}
    for seed in range(seeds):
        for name, cache in seen.items():
            out = folder / f"{name}-{seed}"
            openhelix(
                "train", "policy", f"data={cache}", f"out={out}", f"seed={seed}", "threads=1",
                f"policy.steps={steps}", f"policy.warmup={min(200, steps // 2)}", "bf16=true",
                f"policy.eval_every={steps}", f"policy.changes={changes}",
            )  # fmt: skip
            for shown, held in unseen.items():
                sums.setdefault((name, shown), []).append(sums_of(out / "policy", held))
    stacked = {key: torch.stack(found) for key, found in sums.items()}
    own = compared(stacked["collection", "collection"], stacked["calvin", "calvin"])
    return {
        "demonstrations": per_task * len(TASKS),
        "frames": {name: len(Cache(cache)) for name, cache in seen.items()},
        "unseen_frames": {name: len(Cache(cache)) for name, cache in unseen.items()},
        "steps": steps,
        "seeds": seeds,
        "compared": own,
        "trained_on": {
            name: {
                f"measured on {shown}": [means(one.unsqueeze(0)) for one in stacked[name, shown]]
                for shown in unseen
            }
            for name in seen
        },
    }


def main() -> int:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--policies", type=Path, nargs="+", default=[], help="policy folders")
    parser.add_argument("--caches", type=Path, nargs="+", default=[], help="with cache.json")
    parser.add_argument("--layouts", type=Path, help="folder to make and train everything in")
    parser.add_argument("--per-task", type=int, default=25)
    parser.add_argument("--every", type=int, default=4, help="frames; as of `data cache`")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--changes", default="{}", help="policy.changes of the trainings")
    parser.add_argument("--out", type=Path, help="folder for layouts.json")
    options = parser.parse_args()
    if bool(options.policies) != bool(options.caches) or bool(options.layouts) == bool(
        options.policies
    ):
        parser.error("name --policies and --caches, or --layouts")
    torch.set_num_threads(1)
    if options.layouts is None:
        found: dict[str, Any] = {
            str(folder): {
                str(policy): {"frames": len(Cache(folder))} | means(sums_of(policy, folder))
                for policy in options.policies
            }
            for folder in options.caches
        }
    else:
        found = layouts(
            options.layouts,
            options.per_task,
            options.steps,
            options.seeds,
            options.every,
            options.changes,
        )
        if options.out is not None:
            options.out.mkdir(parents=True, exist_ok=True)
            (options.out / "layouts.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
