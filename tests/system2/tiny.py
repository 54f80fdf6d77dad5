"""Tiny random LLaVA checkpoints: the real classes, a few hundred kilobytes, made in a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from openhelix.system2.model import VisionShape, write_llava

WORDS = [
    "Can you lift the red block? move the slider to the left, open the drawer",
    "turn on the light bulb user assistant push the blue block right pink",
]
SHAPE = VisionShape(image_size=32, patch_size=16, width=32, layers=2, heads=2)


def tokenizer(extra: list[str]) -> Any:
    """A byte-level BPE tokenizer that knows a few dozen words."""
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=extra,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(WORDS * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=model, bos_token=extra[0], eos_token=extra[1], pad_token=extra[1]
    )


def text_config(vocab: int) -> LlamaConfig:
    """A two-layer Llama with grouped keys, as SmolLM2 has them."""
    return LlamaConfig(
        vocab_size=vocab,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=2,  # width 32: the least that CPU attention has
        num_key_value_heads=1,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )


def write_laptop_like(folder: Path) -> Path:
    """A checkpoint made the way the laptop model is."""
    folder.mkdir(parents=True, exist_ok=True)
    words = tokenizer(["<|im_start|>", "<|im_end|>"])
    torch.manual_seed(0)
    language = LlamaForCausalLM(text_config(len(words)))
    write_llava(folder, language, words, SHAPE, None, 0, "tiny", "chatml")
    return folder


def write_llava_15_like(folder: Path, vocab: int) -> Path:
    """A checkpoint laid out as llava-hf/llava-1.5-7b-hf: no `<ACT>`, vocabulary of `vocab` rows."""
    folder.mkdir(parents=True, exist_ok=True)
    words = tokenizer(["<s>", "</s>"])
    words.add_special_tokens({"extra_special_tokens": ["<image>", "<pad>"]})
    torch.manual_seed(1)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
        ),
        text_config=text_config(vocab),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        image_seq_length=4,
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    images = CLIPImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
    )
    LlavaProcessor(
        image_processor=images,
        tokenizer=words,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=VICUNA,
    ).save_pretrained(folder)
    return folder


# ------------------------------------------------------------------------------------------------
# One tiny checkpoint of every family, laid out as its published ones are.

VICUNA = (
    "{% for message in messages %}{% if message['role'] == 'user' %}USER: {% endif %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n{% endif %}"
    "{% endfor %}{% for part in message['content'] %}{% if part['type'] == 'text' %}"
    "{{ part['text'] }}{% endif %}{% endfor %} {% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
CHATML = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}PICTURE{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
IDEFICS = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}:{% else %}: {% endif %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% else %}<image>{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
KINDS = (
    *("llava", "llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl"),
    *("instructblip", "paligemma", "smolvlm"),
)


def _words(begin: str, end: str, more: list[str], bos: bool = False) -> Any:
    """A tokenizer with a model's own tokens; `bos` puts the first before every text."""
    words = tokenizer([begin, end])
    words.add_special_tokens({"extra_special_tokens": more})
    if bos:
        from tokenizers.processors import TemplateProcessing

        words.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{begin} $A", special_tokens=[(begin, words.bos_token_id)]
        )
    return words


def _tower(kind: str, **others: Any) -> Any:
    import transformers

    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2)
    return getattr(transformers, kind)(**(sizes | dict(image_size=28, patch_size=14) | others))


def _text(kind: str, rows: int, **others: Any) -> Any:
    import transformers

    said = text_config(rows).to_dict()
    names = (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
        *("num_attention_heads", "num_key_value_heads", "max_position_embeddings"),
    )
    return getattr(transformers, kind)(**({name: said[name] for name in names} | others))


