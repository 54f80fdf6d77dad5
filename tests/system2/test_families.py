"""Every family on a tiny random checkpoint of its real classes: states, prompts, training, refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from openhelix.runtime.core.files import CheckpointError
from openhelix.system2.engines.transformers import TransformersEngine
from openhelix.system2.families import FAMILIES, squared
from openhelix.system2.latents import KINDS, LatentConfig, LatentHead
from openhelix.system2.model import (
    Checkpoint,
    load_llava,
    load_model,
    load_tokenizer,
    open_checkpoint,
)
from openhelix.system2.train import (
    CHANGES,
    REGIMES,
    ActionTarget,
    RegimeError,
    System2Learner,
    encode_states,
)
from tests.system2 import tiny
from tests.system2.conftest import TEXTS


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A checkpoint of every family."""
    at = tmp_path_factory.mktemp("families")
    return {kind: str(tiny.write_family(at / kind, kind)) for kind in tiny.KINDS}


def test_every_family_is_tried() -> None:
    assert set(tiny.KINDS) == set(FAMILIES)


def engine_of(path: str, **options: Any) -> TransformersEngine:
    return TransformersEngine(path, dtype="float32", device="cpu", **options)


def own_states(engine: TransformersEngine, image: np.ndarray, text: str) -> torch.Tensor:
    """Return the last states (T, hidden) by the whole model's own forward pass."""
    checkpoint = engine.checkpoint
    whole = AutoModelForImageTextToText.from_pretrained(checkpoint.path, dtype=torch.float32)
    whole.eval()
    with torch.no_grad():
        rows = list(checkpoint.act_ids[: engine.head.config.n_act])
        whole.get_input_embeddings().weight[rows] = engine.head.act
    prompt = engine._prompts(text)
    ids = torch.tensor([prompt.expanded(checkpoint.image_token_id)])
    given: dict[str, Any] = checkpoint.family.pixels(
        checkpoint.image_processor(), squared([Image.fromarray(image)], checkpoint.side)
    )
    if "qwen" in checkpoint.kind:
        given["mm_token_type_ids"] = (ids == checkpoint.image_token_id).int()
    if checkpoint.kind == "paligemma":  # <ACT> is of the suffix
        given["token_type_ids"] = torch.zeros_like(ids)
        given["token_type_ids"][:, prompt.layout.act[0] :] = 1
    if checkpoint.kind == "instructblip":
        own = AutoProcessor.from_pretrained(checkpoint.path)
        asked = own.qformer_tokenizer(prompt.text, return_tensors="pt")
        given["qformer_input_ids"] = asked["input_ids"]
    with torch.no_grad():
        found = whole(input_ids=ids, output_hidden_states=True, **given)
    found = getattr(found, "language_model_outputs", found)
    return found.hidden_states[-1][0]


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_the_states_are_those_of_the_models_own_forward_pass(kind: str, folders, images) -> None:
    engine = engine_of(folders[kind], kind="hidden_all", n_act=2)
    prompt = engine._prompts(TEXTS[0])
    found = engine.hidden(images[:1], TEXTS[:1])[0]
    own = own_states(engine, images[0], TEXTS[0])
    assert found.shape == own.shape == (prompt.layout.length, 64)
    assert (found - own).abs().max() < 1e-4
    other = engine.hidden(images[1:2], TEXTS[:1])[0]
    assert (found - other)[slice(*prompt.layout.image)].abs().max() > 1e-4  # it looks


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("read_out", KINDS)
def test_every_read_out_of_every_family(kind: str, read_out: str, folders, images) -> None:
    engine = engine_of(folders[kind], kind=read_out, n_act=2)
    z = engine.encode(images, TEXTS)
    assert z.shape == (3, engine.spec.n_tokens, engine.spec.dim)
    alone = [engine.encode([i], [t]) for i, t in zip(images, TEXTS, strict=True)]
    assert np.abs(z - np.concatenate(alone)).max() < 1e-4


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_read_out_of_words_alone_and_of_middle_layers(kind: str, folders, images) -> None:
    engine = engine_of(folders[kind], kind="lang_mean", layers=[1, 3], vision=False)
    z = engine.encode(images, TEXTS)
    assert np.array_equal(z, engine.encode(images[::-1], TEXTS))
    prompt = engine._prompts(TEXTS[0])
    assert engine.checkpoint.image_token_id not in prompt.ids
    said = load_tokenizer(folders[kind]).decode(list(prompt.ids)[slice(*prompt.layout.words)])
    assert said.strip() == TEXTS[0]


