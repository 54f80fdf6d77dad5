"""One check for every image that reaches System 2.

A float image or a grey one would be silently rescaled or broadcast by most processors and
come out as a plausible, wrong latent; so anything but what is promised is refused.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from system2.prompt import BadImage

MIN_SIDE, MAX_SIDE = 16, 4096


def as_pil(image: Any) -> Image.Image:
    """Return an RGB PIL image from a PIL image or an (H, W, 3) uint8 array.

    Raises:
        BadImage: another type, dtype, shape, colour mode or size.
    """
    if isinstance(image, Image.Image):
        if image.mode != "RGB":
            raise BadImage(f"image: PIL mode {image.mode!r}, want 'RGB'")
        width, height = image.size
    elif isinstance(image, np.ndarray):
        if image.dtype != np.uint8:
            raise BadImage(f"image: dtype {image.dtype}, want uint8")
        if image.ndim != 3 or image.shape[2] != 3:
            raise BadImage(f"image: shape {image.shape}, want (height, width, 3)")
        height, width = image.shape[:2]
    else:
        raise BadImage(f"image: {type(image).__name__}, want a PIL image or a uint8 array")
    if not (MIN_SIDE <= height <= MAX_SIDE and MIN_SIDE <= width <= MAX_SIDE):
        raise BadImage(f"image: {height}x{width} pixels, want sides from {MIN_SIDE} to {MAX_SIDE}")
    if isinstance(image, np.ndarray):
        return Image.fromarray(np.ascontiguousarray(image))
    return image


def as_batch(images: Any, instructions: Any) -> tuple[list[Image.Image], list[Any]]:
    """Check a whole request's lengths and images.

    Raises:
        BadImage: lengths differ, the batch is empty, or an image is unusable (its index is named).
    """
    images, instructions = list(images), list(instructions)
    if len(images) != len(instructions):
        raise BadImage(f"images: {len(images)} images for {len(instructions)} instructions")
    if not images:
        raise BadImage("images: none given")
    checked = []
    for index, image in enumerate(images):
        try:
            checked.append(as_pil(image))
        except BadImage as error:
            raise BadImage(f"images[{index}]: {error}") from error
    return checked, instructions
