"""Runs a recording's observations through System 1 again and compares the trajectories.

Each recorded chunk names the observation and the latent it was computed from; the policy is
given exactly these once more, and the seed of each instruction. With the same weights the
errors are rounding, as long as no chunk was lost: a policy that samples draws its noise chunk
after chunk, so after a loss they are its spread.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from runtime.interfaces import Policy
from runtime.quaternion import angle_between, normalise
from runtime.recorder import Reader
from runtime.types import ActionChunk, LatentGoal, Observation

KEPT = 900  # observations a chunk may look back on: 30 s at 30 Hz


def replay(path: Path, policy: Policy, memory: int = 1) -> dict[str, Any]:
    """Compute every recorded chunk again.

    Args:
        path: folder of a recording.
        policy: System 1, warmed up.
        memory: recent latents that the policy was given (`system1.latent_memory`).

    Returns:
        Counts, and distances between recorded and recomputed rows: position (m), rotation
        (rad), openness; p50, p99 and max over all rows. Null without a chunk to compare.

    Raises:
        runtime.segments.RecordingError: there is no recording.
    """
    reader, matcher = Reader(path), _Inputs(memory)
    seed = int(reader.meta.get("seed", 0))  # the loop gives each instruction seed + epoch
    chunks = unmatched = 0
    errors: list[np.ndarray[Any, Any]] = []
    latencies_s: list[float] = []
    epoch: int | None = None
    for topic, _, message in reader:
        if topic == "observation":
            matcher.observed(message)
        elif topic == "latent":
            matcher.conditioned(message)
        elif topic == "chunk":
            chunks += 1
            given = matcher.of(message)
            if given is None:
                unmatched += 1
                continue
            if message.epoch != epoch:
                epoch = message.epoch
                policy.reset(seed + epoch)
            start_s = time.perf_counter()
            again = policy.act(*given)
            latencies_s.append(time.perf_counter() - start_s)
            errors.append(_distances(message, again))
    rows = np.concatenate(errors) if errors else np.empty((0, 3))
    return {
        "recording": str(path),
        "complete": reader.complete,
        "dropped": reader.meta.get("dropped"),
        "chunks": chunks,
        "replayed": len(errors),
        "unmatched": unmatched,
        "rows": len(rows),
        "position_error_m": _spread(rows[:, 0]),
        "rotation_error_rad": _spread(rows[:, 1]),
        "gripper_error": _spread(rows[:, 2]),
        "s1_latency_s": _spread(np.array(latencies_s)),
    }


class _Inputs:
    """Finds what a chunk was computed from among what was seen shortly before."""

    def __init__(self, memory: int) -> None:
        self._recent: deque[LatentGoal] = deque(maxlen=memory)
        self._seen: deque[tuple[Observation, tuple[LatentGoal, ...]]] = deque(maxlen=KEPT)

    def observed(self, observation: Observation) -> None:
        self._seen.append((observation, tuple(self._of_epoch(observation.epoch))))

    def conditioned(self, latent: LatentGoal) -> None:
        """A latent follows its tick's observation, and the plan of that tick already has it."""
        self._recent.append(latent)
        if self._seen:
            observation, _ = self._seen.pop()
            self.observed(observation)

    def of(self, chunk: ActionChunk) -> tuple[Observation, Sequence[LatentGoal]] | None:
        for observation, latents in reversed(self._seen):
            if observation.t_ns != chunk.t_obs_ns or observation.epoch != chunk.epoch:
                continue
            newest = latents[-1].seq if latents else -1
            if chunk.latent_seq in (-1, newest):
                return observation, latents
        return None

    def _of_epoch(self, epoch: int) -> list[LatentGoal]:
        return [latent for latent in self._recent if latent.epoch == epoch]


def _distances(a: ActionChunk, b: ActionChunk) -> np.ndarray[Any, Any]:
    """Return (rows, 3): distance (m), angle (rad) and openness between two chunks."""
    count = min(len(a.poses), len(b.poses))
    away = np.linalg.norm(a.poses[:count, :3] - b.poses[:count, :3], axis=1)
    turned = [
        angle_between(normalise(p.tolist()), normalise(q.tolist()))
        for p, q in zip(a.poses[:count, 3:], b.poses[:count, 3:], strict=True)
    ]
    opened = np.abs(np.asarray(a.gripper[:count]) - np.asarray(b.gripper[:count]))
    return np.stack([away, np.array(turned), opened], axis=1)


def _spread(values: np.ndarray[Any, Any]) -> dict[str, float] | None:
    if len(values) == 0:
        return None
    p50, p99 = np.percentile(values, (50, 99))
    return {"p50": float(p50), "p99": float(p99), "max": float(values.max())}
