"""Joins a language model, a vision tower and a projector into a LLaVA folder with `<ACT>`.

What is written is an ordinary `LlavaForConditionalGeneration` checkpoint with processor and
chat template, so that vLLM, transformers and their servers take it as any other; one small
manifest beside it says which rows of the embedding table belong to `<ACT>`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MANIFEST = "openhelix.json"
IMAGE_TOKEN = "<image>"
MAX_ACT = 8  # rows that a checkpoint made here keeps for <ACT> tokens


class CheckpointError(ValueError):
    """A checkpoint folder that cannot serve; the message says what is missing."""


def act_token(index: int) -> str:
    """Return the name of the i-th `<ACT>` token."""
    return "<ACT>" if index == 0 else f"<ACT_{index}>"


@dataclass(frozen=True, slots=True)
class VisionShape:
    """The laptop tower: CLIP layout, so vLLM and transformers both know it."""

    image_size: int = 128  # pixels
    patch_size: int = 16  # pixels; 128 / 16 squared = 64 image tokens
    width: int = 192
    layers: int = 5
    heads: int = 3

    @property
    def n_tokens(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    def clip_config(self) -> Any:
        """Return the tower's configuration as transformers names it."""
        from transformers import CLIPVisionConfig

        return CLIPVisionConfig(
            hidden_size=self.width,
            intermediate_size=4 * self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            image_size=self.image_size,
            patch_size=self.patch_size,
            projection_dim=self.width,
        )


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write what `model.open_checkpoint` reads beside the weights."""
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2, sort_keys=True))


def write_llava(
    out: Path,
    language: Any,
    tokenizer: Any,
    shape: VisionShape,
    vision_weights: dict[str, Any] | None,
    seed: int,
    model_id: str,
    template: str,
    recipe: dict[str, Any] | None = None,
) -> None:
    """Join a causal language model, a tower and a projector into a LLaVA folder with `<ACT>`.

    Args:
        out: an empty folder.
        language: a transformers causal model.
        tokenizer: its fast tokenizer; the new tokens are added to it.
        vision_weights: as in `build`; None for random ones.
        model_id: what the manifest calls the weights.
        template: name in `prompt.TEMPLATES`.
        recipe: what it was made from, for the manifest.
    """
    import torch
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    names = [IMAGE_TOKEN, *(act_token(i) for i in range(MAX_ACT))]
    tokenizer.add_special_tokens(
        {"extra_special_tokens": names}, replace_extra_special_tokens=False
    )
    ids = tokenizer.convert_tokens_to_ids(names)
    table = language.get_input_embeddings().weight.detach()
    old_rows = table.shape[0]
    mean = table.mean(dim=0)
    language.resize_token_embeddings(max(len(tokenizer), old_rows), mean_resizing=False)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        table = language.get_input_embeddings().weight
        noise = torch.randn(table.shape[0] - old_rows, table.shape[1]) * table[:old_rows].std()
        table[old_rows:] = mean + noise
        config = LlavaConfig(
            vision_config=shape.clip_config(),
            text_config=language.config,
            image_token_index=ids[0],
            vision_feature_layer=-1,
            vision_feature_select_strategy="default",
            image_seq_length=shape.n_tokens,
            tie_word_embeddings=language.config.tie_word_embeddings,
        )
        model = LlavaForConditionalGeneration(config)
    model.model.language_model = language.model
    model.lm_head = language.lm_head
    if vision_weights is not None:
        load_vision(model, vision_weights)
    model.to(torch.bfloat16).save_pretrained(out)
    rename_tower(out / "model.safetensors")
    _processor(shape, tokenizer).save_pretrained(out)
    manifest = {
        "model_id": model_id,
        "act_ids": ids[1:],
        "template": template,
        "recipe": recipe or {},
    }
    write_manifest(out, manifest)


def load_vision(model: Any, weights: dict[str, Any]) -> None:
    """Put tower and projector weights into a LLaVA, strictly.

    Raises:
        CheckpointError: a tensor is missing, extra or of another shape.
    """
    for name in ("vision_tower", "multi_modal_projector"):
        part = {k.split(".", 1)[1]: v for k, v in weights.items() if k.startswith(name + ".")}
        module = getattr(model.model, name)
        have = {k: tuple(v.shape) for k, v in module.state_dict().items()}
        got = {k: tuple(v.shape) for k, v in part.items()}
        have.pop("embeddings.position_ids", None)
        if have != got:
            odd = sorted(set(have.items()) ^ set(got.items()))[:3]
            raise CheckpointError(f"vision weights: {name} does not fit, for example {odd}")
        module.load_state_dict(part, strict=False)


def vision_state(model: Any) -> dict[str, Any]:
    """Return tower and projector of a LLaVA as `load_vision` takes them."""
    state = {}
    for name in ("vision_tower", "multi_modal_projector"):
        for key, value in getattr(model.model, name).state_dict().items():
            if key != "embeddings.position_ids":
                state[f"{name}.{key}"] = value.detach().clone().contiguous()
    return state


def rename_tower(file: Path) -> None:
    """Give the tower's keys the older name that vLLM's loader knows (transformers knows both)."""
    from safetensors.torch import load_file, save_file

    state = load_file(file)
    renamed = {}
    for key, value in state.items():
        old = "vision_tower."
        at = key.find(old)
        if at >= 0 and not key[at + len(old) :].startswith("vision_model."):
            key = key[: at + len(old)] + "vision_model." + key[at + len(old) :]
        renamed[key] = value
    save_file(renamed, file, metadata={"format": "pt"})


_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% elif part['type'] == 'text' %}{{ part['text'] }}"
    "{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _processor(shape: VisionShape, tokenizer: Any) -> Any:
    """The processor that both engines load: square resize, CLIP's mean and deviation."""
    from transformers import LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    side = {"height": shape.image_size, "width": shape.image_size}
    # The PIL version wherever this runs: torchvision's resize gives other pixels.
    images = CLIPImageProcessorPil(size=side, do_center_crop=False)
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=shape.patch_size,
        vision_feature_select_strategy="default",
        image_token=IMAGE_TOKEN,
        num_additional_image_tokens=1,
        chat_template=_CHAT_TEMPLATE,
    )
