"""How fast datasets are read: training samples per second of CPU time on one core.

    python -m openhelix.benchmarks.perf.bench_data
    python -m openhelix.benchmarks.perf.bench_data --data calvin/task_D_D/training --out FOLDER

Without `--data` a few demonstrations are rendered in CALVIN's layout, uncompressed as CALVIN's are.
Measured are

    raw frames   frames read in place from the dataset, all cameras with depth and pose, at random
    cache made   everything that makes a sample of the cache: the frame read, its segment's actions,
                 shrinking, labels, writing
    cache read   batches of 32 as training takes them, points in the world included; plain, and with
                 augmentation

CPU time, so that other load on the machine does not count.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from openhelix.benchmarks.calvin.collect import CollectConfig, export_calvin
from openhelix.benchmarks.data.build import Build, CacheSettings
from openhelix.benchmarks.data.source import Source, open_source
from openhelix.system1.data import Augment, Cache
from openhelix.system1.train_loop import keep_freed_memory

BATCH = 32
TASKS = ("open_drawer", "turn_on_led", "lift_red_block_table", "push_blue_block_left")


def rate(work: Callable[[], int], seconds: float) -> float:
    """Return samples per second of CPU time; `work` does some and returns how many."""
    work()  # the first makes what all others find ready
    done, begun = 0, time.process_time()
    while (spent := time.process_time() - begun) < seconds:
        done += work()
    return round(done / spent, 1)


def raw_rate(source: Source, seconds: float) -> float:
    """Return frames read at random from the dataset."""
    rng = np.random.default_rng(0)
    names = [camera.name for camera in source.cameras]

    def read() -> int:
        segment = source.segments[int(rng.integers(len(source.segments)))]
        frames = np.sort(rng.integers(segment.first, segment.last + 1, 8)).tolist()
        return len(list(source.views(frames, names)))

    return rate(read, seconds)


def cache_rate(cache: Cache, augment: Augment | None, seconds: float) -> float:
    """Return samples in batches from the cache."""
    generator = torch.Generator().manual_seed(0)

    def read() -> int:
        frames = torch.randint(len(cache), (BATCH,), generator=generator)
        return len(cache.batch(frames, generator, augment).rows)

    return rate(read, seconds)


def measured(path: Path, scratch: Path, seconds: float) -> dict[str, Any]:
    """Return all rates for a dataset; its cache goes to `scratch`."""
    source = open_source(path)
    raw = raw_rate(source, seconds)
    begun = time.process_time()
    built = Build(source, "", CacheSettings(), scratch / "cache").run(lambda text: None)
    made = built["frames"] / (time.process_time() - begun)
    cache = Cache(scratch / "cache")
    return {
        "dataset_frames": source.n_frames,
        "cache_frames": len(cache),
        "samples_per_cpu_s": {
            "raw frames": raw,
            "cache made": round(made, 1),
            "cache read": cache_rate(cache, None, seconds),
            "cache read, augmented": cache_rate(cache, Augment(), seconds),
        },
    }


def main() -> int:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="a split in CALVIN's layout")
    parser.add_argument("--seconds", type=float, default=5.0, help="of CPU time for each figure")
    parser.add_argument("--out", type=Path, help="folder for data.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()  # as a training does
    with tempfile.TemporaryDirectory() as folder:
        path = options.data
        if path is None:
            config = CollectConfig(
                out=Path(folder) / "demonstrations",
                scenes="A",
                tasks=TASKS,
                per_task=3,
                jobs=1,
                format="calvin",
                compress=False,
            )
            export_calvin(config)
            path = config.folder / "training"
        found = measured(path, Path(folder), options.seconds)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "data.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
