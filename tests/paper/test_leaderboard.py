"""The leaderboard: who is on it, in which order, and what is refused."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import av
import numpy as np
import pytest

from openhelix.benchmarks.evaluation.results import FIELDS, FORMAT, line_of
from openhelix.benchmarks.paper import leaderboard
from openhelix.benchmarks.paper.judge import STATISTICS
from openhelix.benchmarks.paper.leaderboard import (
    HEADER,
    cells,
    entries,
    named_folders,
    own_entries,
    to_html,
    write_leaderboard,
)
from openhelix.runtime.core.config import ConfigError
from openhelix.runtime.observe.film import Mp4

COMMON = {
    **{"clock": "lockstep", "steps_limit": 60, "interval": 10, "latency": 2, "hold_steps": 7},
    **{"s1_s_per_plan": 0.05, "s2_s_per_latent": None, "latents_per_task": 3.25},
    **{"policy_sha256": "abc", "n_starts": 78, "scene": "D", "latents": "l", "n_errors": 0},
}


def chain(avg):
    return {
        **COMMON,
        **{"suite": "calvin", "avg_len": avg, "ci95": [avg - 0.5, avg + 0.5], "n_sequences": 100},
    }


def single(rate):
    return {
        **COMMON,
        **{"suite": "calvin-d", "success_rate": rate, "ci95": [0.1, 0.9], "n_episodes": 315},
    }


def outcome(name, *rows, statistics=STATISTICS):
    made = [
        {"name": who, "score": score, "evaluation": key, "suite": "calvin"}
        for who, score, key in rows
    ]
    return {"name": name, "scale": {"name": "laptop"}, "rows": made, "statistics": statistics}


TABLES = [
    outcome("table8", ("<b>weak</b>", chain(1.0), "k1"), ("strong", chain(3.5), "k2")),
    outcome("table1", ("strong", single(0.8), "k3"), ("none", None, "k4")),
    outcome("table2", ("strong again", chain(3.5), "k2")),
    outcome("table3", ("old", chain(5.0), "k5"), statistics=1),
]


def test_each_evaluation_is_listed_once_best_first_and_none_by_older_rules():
    found = entries(TABLES)
    told = [(e["system"], e["score"]["suite"]) for e in found]
    assert told == [("strong", "calvin"), ("<b>weak</b>", "calvin"), ("strong", "calvin-d")]
    assert cells(found[0])[2:6] == ["3.50", "3.00 to 4.00", "78", "100"]
    assert cells(found[2])[2:4] == ["80.0", "10.0 to 90.0"]
    assert all(len(cells(e)) + 1 == len(HEADER) for e in found)


class Rows(HTMLParser):
    """Collects the cells of a page's rows, and what it loads from elsewhere."""

    def __init__(self):
        super().__init__()
        self.rows, self.loads = [], []
        self.inside = False

    def handle_starttag(self, tag, attrs):
        self.loads += [v for k, v in attrs if k in ("src", "href")]
        if tag == "tr":
            self.rows.append([])
        self.inside = tag in ("td", "th")

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, data):
        if self.inside and self.rows:
            self.rows[-1].append(data)


def test_the_page_needs_nothing_else_and_shows_names_as_text(tmp_path):
    place = write_leaderboard(tmp_path, TABLES, (), tmp_path)
    text = place.read_text()
    reader = Rows()
    reader.feed(text)
    assert not reader.loads and "http" not in text and "<b>weak" not in text
    assert tuple(reader.rows[0]) == HEADER
    assert [row[0] for row in reader.rows[1:]] == ["strong", "<b>weak</b>", "strong"]
    kinds = re.findall(r'data-kind="(\w+)"', text)
    assert [kinds[HEADER.index(n)] for n in ("system", "score", "starts")] == [
        *("text", "number", "number")
    ]
    assert "## CALVIN-D" in (tmp_path / "leaderboard.md").read_text()
    assert write_leaderboard(tmp_path / "none", [], (), tmp_path) is None


def filmed(folder, *successes):
    """Write an evaluation of one task an episode, each with a film of a second."""
    (folder / "shards").mkdir(parents=True)
    (folder / "videos").mkdir()
    run = {"format": FORMAT, "identity": {}, "code": ["x"]}
    (folder / "run.json").write_text(json.dumps(run))
    lines = []
    for index, success in enumerate(successes):
        result = dict.fromkeys(FIELDS) | {"index": index, "key": f"D/{index}"}
        lines.append(line_of(result | {"tasks": [{"task": "open_drawer", "success": success}]}))
        film = Mp4(folder / "videos" / f"D-{index}.mp4", 640, 360)
        for tick in range(30):
            shade = 200 if success else 20
            film.write(np.full((360, 640, 3), shade, np.uint8), round(tick * 1e9 / 30))
        film.close()
    (folder / "shards" / "0000.jsonl").write_text("\n".join(lines) + "\n")


