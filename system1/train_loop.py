"""The loop around a training step: when to log, evaluate, save and stop."""

from __future__ import annotations

import ctypes
import json
import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from openhelix.runtime.core.files import (
    BadFile,
    check_kinds,
    load_tensors,
    read_json,
    replace_file,
    save_tensors,
)
from openhelix.runtime.core.precision import computes_bf16
from openhelix.runtime.core.workers import ALONE, Workers

# ------------------------------------------------------------------------------------------------
# Optimisers of a policy: AdamW, or Muon for the matrices of its hidden layers.
#
# Muon (Jordan et al. 2024) steps along the nearest orthogonal matrix to the momentum, with
# steps as large as AdamW's in the root mean square (Liu et al. 2025), so that one learning
# rate serves both. On two CPU cores, where the number of steps is what is scarce, a policy
# gets in 220 of its steps as far as in 300 of AdamW's, each as long.


OptimizerName = Literal["adamw", "muon"]
OPTIMIZERS: tuple[OptimizerName, ...] = ("adamw", "muon")
NARROWEST = 32  # a matrix with a side below this is an input or an output, not hidden
BETAS = (0.9, 0.95)


def hidden(name: str, p: Tensor) -> bool:
    """Whether Muon takes a parameter: a matrix that is neither table, input nor output."""
    return p.ndim == 2 and min(p.shape) > NARROWEST and "table" not in name


