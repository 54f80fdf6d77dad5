"""In which precision this machine computes: bfloat16 where that is native, else float32.

Where it is not, torch emulates it: on a CPU with AVX2 alone it takes several times as long as float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch


def pick_dtype(name: str) -> torch.dtype:
    """Return the named dtype; "auto" is bfloat16 where the machine computes it natively.

    Raises:
        ValueError: an unknown name.
    """
    import torch

    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name != "auto":
        if name not in dtypes:
            raise ValueError(f"dtype: {name!r}, want auto, {', '.join(dtypes)}")
        return dtypes[name]
    native = computes_bf16("auto", "cuda" if torch.cuda.is_available() else "cpu")
    return torch.bfloat16 if native else torch.float32


def computes_bf16(wanted: bool | Literal["auto"], device: str) -> bool:
    """Whether to compute in bfloat16; "auto" where the device does so natively."""
    import torch

    if isinstance(wanted, bool):
        return wanted
    if device.startswith("cuda"):
        return bool(torch.cuda.is_bf16_supported())
    capable = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capable.get("avx512_bf16") or capable.get("amx_bf16"))
