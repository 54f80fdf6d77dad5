"""Generated scenes: the same at every call, within A to C's limits, far from D, and they work."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from openhelix.benchmarks.calvin import geometry, urdf
from openhelix.benchmarks.calvin.appearance import Appearance
from openhelix.benchmarks.calvin.calvin_env import CalvinEnv
from openhelix.benchmarks.calvin.cameras import CAMERAS, SceneRenderer
from openhelix.benchmarks.calvin.collect import CollectConfig
from openhelix.benchmarks.calvin.env import PlayTableEnv
from openhelix.benchmarks.calvin.evaluate_experts import evaluate_starts
from openhelix.benchmarks.calvin.frames import MOST_RANDOM_UNITS, first_episode
from openhelix.benchmarks.calvin.scene import (
    BULB_RADIUS,
    DOOR_X,
    LED_HALF_X,
    MOST_SCENES,
    SCENES,
    SWITCH_HALF_X,
    Scene,
    SceneError,
    fits,
    get_scene,
    layout_distance,
    layout_vector,
    nearest_allowed,
    random_scene,
    scene_names,
    written,
)
from openhelix.benchmarks.calvin.sequences import get_layout, get_sequences, initial_state
from openhelix.benchmarks.calvin.starts import begin, home
from openhelix.benchmarks.evaluation.suites import Suite, SuiteError

MANY = [random_scene(number) for number in range(500)]


def mirrored(scene: Scene) -> Scene:
    """The same furniture, left and right exchanged."""
    return replace(
        scene,
        slide_x=scene.slide_travel - DOOR_X - scene.slide_x,
        **{name: -getattr(scene, name) for name in ("drawer_x", "button_x", "switch_x", "plank_x")},
    )


def test_a_number_is_a_scene_in_every_process() -> None:
    code = (
        "from openhelix.benchmarks.calvin.scene import get_scene; import sys;"
        "print(get_scene('R41')); assert 'numba' not in sys.modules"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True
    )
    assert run.stdout.strip() == str(random_scene(41)) == str(get_scene("R41"))
    assert len({replace(scene, name="") for scene in MANY}) == len(MANY)


def test_no_scene_comes_near_the_held_out_layout() -> None:
    limit = nearest_allowed()
    assert limit == min(layout_distance(SCENES[name], SCENES["D"]) for name in "ABC") > 0.18
    assert min(layout_distance(scene, SCENES["D"]) for scene in MANY) > limit
    # Not an empty promise: the limits that A to C set would allow D's own neighbourhood.
    near_d = replace(SCENES["D"], drawer_x=0.17, switch_x=0.31, button_x=-0.15)
    assert fits(near_d) and layout_distance(near_d, SCENES["D"]) < 0.04


@pytest.mark.parametrize("name", ["A", "B", "C"])
def test_training_scenes_and_their_mirror_images_are_within_the_limits(name: str) -> None:
    """What is generated spans A to C and, but for the drawer, each one's mirror image.

    A drawer on the left would run into the arm's foot.
    """
    vectors = np.array([layout_vector(scene) for scene in MANY])
    for scene in (SCENES[name], replace(mirrored(SCENES[name]), drawer_x=0.1)):
        assert fits(scene)
        vector = layout_vector(scene)
        assert (vector >= vectors.min(axis=0) - 0.012).all()
        assert (vector <= vectors.max(axis=0) + 0.012).all()


def test_every_colour_has_every_size_and_place_in_the_order() -> None:
    longest = Counter(max(scene.block_lengths, key=lambda b: b[1])[0] for scene in MANY)
    first = Counter(scene.blocks[0] for scene in MANY)
    left = sum(scene.plank_x < 0 for scene in MANY)
    for counts in (longest, first):
        assert len(counts) == 3 and min(counts.values()) > 100
    assert 150 < left < 350


def test_nothing_that_is_built_in_stands_in_the_way_of_anything_else() -> None:
    for scene in MANY:
        places = {joint.link: joint.origin[0] for joint in geometry.joints(scene)}
        cabinet = scene.plank_x + np.array([-1, 1]) * geometry.CABINET_HALF_X
        door = (scene.slide_x - scene.slide_travel, scene.slide_x + DOOR_X)
        switch = scene.switch_x + np.array([-1, 1]) * SWITCH_HALF_X
        assert switch[1] < min(door[0], cabinet[0]) or switch[0] > max(door[1], cabinet[1])
        apart = abs(places["led_link"] - places["light_link"])
        assert apart > LED_HALF_X + BULB_RADIUS
        for piece in geometry.pieces(scene):
            x = piece.vertices[:, 0] + places.get(piece.link, 0.0)
            assert np.abs(x).max() <= geometry.HALF_X + 1e-9
        table = dict(scene.surfaces)["table"].x
        assert table[1] - table[0] > 0.26
        assert max(table[0] - scene.button_x, scene.button_x - table[1]) > 0.06
        for side in ("slider_left", "slider_right"):
            low, high = dict(scene.surfaces)[side].x
            assert cabinet[0] < low < high - 0.05 and high < cabinet[1]


def test_names() -> None:
    assert scene_names("ABC") == ("A", "B", "C")
    assert scene_names("R17") == scene_names("random:17") == ("R17",)
    assert scene_names("random:3-5") == scene_names("R3-R5") == ("R3", "R4", "R5")
    assert scene_names("AB,random:0-1,D") == ("A", "B", "R0", "R1", "D")
    for text in ("ABC", "D", "R17", "ABC,R0-R199", "R1,R3-R4,A,R7"):
        assert written(scene_names(text)) == text
    assert get_scene("calvin_scene_R5") is get_scene("R5")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no choice of scenes"),
        ("ABE", "no choice of scenes"),
        ("AA", "names a scene twice"),
        ("random:0-3,R2", "names a scene twice"),
        ("random:9-3", "no range of generated scenes"),
        (f"R{MOST_SCENES}", "they are R0 to R99999"),
        ("random:", "no choice of scenes"),
    ],
)
def test_bad_names(text: str, says: str) -> None:
    with pytest.raises(SceneError, match=says):
        scene_names(text)


@pytest.mark.parametrize("name", ["R", "R-1", "R01", "r3", "R100000"])
def test_bad_single_names(name: str) -> None:
    with pytest.raises(SceneError, match="is not one of A, B, C, D, nor R0"):
        get_scene(name)


def test_calvin_env_does_not_have_them() -> None:
    with pytest.raises(SceneError, match="calvin_env has no R3, only A, B, C and D"):
        CalvinEnv("R3")
    with pytest.raises(SuiteError, match="--scene: R3 needs playtable"):
        Suite("tasks", world="calvin", scenes=("R3",))


def test_collections_take_them(tmp_path) -> None:
    config = CollectConfig(scenes="ABC,random:0-2", out=tmp_path)
    assert config.scene_list == ("A", "B", "C", "R0", "R1", "R2")
    assert CollectConfig(scenes="random:0-199", per_task=1).folder.name == "demonstrations_R0-R199"
    assert "generated" not in CollectConfig(scenes="ABC").identity()
    first, second = (CollectConfig(scenes=s).identity()["generated"] for s in ("R0", "R0-R1"))
    assert len(first) == 16 and first != second
    with pytest.raises(ValueError, match="per_task: 101 of a generated scene; at most 100"):
        CollectConfig(scenes="R0", per_task=MOST_RANDOM_UNITS + 1)


def test_episode_numbers_do_not_meet_and_fit_31_bits() -> None:
    ends = [first_episode(s, n) for s in "ABCD" for n in (0, 99_999)]
    ends += [first_episode(s, n) for s in ("R0", "R1", "R99999") for n in (0, 99)]
    assert ends == sorted(set(ends)) and ends[-1] + 99 < 2**31


@pytest.mark.parametrize("number", [0, 1, 2, 3])
def test_an_episode_of_the_evaluation_starts_at_rest(number: int) -> None:
    """CALVIN's symbolic starts, put into a generated scene, lie where they say."""
    scene = random_scene(number)
    layout = get_layout(scene.name)
    assert tuple(f"block_{colour}" for colour in layout.order) == scene.blocks
    with PlayTableEnv(scene, cameras=()) as env:
        for state, _ in get_sequences(12):
            robot_obs, scene_obs = initial_state(state, scene.name)
            env.reset(robot_obs, scene_obs)
            before = env.get_state_obs()["scene_obs"]
            for _ in range(10):
                env.advance((env.robot.tcp()[0], env.robot.tcp()[1], 1))
            after = env.get_state_obs()["scene_obs"]
            np.testing.assert_allclose(after[:6], before[:6], atol=1e-3)
            np.testing.assert_allclose(after[6:], before[6:], atol=6e-3)  # m and rad


