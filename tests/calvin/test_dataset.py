"""CALVIN's layout: written, read back, resumed after a kill, and never trusted."""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from openhelix.benchmarks.calvin import dataset as annotations
from openhelix.benchmarks.calvin.dataset import (
    Annotation,
    Dataset,
    DatasetError,
    DatasetWriter,
    absolute_action,
    frame_name,
    load_object_array,
    relative_action,
)

RNG = np.random.default_rng(3)


def observation(t: int, gripper: float = 1.0) -> dict[str, Any]:
    """What an env returns, with every number telling when it was."""
    robot = np.zeros(15)
    robot[:3] = 0.3 + 0.005 * t, -0.2, 0.5
    robot[3:6] = 3.1 + 0.02 * t, 0.0, 1.5
    robot[5] = np.pi - 0.02 + 0.03 * t  # wraps
    robot[5] = (robot[5] + np.pi) % (2 * np.pi) - np.pi
    robot[14] = gripper
    return {
        "robot_obs": robot,
        "scene_obs": np.full(24, t / 7),
        "rgb_obs": {"rgb_static": np.full((4, 4, 3), t, np.uint8)},
        "depth_obs": {"depth_static": np.full((4, 4), t / 3, np.float32)},
    }


def write(folder: Path, lengths: tuple[int, ...], scene: str = "D") -> None:
    with DatasetWriter(folder) as writer:
        for length in lengths:
            with writer.episode(scene) as episode:
                for t in range(length):
                    episode.add(observation(t, 1.0 if t < 3 else -1.0))
                episode.annotate(1, length - 1, "open_drawer", "open the drawer")


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write(tmp_path / "training", (5, 4))
    data = Dataset(tmp_path / "training")
    np.testing.assert_array_equal(data.episodes, [[0, 4], [5, 8]])
    np.testing.assert_array_equal(np.load(tmp_path / "training" / "ep_lens.npy"), [5, 4])
    frame = data.frame(7)
    assert set(frame) == {
        *("actions", "rel_actions", "robot_obs", "scene_obs", "rgb_static", "depth_static")
    }
    np.testing.assert_array_equal(frame["robot_obs"], observation(2)["robot_obs"])
    assert (frame["rgb_static"] == 2).all()
    assert frame["depth_static"].dtype == np.float32
    notes, embeddings = data.annotations()
    assert notes == [
        Annotation(1, 4, "open_drawer", "open the drawer"),
        Annotation(6, 8, "open_drawer", "open the drawer"),
    ]
    assert embeddings.shape == (2, 1, 0)
    assert data.scenes() == {"calvin_scene_D": (0, 8)}
    window = data.window(5, 8, ["scene_obs", "actions"])
    np.testing.assert_allclose(window["scene_obs"][:, 0], np.arange(4) / 7)


def test_actions_are_calvins(tmp_path: Path) -> None:
    write(tmp_path, (5,))
    data = Dataset(tmp_path)
    for t in range(4):
        now, later = observation(t)["robot_obs"], observation(t + 1)["robot_obs"]
        frame = data.frame(t)
        np.testing.assert_array_equal(frame["actions"][:6], later[:6])
        assert frame["actions"][6] == (1.0 if t + 1 < 3 else -1.0)
        rel = frame["rel_actions"]
        np.testing.assert_allclose(rel[0], 0.005 / 0.02)
        np.testing.assert_allclose(rel[3], 0.02 / 0.05)
        np.testing.assert_allclose(rel[5], 0.03 / 0.05)  # the short way over pi
        assert not np.allclose(now[5] + 0.03, later[5]) or t != 0
    last = data.frame(4)
    np.testing.assert_array_equal(last["actions"][:6], last["robot_obs"][:6])
    np.testing.assert_array_equal(last["rel_actions"][:6], 0)


POSE = st.lists(st.floats(-3.0, 3.0), min_size=15, max_size=15).map(np.array)


@given(POSE, POSE)
def test_relative_actions_stay_in_range(now: np.ndarray, later: np.ndarray) -> None:
    rel = relative_action(now, absolute_action(later))
    assert np.abs(rel[:6]).max() <= 1.0
    assert rel[6] == later[14]
    near = now + np.clip(later, -1, 1) * ([0.019] * 3 + [0.049] * 3 + [0] * 9)
    step = relative_action(now, absolute_action(near))
    np.testing.assert_allclose(now[:3] + 0.02 * step[:3], near[:3], atol=1e-9)
    np.testing.assert_allclose(now[3:6] + 0.05 * step[3:6], near[3:6], atol=1e-9)


