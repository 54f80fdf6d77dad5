"""A frame's latent comes from its own episode, is not too old, and every frame has its turn."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from openhelix.benchmarks.training.feeds import Ages, at_most, spread


class FakeCache:
    """Episodes of given lengths, a frame every `every` environment steps."""

    hz = 30.0

    def __init__(self, lengths: list[int], every: int) -> None:
        number = 7  # episodes are named as they please
        self.episode = torch.cat([torch.full((n,), number - i) for i, n in enumerate(lengths)])
        self.step = torch.cat([2 + every * torch.arange(n) for n in lengths])

    def __len__(self) -> int:
        return len(self.step)


episodes = st.lists(st.integers(1, 9), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(episodes, st.integers(1, 5), st.integers(0, 30), st.integers(1, 5), st.integers(0, 99))
def test_sources_are_of_the_episode_and_not_too_old(lengths, every, lag, stride, seed) -> None:
    cache = FakeCache(lengths, every)
    sources = spread(cache, stride)
    ages = Ages(cache, sources, lag)
    frames = ages.reachable(torch.arange(len(cache)))
    generator = torch.Generator().manual_seed(seed)
    for rows, age in (ages.draw(frames, generator), ages.newest(frames)):
        found = sources[rows]
        assert (cache.episode[found] == cache.episode[frames]).all()
        gap = cache.step[frames] - cache.step[found]
        assert (gap >= 0).all() and (gap <= lag).all()
        torch.testing.assert_close(age, gap / 30)
    newest = ages.newest(frames)[1]
    assert (newest <= ages.draw(frames, generator)[1] + 1e-6).all()
    # What is not reachable has no source within the lag.
    for frame in set(range(len(cache))) - set(frames.tolist()):
        same = sources[cache.episode[sources] == cache.episode[frame]]
        gaps = cache.step[frame] - cache.step[same]
        assert not ((gaps >= 0) & (gaps <= lag)).any()


def test_every_source_of_a_frame_is_drawn() -> None:
    cache = FakeCache([6, 6], 4)
    ages = Ages(cache, torch.arange(12), 8)
    rows, _ = ages.draw(torch.full((300,), 11), torch.Generator().manual_seed(0))
    assert sorted(rows.unique().tolist()) == [9, 10, 11]
    assert rows.bincount()[9:].min() > 70


@settings(max_examples=40, deadline=None)
@given(episodes, st.integers(1, 20))
def test_so_many_and_no_more(lengths, count) -> None:
    cache = FakeCache(lengths, 1)
    frames = at_most(cache, count)
    assert 1 <= len(frames) <= count
    assert (frames[1:] > frames[:-1]).all()
    if count >= len(lengths):
        starts = torch.tensor([0, *lengths[:-1]]).cumsum(0)
        assert torch.isin(starts, frames).all()
    if count >= sum(lengths):
        assert len(frames) == sum(lengths)
