"""Trainings: known by content, shared, done once, continued after a kill."""

from __future__ import annotations

import json

import pytest

from benchmarks.experiments import costs
from benchmarks.experiments.catalogue import catalogue
from benchmarks.experiments.train_command import TrainCommand, changed, check_options, exported
from benchmarks.experiments.trainings import Trainings, in_order, trainings_of
from runtime.config import ConfigError
from runtime.errors import CommandFailed
from tests.experiments.fakes import FakeTrainer

VARIANTS = catalogue().variants
LAPTOP = catalogue().scale("laptop")


def training(name, changes=None, data="d"):
    return trainings_of(VARIANTS[name], LAPTOP, data, changes or {})


def test_what_is_alike_is_shared_and_what_differs_is_not():
    keys = {name: training(name).key for name in VARIANTS}
    assert len(set(keys.values())) == len(keys)
    assert training("prompt").key == keys["prompt"]
    assert training("prompt", data="other").key != keys["prompt"]
    assert training("prompt", {"stage2.steps": 7}).key != keys["prompt"]
    # All that begin with the pretrained policy begin with the same one.
    parents = {t.parent.key for n in VARIANTS if (t := training(n)).parent is not None}
    assert parents == {keys["policy_table"]}


def test_only_the_policys_own_settings_shape_the_policy():
    policy = training("prompt").parent
    assert training("prompt", {"stage2.steps": 7}).parent.key == policy.key
    assert training("prompt", {"policy.steps": 7}).parent.key != policy.key
    assert not any(k.startswith(("latent.", "stage")) for k in policy.options)


def test_the_variants_are_what_the_paper_says():
    assert training("scratch_lora_clip").options["policy.pretrained"] is False
    assert training("scratch_lora_clip").parent is None
    ends = training("e2e_prompt").options
    assert ends["stage1.steps"] == 0 and ends["stage2.start"] == "random"
    assert ends["latent.feed"] == "prefix"  # <ACT> learns there too
    assert training("prompt").options["stage1.steps"] > 0
    assert training("prompt_novision").options["latent.vision"] is False
    assert training("prompt_aux").options["latent.aux"] is True
    assert (
        training("frozen_clip").options["latent.clip"]
        > 0
        == training("frozen").options["latent.clip"]
    )
    assert training("pseudo").options["policy.changes"] == {"head": "lstm"}
    assert training("lora").options["stage2.batch"] == 8


def test_parents_come_first_and_once():
    order = in_order([training(n) for n in ("prompt", "lora", "policy_table", "prompt")])
    assert [t.stage for t in order] == ["policy", "pair", "pair"]


def test_a_killed_training_is_continued_and_a_finished_one_is_not_done_again(tmp_path):
    trainer = FakeTrainer(dies_at=1)
    trainings = Trainings(tmp_path, trainer)
    wanted = training("prompt")
    with pytest.raises(KeyboardInterrupt):
        trainings.ensure(wanted, lambda text: None)
    assert trainings.done(wanted) is None and trainings.done(wanted.parent) is not None
    found = trainings.ensure(wanted, lambda text: None)
    assert trainer.trained == [wanted.parent.key, wanted.key]
    assert trainings.ensure(wanted, lambda text: None) == found
    assert len(trainer.trained) == 2
    assert trainings.seconds(wanted) == 0.0 and trainings.seconds(training("lora")) == 60.0


def test_a_damaged_note_is_told_in_one_line(tmp_path):
    trainings = Trainings(tmp_path, FakeTrainer())
    wanted = training("policy_table")
    trainings.ensure(wanted, lambda text: None)
    path = trainings.place(wanted) / "trained.json"
    path.write_text(path.read_text()[:-20])
    with pytest.raises(ConfigError, match="damaged; delete"):
        trainings.done(wanted)


