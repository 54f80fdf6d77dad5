"""`openhelix calibrate`: where a camera stands, from pictures of a printed board.

    openhelix calibrate --print board.png
    openhelix calibrate pictures --board-at 0.1,-0.2,0.0,0.0
    openhelix calibrate pictures --poses poses.json
    openhelix calibrate pictures --board-at 0.1,-0.2,0.0,0.0 --depth depth.npy

`--print` writes the board, a ChArUco board of 7 x 5 squares, to be printed at full size on A4 and
laid on the table. From pictures of it the first form gives a standing camera's `T_world_cam`; the
board lies at `--board-at x,y,z,yaw` (its printed corner "0", metres and radians in W). The second
gives `T_tcp_cam` of a camera on the hand, from pictures of a board that stays where it is and the
TCP's pose at each (`poses.json`: picture's name to seven numbers, xyz and quaternion xyzw). Without
`--intrinsics` the lens is calibrated too, which takes ten or more pictures at different tilts. K is
told as this project has it: with pixel centres at +0.5.

The check: with `--depth`, an image in metres that belongs to the last picture, what the camera sees
of the table top around the board must lie on the table; the command says how far off it is, and
fails beyond `--tolerance-mm`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from openhelix.runtime.cli.arguments import Options, Positional, option, parse
from openhelix.runtime.core.config import ConfigError
from openhelix.runtime.core.files import BadFile, read_json
from openhelix.runtime.core.interfaces import F64, U8
from openhelix.runtime.core.output import answer
from openhelix.runtime.core.quaternion import QuaternionError, matrix, normalise

SQUARES = (7, 5)  # columns, rows
SQUARE_M, MARKER_M = 0.036, 0.027
PIXELS_PER_M = 300 / 0.0254
MARGIN_M = 0.01
LEAST_CORNERS = 8  # of a picture's 24
LEAST_PICTURES = 10  # for the lens
LEAST_POSES = 3  # for a camera on the hand
TURNED_RAD = np.radians(5)  # of the hand between two pictures, in the mean and about two axes
TABLE_M = 0.5  # around the board's centre, what is looked at of the table
NEAR_M = 0.05  # above or below it
# OpenCV and the cameras' libraries count pixels from their centres, `CameraFrame` from corners.
CENTRES = np.array([[0, 0, 0.5], [0, 0, 0.5], [0, 0, 0]])
PICTURES = (".png", ".jpg", ".jpeg")


class CalibrateOptions(Options):
    """Options of `calibrate`."""

    pictures: Annotated[Path | None, Positional()] = option(None, "folder with the pictures")
    print: Path | None = option(None, "write the board to be printed, and nothing else", "FILE")
    square_mm: float = option(SQUARE_M * 1000, "a square's side on the printed board", "MM")
    board_at: str | None = option(
        None, "where the board lies in W: x, y, z (m) and yaw (rad)", "X,Y,Z,YAW"
    )
    poses: Path | None = option(None, "the hand's pose at each picture: camera on the hand", "FILE")
    intrinsics: str | None = option(
        None,
        "of the lens, from the camera's own library",
        "FX,FY,CX,CY",
    )
    depth: Path | None = option(None, "depth image (H, W) in m of the last picture", "FILE.npy")
    tolerance_mm: float = option(5.0, "how far the table top may be off in the mean", "MM")


@dataclass(frozen=True, slots=True)
class Seen:
    """What a picture shows of the board.

    corners (n, 2) pixels; points (n, 3) m on the board; pixel centres are whole numbers.
    """

    name: str
    corners: F64
    points: F64


@dataclass(frozen=True, slots=True)
class Lens:
    """K (3, 3), five distortion coefficients, and the error (pixels) that they leave."""

    K: F64
    distortion: F64
    error_px: float


def board(square_m: float = SQUARE_M) -> Any:
    """Return OpenCV's board; its origin is the printed corner, x along the long side, z into it.

    Raises:
        ConfigError: OpenCV is not installed, or a square has no size.
    """
    try:
        import cv2
    except ImportError:
        raise ConfigError("calibrate: needs OpenCV; pip install opencv-python-headless") from None
    if not 0.001 <= square_m <= 1:
        raise ConfigError(f"square_mm: {square_m * 1000:g}, want 1 to 1000")
    words = cv2.aruco.getPredefinedDictionary(cv2.aruco.DICT_4X4_50)
    return cv2.aruco.CharucoBoard(SQUARES, square_m, square_m * MARKER_M / SQUARE_M, words)


def printed() -> U8:
    """Return the board (H, W) at 300 dots an inch, with a white margin."""
    margin = round(MARGIN_M * PIXELS_PER_M)
    side = round(SQUARE_M * PIXELS_PER_M)
    size = tuple(n * side + 2 * margin for n in SQUARES)
    return np.asarray(board().generateImage(size, marginSize=margin), np.uint8)


def find(name: str, picture: U8, square_m: float = SQUARE_M) -> Seen | None:
    """Return the board's corners in a picture (H, W, 3); None where too few are seen."""
    import cv2

    made = board(square_m)
    corners, ids, _, _ = cv2.aruco.CharucoDetector(made).detectBoard(picture)
    if ids is None or len(ids) < LEAST_CORNERS:
        return None
    points = made.getChessboardCorners()[ids.ravel()]
    return Seen(
        name, np.asarray(corners, np.float64).reshape(-1, 2), np.asarray(points, np.float64)
    )