def test_a_success_and_a_failure_of_each_evaluation_can_be_watched(tmp_path):
    filmed(tmp_path / "evaluations" / "k2", True, False, True)
    filmed(tmp_path / "evaluations" / "k1", False)
    place = write_leaderboard(tmp_path / "out", TABLES, (), tmp_path / "evaluations")
    reader = Rows()
    reader.feed(place.read_text())
    films = [f"films/{name}.mp4" for name in ("k2-success", "k2-failure", "k1-failure")]
    assert reader.loads == films
    for name in films:
        with av.open(str(tmp_path / "out" / name)) as container:
            shots = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
            assert len(shots) == 10 and shots[0].shape == (216, 384, 3)
            assert abs(int(shots[5].mean()) - (200 if "success" in name else 20)) < 4
    assert "[success](films/k2-success.mp4)" in (tmp_path / "out" / "leaderboard.md").read_text()
    # Where only the results are, their films still are.
    place = write_leaderboard(tmp_path / "out", TABLES, (), tmp_path / "elsewhere")
    assert all(name in place.read_text() for name in films)


def test_two_processes_may_make_one_film_at_once(tmp_path, monkeypatch):
    filmed(tmp_path / "k1", True)
    source, out = tmp_path / "k1" / "videos" / "D-0.mp4", tmp_path / "small.mp4"

    class Slow(Mp4):
        def close(self):
            with monkeypatch.context() as other:  # another process begins and ends meanwhile
                other.setattr(leaderboard, "Mp4", Mp4)
                other.setattr("os.getpid", lambda: 1)
                leaderboard.small_film(source, out)
            super().close()

    monkeypatch.setattr(leaderboard, "Mp4", Slow)
    leaderboard.small_film(source, out)
    with av.open(str(out)) as container:
        assert len(list(container.decode(video=0))) == 10
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["small.mp4"]


def test_a_system_of_ones_own_is_named_by_its_evaluation(tmp_path):
    score = chain(4.0)
    report = {
        **{k: v for k, v in score.items() if k not in ("policy_sha256", "hold_steps")},
        **{"scene": "D", "seed": 0, "n_errors": 0, "policy": {"sha256": "mine"}, "system2": None},
        **{"wall_s": 1.0, "workers": 1, "replan_steps": 4, "code": ["x"]},
        "work": {
            **{"env_steps": 9, "hold_steps": 7, "latent_age_steps": None, "latents_per_task": 1},
            **{"tasks_attempted": 10, "plans": 100},
        },
        "timing": {
            **{"steps_per_s": 1.0, "s1_s_per_task": 0.5, "s2_s_per_latent": 0.2},
            **{"s2_s_per_task": 0.2, "cpu_s_per_step": None},
        },
    }
    (tmp_path / "run.json").write_text(
        json.dumps({"format": FORMAT, "identity": {}, "code": ["x"]})
    )
    (tmp_path / "shards").mkdir()
    results = [
        dict.fromkeys(FIELDS) | {"index": i, "in_a_row": 3 + 2 * (i % 2)} for i in range(100)
    ]
    shard = tmp_path / "shards" / "0000.jsonl"
    shard.write_text("".join(f"{line_of(r)}\n" for r in results))

    def refused(match, folder=tmp_path):
        with pytest.raises(ConfigError, match=rf"^--systems: mine: .*{match}"):
            own_entries({"mine": folder})

    refused("is not finished: no report.json")
    (tmp_path / "report.json").write_text("{}")
    refused("report.json is no report of an evaluation")
    (tmp_path / "report.json").write_text(json.dumps(report | {"avg_len": 4.99}))
    refused("does not say what the episodes beside it show")
    (tmp_path / "report.json").write_text(json.dumps(report))
    best = entries(TABLES, own_entries({"mine": tmp_path}))[0]
    line = dict(zip([h for h in HEADER if h != "films"], cells(best), strict=True))
    assert (line["system"], line["ms per plan"], line["ms per latent"]) == ("mine", "50", "200")
    assert (line["a plan every"], line["System 2 every"]) == ("4", "")  # it has no System 2
    assert "mine" in to_html([best])
    shard.write_text("spoilt")
    refused("")
    refused("no evaluation", tmp_path / "nothing")


@pytest.mark.parametrize("words", [["mine"], ["=x"], ["mine="], ["a=x", "a=y"]])
def test_names_and_folders_are_read_or_refused(words):
    with pytest.raises(ConfigError, match="--systems: "):
        named_folders(words)
    assert list(named_folders(["a=x", "b=y"])) == ["a", "b"]
