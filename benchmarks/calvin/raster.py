"""A small triangle rasteriser, compiled: colour, metric depth and segmentation at once.

Why not Bullet's: its CPU renderer takes 20 to 40 ms a view, draws only what a physics
client holds, and cannot be given a texture or a light without that client. This one takes
one to two milliseconds, needs no client, so that another process or thread can draw from a
published state (the interpreter lock is released), and gives the same bits every time.

Pinhole camera in OpenCV axes, pixel centres at +0.5, depth along the optical axis. Faces
that look away are not drawn. Light is per corner: ambient + diffuse n.l + specular r_z^2.
"""

from __future__ import annotations

import numpy as np
from numba import njit  # type: ignore[import-untyped]

from openhelix.runtime.core.interfaces import F32, F64, U8


@njit(cache=True, nogil=True, fastmath=False, error_model="numpy")  # type: ignore[untyped-decorator]
def draw(
    first: int,
    last: int,
    position: F32,  # (T, 3, 3) link frame
    normal: F32,  # (T, 3, 3) link frame
    uv: F32,  # (T, 3, 2) metres on the texture
    link: np.ndarray,  # (T,) i32
    material: np.ndarray,  # (T,) i32
    segment: np.ndarray,  # (T,) i32
    T_world_link: F64,  # (L, 4, 4)
    T_cam_world: F64,  # (4, 4)
    camera: F64,  # fx, fy, cx, cy, near, far
    colours: F32,  # (M, 3)
    texture: np.ndarray,  # (M,) i32 index of the texture, -1 for none
    texels: U8,  # (X, S, S, 3)
    texture_m: F32,  # (X,) metres that a texture spans
    light: F64,  # direction xyz, ambient, diffuse, specular, colour rgb
    rgb: U8,  # (H, W, 3) drawn into
    depth: F32,  # (H, W) drawn into
    mask: np.ndarray,  # (H, W) i32 drawn into
) -> None:
    """Draw triangles `first` to `last` over what the three images hold."""
    height, width = depth.shape
    fx, fy, cx, cy, near, far = camera
    lx, ly, lz, ambient, diffuse, specular = light[:6]
    n_links = T_world_link.shape[0]
    T_cam_link = np.empty((n_links, 3, 4))
    for k in range(n_links):
        for i in range(3):
            for j in range(4):
                s = 0.0
                for m in range(4):
                    s += T_cam_world[i, m] * T_world_link[k, m, j]
                T_cam_link[k, i, j] = s
    # A corner in camera space: x, y, z, shade, u, v; clipping can make four of three.
    corner = np.empty((3, 6))
    poly = np.empty((4, 6))
    sx = np.empty(4)
    sy = np.empty(4)
    iz = np.empty(4)
    for t in range(first, last):
        k = link[t]
        behind = 0
        for v in range(3):
            px, py, pz = position[t, v, 0], position[t, v, 1], position[t, v, 2]
            for i in range(3):
                corner[v, i] = (
                    T_cam_link[k, i, 0] * px
                    + T_cam_link[k, i, 1] * py
                    + T_cam_link[k, i, 2] * pz
                    + T_cam_link[k, i, 3]
                )
            if corner[v, 2] < near:
                behind += 1
        if behind == 3:
            continue
        ax, ay, az = corner[0, 0], corner[0, 1], corner[0, 2]
        e1x, e1y, e1z = corner[1, 0] - ax, corner[1, 1] - ay, corner[1, 2] - az
        e2x, e2y, e2z = corner[2, 0] - ax, corner[2, 1] - ay, corner[2, 2] - az
        facing = (
            (e1y * e2z - e1z * e2y) * ax
            + (e1z * e2x - e1x * e2z) * ay
            + (e1x * e2y - e1y * e2x) * az
        )
        if facing >= 0.0:
            continue
        if behind == 0:
            x_lo = x_hi = fx * corner[0, 0] / corner[0, 2]
            y_lo = y_hi = fy * corner[0, 1] / corner[0, 2]
            for v in range(1, 3):
                x, y = fx * corner[v, 0] / corner[v, 2], fy * corner[v, 1] / corner[v, 2]
                x_lo, x_hi = min(x_lo, x), max(x_hi, x)
                y_lo, y_hi = min(y_lo, y), max(y_hi, y)
            if x_hi + cx < 0.0 or x_lo + cx > width or y_hi + cy < 0.0 or y_lo + cy > height:
                continue
        mat = material[t]
        for v in range(3):
            nx, ny, nz = normal[t, v, 0], normal[t, v, 1], normal[t, v, 2]
            wx = (
                T_world_link[k, 0, 0] * nx + T_world_link[k, 0, 1] * ny + T_world_link[k, 0, 2] * nz
            )
            wy = (
                T_world_link[k, 1, 0] * nx + T_world_link[k, 1, 1] * ny + T_world_link[k, 1, 2] * nz
            )
            wz = (
                T_world_link[k, 2, 0] * nx + T_world_link[k, 2, 1] * ny + T_world_link[k, 2, 2] * nz
            )
            lambert = wx * lx + wy * ly + wz * lz
            shade = ambient
            if lambert > 0.0:
                shade += diffuse * lambert
                mirror = 2.0 * lambert * wz - lz
                if mirror > 0.0:
                    shade += specular * mirror * mirror
            corner[v, 3] = shade
            corner[v, 4], corner[v, 5] = uv[t, v, 0], uv[t, v, 1]
        count = 0
        for v in range(3):
            w = (v + 1) % 3
            inside, next_inside = corner[v, 2] >= near, corner[w, 2] >= near
            if inside:
                for i in range(6):
                    poly[count, i] = corner[v, i]
                count += 1
            if inside != next_inside:
                a = (near - corner[v, 2]) / (corner[w, 2] - corner[v, 2])
                for i in range(6):
                    poly[count, i] = corner[v, i] + a * (corner[w, i] - corner[v, i])
                count += 1
        for v in range(count):
            iz[v] = 1.0 / poly[v, 2]
            sx[v] = fx * poly[v, 0] * iz[v] + cx
            sy[v] = fy * poly[v, 1] * iz[v] + cy
        tex = texture[mat]
        r0, g0, b0 = (
            colours[mat, 0] * light[6],
            colours[mat, 1] * light[7],
            colours[mat, 2] * light[8],
        )
        for c in range(1, count - 1):
            x0, y0, x1, y1, x2, y2 = sx[0], sy[0], sx[c], sy[c], sx[c + 1], sy[c + 1]
            area = (x1 - x0) * (y2 - y0) - (x2 - x0) * (y1 - y0)
            if area == 0.0:
                continue
            x_min = max(int(np.ceil(min(x0, x1, x2) - 0.5)), 0)
            x_max = min(int(np.floor(max(x0, x1, x2) - 0.5)), width - 1)
            y_min = max(int(np.ceil(min(y0, y1, y2) - 0.5)), 0)
            y_max = min(int(np.floor(max(y0, y1, y2) - 0.5)), height - 1)
            inv = 1.0 / area
            for row in range(y_min, y_max + 1):
                yy = row + 0.5
                for col in range(x_min, x_max + 1):
                    xx = col + 0.5
                    w1 = ((xx - x0) * (y2 - y0) - (x2 - x0) * (yy - y0)) * inv
                    w2 = ((x1 - x0) * (yy - y0) - (xx - x0) * (y1 - y0)) * inv
                    w0 = 1.0 - w1 - w2
                    if w0 < 0.0 or w1 < 0.0 or w2 < 0.0:
                        continue
                    p0, p1, p2 = w0 * iz[0], w1 * iz[c], w2 * iz[c + 1]
                    z = 1.0 / (p0 + p1 + p2)
                    if z >= depth[row, col] or z > far:
                        continue
                    p0, p1, p2 = p0 * z, p1 * z, p2 * z
                    shade = p0 * poly[0, 3] + p1 * poly[c, 3] + p2 * poly[c + 1, 3]
                    red, green, blue = r0, g0, b0
                    if tex >= 0:
                        size = texels.shape[1]
                        scale = size / texture_m[tex]
                        u = (p0 * poly[0, 4] + p1 * poly[c, 4] + p2 * poly[c + 1, 4]) * scale
                        w = (p0 * poly[0, 5] + p1 * poly[c, 5] + p2 * poly[c + 1, 5]) * scale
                        i, j = int(np.floor(w)) % size, int(np.floor(u)) % size
                        red *= texels[tex, i, j, 0] / 255.0
                        green *= texels[tex, i, j, 1] / 255.0
                        blue *= texels[tex, i, j, 2] / 255.0
                    depth[row, col] = z
                    mask[row, col] = segment[t]
                    rgb[row, col, 0] = np.uint8(min(max(red * shade * 255.0, 0.0), 255.0))
                    rgb[row, col, 1] = np.uint8(min(max(green * shade * 255.0, 0.0), 255.0))
                    rgb[row, col, 2] = np.uint8(min(max(blue * shade * 255.0, 0.0), 255.0))