def write_family(folder: Path, kind: str, **changed: Any) -> Path:
    """A random checkpoint of a family, with the files that such a folder has."""
    import transformers

    folder.mkdir(parents=True, exist_ok=True)
    chat, special = VICUNA, ["<image>", "<pad>"]
    if kind in ("qwen2_vl", "qwen2_5_vl"):
        chat = CHATML.replace("PICTURE", "<|vision_start|><|image_pad|><|vision_end|>")
        special = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
        words = _words("<|im_start|>", "<|im_end|>", special)
    elif kind == "llava_onevision":
        chat, special = CHATML.replace("PICTURE", "<image>\n"), ["<image>", "<video>"]
        words = _words("<|im_start|>", "<|im_end|>", special)
    elif kind == "smolvlm":
        chat = IDEFICS
        special = ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
        words = _words("<|im_start|>", "<|im_end|>", special)
    else:
        words = _words("<s>", "</s>", special, bos=kind != "paligemma")
    picture = words.convert_tokens_to_ids("<|image_pad|>" if "qwen" in kind else "<image>")
    rows = 384
    torch.manual_seed(2)
    llama = _text("LlamaConfig", rows, tie_word_embeddings=False)
    if kind == "llava":
        config = LlavaConfig(
            vision_config=_tower("CLIPVisionConfig"), text_config=llama, image_token_index=picture
        )
    elif kind == "llava_next":
        config = transformers.LlavaNextConfig(
            vision_config=_tower("CLIPVisionConfig"),
            text_config=llama,
            image_token_index=picture,
            image_grid_pinpoints=[[28, 56], [56, 28], [56, 56]],
        )
    elif kind == "llava_onevision":
        config = transformers.LlavaOnevisionConfig(
            vision_config=_tower("SiglipVisionConfig", vision_use_head=False),
            text_config=_text("Qwen2Config", rows),
            image_token_index=picture,
            video_token_index=words.convert_tokens_to_ids("<video>"),
            image_grid_pinpoints=[[28, 28], [28, 56], [56, 56]],
            vision_feature_layer=-1,
        )
    elif kind in ("qwen2_vl", "qwen2_5_vl"):
        sections = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 1e6}
        name = "Qwen2VL" if kind == "qwen2_vl" else "Qwen2_5_VL"
        tower: dict[str, Any] = dict(
            depth=2, num_heads=2, patch_size=14, spatial_merge_size=2, temporal_patch_size=2
        )
        if kind == "qwen2_vl":
            tower |= dict(embed_dim=32, hidden_size=64)
        else:
            tower |= dict(hidden_size=32, out_hidden_size=64, intermediate_size=64)
            tower |= dict(window_size=56, fullatt_block_indexes=[1])
        text = _text(f"{name}TextConfig", rows, rope_parameters=sections).to_dict()
        config = getattr(transformers, f"{name}Config")(
            vision_config=tower,
            text_config=text,
            image_token_id=picture,
            video_token_id=words.convert_tokens_to_ids("<|video_pad|>"),
            vision_start_token_id=words.convert_tokens_to_ids("<|vision_start|>"),
            vision_end_token_id=words.convert_tokens_to_ids("<|vision_end|>"),
        )
    elif kind == "instructblip":
        config = transformers.InstructBlipConfig(
            vision_config=_tower("InstructBlipVisionConfig", initializer_range=0.05).to_dict(),
            qformer_config=dict(
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=64,
                vocab_size=rows,
                encoder_hidden_size=32,
                cross_attention_frequency=1,
            ),
            text_config=llama.to_dict(),
            num_query_tokens=4,
            image_token_index=picture,
        )
    elif kind == "paligemma":
        config = transformers.PaliGemmaConfig(
            vision_config=_tower("SiglipVisionConfig", vision_use_head=False).to_dict(),
            text_config=_text("GemmaConfig", rows, head_dim=32).to_dict(),
            image_token_index=picture,
            projection_dim=64,
        )
    else:
        config = transformers.SmolVLMConfig(
            vision_config=_tower("SmolVLMVisionConfig", image_size=56).to_dict(),
            text_config=llama.to_dict(),
            image_token_id=picture,
            scale_factor=2,
        )
    for name, value in changed.items():
        setattr(config, name, value)
    model = transformers.AutoModelForImageTextToText.from_config(config)
    if kind == "instructblip":  # fresh queries are all the same
        with torch.no_grad():
            model.query_tokens.normal_()
    model.save_pretrained(folder)
    words.chat_template = None if kind in ("instructblip", "paligemma") else chat
    words.save_pretrained(folder)
    _images(kind).save_pretrained(folder)
    if kind == "instructblip":
        _words("<s>", "</s>", []).save_pretrained(folder / "qformer_tokenizer")
    if kind in ("llava", "llava_next"):
        made = LlavaProcessor if kind == "llava" else transformers.LlavaNextProcessor
        made(
            image_processor=_images(kind),
            tokenizer=words,
            patch_size=14,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=chat,
        ).save_pretrained(folder)
    return folder


def _images(kind: str) -> Any:
    """The image processor of a family at the tiny size."""
    from importlib import import_module

    square = {"height": 28, "width": 28}
    module, cls, options = {
        "llava": ("clip", "CLIP", dict(size={"shortest_edge": 28}, crop_size=square)),
        "llava_next": (
            *("llava_next", "LlavaNext"),
            dict(
                size={"shortest_edge": 28},
                crop_size=square,
                image_grid_pinpoints=[[28, 56], [56, 28], [56, 56]],
            ),
        ),
        "llava_onevision": (
            *("llava_onevision", "LlavaOnevision"),
            dict(size=square, image_grid_pinpoints=[[28, 28], [28, 56], [56, 56]]),
        ),
        "qwen2_vl": ("qwen2_vl", "Qwen2VL", dict(min_pixels=28 * 28, max_pixels=448 * 448)),
        "qwen2_5_vl": ("qwen2_vl", "Qwen2VL", dict(min_pixels=28 * 28, max_pixels=448 * 448)),
        "instructblip": ("blip", "Blip", dict(size=square)),
        "paligemma": ("siglip", "Siglip", dict(size=square)),
        "smolvlm": (
            *("smolvlm", "SmolVLM"),
            dict(size={"longest_edge": 112}, max_image_size={"longest_edge": 56}),
        ),
    }[kind]
    found = import_module(f"transformers.models.{module}.image_processing_pil_{module}")
    return getattr(found, f"{cls}ImageProcessorPil")(**options)
