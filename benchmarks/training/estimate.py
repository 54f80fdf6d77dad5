"""`openhelix train STAGE … --estimate`: how much memory a training takes, and how long, before it starts.

Memory is worked out from sizes alone (docs/training.md has the formula): a checkpoint's `config.json`
is enough, and `latent.model=llava-1.5-7b` needs not even that. Time is measured on this machine: one
layer of the language model at its real size, the policy, and an optimiser's step are run for a
moment. On a CPU their CPU time counts, so that other load on the machine does not.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from openhelix.benchmarks.training.config import (
    REGIMES,
    JointStage,
    PolicyStage,
    TrainingConfig,
    base_policy_folder,
)
from openhelix.benchmarks.training.feeds import feed_kind, regime_of
from openhelix.runtime.core.clock import duration_text
from openhelix.runtime.core.config import ConfigError
from openhelix.runtime.core.interfaces import LatentSpec
from openhelix.runtime.core.precision import pick_dtype
from openhelix.system1.checkpoint import Network, load_policy
from openhelix.system1.data import Cache
from openhelix.system1.latent_adapter import adapt_to_latent
from openhelix.system1.train import TrainConfig, fresh_network, policy_config
from openhelix.system1.train_loop import Optimizers, hidden
from openhelix.system2.latents import KV, LATENT_DIM
from openhelix.system2.model import Checkpoint, open_checkpoint
from openhelix.system2.train import CHANGES, ActionHead

ESTIMATED = ("policy", "stage1", "stage2")
KNOWN = "llava-1.5-7b"  # sizes that need no folder: transformers' own defaults of a LLaVA
WORDS = 40  # tokens of a prompt beside the picture's, where no tokenizer tells
MEASURED_S = 1.0  # of CPU time, for each thing that is timed
TIMED = {"cpu": 1e11, "cuda": 2e13}  # products, of what is timed of a layer; the rest is scaled
FILED = 2  # bytes of a weight in a file of weights, which is mapped while it is read
STEPPED = 16_000_000  # weights whose optimiser's step is timed: more than caches hold
MOST_TENSORS = 1000  # of these weights
GB = 1e9


@dataclass(frozen=True, slots=True)
class Sizes:
    """A LLaVA as far as memory asks for it.

    Attributes:
        hidden, ffn, layers, heads, kv_heads, head: of the language model, the layers that run.
        words: rows of the embedding table.
        language, vision, projector: weights.
        layer: weights of one layer.
        tokens: of a prompt with its picture.
        n_image: of the picture.
    """

    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    head: int
    words: int
    language: int
    vision: int
    projector: int
    layer: int
    tokens: int
    n_image: int


def sizes_of(config: Any, layers: int, n_image: int, vision: bool) -> Sizes:
    """Return a LLaVA's sizes from transformers' configuration; no weights are made."""
    from transformers import LlavaModel

    with torch.device("meta"):
        model = LlavaModel(config)
    text = config.text_config

    def count(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    layer = count(model.language_model.layers[0])
    spared = (len(model.language_model.layers) - layers) * layer
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return Sizes(
        text.hidden_size,
        text.intermediate_size,
        layers,
        text.num_attention_heads,
        text.num_key_value_heads,
        head,
        text.vocab_size,
        count(model.language_model) - spared,
        count(model.vision_tower),
        count(model.multi_modal_projector),
        layer,
        WORDS + (n_image if vision else 0),
        n_image,
    )


def kept_per_token(sizes: Sizes, regime: str, rank: int, number: int, bf16: bool) -> int:
    """Return the bytes that one layer keeps of a token for the way back.

    Args:
        sizes: of the model.
        regime: what learns; "prompt" and "lora" have gradients that pass through.
        rank: of "lora".
        number: bytes of a weight.
        bf16: whether autocast makes products of two bytes.
    """
    h, f, a = sizes.hidden, sizes.ffn, 2 if bf16 else number
    wide, kv = sizes.heads * sizes.head, sizes.kv_heads * sizes.head
    norms = 2 * 4 * h  # what a norm squares, in float32
    products = a * (2 * wide + 2 * kv + 3 * f)  # q, out, k, v; gate, its activation, up
    if regime == "lora":
        return norms + products + a * (h + 4 * rank)
    if regime == "full":
        return 2 * norms + products + a * (2 * h + f)
    return norms + products


def trained_weights(sizes: Sizes, regime: str, rank: int) -> int:
    """Return how many of the LLaVA's own weights learn, low-rank parts included."""
    h, wide, kv = sizes.hidden, sizes.heads * sizes.head, sizes.kv_heads * sizes.head
    if regime == "lora":
        return sizes.layers * rank * (2 * (h + wide) + 2 * (h + kv))
    if regime == "vocabulary":
        return sizes.words * sizes.hidden
    return sizes.language + sizes.projector if regime == "full" else 0


