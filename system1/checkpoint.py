"""Policies on disk: safetensors, configuration, normaliser and spec, four files a folder.

    config.json                what to build
    model.safetensors          the weights
    normalizer.safetensors     offset and scale of the trajectory
    spec.json                  what the policy expects and promises, for people and checks

Nothing here unpickles.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from openhelix.runtime.core.config import ConfigError
from openhelix.runtime.core.files import (
    CheckpointError,
    check_finite,
    check_kinds,
    load_tensors,
    load_torch,
    read_json,
    replace_file,
    save_tensors,
    tensor_header,
)
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


def take_encoder(model: Network, source: Network) -> int:
    """Give a network the weights of another's encoder where they fit; return how many numbers do."""
    own, taken = model.state_dict(), 0
    for name, tensor in source.state_dict().items():
        if name.startswith("encoder.") and name in own and own[name].shape == tensor.shape:
            own[name].copy_(tensor)
            taken += tensor.numel()
    return taken


def load_strict(model: nn.Module, state: dict[str, Tensor], where: str) -> None:
    """Load a state dict whose names and shapes must be exactly the model's.

    Raises:
        BadFile: naming the missing, extra and misshapen parameters, or one that is not finite or of
            another kind of number.
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
    check_kinds(state, where, model.state_dict())
    check_finite(state, where)
    model.load_state_dict(state)


def save_policy(
    folder: Path | str, config: PolicyConfig, state: dict[str, Tensor], normalizer: Normalizer
) -> None:
    """Write a checkpoint folder, each file first under another name, so none is ever half there."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)

    def text(data: object) -> bytes:
        return (json.dumps(data, indent=1) + "\n").encode()

    save_tensors(folder / WEIGHTS, state)
    save_tensors(folder / NORMALIZER, normalizer.tensors())
    replace_file(folder / SPEC, text(asdict(config.spec())))
    replace_file(folder / CONFIG, text(config.to_json()))


def load_policy(folder: Path | str) -> Network:
    """Read a checkpoint folder into a network.

    Raises:
        BadFile: a file is missing, damaged or does not fit; the line names it.
    """
    folder = Path(folder)
    for name in (CONFIG, WEIGHTS, NORMALIZER):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder}: no {name}; a checkpoint folder has {CONFIG}, ...")
    config = PolicyConfig.from_json(read_json(folder / CONFIG), str(folder / CONFIG))
    if (folder / SPEC).exists():
        read_json(folder / SPEC)
    header, _ = tensor_header(folder / WEIGHTS)
    held = sum(math.prod(shape) for _, shape in header.values())
    if config.dim**2 * config.layers > held:  # before anything of that size is built
        raise CheckpointError(
            f"{folder / CONFIG}: dim={config.dim} and layers={config.layers} are of a larger "
            f"network than {folder / WEIGHTS} holds, with {held} numbers"
        )
    normalizer = _read_normalizer(folder / NORMALIZER, config.horizon)
    try:
        model = build_model(config, normalizer)
    except (ValueError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{folder / CONFIG}: {error}") from error
    weights, _ = load_tensors(folder / WEIGHTS)
    load_strict(model, weights, str(folder / WEIGHTS))
    return model


def _read_normalizer(path: Path, horizon: int) -> Normalizer:
    scales, _ = load_tensors(path, ("offset", "scale"))
    check_kinds(scales, str(path))
    for name, values in scales.items():
        if values.ndim != 2 or values.shape[1] != 9 or len(values) not in (1, horizon):
            raise CheckpointError(
                f"{path}: {name} has shape {tuple(values.shape)}, needs (1, 9) or ({horizon}, 9)"
            )
    if not bool((scales["scale"] > 0).all()):
        raise CheckpointError(f"{path}: scale has values that are not above 0")
    return Normalizer(scales["offset"].float(), scales["scale"].float())


def _harmless() -> list[Any]:
    """Return what training scripts leave beside weights and what makes plain values alone."""
    import argparse

    from numpy._core import multiarray

    numbers = [getattr(np.dtypes, name) for name in np.dtypes.__all__]
    makers = ((multiarray.scalar, "scalar"), (multiarray._reconstruct, "_reconstruct"))
    named = [
        (made, f"numpy.{core}.multiarray.{name}")
        for made, name in makers
        for core in ("core", "_core")  # before numpy 2 and since
    ]
    return [argparse.Namespace, np.dtype, np.ndarray, *numbers, *named]


WRAPPERS = ("weight", "state_dict", "model", "model_state_dict")  # what weights are kept under


def read_official(source: Path | str | Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the bare state dict of a published checkpoint.

    Wrappers (`WRAPPERS`) and the `module.` prefix of distributed training are taken off.

    Raises:
        BadFile: the file is not a dictionary of tensors, or cannot be read without unpickling
            code.
    """
    where = "state dict" if isinstance(source, Mapping) else str(source)
    data: Any = source
    if not isinstance(source, Mapping):
        path = Path(source)
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file")
        if path.suffix == ".safetensors":
            data, _ = load_tensors(path)
        else:
            with torch.serialization.safe_globals(_harmless()):
                data = load_torch(path, torch.load)
    for _ in range(len(WRAPPERS)):  # some are wrapped twice
        inner = [data[name] for name in WRAPPERS if isinstance(data, Mapping) and name in data]
        if not inner or not isinstance(inner[0], Mapping):
            break
        data = inner[0]
    if not isinstance(data, Mapping) or not data:
        raise CheckpointError(f"{where}: not a dictionary of parameters")
    for name, value in data.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{where}: {name} is {type(value).__name__}, not a tensor")
        if value.layout != torch.strided or value.is_quantized:
            raise CheckpointError(f"{where}: {name} is no plain tensor")
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
        BadFile: naming every parameter that is missing, extra or misshapen, or not finite.
    """
    state = read_official(source)
    where = "state dict" if isinstance(source, Mapping) else str(source)
    embed = state.get("encoder.curr_gripper_embed.weight")
    nhist = len(embed) if embed is not None and embed.ndim == 2 else 1
    try:
        config = official_calvin(nhist, latent_tokens or 1, **changes)
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error}") from None
    model = DiffuserActor(config)
    load_strict(model, state, where)
    return model.eval().requires_grad_(False)


def convert_official(
    source: Path | str | Mapping[str, Any],
    folder: Path | str,
    latent_tokens: int | None = None,
    **changes: Any,
) -> DiffuserActor:
    """Read a published checkpoint and write it as a checkpoint folder of ours; see `load_official`."""
    model = load_official(source, latent_tokens, **changes)
    save_policy(folder, model.config, model.state_dict(), model.normalizer)
    return model
