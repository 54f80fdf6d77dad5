"""The training stages, each in its own folder and resumable."""

from __future__ import annotations

import json
import logging
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openhelix.benchmarks.training.config import (
    AUX,
    BEGAN,
    LANGUAGE,
    LATENT,
    JointStage,
    NotDone,
    TrainingConfig,
    base_policy_folder,
    finished,
    keep_settings,
    section_settings,
)
from openhelix.benchmarks.training.feeds import (
    Feed,
    LiveFeed,
    PrefixFeed,
    Source,
    StateFeed,
    Store,
    encode_prefix,
    encode_read_outs,
    feed_kind,
    kept_of,
    prefix_store,
    regime_of,
    states_store,
)
from openhelix.benchmarks.training.joint import Joint, Stage
from openhelix.benchmarks.training.progress import Showing
from openhelix.benchmarks.training.start import start_from_table
from openhelix.benchmarks.training.told import prepare_told
from openhelix.runtime.core.config import CommandFailed, ConfigError
from openhelix.runtime.core.files import (
    BadFile,
    check_kinds,
    load_tensors,
    replace_file,
    save_tensors,
)
from openhelix.runtime.core.interfaces import LatentSpec
from openhelix.runtime.core.precision import pick_dtype
from openhelix.runtime.core.workers import ALONE, Workers
from openhelix.system1.checkpoint import WEIGHTS, Network, load_policy, load_strict, save_policy
from openhelix.system1.data import Cache
from openhelix.system1.latent_adapter import (
    adapt_to_latent,
    name_by_sentences,
    task_anchors,
    with_latent,
)
from openhelix.system1.model import VisuomotorPolicy
from openhelix.system1.train import (
    TrainConfig,
    Trainer,
    fresh_network,
    opened_encoder,
    policy_config,
)
from openhelix.system1.train_loop import (
    STATE,
    Curves,
    Pace,
    Watch,
    draw_curves,
    load_state,
    run_loop,
    save_state,
    trained,
    whole,
)
from openhelix.system2.latents import KV, LATENT_DIM, LatentHead, plain_name
from openhelix.system2.model import Checkpoint, load_model, open_checkpoint, sha256_file
from openhelix.system2.probe import WordSpace
from openhelix.system2.text import FILE, TextCode, TextError, TextReader, fitted_code
from openhelix.system2.train import CHANGES, RegimeError, System2Learner

# -- Loss curves of a joint stage ------------------------------------------------------

TERMS = (
    ("loss", "all"),
    ("policy", "policy"),
    ("aux_position", "auxiliary: position"),
    ("aux_rotation", "auxiliary: rotation"),
    ("clip", "alignment"),
    ("answer", "answer in words"),
)
HELD_OUT = (
    ("val_loss", "all"),
    ("val_policy", "policy, told by latents"),
    ("val_policy_named", "policy, told the task's name"),
)


def plot_joint(path: Path, stage: str, history: list[dict[str, Any]]) -> None:
    """Draw training terms, held-out losses, and how often a latent means the right task."""
    panels = (
        Curves(f"{stage}: training", "loss", TERMS, log=True),
        Curves("held-out episodes, average weights", "loss", HELD_OUT, log=True),
        Curves(
            "latents nearest to their task's row",
            "% of held-out frames",
            (("val_task_top1", ""),),
            100.0,
            top=100.0,
        ),
    )
    draw_curves(path, panels, history)


# -- A stage: its parts opened or continued, trained, and written ----------------------

log = logging.getLogger(__name__)


def policy_settings(
    config: TrainingConfig, deadline_ns: int = 0, workers: Workers = ALONE
) -> TrainConfig:
    """Return System 1's own configuration of the stage `policy`."""
    p = config.policy
    left = (deadline_ns - time.monotonic_ns()) * 1e-9 if deadline_ns else 0.0
    told = workers.once(lambda: prepare_told(config)) if p.told == "sentence" else None
    return TrainConfig(
        cache=config.frames_folders(),
        mix=config.mix,
        sentences=told.sentences if told else None,
        held_sentences=told.held if told else None,
        sentence_noise=p.sentence_noise,
        door_penalty=p.door_penalty,
        out=config.folder / "policy",
        preset=p.preset,
        changes=p.changes,
        init=p.init,
        encoder_from=p.encoder_from.expanduser() if p.encoder_from else None,
        freeze=p.freeze,
        optimizer=p.optimizer,
        plan_s=p.plan_s,
        steps=p.steps,
        batch=p.batch,
        accumulate=config.accumulate,
        draws=p.draws,
        lr=p.lr,
        weight_decay=p.weight_decay,
        warmup=p.warmup,
        ema=p.ema,
        bf16=config.computes_bf16,
        device=config.device,
        seed=config.seed,
        validation=config.validation,
        eval_every=p.eval_every,
        eval_frames=config.eval_frames,
        save_every=p.save_every,
        log_every=config.log_every,
        time_limit_s=max(left, 1e-6) if deadline_ns else 0.0,
    )


