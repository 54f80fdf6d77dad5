"""openhelix.benchmarks.evaluation.results: a folder that a killed evaluation is continued in."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from openhelix.benchmarks.evaluation.results import (
    FIELDS,
    SHARD,
    ResultsError,
    Store,
    line_of,
    parse_line,
    read_results,
)
from openhelix.benchmarks.evaluation.suites import Suite

EPISODES = Suite("tasks", count=2).episodes()
IDENTITY = {"name": "tasks", "seed": 0, "tasks": ["a", "b"]}


def result(episode, **changes):
    values = dict.fromkeys(FIELDS)
    values |= {"index": episode.index, "key": episode.key, "success": True, "error": "naïve\n“x”"}
    return values | changes


def store(folder, identity=IDENTITY, code="c"):
    return Store(folder, identity, EPISODES, code)


@pytest.mark.parametrize("left", [(), (".lock",), (".lock", ".run.json.7.part")])
def test_an_evaluation_that_was_killed_before_it_began_can_begin(tmp_path, left):
    (tmp_path / "run" / "shards").mkdir(parents=True)
    for name in left:
        (tmp_path / "run" / name).write_bytes(b"x")
    box = store(tmp_path / "run")
    box.add(result(EPISODES[0]))
    box.close()
    assert len(read_results(tmp_path / "run")) == 1
    (tmp_path / "other" / "shards").mkdir(parents=True)
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(ResultsError, match="holds other files"):
        store(tmp_path / "other")


@pytest.fixture
def filled(tmp_path):
    folder = tmp_path / "run"
    box = store(folder)
    for episode in reversed(EPISODES[:40]):
        box.add(result(episode))
    box.close()
    return folder


def snapshot(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


def test_what_was_added_is_there_afterwards_in_order(filled):
    box = store(filled)
    assert [r["index"] for r in box.results] == list(range(40))
    assert [e.index for e in box.missing] == list(range(40, 68))
    assert box.results == [result(e) for e in EPISODES[:40]] == read_results(filled)
    assert len(list((filled / "shards").iterdir())) == -(-40 // SHARD)
    box.close()


def test_a_shard_is_never_half_there(filled, monkeypatch):
    """A write that dies at any point leaves the old shard."""
    before = snapshot(filled)
    box = store(filled)
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("the disk is full")))
    with pytest.raises(OSError, match="full"):
        box.add(result(EPISODES[40]))
    box.close()
    monkeypatch.undo()
    after = {p: d for p, d in snapshot(filled).items() if p.suffix == ".jsonl"}
    assert after == {p: d for p, d in before.items() if p.suffix == ".jsonl"}
    assert len(read_results(filled)) == 40


def test_every_byte_of_a_shard_is_watched(filled):
    path = filled / "shards" / "0001.jsonl"
    data = path.read_bytes()

    @given(st.integers(0, len(data) - 1), st.integers(1, 255))
    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    def check(position, flip):
        broken = bytearray(data)
        broken[position] ^= flip
        path.write_bytes(bytes(broken))
        try:
            read = read_results(filled)
        except ResultsError as error:
            said = str(error)
        else:
            # White space and the like: other bytes, the same results.
            assert read == [result(e) for e in EPISODES[:40]]
            return
        assert "0001.jsonl" in said and "\n" not in said

    check()


@pytest.mark.parametrize("damage", ["cut", "garbage", "twice", "foreign", "binary"])
def test_damage_is_refused_and_nothing_is_touched(filled, damage):
    path = filled / "shards" / "0000.jsonl"
    data = path.read_bytes()
    path.write_bytes(
        {
            "cut": data[:-20],
            "garbage": data + b"{not json\n",
            "twice": data + data.splitlines(keepends=True)[0],
            "foreign": data + (line_of(result(EPISODES[50], key="D/other/0")) + "\n").encode(),
            "binary": b"\xff\xfe" + data,
        }[damage]
    )
    before = snapshot(filled)
    with pytest.raises(ResultsError) as caught:
        store(filled)
    assert "0000.jsonl" in str(caught.value) and "\n" not in str(caught.value)
    assert snapshot(filled) == before


def test_a_damaged_run_file_is_refused(filled):
    for text in (
        "",
        "{",
        "[]",
        "[" * 100_000,
        '{"format": 1}',
        '{"format": 99, "identity": {}, "code": []}',
    ):
        (filled / "run.json").write_text(text)
        with pytest.raises(ResultsError, match=r"run\.json"):
            store(filled)
        assert (filled / "run.json").read_text() == text


def test_another_evaluations_folder_is_refused(filled):
    with pytest.raises(ResultsError, match=r"begun with seed = 0, now it is 1"):
        store(filled, IDENTITY | {"seed": 1})
    with pytest.raises(ResultsError, match="begun with extra = null"):
        store(filled, IDENTITY | {"extra": 2})


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ResultsError, match="other files"):
        store(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_two_evaluations_do_not_share_a_folder(tmp_path):
    box = store(tmp_path / "run")
    with pytest.raises(ResultsError, match="in use"):
        store(tmp_path / "run")
    box.close()
    assert not (tmp_path / "run").exists()  # it got no result
    store(tmp_path / "run").close()


def test_results_of_another_program_are_noted(filled):
    box = store(filled, code="newer")
    assert box.codes == ["c", "newer"]
    box.close()
    assert json.loads((filled / "run.json").read_text())["code"] == ["c", "newer"]


def test_videos_lie_beside_the_results(tmp_path):
    box = store(tmp_path / "run")
    box.add(result(EPISODES[0]), b"mp4")
    box.close()
    (video,) = (tmp_path / "run" / "videos").iterdir()
    assert video.read_bytes() == b"mp4" and "/" not in video.name


def test_a_line_carries_its_checksum():
    line = line_of(result(EPISODES[0]))
    assert "\n" not in line and parse_line(line, "x") == result(EPISODES[0])
    with pytest.raises(ResultsError, match="x: damaged"):
        parse_line(line.replace('"success":true', '"success":false'), "x")
    with pytest.raises(ResultsError, match="x: damaged"):
        parse_line("[" * 100_000, "x")
