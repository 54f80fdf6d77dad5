"""The loss curves of a joint stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

TERMS = (
    ("loss", "all"),
    ("policy", "policy"),
    ("aux_position", "auxiliary: position"),
    ("aux_rotation", "auxiliary: rotation"),
    ("clip", "alignment"),
)
HELD_OUT = (
    ("val_policy", "policy, told by latents"),
    ("val_policy_named", "policy, told the task's name"),
    ("val_loss", "all"),
)


def plot_joint(path: Path, stage: str, history: list[dict[str, Any]]) -> None:
    """Draw training terms, held-out losses, and how often a latent means the right task."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(15, 4), layout="constrained")
    for axis, lines, marker in ((axes[0], TERMS, ""), (axes[1], HELD_OUT, ".")):
        for key, label in lines:
            points = [(row["step"], row[key]) for row in history if row.get(key, 0) > 0]
            if points:
                axis.plot(*zip(*points, strict=True), label=label, marker=marker)
        if axis.lines:
            axis.set_yscale("log")
            axis.legend()
    axes[0].set(xlabel="step", title=f"{stage}: training")
    axes[1].set(xlabel="step", title="held-out episodes, average weights")
    points = [(r["step"], 100 * r["val_task_top1"]) for r in history if "val_task_top1" in r]
    if points:
        axes[2].plot(*zip(*points, strict=True), marker=".")
    axes[2].set(
        xlabel="step", ylabel="%", title="latents nearest to their task's row", ylim=(0, 100)
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)