def lens_of(seen: Sequence[Seen], size: tuple[int, int]) -> Lens:
    """Calibrate a lens from pictures of the board; `size` is (height, width).

    Raises:
        ConfigError: too few pictures.
    """
    import cv2

    if len(seen) < LEAST_PICTURES:
        raise ConfigError(
            f"pictures: {len(seen)} show the board, and a lens takes {LEAST_PICTURES} at different "
            "tilts; or give the camera's own as --intrinsics"
        )
    error, K, distortion, _, _ = cv2.calibrateCamera(
        [s.points.astype(np.float32) for s in seen],
        [s.corners.astype(np.float32) for s in seen],
        (size[1], size[0]),
        None,
        None,
    )
    return Lens(np.asarray(K, np.float64), np.asarray(distortion, np.float64).ravel(), float(error))


def board_in_camera(seen: Seen, lens: Lens) -> tuple[F64, float]:
    """Return T_cam_board (4, 4) and the error (pixels) that it leaves."""
    import cv2

    _, turn, shift = cv2.solvePnP(seen.points, seen.corners, lens.K, lens.distortion)
    T: F64 = np.eye(4)
    T[:3, :3], T[:3, 3] = cv2.Rodrigues(turn)[0], shift.ravel()
    again, _ = cv2.projectPoints(seen.points, turn, shift, lens.K, lens.distortion)
    off = np.linalg.norm(again.reshape(-1, 2) - seen.corners, axis=1)
    return T, float(np.sqrt((off**2).mean()))


def board_in_world(at: Sequence[float]) -> F64:
    """Return T_world_board (4, 4) of a board that lies face up, its corner at (x, y, z), by yaw.

    The board's own z points into the table, so that its x and y run as they are printed.
    """
    x, y, z, yaw = at
    c, s = np.cos(yaw), np.sin(yaw)
    return np.array([[c, s, 0, x], [s, -c, 0, y], [0, 0, -1, z], [0, 0, 0, 1.0]])


def mean_pose(poses: Sequence[F64]) -> F64:
    """Return the mean of poses (4, 4) that are nearly the same."""
    u, _, v = np.linalg.svd(np.mean([T[:3, :3] for T in poses], axis=0))
    T: F64 = np.eye(4)
    T[:3, :3] = u @ np.diag([1, 1, np.linalg.det(u @ v)]) @ v
    T[:3, 3] = np.mean([T[:3, 3] for T in poses], axis=0)
    return T


