"""What the stages leave in their folders, and what they ask of each other's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from benchmarks.training.config import TrainingConfig
from runtime.config import ConfigError
from system1.checkpoint import CONFIG

SETTINGS, BEGAN, LATENT, AUX, LANGUAGE = (
    "settings.json",
    "began.json",
    "latent.safetensors",
    "aux.safetensors",
    "language.safetensors",
)
# What may differ between a run and the one that continues it.
FREE = ("eval_every", "save_every", "max_gb", "encode_batch", "checkpoint")


class NotDone(Exception):
    """The time limit came; the same command goes on."""


def keep_settings(folder: Path, settings: dict[str, Any], write: bool) -> None:
    """Check that a stage goes on as it was begun, and write what it was begun with.

    Args:
        folder: of the stage.
        settings: sections of plain values.
        write: False checks alone, before anything is opened.

    Raises:
        ConfigError: a stage is being continued with another setting.
    """
    settings = json.loads(json.dumps(settings, default=str))
    file = folder / SETTINGS
    before = json.loads(file.read_text()) if file.is_file() else settings
    for section, values in settings.items():
        old = before.get(section)
        for key, value in values.items() if isinstance(values, dict) else [("", values)]:
            was = old.get(key) if isinstance(old, dict) else old
            if was != value:
                where = f"{section}.{key}".rstrip(".")
                raise ConfigError(
                    f"{where}: {folder} was begun with {was!r}, not {value!r}; "
                    "choose another out=FOLDER or remove it"
                )
    if not write:
        return
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(settings, indent=1) + "\n")


def section_settings(section: Any) -> dict[str, Any]:
    """Return a section without what may change on the way."""
    return {k: v for k, v in section.model_dump(mode="json").items() if k not in FREE}


def finished(
    stage: str, folder: Path, step: int, history: list[dict[str, Any]], steps: int
) -> dict[str, Any]:
    """Return what a stage says of itself.

    Raises:
        NotDone: it is not at its last step.
    """
    if step < steps:
        raise NotDone(f"{stage}: stopped at step {step} of {steps} by the time limit")
    last: dict[str, Any] = next((row for row in reversed(history) if "val_loss" in row), {})
    return {"stage": stage, "folder": str(folder), **last}


def base_policy_folder(config: TrainingConfig) -> Path | None:
    """Return the folder of the pretrained policy; None for an untrained one.

    Raises:
        ConfigError: there is none.
    """
    if not config.policy.pretrained:
        return None
    folder = config.policy.checkpoint or config.folder / "policy"
    folder = folder.expanduser()
    if not (folder / CONFIG).is_file():
        raise ConfigError(
            f"policy.checkpoint: no policy in {folder}; run `openhelix train policy` first, name "
            "a folder, or say policy.pretrained=false"
        )
    return folder


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors, first under another name."""
    part = path.with_name(f".{path.name}.part")
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, part)
    part.replace(path)
