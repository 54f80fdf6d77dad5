"""`openhelix train understanding`: which instructions System 2 is to refuse.

The head (`openhelix.system2.understanding`) is fitted to the frozen language model's states of
sentences that name a task and of sentences that name none, both from grammars
(`openhelix.benchmarks.calvin.refusals`). Everything else is chosen on sentences that it was not
fitted to: the patterns of the grammars are split into folds, and what a head makes of patterns it
has not seen gives the calibration; the threshold is where as many of those, and of the development
list, would be refused as `false_refusals` allows. CALVIN-E, CALVIN's validation sentences and the
held-out refusals are measured at the end and change nothing.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from openhelix.benchmarks.calvin import phrases, refusals
from openhelix.benchmarks.calvin.refusals import Said
from openhelix.benchmarks.calvin.tasks import TASKS
from openhelix.benchmarks.training.config import TrainingConfig, UnderstandingSection
from openhelix.runtime.core.config import ConfigError
from openhelix.runtime.core.files import CheckpointError
from openhelix.runtime.core.paths import cache_folder
from openhelix.system2.latents import BadReadOut, LatentHead
from openhelix.system2.model import SHIPPED, open_checkpoint
from openhelix.system2.text import TextError, TextReader
from openhelix.system2.understanding import FILE, Understanding, joined

log = logging.getLogger(__name__)
REPORT = "understanding.json"
BATCH, RATE, DECAY, DROPOUT = 192, 1e-3, 0.1, 0.3
MIDDLE = (0.25, 0.6)  # of a model's layers: below are words, above is what comes next
LATENT = "latent.safetensors"
BINS = 10  # of the calibration error
MOST_TOKENS = 256  # of a sentence, whatever the tokenizer
READ_TOGETHER, JUDGED_TOGETHER = 64, 256  # sentences
States = list[Tensor]  # of sentences, each (T, layers * hidden) in half precision


def understanding_folder(config: TrainingConfig) -> Path:
    """Return where the head goes: `out`, or `train/understanding` in the cache."""
    return (
        config.out.expanduser()
        if config.out is not None
        else cache_folder() / "train" / "understanding"
    )


def run_understanding(config: TrainingConfig) -> dict[str, Any]:
    """Fit the head, choose its threshold, measure it; write both into the folder.

    Raises:
        ConfigError: a setting does not fit the model.
    """
    section, out = config.understanding, understanding_folder(config)
    try:
        section = section.model_copy(update={"layers": section.layers or layers_for(config)})
        reader = TextReader(config.latent.model, section.layers, config.device, MOST_TOKENS)
    except CheckpointError as error:
        raise ConfigError(f"latent.{error}") from None
    except (TextError, BadReadOut) as error:
        where = "understanding." if isinstance(error, TextError) else ""
        raise ConfigError(f"{where}{error}") from None
    said = (
        *refusals.requests(section.requests, config.seed),
        *refusals.refusals(section.refusals, config.seed),
    )
    named = torch.tensor([float(one.kind not in refusals.KINDS) for one in said])
    log.info("reading %d sentences", len(said))
    states = read(reader, [one.text for one in said])
    head, unseen = fit(states, named, said, section, config.seed, reader.checkpoint.model_id)
    chosen = {
        "development": read(reader, flat(phrases.development())),
        "development_nothing": read(reader, list(phrases.development_nothing())),
    }
    allowed = section.false_refusals
    known = [unseen[named == 1], probability(head, chosen["development"])]
    # Rounded down: no more are refused than are allowed.
    head.threshold = min(float(p.quantile(allowed, interpolation="lower")) for p in known)
    report = {
        "model": config.latent.model,
        "model_id": reader.checkpoint.model_id,
        "settings": section.model_dump(mode="json"),
        "seed": config.seed,
        "threshold": head.threshold,
        "unseen patterns": {
            "refused, by kind": by_kind(unseen < head.threshold, said),
            "calibration error": calibration_error(unseen, named),
        },
        "chosen by": {
            name: {"refused": refused(head, read_of), "n": len(read_of)}
            for name, read_of in chosen.items()
        },
        "measured": measured(head, partial(read, reader)),
    }
    out.mkdir(parents=True, exist_ok=True)
    head.note = {
        "settings": report["settings"],
        "seed": config.seed,
        "measured": report["measured"],
    }
    head.save(out / FILE)
    (out / REPORT).write_text(json.dumps(report, indent=1) + "\n")
    return {"stage": "understanding", "folder": str(out), **report}


def layers_for(config: TrainingConfig) -> tuple[int, ...]:
    """Return after which layers the head is to read: middle ones that the latent reads too.

    The latent is that of `latent.init`, else the one beside the model or the shipped one, else
    the read-out that the settings describe.

    Raises:
        ConfigError: no such latent.
        CheckpointError: the model or the latent cannot be used.
    """
    latent = config.latent
    checkpoint = open_checkpoint(latent.model)
    own = SHIPPED if latent.model == "laptop" else Path(latent.model).expanduser()
    beside = [own / LATENT, own.parent / LATENT]
    file = latent.init or next((f for f in beside if f.is_file()), None)
    read_out = latent.read_out() if file is None else LatentHead.load(file.expanduser()).config
    layers = read_out.layers_of(checkpoint.layers)
    low, high = (share * checkpoint.layers for share in MIDDLE)
    return tuple(layer for layer in layers if low <= layer <= high) or layers[-1:]


def read(reader: TextReader, sentences: Sequence[str]) -> States:
    """Return sentences' states; those of like length go through the model together."""
    order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))
    found: dict[int, Tensor] = {}
    for start in range(0, len(order), READ_TOGETHER):
        part = order[start : start + READ_TOGETHER]
        made = reader.states([sentences[i] for i in part])
        found |= {index: states.half() for index, states in zip(part, made, strict=True)}
    return [found[index] for index in range(len(sentences))]