def base_policy(config: TrainingConfig, cache: Cache, spec: LatentSpec | None = None) -> Network:
    """Return the policy that the two joint stages begin with; an untrained one for these latents."""
    folder = base_policy_folder(config)
    if folder is not None:
        model = load_policy(folder)
        have, want = model.config.horizon, cache.meta["horizon"]
        if have != want:
            raise ConfigError(f"policy.checkpoint: horizon {have}, the data has {want}")
        return model
    settings = policy_settings(config)
    frames, _ = cache.split(config.validation, config.seed)
    made = policy_config(settings, cache)
    made = made if spec is None else with_latent(made, spec)
    source = opened_encoder(settings.encoder_from)
    return fresh_network(made, cache, frames, config.seed, source)


class JointRun:
    """One joint stage: its parts, opened or continued, and its folder.

    Args:
        config: of the whole training.
        stage: which.
        deadline_ns: monotonic time to stop after; 0 for none.
        begin: False only makes what the stage reads, and binds its folder to no settings.
        workers: that train together, each with a run of its own.

    Raises:
        ConfigError: the settings contradict each other, the data, or an earlier run.
        NotDone: the time limit came while System 2's states were being made.
    """

    def __init__(
        self,
        config: TrainingConfig,
        stage: Stage,
        deadline_ns: int = 0,
        begin: bool = True,
        workers: Workers = ALONE,
    ) -> None:
        self.config, self.stage, self.workers = config, stage, workers
        self.section: JointStage = getattr(config, stage)
        self.folder = config.folder / stage
        self.deadline_ns = deadline_ns
        self.cache = Cache(config.frames_folders())
        self.before = self._before()
        self._settings(write=False)
        self.learner = open_learner(config, stage, self.before)
        latent = config.latent
        _, held = self.cache.split(config.validation, config.seed)
        self.source = Source.open(self.cache, config.seed, latent.vision, latent.wordings, held)
        spec = self.learner.head.spec(self.learner.checkpoint, raw=False)
        policy = self._policy(spec)
        if begin and self._starts_from_table and not (self.folder / STATE).is_file():
            name_by_data(config, self.source, policy)
        policy = adapt_to_latent(policy, spec, config.seed)
        if begin:
            self._settings(write=True)
        feed = self._feed()
        act_seed = seed_of(config, self.learner)
        self.joint = Joint(config, stage, self.cache, policy, self.learner, feed, workers=workers)
        self.joint.act_seed = act_seed
        if config.latent.clip:
            if config.latent.clip_to == "sentence":
                self.joint.clip_text = sentence_codes(config, self.source, spec.dim)
            else:
                self.joint.clip_text = alignment_text(self.joint, self.source)
        self.step = 0
        self.history: list[dict[str, Any]] = []
        if (self.folder / STATE).is_file():
            self.step, self.history = load_state(
                self.folder, self.pair, self.joint.ema, self.joint.optimizers, self.pair.kept
            )
            log.info("%s: going on at step %d", stage, self.step)
        elif begin and self._starts_from_table:
            self._start()
        workers.same([*trained(self.pair).values(), *self.joint.ema.values.values()])

    @property
    def _starts_from_table(self) -> bool:
        fresh = self.before is None and self.config.latent.init is None
        return fresh and self.section.start == "table"

    @property
    def pair(self) -> Any:
        """Both systems."""
        return self.joint.pair

    def _before(self) -> Path | None:
        """Return the folder of the stage that this one begins from."""
        if self.stage == "stage1" or self.config.stage1.steps == 0:
            return None
        folder = self.config.folder / "stage1"
        if not (folder / LATENT).is_file():
            raise ConfigError(
                f"stage2: nothing in {folder}; run `openhelix train stage1` first, or say "
                "stage1.steps=0"
            )
        return folder

    def _policy(self, spec: LatentSpec) -> Network:
        if self.before is not None:
            return load_policy(self.before)
        return base_policy(self.config, self.cache, spec)

    def _settings(self, write: bool) -> None:
        own = {
            self.stage: section_settings(self.section),
            "latent": section_settings(self.config.latent),
            "seed": self.config.seed,
        }
        write = write and self.workers.first
        keep_settings(self.folder, own, write)
        origin = self.before or base_policy_folder(self.config)
        if write and origin is not None and not (self.folder / BEGAN).is_file():
            began = {"policy": str(origin), "sha256": sha256_file(origin / WEIGHTS)}
            replace_file(self.folder / BEGAN, (json.dumps(began, indent=1) + "\n").encode())

    def _feed(self) -> Feed:
        section, learner = self.config.latent, self.learner
        kind = feed_kind(section, self.stage, self.config.device)
        log.info("%s: latents from feed %r, regime %r", self.stage, kind, learner.regime)
        if kind == "live":
            learner.to(self.config.device)
            asks = section.answer > 0 and learner.regime in ("lora", "full")
            kept = kept_of(self._prepared, learner, self.source, section)
            return LiveFeed(learner, self.source, section.max_gb * 1e9, asks, kept)
        store = self.prepare(kind)
        return PrefixFeed(learner, store) if kind == "prefix" else StateFeed(learner, store)

    @property
    def _prepared(self) -> Path:
        return self.config.folder / "prepared"

    def prepare(self, kind: str) -> Store:
        """Make the store of a kind, or what is missing of it."""
        section, learner, source = self.config.latent, self.learner, self.source
        learner.to(self.config.device)
        make = prefix_store if kind == "prefix" else states_store
        encode = encode_prefix if kind == "prefix" else encode_read_outs
        store = make(self._prepared, learner, source, section)
        learner.eval()

        def of_frames(frames: Tensor, said: Tensor) -> dict[str, Tensor]:
            return encode(learner, source, section.encode_batch, frames, said)

        if not store.build(of_frames, section.max_gb, self.deadline_ns, self.workers):
            raise NotDone(f"{self.stage}: {kind} not complete when the time limit came")
        return store

    def _start(self) -> None:
        found = start_from_table(self.joint, self.source)
        self.joint.ema.values = {
            n: p.detach().clone() for n, p in self.pair.named_parameters() if p.requires_grad
        }
        if found:
            log.info("%s: projector fitted to the task table: %s", self.stage, found)
            row = {f"start_{k}": v for k, v in found.items()}
            self.history.append({"step": 0, "seconds": 0.0, **row, **self.evaluate()})

    def train_step(self) -> dict[str, float]:
        """See `openhelix.system1.train_loop.Run`."""
        row = self.joint.step(self.step)
        self.step += 1
        return row

    def evaluate(self) -> dict[str, float]:
        """See `openhelix.system1.train_loop.Run`."""
        return self.joint.evaluate() | self.joint.act_gradients()

    def save(self) -> None:
        """Write both systems' average weights, then the state, then the plot: the first worker.

        The others give it their share of what is divided among them.
        """
        first, joint, out = self.workers.first, self.joint, self.folder
        if not first and not joint.sharded:
            return
        joint.ema.swap(self.pair)
        language = {}
        for name, p in trained(self.learner.model).items():
            all_of_it = whole(p.detach())
            if first:
                language[plain_name(name)] = all_of_it.cpu()
        if first:
            self._save_average(out, language)
        joint.ema.swap(self.pair)
        save_state(
            out,
            self.pair,
            joint.ema,
            joint.optimizers,
            self.step,
            self.history,
            self.pair.kept,
            write=first,
        )
        if not first:
            return
        try:
            plot_joint(out / "loss.png", self.stage, self.history)
        except ImportError:
            log.warning("matplotlib is not installed: no loss.png")

    def _save_average(self, out: Path, language: dict[str, Tensor]) -> None:
        learner, policy = self.learner, self.joint.policy
        spec = learner.head.spec(learner.checkpoint, raw=False)
        policy.config = with_latent(policy.config, spec)
        save_policy(out, policy.config, policy.state_dict(), policy.normalizer)
        note = {"stage": self.stage, "step": self.step, **self._act_note()}
        part = out / f".{LATENT}.part"
        learner.head.save(part, base=learner.checkpoint.model_id, note=note)
        part.replace(out / LATENT)
        save_tensors(out / AUX, learner.aux.state_dict())
        if language:
            save_tensors(out / LANGUAGE, language)

    def _act_note(self) -> dict[str, Any]:
        """Return what a card says of `<ACT>`: how far it has moved, and the words nearest to it."""
        moved = self.joint.act_row()
        if not moved or self.step < self.section.steps:
            return {}
        space = WordSpace(self.learner.checkpoint)
        tokens = self.learner.head.act.detach().float().cpu()
        return {
            "act": {
                "cosine_to_seed": round(moved["act_cosine"], 4),
                "moved": round(moved["act_moved"], 4),
                "nearest": [[near["word"] for near in space.nearest(token)] for token in tokens],
            }
        }

    def run(self, watch: Watch | None = None) -> dict[str, Any]:
        """Train to the last step, watched.

        Raises:
            NotDone: the time limit came first.
        """
        s = self.section
        pace = Pace(s.steps, s.eval_every, s.save_every, self.config.log_every, self.deadline_ns)
        run_loop(self, pace, watch, self.workers)
        return finished(self.stage, self.folder, self.step, self.history, s.steps)


