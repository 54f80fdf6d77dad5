"""The stages train what they say and nothing else, and go on as if they had never stopped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from openhelix.benchmarks.training.config import LATENT, SETTINGS, NotDone
from openhelix.benchmarks.training.export import SYSTEM1, SYSTEM2, export, make_card
from openhelix.benchmarks.training.feeds import LiveFeed
from openhelix.benchmarks.training.stages import (
    JointRun,
    base_policy,
    prepare,
    run_joint,
    run_policy,
)
from openhelix.benchmarks.training.start import heard
from openhelix.runtime.core.config import ConfigError
from openhelix.runtime.core.files import BadFile
from openhelix.system1.checkpoint import load_policy
from openhelix.system1.data import Cache
from openhelix.system1.latent_adapter import ADAPTER, adapter_tokens
from openhelix.system1.policy import DiffusionPolicy
from openhelix.system1.train import TrainConfig, Trainer
from openhelix.system2.engines.transformers import TransformersEngine
from openhelix.system2.latents import LatentHead
from tests.training.conftest import CHANGES, settings


def moved(run: JointRun, steps: int = 2) -> set[str]:
    """Which parts change in a few steps."""
    before = {n: p.detach().clone() for n, p in run.pair.named_parameters()}
    for _ in range(steps):
        run.train_step()
    changed = {n for n, p in run.pair.named_parameters() if not torch.equal(p, before[n])}
    parts = {
        "learner.head.act": "act",
        "learner.head.neck": "projector",
        "learner.head.projector": "projector",
        "learner.head.pool": "pool",
        "learner.head.sense": "sense",
        "learner.aux": "aux",
        "lora_": "lora",
        "learner.model": "language",
        "policy.": "policy",
    }
    return {next(part for key, part in parts.items() if key in name) for name in changed}


@pytest.mark.parametrize(
    ("stage", "more", "parts"),
    [
        ("stage1", (), {"act", "projector", "aux"}),
        ("stage1", ("latent.aux=false",), {"act", "projector"}),
        ("stage1", ("latent.regime=frozen",), {"projector", "aux"}),
        ("stage1", ("latent.regime=full",), {"act", "projector", "aux"}),
        ("stage2", (), {"act", "projector", "aux", "policy"}),
        ("stage2", ("latent.kind=act_words",), {"act", "projector", "aux", "policy"}),
        ("stage2", ("latent.feed=states",), {"projector", "aux", "policy"}),
        ("stage2", ("latent.kind=lang_mean",), {"projector", "aux", "policy"}),
        ("stage2", ("latent.feed=live",), {"act", "projector", "aux", "policy"}),
        ("stage2", ("latent.regime=lora",), {"act", "projector", "aux", "policy", "lora"}),
        ("stage2", ("latent.regime=full",), {"act", "projector", "aux", "policy", "language"}),
        (
            "stage2",
            ("latent.regime=vocabulary",),
            {"act", "projector", "aux", "policy", "language"},
        ),
        ("stage1", ("latent.regime=vocabulary",), {"act", "projector", "aux"}),
        ("stage1", ("stage1.policy=learns",), {"act", "projector", "aux", "policy"}),
        (
            "stage2",
            ("latent.regime=lora", "latent.answer=1", "latent.clip=1", "latent.aux=false"),
            {"act", "projector", "policy", "lora"},
        ),
        (
            "stage2",
            ("latent.proprio=true",),
            {"act", "projector", "aux", "policy", "sense"},
        ),
        ("stage2", ("latent.kind=pool_map",), {"projector", "aux", "policy", "pool"}),
    ],
)
def test_a_stage_moves_its_parts_alone(
    frames, llava, trained_policy, tmp_path, stage, more, parts
) -> None:
    config = settings(
        frames, llava, tmp_path, f"policy.checkpoint={trained_policy}", *more,
        *(("stage1.steps=0",) if stage == "stage2" else ()),
    )  # fmt: skip
    assert moved(JointRun(config, stage)) == parts


def test_the_pair_learns_and_round_trips(frames, llava, tmp_path) -> None:
    config = settings(
        frames, llava, tmp_path, "policy.steps=20", "stage1.steps=20", "stage2.steps=20",
        "stage2.lr_policy=2e-3", *(f"{s}.{k}=20" for s in ("policy", "stage1", "stage2")
                                   for k in ("save_every", "eval_every")),
    )  # fmt: skip
    run_policy(config, 0)
    for stage in ("stage1", "stage2"):
        run_joint(config, stage, 0)
        history = json.loads((tmp_path / stage / "train.json").read_text())["history"]
        rows = [row["loss"] for row in history if "loss" in row]
        assert sum(rows[-5:]) < 0.95 * sum(rows[:5]), stage
        assert (tmp_path / stage / "loss.png").stat().st_size > 5_000
    policy = DiffusionPolicy.load(tmp_path / "stage2")
    head = LatentHead.load(tmp_path / "stage2" / LATENT)
    from openhelix.system2.model import open_checkpoint

    assert policy.spec.latent == head.spec(open_checkpoint(llava), raw=False)
    trained = load_policy(tmp_path / "stage1").state_dict()
    alone = load_policy(tmp_path / "policy").state_dict()
    for name, tensor in alone.items():
        assert torch.equal(trained[name], tensor), name


@pytest.mark.parametrize("kind", ["act_last", "act_words"])
def test_act_moves_as_far_as_it_still_learns_in_both_stages(
    frames, llava, trained_policy, tmp_path, kind
) -> None:
    config = settings(
        frames, llava, tmp_path, f"policy.checkpoint={trained_policy}", f"latent.kind={kind}",
        *(f"{s}.{k}={v}" for s in ("stage1", "stage2")
          for k, v in (("steps", 30), ("lr_act", 1e-2), ("ema", 0.5),
                       ("save_every", 30), ("eval_every", 30))),
    )  # fmt: skip
    reached = []
    for stage in ("stage1", "stage2"):
        run_joint(config, stage, 0)
        history = json.loads((tmp_path / stage / "train.json").read_text())["history"]
        steps = [row for row in history if "act_grad" in row]
        assert all(row["act_grad"] > 0 for row in steps)
        held = [row for row in history if "act_grad_aux" in row]
        assert held and all(r["act_grad_aux"] > 0 and r["act_grad_policy"] > 0 for r in held)
        reached.append((steps[-1]["act_cosine"], steps[-1]["act_moved"]))
        note = LatentHead.load(tmp_path / stage / LATENT).note["act"]
        assert note["cosine_to_seed"] == pytest.approx(reached[-1][0], abs=0.05)
        assert len(note["nearest"]) == 1 and len(note["nearest"][0]) == 10
        assert make_card(config, stage, tmp_path / stage)["stages"][stage]["act"] == note
    (first, moved), (second, further) = reached
    assert max(first, second) < 0.9 and further > moved > 0.3
    fixed = settings(
        frames, llava, tmp_path / "fixed", f"policy.checkpoint={trained_policy}",
        "latent.regime=frozen", "stage1.steps=1",
    )  # fmt: skip
    run_joint(fixed, "stage1", 0)
    assert "act" not in LatentHead.load(tmp_path / "fixed" / "stage1" / LATENT).note


def test_the_projector_starts_by_naming_the_task(frames, llava, trained_policy, tmp_path) -> None:
    config = settings(frames, llava, tmp_path, f"policy.checkpoint={trained_policy}")
    run = JointRun(config, "stage1")
    start = run.history[0]
    assert start["start_train_top1"] == 1.0  # two sentences, two tasks
    # The latent speaks for the table: the policy does as well told by it as told by name.
    assert start["val_policy"] == pytest.approx(start["val_policy_named"], rel=0.05)
    plain = JointRun(settings(
        frames, llava, tmp_path / "b", f"policy.checkpoint={trained_policy}", "stage1.start=random"
    ), "stage1")  # fmt: skip
    assert plain.history == []


def test_a_fit_sees_no_samples_but_those_of_the_first_steps(
    frames, llava, trained_policy, tmp_path, monkeypatch
) -> None:
    seen: list[list[int]] = []
    draw = LiveFeed.draw

    def watched(self, rows, generator):
        drawn = draw(self, rows, generator)
        seen.append(list(zip(drawn.frames.tolist(), drawn.instruction.tolist(), strict=True)))
        return drawn

    monkeypatch.setattr(LiveFeed, "draw", watched)
    begin = (f"policy.checkpoint={trained_policy}", "latent.feed=live", "stage1.start_samples=24")
    run = JointRun(settings(frames, llava, tmp_path, *begin), "stage1")
    assert run.history[0]["start_samples"] == 24  # three steps of eight
    fitted, _ = seen[:3], seen.clear()
    for number in range(3):
        run.train_step()
        assert seen[-1] == fitted[number]
    few = JointRun(settings(frames, llava, tmp_path / "few", *begin, "stage1.steps=2"), "stage1")
    assert few.history[0]["start_samples"] == 16  # there are no more steps


def test_a_setting_that_a_stage_was_begun_without_was_as_usual(
    frames, llava, trained_policy, tmp_path
) -> None:
    begin = (f"policy.checkpoint={trained_policy}", "stage1.steps=1")
    run_joint(settings(frames, llava, tmp_path, *begin), "stage1", 0)
    file = tmp_path / "stage1" / SETTINGS
    kept = json.loads(file.read_text())
    del kept["stage1"]["start_samples"]
    for _ in range(2):
        file.write_text(json.dumps(kept))
        JointRun(settings(frames, llava, tmp_path, *begin), "stage1")
    file.write_text(json.dumps(kept))
    with pytest.raises(ConfigError, match=r"stage1\.start_samples: .* was begun with 0, not 8"):
        JointRun(settings(frames, llava, tmp_path, *begin, "stage1.start_samples=8"), "stage1")


def test_system_2_still_answers_in_words(frames, llava, trained_policy, tmp_path) -> None:
    begin = (f"policy.checkpoint={trained_policy}", "stage1.steps=2", "latent.regime=lora")
    config = settings(frames, llava, tmp_path, *begin, "latent.answer=1")
    first = JointRun(config, "stage1")
    assert "answer" not in first.train_step()  # the language model is frozen there
    first.run()
    run = JointRun(config, "stage2")
    told = [run.source.sentences.first(task) for task in (0, 1)]
    assert run.source.sentences.answers(torch.tensor([1, 0, 1])) == [told[1], told[0], told[1]]
    row = run.train_step()
    parts = ("aux_position", "aux_rotation", "aux_gripper", "answer", "policy")
    assert row["answer"] > 0 and row["loss"] == pytest.approx(sum(row[p] for p in parts), rel=1e-5)
    assert 0 <= run.evaluate()["val_answer_right"] <= 1


def test_latents_are_drawn_to_the_text_encoders_sentences(
    frames, llava, trained_policy, tmp_path
) -> None:
    begin = (f"policy.checkpoint={trained_policy}", "latent.clip=1", "latent.clip_to=sentence")
    coded = (f"policy.text_model={llava}", "policy.text_layers=[1,2]", "stage1.start=random")
    run = JointRun(
        settings(frames, llava, tmp_path, *begin, *coded, "stage1.lr_head=1e-2"), "stage1"
    )
    codes = run.joint.clip_text
    assert codes is not None and codes.shape == (len(run.source.sentences.texts), 512)
    assert len(codes.unique(dim=0)) == len(set(run.source.sentences.texts))
    before = run.joint.evaluate()["val_clip"]
    for _ in range(4):
        run.train_step()
    run.joint.ema.values = {
        n: p.detach() for n, p in run.pair.named_parameters() if p.requires_grad
    }
    assert run.joint.evaluate()["val_clip"] < before
    with pytest.raises(ConfigError, match=r"latent.clip_to: layers: \[9\] is not within"):
        JointRun(
            settings(frames, llava, tmp_path / "b", *begin, *coded, "policy.text_layers=[9]"),
            "stage1",
        )


def test_an_expert_learns_on_the_keys_of_every_layer(frames, llava, tmp_path) -> None:
    changes = {"dim": 48, "heads": 2, "layers": 4, "head": "expert", "sensors": ["proprio"]}
    began = (
        "policy.pretrained=false", "policy.preset=small_flow", "stage1.steps=0", "latent.kind=kv",
        f"policy.changes={json.dumps(changes)}",
    )  # fmt: skip
    own = (*began, "latent.aux=false", "latent.regime=full", "stage2.start=random")
    run = JointRun(settings(frames, llava, tmp_path, *own), "stage2")
    assert moved(run) == {"policy", "language"}
    run = JointRun(settings(frames, llava, tmp_path, *own), "stage2")
    run.run()
    policy, head = (
        DiffusionPolicy.load(tmp_path / "stage2"),
        LatentHead.load(tmp_path / "stage2" / LATENT),
    )
    latent = policy.spec.latent
    assert latent is not None and latent.kind == "kv" == head.config.kind
    assert (
        latent.dim
        == head.projector.out_features
        == run.learner.head.config.numbers(run.learner.checkpoint)
    )
    folder = Path(export(settings(frames, llava, tmp_path, *own))["folder"])
    shipped = TransformersEngine(
        str(folder / SYSTEM2 / "llava"), latent_projector=folder / SYSTEM2 / LATENT, device="cpu"
    )
    assert shipped.spec == DiffusionPolicy.load(folder / SYSTEM1).spec.latent
    with pytest.raises(ConfigError, match="aux: read-out 'kv' has no state"):
        settings(frames, llava, tmp_path, *began)
    table = settings(frames, llava, tmp_path / "b", *own[:-1])
    with pytest.raises(ConfigError, match=r"stage2.start: read-out 'kv' has no projector to fit"):
        JointRun(table, "stage2")
    with pytest.raises(ConfigError, match=r"head: 'expert' of 4 layers and 2 heads needs"):
        JointRun(settings(frames, llava, tmp_path / "c", *own, "latent.kind=act_last"), "stage2")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("latent.answer=1",), "latent: answer: regime 'prompt_tuning' leaves"),
        (("latent.answer=1", "latent.regime=lora", "latent.shard=true"), "answer: not with shard"),
        (("latent.clip_to=words",), "latent.clip_to"),
        (("latent.clip_to=sentence",), r"^latent\.clip_to: there is no alignment loss"),
        (("latent.proprio=true", "latent.refuse=10"), "refuse: not with proprio"),
    ],
)
def test_what_would_teach_nothing_is_refused(frames, llava, tmp_path, more, message) -> None:
    with pytest.raises(ConfigError, match=message):
        settings(frames, llava, tmp_path, *more)


def weights(run: JointRun) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in run.pair.named_parameters() if p.requires_grad} | {
        f"ema.{n}": v for n, v in run.joint.ema.values.items()
    }


@pytest.mark.parametrize(
    ("stage", "more"),
    [
        ("stage1", ()),
        ("stage2", ("stage1.steps=0",)),
        ("stage2", ("stage1.steps=0", "stage2.optimizer=muon")),
        ("stage2", ("stage1.steps=0", "latent.regime=lora")),
    ],
)
def test_a_resumed_stage_is_the_one_that_never_stopped(
    frames, llava, trained_policy, tmp_path, stage, more
) -> None:
    begin = (f"policy.checkpoint={trained_policy}", *more)
    whole = JointRun(settings(frames, llava, tmp_path / "a", *begin), stage)
    whole.run()
    first = JointRun(settings(frames, llava, tmp_path / "b", *begin), stage)
    for _ in range(2):
        first.train_step()
    first.save()
    first.train_step()  # lost: it was not saved
    second = JointRun(settings(frames, llava, tmp_path / "b", *begin), stage)
    assert second.step == 2
    second.run()
    expected = weights(whole)
    for name, tensor in weights(second).items():
        assert torch.equal(tensor, expected[name]), name


def test_a_time_limit_stops_and_the_same_command_goes_on(frames, llava, tmp_path) -> None:
    config = settings(frames, llava, tmp_path)
    with pytest.raises(NotDone, match="policy: stopped at step 1 of 4"):
        run_policy(config, 1)
    assert run_policy(config, 0)["step"] == 4
    with pytest.raises(NotDone, match="prefix not complete"):
        run_joint(config, "stage1", 1)
    made = prepare(config, 0)
    assert made["feed"] == "prefix" and made["frames"] == 60
    with pytest.raises(NotDone, match="stage1: stopped at step 1 of 4"):
        run_joint(config, "stage1", 1)
    assert run_joint(config, "stage1", 0)["step"] == 4
    again = run_joint(config, "stage1", 0)
    assert again["step"] == 4


def test_preparing_binds_a_stage_to_no_settings(frames, llava, trained_policy, tmp_path) -> None:
    first = settings(frames, llava, tmp_path, f"policy.checkpoint={trained_policy}")
    prepare(first, 0)
    assert not list((tmp_path / "stage1").glob("*"))
    other = first.model_copy(update={"stage1": first.stage1.model_copy(update={"steps": 1})})
    assert run_joint(other, "stage1", 0)["step"] == 1


def test_a_policy_trained_by_system1_alone_is_gone_on_with(frames, llava, tmp_path) -> None:
    config = settings(frames, llava, tmp_path)
    from openhelix.benchmarks.training.stages import policy_settings

    own = policy_settings(config)
    run = Trainer(TrainConfig(**{f: getattr(own, f) for f in own.__slots__}))
    run.train_step()
    run.save()
    assert run_policy(config, 0)["step"] == 4


def test_contradictions_are_named(frames, llava, trained_policy, tmp_path) -> None:
    begin = (f"policy.checkpoint={trained_policy}",)
    with pytest.raises(ConfigError, match=r"policy\.checkpoint: no policy in .*train policy"):
        JointRun(settings(frames, llava, tmp_path), "stage1")
    with pytest.raises(ConfigError, match=r"stage2: nothing in .*train stage1"):
        JointRun(settings(frames, llava, tmp_path, *begin), "stage2")
    run_joint(settings(frames, llava, tmp_path, *begin, "stage1.steps=1"), "stage1", 0)
    with pytest.raises(ConfigError, match=r"stage1\.steps: .* was begun with 1, not 2"):
        JointRun(settings(frames, llava, tmp_path, *begin, "stage1.steps=2"), "stage1")
    changed = settings(frames, llava, tmp_path, *begin, "latent.n_act=2")
    with pytest.raises(ConfigError, match="latent: stage1 was trained for"):
        JointRun(changed, "stage2")
    few = settings(frames, llava, tmp_path / "c", *begin, "latent.max_gb=1e-6")
    with pytest.raises(ConfigError, match=r"latent\.max_gb: .* GB would lie in"):
        JointRun(few, "stage1")
    wrong = settings(frames, llava, tmp_path / "d", *begin, "latent.regime=full", "stage1.steps=0",
                     "latent.feed=states")  # fmt: skip
    with pytest.raises(ConfigError, match=r"latent\.feed: 'states' keeps what regime 'full'"):
        JointRun(wrong, "stage2")


def test_an_untrained_policy_may_be_wanted(frames, llava, tmp_path) -> None:
    config = settings(
        frames, llava, tmp_path, "policy.pretrained=false", "stage1.steps=0", "stage2.steps=2",
        f"policy.changes={json.dumps({'dim': 48, 'heads': 4, 'encoder_width': 8, 'layers': 2})}",
    )  # fmt: skip
    assert run_policy(config, 0)["skipped"]
    assert run_joint(config, "stage1", 0)["skipped"]
    assert run_joint(config, "stage2", 0)["step"] == 2


def test_an_untrained_policy_may_begin_with_a_trained_encoder(
    frames, trained_policy, llava, tmp_path
) -> None:
    changes = json.dumps({**CHANGES, "head": "lstm"})
    begin = ("policy.pretrained=false", f"policy.changes={changes}")
    config = settings(
        frames, llava, tmp_path, *begin, f"policy.encoder_from={trained_policy}", "stage1.steps=0",
        "stage2.steps=2",
    )  # fmt: skip
    made = base_policy(config, Cache(frames)).state_dict()
    fresh = base_policy(settings(frames, llava, tmp_path, *begin), Cache(frames)).state_dict()
    before = load_file(trained_policy / "model.safetensors")
    for name, tensor in made.items():
        own = before if name.startswith("encoder.") else fresh
        assert torch.equal(tensor, own[name]), name
    assert any(not torch.equal(made[name], fresh[name]) for name in made)
    assert run_joint(config, "stage2", 0)["step"] == 2
    nowhere = settings(frames, llava, tmp_path, *begin, f"policy.encoder_from={tmp_path}/none")
    with pytest.raises(BadFile, match=r"^policy\.encoder_from: .*none"):
        base_policy(nowhere, Cache(frames))
    both = (f"policy.{name}={trained_policy}" for name in ("encoder_from", "init"))
    with pytest.raises(ConfigError, match="encoder_from: init begins with a whole policy"):
        settings(frames, llava, tmp_path, *both)


def test_a_policy_alone_may_begin_with_a_trained_encoder(
    frames, trained_policy, llava, tmp_path
) -> None:
    more = (f"policy.encoder_from={trained_policy}", "policy.steps=1", "policy.lr=1e-9")
    changes = json.dumps({**CHANGES, "head": "lstm"})
    run_policy(settings(frames, llava, tmp_path, f"policy.changes={changes}", *more), 0)
    made = load_policy(tmp_path / "policy")
    assert made.config.head == "lstm"
    before = load_file(trained_policy / "model.safetensors")
    for name, tensor in made.state_dict().items():
        if name.startswith("encoder."):
            torch.testing.assert_close(tensor, before[name], atol=1e-6, rtol=0, msg=name)


@pytest.mark.parametrize(
    "more",
    [
        ("latent.kind=act_last", "latent.n_act=2"),
        ("latent.vision=false",),
        ("latent.kind=act_mid",),
        ("latent.kind=lang_mean", "latent.layers=[1,3]"),
        ("latent.kind=act_lang", "latent.text_rows=4"),
        ("latent.kind=lang", "latent.text_rows=4"),
        ("latent.kind=hidden_all", "latent.text_rows=4"),
        ("latent.kind=pool_max",),
    ],
)
def test_every_latent_can_be_trained_on(frames, llava, trained_policy, tmp_path, more) -> None:
    config = settings(
        frames, llava, tmp_path, f"policy.checkpoint={trained_policy}", "stage1.steps=2", *more
    )
    run_joint(config, "stage1", 0)
    policy = load_policy(tmp_path / "stage1")
    head = LatentHead.load(tmp_path / "stage1" / LATENT)
    assert policy.config.latent_kind == head.config.name
    before = load_file(trained_policy / "model.safetensors")
    for name, tensor in policy.state_dict().items():
        if not name.startswith(ADAPTER):
            assert torch.equal(tensor, before[name]), name


def test_the_alignment_loss_pulls_latents_to_the_table(
    frames, llava, trained_policy, tmp_path
) -> None:
    config = settings(
        frames, llava, tmp_path, f"policy.checkpoint={trained_policy}", "latent.clip=1",
        "stage1.start=random", "stage1.steps=15", "stage1.save_every=15", "stage1.eval_every=15",
    )  # fmt: skip
    run_joint(config, "stage1", 0)
    rows = json.loads((tmp_path / "stage1" / "train.json").read_text())["history"]
    assert rows[-1]["clip"] < rows[0]["clip"]


def test_a_start_sends_sentences_that_name_no_task_where_no_task_is(
    frames, llava, trained_policy, tmp_path
) -> None:
    def started(folder: Path, refuse: int) -> LatentHead:
        config = settings(
            frames, llava, folder, f"policy.checkpoint={trained_policy}", "stage1.steps=1",
            "latent.kind=lang_mean", f"latent.refuse={refuse}",
        )  # fmt: skip
        run_joint(config, "stage1", 0)
        return LatentHead.load(folder / "stage1" / LATENT)

    with_them, without = started(tmp_path / "with", 16), started(tmp_path / "without", 0)
    assert not torch.allclose(with_them.projector.weight, without.projector.weight)
    linear = settings(
        frames, llava, tmp_path / "linear", f"policy.checkpoint={trained_policy}",
        "latent.refuse=16", "latent.projector_width=0",
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"latent\.refuse: needs a hidden layer"):
        run_joint(linear, "stage1", 0)


def test_a_start_like_another_latent_says_what_the_policy_heard_from_that(
    frames, llava, trained_policy, tmp_path
) -> None:
    before = settings(
        frames, llava, tmp_path / "before", f"policy.checkpoint={trained_policy}", "stage1.steps=2"
    )
    run_joint(before, "stage1", 0)
    latent, out = tmp_path / "before" / "stage1" / LATENT, tmp_path / "after"
    after = settings(
        frames, llava, out, f"policy.checkpoint={tmp_path / 'before' / 'stage1'}",
        "latent.kind=lang_mean", f"latent.like={latent}", "stage1.steps=1", "stage1.lr_head=1e-9",
    )  # fmt: skip
    run_joint(after, "stage1", 0)
    policy = load_policy(out / "stage1")
    run = JointRun(before, "stage1", begin=False)
    rows = heard(run.joint, run.source, latent)[1:]
    table = policy.encoder.condition.table.weight[1:]
    head = LatentHead.load(out / "stage1" / LATENT)
    learner = JointRun(after, "stage1", begin=False).learner
    frames_of = [int(torch.nonzero(run.cache.task == task)[0]) for task in range(2)]
    said = [run.cache.meta["instructions"][task] for task in range(2)]
    z = learner(run.source.pictures(torch.tensor(frames_of)), said).z
    assert torch.allclose(learner.head.projector.weight, head.projector.weight, atol=1e-6)
    tokens = adapter_tokens(policy, z.detach()).mean(1)
    assert (tokens - rows).norm(dim=1).mean() < (tokens - table).norm(dim=1).mean()
    assert (torch.cdist(tokens, rows).argmin(1) == torch.arange(2)).all()