def camera_on_hand(hands: Sequence[F64], boards: Sequence[F64]) -> tuple[F64, float]:
    """Return T_tcp_cam (4, 4) and by how many metres the board seems to move (rms).

    Args:
        hands: T_world_tcp of each picture.
        boards: T_cam_board of each.

    Raises:
        ConfigError: too few poses, or the hand did not turn between them.
    """
    from scipy.spatial.transform import Rotation

    if len(hands) < LEAST_POSES:
        raise ConfigError(
            f"poses: {len(hands)} pictures show the board, want {LEAST_POSES} or more"
        )
    # Between two pictures, the hand's motion A and the board's B in the camera obey A X = X B.
    # Their turns are about axes that X turns into each other; then X's shift is linear.
    pairs = [(i, j) for i in range(len(hands)) for j in range(i)]
    moved = [np.linalg.inv(hands[i]) @ hands[j] for i, j in pairs]
    shown = [boards[i] @ np.linalg.inv(boards[j]) for i, j in pairs]
    a, b = (
        np.array([Rotation.from_matrix(T[:3, :3]).as_rotvec() for T in side])
        for side in (moved, shown)
    )
    spread_of_axes = np.linalg.svd(a, compute_uv=False)
    if spread_of_axes[1] < TURNED_RAD * np.sqrt(len(pairs)):
        raise ConfigError(
            "poses: the hand hardly turns between the pictures; turn it about two axes, by 20° "
            "and more"
        )
    turn = Rotation.align_vectors(a, b)[0].as_matrix()
    left = np.concatenate([T[:3, :3] - np.eye(3) for T in moved])
    right = np.concatenate([turn @ B[:3, 3] - A[:3, 3] for A, B in zip(moved, shown, strict=True)])
    shift, *_ = np.linalg.lstsq(left, right, rcond=None)
    T: F64 = np.eye(4)
    T[:3, :3], T[:3, 3] = turn, shift
    places = np.array([(h @ T @ b)[:3, 3] for h, b in zip(hands, boards, strict=True)])
    spread = np.sqrt(((places - places.mean(0)) ** 2).sum(1).mean())
    return T, float(spread)


@dataclass(frozen=True, slots=True)
class TableCheck:
    """How the table top that a camera sees lies to the table, all in mm and degrees."""

    points: int
    mean_mm: float  # signed, above the table
    spread_mm: float
    tilt_deg: float


def table_check(
    depth: F64, K: F64, T_world_cam: F64, T_world_board: F64, square_m: float = SQUARE_M
) -> TableCheck:
    """Compare the table top around the board with the plane that the board lies in.

    Args:
        depth: (H, W) m along the camera's axis; 0 or NaN where there is none.
        K: (3, 3), pixel centres at whole numbers.

    Raises:
        ConfigError: nothing of the table is seen.
    """
    rows, columns = np.indices(depth.shape)
    good = np.isfinite(depth) & (depth > 0)
    z = depth[good].astype(np.float64)
    rays = np.stack([columns[good], rows[good], np.ones(len(z))]) * z
    points = T_world_cam[:3, :3] @ np.linalg.inv(K) @ rays + T_world_cam[:3, 3:]
    middle = T_world_board @ [SQUARES[0] * square_m / 2, SQUARES[1] * square_m / 2, 0, 1]
    near = np.hypot(*(points[:2] - middle[:2, None])) < TABLE_M / 2
    high = points[2] - middle[2]
    near &= np.abs(high) < NEAR_M  # what stands on the table is no table
    if near.sum() < 100:
        raise ConfigError(
            f"depth: {int(near.sum())} points lie within 5 cm of the table around the board, of "
            f"{int(good.sum())} with a depth: the calibration is off, or depth is not in metres"
        )
    off = np.abs(high - np.median(high[near]))
    inner = near & (off <= np.quantile(off[near], 0.9))  # without the worst tenth: blocks, edges
    x, y = points[:2, inner] - middle[:2, None]
    plane, *_ = np.linalg.lstsq(np.stack([x, y, np.ones(len(x))], 1), high[inner], rcond=None)
    return TableCheck(
        points=int(inner.sum()),
        mean_mm=float(high[inner].mean() * 1000),
        spread_mm=float(high[inner].std() * 1000),
        tilt_deg=float(np.degrees(np.arctan(np.hypot(plane[0], plane[1])))),
    )


