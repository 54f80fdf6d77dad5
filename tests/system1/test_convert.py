"""`openhelix convert`: what published files look like, and what is refused in one line."""

from __future__ import annotations

import argparse
import json

import numpy as np
import pytest
import torch

from openhelix.runtime.cli.main import main
from openhelix.runtime.core.config import ConfigError
from openhelix.system1.actor import DiffuserActor
from openhelix.system1.checkpoint import load_policy, read_official
from openhelix.system1.config import official_calvin, small
from openhelix.system1.geometry import matrix_from_6d, matrix_to_6d, quat_to_matrix
from openhelix.system1.policy import DiffusionPolicy
from tests.system1.test_actor import make, observe
from tests.system1.test_policy import tiny


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    """A state dict of the published layout, random."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return dict(DiffuserActor(official_calvin(nhist=1)).state_dict())


def told(capsys) -> dict:
    return json.loads(capsys.readouterr().out)


def test_a_file_as_training_scripts_leave_it_becomes_a_folder(weights, tmp_path, capsys):
    path, out = tmp_path / "policy.pth", tmp_path / "mine"
    beside = {
        "iter": 65_000,
        "best_loss": np.float64(0.25),
        "losses": np.zeros(3),
        "args": argparse.Namespace(lr=3e-4, tasks=["a"]),
    }
    torch.save({"weight": {f"module.{k}": v for k, v in weights.items()}, **beside}, path)
    assert main(["convert", str(path), str(out), "--tokens", "16", "--json"]) == 0
    said = told(capsys)
    assert (said["nhist"], said["latent_tokens"], said["quaternion"]) == (1, 16, "wxyz")
    assert said["parameters"] == sum(p.numel() for p in DiffuserActor().parameters())
    model = load_policy(out)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[name]), name
    assert DiffusionPolicy(model).spec.latent.n_tokens == 16
    assert main(["convert", str(path), str(tmp_path / "again")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "history of 1, 1 latent token, rotations read wxyz" in lines[0]
    assert lines[1] == f"next: openhelix run system1.policy.options.path={tmp_path}/again"


@pytest.mark.parametrize("wrap", ["weight", "state_dict", "model", "model_state_dict"])
def test_every_wrapper_comes_off(wrap):
    inner = {"a": torch.zeros(2)}
    assert read_official({wrap: inner, "epoch": 1}).keys() == inner.keys()
    assert read_official({"model": {wrap: inner}}).keys() == inner.keys()


class Evil:
    def __reduce__(self):
        return (print, ("unpickled",))


def test_files_of_numpy_before_2_are_read(tmp_path):
    # Its scalars name a module that has since moved.
    path = tmp_path / "old.pth"
    torch.save({"weight": {"a": torch.zeros(2)}, "loss": np.float32(1.5)}, path)
    data = path.read_bytes()
    assert b"numpy._core.multiarray" in data or b"numpy.core.multiarray" in data
    assert read_official(path).keys() == {"a"}


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("absent", "no such file"),
        ("pointer", "is only a pointer of git-lfs to a file of 191979520 bytes; `git lfs pull`"),
        ("code", "it holds more than tensors, and reading that could run code"),
        ("text", "no checkpoint that torch.save wrote, or a damaged one"),
        ("short", "parameters do not fit: missing"),
    ],
)
def test_what_is_no_checkpoint_is_one_line_and_writes_nothing(kind, said, tmp_path, capsys):
    path, out = tmp_path / "policy.pth", tmp_path / "mine"
    if kind == "pointer":
        path.write_text(
            "version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 191979520\n"
        )
    elif kind == "code":
        torch.save({"weight": {"a": torch.zeros(1)}, "hook": Evil()}, path)
    elif kind == "text":
        path.write_text("not weights")
    elif kind == "short":
        torch.save({"weight": {"encoder.curr_gripper_embed.weight": torch.zeros(1, 192)}}, path)
    assert main(["convert", str(path), str(out)]) == 2
    printed = capsys.readouterr()
    assert said in printed.err and str(path) in printed.err and printed.err.count("\n") == 1
    assert "weights_only" not in printed.err and printed.out == ""
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["full"], "out: full is there already; name a new folder"),
        (["new", "--tokens", "3"], "--tokens: 3, must be 1 or 16"),
        (["new", "--quaternion", "zyxw"], "--quaternion: "),
        (["new", "a.b=1"], "a.b=1: convert takes no settings"),
    ],
)
def test_bad_words_are_one_line_and_exit_2(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    assert main(["convert", "policy.pth", *words]) == 2
    printed = capsys.readouterr()
    assert said in printed.err and printed.err.count("\n") == 1 and printed.out == ""


def test_weights_that_misread_rotations_run_right():
    """Trained reading w, x, y, z as x, y, z, w, a network knows rotations by another matrix."""
    model = make(1, 1)
    given = observe(1, 1, 1)
    noise = torch.Generator().manual_seed(3)

    def sampled(order):
        model.config = official_calvin(quaternion=order)
        noise.manual_seed(3)
        return model.sample(*given, lambda shape: torch.randn(shape, generator=noise))

    read, misread = sampled("wxyz"), sampled("xyzw")
    torch.testing.assert_close(misread[..., :3], read[..., :3])
    torch.testing.assert_close(misread[..., (6, 3, 4, 5)], read[..., 3:7])  # (z, w, x, y)


def test_training_tells_them_rotations_as_they_read_them(monkeypatch):
    from openhelix.system1 import actor

    model, seen = make(1, 1), {}
    monkeypatch.setattr(actor, "diffusion_loss", lambda _, clean, *rest: seen.update(clean=clean))
    monkeypatch.setattr(model, "tensors_of", lambda inputs: observe(1, 1, 1))
    quat = torch.nn.functional.normalize(
        torch.randn(1, 19, 4, generator=torch.Generator().manual_seed(1)), dim=-1
    )
    rows = torch.cat((torch.zeros(1, 19, 3), matrix_to_6d(quat_to_matrix(quat))), -1)
    for order in ("wxyz", "xyzw"):
        model.config = official_calvin(quaternion=order)
        model.loss(None, rows, torch.ones(1, 19), torch.ones(1, 19, dtype=torch.bool))
        turned = matrix_from_6d(model.normalizer.denormalize(seen["clean"])[..., 3:9])
        want = quat if order == "wxyz" else quat[..., (3, 0, 1, 2)]
        torch.testing.assert_close(turned, quat_to_matrix(want), atol=1e-5, rtol=0)


def test_the_order_belongs_to_published_weights():
    with pytest.raises(ConfigError, match="quaternion: 'xyzw'; only published weights have it"):
        small(quaternion="xyzw")
    assert tiny().quaternion == "wxyz"