def test_statistics(tmp_path: Path) -> None:
    write(tmp_path, (6, 3, 4))
    data = Dataset(tmp_path)
    frames = data.window(0, 12, ["robot_obs", "scene_obs", "actions"])
    statistics = data.statistics()
    for key in ("robot_obs", "scene_obs"):
        (entry,) = statistics[key]
        assert entry["_target_"].endswith("NormalizeVector")
        np.testing.assert_allclose(entry["mean"], frames[key].mean(0), atol=1e-12)
        np.testing.assert_allclose(entry["std"], frames[key].std(0), atol=1e-7)
    np.testing.assert_array_equal(statistics["act_min_bound"], frames["actions"].min(0))
    np.testing.assert_array_equal(statistics["act_max_bound"], frames["actions"].max(0))


def test_calvins_own_code_can_read_it(tmp_path: Path) -> None:
    def embed(texts: list[str]) -> np.ndarray:
        return np.array([[[len(text), 1.0]] for text in texts], dtype=np.float32)

    with DatasetWriter(tmp_path, embed=embed) as writer, writer.episode("calvin_scene_A") as one:
        for t in range(3):
            one.add(observation(t))
        one.annotate(0, 2, "lift_red_block_table", "lift the red block")
    content = np.load(tmp_path / annotations.LANG_FILE, allow_pickle=True).item()
    assert content["language"]["ann"] == ["lift the red block"]
    assert content["language"]["task"] == ["lift_red_block_table"]
    np.testing.assert_array_equal(content["language"]["emb"], [[[18.0, 1.0]]])
    assert content["info"]["indx"] == [(0, 2)]
    scenes = np.load(tmp_path / "scene_info.npy", allow_pickle=True).item()
    assert scenes == {"calvin_scene_A": [0, 2]}


def test_a_folder_of_calvins_is_read_by_the_guarded_loader(tmp_path: Path) -> None:
    write(tmp_path, (4,))
    for twin in (annotations.LANG_TWIN, annotations.EMB_TWIN, Path("scene_info.json")):
        (tmp_path / twin).unlink()
    emb = RNG.random((2, 1, 384)).astype(np.float32)
    content = {
        "language": {"ann": ["a", "b"], "task": ["open_drawer", "turn_on_led"], "emb": emb},
        "info": {"episodes": [], "indx": [(0, 2), (np.int64(1), 3)]},
    }
    np.save(tmp_path / annotations.LANG_FILE, content)  # type: ignore[arg-type]
    data = Dataset(tmp_path)
    notes, read = data.annotations()
    assert notes == [Annotation(0, 2, "open_drawer", "a"), Annotation(1, 3, "turn_on_led", "b")]
    np.testing.assert_array_equal(read, emb)
    assert data.scenes() == {"calvin_scene_D": (0, 3)}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_pickle_protocol_of_arrays(tmp_path: Path, protocol: int) -> None:
    value = {
        "x": np.arange(6.0).reshape(2, 3),
        "names": np.array(["red", "blue"]),
        "many": np.array([1, "two", (3.0,)], dtype=object),
        "one": np.float32(0.5),
        "plain": [1, 2.5, "x", None, True, {"k": (1, 2)}],
    }
    box = np.empty((), dtype=object)
    box[()] = value
    body = pickle.dumps(box, protocol=protocol)
    # as NumPy 1 spelt it; both spellings occur in the wild
    for spelt in (body, body.replace(b"numpy._core.", b"numpy.core.")):
        with (tmp_path / "x.npy").open("wb") as file:
            np.lib.format.write_array_header_1_0(
                file, {"descr": "|O", "fortran_order": False, "shape": ()}
            )
            # protocols that frame their content break when it is shortened
            file.write(body if protocol >= 4 else spelt)
        np.testing.assert_equal(load_object_array(tmp_path / "x.npy"), value)


class Evil:
    """What a hostile annotation file would hold."""

    def __init__(self, where: str) -> None:
        self.where = where

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.where}",)


@pytest.mark.parametrize("depth", [0, 1])
def test_a_hostile_file_is_refused_and_runs_nothing(tmp_path: Path, depth: int) -> None:
    evil: Any = Evil(str(tmp_path / "owned"))
    path = tmp_path / annotations.LANG_FILE
    path.parent.mkdir()
    np.save(path, [evil, {"language": np.array([evil], dtype=object)}][depth])
    with pytest.raises(DatasetError, match=r"auto_lang_ann\.npy: holds posix\.system"):
        annotations.read_annotations(tmp_path)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    "content", [b"", b"\x93NUMPY garbage", b"\x80\x04K\x01.", annotations.npy_bytes(np.zeros(3))]
)
def test_a_damaged_file_is_one_clear_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.npy").write_bytes(content)
    with pytest.raises(DatasetError, match=r"/x\.npy: "):
        load_object_array(tmp_path / "x.npy")


