"""`openhelix keys FOLDER [--robot NAME ...]`: CURVE keys for hosts that are not this one.

    openhelix keys keys --robot left right

Makes `server.secret` and `server.public`, and a pair for each robot. A host gets its own
`.secret` and the `.public` files of those it talks to, over a channel you trust (scp).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from openhelix.runtime.cli.arguments import Many, Options, Positional, option, parse
from openhelix.runtime.core.config import ConfigError
from openhelix.runtime.core.output import answer
from openhelix.runtime.transport.sockets import SERVER, check_name, generate


class KeysOptions(Options):
    """Options of `keys`."""

    folder: Annotated[Path, Positional()] = option(..., "where to write the keys")
    robot: Annotated[tuple[str, ...], Many()] = option((), "a robot that gets a pair", "NAME")


def main(argv: Sequence[str]) -> int:
    """Make the CURVE keys that other hosts need; replaces none."""
    options, _ = parse("keys", KeysOptions, argv, __doc__ or "")
    names = list(options.robot) or ["client"]
    if not (options.folder.expanduser() / f"{SERVER}.secret").exists():
        names.insert(0, SERVER)
    for name in names:
        check_name(name)  # all of them, before anything is written
        if (secret := options.folder.expanduser() / f"{name}.secret").exists():
            raise ConfigError(f"{secret}: exists already; remove it to make a new key")
    try:
        made = [generate(options.folder, name).name for name in names]
    except OSError as error:
        raise ConfigError(f"folder: cannot write to {options.folder}: {error.strerror}") from None
    if options.as_json:
        answer(json.dumps({"folder": str(options.folder), "made": made}))
    else:
        answer(f"{options.folder}: made {', '.join(made)}")
    return 0
