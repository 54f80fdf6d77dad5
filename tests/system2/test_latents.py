"""Read-outs: shapes, padding, and what each may look at."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import load_file, save_file

from openhelix.runtime.core.files import CheckpointError
from openhelix.system2.latents import (
    KINDS,
    NEEDS_VISION,
    BadReadOut,
    LatentConfig,
    LatentHead,
    MapPool,
    read_out,
)
from openhelix.system2.prompt import Layout

LAYOUT = Layout(length=20, image=(2, 10), text=(11, 16), act=(18, 20), words=(13, 15))
HIDDEN = torch.randn(20, 12, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_as_promised(kind: str) -> None:
    config = LatentConfig(kind=kind, n_act=2, text_rows=9)
    latent, filled = read_out(config, HIDDEN, LAYOUT, MapPool(12))
    assert latent.shape == (config.n_tokens(8), 12 * config.width)
    assert filled.shape == (config.n_tokens(8),)
    assert bool((latent[~filled] == 0).all())


def test_values_come_from_the_right_places() -> None:
    act, _ = read_out(LatentConfig(n_act=2), HIDDEN, LAYOUT)
    assert torch.equal(act, HIDDEN[18:20])
    lang, filled = read_out(LatentConfig(kind="lang", text_rows=6), HIDDEN, LAYOUT)
    assert torch.equal(lang[:5], HIDDEN[11:16])
    assert filled.tolist() == [True] * 5 + [False]
    pooled, _ = read_out(LatentConfig(kind="pool_max"), HIDDEN, LAYOUT)
    assert torch.equal(pooled[0], torch.cat([HIDDEN[2:10], HIDDEN[11:16]]).amax(0))
    mean, _ = read_out(LatentConfig(kind="lang_mean"), HIDDEN, LAYOUT)
    assert torch.equal(mean[0], HIDDEN[13:15].mean(0))
    side, _ = read_out(LatentConfig(kind="act_words", n_act=2), HIDDEN, LAYOUT)
    assert torch.equal(side[0], torch.cat([HIDDEN[18], HIDDEN[19], HIDDEN[13:15].mean(0)]))
    both, _ = read_out(LatentConfig(kind="act_lang", n_act=2, text_rows=4), HIDDEN, LAYOUT)
    assert torch.equal(both, torch.cat([HIDDEN[18:20], HIDDEN[11:15]]))


def test_an_untrained_map_pool_averages() -> None:
    pool = MapPool(12)
    expected = pool.value(torch.cat([HIDDEN[2:10], HIDDEN[11:16]])).mean(0)
    pooled, _ = read_out(LatentConfig(kind="pool_map"), HIDDEN, LAYOUT, pool)
    assert torch.allclose(pooled[0], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"kind": "cls"}, "kind"),
        ({"n_act": 0}, "n_act"),
        ({"text_rows": 0}, "text_rows"),
        ({"layer": -1}, "layer"),
        ({"layer": 3, "layers": (1, 3)}, "layers"),
        ({"layers": (3, 1)}, "layers"),
        ({"layers": (0, 1)}, "layers"),
        ({"layers": (2, 2)}, "layers"),
        *(({"kind": kind, "vision": False}, "vision") for kind in NEEDS_VISION),
    ],
)
def test_impossible_read_outs_are_refused(options, field: str) -> None:
    with pytest.raises(BadReadOut, match=f"latent.{field}"):
        LatentConfig(**options)


def test_a_layer_the_model_lacks_is_refused() -> None:
    with pytest.raises(BadReadOut, match="1 to 3"):
        LatentConfig(kind="act_mid", layer=9).layers_of(4)
    with pytest.raises(BadReadOut, match="1 to 4"):
        LatentConfig(layers=(1, 5)).layers_of(4)
    assert LatentConfig(kind="act_mid").layers_of(4) == (2,)
    assert LatentConfig(kind="lang", layer=3).layers_of(4) == (3,)
    assert LatentConfig(layers=(1, 4)).layers_of(4) == (1, 4)
    assert LatentConfig().layers_of(4) == (4,)


def test_names_tell_what_changes_the_meaning() -> None:
    names = {
        LatentConfig().name,
        LatentConfig(vision=False).name,
        LatentConfig(kind="act_mid").name,
        LatentConfig(kind="act_mid", layer=7).name,
        LatentConfig(kind="act_mid", layers=(1, 7)).name,
        LatentConfig(layer=7).name,
    }
    assert len(names) == 6


@pytest.mark.parametrize("layers", [(), (1, 3)])
def test_head_round_trip(tmp_path, layers: tuple[int, ...]) -> None:
    config = LatentConfig(kind="pool_map", n_act=3, layers=layers)
    head = LatentHead.fresh(config, torch.randn(50, 12), seed=1)
    assert head.projector.in_features == 12 * config.width
    head.save(tmp_path / "h.safetensors", base="x")
    again = LatentHead.load(tmp_path / "h.safetensors")
    assert again.config == head.config
    for name, value in head.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])


def test_a_damaged_head_is_refused(tmp_path) -> None:
    path = tmp_path / "h.safetensors"
    path.write_bytes(b"not a tensor file")
    with pytest.raises(CheckpointError, match=r"latent_projector: .*: not safetensors"):
        LatentHead.load(path)
    head = LatentHead.fresh(LatentConfig(), torch.randn(50, 12))
    head.act.data[0, 0] = float("nan")
    head.save(path)
    with pytest.raises(CheckpointError, match="not finite"):
        LatentHead.load(path)


HEAD = {"latent": asdict(LatentConfig())}


@pytest.mark.parametrize(
    ("about", "change", "said"),
    [
        ("{", {}, "its account of the read-out: not JSON"),
        ("[1]", {}, "its account of the read-out: holds list"),
        ("{}", {}, "latent: must be an object"),
        (json.dumps({"latent": {"kind": 5}}), {}, "latent: kind"),
        (json.dumps({"latent": {"kind": "nope"}}), {}, "latent.kind: 'nope'"),
        (json.dumps({"latent": {"colour": 1}}), {}, "latent: colour: no such field"),
        (json.dumps({"latent": {"n_act": 10**9}}), {}, "are not those of n_act=1000000000"),
        (json.dumps({"latent": {"layers": list(range(1, 99))}}), {}, "98 states side by side"),
        (json.dumps(HEAD), {"act": torch.zeros(3)}, "holds no <ACT> and projector"),
        (json.dumps(HEAD), {"act": None}, "holds no <ACT> and projector"),
        (json.dumps(HEAD), {"projector.weight": torch.zeros(3)}, "holds no <ACT> and projector"),
        (json.dumps(HEAD), {"projector.bias": None}, "projector.bias is missing"),
        (json.dumps(HEAD), {"projector.bias": torch.zeros(3)}, "projector.bias has shape (3,)"),
        (json.dumps(HEAD), {"more": torch.zeros(3)}, "more does not belong there"),
        (json.dumps(HEAD), {"act": torch.full((1, 12), float("inf"))}, "act has values that are"),
        (json.dumps(HEAD), {"act": torch.ones(1, 12).int()}, "act is int32, needs fractions"),
    ],
)
def test_a_head_that_is_not_as_it_says_is_refused_in_one_line(tmp_path, about, change, said):
    path = tmp_path / "h.safetensors"
    LatentHead.fresh(LatentConfig(), torch.randn(50, 12)).save(path)
    state = {k: v for k, v in (load_file(path) | change).items() if v is not None}
    save_file(state, path, metadata={"openhelix": about})
    with pytest.raises(CheckpointError) as caught:
        LatentHead.load(path)
    text = str(caught.value)
    assert text.startswith(f"latent_projector: {path}: ") and said in text and "\n" not in text
