"""`openhelix train` as a command: errors in one line, kill -9 and again, one folder to ship."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from openhelix.benchmarks.training.export import changed
from openhelix.runtime.cli.main import main
from openhelix.runtime.core.config import ConfigError
from openhelix.system1.policy import DiffusionPolicy
from openhelix.system2.latents import LatentHead
from openhelix.system2.model import open_checkpoint
from tests.training.conftest import settings

KILLED_AT_STEP_17 = """
import os, signal, sys
from openhelix.runtime.cli.main import main
from openhelix.runtime.core.config import ConfigError
from openhelix.system1.train import Trainer

step = Trainer.train_step

def until_17(self):
    if self.step == 17:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self)

Trainer.train_step = until_17
main(sys.argv[1:])
"""


@pytest.fixture
def own_threads() -> Iterator[None]:
    """What a test sets torch's threads to ends with it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def write(config, place: Path) -> Path:
    place.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return place


def test_all_stages_end_in_a_folder_to_ship(frames, llava, tmp_path, capsys) -> None:
    config = settings(frames, llava, tmp_path / "out")
    file = write(config, tmp_path / "train.yaml")
    assert main(["train", "all", "--config", str(file), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["finished"] and [s["stage"] for s in said["stages"]] == [
        "policy", "stage1", "stage2", "export",
    ]  # fmt: skip
    ship = tmp_path / "out" / "ship"
    policy = DiffusionPolicy.load(ship / "system1-laptop")
    head = LatentHead.load(ship / "system2-laptop" / "latent.safetensors")
    assert policy.spec.latent == head.spec(open_checkpoint(llava), raw=False)
    card = json.loads((ship / "card.json").read_text())
    assert card["weights_of"] == "stage2" and card["data"]["frames"] == 60
    assert len(card["data"]["frames_sha256"]) == 64 and card["hours"] > 0
    assert set(card["stages"]) == {"policy", "stage1", "stage2"}
    assert "| stage2 | 4 |" in (ship / "README.md").read_text()
    stored = load_file(ship / "system1-laptop" / "model.safetensors")
    assert (next(iter(stored.values())).dtype == torch.float16) == (
        card["precision"]["dtype"] == "float16"
    )
    assert card["precision"]["moves_a_trajectory_by_m"] <= 5e-4
    # Again: everything is there, nothing is trained, and it says what to do next.
    assert main(["train", "stage2", "--config", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["stages"][0]["step"] == 4
    assert main(["train", "stage2", "--config", str(file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [
        "trained",
        "figures",
        "written",
        "curves",
        "next",
    ]
    assert lines[4].split(maxsplit=1)[1] == f"openhelix train export --config {file}"
    assert "held-out loss" in lines[1] and "stage2/loss.png" in lines[3]


def test_an_exported_language_model_speaks_as_the_trained_one(frames, llava, tmp_path) -> None:
    from openhelix.benchmarks.training.export import export
    from openhelix.benchmarks.training.stages import JointRun, run_joint, run_policy

    config = settings(
        frames, llava, tmp_path, "latent.regime=lora", "stage1.steps=0", "stage2.lr_language=0.01"
    )
    run_policy(config, 0)
    run_joint(config, "stage2", 0)
    export(config)
    run = JointRun(config, "stage2")
    run.joint.ema.swap(run.pair)
    frames_ = torch.tensor([0, 7])
    pictures, texts = run.source.pictures(frames_), ["open", "close"]
    with torch.no_grad():
        trained = run.learner(pictures, texts).z
    from openhelix.system2.engines.transformers import TransformersEngine

    ship = tmp_path / "ship"
    engine = TransformersEngine(
        str(ship / "system2-laptop" / "llava"),
        latent_projector=ship / "system2-laptop" / "latent.safetensors",
        dtype="float32",
        device="cpu",
    )
    import numpy as np

    served = torch.from_numpy(engine.encode([np.asarray(p) for p in pictures], texts))
    assert torch.nn.functional.cosine_similarity(served, trained, dim=-1).min() > 0.999
    assert DiffusionPolicy.load(ship / "system1-laptop").spec.latent == engine.spec


def test_a_base_models_own_latents_are_exported_beside_a_policy_that_reads_their_code(
    frames, llava, tmp_path
) -> None:
    from openhelix.benchmarks.training.export import export
    from openhelix.benchmarks.training.stages import run_policy
    from openhelix.system2.engines.transformers import TransformersEngine
    from openhelix.system2.latents import LatentConfig

    config = settings(frames, llava, tmp_path)
    run_policy(config, 0)
    policy = DiffusionPolicy.load(tmp_path / "policy")
    checkpoint = open_checkpoint(llava)
    table = torch.randn(50, checkpoint.hidden, generator=torch.Generator().manual_seed(0))
    said = LatentConfig("lang_mean", layers=(1,))
    for dim, name in ((policy.config.latent_dim, "good"), (7, "narrow")):
        LatentHead.fresh(said, table, dim).save(tmp_path / f"{name}.safetensors")
    with_init = [f"latent.init={tmp_path}/good.safetensors"]
    card = export(settings(frames, llava, tmp_path, *with_init))
    assert card["from"] == "vlm"
    ship = tmp_path / "ship"
    engine = TransformersEngine(
        llava, latent_projector=ship / "system2-laptop" / "latent.safetensors", device="cpu"
    )
    assert DiffusionPolicy.load(ship / "system1-laptop").spec.latent == engine.spec
    assert engine.spec.kind == "lang_mean@1"
    for name, said_of_it in (
        ("narrow", "latent.init: its latents have 1 tokens of 7 numbers, the policy reads 1 of"),
        ("none", "latent.init: there is no file"),
    ):
        with pytest.raises(ConfigError, match=said_of_it):
            export(settings(frames, llava, tmp_path, f"latent.init={tmp_path}/{name}.safetensors"))
        assert DiffusionPolicy.load(ship / "system1-laptop").spec.latent == engine.spec  # as it was


def test_a_card_names_all_its_data_and_no_place_of_this_machine(monkeypatch) -> None:
    from openhelix.benchmarks.training.export import _data_line, shown

    monkeypatch.setenv("HOME", "/home/one")
    assert shown({"data": "/home/one/a,/home/one/b", "at": ["/home/one/c"], "n": 3}) == {
        "data": "~/a,~/b",
        "at": ["~/c"],
        "n": 3,
    }
    assert shown("x=/home/one/a") == "x=~/a" and shown("/data/home/one/a") == "/data/home/one/a"
    line = _data_line({"frames": 5, "frames_sha256": "ab", "collection": "mine"})
    assert line == "Data: mine, 5 frames, SHA-256 `ab`."


def test_half_precision_turns_no_latent() -> None:
    from openhelix.benchmarks.training.export import EXACT_TURN, turned_by_half
    from openhelix.system2.latents import LatentConfig

    torch.manual_seed(0)
    head = LatentHead(LatentConfig("lang_mean", layers=(1, 2)), 48, width=32)
    assert 0 < turned_by_half(head) <= EXACT_TURN
    with torch.no_grad():
        head.projector.weight[0, 0] = 1e30  # half precision has no such number
    assert not turned_by_half(head) <= EXACT_TURN


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["stage3"], "stage: 'stage3' is none of policy, prepare, stage1"),
        (["policy", "data=/no/where"], "data: no folder /no/where; `openhelix collect` makes one"),
        (["policy", "data={empty}"], "has no frames; `openhelix collect"),
        (["stage1", "latent.kind=best"], "latent.kind: 'best', want one of"),
        (["stage1", "latent.regime=half"], "latent.regime: input should be 'frozen'"),
        (["stage1", "latent.kinds=lang"], "latent.kinds: unknown key; did you mean 'kind'?"),
        (["stage1", "device=cuda:9"], "device: 'cuda:9', but torch sees no CUDA"),
        (
            ["policy", "policy.changes={dim: 50}"],
            "policy.changes.dim: 50 is not a multiple of heads",
        ),
        (
            ["policy", "policy.changes={hed: dit}"],
            "policy.changes.hed: no such field; valid are cam",
        ),
        (["policy", "policy.changes={head: best}"], "policy.changes.head: input should be 'diff"),
        (
            ["policy", "policy.changes={sensors: rgb}"],
            "policy.changes.sensors: input should be a list",
        ),
        (
            ["policy", "policy.changes={horizon: 9}"],
            "policy.changes.horizon: 9 contradicts the cache",
        ),
        (
            ["policy", "policy.changes={sensors: [rgb, tactile]}"],
            "policy.changes.sensors: the data has no camera 'tactile'",
        ),
        (["policy", "policy.preset=huge"], "policy.preset: 'huge' is none of small, small_flow"),
        (
            ["policy", "policy.changes={head: lstm}", "policy.preset=small_flow"],
            "policy.changes.head: 'lstm' samples nothing",
        ),
        (
            ["policy", "policy.checkpoint=nosuch", "--estimate"],
            "policy.checkpoint: no policy in nosuch",
        ),
        (["policy", "policy.init=nosuch"], "policy.init: no policy in nosuch"),
        (["policy", "latent.clip_to=sentence"], "latent.clip_to: there is no alignment loss; say"),
        (["stage1", "stage1.steps=-1"], "stage1.steps: input should be greater"),
        (["export"], "policy.checkpoint: no policy in"),
    ],
)
def test_bad_input_gets_one_line(frames, llava, tmp_path, capsys, words, said) -> None:
    if "cuda" in said and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    empty = tmp_path / "empty"
    empty.mkdir()
    words = [word.replace("{empty}", str(empty)) for word in words]
    file = write(settings(frames, llava, tmp_path / "out"), tmp_path / "train.yaml")
    assert main(["train", *words, "--config", str(file)]) == 2
    err = capsys.readouterr().err.strip()
    assert said in err and len(err.splitlines()) == 1
    assert not list((tmp_path / "out").rglob("*.safetensors"))


def test_killed_and_called_again_it_ends_as_if_nothing_had_been(
    frames, llava, tmp_path, own_threads
) -> None:
    # The same bits need the same number of threads: sums are split among them.
    same = ("policy.steps=30", "policy.save_every=5", "threads=1")
    files = {
        name: write(settings(frames, llava, tmp_path / name, *same), tmp_path / f"{name}.yaml")
        for name in ("whole", "killed")
    }
    words = ["train", "policy", "--config"]
    assert main([*words, str(files["whole"])]) == 0
    done = subprocess.run(
        [sys.executable, "-c", KILLED_AT_STEP_17, *words, str(files["killed"])],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    killed = tmp_path / "killed" / "policy"
    assert json.loads((killed / "train.json").read_text())["step"] == 15  # two steps are lost
    assert main([*words, str(files["killed"])]) == 0
    whole, again = (load_file(tmp_path / x / "policy" / "model.safetensors") for x in files)
    for name, tensor in whole.items():
        assert torch.equal(tensor, again[name]), name


def test_the_card_names_what_is_not_default() -> None:
    defaults = {"a": {"b": 1, "c": {}}, "out": None, "d": False}
    values = {"a": {"b": 2, "c": {"dim": 48}}, "out": "x", "d": True}
    assert changed(values, defaults, "") == ["a.b=2", 'a.c={"dim": 48}', "d=true"]
