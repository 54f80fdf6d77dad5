"""Random numbers of a part of a batch: drawn for the whole of it, of which the part takes its rows.

So a batch is the same, and noised the same, in however many parts it is worked on, one after the
other or in several processes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Part(torch.Generator):
    """The generator of some rows of a batch.

    Attributes:
        rows: of the batch.
        whole: how many rows the batch has.
    """

    rows: slice
    whole: int

    @staticmethod
    def of(rows: slice, whole: int, seed: int) -> Part:
        """Return it, seeded."""
        part = Part()
        part.rows, part.whole = rows, whole
        part.manual_seed(seed)
        return part

    def slice_of(self, count: int) -> tuple[int, slice]:
        """Return how many rows are drawn and which are taken, for `count` rows of the part."""
        each = count // (self.rows.stop - self.rows.start)
        return each * self.whole, slice(each * self.rows.start, each * self.rows.stop)


def _drawn(draw: Any, shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    if not isinstance(generator, Part):
        found: Tensor = draw(shape, generator=generator)
        return found
    count, taken = generator.slice_of(shape[0])
    found = draw((count, *shape[1:]), generator=generator)
    return found[taken]


def rand(*shape: int, generator: torch.Generator | None) -> Tensor:
    """Return `torch.rand` of a shape that begins with the rows of a batch, or a multiple of them."""
    return _drawn(torch.rand, shape, generator)


def randn(*shape: int, generator: torch.Generator | None) -> Tensor:
    """Return `torch.randn`; see `rand`."""
    return _drawn(torch.randn, shape, generator)


def randint(low: int, high: int, *shape: int, generator: torch.Generator | None) -> Tensor:
    """Return `torch.randint`; see `rand`."""

    def draw(size: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
        return torch.randint(low, high, size, generator=generator)

    return _drawn(draw, shape, generator)


def numbers(count: int, generator: torch.Generator | None) -> Tensor:
    """Return the numbers (count,) that a part's rows have in the whole batch."""
    if not isinstance(generator, Part):
        return torch.arange(count)
    _, taken = generator.slice_of(count)
    return torch.arange(taken.start, taken.stop)
