"""How the loop asks System 1: another process (`RemotePlanner`) or the tick (`SyncPlanner`).

Both take the newest observation when a new chunk is due and hand finished chunks back
without blocking, so the control loop is the same on both clocks. A chunk is due a fixed time
after the observation of the last one, and at once when the instruction has changed.

On the wall clock System 1 has a process of its own, because threads of one Python process
share one interpreter: a policy's thread that holds it when the scheduler takes its core away
stops a control thread of any priority.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from openhelix.runtime.core.interfaces import PartFailed, Policy, PolicyFault
from openhelix.runtime.core.types import ActionChunk, LatentGoal, Observation
from openhelix.runtime.transport.codec import register
from openhelix.runtime.transport.wire import NewestReader, Publisher

log = logging.getLogger(__name__)

LATENCIES_KEPT = 4096
EARLY_NS = 500_000  # a tick may come a little early; half a millisecond is still due
LOST_AFTER_NS = 1_000_000_000  # an answer this late is not waited for: System 1 may have died


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """What System 1 needs for one chunk."""

    observation: Observation  # names the instruction that the chunk is for
    latents: tuple[LatentGoal, ...]  # newest last
    seed: int  # of this instruction's randomness


@dataclass(frozen=True, slots=True)
class PlanReply:
    """What System 1 made of it."""

    instruction_id: int
    t_obs_ns: int  # of the request's observation
    chunk: ActionChunk | None  # None: the policy failed
    compute_s: float


register("plan_request", PlanRequest)
register("plan_reply", PlanReply)


class Planner(Protocol):
    """What the loop knows of System 1."""

    latencies_s: deque[float]  # of `Policy.act`, newest last, warm-up excluded
    failures: int

    def offer(self, observation: Observation, latents: Sequence[LatentGoal]) -> None:
        """Give the newest input; a plan is started if one is due."""

    def poll(self) -> ActionChunk | None:
        """Return a finished chunk once, or None."""

    def reset(self, seed: int) -> None:
        """A new instruction: the next offer is due at once."""

    def close(self) -> None: ...


def checked_chunk(made: object) -> ActionChunk:
    """Return what a policy's `act` gave; TypeError unless it is an `ActionChunk`."""
    if not isinstance(made, ActionChunk):
        raise TypeError(f"act returned {type(made).__name__}, not an ActionChunk")
    return made


class _Due:
    """Decides when the next chunk is to be planned."""

    def __init__(self, replan_ns: int) -> None:
        self._replan_ns = replan_ns
        self._last_ns: int | None = None  # time of the last plan's observation

    def __call__(self, observation: Observation) -> bool:
        if self._last_ns is None:
            return True
        return observation.t_ns - self._last_ns >= self._replan_ns - EARLY_NS

    def mark(self, observation: Observation) -> None:
        self._last_ns = observation.t_ns

    def clear(self) -> None:
        self._last_ns = None


class SyncPlanner:
    """System 1 inside the tick: deterministic, for the lockstep clock.

    A `PolicyFault` is counted and the loop goes on without that chunk, as on the wall clock.
    Whatever else a policy raises ends the run as a `PartFailed`: a study must not score a
    defect as a failure of the method.
    """

    def __init__(self, policy: Policy, replan_ns: int) -> None:
        self._policy = policy
        self._due = _Due(replan_ns)
        self._chunk: ActionChunk | None = None
        self.latencies_s: deque[float] = deque(maxlen=LATENCIES_KEPT)
        self.failures = 0

    def offer(self, observation: Observation, latents: Sequence[LatentGoal]) -> None:
        if not self._due(observation):
            return
        self._due.mark(observation)
        start_s = time.perf_counter()
        try:
            self._chunk = checked_chunk(self._policy.act(observation, latents))
        except PolicyFault as fault:
            self.failures += 1
            log.warning("System 1: %s; the loop goes on without this chunk", fault)
            return
        except PartFailed:  # a latent that was computed only now, because the policy looks at it
            raise
        except Exception as error:
            raise PartFailed("system1", error) from error
        self.latencies_s.append(time.perf_counter() - start_s)

    def poll(self) -> ActionChunk | None:
        chunk, self._chunk = self._chunk, None
        return chunk

    def reset(self, seed: int) -> None:
        self._due.clear()
        self._chunk = None
        try:
            self._policy.reset(seed)
        except Exception as error:
            raise PartFailed("system1", error) from error

    def close(self) -> None:
        """Nothing to release."""


class RemotePlanner:
    """System 1 in another process; see `openhelix.runtime.launch.system1_process.System1Process`.

    A request is out until its reply comes or `LOST_AFTER_NS` have passed, so that a slow
    policy is given a fresh observation when it is free instead of a queue of old ones.
    """

    def __init__(self, sender: Publisher, reader: NewestReader[PlanReply], replan_ns: int) -> None:
        self.sender, self.reader = sender, reader
        self._due = _Due(replan_ns)
        self._out: tuple[int, int] | None = None  # the request's instruction and time
        self._seed = 0
        self.latencies_s: deque[float] = deque(maxlen=LATENCIES_KEPT)
        self.failures = 0

    def offer(self, observation: Observation, latents: Sequence[LatentGoal]) -> None:
        if self._out is not None and observation.t_ns - self._out[1] < LOST_AFTER_NS:
            return
        if not self._due(observation):
            return
        self._due.mark(observation)
        self._out = (observation.instruction_id, observation.t_ns)
        self.sender.send(PlanRequest(observation, tuple(latents), self._seed))

    def poll(self) -> ActionChunk | None:
        reply = self.reader.poll()
        if reply is None:
            return None
        if self._out == (reply.instruction_id, reply.t_obs_ns):
            self._out = None
        if reply.chunk is None:
            self.failures += 1
        else:
            self.latencies_s.append(reply.compute_s)
        return reply.chunk

    def reset(self, seed: int) -> None:
        self._due.clear()
        self._out = None
        self._seed = seed

    def close(self) -> None:
        """Close both channels."""
        self.sender.close()
        self.reader.close()
