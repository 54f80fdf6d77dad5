"""Trains a base model: tower, then projector, then language model, as LLaVA is trained.

    see    tower and projector show the picture's facts to linear maps: no language model
    align  tower and projector through the frozen language model, loss on the answers alone
    tune   the language model too, whole or by low-rank parts

The same command goes on where it stopped: what a step draws depends on its number alone.
Written to the run's folder: `state.safetensors` (to go on), `log.jsonl`, `report.json`, and
`llava`, an ordinary LLaVA folder for both engines; for the laptop model with low-rank parts
also `vision.safetensors` and `language.safetensors`, the few megabytes that differ from what
packages deliver.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from openhelix.runtime.core.files import (
    BadFile,
    load_tensors,
    parse_object,
    read_json,
    replace_file,
)
from openhelix.runtime.core.plugins import none_of
from openhelix.runtime.core.precision import computes_bf16
from openhelix.runtime.core.workers import ALONE, Workers
from openhelix.system2.model import (
    BUILTIN,
    LANGUAGE,
    MANIFEST,
    VISION,
    Checkpoint,
    VisionShape,
    build,
    builtin,
    load_llava,
    load_processor,
    load_tokenizer,
    open_checkpoint,
    rename_tower,
    sha256_file,
    vision_state,
    write_manifest,
)
from openhelix.system2.pretrain import augment
from openhelix.system2.prompt import TEMPLATES
from openhelix.system2.text import TextCode, TextReader, fitted_code
from openhelix.system2.understanding import FILE as UNDERSTANDING
from openhelix.system2.vlm import (
    IGNORED,
    LORA_SCALE,
    Adapted,
    Answers,
    Goals,
    Learner,
    Packed,
    Packer,
    Sight,
    adapt,
    folded_state,
)
from openhelix.system2.vlm_config import Tower, VlmSection, VlmStage
from openhelix.system2.vlm_data import GOAL_KINDS, Question, Record, TalkError, read

log = logging.getLogger(__name__)
StageName = Literal["see", "align", "tune"]
STAGES: tuple[StageName, ...] = ("see", "align", "tune")
STATE, LOG, REPORT, LLAVA = "state.safetensors", "log.jsonl", "report.json", "llava"
LATENT = "latent.safetensors"
NEVER_SCORED = ("caption",)  # long; trained on, but not asked in examinations
Shown = Literal["image", "none", "other"]
CALIBRATED_ON = 8  # batches
ACT_RATE = 1e-2  # of <ACT>, one row that stands against millions of weights
GOAL_RATE = 1e-3  # of the head that makes latents of instructions


def read_state(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of a run that was stopped, and where it stood.

    Raises:
        BadFile: the file is damaged, or is of something else.
    """
    state, metadata = load_tensors(file)
    about = parse_object(metadata.get("vlm", ""), str(file))
    if missing := sorted({"stage", "step", "samples", "pictures", "seconds"} - set(about)):
        raise BadFile(f"{file}: does not say its {missing[0]}")
    return state, about


class Pictures:
    """Records with their pixels at the tower's size.

    Args:
        records: pictures and questions.
        processor: the checkpoint's image processor: it resizes, and nothing else here.
        max_gb: keeps decoded pixels up to this much memory.
    """

    def __init__(self, records: Sequence[Record], processor: Any, max_gb: float) -> None:
        self.records = records
        self._processor = processor
        first = self._decoded(records[0])
        fits = first.numel() * len(records) <= max_gb * 1e9
        self._kept = torch.zeros((len(records), *first.shape), dtype=torch.uint8) if fits else None
        self._there = torch.zeros(len(records), dtype=torch.bool)

    def __len__(self) -> int:
        return len(self.records)

    def _decoded(self, record: Record) -> Tensor:
        made = self._processor(
            record.image(), return_tensors="pt", do_rescale=False, do_normalize=False
        )["pixel_values"][0]
        return torch.as_tensor(made).round().clamp(0, 255).to(torch.uint8)

    def fill(self, workers: int) -> None:
        """Decode everything now, in some threads."""
        with ThreadPoolExecutor(max(1, workers)) as pool:
            for _ in pool.map(lambda row: self.pixels([row]), range(len(self))):
                pass

    def pixels(self, rows: Sequence[int]) -> Tensor:
        """Return (B, 3, S, S) in [0, 1]."""
        found = []
        for row in rows:
            if self._kept is None:
                found.append(self._decoded(self.records[row]))
                continue
            if not self._there[row]:
                self._kept[row] = self._decoded(self.records[row])
                self._there[row] = True
            found.append(self._kept[row])
        return torch.stack(found).float() / 255


def parted(questions: Sequence[Question]) -> tuple[list[Question], list[Question]]:
    """Return instructions to a robot, and all other questions."""
    told = [q for q in questions if q.kind in GOAL_KINDS]
    return told, [q for q in questions if q.kind not in GOAL_KINDS]


