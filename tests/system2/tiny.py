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
    ).save_pretrained(folder)
    return folder
