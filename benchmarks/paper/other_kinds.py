"""The experiments that are more than a table of scores: the latent probe and the zoo of designs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from openhelix.benchmarks.evaluation.eval import load_config
from openhelix.benchmarks.evaluation.evaluation import fingerprint
from openhelix.benchmarks.paper import tables
from openhelix.benchmarks.paper.catalogue import Experiment
from openhelix.benchmarks.paper.figure5 import (
    Pictures,
    ProbeOptions,
    claims,
    distance_table,
    draw,
    planned,
    probe,
    take_pictures,
)
from openhelix.benchmarks.paper.judge import decide
from openhelix.benchmarks.paper.measures import SCENE
from openhelix.benchmarks.paper.session import Session
from openhelix.runtime.control.assembly import make
from openhelix.runtime.core.config import ConfigError, EnginePart
from openhelix.runtime.core.files import replace_file
from openhelix.system2.model import SHIPPED

UNTRAINED = "as shipped, <ACT> untrained"
SMOKE = {"starts": 1, "steps": 10}
PROBE = "probe.json"


class Probes:
    """Figure 5: the probe of every System 2 that there is.

    Args:
        session: knows trainings and the root.
        experiment: of kind "probe".
    """

    def __init__(self, session: Session, experiment: Experiment) -> None:
        self._session, self._experiment = session, experiment
        options = {k: v for k, v in experiment.options.items() if k != "variants"}
        if not session.request.scale.official:
            options |= SMOKE
        options["seed"] = session.request.seed
        unknown = set(options) - {f.name for f in fields(ProbeOptions)}
        if unknown:
            raise ConfigError(f"{experiment.name}: options: {unknown.pop()!r} is unknown")
        self.options = ProbeOptions(**options)
        self._pictures: list[Pictures] | None = None

    def wanted(self) -> dict[str, str]:
        """Return the System 2s to look at: the keys of their trainings, by what they are called."""
        request = self._session.request
        shipped = (SHIPPED / "latent.safetensors").is_file()
        found = {"as shipped" if shipped else UNTRAINED: self._session.training("shipped").key}
        for name in self._experiment.options.get("variants", ()):
            found[request.catalogue.variants[name].says] = self._session.training(name).key
        return found

    def planned(self) -> list[dict[str, Any]]:
        """Return the claims about all of them, as they stand before anything is probed.

        Before training, <ACT> means nothing: its figures are shown, no claim is made.
        """
        return [claim for who in self.wanted() if who != UNTRAINED for claim in planned(who)]

    def engines(self) -> dict[str, EnginePart]:
        """Return the System 2s that are there, by what they are called."""
        request, (first, *others) = self._session.request, self.wanted()
        found = {first: load_config(request.run, scene=SCENE).system2.engine}
        names = self._experiment.options.get("variants", ())
        for who, name in zip(others, names, strict=True):
            done = self._session.trainings.done(self._session.training(name))
            if done is not None:
                words = [*done["overrides"], *request.run]
                found[who] = load_config(words, scene=SCENE).system2.engine
        return found

    def made(self) -> dict[str, dict[str, Any]]:
        """Return the probes that are there, by what their System 2s are called.

        Those made on this machine come first; others are read off the page that shows them.
        """
        engines, found = self.engines(), dict[str, dict[str, Any]]()
        for who, key in self.wanted().items():
            path = self.place(who, engines[who]) / PROBE if who in engines else None
            kept = self._session.probed.get(key, {})
            if path is not None and path.exists():
                found[who] = {**json.loads(path.read_text(encoding="utf-8")), "training": key}
            elif kept.get("options") == asdict(self.options):
                found[who] = dict(kept)
        return found

    def place(self, who: str, part: EnginePart) -> Path:
        """Return the folder of one System 2's probe."""
        text = json.dumps([asdict(self.options), who, fingerprint(part)], sort_keys=True)
        digest = hashlib.sha256(text.encode())
        for path in sorted(p for p in SHIPPED.glob("*.safetensors") if p.is_file()):
            digest.update(path.read_bytes())
        return self._session.request.root / "probes" / digest.hexdigest()[:12]

    def run(self) -> bool:
        """Probe what has not been probed; return whether there was anything."""
        there, new = self.made(), False
        for who, part in self.engines().items():
            if who in there:
                continue
            folder, new = self.place(who, part), True
            self._session.say(f"probe of {who}")
            if self._pictures is None:
                self._pictures = take_pictures(self.options)
            engine = make(part)
            try:
                made = probe(self._pictures, engine, self.options)
                made |= {"options": asdict(self.options)}
            finally:
                engine.close()
            folder.mkdir(parents=True, exist_ok=True)
            picture = draw(made, self._pictures[0].moved, self.options.shift_at, who)
            for name, data in picture.files("probe").items():
                replace_file(folder / name, data)
            replace_file(folder / PROBE, json.dumps(made).encode())
        return new

    def outcome(self) -> dict[str, Any]:
        """Return the experiment as plain data."""
        found = self._session.outcome(self._experiment)
        probes, contrasts, tables = self.made(), [], []
        for who in self.wanted():
            # Before training, <ACT> means nothing: its figures are shown, no claim is made.
            if who != UNTRAINED:
                contrasts += claims(probes[who], who) if who in probes else planned(who)
        for who, made in probes.items():
            tables.append([f"What moves the latent ({who})", *distance_table(made)])
            tables.append([f"The words nearest to it ({who})", *_words(made)])
        state = "not run" if not probes else "complete"
        if probes and len(probes) < len(self.wanted()):
            state = f"partial: {len(probes)} of {len(self.wanted())} models"
        decide(contrasts)
        o = self.options
        note = (
            f"{o.starts} starts of {o.task} in scene {o.scene}, a scripted expert acting, the "
            f"block moved {o.shift_m:g} m to the left at environment step {o.shift_at}, up to "
            f"{o.steps} steps; no policy and no clock is involved."
        )
        return found | {
            "state": state,
            "contrasts": contrasts,
            "probes": probes,
            "tables": tables,
            "notes": [note, *found["notes"]],
        }

    def pictures(self, folder: Path) -> dict[str, bytes]:
        """Return the drawings by file name; of a probe made elsewhere, those of the results."""
        found, engines, made = {}, self.engines(), self.made()
        for number, who in enumerate(self.wanted()):
            suffix = f"-{number}" if number else ""
            place = self.place(who, engines[who]) if who in engines else None
            for kind in ("png", "svg", "pdf"):
                name = f"{self._experiment.name}{suffix}.{kind}"
                drawn = folder / name if place is None else place / f"probe.{kind}"
                if drawn.exists() and who in made:
                    found[name] = drawn.read_bytes()
        return found


