"""openhelix.runtime.core.targets: what a part takes, read from its source and never imported."""

from __future__ import annotations

import sys

import pytest

from openhelix.runtime.core.config import ConfigError, EnginePart, Part
from openhelix.runtime.core.plugins import ResolveError
from openhelix.runtime.core.targets import check_part, signature_of

MODULE = """
from dataclasses import dataclass
from pathlib import Path

raise RuntimeError("is not to be imported")


class Base:
    def __init__(self, size: int = 1, *, file: Path | str = "shipped"): ...


class Passes(Base):
    def __init__(self, name: str, **rest): super().__init__(**rest)


class Keeps(Base):
    def __init__(self, **rest): self.rest = rest


class Plain(Base):
    @staticmethod
    def load(path: Path | None = None): ...


@dataclass
class Data:
    x: int


made = Base
"""


@pytest.fixture
def module(tmp_path, monkeypatch) -> str:
    """A module of the current folder, where a console script does not look."""
    (tmp_path / "parts_of_mine.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    return "parts_of_mine"


def check(target: str, **options: object) -> None:
    check_part("x", Part(target=target, options=options))


def test_options_are_checked_against_the_signature(module, tmp_path) -> None:
    assert list(signature_of(f"{module}:Passes").parameters) == ["name", "size", "file"]
    check(f"{module}:Passes", name="a", size=2, file="shipped")
    check(f"{module}:Passes", name="a", file=str(tmp_path))
    with pytest.raises(ConfigError, match=r"^x\.options\.sise: .* did you mean 'size'"):
        check(f"{module}:Passes", name="a", sise=2)
    with pytest.raises(ConfigError, match=r"^x\.options\.name: .* needs it"):
        check(f"{module}:Passes")
    with pytest.raises(ConfigError, match=r"^x\.options\.file: there is nothing at /nope"):
        check(f"{module}:Passes", name="a", file="/nope")
    with pytest.raises(ConfigError, match=r"^x\.options\.path: there is nothing at /nope"):
        check(f"{module}:Plain.load", path="/nope")
    check_part("x", Part(target=f"{module}:Plain.load", options={"path": "/nope"}), files=False)
    assert module not in sys.modules


def test_what_the_source_does_not_tell_is_let_through(module) -> None:
    check(f"{module}:Keeps", anything=1)
    assert signature_of(f"{module}:Data") is None and signature_of(f"{module}:made") is None
    assert signature_of(f"{module}:Plain.other") is None  # perhaps of its base
    with pytest.raises(ResolveError, match="has no 'Bass'"):
        signature_of(f"{module}:Bass")


def test_options_of_an_engine_are_known_through_its_base() -> None:
    before = set(sys.modules)
    with pytest.raises(ConfigError, match="did you mean 'model'"):
        check_part("system2.engine", EnginePart(options={"modle": "laptop"}))
    assert "openhelix.system2.engines.base" not in set(sys.modules) - before
