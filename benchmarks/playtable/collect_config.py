"""What a collection is: one frozen record, from YAML, overrides or the command line."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from benchmarks.playtable.frames import FramesConfig
from benchmarks.playtable.scene import get_scene
from benchmarks.playtable.tasks import TASK_NAMES, get_task

VERSION = 1  # of what the experts do and of what is stored; data of another is not mixed
Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]


def cache_root() -> Path:
    """The folder for data and caches: OPENHELIX_CACHE, or ~/.cache/openhelix."""
    return Path(os.environ.get("OPENHELIX_CACHE") or Path.home() / ".cache" / "openhelix")


class CollectConfig(BaseModel):
    """One collection.

    Attributes:
        out: folder; None for `data/demonstrations_<scenes>` in the cache.
        scenes: letters out of ABCD.
        tasks: names; all 34 by default.
        per_task: demonstrations per task and scene.
        seed: decides everything else.
        disturbed: share of demonstrations in which the arm is pushed once.
        chain: at most so many tasks without a reset.
        jobs: processes.
        format: "states" keeps states and actions, from which `system1`'s training data is
            drawn; "calvin" writes CALVIN's layout, with rendered frames.
        compress: CALVIN's layout only: smaller files, slower.
        frames: what is drawn for training (format "states"); `frames.every=0` draws nothing.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    out: Path | None = None
    scenes: str = "ABC"
    tasks: tuple[str, ...] = TASK_NAMES
    per_task: Count = 100
    seed: Annotated[int, Field(ge=0)] = 0
    disturbed: Share = 0.4
    chain: Count = 5
    jobs: Count = 2
    format: Literal["states", "calvin"] = "states"
    compress: bool = True
    frames: FramesConfig = FramesConfig()

    @field_validator("scenes")
    @classmethod
    def _known_scenes(cls, value: str) -> str:
        if not value or len(set(value)) != len(value):
            raise ValueError(f"{value!r} is no choice of different letters out of ABCD")
        return "".join(get_scene(letter).name for letter in value)

    @field_validator("tasks")
    @classmethod
    def _known_tasks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise ValueError("names no task")
        return tuple(get_task(task).name for task in value)

    @property
    def folder(self) -> Path:
        """Where the collection goes."""
        return self.out or cache_root() / "data" / f"demonstrations_{self.scenes}"

    def identity(self) -> dict[str, Any]:
        """What must agree for a folder to be continued."""
        keep = ("scenes", "tasks", "seed", "disturbed", "chain", "format")
        dumped = self.model_dump(mode="json")
        return {"version": VERSION, **{key: dumped[key] for key in keep}}
