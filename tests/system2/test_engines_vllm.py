"""vLLM gives what transformers gives, swaps `<ACT>` in place, and survives bad requests."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor

from openhelix.runtime.core.files import BadFile, CheckpointError
from openhelix.runtime.observe.metrics import Library
from openhelix.system2.engines.transformers import TransformersEngine
from openhelix.system2.engines.vllm import VllmEngine, serving_folder
from openhelix.system2.engines.vllm_plugin import real_hasattr, real_vars
from openhelix.system2.latents import BadReadOut, LatentHead
from openhelix.system2.model import open_checkpoint
from openhelix.system2.prompt import BadImage, BadInstruction
from tests.system2 import tiny
from tests.system2.conftest import TEXTS

# ------------------------------------------------------------------------------------------------
# The engine


@pytest.fixture(scope="module")
def vllm(tiny_model: str) -> Iterator[VllmEngine]:
    engine = VllmEngine(tiny_model, dtype="float32", max_batch=4)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def plain(tiny_model: str) -> TransformersEngine:
    return TransformersEngine(tiny_model, dtype="float32", device="cpu")


def test_equal_to_transformers(vllm, plain, images) -> None:
    a, b = plain.encode(images, TEXTS), vllm.encode(images, TEXTS)
    assert a.shape == (3, 1, 512)
    assert a.dtype == b.dtype == np.float32
    assert np.abs(a - b).max() < 1e-4
    assert vllm.spec == plain.spec


def test_a_request_does_not_depend_on_its_batch(vllm, images) -> None:
    together = vllm.encode(images, TEXTS)
    alone = np.concatenate([vllm.encode([i], [t]) for i, t in zip(images, TEXTS, strict=True)])
    assert np.abs(together - alone).max() < 1e-4


@pytest.mark.slow
def test_a_weight_that_is_not_finite_is_refused(tiny_model, tmp_path) -> None:
    shutil.copytree(tiny_model, tmp_path / "llava")
    state = load_file(tmp_path / "llava" / "model.safetensors")
    name = next(name for name in state if name.endswith("mlp.down_proj.weight"))
    state[name].view(-1)[3] = float("nan")
    save_file(state, tmp_path / "llava" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadFile, match=r"down_proj\.weight has values that are not finite"):
        VllmEngine(str(tmp_path / "llava"), dtype="float32", untrained=True)


def test_what_vllm_counts_is_there_for_prometheus(vllm, images) -> None:
    vllm.encode(images, TEXTS)
    samples = {s.name: s.value for f in Library("vllm:").collect() for s in f.samples}
    assert samples["vllm:prompt_tokens_total"] > 3 * len(TEXTS)
    assert samples["vllm:num_requests_waiting"] == samples["vllm:num_requests_running"] == 0


def test_bad_requests_leave_the_engine_working(vllm, images) -> None:
    before = vllm.encode(images[:1], TEXTS[:1])
    with pytest.raises(BadImage, match=r"images\[1\].*float32.*want uint8"):
        vllm.encode([images[0], images[1].astype(np.float32)], TEXTS[:2])
    with pytest.raises(BadInstruction, match=r"instructions\[0\].*<image"):
        vllm.encode(images[:1], ["lift <image> the block"])
    assert np.abs(vllm.encode(images[:1], TEXTS[:1]) - before).max() < 1e-5


def test_what_a_failed_call_left_behind_is_not_finished_by_the_next(
    vllm, images, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = vllm.encode(images[:1], ["push the block"])
    engine = vllm._llm.llm_engine

    def lost() -> None:
        raise RuntimeError("device lost")

    with monkeypatch.context() as patch:
        patch.setattr(engine, "step", lost)
        with pytest.raises(RuntimeError, match="device lost"):
            vllm.encode(images[:2], ["open the drawer", "lift"])
    assert not engine.has_unfinished_requests()
    assert np.allclose(vllm.encode(images[:1], ["push the block"]), before, atol=1e-6)


def test_the_search_for_kernels_sees_real_attributes_only() -> None:
    class Answers:
        kernel = "a class attribute"

        def __getattribute__(self, name: str) -> object:
            raise AssertionError(f"asked for {name}")

    answers = Answers()
    object.__setattr__(answers, "mine", 1)
    assert dict(real_vars(answers)) == {"mine": 1}
    assert real_vars(3) == {}
    assert real_hasattr(answers, "__dict__")
    assert not real_hasattr(3, "__dict__")
    assert real_hasattr(3, "real")
    assert real_vars(np)["ndarray"] is np.ndarray
    assert real_vars(Answers)["kernel"] == "a class attribute"


@pytest.mark.parametrize("width", [0, 24])  # without and with a hidden layer in the projector
def test_swap_changes_the_latent_on_both(vllm, plain, images, width: int, tmp_path: Path) -> None:
    old, old_spec = vllm.encode(images, TEXTS), vllm.spec
    head = LatentHead.fresh(vllm.head.config, plain._table(), seed=7, width=width)
    head.save(tmp_path / "head.safetensors")
    original = vllm.head
    try:
        assert vllm.swap(tmp_path / "head.safetensors") == plain.swap(head)
        a, b = plain.encode(images, TEXTS), vllm.encode(images, TEXTS)
        assert np.abs(a - b).max() < 1e-4
        assert np.abs(b - old).max() > 1e-2
        assert vllm.spec.spec_id != old_spec.spec_id
    finally:
        vllm.swap(original)
        plain.swap(original)
    assert np.abs(vllm.encode(images, TEXTS) - old).max() < 1e-5


def test_a_layer_that_the_model_lacks_is_refused_before_it_is_loaded(tiny_model: str) -> None:
    with pytest.raises(BadReadOut, match="layers 1 to 4"):
        VllmEngine(tiny_model, kind="lang_mean", layers=[1, 5])


def test_middle_layers_equal_transformers(tiny_model: str, images) -> None:
    options = {"kind": "lang_mean", "layers": [1, 3], "dtype": "float32"}
    a = TransformersEngine(tiny_model, device="cpu", **options)
    b = VllmEngine(tiny_model, **options)
    assert a.spec == b.spec
    x, y = a.states(images, TEXTS), b.states(images, TEXTS)
    assert x.shape == (3, 1, 128)
    assert np.abs(x - y).max() < 1e-5
    together = b.encode(images, TEXTS)
    alone = np.concatenate([b.encode([i], [t]) for i, t in zip(images, TEXTS, strict=True)])
    assert np.abs(together - alone).max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    "read_out",
    [
        {"kind": "act_mid"},
        {"kind": "act_mid", "layers": [2, 4]},
        {"kind": "act_last", "layer": 1},
        {"kind": "act_lang", "layers": [1, 2, 3]},
        {"kind": "pool_map", "layer": 2},
        {"kind": "act_words", "layers": [1, 3]},
        {"kind": "lang_mean"},
    ],
)
def test_every_layer_equals_transformers(read_out, tiny_model: str, images) -> None:
    a = TransformersEngine(tiny_model, dtype="float32", device="cpu", **read_out)
    b = VllmEngine(tiny_model, dtype="float32", **read_out)
    assert np.abs(a.encode(images, TEXTS) - b.encode(images, TEXTS)).max() < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["act_lang", "act_words", "hidden_all", "pool_max", "pool_map", "lang", "lang_mean"]
)
def test_every_token_kind_equals_transformers(kind: str, tiny_model: str, images) -> None:
    options = {"kind": kind, "n_act": 2, "dtype": "float32"}
    a = TransformersEngine(tiny_model, device="cpu", **options).encode(images, TEXTS)
    b = VllmEngine(tiny_model, **options).encode(images, TEXTS)
    assert np.abs(a - b).max() < 1e-4


@pytest.mark.slow
def test_a_full_size_layout_without_vision_tower_level(tmp_path: Path, images) -> None:
    path = str(tiny.write_llava_15_like(tmp_path / "llava", vocab=384))
    a = TransformersEngine(path, dtype="float32", device="cpu").encode(images, TEXTS)
    b = VllmEngine(path, dtype="float32").encode(images, TEXTS)
    assert np.abs(a - b).max() < 1e-4


@pytest.mark.slow
def test_without_vision(tiny_model: str, images) -> None:
    options = {"vision": False, "dtype": "float32"}
    a = TransformersEngine(tiny_model, device="cpu", **options).encode(images, TEXTS)
    b = VllmEngine(tiny_model, **options).encode(images, TEXTS)
    assert np.abs(a - b).max() < 1e-4
    assert np.abs(a[0] - a[1]).max() > 1e-3


@pytest.mark.slow
def test_the_laptop_model_equals_transformers(images) -> None:
    a = TransformersEngine("laptop", dtype="float32", device="cpu").encode(images, TEXTS)
    b = VllmEngine("laptop", dtype="float32").encode(images, TEXTS)
    # The trained projector gives numbers up to 23, of which float32 keeps seven digits.
    assert np.abs(a - b).max() < 2e-5 * np.abs(a).max()


# ------------------------------------------------------------------------------------------------
# The folder that vLLM is given: the same weights, a tokenizer of two words


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OPENHELIX_CACHE", str(tmp_path))
    return tmp_path


def test_an_image_becomes_the_same_tokens_and_pixels(tiny_model: str, cache: Path) -> None:
    checkpoint = open_checkpoint(tiny_model)
    served = serving_folder(checkpoint)
    assert Path(served).is_relative_to(cache)
    assert served == serving_folder(checkpoint)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8))
    full, lean = (AutoProcessor.from_pretrained(path) for path in (tiny_model, served))
    word = full.image_token
    assert lean.image_token == word
    theirs, ours = (p(text=word, images=[image], return_tensors="np") for p in (full, lean))
    tokens = [int(t) for t in np.asarray(ours["input_ids"]).ravel()]
    assert tokens == [checkpoint.image_token_id] * checkpoint.n_image
    assert tokens == [t for t in theirs["input_ids"].ravel() if t == checkpoint.image_token_id]
    assert np.array_equal(np.asarray(theirs["pixel_values"]), np.asarray(ours["pixel_values"]))
    assert len(lean.tokenizer) == 2


def test_weights_are_links_and_the_words_are_left_out(tiny_model: str, cache: Path) -> None:
    served = Path(serving_folder(open_checkpoint(tiny_model)))
    weights = list(served.glob("*.safetensors"))
    assert weights and all(file.is_symlink() and file.exists() for file in weights)
    assert not (served / "tokenizer.json").is_symlink()
    assert (served / "config.json").read_text() == (Path(tiny_model) / "config.json").read_text()


def test_what_is_no_folder_or_says_no_word_stays_as_it_is(tiny_model: str, cache: Path) -> None:
    checkpoint = open_checkpoint(tiny_model)
    bare = cache / "bare"
    bare.mkdir()
    for file in Path(tiny_model).iterdir():
        if file.name != "processor_config.json":
            (bare / file.name).symlink_to(file)
    for path in (str(bare), "owner/model"):
        assert serving_folder(replace(checkpoint, path=path)) == path


# ------------------------------------------------------------------------------------------------
# Other families


@pytest.mark.slow
def test_a_picture_in_tiles_equals_transformers(tmp_path: Path, images) -> None:
    path = str(tiny.write_family(tmp_path / "next", "llava_next"))
    served = VllmEngine(path, kind="hidden_all", dtype="float32")
    try:
        plain = TransformersEngine(
            path, latent_projector=served.head, dtype="float32", device="cpu"
        )
        assert plain.spec == served.spec
        assert np.abs(served.encode(images, TEXTS) - plain.encode(images, TEXTS)).max() < 1e-4
    finally:
        served.close()


@pytest.mark.parametrize(
    ("kind", "changed", "said"),
    [
        ("smolvlm", {}, "a 'smolvlm' is given by the engine transformers, not by vllm"),
        ("paligemma", {}, "a 'paligemma' is given by the engine transformers, not by vllm"),
        ("qwen2_5_vl", {}, "vLLM reads the pictures of a 'qwen2_5_vl' with torchvision"),
        (
            "llava",
            {"vision_feature_layer": [-2, -1]},
            r"vision_feature_layer: \[-2, -1\], and vLLM",
        ),
    ],
)
def test_what_vllm_does_not_serve_is_one_line(
    kind: str, changed: dict, said: str, tmp_path: Path, images
) -> None:
    if kind == "qwen2_5_vl" and importlib.util.find_spec("torchvision") is not None:
        pytest.skip("torchvision is here")
    path = str(tiny.write_family(tmp_path / "m", kind, **changed))
    with pytest.raises(CheckpointError, match=said) as caught:
        VllmEngine(path, dtype="float32")
    assert "\n" not in str(caught.value)
    plain = TransformersEngine(path, dtype="float32", device="cpu")
    assert np.isfinite(plain.encode(images, TEXTS)).all()
