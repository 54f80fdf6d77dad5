"""The experiments: YAML files in `experiments/`, one for each table and figure of the paper.

Each lists what is trained, how it is measured and the paper's figures, so that an experiment can
be added without touching code. The models below validate the files; an invalid key or name is
reported in one line.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from openhelix.runtime.core import plugins
from openhelix.runtime.core.config import ConfigError, read_yaml, validate
from openhelix.runtime.core.plugins import none_of
from openhelix.system1.config import DIRECT, TACTILE, Encoder, PolicyConfig, Sensor
from openhelix.system2.latents import KV, LatentConfig
from openhelix.system2.train import CHANGES

# -- What a file may hold: variants, rows and conditions, the paper's figures, comparisons

SEES: tuple[Sensor, ...] = PolicyConfig().sensors
SCALED = {"dim": 288, "heads": 12, "layers": 12}
EXPERT = {"heads": 3, "layers": 30}  # as System 2's: SmolLM2-135M's layers, and its keys' heads
Count = Annotated[int, Field(ge=1)]
Percent = Annotated[float, Field(ge=0, le=100)]
LENGTH = 5  # tasks in a chain
BATCHES = 4  # in one of a `longer` training


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class Variant(_Section):
    """One way to build and train the pair of systems.

    Attributes:
        says: what it is, in words.
        policy: "pretrained" begins with the policy that was trained alone, "scratch" with an
            untrained one, "untrained" with that policy's own network before its training,
            "encoder" with one of its own make that began with the pretrained policy's encoder,
            where the weights fit, and then learned alone as that one did; "kept" stays with the
            pretrained one as it is, and all samples are stage 1's; "only" is that policy by
            itself; "shipped" is the project's own pair as it is, and nothing is trained.
        regime: what of the language model learns; "frozen" trains the projector alone.
        clip, aux, vision: alignment loss, auxiliary action head, image in System 2's prompt.
        clip_to: what the alignment loss draws latents to: the policy's "table" of tasks, or the
            frozen text encoder's embedding of the "sentence".
        answer: System 2 learns to answer in words, too, behind `<ACT>`.
        prealign: stage 1 (projector and `<ACT>` alone) before stage 2; without it stage 2 has
            its samples too.
        aligned: with the policy "frozen" in stage 1 (Appendix A.4) or with it too "learning"
            (Sec. 5.4).
        latent: the read-out, a kind of `openhelix.system2.latents`.
        lag: a latent may be up to so many environment steps old in training; 0 is synchronous.
        layer, n_act: of the read-out: after which layer (0: the last), how many `<ACT>`.
        proprio: System 2 is told the robot's own state, too.
        model: System 2's, as `openhelix train` names it.
        projector: between the systems, "linear" or with a hidden layer.
        fitted: the projector begins as what best sends the states of the first steps' own samples
            to the policy's tasks (`openhelix.benchmarks.training.start`), not at random.
        longer: so many times the samples of the scale, in larger batches and with the optimiser
            that the policy learned alone with; System 2's states, which are frozen, are kept.
        head, encoder, sensors, sampler: System 1's; see `openhelix.system1.config`.
        scaled: System 1 has twice the width and three times the blocks.
    """

    says: str
    policy: Literal["pretrained", "scratch", "untrained", "encoder", "kept", "only", "shipped"] = (
        "pretrained"
    )
    regime: Literal["frozen", "prompt", "lora", "full", "vocabulary"] = "prompt"
    clip: bool = False
    clip_to: Literal["table", "sentence"] = "table"
    answer: bool = False
    aux: bool = False
    vision: bool = True
    prealign: bool = True
    aligned: Literal["frozen", "learning"] = "frozen"
    latent: str = "act_last"
    lag: Annotated[int, Field(ge=0)] = 0
    layer: Annotated[int, Field(ge=0)] = 0
    n_act: Count = 1
    proprio: bool = False
    model: str = "laptop"
    projector: Literal["linear", "mlp"] = "mlp"
    fitted: bool = False
    longer: Count = 1
    head: Literal["trajectory", "dit", "plain", "lstm", "transformer", "map", "expert"] = (
        "trajectory"
    )
    encoder: Encoder = "light"
    sensors: tuple[Sensor, ...] = SEES
    sampler: Literal["diffusion", "flow"] = "diffusion"
    scaled: bool = False

    @property
    def network(self) -> dict[str, Any]:
        """What System 1 has other than the base: options of `openhelix train`."""
        changes: dict[str, Any] = dict(SCALED) if self.scaled else {}
        changes |= EXPERT if self.head == "expert" else {}
        for name, usual in (("head", "trajectory"), ("encoder", "light"), ("sensors", SEES)):
            if getattr(self, name) != usual:
                changes[name] = getattr(self, name)
        options: dict[str, Any] = {"policy.changes": changes} if changes else {}
        return options | ({"policy.preset": "small_flow"} if self.sampler == "flow" else {})

    @model_validator(mode="after")
    def _can_be_built(self) -> Variant:
        if self.head in DIRECT and self.sampler == "flow":
            raise ValueError(f"sampler: flow, but head {self.head!r} samples nothing")
        LatentConfig(
            self.latent, self.n_act, self.layer, vision=self.vision, proprio=self.proprio
        )  # refuses a read-out that there is not
        if self.policy == "kept" and (self.regime in CHANGES or not self.prealign):
            raise ValueError("policy: kept has a stage 1 alone, where the language model is frozen")
        if self.aligned != "frozen" and (not self.prealign or self.policy == "kept"):
            raise ValueError("aligned: there is no stage 1 in which the policy could learn")
        if self.answer and self.regime not in ("lora", "full"):
            raise ValueError(f"answer: regime {self.regime!r} leaves the language model as it is")
        if (self.head == "expert") != (self.latent == KV):
            raise ValueError(
                f"head: {self.head!r} on latent {self.latent!r}; expert and {KV} go together"
            )
        if self.clip_to != "table" and not self.clip:
            raise ValueError("clip_to: there is no alignment loss; say clip: true")
        if self.fitted and self.latent == KV:
            raise ValueError(f"fitted: read-out {KV!r} has no projector to fit")
        if self.fitted and self.policy not in ("pretrained", "encoder", "kept"):
            raise ValueError(f"fitted: policy {self.policy!r} has no tasks to fit a projector to")
        if self.longer % BATCHES and self.longer > 1:
            raise ValueError(f"longer: {self.longer}, want 1 or a multiple of {BATCHES}")
        if self.longer > 1 and self.regime != "frozen":
            raise ValueError(f"longer: regime {self.regime!r}, but only a frozen model's are kept")
        network = {**self.network.get("policy.changes", {})}
        cameras = PolicyConfig().cameras
        if TACTILE in self.sensors:
            cameras = (*cameras, replace(cameras[-1], name=TACTILE))
        PolicyConfig(cameras=cameras, **network)  # refuses what does not go together
        if self.policy in ("pretrained", "kept") and self.network:
            raise ValueError(
                f"policy: {self.policy!r} is the base, which has another head, encoder, sampler, "
                "size or other sensors; say encoder (the base's encoder, a fresh head) or scratch"
            )
        return self


class Published(_Section):
    """What the paper prints for a row; None where it prints nothing.

    Attributes:
        in_a_row: percent of chains with 1 to 5 tasks done.
        avg_len: as printed, which is not always the sum of the rates.
        patterns: percent of successes by motion (Table 1).
    """

    in_a_row: tuple[Percent, Percent, Percent, Percent, Percent] | None = None
    avg_len: Annotated[float, Field(ge=0, le=LENGTH)] | None = None
    patterns: dict[str, Percent] | None = None

    @property
    def length(self) -> float | None:
        """Average length that the printed rates add up to; else the printed one."""
        return sum(self.in_a_row) / 100 if self.in_a_row is not None else self.avg_len

    @property
    def disagrees(self) -> bool:
        """Whether the printed average is not what the printed rates (whole percents) add up to."""
        if self.in_a_row is None or self.avg_len is None or self.length is None:
            return False
        return not math.isclose(self.length, self.avg_len, abs_tol=0.03)


class Row(_Section):
    """One line of a table: a variant under some conditions.

    Attributes:
        id: what comparisons call it.
        name: what the table calls it.
        variant: a name in `variants.yaml`; None for a method that is only quoted.
        suite: of `openhelix eval`.
        steps: environment steps per task.
        interval, latency: System 2 refreshes every so many steps, and arrives so late; with
            interval 1 every plan has a fresh latent.
        patterns, speeds: of calvin-d.
        final: measured on the scale's larger number of sequences, as the paper's Tables 7, 9.
        paper: its figures.
    """

    id: str = Field(pattern=r"^[\w-]+$")
    name: str
    variant: str | None = None
    suite: Literal["calvin", "calvin-e", "calvin-d", "calvin-r"] = "calvin"
    steps: Count = 60
    interval: Count = 1
    latency: Annotated[int, Field(ge=0)] = 0
    patterns: tuple[str, ...] = ("static", "left", "forward", "diagonal", "circular")
    speeds: tuple[str, ...] = ("paper",)
    final: bool = False
    paper: Published | None = None


class Contrast(_Section):
    """Two rows on the same episodes, and what the paper's finding says of them.

    Attributes:
        a, b: rows by id.
        axis: the one thing in which their arms differ; a field, or one of `AXES`.
        finding: of the paper's five, which one this bears on; 0 for none.
        expect: "b_better": b scores higher than a; "same": they differ by less than `margin`.
        margin: a difference below it is none, stated before anything is measured; in tasks in a
            row for chains, in success rate else.
        base_needs: what the experiment's `base` must score before this can be tested.
        patterns: only these motions count.
        says: the claim in words.
    """

    a: str
    b: str
    axis: str
    finding: Annotated[int, Field(ge=0, le=5)]
    expect: Literal["b_better", "same"] = "b_better"
    margin: Annotated[float, Field(gt=0)]
    base_needs: Annotated[float, Field(ge=0)] = 1.0
    patterns: tuple[str, ...] = ()
    says: str


class Experiment(_Section):
    """A table or figure of the paper.

    Attributes:
        name, title: "table2", and what it is about.
        kind: "rows" is trained and evaluated; "zoo" likewise, every system on every suite with
            what it costs; "probe" looks at latents.
        rows, contrasts: see there.
        base: the row of what all arms of the contrasts begin from.
        notes: what must be known to read our figures beside the paper's.
    """

    name: str
    title: str
    kind: Literal["rows", "zoo", "probe"] = "rows"
    rows: tuple[Row, ...] = ()
    contrasts: tuple[Contrast, ...] = ()
    base: str | None = None
    notes: tuple[str, ...] = ()
    options: dict[str, Any] = {}

    @model_validator(mode="after")
    def _names(self) -> Experiment:
        ids = [row.id for row in self.rows]
        for name in ids:
            if ids.count(name) > 1:
                raise ValueError(f"row {name!r} occurs twice")
        for contrast in self.contrasts:
            for name in (contrast.a, contrast.b):
                if name not in ids:
                    raise ValueError(f"contrast names row {name!r}; valid: {', '.join(ids)}")
            a, b = self.row(contrast.a), self.row(contrast.b)
            if a.suite != b.suite:
                raise ValueError(f"{a.id} and {b.id} are of different suites: no pairs")
            if a.suite == "calvin-d" and not {"static"} <= {*a.patterns} & {*b.patterns}:
                raise ValueError(f"{a.id} and {b.id}: without the static pattern nothing is shown")
        if self.base is not None and self.base not in ids:
            raise ValueError(f"base names row {self.base!r}; valid: {', '.join(ids)}")
        return self

    def row(self, name: str) -> Row:
        """Return a row by its id."""
        return next(row for row in self.rows if row.id == name)


class Scale(_Section):
    """How much is trained and measured.

    Attributes:
        says: in words.
        sequences, final_sequences: chains of a row, and of a row that is `final`.
        episodes_per_task: of calvin-d, for each task and motion.
        own_steps: for which a policy of another make than the base's learns alone, behind the
            base's encoder.
        max_steps: cuts every row's step limit; None leaves it.
        threads: of torch, for each worker of an evaluation.
        videos: episodes of each evaluation that are filmed; none of them is another for it.
        train: overrides of `openhelix train`, for every training.
        run: overrides of the runs that are measured.
        official: whether results may be kept as the project's own.
        decides: whether its verdicts count for the findings.
        notes: what must be known to read any table measured at it.
    """

    says: str
    sequences: Count
    final_sequences: Count
    episodes_per_task: Count
    own_steps: Count = 20_000
    max_steps: Count | None = None
    threads: Count = 1
    videos: Annotated[int, Field(ge=0)] = 2
    train: dict[str, Any] = {}
    run: tuple[str, ...] = ()
    official: bool = True
    decides: bool = True
    notes: tuple[str, ...] = ()


# -- Fair arms: two rows that are compared differ in one thing --------------------------
#
# An arm is a row's conditions and its variant. Samples are compared in `trainings.check_samples`.

# Axes that are more than one field, since one of them means nothing without the others.
AXES: Mapping[str, frozenset[str]] = {
    # What is aligned with means nothing without the loss.
    "clip": frozenset({"clip", "clip_to"}),
    # System 2 itself, against the same language model as a text encoder alone.
    "system 2": frozenset({"regime", "latent", "vision", "clip", "aux"}),
    # With an untrained policy there is nothing to align the projector with.
    "policy": frozenset({"policy", "prealign"}),
}
NOT_OF_AN_ARM = {"says", "id", "name", "variant", "paper", "final"}


def differences(a: Row, b: Row, variants: Mapping[str, Variant]) -> set[str]:
    """Return the fields of variant and conditions in which two rows differ."""
    first, second = _arm(a, variants), _arm(b, variants)
    return {name for name in first if first[name] != second[name]}


def check_axes(experiment: Experiment, variants: Mapping[str, Variant]) -> None:
    """Refuse a contrast whose arms differ in more than its axis.

    Raises:
        ConfigError: one line names contrast and fields.
    """
    for contrast in experiment.contrasts:
        a, b = experiment.row(contrast.a), experiment.row(contrast.b)
        where = f"{experiment.name}.yaml: {named(contrast)}"
        for row in (a, b):
            if row.variant is None:
                raise ConfigError(f"{where}: {row.id} is only quoted; it has no arm")
        found = differences(a, b, variants)
        allowed = AXES.get(contrast.axis, frozenset({contrast.axis}))
        if not allowed & set(_arm(a, variants)):
            valid = ", ".join(sorted({*AXES, *_arm(a, variants)}))
            raise ConfigError(f"{where}: axis: {contrast.axis!r} is none of {valid}")
        if found - allowed:
            raise ConfigError(
                f"{where}: differ in {', '.join(sorted(found - allowed))} beside the axis "
                f"{contrast.axis!r}; an arm may differ in one thing"
            )
        if not found:
            raise ConfigError(f"{where}: do not differ in {contrast.axis!r}")


def _arm(row: Row, variants: Mapping[str, Variant]) -> dict[str, Any]:
    """Return all that shapes a row's score, by the names of axes."""
    assert row.variant is not None
    both = {**variants[row.variant].model_dump(), **row.model_dump()}
    return {name: value for name, value in both.items() if name not in NOT_OF_AN_ARM}


