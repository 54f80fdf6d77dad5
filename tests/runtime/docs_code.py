"""The code that the documentation shows, as modules: what is printed there is what is tested."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

DOCS = Path(__file__).resolve().parents[2] / "docs"


def blocks(page: str, language: str) -> list[str]:
    """Return the page's fenced blocks of a language ("" for plain ones), in order."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", (DOCS / page).read_text(), re.M | re.S)
    return [text for name, text in found if name == language]


def commands(page: str) -> list[str]:
    """Return the lines of a page's shell blocks, continued lines joined."""
    joined = (block.replace("\\\n", " ") for block in blocks(page, ""))
    return [line for text in joined for line in text.splitlines() if line]


def module(page: str, name: str) -> ModuleType:
    """Return the page's only Python block as a module called `name`."""
    (code,) = blocks(page, "python")
    made = sys.modules.setdefault(name, ModuleType(name))
    exec(compile(code, str(DOCS / page), "exec"), made.__dict__)
    return made
