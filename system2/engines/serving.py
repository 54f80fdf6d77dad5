"""The folder that vLLM is given: the checkpoint's own files, and next to no tokenizer.

vLLM gets prompts as token ids, so the only word it ever has to know is the image's. It reads a
model's tokenizer several times over and copies it twenty times all the same, which costs five
seconds of every start with a vocabulary of fifty thousand words.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from openhelix.runtime.core.paths import cache_folder
from openhelix.system2.model import Checkpoint, build_once

_FORMAT = 1  # raise it when the same checkpoint would give another folder
TOKENIZER = ("tokenizer", "vocab", "merges", "special_tokens", "added_tokens", "chat_template")
UNKNOWN = "<unk>"


def serving_folder(checkpoint: Checkpoint) -> str:
    """Return a folder with links to the checkpoint's files and a tokenizer of two words.

    A hub name, and a folder whose processor does not say its image's word, stay as they are.
    """
    source = Path(checkpoint.path).resolve()
    image_token = _image_token(source)
    if image_token is None:
        return checkpoint.path
    words = f"{_FORMAT}:{source}:{checkpoint.model_id}:{image_token}:{checkpoint.image_token_id}"
    name = hashlib.sha256(words.encode()).hexdigest()[:16]

    def make(out: Path) -> None:
        for file in source.iterdir():
            if file.is_file() and not file.name.startswith(TOKENIZER):
                (out / file.name).symlink_to(file)
        _write_tokenizer(out, image_token, checkpoint.image_token_id)

    return str(build_once(cache_folder() / "system2" / f"serving-{name}", make))


def _image_token(source: Path) -> str | None:
    """Return the word for an image in a checkpoint's processor."""
    try:
        word = json.loads((source / "processor_config.json").read_text()).get("image_token")
    except (OSError, ValueError):
        return None
    return word if isinstance(word, str) and word else None


def _write_tokenizer(out: Path, image_token: str, image_id: int) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    vocabulary = {UNKNOWN: 0 if image_id else 1, image_token: image_id}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token=UNKNOWN)),
        unk_token=UNKNOWN,
        pad_token=UNKNOWN,
        eos_token=UNKNOWN,
        additional_special_tokens=[image_token],
    ).save_pretrained(out)