def language_memory(
    config: TrainingConfig, stage: str, sizes: Sizes, samples: int
) -> dict[str, float]:
    """Return the bytes that System 2 takes in a joint stage, by what they are for.

    Args:
        config: of the training.
        stage: "stage1" or "stage2".
        sizes: of the LLaVA.
        samples: of a part, what is worked on at once.
    """
    section = config.latent
    regime, feed = regime_of(section, stage), feed_kind(section, stage, config.device)
    number = 4 if regime in CHANGES else pick_dtype(section.dtype).itemsize
    bf16 = config.computes_bf16 and regime in CHANGES
    learned = trained_weights(sizes, regime, section.lora_rank)
    whole = sizes.language + sizes.vision + sizes.projector
    whole += learned if regime == "lora" else 0
    wide = sizes.hidden * section.read_out().width
    head = wide * section.projector_width + section.projector_width * LATENT_DIM
    with torch.device("meta"):
        head += sum(p.numel() for p in ActionHead(wide).parameters())
    kept, tokens = 0.0, samples * sizes.tokens
    if feed == "live" and regime != "frozen":
        each = kept_per_token(sizes, regime, section.lora_rank, number, bf16)
        kept = tokens * (sizes.layers * each + 2 * 4 * sizes.hidden * section.read_out().width)
    elif feed == "prefix":  # keys and values, read and joined to those of <ACT>
        of_kv = 2 * sizes.layers * sizes.kv_heads * sizes.head
        kept = 3 * tokens * of_kv * number
    # Divided among the workers: all but the layer that runs, its gradient, and what is not language.
    among = config.workers if section.shard and regime in ("lora", "full") else 1
    spared = sizes.language * (1 - 1 / among)
    learned_here = learned - (learned if regime == "lora" else sizes.language) * (1 - 1 / among)
    gathered = (2 * sizes.layer if regime == "full" else sizes.layer) if among > 1 else 0
    passing = tokens * 2 * (2 if bf16 else number) * (sizes.ffn + sizes.hidden)
    act = stage == "stage1" or regime != "frozen"
    return {
        "weights": number * (whole - spared + gathered)
        + 4 * head
        + (2 * sizes.language / among if bf16 else 0),
        "gradients": 4 * (learned_here + head),
        "optimiser": 8 * (learned_here + head),
        "average": 4 * (learned_here + head),
        "activations": kept + (passing if feed != "states" else 0.0),
        "file while loading": FILED * whole,
        # What <ACT> has become is told in words: three times the output table.
        "copy while saving": 3.0 * 4 * sizes.words * sizes.hidden if act else 0.0,
    }


