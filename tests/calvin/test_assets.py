"""Generated files: named by content, whole whatever starts at once, light to draw."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from openhelix.benchmarks.calvin import geometry
from openhelix.benchmarks.calvin.appearance import WOODS, floor_texture, wood_texture
from openhelix.benchmarks.calvin.meshes import from_piece
from openhelix.benchmarks.calvin.scene import SCENES, get_scene
from openhelix.benchmarks.calvin.urdf import content_folder
from openhelix.runtime.core.paths import cache_folder


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENHELIX_CACHE", str(tmp_path))
    return tmp_path


def test_folders_are_named_by_content_and_written_once(own_cache):
    assert cache_folder() == own_cache
    files = {"a.txt": b"one", "b.txt": b"two"}
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: content_folder("kind", files), range(32)))
    assert len(set(folders)) == 1
    assert {p.name: p.read_bytes() for p in folders[0].iterdir()} == files
    assert content_folder("kind", {**files, "b.txt": b"2"}) != folders[0]
    assert sorted(p.name for p in folders[0].parent.iterdir() if p.name.startswith(".")) == []


def test_processes_that_start_at_once_on_an_empty_cache_all_work(own_cache):
    code = (
        "import sys; from openhelix.benchmarks.calvin.env import PlayTableEnv;"
        "print(PlayTableEnv('C', cameras=()).step([0]*6+[1])[0]['scene_obs'].sum());"
        "assert 'numba' not in sys.modules"  # without cameras nothing is compiled
    )
    runs = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    outputs = [run.communicate()[0].split()[-1] for run in runs]
    assert all(run.returncode == 0 for run in runs)
    assert len(set(outputs)) == 1


@pytest.mark.parametrize("name", sorted(SCENES))
def test_pieces_are_closed_surfaces_within_the_table(name):
    for piece in geometry.pieces(SCENES[name]):
        mesh = from_piece(piece)
        # Of a closed surface the area vectors sum to nothing, and the volume is positive.
        edge_1 = mesh.position[:, 1] - mesh.position[:, 0]
        edge_2 = mesh.position[:, 2] - mesh.position[:, 0]
        area = np.cross(edge_1, edge_2).astype(float)
        assert np.abs(area.sum(axis=0)).max() < 1e-5
        volume = (mesh.position[:, 0] * area).sum() / 6
        assert volume > 0
        if piece.link == "base_link":
            assert np.abs(piece.vertices[:, 0]).max() <= geometry.HALF_X + 1e-9
            assert np.abs(piece.vertices[:, 1]).max() <= geometry.HALF_Y + 1e-9


@pytest.mark.parametrize("name", sorted(SCENES))
def test_closed_drawer_and_door_fit_their_openings(name):
    scene = SCENES[name]
    places = {joint.link: joint for joint in geometry.joints(scene)}
    door = places["slide_link"].origin[0] + np.array([0.0, geometry.DOOR_SIZE_X])
    opening = scene.plank_x + np.array([-1, 1]) * geometry.CABINET_HALF_X
    shut, opened = door, door - scene.slide_travel
    for x in (shut, opened):  # at either end the door covers one side and not the other
        covered = min(x[1], opening[1]) - max(x[0], opening[0])
        assert 0.2 < covered / (opening[1] - opening[0]) < 0.65
    assert abs(scene.drawer_x) + 0.22 <= geometry.HALF_X


def test_scene_names():
    assert get_scene("calvin_scene_B") is get_scene("B") is get_scene(SCENES["B"])
    with pytest.raises(ValueError, match="scene: 'Z' is not one of A, B, C, D"):
        get_scene("Z")


@pytest.mark.parametrize("name", sorted(WOODS))
def test_wood_repeats_seamlessly_and_has_its_colour(name):
    image = wood_texture(WOODS[name], 3).astype(float)
    np.testing.assert_allclose(image.mean(axis=(0, 1)) / 255, WOODS[name].colour, atol=0.02)
    for axis in (0, 1):
        inside = np.abs(np.diff(image, axis=axis)).mean()
        seam = np.abs(np.take(image, 0, axis) - np.take(image, -1, axis)).mean()
        assert seam < 2 * inside
    along, across = (np.abs(np.diff(image.mean(-1), axis=a)).mean() for a in (1, 0))
    assert across > 1.5 * along  # grain runs along the second axis
    assert (wood_texture(WOODS[name], 3) != wood_texture(WOODS[name], 4)).any()


def test_floor_tiles():
    image = floor_texture(((1.0, 1.0, 1.0), (0.0, 0.0, 0.0)))
    assert image[0, 0, 0] == image[-1, -1, 0] == 255
    assert image[0, -1, 0] == image[-1, 0, 0] == 0
