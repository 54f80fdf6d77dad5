"""A pool in this process for each module that evaluates."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from openhelix.benchmarks.evaluation.pool import LocalPool
from tests.evaluation.small import small_config


@pytest.fixture(scope="module")
def pool() -> Iterator[LocalPool]:
    found = LocalPool(small_config())
    yield found
    found.close()
