"""`openhelix train STAGE`: from a collection to a pair of checkpoints.

    openhelix train all data=demonstrations
    openhelix train stage2 data=demonstrations stage2.steps=500 out=mine
    openhelix train policy data=calvin/task_ABC_D/training
    openhelix train export out=mine

Stages: `vlm` (a base model for System 2, trained on pictures and questions; name it with
`latent.model` in later stages), `policy` (System 1 alone), `prepare` (caches the frozen language
model's outputs on disk), `stage1` (trains <ACT> and projector; policy and language model are
frozen), `stage2` (trains the policy too), `export` (writes one folder with the pair), `all` (every
unfinished stage from `policy` on, in order), `understanding` (a head that says which instructions
are refused; put its file beside the pair's `latent.safetensors`). Repeating a command resumes an
interrupted stage and skips a finished one.

Several processes train together, each on its own core or GPU, with the same result:

    openhelix train policy data=demonstrations workers=2
    torchrun --nproc-per-node=8 --no-python openhelix train stage2 data=demonstrations device=cuda
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from openhelix.benchmarks.training.config import STAGES, TrainingConfig, check_policy
from openhelix.runtime.cli.arguments import Options, Positional, option, parse
from openhelix.runtime.core.config import CommandFailed, ConfigError, read_settings
from openhelix.runtime.core.files import NO_ROOM
from openhelix.runtime.core.output import answer
from openhelix.runtime.core.plugins import none_of
from openhelix.runtime.core.workers import ALONE, Workers

if TYPE_CHECKING:
    from openhelix.benchmarks.training.joint import Stage
    from openhelix.benchmarks.training.progress import Showing


class TrainOptions(Options):
    """Options of `train`; all else is `TrainingConfig`."""

    stage: Annotated[str, Positional()] = option(..., "what to train or export", "|".join(STAGES))
    skip_bad: bool = option(False, "leave out what cannot be read of a dataset, counted and listed")
    estimate: bool = option(False, "only say how much memory it takes, and how long")


def main(argv: Sequence[str]) -> int:
    """Train both systems, from frames to checkpoints.

    0 when the stage is finished or the time limit has come.

    Raises:
        ConfigError: bad input, in one line.
    """
    options, overrides = parse("train", TrainOptions, argv, __doc__ or "", TrainingConfig)
    if options.stage not in STAGES:
        raise ConfigError(f"stage: {none_of(options.stage, STAGES)}")
    from openhelix.benchmarks.training import progress

    begun = time.monotonic()
    from openhelix.benchmarks.training.curves import check_tracker
    from openhelix.benchmarks.training.workers import only_first_complains

    try:
        with only_first_complains():
            config = with_device(read_settings(TrainingConfig, options.config, overrides))
            check_tracker(config.tracker)
            check_policy(config.policy)
        if options.estimate:
            from openhelix.benchmarks.training.estimate import estimate, told
            from openhelix.benchmarks.training.estimate_vlm import estimate_vlm

            vlm = options.stage == "vlm"
            found = estimate_vlm(config) if vlm else estimate(config, options.stage)
            answer(json.dumps(found) if options.as_json else told(found))
            return 0
        terminal = progress.open_log()
        results = started(config, options.stage, options.skip_bad, terminal)
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise CommandFailed(
            f"{error.filename}: {error.strerror}; what was saved before is kept, and the same "
            "command goes on"
        ) from None
    if results is None:  # another worker says it
        return 0
    if options.as_json:
        answer(json.dumps(results, default=str))
    else:
        words = [options.stage, *(word for word in argv if word != options.stage)]
        lines = progress.ending(results, words, time.monotonic() - begun)
        answer("\n".join(lines))
    return 0


def with_device(config: TrainingConfig) -> TrainingConfig:
    """Return the configuration with the device that "auto" means.

    Raises:
        ConfigError: there is none such.
    """
    import torch

    if config.device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        config = config.model_copy(update={"device": device})
    if config.device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"device: {config.device!r}, but torch sees no CUDA device here")
    return config


def started(
    config: TrainingConfig, stage: str, skip_bad: bool, terminal: Any
) -> dict[str, Any] | None:
    """Train in as many processes as asked for; None in all of them but the first.

    Raises:
        ConfigError: of settings that contradict how the command was started.
    """
    from openhelix.benchmarks.training.progress import Showing
    from openhelix.benchmarks.training.workers import device_of, joined, started_as

    if config.workers > 1:
        if started_as()[1] > 1:
            raise ConfigError(
                f"workers: {config.workers}, but a launcher has started {started_as()[1]} already; "
                "leave it 1"
            )
        if stage in ("understanding", "export"):
            raise ConfigError(f"workers: {stage} is made by one process; leave it 1")
        from openhelix.benchmarks.training.ray_workers import train_on_ray

        return train_on_ray(run, config, stage, skip_bad)
    with joined(config.device) as workers:
        own = config.model_copy(update={"device": str(device_of(config.device))})
        first = workers.first
        told = own.model_dump(mode="json")
        shown = Showing(terminal if first else None, first, config.tracker, told)
        results = run(own, stage, shown, skip_bad, workers)
    return results if workers.first else None


def with_caches(config: TrainingConfig, skip_bad: bool) -> TrainingConfig:
    """Return the configuration with the caches of the datasets that it names, built if need be.

    Raises:
        ConfigError: `data` names nothing that there is.
        DataError: a dataset cannot be read, or has changed since its cache was built.
    """
    from openhelix.benchmarks.data.command import ready
    from openhelix.benchmarks.data.source import recognised

    found = []
    for name in config.named():
        place = Path(name).expanduser()
        cached = (place / "cache.json").is_file() or (place / "frames" / "cache.json").is_file()
        if cached or not place.exists() or not recognised(place):
            place = config.model_copy(update={"data": Path(name)}).frames_folder()
        found.append(str(ready(place, skip_bad)))
    return config.model_copy(update={"data": Path(",".join(found))})


def run(
    config: TrainingConfig,
    stage: str,
    shown: Showing,
    skip_bad: bool = False,
    workers: Workers = ALONE,
) -> dict[str, Any]:
    """Run a stage, or all of them; return what they say of themselves."""
    import torch

    from openhelix.benchmarks.training.config import NotDone
    from openhelix.benchmarks.training.export import export
    from openhelix.benchmarks.training.stages import prepare, run_joint, run_policy
    from openhelix.benchmarks.training.understanding import (
        run_understanding,
        understanding_folder,
    )
    from openhelix.benchmarks.training.vlm import run_vlm, vlm_folder
    from openhelix.system1.train_loop import deadline_after

    # Stages that need no collection, and where each puts what it makes.
    alone = {"vlm": vlm_folder, "understanding": understanding_folder}

    if stage not in alone:
        config.latent.read_out()
        made = config
        config = workers.once(lambda: with_caches(made, skip_bad))
    if config.threads:
        torch.set_num_threads(config.threads)
    deadline = deadline_after(config.time_limit_s)
    folder = str(alone[stage](config) if stage in alone else config.folder)
    done: list[dict[str, Any]] = []
    try:
        for name in ("policy", "stage1", "stage2", "export") if stage == "all" else (stage,):
            if name == "vlm":
                done.append(run_vlm(config, deadline, shown, workers))
            elif name == "understanding":
                done += [run_understanding(config)] if workers.first else []
            elif name == "policy":
                done.append(run_policy(config, deadline, shown, workers))
            elif name == "prepare":
                done.append(prepare(config, deadline, workers))
            elif name == "export":
                done += [export(config)] if workers.first else []
            else:
                joint: Stage = "stage1" if name == "stage1" else "stage2"
                done.append(run_joint(config, joint, deadline, shown, workers))
            workers.wait()  # until what the next stage reads is written
    except NotDone as stop:
        logging.getLogger(__name__).info("%s; the same command goes on", stop)
        return {"finished": False, "why": str(stop), "folder": folder, "stages": done}
    return {"finished": True, "folder": folder, "stages": done}
