"""PlayTable drawn for people: where the cameras would see it, smooth, with shadows."""

from __future__ import annotations

import numpy as np
import pytest

from openhelix.benchmarks.calvin.cameras import CameraError, SceneRenderer
from openhelix.benchmarks.calvin.env import PlayTableEnv
from openhelix.benchmarks.calvin.scenery import PlayTableScenery
from openhelix.runtime.observe.overlay import project

SIZE = (480, 270)


@pytest.fixture(scope="module")
def state():
    with PlayTableEnv("D", cameras=()) as env:
        env.reset()
        return env.visual_state()


@pytest.fixture(scope="module")
def scenery():
    return PlayTableScenery("D")


def test_things_are_where_the_static_camera_sees_them(scenery, state) -> None:
    picture = scenery.picture(state, "room", *SIZE)
    own = SceneRenderer("D", ("static",)).render(state)["static"]
    np.testing.assert_array_equal(picture.T_world_cam, own.T_world_cam)
    assert picture.rgb.shape == (270, 480, 3)
    for i, channel in ((0, 0), (1, 2)):  # the red block and the blue one
        (pixel,), (ahead,) = project(picture, [state[15 + 7 * i : 18 + 7 * i]])
        colour = picture.rgb[round(pixel[1]), round(pixel[0])].astype(int)
        assert ahead and colour[channel] > 2 * np.delete(colour, channel).max()


def test_edges_are_smooth_and_shadows_fall_on_the_table(scenery, state) -> None:
    picture = scenery.picture(state, "room", *SIZE).rgb.astype(int)
    coarse = SceneRenderer("D", ("static",)).render(state)["static"].rgb
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > len(
        np.unique(coarse.reshape(-1, 3), axis=0)
    )
    # A block that is lifted takes its shadow along: the table is brighter where it was.
    lifted = state.copy()
    lifted[15:17] += 3.0  # and out of the picture
    without = scenery.picture(lifted, "room", *SIZE).rgb.astype(int)
    darker = (without - picture).sum(axis=-1) > 40
    red = picture[..., 0] > 2 * picture[..., 1] + 40
    assert (darker & ~red).sum() > 20


def test_what_moves_moves_in_every_view(scenery, state) -> None:
    moved = state.copy()
    moved[0] += 0.3
    moved[10] = 0.2  # the drawer
    for view in ("room", "static", "gripper"):
        before = scenery.picture(state, view, 96, 96).rgb.astype(int)
        after = scenery.picture(moved, view, 96, 96).rgb.astype(int)
        assert np.abs(after - before).max() > 60
    with pytest.raises(CameraError, match="there are room, static, gripper"):
        scenery.picture(state, "wrist", 96, 96)


def test_the_parts_make_up_the_scene(scenery, state) -> None:
    parts, places = scenery.parts(), scenery.transforms(state)
    names = {part.name for part in parts}
    assert {"table", "slide", "drawer", "block_red", "arm/1"} <= names
    for part in parts:
        assert part.triangles.shape[1:] == (3, 3) and len(part.colours) == len(part.triangles)
    red = next(part for part in parts if part.name == "block_red")
    np.testing.assert_allclose(places[red.link][:3, 3], state[15:18])
    assert red.colours[0].tolist() == [255, 0, 0]
    # The floor is not among them: a viewer has a ground of its own.
    table = next(part for part in parts if part.name == "table")
    assert np.abs(table.triangles).max() < 3.0


def test_another_stand_of_the_camera(state) -> None:
    stand = {"eye": (1.5, -1.5, 1.5), "target": None, "up": None, "fov": 40.0}
    picture = PlayTableScenery("D", stand).picture(state, "room", *SIZE)
    np.testing.assert_allclose(picture.T_world_cam[:3, 3], (1.5, -1.5, 1.5))
    assert picture.K[0, 0] == pytest.approx(135 / np.tan(np.radians(24)))
