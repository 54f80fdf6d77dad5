"""Workers that train together learn what one learns; when one ends, all end, with one line."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch
import yaml

from openhelix.benchmarks.training.config import NotDone, TrainingConfig
from openhelix.benchmarks.training.stages import (
    JointRun,
    policy_settings,
    run_joint,
    run_policy,
)
from openhelix.benchmarks.training.vlm import run_vlm
from openhelix.benchmarks.training.workers import buckets
from openhelix.runtime.core.config import ConfigError
from openhelix.runtime.core.workers import ALONE, Workers
from openhelix.system1.draws import Part, numbers, rand, randint, randn
from openhelix.system1.losses import real_rows
from openhelix.system1.train import Trainer
from openhelix.system2.text import TextReader, fitted_code
from openhelix.system2.vlm_data import write_shard
from tests.system2.test_vlm import with_goals
from tests.training.conftest import settings

ALL = ("policy", "stage1", "stage2")
SAME = (
    "policy.optimizer=adamw", "stage1.start=random", "policy.changes.given_rows=3",
    "stage1.steps=2", "stage2.steps=2", "threads=1",
)  # fmt: skip


# Trains one stage after the other, so that a process is started once: it prints what each ended with.
TURNS = """
import os, sys
from openhelix.benchmarks.training import workers
from openhelix.runtime.cli.main import main
for turn in sys.argv[1:]:
    stage, port, file = turn.split(",")
    os.environ["MASTER_PORT"] = port
    if file.endswith("killed"):
        workers.LAST_WORD_S = 1.0  # the other one never asks
    try:
        code = main(["train", stage, "--config", file])
    except SystemExit as end:
        code = end.code
    for out in (sys.stdout, sys.stderr):
        print(f"ended {code}", file=out, flush=True)
"""


def command(stage: str, file: Path) -> list[str]:
    return [sys.executable, "-m", "openhelix", "train", stage, "--config", str(file)]


def started(turns: Sequence[tuple[str, Path]], count: int = 2) -> list[subprocess.Popen[str]]:
    """Processes as a launcher starts them, which take their turns at stages."""
    words = [sys.executable, "-c", TURNS]
    for stage, file in turns:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            words.append(f"{stage},{free.getsockname()[1]},{file}")
    known = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
    return [
        subprocess.Popen(
            words,
            env={**os.environ, **known, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]


def turns_of(text: str) -> list[tuple[str, str]]:
    """Return what was said in each turn, and what it ended with."""
    found: list[tuple[str, str]] = []
    said = ""
    for line in text.splitlines(keepends=True):
        if line.startswith("ended "):
            found.append((said, line.removeprefix("ended ").strip()))
            said = ""
        else:
            said += line
    return found


def complaints(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("openhelix train:")]


def written(file: Path, config) -> Path:
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return file


@pytest.mark.parametrize("draw", [
    lambda n, g: rand(n, 2, generator=g),
    lambda n, g: randn(3 * n, 4, generator=g),
    lambda n, g: randint(0, 9, n, generator=g),
    lambda n, g: numbers(2 * n, g),
])  # fmt: skip
def test_a_part_draws_its_rows_of_the_whole(draw) -> None:
    whole = draw(8, torch.Generator().manual_seed(5))
    parts = [Part.of(slice(first, first + 2), 8, 5) for first in range(0, 8, 2)]
    assert torch.equal(torch.cat([draw(2, part) for part in parts]), whole)


def test_real_rows_are_counted_before_they_are_noised() -> None:
    mask = torch.rand(8, 6, generator=torch.Generator().manual_seed(1)) < 0.7
    assert real_rows(mask, 4, torch.Generator()) == 4 * int(mask.sum())
    generator = torch.Generator().manual_seed(3)
    before = generator.get_state()
    counted = real_rows(mask, 4, generator, given_rows=3)
    assert torch.equal(generator.get_state(), before)
    assert counted < 4 * int(mask.sum())


def test_what_cannot_be_divided_is_said() -> None:
    three = Workers()
    three.count, three.rank = 3, 2
    assert three.parts(12, 2, "x") == [slice(8, 10), slice(10, 12)]
    with pytest.raises(ConfigError, match=r"policy\.batch: 8 samples .* multiple of 6"):
        three.parts(8, 2, "policy.batch")
    assert ALONE.parts(8, 1, "x") == [slice(0, 8)]


def test_gradients_are_summed_in_buckets_of_one_type(monkeypatch) -> None:
    monkeypatch.setattr("openhelix.benchmarks.training.workers.BUCKET_BYTES", 40)
    tensors = [torch.zeros(n) for n in (4, 4, 8, 1)] + [torch.zeros(2, dtype=torch.bfloat16)]
    found = [[t.numel() for t in bucket] for bucket in buckets(tensors)]
    assert found == [[4, 4], [8, 1], [2]]


def test_parts_one_after_the_other_are_the_batch(frames, llava, trained_policy, tmp_path) -> None:
    """The same loss and the same gradient, of the policy and of the pair."""
    more = ("stage1.steps=0", f"policy.checkpoint={trained_policy}", *SAME[:1], *SAME[2:3])
    rows = []
    for parts in (1, 4):
        config = settings(frames, llava, tmp_path / str(parts), f"accumulate={parts}", *more)
        alone = Trainer(policy_settings(config))
        joint = JointRun(config, "stage2")
        rows.append([alone.train_step() for _ in range(2)] + [joint.train_step()])
    for whole, parted in zip(*rows, strict=True):
        for name in ("loss", "position", "gripper", "grad_norm"):
            assert parted[name] == pytest.approx(whole[name], rel=2e-4), name


REGIMES = ("full", "lora")
VLM = ("vlm", "vlm-from-one", "vlm-to-one")


def vlm_words(root: Path, llava: str) -> tuple[str, ...]:
    """Return the settings of a base model's training of a few steps, on pictures made here."""
    write_shard(root / "talk" / "train", 0, with_goals(24))
    write_shard(root / "talk" / "held-out", 0, with_goals(8, 9))
    code = root / "text.safetensors"
    fitted_code(TextReader(llava, (1, 2)), ["turn left", "turn right", "lift"]).save(code)
    stages = [
        f"vlm.{stage}.{word}"
        for stage in ("see", "align", "tune")
        for word in ("steps=3", "batch=8", "speech=0.1", "lr_projector=2e-3")
    ]
    return (
        f"vlm.data={root / 'talk'}", f"vlm.model={llava}", "vlm.bf16=off", "vlm.tune.goals=2",
        "vlm.tune.goal_layers=[1,2]", "vlm.tune.lr_language=4e-3", f"vlm.tune.goal_code={code}",
        "threads=1", *stages,
    )  # fmt: skip