def fit(
    states: States,
    named: Tensor,
    said: Sequence[Said],
    section: UnderstandingSection,
    seed: int,
    model: str,
) -> tuple[Understanding, Tensor]:
    """Return a calibrated head, and the probabilities (S,) of sentences whose pattern was left out.

    Args:
        states: of S sentences.
        named: (S,) 1 where a sentence names a task.
        said: the sentences.
        section: the settings.
        seed: of folds, weights and batches.
        model: `Checkpoint.model_id`.
    """
    # A task is not left out whole: every task is known to whoever is told one.
    parts = [one.text if one.pattern in TASKS else one.pattern for one in said]
    folds = np.array(fold_of(parts, section.folds, seed))
    odds = torch.zeros(len(said))
    for fold in range(section.folds):
        log.info("fold %d of %d", fold + 1, section.folds)
        left, others = (torch.from_numpy(np.flatnonzero(x)) for x in (folds == fold, folds != fold))
        part = trained(states, named, others, section, seed, model)
        odds[left] = log_odds(part, [states[i] for i in left])
    head = trained(states, named, torch.arange(len(states)), section, seed, model)
    scale, offset = calibrated(odds, named)
    head.scale.fill_(scale)
    head.offset.fill_(offset)
    return head, torch.sigmoid(scale * odds + offset)


def fold_of(patterns: Sequence[str], folds: int, seed: int) -> list[int]:
    """Return each sentence's fold: all sentences of a pattern have the same."""
    names = sorted(set(patterns))
    order = np.random.default_rng([seed, 9]).permutation(len(names))
    place = {name: int(k) % folds for name, k in zip(names, order, strict=True)}
    return [place[pattern] for pattern in patterns]


