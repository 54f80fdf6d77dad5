"""What is read out of the language model, and how it becomes a latent.

The read-outs are the latent representations of the paper's Table 8:

| kind | tokens | as in |
|---|---|---|
| `act_last` | `n_act` | LCB, OpenHelix: the last layer at `<ACT>` (default) |
| `act_mid` | `n_act` | GR00T-N1: a middle layer at `<ACT>` |
| `act_lang` | `n_act` + text | RoboDual: `<ACT>` and the instruction's hidden states |
| `hidden_all` | image + text + `n_act` | DP-VLA: every hidden state |
| `pool_max` | 1 | HiRT: maximum over image and text |
| `pool_map` | 1 | HiRT: attention pooling with one learned query |
| `lang` | text | DexVLA: the instruction alone |
| `act_words` | 1 | every `<ACT>` and the mean over the instruction's own words, side by side |
| `lang_mean` | 1 | the mean over the instruction's own words, without the question around them |
| `kv` | image + text | π0: every layer's keys and values (before their rotary code), for a policy whose own layers attend to them |

Each can also be had without vision (paper's Table 6): the image is then left out of the
prompt; and after middle layers instead of the last (`layer`, or several of them side by side:
`layers`). Rows that an instruction does not fill are zero, so that the shape is constant.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import ConfigDict
from torch import Tensor, nn
from torch.nn.functional import gelu

from openhelix.runtime.core.files import (
    CheckpointError,
    as_record,
    check_kinds,
    load_tensors,
    parse_object,
    save_tensors,
    told_as,
)
from openhelix.runtime.core.interfaces import SENSES, LatentSpec
from openhelix.system2.model import Checkpoint
from openhelix.system2.prompt import Layout

# ------------------------------------------------------------------------------------------------
# Read-outs


KV = "kv"
KINDS = (
    "act_last",
    "act_mid",
    "act_lang",
    "hidden_all",
    "pool_max",
    "pool_map",
    "lang",
    "act_words",
    "lang_mean",
    KV,
)
AT_ACT = ("act_last", "act_mid", "act_lang", "hidden_all", "act_words")  # read <ACT>
NEEDS_VISION = ("hidden_all", "pool_max", "pool_map", KV)


class BadReadOut(ValueError):
    """A read-out that does not exist or that this engine cannot give."""


@dataclass(frozen=True, slots=True)
class LatentConfig:
    """Which read-out, and its numbers.

    Attributes:
        kind: a row of the table above.
        n_act: how many `<ACT>` tokens end the prompt.
        layer: the number of language-model layers run; 0 runs all (for `act_mid` half).
        text_rows: rows kept for the instruction by `act_lang`, `hidden_all`, `lang` and `kv`.
        vision: False leaves the image out of the prompt.
        layers: ascending; the states after each of them side by side, so that the read-out is
            as many times as wide. Empty: those after `layer` alone; of `kv` all.
        proprio: the robot's own state stands before `<ACT>`, as one projected token (Helix).
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    kind: str = "act_last"
    n_act: int = 1
    layer: int = 0
    text_rows: int = 32
    vision: bool = True
    layers: tuple[int, ...] = ()
    proprio: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))  # a file's list
        if self.kind not in KINDS:
            raise BadReadOut(f"latent.kind: {self.kind!r}, want one of {', '.join(KINDS)}")
        if self.n_act < 1:
            raise BadReadOut(f"latent.n_act: {self.n_act}, want 1 or more")
        if self.text_rows < 1:
            raise BadReadOut(f"latent.text_rows: {self.text_rows}, want 1 or more")
        if self.layer < 0:
            raise BadReadOut(f"latent.layer: {self.layer}, want 0 or a layer's number")
        if self.layer and self.layers:
            raise BadReadOut("latent.layers: say latent.layer or latent.layers, not both")
        if self.layer and self.kind == KV:
            raise BadReadOut("latent.layer: 'kv' reads several; name them in latent.layers")
        if list(self.layers) != sorted({n for n in self.layers if n > 0}):
            raise BadReadOut(f"latent.layers: {list(self.layers)}, want ascending numbers above 0")
        if not self.vision and self.kind in NEEDS_VISION:
            raise BadReadOut(f"latent.vision: {self.kind!r} reads the image's hidden states")
        if self.proprio and self.kind not in AT_ACT:
            raise BadReadOut(
                f"latent.proprio: {self.kind!r} reads nothing behind the robot's state; want "
                f"{', '.join(AT_ACT)}"
            )

    @property
    def rows(self) -> int:
        """How many rows of the embedding table are the read-out's: `<ACT>` and the state's."""
        return self.n_act + self.proprio

    @property
    def plain_only(self) -> bool:
        """Whether only the engine on transformers' own networks gives it."""
        return self.proprio or self.kind == KV

    @property
    def last_token_only(self) -> bool:
        """Whether the sequence's last hidden state is all that is read."""
        return self.kind in ("act_last", "act_mid") and self.n_act == 1

    @property
    def width(self) -> int:
        """How many states stand side by side in a row of the read-out."""
        return max(1, len(self.layers)) * (1 + self.n_act if self.kind == "act_words" else 1)

    def n_tokens(self, n_image: int) -> int:
        """Rows of the latent for a model with `n_image` image tokens."""
        return {
            "act_last": self.n_act,
            "act_mid": self.n_act,
            "act_lang": self.n_act + self.text_rows,
            "hidden_all": n_image + self.text_rows + self.n_act,
            "pool_max": 1,
            "pool_map": 1,
            "lang": self.text_rows,
            "act_words": 1,
            "lang_mean": 1,
            KV: n_image + self.text_rows,
        }[self.kind]

    def numbers(self, checkpoint: Checkpoint) -> int:
        """Return the numbers of a row of the read-out."""
        if self.kind == KV:
            return 2 * checkpoint.kv * len(self.layers_of(checkpoint.layers))
        return checkpoint.hidden * self.width

    def layers_of(self, n_layers: int) -> tuple[int, ...]:
        """Return after how many layers states are read, ascending; `n_layers` is the final state.

        Raises:
            BadReadOut: the model has no such layer.
        """
        if self.layers:
            if self.layers[-1] > n_layers:
                raise BadReadOut(
                    f"latent.layers: {self.layers[-1]}, this model has layers 1 to {n_layers}"
                )
            return self.layers
        if self.kind == KV:
            return tuple(range(1, n_layers + 1))
        if not self.layer and self.kind != "act_mid":
            return (n_layers,)
        layer = self.layer or n_layers // 2
        if not 1 <= layer < n_layers:
            raise BadReadOut(
                f"latent.layer: {layer}, this model has middle layers 1 to {n_layers - 1}"
            )
        return (layer,)

    @property
    def name(self) -> str:
        """The `kind` of the `LatentSpec`, with what changes its meaning."""
        after = ",".join(map(str, self.layers or (self.layer,)))
        name = self.kind + (f"@{after}" if self.layer or self.layers else "")
        name = name if self.vision else name + "-novision"
        return name + SENSES if self.proprio else name

    def spec(self, n_image: int, dim: int, model_id: str) -> LatentSpec:
        """Return what System 2 promises with this read-out."""
        return LatentSpec(self.name, self.n_tokens(n_image), dim, model_id)


