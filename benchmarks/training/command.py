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
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from openhelix.benchmarks.training.config import STAGES, TrainingConfig
from openhelix.runtime.cli.arguments import Options, Positional, option, parse
from openhelix.runtime.core.config import CommandFailed, ConfigError, read_settings
from openhelix.runtime.core.files import NO_ROOM
from openhelix.runtime.core.output import answer
from openhelix.runtime.core.plugins import none_of

if TYPE_CHECKING:
    from openhelix.benchmarks.training.joint import Stage
    from openhelix.benchmarks.training.progress import Showing


class TrainOptions(Options):
    """Options of `train`; all else is `TrainingConfig`."""

    stage: Annotated[str, Positional()] = option(..., "what to train or export", "|".join(STAGES))
    skip_bad: bool = option(False, "leave out what cannot be read of a dataset, counted and listed")


def main(argv: Sequence[str]) -> int:
    """Train both systems, from frames to checkpoints.

    0 when the stage is finished or the time limit has come.

    Raises:
        ConfigError: bad input, in one line.
    """
    options, overrides = parse("train", TrainOptions, argv, __doc__ or "", TrainingConfig)
    if options.stage not in STAGES:
        raise ConfigError(f"stage: {none_of(options.stage, STAGES)}")
    config = read_settings(TrainingConfig, options.config, overrides)
    from openhelix.benchmarks.training import progress

    if config.tensorboard:
        progress.check_tensorboard()
    begun = time.monotonic()
    shown = progress.Showing(progress.open_log(), config.tensorboard)
    try:
        results = run(config, options.stage, shown, options.skip_bad)
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise CommandFailed(
            f"{error.filename}: {error.strerror}; what was saved before is kept, and the same "
            "command goes on"
        ) from None
    if options.as_json:
        answer(json.dumps(results, default=str))
    else:
        words = [options.stage, *(word for word in argv if word != options.stage)]
        lines = progress.ending(results, words, time.monotonic() - begun)
        answer("\n".join(lines))
    return 0


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
    config: TrainingConfig, stage: str, shown: Showing, skip_bad: bool = False
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

    if config.device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        config = config.model_copy(update={"device": device})
    if stage not in alone:
        config.latent.read_out()
        config = with_caches(config, skip_bad)
    if config.device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"device: {config.device!r}, but torch sees no CUDA device here")
    if config.threads:
        torch.set_num_threads(config.threads)
    deadline = deadline_after(config.time_limit_s)
    folder = str(alone[stage](config) if stage in alone else config.folder)
    done: list[dict[str, Any]] = []
    try:
        for name in ("policy", "stage1", "stage2", "export") if stage == "all" else (stage,):
            if name == "vlm":
                done.append(run_vlm(config, deadline, shown))
            elif name == "understanding":
                done.append(run_understanding(config))
            elif name == "policy":
                done.append(run_policy(config, deadline, shown))
            elif name == "prepare":
                done.append(prepare(config, deadline))
            elif name == "export":
                done.append(export(config))
            else:
                joint: Stage = "stage1" if name == "stage1" else "stage2"
                done.append(run_joint(config, joint, deadline, shown))
    except NotDone as stop:
        logging.getLogger(__name__).info("%s; the same command goes on", stop)
        return {"finished": False, "why": str(stop), "folder": folder, "stages": done}
    return {"finished": True, "folder": folder, "stages": done}
