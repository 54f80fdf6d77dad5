"""A trainer that trains nothing: its weights are the small parts that evaluate in milliseconds."""

from __future__ import annotations

import json
from pathlib import Path

from openhelix.benchmarks.paper.trainings import Say, Training
from openhelix.runtime.core.config import CommandFailed
from tests.evaluation.small import CAMERAS


class FakeTrainer:
    """Notes what it is asked to train; a policy's speed depends on what that is.

    Attributes:
        trained: keys, in order.
        dies_at: it raises once at the training of this number.
        scratch_fails: trainings of a policy from scratch fail.
        own_fails: trainings of a policy of another make than the base's fail.
    """

    scratch_fails = own_fails = False

    def __init__(self, dies_at: int | None = None) -> None:
        self.trained: list[str] = []
        self.dies_at = dies_at

    def train(self, training: Training, folder: Path, parent: Path | None, say: Say) -> None:
        assert (parent is None) == (training.parent is None)
        if parent is not None:
            assert (parent / "weights.json").exists()
        if len(self.trained) == self.dies_at:
            self.dies_at = None
            raise KeyboardInterrupt
        if training.options.get("policy.pretrained") is False and self.scratch_fails:
            raise CommandFailed(f"{training.key}: the loss is nan")
        if training.stage == "policy" and training.parent is not None and self.own_fails:
            raise CommandFailed(f"{training.key}: the loss is nan")
        self.trained.append(training.key)
        say(f"trained {training.key}")
        (folder / "weights.json").write_text(json.dumps(training.to_json()))

    def overrides(self, training: Training, folder: Path) -> list[str]:
        slow = training.options.get("latent.regime") == "frozen"
        options = f"{{cameras: {CAMERAS}, speed_m: {0.002 if slow else 0.01}}}"
        return [
            "system1.policy.target=tests.fakes:ReachPolicy",
            f"system1.policy.options={options}",
            "system2.engine={target: 'tests.evaluation.small:WordEngine', options: {}}",
        ]

    def seconds(self, training: Training) -> float | None:
        return 60.0
