"""The families of vision-language models that can be System 2: one small adapter each.

Everything that differs from model to model is here: how many tokens a picture becomes and how
they are computed, where the language model and its projector are, what its positions and its
attention mask are, and the prompt where a checkpoint brings no chat template. Engines and training
see one thing: a sequence of head, picture, sentence and `<ACT>`, and a stack of layers that turns
its embeddings into hidden states.

The base class is LLaVA-1.5; a family states what it does otherwise. A new one is a class here, its
row in `FAMILIES`, and a tiny checkpoint in `tests/system2/tiny.py`, which every test of
`tests/system2/test_families.py` then runs on. The number of picture tokens is a constant of a
checkpoint, since the latent's shape is: where a family's own processor would make it depend on the
picture's size, pictures are first brought to a square.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol

import torch
from PIL import Image
from torch import Tensor

from openhelix.system2.prompt import Around, Prompt, Template

Processor = Callable[[], Any]  # loads the checkpoint's image processor when it is called


class Family:
    """LLaVA-1.5, and what a family is unless it says otherwise.

    Attributes:
        models: what it is, in words.
        causal: whether no token sees a later one. Where the picture sees the sentence, nothing
            of it can be shared by several sentences.
        reads_words: whether the picture's tokens depend on the sentence.
        engines: those that give its latents.
        untold: the prompt of a checkpoint without a chat template; None asks the user.
        adjustable: whether `image_side` can be chosen.
        moving: whether its processor is one of videos too, which vLLM loads, and which needs
            torchvision.
    """

    models: ClassVar[str] = "LLaVA-1.5 and its fine-tunes"
    causal: ClassVar[bool] = True
    reads_words: ClassVar[bool] = False
    engines: ClassVar[tuple[str, ...]] = ("transformers", "vllm")
    untold: ClassVar[Template | None] = None
    adjustable: ClassVar[bool] = False
    moving: ClassVar[bool] = False

    # What a checkpoint's files say.

    def refusal(self, config: Any) -> str:
        """Return why a member of the family cannot serve; empty if it can."""
        return ""

    def picture(self, config: Any, processor: Processor, side: int) -> tuple[int, int]:
        """Return the pixels of the square that pictures are brought to, and how many tokens one is.

        0 pixels leaves a picture as it comes. `side` is the user's choice; 0 for none.
        """
        vision = config.vision_config
        # CLIP has a class token, which "default" drops and "full" keeps; SigLIP has none, and
        # "default" would drop a patch of it.
        clip = vision.model_type.startswith("clip")
        full = config.vision_feature_select_strategy == "full"
        patches: int = (vision.image_size // vision.patch_size) ** 2
        return 0, patches + int(full and clip) - int(not full and not clip)

    def around(self, tokenizer: Any) -> Around:
        """Return the tokens that the model's processor puts before and after the picture's."""
        return (), ()

    def bos(self, tokenizer: Any, begun: str, vision: bool) -> int | None:
        """Return the token that the tokenizer itself puts first; None where `begun` has it."""
        ids = tokenizer("a")["input_ids"]
        first = tokenizer.bos_token_id
        own = first is not None and bool(ids) and ids[0] == first
        return first if own and not begun.startswith(tokenizer.bos_token) else None

    # What its network is made of.

    def core(self, whole: Any) -> Any:
        """Return the network without its vocabulary layer."""
        return whole.model

    def language(self, core: Any) -> Any:
        """Return the stack of language-model layers, with `layers` and `norm`."""
        return core.language_model

    def projector(self, core: Any) -> Any:
        """Return what brings the picture's features to the language model."""
        return core.multi_modal_projector

    # What is computed.

    def pixels(self, processor: Any, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """Return what `features` is given of pictures that were brought to the square."""
        return dict(processor(list(images), return_tensors="pt"))

    def features(self, core: Any, pixels: dict[str, Tensor], words: dict[str, Tensor]) -> Tensor:
        """Return the picture's tokens (B, n_image, hidden).

        `words` is what a family that `reads_words` is told of the sentences.
        """
        found = core.get_image_features(return_dict=True, **pixels).pooler_output
        return found if isinstance(found, Tensor) else torch.stack(list(found))

    def shift(self, n_image: int) -> int:
        """Return by how much positions behind the picture differ from the places in the sequence."""
        return 0

    def arranged(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """Return the positions and mask (B, …, T) of a batch padded on the right, where special."""
        return {}


class LlavaNext(Family):
    """A picture twice: whole, and in tiles with a new-line token after each row of them."""

    models = "LLaVA-NeXT (1.6)"
    adjustable = True

    def picture(self, config: Any, processor: Processor, side: int) -> tuple[int, int]:
        from transformers.models.llava_next.modeling_llava_next import (
            get_anyres_image_grid_shape,
            unpad_image,
        )

        vision = config.vision_config
        side = side or vision.image_size
        across = vision.image_size // vision.patch_size
        size = (side, side)
        tiles = get_anyres_image_grid_shape(size, config.image_grid_pinpoints, vision.image_size)
        laid = torch.empty(1, tiles[0] * across, tiles[1] * across, device="meta")
        _, high, wide = unpad_image(laid, size).shape
        high, wide = self.shrunk(config, high, wide, across)
        return side, self.base(config, across) + high * (wide + 1)

    def base(self, config: Any, across: int) -> int:
        """Return the tokens of the whole picture."""
        full = config.vision_feature_select_strategy == "full"
        clip = config.vision_config.model_type.startswith("clip")
        return across * across + int(full and clip) - int(not full and not clip)

    def shrunk(self, config: Any, high: int, wide: int, across: int) -> tuple[int, int]:
        """Return the rows and columns of the tiles' tokens that are kept."""
        return high, wide

    def pixels(self, processor: Any, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        found = processor(list(images), return_tensors="pt")
        return {name: found[name] for name in ("pixel_values", "image_sizes")}


class LlavaOnevision(LlavaNext):
    """As LLaVA-NeXT, with a limit to the tiles' tokens."""

    models = "LLaVA-OneVision"
    moving = True

    def base(self, config: Any, across: int) -> int:
        return across * across

    def shrunk(self, config: Any, high: int, wide: int, across: int) -> tuple[int, int]:
        most = int(config.vision_aspect_ratio.removeprefix("anyres_max_"))
        ratio = math.sqrt(high * wide / (most * across**2))
        return (int(high // ratio), int(wide // ratio)) if ratio > 1.1 else (high, wide)


class Qwen2VL(Family):
    """Tokens of pixels at any size, whose positions are places in time, height and width."""

    models = "Qwen2-VL"
    adjustable = True
    moving = True
    side = 224  # pixels: 8 x 8 tokens, as many as the laptop model has

    def picture(self, config: Any, processor: Processor, side: int) -> tuple[int, int]:
        images = processor()
        vision = config.vision_config
        across = vision.patch_size * vision.spatial_merge_size
        wanted = side or self.side
        # The processor rounds, and has a least and a most of its own.
        patches = images.get_number_of_image_patches(wanted, wanted, {})
        patches = math.isqrt(patches) // vision.spatial_merge_size
        return patches * across, patches**2

    def projector(self, core: Any) -> Any:
        return core.visual.merger

    def pixels(self, processor: Any, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        found = processor(list(images), return_tensors="pt")
        return {name: found[name] for name in ("pixel_values", "image_grid_thw")}

    def shift(self, n_image: int) -> int:
        return math.isqrt(n_image) - n_image

    def arranged(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        longest = max(prompt.layout.length for prompt in prompts)
        rows = []
        for prompt in prompts:
            start, stop = prompt.layout.image
            place = torch.arange(longest).expand(3, -1).clone()
            if stop > start:
                across = math.isqrt(stop - start)
                seen = torch.arange(stop - start)
                place[:, start:stop] = start + torch.stack(
                    [torch.zeros_like(seen), seen // across, seen % across]
                )
                place[:, stop:] += self.shift(stop - start)
            rows.append(place)
        return {"position_ids": torch.stack(rows, dim=1)}


class Qwen25VL(Qwen2VL):
    """As Qwen2-VL, with windows in the tower."""

    models = "Qwen2.5-VL"


class InstructBlip(Family):
    """Learned queries look at the picture for what the sentence asks; Vicuna reads them first."""

    models = "InstructBLIP with Vicuna"
    reads_words = True
    engines = ("transformers",)
    untold = Template("instructblip", "", "", "")

    def refusal(self, config: Any) -> str:
        if config.use_decoder_only_language_model:
            return ""
        return (
            f"its language model is a {config.text_config.model_type!r}, an encoder and a decoder; "
            "<ACT> ends one sequence: take one with Vicuna"
        )

    def picture(self, config: Any, processor: Processor, side: int) -> tuple[int, int]:
        return 0, config.num_query_tokens

    def around(self, tokenizer: Any) -> Around:
        return (), (tokenizer.bos_token_id,)  # the sentence is read alone and begins with it

    def bos(self, tokenizer: Any, begun: str, vision: bool) -> int | None:
        return None if vision else int(tokenizer.bos_token_id)

    def core(self, whole: Any) -> Any:
        return whole

    def language(self, core: Any) -> Any:
        return core.language_model.model

    def projector(self, core: Any) -> Any:
        return core.language_projection

    def features(self, core: Any, pixels: dict[str, Tensor], words: dict[str, Tensor]) -> Tensor:
        found: Tensor = core.get_image_features(
            pixels["pixel_values"],
            qformer_input_ids=words["input_ids"],
            qformer_attention_mask=words["attention_mask"],
            return_dict=True,
        ).pooler_output
        return found


class PaliGemma(Family):
    """Picture and sentence see each other both ways; `<ACT>` is what the answer would begin with."""

    models = "PaliGemma"
    causal = False
    engines = ("transformers",)  # vLLM attends causally there, which is another network

    def picture(self, config: Any, processor: Processor, side: int) -> tuple[int, int]:
        vision = config.vision_config
        return 0, (vision.image_size // vision.patch_size) ** 2

    untold = Template("paligemma", "", "", "\n")

    def around(self, tokenizer: Any) -> Around:
        return (), (tokenizer.bos_token_id,)

    def bos(self, tokenizer: Any, begun: str, vision: bool) -> int | None:
        return None if vision else int(tokenizer.bos_token_id)

    def shift(self, n_image: int) -> int:
        return 1  # positions are counted from one

    def arranged(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        longest = max(prompt.layout.length for prompt in prompts)
        place = torch.arange(longest)
        prefix = torch.tensor([prompt.layout.act[0] for prompt in prompts])[:, None, None]
        seen = place[None, None, :] <= place[None, :, None]
        seen = seen | ((place[None, :, None] < prefix) & (place[None, None, :] < prefix))
        return {
            "position_ids": (place + 1).expand(len(prompts), -1),
            "attention_mask": seen[:, None],
        }


class SmolVLM(Family):
    """SigLIP's patches in groups, between words that say that a whole picture comes."""

    models = "SmolVLM"
    engines = ("transformers",)

    def picture(self, config: Any, processor: Processor, side: int) -> tuple[int, int]:
        vision = config.vision_config
        across = vision.image_size // vision.patch_size
        return vision.image_size, across**2 // config.scale_factor**2

    def around(self, tokenizer: Any) -> Around:
        fake, whole = tokenizer.convert_tokens_to_ids(["<fake_token_around_image>", "<global-img>"])
        return (fake, whole), (fake,)

    def language(self, core: Any) -> Any:
        return core.text_model

    def projector(self, core: Any) -> Any:
        return core.connector

    def pixels(self, processor: Any, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        # Without tiles: the whole picture is what the tower takes.
        found = processor([[i] for i in images], do_image_splitting=False, return_tensors="pt")
        return {name: found[name] for name in ("pixel_values", "pixel_attention_mask")}


FAMILIES: dict[str, Family] = {  # by transformers' `model_type`
    "llava": Family(),
    "llava_next": LlavaNext(),
    "llava_onevision": LlavaOnevision(),
    "qwen2_vl": Qwen2VL(),
    "qwen2_5_vl": Qwen25VL(),
    "instructblip": InstructBlip(),
    "paligemma": PaliGemma(),
    "smolvlm": SmolVLM(),
}


def known_families() -> str:
    """Return the families in words, for a message."""
    return ", ".join(f"{name} ({family.models})" for name, family in FAMILIES.items())


def squared(images: Sequence[Image.Image], side: int) -> list[Image.Image]:
    """Return pictures at `side` x `side` pixels; 0 leaves them as they are."""
    if not side:
        return list(images)
    return [i.resize((side, side), Image.Resampling.BICUBIC) for i in images]


class Described(Protocol):
    """What is needed of a checkpoint (`openhelix.system2.model.Checkpoint`) to see with it."""

    @property
    def path(self) -> str: ...
    @property
    def side(self) -> int: ...
    @property
    def family(self) -> Family: ...


def picture_tokens(
    checkpoint: Described,
    core: Any,
    processor: Any,
    images: Sequence[Image.Image],
    texts: Sequence[str],
) -> Tensor:
    """Return the tokens of pictures (B, n_image, hidden), of which `texts` ask."""
    family = checkpoint.family
    weight = core.get_input_embeddings().weight
    pixels = {
        name: value.to(weight) if value.is_floating_point() else value.to(weight.device)
        for name, value in family.pixels(processor, squared(images, checkpoint.side)).items()
    }
    words = {}
    if family.reads_words:
        told = _query_tokenizer(checkpoint.path)(list(texts), padding=True, return_tensors="pt")
        words = {name: told[name].to(weight.device) for name in ("input_ids", "attention_mask")}
    return family.features(core, pixels, words)


@functools.lru_cache(maxsize=4)
def _query_tokenizer(path: str) -> Any:
    """Return what a Q-Former reads the sentence with."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path, subfolder="qformer_tokenizer")


def embedded(
    family: Family,
    core: Any,
    prompts: Sequence[Prompt],
    image_token_id: int,
    features: Tensor | None,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return what the language model is given of a batch of prompts.

    Args:
        family: of the model.
        core: the network without its vocabulary layer.
        prompts: of one checkpoint; all with vision or none.
        image_token_id: of the placeholder.
        features: picture tokens (B, n_image, hidden), or None without vision.

    Returns:
        embeddings (B, T, hidden) padded on the right, lengths (B,), and further arguments of
        the language model: positions and mask.
    """
    table = core.get_input_embeddings()
    device = table.weight.device
    lengths = torch.tensor([prompt.layout.length for prompt in prompts], device=device)
    ids = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, : prompt.layout.length] = torch.tensor(prompt.expanded(image_token_id))
    if image_token_id >= table.weight.shape[0]:
        ids[ids == image_token_id] = 0  # it has no row of its own
    embeddings = table(ids.to(device))
    if features is not None:
        start, stop = prompts[0].layout.image
        head, tail = embeddings[:, :start], embeddings[:, stop:]
        embeddings = torch.cat([head, features.to(embeddings.dtype), tail], dim=1)
    further = {name: value.to(device) for name, value in family.arranged(prompts).items()}
    return embeddings, lengths, further


def act_scale(core: Any) -> float:
    """Return by what the model multiplies a row of its embedding table when it reads it (Gemma)."""
    return float(getattr(core.get_input_embeddings(), "scalar_embed_scale", 1.0))


# ------------------------------------------------------------------------------------------------
# The prompt that a checkpoint was tuned on, out of its chat template.

ASKED = "Sentence of the robot"  # stands for the instruction while the template is read


class NoTemplate(ValueError):
    """A chat template that is missing or makes no prompt of one picture and one sentence."""


def told_template(tokenizer: Any, chat: str | None, image_word: str) -> Template:
    """Return the words that a checkpoint's chat template puts around a picture and a sentence.

    Args:
        tokenizer: its tokenizer, which renders the template.
        chat: the template.
        image_word: what stands for the picture.

    Raises:
        NoTemplate: there is none, or it cannot be used; the message says why.
    """
    if not chat:
        raise NoTemplate("has no chat template")
    sentence = {"type": "text", "text": ASKED}
    shown = _rendered(tokenizer, chat, [{"type": "image"}, sentence])
    alone = _rendered(tokenizer, chat, [sentence])
    if shown.count(image_word) != 1:  # a template of words alone: the picture is one of them
        shown = _rendered(tokenizer, chat, f"{image_word}\n{ASKED}")
        alone = _rendered(tokenizer, chat, ASKED)
    if shown.count(image_word) != 1 or shown.count(ASKED) != 1 or alone.count(ASKED) != 1:
        raise NoTemplate("has a chat template that does not show one picture and one sentence")
    head, rest = shown.split(image_word)
    if ASKED not in rest:
        raise NoTemplate("has a chat template that puts the sentence before the picture")
    body, tail = rest.split(ASKED)
    digits = hashlib.sha256("\0".join((head, body, tail)).encode()).hexdigest()[:8]
    return Template(f"chat_{digits}", head, body, tail, alone.split(ASKED)[0])


def _rendered(tokenizer: Any, chat: str, content: Any) -> str:
    messages = [{"role": "user", "content": content}]
    try:
        return str(
            tokenizer.apply_chat_template(
                messages, chat_template=chat, tokenize=False, add_generation_prompt=True
            )
        )
    except Exception as error:  # a template may fail in any way: it is a program
        said = " ".join(str(error).split())
        raise NoTemplate(f"has a chat template that cannot be read: {said[:200]}") from error