class MapPool(nn.Module):
    """Attention pooling with one learned query (HiRT's MAP block, one head-split attention)."""

    def __init__(self, hidden: int, heads: int = 1) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Parameter(torch.zeros(hidden))
        self.key = nn.Linear(hidden, hidden, bias=False)
        self.value = nn.Linear(hidden, hidden, bias=False)

    def forward(self, states: Tensor) -> Tensor:
        """(T, hidden) or (B, T, hidden) to (…, 1, hidden)."""
        width = states.shape[-1] // self.heads
        split = (*states.shape[:-1], self.heads, width)
        key, value = (f(states).reshape(split).transpose(-2, -3) for f in (self.key, self.value))
        query = self.query.reshape(self.heads, 1, width).expand(*key.shape[:-2], 1, width)
        pooled = nn.functional.scaled_dot_product_attention(query, key, value)
        return pooled.transpose(-2, -3).reshape(*states.shape[:-2], 1, states.shape[-1])


PROPRIO, SENSED = 9, 11  # numbers of a robot's state, and what they are told as
REACH_M, WIDTH_M = 0.3, 0.04  # in units of which places and the fingers' width are told


class Sense(nn.Module):
    """The robot's own state as one token of the language model's width.

    Args:
        hidden: of the language model.
    """

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.project = nn.Linear(SENSED, hidden)

    def forward(self, proprio: Tensor) -> Tensor:
        """Return (B, hidden) of states (B, 9), see `openhelix.runtime.core.interfaces.proprio_of`."""
        place, (x, y, z, w) = proprio[:, :3] / REACH_M, proprio[:, 3:7].unbind(1)
        # The first two columns of the rotation: the same for a quaternion and its negative.
        turn = (
            1 - 2 * (y * y + z * z), 2 * (x * y + z * w), 2 * (x * z - y * w),
            2 * (x * y - z * w), 1 - 2 * (x * x + z * z), 2 * (y * z + x * w),
        )  # fmt: skip
        width, opened = proprio[:, 7] / WIDTH_M - 1, 2 * proprio[:, 8] - 1
        told = torch.cat([place, torch.stack([*turn, width, opened], 1)], 1)
        return self.project(told.to(self.project.weight))


