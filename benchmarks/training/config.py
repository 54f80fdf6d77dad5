"""What `openhelix train` does: one frozen record, from YAML, overrides or the command line.

The stages are the paper's (Appendix A.4) with the policy's own pretraining before them:
`policy`, `stage1`, `stage2`; `prepare` makes what both of the latter read and `export` what a
robot reads. Each keeps its own folder under `out`, so that a stage can be repeated with other
settings while the earlier ones are kept.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from openhelix.benchmarks.training.curves import Tracker
from openhelix.runtime.core.config import ConfigError
from openhelix.runtime.core.files import BadFile, CheckpointError, read_json, replace_file
from openhelix.runtime.core.paths import cache_folder
from openhelix.runtime.core.plugins import none_of
from openhelix.system1.checkpoint import CONFIG
from openhelix.system1.config import DIRECT, PRESETS, TACTILE, PolicyConfig
from openhelix.system1.train_loop import OptimizerName
from openhelix.system2.latents import KV, BadReadOut, LatentConfig
from openhelix.system2.model import layers_at_hand
from openhelix.system2.text import FILE as TEXT_CODE
from openhelix.system2.train import Regime
from openhelix.system2.vlm_config import VlmSection

STAGES = ("policy", "prepare", "stage1", "stage2", "export", "all", "understanding", "vlm")
Count = Annotated[int, Field(ge=1)]
Whole = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, lt=1)]
# The paper's names and System 2's.
REGIMES: dict[str, Regime] = {
    "frozen": "frozen",
    "prompt_tuning": "prompt",
    "lora": "lora",
    "full": "full",
    "vocabulary": "vocabulary",
}


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class PolicyStage(_Section):
    """System 1 alone, told its task by number or by a sentence.

    Attributes:
        told: "number": a row of a learned table; "sentence": what a frozen language model makes
            of one of many sentences for the task, see `told.py`. A tenth of the samples is
            told the number even then, so that the table is there to compare with.
        sentences: a JSON file {task: [sentence, ...]}; None for those that demonstrations are
            labelled with.
        held_sentences: likewise, for the held-out frames; None holds out a fifth of the above.
        sentence_noise: added to a sentence's latent, in units of the latents' spread.
        door_penalty: of the map that a policy begins with which knew no sentences before.
        freeze: beginnings of names of parameters that stay as they are; `encoder.condition.project`
            keeps the map of sentences as it was fitted.
        text_model, text_layers, text_words: the language model, the layers after which the mean
            of a sentence's tokens is read, and how many of its tokens follow one by one.
        text_code: "fitted" to the sentences, or the "encoder"'s: the very code in which the policy
            of `encoder_from` was told sentences, so that its encoder reads them from the first step.
        checkpoint: a trained policy's folder, taken instead of training one.
        pretrained: False: the stages after begin with an untrained policy (Table 4's contrast).
        encoder_from: a policy's folder whose encoder a fresh policy begins with, where the
            weights fit its own.
        init: a policy's folder whose weights the training begins with; what `changes` adds to
            the network is fresh.
        plan_s: seconds of training after which the rate has fallen and the stage is finished,
            in all runs together, however many of its `steps` it took; 0 counts steps.
        preset, changes: which network; fields of `openhelix.system1.config.PolicyConfig`.
        optimizer: "muon" or "adamw"; see `openhelix.system1.train_loop`.
    """

    told: Literal["number", "sentence"] = "number"
    sentences: Path | None = None
    held_sentences: Path | None = None
    sentence_noise: Annotated[float, Field(ge=0)] = 0.5
    door_penalty: Positive = 3.0
    freeze: tuple[str, ...] = ()
    text_model: str = "smollm2"
    text_layers: tuple[Whole, ...] = (1, 8)
    text_words: Whole = 0
    text_code: Literal["fitted", "encoder"] = "fitted"
    checkpoint: Path | None = None
    pretrained: bool = True
    encoder_from: Path | None = None
    init: Path | None = None
    preset: str = "small"
    changes: dict[str, Any] = {}
    plan_s: Annotated[float, Field(ge=0)] = 0.0
    steps: Count = 20_000
    batch: Count = 32
    draws: Count = 4
    optimizer: OptimizerName = "muon"
    lr: Positive = 1e-3
    weight_decay: Annotated[float, Field(ge=0)] = 5e-3
    warmup: Whole = 200
    ema: Share = 0.998
    eval_every: Count = 500
    save_every: Count = 100

    @model_validator(mode="after")
    def _begins_once(self) -> PolicyStage:
        if self.encoder_from is not None and self.init is not None:
            raise ValueError("encoder_from: init begins with a whole policy; say one of the two")
        return self

    def encoder_code(self) -> Path | None:
        """Return the file of the code that the encoder's policy was told in, where it is wanted.

        Raises:
            ConfigError: there is no such policy, or it was told no sentences.
        """
        if self.text_code == "fitted":
            return None
        if self.encoder_from is None:
            raise ConfigError("policy.text_code: encoder is that of policy.encoder_from=FOLDER")
        file = self.encoder_from.expanduser() / TEXT_CODE
        if not file.is_file():
            raise ConfigError(
                f"policy.text_code: no {TEXT_CODE} in {file.parent}: that policy was told no "
                "sentences; say fitted"
            )
        return file


class LatentSection(_Section):
    """System 2: which model, which read-out, what of it learns, and where its states come from.

    Attributes:
        model: "laptop", "smollm2", a model's folder, or a hub name, of any family in
            `openhelix.system2.families`.
        prompt, image_side: as in `openhelix.system2.engines.base`.
        kind, n_act, layer, layers, text_rows, vision, proprio: the read-out; see
            `openhelix.system2.latents`.
        regime: what of the language model learns.
        lora_rank: of regime "lora".
        shard: regimes "lora" and "full" with several workers: the language model's weights,
            gradients and optimiser's memory are divided among them (FSDP).
        projector_width: of the projector's hidden layer; 0 for a single linear layer.
        aux: train the auxiliary action head beside (paper's Eq. 1 and 2).
        clip: weight of the alignment loss to the instruction's embedding; 0 for none.
        clip_to: that embedding: "table", the task's row of the policy's table, or "sentence", what
            the frozen text encoder makes of the very sentence (LCB): the policy's own, where it
            was told sentences, else `policy.text_model`.
        answer: weight of the language model's own loss on an answer in words behind `<ACT>`, the
            plain sentence of what is to be done (LCB); 0 for none. Regimes "lora" and "full".
        lag_steps: a latent may come from an observation up to this many environment steps old
            (asynchronous training), as at one a second it does; 0 trains synchronously.
        null: share of samples whose latent is left out and whose task is named instead.
        feed: "live" runs the language model in every step, "prefix" over cached keys and
            values of some frames (exact, see `openhelix.system2.train`), "states" not at all: it
            reads states at an `<ACT>` that no longer learns; "auto" picks.
        frames: most frames with a cached prefix; each serves the frames up to `lag_steps` after.
        stride: every so many-th frame of an episode has cached states.
        phrasings: sentences a frame has states for.
        wordings: sentences a task from the grammar of `openhelix.benchmarks.calvin.wordings`, beside
            those that the data was labelled with; held-out frames are then told sentences of
            the development list.
        refuse: sentences that name no task ("sing", "do not open the drawer"), which the
            projector's start sends to the table's row for "no task named"; 0 for none.
        init: a `latent.safetensors` to begin with (stage `vlm` writes one that says instructions
            in the policy's own code); None for a fresh one.
        like: the `latent.safetensors` that the policy was trained with: the projector's start
            then says of each task what that one says, in place of the policy's table.
        max_gb: refuse to write more than this; feed "live" keeps no more in memory.
        prefix_gb: feed "live" where only `<ACT>` learns, or nothing: most that lies in `prepared/`
            of what was computed for samples that were drawn, for trainings that draw them again;
            0 keeps none.
        encode_batch: frames encoded together.
        dtype: of the language model, as in `openhelix.system2.engines.base`.
    """

    model: str = "laptop"
    prompt: str = "checkpoint"
    image_side: Whole = 0
    kind: str = "act_last"
    n_act: Count = 1
    layer: Whole = 0
    layers: tuple[Count, ...] = ()
    text_rows: Count = 32
    vision: bool = True
    proprio: bool = False
    regime: Literal["frozen", "prompt_tuning", "lora", "full", "vocabulary"] = "prompt_tuning"
    lora_rank: Count = 16
    shard: bool = False
    projector_width: Whole = 256
    aux: bool = True
    clip: Annotated[float, Field(ge=0)] = 0.0
    clip_to: Literal["table", "sentence"] = "table"
    answer: Annotated[float, Field(ge=0)] = 0.0
    lag_steps: Whole = 40
    null: Share = 0.1
    feed: Literal["auto", "live", "prefix", "states"] = "auto"
    frames: Count = 3000
    stride: Count = 2
    phrasings: Count = 2
    wordings: Whole = 0
    refuse: Whole = 0
    init: Path | None = None
    like: Path | None = None
    max_gb: Positive = 12.0
    prefix_gb: Annotated[float, Field(ge=0)] = 0.0
    encode_batch: Count = 8
    dtype: str = "auto"

    @field_validator("regime", mode="before")
    @classmethod
    def _short_name(cls, value: Any) -> Any:
        return "prompt_tuning" if value == "prompt" else value

    @model_validator(mode="after")
    def _teaches(self) -> LatentSection:
        if self.answer and self.regime not in ("lora", "full"):
            raise ValueError(
                f"answer: regime {self.regime!r} leaves the language model, and so its answers, as "
                "it is; it needs lora or full"
            )
        if self.answer and self.shard:
            raise ValueError("answer: not with shard: the vocabulary is not divided")
        for name in ("aux", "clip", "answer"):
            if self.kind == KV and getattr(self, name):
                raise ValueError(
                    f"{name}: read-out 'kv' has no state to learn it from; leave it out"
                )
        if self.clip_to != "table" and not self.clip:
            raise ValueError("latent.clip_to: there is no alignment loss; say latent.clip=1")
        if self.proprio and self.refuse:
            raise ValueError("refuse: not with proprio: sentences alone have no robot's state")
        return self

    def read_out(self) -> LatentConfig:
        """Return System 2's own record of the read-out.

        Raises:
            ConfigError: there is no such read-out.
        """
        try:
            return LatentConfig(
                self.kind,
                self.n_act,
                self.layer,
                self.text_rows,
                self.vision,
                self.layers,
                self.proprio,
            )
        except BadReadOut as error:
            raise ConfigError(str(error)) from None


class UnderstandingSection(_Section):
    """The head that says which instructions are refused; see `understanding.py`.

    Attributes:
        layers: after which the language model's states are read; the latent must read them too.
            Empty: those in the middle of the model that the latent reads.
        width: of the hidden layer.
        requests, refusals: sentences that name a task, and that name none.
        folds: the sentences' patterns are split into as many parts.
        steps: of the fit.
        false_refusals: share of sentences in patterns not seen, and of the development list,
            that may be refused.
    """

    layers: tuple[Whole, ...] = ()
    width: Count = 64
    requests: Annotated[int, Field(ge=1000)] = 4600
    refusals: Annotated[int, Field(ge=100)] = 2800
    folds: Annotated[int, Field(ge=2)] = 4
    steps: Count = 600
    false_refusals: Share = 0.01


class JointStage(_Section):
    """Stage 1 or 2: both systems together.

    Attributes:
        steps: 0 leaves the stage out.
        optimizer: of the policy, as in `PolicyStage`; all else has AdamW.
        lr_policy: of the policy; stage 1 keeps it frozen.
        lr_head, lr_act, lr_language: of projector and auxiliary head, of `<ACT>`, of the
            language model's own weights (regimes "lora" and "full").
        start: "table": the projector starts by saying what the policy's task table says,
            see `start.py`; "random": it starts untrained. Read where no stage came before.
        start_samples: with start "table", only those that the first steps draw, so many of them,
            and no others: an arm so begun has seen as much as one begun at random. 0: as many as
            help, drawn for the start alone.
    """

    steps: Whole
    batch: Count = 32
    draws: Count = 4
    optimizer: OptimizerName = "adamw"
    lr_policy: Positive = 1e-4
    lr_head: Positive = 5e-4
    lr_act: Positive = 1e-3
    lr_language: Positive = 5e-5
    weight_decay: Annotated[float, Field(ge=0)] = 5e-3
    warmup: Whole = 50
    ema: Share = 0.995
    clip_norm: Positive = 1.0
    eval_every: Count = 250
    save_every: Count = 100
    start: Literal["table", "random"] = "table"
    start_samples: Whole = 0


class Stage1(JointStage):
    """`<ACT>` and projector learn; the language model is frozen.

    Attributes:
        policy: "frozen" (the paper's Appendix A.4), or "learns" beside them (its Sec. 5.4).
    """

    steps: Whole = 1500
    policy: Literal["frozen", "learns"] = "frozen"


class Stage2(JointStage):
    """The policy learns too."""

    steps: Whole = 6000
    ema: Share = 0.999
    eval_every: Count = 500
    save_every: Count = 250


class TrainingConfig(_Section):
    """One training of the pair.

    Attributes:
        data: a collection that `openhelix collect` made, or its `frames` folder; a cache that
            `openhelix data cache` built; or a dataset, whose cache is built first. Several, with
            commas between them, are trained on together.
        mix: shares of the policy's samples, one for each collection; () by their frames.
        out: everything goes here; None for `train/<collection>` in the cache.
        validation: share of the episodes held out.
        time_limit_s: end the command after this long, saved; 0 for no limit.
        threads: torch threads; 0 leaves torch's own number.
        device: "cpu", "cuda", or "auto": CUDA where there is one.
        bf16: autocast to bfloat16; "auto" where the device computes it natively.
        tracker: "wandb" or "mlflow" gets the figures too, beside TensorBoard's files in each
            stage's folder; needs the extra of that name.
        workers: processes that train together, on a cluster of Ray's; 1 trains in this process, or
            in those that `torchrun` started. However many, a stage's `batch` is of all together.
        ray_address: the cluster; None for one on this machine alone.
        restarts: how often the workers are started again, from what was saved, after one died.
        accumulate: parts of a worker's share of a batch, worked on one after the other: less
            memory for the same result.
        understanding: of stage `understanding` alone.
        vlm: the base model's own training, see `openhelix.system2.vlm_config`; read by stage `vlm` alone.
    """

    data: Path = Path("demonstrations_ABC")
    mix: tuple[Annotated[float, Field(ge=0)], ...] = ()
    out: Path | None = None
    seed: Whole = 0
    device: str = "cpu"
    bf16: bool | Literal["auto"] = False
    threads: Whole = 0
    validation: Share = 0.05
    eval_frames: Count = 128
    time_limit_s: Annotated[float, Field(ge=0)] = 0.0
    log_every: Count = 20
    tracker: Tracker = ""
    workers: Count = 1
    ray_address: str | None = None
    restarts: Whole = 3
    accumulate: Count = 1
    policy: PolicyStage = PolicyStage()
    latent: LatentSection = LatentSection()
    stage1: Stage1 = Stage1()
    stage2: Stage2 = Stage2()
    understanding: UnderstandingSection = UnderstandingSection()
    vlm: VlmSection = VlmSection()

    @field_validator("data", mode="before")
    @classmethod
    def _joined(cls, value: Any) -> Any:
        return ",".join(map(str, value)) if isinstance(value, list | tuple) else value

    @property
    def computes_bf16(self) -> bool:
        """Whether autocast is used on this machine."""
        from openhelix.runtime.core.precision import computes_bf16

        return computes_bf16(self.bf16, self.device)

    def frames_folder(self) -> Path:
        """Return the training cache, the first where several are named.

        Raises:
            ConfigError: there is none, or it has no frames.
        """
        return self.frames_folders()[0]

    def frames_folders(self) -> tuple[Path, ...]:
        """Return the training caches in the order in which they are named.

        Raises:
            ConfigError: one is missing, named twice, or has no frames.
        """
        found = tuple(self._frames_folder(Path(name)) for name in self.named())
        if len(set(found)) < len(found):
            raise ConfigError(f"data: {self.data} names a collection twice; mix=[...] weighs them")
        return found

    def named(self) -> tuple[str, ...]:
        """Return what `data` names, one by one.

        Raises:
            ConfigError: it names nothing.
        """
        found = tuple(name.strip() for name in str(self.data).split(",") if name.strip())
        if not found:
            raise ConfigError("data: no collection is named")
        return found

    def _frames_folder(self, named: Path) -> Path:
        given = named.expanduser()
        places = [given, given / "frames"]
        if not given.is_absolute():
            places += [cache_folder() / "data" / given, cache_folder() / "data" / given / "frames"]
        for place in places:
            if (place / "cache.json").is_file():
                return place
        if any(place.is_dir() for place in places):
            raise ConfigError(
                f"data: {given} has no frames; `openhelix collect out={given}` draws them "
                "(frames.every must not be 0)"
            )
        raise ConfigError(
            f"data: no folder {given}; `openhelix collect` makes one, or name a dataset"
        )

    @property
    def folder(self) -> Path:
        """Where the training goes."""
        if self.out is not None:
            return self.out.expanduser()
        names = [f.parent.name if f.name == "frames" else f.name for f in self.frames_folders()]
        return cache_folder() / "train" / "+".join(names)


# -- Folders: what the stages leave in theirs, and what they ask of each other's -------

SETTINGS, BEGAN, LATENT, AUX, LANGUAGE = (
    "settings.json",
    "began.json",
    "latent.safetensors",
    "aux.safetensors",
    "language.safetensors",
)
# What may differ between a run and the one that continues it.
FREE = (
    "bf16",
    "eval_every",
    "save_every",
    "max_gb",
    "prefix_gb",
    "encode_batch",
    "checkpoint",
    "shard",
)


class NotDone(Exception):
    """The time limit came; the same command goes on."""


def keep_settings(folder: Path, settings: dict[str, Any], write: bool) -> None:
    """Check that a stage goes on as it was begun, and write what it was begun with.

    Args:
        folder: of the stage.
        settings: sections of plain values.
        write: False checks alone, before anything is opened.

    Raises:
        ConfigError: a stage is being continued with another setting.
        BadFile: what it was begun with cannot be read.
    """
    settings = json.loads(json.dumps(settings, default=str))
    file = folder / SETTINGS
    before = read_json(file) if file.is_file() else settings
    for section, values in settings.items():
        old = before.get(section)
        for key, value in values.items() if isinstance(values, dict) else [("", values)]:
            was = old.get(key, _usual(section, key)) if isinstance(old, dict) else old
            if was != value:
                where = f"{section}.{key}".rstrip(".")
                raise ConfigError(
                    f"{where}: {folder} was begun with {was!r}, not {value!r}; "
                    "choose another out=FOLDER or remove it"
                )
    if not write:
        return
    replace_file(file, (json.dumps(settings, indent=1) + "\n").encode())


def _usual(section: str, key: str) -> Any:
    """Return what a setting was in a stage begun before there was such a setting."""
    made = TrainingConfig.model_fields[section].default if key else None
    return None if made is None else made.model_dump(mode="json").get(key)


def section_settings(section: Any) -> dict[str, Any]:
    """Return a section without what may change on the way."""
    return {k: v for k, v in section.model_dump(mode="json").items() if k not in FREE}


def finished(
    stage: str, folder: Path, step: int, history: list[dict[str, Any]], steps: int
) -> dict[str, Any]:
    """Return what a stage says of itself.

    Raises:
        NotDone: it is not at its last step.
    """
    if step < steps:
        raise NotDone(f"{stage}: stopped at step {step} of {steps} by the time limit")
    last: dict[str, Any] = next((row for row in reversed(history) if "val_loss" in row), {})
    return {"stage": stage, "folder": str(folder), **last}


def base_policy_folder(config: TrainingConfig) -> Path | None:
    """Return the folder of the pretrained policy; None for an untrained one.

    Raises:
        ConfigError: there is none.
    """
    if not config.policy.pretrained:
        return None
    folder = config.policy.checkpoint or config.folder / "policy"
    folder = folder.expanduser()
    if not (folder / CONFIG).is_file():
        raise ConfigError(
            f"policy.checkpoint: no policy in {folder}; run `openhelix train policy` first, name "
            "a folder, or say policy.pretrained=false"
        )
    return folder


# -- What a configuration names: told of before anything is opened ---------------------


def check_policy(section: PolicyStage) -> None:
    """Refuse a network that there is not, and a folder without a policy.

    Raises:
        ConfigError: one line names the field and what is valid.
        BadFile: what the policy in `init` says of itself cannot be read.
    """
    if section.preset not in PRESETS:
        raise ConfigError(f"policy.preset: {none_of(section.preset, PRESETS)}")
    for name in ("checkpoint", "init", "encoder_from"):
        folder = getattr(section, name)
        if folder is not None and not (folder.expanduser() / CONFIG).is_file():
            raise ConfigError(
                f"policy.{name}: no policy in {folder}; name a folder that `openhelix train policy` "
                "wrote"
            )
    changes = json.loads(json.dumps(section.changes, default=str))
    base = _before_changes(section)
    try:
        made = PolicyConfig.from_json({**base, **changes}, "policy.changes")
    except BadFile as error:
        raise ConfigError(str(error).replace(": ", ".", 1)) from None
    if made.flow and made.head in DIRECT:
        raise ConfigError(
            f"policy.changes.head: {made.head!r} samples nothing, so that no flow is learned; say "
            "policy.preset=small"
        )


def _before_changes(section: PolicyStage) -> dict[str, Any]:
    """Return the network that `changes` are made to, with a camera for the sense that they add."""
    if section.init is not None:
        file = section.init.expanduser() / CONFIG
        return PolicyConfig.from_json(read_json(file), str(file)).to_json()
    base = PRESETS[section.preset]().to_json()
    sensors = section.changes.get("sensors")
    if isinstance(sensors, list | tuple) and TACTILE in sensors:
        base["cameras"] = [*base["cameras"], {**base["cameras"][-1], "name": TACTILE}]
    return base


def check_model(section: LatentSection) -> None:
    """Refuse a model that is nowhere, and a read-out of layers that it lacks, where that is known.

    Raises:
        ConfigError: one line names the field and what is valid.
    """
    read_out = section.read_out()
    try:
        layers = layers_at_hand(section.model)
        if layers is not None:
            read_out.layers_of(layers)
    except CheckpointError as error:
        raise ConfigError(f"latent.{error}") from None
    except BadReadOut as error:
        raise ConfigError(str(error)) from None