class Claim:
    """An array that a pickle only claims to have."""

    def __init__(self, how: int) -> None:
        self.how = how

    def __reduce__(self):
        if self.how == 0:
            return np.ndarray, ((10**12,),)
        return np.ndarray.__reduce__(np.zeros(1))[0], (np.ndarray, (10**12,), b"b")


@pytest.mark.parametrize("how", [0, 1])
def test_an_array_that_only_claims_its_size_is_not_made(tmp_path: Path, how: int) -> None:
    (tmp_path / "x.npy").write_bytes(annotations.object_bytes({"a": Claim(how)}))
    with pytest.raises(DatasetError, match=r"/x\.npy: "):
        load_object_array(tmp_path / "x.npy")


def annotated(folder: Path, emb: Any) -> Path:
    """Two annotations with what is given as their embeddings."""
    content = {
        "language": {"ann": ["a", "b"], "task": ["open_drawer", "turn_on_led"], "emb": emb},
        "info": {"indx": [(0, 5), (3, 9)], "episodes": []},
    }
    path = folder / annotations.LANG_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(annotations.object_bytes(content))
    return path


@pytest.mark.parametrize(
    ("emb", "said"),
    [
        (None, "not CALVIN's annotations"),
        ([None, None], "embedding 0 is 'None', no vector"),
        ([np.zeros((1, 4)), None], "embedding 1 is 'None', no vector"),
        (np.array([None, None], dtype=object), "embedding 0 is 'None', no vector"),
        (["x", "y"], "embedding 0 is 'x', no vector"),
        (np.zeros((4, 1, 4)), "4 embeddings for 2 annotations"),
        (np.zeros((1, 1, 4)), "1 embeddings for 2 annotations"),
        (np.zeros((2, 1, 2, 2)), "no vector"),
        ([np.zeros(4), np.zeros(8)], "embedding 1 has 8 numbers, others have 4"),
        (np.full((2, 1, 4), np.nan), "embedding 0 is not finite"),
        ([np.zeros(4), np.array([0, 0, np.inf, 0])], "embedding 1 is not finite"),
    ],
)
def test_an_embedding_that_is_missing_or_too_many_is_refused(
    tmp_path: Path, emb: Any, said: str
) -> None:
    path = annotated(tmp_path, emb)
    with pytest.raises(DatasetError, match=re.escape(f"{path}: ")) as caught:
        annotations.read_annotations(tmp_path)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "emb", [np.ones((2, 1, 4)), np.ones((2, 4)), [np.ones(4), np.ones((1, 4))]]
)
def test_embeddings_come_as_one_vector_each(tmp_path: Path, emb: Any) -> None:
    annotated(tmp_path, emb)
    _, read = annotations.read_annotations(tmp_path)
    np.testing.assert_array_equal(read, np.ones((2, 1, 4)))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("json", b"{"),
        ("json", b"[[1, 2]]"),
        ("json", b'[[5, 2, "open_drawer", "x"]]'),
        ("json", b'[[-1, 2, "open_drawer", "x"]]'),
        ("json", b"[" * 100_000),
        ("npy", annotations.npy_bytes(np.zeros((3, 1, 4), np.float32))),
        ("npy", annotations.npy_bytes(np.full((1, 1, 4), np.nan, np.float32))),
        ("npy", b""),
        ("npy", annotations.object_bytes({})),
    ],
)
def test_damaged_twins_are_named(tmp_path: Path, name: str, content: bytes) -> None:
    one = [Annotation(0, 5, "open_drawer", "open it")]
    annotations.write_annotations(tmp_path, one, np.ones((1, 1, 4), np.float32))
    assert annotations.read_annotations(tmp_path)[0] == one
    path = tmp_path / (annotations.LANG_TWIN if name == "json" else annotations.EMB_TWIN)
    path.write_bytes(content)
    with pytest.raises(DatasetError, match=re.escape(str(path))):
        annotations.read_annotations(tmp_path)


def test_embeddings_that_are_no_numbers_are_not_written(tmp_path: Path) -> None:
    one = [Annotation(0, 5, "open_drawer", "open it")]
    with pytest.raises(DatasetError, match="not finite"):
        annotations.write_annotations(tmp_path, one, np.full((1, 1, 4), np.nan, np.float32))


