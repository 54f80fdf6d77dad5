"""The training cache: what is written is what is read, and bad data is named."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from openhelix.runtime.core.files import BadFile
from openhelix.system1.cache import (
    FARTHEST_M,
    CacheError,
    chunk_targets,
    pictures,
    shard_bytes,
)
from openhelix.system1.data import Cache, relative_rows, shift
from openhelix.system1.geometry import (
    matrix_from_6d,
    matrix_to_euler,
    matrix_to_quat,
    quat_to_matrix,
)
from openhelix.system1.policy import DiffusionPolicy, to_absolute
from tests.system1.synthetic import make_cache, make_episode
from tests.system1.test_policy import observe, tiny

CONFIG = tiny(n_tasks=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("cache")
    make_cache(path, CONFIG)
    return path


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_frames_come_back(folder):
    cache = Cache(folder)
    raw = load_file(folder / "shard-00000.safetensors")
    frames = torch.tensor([17, 3])
    batch = cache.batch(frames, generator())
    assert len(cache) == 96
    for i, f in enumerate(frames):
        rgb = batch.inputs.rgb[0][i].permute(1, 2, 0) * 255
        np.testing.assert_allclose(rgb, raw["rgb.static"][f], atol=1e-3)
        np.testing.assert_allclose(batch.inputs.proprio[i], raw["proprio"][f])
    # the plane lies at z = 0, seen from above
    seen = batch.inputs.valid[0]
    assert (~seen).sum() == 2 * 4
    torch.testing.assert_close(
        batch.inputs.xyz[0][:, 2][seen], torch.zeros(int(seen.sum())), atol=1e-4, rtol=0
    )


def test_training_sees_the_pixels_that_acting_sees():
    obs, camera = observe(CONFIG), CONFIG.cameras[0]
    kept = pictures([obs.frames["static"]], camera)
    live = DiffusionPolicy.build(CONFIG, 0).prepare(obs, [])
    np.testing.assert_allclose(
        live.rgb[0][0].permute(1, 2, 0) * 255, kept["rgb.static"][0].float(), atol=0.51
    )
    from openhelix.system1.geometry import deproject

    depth = kept["depth.static"][0].float() * 1e-4
    xyz, valid = deproject(depth, kept["K.static"][0], kept["T.static"][0])
    torch.testing.assert_close(live.xyz[0][0], xyz, atol=2e-4, rtol=0)
    assert torch.equal(live.valid[0][0], valid)


def test_depth_beyond_reach_is_no_depth_rather_than_a_wall():
    frame = observe(CONFIG).frames["static"]
    depth = np.full_like(frame.depth, 2.0)
    depth[:8] = FARTHEST_M + 0.01
    depth[8:16] = np.inf, *[np.nan] * 7, *[-1.0] * 8, *[0.0] * 16
    kept = pictures([replace(frame, depth=depth)], CONFIG.cameras[0])["depth.static"][0]
    assert (kept[:8] == 0).all()
    assert (kept[8:] == 20_000).all()
    with pytest.raises(CacheError, match="'static': a frame has no depth"):
        pictures([replace(frame, depth=None)], CONFIG.cameras[0])


@given(st.integers(0, 1000), st.sampled_from(["so3", "euler"]))
def test_targets_undo_to_the_commanded_pose(seed, rotation):
    g = generator(seed)
    poses = torch.randn(1, 5, 7, dtype=torch.float64, generator=g)
    poses[..., 3:] /= poses[..., 3:].norm(dim=-1, keepdim=True)
    now = torch.randn(1, 7, dtype=torch.float64, generator=g)
    now[:, 3:] /= now[:, 3:].norm()
    if rotation == "euler":  # angles that differ by a quarter turn have no one difference
        poses[..., 3:] = now[:, None, 3:] + 0.1 * poses[..., 3:]
        poses[..., 3:] /= poses[..., 3:].norm(dim=-1, keepdim=True)
        level = matrix_to_euler(quat_to_matrix(now[:, 3:].roll(1, -1)))[0, 1].abs()
        assume(level < 1.2)
    rows = relative_rows(poses, now, rotation)[0]
    quat = matrix_to_quat(matrix_from_6d(rows[:, 3:]))
    position, turned = to_absolute(torch.cat((rows[:, :3], quat), -1), now[0], rotation)
    torch.testing.assert_close(position, poses[0, :, :3])
    same = (turned * poses[0, :, 3:]).sum(-1).abs()
    torch.testing.assert_close(same, torch.ones(5).double(), atol=1e-6, rtol=0)


def test_targets_end_with_the_episode():
    targets = np.arange(5 * 8, dtype=np.float64).reshape(5, 8)
    out = chunk_targets(targets, [0, 3], 4)
    assert out["target_mask"].tolist() == [[True] * 4, [True, True, False, False]]
    np.testing.assert_array_equal(out["target_pose"][0], targets[:4, :7])
    np.testing.assert_array_equal(out["target_pose"][1], targets[[3, 4, 4, 4], :7])
    np.testing.assert_array_equal(out["target_open"][1], targets[[3, 4, 4, 4], 7])
    fewer = chunk_targets(targets, [0, 3], 4, usable=[1, 2])["target_mask"]
    assert fewer.tolist() == [[True, False, False, False], [True, True, False, False]]


def test_the_task_is_named(folder):
    batch = Cache(folder).batch(torch.tensor([0, 8]), generator())
    assert batch.inputs.latent is None
    assert batch.inputs.task.tolist() == [0, 1]


def test_a_split_keeps_episodes_whole(folder):
    cache = Cache(folder)
    train, held = cache.split(0.25)
    assert len(train) + len(held) == 96
    assert not set(cache.episode[train].tolist()) & set(cache.episode[held].tolist())
    assert len(cache.episode[held].unique()) == 3


def test_shifting_moves_points_with_pixels():
    rgb = torch.rand(2, 3, 6, 7)
    xyz, valid = torch.rand(2, 3, 6, 7), torch.rand(2, 6, 7) > 0.2
    moved = shift(rgb, xyz, valid, torch.tensor([[2, -1], [0, 0]]))
    for old, new in zip((rgb, xyz, valid), moved, strict=True):
        assert torch.equal(new[1], old[1])
        assert torch.equal(new[0][..., 2:, :-1], old[0][..., :-2, 1:])
        assert (new[0][..., :2, :] == 0).all()
        assert (new[0][..., -1] == 0).all()


def test_shards_are_one_cache(tmp_path):
    make_cache(tmp_path, CONFIG, shards=5)
    cache = Cache(tmp_path)
    shards = json.loads((tmp_path / "cache.json").read_text())["shards"]
    assert len(shards) == 5
    assert len(cache) == sum(s["frames"] for s in shards) == 96
    frames = torch.randperm(96, generator=generator())
    assert torch.equal(cache.gather("step", frames).long(), cache.step[frames])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop("task"), "task: missing"),
        (lambda a: a.update(task=a["task"] + 5), "task: outside"),
        (lambda a: a.update(proprio=a["proprio"].double()), "proprio: float64"),
        (lambda a: a.update(proprio=a["proprio"] * np.nan), "proprio: not finite"),
        (lambda a: a.update(step=a["step"][:3]), "rows: the tensors have"),
        (lambda a: a.update({"rgb.static": a["rgb.static"][:, :4]}), r"rgb\.static: uint8"),
    ],
)
def test_bad_columns_are_named(change, message):
    good = make_episode(CONFIG, 0, 8, np.random.default_rng(0))
    bad = make_episode(CONFIG, 1, 8, np.random.default_rng(0))
    change(bad)
    assert shard_bytes([good], CONFIG, 2, 2)
    with pytest.raises(CacheError, match=f"^{message}"):
        shard_bytes([bad], CONFIG, 2, 2)


def test_a_folder_without_an_index_is_named(tmp_path):
    with pytest.raises(CacheError, match=r"no cache\.json"):
        Cache(tmp_path)


def changed(name, **fields):
    """Change fields of the index."""

    def change(place):
        index = json.loads((place / "cache.json").read_text())
        (place / "cache.json").write_text(json.dumps(index | fields))

    return f"cache.json: {name}", change


def reshaped(said, edit):
    """Change tensors of the shard."""

    def change(place):
        tensors = load_file(place / "shard-00000.safetensors")
        edit(tensors)
        save_file(tensors, place / "shard-00000.safetensors")

    return f"shard-00000.safetensors: {said}", change


def content(name, data):
    return name, lambda place: (place / name).write_bytes(data)


@pytest.mark.parametrize(
    ("said", "change"),
    [
        content("cache.json", b"{"),
        content("cache.json", b"[]"),
        content("cache.json", b""),
        content("cache.json", b"{}"),
        content("shard-00000.safetensors", b""),
        content("shard-00000.safetensors", bytes(2000)),
        changed("hz", hz="30"),
        changed("horizon", horizon=None),
        changed("cameras.0.", cameras=[{"lens": 1}]),
        changed("tasks", tasks="ab"),
        changed("shards.0.frames", shards=[{"file": "shard-00000.safetensors"}]),
        changed("shards", shards=[{"file": "../x.safetensors", "frames": 96}]),
        changed("shards", shards=[{"file": "shard-00000.safetensors", "frames": 0}]),
        reshaped("no task", lambda t: t.pop("task")),
        reshaped("no episode", lambda t: t.pop("episode")),
        reshaped("task: outside 0..1", lambda t: t.update(task=t["task"] + 9)),
        reshaped("task is F32", lambda t: t.update(task=t["task"].astype(np.float32))),
        reshaped("proprio is F32(96, 1, 8)", lambda t: t.update(proprio=t["proprio"][..., :8])),
        reshaped("step is I32(95,)", lambda t: t.update(step=t["step"][1:])),
        reshaped("rgb.static is", lambda t: t.update({"rgb.static": t["rgb.static"][:, :4]})),
    ],
)
def test_a_damaged_file_is_named(folder, tmp_path, said, change):
    place = tmp_path / "frames"
    shutil.copytree(folder, place)
    Cache(place)
    change(place)
    with pytest.raises(BadFile, match=re.escape(f"{place}/{said}")) as caught:
        Cache(place)
    assert "\n" not in str(caught.value)