def open_learner(config: TrainingConfig, stage: Stage, before: Path | None) -> System2Learner:
    """Return System 2 with its head from the stage before, or a fresh one.

    Raises:
        ConfigError: the stage before was trained for another read-out.
    """

    section, regime = config.latent, regime_of(config.latent, stage)
    read_out = section.read_out()
    checkpoint = open_checkpoint(section.model, read_out.rows, section.prompt, section.image_side)
    read_out.layers_of(checkpoint.layers)
    dtype = torch.float32 if regime in CHANGES else pick_dtype(section.dtype)
    whole_model = load_model(checkpoint.path, dtype).eval()
    model = checkpoint.family.core(whole_model)
    asks = section.answer > 0 and regime in ("lora", "full")
    words = whole_model.get_output_embeddings().requires_grad_(False) if asks else None
    table = model.get_input_embeddings().weight[: checkpoint.act_ids[0]]
    if before is None and section.init is not None:
        head = LatentHead.load(section.init.expanduser())
        if head.config != read_out:
            raise ConfigError(f"latent.init: was made for {head.config}, not {read_out}")
    elif before is None:
        head = fresh_head(config, checkpoint, table)
    else:
        head = LatentHead.load(before / LATENT)
        if head.config != read_out:
            raise ConfigError(f"latent: stage1 was trained for {head.config}, not {read_out}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        try:
            learner = System2Learner(model, checkpoint, head, regime, section.lora_rank, words)
        except RegimeError as error:
            raise ConfigError(f"latent.{error}") from None
    if before is not None:
        load_strict(learner.aux, load_tensors(before / AUX)[0], str(before / AUX))
        if (before / LANGUAGE).is_file():
            learned, _ = load_tensors(before / LANGUAGE)
            check_kinds(learned, str(before / LANGUAGE), model.state_dict())
            unknown = model.load_state_dict(learned, strict=False).unexpected_keys
            if unknown:
                raise BadFile(f"{before / LANGUAGE}: {unknown[0]} is not of {section.model}")
    return learner


def seed_of(config: TrainingConfig, learner: System2Learner) -> Tensor:
    """Return the `<ACT>` (n_act, hidden) that the first joint stage began with."""
    section = config.latent
    if section.init is not None:
        return LatentHead.load(section.init.expanduser()).act.detach().float()
    table = learner.model.get_input_embeddings().weight[: learner.checkpoint.act_ids[0]]
    return fresh_head(config, learner.checkpoint, table).act.detach().float()


def fresh_head(config: TrainingConfig, checkpoint: Checkpoint, table: Tensor) -> LatentHead:
    """Return the untrained head of a model with the embedding table `table` (V, hidden)."""
    section, read_out = config.latent, config.latent.read_out()
    dim = read_out.numbers(checkpoint) if read_out.kind == KV else LATENT_DIM
    return LatentHead.fresh(read_out, table, dim, config.seed, section.projector_width)


def alignment_text(joint: Joint, source: Source) -> Tensor:
    """Return what the alignment loss pulls each task's latent to, (n_tasks, dim).

    The instruction as the policy knows it: its table's row, seen through its adapter. A policy
    without a table has the language model's own embedding of one sentence a task, turned to
    the latent's width by a fixed random map.
    """
    anchors = task_anchors(joint.policy)
    if anchors is not None:
        return anchors[:, 0].to(joint.device)
    tasks = range(len(source.cache.meta["tasks"]))
    text = joint.learner.text_embedding([source.sentences.first(task) for task in tasks])
    width = joint.learner.head.projector.out_features
    generator = torch.Generator().manual_seed(0)
    turn = torch.randn(text.shape[1], width, generator=generator).to(text) / width**0.5
    return text @ turn


def sentence_codes(config: TrainingConfig, source: Source, dim: int) -> Tensor:
    """Return what the frozen text encoder makes of every sentence, (n_sentences, dim).

    As LCB's alignment loss, which pulls `<ACT>` to CLIP's embedding of the instruction: the encoder
    is the one that told the policy sentences. A policy that was told none has one fitted to these.

    Raises:
        ConfigError: its codes have another width than the latent.
    """
    folder = base_policy_folder(config)
    file = None if folder is None else folder / FILE
    p, texts = config.policy, source.sentences.texts
    try:
        if file is not None and file.is_file():
            code = TextCode.load(file)
            reader = TextReader(p.text_model, code.layers, config.device)
        else:
            reader = TextReader(p.text_model, p.text_layers, config.device)
            code = fitted_code(reader, texts, dim=dim)
        found = reader.encode(code, texts)[:, 0]
    except TextError as error:
        raise ConfigError(f"latent.clip_to: {error}") from None
    if found.shape[1] != dim:
        raise ConfigError(
            f"latent.clip_to: the text encoder's codes have {found.shape[1]} numbers, the latent "
            f"has {dim}"
        )
    return found.to(config.device)


def name_by_data(config: TrainingConfig, source: Source, policy: Network) -> None:
    """Make the rows of a told policy's table what it makes of the data's sentences.

    What it was told sentences for, it has hardly learned by number (`name_by_sentences`), and a
    projector is fitted to the rows.

    Raises:
        ConfigError: its code is of another language model than `policy.text_model`.
    """
    folder = base_policy_folder(config)
    if folder is None or not (folder / FILE).is_file():
        return
    number, texts = source.sentences.of_tasks()
    try:
        code = TextCode.load(folder / FILE)
        reader = TextReader(config.policy.text_model, code.layers, config.device)
        latent = reader.encode(code, texts)
    except TextError as error:
        raise ConfigError(f"policy.checkpoint: {error}") from None
    if len(number.unique()) == len(source.cache.meta["tasks"]):
        name_by_sentences(policy, latent, number)


def keep_reading(folder: Path) -> None:
    """Note beside a policy's code how the policy reads it (`TextCode.reading`)."""
    model = load_policy(folder)
    if isinstance(model, VisuomotorPolicy):
        weight = model.encoder.condition.project.weight.detach().float()
        replace(TextCode.load(folder / FILE), reading=weight).save(folder / FILE)


def run_policy(
    config: TrainingConfig,
    deadline_ns: int,
    shown: Showing | None = None,
    workers: Workers = ALONE,
) -> dict[str, Any]:
    """Train System 1 alone.

    Raises:
        NotDone: the time limit came first.
    """
    if config.policy.checkpoint is not None or not config.policy.pretrained:
        return {"stage": "policy", "skipped": True}
    settings = policy_settings(config, deadline_ns, workers)
    own = {"policy": section_settings(config.policy), "seed": config.seed}
    keep_settings(settings.out, own, write=False)
    trainer = Trainer(settings, workers)
    if workers.first:
        keep_settings(settings.out, own, write=True)
        if settings.sentences is not None:
            shutil.copyfile(settings.sentences.with_name(FILE), settings.out / FILE)
    with (shown or Showing())("policy", settings.out) as watch:
        trainer.run(watch)
    if settings.sentences is not None:
        keep_reading(settings.out)
    steps = config.policy.steps
    if config.policy.plan_s and workers.firsts(trainer.seconds) >= config.policy.plan_s:
        steps = trainer.step  # as many as there was time for
    return finished("policy", settings.out, trainer.step, trainer.history, steps)


def run_joint(
    config: TrainingConfig,
    stage: Stage,
    deadline_ns: int,
    shown: Showing | None = None,
    workers: Workers = ALONE,
) -> dict[str, Any]:
    """Train a joint stage, unless it is left out.

    Raises:
        NotDone: the time limit came first.
        CommandFailed: the loss was not finite.
    """
    if getattr(config, stage).steps == 0:
        return {"stage": stage, "skipped": True}
    try:
        run = JointRun(config, stage, deadline_ns, workers=workers)
        with (shown or Showing())(stage, run.folder) as watch:
            return run.run(watch)
    except FloatingPointError as error:
        raise CommandFailed(f"{stage}: {error}") from error


def prepare(config: TrainingConfig, deadline_ns: int, workers: Workers = ALONE) -> dict[str, Any]:
    """Make what the next joint stage reads, and train nothing."""
    first = config.stage1.steps and not (config.folder / "stage1" / LATENT).is_file()
    stage: Stage = "stage1" if first else "stage2"
    run = JointRun(config, stage, deadline_ns, begin=False, workers=workers)
    files = list((config.folder / "prepared").rglob("*.safetensors"))
    return {
        "stage": "prepare",
        "for": stage,
        "feed": feed_kind(config.latent, stage, config.device),
        "frames": len(run.joint.feed.frames),
        "gb": round(sum(f.stat().st_size for f in files) / 1e9, 3),
    }