def test_a_small_frame_that_unpacks_to_gigabytes_is_refused(tmp_path: Path) -> None:
    write(tmp_path, (3,))
    bomb = tmp_path / frame_name(1)
    with (
        zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as packed,
        packed.open("rgb_static.npy", "w") as member,
    ):
        for _ in range(600):
            member.write(bytes(1 << 20))
    assert bomb.stat().st_size < 1 << 20
    with pytest.raises(DatasetError, match=rf"{frame_name(1)}: would unpack to 600 MiB"):
        Dataset(tmp_path).frame(1)


@pytest.mark.parametrize("spans", [np.zeros((2, 3)), np.zeros(3), [[5, 2]], [[0.0, 3.0]]])
def test_what_is_no_index_of_episodes_is_refused(tmp_path: Path, spans: Any) -> None:
    np.save(tmp_path / "ep_start_end_ids.npy", np.asarray(spans))
    with pytest.raises(DatasetError, match=r"ep_start_end_ids\.npy: "):
        Dataset(tmp_path)


def test_a_kill_loses_only_the_episode_being_written(tmp_path: Path) -> None:
    write(tmp_path, (4, 3))
    committed = (tmp_path / "episodes.jsonl").read_bytes()
    # killed in the middle of episode 2: frames there, its log line torn
    for index in (7, 8, 9):
        (tmp_path / frame_name(index)).write_bytes(b"half a frame")
    (tmp_path / f".{frame_name(10)}.1.part").write_bytes(b"")
    (tmp_path / "episodes.jsonl").write_bytes(committed + b'{"start":7,"end":')
    with DatasetWriter(tmp_path) as writer:
        assert (writer.n_episodes, writer.n_frames) == (2, 7)
        assert not (tmp_path / frame_name(9)).exists()
        assert not list(tmp_path.glob(".*.part"))
        with writer.episode("D") as episode:
            episode.add(observation(0))
    data = Dataset(tmp_path)
    np.testing.assert_array_equal(data.episodes, [[0, 3], [4, 6], [7, 7]])
    assert (data.frame(7)["rgb_static"] == 0).all()


def add_broken(writer: DatasetWriter) -> None:
    with writer.episode("D") as one:
        one.add(observation(0))
        one.add(observation(1))
        one.add({**observation(2), "robot_obs": np.full(15, np.nan)})


def test_an_error_discards_the_episode(tmp_path: Path) -> None:
    with DatasetWriter(tmp_path) as writer:
        with pytest.raises(DatasetError, match="robot_obs"):
            add_broken(writer)
        assert writer.n_frames == 0
        assert not list(tmp_path.glob("*.npz"))
        with writer.episode("D") as one:
            one.add(observation(0))
    assert len(Dataset(tmp_path).episodes) == 1


def test_bad_input(tmp_path: Path) -> None:
    with DatasetWriter(tmp_path) as writer:
        with pytest.raises(DatasetError, match="has no frames"), writer.episode("A"):
            pass
        with writer.episode("A") as one:
            for bad in ({}, {**observation(0), "scene_obs": np.zeros(5)}):
                with pytest.raises(DatasetError, match="shape"):
                    one.add(bad)
            one.add(observation(0))
            with pytest.raises(DatasetError, match="frames 0 to 1 of 1"):
                one.annotate(0, 1, "open_drawer", "open")
            with pytest.raises(ValueError, match="task: 'fly'"):
                one.annotate(0, 0, "fly", "fly")
            with pytest.raises(DatasetError, match="not finished"), writer.episode("A"):
                pass
        with writer.episode("B") as one:
            one.add(observation(0))
        with pytest.raises(DatasetError, match="scene: A again"), writer.episode("A"):
            pass
    assert Dataset(tmp_path).scenes() == {"calvin_scene_A": (0, 0), "calvin_scene_B": (1, 1)}
    with pytest.raises(DatasetError, match=r"episode_0000002\.npz: no such file"):
        Dataset(tmp_path).frame(2)
    (tmp_path / frame_name(1)).write_bytes(b"PK damaged")
    with pytest.raises(DatasetError, match=frame_name(1)):
        Dataset(tmp_path).frame(1)
    with pytest.raises(DatasetError, match=r"ep_start_end_ids\.npy"):
        Dataset(tmp_path / "nowhere")


def test_somebody_elses_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / frame_name(5)).write_bytes(b"precious")
    with pytest.raises(DatasetError, match="refusing to write"):
        DatasetWriter(tmp_path)
    assert (tmp_path / frame_name(5)).read_bytes() == b"precious"
