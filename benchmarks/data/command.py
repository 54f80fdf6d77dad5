"""`openhelix data inspect|cache|convert PATH [OUT]`: look at datasets, train on them, write them.

    openhelix data inspect calvin/task_ABC_D
    openhelix data cache calvin/task_ABC_D/training abc jobs=8
    openhelix data cache calvin/task_ABC_D/training abc --skip-bad
    openhelix data convert calvin/task_ABC_D/training abc-lerobot format=lerobot

`inspect` shows what is in a dataset: counts, tasks, sentences, cameras, ranges of actions, the
gripper's convention, problems, and a strip of pictures. `cache` builds what training reads, in
parallel: how large it will be is said first, the same command goes on where it was stopped, and
`openhelix train policy data=OUT` trains on it (given the dataset itself, `train` builds it).

`convert` writes a dataset as LeRobot's version 3.0, in CALVIN's layout, or as MCAP.

A path is a split in CALVIN's layout or the folder around its splits, a dataset of LeRobot's, our own
recordings or demonstrations, or plain arrays with a `dataset.json`. What cannot be read is
refused in one line that names the file and the field; `--skip-bad` leaves such segments out,
counts and lists them.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from openhelix.benchmarks.data.build import (
    INDEX,
    Build,
    CacheSettings,
    about_cache,
    check_unchanged,
    default_folder,
    remove_cache,
)
from openhelix.benchmarks.data.inspect import as_text, report, sources
from openhelix.benchmarks.data.source import open_source
from openhelix.runtime.cli.arguments import Options, Positional, option, parse
from openhelix.runtime.core.config import ConfigError, read_settings
from openhelix.runtime.core.output import answer


class DataOptions(Options):
    """Options of `data`; all else is `DataSettings`."""

    verb: Annotated[Literal["inspect", "cache", "convert"], Positional()] = option(
        ..., "what to do", "inspect|cache|convert"
    )
    path: Annotated[Path, Positional()] = option(..., "the dataset", "PATH")
    out: Annotated[Path | None, Positional()] = option(None, "as out=OUT", "OUT")
    skip_bad: bool = option(False, "leave out, count and list what cannot be read")
    fresh: bool = option(False, "cache: build it again from the beginning")


class DataSettings(CacheSettings):
    """Settings of `openhelix data`, beside those of the cache.

    Attributes:
        reader: which layout, by the reader's name or as "module:Class"; "" looks.
        out: cache, convert: its folder; None for one under `data` in OpenHelix's cache, or in
            `outputs/data`.
        format: convert: "lerobot", "calvin" or "mcap".
        video: convert: False keeps images as they are in LeRobot's layout.
        jobs: processes; 0 for one a core.
        max_gb: refuse to begin a cache that would be larger.
        sample: inspect: about how many frames' actions are read; 0 for all.
        picture: inspect: the strip of pictures; None for `outputs/data/<name>.png`.
    """

    reader: str = ""
    out: Path | None = None
    format: Literal["lerobot", "calvin", "mcap"] = "lerobot"
    video: bool = True
    jobs: Annotated[int, Field(ge=0)] = 0
    max_gb: Annotated[float, Field(gt=0)] = 40.0
    sample: Annotated[int, Field(ge=0)] = 4000
    picture: Path | None = None


def main(argv: Sequence[str]) -> int:
    """Look at datasets, and build training caches of them.

    Raises:
        ConfigError, DataError: bad input, in one line.
    """
    options, overrides = parse("data", DataOptions, argv, __doc__ or "", DataSettings)
    settings = read_settings(DataSettings, options.config, overrides)
    if options.out is not None:
        if settings.out is not None or options.verb == "inspect":
            raise ConfigError(f"out: {options.out}, one folder too many")
        settings = settings.model_copy(update={"out": options.out})
    if options.verb == "inspect":
        inspect(options, settings)
    elif options.verb == "convert":
        from openhelix.benchmarks.data.writers import convert

        source = open_source(options.path, settings.reader)
        name = f"{source.path.resolve().name}-{settings.format}"
        out = settings.out or Path("outputs") / "data" / name
        found = convert(source, out.expanduser(), settings.format, say, settings.video)
        answer(json.dumps(found, indent=None if options.as_json else 1))
    else:
        found = built(
            options.path,
            settings.out,
            CacheSettings(**{n: getattr(settings, n) for n in CacheSettings.model_fields}),
            settings.reader,
            settings.jobs,
            options.skip_bad,
            settings.max_gb,
            options.fresh,
        )
        answer(json.dumps(found, indent=None if options.as_json else 1))
    return 0


def inspect(options: DataOptions, settings: DataSettings) -> None:
    """Answer with what is in a dataset, or in each split of one; or in a cache of one."""
    if (options.path.expanduser() / INDEX).is_file():
        kept = about_cache(options.path.expanduser())
        answer(json.dumps(kept, indent=None if options.as_json else 1))
        return
    found: list[dict[str, Any]] = []
    for source in sources(options.path.expanduser(), settings.reader):
        name = "-".join(source.path.resolve().parts[-2:])
        picture = settings.picture or Path("outputs") / "data" / f"{name}.png"
        found.append(report(source, settings.sample, picture))
    if options.as_json:
        answer(json.dumps({"datasets": found}))
    else:
        answer("\n\n".join(as_text(one) for one in found))


def say(text: str) -> None:
    """Tell of progress, a line on standard error."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def built(
    path: Path,
    out: Path | None = None,
    settings: CacheSettings | None = None,
    reader: str = "",
    jobs: int = 0,
    skip_bad: bool = False,
    max_gb: float = 40.0,
    fresh: bool = False,
) -> dict[str, Any]:
    """Build a dataset's cache, or what is missing of it; see `DataSettings`."""
    source = open_source(path, reader)
    folder = default_folder(source.path) if out is None else out.expanduser()
    if fresh:
        remove_cache(folder)
    jobs = jobs or len(os.sched_getaffinity(0))
    build = Build(source, reader, settings or CacheSettings(), folder, jobs, skip_bad, max_gb)
    return build.run(say)


def ready(path: Path, skip_bad: bool) -> Path:
    """Return a folder that can be trained on: a cache that is fresh, or one that is built now.

    Args:
        path: of a cache, which is compared with its dataset, or of a dataset.
        skip_bad: leave out what cannot be read.

    Raises:
        DataError: the dataset cannot be read, or has changed since.
    """
    if (path / INDEX).is_file():
        check_unchanged(path)
        return path
    return Path(built(path, skip_bad=skip_bad)["folder"])