@dataclass
class Together:
    """What two processes made in their turns, and one process beside them.

    Attributes:
        root: of their folders: `one-NAME` and `two-NAME`.
        configs: by the name of the turn.
        said: standard output, error and exit code of each process in each turn, by its name.
        killed: what the first process said when the second had been killed.
    """

    root: Path
    configs: dict[str, TrainingConfig]
    said: dict[str, list[tuple[str, str, str]]]
    killed: str

    def histories(self, name: str, stage: str) -> Iterator[tuple[dict, dict]]:
        """Yield the rows that one process and two wrote."""
        codes = [code for _, _, code in self.said[name]]
        assert codes == ["0", "0"], self.said[name]
        one, two = (
            json.loads((self.root / f"{many}-{name}" / stage / "train.json").read_text())["history"]
            for many in ("one", "two")
        )
        assert [row["step"] for row in one] == [row["step"] for row in two]
        return zip(one, two, strict=True)


@pytest.fixture(scope="module")
def together(frames, llava, trained_policy, tmp_path_factory) -> Together:
    """Every training here that takes two processes; the second is killed in the last one."""
    root = tmp_path_factory.mktemp("workers")
    after = (
        f"policy.checkpoint={trained_policy}", "stage1.steps=0", "stage2.steps=3", "threads=1",
        "latent.feed=live", "stage2.save_every=3", "accumulate=2", "stage2.start=random",
    )  # fmt: skip
    more = {
        "all": SAME,
        **{regime: (*after, f"latent.regime={regime}") for regime in REGIMES},
        **dict.fromkeys(VLM, vlm_words(root, llava)),
        "bad": ("policy.batch=7",),
        "killed": ("policy.steps=100000", "threads=1"),
    }
    divided = {regime: "latent.shard=true" for regime in REGIMES}
    stages = dict.fromkeys(VLM, "vlm") | dict.fromkeys(REGIMES, "stage2") | {"all": "all"}
    one = {k: settings(frames, llava, root / f"one-{k}", *words) for k, words in more.items()}
    two = {
        name: settings(frames, llava, root / f"two-{name}", *words, *divided.get(name, "").split())
        for name, words in more.items()
    }
    with pytest.raises(NotDone, match="step 1 of 3 of 'see'"):
        run_vlm(two["vlm-from-one"], 1)
    two["vlm-to-one"] = two["vlm-to-one"].model_copy(update={"time_limit_s": 1e-4})
    running = started(
        [(stages.get(name, "policy"), written(root / name, two[name])) for name in more]
    )
    saved = root / "two-killed" / "policy" / "train_state.safetensors"
    try:
        run_policy(one["all"], 0)
        run_joint(one["all"], "stage1", 0)
        run_joint(one["all"], "stage2", 0)
        for regime in REGIMES:
            run_joint(one[regime], "stage2", 0)
        run_vlm(one["vlm"], 0)
        end = time.monotonic() + 200
        while not saved.is_file() and time.monotonic() < end:
            assert running[0].poll() is None
            time.sleep(0.1)
        running[1].kill()
        said = [process.communicate(timeout=60) for process in running]
    finally:
        for process in running:
            process.kill()
    each = [list(zip(*map(turns_of, both), strict=True)) for both in said]
    turns = {
        name: [(out, error, code) for (out, code), (error, _) in (mine[k] for mine in each)]
        for k, name in enumerate(list(more)[:-1])
    }
    (_, (killed, code)) = each[0][-1]
    assert code == "1", said
    return Together(root, two, turns, killed)


