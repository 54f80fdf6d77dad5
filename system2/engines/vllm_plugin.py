"""Lets vLLM load its models on a machine without torchvision, and beside numba.

vLLM's LLaVA imports its Pixtral module, and its Qwen2-VL the like of it: image processors that
need torchvision; CPU-only torch has no torchvision of the same build. transformers has PIL
versions of them with the same functions, so these are put in the others' places, only where
torchvision is absent.

vLLM also looks through every global of every loaded module for Triton kernels, with
`vars(value)`. llvmlite (numba's) has an object that answers *any* attribute with a function,
`__dict__` too, and the search fails on it; torch has one that warns of its deprecation whatever
it is asked for. The search is given `vars` and `hasattr` that look past such answers.
vLLM calls `register` in each of its processes.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Mapping
from typing import Any

_FAST = ("pixtral", "qwen2_vl")  # image processors that vLLM's models import
_KERNEL_SEARCH = "vllm.triton_utils.dispatcher"


def register() -> None:
    """Mend both, each only where it is needed."""
    _use_pil_images()
    if importlib.util.find_spec(_KERNEL_SEARCH) is not None:
        # A module's globals come before the builtins of the same names.
        search = importlib.import_module(_KERNEL_SEARCH).__dict__
        search["vars"], search["hasattr"] = real_vars, real_hasattr


def real_vars(value: object) -> Mapping[str, Any]:
    """Return `vars(value)` without running any code of the value's own; empty if it has none."""
    try:
        found = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return {}
    return found if isinstance(found, Mapping) else {}


def real_hasattr(value: object, name: str) -> bool:
    """Return `hasattr(value, name)`; for `__dict__` without running code of the value's own."""
    if name != "__dict__":
        return hasattr(value, name)
    try:
        object.__getattribute__(value, name)
    except AttributeError:
        return False
    return True


def _use_pil_images() -> None:
    """Put the PIL image processors in the places of those that need torchvision."""
    if importlib.util.find_spec("torchvision") is not None:
        return
    for name in _FAST:
        place = f"transformers.models.{name}.image_processing_"
        if place + name not in sys.modules:
            sys.modules[place + name] = importlib.import_module(f"{place}pil_{name}")