def test_the_cameras_say_where_they_are() -> None:
    """Points of both cameras' depth lie on the table top, wherever the cameras were put."""
    for number in range(4):
        with PlayTableEnv(f"R{number}") as env:
            frames = env.render_frames()
            seen = []
            for frame in frames.values():
                points = frame.points()[frame.segmentation == 5]
                near = np.abs(points[:, 2] - 0.44) < 0.01
                top = points[near & (points[:, 1] > -0.17) & (points[:, 1] < 0.0)]
                seen.append(len(top))
                assert (np.abs(top[:, 2] - 0.44) < 1e-4).mean() > 0.95  # but for the button's foot
            assert min(seen) > 200
            static = frames["static"]
            assert not np.allclose(static.K, CAMERAS["static"].K)
            button = static.T_world_cam[:3, :3].T @ (
                np.array([env.scene.button_x, -0.12, 0.46]) - static.T_world_cam[:3, 3]
            )
            u, v, w = static.K @ button
            assert 0 < u / w < 200 and 0 < v / w < 200


def test_looks_are_the_scenes_own_and_free_of_noise() -> None:
    looks = [Appearance.of(f"R{number}") for number in range(40)]
    assert len(set(looks)) == 40 and all(look.rgb_noise == 0 for look in looks)
    assert len({look.crosswise for look in looks}) == 4
    other = Appearance.random(5, "R3")
    assert other.crosswise == looks[3].crosswise and other.wood != looks[3].wood
    renderer = SceneRenderer("R3", ["static"])
    with PlayTableEnv("R3", cameras=()) as env:
        state = env.visual_state()
    along = renderer.render(state)["static"].rgb
    flipped = (not looks[3].crosswise[0], looks[3].crosswise[1])
    renderer.set_appearance(replace(looks[3], crosswise=flipped))
    across = renderer.render(state)["static"].rgb
    assert np.abs(along.astype(int) - across).mean() > 1.0


