"""The numbers of a base model's training, one frozen record; see `vlm_train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=1)]
Whole = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class Tower(_Section):
    """The vision tower of "smollm2"; not read for any other model.

    Attributes:
        image_size, patch_size: pixels; (image_size / patch_size) squared image tokens.
        width, layers, heads: of the transformer.
        shipped: begin with the shipped weights; they exist for the first shape only.
    """

    image_size: Count = 160
    patch_size: Count = 32
    width: Count = 256
    layers: Count = 6
    heads: Count = 4
    shipped: bool = False


class VlmStage(_Section):
    """One stage: pictures a step, questions a picture, rates.

    Attributes:
        steps: 0 leaves the stage out.
        batch: pictures a step.
        questions: asked of each; unused by `see`.
        often: how much more often than others a question of some kinds is drawn, by kind:
            {nearest: 3} asks three times as often which block is nearest to something.
        lr_vision, lr_projector: of tower and projector; 0 keeps them as they are.
        lr_language: of the language model; read by `tune`.
        sight: weight of the read-out without language.
        speech: weight of image tokens being the words of what they show.
    """

    steps: Whole
    batch: Count = 16
    questions: Count = 8
    often: dict[str, Positive] = {}
    lr_vision: NotNegative = 3e-4
    lr_projector: NotNegative = 1e-3
    lr_language: NotNegative = 0.0
    sight: NotNegative = 0.3
    speech: NotNegative = 0.0
    weight_decay: NotNegative = 0.05
    warmup: Whole = 50


class See(VlmStage):
    """Tower and projector learn to show the picture's facts; no language model runs."""

    steps: Whole = 4000
    batch: Count = 64
    lr_vision: NotNegative = 1e-3
    sight: NotNegative = 1.0
    speech: NotNegative = 1.0
    warmup: Whole = 200


class Align(VlmStage):
    """Tower and projector learn through the frozen language model (LLaVA's first stage)."""

    steps: Whole = 150


class Tune(VlmStage):
    """The language model learns too (LLaVA's second stage).

    Attributes:
        mode: "lora" puts low-rank parts beside its linear layers, "full" trains it whole.
        rank: of "lora".
        goals: instructions to a robot asked of each picture beside the questions, and answered by
            the plain sentence that is meant.
        goal_weight: of these instructions' latents being the plain sentence's, see `Goals`; the
            head that makes them is written beside the model.
        goal_layers: whose states the latent is read from.
        goal_code: the `text.safetensors` of the policy that is to understand the latents; None
            for a code of the plain sentences' own.
    """

    steps: Whole = 1500
    lr_vision: NotNegative = 1e-4
    lr_projector: NotNegative = 3e-4
    lr_language: NotNegative = 5e-4
    mode: Literal["lora", "full"] = "lora"
    rank: Count = 16
    goals: Whole = 0
    goal_weight: NotNegative = 1.0
    goal_layers: tuple[Count, ...] = (4, 8, 16, 24)
    goal_code: Path | None = None


class VlmSection(_Section):
    """A base model: what it is made of, what it learns from, and how.

    Attributes:
        data: a folder with `train`, `held-out` and, for measuring alone, `scene-D`; a bare
            name means a folder in the cache's `vlm`. Where it does not exist it is made.
        pictures: to train on, of those there are (or, where none are, to make).
        scenes: whose pictures are made, letters out of ABC, `R17`, `R0-R116`, or several with
            commas; scene D is measured on and never trained on. Of three scenes alone a model
            learns where the switch is by heart instead of looking for it.
        model: "laptop", "smollm2", a LLaVA's folder, or a hub name.
        tower: of "smollm2".
        init: folder of another run whose weights this one begins with.
        see, align, tune: the stages.
        bf16: compute in bfloat16; "auto" where the machine does so natively.
        jitter: strength of brightness, contrast and shift augmentation; 0 for none.
        eval_every: steps between evaluations of `align` and `tune`.
        eval_pictures, eval_questions: held-out pictures, and questions of each.
        measure_pictures: of each held-out set in the report at the end.
        save_every_s: seconds between checkpoints.
        max_gb: decoded pictures that are kept in memory.
        checkpointing: compute the language model's activations again on the way back: much less
            memory for a third more time; for large models.
        workers: threads that make batches ahead, for a GPU that would wait for them; 0 for none.
    """

    data: Path = Path("table")
    pictures: Count = 24000
    scenes: str = "ABC,R0-R116"
    model: str = "smollm2"
    tower: Tower = Tower()
    init: Path | None = None
    see: See = See()
    align: Align = Align()
    tune: Tune = Tune()
    bf16: bool | Literal["auto"] = "auto"
    jitter: NotNegative = 1.0
    eval_every: Count = 100
    eval_pictures: Count = 120
    eval_questions: Count = 10
    measure_pictures: Count = 300
    save_every_s: Positive = 180.0
    max_gb: Positive = 4.0
    workers: Whole = 0
    checkpointing: bool = False
