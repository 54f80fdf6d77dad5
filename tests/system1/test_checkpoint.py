"""Checkpoints: round trips, published layouts, and what is refused by name."""

from __future__ import annotations

import json
import pickle
import re
import shutil
import struct
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file

from openhelix.runtime.core.config import ConfigError
from openhelix.runtime.core.files import BadFile
from openhelix.system1.actor import DiffuserActor
from openhelix.system1.checkpoint import (
    build_model,
    convert_official,
    load_official,
    load_policy,
    read_official,
    rebuilt,
    save_policy,
    seeded_model,
)
from openhelix.system1.config import CameraConfig, PolicyConfig, official_calvin, small
from openhelix.system1.diffusion import Normalizer
from openhelix.system1.policy import DiffusionPolicy
from tests.system1.test_policy import goal, observe, tiny


@pytest.fixture(scope="module")
def published() -> dict[str, torch.Tensor]:
    """A state dict of the published layout, random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return dict(DiffuserActor(official_calvin(nhist=3)).state_dict())


def test_the_published_wrapper_and_prefix_come_off(published, tmp_path):
    path = tmp_path / "policy.pth"
    torch.save({"weight": {f"module.{k}": v for k, v in published.items()}, "iter": 3}, path)
    model = load_official(path)
    assert model.config.nhist == 3
    assert not model.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, published[name]), name


def test_missing_extra_and_misshapen_are_all_named(published):
    broken = dict(published)
    del broken["prediction_head.traj_encoder.bias"]
    broken["surprise"] = torch.zeros(1)
    broken["encoder.instruction_encoder.bias"] = torch.zeros(7)
    with pytest.raises(BadFile) as error:
        load_official(broken)
    text = str(error.value)
    assert "3 parameters do not fit" in text
    assert "missing prediction_head.traj_encoder.bias" in text
    assert "extra surprise" in text
    assert "encoder.instruction_encoder.bias has shape (7,), needs (192,)" in text


class Evil:
    """Something only unpickling would run."""

    def __reduce__(self):
        return (print, ("unpickled",))


def test_nothing_is_unpickled(tmp_path, capsys):
    path = tmp_path / "policy.pth"
    torch.save({"weight": Evil()}, path)
    with pytest.raises(BadFile, match="it holds more than tensors"):
        load_official(path)
    path.write_bytes(pickle.dumps({"weight": Evil()}))
    with pytest.raises(BadFile):
        load_official(path)
    assert "unpickled" not in capsys.readouterr().out


def test_values_that_are_not_tensors_are_named(tmp_path):
    with pytest.raises(BadFile, match="epoch is int, not a tensor"):
        load_official({"epoch": 3})
    with pytest.raises(BadFile, match="no such file"):
        load_official(tmp_path / "absent.pth")


def test_a_converted_checkpoint_drives_a_robot(published, tmp_path):
    model = convert_official(published, tmp_path / "c")
    names = {p.name for p in (tmp_path / "c").iterdir()}
    assert names == {"config.json", "model.safetensors", "normalizer.safetensors", "spec.json"}
    policy = DiffusionPolicy.load(tmp_path / "c", sampler="ddim", steps=2)
    assert policy.spec.horizon == 19
    assert [c.name for c in policy.spec.cameras] == ["static", "gripper"]
    for name, tensor in policy.model.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])
    obs = observe(policy.config)
    chunk = policy.act(obs, [goal(policy.config)])
    assert chunk.poses.shape == (19, 7)
    assert np.abs(chunk.poses[:, :3] - obs.tcp_pose[:3]).max() < 0.4


def test_our_own_round_trip_gives_the_same_chunk(tmp_path):
    config = tiny(latent_model_id="abc")
    policy = DiffusionPolicy.build(config, 3)
    scales = Normalizer(torch.zeros(6, 9), torch.full((6, 9), 0.07))
    policy.model.set_normalizer(scales)
    save_policy(tmp_path, config, policy.model.state_dict(), policy.model.normalizer)
    again = DiffusionPolicy.load(tmp_path)
    assert again.config == config
    assert again.spec.latent.model_id == "abc"
    obs = observe(config)
    policy.reset(1)
    again.reset(1)
    first, second = policy.act(obs, [goal(config)]), again.act(obs, [goal(config)])
    np.testing.assert_array_equal(first.poses, second.poses)


def test_bad_folders_are_named(tmp_path):
    with pytest.raises(BadFile, match=r"no config\.json"):
        load_policy(tmp_path)
    config = tiny()
    policy = DiffusionPolicy.build(config, 0)
    save_policy(tmp_path, config, policy.model.state_dict(), policy.model.normalizer)
    data = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**data, "layers": 3}))
    with pytest.raises(BadFile, match=r"missing head\.blocks\.2"):
        load_policy(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**data, "colour": 1}))
    with pytest.raises(BadFile, match=r"config\.json: colour: no such field"):
        load_policy(tmp_path)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"dim": 100}, "dim"),
        ({"dim": 120, "heads": 8}, "heads"),
        ({"sample_steps": 101}, "sample_steps"),
        ({"horizon": 0}, "horizon"),
        ({"cameras": ()}, "cameras"),
        ({"hz": 0}, "hz"),
        ({"hz": float("nan")}, "hz"),
        ({"layers": -3}, "layers"),
        ({"layers": 10**6}, "layers"),
        ({"train_steps": 10**9}, "train_steps"),
        ({"horizon": 10**9}, "horizon"),
        ({"latent_tokens": 10**9}, "latent_tokens"),
        ({"dropout": 1.0}, "dropout"),
        ({"dim": 4032, "heads": 6, "layers": 64}, "dim, layers"),
        ({"cameras": tuple(CameraConfig(str(i), 9, 9, 9, 9) for i in range(9))}, "cameras: 9"),
        ({"encoder_width": 2048, "cameras": (CameraConfig("a", 9, 9, 512, 512),)}, "cameras: a"),
    ],
)
def test_bad_configurations_name_the_field(changes, field):
    with pytest.raises(ConfigError, match=f"^{field}"):
        small(**changes)


@pytest.mark.parametrize("field", ["height", "width", "work_height", "work_width"])
@pytest.mark.parametrize("size", [-1, 0, 10**6])
def test_a_camera_beyond_reason_is_refused(field, size):
    about = {"name": "static", "height": 200, "width": 200, "work_height": 100, "work_width": 100}
    with pytest.raises(ConfigError, match=rf"^cameras: static\.{field}: {size} is not in"):
        CameraConfig(**about | {field: size})


def test_configuration_round_trip():
    for config in (small(nhist=2), official_calvin(3, 16)):
        assert PolicyConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_a_rebuilt_network_keeps_what_fits_and_names_the_rest():
    torch.manual_seed(7)
    model = build_model(tiny(keyposes=0))
    before = torch.get_rng_state()
    made, unfit = rebuilt(model, replace(model.config, encoder_width=16, keyposes=2), seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    kept, now = model.state_dict(), made.state_dict()
    assert 0 < len(unfit) < len(kept)
    for name, tensor in kept.items():
        assert (name in unfit) == (now[name].shape != tensor.shape), name
        if name not in unfit:
            assert torch.equal(now[name], tensor), name
    fresh = seeded_model(made.config, 3).state_dict()
    added = set(now) - set(kept)
    assert added and all(torch.equal(now[name], fresh[name]) for name in [*added, *unfit])
    # What a smaller configuration lacks is named too.
    lost = set(rebuilt(made, replace(made.config, keyposes=0), seed=3)[1])
    assert lost == added


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A whole checkpoint folder."""
    folder = tmp_path_factory.mktemp("saved")
    config = tiny()
    policy = DiffusionPolicy.build(config, 0)
    save_policy(folder, config, policy.model.state_dict(), policy.model.normalizer)
    return folder


