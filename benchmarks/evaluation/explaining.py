"""What did System 2 make of what it saw? A recording's latents, or those of a robot that runs.

    openhelix probe --recording outputs/latest --latents 4 --out outputs/explained
    openhelix probe --run newest --latents 3 --ask "is the drawer open?"

For each latent: how probably its instruction is understood, the tasks whose row of the policy's
table is nearest to it, how far it has drifted from the first and from the one before, and where in
the image it comes from: each part of the image is covered in turn, and what moves the latent
most is what mattered. All of it goes into one picture (`--out`). With `--ask` a base model that was
trained to answer (`openhelix train vlm`) says it in words too.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from PIL import Image

from openhelix.benchmarks.calvin.tasks import TASK_NAMES
from openhelix.benchmarks.evaluation.asking import answering
from openhelix.benchmarks.evaluation.eval import load_config, on_transformers
from openhelix.benchmarks.evaluation.measurement import cosine
from openhelix.runtime.cli.arguments import Many, Options, option, parse
from openhelix.runtime.control.assembly import make
from openhelix.runtime.core.config import ConfigError, EnginePart, RunConfig, validate
from openhelix.runtime.core.interfaces import (
    F32,
    U8,
    CameraFrame,
    Engine,
    LatentGoal,
    check_latent,
    encode_one,
)
from openhelix.runtime.core.output import answer
from openhelix.runtime.core.plugins import resolve
from openhelix.runtime.observe.recorder import Reader
from openhelix.runtime.observe.status_source import NoRun, RunSource
from openhelix.system2.answering import ANSWERERS, Answerer

VLLM = EnginePart().target
LOOK_S = 0.1  # how often a run is asked for its newest latent
TOP = 5  # tasks that are listed
MOST_KEPT = 256  # latents of a recording that are looked through, evenly over it
FRAMES_KEPT = 90  # images that a latent may look back on
BATCH = 8
LEAST_TURN = 0.01  # 1 less the cosine: a map of less has no bright spots, for none of it matters
PICTURE = "explained.png"


@dataclass(frozen=True, slots=True)
class Seen:
    """One latent, or where there is none yet an image and an instruction to make one of."""

    t_s: float  # since the first one
    instruction: str
    image: U8  # (H, W, 3), what it was made from
    z: F32 | None  # (n, d)
    understood: float | None
    refused: bool


class ExplainOptions(Options):
    """Options of `probe --recording` and `probe --run`; all else is `RunConfig`."""

    recording: Path | None = option(None, "latents of this recording", "FILE|FOLDER")
    run: str | None = option(None, "of a robot that runs", "newest|FOLDER")
    latents: int = option(6, "how many, evenly over the recording; of a run the next ones (6)", "N")
    grid: int = option(6, "the image is covered in N x N parts; 0 for no map (6)", "N")
    ask: Annotated[tuple[str, ...], Many()] = option((), "answer these in words", "QUESTION")
    model: str | None = option(None, "of the answers: a LLaVA folder (the settings')")
    out: Path = option(Path("outputs") / "explained", "folder of the picture", "DIR")


def main(argv: Sequence[str]) -> int:
    """Explain System 2's latents.

    Raises:
        ValueError: bad input, in one line.
    """
    options, overrides = parse(
        "probe", ExplainOptions, argv, __doc__ or "", RunConfig, ("system1", "system2", "output")
    )
    if (options.recording is None) == (options.run is None):
        raise ConfigError("probe: say --recording FILE or --run newest, one of them")
    if options.latents < 1 or not 0 <= options.grid <= 32:
        raise ConfigError("--latents must be at least 1, --grid 0 to 32")
    config = settings(options, overrides)
    policy, engine = make(config.system1.policy), make(config.system2.engine)
    try:
        if policy.spec.latent is not None:
            check_latent(engine.spec, policy.spec.latent)
        if options.recording is not None:
            seen: Iterable[Seen] = recorded(options.recording, config, options.latents)
        else:
            seen = running(options, config, engine.spec.spec_id)
        rows = explain(seen, engine, policy, options.grid)
    finally:
        engine.close()
    if options.ask:
        in_words(rows, options, config)
    options.out.mkdir(parents=True, exist_ok=True)
    picture(rows, options.out / PICTURE)
    made = {
        "of": str(options.recording or options.run),
        "spec_id": engine.spec.spec_id,
        "picture": str(options.out / PICTURE),
        "latents": [{k: v for k, v in row.items() if k != "image"} for row in rows],
    }
    answer(json.dumps(made) if options.as_json else page(made))
    return 0


def in_words(rows: Sequence[dict[str, Any]], options: ExplainOptions, config: RunConfig) -> None:
    """Add to each row the `answers` {question: answer} of a base model that was trained to give them."""
    name, given = answering(config.system2.engine, None, options.model)
    answerer: Answerer = resolve(ANSWERERS[name])(**given)
    try:
        for row in rows:
            shown = [Image.fromarray(row["image"])] * len(options.ask)
            found = answerer.answer(shown, list(options.ask))
            row["answers"] = dict(zip(options.ask, found, strict=True))
    finally:
        answerer.close()


def settings(options: ExplainOptions, overrides: Sequence[str]) -> RunConfig:
    """Return the configuration: of the recorded run, else as an evaluation has it.

    System 2 is on transformers unless it is named: it is asked few questions, and vLLM takes
    long to start.
    """
    if options.recording is None:
        return load_config(overrides, options.config)
    data = Reader(options.recording).config(overrides).model_dump(mode="json")
    engine = data["system2"]["engine"]["target"]
    if engine == VLLM and not any("system2.engine.target" in word for word in overrides):
        data = on_transformers(data, overrides)
    return validate(RunConfig, data)


# -- Where latents come from -------------------------------------------------------------------


def recorded(path: Path, config: RunConfig, count: int) -> list[Seen]:
    """Return `count` latents of a recording, evenly over it, each with the image behind it.

    Raises:
        ConfigError: it has no latent whose image was recorded.
    """
    topic = f"/camera/{config.system2.camera}"
    frames: deque[CameraFrame] = deque(maxlen=FRAMES_KEPT)
    found: list[Seen] = []
    text, first_ns, every, number = "", None, 1, 0
    for message in Reader(path):
        if message.topic == "/instruction":
            text = message.message.text
        elif message.topic == topic:
            frames.append(message.message)
        elif message.topic == "/latent":
            latent: LatentGoal = message.message
            image = next((f.rgb for f in frames if f.t_ns == latent.t_obs_ns), None)
            first_ns = latent.t_obs_ns if first_ns is None else first_ns
            if image is not None and number % every == 0:
                found.append(seen_of(latent, text, image, first_ns))
            number += 1
            if len(found) > MOST_KEPT:
                found, every = found[::2], 2 * every
    if not found:
        raise ConfigError(f"--recording: {path} has no latent with its image")
    return [found[i] for i in np.unique(np.linspace(0, len(found) - 1, count).round().astype(int))]


def seen_of(latent: LatentGoal, text: str, image: U8, first_ns: int) -> Seen:
    """Return a latent as it is explained; `first_ns` is when the first one's image was taken."""
    t_s = (latent.t_obs_ns - first_ns) * 1e-9
    return Seen(t_s, text, image, latent.z, latent.understood, latent.refused)


