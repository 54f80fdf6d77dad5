"""What the cameras show: geometry to the millimetre, the same bits, in any process."""

from __future__ import annotations

import numpy as np
import pybullet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from openhelix.benchmarks.calvin.appearance import Appearance
from openhelix.benchmarks.calvin.calvin_env import CalvinEnv
from openhelix.benchmarks.calvin.cameras import (
    BEHIND_M,
    CAMERAS,
    PAD_PIXELS,
    PAD_VIEW_M,
    STATIC_EYE,
    STATIC_TARGET,
    STATIC_UP,
    SceneRenderer,
    dent_image,
)
from openhelix.benchmarks.calvin.env import PlayTableEnv
from openhelix.benchmarks.calvin.meshes import TABLE_ID, link_transforms, scene_visuals, segment_id
from openhelix.benchmarks.calvin.scene import SCENES
from openhelix.benchmarks.calvin.urdf import PAD_HI, PAD_LO
from tests.calvin.helpers import ROBOT_OBS, scene_obs

BLOCK_IDS = (2, 3, 4)


@pytest.fixture(scope="module")
def env():
    with PlayTableEnv("D") as made:
        yield made


def seen(frame, segment):
    return frame.segmentation == segment


@pytest.mark.parametrize("camera", sorted(CAMERAS))
def test_points_lie_on_the_table_top(env, camera):
    env.reset(ROBOT_OBS, scene_obs())
    frame = env.render_frames()[camera]
    points, eye = frame.points(), frame.T_world_cam[:3, 3]
    # Where each pixel's ray meets the plane of the table top, whatever the depth says.
    rays = points - eye
    x, y, _ = np.moveaxis(eye + rays * ((0.44 - eye[2]) / rays[..., 2])[..., None], -1, 0)
    # Inside the front part, away from the button's ring, the table can only be its top.
    inside = (np.abs(x) < 0.43) & (y > -0.17) & (y < 0.0) & (np.abs(x + 0.12) > 0.06)
    top = seen(frame, segment_id(TABLE_ID)) & inside & (rays[..., 2] < 0)
    assert top.sum() > 500
    assert np.abs(points[top][:, 2] - 0.44).max() < 0.002


def test_points_of_a_block_fill_its_box(env):
    env.reset(ROBOT_OBS, scene_obs())
    frame = env.render_frames()["static"]
    position, quaternion = env.world.block_pose("block_red")
    points = frame.points()[seen(frame, BLOCK_IDS[0])] - position
    yaw = 2 * np.arctan2(quaternion[2], quaternion[3])
    turn = np.array([[np.cos(yaw), np.sin(yaw)], [-np.sin(yaw), np.cos(yaw)]])
    flat = points[:, :2] @ turn.T
    assert len(points) > 100
    assert (np.abs(flat) <= np.array([0.028, 0.02]) + 0.001).all()
    assert np.abs(points[:, 2]).max() <= 0.021
    assert points[:, 2].max() > 0.019


@given(st.integers(0, 199), st.integers(0, 199))
@settings(max_examples=40, deadline=None)
def test_a_lifted_pixel_projects_back_onto_itself(row, column):
    frame = _static_frame()
    point = np.append(frame.points()[row, column], 1.0)
    camera = np.linalg.inv(frame.T_world_cam) @ point
    u, v, _ = frame.K @ camera[:3] / camera[2]
    assert (u, v) == pytest.approx((column + 0.5, row + 0.5), abs=1e-3)


_CACHE: list = []


def _static_frame():
    if not _CACHE:
        with PlayTableEnv("D", cameras=("static",)) as env:
            _CACHE.append(env.render_frames()["static"])
    return _CACHE[0]


