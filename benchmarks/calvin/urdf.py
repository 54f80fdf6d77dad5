"""Collision models for Bullet: the table, a block, the floor and the Panda, as URDF text.

None of them carries a visual shape: `openhelix.benchmarks.calvin.cameras` draws from its own
meshes, so the physics client stays small and loads in milliseconds. The Panda's links,
joints, inertias and collision hulls are those of pybullet's own wheel (`pybullet_data`);
longer fingers, finger pads, camera mount and TCP are added here.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from functools import cache, lru_cache
from math import pi
from pathlib import Path

import numpy as np
import pybullet_data
from scipy.spatial import ConvexHull

from openhelix.benchmarks.calvin import geometry
from openhelix.benchmarks.calvin.scene import BLOCK_SIDE_M, Scene
from openhelix.runtime.core.interfaces import F64
from openhelix.runtime.core.paths import cache_folder, make_in_cache

# -- Generated URDF and OBJ files, in a cache named by their content -------------------
#
# Bullet reads shapes from files only. They are written once per content: into a folder named
# by a hash of what goes in, made beside its final place and moved there in one step, so that
# any number of processes may start at once and a changed dimension never meets a stale file.


def content_folder(kind: str, files: Mapping[str, bytes]) -> Path:
    """Return the folder that holds exactly `files`, writing it if it is not there yet.

    Args:
        kind: what they are; a folder name under the cache.
        files: contents by relative file name.

    Raises:
        CacheFolderError: the cache cannot be written.
        OSError: the disk refuses; `filename` is the folder's.
    """
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(f"{name}\0{len(files[name])}\0".encode())
        digest.update(files[name])
    final = cache_folder() / "playtable" / kind / digest.hexdigest()[:20]
    if final.is_dir():
        return final
    make_in_cache(final.parent)
    made = Path(tempfile.mkdtemp(prefix=".new-", dir=final.parent))
    try:
        for name, data in files.items():
            (made / name).write_bytes(data)
        made.chmod(0o755)
        made.rename(final)
    except OSError as error:
        if not final.is_dir():  # a rename onto a folder that another process just made is fine
            raise OSError(error.errno, error.strerror, str(final)) from error
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return final


# -- The models ------------------------------------------------------------------------

HAND_TO_TCP_M = 0.14
HULL_MARGIN_M = 0.001  # Bullet's, around every convex mesh that it loads
CAMERA_MOUNT = ((-0.1, 0.0, 0.0), (1.3, 0.0, -1.57))  # xyz, rpy in the hand's frame

Sections = tuple[tuple[float, float, float, float], ...]
# Finger: cross-sections (z, half width in x, inner y, outer y), m, in the finger's frame.
FINGER_SECTIONS = (
    (0.0, 0.0104, 0.0062, 0.0269),
    (0.034, 0.0104, 0.0045, 0.0214),
    (0.065, 0.0087, 0.0040, 0.0141),
    (0.0905, 0.0087, 0.0040, 0.0067),
    (0.0962, 0.0055, 0.0040, 0.0067),
)
# What is seen of it: a block at the hand and a blade below.
FINGER_SEEN = (
    ((0.0, 0.0100, 0.0030, 0.0280), (0.020, 0.0100, 0.0125, 0.0268), (0.034, 0.0100, 0.0130, 0.0215)),
    ((0.030, 0.0095, 0.0036, 0.0180), (0.070, 0.0092, 0.0004, 0.0115), (0.0962, 0.0085, 0.0004, 0.0048)),
)  # fmt: skip
PAD_LO, PAD_HI = (-0.0092, -0.0002, 0.0707), (0.0092, 0.0050, 0.0957)


def finger_vertices(sections: Sections = FINGER_SECTIONS) -> F64:
    """Corners (n, 3) of the left finger's hull, m, in the finger's frame."""
    return np.array(
        [[sx * half, y, z] for z, half, lo, hi in sections for sx in (-1, 1) for y in (lo, hi)]
    )


def _obj(vertices: F64) -> bytes:
    """An OBJ whose convex hull is that of `vertices` (Bullet hulls what it loads)."""
    lines = [f"v {x:.6f} {y:.6f} {z:.6f}" for x, y, z in vertices]
    lines += [f"f {i} {i + 1} {i + 2}" for i in range(1, len(vertices) - 1)]
    return ("\n".join(["o hull", *lines]) + "\n").encode()


def _xyz(values: tuple[float, float, float] | F64) -> str:
    return " ".join(f"{v:.7g}" for v in values)


def _mesh(vertices: F64) -> bytes:
    """An OBJ of the triangles of the convex hull of `vertices`."""
    hull = ConvexHull(vertices)
    lines = [f"v {x:.6f} {y:.6f} {z:.6f}" for x, y, z in vertices]
    for corners, plane in zip(hull.simplices, hull.equations, strict=True):
        a, b, c = (int(i) for i in corners)
        outwards = np.cross(vertices[b] - vertices[a], vertices[c] - vertices[a]) @ plane[:3] > 0
        lines.append(f"f {a + 1} {b + 1} {c + 1}" if outwards else f"f {a + 1} {c + 1} {b + 1}")
    return ("\n".join(["o mesh", *lines]) + "\n").encode()


def _shape(piece: geometry.Piece, index: int, files: dict[str, bytes], support: str) -> str:
    """A piece's collision shape; `support` as in `scene.Variant`."""
    if support == "mesh" and piece.link == "base_link":  # what moves must be convex
        name = f"mesh_{index:02d}.obj"
        files[name] = _mesh(piece.vertices)
        mesh = f'<geometry><mesh filename="{name}"/></geometry>'
        return f'<collision concave="yes">{mesh}</collision>'
    if piece.box is not None and support == "box":
        centre, size = piece.box
        return (
            f'<collision><origin xyz="{_xyz(centre)}"/>'
            f'<geometry><box size="{_xyz(size)}"/></geometry></collision>'
        )
    name, corners = f"hull_{index:02d}.obj", piece.vertices
    if piece.box is not None:  # a box has no margin, a hull has
        corners = corners - np.sign(corners - piece.box[0]) * HULL_MARGIN_M
    files[name] = _obj(corners)
    return f'<collision><geometry><mesh filename="{name}"/></geometry></collision>'