def trained(
    states: States,
    named: Tensor,
    among: Tensor,
    section: UnderstandingSection,
    seed: int,
    model: str,
) -> Understanding:
    """Return a head fitted to some sentences, as many a step that name a task as that name none.

    Args:
        states, named: see `fit`.
        among: (N,) which sentences.
        section, seed, model: see `fit`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        hidden = states[0].shape[1] // len(section.layers)
        head = Understanding(section.layers, hidden, section.width, model)
        tokens = torch.cat([states[i] for i in among]).float()
        head.mean.copy_(tokens.mean(0))
        head.spread.copy_(tokens.std(0).clamp_min(1e-6))
        groups = [among[named[among] == value] for value in (1.0, 0.0)]
        optimizer = torch.optim.AdamW(head.parameters(), RATE, weight_decay=DECAY)
        rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, section.steps)
        for _ in range(section.steps):
            picks = torch.cat([g[torch.randint(len(g), (BATCH // 2,))] for g in groups])
            odds = head(*joined([states[i] for i in picks]), DROPOUT)
            loss = binary_cross_entropy_with_logits(odds, named[picks])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rate.step()
    return head.eval().requires_grad_(False)


@torch.no_grad()
def log_odds(head: Understanding, states: States) -> Tensor:
    """Return uncalibrated log odds (S,)."""
    parts = [states[i : i + JUDGED_TOGETHER] for i in range(0, len(states), JUDGED_TOGETHER)]
    return torch.cat([head(*joined(part)) for part in parts])


def probability(head: Understanding, states: States) -> Tensor:
    """Return calibrated probabilities (S,)."""
    return torch.sigmoid(head.scale * log_odds(head, states) + head.offset)


def calibrated(odds: Tensor, named: Tensor) -> tuple[float, float]:
    """Return scale and offset of log odds (S,) that make them probabilities (Platt's method).

    Both groups count alike, however many sentences each has.
    """
    weight = torch.where(named == 1, 0.5 / named.sum(), 0.5 / (1 - named).sum()).double()
    line = torch.tensor([1.0, 0.0], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([line], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = binary_cross_entropy_with_logits(
            line[0] * odds.double() + line[1], named.double(), weight=weight, reduction="sum"
        )
        loss.backward()
        return loss

    optimizer.step(closure)
    return float(line[0].detach()), float(line[1].detach())


def calibration_error(probability: Tensor, named: Tensor) -> float:
    """Return the mean distance between what is said and what is so, over ten bins of probability."""
    at = (probability * BINS).long().clamp(0, BINS - 1)
    total = 0.0
    for index in range(BINS):
        inside = at == index
        if inside.any():
            gap = float(probability[inside].mean() - named[inside].mean())
            total += abs(gap) * float(inside.float().mean())
    return round(total, 4)


def measured(head: Understanding, states: Callable[[Sequence[str]], States]) -> dict[str, Any]:
    """Return what is refused of the lists that nothing was chosen by."""
    lists = {
        "validation": flat(phrases.validation()),
        "seen": flat(phrases.calvin_e("seen")),
        "unseen": flat(phrases.calvin_e("unseen")),
    }
    found: dict[str, Any] = {}
    for name, sentences in lists.items():
        found[name] = {"refused": refused(head, states(sentences)), "n": len(sentences)}
    held = refusals.held_out()
    rows = {kind: states(sentences) for kind, sentences in held.items()}
    found["refusals"] = {
        "refused": refused(head, [s for part in rows.values() for s in part]),
        "n": sum(map(len, rows.values())),
        "by kind": {kind: refused(head, x) for kind, x in rows.items()},
    }
    return found


def refused(head: Understanding, states: States) -> float:
    """Return the share of sentences that a head refuses."""
    return round(float((probability(head, states) < head.threshold).float().mean()), 4)


def by_kind(refused: Tensor, said: Sequence[Said]) -> dict[str, float]:
    """Return the share of each kind of sentence that is refused."""
    kinds = np.array([one.kind for one in said])
    shares = refused.float()
    return {
        kind: round(float(shares[torch.from_numpy(kinds == kind)].mean()), 4)
        for kind in dict.fromkeys(kinds.tolist())
    }


def flat(said: Mapping[str, Sequence[str]]) -> list[str]:
    """Return all sentences of a list."""
    return [sentence for sentences in said.values() for sentence in sentences]