def _padded(rows: Tensor, n: int) -> Tensor:
    rows = rows[:n]
    missing = n - rows.shape[0]
    return nn.functional.pad(rows, (0, 0, 0, missing)) if missing else rows


def read_out(
    config: LatentConfig, hidden: Tensor, layout: Layout, pool: MapPool | None = None
) -> tuple[Tensor, Tensor]:
    """Read a latent from one sequence's hidden states.

    Args:
        config: which read-out.
        hidden: (T, d), the states of the wanted layer or layers, T = `layout.length`.
        layout: where image, text and `<ACT>` lie.
        pool: the learned pooling, for `pool_map`.

    Returns:
        the latent (n_tokens, d), and (n_tokens,) bool: which rows are not padding.
    """
    act = hidden[slice(*layout.act)]
    text = hidden[slice(*layout.text)]
    image = hidden[slice(*layout.image)]
    full = torch.ones(act.shape[0], dtype=torch.bool, device=hidden.device)
    one = torch.ones(1, dtype=torch.bool, device=hidden.device)
    filled = torch.arange(config.text_rows, device=hidden.device) < text.shape[0]
    if config.kind in ("act_last", "act_mid"):
        return act, full
    if config.kind == "act_lang":
        return torch.cat([act, _padded(text, config.text_rows)]), torch.cat([full, filled])
    if config.kind == "lang":
        return _padded(text, config.text_rows), filled
    if config.kind == "lang_mean":
        return hidden[slice(*layout.words)].mean(dim=0, keepdim=True), one
    if config.kind == "act_words":
        mean = hidden[slice(*layout.words)].mean(dim=0)
        return torch.cat([act.flatten(), mean]).unsqueeze(0), one
    if config.kind == KV:
        some = torch.ones(image.shape[0], dtype=torch.bool, device=hidden.device)
        return torch.cat([image, _padded(text, config.text_rows)]), torch.cat([some, filled])
    if config.kind == "hidden_all":
        some = torch.ones(image.shape[0], dtype=torch.bool, device=hidden.device)
        rows = torch.cat([image, _padded(text, config.text_rows), act])
        return rows, torch.cat([some, filled, full])
    both = torch.cat([image, text])
    if config.kind == "pool_max":
        return both.amax(dim=0, keepdim=True), one
    if pool is None:
        raise BadReadOut("latent.kind: 'pool_map' needs its learned pooling in the latent weights")
    return pool(both), one