def test_arm_stands_where_physics_says(env):
    env.reset(ROBOT_OBS, scene_obs(slide=0.2, drawer=0.15, switch=0.05))
    for _ in range(5):
        env.step([1, 0.5, -0.5, 0.2, 0.3, 1, -1])
    visuals = scene_visuals(env.scene)
    T = link_transforms(visuals, env.visual_state())
    tcp = T[visuals.arm[-1].child]
    world = env.world
    state = pybullet.getLinkState(
        world.robot, world.tcp, computeForwardKinematics=1, physicsClientId=world.client
    )
    np.testing.assert_allclose(tcp[:3, 3], state[4], atol=1e-6)
    x, y, z, w = state[5]
    forward = [2 * (x * z + y * w), 2 * (y * z - x * w), 1 - 2 * (x * x + y * y)]
    np.testing.assert_allclose(tcp[:3, 2], forward, atol=1e-6)


def test_gripper_camera_moves_with_the_hand_and_the_static_one_stays(env):
    env.reset(ROBOT_OBS, scene_obs())
    before = env.render_frames()
    for _ in range(4):
        env.step([0, 0, 1, 0, 0, 0, 1])
    after = env.render_frames()
    assert (before["static"].T_world_cam == after["static"].T_world_cam).all()
    rise = after["gripper"].T_world_cam[2, 3] - before["gripper"].T_world_cam[2, 3]
    assert rise == pytest.approx(env.robot.tcp()[0][2] - ROBOT_OBS[2], abs=2e-3)


def test_another_renderer_draws_the_same_bits_from_the_state_vector(env):
    env.reset(ROBOT_OBS, scene_obs(drawer=0.1, led=1))
    state = env.visual_state()
    wanted = env.render_frames()
    other = SceneRenderer("D", ("gripper", "static"))
    found = other.render(np.frombuffer(state.tobytes()))
    for name, frame in wanted.items():
        for field in ("rgb", "depth", "segmentation", "K", "T_world_cam"):
            assert (getattr(frame, field) == getattr(found[name], field)).all()


def test_lights_blocks_and_drawer_show_in_the_picture(env):
    env.reset(ROBOT_OBS, scene_obs())
    off = env.render_frames()["static"]
    env.reset(ROBOT_OBS, scene_obs(led=1, bulb=1, switch=0.088, drawer=0.2))
    on = env.render_frames()["static"]
    led, bulb = seen(on, segment_id(TABLE_ID, 4)), seen(on, segment_id(TABLE_ID, 5))
    assert off.rgb[led].std(axis=1).max() < 2  # white
    assert on.rgb[led][:, 1].min() > 100
    assert on.rgb[led][:, [0, 2]].max() == 0
    assert on.rgb[bulb][:, :2].min() > 100
    assert on.rgb[bulb][:, 2].max() == 0
    drawer = segment_id(TABLE_ID, 3)
    assert seen(on, drawer).sum() > 2 * seen(off, drawer).sum()
    red = on.rgb[seen(on, BLOCK_IDS[0])]
    assert red[:, 0].min() > 100
    assert red[:, 1:].max() == 0


def test_camera_frames_carry_time_and_geometry(env):
    frames = env.camera_frames(123)
    assert set(frames) == {"static", "gripper"}
    for name, frame in frames.items():
        assert frame.t_ns == 123
        size = CAMERAS[name].size
        assert frame.K[0, 2] == frame.K[1, 2] == size / 2
        rotation = frame.T_world_cam[:3, :3]
        np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-12)
        assert np.linalg.det(rotation) == pytest.approx(1.0)


def test_scenes_differ_in_wood_and_layout():
    means = {}
    for name in SCENES:
        with PlayTableEnv(name, cameras=("static",)) as env:
            env.reset(ROBOT_OBS, scene_obs())
            frame = env.render_frames()["static"]
        means[name] = frame.rgb[seen(frame, segment_id(TABLE_ID))].mean(axis=0)
    brightness = {name: mean.sum() for name, mean in means.items()}
    assert brightness["B"] > brightness["D"] > brightness["A"]
    assert means["A"][0] / means["A"][1] > means["D"][0] / means["D"][1]  # A is redder
    assert min(np.abs(means[a] - means[b]).max() for a in means for b in means if a < b) > 5


