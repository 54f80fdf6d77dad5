"""`openhelix convert`: published policies as checkpoint folders of ours.

    openhelix convert policy.pth checkpoints/mine
    openhelix convert policy.pth checkpoints/mine --tokens 16 --quaternion wxyz

Reads weights of 3D Diffuser Actor or OpenHelix in CALVIN's shape, without running any code that a
file may hold, names every parameter that does not fit, and writes safetensors. What the weights
tell is taken from them (the length of the gripper history); the rest is asked for, and written
into the folder's `config.json`. `--tokens`
is the number of the instruction's: 16 for 3D Diffuser Actor, 1 for OpenHelix. `--quaternion` is the
order in which training *read* rotations, which CALVIN's data write w, x, y, z
(`--quaternion_format` of the training script); weights trained with the other order run right too,
once it is known.

`openhelix run system1.policy.options.path=checkpoints/mine` then acts with it, and `openhelix train
policy policy.init=checkpoints/mine` begins from it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from openhelix.runtime.cli.arguments import Options, Positional, option, parse
from openhelix.runtime.core.config import ConfigError
from openhelix.runtime.core.output import answer


class ConvertOptions(Options):
    """Options of `convert`."""

    source: Annotated[Path, Positional()] = option(..., "policy.pth or a safetensors file", "FILE")
    out: Annotated[Path, Positional()] = option(..., "folder to write", "FOLDER")
    tokens: int = option(1, "latent tokens it was trained with (1)", "1|16")
    quaternion: Literal["wxyz", "xyzw"] = option("wxyz", "order it read (wxyz)", "wxyz|xyzw")


def main(argv: Sequence[str]) -> int:
    """Convert a checkpoint.

    Raises:
        ConfigError: bad input, in one line; nothing was written.
    """
    options, _ = parse("convert", ConvertOptions, argv, __doc__ or "")
    if options.tokens not in (1, 16):
        raise ConfigError(f"--tokens: {options.tokens}, must be 1 or 16")
    if options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        raise ConfigError(f"out: {options.out} is there already; name a new folder")
    from openhelix.system1.checkpoint import WEIGHTS, convert_official

    source = options.source.expanduser()
    model = convert_official(source, options.out, options.tokens, quaternion=options.quaternion)
    weights = options.out / WEIGHTS
    found = {
        "folder": str(options.out),
        "parameters": sum(p.numel() for p in model.parameters()),
        "bytes": weights.stat().st_size,
        "nhist": model.config.nhist,
        "latent_tokens": model.config.latent_tokens,
        "quaternion": model.config.quaternion,
        "rotation": model.config.rotation,
    }
    if options.as_json:
        answer(json.dumps(found))
        return 0
    answer(
        f"{found['folder']}: {found['parameters']:,} parameters, history of {found['nhist']}, "
        f"{found['latent_tokens']} latent token{'s' * (options.tokens > 1)}, rotations read "
        f"{found['quaternion']}\n"
        f"next: openhelix run system1.policy.options.path={options.out}"
    )
    return 0