def digest(tensors: dict[str, Tensor]) -> str:
    """Return twelve digits that change with any value of the tensors."""
    made = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().to("cpu", torch.float32).contiguous()
        made.update(f"{name}{tuple(value.shape)}".encode())
        made.update(value.numpy().tobytes())
    return made.hexdigest()[:12]


# ------------------------------------------------------------------------------------------------
# States after middle layers: the language model stops at the last layer that is read.
#
# What lies behind a read-out is never run, so a read-out after layer 8 of 30 costs a quarter of
# one after the last. The model is changed in place and stays so: its later layers go, and in the
# place of its final norm stands `States`, which puts the wanted states side by side. Both
# engines and the training do it with the same two functions, since transformers' language model
# and vLLM's have the same parts (`layers`, `norm`).


class States(nn.Module):
    """In the place of a language model's final norm: the states after several layers.

    The state after the model's very last layer is the one after its norm, as everywhere.

    Args:
        norm: the model's own final norm.
        ends: whether the last of the wanted layers is the model's last.
        alone: what is kept is all that is read: keys and values.
    """

    def __init__(self, norm: nn.Module, ends: bool, alone: bool = False) -> None:
        super().__init__()
        self.norm = norm
        self.ends = ends
        self.alone = alone
        self.kept: list[Tensor] = []

    def keep(self, _: Any, __: Any, output: Any) -> None:
        """Forward hook of a layer below the last, or of keys or values: remember what it gives."""
        self.kept.append(_state(output))

    def forward(self, hidden: Tensor, residual: Tensor | None = None) -> Any:
        """As the norm's: transformers' gives the state, vLLM's takes and gives two parts of it."""
        parts, self.kept = self.kept, []
        if self.alone:
            return torch.cat(parts, dim=-1)
        if self.ends:
            last = self.norm(hidden) if residual is None else self.norm(hidden, residual)[0]
        else:
            last = hidden if residual is None else hidden + residual
        states = torch.cat([*parts, last], dim=-1) if parts else last
        return states if residual is None else (states, states)


def plain_name(name: str) -> str:
    """Return what a weight of a stopped model is called in a whole one: `States` holds its norm."""
    return name.replace("norm.norm.", "norm.")


def stop_after(language_model: Any, wanted: Sequence[int], n_layers: int, kv: bool = False) -> None:
    """Let transformers' `LlamaModel` return the states after `wanted` layers side by side.

    Args:
        language_model: changed in place, once; a second time it must be for the same layers.
        wanted: ascending, 1 to `n_layers`; `n_layers` alone changes nothing.
        n_layers: of the whole model.
        kv: return each layer's keys, then its values, in the place of states.

    Raises:
        ValueError: it was stopped after other layers before.
    """
    asked = (*wanted, KV) if kv else tuple(wanted)
    before = getattr(language_model, "read_after", (n_layers,))
    if asked == before:
        return
    if before != (n_layers,):
        raise ValueError(f"the model gives states after {before}, not after {asked}")
    if kv:
        states = States(language_model.norm, ends=True, alone=True)
        for layer in wanted:
            attention = language_model.layers[layer - 1].self_attn
            for part in (attention.k_proj, attention.v_proj):
                part.register_forward_hook(states.keep)
        language_model.norm = states
    else:
        _tap(language_model, wanted, n_layers)
    language_model.layers = language_model.layers[: wanted[-1]]
    language_model.config.num_hidden_layers = wanted[-1]  # as caches count them
    language_model.read_after = asked


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


# ------------------------------------------------------------------------------------------------
# The few weights that make a frozen LLaVA a System 2: `<ACT>`, projector, pooling.
#
# They are kept apart from the 14 GB (or 280 MB) that never change, in one safetensors file of
# about a megabyte, so that training saves, ships and hot-swaps them alone.


