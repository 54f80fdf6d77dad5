"""Fast modes beside the exact one, each optional, each with a name that reports carry.

- bf16: weights and activations in bfloat16; positions, rotary codes, the sampler and
  farthest point sampling stay in float32 or float64.
- compile: `torch.compile` of one denoising evaluation.
- CUDA graph: the whole chunk, encoder to last denoising step, captured once for each shape of
  input and replayed; the launch of some ten thousand small kernels is most of a GPU's time
  here. When capture fails the sampler goes on eagerly and says why.
"""

from __future__ import annotations

import logging
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from openhelix.system1.actor import DiffuserActor
from openhelix.system1.checkpoint import Network
from openhelix.system1.diffusion import Noise, draw_noise
from openhelix.system1.geometry import Inputs
from openhelix.system1.model import gaussian, rows_to_poses

log = logging.getLogger(__name__)

NORMS_IN_FP32 = (nn.BatchNorm2d,)  # running statistics lose too much in bfloat16


def to_bf16(model: Network) -> Network:
    """Turn a network's weights to bfloat16 in place and return it."""
    for module in model.modules():
        if isinstance(module, NORMS_IN_FP32):
            continue
        for name, p in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(p.detach().bfloat16(), requires_grad=False))
    return model


def compile_denoiser(model: Network) -> Network:
    """Compile the denoising evaluation in place and return the network.

    The first call takes minutes and needs a C++ compiler on a CPU; later processes find the
    result in the compiler's cache. The weights are frozen into the program: compile last,
    after loading and after `to_bf16`. On a CPU most of the time is in products and softmax,
    which the compiler leaves as they are: expect a tenth in float32 and nothing in bfloat16.
    """
    head: Any = model.prediction_head if isinstance(model, DiffuserActor) else model.head
    cpu = model.offset.device.type == "cpu"
    head.denoise = torch.compile(head.denoise, dynamic=False, options={"freezing": cpu})
    return model


class GraphedSampler:
    """`sample_inputs` by CUDA graph, with an eager fall-back that says why."""

    def __init__(self, model: Network) -> None:
        self.model = model
        self.reason = ""  # why the last capture failed; "" while graphs are in use
        self._graphs: dict[tuple[Any, ...], _Captured] = {}

    @torch.inference_mode()
    def sample_inputs(self, inputs: Inputs, noise: Noise | None = None) -> Tensor:
        """Return what the network's own `sample_inputs` returns."""
        model = self.model
        device = model.offset.device
        if device.type != "cuda":
            self.reason = self.reason or f"the policy is on {device.type}, graphs need cuda"
        if self.reason:
            return model.sample_inputs(inputs, noise)
        table = model.sampler
        source = noise or gaussian(None)
        first, drawn = draw_noise(table, inputs.batch, model.config.horizon, source)
        key = (table.timesteps, table.multistep, *weights_at(model), *signature(inputs))
        with torch.cuda.device(device):  # streams and graphs belong to the current one
            if key not in self._graphs:
                try:
                    self._graphs[key] = _Captured(model, inputs, first, drawn)
                except RuntimeError as error:
                    self.reason = f"capture failed: {error}".splitlines()[0]
                    log.warning("CUDA graph: %s; running eagerly", self.reason)
                    torch.cuda.synchronize(device)
                    rows, logits = model.denoise_inputs(inputs, first, drawn)
                    return finish(model, rows, logits)
            rows, logits = self._graphs[key].replay(inputs, first, drawn)
        return finish(model, rows, logits)


def finish(model: Network, rows: Tensor, logits: Tensor) -> Tensor:
    """Return trajectories (B, T, 8) for the sampler's rows and logits."""
    return rows_to_poses(model.normalizer.denormalize(rows.float()), logits.float())


def weights_at(model: Network) -> tuple[Any, ...]:
    """Return where the weights are: a graph reads these addresses, whatever is there later.

    Weights that change in place are seen by the graph; weights that were replaced (another
    precision, another device) need a new one.
    """
    first = next(model.parameters())
    return first.data_ptr(), first.dtype


def signature(inputs: Inputs) -> tuple[Any, ...]:
    """Return the shapes of inputs; one graph serves one signature."""
    out: list[Any] = []
    for field in fields(inputs):
        value = getattr(inputs, field.name)
        parts = value if isinstance(value, tuple) else (value,)
        out.append(tuple(None if p is None else tuple(p.shape) for p in parts))
    return tuple(out)


def clone_inputs(inputs: Inputs) -> Inputs:
    """Return a deep copy."""
    copies: dict[str, Any] = {}
    for field in fields(inputs):
        value = getattr(inputs, field.name)
        if isinstance(value, tuple):
            copies[field.name] = tuple(v.clone() for v in value)
        elif value is not None:
            copies[field.name] = value.clone()
    return replace(inputs, **copies)


def copy_inputs(target: Inputs, source: Inputs) -> None:
    """Copy into tensors whose addresses a graph has remembered."""
    for field in fields(source):
        new, old = getattr(source, field.name), getattr(target, field.name)
        if isinstance(new, tuple):
            for a, b in zip(old, new, strict=True):
                a.copy_(b)
        elif new is not None:
            old.copy_(new)


class _Captured:
    """One graph and the tensors it reads and writes."""

    def __init__(self, model: Network, inputs: Inputs, first: Tensor, drawn: Tensor | None) -> None:
        self.inputs = clone_inputs(inputs)
        self.first = first.clone()
        self.drawn = None if drawn is None else drawn.clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # capture needs libraries and allocator warmed up
            for _ in range(3):
                model.denoise_inputs(self.inputs, self.first, self.drawn)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.out = model.denoise_inputs(self.inputs, self.first, self.drawn)

    def replay(self, inputs: Inputs, first: Tensor, drawn: Tensor | None) -> tuple[Tensor, Tensor]:
        copy_inputs(self.inputs, inputs)
        self.first.copy_(first)
        if self.drawn is not None and drawn is not None:
            self.drawn.copy_(drawn)
        self.graph.replay()
        return self.out[0].clone(), self.out[1].clone()
