"""`openhelix train … workers=N`: workers of Ray Train's, and another start when one of them died.

Every start goes on from what was saved last, as the same command does when it is typed again.
`out` must be a folder that all hosts of the cluster have.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
import torch

from openhelix.benchmarks.training.config import TrainingConfig
from openhelix.runtime.core.config import CommandFailed, ConfigError
from openhelix.runtime.core.files import replace_file
from openhelix.runtime.core.paths import cache_folder

log = logging.getLogger(__name__)


def work(told: dict[str, Any]) -> None:
    """Be one worker: train as `told`, see `train_on_ray`."""
    from ray.train.torch import get_device

    from openhelix.benchmarks.training.progress import Showing, open_log
    from openhelix.benchmarks.training.workers import Group

    if Path(told["folder"]).is_dir():  # what paths are relative to
        os.chdir(told["folder"])
    config = TrainingConfig.model_validate(told["config"])
    device = get_device() if config.device.startswith("cuda") else torch.device("cpu")
    config = config.model_copy(update={"device": str(device)})
    open_log()
    workers = Group(device)
    if not workers.first:
        logging.getLogger().setLevel(logging.ERROR)
    shown = Showing(None, workers.first, config.tracker, config.model_dump(mode="json"))
    try:
        results = told["run"](config, told["stage"], shown, told["skip_bad"], workers)
    except ConfigError as error:  # another start would not help
        results = {"refused": str(error)}
    if workers.first:
        replace_file(Path(told["results"]), json.dumps(results, default=str).encode())


def train_on_ray(
    run: Callable[..., dict[str, Any]], config: TrainingConfig, stage: str, skip_bad: bool
) -> dict[str, Any]:
    """Train with `config.workers` processes; return what the first of them says.

    Args:
        run: what each of them does, `command.run`.
        config: of the training.
        stage: of it.
        skip_bad: see there.

    Raises:
        ConfigError: bad input; the cluster has not as many cores or GPUs.
        CommandFailed: a worker failed more often than `config.restarts`; no cluster answers.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from openhelix.runtime.launch.actors import join

    mine = not ray.is_initialized()
    cuda = config.device.startswith("cuda")
    if mine:
        # Of Ray's own warnings none: one of them comes every second where there is no dashboard.
        quiet = ray.LoggingConfig(log_level="ERROR")
        options: dict[str, Any] = {"include_dashboard": False, "logging_config": quiet}
        if config.ray_address is not None:
            join(config.ray_address, log_to_driver=True)
        else:
            cores = max(config.workers, os.cpu_count() or 1)
            ray.init(address="local", num_cpus=cores, **options)
    try:
        name, have = ("GPU", ray.cluster_resources().get("GPU", 0)) if cuda else ("CPU", None)
        if have is not None and have < config.workers:
            raise ConfigError(f"workers: {config.workers}, the cluster has {have:g} {name}s")
        # Ray Train returns nothing of workers that keep no checkpoints of its own.
        answer = (config.out or cache_folder() / "train").expanduser() / f".{uuid.uuid4().hex}.json"
        told = {
            "run": run,
            "config": config.model_copy(update={"workers": 1}).model_dump(mode="json"),
            "stage": stage,
            "skip_bad": skip_bad,
            "folder": str(Path.cwd()),
            "results": str(answer.resolve()),
        }
        with tempfile.TemporaryDirectory(prefix="openhelix-ray-") as folder:
            trainer = TorchTrainer(
                work,
                train_loop_config=told,
                torch_config=TorchConfig(backend="nccl" if cuda else "gloo"),
                scaling_config=ScalingConfig(num_workers=config.workers, use_gpu=cuda),
                run_config=RunConfig(
                    name="train",
                    storage_path=str(Path(folder)),
                    failure_config=FailureConfig(max_failures=config.restarts),
                ),
            )
            try:
                trainer.fit()
                results: dict[str, Any] = json.loads(answer.read_text())
            except Exception as error:  # Ray Train's own kinds differ from version to version
                why = " ".join(str(error).split())[-200:]
                raise CommandFailed(
                    f"{stage}: a worker failed more often than restarts={config.restarts}: {why}; "
                    "what was saved before is kept"
                ) from None
            finally:
                answer.unlink(missing_ok=True)
    finally:
        if mine:
            ray.shutdown()
    if "refused" in results:
        raise ConfigError(results["refused"])
    return results
