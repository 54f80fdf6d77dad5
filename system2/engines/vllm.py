"""The served engine: vLLM's pooling runner, one prefill, no decoding.

vLLM runs in this process (no engine-core process beside it): System 2 has an actor of its
own already, and `<ACT>` can then be swapped in place. Requests of several robots go in one
call and vLLM batches them. For a read-out after middle layers the model inside vLLM is made to
stop there (`openhelix.system2.latents`); it is then run as it is, without compilation.
"""

from __future__ import annotations

import gc
import hashlib
import importlib.util
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from openhelix.runtime.core.files import BadFile, CheckpointError, check_finite, read_json
from openhelix.runtime.core.paths import cache_folder
from openhelix.runtime.core.precision import pick_dtype
from openhelix.system2.answering import MAX_WORDS, AnswerPrompts
from openhelix.system2.engines.base import EncodeError, EngineBase
from openhelix.system2.engines.vllm_plugin import register
from openhelix.system2.families import squared
from openhelix.system2.latents import LatentConfig, stop_vllm_after
from openhelix.system2.model import Checkpoint, build_once
from openhelix.system2.prompt import Prompt, as_batch
from openhelix.system2.understanding import OFF

# ------------------------------------------------------------------------------------------------
# The folder that vLLM is given: the checkpoint's own files, and next to no tokenizer.
#
# vLLM gets prompts as token ids, so the only word it ever has to know is the image's. It reads a
# model's tokenizer several times over and copies it twenty times all the same, which costs five
# seconds of every start with a vocabulary of fifty thousand words.


_FORMAT = 1  # raise it when the same checkpoint would give another folder
TOKENIZER = ("tokenizer", "vocab", "merges", "special_tokens", "added_tokens", "chat_template")
UNKNOWN = "<unk>"


def serving_folder(checkpoint: Checkpoint) -> str:
    """Return a folder with links to the checkpoint's files and a tokenizer of two words.

    A hub name, a folder whose processor does not say its image's word, and a family whose
    processor wants more words than that, stay as they are.
    """
    source = Path(checkpoint.path).resolve()
    image_token = None if checkpoint.family.moving else _image_token(source)
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
        word = read_json(source / "processor_config.json").get("image_token")
    except BadFile:
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


# ------------------------------------------------------------------------------------------------
# The engine


