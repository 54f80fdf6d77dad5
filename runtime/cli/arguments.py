"""The command line that all commands share: `--config FILE`, dotted overrides, `--json`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from openhelix.runtime.core.config import ConfigError


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, raised as `ConfigError`."""

    def error(self, message: str) -> None:  # type: ignore[override]
        raise ConfigError(message)


def parser(command: str, description: str) -> Parser:
    """Return a parser with the options that every command takes."""
    result = Parser(prog=f"openhelix {command}", description=description)
    result.add_argument("--config", type=Path, metavar="FILE", help="YAML configuration")
    result.add_argument(
        "--json", action="store_true", help="print one JSON object and nothing else"
    )
    return result


def parse(
    arguments: argparse.ArgumentParser, argv: Sequence[str]
) -> tuple[argparse.Namespace, list[str]]:
    """Return the known options and the overrides (`a.b=value` or `--a.b value`).

    Raises:
        ConfigError: a word is neither.
    """
    known, rest = arguments.parse_known_args(argv)
    overrides: list[str] = []
    words = iter(rest)
    for word in words:
        if "=" in word:
            overrides.append(word.removeprefix("--"))
        elif word.startswith("--") and "." in word:
            value = next(words, None)
            if value is None:
                raise ConfigError(f"{word}: needs a value")
            overrides.append(f"{word.removeprefix('--')}={value}")
        else:
            raise ConfigError(
                f"{word!r}: unknown option; overrides are written section.field=value"
            )
    return known, overrides