class Muon(torch.optim.Muon):
    """torch's Muon, all matrices of one shape at a time.

    A policy has dozens of small matrices of few shapes; one after the other, their products
    cost a CPU mostly the calls.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take a step; the same as torch's up to the rounding of the products."""
        loss = None if closure is None else closure()
        for group in self.param_groups:
            alike: dict[tuple[int, ...], list[nn.Parameter]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    alike.setdefault(tuple(p.shape), []).append(p)
            for shape, matrices in alike.items():
                self._step_alike(group, shape, matrices)
        return loss

    def _step_alike(
        self, group: dict[str, Any], shape: tuple[int, ...], matrices: list[nn.Parameter]
    ) -> None:
        grads = [p.grad for p in matrices if p.grad is not None]
        for p in matrices:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        momenta: list[Tensor] = [self.state[p]["momentum_buffer"] for p in matrices]
        torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
        ahead = (
            torch._foreach_lerp(grads, momenta, group["momentum"]) if group["nesterov"] else momenta
        )
        turned = orthogonal(torch.stack(list(ahead)), group["ns_coefficients"], group["ns_steps"])
        rate = group["lr"] * 0.2 * max(shape) ** 0.5  # "match_rms_adamw"
        weights: list[Tensor] = list(matrices)
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(weights, list(turned.to(weights[0].dtype).unbind(0)), alpha=-rate)


def orthogonal(x: Tensor, coefficients: tuple[float, float, float], steps: int) -> Tensor:
    """Return the nearest orthogonal matrices of x (N, rows, columns), near enough for bfloat16."""
    a, b, c = coefficients
    flip = x.shape[1] > x.shape[2]
    x = x.bfloat16() if computes_bf16("auto", x.device.type) else x.float()
    x = x.mT if flip else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if flip else x


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
            muon = Muon(
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


# ------------------------------------------------------------------------------------------------
# What a training run must remember to go on as if it had never stopped.
#
# Weights, their exponential moving average, what the optimisers remember, the step and the history of
# losses; all in safetensors and JSON. Randomness needs no state: every step seeds its own
# generator from the run's seed and the step's number. The history is written before the
# weights and the weights say which step they are of, so a run killed between the two goes on
# from whole weights and forgets the rows after them.


STATE, LOG = "train_state.safetensors", "train.json"


class Ema:
    """An exponential moving average of a network's trained parameters.

    It starts short and grows to `decay`, so that the first thousand steps do not weigh on it.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = {n: p.detach().clone() for n, p in trained(model).items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights after step number `step`, counted from 0."""
        keep = min(self.decay, (1 + step) / (10 + step))
        for names in alike(trained(model)):
            averages = [self.values[name] for name in names]
            torch._foreach_lerp_(averages, [p.detach() for p in names.values()], 1 - keep)

    @torch.no_grad()
    def swap(self, model: nn.Module) -> None:
        """Exchange the average and the network's weights; twice is no change."""
        for name, p in trained(model).items():
            kept = p.detach().clone()
            p.copy_(self.values[name])
            self.values[name] = kept


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is divided among workers (FSDP); the two kinds do not mix in one call."""
    return isinstance(tensor, DTensor)


def alike(parameters: dict[str, nn.Parameter]) -> list[dict[str, nn.Parameter]]:
    """Return parameters in two lots: those that are whole, and those that are divided."""
    lots: tuple[dict[str, nn.Parameter], ...] = ({}, {})
    for name, p in parameters.items():
        lots[is_sharded(p)][name] = p
    return [lot for lot in lots if lot]


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor with what other workers have of it; all must ask."""
    found: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return found


def as_divided(tensor: Tensor, like: Tensor) -> Tensor:
    """Return a whole tensor where another is, and divided as that one is."""
    moved = tensor.to(like.device)
    if not isinstance(like, DTensor):
        return moved
    made: Tensor = distribute_tensor(moved, like.device_mesh, like.placements)
    return made


def clip_gradients(parameters: Sequence[nn.Parameter], most: float) -> Tensor:
    """Scale gradients down to a norm of at most `most`, in place; return the norm they had."""
    lots = [list(lot.values()) for lot in alike({str(i): p for i, p in enumerate(parameters)})]
    grads = [[p.grad for p in lot if p.grad is not None] for lot in lots]
    norms = [whole(nn.utils.get_total_norm(lot)) for lot in grads if lot]
    if not norms:
        return torch.zeros(())
    norm = torch.stack(norms).norm()
    for lot in lots:
        nn.utils.clip_grads_with_norm_(lot, most, norm)
    return norm


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that training changes, by name."""
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def cosine_rate(step: int, warmup: int, steps: int, floor: float = 0.05) -> float:
    """Return the share of the top learning rate: linear warm-up, then a cosine to `floor`."""
    if step < warmup:
        return (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    return floor + (1 - floor) * 0.5 * (1 + float(torch.cos(torch.tensor(done * torch.pi))))


def save_state(
    folder: Path,
    model: nn.Module,
    ema: Ema,
    optimizers: Sequence[torch.optim.Optimizer],
    step: int,
    history: list[dict[str, Any]],
    keep: Callable[[str], bool] = lambda name: True,
    write: bool = True,
) -> None:
    """Write the state, each file first under another name.

    Args:
        folder: of the run.
        model: with the newest weights.
        ema: their average.
        optimizers: whatever steps the weights.
        step: steps taken.
        history: rows of the log.
        keep: which of the model's tensors to write, by name; what never changes need not be.
        write: False only gives the worker that writes its share of divided tensors.
    """
    state = model.state_dict()
    tensors: dict[str, Tensor] = {f"model.{n}": t for n, t in state.items() if keep(n)}
    tensors |= {f"ema.{n}": t for n, t in ema.values.items()}
    for name, p in trained(model).items():
        for key, value in memory_of(optimizers, p)[1].items():
            tensors[f"optimizer.{key}.{name}"] = torch.as_tensor(value)
    kept = {}
    for name, tensor in tensors.items():
        all_of_it = whole(tensor.detach())
        if write:
            kept[name] = all_of_it.cpu().clone()
    if not write:
        return
    text = json.dumps({"step": step, "history": history}, indent=1) + "\n"
    replace_file(folder / LOG, text.encode())
    save_tensors(folder / STATE, kept, {"step": str(step)})


def load_state(
    folder: Path,
    model: nn.Module,
    ema: Ema,
    optimizers: Sequence[torch.optim.Optimizer],
    keep: Callable[[str], bool] = lambda name: True,
) -> tuple[int, list[dict[str, Any]]]:
    """Read the state back; return the step to go on with and the history.

    Raises:
        BadFile: the state is damaged, or belongs to another network.
    """
    tensors, about = load_tensors(folder / STATE)
    log = read_json(folder / LOG)
    if not about.get("step", "").isdecimal() or not isinstance(log.get("history"), list):
        raise BadFile(f"{folder / STATE}: does not say at which step it was written")
    step = int(about["step"])
    weights = {n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")}
    learned = {f"ema.{n}" for n in trained(model)}
    if set(weights) != {n for n in model.state_dict() if keep(n)} or not learned <= set(tensors):
        raise BadFile(f"{folder / STATE}: belongs to another network")
    check_kinds(weights, str(folder / STATE), model.state_dict())
    own = model.state_dict()
    weights = {name: as_divided(tensor, own[name]) for name, tensor in weights.items()}
    model.load_state_dict(weights, strict=False)
    for name, p in trained(model).items():
        ema.values[name] = as_divided(tensors[f"ema.{name}"], p)
        moments = {
            key: tensors[f"optimizer.{key}.{name}"]
            for key in ("step", "exp_avg", "exp_avg_sq", "momentum_buffer")
            if f"optimizer.{key}.{name}" in tensors
        }
        owner, _ = memory_of(optimizers, p)
        if moments and owner is not None:
            owner.state[p] = {
                key: value if key == "step" else as_divided(value, p)
                for key, value in moments.items()
            }
    return step, [row for row in log["history"] if row["step"] <= step]


@dataclass(frozen=True, slots=True)
class Curves:
    """One panel of a training's plot: some columns of the history over the step.

    Attributes:
        title: above it.
        unit: of its values, after `factor`.
        lines: column of the history, and what the legend calls it.
        factor: times every value.
        log: a logarithmic axis; otherwise one that begins at 0.
        top: where the axis ends, None for where the values do.
    """

    title: str
    unit: str
    lines: tuple[tuple[str, str], ...]
    factor: float = 1.0
    log: bool = False
    top: float | None = None


LOSSES: Curves = Curves(
    "loss",
    "30 position + 10 rotation + gripper",
    (("loss", "training"), ("val_loss", "held out, average weights")),
    log=True,
)
ERRORS = (
    Curves("position error", "cm", (("val_position_m", ""),), 100.0),
    Curves("rotation error", "degrees", (("val_rotation_rad", ""),), 57.29578),
    Curves("wrong gripper state", "% of rows", (("val_gripper_error", ""),), 100.0),
)
# Okabe and Ito's, told apart by every eye.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def plot_history(path: Path, history: list[dict[str, Any]]) -> None:
    """Draw a policy's losses and, of sampled trajectories, the mean errors over held-out rows."""
    draw_curves(path, (LOSSES, *ERRORS), history)


def draw_curves(path: Path, panels: Sequence[Curves], history: list[dict[str, Any]]) -> None:
    """Draw panels side by side as PNG.

    A line with more than a hundred values is drawn faintly, with its running mean over it: single
    batches jump about by more than a training gains in an hour.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    figure = Figure(figsize=(4.2 * len(panels), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for (key, label), colour in zip(panel.lines, COLOURS, strict=False):
            points = [(r["step"], panel.factor * r[key]) for r in history if r.get(key) is not None]
            points = [point for point in points if point[1] > 0] if panel.log else points
            if not points:
                continue
            steps, values = map(np.asarray, zip(*points, strict=True))
            many = len(values) > 100
            axis.plot(
                steps, values, color=colour, lw=0.7 if many else 1.6, alpha=0.3 if many else 1
            )
            if many:
                axis.plot(*running_mean(steps, values), color=colour, lw=1.6)
            axis.plot([], [], color=colour, label=label)
        axis.set(xlabel="step", ylabel=panel.unit, title=panel.title)
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        if not axis.lines:
            axis.text(0.5, 0.5, "not measured yet", transform=axis.transAxes, ha="center")
            axis.set_yticks([])
        elif panel.log:
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=12))
            axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.yaxis.set_minor_locator(NullLocator())
        else:
            axis.set_ylim(0, panel.top or 1.05 * axis.get_ylim()[1])
        axis.set_xlim(left=0)
        if len(panel.lines) > 1 and axis.lines:
            axis.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.2))
    figure.savefig(path, dpi=120)


def running_mean(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean over a fiftieth of the values, at the middle of each window."""
    width = max(3, len(values) // 50)
    kernel = np.ones(width) / width
    return np.convolve(steps, kernel, "valid"), np.convolve(values, kernel, "valid")


log = logging.getLogger(__name__)


class Run(Protocol):
    """A training run: what it has done, and how it goes on."""

    step: int
    history: list[dict[str, Any]]

    def train_step(self) -> dict[str, float]:
        """Take one step, count it, and return what is to be logged of it."""

    def evaluate(self) -> dict[str, float]:
        """Return the validation figures."""

    def save(self) -> None:
        """Write everything that is needed to go on."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How many steps, and how often the rest is done.

    `deadline_ns` is monotonic: the run ends, saved, with the first step after it; 0 for none.
    """

    steps: int
    eval_every: int
    save_every: int
    log_every: int
    deadline_ns: int = 0


class Watch(Protocol):
    """Is shown a training while it goes on: a bar on a terminal, a file of curves."""

    def __call__(self, row: Mapping[str, Any], pace: Pace, logged: bool) -> None:
        """Take what a step returned, and whether its row is one of the history's."""


def deadline_after(seconds: float) -> int:
    """Return the monotonic time in so many seconds; 0 ("none") for 0."""
    return time.monotonic_ns() + int(seconds * 1e9) if seconds > 0 else 0


def run_loop(run: Run, pace: Pace, watch: Watch | None = None, workers: Workers = ALONE) -> bool:
    """Train to the last step or the deadline; return whether the last step was reached.

    The first worker's clock says for all whether it is too late.
    """
    begun = time.monotonic_ns()
    before = float(run.history[-1]["seconds"]) if run.history else 0.0
    while run.step < pace.steps:
        row: dict[str, Any] = run.train_step()
        done = run.step >= pace.steps
        now = time.monotonic_ns()
        late = bool(workers.firsts(0 < pace.deadline_ns <= now))
        keep = run.step % pace.log_every == 0
        if run.step % pace.eval_every == 0 or done or late:
            row |= run.evaluate()
            keep = True
        if keep:
            run.history.append({**row, "seconds": before + (now - begun) * 1e-9})
            if workers.first:
                log.info("%s", " ".join(f"{k}={v:.5g}" for k, v in row.items()))
        if watch is not None and workers.first:
            watch(row, pace, keep)
        if run.step % pace.save_every == 0 or done or late:
            run.save()
        if late:
            break
    return run.step >= pace.steps


# ------------------------------------------------------------------------------------------------
# Keeping freed memory: what a training step gives back, the next one needs again.
#
# A step allocates and frees the same few hundred megabytes. The C library hands large blocks
# straight back to the kernel, which must find and clear every page anew a moment later: on a
# CPU that is a tenth to a quarter of a step.


# glibc's malloc.h
TRIM_THRESHOLD, TOP_PAD, MMAP_MAX = -1, -2, -4
NEVER = 2**31 - 1
AT_ONCE = 64 * 2**20  # the heap grows by so much


def keep_freed_memory() -> bool:
    """Let this process keep what it frees; return whether the C library can be told so."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # another C library
        return False
    settings = ((MMAP_MAX, 0), (TRIM_THRESHOLD, NEVER), (TOP_PAD, AT_ONCE))
    return all([bool(mallopt(name, value)) for name, value in settings])