SCRIPT = """
import json, pathlib, sys
words = dict(w.split("=", 1) for w in sys.argv[2:] if "=" in w)
out = pathlib.Path(words["out"])
if words.get("seed") == "13":
    print("stage2: the loss was not finite", file=sys.stderr)
    raise SystemExit(1)
(out / "words.json").write_text(json.dumps({"stage": sys.argv[1], **words}))
ship = out / ("policy" if sys.argv[1] == "policy" else "ship/system1-laptop")
ship.mkdir(parents=True)
if sys.argv[1] == "all":
    head = out / "ship" / "system2-laptop"
    head.mkdir()
    (head / "latent.safetensors").touch()
print(json.dumps({"finished": words.get("seed") != "14", "stages": []}))
"""


@pytest.fixture
def command(tmp_path):
    import sys

    (tmp_path / "train.py").write_text(SCRIPT)
    words = (sys.executable, str(tmp_path / "train.py"))
    return TrainCommand(tmp_path / "data", tmp_path / "root", words)


def test_openhelix_train_is_told_all_of_it(tmp_path, command):
    trainings = Trainings(tmp_path / "root" / "trainings", command)
    wanted = training("prompt_aux")
    found = trainings.ensure(wanted, lambda text: None)
    folder = trainings.place(wanted)
    words = json.loads((folder / "words.json").read_text())
    assert words["stage"] == "all" and words["latent.regime"] == "prompt"
    assert words["latent.aux"] == "true" and words["data"] == str(tmp_path / "data")
    assert words["policy.checkpoint"] == str(trainings.place(wanted.parent) / "policy")
    assert "policy.steps" not in words  # it is trained already
    assert found["overrides"] == exported(folder)
    # What frozen models make of the data is kept for all.
    assert (folder / "prepared").resolve() == (tmp_path / "root" / "prepared").resolve()
    policy = trainings.done(wanted.parent)
    assert policy["overrides"][0].endswith("/policy")


def test_a_given_policy_is_not_trained(tmp_path, command):
    given = {"policy.checkpoint": "/weights/policy"}
    trainings = Trainings(tmp_path / "trainings", command)
    trainings.ensure(training("prompt", given), lambda text: None)
    words = json.loads((trainings.place(training("prompt", given)) / "words.json").read_text())
    assert words["policy.checkpoint"] == "/weights/policy"
    table = trainings.ensure(training("policy_table", given), lambda text: None)
    assert table["overrides"] == ["system1.policy.options.path=/weights/policy"]


def test_a_training_that_fails_says_why_and_is_not_finished(tmp_path, command):
    trainings = Trainings(tmp_path / "trainings", command)
    for seed, message in ((13, "the loss was not finite"), (14, "not finished")):
        wanted = training("policy_table", {"seed": seed})
        with pytest.raises(CommandFailed, match=message):
            trainings.ensure(wanted, lambda text: None)
        assert trainings.done(wanted) is None


def test_overrides_are_sorted_out():
    assert changed(["train.stage2.steps=5", "system1.replan_steps=4"]) == (
        {"stage2.steps": 5},
        ["system1.replan_steps=4"],
    )
    with pytest.raises(ConfigError, match=r"stage2\.stepz"):
        check_options({"stage2.stepz": 5})


def test_what_is_measured_says_how_long_it_takes(monkeypatch):
    measured = {f"{k}_step_s": 1.0 for k in ("policy", "prefix", "states", "live")}
    measured |= {"prefix_frame_s": 0.5, "states_frame_s": 0.25}
    monkeypatch.setattr(costs, "costs", lambda: {"training": measured})
    policy, prompt = training("policy_table"), training("prompt")
    assert costs.training_s(policy, 800) == policy.options["policy.steps"]
    want = 500 + 2000 * 0.5 + 800 / 8 * 2 * 0.25 + 1500  # stage 1, prefixes, states, 2
    assert costs.training_s(prompt, 800) == want
    assert costs.training_s(training("lora"), 800) == 500 + 2000 * 0.5 + 400
    assert costs.training_s(training("frozen"), 800) == 500 + 50 + 1500
    assert costs.training_s(training("e2e_prompt"), 800) == 2000 * 0.5 + 1500
    assert costs.training_s(training("prompt", {"device": "cuda"}), 800) is None
    given = training("policy_table", {"policy.checkpoint": "x"})
    assert costs.training_s(given, 800) == 0.0
    monkeypatch.setattr(costs, "costs", dict)
    assert costs.training_s(policy, 800) is None
