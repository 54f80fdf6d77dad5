"""The few weights that make a frozen LLaVA a System 2: `<ACT>`, projector, pooling.

They are kept apart from the 14 GB (or 280 MB) that never change, in one safetensors file of
about a megabyte, so that training saves, ships and hot-swaps them alone.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import gelu

from openhelix.runtime.core.interfaces import LatentSpec
from openhelix.system2.latents import BadLatent, LatentConfig, MapPool, digest, read_out
from openhelix.system2.model import Checkpoint, CheckpointError
from openhelix.system2.prompt import Layout

LATENT_DIM = 512  # width of the policy's instruction input (paper Appendix A.3; CLIP's width)


class LatentHead(nn.Module):
    """`<ACT>` embeddings, the projector between the two systems, and the learned pooling.

    The projector is one linear layer, as in the paper's public recipe, or with a hidden layer
    before it (`neck`, GELU) the MLP of the paper's Sec. 5.4. A linear map can only pass on how
    sure the language model is of one task or another; a hidden layer can decide.
    """

    def __init__(
        self, config: LatentConfig, hidden: int, dim: int = LATENT_DIM, width: int = 0
    ) -> None:
        super().__init__()
        self.config = config
        self.hidden = hidden
        self.note: dict[str, Any] = {}  # what training says of it, kept in the file
        self.act = nn.Parameter(torch.zeros(config.n_act, hidden))
        read = hidden * config.width
        self.neck = nn.Linear(read, width) if width else None
        self.projector = nn.Linear(width or read, dim)
        self.pool = MapPool(read) if config.kind == "pool_map" else None

    @classmethod
    def fresh(
        cls,
        config: LatentConfig,
        table: Tensor,
        dim: int = LATENT_DIM,
        seed: int = 0,
        width: int = 0,
    ) -> LatentHead:
        """Return an untrained head for a model with the embedding table `table` (V, hidden).

        `<ACT>` starts at the table's mean with its spread, so that its norm is a word's.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            head = cls(config, table.shape[1], dim, width)
            table = table.detach().to("cpu", torch.float32)
            noise = torch.randn(config.n_act, table.shape[1])
            with torch.no_grad():
                head.act.copy_(table.mean(dim=0) + noise * table.std(dim=0))
        return head

    def project(self, latent: Tensor, filled: Tensor) -> Tensor:
        """(…, n, hidden) and (…, n) bool to (…, n, dim); padding stays zero."""
        if self.neck is not None:
            latent = gelu(self.neck(latent))
        return self.projector(latent) * filled.unsqueeze(-1)

    def forward(self, hidden: Tensor, layout: Layout, raw: bool = False) -> Tensor:
        """One sequence's states (T, hidden) to its latent (n_tokens, dim), or raw (…, hidden)."""
        latent, filled = read_out(self.config, hidden, layout, self.pool)
        return latent if raw else self.project(latent, filled)

    def model_id(self, checkpoint: Checkpoint, raw: bool) -> str:
        """Identity of everything that shapes the latent: the LLaVA, its prompt, these weights."""
        tensors = dict(self.state_dict())
        if raw:
            tensors = {
                k: v for k, v in tensors.items() if not k.startswith(("neck.", "projector."))
            }
        return f"{checkpoint.model_id}-{checkpoint.template.name}-{digest(tensors)}"

    def spec(self, checkpoint: Checkpoint, raw: bool) -> LatentSpec:
        """Return what an engine with this head promises."""
        dim = self.hidden * self.config.width if raw else self.projector.out_features
        return self.config.spec(checkpoint.n_image, dim, self.model_id(checkpoint, raw))

    def save(self, path: Path | str, base: str = "", note: dict[str, Any] | None = None) -> None:
        """Write the head as safetensors; `base` is the model it was trained on."""
        about = {"latent": asdict(self.config), "base": base, "note": self.note | (note or {})}
        state = {
            k: v.detach().to("cpu", torch.float32).contiguous()
            for k, v in self.state_dict().items()
        }
        save_file(state, path, metadata={"openhelix": json.dumps(about, sort_keys=True)})

    @classmethod
    def load(cls, path: Path | str) -> LatentHead:
        """Read a head that `save` wrote.

        Raises:
            CheckpointError: not such a file, or not finite.
        """
        try:
            with safe_open(path, framework="pt") as stream:
                about = json.loads((stream.metadata() or {}).get("openhelix", "null"))
                state = {key: stream.get_tensor(key) for key in stream.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"latent_projector: cannot read {str(path)!r}: {error}"
            ) from error
        if not about or "act" not in state or "projector.weight" not in state:
            raise CheckpointError(f"latent_projector: {str(path)!r} holds no <ACT> and projector")
        if not all(bool(value.isfinite().all()) for value in state.values()):
            raise CheckpointError(f"latent_projector: {str(path)!r} has values that are not finite")
        dim, inner = state["projector.weight"].shape
        hidden = state["act"].shape[1]
        width = inner if "neck.weight" in state else 0
        head = cls(LatentConfig(**about["latent"]), hidden, dim, width)
        head.load_state_dict(state)
        head.note = dict(about.get("note") or {})
        return head


def head_for(
    checkpoint: Checkpoint,
    config: LatentConfig | None,
    source: LatentHead | Path | str | None,
    table: Tensor,
    seed: int = 0,
) -> LatentHead:
    """Return the head an engine starts with, checked against its checkpoint.

    Args:
        checkpoint: the LLaVA.
        config: the wanted read-out; None takes the file's, or the default.
        source: a head, a file that `LatentHead.save` wrote, or None for an untrained one.
        table: the embedding table (V, hidden).
        seed: of the untrained one.

    Raises:
        BadLatent: the file was trained for another read-out than the one asked for.
        CheckpointError: it does not fit the checkpoint.
    """
    if source is None:
        head = LatentHead.fresh(config or LatentConfig(), table, seed=seed)
    else:
        head = source if isinstance(source, LatentHead) else LatentHead.load(source)
        if config is not None and config != head.config:
            raise BadLatent(f"latent: asked for {config}, the weights are for {head.config}")
    check_fit(head, checkpoint)
    return head.eval().requires_grad_(False)


def check_fit(head: LatentHead, checkpoint: Checkpoint) -> None:
    """Raise unless the head's width, tokens and layer exist in the checkpoint."""
    if head.hidden != checkpoint.hidden:
        raise CheckpointError(
            f"latent_projector: made for width {head.hidden}, the model has {checkpoint.hidden}"
        )
    if head.config.n_act > len(checkpoint.act_ids):
        raise CheckpointError(
            f"latent.n_act: {head.config.n_act}, the model has rows for {len(checkpoint.act_ids)}"
        )
    head.config.layers_of(checkpoint.layers)


def with_act(config: LatentConfig | None, **changes: Any) -> LatentConfig | None:
    """Return `config` (or the default) with the options that are not None; None if none is given."""
    given = {key: value for key, value in changes.items() if value is not None}
    if config is None and not given:
        return None
    return replace(config or LatentConfig(), **given)
