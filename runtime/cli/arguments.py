"""The one command line that all commands share.

A command has *options*, a pydantic model whose fields are written `--name VALUE`, and most have
*settings*, another pydantic model, read from `--config FILE` with words `section.field=value`
(or `--section.field value`) on top. `--json` prints one object and nothing else. What is wrong
is one line that names the option or field, and what was probably meant.
"""

from __future__ import annotations

import argparse
import difflib
import re
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from openhelix.runtime.core.config import ConfigError, explain

WIDEST = 100  # columns of a help page, in however wide a terminal
OVERRIDE = re.compile(r"[A-Za-z_][\w-]*(\.[\w-]+)*=")
O = TypeVar("O", bound="Options")  # noqa: E741


@dataclass(frozen=True, slots=True)
class Positional:
    """Marks an option that is written without its name; `many` takes any number of words."""

    many: bool = False


@dataclass(frozen=True, slots=True)
class Many:
    """Marks an option that takes one or more words, and may be repeated."""


def _split(value: Any) -> Any:
    if isinstance(value, str):
        return tuple(word.strip() for word in value.split(",") if word.strip())
    return value


Words = Annotated[tuple[str, ...], BeforeValidator(_split)]  # written a,b,c
Numbers = Annotated[tuple[int, ...], BeforeValidator(_split)]  # written 1,2,3


def option(default: Any, says: str, metavar: str | None = None) -> Any:
    """Return the field of an option; `...` as default for one that must be given."""
    return Field(default, description=says, json_schema_extra={"metavar": metavar})


class Options(BaseModel):
    """What every command takes; a command's own options are fields of a subclass."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", populate_by_name=True, arbitrary_types_allowed=True
    )

    config: Path | None = option(None, "YAML file with settings", "FILE")
    as_json: bool = Field(False, alias="json", description="print one JSON object and nothing else")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise ConfigError(message)


def parse(
    command: str,
    options: type[O],
    argv: Sequence[str],
    doc: str = "",
    settings: type[BaseModel] | None = None,
    sections: Sequence[str] = (),
) -> tuple[O, list[str]]:
    """Return a command's options, and its overrides as `section.field=value`.

    Args:
        command: its name.
        options: the model of what is written `--name VALUE`.
        argv: the words after the command's name.
        doc: what `--help` says of it.
        settings: the model that overrides are for; None: the command takes none, and no
            `--config`.
        sections: the parts of the settings that it uses, or their sections, which `--help` lists;
            () for all.

    Raises:
        ConfigError: in one line, the word and what is valid.
    """
    parser, spelled = _parser(command, options, doc, settings, sections)
    words, overrides = _separate(argv, spelled, settings)
    if overrides and settings is None:
        raise ConfigError(f"{overrides[0]}: {command} takes no settings")
    values = vars(parser.parse_args(words))
    try:
        return options.model_validate(values), overrides
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ConfigError(_complaint(options, first)) from None


def help_of_settings(settings: type[BaseModel] | BaseModel, prefix: str = "") -> Iterator[str]:
    """Yield every setting with its default, one per line; of a model, or of one with values."""
    model = type(settings) if isinstance(settings, BaseModel) else settings
    for name, field in model.model_fields.items():
        default = getattr(settings, name) if isinstance(settings, BaseModel) else field.default
        if isinstance(default, BaseModel):
            yield from help_of_settings(default, f"{prefix}{name}.")
        elif is_dataclass(default) and not isinstance(default, type):
            for part in fields(default):
                yield _setting(f"{prefix}{name}.{part.name}", getattr(default, part.name))
        else:
            yield _setting(f"{prefix}{name}", default)


def as_typed(value: Any) -> str:
    """Return a value as it is typed: a list in YAML's brackets, nothing as null."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(as_typed, value))}]"
    return str(value)


def _setting(name: str, default: object) -> str:
    shown = as_typed(default)
    return f"  {name}={shown if len(shown) < 70 else shown[:66] + ' ...'}"