def running(options: ExplainOptions, config: RunConfig, spec_id: str) -> Iterator[Seen]:
    """Yield the next latents of a robot that runs.

    Raises:
        NoRun: there is none, or it has ended before its first latent.
        ConfigError: its latents are of another model than this one.
    """
    folder = None if options.run in (None, "newest") else Path(str(options.run))
    source, shown, first_ns = RunSource(config.output.folder, folder), -1, None
    try:
        for _ in range(options.latents):
            while not (found := source.latent()) or found["seq"] == shown or "rgb" not in found:
                time.sleep(LOOK_S)
            shown = found["seq"]
            if found["spec_id"] != spec_id:
                raise ConfigError(
                    f"--run: its latents are of {found['spec_id']}, this model gives {spec_id}; "
                    "say what the run was told, with --config or system2.engine..."
                )
            first_ns = found["t_obs_ns"] if first_ns is None else first_ns
            t_s = (found["t_obs_ns"] - first_ns) * 1e-9
            yield Seen(
                t_s,
                found["instruction"],
                np.array(found["rgb"]),
                np.array(found["z"], np.float32),
                found["understood"],
                found["refused"],
            )
    except NoRun:
        if first_ns is None:
            raise  # else the run has ended: what was seen of it is explained
    finally:
        source.close()


# -- What is said of them ----------------------------------------------------------------------


def explain(seen: Iterable[Seen], engine: Engine, policy: Any, grid: int) -> list[dict[str, Any]]:
    """Return for each latent what is known of it, plain but for its "image".

    `tasks` [{`task`, `confidence`}], the likeliest first, None for a policy without a table;
    `drift`: cosine to the first latent and to the one before; `recomputed`: cosine to what this
    model makes of image and instruction; `map` (grid, grid): by how much the latent turns, 1 less
    the cosine, when that part of the image is covered.
    """
    rows: list[dict[str, Any]] = []
    first: F32 | None = None
    before: F32 | None = None
    for one in seen:
        fresh = encode_one(engine, one.image, one.instruction)
        z = fresh if one.z is None else one.z
        first = z if first is None else first
        before = z if before is None else before
        rows.append(
            {
                "t_s": round(one.t_s, 3),
                "instruction": one.instruction,
                "understood": one.understood,
                "refused": one.refused,
                "tasks": confidences(policy, z),
                "drift": {"first": _rounded(z, first), "before": _rounded(z, before)},
                "recomputed": _rounded(z, fresh),
                "map": occlusion(engine, one.image, one.instruction, grid) if grid else None,
                "image": one.image,
            }
        )
        before = z
    return rows


