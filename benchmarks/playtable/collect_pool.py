"""What the parts of a collection share: where units are, and the pool of processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

UNITS = "units"
Report = Callable[[int, int, str], None]  # done, to do, what the last one was


def unit_path(folder: Path, scene: str, number: int) -> Path:
    """Where a unit is kept."""
    return folder / UNITS / f"{scene}_{number:05d}.npz"


def pooled(
    function: Callable[..., int], work: Sequence[tuple[Any, ...]], jobs: int
) -> Iterator[int]:
    """Run `function` over `work` in processes of its own; yields results as they come."""
    if jobs == 1:
        for item in work:
            yield function(*item)
        return
    with ProcessPoolExecutor(min(jobs, max(len(work), 1)), mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(function, *item) for item in work]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
