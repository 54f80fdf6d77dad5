"""States after middle layers: the language model stops at the last layer that is read.

What lies behind a read-out is never run, so a read-out after layer 8 of 30 costs a quarter of
one after the last. The model is changed in place and stays so: its later layers go, and in the
place of its final norm stands `States`, which puts the wanted states side by side. Both
engines and the training do it with the same two functions, since transformers' language model
and vLLM's have the same parts (`layers`, `norm`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class States(nn.Module):
    """In the place of a language model's final norm: the states after several layers.

    The state after the model's very last layer is the one after its norm, as everywhere.

    Args:
        norm: the model's own final norm.
        ends: whether the last of the wanted layers is the model's last.
    """

    def __init__(self, norm: nn.Module, ends: bool) -> None:
        super().__init__()
        self.norm = norm
        self.ends = ends
        self.kept: list[Tensor] = []

    def keep(self, _: Any, __: Any, output: Any) -> None:
        """Forward hook of a layer below the last: remember its state."""
        self.kept.append(_state(output))

    def forward(self, hidden: Tensor, residual: Tensor | None = None) -> Any:
        """As the norm's: transformers' gives the state, vLLM's takes and gives two parts of it."""
        parts, self.kept = self.kept, []
        if self.ends:
            last = self.norm(hidden) if residual is None else self.norm(hidden, residual)[0]
        else:
            last = hidden if residual is None else hidden + residual
        states = torch.cat([*parts, last], dim=-1) if parts else last
        return states if residual is None else (states, states)


def stop_after(language_model: Any, wanted: Sequence[int], n_layers: int) -> None:
    """Let transformers' `LlamaModel` return the states after `wanted` layers side by side.

    Args:
        language_model: changed in place, once; a second time it must be for the same layers.
        wanted: ascending, 1 to `n_layers`; `n_layers` alone changes nothing.
        n_layers: of the whole model.

    Raises:
        ValueError: it was stopped after other layers before.
    """
    wanted = tuple(wanted)
    before = getattr(language_model, "read_after", (n_layers,))
    if wanted == before:
        return
    if before != (n_layers,):
        raise ValueError(f"the model gives states after {before}, not after {wanted}")
    _tap(language_model, wanted, n_layers)
    language_model.layers = language_model.layers[: wanted[-1]]
    language_model.config.num_hidden_layers = wanted[-1]  # as caches count them
    language_model.read_after = wanted


def stop_vllm_after(language_model: Any, wanted: Sequence[int], n_layers: int) -> None:
    """As `stop_after`, for vLLM's `LlamaModel`, which runs its layers up to `end_layer`.

    Raises:
        ValueError: its layers are spread over several processes.
    """
    wanted = tuple(wanted)
    if wanted == (n_layers,):
        return
    if (language_model.start_layer, language_model.end_layer) != (0, n_layers):
        raise ValueError("latent.layer: vLLM gives middle layers without pipeline stages only")
    _tap(language_model, wanted, n_layers)
    language_model.end_layer = wanted[-1]


def _tap(language_model: Any, wanted: Sequence[int], n_layers: int) -> None:
    states = States(language_model.norm, wanted[-1] == n_layers)
    for layer in wanted[:-1]:
        language_model.layers[layer - 1].register_forward_hook(states.keep)
    language_model.norm = states


def _state(output: Any) -> Tensor:
    """Return the state of a layer's output; vLLM leaves the last addition to the next layer."""
    if isinstance(output, Tensor):
        return output
    hidden, *rest = output
    return hidden if not rest or rest[0] is None else hidden + rest[0]
