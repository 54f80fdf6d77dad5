"""A session from the command line, with a trainer that trains nothing."""

from __future__ import annotations

import copy
import dataclasses
import gzip
import json
import re
import shutil
import subprocess
import sys
from contextlib import ExitStack

import pytest

from openhelix.benchmarks.paper import command, session, tables
from openhelix.benchmarks.paper.catalogue import catalogue
from openhelix.benchmarks.paper.command import RESULTS, make_session, planned, read
from openhelix.benchmarks.paper.costs import by_experiment, hours, left, todo, told
from openhelix.benchmarks.paper.episodes import read_episodes
from openhelix.benchmarks.paper.judge import STATISTICS
from openhelix.benchmarks.paper.overview import findings
from openhelix.benchmarks.paper.train_command import check_options
from openhelix.benchmarks.paper.trainings import OutOfTime
from openhelix.runtime.cli.main import main
from openhelix.runtime.core.config import ConfigError
from openhelix.system1.cache import FORMAT

INDEX = {
    "format": FORMAT,
    "cameras": [{"name": "static", "height": 16, "width": 16, "work_height": 16, "work_width": 16}],
    "horizon": 4,
    "hz": 30.0,
    "nhist": 1,
    "tasks": ["open_drawer"],
    "instructions": ["open the drawer"],
    "shards": [{"file": "shard-00000.safetensors", "frames": 3}],
}
TRAINER = "tests.paper.fakes:FakeTrainer"


def words(tmp_path, *names, **options):
    found = ["experiment", *names, "--scale", "smoke", "--trainer", TRAINER]
    found += ["--root", str(tmp_path / "root"), "--out", str(tmp_path / "out")]
    for key, value in options.items():
        found += [f"--{key}"] if value is True else [f"--{key}", str(value)]
    return found


@pytest.fixture(scope="module")
def table4(tmp_path_factory):
    base = tmp_path_factory.mktemp("experiments")
    assert main(words(base, "table4")) == 0
    return base


def test_a_table_is_trained_measured_and_written(table4):
    outcome = json.loads((table4 / "out" / "table4.json").read_text())
    assert outcome["state"] == "complete" and outcome["scale"]["name"] == "smoke"
    for row in outcome["rows"]:
        score = row["score"]
        assert score["n_sequences"] == 1 and score["steps_limit"] == 16
        assert score["clock"] == "lockstep" and score["interval"] == 1
    found, _ = outcome["contrasts"]
    assert found["n_pairs"] == found["n_starts"] == 1 and found["verdict"] == "not testable"
    assert "the base itself scores" in found["not_testable"] and outcome["statistics"] == STATISTICS
    assert found["paper_difference"] == pytest.approx(0.68)
    assert outcome["command"] == "openhelix experiment table4 --scale smoke"
    text = (table4 / "out" / "table4.md").read_text()
    assert outcome["rows"][0]["score"]["policy_sha256"] in text
    for stated in (
        "# Table 4",
        "96 83 68 58 48",
        "lockstep",
        "smoke",
        "mean nothing",
        "not testable",
    ):
        assert stated in text
    assert (table4 / "out" / "table4.png").read_bytes().startswith(b"\x89PNG")
    board = (table4 / "out" / "leaderboard.html").read_text()
    assert outcome["rows"][0]["score"]["policy_sha256"] in board
    overview = (table4 / "out" / "README.md").read_text()
    assert "The five findings" in overview and "not run" in overview
    assert len(list((table4 / "root" / "evaluations").iterdir())) == len(outcome["rows"])


