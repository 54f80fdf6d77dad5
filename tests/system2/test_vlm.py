"""A tiny LLaVA learns to answer; packing changes nothing; a killed run goes on as it was."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlavaForConditionalGeneration

from openhelix.benchmarks.calvin import goals
from openhelix.runtime.core.files import BadFile, save_tensors
from openhelix.system2 import vlm_data
from openhelix.system2.answering import TransformersAnswerer
from openhelix.system2.engines.transformers import TransformersEngine
from openhelix.system2.model import open_checkpoint
from openhelix.system2.prompt import asked_of_robot
from openhelix.system2.text import TextReader, fitted_code
from openhelix.system2.vlm import (
    IGNORED,
    NOTHING,
    Goals,
    Learner,
    Packer,
    Sight,
    adapt,
    folded_state,
)
from openhelix.system2.vlm_config import VlmSection
from openhelix.system2.vlm_data import (
    Question,
    Record,
    TalkError,
    encoded,
    read,
    read_shard,
    write_shard,
)
from openhelix.system2.vlm_train import VlmRun, read_state
from tests.system2.tiny import write_llava_15_like


def records(n: int, seed: int = 0) -> list[Record]:
    """Dark and bright pictures; one question needs the picture, one does not."""
    rng = np.random.default_rng(seed)
    made = []
    for row in range(n):
        bright = bool(rng.integers(2))
        pixels = rng.integers(0, 50, (40, 40, 3)) + 180 * bright
        asked = (
            Question("light", "light", "on" if bright else "off", row % 2 == 1),
            Question("block", "block", "red", False),
        )
        labels = {"light": "on" if bright else "off"} | ({"dark": "x"} if row % 3 else {})
        numbers = (float(bright), None if row % 2 else 1.0)
        made.append(Record(encoded(pixels.astype(np.uint8)), "A", asked, labels, numbers))
    return made


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("talk")
    for index in range(2):
        write_shard(folder / "train", index, records(24, index))
    write_shard(folder / "held-out", 0, records(16, 9))
    return folder


def section(data: Path, model: str, **changes: Any) -> VlmSection:
    stage = {"batch": 8, "questions": 2, "warmup": 2, "lr_vision": 2e-3, "lr_projector": 2e-3}
    values: dict[str, Any] = {
        "data": data,
        "model": model,
        "bf16": "off",
        "jitter": 0.0,
        "eval_every": 100,
        "see": {**stage, "steps": 4},
        "align": {**stage, "steps": 3},
        "tune": {**stage, "steps": 40, "lr_language": 4e-3},
    }
    for key, value in changes.items():
        values[key] = {**values[key], **value} if isinstance(value, dict) else value
    return VlmSection(**values)


def test_shards_hold_what_was_written(tmp_path: Path) -> None:
    made = records(5)
    write_shard(tmp_path, 3, made)
    assert list(read_shard(tmp_path, 3)) == made
    assert made[0].image().size == (40, 40)
    before = (tmp_path / "00003.jsonl.gz").read_bytes()
    write_shard(tmp_path, 3, made)
    assert (tmp_path / "00003.jsonl.gz").read_bytes() == before
    (tmp_path / "00003.bin").write_bytes(b"short")
    with pytest.raises(TalkError, match="too short"):
        read(tmp_path)
    with pytest.raises(TalkError, match="no pictures"):
        read(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"no gzip", "gzip"),
        (gzip.compress(b"{}", mtime=0)[:-9], "end-of-stream"),
        (gzip.compress(b"{}", mtime=0)[:10] + b"\xff" * 20, "."),
        (gzip.compress(b"[" * 100_000, mtime=0), "recursion"),
        (gzip.compress(b"[1]", mtime=0), "."),
        (gzip.compress(b'{"bytes": [0]}', mtime=0), "."),
        (gzip.compress(b"\xff", mtime=0), "utf-8"),
        (gzip.compress(bytes(3000), mtime=0), "unpacks to more than"),
    ],
)
def test_a_damaged_shard_is_named_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, said: str
) -> None:
    if said.startswith("unpacks"):
        monkeypatch.setattr(vlm_data, "MAX_TEXT_BYTES", 2000)
    write_shard(tmp_path, 3, records(1))
    (tmp_path / "00003.jsonl.gz").write_bytes(content)
    with pytest.raises(TalkError, match=said) as caught:
        read(tmp_path)
    assert "\n" not in str(caught.value) and str(tmp_path / "00003") in str(caught.value)


def test_what_is_no_state_of_a_stopped_run_is_named(tmp_path: Path) -> None:
    file = tmp_path / "state.safetensors"
    for tensors, about, said in (
        ({"a": torch.ones(2)}, None, "not JSON"),
        ({"a": torch.ones(2)}, {"vlm": '{"stage": "see"}'}, "does not say its pictures"),
        ({"a": torch.full((2,), torch.nan)}, {"vlm": "{}"}, "not finite"),
    ):
        save_tensors(file, tensors, about)
        with pytest.raises(BadFile, match=said):
            read_state(file)
    file.write_bytes(b"garbage")
    with pytest.raises(BadFile, match=r"state\.safetensors"):
        read_state(file)


def learner_of(model: str) -> tuple[Learner, Any]:
    checkpoint = open_checkpoint(model)
    loaded = LlavaForConditionalGeneration.from_pretrained(checkpoint.path, dtype=torch.float32)
    sight = Sight(checkpoint.n_image, checkpoint.hidden, {"a": ("x", "y")}, 1)
    return Learner(loaded.eval(), checkpoint, sight, [0.5] * 3, [0.5] * 3), checkpoint


@pytest.mark.parametrize("template", ["laptop", "llava"])
def test_a_packed_question_is_the_question_alone(
    tiny_model: str, tmp_path: Path, template: str
) -> None:
    model = tiny_model if template == "laptop" else str(write_llava_15_like(tmp_path, 400))
    learner, checkpoint = learner_of(model)
    packer = Packer(checkpoint)
    size = learner.model.config.vision_config.image_size
    pixels = torch.rand(2, 3, size, size)
    asked = [
        [Question("k", "open the drawer", "red"), Question("k", "left?", "the block on the left")],
        [Question("k", "lift", "no")],
    ]
    with torch.no_grad():
        tokens = learner.image_tokens(pixels)
        together = learner.answers(tokens, packer(asked))
        alone = [
            learner.answers(tokens[row : row + 1], packer([[q]]))
            for row, questions in enumerate(asked)
            for q in questions
        ]
    lengths = torch.tensor(
        [float((packer([[q]]).wanted != IGNORED).sum()) for qs in asked for q in qs]
    )
    mean = (torch.stack([one.loss for one in alone]) * lengths).sum() / lengths.sum()
    assert torch.allclose(together.loss, mean, atol=1e-5)
    assert together.right.shape == (2, 2) and bool(together.right[1, 1].isnan())


def test_only_the_answer_is_wanted(tiny_model: str) -> None:
    checkpoint = open_checkpoint(tiny_model)
    packed = Packer(checkpoint)([[Question("k", "open the drawer", "red")]])
    wanted = packed.wanted[packed.wanted != IGNORED].tolist()
    builder = checkpoint.prompts(1)
    assert wanted[:-1] == builder.tokenize("red")[0]
    start = packed.image[0]
    whole = builder.assemble("open the drawer", ())
    real = packed.ids[0, : whole.layout.length].clone()
    real[start : packed.image[1]] = checkpoint.image_token_id
    assert real.tolist() == whole.expanded(checkpoint.image_token_id)


def test_folding_low_rank_parts_changes_no_answer(tiny_model: str) -> None:
    learner, checkpoint = learner_of(tiny_model)
    new = adapt(learner.model.model.language_model, 2)
    with torch.no_grad():
        for parameter in new:
            parameter.normal_(std=0.05)
    packed = Packer(checkpoint)([[Question("k", "open", "red block")]])
    size = learner.model.config.vision_config.image_size
    with torch.no_grad():
        tokens = learner.image_tokens(torch.rand(1, 3, size, size))
        before = learner.answers(tokens, packed).loss
        plain, _ = learner_of(tiny_model)
        plain.model.load_state_dict(folded_state(learner.model))
        after = plain.answers(tokens, packed).loss
    assert torch.allclose(before, after, atol=1e-5)


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_it_learns_what_only_the_picture_tells(
    tiny_model: str, data: Path, tmp_path: Path, mode: str
) -> None:
    config = section(data, tiny_model, tune={"mode": mode, "steps": 80}, see={"steps": 30})
    run = VlmRun(config, tmp_path / "run", device="cpu")
    assert run.run()
    report = run.report()
    found = report["held-out"]
    assert found["image"]["light"]["accuracy"] == 1.0 == found["image"]["block"]["accuracy"]
    assert found["none"]["light"]["accuracy"] < 0.9 and found["commonest answer"]["accuracy"] < 0.9
    assert {"held-out wording", "trained wording", "all"} <= set(found["image"])
    assert "scene-D" not in report  # there is none
    folder = run.export()
    answerer = TransformersAnswerer(str(folder), dtype="float32", device="cpu")
    shown = [r.image() for r in run.held_out.records[:6]]  # type: ignore[union-attr]
    said = answerer.answer(shown, ["light"] * 6)
    assert said == [r.questions[0].answer for r in run.held_out.records[:6]]  # type: ignore[union-attr]
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert any("accuracy_image" in row and "accuracy_none" in row for row in rows)
    assert any("samples_per_s" in row for row in rows)


def test_a_stopped_run_goes_on_as_it_was(tiny_model: str, data: Path, tmp_path: Path) -> None:
    config = section(data, tiny_model, tune={"steps": 4})
    whole = VlmRun(config, tmp_path / "whole", device="cpu")
    whole.run()
    for steps in range(3):  # see, align, tune: stopped in each
        part = VlmRun(config, tmp_path / "parts", device="cpu")
        for _ in range(4 if steps < 2 else 2):
            if part.step >= part.section(part.stage).steps:
                part._enter("align" if part.stage == "see" else "tune")
            part.train_step()
        part.save()
    last = VlmRun(config, tmp_path / "parts", device="cpu")
    assert (last.stage, last.step) == ("tune", 3) and last.run()
    mine, theirs = last._learned(), whole._learned()
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.allclose(mine[name], value, atol=1e-6), name
    assert last.samples == whole.samples


def test_a_hub_llava_trains_by_the_same_code(data: Path, tmp_path: Path) -> None:
    model = str(write_llava_15_like(tmp_path / "model", 400))
    run = VlmRun(section(data, model, tune={"steps": 2}), tmp_path / "run", device="cpu")
    assert run.run()
    served = open_checkpoint(str(run.export()))
    assert served.template == open_checkpoint(model).template and len(served.act_ids) >= 1
    state = LlavaForConditionalGeneration.from_pretrained(served.path).state_dict()
    before = LlavaForConditionalGeneration.from_pretrained(model).state_dict()
    assert state.keys() == before.keys()
    moved = [k for k in state if not torch.equal(state[k].float(), before[k].bfloat16().float())]
    assert any("q_proj" in k and "language" in k for k in moved)
    assert any("multi_modal_projector" in k for k in moved)


def test_some_kinds_are_asked_more_often(tiny_model: str, data: Path, tmp_path: Path) -> None:
    config = section(data, tiny_model, tune={"questions": 1, "often": {"block": 9.0}})
    run = VlmRun(config, tmp_path, device="cpu")
    often, evenly = Counter[str](), Counter[str]()
    draws = torch.Generator().manual_seed(0)
    for record in run.train.records * 10:
        often.update(q.kind for q in run._draw(record.questions, 1, draws, config.tune.often))
        evenly.update(q.kind for q in run._draw(record.questions, 1, draws))
    kinds, total = len(evenly), sum(often.values())
    assert often["block"] / total == pytest.approx(9 / (8 + kinds), abs=0.06)
    assert evenly["block"] / total == pytest.approx(1 / kinds, abs=0.06)
    whole = run._draw(run.train.records[0].questions, 99, draws, config.tune.often)
    assert sorted(q.kind for q in whole) == sorted(q.kind for q in run.train.records[0].questions)


def test_one_run_is_not_continued_as_another(tiny_model: str, data: Path, tmp_path: Path) -> None:
    VlmRun(section(data, tiny_model), tmp_path, device="cpu").save()
    with pytest.raises(ValueError, match=r"vlm\.rank.*begun with 16, not 8"):
        VlmRun(section(data, tiny_model, tune={"rank": 8}), tmp_path, device="cpu")


def test_another_run_is_begun_from(tiny_model: str, data: Path, tmp_path: Path) -> None:
    first = VlmRun(section(data, tiny_model, tune={"steps": 2}), tmp_path / "a", device="cpu")
    first.run()
    config = section(data, tiny_model, tune={"steps": 2}, init=tmp_path / "a")
    second = VlmRun(config, tmp_path / "b", device="cpu")
    assert second.step == 0 and second.stage == "see"
    for name, value in first._parts().items():
        assert torch.equal(second._parts()[name], value)
    # Pictures that are labelled in another way: the rest of the weights is kept all the same.
    for index in range(2):
        more = [replace(r, labels=r.labels | {"new": "yes"}) for r in records(24, index)]
        write_shard(tmp_path / "more" / "train", index, more)
    config = section(tmp_path / "more", tiny_model, tune={"steps": 2}, init=tmp_path / "a")
    third = VlmRun(config, tmp_path / "d", device="cpu")
    for name, value in first._parts().items():
        assert torch.equal(third._parts()[name], value)
    with pytest.raises(ValueError, match=r"vlm\.init: no state"):
        VlmRun(section(data, tiny_model, init=tmp_path / "none"), tmp_path / "c", device="cpu")


def test_a_few_megabytes_stand_for_the_whole(
    tiny_model: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("openhelix.system2.vlm_train.build", lambda **_: Path(tiny_model))
    monkeypatch.setattr("openhelix.system2.model.build", lambda **_: Path(tiny_model))
    config = section(data, "smollm2", tune={"steps": 3}, see={"steps": 0}, align={"steps": 0})
    run = VlmRun(config, tmp_path / "run", device="cpu")
    assert run.run()
    whole = run.export()
    small = tmp_path / "small"
    small.mkdir()
    for name in ("vision.safetensors", "language.safetensors"):
        (small / name).write_bytes((tmp_path / "run" / name).read_bytes())
    served = open_checkpoint(str(small))
    again = LlavaForConditionalGeneration.from_pretrained(served.path).model.language_model
    trained = LlavaForConditionalGeneration.from_pretrained(whole).model.language_model
    before = LlavaForConditionalGeneration.from_pretrained(tiny_model).model.language_model
    moved = 0.0
    for (name, mine), theirs, old in zip(
        again.named_parameters(), trained.parameters(), before.parameters(), strict=True
    ):
        assert torch.allclose(mine.float(), theirs.float(), atol=2e-3), name
        moved = max(moved, float((mine - old).detach().float().abs().max()))
    assert moved > 4e-3
    (small / "vision.safetensors").write_bytes(b"x")
    with pytest.raises(BadFile, match=r"vision\.safetensors: not safetensors"):
        open_checkpoint(str(small))


@pytest.mark.parametrize(("name", "value"), [("workers", 3), ("checkpointing", True)])
def test_batches_made_ahead_and_recomputing_change_nothing(
    tiny_model: str, data: Path, tmp_path: Path, name: str, value: int
) -> None:
    losses = []
    for setting in (type(value)(0), value):
        config = section(data, tiny_model, tune={"steps": 3}, **{name: setting})
        run = VlmRun(config, tmp_path / str(setting), device="cpu")
        assert run.learner.model.model.language_model.is_gradient_checkpointing == (
            name == "checkpointing" and bool(setting)
        )
        run.run()
        rows = (tmp_path / str(setting) / "log.jsonl").read_text().splitlines()
        losses.append([row["loss"] for row in map(json.loads, rows) if "loss" in row])
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_parts_one_after_the_other_are_the_batch(tiny_model: str, tmp_path: Path) -> None:
    """The same losses, whatever is learned from in one go; with instructions among the questions."""
    write_shard(tmp_path / "data" / "train", 0, with_goals(24))
    code = tmp_path / "text.safetensors"
    fitted_code(TextReader(tiny_model, (1, 2)), ["turn left", "turn right", "lift"]).save(code)
    stage: dict[str, Any] = {"steps": 2, "sight": 0.3, "speech": 0.1}
    tune = {**stage, "goals": 2, "goal_layers": (1, 2), "goal_code": code}
    config = section(
        tmp_path / "data", tiny_model, see=stage, align={"steps": 0}, tune=tune, jitter=1.0
    )
    rows: list[list[dict[str, float]]] = []
    for parts in (1, 4):
        run = VlmRun(config, tmp_path / str(parts), device="cpu", accumulate=parts)
        found = [run.train_step() for _ in range(2)]
        run._enter("tune")
        rows.append(found + [run.train_step() for _ in range(2)])
    assert set(rows[0][2]) >= {"sight", "speech", "loss", "right", "goal", "goal_right"}
    for whole, parted in zip(*rows, strict=True):
        assert parted == pytest.approx(whole, rel=2e-3, abs=1e-4)
    assert run.samples == 2 * 8 * (2 + 2)


def test_the_clock_ends_the_stages(tiny_model: str, data: Path, tmp_path: Path) -> None:
    from openhelix.benchmarks.training.gpu_vlm import main

    words = f"--data {data} --out {tmp_path} --minutes 0.05 --model {tiny_model} --device cpu "
    words += "--batch 4 --questions 2 --see-batch 8 --workers 2 --every 1 --bf16 off"
    assert main(words.split()) == 0
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert {row["stage"] for row in rows} == {"see", "align", "tune"}
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["samples"] > 0 and report["held-out"]["image"]["all"]["asked"] == 32
    assert (tmp_path / "language.safetensors").is_file()


def with_goals(n: int, seed: int = 0) -> list[Record]:
    """Pictures in which an instruction means one thing or the other."""
    made = []
    for record in records(n, seed):
        bright = record.labels["light"] == "on"
        meant = "switch off the lamp" if bright else "switch on the lamp"
        told = (
            Question("goal look", asked_of_robot("toggle the lamp"), meant),
            Question("goal told", asked_of_robot("put the lamp out"), "switch off the lamp"),
        )
        made.append(Record(record.picture, "A", record.questions + told, record.labels))
    return made


def test_instructions_become_latents_that_both_read_alike(tiny_model: str, tmp_path: Path) -> None:
    """What training reads from a packed sequence, an engine reads from the robot's prompt."""
    write_shard(tmp_path / "data" / "train", 0, with_goals(24))
    write_shard(tmp_path / "data" / "held-out", 0, with_goals(12, 9))
    tune = {
        "steps": 30,
        "goals": 2,
        "goal_layers": (1, 2),
        "goal_code": tmp_path / "text.safetensors",
    }
    fitted_code(
        TextReader(tiny_model, (1, 2)), ["turn left", "turn right", "lift", "drop it"]
    ).save(tmp_path / "text.safetensors")
    config = section(tmp_path / "data", tiny_model, see={"steps": 0}, align={"steps": 0}, tune=tune)
    run = VlmRun(config, tmp_path / "out", device="cpu")
    assert run.run()
    rows = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    losses = [row["goal"] for row in rows if "goal" in row]
    assert losses[-1] < losses[0]
    assert run.goals is not None and run.goals.moved < 0.9999  # <ACT> learns too
    report = run.report()
    assert set(report["held-out"]["goals"]["image"]) == {
        "goal look", "goal look words", "goal told", "goal told words",
    }  # fmt: skip
    run.export()
    assert run.goals is not None
    record = run.train.records[0]
    packed = run.packer([[q for q in record.questions if q.kind == "goal look"]])
    with torch.no_grad():
        tokens = run.learner.image_tokens(run.train.pixels([0]))
        states = run.learner.answers(tokens, packed, (1, 2), run.goals.head.act).states
        wanted = run.goals.latent(run.goals.read(states, packed))
    engine = TransformersEngine(
        str(tmp_path / "out" / "llava"),
        latent_projector=tmp_path / "out" / "latent.safetensors",
        dtype="float32",
    )
    found = torch.from_numpy(engine.encode([record.image()], ["toggle the lamp"]))[0]
    # The folder is written in half precision.
    assert torch.cosine_similarity(found, wanted, dim=1).item() > 0.999
    again = VlmRun(config, tmp_path / "out", device="cpu")
    assert again.goals is not None and again.goals.calibrated