@pytest.mark.parametrize("kind", ["llava", "llava_next", "instructblip", "paligemma"])
def test_the_prompt_is_the_processors_own(kind: str, folders, images) -> None:
    """Of those whose processor loads without torchvision."""
    checkpoint = open_checkpoint(folders[kind])
    processor = AutoProcessor.from_pretrained(folders[kind])
    processor.num_query_tokens = 4
    asked = "Can you open the drawer?"
    picture = squared([Image.fromarray(images[0])], checkpoint.side)[0]
    text = asked
    if kind in ("llava", "llava_next"):
        said = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": asked}]}
        text = processor.apply_chat_template([said], add_generation_prompt=True)
        assert text == "USER: <image>\nCan you open the drawer? ASSISTANT:"
    elif kind == "paligemma":
        text = "<image>" + asked
        processor.image_seq_length = checkpoint.n_image
    own = processor(images=picture, text=text, return_tensors="np")["input_ids"][0]
    prompt = checkpoint.prompts(1)("open the drawer")
    assert prompt.expanded(checkpoint.image_token_id)[:-1] == own.tolist()


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (
            "qwen2_5_vl",
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
            "<|vision_start|>PICTURE<|vision_end|>Can you open the drawer?<|im_end|>\n"
            "<|im_start|>assistant\n",
        ),
        (
            "smolvlm",
            "<|im_start|>User:<fake_token_around_image><global-img>PICTURE"
            "<fake_token_around_image>Can you open the drawer?<end_of_utterance>\nAssistant:",
        ),
        (
            "llava_onevision",
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
            "PICTURE\nCan you open the drawer?<|im_end|>\n<|im_start|>assistant\n",
        ),
    ],
)
def test_the_prompt_is_the_chat_templates(kind: str, text: str, folders) -> None:
    checkpoint = open_checkpoint(folders[kind])
    tokenizer = load_tokenizer(folders[kind])
    word = tokenizer.convert_ids_to_tokens(checkpoint.image_token_id)
    own = tokenizer(text.replace("PICTURE", word * checkpoint.n_image))["input_ids"]
    prompt = checkpoint.prompts(1)("open the drawer")
    assert prompt.expanded(checkpoint.image_token_id)[:-1] == own


def learner_of(checkpoint: Checkpoint, regime: Any, kind: str = "act_last") -> System2Learner:
    torch.manual_seed(0)
    core = checkpoint.family.core(load_model(checkpoint.path, torch.float32)).eval()
    rows = core.get_input_embeddings().weight[: checkpoint.act_ids[0]]
    head = LatentHead.fresh(LatentConfig(kind=kind, n_act=2), rows, dim=16)
    return System2Learner(core, checkpoint, head, regime, lora_rank=2)


def ties(checkpoint: Checkpoint) -> bool:
    """Whether a model's vocabulary layer is its table of words, as one sees in the model itself."""
    model = load_model(checkpoint.path, torch.float32)
    words = model.get_output_embeddings()
    return words is not None and words.weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("regime", REGIMES)
