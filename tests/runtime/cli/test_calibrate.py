"""Calibration on pictures rendered of a board whose place is known."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from openhelix.runtime.cli import calibrate
from openhelix.runtime.cli.calibrate import board_in_world, main
from openhelix.runtime.core.config import ConfigError

cv2 = pytest.importorskip("cv2")
K = np.array([[600.0, 0, 322], [0, 605, 238], [0, 0, 1]])
SIZE = (480, 640)
AT = (0.10, -0.20, 0.02, 0.3)  # the board in W
MIDDLE = np.array([calibrate.SQUARES[0] / 2, calibrate.SQUARES[1] / 2, 0]) * calibrate.SQUARE_M


def looking(at: np.ndarray, away: float, across_deg: float, down_deg: float, roll: float = 0.0):
    """T_world_cam of a camera that looks at a point from `away` metres."""
    a, d = np.radians([across_deg, down_deg])
    eye = at + away * np.array([np.cos(a) * np.cos(d), np.sin(a) * np.cos(d), np.sin(d)])
    z = (at - eye) / away
    x = np.cross(z, [0, 0, 1.0])
    x /= np.linalg.norm(x)
    y = np.cross(z, x)
    turn = np.array([[np.cos(roll), -np.sin(roll), 0], [np.sin(roll), np.cos(roll), 0], [0, 0, 1]])
    T = np.eye(4)
    T[:3, :3], T[:3, 3] = np.stack([x, y, z], 1) @ turn, eye
    return T


def render(T_cam_board: np.ndarray) -> np.ndarray:
    """A grey picture (H, W) of the board on a grey table."""
    image = calibrate.printed().astype(np.float32)
    s, m = calibrate.PIXELS_PER_M, calibrate.MARGIN_M
    to_board = np.array([[1 / s, 0, 0.5 / s - m], [0, 1 / s, 0.5 / s - m], [0, 0, 1]])
    seen = K @ T_cam_board[:3, [0, 1, 3]] @ to_board
    big = np.diag([2.0, 2, 1]) + np.array([[0, 0, 0.5], [0, 0, 0.5], [0, 0, 0]])
    flags = cv2.INTER_AREA
    drawn = cv2.warpPerspective(
        image, big @ seen, (2 * SIZE[1], 2 * SIZE[0]), flags=flags, borderValue=120.0
    )
    small = drawn.reshape(SIZE[0], 2, SIZE[1], 2).mean((1, 3))
    noise = np.random.default_rng(0).normal(0, 2, SIZE)
    return np.clip(small + noise, 0, 255).astype(np.uint8)


def save(folder: Path, poses: list[np.ndarray], T_world_board: np.ndarray) -> None:
    folder.mkdir()
    for i, T in enumerate(poses):
        picture = render(np.linalg.inv(T) @ T_world_board)
        Image.fromarray(np.stack([picture] * 3, -1)).save(folder / f"{i:02}.png")


def table_depth(T_world_cam: np.ndarray, z: float) -> np.ndarray:
    """Depth (H, W) of a table at height `z`, with a block on it."""
    rows, columns = np.indices(SIZE)
    rays = np.linalg.inv(K) @ np.stack([columns.ravel(), rows.ravel(), np.ones(rows.size)])
    down = (T_world_cam[:3, :3] @ rays)[2]
    depth = ((z - T_world_cam[2, 3]) / down).reshape(SIZE)
    depth[200:230, 300:340] -= 0.03
    return depth + np.random.default_rng(1).normal(0, 0.002, SIZE)


def angle_deg(a: np.ndarray, b: np.ndarray) -> float:
    cosine = (np.trace(a[:3, :3].T @ b[:3, :3]) - 1) / 2
    return float(np.degrees(np.arccos(np.clip(cosine, -1, 1))))


@pytest.fixture(scope="module")
def standing(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """Twelve pictures by a camera that stands, of a board that lies: some noise, one place."""
    folder = tmp_path_factory.mktemp("standing") / "pictures"
    T_world_board = board_in_world(AT)
    T = looking((T_world_board @ [*MIDDLE, 1])[:3], 0.6, -70, 50, 0.05)
    save(folder, [T] * 2, T_world_board)
    return folder, T


def run(capsys, *words: str) -> tuple[int, dict]:
    code = main([*words, "--json"])
    return code, json.loads(capsys.readouterr().out)


OWN = "--intrinsics=600,605,322,238"
BOARD_AT = f"--board-at={','.join(map(str, AT))}"


def test_a_camera_that_stands_is_placed_and_sees_the_table_where_it_is(
    standing, capsys, tmp_path
) -> None:
    folder, T = standing
    np.save(tmp_path / "depth.npy", table_depth(T, AT[2]))
    code, found = run(capsys, str(folder), OWN, BOARD_AT, "--depth", str(tmp_path / "depth.npy"))
    placed = np.array(found["T_world_cam"])
    assert code == 0 and found["with_board"] == 2
    assert np.linalg.norm(placed[:3, 3] - T[:3, 3]) < 0.002  # m
    assert angle_deg(placed, T) < 0.2
    assert found["error_px"] < 0.3
    assert found["K"][0] == [600, 0, 322.5]  # pixel centres at +0.5
    table = found["table"]
    assert abs(table["mean_mm"]) < 1 and table["tilt_deg"] < 0.3 and table["points"] > 10_000
    assert main([str(folder), OWN, BOARD_AT, "--depth", str(tmp_path / "depth.npy")]) == 0
    assert "they lie on the table" in capsys.readouterr().out


def test_a_depth_that_is_off_fails_the_check(standing, capsys, tmp_path) -> None:
    folder, T = standing
    np.save(tmp_path / "depth.npy", table_depth(T, AT[2]) * 1.02)  # of 0.6 m: 9 mm
    words = (str(folder), OWN, BOARD_AT, "--depth", str(tmp_path / "depth.npy"))
    code, found = run(capsys, *words)
    assert code == 1 and found["table"]["mean_mm"] < -5
    code, found = run(capsys, *words, "--tolerance-mm", "20")
    assert code == 0
    np.save(tmp_path / "depth.npy", table_depth(T, AT[2]) * 1000)
    with pytest.raises(ConfigError, match="depth is not in metres"):
        main([*words])


def test_a_lens_is_calibrated_from_tilted_pictures(capsys, tmp_path) -> None:
    T_world_board = board_in_world(AT)
    middle = (T_world_board @ [*MIDDLE, 1])[:3]
    rng = np.random.default_rng(3)
    poses = [
        looking(middle + rng.uniform(-0.03, 0.03, 3), away, across, down, rng.uniform(-0.4, 0.4))
        for away in (0.35, 0.45)
        for across, down in ((-90, 80), (-60, 55), (20, 50), (110, 55), (180, 60), (-120, 45))
    ]
    save(tmp_path / "pictures", poses, T_world_board)
    seen = {name: p for name, p in calibrate.read_pictures(tmp_path / "pictures")[0].items()}
    found = [s for s in (calibrate.find(n, p) for n, p in seen.items()) if s is not None]
    assert len(found) == 12
    lens = calibrate.lens_of(found, SIZE)
    assert np.abs(lens.K - K).max() < 6  # pixels, of 600
    assert lens.error_px < 0.3
    with pytest.raises(ConfigError, match="3 show the board, and a lens takes 10"):
        calibrate.lens_of(found[:3], SIZE)


def test_a_camera_on_the_hand(capsys, tmp_path) -> None:
    from scipy.spatial.transform import Rotation

    T_world_board = board_in_world(AT)
    middle = (T_world_board @ [*MIDDLE, 1])[:3]
    T_tcp_cam = np.eye(4)
    T_tcp_cam[:3, :3] = Rotation.from_euler("xyz", [5, -10, 90], degrees=True).as_matrix()
    T_tcp_cam[:3, 3] = [0.03, -0.05, -0.08]
    places = ((-90, 75), (-60, 55), (20, 50), (110, 55), (180, 60), (-120, 45))
    cameras = [looking(middle, 0.4, a, d, 0.2 * i) for i, (a, d) in enumerate(places)]
    save(tmp_path / "pictures", cameras, T_world_board)
    poses = {}
    for i, camera in enumerate(cameras):
        hand = camera @ np.linalg.inv(T_tcp_cam)
        quaternion = Rotation.from_matrix(hand[:3, :3]).as_quat()
        poses[f"{i:02}.png"] = [*hand[:3, 3].tolist(), *quaternion.tolist()]
    file = tmp_path / "poses.json"
    file.write_text(json.dumps(poses))
    code, found = run(capsys, str(tmp_path / "pictures"), OWN, "--poses", str(file))
    placed = np.array(found["T_tcp_cam"])
    assert code == 0 and found["board_moves_mm"] < 2
    assert np.linalg.norm(placed[:3, 3] - T_tcp_cam[:3, 3]) < 0.003
    assert angle_deg(placed, T_tcp_cam) < 0.3
    same = dict.fromkeys(poses, poses["00.png"])
    file.write_text(json.dumps(same))
    with pytest.raises(ConfigError, match="hardly turns"):
        main([str(tmp_path / "pictures"), OWN, "--poses", str(file)])
    file.write_text(json.dumps(poses | {"03.png": [1, 2]}))
    with pytest.raises(ConfigError, match=r"poses.json: 03.png: want seven numbers"):
        main([str(tmp_path / "pictures"), OWN, "--poses", str(file)])


def test_the_printed_board_is_the_one_that_is_found(capsys, tmp_path) -> None:
    file = tmp_path / "board.png"
    assert main(["--print", str(file)]) == 0
    assert "36 mm" in capsys.readouterr().out
    with Image.open(file) as image:
        assert image.size == (3211, 2361)  # 272 x 200 mm at 300 dots an inch: it fits on A4
        picture = np.array(image.convert("RGB").resize((1606, 1181)))
    seen = calibrate.find("board", picture)
    assert seen is not None and len(seen.corners) == 24


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "pictures: name a folder"),
        (["DIR"], "--board-at .*, --poses: give one"),
        (["DIR", "--board-at", "1,2,3"], "board_at: '1,2,3', want 4 numbers"),
        (["/nowhere", "--board-at", "1,2,3,4"], "no folder /nowhere"),
        (["EMPTY", "--board-at", "1,2,3,4"], "pictures: none in"),
        (["DIR", "--board-at", "1,2,3,4"], "2 show the board, and a lens takes 10"),
        (["DIR", "--board-at", "1,2,3,4", "--intrinsics", "0,1,1,1"], "must be positive"),
        (["DIR", BOARD_AT, OWN, "--square-mm", "0"], "square_mm: 0, want 1 to 1000"),
        (["DIR", BOARD_AT, OWN, "--depth", "/no.npy"], "depth: /no.npy"),
        (["DIR", OWN, "--poses", "/no.json"], "poses: .*no.json"),
        (["--print", "/nowhere/board.png"], "print: cannot write"),
    ],
)
def test_what_is_wrong_is_one_line(words, said, standing, tmp_path) -> None:
    places = {"DIR": str(standing[0]), "EMPTY": str(tmp_path)}
    with pytest.raises(ConfigError, match=said) as caught:
        main([places.get(word, word) for word in words])
    assert "\n" not in str(caught.value)
