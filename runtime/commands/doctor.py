"""`openhelix doctor`: what this machine can do, and what to do about what is missing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from runtime.commands.arguments import parse, parser
from runtime.config import ConfigError
from runtime.doctor import diagnose, healthy


def main(argv: Sequence[str]) -> int:
    """Print one row a check; 0 when everything that a run needs is there, else 1."""
    options, overrides = parse(parser("doctor", __doc__ or ""), argv)
    if overrides:
        raise ConfigError(f"{overrides[0]}: doctor takes no overrides")
    checks = diagnose()
    if options.json:
        print(json.dumps({"healthy": healthy(checks), "checks": [asdict(c) for c in checks]}))
        return 0 if healthy(checks) else 1
    table = Table("", "what", "found", "what to do")
    for check in checks:
        mark = "[green]yes[/green]" if check.ok else "[yellow]no[/yellow]"
        table.add_row(mark, check.name, check.detail, "" if check.ok else check.remedy)
    Console(highlight=False).print(table)
    return 0 if healthy(checks) else 1
