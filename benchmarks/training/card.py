"""The card of a trained pair: data, command, seed, hours and losses, for people and for checks."""

from __future__ import annotations

import json
import platform
import shlex
from pathlib import Path
from typing import Any

import torch

from benchmarks.training.config import TrainingConfig
from benchmarks.training.folders import SETTINGS
from system1.cache import frames_digest
from system1.train_state import LOG

KEPT = ("collection", "moments")


def make_card(config: TrainingConfig, stage: str, source: Path) -> dict[str, Any]:
    """Return what is to be known about a training, from what its stages left.

    Args:
        config: of the training.
        stage: whose weights are shipped.
        source: that stage's folder.
    """
    folders = {"policy": config.policy.checkpoint or config.folder / "policy"}
    folders |= {name: config.folder / name for name in ("stage1", "stage2")}
    stages = {
        name: stage_card(folder) for name, folder in folders.items() if (folder / LOG).is_file()
    }
    return {
        "what": "a System 1 policy and the trained tensors of its System 2",
        "weights_of": stage,
        "data": data_card(config.frames_folder()),
        "command": command(config),
        "seed": config.seed,
        "device": config.device,
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "hours": round(sum(s["hours"] for s in stages.values()), 5),
        "stages": stages,
        "settings": shown(config.model_dump(mode="json")),
    }


def stage_card(folder: Path) -> dict[str, Any]:
    """Return steps, hours and last figures of a stage."""
    log = json.loads((folder / LOG).read_text())
    history = log["history"]
    losses = [row for row in history if "loss" in row]
    held = [row for row in history if "val_loss" in row]
    skipped = ("seconds", "lr", "grad_norm")
    card = {
        "steps": log["step"],
        "hours": round(history[-1]["seconds"] / 3600, 5) if history else 0.0,
        "first": {k: v for k, v in (losses or [{}])[0].items() if k not in skipped},
        "last": {k: v for k, v in (losses or [{}])[-1].items() if k not in skipped},
        "held_out": {k: v for k, v in (held or [{}])[-1].items() if k.startswith("val_")},
    }
    settings = folder / SETTINGS
    if settings.is_file():
        card["settings"] = shown(json.loads(settings.read_text()))
    return card


def data_card(frames: Path) -> dict[str, Any]:
    """Return what the collection's own card says, and a digest of the frames trained on."""
    meta = json.loads((frames / "cache.json").read_text())
    out = {
        "frames": sum(int(shard["frames"]) for shard in meta["shards"]),
        "frames_sha256": frames_digest(frames, meta["shards"]),
        **{k: v for k, v in meta["notes"].items() if k in KEPT},
    }
    card = frames.parent / "card.json"
    if card.is_file():
        about = json.loads(card.read_text())
        keys = ("demonstrations", "hours_of_play", "expert_success", "sha256")
        out |= {k: about[k] for k in keys if k in about}
        out["collection_settings"] = about.get("settings", {})
    return out


def command(config: TrainingConfig) -> str:
    """Return the command that makes the same again: all settings that are not the defaults."""
    words = ["openhelix", "train", "all"]
    values = shown(config.model_dump(mode="json"))
    words += changed(values, TrainingConfig().model_dump(mode="json"), "")
    return shlex.join(words)


def shown(value: Any) -> Any:
    """Return settings with folders as another user would name them: `~` for the home folder."""
    if isinstance(value, dict):
        return {k: shown(v) for k, v in value.items()}
    home = str(Path.home())
    if isinstance(value, str) and value.startswith(home + "/"):
        return "~" + value[len(home) :]
    return value


def changed(values: dict[str, Any], defaults: dict[str, Any], prefix: str) -> list[str]:
    """Return `a.b=value` for every value that is not the default."""
    out = []
    for name, value in values.items():
        if isinstance(value, dict) and isinstance(defaults.get(name), dict) and defaults[name]:
            out += changed(value, defaults[name], f"{prefix}{name}.")
        elif value != defaults.get(name) and name not in ("out", "time_limit_s", "threads"):
            text = json.dumps(value) if isinstance(value, (dict, list, bool)) else str(value)
            out.append(f"{prefix}{name}={text}")
    return out


def markdown(card: dict[str, Any]) -> str:
    """Return the card as a page."""
    data = card["data"]
    lines = [
        "# A trained pair",
        "",
        f"Weights of `{card['weights_of']}`, in {card['precision']['dtype']} (rounding moves a "
        f"sampled trajectory by at most {1e6 * card['precision']['moves_a_trajectory_by_m']:.1f} um).",
        "",
        "    " + card["command"],
        "",
        f"Seed {card['seed']}, {card['device']} ({card['machine']}), torch {card['torch']}, "
        f"{card['hours']:.2f} hours of training.",
        "",
        f"Data: {data.get('collection', 'frames')}, {data['frames']} frames"
        + (f" of {data['demonstrations']} demonstrations" if "demonstrations" in data else "")
        + f", SHA-256 `{data['frames_sha256']}`.",
        "",
        "| stage | steps | hours | first loss | last loss | held out |",
        "|---|---|---|---|---|---|",
    ]
    for name, stage in card["stages"].items():
        first, last = stage["first"].get("loss"), stage["last"].get("loss")
        held = ", ".join(f"{k.removeprefix('val_')} {v:.4g}" for k, v in stage["held_out"].items())
        losses = " | ".join("-" if x is None else f"{x:.3f}" for x in (first, last))
        lines.append(f"| {name} | {stage['steps']} | {stage['hours']:.2f} | {losses} | {held} |")
    return "\n".join([*lines, ""])
