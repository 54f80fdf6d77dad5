"""The projector's start: discriminants separate, and the loss in the table's space orders."""

from __future__ import annotations

import torch

from openhelix.benchmarks.training.start import discriminants, ridge, table_loss
from openhelix.system1.latent_adapter import task_anchors
from openhelix.system1.policy import DiffusionPolicy
from tests.system1.test_policy import tiny


def clouds(seed: int, n: int = 400) -> tuple[torch.Tensor, torch.Tensor]:
    """Five classes whose means differ little in directions of little noise."""
    means = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))
    g = torch.Generator().manual_seed(seed)
    label = torch.arange(n) % 5
    noise = torch.randn(n, 12, generator=g)
    noise[:, :4] *= 30.0  # hides the classes from whoever does not look away
    return means[label] + 0.3 * noise + 100.0, label


def test_in_the_space_of_discriminants_the_spread_is_one_and_classes_part() -> None:
    x, label = clouds(1)
    weight, bias = discriminants(x, label, 1e-3)
    assert weight.shape == (4, 12)
    seen = x @ weight.T + bias
    means = torch.stack([seen[label == k].mean(0) for k in range(5)])
    inner = seen - means[label]
    torch.testing.assert_close(inner.T @ inner / len(x), torch.eye(4), atol=0.02, rtol=0)
    fresh, truth = clouds(2)
    found = torch.cdist(fresh @ weight.T + bias, means).argmin(1)
    right = (found == truth).float().mean()
    plain = torch.stack([x[label == k].mean(0) for k in range(5)])
    assert right > 0.95 > (torch.cdist(fresh, plain).argmin(1) == truth).float().mean() + 0.2


def test_the_regression_is_exact_where_the_truth_is_linear() -> None:
    g = torch.Generator().manual_seed(0)
    x, true = torch.randn(200, 6, generator=g) * 50 + 3, torch.randn(2, 6, generator=g)
    weight, bias = ridge(x, x @ true.T + 1.5, 1e-9)
    torch.testing.assert_close(weight, true, atol=1e-3, rtol=0)
    torch.testing.assert_close(bias, torch.full((2,), 1.5), atol=0.05, rtol=0)


def test_the_loss_is_least_at_the_rows_and_grows_towards_others() -> None:
    model = DiffusionPolicy.build(tiny(), 0).model
    anchors = task_anchors(model)
    table = model.encoder.condition.table.weight[1:]
    every = torch.arange(len(table))
    right = table_loss(model, anchors, table, every)
    between = table_loss(model, (anchors + anchors.roll(1, 0)) / 2, table, every)
    wrong = table_loss(model, anchors, table, every.roll(1))
    assert right < between < wrong - 1
