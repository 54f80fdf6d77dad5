"""`openhelix config [PATTERN]`: every setting of a run, with its unit, its range and its default.

    openhelix config                                    all of them
    openhelix config safety                             those of one section
    openhelix config latent                             those with a word in their name or text
    openhelix config --config configs/run.yaml system2.hz=2    as a file and these words set them

The names are those of a settings file and of the words `section.field=value` of `openhelix run`.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import io
import json
import re
import textwrap
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, is_dataclass
from dataclasses import fields as dataclass_fields
from functools import cache
from typing import Annotated, Any

from annotated_types import BaseMetadata, Ge, Gt, Le, Lt
from pydantic import BaseModel
from rich.console import Console
from rich.text import Text

from openhelix.runtime.cli.arguments import Options, Positional, as_typed, option, parse
from openhelix.runtime.core.config import ConfigError, RunConfig, load
from openhelix.runtime.core.output import answer

UNITS = {  # by the last part of a field's name
    "_rad_s2": "rad/s²",
    "_m_s2": "m/s²",
    "_rad_s": "rad/s",
    "_m_s": "m/s",
    "_hz": "Hz",
    "_us": "µs",
    "_m": "m",
    "_s": "s",
    "_steps": "environment steps",
    "steps_limit": "environment steps",
}
INDENT, WIDTH = 6, 78


@dataclass(frozen=True, slots=True)
class Setting:
    """One field of the configuration."""

    name: str
    value: Any
    default: Any
    unit: str
    bounds: str  # what is valid, as far as it is a range or a choice
    says: str


class ConfigOptions(Options):
    """Options of `config`."""

    pattern: Annotated[str | None, Positional()] = option(None, "a section or a word", "PATTERN")


def main(argv: Sequence[str]) -> int:
    """List the settings of a run, with units, ranges and defaults."""
    options, overrides = parse("config", ConfigOptions, argv, __doc__ or "", RunConfig)
    config = load(options.config, overrides)
    found = _fitting(list(settings(RunConfig, config)), options.pattern)
    if not found:
        names = {part for s in settings(RunConfig, config) for part in re.split("[._]", s.name)}
        near = difflib.get_close_matches(options.pattern or "", names, n=1)
        meant = f"did you mean {near[0]!r}?" if near else "`openhelix config` lists all of them"
        raise ConfigError(f"PATTERN: no setting has {options.pattern!r} in it; {meant}")
    if options.as_json:
        shown = RunConfig.model_validate(config).model_dump(mode="json")
        answer(json.dumps({s.name: _plain(shown, s) for s in found}))
        return 0
    console = Console(highlight=False, width=WIDTH + 2)
    for setting in found:
        changed = "bold yellow" if setting.value != setting.default else "bold"
        line = Text(setting.name, changed)
        line.append(f"={as_typed(setting.value)}")
        notes = [note for note in (setting.unit, setting.bounds) if note]
        line.append(f"  {', '.join(notes)}" if notes else "", "dim")
        console.print(line, soft_wrap=True)
        for row in textwrap.wrap(setting.says, WIDTH - INDENT):
            console.print(" " * INDENT + row, markup=False)
    return 0


def _plain(shown: dict[str, Any], setting: Setting) -> dict[str, Any]:
    value: Any = shown
    for part in setting.name.split("."):
        value = value[part]
    return {"value": value, "unit": setting.unit, "valid": setting.bounds, "says": setting.says}


def settings(model: type[Any], values: Any, prefix: str = "") -> Iterator[Setting]:
    """Yield every field of a model or dataclass, its sections opened, with what its source says."""
    told = comments(model)  # type: ignore[arg-type]
    hints = inspect.get_annotations(model, eval_str=False)
    if is_dataclass(model):
        rows = [(f.name, f.default, ()) for f in dataclass_fields(model)]
    else:
        assert issubclass(model, BaseModel)
        rows = [
            (name, field.get_default(call_default_factory=True), tuple(field.metadata))
            for name, field in model.model_fields.items()
        ]
    for name, default, metadata in rows:
        value = getattr(values, name)
        whole = f"{prefix}{name}"
        if isinstance(value, BaseModel) or (is_dataclass(value) and not isinstance(value, type)):
            yield from settings(type(value), value, f"{whole}.")
            continue
        unit = next((unit for end, unit in UNITS.items() if f"_{name}".endswith(end)), "")
        bounds = _bounds(metadata, str(hints.get(name, "")))
        yield Setting(whole, value, default, unit, bounds, told.get(name, ""))


@cache
def comments(model: Any) -> dict[str, str]:
    """Return what the source of a class says of each field, in the remarks beside or above it."""
    try:
        source = textwrap.dedent(inspect.getsource(model))
    except OSError:
        return {}
    remarks: dict[int, str] = {}
    alone: set[int] = set()
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row = token.start[0]
            remarks[row] = token.string.lstrip("# ").strip()
            if lines[row - 1].strip().startswith("#"):
                alone.add(row)
    found: dict[str, str] = {}
    body = next(node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)).body
    for node in body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        above: list[str] = []
        row = node.lineno - 1
        while row in alone:
            above.insert(0, remarks[row])
            row -= 1
        beside = [
            remarks[r] for r in range(node.lineno, (node.end_lineno or 0) + 1) if r in remarks
        ]
        found[node.target.id] = " ".join([*above, *beside])
    return found


def _bounds(metadata: Sequence[Any], hint: str) -> str:
    choice = re.search(r"Literal\[(.*?)\]", hint)
    if choice:
        return "one of " + choice[1].replace('"', "").replace("'", "")
    words = []
    for one in metadata:
        inner = [one] if isinstance(one, BaseMetadata) else getattr(one, "metadata", [])
        for bound in inner:
            match bound:
                case Gt():
                    words.append(f"above {bound.gt}")
                case Ge():
                    words.append(f"at least {bound.ge}")
                case Lt():
                    words.append(f"below {bound.lt}")
                case Le():
                    words.append(f"at most {bound.le}")
    return ", ".join(words)


def _fitting(listed: list[Setting], pattern: str | None) -> list[Setting]:
    if pattern is None:
        return listed
    word = pattern.lower().strip(".")
    section = [s for s in listed if s.name == word or s.name.startswith(f"{word}.")]
    return section or [s for s in listed if word in f"{s.name} {s.says}".lower()]