def test_one_training_step_of_every_regime(kind: str, regime: str, folders, images) -> None:
    checkpoint = open_checkpoint(folders[kind], 2)
    if regime == "vocabulary" and not ties(checkpoint):
        with pytest.raises(RegimeError, match="no table of words: no latent would change"):
            learner_of(checkpoint, regime)
        return
    learner = learner_of(checkpoint, regime)
    pictures = [Image.fromarray(i) for i in images]
    learned = learner.learned()
    every = [*learned.head, *learned.act, *learned.language]
    before = [p.detach().clone() for p in every]
    sample = learner(pictures, TEXTS)
    target = ActionTarget(torch.zeros(3, 3), torch.zeros(3, 6), torch.zeros(3))
    losses = learner.losses(sample, target, policy_loss=lambda z: z.square().mean())
    optimiser = torch.optim.SGD(every, lr=0.1)
    torch.stack([x.mean() for x in losses.values()]).sum().backward()
    act = learner.head.act.grad
    if regime == "frozen":
        assert act is None and not learned.act and not learned.language
    else:
        assert act is not None and act.abs().max() > 0
    assert bool(learned.language) == (regime in CHANGES)
    optimiser.step()
    moved = [bool((p.detach() - old).any()) for p, old in zip(every, before, strict=True)]
    assert any(moved[: len(learned.head)])
    if learned.language:
        assert any(moved[len(learned.head) + len(learned.act) :])


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("read_out", ["act_last", "act_words"])
def test_a_cached_prefix_gives_the_same_as_the_engine(
    kind: str, read_out: str, folders, images
) -> None:
    """And so does training without one: three ways to one latent."""
    checkpoint = open_checkpoint(folders[kind], 2)
    learner = learner_of(checkpoint, "prompt", read_out)
    pictures = [Image.fromarray(i) for i in images]
    straight = learner(pictures, TEXTS)
    kept = learner.from_prefix(learner.prefix(pictures, TEXTS))
    assert torch.allclose(straight.z, kept.z, atol=1e-5)
    kept.z.sum().backward()
    by_prefix = learner.head.act.grad.clone()
    learner.head.act.grad = None
    straight.z.sum().backward()
    assert torch.allclose(by_prefix, learner.head.act.grad, atol=1e-4)
    many, _ = encode_states(learner, pictures[:2], [TEXTS[:2], TEXTS[1:]])
    assert torch.allclose(many[0, 0], straight.state[0], atol=1e-5)
    again = learner(pictures[1:2], TEXTS[2:])
    assert torch.allclose(many[1, 1], again.state[0], atol=1e-5)
    engine = engine_of(folders[kind], latent_projector=learner.head)
    assert np.abs(engine.encode(images, TEXTS) - straight.z.detach().numpy()).max() < 1e-4


# ------------------------------------------------------------------------------------------------
# Prompts and pictures that are chosen


def test_a_siglip_llava_with_a_chatml_tokenizer_is_asked_in_chatml(tmp_path: Path) -> None:
    """And its first token is not another family's."""
    path = str(tiny.write_family(tmp_path / "m", "llava_onevision"))
    checkpoint = open_checkpoint(path)
    prompt = checkpoint.prompts(1)("lift it")
    tokenizer = load_tokenizer(path)
    assert tokenizer.decode([prompt.ids[0]]) == "<|im_start|>"
    assert "USER" not in tokenizer.decode(list(prompt.ids))
    vicuna = open_checkpoint(path, prompt="llava_v1")
    assert vicuna.template.name == "llava_v1" != checkpoint.template.name
    assert "ASSISTANT" in tokenizer.decode(list(vicuna.prompts(1)("lift it").ids))
    with pytest.raises(CheckpointError, match="prompt: 'alpaca' is none of checkpoint, llava_v1"):
        open_checkpoint(path, prompt="alpaca")


