"""Alignment moves `<ACT>` and projector towards the table, and nothing else."""

from __future__ import annotations

import torch

from benchmarks.training.align import align, table_loss
from benchmarks.training.joint_run import JointRun
from system1.door import task_anchors
from system1.policy import DiffusionPolicy
from tests.system1.test_policy import tiny
from tests.training.conftest import settings


def test_the_loss_is_nothing_at_the_rows_and_grows_towards_others() -> None:
    model = DiffusionPolicy.build(tiny(), 0).model
    anchors = task_anchors(model)
    table = model.encoder.condition.table.weight[1:]
    every = torch.arange(len(table))
    right = table_loss(model, anchors, table, every)
    wrong = table_loss(model, anchors, table, every.roll(1))
    between = table_loss(model, (anchors + anchors.roll(1, 0)) / 2, table, every)
    assert right < between < wrong - 1


def test_act_and_projector_learn_the_table_and_nothing_else_moves(
    frames, llava, trained_policy, tmp_path
) -> None:
    config = settings(
        frames, llava, tmp_path, f"policy.checkpoint={trained_policy}", "stage1.start=random"
    )
    run = JointRun(config, "stage1")
    before = {n: p.detach().clone() for n, p in run.pair.named_parameters()}
    losses = align(run.joint, 40)
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    moved = {n for n, p in run.pair.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {
        "learner.head.act",
        "learner.head.projector.weight",
        "learner.head.projector.bias",
    }


def test_it_comes_before_the_first_step_and_is_logged(
    frames, llava, trained_policy, tmp_path
) -> None:
    found = {}
    for steps in (0, 30):
        config = settings(
            frames,
            llava,
            tmp_path / str(steps),
            f"policy.checkpoint={trained_policy}",
            f"stage1.align_steps={steps}",
        )
        found[steps] = JointRun(config, "stage1").history[0]
    assert "start_aligned_last_loss" not in found[0]
    assert found[30]["start_aligned_last_loss"] < found[30]["start_aligned_first_loss"]
    assert found[30]["start_held_out_top1"] == found[0]["start_held_out_top1"]
