"""`openhelix keys FOLDER [--robot NAME ...]`: CURVE keys for hosts that are not this one.

Makes `server.secret` and `server.public`, and a pair for each robot. A host gets its own
`.secret` and the `.public` files of those it talks to, over a channel you trust (scp).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from openhelix.runtime.cli.arguments import parse, parser
from openhelix.runtime.core.config import ConfigError
from openhelix.runtime.transport.sockets import SERVER, generate


def main(argv: Sequence[str]) -> int:
    """Write key pairs; existing ones are never overwritten."""
    arguments = parser("keys", __doc__ or "")
    arguments.add_argument("folder", type=Path, help="where to write the keys")
    arguments.add_argument("--robot", action="append", default=[], metavar="NAME")
    options, overrides = parse(arguments, argv)
    if overrides:
        raise ConfigError(f"{overrides[0]}: keys takes no overrides")
    names = list(options.robot) or ["client"]
    if not (options.folder / f"{SERVER}.secret").exists():
        names.insert(0, SERVER)
    try:
        made = [generate(options.folder, name).name for name in names]
    except OSError as error:
        raise ConfigError(f"folder: cannot write to {options.folder}: {error.strerror}") from None
    if options.json:
        print(json.dumps({"folder": str(options.folder), "made": made}))
    else:
        print(f"{options.folder}: made {', '.join(made)}")
    return 0
