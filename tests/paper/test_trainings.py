"""Trainings: known by content, shared, done once, continued after a kill."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import psutil
import pytest
import torch

from openhelix.benchmarks.calvin.phrases import validation
from openhelix.benchmarks.calvin.tasks import TASK_NAMES
from openhelix.benchmarks.evaluation.eval import load_config
from openhelix.benchmarks.paper import costs
from openhelix.benchmarks.paper.catalogue import Variant, catalogue
from openhelix.benchmarks.paper.train_command import (
    TrainCommand,
    changed,
    check_options,
    engine_of,
    exported,
    told_by_name,
)
from openhelix.benchmarks.paper.trainings import (
    OWN,
    SHIPPED_POLICY,
    OutOfTime,
    Trainings,
    in_order,
    samples,
    trainings_of,
)
from openhelix.runtime.control.assembly import make
from openhelix.runtime.core.config import CommandFailed, ConfigError, validate
from openhelix.system1.checkpoint import build_model, load_policy, save_policy
from openhelix.system1.config import PRESETS, small
from openhelix.system1.latent_adapter import nearest_task
from tests.paper.fakes import FakeTrainer
from tests.system1.test_heads import batch_of, stirred
from tests.system1.test_policy import tiny

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
    policies = [t.parent for n in VARIANTS if (t := training(n)).parent is not None]
    assert {p.key for p in policies if p.parent is None} == {keys["base"]}


def test_a_policy_of_another_make_learns_alone_behind_the_bases_encoder(tmp_path, command):
    base = training("prompt").parent
    for name in ("head_trajectory", "head_dit", "helix", "pseudo"):
        own = training(name).parent
        assert own.stage == "policy" and own.given is None, name
        assert own.parent.key == base.key, name
        assert own.options["policy.steps"] == LAPTOP.own_steps, name
        assert own.options["policy.told"] == "sentence", name
        assert "policy.pretrained" not in training(name).options, name
    assert training("pi0").parent is None  # it can't be told sentences
    trainings = Trainings(tmp_path / "root" / "trainings", command)
    own = training("head_dit").parent
    trainings.ensure(own, lambda text: None)
    words = json.loads((trainings.place(own) / "words.json").read_text())
    assert words["policy.encoder_from"] == str(trainings.place(base) / "policy")
    assert "policy.checkpoint" not in words and words["stage"] == "policy"
    feels = trainings.ensure(training("robodual"), lambda text: None)["overrides"]
    assert feels[-1] == 'world.cameras=["static", "gripper", "tactile"]'


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
    assert ends["stage2.steps"] == 1000 and ends["latent.feed"] == "live"  # <ACT> learns there too
    assert training("prompt").options["stage1.steps"] > 0
    assert training("prompt_novision").options["latent.vision"] is False
    assert training("prompt_aux").options["latent.aux"] is True
    assert (
        training("frozen_clip").options["latent.clip"]
        > 0
        == training("frozen").options["latent.clip"]
    )
    blind = {"head": "lstm", "sensors": ("proprio",)}
    assert training("pseudo").parent.options["policy.changes"] == blind
    assert training("live").parent.options["policy.changes"] == {"head": "lstm"}
    assert training("groot").parent.options["policy.preset"] == "small_flow"
    assert training("groot").options["latent.layer"] == 15
    assert training("linear").options["latent.projector_width"] == 0
    assert training("lag_40").options["latent.lag_steps"] == 40
    assert training("prompt").options["latent.lag_steps"] == 0
    own = training("prompt", {"policy.steps": 7}).parent
    assert own.options["policy.told"] == "sentence" and own.reads_data


def test_a_fitted_projector_sees_the_samples_of_its_first_stage():
    plain, e2e, random = (training(n).options for n in ("plain", "plain_e2e", "prompt"))
    assert plain["stage1.start"] == e2e["stage2.start"] == "table" != random["stage1.start"]
    assert plain["stage1.start_samples"] == e2e["stage2.start_samples"] == 2048
    assert "stage2.start_samples" not in plain and "stage1.start_samples" not in random
    assert samples(training("plain")) == samples(training("plain_e2e")) == samples(training("lora"))


def test_a_longer_training_sees_so_many_times_the_samples_as_the_base_learned():
    long, scratch = training("long"), training("long_scratch")
    assert samples(long) == samples(scratch) == 12 * samples(training("frozen")) == 96_000
    assert long.options["stage1.steps"] == 1200 and scratch.options["stage1.steps"] == 0
    for options in (long.options, scratch.options):
        assert options["stage2.optimizer"] == "muon" and options["stage2.batch"] == 32
        assert options["latent.feed"] == "states"
    quick = trainings_of(VARIANTS["long"], catalogue().scale("smoke"), "d", {})
    plain = trainings_of(VARIANTS["frozen"], catalogue().scale("smoke"), "d", {})
    assert samples(quick) == 12 * samples(plain)
    assert quick.options["latent.feed"] == "live"  # a collection's states would take longer


def test_a_policy_is_told_in_the_code_of_its_encoder_where_there_is_one(tmp_path):
    assert training("head_dit").parent.options["policy.text_code"] == "encoder"
    trained = training("head_dit", {"policy.steps": 7}).parent  # a base that is trained first
    assert trained.options["policy.text_code"] == "encoder"
    by_number = {"policy.told": "number", "policy.steps": 7}
    assert "policy.text_code" not in training("head_dit", by_number).parent.options
    given = {"policy.checkpoint": str(tmp_path)}
    assert "policy.text_code" not in training("head_dit", given).parent.options
    (tmp_path / "text.safetensors").write_bytes(b"")
    assert training("head_dit", given).parent.options["policy.text_code"] == "encoder"


def test_another_network_has_a_base_of_its_own():
    other = VARIANTS["prompt"].model_copy(update={"sensors": ("rgb", "proprio")})
    given = {"policy.checkpoint": str(SHIPPED_POLICY)}
    assert training("prompt", given).parent.given == SHIPPED_POLICY
    parent = trainings_of(other, LAPTOP, "d", given).parent
    assert parent.given is None
    assert parent.options["policy.changes"] == {"sensors": ("rgb", "proprio")}


@pytest.mark.parametrize("name", sorted(n for n, v in VARIANTS.items() if v.network))
def test_every_variants_policy_can_be_built_and_learns(name):
    network = VARIANTS[name].network
    changes = dict(network.get("policy.changes", {}))
    if VARIANTS[name].scaled:
        changes |= {"dim": 96, "heads": 4, "layers": 2}
    cameras = tiny().cameras
    if "tactile" in VARIANTS[name].sensors:
        cameras = (*cameras, replace(cameras[-1], name="tactile"))
    base = {"cameras": cameras, "latent_dim": 12, "horizon": 6, "encoder_width": 8}
    if VARIANTS[name].head == "expert":
        base |= {"latent_dim": 2 * 30 * 3, "latent_kind": "kv"}
    config = PRESETS[network.get("policy.preset", "small")](**{**base, **changes})
    model, inputs = stirred(config), batch_of(config, [0, 1])
    chunk = model.sample_inputs(inputs, lambda shape: torch.full(shape, 0.3))
    assert chunk.shape == (2, 6, 8) and torch.isfinite(chunk).all()
    model.requires_grad_(True)
    rows = torch.zeros(2, 6, 9)
    with torch.enable_grad():
        loss = model.loss(inputs, rows, rows[..., 0], torch.ones(2, 6, dtype=torch.bool)).total
        loss.backward()
    assert torch.isfinite(loss) and any(p.grad is not None for p in model.head.parameters())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sensors": ["smell"]}, "sensors"),
        ({"sensors": []}, "sensors: .* want one or more"),
        ({"head": "crystal ball"}, "head"),
        ({"head": "lstm", "sampler": "flow"}, "samples nothing"),
        ({"encoder": "efficientnet", "sensors": ["depth"]}, "efficientnet sees colours alone"),
        ({"head": "dit"}, "policy: 'pretrained' is the base, which has another head"),
    ],
)
def test_a_variant_that_cannot_be_built_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        validate(Variant, {"says": "x", **fields})


def test_who_says_how_the_policy_is_trained_gets_it_trained():
    assert trainings_of(VARIANTS["prompt"], catalogue().scale("quick"), "d", {}).parent.given
    own = training("prompt", {"policy.steps": 7}).parent
    assert own.given is None and own.reads_data and own.options["policy.steps"] == 7
    assert "policy.checkpoint" not in training("pseudo").options


def test_parents_come_first_and_once():
    order = in_order([training(n) for n in ("prompt", "lora", "base", "prompt")])
    assert [t.stage for t in order] == ["policy", "pair", "pair"]
    base = order[0].key
    order = in_order([training(n) for n in ("head_dit", "prompt")])
    assert [t.stage for t in order] == ["policy", "policy", "pair", "pair"]
    assert order[0].key == base and order[1].parent.key == base


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
    wanted = training("base")
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
    wanted = training("prompt_aux", {"policy.steps": 7})
    found = trainings.ensure(wanted, lambda text: None)
    folder = trainings.place(wanted)
    words = json.loads((folder / "words.json").read_text())
    assert words["stage"] == "all" and words["latent.regime"] == "prompt"
    assert words["latent.aux"] == "true" and words["data"] == str(tmp_path / "data")
    assert words["policy.checkpoint"] == str(trainings.place(wanted.parent) / "policy")
    assert "policy.steps" not in words  # it is trained already
    assert "policy.encoder_from" not in words
    assert found["overrides"] == exported(folder)
    plain = "openhelix.system2.engines.transformers:TransformersEngine"
    assert engine_of(wanted.options) == []
    assert engine_of(training("helix").options) == [f"system2.engine.target={plain}"]
    # What frozen models make of the data is kept for all.
    assert (folder / "prepared").resolve() == (tmp_path / "root" / "prepared").resolve()
    policy = trainings.done(wanted.parent)
    assert policy["overrides"][0].endswith("/policy")


def test_a_training_ends_with_whoever_started_it(tmp_path):
    note = tmp_path / "pid"
    script = f"import os, time; open({str(note)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    work = (
        "import sys\n"
        "from pathlib import Path\n"
        "from openhelix.benchmarks.paper.train_command import TrainCommand\n"
        "from openhelix.benchmarks.paper.trainings import Training\n"
        f"here = Path({str(tmp_path)!r})\n"
        f"made = TrainCommand(here, here, (sys.executable, '-c', {script!r}))\n"
        "made.train(Training('policy'), here, None, print)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", work], stdout=subprocess.DEVNULL)
    until(lambda: note.exists() and note.read_text())
    child = psutil.Process(int(note.read_text()))
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs([child], timeout=20)
    for left in alive:
        left.kill()
    assert not alive


def until(done, limit_s=120.0):
    """Wait for something that takes as long as the machine is busy."""
    deadline_s = time.monotonic() + limit_s
    while not done():
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def test_a_given_policy_is_not_trained(tmp_path, command):
    given = {"policy.checkpoint": "/weights/policy"}
    trainings = Trainings(tmp_path / "trainings", command)
    trainings.ensure(training("prompt", given), lambda text: None)
    words = json.loads((trainings.place(training("prompt", given)) / "words.json").read_text())
    assert words["policy.checkpoint"] == "/weights/policy"
    table = trainings.ensure(training("base", given), lambda text: None)
    assert table["overrides"] == ["system1.policy.options.path=/weights/policy"]


def test_a_training_that_fails_says_why_and_is_not_finished(tmp_path, command):
    trainings = Trainings(tmp_path / "trainings", command)
    for seed, message in ((13, "the loss was not finite"), (14, "not finished")):
        wanted = training("base", {"seed": seed, "policy.steps": 7})
        with pytest.raises(CommandFailed, match=message):
            trainings.ensure(wanted, lambda text: None)
        assert trainings.done(wanted) is None


def test_a_training_stops_when_the_time_given_is_over(tmp_path, command):
    def ensure(seed, left_s):
        command._until_s = time.monotonic() + left_s
        wanted = training("base", {"seed": seed, "policy.steps": 7})
        place = Trainings(tmp_path / "trainings", command)
        with pytest.raises(OutOfTime):
            place.ensure(wanted, lambda text: None)
        assert place.done(wanted) is None and place.failure(wanted) is None  # it goes on later
        return place.place(wanted) / "words.json"

    assert not ensure(14, 1.0).exists()
    words = json.loads(ensure(14, 7200.0).read_text())
    assert 7000 < float(words["time_limit_s"]) <= 7200


def test_the_base_is_told_by_the_text_encoder_that_it_was_trained_with(tmp_path, command):
    base = training("base")
    found = Trainings(tmp_path / "trainings", command).ensure(base, lambda text: None)
    folder = tmp_path / "trainings" / base.key / "policy"
    assert found["overrides"] == [f"system1.policy.options.path={folder}"]
    config = load_config(found["overrides"])  # as evaluations read it
    engine = make(config.system2.engine)
    alone = load_policy(folder)
    assert engine.spec == alone.config.spec().latent
    tasks = list(TASK_NAMES)
    sentences = [
        (tasks.index(task), text) for task, texts in validation().items() for text in texts
    ]
    latent = engine.encode(
        [np.zeros((16, 16, 3), np.uint8)] * len(sentences), [t for _, t in sentences]
    )
    named = nearest_task(alone, torch.from_numpy(latent))
    assert [int(n) for n in named] == [task for task, _ in sentences]
    # Pairs begin with this very policy.
    assert command._policy_of(base, folder.parent) == folder


def test_overrides_are_sorted_out():
    assert changed(["train.stage2.steps=5", "system1.replan_steps=4"]) == (
        {"stage2.steps": 5},
        ["system1.replan_steps=4"],
    )
    with pytest.raises(ConfigError, match=r"stage2\.stepz"):
        check_options({"stage2.stepz": 5})
    with pytest.raises(ConfigError, match="kind"):
        check_options({"latent.kind": "crystal ball"})


def test_what_is_measured_says_how_long_it_takes(monkeypatch):
    measured = {f"{k}_sample_s": 1.0 for k in ("policy", "prefix", "states", "live")}
    measured |= {"prefix_frame_s": 0.5, "states_frame_s": 0.25}
    measured |= {"open_s": 2.0, "thread_gain": 1.0}
    monkeypatch.setattr(costs, "costs", lambda: {"training": measured})
    few = {"policy.batch": 1, "stage1.batch": 2, "stage2.batch": 3, "stage1.steps": 10}
    few |= {"stage2.steps": 20, "latent.frames": 100, "latent.stride": 4, "latent.phrasings": 2}
    few |= {"latent.feed": "auto"}

    def seconds(name, **changes):
        return costs.training_s(training(name, few | changes), 800)

    alone = training("base", {"policy.checkpoint": None, "policy.steps": 7, **few})
    assert costs.training_s(alone, 800) == 7
    prefixes, states = 100 * 0.5, 800 / 4 * 2 * 0.25
    assert seconds("prompt") == 2 * 2 + 20 + prefixes + states + 60
    assert seconds("prompt", **{"latent.feed": "prefix"}) == 2 * 2 + 20 + prefixes + 60
    assert seconds("lora") == 2 * 2 + 20 + prefixes + 60
    assert seconds("frozen") == 2 * 2 + states + 20 + 60
    assert seconds("frozen", **{"latent.feed": "live"}) == 2 * 2 + (20 + 60) * 1.25
    live = {"latent.feed": "live"}
    assert seconds("prompt", **live) == 2 * 2 + (20 + 60) * 1.5  # what is before <ACT> each time
    assert seconds("helix", **live) == 2 * 2 + 20 + 60
    assert seconds("pool_max", **live) == 2 * 2 + (20 + 60) * 1.25
    assert seconds("lora", **live) == 2 * 2 + 20 * 1.5 + 60
    assert seconds("e2e_prompt") == 2 + prefixes + 26 * 3  # with stage 1's samples
    assert seconds("prompt", device="cuda") is None
    assert seconds("shipped") == 0.0
    assert costs.training_s(training("base", {"policy.checkpoint": "x"}), 800) == 0.0
    del measured["live_sample_s"]  # a bench that was cut short
    assert costs.training_s(alone, 800) is None
    monkeypatch.setattr(costs, "costs", dict)
    assert costs.training_s(alone, 800) is None


def test_another_language_model_of_the_project_is_another_training(tmp_path, monkeypatch):
    before, blank = training("prompt").key, training("plain").key
    for name in ("vision", "language"):
        (tmp_path / name).write_bytes(b"other")
    files = [tmp_path / "vision", tmp_path / "language"]
    monkeypatch.setattr("openhelix.benchmarks.paper.trainings.SHIPPED_MODEL", files)
    assert training("prompt").key != before and training("plain").key == blank


def test_from_scratch_is_the_bases_own_network():
    own = training("scratch_lora_clip").options["policy.changes"]
    config = json.loads((SHIPPED_POLICY / "config.json").read_text())
    assert own and all(config[name] == value for name, value in own.items())
    usual = small()
    assert all(getattr(usual, name) == config[name] for name in set(OWN) - set(own))
    trained = {"policy.preset": "small"}  # the base itself is made of the preset
    assert "policy.changes" not in training("scratch_lora_clip", trained).options
    assert "policy.changes" not in training("head_trajectory").options


def test_other_weights_at_the_same_place_are_another_training(tmp_path):
    given = tmp_path / "policy"
    given.mkdir()
    (given / "model.safetensors").write_bytes(b"one")
    changes = {"policy.checkpoint": str(given)}
    before, policy = training("prompt", changes), training("base", changes)
    assert policy.shown_options["policy.checkpoint"] == str(given)
    ours = training("base", {"policy.checkpoint": "shipped"})
    # Results are read on other machines: the project's own are named by their place in it.
    assert ours.shown_options["policy.checkpoint"] == "checkpoints/system1-laptop"
    moved = tmp_path / "elsewhere"
    given.rename(moved)
    elsewhere = training("prompt", {"policy.checkpoint": str(moved)})
    assert elsewhere.key == before.key and elsewhere.parent.given == moved
    (moved / "model.safetensors").write_bytes(b"two")
    assert training("prompt", {"policy.checkpoint": str(moved)}).key != before.key
    assert training("base", {"policy.checkpoint": str(moved)}).key != policy.key


def test_the_shipped_pair_needs_no_data_and_no_training(tmp_path, command):
    wanted = training("shipped")
    assert wanted == training("shipped", {"stage2.steps": 3}, data="other")
    assert not wanted.reads_data and training("prompt").reads_data
    found = Trainings(tmp_path / "trainings", command).ensure(wanted, lambda text: None)
    # It is what a run takes anyhow, but refuses nothing, as no trained arm does.
    assert found["overrides"] == ["system2.engine.options.understanding=off"]


def test_a_policy_that_takes_latents_can_be_told_its_task_by_name(tmp_path):
    taught = small_policy(use_latent=True)
    save_policy(tmp_path / "given", taught.config, taught.state_dict(), taught.normalizer)
    told_by_name(tmp_path / "given", tmp_path / "alone")
    alone = load_policy(tmp_path / "alone")
    assert alone.config == replace(taught.config, use_latent=False)
    for name, tensor in alone.state_dict().items():
        assert torch.equal(tensor, taught.state_dict()[name])
    # One that takes none is left where it is.
    told_by_name(tmp_path / "alone", tmp_path / "other")
    told_by_name(tmp_path / "nowhere", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def small_policy(**changes):
    return build_model(replace(small(), **changes))
