"""Keyposes: tokens vote, the vote is a weighted mean, and it can be learnt."""

from __future__ import annotations

import torch

from openhelix.system1.encoder_light import KeyposeHead, KeyposeTargets, keypose_loss
from tests.system1.test_heads import batch_of, stirred
from tests.system1.test_policy import tiny

IDENTITY = torch.tensor([1.0, 0, 0, 0, 1, 0])


def made(dim: int = 24) -> KeyposeHead:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return KeyposeHead(dim, 2)


def scene(n: int = 12, dim: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(3, n, dim, generator=g), 0.2 * torch.randn(3, n, 3, generator=g)


def test_the_vote_is_the_weighted_mean_of_the_votes_and_masked_tokens_have_none() -> None:
    tokens, xyz = scene()
    mask = torch.ones(3, 12, dtype=torch.bool)
    mask[:, 7:] = False
    vote, told, signal = made()(tokens, xyz, mask)
    assert told.shape == (3, 2, 24) and signal.shape == (3, 24)
    torch.testing.assert_close(vote.weight.sum(1), torch.ones(3, 2))
    assert (vote.weight[:, 7:] == 0).all()
    mean = (vote.weight[..., None] * vote.votes).sum(1)
    torch.testing.assert_close(vote.position, mean)
    moved = xyz.clone()
    moved[:, 7:] += 5.0
    torch.testing.assert_close(made()(tokens, moved, mask)[0].position, vote.position)


def test_where_everything_moves_the_vote_moves_along() -> None:
    tokens, xyz = scene()
    by = torch.tensor([0.1, -0.2, 0.05])
    before, after = (made()(tokens, x, None)[0].position for x in (xyz, xyz + by))
    torch.testing.assert_close(after, before + by)


def test_the_loss_is_least_at_the_truth_and_spread_votes_cost() -> None:
    tokens, xyz = scene()
    vote, *_ = made()(tokens, xyz, None)
    at = torch.cat((vote.position, vote.rotation), -1)
    right = keypose_loss(vote, KeyposeTargets(at, (vote.opened > 0).float()))
    wrong = keypose_loss(vote, KeyposeTargets(at + 0.05, (vote.opened > 0).float()))
    assert right > 0  # the votes lie on all sides of their mean
    assert wrong > right


def test_a_marked_token_is_found_in_a_few_steps() -> None:
    head = made()
    optimizer = torch.optim.Adam(head.parameters(), 1e-2)
    g = torch.Generator().manual_seed(2)
    found = []
    for _ in range(150):
        tokens, xyz = (
            torch.randn(16, 12, 24, generator=g),
            0.2 * torch.randn(16, 12, 3, generator=g),
        )
        which = torch.randint(12, (16,), generator=g)
        tokens[torch.arange(16), which, 0] = 6.0
        goal = xyz[torch.arange(16), which][:, None].expand(-1, 2, -1)
        rows = torch.cat((goal, IDENTITY.expand(16, 2, 6)), -1)
        vote, *_ = head(tokens, xyz, None)
        loss = keypose_loss(vote, KeyposeTargets(rows, torch.ones(16, 2)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(float((vote.position.detach() - goal).norm(dim=-1).mean()))
    assert found[0] > 0.2 and sum(found[-10:]) / 10 < 0.06


def test_what_was_voted_for_stands_among_the_scenes_tokens() -> None:
    config = tiny()
    with torch.inference_mode():
        made_scene = stirred(config).encode(batch_of(config, [0, 1]))
        without = stirred(tiny(keyposes=0)).encode(batch_of(config, [0, 1]))
    assert made_scene.vote is not None and without.vote is None
    assert made_scene.tokens.shape[1] == without.tokens.shape[1] + 2
    torch.testing.assert_close(made_scene.xyz[:, -2:], made_scene.vote.position)
