"""Memory of the GPUs that this process uses, as metrics.

torch is looked up among the modules that are loaded already, never imported: a process
without it has no GPU memory to tell of, and the runtime needs no torch. A process that has
not touched a GPU is left so, since asking for the figures would make a context of hundreds
of megabytes on it.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable
from typing import Any

from prometheus_client.core import Metric

from runtime.metrics import gauge

log = logging.getLogger(__name__)


class GpuMetrics:
    """Memory of each GPU: whole, in use by whomever, held by this process."""

    def collect(self) -> Iterable[Metric]:
        """Return nothing where this process uses no GPU."""
        cuda = _cuda_in_use()
        if cuda is None:
            return
        total: dict[str, float] = {}
        used: dict[str, float] = {}
        reserved: dict[str, float] = {}
        for index in range(cuda.device_count()):
            held = float(cuda.memory_reserved(index))
            if not held:
                continue  # asking for more would make a context on a GPU of somebody else's
            free, whole = cuda.mem_get_info(index)
            name = str(index)
            total[name], used[name] = float(whole), float(whole - free)
            reserved[name] = held
        yield gauge("gpu_memory_total_bytes", total)
        yield gauge("gpu_memory_used_bytes", used)
        yield gauge("gpu_memory_reserved_bytes", reserved)


def _cuda_in_use() -> Any:
    cuda = getattr(sys.modules.get("torch"), "cuda", None)
    if cuda is None or not cuda.is_available() or not cuda.is_initialized():
        return None
    return cuda