@contextlib.contextmanager
def kept_bytes(model: nn.Module) -> Iterator[list[float]]:
    """Count what autograd keeps for the way back, weights left out; the list's one number."""
    own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    seen: dict[int, int] = {}
    found = [0.0]

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
            found[0] = float(sum(seen.values()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found


class Clock:
    """Times work: CPU time for each thread on a CPU, else the time until the device is done."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def now(self) -> float:
        """Return seconds since some moment."""
        if self._device.type == "cpu":
            return time.process_time() / torch.get_num_threads()
        torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def mean(self, work: Callable[[], Any]) -> float:
        """Return how long `work` takes, on average over a second's worth; the first is not counted."""
        work()
        begun, done = self.now(), 0
        while done == 0 or self.now() - begun < MEASURED_S:
            work()
            done += 1
        return (self.now() - begun) / done


def process_bytes() -> float:
    """Return what this process takes with its libraries, and without what it has freed."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):  # another C library than GNU's
        ctypes.CDLL(None).malloc_trim(0)
    return float(psutil.Process().memory_info().rss)


def policy_of(config: TrainingConfig, stage: str, cache: Cache) -> Network:
    """Return the policy that a stage trains; in a joint stage told by latents.

    Raises:
        ConfigError: nothing is known of what its latents take.
    """
    section = config.policy
    if config.latent.kind == KV:
        raise ConfigError(
            "latent.kind: 'kv' is not estimated; train a few steps and look at the log"
        )
    folder = section.init if stage == "policy" else None
    if stage != "policy" and section.pretrained:
        with contextlib.suppress(ConfigError):  # not trained yet: one of its shape
            folder = base_policy_folder(config)
    if folder is not None:
        model = load_policy(folder.expanduser())
    else:
        settings = TrainConfig(
            config.frames_folders(), Path(), preset=section.preset, changes=section.changes
        )
        frames = torch.arange(min(64, len(cache)))
        model = fresh_network(policy_config(settings, cache), cache, frames, config.seed)
    told = stage != "policy" or section.told == "sentence"
    if not told:
        return model
    rows = config.latent.read_out().n_tokens(1) if stage != "policy" else 1
    return adapt_to_latent(model, LatentSpec("act_last", rows, LATENT_DIM, "any"), config.seed)


def run_policy_once(
    config: TrainingConfig, model: Network, cache: Cache, samples: int, draws: int
) -> Tensor:
    """Return the loss of some samples, for its way back to be looked at."""
    device = torch.device(config.device)
    generator = torch.Generator().manual_seed(0)
    frames = torch.arange(samples) % len(cache)
    batch = cache.batch(frames, generator, None, model.config.rotation, device)
    inputs = batch.inputs
    if model.config.use_latent:
        from openhelix.benchmarks.training.joint import with_latent

        shape = (samples, model.config.latent_tokens, model.config.latent_dim)
        z = torch.zeros(shape, device=device, requires_grad=True)
        none = torch.zeros(samples)
        inputs = with_latent(inputs, z, none, none.bool())
    cast = torch.autocast(device.type, torch.bfloat16, enabled=config.computes_bf16)
    with cast:
        parts = model.loss(
            inputs, batch.rows, batch.openness, batch.mask, draws, generator, batch.keyposes
        )
    return parts.total


def policy_costs(
    config: TrainingConfig, stage: str, samples: int, section: PolicyStage | JointStage
) -> tuple[dict[str, float], float]:
    """Return the bytes that System 1 takes, and the seconds of one part of a step."""
    cache = Cache(config.frames_folders())
    model = policy_of(config, stage, cache).to(config.device)
    learns = stage != "stage1"
    model.requires_grad_(learns)
    with kept_bytes(model) as found:
        run_policy_once(config, model, cache, 2, section.draws)
    weights = {n: p for n, p in model.named_parameters() if p.requires_grad}
    count = sum(p.numel() for p in weights.values())
    matrices = sum(p.numel() for n, p in weights.items() if hidden(n, p))
    muon = matrices if section.optimizer == "muon" else 0
    memory = {
        "weights": 4.0 * sum(p.numel() for p in model.parameters()),
        "gradients": 4.0 * count,
        "optimiser": 8.0 * (count - muon) + 4.0 * muon,
        "average": 4.0 * count,
        "activations": found[0] * samples / 2,
        "file while loading": 0.0,
        "copy while saving": 0.0,
    }
    clock = Clock(torch.device(config.device))

    def work() -> None:
        run_policy_once(config, model, cache, samples, section.draws).backward()

    seconds = clock.mean(work)
    if weights:
        optimizers = Optimizers(weights, section.optimizer, 1e-12, 0.0)
        seconds += clock.mean(lambda: optimizers.step(1e-12)) / config.accumulate
    return memory, seconds


def layer_seconds(
    config: TrainingConfig, sizes: Sizes, regime: str, samples: int, tokens: int, learns: bool
) -> float:
    """Return the seconds in which one layer of the language model runs, and comes back if it learns."""
    from transformers import LlamaConfig, LlamaModel

    device = torch.device(config.device)
    dtype = torch.float32 if regime in CHANGES else pick_dtype(config.latent.dtype)
    shape = LlamaConfig(
        hidden_size=sizes.hidden,
        intermediate_size=sizes.ffn,
        num_hidden_layers=1,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        head_dim=sizes.head,
        vocab_size=8,
    )
    model = LlamaModel(shape).to(device, dtype).requires_grad_(False)
    if learns and regime == "full":
        model.requires_grad_(True)
    elif learns and regime == "lora":
        from peft import LoraConfig, inject_adapter_in_model

        names = ["q_proj", "k_proj", "v_proj", "o_proj"]
        inject_adapter_in_model(LoraConfig(r=config.latent.lora_rank, target_modules=names), model)
    cast = config.computes_bf16 and regime in CHANGES
    clock = Clock(device)
    most = max(16, int(TIMED.get(device.type, 1e11) / (6 * sizes.layer)))  # tokens
    few, short = max(1, min(samples, most // tokens)), min(tokens, most)

    def work() -> None:
        x = torch.randn(few, short, sizes.hidden, device=device, dtype=dtype)
        x.requires_grad_(learns)
        with (
            torch.autocast(device.type, torch.bfloat16, enabled=cast),
            torch.set_grad_enabled(learns),
        ):
            out = model(inputs_embeds=x, use_cache=False).last_hidden_state
        if learns:
            out.sum().backward()
            model.zero_grad(set_to_none=True)

    return clock.mean(work) * (samples * tokens) / (few * short)


def step_seconds(device: torch.device, each: float) -> float:
    """Return the seconds that gradient norm, AdamW and average take for one weight.

    Args:
        device: on which.
        each: weights of a tensor: many small ones cost their calls, large ones do not fit caches.
    """
    size = max(1, round(each))
    number = max(1, min(MOST_TENSORS, STEPPED // size))
    weights = [nn.Parameter(torch.randn(size, device=device)) for _ in range(number)]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    average = [weight.detach().clone() for weight in weights]
    optimizer = torch.optim.AdamW(weights, 1e-12)

    def work() -> None:
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        torch._foreach_lerp_(average, [weight.detach() for weight in weights], 0.01)

    return Clock(device).mean(work) / (size * number)


def prompt_tokens(config: TrainingConfig, sizes: Sizes, samples: int) -> int:
    """Return the length of a batch of prompts; without a tokenizer `WORDS` beside the picture."""
    section = config.latent
    if section.model == KNOWN:
        return sizes.tokens
    try:
        prompts = open_checkpoint(section.model, section.n_act).prompts(
            section.n_act, section.vision
        )
    except ValueError:  # config.json alone
        return sizes.tokens
    texts = Cache(config.frames_folders()).meta["instructions"]
    lengths = torch.tensor([float(prompts(text).layout.length) for text in texts])
    drawn = torch.randint(len(texts), (200, samples), generator=torch.Generator().manual_seed(0))
    return round(float(lengths[drawn].amax(1).mean()))


def language_costs(
    config: TrainingConfig, stage: str, samples: int
) -> tuple[dict[str, float], float, float]:
    """Return the bytes System 2 takes, the seconds of a part of a step, and those before the first."""
    section = config.latent
    regime, feed = regime_of(section, stage), feed_kind(section, stage, config.device)
    sizes = model_sizes(config)
    sizes = replace(sizes, tokens=prompt_tokens(config, sizes, samples))
    memory = language_memory(config, stage, sizes, samples)
    learns = regime != "frozen"
    a_part, before = 0.0, 0.0
    if feed == "live":
        a_part = sizes.layers * layer_seconds(config, sizes, regime, samples, sizes.tokens, learns)
    else:
        if feed == "prefix":
            a_part = sizes.layers * layer_seconds(
                config, sizes, regime, samples, section.n_act, True
            )
        some = section.encode_batch
        each = sizes.layers * layer_seconds(config, sizes, regime, some, sizes.tokens, False) / some
        cache = Cache(config.frames_folders())
        frames = min(section.frames, len(cache)) if feed == "prefix" else len(cache)
        before = each * (
            frames if feed == "prefix" else frames * section.phrasings / section.stride
        )
    learned = trained_weights(sizes, regime, section.lora_rank)
    if learned:
        # A layer has seven matrices and two norms; a low-rank part, two narrow matrices.
        each = section.lora_rank * sizes.hidden if regime == "lora" else sizes.layer / 9
        a_part += learned * step_seconds(torch.device(config.device), each) / config.accumulate
    return memory, a_part, before


def llava_config(model: str, name: str, n_act: int = 1) -> tuple[Any, int]:
    """Return transformers' configuration of a LLaVA, and how many tokens a picture has.

    Args:
        model: a folder, whose config.json is enough; `KNOWN`; or what names a whole checkpoint.
        name: of the setting, for messages.
        n_act: of the checkpoint.

    Raises:
        ConfigError: there is no such model, and it is not `KNOWN`.
    """
    from transformers import AutoConfig, LlavaConfig

    if model == KNOWN:
        return LlavaConfig(), 576
    if (Path(model).expanduser() / "config.json").is_file():
        made = AutoConfig.from_pretrained(Path(model).expanduser())
        if made.model_type != "llava":
            raise ConfigError(f"{name}: {model} is a {made.model_type!r}")
        vision = made.vision_config
        return made, (vision.image_size // vision.patch_size) ** 2
    try:
        checkpoint: Checkpoint = open_checkpoint(model, n_act)
    except ValueError as error:
        raise ConfigError(
            f"{name.removesuffix('.model')}.{error}; for an estimate a folder with its config.json "
            f"is enough, or {KNOWN!r}"
        ) from None
    return AutoConfig.from_pretrained(checkpoint.path), checkpoint.n_image


def model_sizes(config: TrainingConfig) -> Sizes:
    """Return the sizes of the model that `latent.model` names.

    Raises:
        ConfigError: there is no such model, and it is not `KNOWN`.
    """
    section = config.latent
    made, n_image = llava_config(section.model, "latent.model", section.n_act)
    layers = section.read_out().layers_of(made.text_config.num_hidden_layers)[-1]
    return sizes_of(made, layers, n_image, section.vision)


def samples_at_once(config: TrainingConfig, batch: int, stage: str) -> int:
    """Return how many samples of a batch are worked on at once.

    Raises:
        ConfigError: the batch cannot be divided so.
    """
    samples = batch // (config.accumulate * config.workers)
    if samples * config.accumulate * config.workers != batch or not samples:
        raise ConfigError(
            f"{stage}.batch: {batch} samples cannot be divided among {config.workers} "
            f"workers with accumulate={config.accumulate}"
        )
    return samples


def estimate(config: TrainingConfig, stage: str) -> dict[str, Any]:
    """Return what a stage takes: bytes by what they are for, and seconds.

    Args:
        config: of the training.
        stage: one of `ESTIMATED`; for "vlm" see `estimate_vlm`.

    Raises:
        ConfigError: another stage, or settings that name nothing.
    """
    if stage not in ESTIMATED:
        raise ConfigError(f"--estimate: of {stage!r}; it knows {', '.join(ESTIMATED)}, vlm")
    if config.threads:
        torch.set_num_threads(config.threads)
    section: PolicyStage | JointStage = getattr(config, stage)
    samples = samples_at_once(config, section.batch, stage)
    memory, a_part = policy_costs(config, stage, samples, section)
    before = 0.0
    found: dict[str, Any] = {"stage": stage, "samples_at_once": samples}
    if stage != "policy":
        language, more, before = language_costs(config, stage, samples)
        memory = {name: memory[name] + language[name] for name in memory}
        a_part += more
        shown = {own: name for name, own in REGIMES.items()}
        found["regime"] = shown[regime_of(config.latent, stage)]
        found["feed"] = feed_kind(config.latent, stage, config.device)
    host = config.device == "cpu"
    if host:  # a GPU has no copy, and its own file
        memory["copy while saving"] += 2 * memory["average"] + memory["optimiser"]
    else:
        memory["file while loading"] = memory["copy while saving"] = 0.0
    process = process_bytes() if host else 0.0
    # What a step has freed stays with the process, so that a copy comes on top of it.
    loading = memory["weights"] + memory["file while loading"]
    peak = process + max(loading, sum(memory.values()) - memory["file while loading"])
    a_step = a_part * config.accumulate
    return found | {
        "memory_gb": {
            "process": round(process / GB, 3),
            **{name: round(value / GB, 3) for name, value in memory.items()},
            "peak": round(peak / GB, 3),
        },
        "seconds": {
            "before the first step": round(before, 1),
            "a step": round(a_step, 4),
            "all steps": round(a_step * section.steps + before, 1),
        },
        "workers": config.workers,
    }


def told(found: Mapping[str, Any]) -> str:
    """Return an estimate as lines for people."""
    memory, seconds = found["memory_gb"], found["seconds"]
    rows = [f"{found['stage']}: {found['samples_at_once']} samples at once in each of "
            f"{found['workers']} workers"]  # fmt: skip
    if "regime" in found:
        rows[0] += f", {found['regime']}, latents from {found['feed']!r}"
    rows += [f"  {name:<20} {value:9.2f} GB" for name, value in memory.items()]
    for stage, row in found.get("stages", {}).items():
        rows.append(
            f"  {stage:<20} {row['beside weights']:9.2f} GB beside weights, "
            f"{row['a step']:.2f} s a step"
        )
    rows.append(f"  {'a step':<20} {seconds['a step']:9.2f} s")
    rows.append(f"  {'all steps':<20} {duration_text(seconds['all steps']):>9}")
    return "\n".join(rows)
