"""`"module:Name"` to the object it names, imported only when asked for.

The runtime reaches System 1, System 2 and the simulator through this function alone, so
that importing `runtime` costs neither torch nor vLLM nor pybullet.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from importlib.machinery import PathFinder
from typing import Any


class ResolveError(ValueError):
    """The path does not name an importable object."""


def find(path: str) -> None:
    """Raise `ResolveError` unless the module of `"package.module:Name"` is there.

    It is looked for and not imported, as is its name: that takes milliseconds, where loading
    torch takes seconds.
    """
    module_name, _, attribute = path.partition(":")
    if not module_name or not attribute:
        raise ResolveError(f"{path!r}: write it as 'package.module:Name'")
    root = module_name.partition(".")[0]
    try:
        if importlib.util.find_spec(root) is None:
            # `python -m`, which starts a run's processes, finds modules in the working folder too.
            if PathFinder.find_spec(root, [os.getcwd()]) is not None:
                return
            raise ResolveError(f"{path!r}: no module named {root!r}")
        found = importlib.util.find_spec(module_name)
    except ImportError as error:
        raise ResolveError(f"{path!r}: {error}") from None
    if found is None:
        raise ResolveError(f"{path!r}: no module named {module_name!r}")


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