# ------------------------------------------------------------------------------------------------
# The command


def main(argv: Sequence[str]) -> int:
    """Calibrate a camera with a printed board, and check the table."""
    options, _ = parse("calibrate", CalibrateOptions, argv, __doc__ or "")
    if options.print is not None:
        return _print(options)
    if options.pictures is None:
        raise ConfigError("pictures: name a folder with pictures of the board, or --print FILE")
    if (options.board_at is None) == (options.poses is None):
        raise ConfigError("--board-at (a camera that stands), --poses: give one of them")
    report = calibrated(options)
    if options.as_json:
        answer(json.dumps(report))
    else:
        answer(told(report))
    table = report.get("table")
    return int(table is not None and not table["within_tolerance"])


def _print(options: CalibrateOptions) -> int:
    from PIL import Image

    assert options.print is not None
    image = printed()
    try:
        Image.fromarray(image).save(options.print, dpi=(300, 300))
    except (OSError, ValueError) as error:
        raise ConfigError(f"print: cannot write {options.print}: {error}") from None
    about = {"board": str(options.print), "square_mm": SQUARE_M * 1000, "squares": list(SQUARES)}
    if options.as_json:
        answer(json.dumps(about))
    else:
        answer(
            f"{options.print}: print it at full size (100 %) on A4, glue it to something flat, and "
            f"measure a square: {SQUARE_M * 1000:g} mm, or give yours as --square-mm"
        )
    return 0


def calibrated(options: CalibrateOptions) -> dict[str, Any]:
    """Return what the pictures say of the camera.

    Raises:
        ConfigError: a file or option is unusable; the message names it.
    """
    assert options.pictures is not None
    at = numbers("board_at", options.board_at, 4) if options.poses is None else None
    square = options.square_mm / 1000
    board(square)
    pictures, size = read_pictures(options.pictures)
    seen = [s for s in (find(n, p, square) for n, p in pictures.items()) if s is not None]
    if not seen:
        raise ConfigError(
            f"pictures: none of the {len(pictures)} in {options.pictures} shows the board"
        )
    lens = _lens(options, seen, size)
    report: dict[str, Any] = {
        "pictures": len(pictures),
        "with_board": len(seen),
        "K": (lens.K + CENTRES).tolist(),
        "distortion": lens.distortion.tolist(),
    }
    placed = [board_in_camera(s, lens) for s in seen]
    report["error_px"] = float(np.sqrt(np.mean([error**2 for _, error in placed])))
    if options.poses is not None:
        hands = read_poses(options.poses, [s.name for s in seen])
        T, spread = camera_on_hand(hands, [T for T, _ in placed])
        return report | {"T_tcp_cam": T.tolist(), "board_moves_mm": spread * 1000}
    assert at is not None
    T_world_board = board_in_world(at)
    # The camera and the board stand still: every picture says the same.
    T_world_cam = mean_pose([T_world_board @ np.linalg.inv(T) for T, _ in placed])
    report["T_world_cam"] = T_world_cam.tolist()
    if options.depth is not None:
        depth = _depth(options.depth, size)
        found = table_check(depth, lens.K, T_world_cam, T_world_board, square)
        good = abs(found.mean_mm) <= options.tolerance_mm
        report["table"] = {
            "points": found.points,
            "mean_mm": found.mean_mm,
            "spread_mm": found.spread_mm,
            "tilt_deg": found.tilt_deg,
            "tolerance_mm": options.tolerance_mm,
            "within_tolerance": good,
        }
    return report


def _lens(options: CalibrateOptions, seen: Sequence[Seen], size: tuple[int, int]) -> Lens:
    if options.intrinsics is None:
        return lens_of(seen, size)
    fx, fy, cx, cy = numbers("intrinsics", options.intrinsics, 4)
    if min(fx, fy) <= 0:
        raise ConfigError(f"intrinsics: {options.intrinsics}: focal lengths must be positive")
    return Lens(np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1.0]]), np.zeros(5), 0.0)


