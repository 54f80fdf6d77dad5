"""How processes that train one model together share the work; here the one that trains alone.

Every worker draws a whole step's random numbers and takes its rows of them, so what is learned does
not depend on how many workers there are. The trainings of both systems are written against this
class; `openhelix.benchmarks.training.workers` has the one whose workers are processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from openhelix.runtime.core.config import ConfigError

T = TypeVar("T")


class Workers:
    """A training's workers, of which this process is one.

    Attributes:
        rank: this one's number, from 0.
        count: how many there are.
    """

    rank = 0
    count = 1

    @property
    def first(self) -> bool:
        """Whether this is the worker that writes files and speaks."""
        return self.rank == 0

    def parts(self, batch: int, accumulate: int, name: str) -> list[slice]:
        """Return which rows of a batch this worker takes, one slice for each part of its share.

        Args:
            batch: rows of a step, of all workers together.
            accumulate: parts of a worker's share, worked on one after the other.
            name: of the setting `batch`, for the message.

        Raises:
            ConfigError: the batch cannot be divided so.
        """
        pieces = self.count * accumulate
        if batch % pieces:
            raise ConfigError(
                f"{name}: {batch} samples cannot be divided among {self.count} workers with "
                f"accumulate={accumulate}; take a multiple of {pieces}"
            )
        size = batch // pieces
        begin = self.rank * accumulate * size
        return [slice(begin + k * size, begin + (k + 1) * size) for k in range(accumulate)]

    def summed(self, values: Sequence[float]) -> list[float]:
        """Return the sums of some numbers over the workers."""
        return list(values)

    def firsts(self, value: float) -> float:
        """Return the first worker's value of what clocks tell each worker differently."""
        return value

    def add_gradients(self, parameters: Iterable[Any]) -> None:
        """Sum the gradients of parameters over the workers, in place."""

    def same(self, tensors: Iterable[Any]) -> None:
        """Make tensors what they are in the first worker, in place."""

    def shard(self, modules: Iterable[Any]) -> None:
        """Divide the weights of modules among the workers; each is whole only while it runs.

        Raises:
            ConfigError: there is one worker alone.
        """
        raise ConfigError("latent.shard: true, but there is one worker; see `workers`")

    def wait(self) -> None:
        """Wait until every worker is here, however long the first one takes."""

    def once(self, work: Callable[[], T]) -> T:
        """Let the first worker do what makes files; then the others, who find them made."""
        return work()


ALONE = Workers()