def test_a_page_can_be_recomputed_from_the_episodes_beside_it(table4, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(table4 / "out", out)
    assert main(["experiment", "table4", "--recompute", "--out", str(out)]) == 0
    assert "table4: 5 rows and 2 claims as 5 episodes give them" in capsys.readouterr().out
    file = out / "table4.episodes.jsonl.gz"
    text = gzip.decompress(file.read_bytes())
    assert str(tmp_path.parent).encode() not in text and b"wall_s" not in text
    kept = read_episodes(file)
    page = json.loads((out / "table4.json").read_text())
    for row in page["rows"]:
        results = kept[row["evaluation"]].results
        assert sum(t["env_steps"] for r in results for t in r["tasks"]) == row["score"]["env_steps"]
        assert (
            sum(t["hold_steps"] for r in results for t in r["tasks"]) == row["score"]["hold_steps"]
        )
    page["rows"][0]["score"]["avg_len"] += 1.0
    (out / "table4.json").write_text(json.dumps(page))
    assert main(["experiment", "table4", "--recompute", "--out", str(out)]) == 2
    assert "table4: pretrained: avg_len is" in capsys.readouterr().err
    file.write_bytes(gzip.compress(text[: len(text) // 2]))
    assert main(["experiment", "table4", "--recompute", "--out", str(out)]) == 2
    assert "no episodes can be read" in capsys.readouterr().err


def test_nothing_is_done_twice(table4, monkeypatch, capsys):
    def forbidden(*_):
        raise AssertionError("it was there")

    monkeypatch.setattr(session, "evaluate", forbidden)
    monkeypatch.setattr("tests.paper.fakes.FakeTrainer.train", forbidden)
    assert main([*words(table4, "table4"), "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["experiments"][0]["state"] == "complete"
    assert "0 trainings" in err and "0 evaluations" in err


def test_what_a_folder_of_results_keeps_is_not_made_again(table4, tmp_path, monkeypatch, capsys):
    out, root = tmp_path / "out", tmp_path / "root"
    shutil.copytree(table4 / "out", out)
    before = {p.name: p.read_bytes() for p in out.glob("table4.*") if p.suffix != ".pdf"}

    def forbidden(*_):
        raise AssertionError("it was there")

    with monkeypatch.context() as patched:
        patched.setattr(session, "evaluate", forbidden)
        patched.setattr("tests.paper.fakes.FakeTrainer.train", forbidden)
        assert main(words(tmp_path, "table4")) == 0
    assert "0 trainings" in capsys.readouterr().err
    assert not root.exists() or not list(root.glob("trainings/*"))
    assert before == {p.name: p.read_bytes() for p in out.glob("table4.*") if p.suffix != ".pdf"}
    # A row that is not kept is made, and nothing but it.
    page = json.loads((out / "table4.json").read_text())
    lost = next(row for row in page["rows"] if row["id"] == "scratch")
    kept, lost["score"] = lost["score"], None
    (out / "table4.json").write_text(json.dumps(page))
    asked = make_session(*read(words(tmp_path, "table4")[1:]), catalogue())
    assert [m.key for t in asked.wanted() for m in asked.unmeasured(t)] == [lost["evaluation"]]
    assert [t.key for t in asked.missing()] == [lost["training"]]
    assert main(words(tmp_path, "table4")) == 0
    assert [p.name for p in (root / "evaluations").iterdir()] == [lost["evaluation"]]
    page = json.loads((out / "table4.json").read_text())
    again = next(row for row in page["rows"] if row["id"] == "scratch")["score"]
    assert again["avg_len"] == kept["avg_len"] and page["state"] == "complete"
    assert main(["experiment", "table4", "--recompute", "--out", str(out)]) == 0


def test_each_training_is_followed_by_its_evaluations(tmp_path, capsys):
    assert main(words(tmp_path, "table4", "table6")) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "experiment: " in line]
    order = [s.split("experiment: ")[1].split(" ")[0] for s in said]
    firsts = "".join(w[0] for w in order if w in ("training", "evaluation"))
    assert "te" in firsts and "tttt" not in firsts and firsts.endswith("e")


def test_where_a_run_writes_makes_no_other_evaluation(tmp_path):
    keys = []
    for more in ([], ["output.metrics_port=0"], ["system1.replan_steps=8"]):
        options, overrides = read([*words(tmp_path, "table4")[1:], *more])
        asked = make_session(options, overrides, catalogue())
        keys.append([asked.measure(row).key for row in asked.rows()])
    assert keys[0] == keys[1] and not set(keys[0]) & set(keys[2])


def test_what_another_process_is_at_is_left_to_it_and_waited_for(tmp_path, monkeypatch, capsys):
    options, overrides = read(words(tmp_path, "table4")[1:])
    one, other = (make_session(options, overrides, catalogue()) for _ in range(2))
    row = one.rows()[-1]
    training, measure = one.training(row.variant), one.measure(row)
    waited = []

    def wait(seconds):
        held.close()
        waited.append((one.trainings.done(training), len(one.unmeasured(training))))
        if len(waited) == 1:
            assert held.enter_context(other.claims.of(measure.key))

    monkeypatch.setattr(session.time, "sleep", wait)
    with ExitStack() as held:
        assert held.enter_context(other.claims.of(training.key))
        one.run(lambda: None)
    assert [done is None for done, _ in waited] == [True, False]
    assert [count for _, count in waited] == [1, 1]
    assert not one.missing() and all(one.report(one.measure(row)) for row in one.rows())
    assert f"another process is at {training.key}" in capsys.readouterr().err


def test_a_system_of_ones_own_stands_beside_those_measured_here(table4, tmp_path):
    folder = next((table4 / "root" / "evaluations").iterdir())
    given = words(tmp_path, "table4", report=True, systems=f"mine={folder}")
    assert main(given) == 0
    text = (tmp_path / "out" / "leaderboard.md").read_text()
    assert "| mine |" in text and "(laptop) |" in text
    films = re.findall(r"\((films/[^)]+)\)", text)
    assert films and all((tmp_path / "out" / film).is_file() for film in films)
    assert "(leaderboard.md)" in (tmp_path / "out" / "README.md").read_text()


def test_two_processes_share_the_work(tmp_path):
    begun = [
        subprocess.Popen([sys.executable, "-m", "openhelix.runtime.cli.main", *command],
                         stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        for command in [words(tmp_path, "table4")] * 2
    ]  # fmt: skip
    said = [process.communicate()[1] for process in begun]
    assert [process.returncode for process in begun] == [0, 0], "\n".join(said)
    did = [line for text in said for line in text.splitlines() if ": evaluation " in line]
    measured = [line.split(": ")[-1] for line in did]
    outcome = json.loads((tmp_path / "out" / "table4.json").read_text())
    assert len(measured) == len(set(measured)) == len(outcome["rows"])
    assert outcome["state"] == "complete"


def test_tables_share_what_they_have_in_common(tmp_path):
    options, overrides = read(words(tmp_path, "all")[1:])
    whole = make_session(options, overrides, catalogue())
    rows = whole.rows()
    measures = {m.key for m in map(whole.measure, rows)}
    assert len(measures) < len(rows)
    pairs = [t for t in whole.wanted() if t.stage == "pair"]
    assert len(pairs) < len({row.variant for row in rows})
    items = todo(whole)
    assert len(items) == len(whole.wanted()) + len(measures)
    assert f"{len(measures)} evaluations" in told(items)
    parts = left(whole)
    assert [part.name for part in parts][:3] == ["table2", "table3", "table5"]
    assert parts[-1].name == "table8" and len(parts) == len(catalogue().experiments)
    assert len({item.what for item in items}) == len(items)
    lines = by_experiment(parts).splitlines()
    assert lines[0].startswith("table2: 0 of 6 trainings and 0 of 6 evaluations done, ")


def test_what_is_cut_short_is_told_and_continued(tmp_path, capsys):
    assert main(words(tmp_path, "table4", hours=1e-9)) == 0
    assert "not run" in capsys.readouterr().out
    text = (tmp_path / "out" / "table4.md").read_text()
    assert text.count("not run") >= 3 and "96 83 68 58 48" in text
    assert not (tmp_path / "out" / "table4.png").exists()
    # One row's weights are there, the other's are not: only what can be measured is.
    options, overrides = read(words(tmp_path, "table4")[1:])
    one = make_session(options, overrides, catalogue())
    one.trainings.ensure(one.training("lora_clip"), lambda text: None)
    assert main([*words(tmp_path, "table4"), "--no-training"]) == 0
    outcome = json.loads((tmp_path / "out" / "table4.json").read_text())
    assert outcome["state"] == "partial: 2 of 5 rows"
    assert outcome["contrasts"][0]["verdict"] == "not run"


def test_an_evaluation_stops_between_episodes_and_goes_on(tmp_path, monkeypatch):
    options, overrides = read(words(tmp_path, "figure4")[1:])
    asked = make_session(options, overrides, catalogue())
    row = asked.rows()[0]
    calls = iter(range(100))

    def over(self):
        if next(calls) == 3:  # a training, an evaluation, and two of its episodes
            raise OutOfTime

    monkeypatch.setattr(session.Session, "_in_time", over)
    with pytest.raises(OutOfTime):
        asked.run(lambda: None)
    monkeypatch.undo()
    done = asked.results(asked.measure(row))
    assert len(done) == 2 and asked.report(asked.measure(row)) is None
    part = left(asked)[0]
    assert (part.trainings, part.evaluations) == ((1, 1), (0, len(part.items)))
    assert part.items[0].seconds < part.items[1].seconds  # two of its five are there
    asked.run(lambda: None)
    assert asked.results(asked.measure(row))[:2] == done
    assert left(asked)[0].items == ()


def test_a_training_that_fails_leaves_its_row_out_and_no_other(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tests.paper.fakes.FakeTrainer.scratch_fails", True)
    assert main(words(tmp_path, "table4")) == 1
    assert "2 trainings failed: pair-" in capsys.readouterr().err.splitlines()[-1]
    outcome = json.loads((tmp_path / "out" / "table4.json").read_text())
    assert outcome["state"] == "partial: 3 of 5 rows"
    assert "the loss is nan" in outcome["rows"][1]["training_failed"]
    assert "training failed: pair-" in (tmp_path / "out" / "table4.md").read_text()
    monkeypatch.setattr("tests.paper.fakes.FakeTrainer.scratch_fails", False)
    assert main(words(tmp_path, "table4")) == 0
    assert "failed" not in (tmp_path / "out" / "table4.md").read_text()


def test_what_begins_with_a_training_that_failed_is_left_out(tmp_path, monkeypatch, capsys):
    whole = catalogue().experiment("axis_head")
    few = whole.model_copy(update={"rows": (whole.row("dit"),), "contrasts": ()})
    monkeypatch.setitem(catalogue().experiments, "axis_head", few)
    monkeypatch.setattr("tests.paper.fakes.FakeTrainer.own_fails", True)
    assert main(words(tmp_path, "axis_head")) == 1
    assert "1 trainings failed: policy-" in capsys.readouterr().err.splitlines()[-1]
    monkeypatch.setattr("tests.paper.fakes.FakeTrainer.own_fails", False)
    assert main(words(tmp_path, "axis_head")) == 0
    outcome = json.loads((tmp_path / "out" / "axis_head.json").read_text())
    assert outcome["state"] == "complete"


def test_worse_results_do_not_replace_better_ones(table4, tmp_path):
    before = (table4 / "out" / "table4.json").read_bytes()
    other = words(tmp_path, "table4", report=True)
    other[other.index("--out") + 1] = str(table4 / "out")
    assert main(other) == 0
    assert (table4 / "out" / "table4.json").read_bytes() == before


def test_what_was_measured_by_older_rules_is_withdrawn_until_it_is_measured_again(table4, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(table4 / "out", out)
    old = json.loads((out / "table4.json").read_text())
    del old["statistics"]
    old["contrasts"][0] |= {"verdict": "holds", "p": 1e-9}
    (out / "table4.json").write_text(json.dumps(old))
    assert main(words(tmp_path, "table4", report=True)) == 0
    marked = json.loads((out / "table4.json").read_text())
    assert marked["state"] == "withdrawn (complete)" and marked["rows"][0]["score"] is not None
    assert marked["contrasts"][0]["verdict"] == "withdrawn"
    text = (out / "table4.md").read_text()
    assert "Withdrawn: measured or judged by older rules" in text and "| holds |" not in text
    found = json.loads((out / "findings.json").read_text())
    assert found[2]["verdict"] == "not run" and "withdrawn" in found[2]["reason"]
    again = words(table4, "table4", report=True)
    again[again.index("--out") + 1] = str(out)
    assert main(again) == 0
    assert json.loads((out / "table4.json").read_text())["state"] == "complete"


def test_a_finding_waits_for_all_of_its_claims_and_is_corrected_for_them(table4, tmp_path):
    asked = make_session(*read(words(tmp_path, "table4")[1:]), catalogue())
    claims = planned(asked)
    assert set(claims) == set(catalogue().experiments)
    assert len(claims["figure5"]) % 5 == 0 and claims["figure5"]  # whether probed or not
    assert {c["verdict"] for stated in claims.values() for c in stated} == {"not run"}
    page = json.loads((table4 / "out" / "table4.json").read_text())
    page["scale"]["decides"] = True
    for claim in page["contrasts"]:
        claim |= {"not_testable": "", "p_difference": 1e-6, "difference": 1.0}
        claim |= {"p_same": 1.0, "ci95": [0.5, 1.5]}
    found = {f["finding"]: f for f in findings([page], claims)}
    beside = sum(len(c) for name, c in claims.items() if not name.startswith("axis_"))
    assert found[3]["verdict"] == "holds" and beside > 25
    assert found[3]["claims"][0]["p_paper"] == pytest.approx(beside * 1e-6)
    assert found[4]["verdict"] == "not run" and len(found[4]["claims"]) > 3
    page["scale"]["decides"] = False  # measured to try the study
    assert findings([page], claims)[2]["verdict"] == "not run"


def test_a_scale_that_tries_the_study_replaces_none_that_decides(table4, tmp_path):
    outcome = json.loads((table4 / "out" / "table4.json").read_text())
    many = copy.deepcopy(outcome)
    outcome["scale"]["decides"], many["scale"]["decides"] = True, False
    for row in many["rows"]:
        row["score"]["n_sequences"] = 20
    assert tables.write(outcome, tmp_path, {}) and not tables.write(many, tmp_path, {})
    assert json.loads((tmp_path / "table4.json").read_text())["scale"]["decides"]
    assert tables.write(many, tmp_path / "empty", {})
    assert tables.write(outcome, tmp_path / "empty", {})


@pytest.mark.parametrize(
    "word", ["control.clock=realtime", "world.scene=A", "tasks.steps_limit=5", "lockstep={}"]
)
def test_what_rows_say_themselves_is_no_override(tmp_path, word, capsys):
    assert main([*words(tmp_path, "table4"), word]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"openhelix experiment: {word.partition('=')[0]}: the rows")
    assert not (tmp_path / "root").exists()


def test_what_cannot_be_used_is_refused_before_anything_is_written(tmp_path, capsys):
    for more, said in (
        (["--systems", "mine=nofolder"], "--systems: mine: nofolder: no run.json here"),
        (["--config", "mine.yaml"], "--config: an experiment takes no file"),
    ):
        assert main([*words(tmp_path, "table4"), *more]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line and not list(tmp_path.iterdir())


def test_one_variants_rows_can_be_asked_for_alone(tmp_path, capsys):
    asked = [*words(tmp_path, "table4"), "--variants", "lora_clip"]
    assert main(asked) == 0
    page = json.loads((tmp_path / "out" / "table4.json").read_text())
    scored = [row["id"] for row in page["rows"] if row["score"]]
    assert scored == ["pretrained"] and page["state"] == "partial: 1 of 5 rows"
    assert main([*words(tmp_path, "table4"), "--variants", "lora_clop"]) == 2
    assert "--variants: 'lora_clop' is none of lora_clip" in capsys.readouterr().err


def test_a_variant_that_cannot_be_trained_is_refused_before_any_other_is(tmp_path, monkeypatch):
    known = catalogue()
    mad = known.variants["pi0"].model_copy(update={"aux": True})
    other = dataclasses.replace(known, variants={**known.variants, "pi0": mad})
    given = [w for w in words(tmp_path, "table8")[1:] if w not in ("--trainer", TRAINER)]
    with pytest.raises(ConfigError, match=r"^variants.yaml: pi0: .*aux: read-out 'kv'"):
        make_session(*read(given), other)


def test_arms_that_saw_other_samples_are_refused_before_anything_starts(tmp_path, capsys):
    given = ["experiment", "table5", "--scale", "smoke", "--root", str(tmp_path / "root")]
    assert main([*given, "train.stage1.steps=3", "train.stage2.batch=4"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "table5.yaml: e2e_frozen and frozen: 12 and 14 samples" in lines[0]
    assert not (tmp_path / "root").exists()


def test_moving_blocks(tmp_path):
    assert main([*words(tmp_path, "table1")]) == 0
    outcome = json.loads((tmp_path / "out" / "table1.json").read_text())
    assert set(outcome["rows"][0]["score"]["per_motion"]) >= {"static", "left paper", "left x5"}
    text = (tmp_path / "out" / "table1.md").read_text()
    (header,) = (line for line in text.splitlines() if "by motion and speed" in line)
    assert header.count("static") == header.count("left paper") == 1 and "left |" not in header
    (quoted,) = (line for line in text.splitlines() if "3D Diffuser Actor): paper" in line)
    columns = dict(zip(header.split("|"), quoted.split("|"), strict=True))
    assert float(columns[" left paper "]) == 84 and float(columns[" static "]) == 82


def test_the_zoo_is_scored_on_every_suite_with_its_costs(tmp_path, monkeypatch):
    whole = catalogue().experiment("table8")
    assert {row.suite for row in whole.rows} == {"calvin", "calvin-e", "calvin-r", "calvin-d"}
    few = tuple(row for row in whole.rows if row.id in ("robodual", "r_robodual"))
    assert set(whole.options["designs"]) == {row.variant for row in whole.rows}
    monkeypatch.setitem(catalogue().experiments, "table8", whole.model_copy(update={"rows": few}))
    assert main([*words(tmp_path, "table8")]) == 0
    outcome = json.loads((tmp_path / "out" / "table8.json").read_text())
    assert outcome["state"] == "complete" and len(outcome["rows"]) == 2
    costs, _ = outcome["tables"]
    assert [row[0] for row in costs[2]] == ["RoboDual"]
    assert all(float(row[3]) > 0 for row in costs[2])  # plans per second
    text = (tmp_path / "out" / "table8.md").read_text()
    for stated in ("## CALVIN-R", "Perceiver resampler", "without a gel's light"):
        assert stated in text


def test_a_sensor_of_which_the_data_has_no_picture_is_refused(tmp_path):
    made = make_session(*read(words(tmp_path, "table8")[1:]), catalogue())
    (tmp_path / "cache.json").write_text(json.dumps(INDEX))
    with pytest.raises(ConfigError, match="robodual: sensors: the data has no camera 'tactile'"):
        command.check_sensors(made, tmp_path)
    check = [*INDEX["cameras"], {**INDEX["cameras"][0], "name": "tactile"}]
    (tmp_path / "cache.json").write_text(json.dumps(INDEX | {"cameras": check}))
    command.check_sensors(made, tmp_path)


def test_intervals_are_drawn_as_a_line(tmp_path, monkeypatch):
    few = catalogue().experiment("figure4")
    monkeypatch.setitem(
        catalogue().experiments,
        "figure4",
        few.model_copy(update={"rows": (few.row("i1"), few.row("i60"), few.row("i10"))}),
    )
    # The shipped pair is there: it is measured even where nothing may be trained.
    assert main([*words(tmp_path, "figure4"), "--no-training"]) == 0
    assert (tmp_path / "out" / "figure4.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["table10"], "no experiment 'table10'"),
        ([], "NAME: say all, or one of"),
        (["table2", "--scale", "huge"], "--scale: 'huge'"),
        (["table2", "--workers", "0"], "--workers"),
        (["table2", "--hours", "0"], "--hours"),
        (["table2", "train.stage2.stepz=3"], "train.stage2.stepz: "),
        (["table2", "train.policy.changes={hed: dit}"], "train.policy.changes.hed: no such field"),
        (
            ["table2", "train.policy.changes={head: nosuch}"],
            "train.policy.changes.head: input should be",
        ),
        (
            ["table2", "train.policy.changes={sensors: rgb}"],
            "changes.sensors: input should be a list",
        ),
        (["table2", "train.policy.changes={hed: "], "train.policy.changes: input should be"),
        (["table2", "train.policy.preset=huge"], "train.policy.preset: 'huge' is none of small"),
        (
            ["table2", "train.policy.checkpoint=nosuch"],
            "train.policy.checkpoint: no policy in nosuch;",
        ),
        (["table2", "train.latent.model=nosuch"], "train.latent.model: no folder 'nosuch'; valid"),
        (
            ["table2", "train.latent.layer=99"],
            "train.latent.layer: 99, this model has middle layers",
        ),
        (["table2", "system1.replan_step=5"], "system1.replan_step: unknown key; did you mean"),
        (["all", "table2"], "NAME: all stands alone"),
        (["table2", "--data", "/none"], "data: no folder /none"),
        (["table2", "--scale", "smoke", "--out", str(RESULTS), "--report"], "for results"),
    ],
)
@pytest.mark.parametrize("only", [[], ["--estimate"]])
def test_bad_input_is_one_line_and_exit_code_2(given, message, only, tmp_path, capsys):
    assert main(["experiment", *given, *only, "--root", str(tmp_path / "root")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and message in lines[0]
    assert not (tmp_path / "root").exists()


@pytest.mark.parametrize(
    "word",
    ["train.policy.changes={head: nosuch}", "train.policy.changes={sensors: rgb}", "system1.hz=5"],
)
def test_a_report_of_what_cannot_be_is_refused(word, tmp_path, capsys):
    assert main([*words(tmp_path, "table2", report=True), word]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"experiment: {word.partition('=')[0]}" in line and not list(tmp_path.iterdir())


def test_a_given_policy_may_be_the_shipped_one():
    check_options({"policy.checkpoint": "shipped"})


def test_the_list_needs_nothing(capsys):
    assert main(["experiment", "--list"]) == 0
    text = capsys.readouterr().out
    assert "table2" in text and "figure5" in text and "laptop" in text


def test_the_estimate_alone_starts_nothing(tmp_path, capsys):
    assert main(words(tmp_path, "table2", estimate=True)) == 0
    assert "trainings" in capsys.readouterr().err
    assert not (tmp_path / "root").exists() and not (tmp_path / "out").exists()
    assert hours(60 * 125) == "2 h 05 min" and hours(90) == "2 min"


def test_smoke_results_have_a_place_of_their_own(tmp_path):
    options, overrides = read(words(tmp_path, "table4")[1:])
    assert (
        command.default_out(make_session(options, overrides, catalogue()).request).parts[0]
        == "outputs"
    )


def test_what_the_shipped_pair_is_measured_for_needs_no_data(tmp_path):
    given = ["figure4", "table7", "--data", "/none", "--root", str(tmp_path / "root")]
    made = make_session(*read(given), catalogue())
    assert [t.stage for t in made.wanted()] == ["shipped"]
    assert made.request.command("figure4") == (
        "openhelix experiment figure4 --scale laptop --data /none"
    )
    other = ["table6", "--seed", "3", "train.stage2.steps=5", "system1.replan_steps=4"]
    words = [*other, "--root", str(tmp_path / "root"), "--data", "/none", "--report"]
    command_line = make_session(*read(words), catalogue()).request.command("table6")
    assert command_line.endswith("--seed 3 train.stage2.steps=5 system1.replan_steps=4")
