"""Policies on disk: safetensors, configuration, normaliser and spec, four files a folder.

    config.json                what to build
    model.safetensors          the weights
    normalizer.safetensors     offset and scale of the trajectory
    spec.json                  what the policy expects and promises, for people and checks

Nothing here unpickles.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from system1.config import PolicyConfig
from system1.model import VisuomotorPolicy
from system1.normalizer import Normalizer

CONFIG, WEIGHTS, NORMALIZER, SPEC = (
    "config.json",
    "model.safetensors",
    "normalizer.safetensors",
    "spec.json",
)


class CheckpointError(ValueError):
    """A checkpoint that cannot be read; the message names the file or the parameters."""


def build_model(config: PolicyConfig, normalizer: Normalizer | None = None) -> nn.Module:
    """Return the network of a configuration with fresh weights."""
    return VisuomotorPolicy(config, normalizer)


def load_strict(model: nn.Module, state: dict[str, Tensor], where: str) -> None:
    """Load a state dict whose names and shapes must be exactly the model's.

    Raises:
        CheckpointError: naming the missing, extra and misshapen parameters.
    """
    want = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    have = {name: tuple(t.shape) for name, t in state.items()}
    lines = [f"missing {name}" for name in sorted(set(want) - set(have))]
    lines += [f"extra {name}" for name in sorted(set(have) - set(want))]
    lines += [
        f"{name} has shape {have[name]}, needs {want[name]}"
        for name in sorted(set(want) & set(have))
        if want[name] != have[name]
    ]
    if lines:
        shown = "; ".join(lines[:20]) + (f"; and {len(lines) - 20} more" if lines[20:] else "")
        raise CheckpointError(f"{where}: {len(lines)} parameters do not fit: {shown}")
    model.load_state_dict(state)


def save_policy(
    folder: Path | str, config: PolicyConfig, state: dict[str, Tensor], normalizer: Normalizer
) -> None:
    """Write a checkpoint folder, each file first under another name, so none is ever half there."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)

    def place(name: str, write: object) -> None:
        part = folder / f".{name}.part"
        write(part)  # type: ignore[operator]
        part.replace(folder / name)

    tensors = {k: v.detach().cpu().contiguous() for k, v in state.items()}
    scales = {k: v.detach().cpu().contiguous() for k, v in normalizer.tensors().items()}
    place(WEIGHTS, lambda p: save_file(tensors, p))
    place(NORMALIZER, lambda p: save_file(scales, p))
    place(SPEC, lambda p: p.write_text(json.dumps(asdict(config.spec()), indent=1) + "\n"))
    place(CONFIG, lambda p: p.write_text(json.dumps(config.to_json(), indent=1) + "\n"))


def load_policy(folder: Path | str) -> nn.Module:
    """Read a checkpoint folder into a network.

    Raises:
        CheckpointError: a file is missing or does not fit.
    """
    folder = Path(folder)
    for name in (CONFIG, WEIGHTS, NORMALIZER):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder}: no {name}; a checkpoint folder has {CONFIG}, ...")
    config = PolicyConfig.from_json(json.loads((folder / CONFIG).read_text()))
    scales = load_file(folder / NORMALIZER)
    model = build_model(config, Normalizer(scales["offset"], scales["scale"]))
    load_strict(model, load_file(folder / WEIGHTS), str(folder / WEIGHTS))
    return model
