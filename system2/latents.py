"""What is read out of the language model: the latent representations of the paper's Table 8.

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

Each can also be had without vision (paper's Table 6): the image is then left out of the
prompt; and after middle layers instead of the last (`layer`, or several of them side by side:
`layers`). Rows that an instruction does not fill are zero, so that the shape is constant.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from openhelix.runtime.core.interfaces import LatentSpec
from openhelix.system2.prompt import Layout

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
)
NEEDS_VISION = ("hidden_all", "pool_max", "pool_map")


class BadLatent(ValueError):
    """A read-out that does not exist or that this engine cannot give."""


@dataclass(frozen=True, slots=True)
class LatentConfig:
    """Which read-out, and its numbers.

    Attributes:
        kind: a row of the table above.
        n_act: how many `<ACT>` tokens end the prompt.
        layer: the number of language-model layers run; 0 runs all (for `act_mid` half).
        text_rows: rows kept for the instruction by `act_lang`, `hidden_all` and `lang`.
        vision: False leaves the image out of the prompt.
        layers: ascending; the states after each of them side by side, so that the read-out is
            as many times as wide. Empty: those after `layer` alone.
    """

    kind: str = "act_last"
    n_act: int = 1
    layer: int = 0
    text_rows: int = 32
    vision: bool = True
    layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))  # a file's list
        if self.kind not in KINDS:
            raise BadLatent(f"latent.kind: {self.kind!r}, want one of {', '.join(KINDS)}")
        if self.n_act < 1:
            raise BadLatent(f"latent.n_act: {self.n_act}, want 1 or more")
        if self.text_rows < 1:
            raise BadLatent(f"latent.text_rows: {self.text_rows}, want 1 or more")
        if self.layer < 0:
            raise BadLatent(f"latent.layer: {self.layer}, want 0 or a layer's number")
        if self.layer and self.layers:
            raise BadLatent("latent.layers: say latent.layer or latent.layers, not both")
        if list(self.layers) != sorted({n for n in self.layers if n > 0}):
            raise BadLatent(f"latent.layers: {list(self.layers)}, want ascending numbers above 0")
        if not self.vision and self.kind in NEEDS_VISION:
            raise BadLatent(f"latent.vision: {self.kind!r} reads the image's hidden states")

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
        }[self.kind]

    def layers_of(self, n_layers: int) -> tuple[int, ...]:
        """Return after how many layers states are read, ascending; `n_layers` is the final state.

        Raises:
            BadLatent: the model has no such layer.
        """
        if self.layers:
            if self.layers[-1] > n_layers:
                raise BadLatent(
                    f"latent.layers: {self.layers[-1]}, this model has layers 1 to {n_layers}"
                )
            return self.layers
        if not self.layer and self.kind != "act_mid":
            return (n_layers,)
        layer = self.layer or n_layers // 2
        if not 1 <= layer < n_layers:
            raise BadLatent(
                f"latent.layer: {layer}, this model has middle layers 1 to {n_layers - 1}"
            )
        return (layer,)

    @property
    def name(self) -> str:
        """The `kind` of the `LatentSpec`, with what changes its meaning."""
        after = ",".join(map(str, self.layers or (self.layer,)))
        name = self.kind + (f"@{after}" if self.layer or self.layers else "")
        return name if self.vision else name + "-novision"

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
    if config.kind == "hidden_all":
        some = torch.ones(image.shape[0], dtype=torch.bool, device=hidden.device)
        rows = torch.cat([image, _padded(text, config.text_rows), act])
        return rows, torch.cat([some, filled, full])
    both = torch.cat([image, text])
    if config.kind == "pool_max":
        return both.amax(dim=0, keepdim=True), one
    if pool is None:
        raise BadLatent("latent.kind: 'pool_map' needs its learned pooling in the latent weights")
    return pool(both), one


def digest(tensors: dict[str, Tensor]) -> str:
    """Return twelve digits that change with any value of the tensors."""
    made = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().to("cpu", torch.float32).contiguous()
        made.update(f"{name}{tuple(value.shape)}".encode())
        made.update(value.numpy().tobytes())
    return made.hexdigest()[:12]