@pytest.mark.parametrize("stage", ALL)
def test_two_processes_learn_what_one_learns(together, stage) -> None:
    for mine, theirs in together.histories("all", stage):
        for name in ("loss", "grad_norm", "position", "gripper", "val_loss"):
            if name in mine:
                assert theirs[name] == pytest.approx(mine[name], rel=1e-3), (name, mine["step"])


@pytest.mark.parametrize("regime", REGIMES)
def test_a_divided_language_model_learns_as_a_whole_one(together, regime) -> None:
    for mine, theirs in together.histories(regime, "stage2"):
        for name in ("loss", "grad_norm", "val_loss"):
            if name in mine:
                assert theirs[name] == pytest.approx(mine[name], rel=2e-3), (name, mine["step"])
    # What was divided is written whole: one process goes on from it.
    config = together.configs[regime]
    undivided = config.latent.model_copy(update={"shard": False})
    again = JointRun(config.model_copy(update={"latent": undivided}), "stage2")
    assert again.step == 3
    whole = JointRun(
        config.model_copy(update={"latent": undivided, "out": together.root / f"one-{regime}"}),
        "stage2",
    )
    for name, tensor in again.pair.named_parameters():
        if tensor.requires_grad and "learner.model" in name:
            other = whole.pair.get_parameter(name)
            assert torch.allclose(tensor, other, atol=2e-5), name


def learned(folder: Path, stages: Sequence[str]) -> list[dict[str, float]]:
    """Return what the stages of a base model's training said of their steps."""
    rows = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    others = ("stage", "seconds", "pictures_per_s", "samples_per_s")
    return [
        {k: v for k, v in row.items() if k not in others}
        for row in rows
        if row["stage"] in stages and "sight" in row
    ]


def test_two_processes_train_a_base_model_as_one_does_and_go_on_for_each_other(together) -> None:
    one = together.root / "one-vlm"
    for name in VLM:
        assert [code for _, _, code in together.said[name]] == ["0", "0"], together.said[name]
    half = together.configs["vlm-to-one"]
    assert learned(half.out, ("see",))[-1]["step"] == 1
    assert set(run_vlm(half, 0)["accuracy"]["held-out"]) >= {"image", "none"}
    for name in VLM:
        stages = ("see", "align", "tune") if name == "vlm" else ("align", "tune")
        mine, theirs = learned(one, stages), learned(together.configs[name].out, stages)
        assert [row["step"] for row in theirs] == [3] * len(stages)
        assert {"sight", "speech", "loss", "goal"} <= set(mine[-1])
        for a, b in zip(mine, theirs, strict=True):
            assert b == pytest.approx(a, rel=2e-3, abs=1e-4), name


def test_dividing_a_model_needs_workers(frames, llava, trained_policy, tmp_path) -> None:
    config = settings(
        frames, llava, tmp_path, f"policy.checkpoint={trained_policy}", "stage1.steps=0",
        "latent.regime=full", "latent.shard=true",
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"latent\.shard: true, but there is one worker"):
        JointRun(config, "stage2")


def test_only_the_first_speaks_and_writes(together) -> None:
    (first, _, _), (second, _, _) = together.said["all"]
    assert second == "" and first.splitlines()[0].startswith("trained")
    assert (together.root / "two-all" / "ship" / "card.json").is_file()


def test_one_that_is_killed_ends_all_and_another_number_goes_on(together) -> None:
    (line,) = complaints(together.killed)
    assert "a worker of 2 ended" in line and "Traceback" not in together.killed
    again = Trainer(policy_settings(together.configs["killed"]))
    assert again.step >= 2
    assert torch.isfinite(torch.tensor(again.train_step()["loss"]))


def test_bad_input_is_said_once(together) -> None:
    said = together.said["bad"]
    assert [code for _, _, code in said] == ["2", "2"], said
    errors = "".join(error for _, error, _ in said)
    (line,) = complaints(errors)
    assert "policy.batch: 7 samples" in line and "Traceback" not in errors


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_worker_of_rays_that_is_killed_is_replaced(frames, llava, tmp_path) -> None:
    pytest.importorskip("pandas")
    config = settings(
        frames, llava, tmp_path / "out", "policy.steps=60", "workers=2", "threads=1",
        "policy.save_every=5",
    )  # fmt: skip
    driver = subprocess.Popen(
        [*command("policy", written(tmp_path / "config.yaml", config)), "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    saved = tmp_path / "out" / "policy" / "train_state.safetensors"
    try:
        end = time.monotonic() + 700
        while not saved.is_file() and time.monotonic() < end:
            time.sleep(0.1)
        victim = next(
            child
            for child in psutil.Process(driver.pid).children(recursive=True)
            if "RayTrainWorker" in " ".join(child.cmdline())
        )
        victim.send_signal(signal.SIGKILL)
        out, error = driver.communicate(timeout=700)
    finally:
        driver.kill()
    assert driver.returncode == 0, error[-2000:]
    assert json.loads(out.splitlines()[-1])["stages"][0]["step"] == 60
    assert "going on at step" in error