CAMERA = {"name": "static", "height": 9, "width": 9, "work_height": 9, "work_width": 9}
FIELDS = [
    json.dumps(fields).encode()
    for fields in (
        {"dim": "144"},
        {"dim": 144.5},
        {"dim": True},
        {"layers": None},
        {"use_latent": "no"},
        {"head": "nope"},
        {"head": 3},
        {"sampler": "nope"},
        {"position_schedule": "nope"},
        {"hz": float("nan")},
        {"cameras": 5},
        {"cameras": [CAMERA | {"height": "200"}]},
        {"cameras": [CAMERA | {"work_height": 10**6}]},
        {"cameras": [CAMERA | {"lens": 1}]},
        {"cameras": [{"name": "static"}]},
        {"dim": 1440, "layers": 60},  # a larger network than the weights beside it
    )
]
ONES = torch.ones(6, 9)
SCALES = [
    {"offset": ONES},
    {"offset": ONES, "scale": ONES.clone(), "more": ONES.clone()},
    {"offset": ONES[:3].clone(), "scale": ONES},
    {"offset": ONES, "scale": torch.ones(54)},
    {"offset": ONES, "scale": torch.zeros(6, 9)},
    {"offset": ONES, "scale": -ONES},
    {"offset": ONES * float("nan"), "scale": ONES},
    {"offset": ONES, "scale": ONES * float("inf")},
    {"offset": ONES, "scale": ONES.int()},
    {"offset": ONES.clone().view(torch.int32), "scale": ONES},
]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *((name, b"garbage" * 9) for name in ("model.safetensors", "normalizer.safetensors")),
        *((name, b"") for name in ("model.safetensors", "config.json")),
        *((name, b"{") for name in ("config.json", "spec.json")),
        *((name, b"[1]") for name in ("config.json", "spec.json")),
        ("config.json", b"\xff\xfe"),
        ("config.json", b'{"cameras": [1]}'),
        ("config.json", b'{"dim": "wide"}'),
        ("config.json", b"[" * 200_000),
        *(("config.json", changed) for changed in FIELDS),
        ("model.safetensors", struct.pack("<Q", 2**63) + b"{}"),
        ("model.safetensors", save({})),
        *(("normalizer.safetensors", save(tensors)) for tensors in SCALES),
    ],
)
def test_a_damaged_file_is_named(saved, tmp_path, name, content):
    folder = tmp_path / "broken"
    shutil.copytree(saved, folder)
    assert load_policy(folder) is not None
    (folder / name).write_bytes(content)
    with pytest.raises(BadFile, match=re.escape(str(folder / name))):
        load_policy(folder)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(saved, published, tmp_path, bad):
    folder = tmp_path / "broken"
    shutil.copytree(saved, folder)
    state = load_file(folder / "model.safetensors")
    name = sorted(state)[-1]
    state[name].view(-1)[-1] = bad
    save_file(state, folder / "model.safetensors")
    with pytest.raises(BadFile, match=re.escape(f"model.safetensors: {name} has values that are")):
        load_policy(folder)
    given = {k: v.clone() for k, v in read_official(published).items()}
    given["encoder.curr_gripper_embed.weight"][0, 0] = bad
    with pytest.raises(
        BadFile, match=r"encoder\.curr_gripper_embed\.weight has values that are not"
    ):
        load_official(given)