def _link(name: str, mass: float, body: str) -> str:
    inertia = '<inertia ixx="0.01" ixy="0" ixz="0" iyy="0.01" iyz="0" izz="0.01"/>'
    return f'<link name="{name}"><inertial><mass value="{mass}"/>{inertia}</inertial>{body}</link>'


@lru_cache(maxsize=16)
def table_urdf(scene: Scene) -> Path:
    """Write the table of `scene`; return the path of its URDF.

    The folder also holds `frame.urdf`: what of the table never moves, as a body of its own.
    Bullet solves contacts with a plain static body much faster than with the base of an
    articulated one, and blocks rest on it all the time.
    """
    files: dict[str, bytes] = {}
    shapes: dict[str, str] = {}
    support = scene.variant.support if scene.variant else "box"
    for index, piece in enumerate(geometry.pieces(scene)):
        if piece.solid:
            shapes[piece.link] = shapes.get(piece.link, "") + _shape(piece, index, files, support)
    frame = _link("base_link", 0.0, shapes["base_link"])
    files["frame.urdf"] = f'<robot name="frame">{frame}</robot>'.encode()
    parts = [_link("base_link", 0.0, "")]
    for joint in geometry.joints(scene):
        parts.append(_link(joint.link, joint.mass_kg, shapes[joint.link]))
        kind = "fixed" if joint.axis is None else "prismatic"
        motion = "" if joint.axis is None else (
            f'<axis xyz="{_xyz(joint.axis)}"/>'
            f'<limit lower="0" upper="{joint.travel_m}" effort="0" velocity="0"/>'
        )  # fmt: skip
        parts.append(
            f'<joint name="{joint.name}" type="{kind}"><parent link="base_link"/>'
            f'<child link="{joint.link}"/>'
            f'<origin xyz="{_xyz(joint.origin)}" rpy="{joint.roll_rad:.15g} 0 0"/>{motion}</joint>'
        )
    files["table.urdf"] = ('<robot name="table">' + "\n".join(parts) + "</robot>").encode()
    return content_folder("table", files) / "table.urdf"


@cache
def block_urdf(length_m: float) -> Path:
    """Write a block of that length along x; return the path of its URDF."""
    contact = '<contact><lateral_friction value="0.7"/><spinning_friction value="0.001"/></contact>'
    size = f"{length_m} {BLOCK_SIDE_M} {BLOCK_SIDE_M}"
    shape = f'<collision><geometry><box size="{size}"/></geometry></collision>'
    text = f'<robot name="block">{_link("base_link", 1.0, contact + shape)}</robot>'
    return content_folder("block", {"block.urdf": text.encode()}) / "block.urdf"


