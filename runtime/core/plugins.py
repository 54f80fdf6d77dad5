"""`"module:Name"` to the object it names, imported only when asked for.

The runtime reaches System 1, System 2 and the simulator through this function alone, so
that importing `runtime` costs neither torch nor vLLM nor pybullet.
"""

from __future__ import annotations

import importlib
from typing import Any


class ResolveError(ValueError):
    """The path does not name an importable object."""


def resolve(path: str) -> Any:
    """Return the object named by `"package.module:Name"`."""
    module_name, _, attribute = path.partition(":")
    if not module_name or not attribute:
        raise ResolveError(f"{path!r}: write it as 'package.module:Name'")
    try:
        target: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ResolveError(f"{path!r}: no module named {error.name!r}") from error
    for name in attribute.split("."):
        if not hasattr(target, name):
            raise ResolveError(f"{path!r}: {module_name} has no {name!r}")
        target = getattr(target, name)
    return target
