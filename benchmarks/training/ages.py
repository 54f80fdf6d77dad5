"""Which observation a frame's latent comes from.

At run time a latent is older than the frame that it steers. So in training every frame is
drawn equally often, and its latent comes from any observation of its episode that has one and
is at most `lag` environment steps older. That is also why not every frame needs a latent.
"""

from __future__ import annotations

import torch
from torch import Tensor

from system1.data import Cache


class Ages:
    """Matches frames with older ones that have a latent.

    Args:
        cache: whose episodes lie one after the other, each in time order.
        sources: (N,) ascending, the frames that have a latent.
        lag: most environment steps between the two.
    """

    def __init__(self, cache: Cache, sources: Tensor, lag: int) -> None:
        self._step, self._hz = cache.step, cache.hz
        self._sources = sources = sources.contiguous()  # torch warns of a slice
        step = cache.step
        ordinal = episode_ordinals(cache)
        # Wider than an episode and the lag together, so that no window reaches another episode.
        width = int(step.max()) + lag + 1
        key = ordinal * width + step
        self._first = torch.searchsorted(key[sources], torch.maximum(key - lag, ordinal * width))
        self._last = torch.searchsorted(sources, torch.arange(len(cache)), right=True) - 1

    def reachable(self, frames: Tensor) -> Tensor:
        """Return those of frames (B,) that have a source."""
        return frames[self._first[frames] <= self._last[frames]]

    def draw(self, frames: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return a source's row (B,) for each frame, evenly over those it has, and its age."""
        first, last = self._first[frames], self._last[frames]
        share = torch.rand(len(frames), generator=generator)
        rows = first + (share * (last - first + 1)).long()
        return rows, self.age_s(frames, rows)

    def newest(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Return the newest source's row (B,) for each frame, and its age."""
        rows = self._last[frames]
        return rows, self.age_s(frames, rows)

    def age_s(self, frames: Tensor, rows: Tensor) -> Tensor:
        """Return how many seconds lie between sources and frames, (B,)."""
        return (self._step[frames] - self._step[self._sources[rows]]).float() / self._hz


def episode_ordinals(cache: Cache) -> Tensor:
    """Return each frame's episode (N,), counted from 0 in the order of the frames."""
    changes = torch.ones(len(cache), dtype=torch.long)
    changes[1:] = (cache.episode[1:] != cache.episode[:-1]).long()
    return changes.cumsum(0) - 1


def spread(cache: Cache, stride: int) -> Tensor:
    """Return each episode's first frame and every `stride`-th after it, ascending."""
    ordinal = episode_ordinals(cache)
    starts = torch.searchsorted(ordinal, ordinal)  # the first frame of each frame's episode
    return torch.nonzero((torch.arange(len(cache)) - starts) % stride == 0)[:, 0]


def at_most(cache: Cache, count: int) -> Tensor:
    """Return about `count` frames, no more, as evenly over the episodes as they go.

    Every episode has its first frame among them, unless there are more episodes than `count`:
    then some episodes have none.
    """
    longest = int(torch.bincount(episode_ordinals(cache)).max())
    for stride in range(1, longest + 1):
        frames = spread(cache, stride)
        if len(frames) <= count:
            return frames
    return frames[:: -(-len(frames) // count)]
