"""Where a training's figures go while it runs: TensorBoard's files, Weights & Biases, MLflow.

TensorBoard's files are always written, into the stage's folder, where the package is installed. The
other two are asked for with `tracker=wandb` or `tracker=mlflow`, and configured as their users know
them (WANDB_MODE=offline, MLFLOW_TRACKING_URI, …).
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from openhelix.runtime.core.config import CommandFailed, ConfigError
from openhelix.runtime.core.files import replace_file

log = logging.getLogger(__name__)
Tracker = Literal["", "wandb", "mlflow"]
FOLDER = "tensorboard"
PROJECT = "openhelix"
RUN_ID = "mlflow-run.txt"  # of the stage's folder: the run that goes on


class Curves(Protocol):
    """Takes the figures of logged steps."""

    def add(self, figures: Mapping[str, float], step: int) -> None:
        """Take some figures by name."""

    def close(self) -> None:
        """Write what is left."""


def figures_of(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a row of the log, named by what they were measured on."""
    found = {}
    for name, value in row.items():
        if isinstance(value, int | float) and name not in ("step", "seconds"):
            held = name.startswith(("val_", "accuracy_", "sight_"))
            group = "held out" if held else "training"
            found[f"{group}/{name.removeprefix('val_')}"] = float(value)
    return found


def check_tracker(tracker: Tracker) -> None:
    """Raise ConfigError if what figures shall be sent to is not installed."""
    if tracker and importlib.util.find_spec(tracker) is None:
        raise ConfigError(
            f"tracker: {tracker} is not installed; `pip install 'openhelix[{tracker}]'`, or leave "
            "it empty: every figure is in train.json and in TensorBoard's files"
        )


class TensorBoard:
    """TensorBoard's own files.

    Args:
        folder: the stage's.
        step: the first that is written: what a killed run wrote after it is hidden.
    """

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(log_dir=str(folder / FOLDER), purge_step=step)

    def add(self, figures: Mapping[str, float], step: int) -> None:
        """See `Curves.add`."""
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """See `Curves.close`."""
        self._writer.close()


class WandB:
    """A run of Weights & Biases; the same one when a stage goes on."""

    def __init__(self, stage: str, folder: Path, told: Mapping[str, Any]) -> None:
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:12]
        with _in_one_line("wandb"):
            self._run: Any = wandb.init(
                project=PROJECT,
                name=f"{folder.parent.name}/{stage}",
                id=name,
                resume="allow",
                dir=str(folder),
                config=dict(told),
                settings=wandb.Settings(silent=True),
            )

    def add(self, figures: Mapping[str, float], step: int) -> None:
        """See `Curves.add`."""
        self._run.log(dict(figures), step=step)

    def close(self) -> None:
        """See `Curves.close`."""
        self._run.finish()


class MLflow:
    """A run of MLflow's; the same one when a stage goes on."""

    def __init__(self, stage: str, folder: Path, told: Mapping[str, Any]) -> None:
        import mlflow

        self._mlflow = mlflow
        file = folder / RUN_ID
        with _in_one_line("mlflow"):
            mlflow.set_experiment(PROJECT)
            if file.is_file():
                self._run = mlflow.start_run(run_id=file.read_text().strip())
                return
            self._run = mlflow.start_run(run_name=f"{folder.parent.name}/{stage}")
            mlflow.log_params({k: str(v)[:500] for k, v in told.items()})
        replace_file(file, f"{self._run.info.run_id}\n".encode())

    def add(self, figures: Mapping[str, float], step: int) -> None:
        """See `Curves.add`."""
        self._mlflow.log_metrics(dict(figures), step=step)

    def close(self) -> None:
        """See `Curves.close`."""
        self._mlflow.end_run()


def opened(
    tracker: Tracker, stage: str, folder: Path, step: int, told: Mapping[str, Any]
) -> list[Curves]:
    """Return what a stage's figures go to, from step `step` on.

    Args:
        tracker: beside TensorBoard's files.
        stage, folder: whose.
        step: the first.
        told: the settings, by name.
    """
    found: list[Curves] = []
    if importlib.util.find_spec("tensorboard") is None:
        log.warning("tensorboard is not installed: no curves for it")
    else:
        found.append(TensorBoard(folder, step))
    if tracker == "wandb":
        found.append(WandB(stage, folder, told))
    elif tracker == "mlflow":
        found.append(MLflow(stage, folder, told))
    return found


@contextlib.contextmanager
def _in_one_line(tracker: str) -> Any:
    """Say in one line what a service refused: a key, a server that does not answer."""
    try:
        yield
    except Exception as error:
        why = " ".join(str(error).split())[:200]
        raise CommandFailed(f"tracker: {tracker}: {why}") from None