def _parser(
    command: str,
    options: type[Options],
    doc: str,
    settings: type[BaseModel] | None,
    sections: Sequence[str],
) -> tuple[_Parser, dict[str, FieldInfo]]:
    epilog = ""
    if settings is not None:
        listed = [
            row
            for row in help_of_settings(settings)
            if not sections or any(re.match(rf"  {part}[.=]", row) for part in sections)
        ]
        epilog = "settings, written section.field=value, and their defaults:\n" + _side_by_side(
            listed
        )
    words = " [section.field=value ...]" if settings is not None else ""
    usage = f"openhelix {command} [OPTIONS]{_usage(options)}{words}"
    parser = _Parser(
        prog=f"openhelix {command}",
        usage="\n".join(wrapped(f"usage: {usage}", "", " " * 7)).removeprefix("usage: "),
        description=fitted(doc),
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    spelled: dict[str, FieldInfo] = {}
    for name, field in options.model_fields.items():
        key = field.alias or name
        if name == "config" and settings is None:
            continue
        positional = next((m for m in field.metadata if isinstance(m, Positional)), None)
        says = (field.description or "").replace("%", "%%")
        if positional is not None:
            required = field.is_required()
            count = ("+" if required else "*") if positional.many else None if required else "?"
            parser.add_argument(key, nargs=count, metavar=_metavar(field) or key.upper(), help=says)
            continue
        flag = f"--{key.replace('_', '-')}"
        spelled[flag] = field
        if field.annotation is bool:
            parser.add_argument(flag, dest=key, action="store_true", help=says)
            continue
        many: dict[str, Any] = {}
        if any(isinstance(m, Many) for m in field.metadata):
            many = {"action": "extend", "nargs": "+"}
        parser.add_argument(
            flag,
            dest=key,
            metavar=_metavar(field) or "VALUE",
            required=field.is_required(),
            help=says,
            **many,
        )
    return parser, spelled


def _metavar(field: FieldInfo) -> str:
    extra = field.json_schema_extra
    return str(extra.get("metavar") or "") if isinstance(extra, dict) else ""


def _usage(options: type[Options]) -> str:
    words = ""
    for name, field in options.model_fields.items():
        found = next((m for m in field.metadata if isinstance(m, Positional)), None)
        if found is not None:
            word = (_metavar(field) or name.upper()) + (" ..." if found.many else "")
            words += f" {word}" if field.is_required() else f" [{word}]"
    return words


def _columns() -> int:
    return max(40, min(shutil.get_terminal_size().columns, WIDEST) - 1)


def wrapped(text: str, first: str, others: str, spared: int = 0) -> list[str]:
    """Return a text in lines as wide as the terminal, less `spared`, with these beginnings."""
    lines = textwrap.wrap(
        text,
        _columns() - spared,
        initial_indent=first,
        subsequent_indent=others,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return lines or [first.rstrip()]


def fitted(doc: str) -> str:
    """Return what `--help` says of a command as wide as the terminal: prose filled, examples whole.

    An example's remark goes below it where there is no room beside it, and one that is itself too
    long is continued on the next line as a shell does, so that it can be copied.
    """
    blocks = []
    for block in doc.strip().split("\n\n"):
        rows = block.split("\n")
        if all(row.startswith("    ") for row in rows):
            blocks.append("\n".join(_examples(rows)))
        else:
            blocks.append("\n".join(wrapped(" ".join(block.split()), "", "")))
    return "\n\n".join(blocks)


def _examples(rows: Sequence[str]) -> Iterator[str]:
    split = [re.split(r"\s{2,}", row.strip(), maxsplit=1) for row in rows]
    beside = [row for row in split if len(row) > 1 and len("  ".join(row)) + 4 <= _columns()]
    column = max((len(row[0]) for row in beside), default=0) + 6
    for command, *remark in split:
        whole = wrapped(command, "    ", "        ")
        if len(whole) > 1:  # room for the backslash
            whole = wrapped(command, "    ", "      ", spared=2)
            whole = [f"{line} \\" for line in whole[:-1]] + whole[-1:]
        if len(whole) == 1 and len(told := f"{whole[0]:<{column}}" + "".join(remark)) <= _columns():
            yield told.rstrip()
            continue
        yield from whole
        for words in remark:
            yield from wrapped(words, "        ", "        ")


def _side_by_side(rows: Sequence[str]) -> str:
    """Settings of a section one after the other, as many in a line as fit."""
    lines: list[str] = []
    section = None
    for row in rows:
        own = row.strip().partition("=")[0].rpartition(".")[0].split(".")[0]
        if own == section and len(lines[-1]) + len(row) <= _columns():
            lines[-1] += row
        else:
            lines.append(row)
        section = own
    return "\n".join(lines)


def _separate(
    argv: Sequence[str], spelled: dict[str, FieldInfo], settings: type[BaseModel] | None
) -> tuple[list[str], list[str]]:
    """Split words into a command's own and overrides."""
    own: list[str] = []
    overrides: list[str] = []
    sections = () if settings is None else tuple(settings.model_fields)
    words = iter(argv)
    for word in words:
        flag, sign, _ = word.partition("=")
        if flag in spelled:
            own.append(word)
            if not sign and spelled[flag].annotation is not bool:
                own += [value] if (value := next(words, None)) is not None else []
        elif word in ("-h", "--help") or not (word.startswith("--") or OVERRIDE.match(word)):
            own.append(word)
        elif not word.startswith("--"):
            overrides.append(word)
        elif (key := flag.removeprefix("--").replace("-", "_")).split(".")[0] in sections:
            value = word.partition("=")[2] if sign else next(words, None)
            if value is None:
                raise ConfigError(f"{word}: needs a value")
            overrides.append(f"{key}={value}")
        else:
            raise ConfigError(f"{flag}: unknown option{_meant(flag, spelled, sections)}")
    return own, overrides


def _meant(flag: str, spelled: dict[str, FieldInfo], sections: Sequence[str]) -> str:
    known = [*spelled, *(f"--{name}" for name in sections)]
    near = difflib.get_close_matches(flag, known, n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else f"; valid: {', '.join(spelled)}"


def _complaint(options: type[Options], error: Any) -> str:
    name = str(error["loc"][0]) if error["loc"] else ""
    field = options.model_fields.get(name)
    positional = field is not None and any(isinstance(m, Positional) for m in field.metadata)
    where = name if positional else f"--{name.replace('_', '-')}"
    return explain(where if name else "", error)
