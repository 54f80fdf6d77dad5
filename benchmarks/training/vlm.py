"""`openhelix train vlm`: a base model that answers questions about pictures, before robot data.

The training itself is `openhelix.system2.vlm_train`; here its pictures are found or made.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from openhelix.benchmarks.training.config import NotDone, TrainingConfig
from openhelix.benchmarks.training.progress import Showing
from openhelix.runtime.core.config import CommandFailed, ConfigError
from openhelix.runtime.core.files import CheckpointError
from openhelix.runtime.core.paths import cache_folder
from openhelix.runtime.core.workers import ALONE, Workers
from openhelix.system1.train_loop import Pace
from openhelix.system2.prompt import BadInstruction
from openhelix.system2.vlm_config import VlmSection
from openhelix.system2.vlm_data import shards

log = logging.getLogger(__name__)
ASKED = ("image", "none", "other", "commonest answer")  # what the report tells of questions
HELD_OUT, MEASURED = 1200, 600  # pictures of the folders that are not trained on


def vlm_folder(config: TrainingConfig) -> Path:
    """Return where a base model's training goes: `out`, or `train/vlm` in the cache."""
    return config.out.expanduser() if config.out is not None else cache_folder() / "train" / "vlm"


def data_folder(section: VlmSection) -> Path:
    """Return the folder of pictures with questions; it need not exist yet."""
    given = section.data.expanduser()
    if given.is_absolute() or (given / "train").is_dir():
        return given
    return cache_folder() / "vlm" / given


def find_or_make_pictures(section: VlmSection) -> Path:
    """Return the folder of pictures; one that has none is filled by the simulator.

    Raises:
        ConfigError: it exists and holds something else.
    """
    folder = data_folder(section)
    if shards(folder / "train"):
        return folder
    if folder.exists() and any(folder.iterdir()) and not (folder / "held-out").is_dir():
        raise ConfigError(
            f"vlm.data: {folder} has no pictures with questions; name another folder, or one that "
            "does not exist, and it is made"
        )
    from openhelix.benchmarks.calvin.scene import SceneError, scene_names
    from openhelix.benchmarks.training import collect_talk as talk

    try:
        plan = talk.plans(scene_names(section.scenes))
    except SceneError as error:
        raise ConfigError(f"vlm.scenes: {error}") from None
    except ValueError as error:
        raise ConfigError(f"vlm.{error}") from None
    log.info("vlm.data: making %d pictures in %s", section.pictures, folder)
    talk.make(folder / talk.HELD_OUT, plan[talk.HELD_OUT], min(HELD_OUT, section.pictures))
    talk.make(folder / talk.MEASURED, plan[talk.MEASURED], min(MEASURED, section.pictures))
    talk.make(folder / talk.TRAIN, plan[talk.TRAIN], section.pictures)
    return folder


def run_vlm(
    config: TrainingConfig,
    deadline_ns: int,
    shown: Showing | None = None,
    workers: Workers = ALONE,
) -> dict[str, Any]:
    """Train, or go on training, a base model; write it as a LLaVA folder with its report.

    The first worker writes, and the others return what there is to say without a report.

    Raises:
        ConfigError: a setting does not fit the model, the data or the run.
        NotDone: the time limit came first; the model so far is written all the same.
        CommandFailed: the loss was not finite.
    """
    from openhelix.system2.vlm_train import LLAVA, VlmRun

    out = vlm_folder(config)
    data = workers.once(lambda: find_or_make_pictures(config.vlm))
    section = config.vlm.model_copy(update={"data": data})
    try:
        run = VlmRun(section, out, config.seed, config.device, config.accumulate, workers)
    except CheckpointError as error:
        raise ConfigError(f"vlm.{error}") from None
    except (ValueError, BadInstruction) as error:
        raise ConfigError(str(error)) from None
    try:
        with (shown or Showing())("vlm", out) as watch:
            watch.begins(run.step)

            def tell(row: dict[str, Any]) -> None:
                section = run.section(run.stage)
                watch(row, Pace(section.steps, 0, 0, 0, deadline_ns), logged=True)

            done = run.run(deadline_ns, tell)
    except FloatingPointError as error:
        raise CommandFailed(str(error)) from None
    folder = run.export() if workers.first else out / LLAVA
    workers.wait()
    if not done:
        stage = run.section(run.stage)
        raise NotDone(
            f"vlm: stopped at step {run.step} of {stage.steps} of {run.stage!r} by the time limit; "
            f"the model so far is in {out / LLAVA}"
        )
    report = run.report() if workers.first else {}
    workers.wait()
    short = {
        name: {
            shown: found.get("all", found)["accuracy"]
            for shown, found in report[name].items()
            if shown in ASKED
        }
        for name in ("held-out", "scene-D")
        if name in report
    }
    return {
        "stage": "vlm",
        "folder": str(folder),
        "samples": run.samples,
        "pictures": run.pictures_seen,
        "hours": round(run.seconds / 3600, 3),
        "accuracy": short,
    }
