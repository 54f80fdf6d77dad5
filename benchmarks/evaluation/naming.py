"""Does System 2 understand sentences? Each is named by the task whose row is nearest to its latent.

`openhelix probe --sentences FILE.json` takes `{task: [sentence, ...]}` and one picture per task, a
state of the scene in which the task is feasible (or the same picture for all), and reports the
share of sentences that the policy would assign to their own task. A sentence that System 2 says
it does not understand is refused, and named by none. The list `refusals` has sentences that
name no task, by kind: of those all should be refused. `calvin-r` takes CALVIN-R's instructions, which
name their task only together with the picture of their start.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Protocol

import numpy as np
from pydantic import Field

from openhelix.benchmarks.calvin import phrases, refusals
from openhelix.benchmarks.calvin.phrases import Phrases
from openhelix.benchmarks.calvin.scene import get_scene
from openhelix.benchmarks.calvin.tasks import TASK_NAMES
from openhelix.benchmarks.evaluation.eval import load_config
from openhelix.benchmarks.evaluation.referring import Referred, blind_chance, referred
from openhelix.benchmarks.evaluation.referring import pictures as referring_pictures
from openhelix.runtime.cli.arguments import Options, option, parse
from openhelix.runtime.control.assembly import make
from openhelix.runtime.core.config import ConfigError, RunConfig
from openhelix.runtime.core.interfaces import F32, U8, judged
from openhelix.runtime.core.output import answer
from openhelix.system2 import probe

BATCH = 8
STARTS = 50  # draws for a state from which a task can be done
LISTS = ("training", "validation", "development", "calvin-e", "seen", "unseen", "refusals")
REFERRING = "calvin-r"


class Encoder(Protocol):
    """The part of an engine that is used here."""

    def encode(self, images: Sequence[Any], instructions: Sequence[str]) -> F32: ...


class NamingOptions(Options):
    """Options of `probe --sentences`; all else is `RunConfig`."""

    sentences: str = option(
        ...,
        "a built-in list, or {task: [sentence, ...]}",
        f"FILE|{'|'.join((*LISTS, REFERRING))}",
    )
    scene: str = option("D", "scene of the pictures (D)", "SCENE")
    image: Path | None = option(None, "this picture for every sentence", "FILE")
    blind: bool = option(False, "show black pictures")
    shuffled: bool = option(False, "show every sentence the picture of another one")
    starts: int = option(1, "of calvin-r: pictures for each reference and task (1)", "N")
    seed: Annotated[int, Field(ge=0)] = option(0, "of the states shown (0)", "N")


def main(argv: Sequence[str]) -> int:
    """Name every sentence of a list by its task.

    Raises:
        ValueError: bad input, in one line.
    """
    options, overrides = parse(
        "probe", NamingOptions, argv, __doc__ or "", RunConfig, ("system1", "system2")
    )
    if options.blind:
        overrides.append("system2.blind=true")
    referring = options.sentences == REFERRING
    if referring and options.image is not None:
        raise ConfigError("--image: calvin-r's instructions each have a picture of their own")
    if options.shuffled and not referring:
        raise ConfigError("--shuffled: only calvin-r's instructions depend on their picture")
    said = {} if referring else sentences(options.sentences)
    config = settings(options, overrides)
    asked = seen_references(options) if referring else []
    shown = {} if referring else pictures(options, tuple(said))
    policy = make(config.system1.policy)
    engine = make(config.system2.engine)
    try:
        if referring:
            report = name_references(engine, policy, asked)
            report["shuffled"] = options.shuffled
        else:
            report = name_sentences(engine, policy, said, shown)
    finally:
        engine.close()
    report |= {
        "sentences": str(options.sentences),
        "scene": None if options.image else options.scene,
        "blind": config.system2.blind,
        "spec_id": engine.spec.spec_id,
    }
    answer(json.dumps(report) if options.as_json else page(report))
    return 0


def sentences(name: str) -> Phrases:
    """Return a list that the project has, or a user's file.

    Raises:
        PhraseError: no such file, or it cannot be used.
    """
    if name in ("training", "validation", "development"):
        found: Phrases = getattr(phrases, name)()
        return found
    if name == "refusals":
        return refusals.held_out()
    if name in LISTS:
        return phrases.calvin_e("all" if name == "calvin-e" else name)
    return phrases.load(name)


def settings(options: NamingOptions, overrides: Sequence[str]) -> RunConfig:
    """Return the configuration as an evaluation has it: System 2 on transformers by default."""
    return load_config(overrides, options.config, scene=get_scene(options.scene).name)


def pictures(options: NamingOptions, tasks: Sequence[str]) -> Mapping[str, U8]:
    """Return the picture (H, W, 3) that goes with each task's sentences.

    What is no task (a kind of sentence that names none) goes with the first task's.

    Raises:
        BadImage: the file cannot be read.
        ConfigError: no state was found from which a task can be done.
    """
    if options.image is not None:
        shown = np.asarray(probe.read_image(options.image))
        return dict.fromkeys(tasks, shown)
    from openhelix.benchmarks.calvin.env import PlayTableEnv
    from openhelix.benchmarks.calvin.starts import StartError, begin

    found: dict[str, U8] = {}
    states = {key: key if key in TASK_NAMES else TASK_NAMES[0] for key in tasks}
    with PlayTableEnv(options.scene, cameras=("static",)) as env:
        for task in dict.fromkeys(states.values()):
            for attempt in range(STARTS):
                rng = np.random.default_rng([options.seed, TASK_NAMES.index(task), attempt])
                try:
                    begin(env, task, rng)
                except StartError:
                    continue
                found[task] = np.array(env.render())
                break
            else:
                raise ConfigError(f"--scene: no start for {task} in {STARTS} draws")
    return {key: found[task] for key, task in states.items()}


def seen_references(options: NamingOptions) -> list[tuple[Referred, U8]]:
    """Return CALVIN-R's balanced list with each start's picture, or another's where shuffled."""
    scene = get_scene(options.scene).name
    made = list(referring_pictures(referred((scene,), options.starts, options.seed)))
    if options.shuffled:
        half = len(made) // 2
        turned = made[half:] + made[:half]
        made = [(episode, other) for (episode, _), (_, other) in zip(made, turned, strict=True)]
    return made