def test_appearance_changes_colours_and_never_geometry(env):
    env.reset(ROBOT_OBS, scene_obs())
    state, plain = env.visual_state(), env.render_frames()["static"]
    look = Appearance.random(5, "D")
    renderer = SceneRenderer("D", ("static",), look)
    first, again = (renderer.render(state)["static"] for _ in range(2))
    assert (first.rgb == again.rgb).all()
    assert np.abs(first.rgb.astype(int) - plain.rgb).mean() > 5
    shift = np.linalg.norm(first.T_world_cam[:3, 3] - plain.T_world_cam[:3, 3])
    assert 0 < shift < 0.02
    points = first.points()[seen(first, segment_id(TABLE_ID))]
    high = np.abs(points[:, 2] - 0.44) < 0.02
    assert high.sum() > 2000
    assert np.abs(np.median(points[high][:, 2]) - 0.44) < 0.003
    assert Appearance.random(5, "D") == look
    assert Appearance.random(6, "D") != look


def test_the_gripper_camera_never_sees_its_own_body(env):
    env.reset(ROBOT_OBS, scene_obs())
    mount = segment_id(0, 14)
    assert seen(env.render_frames()["static"], mount).any()
    for seed in range(6):
        frame = SceneRenderer("D", ("gripper",), Appearance.random(seed)).render(env.visual_state())
        assert not seen(frame["gripper"], mount).any()
        assert frame["gripper"].depth.min() > 0.05


def test_an_env_changes_its_appearance_and_goes_back(env):
    env.reset(ROBOT_OBS, scene_obs())
    plain = env.render_frames()
    env.set_appearance(Appearance.random(2, "D"))
    other = env.render_frames()
    env.set_appearance(None)
    again = env.render_frames()
    for name in plain:
        assert (plain[name].rgb == again[name].rgb).all()
        assert (plain[name].rgb != other[name].rgb).any()


def test_calvins_camera_objects_lift_and_project(env):
    env.reset(ROBOT_OBS, scene_obs())
    assert [camera.name for camera in env.cameras] == ["static", "gripper"]
    frames = env.render_frames()
    for camera in env.cameras:
        frame = frames[camera.name]
        rgb, depth = camera.render()
        assert (rgb == frame.rgb).all()
        points = frame.points()
        for row, column in ((10, 20), (40, 40), (70, 60)):
            point = camera.deproject((column, row), depth, homogeneous=True)
            np.testing.assert_allclose(point[:3], points[row, column], atol=1e-9)
            assert camera.project(point) == (column, row)
            # Bullet's matrices say the same: clip space, then pixels.
            view = np.reshape(camera.viewMatrix, (4, 4)).T
            clip = np.reshape(camera.projectionMatrix, (4, 4)).T @ view @ point
            u, v = (clip[:2] / clip[3] * (1, -1) + 1) / 2 * camera.width
            assert (u, v) == pytest.approx((column + 0.5, row + 0.5), abs=1e-6)
    assert (env.render(mode="rgb_array") == frames["static"].rgb).all()
    with pytest.raises(ValueError, match="mode: 'human'"):
        env.render("human")


def test_static_matrices_are_bullets(env):
    camera = env.cameras[0]
    view = pybullet.computeViewMatrix(STATIC_EYE, STATIC_TARGET, STATIC_UP)
    projection = pybullet.computeProjectionMatrixFOV(10, 1, 0.01, 10)
    np.testing.assert_allclose(camera.viewMatrix, view, atol=1e-6)
    np.testing.assert_allclose(camera.projectionMatrix, projection, atol=1e-5)


def test_bad_input():
    with pytest.raises(ValueError, match="cameras: 'static'; give a list"):
        SceneRenderer("D", "static")
    with pytest.raises(ValueError, match=r"visual_state: shape \(3,\), must be \(36,\)"):
        SceneRenderer("D", ("static",)).render(np.zeros(3))