@pytest.mark.parametrize(
    ("chat", "reason"),
    [
        (None, "has no chat template: choose its prompt, prompt=llava_v1 or chatml"),
        ("{{ nothing.at.all }}", "cannot be read"),
        ("{{ 'hello' }}", "does not show one picture and one sentence"),
        (
            "{% for m in messages %}{{ m.content[-1].text }}<image>{% endfor %}",
            "before the picture",
        ),
    ],
)
def test_a_chat_template_that_makes_no_prompt(
    chat: str | None, reason: str, tmp_path: Path
) -> None:
    path = tiny.write_family(tmp_path / "m", "llava_next")
    file = path / "chat_template.jinja"
    file.unlink()
    if chat is not None:
        file.write_text(chat)
    with pytest.raises(CheckpointError, match=reason):
        open_checkpoint(str(path))
    assert open_checkpoint(str(path), prompt="chatml").template.name == "chatml"


def test_a_chat_template_of_words_alone_and_one_in_json(tmp_path: Path) -> None:
    path = tiny.write_family(tmp_path / "m", "llava_next")
    file = path / "chat_template.jinja"
    file.write_text("{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}")
    template = open_checkpoint(str(path)).template
    assert (template.head, template.body, template.tail) == ("[INST] ", "\n", " [/INST]")
    file.unlink()
    load_tokenizer.cache_clear()
    (path / "chat_template.json").write_text(json.dumps({"chat_template": tiny.VICUNA}))
    template = open_checkpoint(str(path)).template
    assert (template.head, template.body, template.tail) == ("USER: ", "\n", " ASSISTANT:")


def test_the_pictures_size_is_a_choice_where_the_family_leaves_it_open(folders, images) -> None:
    usual, large = (open_checkpoint(folders["qwen2_vl"], image_side=n) for n in (0, 112))
    assert (usual.side, usual.n_image, large.side, large.n_image) == (224, 64, 112, 16)
    assert usual.model_id != large.model_id  # another latent
    engine = engine_of(folders["qwen2_vl"], image_side=112, kind="hidden_all")
    assert engine.encode(images[:1], TEXTS[:1]).shape[1] == 16 + 32 + 1
    with pytest.raises(CheckpointError, match="image_side: 112, a 'llava' has a picture size"):
        open_checkpoint(folders["llava"], image_side=112)
    with pytest.raises(CheckpointError, match="image_side: 5, want 16 to 4096"):
        open_checkpoint(folders["qwen2_vl"], image_side=5)


# ------------------------------------------------------------------------------------------------
# Folders as others write them


def copied(folder: str, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


def changed(folder: Path, **entries: Any) -> None:
    file = folder / "config.json"
    found = json.loads(file.read_text()) | entries
    file.write_text(json.dumps({k: v for k, v in found.items() if v is not None}))


def refused(folder: Path, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(folder), **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_unknown_family_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "idefics3"}')
    said = refused(tmp_path)
    assert "is a 'idefics3', known families are llava (LLaVA-1.5" in said
    assert all(kind in said for kind in FAMILIES)


def test_an_encoder_and_decoder_has_no_end_for_act(folders, tmp_path: Path) -> None:
    folder = copied(folders["instructblip"], tmp_path / "m")
    text = {"model_type": "t5", "d_model": 64, "num_layers": 1, "vocab_size": 384}
    changed(folder, text_config=text, use_decoder_only_language_model=False)
    assert "its language model is a 't5'" in refused(folder)


def test_code_of_its_own_is_not_run_and_an_original_llava_is_told_its_conversion(
    tmp_path: Path,
) -> None:
    vla = tmp_path / "vla"
    vla.mkdir()
    about: dict[str, Any] = {
        "model_type": "openvla",
        "architectures": ["OpenVLAForActionPrediction"],
        "auto_map": {"AutoModelForVision2Seq": "modeling.OpenVLAForActionPrediction"},
    }
    (vla / "config.json").write_text(json.dumps(about))
    (vla / "modeling.py").write_text("raise SystemExit('this was run')")
    said = refused(vla)
    assert "is a 'openvla' (OpenVLAForActionPrediction)" in said and "which is not run" in said
    old = {"model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"]}
    (vla / "config.json").write_text(json.dumps(old | {"mm_vision_tower": "clip"}))
    assert "convert_llava_weights_to_hf.py" in refused(vla)
    (vla / "config.json").unlink()
    assert "holds no config.json" in refused(vla)


