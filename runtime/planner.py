"""When System 1 runs: beside the loop (`ThreadPlanner`) or inside a tick (`SyncPlanner`).

Both take the newest observation when a new chunk is due and hand finished chunks back
without blocking, so the control loop is the same on both clocks. A chunk is due
`replan_steps` control periods after the observation of the last one, and at once when the
instruction has changed.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Protocol

from runtime.interfaces import Policy
from runtime.types import ActionChunk, LatentGoal, Observation

log = logging.getLogger(__name__)
LATENCIES_KEPT = 4096


class Planner(Protocol):
    """What the loop knows of System 1."""

    latencies_s: deque[float]  # of `Policy.act`, newest last, warm-up excluded
    failures: int

    def offer(self, observation: Observation, latents: Sequence[LatentGoal]) -> None:
        """Give the newest input; a plan is started if one is due."""

    def poll(self) -> ActionChunk | None:
        """Return a finished chunk once, or None."""

    def reset(self, seed: int | None = None) -> None:
        """A new instruction: the next offer is due at once."""

    def close(self) -> None: ...


class _Due:
    """Decides when the next chunk is to be planned."""

    def __init__(self, replan_ns: int) -> None:
        self._replan_ns = replan_ns
        self._last: tuple[int, int] | None = None  # epoch and time of the last plan's observation

    def __call__(self, observation: Observation) -> bool:
        if self._last is None or self._last[0] != observation.epoch:
            return True
        # A tick's time stamp may be a little early: half a millisecond of grace.
        return observation.t_ns - self._last[1] >= self._replan_ns - 500_000

    def mark(self, observation: Observation) -> None:
        self._last = (observation.epoch, observation.t_ns)

    def clear(self) -> None:
        self._last = None


class SyncPlanner:
    """System 1 inside the tick: deterministic, for the lockstep clock."""

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
        start = time.perf_counter()
        self._chunk = self._policy.act(observation, latents)
        self.latencies_s.append(time.perf_counter() - start)

    def poll(self) -> ActionChunk | None:
        chunk, self._chunk = self._chunk, None
        return chunk

    def reset(self, seed: int | None = None) -> None:
        self._due.clear()
        self._chunk = None
        self._policy.reset(seed)

    def close(self) -> None:
        """Nothing to release."""


class ThreadPlanner:
    """System 1 in a thread beside the loop, which never waits for it."""

    def __init__(self, policy: Policy, replan_ns: int) -> None:
        self._policy = policy
        self._due = _Due(replan_ns)
        self._job: tuple[Observation, tuple[LatentGoal, ...]] | None = None
        self._reset: list[int | None] = []
        self._done: deque[ActionChunk] = deque(maxlen=4)
        self._wake = threading.Event()
        self._closing = False
        self._busy = False
        self.latencies_s: deque[float] = deque(maxlen=LATENCIES_KEPT)
        self.failures = 0
        self._thread = threading.Thread(target=self._run, name="system1", daemon=True)
        self._thread.start()

    def offer(self, observation: Observation, latents: Sequence[LatentGoal]) -> None:
        if self._busy or not self._due(observation):
            return
        self._due.mark(observation)
        self._busy = True
        self._job = (observation, tuple(latents))
        self._wake.set()

    def poll(self) -> ActionChunk | None:
        return self._done.popleft() if self._done else None

    def reset(self, seed: int | None = None) -> None:
        self._due.clear()
        self._done.clear()
        self._reset.append(seed)  # applied by the thread, between two plans

    def close(self) -> None:
        self._closing = True
        self._wake.set()
        self._thread.join(timeout=5.0)

    def _run(self) -> None:
        while True:
            self._wake.wait()
            self._wake.clear()
            if self._closing:
                return
            job, self._job = self._job, None
            if job is not None:
                self._plan(*job)
            self._busy = False

    def _plan(self, observation: Observation, latents: tuple[LatentGoal, ...]) -> None:
        start = time.perf_counter()
        try:
            while self._reset:
                self._policy.reset(self._reset.pop(0))
            chunk = self._policy.act(observation, latents)
        except Exception:
            # The loop must outlive a failing policy: it runs out of actions and holds.
            self.failures += 1
            log.exception("System 1 failed; the loop goes on without a new chunk")
            return
        self.latencies_s.append(time.perf_counter() - start)
        self._done.append(chunk)