class Labels:
    """Words and numbers of records as tensors.

    Args:
        records: whose words are the vocabulary.
    """

    def __init__(self, records: Sequence[Record]) -> None:
        found: dict[str, set[str]] = defaultdict(set)
        for record in records:
            for name, word in record.labels.items():
                found[name].add(word)
        self.words = {name: tuple(sorted(found[name])) for name in sorted(found)}
        self.numbers = max(len(record.numbers) for record in records)

    def target(self, records: Sequence[Record]) -> tuple[Tensor, Tensor]:
        """Return word indices (N, labels) and numbers (N, n), with `IGNORED` and NaN for none."""
        rows, numbers = [], []
        for record in records:
            row = []
            for name, options in self.words.items():
                word = record.labels.get(name)
                row.append(options.index(word) if word in options else IGNORED)
            rows.append(row)
            told = [math.nan if v is None else v for v in record.numbers]
            numbers.append(told + [math.nan] * (self.numbers - len(told)))
        shape = (len(records), -1)
        return torch.tensor(rows).view(*shape), torch.tensor(numbers).view(*shape)


def saying_of(words: dict[str, tuple[str, ...]], table: Tensor, checkpoint: Checkpoint) -> Tensor:
    """Return (labels, most words, hidden): the embeddings of "NAME WORD", summed.

    Scaled to the table's own spread, so that an image token has a word's norm.
    """
    tokenizer = load_tokenizer(checkpoint.path)
    table = table.detach().float()

    def embedded(text: str) -> Tensor:
        return table[tokenizer(" " + text, add_special_tokens=False)["input_ids"]].sum(dim=0)

    most = max((len(options) for options in words.values()), default=0)
    saying = torch.zeros(len(words), most, table.shape[1])
    for row, (name, options) in enumerate(words.items()):
        for column, word in enumerate(options):
            # The word twice: the name is the same in every picture.
            both = embedded(name) + 2 * embedded(word)
            saying[row, column] = both * (table.norm(dim=1).mean() / both.norm())
    return saying


def base_folder(config: VlmSection, seed: int) -> str:
    """Return the LLaVA that a run begins with."""
    if config.model != "smollm2":
        return str(builtin(config.model)) if config.model in BUILTIN else config.model
    tower = config.tower
    if tower.shipped:
        return str(build())
    return str(build(vision=shape_of(tower), seed=seed))


def shape_of(tower: Tower) -> VisionShape:
    """Return System 2's own record of a tower.

    Raises:
        ValueError: patches or heads do not divide it.
    """
    if tower.image_size % tower.patch_size:
        raise ValueError(
            f"vlm.tower.patch_size: {tower.patch_size} does not divide image_size "
            f"{tower.image_size}"
        )
    if tower.width % tower.heads:
        raise ValueError(f"vlm.tower.heads: {tower.heads} does not divide width {tower.width}")
    return VisionShape(tower.image_size, tower.patch_size, tower.width, tower.layers, tower.heads)


def goals_of(config: VlmSection, records: Sequence[Record], table: Tensor, seed: int) -> Goals:
    """Return what instructions' latents are to become.

    Raises:
        ValueError: no record has an instruction.
        TextError: the policy's code does not fit the model.
    """
    plain = sorted({q.answer for r in records for q in r.questions if q.kind in GOAL_KINDS})
    if len(plain) < 2:
        raise ValueError(
            f"vlm.tune.goals: no instructions to a robot in {config.data}; make it anew, or 0"
        )
    tune = config.tune
    code = None if tune.goal_code is None else TextCode.load(tune.goal_code.expanduser())
    reader = TextReader(config.model, (1, 8) if code is None else code.layers)
    code = code or fitted_code(reader, plain)
    codes = reader.encode(code, plain)[:, 0]
    return Goals(tune.goal_layers, table, plain, codes, seed, code.reading)


@dataclass(frozen=True, slots=True)
class Batch:
    """What one step learns from, or a part of it.

    Attributes:
        rows: of the training pictures.
        whole: rows of the step that this is a part of.
        pixels: (B, 3, S, S).
        packed: the questions.
        asked: how many.
        plain: the plain sentence of each instruction among them.
    """

    rows: list[int]
    whole: list[int]
    pixels: Tensor
    packed: Packed | None
    asked: int
    plain: list[str]

    @property
    def answered(self) -> int:
        """How many tokens of answers are learned."""
        return 0 if self.packed is None else int((self.packed.wanted != IGNORED).sum())


@dataclass(frozen=True, slots=True)
class Counted:
    """What a whole step has, of all workers: answers' tokens, questions, instructions."""

    answered: float
    asked: float
    plain: float


