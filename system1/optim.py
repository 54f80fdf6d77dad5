"""Optimisers of a policy: AdamW, or Muon for the matrices of its hidden layers.

Muon (Jordan et al. 2024) steps along the nearest orthogonal matrix to the momentum, with
steps as large as AdamW's in the root mean square (Liu et al. 2025), so that one learning
rate serves both. On two CPU cores, where the number of steps is what is scarce, a policy
gets in 220 of its steps as far as in 300 of AdamW's, each as long.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

OptimizerName = Literal["adamw", "muon"]
OPTIMIZERS: tuple[OptimizerName, ...] = ("adamw", "muon")
NARROWEST = 32  # a matrix with a side below this is an input or an output, not hidden
BETAS = (0.9, 0.95)


def hidden(name: str, p: Tensor) -> bool:
    """Whether Muon takes a parameter: a matrix that is neither table, input nor output."""
    return p.ndim == 2 and min(p.shape) > NARROWEST and "table" not in name


class Optimizers:
    """One or two optimisers that share parameters, learning rate and weight decay."""

    def __init__(
        self, parameters: dict[str, nn.Parameter], name: OptimizerName, lr: float, decay: float
    ) -> None:
        matrices = {n: p for n, p in parameters.items() if name == "muon" and hidden(n, p)}
        rest = {n: p for n, p in parameters.items() if n not in matrices}
        groups = [
            {"params": [p for p in rest.values() if p.ndim > 1], "weight_decay": decay},
            {"params": [p for p in rest.values() if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.parts: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=lr, betas=BETAS)]
        if matrices:
            muon = torch.optim.Muon(
                matrices.values(), lr=lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw"
            )
            self.parts.append(muon)

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def step(self, rate: float) -> None:
        """Take a step at a learning rate."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = rate
            part.step()


def memory_of(
    parts: Sequence[torch.optim.Optimizer], p: nn.Parameter
) -> tuple[torch.optim.Optimizer | None, dict[str, Any]]:
    """Return the optimiser that steps a parameter and what it remembers of it."""
    for part in parts:
        if any(q is p for group in part.param_groups for q in group["params"]):
            return part, part.state.get(p, {})
    return None, {}