class VllmEngine(EngineBase):
    """System 2 on vLLM; options as in `EngineBase`.

    Args:
        max_batch: most requests computed together.
        kv_cache_mb: memory for keys and values, MiB; 0 takes what `max_batch` needs.
        eager: False lets vLLM compile and capture CUDA graphs (slower start, faster calls);
            not for a read-out after middle layers.
    """

    name = "vllm"

    def __init__(
        self,
        model: str = "laptop",
        *,
        max_batch: int = 8,
        kv_cache_mb: int = 0,
        eager: bool = True,
        **options: Any,
    ) -> None:
        self._max_batch, self._kv_cache_mb, self._eager = max_batch, kv_cache_mb, eager
        super().__init__(model, **options)

    def _load(self, config: LatentConfig | None, max_instruction_tokens: int) -> None:
        config = config or LatentConfig()
        _check_served(self.checkpoint)
        # Read when vllm is imported or the engine is built; a value set by the user stands.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        with _collector_off():
            self._start(config, max_instruction_tokens)

    def _start(self, config: LatentConfig, max_instruction_tokens: int) -> None:
        from vllm import LLM
        from vllm.config import PoolerConfig

        _accept_new_tower_names()
        gc.freeze()  # or vLLM, which collects while it loads, looks through all of its imports
        self._task = "embed" if config.last_token_only else "token_embed"
        length = self.checkpoint.prompts(
            config.n_act, config.vision, max_instruction_tokens
        ).max_length
        budget = max(length * self._max_batch, 2048)
        layers = config.layers_of(self.checkpoint.layers)
        middle = layers != (self.checkpoint.layers,)
        self._llm = LLM(
            model=serving_folder(self.checkpoint),
            runner="pooling",
            convert="embed",
            dtype=str(self._dtype).removeprefix("torch."),
            pooler_config=PoolerConfig(
                task=self._task,
                seq_pooling_type="LAST",
                tok_pooling_type="ALL",
                use_activation=False,
            ),
            max_model_len=length,
            max_num_seqs=self._max_batch,
            max_num_batched_tokens=budget,
            limit_mm_per_prompt={"image": 1 if config.vision else 0},
            enable_prefix_caching=False,
            enable_chunked_prefill=False,
            mm_processor_cache_gb=0,
            kv_cache_memory_bytes=self._kv_bytes(length),
            distributed_executor_backend="uni",
            enforce_eager=self._eager or middle,
            disable_log_stats=False,  # they are served with our own; see openhelix.runtime.observe.metrics.Library
            use_tqdm_on_load=False,
            seed=0,
        )
        self._llm.apply_model(partial(_check_finite, path=self.checkpoint.path))
        if middle:
            self._llm.apply_model(partial(_stop, layers=layers, n_layers=self.checkpoint.layers))

    def _kv_bytes(self, length: int) -> int:
        if self._kv_cache_mb:
            return self._kv_cache_mb << 20
        from transformers import AutoConfig

        text = AutoConfig.from_pretrained(self.checkpoint.path).text_config
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        a_token = 2 * text.num_hidden_layers * text.num_key_value_heads * head_dim
        blocks = (length // 128 + 2) * 128  # vLLM's largest CPU block is 128 tokens
        return max(64 << 20, a_token * self._dtype.itemsize * blocks * self._max_batch)

    def _table(self) -> Tensor:
        return self._llm.apply_model(_embedding)[0].weight.detach()

    def _write_act(self, rows: Sequence[int], act: Tensor) -> None:
        def write(model: Any) -> None:
            layer = _embedding(model)
            shard = getattr(layer, "shard_indices", None)
            first = shard.org_vocab_start_index if shard is not None else 0
            with torch.no_grad():
                for row, value in zip(rows, act, strict=True):
                    if first <= row < first + layer.weight.shape[0]:
                        layer.weight[row - first] = value.to(layer.weight)

        self._llm.apply_model(write)

    def _hidden(
        self, images: list[Image.Image], prompts: list[Prompt], sensed: Tensor | None = None
    ) -> list[Tensor]:
        requests: list[dict[str, Any]] = []
        for image, prompt in zip(squared(images, self.checkpoint.side), prompts, strict=True):
            request: dict[str, Any] = {"prompt_token_ids": list(prompt.ids)}
            if self._looks:
                request["multi_modal_data"] = {"image": image}
            requests.append(request)
        return self._encoded(requests)

    def _check_understanding(self, config: LatentConfig) -> None:
        if config.last_token_only:
            raise CheckpointError(
                "understanding: reads all of a sentence's states, and vLLM gives this read-out the "
                f"last one alone; understanding={OFF} does without"
            )
        super()._check_understanding(config)

    def _sentence_states(self, rows: list[list[int]]) -> list[Tensor]:
        return self._encoded([{"prompt_token_ids": row} for row in rows])

    def _encoded(self, requests: list[dict[str, Any]]) -> list[Tensor]:
        """Return each request's states (T, width), or only the last where that is what is read."""
        try:
            outputs = self._llm.encode(requests, pooling_task=self._task, use_tqdm=False)
        except BaseException:
            # What a failed call leaves behind, the next one would finish, and take for its own.
            engine = self._llm.llm_engine
            engine.abort_request(list(engine.output_processor.request_states), internal=True)
            raise
        if len(outputs) != len(requests):
            raise EncodeError(f"vLLM gave {len(outputs)} outputs for {len(requests)} prompts")
        return [torch.atleast_2d(output.outputs.data) for output in outputs]

    def close(self) -> None:
        super().close()
        self._llm = None


def _check_served(checkpoint: Checkpoint) -> None:
    """Refuse what vLLM fails on with pages of its own.

    Raises:
        CheckpointError: its processor needs a library, or it reads several layers of the tower.
    """
    from transformers import AutoConfig

    if checkpoint.family.moving and importlib.util.find_spec("torchvision") is None:
        raise CheckpointError(
            f"model: vLLM reads the pictures of a {checkpoint.kind!r} with torchvision, which this "
            "environment lacks (make setup GPU=1 has it); the engine transformers does without"
        )
    layers = getattr(AutoConfig.from_pretrained(checkpoint.path), "vision_feature_layer", None)
    if isinstance(layers, list | tuple) and len(layers) != 1:
        raise CheckpointError(
            f"{checkpoint.path}/config.json: vision_feature_layer: {list(layers)}, and vLLM takes one "
            "layer of the tower; the engine transformers takes several"
        )


@contextmanager
def _collector_off() -> Iterator[None]:
    """Importing and loading make a million objects that stay; counting them takes seconds."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _accept_new_tower_names() -> None:
    """Let vLLM read checkpoints that transformers 5 saved: they lack one level in the tower."""
    register()  # before the plugin would run, since the module is imported here already
    from vllm.model_executor.models.llava import LlavaForConditionalGeneration
    from vllm.model_executor.models.llava_next import LlavaNextForConditionalGeneration
    from vllm.model_executor.models.utils import WeightsMapper

    names = "embeddings|encoder|pre_layrnorm|post_layernorm|head"
    pattern = re.compile(rf"^(model\.)?vision_tower\.({names})\.")
    added = WeightsMapper(orig_to_new_regex={pattern: r"\1vision_tower.vision_model.\2."})
    for model in (LlavaForConditionalGeneration, LlavaNextForConditionalGeneration):
        if pattern not in model.hf_to_vllm_mapper.orig_to_new_regex:
            model.hf_to_vllm_mapper = model.hf_to_vllm_mapper | added


def _embedding(model: Any) -> Any:
    return model.language_model.model.embed_tokens


def _check_finite(model: Any, path: str) -> None:
    check_finite(dict(model.named_parameters()), f"model: {path!r}")


def _stop(model: Any, layers: Sequence[int], n_layers: int) -> None:
    stop_vllm_after(model.language_model.model, layers, n_layers)


class VllmAnswerer:
    """Answers in words, greedy; arguments as of `openhelix.system2.answering.TransformersAnswerer`.

    Args:
        max_batch: most questions answered together.
    """

    def __init__(
        self,
        model: str = "laptop",
        *,
        dtype: str = "auto",
        vision: bool = True,
        threads: int = 0,
        max_batch: int = 8,
    ) -> None:
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        from vllm import LLM

        if threads:
            torch.set_num_threads(threads)
        _accept_new_tower_names()
        self._prompts = AnswerPrompts(model, vision)
        self.checkpoint = self._prompts.checkpoint
        length = self.checkpoint.prompts(1, vision).max_length + MAX_WORDS
        self._llm: Any = LLM(
            model=serving_folder(self.checkpoint),
            runner="generate",
            dtype=str(pick_dtype(dtype)).removeprefix("torch."),
            max_model_len=length,
            max_num_seqs=max_batch,
            max_num_batched_tokens=max(length * max_batch, 2048),
            limit_mm_per_prompt={"image": 1 if vision else 0},
            enable_prefix_caching=False,
            mm_processor_cache_gb=0,
            distributed_executor_backend="uni",
            enforce_eager=True,
            generation_config="vllm",
            use_tqdm_on_load=False,
            seed=0,
        )

    def answer(self, images: Sequence[Any], questions: Sequence[str]) -> list[str]:
        """Return one answer a pair of image and question."""
        from vllm import SamplingParams

        checked, texts = as_batch(images, questions)
        requests = []
        for image, text in zip(checked, texts, strict=True):
            request: dict[str, Any] = {"prompt_token_ids": list(self._prompts(text).ids)}
            if self._prompts.vision:
                request["multi_modal_data"] = {"image": image}
            requests.append(request)
        greedy = SamplingParams(
            temperature=0.0,
            max_tokens=MAX_WORDS,
            stop_token_ids=[self._prompts.end],
            ignore_eos=True,  # the serving folder's tokenizer knows no real one
            detokenize=False,
        )
        outputs = self._llm.generate(requests, greedy, use_tqdm=False)
        return [self._prompts.words(output.outputs[0].token_ids) for output in outputs]

    def close(self) -> None:
        """Let go of the model."""
        self._llm = None