@cache
def floor_urdf() -> Path:
    """Write the floor, a big slab whose top is z = 0; return the path of its URDF."""
    body = (
        '<contact><lateral_friction value="1"/></contact><collision><origin xyz="0 0 -5"/>'
        '<geometry><box size="200 200 10"/></geometry></collision>'
    )
    text = f'<robot name="floor">{_link("floor_link", 0.0, body)}</robot>'
    return content_folder("floor", {"floor.urdf": text.encode()}) / "floor.urdf"


def panda_source() -> Path:
    """The folder of the Panda that comes with pybullet."""
    return Path(pybullet_data.getDataPath()) / "franka_panda"


def _fixed(parent: str, child: str, xyz: str, rpy: str) -> ET.Element:
    return ET.fromstring(
        f'<joint name="{child}_joint" type="fixed"><parent link="{parent}"/>'
        f'<child link="{child}"/><origin xyz="{xyz}" rpy="{rpy}"/></joint>'
    )


def _bulged_pad(bulge_m: float) -> F64:
    """Corners (n, 3) of a finger pad whose inner face is an arc across, highest in the middle."""
    x0, y0, z0 = (low + HULL_MARGIN_M for low in PAD_LO)
    x1, y1, z1 = (high - HULL_MARGIN_M for high in PAD_HI)
    half, middle = (x1 - x0) / 2, (x0 + x1) / 2
    across = np.linspace(-half, half, 9)
    arc = [(middle + x, y0 + bulge_m * (x / half) ** 2) for x in across]
    return np.array([[x, y, z] for x, y in [*arc, (x0, y1), (x1, y1)] for z in (z0, z1)])


@cache
def panda_urdf(tip_bulge_m: float = 0.0) -> Path:
    """Write the Panda with long fingers, pads, camera mount and TCP; return its URDF's path.

    Args:
        tip_bulge_m: how far the middle of the pads stands out; 0 for flat ones.
    """
    source = panda_source()
    root = ET.fromstring((source / "panda.urdf").read_text())
    for link in root.iter("link"):
        for visual in link.findall("visual"):
            link.remove(visual)
        name = link.get("name", "")
        for mesh in link.iter("mesh"):
            relative = mesh.get("filename", "").removeprefix("package://")
            finger = name.endswith("finger")
            mesh.set("filename", "finger.obj" if finger else str(source / relative))
    centre = [(a + b) / 2 for a, b in zip(PAD_LO, PAD_HI, strict=True)]
    size = [b - a for a, b in zip(PAD_LO, PAD_HI, strict=True)]
    pad_contact = (
        '<contact><lateral_friction value="1"/><spinning_friction value="0.001"/></contact>'
    )
    files: dict[str, bytes] = {}
    shape = (
        f'<collision><origin xyz="{" ".join(map(str, centre))}"/><geometry>'
        f'<box size="{" ".join(map(str, size))}"/></geometry></collision>'
    )
    if tip_bulge_m:
        files["pad.obj"] = _obj(_bulged_pad(tip_bulge_m))
        shape = '<collision><geometry><mesh filename="pad.obj"/></geometry></collision>'
    for side, yaw in (("left", 0.0), ("right", pi)):
        pad = pad_contact + shape
        root.append(ET.fromstring(_link(f"finger_{side}_tip", 1e-4, pad)))
        root.append(_fixed(f"panda_{side}finger", f"finger_{side}_tip", "0 0 0", f"0 0 {yaw:.15g}"))
    xyz, rpy = CAMERA_MOUNT
    root.append(ET.fromstring(_link("gripper_cam", 0.2, "")))
    root.append(_fixed("panda_hand", "gripper_cam", _xyz(xyz), _xyz(rpy)))
    root.append(ET.fromstring(_link("tcp", 1e-5, "")))
    root.append(_fixed("panda_hand", "tcp", f"0 0 {HAND_TO_TCP_M}", "0 0 0"))
    files |= {"panda.urdf": ET.tostring(root), "finger.obj": _obj(finger_vertices())}
    return content_folder("panda", files) / "panda.urdf"