def named(contrast: Contrast) -> str:
    """Return by which rows a contrast is known."""
    return f"{contrast.a} and {contrast.b}"


# -- Reading the files -----------------------------------------------------------------

M = TypeVar("M", bound=BaseModel)
FOLDER = Path(__file__).parent / "experiments"
AXIS = "axis_"
AXES_OF_A2 = ("model", "head", "latent", "regime", "policy", "integration", "async")
NAMES = (
    *(f"table{n}" for n in range(1, 10)),
    *("figure4", "figure5"),
    *(f"{AXIS}{name}" for name in AXES_OF_A2),
)
# `all`: what the findings need first, and what shares trainings together; the zoo last.
ORDER = (
    *("table2", "table3", "table5", "table6", "table4", "table1", "figure4", "table9"),
    *("table7", "figure5", *(f"{AXIS}{name}" for name in AXES_OF_A2), "table8"),
)
BESIDE = ("variants", "scales")
FINDINGS = {
    1: "A dual system is needed: pseudo dual systems fail in dynamic scenes.",
    2: "Prompt tuning keeps the model's generalisation to other wordings.",
    3: "Fine-tuning a pretrained policy beats training it from scratch.",
    4: "Pre-aligning the projector is essential, and an auxiliary visual task helps.",
    5: "How often System 2 refreshes hardly matters; latents are static semantics.",
}


