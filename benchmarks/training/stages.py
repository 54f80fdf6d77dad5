"""The stages, each in its folder, each going on where it stopped."""

from __future__ import annotations

from typing import Any

from benchmarks.training.config import TrainingConfig
from benchmarks.training.feeds import feed_kind
from benchmarks.training.folders import (
    LATENT,
    finished,
    keep_settings,
    section_settings,
)
from benchmarks.training.joint import Stage
from benchmarks.training.joint_run import JointRun, policy_settings
from runtime.errors import CommandFailed
from system1.train import Trainer


def run_policy(config: TrainingConfig, deadline_ns: int) -> dict[str, Any]:
    """Train System 1 alone.

    Raises:
        NotDone: the time limit came first.
    """
    if config.policy.checkpoint is not None or not config.policy.pretrained:
        return {"stage": "policy", "skipped": True}
    settings = policy_settings(config, deadline_ns)
    own = {"policy": section_settings(config.policy), "seed": config.seed}
    keep_settings(settings.out, own, write=False)
    trainer = Trainer(settings)
    keep_settings(settings.out, own, write=True)
    trainer.run()
    return finished("policy", settings.out, trainer.step, trainer.history, config.policy.steps)


def run_joint(config: TrainingConfig, stage: Stage, deadline_ns: int) -> dict[str, Any]:
    """Train a joint stage, unless it is left out.

    Raises:
        NotDone: the time limit came first.
        CommandFailed: the loss was not finite.
    """
    if getattr(config, stage).steps == 0:
        return {"stage": stage, "skipped": True}
    try:
        return JointRun(config, stage, deadline_ns).run()
    except FloatingPointError as error:
        raise CommandFailed(f"{stage}: {error}") from error


def prepare(config: TrainingConfig, deadline_ns: int) -> dict[str, Any]:
    """Make what the next joint stage reads, and train nothing."""
    first = config.stage1.steps and not (config.folder / "stage1" / LATENT).is_file()
    stage: Stage = "stage1" if first else "stage2"
    run = JointRun(config, stage, deadline_ns, begin=False)
    files = list((config.folder / "prepared").rglob("*.safetensors"))
    return {
        "stage": "prepare",
        "for": stage,
        "feed": feed_kind(config.latent, stage, config.device),
        "frames": len(run.joint.feed.frames),
        "gb": round(sum(f.stat().st_size for f in files) / 1e9, 3),
    }
