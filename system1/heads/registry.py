"""From a head's name in the configuration to the module."""

from __future__ import annotations

from openhelix.runtime.core.config import ConfigError
from openhelix.system1.config import PolicyConfig
from openhelix.system1.heads.base import DiffusionHead, DirectHead
from openhelix.system1.heads.dit import DitHead
from openhelix.system1.heads.expert import ExpertHead
from openhelix.system1.heads.lstm import LstmHead
from openhelix.system1.heads.plain import PlainHead
from openhelix.system1.heads.trajectory import TrajectoryHead
from openhelix.system1.heads.transformer import MapHead, TransformerHead

HEADS: dict[str, type[DiffusionHead | DirectHead]] = {
    "trajectory": TrajectoryHead,
    "plain": PlainHead,
    "dit": DitHead,
    "lstm": LstmHead,
    "transformer": TransformerHead,
    "map": MapHead,
    "expert": ExpertHead,
}


def build_head(config: PolicyConfig) -> DiffusionHead | DirectHead:
    """Return the head that `config.head` names.

    Raises:
        ConfigError: no head of our own policies has that name.
    """
    if config.head not in HEADS:
        raise ConfigError(f"head: {config.head!r} is not one of {', '.join(sorted(HEADS))}")
    return HEADS[config.head](config)