MOST_NUMBERS = 65_536  # of a row of keys and values, as a policy takes at most
LATENT_DIM = 512  # width of the policy's instruction input (paper Appendix A.3; CLIP's width)


class Through(nn.Module):
    """In the place of a projector: the read-out itself is the latent."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_features = self.out_features = width

    def forward(self, latent: Tensor) -> Tensor:
        """Return what is given."""
        return latent


class LatentHead(nn.Module):
    """`<ACT>` embeddings, the projector between the two systems, and the learned pooling.

    The projector is one linear layer, as in the paper's public recipe, or with a hidden layer
    before it (`neck`, GELU) the MLP of the paper's Sec. 5.4. A linear map can only pass on how
    sure the language model is of one task or another; a hidden layer can decide. `kv` has none:
    `dim` is then as wide as a row of the read-out.
    """

    def __init__(
        self, config: LatentConfig, hidden: int, dim: int = LATENT_DIM, width: int = 0
    ) -> None:
        super().__init__()
        self.config = config
        self.hidden = hidden
        self.note: dict[str, Any] = {}  # what training says of it, kept in the file
        self.act = nn.Parameter(torch.zeros(config.n_act, hidden))
        read = dim if config.kind == KV else hidden * config.width
        width = 0 if config.kind == KV else width
        self.neck = nn.Linear(read, width) if width else None
        self.projector: Through | nn.Linear = (
            Through(dim) if config.kind == KV else nn.Linear(width or read, dim)
        )
        self.pool = MapPool(read) if config.kind == "pool_map" else None
        self.sense = Sense(hidden) if config.proprio else None

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

        `<ACT>` starts at the table's mean with its spread, so that its norm is a word's; so does
        the token of the robot's state.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            head = cls(config, table.shape[1], dim, width)
            table = table.detach().to("cpu", torch.float32)
            noise = torch.randn(config.n_act, table.shape[1])
            with torch.no_grad():
                head.act.copy_(table.mean(dim=0) + noise * table.std(dim=0))
                if head.sense is not None:
                    project = head.sense.project
                    noise = torch.randn(table.shape[1], SENSED) / SENSED**0.5
                    project.weight.copy_(noise * table.std(dim=0).unsqueeze(1))
                    project.bias.copy_(table.mean(dim=0))
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
        dim = self.config.numbers(checkpoint) if raw else self.projector.out_features
        return self.config.spec(checkpoint.n_image, dim, self.model_id(checkpoint, raw))

    def save(
        self,
        path: Path | str,
        base: str = "",
        note: dict[str, Any] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Write the head as safetensors; `base` is the model it was trained on."""
        about: dict[str, Any] = {"latent": asdict(self.config), "base": base}
        about["note"] = self.note | (note or {})
        if self.config.kind == KV:
            about["dim"] = self.projector.out_features
        state = {k: v.detach().to("cpu", dtype) for k, v in self.state_dict().items()}
        save_tensors(path, state, {"openhelix": json.dumps(about, sort_keys=True)})

    @classmethod
    def load(cls, path: Path | str) -> LatentHead:
        """Read a head that `save` wrote.

        Raises:
            BadFile: not such a file, or not finite; one line names it.
        """
        with told_as(CheckpointError, "latent_projector"):
            state, metadata = load_tensors(path)
            where = f"{path}: its account of the read-out"
            about = parse_object(metadata.get("openhelix", ""), where)
            latent = about.get("latent")
            if not isinstance(latent, dict):
                raise CheckpointError(f"{where}: latent: must be an object")
            config = as_record(LatentConfig, latent, f"{where}: latent")
            act, projector = state.get("act"), state.get("projector.weight")
            if config.kind == KV and act is not None and act.ndim == 2:
                return cls._of_keys(config, state, about, str(path))
            if act is None or projector is None or act.ndim != 2 or projector.ndim != 2:
                raise CheckpointError(f"{path}: holds no <ACT> and projector")
            (n_act, hidden), (dim, inner) = act.shape, projector.shape
            neck = state.get("neck.weight")
            width = inner if neck is not None else 0
            read = inner if neck is None else neck.shape[-1]
            # Compared before anything of that size is made.
            if (
                config.n_act != n_act
                or hidden * config.width != read
                or (neck is not None and neck.ndim != 2)
            ):
                raise CheckpointError(
                    f"{path}: its tensors are not those of n_act={config.n_act} and "
                    f"{config.width} states side by side"
                )
            head = cls(config, hidden, dim, width)
            load_strictly(head, state, str(path))
            head.note = dict(about.get("note") or {}) if isinstance(about.get("note"), dict) else {}
        return head

    @classmethod
    def _of_keys(
        cls, config: LatentConfig, state: dict[str, Tensor], about: dict[str, Any], path: str
    ) -> LatentHead:
        """Return the head of a file without a projector."""
        dim = about.get("dim")
        if type(dim) is not int or not 0 < dim <= MOST_NUMBERS:
            raise CheckpointError(f"{path}: its account of the read-out: dim: {dim!r}")
        if len(state["act"]) != config.n_act:
            raise CheckpointError(f"{path}: its <ACT> is not that of n_act={config.n_act}")
        head = cls(config, state["act"].shape[1], dim)
        load_strictly(head, state, path)
        return head


