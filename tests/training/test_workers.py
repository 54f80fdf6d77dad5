"""Workers that train together learn what one learns; when one ends, all end, with one line."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest
import torch
import yaml

from openhelix.benchmarks.training.stages import (
    JointRun,
    policy_settings,
    run_joint,
    run_policy,
)
from openhelix.benchmarks.training.workers import buckets
from openhelix.runtime.core.config import ConfigError
from openhelix.runtime.core.workers import ALONE, Workers
from openhelix.system1.draws import Part, numbers, rand, randint, randn
from openhelix.system1.losses import real_rows
from openhelix.system1.train import Trainer
from tests.training.conftest import settings

ALL = ("policy", "stage1", "stage2")
SAME = (
    "policy.optimizer=adamw", "stage1.start=random", "policy.changes.given_rows=3",
    "stage1.steps=2", "stage2.steps=2", "threads=1",
)  # fmt: skip


def command(stage: str, file: Path) -> list[str]:
    return [sys.executable, "-m", "openhelix", "train", stage, "--config", str(file)]


def started(words: Sequence[str], count: int = 2) -> list[subprocess.Popen[str]]:
    """Processes as a launcher starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    known = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
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


def complaints(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("openhelix train:")]


def written(folder: Path, config) -> Path:
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return file


def history(folder: Path) -> list[dict]:
    return json.loads((folder / "train.json").read_text())["history"]


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


@pytest.fixture(scope="module")
def alone_and_two(frames, llava, tmp_path_factory) -> tuple[Path, Path, list[str]]:
    """One training by one process and by two."""
    root = tmp_path_factory.mktemp("workers")
    one, two = (settings(frames, llava, root / name, *SAME) for name in ("one", "two"))
    running = started(command("all", written(root, two)))
    run_policy(one, 0)
    for stage in ("stage1", "stage2"):
        run_joint(one, stage, 0)
    said = [process.communicate(timeout=280) for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    return root / "one", root / "two", [out for out, _ in said]


@pytest.mark.parametrize("stage", ALL)
def test_two_processes_learn_what_one_learns(alone_and_two, stage) -> None:
    one, two, _ = alone_and_two
    alone, together = history(one / stage), history(two / stage)
    assert [row["step"] for row in alone] == [row["step"] for row in together]
    for mine, theirs in zip(alone, together, strict=True):
        for name in ("loss", "grad_norm", "position", "gripper", "val_loss"):
            if name in mine:
                assert theirs[name] == pytest.approx(mine[name], rel=1e-3), (name, mine["step"])


@pytest.mark.parametrize("regime", ["full", "lora"])
def test_a_divided_language_model_learns_as_a_whole_one(
    frames, llava, trained_policy, tmp_path, regime
) -> None:
    more = (
        f"policy.checkpoint={trained_policy}", "stage1.steps=0", "stage2.steps=3", "threads=1",
        f"latent.regime={regime}", "latent.feed=live", "stage2.save_every=3", "accumulate=2",
        "stage2.start=random",
    )  # fmt: skip
    one = settings(frames, llava, tmp_path / "one", *more)
    two = settings(frames, llava, tmp_path / "two", *more, "latent.shard=true")
    running = started(command("stage2", written(tmp_path, two)))
    run_joint(one, "stage2", 0)
    said = [process.communicate(timeout=280) for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    alone, together = history(tmp_path / "one" / "stage2"), history(tmp_path / "two" / "stage2")
    for mine, theirs in zip(alone, together, strict=True):
        for name in ("loss", "grad_norm", "val_loss"):
            if name in mine:
                assert theirs[name] == pytest.approx(mine[name], rel=2e-3), (name, mine["step"])
    # What was divided is written whole: one process goes on from it.
    again = JointRun(two.model_copy(update={"latent": one.latent}), "stage2")
    assert again.step == 3
    whole = JointRun(one, "stage2")
    for name, tensor in again.pair.named_parameters():
        if tensor.requires_grad and "learner.model" in name:
            other = whole.pair.get_parameter(name)
            assert torch.allclose(tensor, other, atol=2e-5), name


def test_dividing_a_model_needs_workers(frames, llava, trained_policy, tmp_path) -> None:
    config = settings(
        frames, llava, tmp_path, f"policy.checkpoint={trained_policy}", "stage1.steps=0",
        "latent.regime=full", "latent.shard=true",
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"latent\.shard: true, but there is one worker"):
        JointRun(config, "stage2")


def test_only_the_first_speaks_and_writes(alone_and_two) -> None:
    _, two, said = alone_and_two
    assert said[1] == "" and said[0].splitlines()[0].startswith("trained")
    assert (two / "ship" / "card.json").is_file()


def test_one_that_is_killed_ends_all_and_another_number_goes_on(frames, llava, tmp_path) -> None:
    config = settings(frames, llava, tmp_path / "out", "policy.steps=100000", "threads=1")
    running = started(command("policy", written(tmp_path, config)))
    saved = tmp_path / "out" / "policy" / "train_state.safetensors"
    try:
        end = time.monotonic() + 200
        while not saved.is_file() and time.monotonic() < end:
            time.sleep(0.2)
        running[1].kill()
        _, error = running[0].communicate(timeout=60)
    finally:
        for process in running:
            process.kill()
    assert running[0].returncode == 1
    (line,) = complaints(error)
    assert "a worker of 2 ended" in line and "Traceback" not in error
    again = Trainer(policy_settings(config))
    assert again.step >= 2
    assert torch.isfinite(torch.tensor(again.train_step()["loss"]))


def test_bad_input_is_said_once(frames, llava, tmp_path) -> None:
    config = settings(frames, llava, tmp_path / "out", "policy.batch=7")
    running = started(command("policy", written(tmp_path, config)))
    said = [process.communicate(timeout=200)[1] for process in running]
    assert [process.returncode for process in running] == [2, 2], said
    (line,) = complaints("".join(said))
    assert "policy.batch: 7 samples" in line and "Traceback" not in "".join(said)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_worker_of_rays_that_is_killed_is_replaced(frames, llava, tmp_path) -> None:
    pytest.importorskip("pandas")
    config = settings(
        frames, llava, tmp_path / "out", "policy.steps=60", "workers=2", "threads=1",
        "policy.save_every=5",
    )  # fmt: skip
    driver = subprocess.Popen(
        [*command("policy", written(tmp_path, config)), "--json"],
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