def test_friction_and_the_arms_rest_are_the_scenes_own() -> None:
    """A pushed block slides farther where the scene is smoother."""
    slid = []
    smooth, rough = (
        replace(random_scene(3), variant=replace(random_scene(3).variant, **friction))
        for friction in (
            {"block_friction": 0.6, "table_friction": 0.4},
            {"block_friction": 0.8, "table_friction": 0.6},
        )
    )
    for scene in (smooth, rough):
        with PlayTableEnv(scene, cameras=()) as env:
            name, table = scene.blocks[0], dict(scene.surfaces)["table"].x
            start = np.array([sum(table) / 2, -0.09, 0.46])
            env.world.set_block_pose(name, start, (0, 0, 0, 1))
            env.world.set_block_velocity(name, (0.0, 0.4, 0.0))
            for _ in range(40):
                env.world.substep()
            slid.append(env.world.block_pose(name)[0][1] - start[1])
    assert slid[0] > 1.2 * slid[1] > 0.0
    rests = np.array([home(scene)[7:14] for scene in MANY[:50]])
    assert (rests.std(axis=0) > 0.02).all()
    np.testing.assert_array_equal(home(SCENES["A"])[7:14], home(SCENES["D"])[7:14])


@pytest.mark.parametrize("support", ["box", "hull", "mesh"])
def test_blocks_rest_on_every_kind_of_support(support: str) -> None:
    scene = random_scene(6)
    scene = replace(scene, variant=replace(scene.variant, support=support))
    with PlayTableEnv(scene, cameras=()) as env:
        name, heights = scene.blocks[1], []
        for place, z in ((dict(scene.surfaces)["table"], 0.46), (None, 0.461)):
            x = sum(place.x) / 2 if place else scene.plank_x + 0.2
            env.world.set_block_pose(name, (x, -0.09 if place else 0.09, z), (0, 0, 0.2, 0.98))
            for _ in range(60):
                env.world.substep()
            heights.append(env.world.block_pose(name)[0][2])
            link = -1 if place else 6
            assert (env.world.table, link) in {
                (c[2], c[4]) for c in env.world.contacts(env.world.blocks[name])
            }
        np.testing.assert_allclose(heights, (0.46, 0.461), atol=5e-4)


def test_generated_fingers_hold_a_block_and_are_not_all_alike() -> None:
    assert {scene.variant.support for scene in MANY} == {"box", "hull", "mesh"}
    assert len({urdf.panda_urdf(scene.variant.tip_bulge_m) for scene in MANY[:20]}) > 8
    assert urdf.panda_urdf(0.0) == urdf.panda_urdf()
    for support in ("hull", "mesh"):
        scene = next(scene for scene in MANY if scene.variant.support == support)
        steps = evaluate_starts(scene.name, "lift_blue_block_table", 3, 0, 2, disturb=False)
        assert max(steps) > 0


def test_starts_are_found_and_equal_for_equal_seeds() -> None:
    with PlayTableEnv("R7", cameras=()) as env:
        states = []
        for _ in range(2):
            begin(env, "place_in_slider", np.random.default_rng(5))
            states.append(env.visual_state())
    np.testing.assert_array_equal(*states)


@pytest.mark.parametrize(
    ("scene", "task"),
    [
        ("R0", "turn_on_lightbulb"),
        ("R1", "move_slider_left"),
        ("R2", "lift_red_block_table"),
        ("R3", "turn_on_led"),
        ("R4", "open_drawer"),
        ("R5", "turn_off_lightbulb"),
    ],
)
def test_experts_do_their_tasks_there(scene: str, task: str) -> None:
    steps = evaluate_starts(scene, task, 7, 0, 3, disturb=False)
    assert sum(step > 0 for step in steps) >= 2
