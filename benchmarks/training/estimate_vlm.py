"""`openhelix train vlm --estimate`: memory and time of a base model's training, before it starts.

Nothing is loaded but sizes. Tower, projector, the output layer and one layer of the language model
are made at their real size with random weights, asked about random pictures, and what autograd keeps
is added up; the other layers keep and take as much as that one. The two largest moments beside a step
are loading, where all weights are there in float32, and writing, where they are there three times.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from openhelix.benchmarks.training.config import TrainingConfig
from openhelix.benchmarks.training.estimate import (
    FILED,
    GB,
    TIMED,
    Clock,
    kept_bytes,
    llava_config,
    process_bytes,
    samples_at_once,
    step_seconds,
)
from openhelix.benchmarks.training.vlm import data_folder
from openhelix.runtime.core.precision import computes_bf16
from openhelix.system2.latents import LATENT_DIM, LatentConfig, LatentHead
from openhelix.system2.vlm import IGNORED, Learner, Packed, Sight, adapt
from openhelix.system2.vlm_config import VlmSection
from openhelix.system2.vlm_data import Record, read, shards
from openhelix.system2.vlm_train import STAGES, Labels, StageName, base_folder

# Of the pictures that the simulator makes, in the laptop model's tokens.
QUESTION, ANSWER = 20, 4  # tokens of a question with its answer, and of the answer
INSTRUCTION, PLAIN = 28, 7  # ... of an instruction to a robot, and of the sentence that is meant
HEAD = 3  # before the picture
LABELS, NUMBERS = (3,) * 16 + (4,) * 5, 19  # words of each label; numbers


@dataclass(frozen=True, slots=True)
class Shape:
    """What of a picture is learned in a stage.

    Attributes:
        n_image: tokens of the picture.
        asked: questions and instructions.
        tokens: of the sequence, the picture's too; 0 where no language model runs.
        answers: tokens that are learned.
    """

    n_image: int
    asked: int
    tokens: int
    answers: int


def shape_of(config: VlmSection, stage: StageName, n_image: int) -> Shape:
    """Return what a stage has of a picture."""
    if stage == "see":
        return Shape(n_image, 0, 0, 0)
    section = getattr(config, stage)
    goals = config.tune.goals if stage == "tune" else 0
    tokens = HEAD + n_image + section.questions * QUESTION + goals * INSTRUCTION
    answers = section.questions * ANSWER + goals * PLAIN
    return Shape(n_image, section.questions + goals, -(-tokens // 8) * 8, answers)


def asked(shape: Shape, samples: int, device: torch.device) -> Packed:
    """Return sequences of a shape, of no meaning."""
    size = (samples, shape.tokens)
    rest = shape.tokens - HEAD - shape.n_image
    owner = torch.full(size, -1)
    owner[:, HEAD + shape.n_image :] = torch.arange(rest) * shape.asked // rest
    wanted = torch.full(size, IGNORED)
    wanted[:, shape.tokens - shape.answers :] = 1
    same = (owner[:, :, None] == owner[:, None, :]) | (owner[:, None, :] == -1)
    mask = (same & torch.ones(shape.tokens, shape.tokens, dtype=torch.bool).tril())[:, None]
    zeros = torch.zeros(size, dtype=torch.long)
    image = (HEAD, HEAD + shape.n_image)
    return Packed(zeros, mask, zeros, wanted, owner, zeros.bool(), torch.full(size, -1), image).to(
        device
    )


class Model:
    """A LLaVA at its real size but for its language model, which has one layer.

    Args:
        config: of the training.
        made: transformers' configuration of the whole model.
        n_image: tokens of a picture.
        labels: of the pictures.
    """

    def __init__(self, config: TrainingConfig, made: Any, n_image: int, labels: Any) -> None:
        from transformers import LlavaForConditionalGeneration

        self.config, self.vlm, self.n_image = config, config.vlm, n_image
        self.device = torch.device(config.device)
        self.bf16 = computes_bf16(config.vlm.bf16, self.device.type)
        self.layers = made.text_config.num_hidden_layers
        one = copy.deepcopy(made)
        one.text_config.num_hidden_layers = 1
        one.text_config._attn_implementation = "eager" if self.device.type == "cpu" else "sdpa"
        model = LlavaForConditionalGeneration(one)
        self.lora = self.vlm.tune.mode == "lora" or self.vlm.tune.steps == 0
        if self.bf16 and self.lora:
            model.model.language_model.to(torch.bfloat16)
            model.lm_head.to(torch.bfloat16)
        hidden = made.text_config.hidden_size
        words = {str(i): ("",) * size for i, size in enumerate(labels[0])}
        saying = torch.randn(len(words), max(labels[0], default=0), hidden)
        sight = Sight(n_image, hidden, words, labels[1], saying)
        place: Any = SimpleNamespace(image_token_id=0)
        none = (0.5, 0.5, 0.5)
        self.learner = Learner(model, place, sight, none, none).to(self.device)
        self.side = made.vision_config.image_size
        self.goals = 0
        if self.vlm.tune.goals:
            read_out = LatentConfig("act_words", layers=self.vlm.tune.goal_layers)
            with torch.device("meta"):
                head = LatentHead(read_out, hidden, LATENT_DIM, width=LATENT_DIM)
            self.goals = count(head)

    @property
    def layer(self) -> nn.Module:
        """The language model's one layer."""
        found: nn.Module = self.learner.model.model.language_model.layers[0]
        return found

    def enter(self, stage: StageName) -> int:
        """Make learnable what a stage trains; return how many weights of the whole model that is."""
        section, inner = getattr(self.vlm, stage), self.learner.model.model
        self.learner.requires_grad_(False)
        inner.vision_tower.requires_grad_(section.lr_vision > 0)
        inner.multi_modal_projector.requires_grad_(section.lr_projector > 0)
        self.learner.sight.requires_grad_(section.lr_projector > 0 and section.sight > 0)
        learned = sum(p.numel() for p in self.learner.parameters() if p.requires_grad)
        if stage != "tune":
            return learned
        if self.vlm.tune.mode == "full":
            inner.language_model.requires_grad_(True)
            more = count(inner.language_model) + (self.layers - 1) * count(self.layer)
        else:
            adapt(inner.language_model, self.vlm.tune.rank)
            parts = [p for p in self.layer.parameters() if p.requires_grad]
            more = self.layers * sum(p.numel() for p in parts)
        return learned + (more if section.lr_language > 0 else 0) + self.goals

    def loss(self, stage: StageName, shape: Shape, samples: int) -> Tensor:
        """Return the loss of some pictures, with one layer of the language model."""
        section = getattr(self.vlm, stage)
        pixels = torch.rand(samples, 3, self.side, self.side, device=self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            tokens = self.learner.image_tokens(pixels)
        sight = self.learner.sight
        target = torch.zeros(samples, len(sight.words), dtype=torch.long, device=self.device)
        total = tokens.new_zeros((), dtype=torch.float32)
        if section.sight:
            numbers = torch.zeros(samples, len(sight.shift), device=self.device)
            total = total + sight.loss(tokens.float(), target, numbers)[0]
            if section.speech:
                total = total + sight.speech(tokens, target)
        if shape.tokens:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                total = (
                    total + self.learner.answers(tokens, asked(shape, samples, self.device)).loss
                )
        return total

    def layer_alone(self, shape: Shape, samples: int) -> Tensor:
        """Return what another layer of the language model makes, to be learned from."""
        language = self.learner.model.model.language_model
        packed = asked(shape, samples, self.device)
        dtype = torch.bfloat16 if self.bf16 else torch.float32
        x = torch.randn(
            (samples, shape.tokens, language.config.hidden_size), device=self.device, dtype=dtype
        ).requires_grad_()
        mask = torch.zeros(packed.mask.shape, dtype=dtype, device=self.device)
        mask.masked_fill_(~packed.mask, torch.finfo(dtype).min)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            turned = language.rotary_emb(x, packed.positions)
            out = self.layer(x, attention_mask=mask, position_embeddings=turned)
        return (out[0] if isinstance(out, tuple) else out).float().sum()


def count(module: nn.Module) -> int:
    """Return how many weights a module has."""
    return sum(p.numel() for p in module.parameters())


def kept_of(model: Model, stage: StageName, shape: Shape) -> float:
    """Return the bytes that autograd keeps of a picture in a stage that was entered."""
    with kept_bytes(model.learner) as found:
        model.loss(stage, shape, 1)
    kept = found[0]
    if shape.tokens:
        with kept_bytes(model.learner) as found:
            model.layer_alone(shape, 1)
        if model.vlm.checkpointing:  # of each its input, and of one what it keeps
            width = model.learner.model.model.language_model.config.hidden_size
            kept += model.layers * shape.tokens * width * (2 if model.bf16 else 4)
        else:
            kept += (model.layers - 1) * found[0]
    return kept


def seconds_of(model: Model, stage: StageName, shape: Shape, samples: int) -> float:
    """Return how long some pictures take in a stage that was entered, there and back."""
    clock = Clock(model.device)
    # No more at once than takes a moment: a whole batch of a large tower fits no memory.
    tower = count(model.learner.model.model.vision_tower) * shape.n_image
    most = TIMED.get(model.device.type, 1e11) / (6 * (tower + shape.tokens * count(model.layer)))
    few = max(1, min(samples, int(most)))

    def back(loss: Tensor) -> None:
        loss.backward()
        model.learner.zero_grad(set_to_none=True)

    seconds = clock.mean(lambda: back(model.loss(stage, shape, few))) * samples / few
    if shape.tokens:
        again = 4 / 3 if model.vlm.checkpointing else 1.0
        alone = clock.mean(lambda: back(model.layer_alone(shape, few))) * samples / few
        seconds += (model.layers - 1) * alone * again
    return seconds


def memory_of(model: Model, step: dict[str, float], decoded: float) -> dict[str, float]:
    """Return the bytes by what they are for, and the largest sum of what is there at once.

    Args:
        model: as made here.
        step: bytes that the largest stage's step needs beside weights.
        decoded: bytes of pictures that are kept in memory.
    """
    network, one = model.learner.model, count(model.layer)
    language = count(network.model.language_model) + (model.layers - 1) * one
    if network.lm_head.weight is not network.get_input_embeddings().weight:
        language += count(network.lm_head)
    whole = language + count(network.model.vision_tower)
    whole += count(network.model.multi_modal_projector)
    number = 2 if model.bf16 and model.lora else 4
    weights = 4.0 * (whole - language + count(model.learner.sight)) + number * language
    found = {"weights": weights, **step}
    if model.device.type != "cpu":
        return found | {"peak": sum(found.values())}
    # Written in two bytes from a copy in two bytes, with low-rank parts folded into their layers.
    folded = number * model.layers * one if model.lora and model.vlm.tune.steps else 0.0
    writing = 4.0 * whole + folded + step["optimiser"]
    file = 4.0 * whole - weights + FILED * whole
    peak = weights + decoded + max(sum(step.values()) + writing, file)
    return {
        "pictures": decoded,
        **found,
        "file while loading": file,
        "copy while writing": writing,
        "peak": peak,
    }


def pictures_of(config: TrainingConfig) -> tuple[list[Record], tuple[tuple[int, ...], int], int]:
    """Return the training pictures that there are; words and numbers told of each; how many."""
    folder = data_folder(config.vlm) / "train"
    if not shards(folder):
        return [], (LABELS, NUMBERS), config.vlm.pictures
    records = read(folder, config.vlm.pictures)
    labels = Labels(records)
    return records, (tuple(map(len, labels.words.values())), labels.numbers), len(records)


def estimate_vlm(config: TrainingConfig) -> dict[str, Any]:
    """Return what `openhelix train vlm` takes: bytes by what they are for, and seconds.

    Examinations, and what is written between, are not in the time.

    Raises:
        ConfigError: there is no such model.
        TalkError: the pictures cannot be read.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    section, name = config.vlm, config.vlm.model
    name = base_folder(section, config.seed) if name in ("smollm2", "laptop") else name
    made, n_image = llava_config(name, "vlm.model")
    records, labels, n = pictures_of(config)  # kept in memory, as training keeps them
    model = Model(config, made, n_image, labels)
    decoded = 3.0 * n * model.side**2
    stages: dict[str, dict[str, float]] = {}
    largest, total = {"gradients": 0.0, "optimiser": 0.0, "activations": 0.0}, 0.0
    for stage in (stage for stage in STAGES if getattr(section, stage).steps):
        samples = samples_at_once(config, getattr(section, stage).batch, f"vlm.{stage}")
        learned, shape = float(model.enter(stage)), shape_of(section, stage, n_image)
        kept = samples * kept_of(model, stage, shape)
        a_step = config.accumulate * seconds_of(model, stage, shape, samples)
        if learned:
            tensors = [p.numel() for p in model.learner.parameters() if p.requires_grad]
            a_step += learned * step_seconds(model.device, sum(tensors) / len(tensors))
        step = {"gradients": 4 * learned, "optimiser": 8 * learned, "activations": kept}
        largest = max(largest, step, key=lambda found: sum(found.values()))
        total += a_step * getattr(section, stage).steps
        stages[stage] = {"beside weights": round(sum(step.values()) / GB, 3), "a step": a_step}
    memory = memory_of(model, largest, decoded if decoded <= section.max_gb * 1e9 else 0.0)
    del model
    if config.device == "cpu":
        memory = {"process": process_bytes(), **memory}
        memory["peak"] += memory["process"]
    del records
    return {
        "stage": "vlm",
        "samples_at_once": samples_at_once(config, section.tune.batch, "vlm.tune"),
        "memory_gb": {name: round(value / GB, 3) for name, value in memory.items()},
        "stages": stages,
        "seconds": {
            "before the first step": 0.0,
            "a step": round([*stages.values()][-1]["a step"], 4) if stages else 0.0,
            "all steps": round(total, 1),
        },
        "workers": config.workers,
    }
