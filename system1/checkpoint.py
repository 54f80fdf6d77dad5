"""Policies on disk: safetensors, configuration, normaliser and spec, four files a folder.

    config.json                what to build
    model.safetensors          the weights
    normalizer.safetensors     offset and scale of the trajectory
    spec.json                  what the policy expects and promises, for people and checks

Nothing here unpickles.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from openhelix.system1.actor import DiffuserActor
from openhelix.system1.config import PolicyConfig, official_calvin
from openhelix.system1.diffusion import Normalizer
from openhelix.system1.model import VisuomotorPolicy

CONFIG, WEIGHTS, NORMALIZER, SPEC = (
    "config.json",
    "model.safetensors",
    "normalizer.safetensors",
    "spec.json",
)


class CheckpointError(ValueError):
    """A checkpoint that cannot be read; the message names the file or the parameters."""


Network = VisuomotorPolicy | DiffuserActor


def build_model(config: PolicyConfig, normalizer: Normalizer | None = None) -> Network:
    """Return the network of a configuration with fresh weights."""
    if config.head == "diffuser_actor":
        return DiffuserActor(config, normalizer)
    return VisuomotorPolicy(config, normalizer)


def seeded_model(config: PolicyConfig, seed: int, normalizer: Normalizer | None = None) -> Network:
    """Return the network of a configuration; its fresh weights follow from the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_model(config, normalizer)


def rebuilt(model: Network, config: PolicyConfig, seed: int) -> tuple[Network, list[str]]:
    """Return a network of another configuration, with the weights of `model` where they fit.

    Returns:
        The network, its other weights fresh, and the names of the weights of `model` that
        it has no place for: it lacks them or has them in another shape.
    """
    made = seeded_model(config, seed, model.normalizer)
    state, unfit = made.state_dict(), []
    for name, tensor in model.state_dict().items():
        if name in state and state[name].shape == tensor.shape:
            state[name] = tensor
        else:
            unfit.append(name)
    made.load_state_dict(state)
    return made, unfit


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


def load_policy(folder: Path | str) -> Network:
    """Read a checkpoint folder into a network.

    Raises:
        CheckpointError: a file is missing, damaged or does not fit; the message names it.
    """
    folder = Path(folder)
    for name in (CONFIG, WEIGHTS, NORMALIZER):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder}: no {name}; a checkpoint folder has {CONFIG}, ...")
    about = _read_object(folder / CONFIG)
    if (folder / SPEC).exists():
        _read_object(folder / SPEC)
    scales, weights = _read_tensors(folder / NORMALIZER), _read_tensors(folder / WEIGHTS)
    for name in ("offset", "scale"):
        if name not in scales:
            raise CheckpointError(f"{folder / NORMALIZER}: no {name}")
    try:
        config = PolicyConfig.from_json(about)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{folder / CONFIG}: {error}") from error
    try:
        model = build_model(config, Normalizer(scales["offset"], scales["scale"]))
    except (ValueError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{folder}: {CONFIG} and {NORMALIZER}: {error}") from error
    load_strict(model, weights, str(folder / WEIGHTS))
    return model


def _read_object(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: holds {type(data).__name__}, must be a JSON object")
    return data


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read as safetensors: {error}") from error


def read_official(source: Path | str | Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the bare state dict of a published checkpoint.

    The `weight` wrapper and the `module.` prefix of distributed training are taken off.

    Raises:
        CheckpointError: the file is not a dictionary of tensors, or cannot be read without
            unpickling code.
    """
    where = "state dict" if isinstance(source, Mapping) else str(source)
    data: Any = source
    if not isinstance(source, Mapping):
        path = Path(source)
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file")
        if path.suffix == ".safetensors":
            data = _read_tensors(path)
        else:
            try:
                data = torch.load(path, map_location="cpu", weights_only=True)
            except Exception as error:
                raise CheckpointError(f"{path}: cannot be read as weights: {error}") from error
    if isinstance(data, Mapping) and isinstance(data.get("weight"), Mapping):
        data = data["weight"]
    if not isinstance(data, Mapping) or not data:
        raise CheckpointError(f"{where}: not a dictionary of parameters")
    for name, value in data.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{where}: {name} is {type(value).__name__}, not a tensor")
    return {str(name).removeprefix("module."): value for name, value in data.items()}


def load_official(
    source: Path | str | Mapping[str, Any], latent_tokens: int | None = None, **changes: Any
) -> DiffuserActor:
    """Read a published 3D Diffuser Actor or OpenHelix checkpoint of the CALVIN shape.

    The gripper history is read from the shapes. Nothing in the weights tells how many latent
    tokens the checkpoint was trained with: the network takes any number, and `latent_tokens`
    only goes into the spec.

    Args:
        source: a `policy.pth`, a safetensors file, or the dictionary in one.
        latent_tokens: 1 (OpenHelix, the default) or 16 (3D Diffuser Actor).
        changes: other fields of the configuration.

    Returns:
        The network, in evaluation mode, frozen.

    Raises:
        CheckpointError: naming every parameter that is missing, extra or misshapen.
    """
    state = read_official(source)
    where = "state dict" if isinstance(source, Mapping) else str(source)
    embed = state.get("encoder.curr_gripper_embed.weight")
    nhist = len(embed) if embed is not None and embed.ndim == 2 else 1
    model = DiffuserActor(official_calvin(nhist, latent_tokens or 1, **changes))
    load_strict(model, state, where)
    return model.eval().requires_grad_(False)


def convert_official(
    source: Path | str | Mapping[str, Any], folder: Path | str, latent_tokens: int | None = None
) -> DiffuserActor:
    """Read a published checkpoint and write it as a checkpoint folder of ours."""
    model = load_official(source, latent_tokens)
    save_policy(folder, model.config, model.state_dict(), model.normalizer)
    return model
