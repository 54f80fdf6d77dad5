"""The rasteriser against closed forms: a plane, an occluder, a near-clipped triangle."""

from __future__ import annotations

import numpy as np
import pytest

from openhelix.benchmarks.calvin.meshes import from_triangles
from openhelix.benchmarks.calvin.raster import draw

SIZE = 64


def render(triangles, colours, *, near=0.01, far=10.0, texture=None, smooth=False):
    """Draw triangles (T, 3, 3), one material each, with a camera at the origin along +z."""
    mesh = from_triangles(np.array(triangles, float), smooth=smooth)
    count = len(mesh.position)
    rgb = np.zeros((SIZE, SIZE, 3), np.uint8)
    depth = np.full((SIZE, SIZE), far, np.float32)
    mask = np.full((SIZE, SIZE), -1, np.int32)
    numbers = np.arange(count, dtype=np.int32)
    texels = np.zeros((1, 2, 2, 3), np.uint8) if texture is None else texture[None]
    draw(
        0,
        count,
        mesh.position,
        mesh.normal,
        mesh.uv,
        np.zeros(count, np.int32),
        numbers,
        numbers,
        np.eye(4)[None],
        np.eye(4),
        np.array([SIZE / 2, SIZE / 2, SIZE / 2, SIZE / 2, near, far]),
        np.array(colours, np.float32),
        np.full(count, -1 if texture is None else 0, np.int32),
        texels,
        np.ones(1, np.float32),
        np.array([0.0, 0, -1, 0.5, 0.5, 0.0, 1, 1, 1]),
        rgb,
        depth,
        mask,
    )
    return rgb, depth, mask


def quad(z_of):
    """Two triangles that cover the view, facing the camera, at depth z_of(x, y)."""
    corners = [(-9.0, -9.0), (9.0, -9.0), (9.0, 9.0), (-9.0, 9.0)]
    a, b, c, d = ([x, y, z_of(x, y)] for x, y in corners)
    return [[a, c, b], [a, d, c]]


def test_depth_of_a_tilted_plane_is_exact():
    slope = 0.1
    _, depth, mask = render(quad(lambda x, y: 3 + slope * x), [[1, 1, 1]] * 2)
    column = (np.arange(SIZE) + 0.5 - SIZE / 2) / (SIZE / 2)
    assert (mask >= 0).all()
    np.testing.assert_allclose(
        depth, np.broadcast_to(3 / (1 - slope * column), depth.shape), rtol=1e-5
    )


def test_shared_edges_leave_no_gap_and_the_nearer_face_wins():
    behind, before = quad(lambda x, y: 5.0), quad(lambda x, y: 2.0)
    for order in (behind + before, before + behind):
        _, depth, _ = render(order, [[1, 1, 1]] * 4)
        np.testing.assert_allclose(depth, 2.0, rtol=1e-6)


def test_faces_that_look_away_are_not_drawn():
    flipped = [triangle[::-1] for triangle in quad(lambda x, y: 2.0)]
    _, depth, mask = render(flipped, [[1, 1, 1]] * 2)
    assert (mask == -1).all()
    assert (depth == 10.0).all()


def test_far_plane_and_near_clipping():
    _, _, mask = render(quad(lambda x, y: 11.0), [[1, 1, 1]] * 2)
    assert (mask == -1).all()
    # A floor one metre below (y down) that passes under and behind the camera.
    floor = [[[-50, 1, -5], [50, 1, -5], [50, 1, 9]], [[-50, 1, -5], [50, 1, 9], [-50, 1, 9]]]
    floor = [triangle[::-1] for triangle in floor]
    drawn = [render(f, [[1, 1, 1]] * 2)[1] for f in (floor, [t[::-1] for t in floor])]
    depth = min(drawn, key=lambda image: image.mean())
    row = (np.arange(SIZE) + 0.5 - SIZE / 2) / (SIZE / 2)
    hit = row > 1 / 8.9
    np.testing.assert_allclose(depth[hit], np.repeat(1 / row[hit][:, None], SIZE, 1), rtol=1e-4)


def test_light_is_ambient_plus_diffuse():
    rgb, _, _ = render(quad(lambda x, y: 3.0), [[1.0, 0.5, 0.0]] * 2)
    assert rgb[0, 0].tolist() == pytest.approx([255, 127, 0], abs=1)
    slanted, _, _ = render(quad(lambda x, y: 30 + x), [[1.0, 1.0, 1.0]] * 2, far=100.0)
    shade = 0.5 + 0.5 / np.sqrt(2)
    assert slanted[SIZE // 2, SIZE // 2, 0] == pytest.approx(255 * shade, abs=1.5)


def test_textures_are_perspective_correct_and_repeat():
    checker = np.array([[[255] * 3, [0] * 3], [[0] * 3, [255] * 3]], np.uint8)
    rgb, depth, _ = render(quad(lambda x, y: 3 + 0.1 * x), [[1, 1, 1]] * 2, texture=checker)
    v, u = np.mgrid[0:SIZE, 0:SIZE] + 0.5
    x, y = (u - SIZE / 2) / (SIZE / 2) * depth, (v - SIZE / 2) / (SIZE / 2) * depth
    y = y + 0.74  # faces along z shift their grain by 2 * 0.37
    wanted = (np.floor(2 * x) + np.floor(2 * y)) % 2 == 0
    sure = (np.abs(2 * x - np.round(2 * x)) > 0.02) & (np.abs(2 * y - np.round(2 * y)) > 0.02)
    assert ((rgb[..., 0] > 0) == wanted)[sure].all()