def test_weights_of_another_kind_of_number_are_refused_by_name(saved, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(saved, folder)
    state = load_file(folder / "model.safetensors")
    save_file({k: v.double() for k, v in state.items()}, folder / "model.safetensors")
    load_policy(folder)  # of other fractions they may be
    name = sorted(state)[-1]
    state[name] = state[name].view(torch.int32)
    save_file(state, folder / "model.safetensors")
    with pytest.raises(BadFile, match=rf"model.safetensors: {re.escape(name)} is int32, needs"):
        load_policy(folder)


def test_tensors_that_only_claim_their_size_are_refused_by_their_shape(published):
    state = dict(read_official(published))
    state["encoder.instruction_encoder.bias"] = torch.zeros(1).expand(10**12)
    with pytest.raises(BadFile, match="parameters do not fit"):
        load_official(state)
    state["encoder.curr_gripper_embed.weight"] = torch.zeros(1).expand(10**6, 10**6)
    with pytest.raises(BadFile, match=r"state dict: nhist: 1000000 is not in 1\.\.64"):
        load_official(state)
    state["encoder.curr_gripper_embed.weight"] = torch.zeros(3, 3).to_sparse()
    with pytest.raises(BadFile, match="no plain tensor"):
        load_official(state)


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_no_damage_to_a_checkpoint_is_more_than_one_line(saved, tmp_path_factory, data):
    """Bytes changed or cut in any of its files: refused in one line that names it, or harmless."""
    folder = tmp_path_factory.mktemp("fuzz") / "c"
    shutil.copytree(saved, folder)
    name = data.draw(st.sampled_from(sorted(p.name for p in folder.iterdir())))
    whole = bytearray((folder / name).read_bytes())
    for _ in range(data.draw(st.integers(0, 4))):
        # Mostly where the structure is; the rest of a file are numbers.
        place = data.draw(st.integers(0, min(len(whole), 4000) - 1))
        whole[place] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, 1)) and data.draw(st.integers(0, len(whole) - 1))
    (folder / name).write_bytes(bytes(whole[: cut or None]))
    try:
        load_policy(folder)
    except BadFile as error:
        said = str(error)
    else:
        said = f"{folder}"
    assert str(folder) in said and "\n" not in said


def test_a_published_file_that_is_garbage_is_named(tmp_path):
    path = tmp_path / "policy.safetensors"
    path.write_bytes(b"garbage" * 9)
    with pytest.raises(BadFile, match=re.escape(str(path))):
        load_official(path)
