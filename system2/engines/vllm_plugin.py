"""Lets vLLM load LLaVA on a machine without torchvision.

vLLM's LLaVA imports its Pixtral module, which imports an image processor that needs
torchvision; CPU-only torch has no torchvision of the same build. transformers has a PIL
version of that processor with the same function, so it is put in the other's place, only
where torchvision is absent. vLLM calls `register` in each of its processes.
"""

from __future__ import annotations

import importlib.util
import sys

_FAST = "transformers.models.pixtral.image_processing_pixtral"


def register() -> None:
    """Put the PIL image processor in the place of the one that needs torchvision."""
    if importlib.util.find_spec("torchvision") is not None or _FAST in sys.modules:
        return
    from transformers.models.pixtral import image_processing_pil_pixtral as slow

    sys.modules[_FAST] = slow