def touched(renderer, state, visuals, shift_m, along_m=0.0):
    """The pads' dents, 0 to 255 (left, right), with the red block between the fingers.

    `shift_m` is how far it is from the middle towards the left finger, `along_m` past the fingertips.
    """
    links = link_transforms(visuals, state)
    left, right = (links[link] for link in visuals.fingers)
    pad = np.array([0.0, 0.0, (PAD_LO[2] + PAD_HI[2]) / 2, 1.0])
    middle = (left @ pad + right @ pad)[:3] / 2
    state = state.copy()
    state[15:18] = middle + shift_m * left[:3, 1] + along_m * left[:3, 2]
    state[18:22] = Rotation.from_matrix(left[:3, :3]).as_quat()
    image = renderer.render(state)["tactile"].rgb
    return image[:, :PAD_PIXELS], image[:, PAD_PIXELS:]


def test_the_fingertips_feel_what_they_touch_and_not_each_other(env):
    env.reset(ROBOT_OBS, scene_obs())
    state, visuals = env.visual_state(), scene_visuals(env.scene)
    renderer = SceneRenderer("D", ("tactile",))
    free = renderer.render(state)["tactile"]
    assert free.rgb.shape == (24, 48, 3) and free.depth.shape == (24, 48)
    assert (free.rgb == (128, 128, 0)).all()
    shut = state.copy()
    shut[7:9] = 0.0  # the fingers lie on each other
    assert (renderer.render(shut)["tactile"].rgb == (128, 128, 0)).all()

    shifts = np.arange(0.0, 0.04, 0.0005)
    pads = [touched(renderer, state, visuals, shift) for shift in shifts]
    dents = np.array([[pad[..., 2].mean() for pad in both] for both in pads])
    assert not dents[:, 1].any()  # the other finger's pad is far from it
    assert dents[0, 0] == 0 and dents[:, 0].max() > 60
    deepest = int(dents[:, 0].argmax())
    assert (np.diff(dents[: deepest + 1, 0]) >= 0).all()  # the nearer, the deeper
    near = shifts[np.flatnonzero(dents[:, 0])[0]]
    mirrored = [pad[..., 2].mean() for pad in touched(renderer, state, visuals, -near - 0.001)]
    assert mirrored[0] == 0 < mirrored[1]
    whole, _ = touched(renderer, state, visuals, near + 0.002)
    assert (whole[..., 2] == 255).all()
    tips = [touched(renderer, state, visuals, near + 0.002, 0.005 * i)[0] for i in range(9)]
    cover = [float((tip[..., 2] > 0).mean()) for tip in tips]
    assert cover == sorted(cover, reverse=True) and cover[-1] == 0  # it slips off
    part = next(tip for tip, share in zip(tips, cover, strict=True) if 0 < share < 1)
    assert part[-1, :, 2].min() == 255 and part[0, :, 2].max() == 0  # fingertips are below
    assert len(np.unique(part[..., 1])) > 1 and (part[..., 0] == 128).all()  # an edge across


def test_a_dent_has_the_slope_of_what_makes_it():
    depth = np.full((24, 24), BEHIND_M + 0.01, np.float32)
    flat = dent_image(depth)
    assert (flat == (128, 128, 0)).all()
    rise = 0.05  # m a metre across
    depth[:] = BEHIND_M + 0.0018 - rise * np.arange(24) * PAD_VIEW_M / PAD_PIXELS
    image = dent_image(depth)[4:-4, 4:-4]
    assert np.abs(image[..., 0] - (128 - 127 * rise / np.hypot(rise, 1))).max() <= 1
    assert (image[..., 1] == 128).all() and (np.diff(image[0, :, 2].astype(int)) >= 0).all()
    assert (dent_image(np.full((24, 24), BEHIND_M - 0.001, np.float32))[..., 2] == 255).all()


def test_observations_have_touch_where_it_is_asked_for():
    with PlayTableEnv("D", cameras=("static", "tactile")) as feeling:
        obs = feeling.reset(ROBOT_OBS, scene_obs())
        assert obs["rgb_obs"]["rgb_tactile"].shape == (24, 48, 3)
        assert obs["depth_obs"]["depth_tactile"].shape == (24, 48)
        assert [camera.name for camera in feeling.cameras] == ["static"]  # no eye of its own
    with pytest.raises(ValueError, match="cameras: 'tactile' is not one of static, gripper"):
        CalvinEnv("D", cameras=("static", "tactile"))