def _rounded(a: F32, b: F32) -> float:
    return round(cosine(a, b), 6)


def confidences(policy: Any, z: F32) -> list[dict[str, Any]] | None:
    """Return the likeliest tasks of a latent (n, d); None for a policy without a table."""
    import torch

    from openhelix.system1.latent_adapter import task_confidence

    model = getattr(policy, "model", None)
    found = None if model is None else task_confidence(model, torch.from_numpy(z[None]))
    if found is None:
        return None
    best = found[0].topk(TOP)
    return [
        {"task": TASK_NAMES[i], "confidence": round(p, 4)}
        for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]


def occlusion(engine: Engine, image: U8, text: str, grid: int) -> list[list[float]]:
    """Return by how much the latent turns when a part of the image is covered, (grid, grid).

    What covers it is the image's mean colour, so that no edge of a foreign colour is seen.
    """
    height, width = image.shape[:2]
    cover = image.reshape(-1, 3).mean(0).round().astype(np.uint8)
    ys, xs = (np.linspace(0, side, grid + 1).round().astype(int) for side in (height, width))
    covered = []
    for y in range(grid):
        for x in range(grid):
            part = image.copy()
            part[ys[y] : ys[y + 1], xs[x] : xs[x + 1]] = cover
            covered.append(part)
    plain, turned = encode_one(engine, image, text), list[float]()
    for start in range(0, len(covered), BATCH):
        shown = covered[start : start + BATCH]
        turned += [1.0 - cosine(plain, z) for z in engine.encode(shown, [text] * len(shown))]
    return np.reshape(np.round(turned, 6), (grid, grid)).tolist()


# -- How it is shown ---------------------------------------------------------------------------


def picture(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw a row for each latent: image, what in it mattered, nearest tasks, and what is said."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 2.7 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), 3, squeeze=False, width_ratios=(1, 1, 1.5))
    most = max((np.max(row["map"]) for row in rows if row["map"]), default=0.0)
    for (shown, mattered, tasks), row in zip(axes, rows, strict=True):
        shown.imshow(row["image"])
        shown.set_title(f"{row['t_s']:.1f} s", fontsize=9, loc="left")
        mattered.imshow(row["image"])
        if row["map"]:
            _heat(mattered, row, most)
        for axis in (shown, mattered):
            axis.set_axis_off()
        bars = row["tasks"] or []
        tasks.barh([b["task"] for b in bars][::-1], [b["confidence"] for b in bars][::-1])
        tasks.set_xlim(0, 1)
        tasks.tick_params(labelsize=8)
        tasks.set_title(said(row), fontsize=9, loc="left", wrap=True)
    figure.savefig(path, dpi=110)


def _heat(axis: Any, row: dict[str, Any], most: float) -> None:
    """Lay a latent's map over its image, on one scale for all latents."""
    height, width = row["image"].shape[:2]
    axis.imshow(
        row["map"],
        extent=(-0.5, width - 0.5, height - 0.5, -0.5),
        cmap="inferno",
        alpha=0.6,
        vmin=0.0,
        vmax=max(most, LEAST_TURN),
        interpolation="bilinear",
    )
    turned = float(np.max(row["map"]))
    little = ", next to nothing" if turned < LEAST_TURN else ""
    axis.set_title(f"covered: turns by up to {turned:.4f}{little}", fontsize=9, loc="left")


def said(row: dict[str, Any]) -> str:
    """Return in a few lines what there is to say of a latent."""
    judged = ": refused" if row["refused"] else ": understood"
    # Exactly 1 is what an engine without a head for it says of everything.
    unjudged = row["understood"] in (None, 1.0) and not row["refused"]
    sure = "" if row["understood"] is None else f" ({100 * row['understood']:.0f} %)"
    lines = [f"{row['instruction']!r}" + ("" if unjudged else judged + sure)]
    lines.append(
        f"cosine to the first {row['drift']['first']:.3f}, to the one before "
        f"{row['drift']['before']:.3f}"
    )
    lines += [f"{question} {text}" for question, text in row.get("answers", {}).items()]
    return "\n".join(lines)


def page(made: dict[str, Any]) -> str:
    """Return the report for a terminal."""
    lines = []
    for row in made["latents"]:
        tasks = ", ".join(f"{t['task']} {100 * t['confidence']:.0f} %" for t in row["tasks"] or [])
        lines += [f"{row['t_s']:7.2f} s  " + said(row).replace("\n", "\n           ")]
        lines += [f"           {tasks}"] if tasks else []
    return "\n".join([*lines, made["picture"]])