def test_what_a_policy_reads_apart_counts() -> None:
    """Two sentences differ in one direction that the policy reads, and in many that it does not."""
    torch.manual_seed(0)
    unread = torch.randn(2, 40)
    codes = torch.cat(
        [torch.tensor([[1.0, -1.0], [-1.0, 1.0]]) * 0.2, unread, -unread.sum(1, True)], 1
    )
    reading = torch.zeros(3, codes.shape[1])
    reading[0, 0], reading[1, 1] = 1.0, 1.0
    table = torch.randn(9, 4)
    blind = Goals((1,), table, ["left", "right"], codes)
    seeing = Goals((1,), table, ["left", "right"], codes, reading=reading)
    swapped = codes.clone()
    swapped[:, :2] = codes.flip(0)[:, :2]  # of the unread rest, each is its own sentence
    wanted = torch.tensor([0, 1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Goals, "latent", lambda _, read: read)
        assert blind.loss(swapped, wanted)[1].tolist() == [1, 1]
        assert seeing.loss(swapped, wanted)[1].tolist() == [0, 0]
        assert seeing.loss(codes, wanted)[1].tolist() == [1, 1]
        assert seeing.loss(swapped, wanted)[0] > seeing.loss(codes, wanted)[0] + 1


def test_what_says_that_there_is_nothing_to_do_refuses() -> None:
    assert NOTHING == goals.NOTHING
    table, codes = torch.randn(9, 4), torch.randn(3, 6)
    assert Goals((1,), table, ["left", "right", "up"], codes).judge("model") is None
    judge = Goals((1,), table, ["left", NOTHING, "right"], codes).judge("model")
    assert judge is not None and judge.sentences[judge.nothing] == NOTHING
    assert [one.refused for one in judge.judge(codes[:, None])] == [False, True, False]


def test_a_base_model_without_instructions_cannot_learn_goals(
    data: Path, tiny_model: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"vlm\.tune\.goals"):
        VlmRun(section(data, tiny_model, tune={"goals": 1}), tmp_path / "out", device="cpu")