def name_references(
    engine: Encoder, policy: Any, asked: Sequence[tuple[Referred, U8]]
) -> dict[str, Any]:
    """Name every instruction of CALVIN-R; see `name_sentences`.

    Returns:
        its keys, with `per_reference` beside `per_task`, and `blind_chance`: the share that the
        sentences alone allow to name.
    """
    report = named_rows(engine, policy, [(e.task, e.sentence, shown) for e, shown in asked])
    rows = report.pop("rows")
    kinds = [episode.reference for episode, _ in asked]
    return {
        **report,
        "blind_chance": round(blind_chance([episode for episode, _ in asked]), 4),
        "per_reference": {
            kind: _shares([row for row, of in zip(rows, kinds, strict=True) if of == kind])
            for kind in dict.fromkeys(kinds)
        },
    }


def name_sentences(
    engine: Encoder,
    policy: Any,
    said: Phrases,
    shown: Mapping[str, U8],
) -> dict[str, Any]:
    """Name every sentence.

    Args:
        engine: System 2.
        policy: System 1, with a task table.
        said: {task: sentences}.
        shown: {task: picture}.

    Returns:
        `named` (share of sentences named by their own task), `refused` (share that System 2
        says it does not understand), `n`, `per_task` {task: {`named`, `refused`, `n`}} and
        `confusions` [{`task`, `as`, `count`, `example`}], the commonest first.

    Raises:
        ConfigError: the policy has no task table, so that a latent names nothing.
    """
    wanted = [(task, text, shown[task]) for task, texts in said.items() for text in texts]
    report = named_rows(engine, policy, wanted)
    report.pop("rows")
    return report


def named_rows(
    engine: Encoder, policy: Any, wanted: Sequence[tuple[str, str, U8]]
) -> dict[str, Any]:
    """Return the report of `name_sentences` for (task, sentence, picture), and its `rows`."""
    guesses: list[str | None] = []
    for start in range(0, len(wanted), BATCH):
        part = wanted[start : start + BATCH]
        texts = [text for _, text, _ in part]
        latents = engine.encode([shown for *_, shown in part], texts)
        for guess, judgement in zip(
            named(policy, latents), judged(engine, texts, latents), strict=True
        ):
            guesses.append(None if judgement.refused else guess)
    rows = [(task, guess, text) for (task, text, _), guess in zip(wanted, guesses, strict=True)]
    wrong = Counter((task, guess) for task, guess, _ in rows if guess not in (task, None))
    first = {(task, guess): text for task, guess, text in reversed(rows)}
    return {
        **_shares(rows),
        "rows": rows,
        "per_task": {
            task: _shares([r for r in rows if r[0] == task])
            for task in dict.fromkeys(task for task, _, _ in wanted)
        },
        "confusions": [
            {"task": task, "as": guess, "count": count, "example": first[task, guess]}
            for (task, guess), count in sorted(
                wrong.items(), key=lambda item: (-item[1], item[0][0], str(item[0][1]))
            )
        ],
    }


def named(policy: Any, latents: F32) -> list[str]:
    """Return the task of each latent (B, n, dim): the one whose row of the policy's table is nearest.

    Raises:
        ConfigError: the policy has no task table.
    """
    import torch

    from openhelix.system1.latent_adapter import nearest_task

    model: Any = getattr(policy, "model", None)
    guess = None if model is None else nearest_task(model, torch.from_numpy(latents))
    if guess is None:
        raise ConfigError("system1.policy: has no task table, so that a latent names no task")
    return [TASK_NAMES[index] for index in guess.tolist()]


def _shares(rows: Sequence[tuple[str, str | None, str]]) -> dict[str, Any]:
    n = len(rows)
    return {
        "named": round(sum(task == guess for task, guess, _ in rows) / n, 4),
        "refused": round(sum(guess is None for _, guess, _ in rows) / n, 4),
        "n": n,
    }


def page(report: Mapping[str, Any]) -> str:
    """Return the few lines that a person wants to see."""
    lines = [
        f"named {100 * report['named']:.1f} %, refused {100 * report['refused']:.1f} % of "
        f"{report['n']} sentences"
    ]
    worst = sorted(report["per_task"].items(), key=lambda item: item[1]["named"])[:8]
    if "blind_chance" in report:
        lines.append(f"  the sentences alone allow {100 * report['blind_chance']:.1f} %")
    lines += [f"  {task}: {100 * row['named']:.0f} % of {row['n']}" for task, row in worst]
    lines += [
        f"  {c['count']} x {c['task']} taken for {c['as']}, as {c['example']!r}"
        for c in report["confusions"][:8]
    ]
    return "\n".join(lines) + "\n"
