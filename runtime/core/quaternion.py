"""Unit quaternions xyzw in plain floats, for the parts that run inside a control tick.

A tick has 300 µs. scipy's Rotation costs 10 to 40 µs an object; four Python floats cost
about one. So chunks, safety and drivers do their few rotations here. Everything takes and
returns tuples `(x, y, z, w)`; angles are radians; rotation vectors are in the frame that the
quaternions map to (the world frame W for a TCP orientation).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import acos, asin, atan2, cos, hypot, pi, sin, sqrt

Quat = tuple[float, float, float, float]
Vec3 = tuple[float, float, float]

IDENTITY: Quat = (0.0, 0.0, 0.0, 1.0)


class QuaternionError(ValueError):
    """Four numbers that are no rotation: not finite, or too short to normalise."""


def normalise(q: Sequence[float]) -> Quat:
    """Return `q` at unit length.

    Raises:
        QuaternionError: a component is not finite, or the length is below 1e-6.
    """
    x, y, z, w = float(q[0]), float(q[1]), float(q[2]), float(q[3])
    length = sqrt(x * x + y * y + z * z + w * w)
    # The comparison is written so that NaN fails it too.
    if not 1e-6 < length < 1e150:
        raise QuaternionError(f"quaternion {(x, y, z, w)} cannot be normalised")
    return (x / length, y / length, z / length, w / length)


def multiply(a: Quat, b: Quat) -> Quat:
    """Return the rotation `b` followed by `a`."""
    ax, ay, az, aw = a
    bx, by, bz, bw = b
    return (
        aw * bx + ax * bw + ay * bz - az * by,
        aw * by - ax * bz + ay * bw + az * bx,
        aw * bz + ax * by - ay * bx + az * bw,
        aw * bw - ax * bx - ay * by - az * bz,
    )


def conjugate(q: Quat) -> Quat:
    """Return the inverse of a unit quaternion."""
    return (-q[0], -q[1], -q[2], q[3])


def slerp(a: Quat, b: Quat, weight: float) -> Quat:
    """Return the rotation `weight` of the short way from `a` (0) to `b` (1)."""
    ax, ay, az, aw = a
    bx, by, bz, bw = b
    dot = ax * bx + ay * by + az * bz + aw * bw
    if dot < 0.0:  # q and -q are one rotation: take the near one
        bx, by, bz, bw, dot = -bx, -by, -bz, -bw, -dot
    if dot > 0.9995:  # nearly parallel: sin(angle) would divide by almost nothing
        u, v = 1.0 - weight, weight
    else:
        angle = acos(dot)
        scale = 1.0 / sin(angle)
        u, v = sin((1.0 - weight) * angle) * scale, sin(weight * angle) * scale
    x, y, z, w = u * ax + v * bx, u * ay + v * by, u * az + v * bz, u * aw + v * bw
    length = sqrt(x * x + y * y + z * z + w * w)
    return (x / length, y / length, z / length, w / length)


def rotation_vector(start: Quat, end: Quat) -> Vec3:
    """Return axis times angle, in radians, of the short rotation that takes `start` to `end`."""
    x, y, z, w = multiply(end, conjugate(start))
    if w < 0.0:
        x, y, z, w = -x, -y, -z, -w
    length = hypot(x, y, z)
    if length < 1e-12:
        return (0.0, 0.0, 0.0)
    scale = 2.0 * atan2(length, w) / length
    return (x * scale, y * scale, z * scale)


def from_rotation_vector(v: Sequence[float]) -> Quat:
    """Return the rotation about `v` by its length in radians."""
    x, y, z = float(v[0]), float(v[1]), float(v[2])
    angle = hypot(x, y, z)
    scale = 0.5 if angle < 1e-9 else sin(0.5 * angle) / angle
    return (x * scale, y * scale, z * scale, cos(0.5 * angle))


def angle_between(a: Quat, b: Quat) -> float:
    """Return the angle of the short rotation between `a` and `b`, 0 to pi rad."""
    return hypot(*rotation_vector(a, b))


def from_euler_xyz(euler: Sequence[float]) -> Quat:
    """Return the rotation of fixed-axis (extrinsic) x, then y, then z angles: Bullet's order."""
    hx, hy, hz = (0.5 * float(angle) for angle in euler)
    sx, cx, sy, cy, sz, cz = sin(hx), cos(hx), sin(hy), cos(hy), sin(hz), cos(hz)
    return (
        sx * cy * cz - cx * sy * sz,
        cx * sy * cz + sx * cy * sz,
        cx * cy * sz - sx * sy * cz,
        cx * cy * cz + sx * sy * sz,
    )


def to_euler_xyz(q: Quat) -> Vec3:
    """Return fixed-axis x, y, z angles; at the pole (y = ±pi/2) the z angle is set to zero."""
    x, y, z, w = q
    sin_y = 2.0 * (w * y - x * z)
    if abs(sin_y) > 1.0 - 1e-12:
        roll = 2.0 * atan2(x, w)
        return ((roll + pi) % (2.0 * pi) - pi, asin(max(-1.0, min(1.0, sin_y))), 0.0)
    return (
        atan2(2.0 * (w * x + y * z), 1.0 - 2.0 * (x * x + y * y)),
        asin(sin_y),
        atan2(2.0 * (w * z + x * y), 1.0 - 2.0 * (y * y + z * z)),
    )


def matrix(q: Quat) -> tuple[Vec3, Vec3, Vec3]:
    """Return the rotation's 3x3 matrix as three rows."""
    x, y, z, w = q
    return (
        (1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)),
        (2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)),
        (2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)),
    )
