"""What our network and the published one have in common: schedule, normaliser, sampler in use.

Buffers, none of them in a checkpoint: the schedule and the sampler follow from the
configuration, the normaliser is a file of its own.
"""

from __future__ import annotations

from torch import Tensor, nn

from system1.config import PolicyConfig
from system1.normalizer import Normalizer
from system1.sampler import Plan, make_plan, row_alphas


class DiffusionNetwork(nn.Module):
    """A network that denoises trajectories; its parts are the subclass's."""

    alphas: Tensor
    offset: Tensor
    scale: Tensor

    def __init__(self, config: PolicyConfig, normalizer: Normalizer) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("alphas", row_alphas(config), persistent=False)
        self.register_buffer("offset", normalizer.offset.clone(), persistent=False)
        self.register_buffer("scale", normalizer.scale.clone(), persistent=False)
        self._plan = make_plan(config)

    @property
    def normalizer(self) -> Normalizer:
        """The normaliser, on the model's device."""
        return Normalizer(self.offset, self.scale)

    def use_sampler(self, sampler: str | None = None, steps: int | None = None) -> None:
        """Choose another sampler or number of steps for `sample`."""
        self._plan = make_plan(self.config, sampler, steps)  # type: ignore[arg-type]

    @property
    def plan(self) -> Plan:
        """The sampler in use, on the model's device."""
        if self._plan.clean_out.device != self.offset.device:
            self._plan = self._plan.to(self.offset.device)
        return self._plan
