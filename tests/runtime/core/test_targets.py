"""openhelix.runtime.core.targets: what a part takes, read from its source and never imported."""

from __future__ import annotations

import sys

import pytest

from openhelix.runtime.core import targets
from openhelix.runtime.core.config import ConfigError, EnginePart, Part, PolicyPart
from openhelix.runtime.core.plugins import ResolveError
from openhelix.runtime.core.targets import (
    SHIPPED,
    check_part,
    fingerprint,
    signature_of,
    written_spec,
)

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


# What is in a checkpoint --------------------------------------------------------------------------


def test_what_a_policy_expects_is_read_beside_its_weights(tmp_path) -> None:
    shipped = written_spec(PolicyPart())
    assert [camera.name for camera in shipped.cameras] == ["static", "gripper"]
    assert shipped.latent is not None and shipped.action.hz == 30.0
    (tmp_path / "spec.json").write_text((SHIPPED["system1"] / "spec.json").read_text())
    mine = Part(target="mine:Policy", options={"path": str(tmp_path)})
    assert written_spec(mine) == shipped
    # Nothing is known of what has no file, or is no checkpoint at all.
    assert written_spec(Part(target="mine:Policy", options={"path": "/nowhere"})) is None
    assert written_spec(Part(target="mine:Policy")) is None
    assert written_spec(PolicyPart(options={"untrained": True})) is None


@pytest.mark.parametrize(
    ("written", "why"),
    [(None, "holds no checkpoint"), ("{", "spec.json"), ("{}", "KeyError"), ("[]", "holds list")],
)
def test_a_folder_without_a_checkpoint_is_refused_before_it_is_loaded(
    tmp_path, written, why
) -> None:
    if written is not None:
        (tmp_path / "spec.json").write_text(written)
    with pytest.raises(ConfigError, match=f"system1.policy.options.path: .*{why}") as caught:
        written_spec(PolicyPart(options={"path": str(tmp_path)}))
    assert "\n" not in str(caught.value)


def test_a_fingerprint_is_of_names_and_contents(tmp_path, monkeypatch) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "w").write_bytes(b"1" * 100)
    first = fingerprint(folder)
    assert first == fingerprint(folder) and len(first) == 12
    (folder / "w").write_bytes(b"1" * 99 + b"2")
    second = fingerprint(folder)
    (folder / "w").rename(folder / "v")
    assert len({first, second, fingerprint(folder), fingerprint(folder / "v")}) == 4
    assert fingerprint(tmp_path / "none") is None
    # Of a large file the ends count.
    monkeypatch.setattr(targets, "WHOLE_BYTES", 50)
    monkeypatch.setattr(targets, "ENDS_BYTES", 10)
    large = fingerprint(folder)
    (folder / "v").write_bytes(b"1" * 50 + b"x" + b"1" * 48 + b"2")
    assert fingerprint(folder) == large
    (folder / "v").write_bytes(b"1" * 99 + b"3")
    assert fingerprint(folder) != large
