"""How well policies do on held-out caches: loss and errors of sampled trajectories, on all frames.

Two trainings of equal steps, one on a collection's own cache and one on the same demonstrations in
CALVIN's layout, are compared on demonstrations that neither has seen, in both layouts:

    openhelix collect format=calvin scenes=A per_task=12 disturbed=0 out=cmp
    openhelix collect scenes=A per_task=12 disturbed=0 out=cmp/states frames.plain=1
    openhelix train policy data=cmp/states out=native policy.steps=400
    openhelix train policy data=cmp/training out=calvin policy.steps=400
    python -m openhelix.benchmarks.perf.compare_policies --policies native/policy calvin/policy \
        --caches unseen/states/frames unseen-cache

The figures in docs/data.md are of eight of the tasks (tasks=[open_drawer,close_drawer,turn_on_led,
turn_off_led,move_slider_left,lift_red_block_table,push_blue_block_left,rotate_pink_block_right]),
trained with bf16=true threads=1 validation=0.25; `unseen` is per_task=4 seed=7, every=2.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from openhelix.system1.checkpoint import load_policy
from openhelix.system1.data import Cache
from openhelix.system1.losses import trajectory_errors
from openhelix.system1.model import gaussian

BATCH, DRAWS = 32, 4


@torch.no_grad()
def errors(policy: Path, folder: Path) -> dict[str, float]:
    """Return a policy's loss and mean errors over the real rows of a cache's frames."""
    cache, model = Cache(folder), load_policy(policy).eval()
    generator = torch.Generator().manual_seed(0)
    sums = torch.zeros(5, dtype=torch.float64)
    for frames in torch.arange(len(cache)).split(BATCH):
        batch = cache.batch(frames, generator, None, model.config.rotation)
        parts = model.loss(batch.inputs, batch.rows, batch.openness, batch.mask, DRAWS, generator)
        out = model.sample_inputs(batch.inputs, gaussian(generator, torch.device("cpu")))
        found = trajectory_errors(out, batch.rows, batch.openness, batch.mask)
        rows = float(batch.mask.sum())
        values = (float(parts.total) * rows, *found, rows)
        sums += torch.tensor(values, dtype=torch.float64)
    loss, position, rotation, gripper = (sums[:4] / sums[4]).tolist()
    return {
        "frames": len(cache),
        "loss": round(loss, 4),
        "position_m": round(position, 4),
        "rotation_rad": round(rotation, 4),
        "gripper_error": round(gripper, 4),
    }


def main() -> int:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--policies", type=Path, nargs="+", required=True, help="policy folders")
    parser.add_argument("--caches", type=Path, nargs="+", required=True, help="with cache.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = {
        str(folder): {str(policy): errors(policy, folder) for policy in options.policies}
        for folder in options.caches
    }
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
