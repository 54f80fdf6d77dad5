"""The plain engine: every read-out, batching, swapping, and input that is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration

from openhelix.runtime.core.files import CheckpointError
from openhelix.system2.engines import base
from openhelix.system2.engines.transformers import TransformersEngine
from openhelix.system2.latents import KINDS, BadReadOut, LatentConfig, LatentHead
from openhelix.system2.prompt import BadImage, BadInstruction
from tests.system2.conftest import TEXTS


@pytest.fixture(scope="module")
def engine(tiny_model: str) -> TransformersEngine:
    return TransformersEngine(tiny_model, dtype="float32", device="cpu")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_what_its_spec_says(kind: str, tiny_model: str, images) -> None:
    made = TransformersEngine(tiny_model, kind=kind, n_act=2, dtype="float32", device="cpu")
    z = made.encode(images, TEXTS)
    assert z.shape == (3, made.spec.n_tokens, made.spec.dim)
    assert z.dtype == np.float32
    alone = np.concatenate([made.encode([i], [t]) for i, t in zip(images, TEXTS, strict=True)])
    assert np.abs(z - alone).max() < 1e-4
    width = made.head.config.numbers(made.checkpoint)
    assert made.states(images, TEXTS).shape == (3, made.spec.n_tokens, width)


def test_it_is_the_hidden_state_that_transformers_itself_gives(engine, images) -> None:
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    path = engine.checkpoint.path
    model = LlavaForConditionalGeneration.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        row = engine.checkpoint.act_ids[0]
        model.get_input_embeddings().weight[row] = engine.head.act[0]
    text = "<|im_start|>user\n<image>\nCan you open the drawer?<|im_end|>\n<|im_start|>assistant\n<ACT>"
    inputs = AutoProcessor.from_pretrained(path)(
        images=Image.fromarray(images[0]), text=text, return_tensors="pt"
    )
    with torch.inference_mode():
        states = model(**inputs, output_hidden_states=True).hidden_states[-1][:, -1]
    ours = engine.states(images[:1], ["open the drawer"])[:, 0]
    assert np.abs(ours - states.numpy()).max() < 1e-4


def test_image_and_text_both_matter(engine, images) -> None:
    z = engine.encode([images[0], images[1], images[0]], ["push it", "push it", "lift it"])
    assert np.abs(z[0] - z[1]).max() > 1e-4
    assert np.abs(z[0] - z[2]).max() > 1e-3


def test_arrays_and_pil_images_are_the_same(engine, images) -> None:
    a = engine.encode(images[:1], TEXTS[:1])
    b = engine.encode([Image.fromarray(images[0])], TEXTS[:1])
    assert np.array_equal(a, b)


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (np.zeros((32, 32, 3), dtype=np.float32), "float32"),
        (np.zeros((32, 32), dtype=np.uint8), "shape"),
        (np.zeros((3, 32, 32), dtype=np.uint8), "shape"),
        (np.zeros((32, 32, 4), dtype=np.uint8), "shape"),
        (np.zeros((5, 32, 3), dtype=np.uint8), "5x32"),
        (np.zeros((32, 9000, 3), dtype=np.uint8), "32x9000"),
        (Image.new("L", (32, 32)), "PIL mode 'L'"),
        ("picture.png", "str"),
        (None, "NoneType"),
    ],
)
def test_bad_images(engine, images, image, reason: str) -> None:
    with pytest.raises(BadImage, match=rf"images\[1\].*{reason}"):
        engine.encode([images[0], image], TEXTS[:2])


def test_lengths_must_agree(engine, images) -> None:
    with pytest.raises(BadImage, match="2 images for 1"):
        engine.encode(images[:2], TEXTS[:1])
    with pytest.raises(BadImage, match="none given"):
        engine.encode([], [])


def test_bad_instructions_name_their_place(engine, images) -> None:
    for text in ("", "do <ACT>", "x " * 500):
        with pytest.raises(BadInstruction, match=r"instructions\[1\]"):
            engine.encode(images[:2], ["push it", text])


def test_bf16_is_close(tiny_model: str, engine, images) -> None:
    half = TransformersEngine(tiny_model, dtype="bfloat16", device="cpu").encode(images, TEXTS)
    full = engine.encode(images, TEXTS)
    cosine = (half * full).sum(-1) / np.linalg.norm(half, axis=-1) / np.linalg.norm(full, axis=-1)
    assert cosine.min() > 0.995


def test_swap_refuses_what_does_not_fit(engine, images) -> None:
    before = engine.encode(images, TEXTS)
    with pytest.raises(CheckpointError, match="width 32"):
        engine.swap(LatentHead(LatentConfig(), hidden=32))
    with pytest.raises(CheckpointError, match="started with"):
        engine.swap(LatentHead(LatentConfig(n_act=2), hidden=64))
    with pytest.raises(
        CheckpointError, match=r"latent_projector: /nowhere.safetensors: no such file"
    ):
        engine.swap("/nowhere.safetensors")
    assert np.array_equal(engine.encode(images, TEXTS), before)


def test_raw_gives_the_hidden_state_and_another_identity(tiny_model: str, engine, images) -> None:
    raw = TransformersEngine(tiny_model, dtype="float32", device="cpu", raw=True)
    assert raw.spec.dim == 64
    assert raw.spec.spec_id != engine.spec.spec_id
    assert np.allclose(raw.encode(images, TEXTS), engine.states(images, TEXTS), atol=1e-5)


def test_a_dtype_that_does_not_exist(tiny_model: str) -> None:
    with pytest.raises(ValueError, match="dtype: 'int3'"):
        TransformersEngine(tiny_model, dtype="int3")


def test_blind_is_a_black_picture(tiny_model: str, images) -> None:
    sighted = TransformersEngine(tiny_model, dtype="float32", device="cpu")
    blind = TransformersEngine(tiny_model, dtype="float32", device="cpu", blind=True)
    seen = sighted.encode(images[:1], TEXTS[:1])
    unseen = blind.encode(images[:1], TEXTS[:1])
    assert np.array_equal(unseen, sighted.encode([np.zeros_like(images[0])], TEXTS[:1]))
    assert np.abs(seen - unseen).max() > 1e-4
    assert blind.spec == sighted.spec


def test_another_picture_or_none_is_shown_in_the_place_of_the_one_given(
    tiny_model: str, images, tmp_path
) -> None:
    def made(shown: str, kind: str = "lang_mean") -> TransformersEngine:
        return TransformersEngine(
            tiny_model, kind=kind, dtype="float32", device="cpu", shown=shown, seed=1
        )

    file, others = tmp_path / "others.npy", np.stack([images[2], images[1]])
    np.save(file, others)
    given, none, other = (made(shown) for shown in ("given", "none", str(file)))
    z = given.encode(images[:1], TEXTS[:1])
    assert given.spec == none.spec == other.spec
    # Which one it is depends on the picture alone.
    found = other.encode([images[0], images[0]], [TEXTS[0]] * 2)
    assert np.allclose(found[0], found[1], atol=1e-5)
    assert any(np.allclose(found[0], given.encode([i], TEXTS[:1])[0], atol=1e-5) for i in others)
    assert np.abs(none.encode(images[:1], TEXTS[:1]) - z).max() > 1e-4
    a, b = (none.encode(images[i : i + 1], TEXTS[:1]) for i in (0, 1))
    assert np.allclose(a, b, atol=1e-6)  # nothing of the image is left
    with pytest.raises(BadReadOut, match="pool_max"):
        made("none", "pool_max")
    with pytest.raises(ValueError, match=r"shown: 'half' is neither given, none"):
        made("half")
    np.save(file, np.zeros((2, 4, 4), np.uint8))
    with pytest.raises(ValueError, match=r"holds uint8\(2, 4, 4\)"):
        made(str(file))


def test_a_middle_state_is_the_models_own(tiny_model: str, images) -> None:
    """Stopping after a layer gives what the whole model has there."""
    from transformers import LlavaForConditionalGeneration

    engine = TransformersEngine(
        tiny_model, kind="lang_mean", layers=[1, 3], dtype="float32", device="cpu"
    )
    prompt = engine._prompts(TEXTS[0])
    whole = LlavaForConditionalGeneration.from_pretrained(tiny_model, dtype=torch.float32).model
    ids = torch.tensor([prompt.expanded(engine.checkpoint.image_token_id)])
    embeddings = whole.get_input_embeddings()(ids)
    start, stop = prompt.layout.image
    with torch.no_grad():
        embeddings[:, start:stop] = engine.image_features([Image.fromarray(images[0])])
        states = whole.language_model(
            inputs_embeds=embeddings, output_hidden_states=True
        ).hidden_states
    words = slice(*prompt.layout.words)
    wanted = torch.cat([states[1][0, words], states[3][0, words]], -1).mean(0)
    found = torch.from_numpy(engine.states(images[:1], TEXTS[:1]))[0, 0]
    assert torch.allclose(found, wanted, atol=1e-5)
    text = engine.checkpoint.prompts(1).tokenize
    said = [
        prompt.expanded(engine.checkpoint.image_token_id)[i] for i in range(*prompt.layout.words)
    ]
    assert said == text(" " + TEXTS[0])[0]


def test_untrained_is_random_even_where_weights_are_shipped(
    tiny_model: str, images, monkeypatch
) -> None:
    real = base.open_checkpoint
    monkeypatch.setattr(
        base, "open_checkpoint", lambda _, n_act, *others: real(tiny_model, n_act, *others)
    )
    monkeypatch.setattr(base.LatentHead, "load", lambda path: pytest.fail(f"{path} was read"))
    engine = TransformersEngine("laptop", untrained=True, device="cpu")
    assert engine.untrained and engine.encode(images[:1], ["lift"]).any()


STATES = np.array(
    [[0.1, 0.0, 0.5, 0.0, 0.0, 0.6, 0.8, 0.08, 1.0], [0.1, 0.0, 0.5, 0, 0, 0, 1.0, 0.02, 0.0]],
    np.float32,
)


def test_the_robots_own_state_is_a_token_before_act(tiny_model: str, images, tmp_path) -> None:
    made = TransformersEngine(
        tiny_model, proprio=True, n_act=2, kind="act_lang", dtype="float32", device="cpu"
    )
    made.warm_up()
    assert made.spec.senses and made.spec.kind == "act_lang+proprio"
    shown, said = [images[0]] * 2, TEXTS[:1] * 2
    z = made.encode(shown, said, STATES)
    assert np.abs(z[0, :2] - z[1, :2]).max() > 1e-3
    assert np.abs(z[0, 2:] - z[1, 2:]).max() < 1e-5  # the words stand before it
    alone = np.concatenate(
        [made.encode([i], [t], [s]) for i, t, s in zip(shown, said, STATES, strict=True)]
    )
    assert np.abs(z - alone).max() < 1e-4
    turned = STATES.copy()
    turned[:, 3:7] *= -1  # the same rotation
    assert np.abs(made.encode(shown, said, turned) - z).max() < 1e-5
    made.head.save(tmp_path / "latent.safetensors")
    again = TransformersEngine(
        tiny_model, latent_projector=tmp_path / "latent.safetensors", dtype="float32", device="cpu"
    )
    assert again.spec == made.spec
    assert np.abs(again.encode(shown, said, STATES) - z).max() < 1e-6


def test_training_gives_what_the_engine_gives(tiny_model: str, images) -> None:
    from openhelix.system2.prompt import as_pil
    from openhelix.system2.train import RegimeError, System2Learner

    made = TransformersEngine(tiny_model, proprio=True, dtype="float32", device="cpu")
    model = LlavaForConditionalGeneration.from_pretrained(tiny_model, dtype=torch.float32).model
    learner = System2Learner(model.eval(), made.checkpoint, made.head, "lora")
    pictures, said = [as_pil(image) for image in images[:2]], TEXTS[:2]
    sample = learner(pictures, said, proprio=torch.from_numpy(STATES))
    assert np.abs(sample.z.detach().numpy() - made.encode(images[:2], said, STATES)).max() < 1e-4
    sample.z.square().sum().backward()
    assert learner.head.sense is not None
    assert float(learner.head.sense.project.weight.grad.abs().max()) > 0
    assert not learner.cacheable
    with pytest.raises(RegimeError, match="proprio: this read-out also reads the robot's state"):
        learner(pictures, said)


@pytest.mark.parametrize(
    ("proprio", "message"),
    [
        (None, "proprio: this System 2 also reads the robot's state; none was given"),
        ([None], r"proprio: \(1, 0\), want \(1, 9\)"),
        ([np.full(9, np.nan)], "finite numbers"),
        ([STATES[0], STATES[1]], r"proprio: \(2, 9\), want \(1, 9\)"),
    ],
)
def test_states_that_are_none_are_refused(tiny_model: str, images, proprio, message) -> None:
    made = TransformersEngine(tiny_model, proprio=True, dtype="float32", device="cpu")
    with pytest.raises(ValueError, match=message):
        made.encode(images[:1], TEXTS[:1], proprio)


def test_a_state_goes_with_a_read_out_that_reads_it(engine, tiny_model: str, images) -> None:
    with pytest.raises(ValueError, match="proprio: this System 2 reads no robot's state"):
        engine.encode(images[:1], TEXTS[:1], STATES[:1])
    with pytest.raises(BadReadOut, match=r"latent.proprio: 'lang' reads nothing behind"):
        LatentConfig("lang", proprio=True)
    with pytest.raises(CheckpointError, match=r"n_act: 8, this checkpoint has 1 to 7"):
        engine.checkpoint.prompts(8, proprio=True)


@pytest.mark.parametrize("layers", [None, (1, 3)])
def test_keys_and_values_are_those_of_every_layer(tiny_model: str, images, layers) -> None:
    made = TransformersEngine(
        tiny_model, kind="kv", layers=layers, text_rows=20, dtype="float32", device="cpu"
    )
    checkpoint = made.checkpoint
    n, which = checkpoint.n_image, layers or range(1, checkpoint.layers + 1)
    z = made.encode(images[:1], TEXTS[:1])[0]
    assert made.spec.dim == z.shape[1] == 2 * checkpoint.kv * len(which)
    assert np.array_equal(z, made.states(images[:1], TEXTS[:1])[0])  # no projector between

    model = LlavaForConditionalGeneration.from_pretrained(tiny_model, dtype=torch.float32).eval()
    prompt = checkpoint.prompts(1)(TEXTS[0])
    at, words = slice(*prompt.layout.image), slice(*prompt.layout.text)
    pixels = checkpoint.image_processor()([Image.fromarray(images[0])], return_tensors="pt")
    ids = torch.tensor([prompt.expanded(checkpoint.image_token_id)])
    with torch.inference_mode():
        out = model(input_ids=ids, **pixels, use_cache=True, output_hidden_states=True)
        for place, number in enumerate(which):
            values = out.past_key_values.layers[number - 1].values[0].transpose(0, 1).flatten(1)
            layer = model.model.language_model.layers[number - 1]
            keys = layer.self_attn.k_proj(layer.input_layernorm(out.hidden_states[number - 1]))[0]
            for half, wanted in enumerate((keys, values)):
                start = (2 * place + half) * checkpoint.kv
                found = torch.from_numpy(z[:, start : start + checkpoint.kv])
                torch.testing.assert_close(found[:n], wanted[at], atol=1e-4, rtol=1e-4)
                said = wanted[words]
                torch.testing.assert_close(found[n : n + len(said)], said, atol=1e-4, rtol=1e-4)
                assert not found[n + len(said) :].any()


def test_keys_and_values_learn_with_low_ranks(tiny_model: str, images, tmp_path) -> None:
    from openhelix.system2.prompt import as_pil
    from openhelix.system2.train import System2Learner

    made = TransformersEngine(tiny_model, kind="kv", dtype="float32", device="cpu")
    model = LlavaForConditionalGeneration.from_pretrained(tiny_model, dtype=torch.float32).model
    learner = System2Learner(model.eval(), made.checkpoint, made.head, "lora")
    shown, said = [as_pil(images[0])], TEXTS[:1]
    before = learner(shown, said).z.detach()
    assert np.abs(before.numpy() - made.encode(images[:1], said)).max() < 1e-4
    with torch.no_grad():
        for name, parameter in learner.named_parameters():
            if "layers.0.self_attn.k_proj.lora_B" in name:
                parameter.add_(0.1)
    moved = (learner(shown, said).z - before).abs()
    assert float(moved[..., : made.checkpoint.kv].max()) > 1e-3  # the first layer's own keys
    made.head.save(tmp_path / "latent.safetensors")
    assert (
        LatentHead.load(tmp_path / "latent.safetensors").spec(made.checkpoint, False) == made.spec
    )
    short = LatentHead.fresh(LatentConfig("kv"), torch.zeros(9, 64), 8)
    with pytest.raises(CheckpointError, match="made for 8 keys and values of a token"):
        TransformersEngine(tiny_model, latent_projector=short)
    with pytest.raises(BadReadOut, match=r"latent.layer: 'kv' reads several"):
        LatentConfig("kv", layer=2)
