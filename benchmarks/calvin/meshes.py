"""What can be seen of a scene: triangles with colours, and where their links are.

The furniture's pieces become triangles; the Panda's own meshes are made light. Those in
pybullet's wheel have 100,000 faces; at a pixel of 3 to 4 mm most of them are smaller than a
pixel. Merging the corners that share a cell of a few millimetres leaves a few thousand; the
result is kept in the cache, named by source and cell size.

Links: 0 is what never moves (floor, robot stand, table); then the table's moving parts, the
three blocks, and the arm. The arm's kinematics are read from the same URDF that Bullet
loads, so picture and physics agree.
"""

from __future__ import annotations

import hashlib
import io
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.spatial import ConvexHull

from openhelix.benchmarks.calvin import geometry, urdf
from openhelix.benchmarks.calvin.geometry import Piece
from openhelix.benchmarks.calvin.scene import (
    BLOCK_COLOURS,
    BLOCK_SIDE_M,
    ROBOT_BASE_M,
    TABLE_LINKS,
    Scene,
)
from openhelix.runtime.core.files import replace_file
from openhelix.runtime.core.interfaces import F32, F64, U8
from openhelix.runtime.core.paths import cache_folder, make_in_cache

CREASE_COS = 0.75  # corners are shaded smooth across edges flatter than this


@dataclass(frozen=True, slots=True)
class Mesh:
    """Triangles in a link's frame.

    Attributes:
        position, normal: (T, 3, 3) corners and their unit normals.
        uv: (T, 3, 2) texture coordinates, m.
        colour: (T, 3) in [0, 1]; ones where a material decides.
    """

    position: F32
    normal: F32
    uv: F32
    colour: F32


def from_triangles(triangles: F64, smooth: bool, grain: int = 0, colour: F64 | None = None) -> Mesh:
    """Add normals, texture coordinates and colours to triangles (T, 3, 3)."""
    edge_1, edge_2 = triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0]
    area = np.cross(edge_1, edge_2)
    keep = np.linalg.norm(area, axis=1) > 1e-12
    triangles, area = triangles[keep], area[keep]
    flat = area / np.linalg.norm(area, axis=1, keepdims=True)
    normal = np.repeat(flat[:, None, :], 3, axis=1)
    if smooth:
        normal = _smooth_normals(triangles, area, flat)
    colours = np.ones((len(triangles), 3)) if colour is None else colour[keep]
    return Mesh(
        triangles.astype(np.float32),
        normal.astype(np.float32),
        _box_uv(triangles, flat, grain).astype(np.float32),
        colours.astype(np.float32),
    )


def _smooth_normals(triangles: F64, area: F64, flat: F64) -> F64:
    """Average the normals of the faces that meet at a corner and are nearly parallel."""
    _, index = np.unique(triangles.reshape(-1, 3).round(6), axis=0, return_inverse=True)
    index = index.reshape(-1)
    order = np.argsort(index, kind="stable")
    starts = np.searchsorted(index[order], np.arange(index.max() + 2))
    out = np.empty((len(index), 3))
    for corner in range(len(starts) - 1):
        members = order[starts[corner] : starts[corner + 1]]
        faces = members // 3
        near = (flat[faces] @ flat[faces].T) > CREASE_COS
        total = near.astype(np.float64) @ area[faces]
        out[members] = total / np.linalg.norm(total, axis=1, keepdims=True)
    return out.reshape(-1, 3, 3)


def _box_uv(triangles: F64, flat: F64, grain: int) -> F64:
    """Project each face along its main axis; u runs along the grain where it can."""
    main = np.abs(flat).argmax(axis=1)
    uv = np.empty((*triangles.shape[:2], 2))
    for axis in range(3):
        rest = [i for i in range(3) if i != axis]
        u, v = (rest[1], rest[0]) if grain == rest[1] else (rest[0], rest[1])
        faces = main == axis
        uv[faces, :, 0], uv[faces, :, 1] = triangles[faces][:, :, u], triangles[faces][:, :, v]
        uv[faces, :, 1] += 0.37 * axis  # neighbouring faces do not show the same grain
    return uv