def told(report: Mapping[str, Any]) -> str:
    """Return a calibration as text, its matrices as a configuration takes them."""
    lines = [
        f"{report['with_board']} of {report['pictures']} pictures show the board; "
        f"its corners are {report['error_px']:.2f} px off",
        f"K: {_rounded(report['K'])}",
    ]
    if max(map(abs, report["distortion"])) > 1e-3:
        lines.append(f"distortion: {[round(x, 5) for x in report['distortion']]}")
    if "T_tcp_cam" in report:
        lines.append(f"T_tcp_cam: {_rounded(report['T_tcp_cam'])}")
        lines.append(f"the board seems to move by {report['board_moves_mm']:.1f} mm")
    else:
        lines.append(f"T_world_cam: {_rounded(report['T_world_cam'])}")
    if table := report.get("table"):
        lines.append(
            f"table top: {table['points']} points, {table['mean_mm']:+.1f} mm in the mean, spread "
            f"{table['spread_mm']:.1f} mm, tilted by {table['tilt_deg']:.2f}°: "
            + (
                "they lie on the table"
                if table["within_tolerance"]
                else f"more than {table['tolerance_mm']:g} mm off the table"
            )
        )
    return "\n".join(lines)


def _rounded(rows: Sequence[Sequence[float]]) -> str:
    return json.dumps([[round(x, 6) for x in row] for row in rows])


def numbers(name: str, text: str | None, count: int) -> list[float]:
    """Return the numbers of an option.

    Raises:
        ConfigError: not as many, or not finite.
    """
    try:
        found = [float(word) for word in (text or "").split(",")]
    except ValueError:
        found = []
    if len(found) != count or not np.isfinite(found).all():
        raise ConfigError(f"{name}: {text!r}, want {count} numbers with commas between them")
    return found


def read_pictures(folder: Path) -> tuple[dict[str, U8], tuple[int, int]]:
    """Return a folder's pictures by name, and their height and width.

    Raises:
        ConfigError: none, one that cannot be read, or of several sizes.
    """
    from PIL import Image

    found: dict[str, U8] = {}
    if not folder.is_dir():
        raise ConfigError(f"pictures: no folder {folder}")
    for file in sorted(folder.iterdir()):
        if file.suffix.lower() not in PICTURES:
            continue
        try:
            with Image.open(file) as image:
                found[file.name] = np.array(image.convert("RGB"))
        except OSError as error:
            raise ConfigError(f"{file}: no picture: {error}") from None
    sizes = {picture.shape[:2] for picture in found.values()}
    if len(sizes) != 1:
        what = "none" if not sizes else "pictures of several sizes"
        raise ConfigError(f"pictures: {what} in {folder} ({', '.join(PICTURES)})")
    height, width = sizes.pop()
    return found, (int(height), int(width))


def read_poses(file: Path, names: Sequence[str]) -> list[F64]:
    """Return T_world_tcp (4, 4) of each named picture.

    Raises:
        ConfigError: the file cannot be read, or lacks a pose.
    """
    try:
        told_poses = read_json(file)
    except BadFile as error:
        raise ConfigError(f"poses: {error}") from None
    found = []
    for name in names:
        pose = told_poses.get(name)
        try:
            if not isinstance(pose, list) or len(pose) != 7 or not np.isfinite(pose).all():
                raise ValueError
            T: F64 = np.eye(4)
            T[:3, :3], T[:3, 3] = matrix(normalise(pose[3:])), pose[:3]
        except (TypeError, ValueError, QuaternionError):
            raise ConfigError(
                f"{file}: {name}: want seven numbers, xyz (m) and a quaternion xyzw"
            ) from None
        found.append(T)
    return found


def _depth(file: Path, size: tuple[int, int]) -> F64:
    try:
        depth = np.load(file.expanduser(), allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"depth: {file}: {error}") from None
    if depth.shape != size or not np.issubdtype(depth.dtype, np.floating):
        raise ConfigError(
            f"depth: {file} holds {depth.dtype}{depth.shape}, want metres as fractions, {size} as "
            "the pictures"
        )
    return np.asarray(depth, np.float64)
