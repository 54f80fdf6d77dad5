"""`openhelix collect`: let the experts work, keep what succeeds.

A collection is a folder of unit files. A unit file appears whole or not at all, so a killed
collection is continued by the same command; a folder that was begun with other settings, or
that holds something else, is refused before anything is written. `card.json` says what is in
it: counts, failures, step numbers, settings, and a SHA-256 of every file. Then the moments
that training reads are drawn (`benchmarks.playtable.frames`), likewise file by file.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.playtable.annotations import replace_file
from benchmarks.playtable.collect_config import CollectConfig
from benchmarks.playtable.collect_frames import draw
from benchmarks.playtable.collect_pool import UNITS, Report, pooled, unit_path
from benchmarks.playtable.collect_unit import collect_unit, read_unit, unit_bytes
from benchmarks.playtable.demonstrations import Demonstration
from runtime.config import ConfigError, apply_overrides, read_yaml, validate

SETTINGS, CARD = "collection.json", "card.json"


def open_folder(config: CollectConfig) -> Path:
    """Make the collection's folder, or check that it is one that may be continued.

    Raises:
        ConfigError: the folder holds other data, or was begun with other settings.
    """
    folder, settings = config.folder, config.folder / SETTINGS
    if settings.exists():
        try:
            before = json.loads(settings.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            before = {}
        for key, value in json.loads(json.dumps(config.identity())).items():
            if before.get(key) != value:
                was = "others" if isinstance(value, list) else repr(before.get(key))
                raise ConfigError(
                    f"{key}: {folder} was begun with {was}; choose another folder with out=DIR"
                )
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"out: {folder} holds other data; choose an empty folder")
    else:
        replace_file(settings, json.dumps(config.identity(), indent=1).encode())
    for torn in folder.glob(f"{UNITS}/.*.tmp"):
        torn.unlink()
    return folder


def missing_units(config: CollectConfig, folder: Path) -> list[tuple[str, int]]:
    """The units still to do, scenes in turn, so that an unfinished collection is balanced."""
    wanted = [(scene, n) for n in range(config.per_task) for scene in config.scenes]
    return [(s, n) for s, n in wanted if not unit_path(folder, s, n).exists()]


def write_unit(folder: str, scene: str, number: int, identity: dict[str, Any]) -> int:
    """Collect one unit into its file; returns how many demonstrations it has."""
    unit = collect_unit(
        scene, number, identity["tasks"], identity["seed"], identity["disturbed"], identity["chain"]
    )
    replace_file(unit_path(Path(folder), scene, number), unit_bytes(unit))
    return len(unit.demonstrations)


def collect(config: CollectConfig, report: Report | None = None) -> dict[str, Any]:
    """Collect what is missing; return the card.

    Args:
        config: what to collect.
        report: told of the progress.

    Raises:
        ConfigError: the folder cannot be used.
    """
    folder = open_folder(config)
    todo = missing_units(config, folder)
    identity, begun = config.identity(), time.monotonic()
    work = [(str(folder), scene, number, identity) for scene, number in todo]
    for done, count in enumerate(pooled(write_unit, work, config.jobs), 1):
        if report is not None:
            report(done, len(todo), f"{count} demonstrations")
    card = make_card(folder, identity)
    card["wall_s"] = round(time.monotonic() - begun, 1)
    card["new_units"] = len(todo)
    replace_file(folder / CARD, json.dumps(card, indent=1).encode())
    return card


def make_card(folder: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """What a collection holds, from its files."""
    counts, tried, failed, no_start = (Counter[str]() for _ in range(4))
    steps: dict[str, list[int]] = {}
    digests: dict[str, str] = {}
    frames = size = 0
    for path in sorted((folder / UNITS).glob("*.npz")):
        about, _ = read_unit(path)
        data = path.read_bytes()
        digests[path.name], size = hashlib.sha256(data).hexdigest(), size + len(data)
        for row in about["demonstrations"]:
            counts[f"{about['scene']}/{row['task']}"] += 1
            steps.setdefault(row["task"], []).append(row["success_step"])
            frames += row["steps"]
        for total, part in ((tried, "tried"), (failed, "failed"), (no_start, "no_start")):
            total.update(about[part])
    whole = hashlib.sha256("".join(digests[n] for n in sorted(digests)).encode()).hexdigest()
    return {
        "what": "demonstrations of CALVIN's 34 tasks by scripted experts in PlayTable",
        "settings": identity,
        "demonstrations": sum(counts.values()),
        "steps": frames,
        "hours_of_play": round(frames / 30 / 3600, 2),
        "bytes": size,
        "expert_success": round(1 - sum(failed.values()) / max(sum(tried.values()), 1), 4),
        "by_scene_and_task": dict(sorted(counts.items())),
        "tried": dict(sorted(tried.items())),
        "failed": dict(sorted(failed.items())),
        "no_start": dict(sorted(no_start.items())),
        "median_steps": {t: float(np.median(s)) for t, s in sorted(steps.items())},
        "sha256": whole,
        "files": digests,
    }


def demonstrations(folder: Path | str) -> Iterator[Demonstration]:
    """All demonstrations of a collection, in the order of its files.

    Raises:
        ValueError: the folder is no collection, or a file is damaged.
    """
    root = Path(folder)
    if not (root / SETTINGS).exists():
        raise ValueError(f"{root}: no {SETTINGS} here, so no collection of demonstrations")
    for path in sorted((root / UNITS).glob("*.npz")):
        yield from read_unit(path)[1]


def parse(argv: Sequence[str]) -> tuple[CollectConfig, bool]:
    """The settings from `--config FILE`, `field=value` words and `--json`.

    Raises:
        ConfigError: in one line, the field and what is valid.
    """
    words = list(argv)
    as_json = "--json" in words
    words = [w for w in words if w != "--json"]
    file: Path | None = None
    overrides = []
    while words:
        word = words.pop(0)
        if word in ("-h", "--help"):
            raise SystemExit(_help())
        if "=" not in word:
            if not word.startswith("--") or not words:
                raise ConfigError(f"{word!r}: unknown option; settings are written field=value")
            word = f"{word}={words.pop(0)}"
        key, _, value = word.removeprefix("--").partition("=")
        if key == "config":
            file = Path(value)
        elif key in ("scenes", "out"):
            overrides.append(f"{key}={json.dumps(value)}")
        else:
            overrides.append(f"{key}={value}")
    return validate(CollectConfig, apply_overrides(read_yaml(file), overrides)), as_json


def _help() -> int:
    fields = "\n".join(
        f"  {name}={field.default!r}"
        if name != "tasks"
        else "  tasks=[rotate_red_block_right, ...]"
        for name, field in CollectConfig.model_fields.items()
    )
    sys.stdout.write(
        f"usage: openhelix collect [--config FILE] [field=value ...] [--json]\n\n{__doc__}\n"
        f"Settings and their defaults:\n{fields}\n"
    )
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run `openhelix collect`; returns the exit code.

    Raises:
        ConfigError: bad input, in one line; nothing was written.
    """
    config, as_json = parse(sys.argv[1:] if argv is None else argv)
    begun = time.monotonic()

    def report(done: int, total: int, what: str) -> None:
        left = (time.monotonic() - begun) / done * (total - done)
        sys.stderr.write(f"{done} of {total}: {what}, {left:.0f} s to go\n")

    if config.format == "calvin":
        from benchmarks.playtable.collect_calvin import export_calvin

        card = export_calvin(config, report)
    else:
        card = collect(config, report)
        if config.frames.every:
            begun = time.monotonic()
            card |= draw(config, report)
            replace_file(config.folder / CARD, json.dumps(card, indent=1).encode())
    brief = {k: v for k, v in card.items() if k != "files"} | {"folder": str(config.folder)}
    sys.stdout.write(json.dumps(brief, indent=None if as_json else 1) + "\n")
    return 0


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except ValueError as error:
        sys.stderr.write(f"collect: {error}\n")
        raise SystemExit(2) from None