@dataclass(frozen=True)
class Catalogue:
    """All that can be run, by name."""

    experiments: dict[str, Experiment]
    variants: dict[str, Variant]
    scales: dict[str, Scale]

    def experiment(self, name: str) -> Experiment:
        """Return an experiment.

        Raises:
            ConfigError: there is none of that name.
        """
        if name not in self.experiments:
            raise ConfigError(f"no experiment {name!r}; {plugins.nearest(name, self.experiments)}")
        return self.experiments[name]

    def in_order(self) -> list[str]:
        """Return the names of all experiments in the order in which `all` works through them."""
        return sorted(self.experiments, key=lambda n: ORDER.index(n) if n in ORDER else len(ORDER))

    def scale(self, name: str) -> Scale:
        """Return a scale.

        Raises:
            ConfigError: there is none of that name.
        """
        if name not in self.scales:
            raise ConfigError(f"--scale: {none_of(name, self.scales)}")
        return self.scales[name]


def load_catalogue(folder: Path = FOLDER) -> Catalogue:
    """Read a folder of experiments, `variants.yaml` and `scales.yaml`.

    Raises:
        ConfigError: one line says which file and entry, and what is valid.
    """
    variants = {
        name: _checked(Variant, data, f"variants.yaml: {name}")
        for name, data in read_yaml(folder / "variants.yaml").items()
    }
    scales = {
        name: _checked(Scale, data, f"scales.yaml: {name}")
        for name, data in read_yaml(folder / "scales.yaml").items()
    }
    files = {p.stem: p for p in folder.glob("*.yaml") if p.stem not in BESIDE}
    order = [*(n for n in NAMES if n in files), *sorted(set(files) - set(NAMES))]
    experiments = {}
    for name in order:
        data = {"name": name, **read_yaml(files[name])}
        experiments[name] = _checked(Experiment, data, files[name].name)
        for row in experiments[name].rows:
            if row.variant is not None and row.variant not in variants:
                raise ConfigError(
                    f"{files[name].name}: {row.id}: variant {row.variant!r} is none of "
                    f"{', '.join(variants)}"
                )
        check_axes(experiments[name], variants)
    return Catalogue(experiments, variants, scales)


@cache
def catalogue() -> Catalogue:
    """Return the project's own."""
    return load_catalogue()


def _checked(model: type[M], data: dict[str, Any], where: str) -> M:
    try:
        return validate(model, data)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
