"""CALVIN's layout as it is found: every variant is read, whatever is wrong is named."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from scipy.spatial.transform import Rotation

from openhelix.benchmarks.calvin import dataset as layout
from openhelix.benchmarks.calvin.cameras import CAMERAS, SceneRenderer, camera_matrices
from openhelix.benchmarks.calvin.dataset import Annotation, cameras_bytes, object_bytes
from openhelix.benchmarks.calvin.env import PlayTableEnv
from openhelix.benchmarks.calvin.scene import get_scene
from openhelix.benchmarks.calvin.tasks import TASK_NAMES
from openhelix.benchmarks.data.calvin_layout import CalvinSource
from openhelix.benchmarks.data.inspect import as_text, report
from openhelix.benchmarks.data.source import DataError, open_source
from tests.data.small import (
    GRIPPER_PX,
    OPEN,
    STATIC_PX,
    annotate,
    as_published,
    change_frame,
    observation,
    write_split,
)


@pytest.fixture
def split(tmp_path: Path) -> Path:
    return as_published(write_split(tmp_path / "task_A_A" / "training"))


def test_a_published_split_is_read(split: Path) -> None:
    for path in (split, split.parent):  # the split, or the folder around it
        source = open_source(path)
        assert isinstance(source, CalvinSource) and source.path == split
    np.testing.assert_array_equal(source.spans, [[0, 29], [30, 59]])
    assert [(s.first, s.last, s.task, s.scene) for s in source.segments] == [
        (0, 19, "open_drawer", "A"), (10, 28, "turn_on_led", "A"), (30, 49, "open_drawer", "A"),
    ]  # fmt: skip
    assert source.tasks == TASK_NAMES and source.problems() == []
    assert [(c.name, c.height, c.depth, c.posed, c.mount) for c in source.cameras] == [
        ("static", STATIC_PX, True, True, "world"), ("gripper", GRIPPER_PX, True, True, "hand"),
    ]  # fmt: skip


def test_poses_actions_and_units(split: Path) -> None:
    motion = open_source(split).motion(10, 13)
    now, later = observation(11)["robot_obs"], observation(12)["robot_obs"]
    np.testing.assert_allclose(motion.proprio[1, :3], now[:3], atol=1e-6)
    turned = Rotation.from_euler("xyz", now[3:6]) * Rotation.from_quat(motion.proprio[1, 3:7]).inv()
    assert turned.magnitude() < 1e-6
    np.testing.assert_allclose(motion.proprio[:, 7], 0.08, atol=1e-6)
    assert motion.proprio[:, 8].tolist() == [1, 1, 0, 0]  # as last commanded
    np.testing.assert_allclose(motion.targets[1, :3], later[:3], atol=1e-6)
    assert motion.targets[:, 7].tolist() == [1, 0, 0, 0]  # as commanded next
    np.testing.assert_allclose(motion.relative[0], [0.2, 0, 0, 0, 0, -0.2, 1], atol=1e-6)


def test_relative_actions_are_worked_out_where_they_are_missing(split: Path) -> None:
    with_them = open_source(split).motion(0, 19).relative
    for index in range(60):
        change_frame(split, index, rel_actions=None)
    source = open_source(split)
    np.testing.assert_allclose(source.motion(0, 19).relative, with_them, atol=1e-6)
    assert "missing" in source.facts["relative"]


def test_depth_becomes_points_where_calvins_camera_saw_them(split: Path) -> None:
    """The middle of the static image, 3.9 m away, lies beyond what the camera looks at."""
    view = next(open_source(split).views([3], ["static"]))["static"]
    ahead = view.T_world_cam @ np.array([0, 0, 3.9, 1.0])
    eye, target = view.T_world_cam[:3, 3], np.array([-0.026242351, -0.030232988, 0.39200005])
    along = (target - eye) / np.linalg.norm(target - eye)
    np.testing.assert_allclose(ahead[:3], eye + 3.9 * along, atol=1e-6)
    assert view.K[0, 0] == pytest.approx(STATIC_PX / 2 / np.tan(np.radians(5)))


def test_the_camera_on_the_hand_is_where_the_simulator_has_it(tmp_path: Path) -> None:
    with PlayTableEnv("B", cameras=()) as env:
        state, robot = env.visual_state(), env.get_obs()["robot_obs"]
    split = write_split(tmp_path, ((OPEN,),))
    change_frame(split, 0, robot_obs=robot)
    view = next(open_source(split).views([0], ["gripper"]))["gripper"]
    want = SceneRenderer("B", ["gripper"]).pose_at("gripper", state)
    np.testing.assert_allclose(view.T_world_cam, want, atol=2e-3)
    own = np.eye(4)
    own[:3, 3] = 1, 2, 3
    for index in range(30):  # as a camera that moves by itself is told
        change_frame(split, index, pose_gripper=own)
    view = next(open_source(split).views([0], ["gripper"]))["gripper"]
    np.testing.assert_array_equal(view.T_world_cam, own)


def test_cameras_are_read_from_the_recorded_configuration(split: Path) -> None:
    told = {
        "static": {
            "fov": 20, "width": STATIC_PX, "height": STATIC_PX,
            "look_from": [1, 0, 1], "look_at": [0, 0, 0], "up_vector": [0, 0, 1],
        },
        "gripper": {"fov": 60, "width": GRIPPER_PX, "height": GRIPPER_PX},
    }  # fmt: skip
    place = split / ".hydra" / "merged_config.yaml"
    place.parent.mkdir()
    place.write_text(yaml.safe_dump({"cameras": told}))
    source = open_source(split)
    view = next(source.views([0], ["static", "gripper"]))
    np.testing.assert_allclose(view["static"].T_world_cam[:3, 3], [1, 0, 1])
    assert view["static"].K[0, 0] == pytest.approx(STATIC_PX / 2 / np.tan(np.radians(10)))
    assert view["gripper"].K[0, 0] == pytest.approx(GRIPPER_PX / 2 / np.tan(np.radians(30)))
    assert source.facts["camera matrices"] == str(place) and place in source.index_files()
    place.write_text(yaml.safe_dump({"cameras": told | {"static": {"width": 9, "height": 9}}}))
    with pytest.raises(DataError, match=r"rgb_static: 40 x 40, .*merged_config.yaml says 9 x 9"):
        open_source(split)
    place.write_text("cameras: [")
    with pytest.raises(DataError, match=re.escape(f"{place}: cameras: cannot be read")):
        open_source(split)


def test_camera_matrices_beside_the_data_differ_by_scene(tmp_path: Path) -> None:
    matrices = {name: camera_matrices(get_scene(name)) for name in ("A", "R3", "B")}
    for cameras in matrices.values():
        for name, px in (("static", STATIC_PX), ("gripper", GRIPPER_PX)):
            cameras[name] |= {"height": px, "width": px}
    split = write_split(tmp_path, ((OPEN,), (OPEN,)))
    scenes = {"calvin_scene_A": [0, 29], "calvin_scene_R3": [30, 59]}
    (split / "scene_info.npy").write_bytes(object_bytes(scenes))
    (split / layout.CAMERAS_FILE).write_bytes(cameras_bytes(matrices))
    source = open_source(split)
    for scene, frame in (("A", 0), ("R3", 30)):
        view = next(source.views([frame], ["static"]))["static"]
        want = matrices[scene]["static"]
        np.testing.assert_allclose(view.T_world_cam, want["T_world_cam"])
        np.testing.assert_allclose(view.K, want["K"])
    assert set(CAMERAS) == {c.name for c in source.cameras}


@pytest.mark.parametrize("emb", [None, [], np.ones((3, 1, 384), np.float32)])
def test_annotations_come_with_embeddings_or_without(tmp_path: Path, emb: object) -> None:
    split = as_published(write_split(tmp_path), emb=emb)
    assert len(open_source(split).segments) == 3


def test_annotations_of_other_language_models_stand_in(split: Path) -> None:
    for name in ("lang_paraphrase-MiniLM-L3-v2", "lang_BERT"):
        shutil.copytree(split / "lang_annotations", split / name)
    shutil.rmtree(split / "lang_annotations")
    source = open_source(split)
    assert len(source.segments) == 3
    assert isinstance(source, CalvinSource) and source.language.parent.name == "lang_BERT"


def test_annotations_that_were_written_later_win_over_the_plain_copy(tmp_path: Path) -> None:
    split = write_split(tmp_path)
    assert len(open_source(split).segments) == 3
    annotate(split, [Annotation(0, 9, "open_drawer", "again")])
    assert [s.text for s in open_source(split).segments] == ["again"]


def test_a_split_without_annotations_is_told(split: Path) -> None:
    shutil.rmtree(split / "lang_annotations")
    assert "no annotations" in open_source(split).problems()[0]
    annotated = as_published(write_split(split.parent / "other"))
    annotate(annotated, [])
    assert open_source(annotated).segments == ()


def test_frames_missing_at_the_end_of_an_episode_are_left_away(split: Path) -> None:
    for index in (27, 28, 29):
        (split / layout.frame_name(index)).unlink()
    source = open_source(split)
    np.testing.assert_array_equal(source.spans, [[0, 26], [30, 59]])
    assert "episode_0000027.npz: missing at the end of an episode, 3 frames" in source.problems()[0]
    source.check(0)
    with pytest.raises(DataError, match=r"indx\[1\]: frames 10 to 28; .* frames end with 26"):
        source.check(1)


def test_the_debug_split_begins_late_and_knows_of_more_than_it_has(tmp_path: Path) -> None:
    split = as_published(write_split(tmp_path, ((OPEN,),)))
    for index in range(29, -1, -1):
        (split / layout.frame_name(index)).rename(split / layout.frame_name(358482 + index))
    np.save(split / "ep_start_end_ids.npy", [[358482, 358511]])
    (split / "scene_info.npy").write_bytes(object_bytes({"calvin_scene_D": [0, 611098]}))
    annotate(split, [Annotation(358482, 358501, "open_drawer", "open it")])
    source = open_source(split)
    assert source.problems() == [] and source.segments[0].scene == "D"
    assert len(source.motion(358482, 358501)) == 20


def test_holes_and_strangers_are_found(split: Path) -> None:
    (split / layout.frame_name(40)).unlink()
    (split / layout.frame_name(59)).rename(split / layout.frame_name(99))
    np.save(split / "ep_lens.npy", [30, 31])
    said = "\n".join(open_source(split).problems())
    assert "episode_0000040.npz: missing inside an episode" in said
    assert "1 frames are in no episode" in said and "ep_lens.npy: are not the lengths" in said


def bad_action(index: int) -> np.ndarray:
    action = np.zeros(7)
    action[6], action[index] = 1.0, np.nan
    return action


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"actions": bad_action(2)}, "actions[2]: nan, must be finite"),
        ({"rel_actions": bad_action(4)}, "rel_actions[4]: nan, must be finite"),
        ({"robot_obs": np.zeros(14)}, "robot_obs: float64(14,), must be (15,) numbers"),
        ({"actions": np.array([0, 0, 0, 0, 0, 0, 0.5])}, "actions[6]: 0.5, must be -1 (closed) or"),
        ({"actions": None}, "no actions"),
        ({"rgb_static": np.zeros((9, 9, 3), np.uint8)}, "rgb_static: uint8(9, 9, 3), must be"),
        ({"rgb_gripper": np.zeros((20, 20, 3))}, "rgb_gripper: float64(20, 20, 3), must be"),
        ({"depth_static": np.zeros((40, 40), np.uint16)}, "depth_static: uint16(40, 40), must be"),
        ({"depth_gripper": None}, "no depth_gripper"),
    ],
)
def test_a_bad_frame_is_one_line_with_file_and_field(split: Path, changes: dict, said: str) -> None:
    place = change_frame(split, 5, **changes)
    source = open_source(split)

    def read() -> None:
        source.motion(0, 19)
        list(source.views([0, 5], ["static", "gripper"]))

    with pytest.raises(DataError, match=re.escape(f"{place}: {said}")) as caught:
        read()
    assert "\n" not in str(caught.value)


def test_depth_in_millimetres_is_refused(split: Path) -> None:
    change_frame(split, 0, depth_static=np.full((40, 40), 3900.0, np.float32))
    with pytest.raises(DataError, match="depth_static: median 3900, CALVIN's is in metres"):
        open_source(split)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("ep_start_end_ids.npy", None, "ep_start_end_ids.npy: no such file"),
        ("ep_start_end_ids.npy", np.zeros((0, 2), int), "ep_start_end_ids.npy: lists no episode"),
        ("ep_start_end_ids.npy", [[0, 29], [20, 59]], "ep_start_end_ids.npy: episodes overlap"),
        ("ep_start_end_ids.npy", [[0, 29], [900, 999]], "row 1: frames 900 to 999, none of which"),
        ("scene_info.npy", [1, 2], "scene_info.npy: cannot be read"),
        ("lang_annotations/auto_lang_ann.npy", [1], "auto_lang_ann.npy: is an array"),
    ],
)
def test_a_bad_index_is_named(split: Path, name: str, content: object, said: str) -> None:
    (split / name).unlink()
    if content is not None:
        np.save(split / name, np.asarray(content))
    with pytest.raises(DataError, match=re.escape(said)) as caught:
        _ = open_source(split).segments
    assert "\n" not in str(caught.value)


def test_nothing_and_something_else_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder or file"):
        open_source(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"no layout that is known \(calvin"):
        open_source(tmp_path)
    with pytest.raises(DataError, match="reader: no reader 'calvim'; did you mean 'calvin'"):
        open_source(tmp_path, "calvim")


def test_a_report_says_what_is_there_and_what_is_wrong(split: Path, tmp_path: Path) -> None:
    change_frame(split, 35, actions=bad_action(0))
    found = report(open_source(split), 0, tmp_path / "strip.png")
    assert (found["episodes"], found["frames"], found["segments"]) == (2, 60, 3)
    assert found["tasks"]["open_drawer"] == {"segments": 2, "for_example": "open the drawer"}
    assert found["positions_m"]["x"] == pytest.approx([0.104, 0.216], abs=1e-4)
    assert found["gripper"]["width_m"] == [0.08, 0.08]
    assert found["looked_at"] == 39 and found["n_problems"] == 1
    assert "episode_0000035.npz: actions[0]: nan" in found["problems"][0]
    assert (tmp_path / "strip.png").stat().st_size > 1000
    text = as_text(found)
    assert "turn_on_led: 'press the button'" in text and "-1 closed, 1 open" in text