def hull_triangles(vertices: F64) -> F64:
    """Triangles (T, 3, 3) of the convex hull, facing outwards."""
    hull = ConvexHull(vertices)
    triangles = vertices[hull.simplices]
    normal = np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0])
    inward = (normal * hull.equations[:, :3]).sum(axis=1) < 0
    triangles[inward] = triangles[inward][:, ::-1]
    return np.asarray(triangles, dtype=np.float64)


def from_piece(piece: Piece) -> Mesh:
    """The surface of one convex piece."""
    return from_triangles(hull_triangles(piece.vertices), piece.smooth, piece.grain)


def from_obj(path: Path, cell_m: float) -> Mesh:
    """An OBJ with its colours, its corners merged in cells of `cell_m`; cached."""

    def build() -> dict[str, np.ndarray]:
        triangles, colour = _cluster(*_read_obj(path), cell_m)
        mesh = from_triangles(triangles, smooth=True, colour=colour)
        return {
            "position": mesh.position,
            "normal": mesh.normal,
            "uv": mesh.uv,
            "colour": mesh.colour,
        }

    key = f"{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}-{path.stem}-{cell_m * 1e3:g}mm-3"
    return Mesh(**_cached(key, build))


def _cached(key: str, build: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    folder = cache_folder() / "playtable" / "meshes"
    path = folder / f"{key}.npz"
    if not path.exists():
        make_in_cache(folder)
        buffer = io.BytesIO()
        np.savez_compressed(buffer, allow_pickle=False, **build())
        replace_file(path, buffer.getvalue())
    with np.load(path, allow_pickle=False) as data:
        return {name: data[name] for name in data.files}


def _read_materials(path: Path) -> tuple[dict[str, F64], U8 | None]:
    """Plain colours by material name, and the one texture that the materials share."""
    colours: dict[str, F64] = {}
    texture, name = None, ""
    for line in path.read_text().splitlines() if path.exists() else []:
        words = line.split()
        if words and words[0] == "newmtl":
            name = words[1]
        elif words and words[0] == "Kd":
            colours[name] = np.array([float(w) for w in words[1:4]])
        elif words and words[0] == "map_Kd":
            texture = np.asarray(Image.open(path.parent / words[1]).convert("RGB"))
    return colours, texture


def _read_obj(path: Path) -> tuple[F64, np.ndarray, F64]:
    """Vertices (n, 3), faces (T, 3) and face colours (T, 3) of an OBJ with its materials."""
    colours: dict[str, F64] = {}
    image: U8 | None = None
    current = np.ones(3)
    vertices, coordinates, faces, face_uv, face_colour = [], [], [], [], []
    for line in path.read_text().splitlines():
        words = line.split()
        if not words:
            continue
        if words[0] == "v":
            vertices.append([float(w) for w in words[1:4]])
        elif words[0] == "vt":
            coordinates.append([float(w) for w in words[1:3]])
        elif words[0] == "mtllib":
            colours, image = _read_materials(path.parent / words[1])
        elif words[0] == "usemtl":
            current = colours.get(words[1], np.ones(3))
        elif words[0] == "f":
            corner = [w.split("/") for w in words[1:]]
            for i in range(1, len(corner) - 1):
                three = (corner[0], corner[i], corner[i + 1])
                faces.append([int(c[0]) - 1 for c in three])
                face_uv.append([int(c[1]) - 1 if len(c) > 1 and c[1] else 0 for c in three])
                face_colour.append(current)
    colour = np.array(face_colour)
    if image is not None and coordinates:
        # Bullet paints a textured mesh with its texture and leaves the plain colour aside.
        centre = np.array(coordinates)[np.array(face_uv)].mean(axis=1) % 1.0
        column = (centre[:, 0] * image.shape[1]).astype(int)
        row = ((1 - centre[:, 1]) * image.shape[0]).astype(int).clip(0, image.shape[0] - 1)
        colour = image[row, column] / 255.0
    return np.array(vertices), np.array(faces), colour


def _cluster(vertices: F64, faces: np.ndarray, colour: F64, cell_m: float) -> tuple[F64, F64]:
    """Merge vertices by cell; drop faces that collapse or repeat."""
    cell = np.floor(vertices / cell_m + 0.5).astype(np.int64)
    _, index = np.unique(cell, axis=0, return_inverse=True)
    index = index.reshape(-1)
    count = np.bincount(index)
    merged = np.stack([np.bincount(index, vertices[:, i]) / count for i in range(3)], axis=1)
    corner = index[faces]
    a, b, c = corner.T
    alive = (a != b) & (b != c) & (a != c)
    corner, colour = corner[alive], colour[alive]
    _, once = np.unique(np.sort(corner, axis=1), axis=0, return_index=True)
    return merged[corner[once]], colour[once]


# -- A scene's triangles in flat arrays, and its links for a given state ---------------

VISUAL_STATE_SIZE = 36
WOOD, PANEL, FLOOR = 0, 1, 2  # textures
ROBOT_ID, STAND_ID, TABLE_ID, FLOOR_ID = 0, 1, 5, 6  # bodies, as `physics.World` numbers them
FIRST_BLOCK_ID = 2
MOVING = ("slide_link", "drawer_link", "button_link", "switch_link")  # as in visual_state
STAND_RADIUS_M = 0.13
ARM_CELL_M, HAND_CELL_M = 0.008, 0.004
FLOOR_HALF_M = 15.0


@dataclass(frozen=True, slots=True)
class ArmJoint:
    """One joint of the arm's chain: parent and child link numbers, origin, motion."""

    parent: int
    child: int
    T_parent_joint: F64
    axis: tuple[float, float, float]
    kind: str
    state: int  # index into visual_state, -1 if fixed


@dataclass(frozen=True, slots=True)
class Visuals:
    """The triangles of a scene: the `n_fixed` that never change first, the mount last.

    Attributes:
        position, normal, uv, link, material, segment: per triangle, see `raster.draw`.
        materials, colours, texture: per material.
        n_links: number of link transforms.
        joints: the table's joints; `arm`: the arm's; `camera_link`: the gripper camera's; `fingers`: left, right.
    """

    position: F32
    normal: F32
    uv: F32
    link: np.ndarray
    material: np.ndarray
    segment: np.ndarray
    n_fixed: int
    n_mount: int  # triangles of the gripper camera's own body, which it does not see
    materials: tuple[str, ...]
    colours: tuple[tuple[float, float, float], ...]
    texture: np.ndarray
    n_links: int
    joints: tuple[geometry.Joint, ...]
    arm: tuple[ArmJoint, ...]
    camera_link: int
    fingers: tuple[int, int]


def segment_id(body: int, link: int = -1) -> int:
    """Segmentation value of a body's link, as Bullet codes it."""
    return body + ((link + 1) << 24)


class _Builder:
    def __init__(self) -> None:
        self.parts: list[tuple[bool, int, int, int, Mesh]] = []
        self.names: list[str] = []
        self.colours: list[tuple[float, float, float]] = []
        self.texture: list[int] = []

    def material(
        self, name: str, colour: tuple[float, float, float] = (1.0, 1.0, 1.0), texture: int = -1
    ) -> int:
        key = (name, colour)
        for i, known in enumerate(zip(self.names, self.colours, strict=True)):
            if known == key:
                return i
        self.names.append(name)
        self.colours.append(colour)
        self.texture.append(texture)
        return len(self.names) - 1

    def add(self, mesh: Mesh, link: int, material: int, segment: int, fixed: bool = False) -> None:
        self.parts.append((not fixed, link, material, segment, mesh))

    def add_coloured(self, mesh: Mesh, link: int, segment: int) -> None:
        """A mesh with its own colours: one material for each."""
        rounded = (mesh.colour * 50).round() / 50
        for colour in np.unique(rounded, axis=0):
            faces = (rounded == colour).all(axis=1)
            part = Mesh(
                mesh.position[faces], mesh.normal[faces], mesh.uv[faces], mesh.colour[faces]
            )
            r, g, b = (float(c) for c in colour)
            self.add(part, link, self.material("robot", (r, g, b)), segment)


def _add_table(builder: _Builder, scene: Scene) -> None:
    wood, panel = builder.material("wood", texture=WOOD), builder.material("panel", texture=PANEL)
    places = {joint.link: joint for joint in geometry.joints(scene)}
    for piece in geometry.pieces(scene):
        if not piece.material:
            continue
        mesh = from_piece(piece)
        material = {"wood": wood, "panel": panel}.get(piece.material)
        if material is None:
            material = builder.material(piece.material)
        segment = segment_id(TABLE_ID, TABLE_LINKS[piece.link])
        if piece.link in MOVING:
            builder.add(mesh, 1 + MOVING.index(piece.link), material, segment)
        else:
            joint = places.get(piece.link)
            if joint is not None:
                moved = mesh.position + np.array(joint.origin, np.float32)
                mesh = Mesh(moved, mesh.normal, mesh.uv, mesh.colour)
            builder.add(mesh, 0, material, segment, fixed=piece.material in ("wood", "slot"))


def _add_room(builder: _Builder, scene: Scene) -> None:
    h = FLOOR_HALF_M
    corners = np.array([[h, -h, 0], [h, h, 0], [-h, h, 0], [-h, -h, 0]])
    floor = from_triangles(corners[[[0, 1, 2], [0, 2, 3]]], smooth=False)
    floor = replace(floor, uv=np.ascontiguousarray(floor.position[:, :, :2]))
    builder.add(floor, 0, builder.material("floor", texture=FLOOR), FLOOR_ID, fixed=True)
    x, y, z = ROBOT_BASE_M
    stand = geometry.disc("", (x - 0.05, y, 0.0), STAND_RADIUS_M, z, "", sides=32)
    mesh = from_triangles(hull_triangles(stand.vertices), smooth=True)
    builder.add(mesh, 0, builder.material("stand"), STAND_ID, fixed=True)
    for i, (name, length) in enumerate(scene.block_lengths):
        half = np.array([length, BLOCK_SIDE_M, BLOCK_SIDE_M]) / 2
        sides = np.array([[a, b, c] for a in (-1, 1) for b in (-1, 1) for c in (-1, 1)])
        cube = from_triangles(hull_triangles(sides * half), smooth=False)
        material = builder.material(name, BLOCK_COLOURS[name])
        builder.add(cube, 1 + len(MOVING) + i, material, FIRST_BLOCK_ID + i)


def _add_arm(
    builder: _Builder, first: int, arm_cell_m: float
) -> tuple[tuple[ArmJoint, ...], int, tuple[int, int], int]:
    root = ET.fromstring(urdf.panda_urdf().read_text())
    names = [link.get("name", "") for link in root.iter("link")]
    number = {name: first + i for i, name in enumerate(names)}
    source = urdf.panda_source() / "meshes"
    for i in range(8):
        kind = "collision" if i in (0, 7) else "visual"
        mesh = from_obj(source / kind / f"link{i}.obj", arm_cell_m)
        builder.add_coloured(mesh, number[f"panda_link{i}"], segment_id(ROBOT_ID, i - 1))
    hand = from_obj(source / "visual" / "hand.obj", min(arm_cell_m, HAND_CELL_M))
    builder.add_coloured(hand, number["panda_hand"], segment_id(ROBOT_ID, 8))
    white = builder.material("robot")
    fingers = [hull_triangles(urdf.finger_vertices(part)) for part in urdf.FINGER_SEEN]
    flip = np.array([-1.0, -1.0, 1.0])  # half a turn about z
    for link, segment, sign in (
        ("panda_leftfinger", 9, np.ones(3)),
        ("panda_rightfinger", 11, flip),
    ):
        for shape in fingers:
            mesh = from_triangles(shape * sign, smooth=False)
            builder.add(mesh, number[link], white, segment_id(ROBOT_ID, segment))
    mount = geometry.box("", (-0.04, -0.0125, -0.005), (0.04, 0.0125, 0.005))
    builder.add(from_piece(mount), number["gripper_cam"], white, segment_id(ROBOT_ID, 14))
    moving = iter(range(9))
    joints = []
    for joint in root.iter("joint"):
        kind = joint.get("type", "fixed")
        state = -1 if kind == "fixed" else next(moving)
        joints.append(_arm_joint(joint, number, kind, state))
    fingers_ = (number["panda_leftfinger"], number["panda_rightfinger"])
    return tuple(joints), number["gripper_cam"], fingers_, first + len(names)


def _arm_joint(joint: ET.Element, number: dict[str, int], kind: str, state: int) -> ArmJoint:
    def numbers(tag: str, key: str, default: str = "0 0 0") -> list[float]:
        node = joint.find(tag)
        return [float(v) for v in (default if node is None else node.get(key, default)).split()]

    def name(tag: str) -> str:
        node = joint.find(tag)
        return "" if node is None else node.get("link", "")

    T = np.eye(4)
    T[:3, :3] = rpy_matrix(numbers("origin", "rpy"))
    T[:3, 3] = numbers("origin", "xyz")
    x, y, z = numbers("axis", "xyz")
    return ArmJoint(number[name("parent")], number[name("child")], T, (x, y, z), kind, state)


def rpy_matrix(rpy: list[float] | tuple[float, ...]) -> F64:
    """Rotation (3, 3) of roll, pitch, yaw about fixed axes (URDF's convention)."""
    (cr, cp, cy), (sr, sp, sy) = np.cos(rpy), np.sin(rpy)
    return np.array(
        [
            [cy * cp, cy * sp * sr - sy * cr, cy * sp * cr + sy * sr],
            [sy * cp, sy * sp * sr + cy * cr, sy * sp * cr - cy * sr],
            [-sp, cp * sr, cp * cr],
        ]
    )


@lru_cache(maxsize=8)  # a scene's triangles take about 2 MB
def scene_visuals(scene: Scene, arm_cell_m: float = ARM_CELL_M) -> Visuals:
    """Assemble the triangles of `scene`; once a process.

    Args:
        scene: what stands where.
        arm_cell_m: corners of the arm's meshes that share a cell of this size are merged.
    """
    builder = _Builder()
    _add_room(builder, scene)
    _add_table(builder, scene)
    arm, camera_link, fingers, n_links = _add_arm(
        builder, 1 + len(MOVING) + len(scene.blocks), arm_cell_m
    )
    parts = sorted(builder.parts, key=lambda part: (part[0], part[1] == camera_link))
    meshes = [part[-1] for part in parts]
    sizes = [len(mesh.position) for mesh in meshes]

    def each(values: list[int]) -> np.ndarray:
        return np.repeat(values, sizes).astype(np.int32)

    return Visuals(
        position=np.ascontiguousarray(np.concatenate([m.position for m in meshes])),
        normal=np.ascontiguousarray(np.concatenate([m.normal for m in meshes])),
        uv=np.ascontiguousarray(np.concatenate([m.uv for m in meshes])),
        link=each([part[1] for part in parts]),
        material=each([part[2] for part in parts]),
        segment=each([part[3] for part in parts]),
        n_mount=sum(s for s, p in zip(sizes, parts, strict=True) if p[1] == camera_link),
        n_fixed=sum(size for size, part in zip(sizes, parts, strict=True) if not part[0]),
        materials=tuple(builder.names),
        colours=tuple(builder.colours),
        texture=np.array(builder.texture, np.int32),
        n_links=n_links,
        joints=tuple(j for name in MOVING for j in geometry.joints(scene) if j.link == name),
        arm=arm,
        camera_link=camera_link,
        fingers=fingers,
    )


def quaternion_matrix(quaternion: F64) -> F64:
    """Rotation (3, 3) of a quaternion xyzw."""
    x, y, z, w = quaternion / np.linalg.norm(quaternion)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )


def link_transforms(visuals: Visuals, state: F64) -> F64:
    """Where every link is, (L, 4, 4) link to W, for a visual state (36,)."""
    T = np.zeros((visuals.n_links, 4, 4))
    T[:] = np.eye(4)
    for i, joint in enumerate(visuals.joints):
        rotation = geometry.roll_matrix(joint.roll_rad)
        T[1 + i, :3, :3] = rotation
        travel = np.array(joint.axis or (0.0, 0.0, 0.0)) * state[9 + i]
        T[1 + i, :3, 3] = rotation @ travel + joint.origin
    for i in range(3):
        pose = state[15 + 7 * i : 22 + 7 * i]
        T[5 + i, :3, :3], T[5 + i, :3, 3] = quaternion_matrix(pose[3:]), pose[:3]
    T[visuals.arm[0].parent, :3, 3] = ROBOT_BASE_M
    for arm in visuals.arm:
        T[arm.child] = T[arm.parent] @ arm.T_parent_joint
        if arm.kind == "revolute":  # every revolute joint of the Panda turns about its z
            c, s = np.cos(state[arm.state]), np.sin(state[arm.state])
            turn = np.array([[c, -s], [s, c]])
            T[arm.child, :3, :2] = T[arm.child, :3, :2] @ turn
        elif arm.kind == "prismatic":
            T[arm.child, :3, 3] += T[arm.child, :3, :3] @ np.array(arm.axis) * state[arm.state]
    return T
