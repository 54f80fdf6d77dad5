"""Visual meshes: the furniture's pieces as triangles, the Panda's own meshes made light.

The meshes in pybullet's wheel have 100,000 faces; at a pixel of 3 to 4 mm most of them are
smaller than a pixel. Merging the corners that share a cell of a few millimetres leaves a
few thousand; the result is kept in the cache, named by source and cell size.
"""

from __future__ import annotations

import hashlib
import io
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.spatial import ConvexHull

from benchmarks.playtable.assets import cache_dir
from benchmarks.playtable.geometry import Piece
from runtime.types import F32, F64, U8

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
    folder = cache_dir() / "playtable" / "meshes"
    path = folder / f"{key}.npz"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        np.savez_compressed(buffer, allow_pickle=False, **build())
        handle, name = tempfile.mkstemp(dir=folder)
        with os.fdopen(handle, "wb") as file:
            file.write(buffer.getvalue())
        Path(name).replace(path)
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
