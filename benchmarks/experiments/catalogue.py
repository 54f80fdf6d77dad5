"""Reads the YAML files of `paper/`: experiments, variants and scales, checked."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from benchmarks.experiments.spec import Experiment, Scale, Variant
from runtime.config import ConfigError, read_yaml, validate
from system2.latents import KINDS

M = TypeVar("M", bound=BaseModel)
FOLDER = Path(__file__).parent / "paper"
NAMES = (*(f"table{n}" for n in range(1, 10)), "figure4", "figure5")
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
            raise ConfigError(f"experiment: {name!r} is none of {', '.join(self.experiments)}")
        return self.experiments[name]

    def scale(self, name: str) -> Scale:
        """Return a scale.

        Raises:
            ConfigError: there is none of that name.
        """
        if name not in self.scales:
            raise ConfigError(f"--scale: {name!r} is none of {', '.join(self.scales)}")
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
    for name, variant in variants.items():
        if variant.latent not in KINDS:
            raise ConfigError(f"variants.yaml: {name}: latent is none of {', '.join(KINDS)}")
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