class VlmRun:
    """One training run.

    Args:
        config: its numbers; `config.data` is a folder.
        out: the run's folder; what stands there is continued.
        seed: every draw follows from it.
        device: "auto", or any torch device.
        accumulate: parts in which a worker's share of a batch is worked on.
        workers: that train together, each with a run of its own.
    """

    def __init__(
        self,
        config: VlmSection,
        out: Path,
        seed: int = 0,
        device: str = "auto",
        accumulate: int = 1,
        workers: Workers = ALONE,
    ) -> None:
        self.config, self.out, self.seed, self.workers = config, out, seed, workers
        self.accumulate = accumulate
        for stage in STAGES:
            if self.section(stage).steps:
                self._parts_of(stage)
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device)
        self.bf16 = computes_bf16(config.bf16, self.device.type)
        self._check_settings()
        self.base = workers.once(lambda: base_folder(config, seed))
        self.checkpoint: Checkpoint = workers.once(lambda: open_checkpoint(self.base))
        self.processor = load_processor(self.checkpoint.path).image_processor
        train = read(config.data / "train", config.pictures)
        self._check_kinds({q.kind for record in train for q in record.questions})
        self.train = Pictures(train, self.processor, config.max_gb)
        self.held_out = self._held("held-out")
        self.labels = Labels(train)
        self.target, self.numbers = self.labels.target(train)
        torch.manual_seed(seed)
        # On a CPU plain products are a tenth faster here than the fused attention with its mask.
        attention = "eager" if self.device.type == "cpu" else "sdpa"
        model = load_llava(
            self.checkpoint.path,
            torch.float32,
            attn_implementation={"text_config": attention},
        )
        # Weights that do not learn need no more precision than they are computed in.
        if self.bf16 and (config.tune.mode == "lora" or config.tune.steps == 0):
            model.model.language_model.to(torch.bfloat16)
            model.lm_head.to(torch.bfloat16)
        self.goals: Goals | None = None
        if config.tune.goals:
            words = model.get_input_embeddings().weight[: self.checkpoint.act_ids[0]]
            self.goals = goals_of(config, train, words, seed)
            self.goals.to(self.device)
        if config.checkpointing:
            language = model.model.language_model
            language.gradient_checkpointing_enable({"use_reentrant": False})
            language.train()  # it recomputes in this mode alone; nothing in it drops out
        sight = Sight(
            self.checkpoint.n_image,
            self.checkpoint.hidden,
            self.labels.words,
            self.labels.numbers,
            saying_of(self.labels.words, model.get_input_embeddings().weight, self.checkpoint),
        )
        if self.labels.numbers:
            known = ~self.numbers.isnan()
            count = known.sum(0).clamp_min(1)
            mean = self.numbers.nan_to_num().sum(0) / count
            square = ((self.numbers - mean).nan_to_num() ** 2).sum(0) / count
            sight.shift.copy_(mean)
            sight.spread.copy_(square.sqrt() + 1e-3)
        self.learner = Learner(
            model, self.checkpoint, sight, self.processor.image_mean, self.processor.image_std
        ).to(self.device)
        self.packer = Packer(self.checkpoint)
        self._pool: ThreadPoolExecutor | None = None
        self._coming: dict[tuple[StageName, int], Future[list[Batch]]] = {}
        self.stage: StageName = "see"
        self.step = 0  # of the stage
        self.samples = 0  # questions that were trained on
        self.pictures_seen = 0
        self.seconds = 0.0
        if config.init is not None and not (out / STATE).is_file():
            self._begin_from(config.init)
        self._enter("see")
        if (out / STATE).is_file():
            self._resume()

    def _check_settings(self) -> None:
        """Keep what a run was begun with; refuse to go on with another model or data."""
        mine = self.config.model_dump(mode="json", include={"model", "tower", "data", "pictures"})
        mine |= {"seed": self.seed, "tune": self.config.tune.mode, "rank": self.config.tune.rank}
        file = self.out / "settings.json"
        if file.is_file():
            before = read_json(file)
            for key, value in mine.items():
                if before.get(key, value) != value:
                    raise ValueError(
                        f"vlm.{key}: {self.out} was begun with {before[key]!r}, not {value!r}; "
                        "choose another out=FOLDER or remove it"
                    )
        if self.workers.first:
            self.out.mkdir(parents=True, exist_ok=True)
            replace_file(file, json.dumps(mine, indent=1).encode() + b"\n")  # others read it

    def _check_kinds(self, there: set[str]) -> None:
        for stage in STAGES:
            for kind in self.section(stage).often:
                if kind not in there:
                    raise ValueError(f"vlm.{stage}.often: {none_of(kind, sorted(there))}")

    def _held(self, name: str) -> Pictures | None:
        try:
            records = read(self.config.data / name)
        except TalkError:
            return None
        # A shard is one scene: the first pictures of a folder would show none of the others.
        mixed = np.random.default_rng(0).permutation(len(records))
        chosen = [records[row] for row in mixed[: self.config.measure_pictures]]
        return Pictures(chosen, self.processor, self.config.max_gb)

    # -- stages --------------------------------------------------------------------------

    def section(self, stage: StageName) -> VlmStage:
        """Return a stage's settings."""
        section: VlmStage = getattr(self.config, stage)
        return section

    def _enter(self, stage: StageName) -> None:
        """Make learnable what a stage trains, with a fresh optimiser."""
        section, learner = self.section(stage), self.learner
        inner = learner.model.model
        learner.requires_grad_(False)
        groups: list[tuple[float, list[nn.Parameter]]] = [
            (section.lr_vision, list(inner.vision_tower.parameters())),
            (section.lr_projector, list(inner.multi_modal_projector.parameters())),
            (section.lr_projector if section.sight else 0.0, list(learner.sight.parameters())),
        ]
        if stage == "tune":
            groups.append((section.lr_language, self._language()))
            if self.goals is not None:
                head = self.goals.head
                groups.append((GOAL_RATE, [p for p in head.parameters() if p is not head.act]))
                groups.append((ACT_RATE, [head.act]))
        made = []
        for rate, parameters in groups:
            if rate == 0:
                continue
            for parameter in parameters:
                parameter.requires_grad_(True)
            thick = [p for p in parameters if p.ndim > 1]
            thin = [p for p in parameters if p.ndim <= 1]
            made.append({"params": thick, "lr": rate, "weight_decay": section.weight_decay})
            made.append({"params": thin, "lr": rate, "weight_decay": 0.0})
        made = [group for group in made if group["params"]] or [
            {"params": [nn.Parameter(torch.zeros(1))], "lr": 0.0}
        ]
        self.optimizer = torch.optim.AdamW(made, betas=(0.9, 0.98))
        self._rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        self.workers.same(self._chosen)
        self.stage, self.step = stage, 0

    @property
    def _chosen(self) -> list[nn.Parameter]:
        """What the stage trains."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _language(self) -> list[nn.Parameter]:
        model, tune = self.learner.model, self.config.tune
        if tune.mode == "full":
            return list(model.model.language_model.parameters())
        parts = [m for m in model.model.language_model.modules() if isinstance(m, Adapted)]
        if parts:
            return [p for part in parts for p in (part.down, part.up)]
        torch.manual_seed(self.seed + 1)
        return adapt(model.model.language_model, tune.rank)

    def _rate(self) -> float:
        section = self.section(self.stage)
        if self.step < section.warmup:
            return (self.step + 1) / section.warmup
        done = (self.step - section.warmup) / max(1, section.steps - section.warmup)
        return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def train_step(self) -> dict[str, float]:
        """Take one step of the stage; return its losses.

        Means are over all that the step has, whatever part of it is learned from at once.

        Raises:
            FloatingPointError: the loss is not finite; the weights are as before.
        """
        batches = self._next_batches()
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * self._rate()
        mine = [
            sum(b.answered for b in batches),
            sum(b.asked for b in batches),
            sum(len(b.plain) for b in batches),
        ]
        counted = Counted(*self.workers.summed(mine))
        if self.goals is not None and counted.plain and not self.goals.calibrated:
            self._calibrate()
        self.optimizer.zero_grad(set_to_none=True)
        row = dict.fromkeys(self._columns(counted), 0.0)
        for batch in batches:
            total, told = self._learned_from(batch, counted)
            if total.requires_grad:
                total.backward()
            for name, value in told.items():
                row[name] += value
        row = dict(zip(row, self.workers.summed(list(row.values())), strict=True))
        if not math.isfinite(row.pop("total")):
            raise FloatingPointError(f"vlm {self.stage}: the loss is not finite at {self.step}")
        self.workers.add_gradients(self._chosen)
        nn.utils.clip_grad_norm_(self._chosen, 1.0)
        self.optimizer.step()
        if self.goals is not None and counted.plain:
            row["act_cosine"] = self.goals.moved
        self.samples += round(counted.asked)
        self.pictures_seen += self.section(self.stage).batch
        self.step += 1
        return row

    def _columns(self, counted: Counted) -> list[str]:
        """Return what a step says of itself, the same in every worker."""
        section, names = self.section(self.stage), ["total"]
        if section.sight:
            names += ["sight", "sight_right", *(("speech",) if section.speech else ())]
        if self.stage != "see":
            names += ["loss", "right"]
        if self.goals is not None and counted.plain:
            names += ["goal", "goal_right"]
        return names

    def _learned_from(self, batch: Batch, counted: Counted) -> tuple[Tensor, dict[str, float]]:
        """Return the loss of a part, and what is to be said of it, as shares of the step's."""
        section = self.section(self.stage)
        with self._autocast():
            tokens = self.learner.image_tokens(batch.pixels.to(self.device))
        row: dict[str, float] = {}
        total = tokens.new_zeros((), dtype=torch.float32)
        if section.sight:
            target = self.target[batch.rows].to(self.device)
            numbers = self.numbers[batch.rows].to(self.device)
            whole = self.target[batch.whole].to(self.device)
            loss, right = self.learner.sight.loss(
                tokens.float(), target, numbers, (whole, self.numbers[batch.whole].to(self.device))
            )
            total = total + section.sight * loss
            known = max(1, int((whole != IGNORED).sum()))
            row |= {"sight": loss.item(), "sight_right": right.nansum().item() / known}
            if section.speech:
                said = self.learner.sight.speech(tokens, target, whole)
                total = total + section.speech * said
                row["speech"] = said.item()
        if batch.packed is not None:
            packed = batch.packed.to(self.device)
            with self._autocast():
                answers = self._answers(tokens, packed)
            share = batch.answered / counted.answered
            total = total + share * answers.loss
            row["loss"] = share * answers.loss.item()
            row["right"] = batch.asked / counted.asked * answers.right.nanmean().item()
            if self.goals is not None and batch.plain:
                read = self.goals.read(answers.states, packed)
                loss, hits = self.goals.loss(read, self.goals.index(batch.plain).to(read.device))
                share = len(batch.plain) / counted.plain
                total = total + self.config.tune.goal_weight * share * loss
                row |= {"goal": share * loss.item(), "goal_right": share * hits.mean().item()}
        return total, row | {"total": total.item()}

    def _answers(self, tokens: Tensor | None, packed: Packed) -> Answers:
        if self.goals is None:
            return self.learner.answers(tokens, packed)
        return self.learner.answers(tokens, packed, self.goals.layers, self.goals.head.act)

    @torch.no_grad()
    def _calibrate(self) -> None:
        """Measure the read-out's channels on some pictures."""
        assert self.goals is not None
        reads = []
        for step in range(CALIBRATED_ON):
            whole = slice(0, self.config.tune.batch)
            batch = self._make_batch("tune", self.config.tune, step, whole)
            assert batch.packed is not None
            packed = batch.packed.to(self.device)
            with self._autocast():
                tokens = self.learner.image_tokens(batch.pixels.to(self.device))
                answers = self._answers(tokens, packed)
            reads.append(self.goals.read(answers.states, packed))
        self.goals.calibrate(torch.cat(reads))

    def _next_batches(self) -> list[Batch]:
        """Return this worker's parts of the step; with threads, those after are made meanwhile."""
        stage, section = self.stage, self.section(self.stage)
        if not self.config.workers:
            return self._make_batches(stage, section, self.step)
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self.config.workers)
        last = min(section.steps, self.step + 2 * self.config.workers)
        for step in range(self.step, last):
            if (stage, step) not in self._coming:
                self._coming[stage, step] = self._pool.submit(
                    self._make_batches, stage, section, step
                )
        for key in [k for k in self._coming if k[0] != stage]:
            self._coming.pop(key).cancel()
        return self._coming.pop((stage, self.step)).result()

    def _make_batches(self, stage: StageName, section: VlmStage, step: int) -> list[Batch]:
        return [self._make_batch(stage, section, step, part) for part in self._parts_of(stage)]

    def _parts_of(self, stage: StageName) -> list[slice]:
        batch = self.section(stage).batch
        return self.workers.parts(batch, self.accumulate, f"vlm.{stage}.batch")

    def _make_batch(self, stage: StageName, section: VlmStage, step: int, part: slice) -> Batch:
        """Draw a part of a step's pictures and questions.

        They depend on seed, stage and step alone: all are drawn, and the part's kept.
        """
        number = STAGES.index(stage) * 10_000_000 + step
        draws = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        whole = torch.randint(len(self.train), (section.batch,), generator=draws).tolist()
        rows = whole[part]
        pixels = augment(self.train.pixels(rows), self.config.jitter, draws, part, section.batch)
        if stage == "see":
            return Batch(rows, whole, pixels, None, 0, [])
        goals = self.config.tune.goals if stage == "tune" else 0
        asked = []
        for r in whole:
            told, other = parted(self.train.records[r].questions)
            asked.append(
                self._draw(other, section.questions, draws, section.often)
                + self._draw(told, goals, draws, section.often)
            )
        asked = asked[part]
        plain = [q.answer for each in asked for q in each if q.kind in GOAL_KINDS]
        return Batch(rows, whole, pixels, self.packer(asked), sum(map(len, asked)), plain)

    @staticmethod
    def _draw(
        questions: Sequence[Question],
        n: int,
        generator: torch.Generator,
        often: Mapping[str, float] | None = None,
    ) -> list[Question]:
        if not often or len(questions) <= n:
            order = torch.randperm(len(questions), generator=generator)[:n]
        else:
            weights = torch.tensor([often.get(q.kind, 1.0) for q in questions])
            order = torch.multinomial(weights, n, generator=generator)
        return [questions[i] for i in order.tolist()]

    def run(
        self, deadline_ns: int = 0, tell: Callable[[dict[str, Any]], None] | None = None
    ) -> bool:
        """Train what is left of the stages; return whether all of it is done.

        Args:
            deadline_ns: monotonic; the run ends, saved, with the first step after it; 0 for none.
            tell: hears every row of the log.
        """
        for stage in STAGES[STAGES.index(self.stage) :]:
            if stage != self.stage:
                self._enter(stage)
            if not self._run_stage(deadline_ns, tell):
                return False
        return True

    def _run_stage(self, deadline_ns: int, tell: Callable[[dict[str, Any]], None] | None) -> bool:
        section = self.section(self.stage)
        begun, before = time.monotonic(), self.seconds
        saved = window = begun
        counted, sums, seen = 0, defaultdict[str, float](float), self.pictures_seen
        while self.step < section.steps:
            for name, value in self.train_step().items():
                sums[name] += value
            counted += 1
            now = time.monotonic()
            self.seconds = before + now - begun
            done = self.step >= section.steps
            late = bool(self.workers.firsts(0 < deadline_ns <= time.monotonic_ns()))
            speaks = self.step % (100 if self.stage == "see" else 10) == 0
            if speaks or done or late:
                row = {name: total / counted for name, total in sums.items()}
                per_s = (self.pictures_seen - seen) / max(1e-9, now - window)
                row |= {"pictures_per_s": per_s}
                if self.stage != "see":
                    row["samples_per_s"] = per_s * section.questions
                self._say(row, tell)
                counted, sums, seen, window = 0, defaultdict(float), self.pictures_seen, now
            at_end = done or late
            every = self.config.eval_every * (10 if self.stage == "see" else 1)
            if (self.step % every == 0 or at_end) and self.held_out is not None:
                self._say(self.examine(), tell)
                window = time.monotonic()
            if time.monotonic() - saved > self.config.save_every_s or at_end:
                self.save()
                saved = window = time.monotonic()
            if late and not done:
                return False
        return True

    def _say(self, row: dict[str, Any], tell: Callable[[dict[str, Any]], None] | None) -> None:
        full: dict[str, Any] = {"stage": self.stage, "step": self.step, "samples": self.samples}
        full |= {"pictures": self.pictures_seen, "seconds": round(self.seconds, 1), **row}
        if not self.workers.first:
            return
        with (self.out / LOG).open("a") as out:
            out.write(json.dumps(full) + "\n")
        plain = {k: v for k, v in full.items() if not isinstance(v, dict)}
        log.info(
            "%s",
            " ".join(
                f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in plain.items()
            ),
        )
        if tell is not None:
            tell(full)

    # -- examinations --------------------------------------------------------------------

    def examine(self) -> dict[str, Any]:
        """Ask about held-out pictures: accuracies with the picture and without."""
        assert self.held_out is not None
        n = min(self.config.eval_pictures, len(self.held_out))
        row: dict[str, Any] = {"sight_held_out": self.sight_accuracy(self.held_out, n)}
        if self.stage == "see":
            return row
        both: tuple[Shown, ...] = ("image", "none")
        for shown in both:
            found = self.accuracy(self.held_out, n, self.config.eval_questions, shown)
            row[f"accuracy_{shown}"] = found["all"]["accuracy"]
            row[f"kinds_{shown}"] = found
            if self.goals is not None:
                row[f"goals_{shown}"] = self.understood(self.held_out, n, shown)
        row["asked"] = row["kinds_image"]["all"]["asked"]
        return row

    @torch.no_grad()
    def understood(
        self, pictures: Pictures, n: int, shown: Shown = "image", batch: int = 8
    ) -> dict[str, float]:
        """Return how often instructions are understood: by latents, and in words.

        Keys are the kinds of instruction, with " words" for answers that are right in every
        token and without it for latents that are nearest to the right plain sentence.
        """
        assert self.goals is not None
        packer = self.packer if shown != "none" else Packer(self.checkpoint, vision=False)
        found: dict[str, list[float]] = defaultdict(list)
        for start in range(0, n, batch):
            rows = list(range(start, min(n, start + batch)))
            asked = [parted(pictures.records[row].questions)[0] for row in rows]
            if not any(asked):
                continue
            tokens = None
            packed = packer(asked).to(self.device)
            with self._autocast():
                if shown != "none":
                    half = len(pictures) // 2
                    seen = [(r + half) % len(pictures) for r in rows] if shown == "other" else rows
                    tokens = self.learner.image_tokens(pictures.pixels(seen).to(self.device))
                answers = self._answers(tokens, packed)
            flat = [q for each in asked for q in each]
            read = self.goals.read(answers.states, packed)
            _, hits = self.goals.loss(
                read, self.goals.index([q.answer for q in flat]).to(read.device)
            )
            words = answers.right.flatten()
            words = words[~words.isnan()]
            for question, hit, word in zip(flat, hits.tolist(), words.tolist(), strict=True):
                found[question.kind].append(hit)
                found[f"{question.kind} words"].append(word)
        return {kind: round(float(np.mean(hits)), 4) for kind, hits in sorted(found.items())}

    @torch.no_grad()
    def sight_accuracy(self, pictures: Pictures, n: int) -> float:
        """Return the share of the labels that the read-out without language tells rightly."""
        hits = []
        target, numbers = self.labels.target(pictures.records[:n])
        for start in range(0, n, 32):
            rows = list(range(start, min(n, start + 32)))
            with self._autocast():
                tokens = self.learner.image_tokens(pictures.pixels(rows).to(self.device))
            _, right = self.learner.sight.loss(
                tokens.float(), target[rows].to(self.device), numbers[rows].to(self.device)
            )
            hits.append(right.flatten())
        return float(torch.cat(hits).nanmean())

    @torch.no_grad()
    def accuracy(
        self, pictures: Pictures, n: int, questions: int, shown: Shown = "image", batch: int = 8
    ) -> dict[str, dict[str, float]]:
        """Ask about the first `n` pictures; return {kind: accuracy and questions asked}.

        Args:
            pictures: held-out ones.
            n: pictures.
            questions: of each, drawn by a fixed seed; 0 for all.
            shown: the picture, none at all, or another one.
            batch: pictures at a time.

        The kinds "all", "trained wording" and "held-out wording" sum up.
        """
        packer = self.packer if shown != "none" else Packer(self.checkpoint, vision=False)
        unscored = (*NEVER_SCORED, *GOAL_KINDS)
        right: dict[str, list[int]] = defaultdict(list)
        for start in range(0, n, batch):
            rows = list(range(start, min(n, start + batch)))
            draws = torch.Generator().manual_seed(start)
            asked = []
            for row in rows:
                every = [q for q in pictures.records[row].questions if q.kind not in unscored]
                asked.append(self._draw(every, questions or len(every), draws))
            tokens = None
            with self._autocast():
                if shown != "none":
                    half = len(pictures) // 2
                    seen = [(r + half) % len(pictures) for r in rows] if shown == "other" else rows
                    tokens = self.learner.image_tokens(pictures.pixels(seen).to(self.device))
                answers = self._answers(tokens, packer(asked).to(self.device))
            for hits, questions_ in zip(answers.right.tolist(), asked, strict=True):
                for hit, question in zip(hits, questions_, strict=False):
                    wording = "held-out wording" if question.held_out else "trained wording"
                    for name in ("all", wording, question.kind):
                        right[name].append(int(hit))
        return {
            name: {"accuracy": round(float(np.mean(hits)), 4), "asked": len(hits)}
            for name, hits in sorted(right.items())
        }

    def prior(self, pictures: Pictures, n: int, questions: int, batch: int = 8) -> dict[str, float]:
        """Return how right the commonest training answer to the same words is: no picture, no model."""
        counts: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
        for record in self.train.records:
            for q in record.questions:
                for key in (q.text, f"kind {q.kind}"):
                    counts[key][q.answer] += 1
        best = {key: max(answers, key=lambda a: answers[a]) for key, answers in counts.items()}
        hits = []
        for start in range(0, n, batch):
            draws = torch.Generator().manual_seed(start)
            for row in range(start, min(n, start + batch)):
                unscored = (*NEVER_SCORED, *GOAL_KINDS)
                every = [q for q in pictures.records[row].questions if q.kind not in unscored]
                for q in self._draw(every, questions or len(every), draws):
                    guess = best.get(q.text, best.get(f"kind {q.kind}"))
                    hits.append(guess == q.answer)
        return {"accuracy": round(float(np.mean(hits)), 4), "asked": len(hits)}

    def report(self) -> dict[str, Any]:
        """Examine on every held-out set, with and without the picture; write `report.json`."""
        made: dict[str, Any] = {
            "stage": self.stage,
            "step": self.step,
            "samples": self.samples,
            "pictures": self.pictures_seen,
            "hours": self.seconds / 3600,
            "n_image": self.checkpoint.n_image,
            "config": self.config.model_dump(mode="json"),
        }
        sets = {"held-out": self.held_out, "scene-D": self._held("scene-D")}
        for name, pictures in sets.items():
            if pictures is None:
                continue
            n, each = len(pictures), self.config.eval_questions
            made[name] = {
                shown: self.accuracy(pictures, n, each, shown)
                for shown in ("image", "none", "other")
            }
            made[name]["commonest answer"] = self.prior(pictures, n, each)
            made[name]["sight"] = self.sight_accuracy(pictures, n)
            if self.goals is not None:
                made[name]["goals"] = {
                    shown: self.understood(pictures, n, shown)
                    for shown in ("image", "none", "other")
                }
        (self.out / REPORT).write_text(json.dumps(made, indent=1) + "\n")
        return made

    # -- on disk -------------------------------------------------------------------------

    def _learned(self) -> dict[str, Tensor]:
        """Return every weight that any stage so far has trained."""
        inner = self.learner.model.model
        state = vision_state(self.learner.model)
        state |= {f"sight.{k}": v for k, v in self.learner.sight.state_dict().items()}
        if self.stage == "tune" and self.config.tune.mode == "full":
            state |= {f"language.{k}": v for k, v in inner.language_model.state_dict().items()}
        elif self.stage == "tune":
            state |= self._parts()
        if self.goals is not None:
            state |= {f"goals.{k}": v for k, v in self.goals.state_dict().items()}
        return state

    def _parts(self) -> dict[str, Tensor]:
        return {
            f"language.{name}.{key}": getattr(part, key).detach()
            for name, part in self.learner.model.model.language_model.named_modules()
            if isinstance(part, Adapted)
            for key in ("down", "up")
        }

    def save(self) -> None:
        """Write everything that is needed to go on: the first worker."""
        if not self.workers.first:
            return
        state = {f"weights.{k}": v for k, v in self._learned().items()}
        for index, parameter in enumerate(self._chosen):
            for name, value in self.optimizer.state[parameter].items():
                state[f"optimizer.{index}.{name}"] = torch.as_tensor(value)
        about = {
            "stage": self.stage,
            "step": self.step,
            "samples": self.samples,
            "pictures": self.pictures_seen,
            "seconds": self.seconds,
        }
        part = self.out / f".{STATE}.part"
        save_file(
            {k: v.detach().cpu().contiguous().clone() for k, v in state.items()},
            part,
            metadata={"vlm": json.dumps(about)},
        )
        part.replace(self.out / STATE)

    def _resume(self) -> None:
        state, about = read_state(self.out / STATE)
        self._enter(about["stage"])
        self._load_weights(state)
        for index, parameter in enumerate(self._chosen):
            prefix = f"optimizer.{index}."
            kept = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            if kept:
                self.optimizer.state[parameter] = {
                    k: v if k == "step" else v.to(self.device) for k, v in kept.items()
                }
        self.step, self.samples = about["step"], about["samples"]
        self.pictures_seen, self.seconds = about["pictures"], about["seconds"]

    def _begin_from(self, folder: Path) -> None:
        """Take another run's weights, of whatever stage; its optimiser is left behind."""
        file = folder.expanduser() / STATE
        if not file.is_file():
            raise ValueError(f"vlm.init: no {STATE} in {folder}")
        state, about = read_state(file)
        if about["stage"] == "tune":
            self._language()
        for name, part, what in (
            ("goals", self.goals, "instructions were read out in another way"),
            ("sight", self.learner.sight, "pictures were labelled in another way"),
        ):
            prefix = f"weights.{name}."
            if part is not None and any(
                (was := state.get(prefix + key)) is not None and was.shape != now.shape
                for key, now in part.state_dict().items()
            ):
                log.info("vlm.init: %s there; that part is fresh", what)
                state = {k: v for k, v in state.items() if not k.startswith(prefix)}
        self._load_weights(state)

    def _load_weights(self, state: dict[str, Tensor]) -> None:
        inner = self.learner.model.model
        homes: dict[str, nn.Module] = {
            "vision_tower": inner.vision_tower,
            "multi_modal_projector": inner.multi_modal_projector,
            "sight": self.learner.sight,
            "language": inner.language_model,
        }
        if self.goals is not None:
            homes["goals"] = self.goals
        for name, home in homes.items():
            prefix = f"weights.{name}."
            mine = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            odd = [
                k
                for k, v in mine.items()
                if k in (own := home.state_dict()) and own[k].shape != v.shape
            ]
            if odd:
                raise ValueError(f"vlm.init: {name} has another shape, for example {odd[0]}")
            if mine:
                home.load_state_dict(mine, strict=False)

    def export(self) -> Path:
        """Write the trained model as a LLaVA folder for both engines; return it."""

        fresh = load_llava(self.checkpoint.path, torch.bfloat16)
        state = folded_state(self.learner.model)
        fresh.load_state_dict({k: v.to("cpu", torch.bfloat16) for k, v in state.items()})
        part, folder = self.out / f".{LLAVA}.part", self.out / LLAVA
        shutil.rmtree(part, ignore_errors=True)
        fresh.save_pretrained(part)
        for file in part.glob("*.safetensors"):
            rename_tower(file)
        load_processor(self.checkpoint.path).save_pretrained(part)
        manifest = Path(self.checkpoint.path) / MANIFEST
        about = read_json(manifest) if manifest.is_file() else {}
        if self.checkpoint.template.name in TEMPLATES:  # else its chat template says it
            about |= {"template": self.checkpoint.template.name}
        digests = [sha256_file(file) for file in sorted(part.glob("*.safetensors"))]
        about["model_id"] = "-".join(digest[:16] for digest in digests)
        about["trained"] = {"stage": self.stage, "step": self.step, "samples": self.samples}
        write_manifest(part, about)
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
        if self.config.model == "smollm2":
            self.write_small()
        if self.goals is not None:
            head, note = self.goals.folded(), {"stage": "vlm", "step": self.step}
            head.save(self.out / LATENT, base=about["model_id"], note=note)
            judge = self.goals.judge(about["model_id"])
            if judge is not None:
                judge.save(self.out / UNDERSTANDING)
        return folder

    def write_small(self) -> None:
        """Write tower, projector and low-rank parts, halved: what a base model adds to packages."""
        tower = self.config.tower.model_dump(mode="json")
        about = {"tower": json.dumps(tower), "scale": str(LORA_SCALE)}
        for file, tensors in (
            (VISION, vision_state(self.learner.model)),
            (LANGUAGE, self._parts()),
        ):
            if tensors:
                half = {
                    k: v.detach().to("cpu", torch.bfloat16).contiguous() for k, v in tensors.items()
                }
                save_file(half, self.out / file, metadata=about)

    def _close_pool(self) -> None:
        """End the threads that make batches."""
        self._coming.clear()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None