def probed_in(folder: Path, names: Sequence[str]) -> dict[str, Mapping[str, Any]]:
    """Return the probes that the pages of a folder show, by the key of what was probed."""
    pages = (tables.read(folder, name) for name in names)
    made = [p for page in pages if page is not None for p in page.get("probes", {}).values()]
    return {p["training"]: p for p in made if "training" in p}


def _words(made: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    rows = []
    episode = made["episode"]
    for row in (*episode[:3], episode[-1]):
        words = ", ".join(f"{n['word']} {n['cosine']:.2f}" for n in row["nearest"])
        best = max(row["similarity"], key=row["similarity"].get)
        rows.append([str(row["step"]), words, f"{best} {row['similarity'][best]:.2f}"])
    return ["step", "ten nearest words", "first word of space"], rows


def zoo_outcome(session: Session, experiment: Experiment) -> dict[str, Any]:
    """Return the zoo as plain data: its rows, how each system is built, and what it costs."""
    found = session.outcome(experiment)
    designs: Mapping[str, Mapping[str, str]] = experiment.options.get("designs", {})
    variants = session.request.catalogue.variants
    names = list(dict.fromkeys(row.variant for row in experiment.rows if row.variant))
    built = [
        [designs[name]["method"], designs[name]["paper"], variants[name].says, designs[name]["gap"]]
        for name in names
    ]
    costs = []
    for name in names:
        measured = [r for r in found["rows"] if r["variant"] == name and r["score"]]
        weights = next((r["system1_weights"] for r in measured if r["system1_weights"]), None)
        million = "" if weights is None else f"{weights / 1e6:.1f}"
        costs.append([designs[name]["method"], million, *cost_of([r["score"] for r in measured])])
    header = ["method", "the paper's design", "here", "what is different here"]
    cost_header = ["method", "System 1, million weights", "ms per plan", "plans per second"]
    cost_header += ["System 2, ms per latent", "latents per task", "System 2, s per task"]
    return found | {
        "tables": [
            ["What each costs here", cost_header, costs],
            ["How each is built", header, built],
        ]
    }


def cost_of(scores: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what plans and latents cost, over all evaluations of a system, as text."""

    def mean(name: str) -> float | None:
        values = [float(s[name]) for s in scores if s[name] is not None]
        return sum(values) / len(values) if values else None

    plan, latent = mean("s1_s_per_plan"), mean("s2_s_per_latent")
    work, total = mean("latents_per_task"), mean("s2_s_per_task")
    return [
        "" if plan is None else f"{1e3 * plan:.0f}",
        "" if not plan else f"{1 / plan:.1f}",
        "" if latent is None else f"{1e3 * latent:.0f}",
        "" if work is None else f"{work:.1f}",
        "" if total is None else f"{total:.2f}",
    ]
