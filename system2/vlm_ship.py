"""A trained base model from few megabytes: packages deliver the rest.

A folder with `vision.safetensors` (tower and projector) and `language.safetensors` (low-rank
parts), as `vlm_train` writes them, stands for a whole LLaVA: `base_from` joins it with the
language model's package, once, in the cache. `open_checkpoint` takes such a folder as a model.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from openhelix.system2.model import (
    CheckpointError,
    VisionShape,
    build_once,
    cache_dir,
    rename_tower,
    sha256_file,
    write_manifest,
)

VISION, LANGUAGE, ABOUT = "vision.safetensors", "language.safetensors", "tower"
_FORMAT = 1  # raise it when the same files would give another folder


def is_small(folder: Path) -> bool:
    """Whether a folder holds a base model's few megabytes rather than a whole one."""
    return (folder / VISION).is_file() and not (folder / "config.json").is_file()


def base_from(folder: Path) -> Path:
    """Return the LLaVA folder that a small folder stands for.

    Raises:
        CheckpointError: the files are not of such a folder, or do not fit the language model.
    """
    from openhelix.system2.model import build

    shape = _shape(folder / VISION)
    whole = build(vision=shape, vision_weights=folder / VISION)
    if not (folder / LANGUAGE).is_file():
        return whole
    files = [sha256_file(folder / VISION), sha256_file(folder / LANGUAGE), whole.name]
    key = hashlib.sha256(json.dumps([_FORMAT, *files]).encode()).hexdigest()[:16]
    return build_once(
        cache_dir() / "system2" / f"vlm-{key}",
        lambda out: _join(out, whole, folder / LANGUAGE, key),
    )


def _shape(file: Path) -> VisionShape:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as stream:
            about = json.loads((stream.metadata() or {}).get(ABOUT, "null"))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"model: cannot read {str(file)!r}: {error}") from error
    if about is None:
        raise CheckpointError(f"model: {str(file)!r} does not say which tower it is of")
    if about["shipped"]:
        return VisionShape()
    return VisionShape(**{key: about[key] for key in VisionShape.__dataclass_fields__})


def _join(out: Path, base: Path, language: Path, key: str) -> None:
    import torch
    from safetensors import safe_open
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(base, dtype=torch.float32)
    weights: dict[str, Any] = dict(model.model.language_model.named_parameters())
    with safe_open(language, framework="pt") as stream, torch.no_grad():
        scale = float(stream.metadata()["scale"])
        for name in stream.keys():  # noqa: SIM118
            if not name.endswith(".down"):
                continue
            layer = name.removesuffix(".down")
            place = f"{layer.removeprefix('language.')}.weight"
            down, up = stream.get_tensor(name).float(), stream.get_tensor(f"{layer}.up").float()
            if place not in weights or weights[place].shape != (len(up), down.shape[1]):
                raise CheckpointError(f"model: {str(language)!r} does not fit: no {place}")
            weights[place] += scale * up @ down
    model.to(torch.bfloat16).save_pretrained(out)
    for file in out.glob("*.safetensors"):
        rename_tower(file)
    AutoProcessor.from_pretrained(base).save_pretrained(out)
    about = json.loads((base / "openhelix.json").read_text())
    about |= {"model_id": key, "recipe": {**about.get("recipe", {}), "language": key}}
    write_manifest(out, about)
