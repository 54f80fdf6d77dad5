"""Processes that train together: each takes its rows of every batch, gradients are summed.

    torchrun --nproc-per-node=2 --no-python openhelix train policy data=demonstrations
    openhelix train policy data=demonstrations workers=2

The first is torch's own launcher, for one or several hosts; the second is Ray Train's, which also
replaces a worker that died (`ray_workers.py`). Gradients go over NCCL on CUDA and over gloo on CPUs.
Only the first worker writes files and speaks. When one fails or is killed, all end, with one line.

The losses of a step come from several modules (a policy told by what a language model made), so
gradients are summed once they are all there, in buckets, instead of by a wrapper around one forward
pass.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.fsdp import fully_shard
from torch.distributed.rendezvous import rendezvous

from openhelix.runtime.core.config import CommandFailed, ConfigError
from openhelix.runtime.core.workers import ALONE, T, Workers
from openhelix.system1.train_loop import is_sharded

BUCKET_BYTES = 64 * 2**20  # of gradients that are summed at once
STEP = timedelta(minutes=30)  # the longest that workers are apart within a step
PATIENCE = timedelta(days=7)  # ... while the first one makes files that all read
LAST_WORD_S = 20.0  # for the others to ask who speaks, before the store ends with the first worker


class WorkerLost(CommandFailed):
    """Another worker ended in the middle of something that all do together."""


def started_as() -> tuple[int, int]:
    """Return this process's rank and how many there are, as a launcher told it; 0 and 1 if none."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


class Group(Workers):
    """The processes of torch's default process group.

    Args:
        device: on which this worker computes.
        store: where the workers agree on who speaks when one fails; None where a launcher does.
    """

    def __init__(self, device: torch.device, store: Any = None) -> None:
        self.rank, self.count = dist.get_rank(), dist.get_world_size()
        self._device = device
        self._store = store
        self._patient = dist.new_group(backend="gloo", timeout=PATIENCE)

    def summed(self, values: Sequence[float]) -> list[float]:
        """See `Workers.summed`."""
        told = torch.tensor(list(values), dtype=torch.float64, device=self._device)
        with self._together():
            dist.all_reduce(told)
        found: list[float] = told.tolist()
        return found

    def firsts(self, value: float) -> float:
        """See `Workers.firsts`."""
        told = torch.tensor([value], dtype=torch.float64, device=self._device)
        with self._together():
            dist.broadcast(told, 0)
        return float(told)

    def add_gradients(self, parameters: Iterable[Any]) -> None:
        """See `Workers.add_gradients`; one that only some workers have is taken as 0 in the others.

        Those of divided weights were averaged on the way back.
        """
        parameters = list(parameters)
        for parameter in parameters:
            if is_sharded(parameter) and parameter.grad is not None:
                parameter.grad.mul_(self.count)
        mine = [p for p in parameters if not is_sharded(p)]
        there = torch.tensor([float(p.grad is not None) for p in mine], device=self._device)
        with self._together():
            dist.all_reduce(there)
        found = []
        for parameter, some in zip(mine, there.tolist(), strict=True):
            if some and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if some:
                found.append(parameter.grad)
        self._each(found, dist.all_reduce)

    def same(self, tensors: Iterable[Any]) -> None:
        """See `Workers.same`."""
        own = [t.detach() for t in tensors if not is_sharded(t)]
        self._each(own, lambda flat: dist.broadcast(flat, 0))

    def shard(self, modules: Iterable[Any]) -> None:
        """See `Workers.shard`: torch's FSDP."""
        mesh = init_device_mesh(self._device.type, (self.count,))
        for module in modules:
            fully_shard(module, mesh=mesh, reshard_after_forward=True)

    def wait(self) -> None:
        """See `Workers.wait`."""
        with self._together():
            dist.barrier(group=self._patient)

    def once(self, work: Callable[[], T]) -> T:
        """See `Workers.once`."""
        if not self.first:
            self.wait()
        result = work()
        if self.first:
            self.wait()
        return result

    def _each(self, tensors: Sequence[Tensor], collective: Callable[[Tensor], Any]) -> None:
        """Do something collective with tensors, many at once, in place."""
        for bucket in buckets(tensors):
            flat = torch.cat([t.reshape(-1) for t in bucket]).to(self._device)
            with self._together():
                collective(flat)
            for tensor, part in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
                tensor.copy_(part.view_as(tensor))

    @contextlib.contextmanager
    def _together(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            why = " ".join(str(error).split())[:120]
            raise WorkerLost(
                f"a worker of {self.count} ended ({why}); what was saved before is kept, and the "
                "same command goes on"
            ) from None

    def speaks(self) -> bool:
        """Whether this worker, which fails, is the one that says why: the first to ask."""
        if self._store is None:
            return True
        try:
            first = self._store.add("failed", 1) == 1
        except RuntimeError:  # it ended with the worker that kept it
            return True
        if self.first:  # which may keep the store
            with contextlib.suppress(RuntimeError):
                end = time.monotonic() + LAST_WORD_S
                while self._store.add("failed", 0) < self.count and time.monotonic() < end:
                    time.sleep(0.05)
        return first


def buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield tensors of one type in lists of about `BUCKET_BYTES`, in their order."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        more = tensor.numel() * tensor.element_size()
        if bucket and (size + more > BUCKET_BYTES or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += more
    if bucket:
        yield bucket


def device_of(device: str) -> torch.device:
    """Return the device on which this worker computes: each has a CUDA device of its own."""
    if not device.startswith("cuda") or started_as()[1] == 1:
        return torch.device(device)
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


@contextlib.contextmanager
def joined(device: str) -> Iterator[Workers]:
    """Join the workers that a launcher started; alone where there was none.

    One of them says why when something fails, the others end silently with the same exit code.

    Raises:
        CommandFailed: the others cannot be reached.
    """
    rank, count = started_as()
    if count == 1:
        yield ALONE
        return
    place = device_of(device)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    try:
        store, rank, count = next(rendezvous("env://", timeout=STEP))
        dist.init_process_group(
            "nccl" if place.type == "cuda" else "gloo",
            store=PrefixStore("group", store),
            rank=rank,
            world_size=count,
            timeout=STEP,
        )
    except (RuntimeError, ValueError) as error:
        why = " ".join(str(error).split())[:160]
        raise CommandFailed(f"workers: worker {rank} of {count} cannot join: {why}") from None
    group = Group(place, PrefixStore("say", store))
    if not group.first:
        logging.getLogger().setLevel(logging.ERROR)
    try:
        yield group
    except Exception as error:
        dist.destroy_process_group()  # the others learn of it now
        if not group.speaks():
            bad_input = isinstance(error, ValueError) and not isinstance(error, CommandFailed)
            raise SystemExit(2 if bad_input else 1) from None
        raise
    else:
        dist.destroy_process_group()


@contextlib.contextmanager
def only_first_complains() -> Iterator[None]:
    """End silently where another worker says what is wrong with a command that all were given."""
    try:
        yield
    except ConfigError:
        if started_as()[0] != 0:
            raise SystemExit(2) from None
        raise