@pytest.mark.parametrize("kind", ["llava", "qwen2_5_vl"])
def test_what_is_missing_is_named_with_where_to_get_it(kind: str, folders, tmp_path: Path) -> None:
    folder = copied(folders[kind], tmp_path / "m")
    for file in folder.glob("*processor_config.json"):
        file.unlink()
    with pytest.raises(CheckpointError, match=r"copy preprocessor_config\.json") as caught:
        engine_of(str(folder))
    assert "\n" not in str(caught.value)
    folder = copied(folders[kind], tmp_path / "other")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(CheckpointError, match=r"copy tokenizer\.json|take the tokenizer files"):
        engine_of(str(folder))


@pytest.mark.parametrize("kind", ["llava", "qwen2_vl"])
def test_pickled_weights_are_read_as_tensors_alone(kind: str, folders, tmp_path: Path) -> None:
    folder = copied(folders[kind], tmp_path / "m")
    whole = AutoModelForImageTextToText.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save(whole.state_dict(), folder / "pytorch_model.bin")
    made = open_checkpoint(str(folder))
    assert made.path != str(folder) and list(Path(made.path).glob("*.safetensors"))
    again = load_model(made.path).state_dict()
    assert all(torch.equal(again[k], v) for k, v in whole.state_dict().items())
    assert open_checkpoint(str(folder)).path == made.path

    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"model.x": Evil()}, folder / "pytorch_model.bin")
    assert "pytorch_model.bin cannot be read" in refused(folder)
    assert not (tmp_path / "ran").exists()


def adapter_of(base: str, at: Path) -> Path:
    """A LoRA adapter, trained a little, as peft writes it."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        load_model(base), LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_alpha=4)
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.normal_()
    model.save_pretrained(at)
    return at


@pytest.mark.parametrize("kind", ["llava", "qwen2_vl", "paligemma"])
def test_a_lora_adapter_is_merged_with_its_base(kind: str, folders, images, tmp_path: Path) -> None:
    from peft import PeftModel

    folder = adapter_of(folders[kind], tmp_path / "lora")
    made = open_checkpoint(str(folder))
    base = open_checkpoint(folders[kind])
    assert (made.template, made.n_image) == (base.template, base.n_image)
    assert made.model_id != base.model_id
    own = PeftModel.from_pretrained(load_model(folders[kind], torch.float32), folder)
    own = own.merge_and_unload().state_dict()
    found = load_model(made.path, torch.float32).state_dict()
    assert all(torch.allclose(found[k], v, atol=1e-6) for k, v in own.items())
    a, b = (engine_of(path).encode(images, TEXTS) for path in (folders[kind], str(folder)))
    assert np.abs(a - b).max() > 1e-3


def test_an_adapter_whose_base_is_not_here_or_another(folders, tmp_path: Path) -> None:
    folder = adapter_of(folders["llava"], tmp_path / "lora")
    file = folder / "adapter_config.json"
    about = json.loads(file.read_text())
    file.write_text(json.dumps(about | {"base_model_name_or_path": "/nowhere/llava-7b"}))
    said = refused(folder)
    assert "is an adapter of '/nowhere/llava-7b', which cannot be read here" in said
    assert "write its folder into adapter_config.json" in said
    file.write_text(json.dumps(about | {"base_model_name_or_path": None}))
    assert "base_model_name_or_path: must name a model" in refused(folder)
    file.write_text(json.dumps(about | {"base_model_name_or_path": folders["smolvlm"]}))
    assert "which has no layer for" in refused(folder)
    file.write_text(json.dumps(about))
    (folder / "adapter_model.safetensors").unlink()
    assert "holds no adapter_model.safetensors" in refused(folder)


def test_what_needs_a_llava_says_so(folders) -> None:
    with pytest.raises(CheckpointError, match="is a 'smolvlm', and this needs a 'llava'"):
        load_llava(folders["smolvlm"])
