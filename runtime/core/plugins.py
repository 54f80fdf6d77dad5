"""Plug-ins by name: entry points of any installed package, imported only when used.

The runtime reaches systems, worlds, robots and commands only through this module, so that
importing `openhelix.runtime` loads neither torch nor vLLM nor pybullet, and plug-ins of other
packages are found in the same way as our own. The groups:

    openhelix.commands   name -> function(argv) -> exit code; its docstring is its help text
    openhelix.worlds     name -> see `openhelix.runtime.robots.base.WorldPlugin`
    openhelix.robots     name -> a `Robot` class
    openhelix.nodes      name -> the class of a process that the run's graph starts
    openhelix.readers    name -> a class of datasets, see `openhelix.benchmarks.data.source`

In a checkout our own entry points are read from its pyproject.toml: the metadata of an
editable install may be outdated.
"""

from __future__ import annotations

import ast
import difflib
import functools
import importlib
import importlib.util
import os
import sys
import tomllib
from collections.abc import Iterable, Mapping
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, Final

from openhelix.runtime.core.paths import CHECKOUT

COMMANDS: Final = "openhelix.commands"
WORLDS: Final = "openhelix.worlds"
ROBOTS: Final = "openhelix.robots"
NODES: Final = "openhelix.nodes"
DISTRIBUTION: Final = "openhelix"
FOLDER: Final = "OPENHELIX_FOLDER"  # where a run was started, told to its processes

# The extra of `pip install openhelix[EXTRA]` that brings a module.
EXTRAS: Final[Mapping[str, str]] = {
    "torch": "cpu",
    "vllm": "cpu",
    "transformers": "cpu",
    "tokenizers": "cpu",
    "safetensors": "cpu",
    "roma": "cpu",
    "gguf": "cpu",
    "accelerate": "cpu",
    "scipy": "sim",
    "pybullet": "sim",
    "pybullet_data": "sim",
    "numba": "sim",
    "av": "sim",
    "matplotlib": "sim",
    "jinja2": "sim",
    "gymnasium": "sim",
    "peft": "train",
    "diffusers": "train",
    "ray": "cluster",
    "rerun": "viewer",
    "pyarrow": "data",
    "lerobot": "robots",
    "hydra": "calvin",
    "gym": "calvin",
}


MANY = 12  # names of which a suggestion is enough


class ResolveError(ValueError):
    """The name or path does not lead to an importable object."""


def missing(error: ModuleNotFoundError) -> str | None:
    """Return in one line what to install for an import that failed; None for no extra of ours."""
    name = (error.name or "").partition(".")[0]
    extra = EXTRAS.get(name)
    if extra is None:
        return None
    also = " (with a GPU: openhelix[gpu])" if extra == "cpu" else ""
    return f"the package {name!r} is not installed: pip install 'openhelix[{extra}]'{also}"


def look_here(name: str) -> None:
    """Let a module that is found nowhere else be imported from the command's folder.

    A console script does not look there, and neither does a process on another host.
    """
    root, folder = name.partition(".")[0], os.environ.get(FOLDER) or os.getcwd()
    if not root or root in sys.modules or importlib.util.find_spec(root) is not None:
        return
    if PathFinder.find_spec(root, [folder]) is not None:
        sys.path.append(folder)
        importlib.invalidate_caches()


def find_module(name: str) -> ModuleSpec | None:
    """Return where a module is, in the current folder too; its parents alone are imported.

    Raises:
        ImportError: a parent cannot be imported.
    """
    look_here(name)
    return importlib.util.find_spec(name)


def resolve(path: str) -> Any:
    """Return the object named by `"package.module:Name"`; the current folder is looked in last.

    Raises:
        ResolveError: there is none, or what it needs is not installed.
    """
    module_name, _, attribute = path.partition(":")
    if not module_name or not attribute:
        raise ResolveError(f"{path!r}: write it as 'package.module:Name'")
    look_here(module_name)
    try:
        target: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        hint = missing(error) or f"no module named {error.name!r}"
        raise ResolveError(f"{path!r}: {hint}") from error
    for name in attribute.split("."):
        if not hasattr(target, name):
            raise ResolveError(f"{path!r}: {module_name} has no {name!r}")
        target = getattr(target, name)
    return target


def entries(group: str) -> dict[str, str]:
    """Return the `"module:Name"` of everything in a group by its name, ours first."""
    found = dict(_own(group))
    for name, value in _installed(tuple(sys.path)).get(group, ()):
        found.setdefault(name, value)
    return found


@functools.cache
def _installed(path: tuple[str, ...]) -> dict[str, list[tuple[str, str]]]:
    """Return (name, value) of all entry points on `sys.path` by group; it takes 40 ms to look."""
    found: dict[str, list[tuple[str, str]]] = {}
    seen = {DISTRIBUTION} if CHECKOUT is not None else set()
    for distribution in distributions(path=list(path)):
        # A second one of a name, further down the path, is not the one that is imported.
        if (name := distribution.metadata["Name"]) in seen:
            continue
        seen.add(name)
        for entry in distribution.entry_points:
            found.setdefault(entry.group, []).append((entry.name, entry.value))
    return found


def find(group: str, name: str) -> Any:
    """Return what is called `name` in a group, or named outright as `"module:Name"`.

    Raises:
        ResolveError: there is nothing of that name (the message lists what there is), or it
            cannot be imported.
    """
    if ":" in name:
        return resolve(name)
    found = entries(group)
    if name not in found:
        kind = group.rpartition(".")[2].removesuffix("s")
        field = f"{kind}.name: " if group in (ROBOTS, WORLDS) else ""
        raise ResolveError(f"{field}no {kind} {name!r}; {nearest(name, found)}")
    return resolve(found[name])


def nearest(name: str, known: Iterable[str]) -> str:
    """Return what to say of an unknown name: the one that was meant, and all there are.

    Of more names than a person reads in a line, all are told only if none was meant.
    """
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if near and len(known) > MANY:
        return f"did you mean {near[0]!r}?"
    meant = f"did you mean {near[0]!r}? " if near else ""
    return f"{meant}valid: {', '.join(known) or 'none'}"


def none_of(name: object, known: Iterable[str]) -> str:
    """Return what to say of a name that is not in a list: the list, and the one that was meant."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6) if isinstance(name, str) else []
    if near and len(known) > MANY:
        return f"{name!r} is unknown; did you mean {near[0]!r}?"
    meant = f"; did you mean {near[0]!r}?" if near else ""
    return f"{name!r} is none of {', '.join(known)}{meant}"


def summary(path: str) -> str:
    """Return the first line of a function's docstring without importing its module."""
    module_name, _, attribute = path.partition(":")
    try:
        spec = importlib.util.find_spec(module_name)
        tree = ast.parse(Path(str(spec.origin)).read_text(encoding="utf-8")) if spec else None
    except (ImportError, OSError, SyntaxError):
        return ""
    for node in tree.body if tree else ():
        if isinstance(node, ast.FunctionDef) and node.name == attribute:
            return (ast.get_docstring(node) or "").partition("\n")[0]
    return ""


@functools.cache
def _own(group: str) -> Mapping[str, str]:
    if CHECKOUT is None:
        return {}
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return {name: str(path) for name, path in project["entry-points"].get(group, {}).items()}
