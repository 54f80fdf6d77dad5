"""The short fuzzing: a few inputs of every surface, and that a finding is found."""

from __future__ import annotations

from pathlib import Path

import pytest

from openhelix.benchmarks.perf.fuzz import (
    SHARES,
    SLOW,
    SLOWER,
    Changes,
    Input,
    fuzz,
    table,
    try_out,
)


@pytest.mark.parametrize(
    ("surface", "frames"),
    [*((name, 1500) for name in SHARES), *((name, 160 * SLOWER) for name in SLOW)],
)
def test_whatever_arrives_is_taken_whole_or_refused(
    surface: str, frames: int, tmp_path: Path
) -> None:
    (result,) = list(fuzz(frames, 1, [surface], tmp_path))
    assert not result.findings
    assert result.taken > 5 and sum(result.refused.values()) > 20
    assert result.inputs == result.taken + sum(result.refused.values())
    assert surface in table([result], 1, frames)


def test_every_surface_has_a_share() -> None:
    assert sum(SHARES.values()) == pytest.approx(1.0)
    assert not set(SHARES) & set(SLOW)


class Fragile:
    """Takes what is as it was, and breaks at what is longer."""

    def __init__(self) -> None:
        self.corpus: list[Input] = [[b"right"]]

    def change(self, given: Input, random: Changes) -> Input:
        return [random.of_bytes(given[0], b"other")]

    def feed(self, given: Input) -> str:
        if len(given[0]) > 8:
            raise KeyError("too long for me")
        return "" if given == [b"right"] else "other: x"


def test_what_is_no_refusal_is_a_finding_and_is_kept(tmp_path: Path) -> None:
    result = try_out("fragile", Fragile(), 200, 0, tmp_path / "findings")
    assert result.findings and set(result.findings) == {"KeyError: 'too long for me'"}
    assert result.taken >= 1 and result.refused["other"] > 5 and result.ways == 1
    kept = sorted((tmp_path / "findings").iterdir())
    assert len(kept) == min(20, len(result.findings)) and len(kept[0].read_bytes()) > 8


def test_the_same_seed_makes_the_same_inputs() -> None:
    made = [[Changes(3).of_bytes(b"abcdefgh", b"xyz") for _ in range(5)] for _ in range(2)]
    assert made[0] == made[1]