def load_strictly(module: nn.Module, state: dict[str, Tensor], where: str) -> None:
    """Load tensors whose names and shapes must be exactly the module's.

    Raises:
        BadFile: naming one that is missing, extra, of another shape or of another kind of number.
    """
    want = {name: tuple(t.shape) for name, t in module.state_dict().items()}
    have = {name: tuple(t.shape) for name, t in state.items()}
    if want != have:
        name, _ = min(set(want.items()) ^ set(have.items()))
        what = "is missing" if name in want else "does not belong there"
        if name in want and name in have:
            what = f"has shape {have[name]}, needs {want[name]}"
        raise CheckpointError(f"{where}: {name} {what}")
    check_kinds(state, where, module.state_dict())
    module.load_state_dict(state)


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
        BadReadOut: the file was trained for another read-out than the one asked for.
        CheckpointError: it does not fit the checkpoint.
    """
    if source is None:
        wanted = config or LatentConfig()
        dim = wanted.numbers(checkpoint) if wanted.kind == KV else LATENT_DIM
        head = LatentHead.fresh(wanted, table, dim, seed=seed)
    else:
        head = source if isinstance(source, LatentHead) else LatentHead.load(source)
        if config is not None and config != head.config:
            raise BadReadOut(f"latent: asked for {config}, the weights are for {head.config}")
    check_fit(head, checkpoint)
    return head.eval().requires_grad_(False)


def check_fit(head: LatentHead, checkpoint: Checkpoint) -> None:
    """Raise unless the head's width, tokens and layer exist in the checkpoint."""
    if head.hidden != checkpoint.hidden:
        raise CheckpointError(
            f"latent_projector: made for width {head.hidden}, the model has {checkpoint.hidden}"
        )
    if head.config.rows > len(checkpoint.act_ids):
        raise CheckpointError(
            f"latent.n_act: {head.config.n_act}, the model has rows for "
            f"{len(checkpoint.act_ids) - head.config.proprio}"
        )
    head.config.layers_of(checkpoint.layers)
    if head.config.kind == KV and head.projector.out_features != head.config.numbers(checkpoint):
        raise CheckpointError(
            f"latent_projector: made for {head.projector.out_features} keys and values of a token, "
            f"the model has {head.config.numbers(checkpoint)}"
        )


def with_act(config: LatentConfig | None, **changes: Any) -> LatentConfig | None:
    """Return `config` (or the default) with the options that are not None; None if none is given."""
    given = {key: value for key, value in changes.items() if value is not None}
    if config is None and not given:
        return None
    return replace(config or LatentConfig(), **given)
