"""openhelix.runtime.core.quaternion against scipy's Rotation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation, Slerp

from openhelix.runtime.core import quaternion as quat

component = st.floats(-1, 1, allow_nan=False)
quats = st.tuples(component, component, component, component).filter(
    lambda q: float(np.linalg.norm(q)) > 1e-3
)


def same_rotation(a: object, b: object, tolerance: float = 1e-7) -> bool:
    ra, rb = Rotation.from_quat(np.asarray(a)), Rotation.from_quat(np.asarray(b))
    return bool((ra.inv() * rb).magnitude() < tolerance)


@given(quats, quats)
def test_multiply_and_conjugate(a, b):
    qa, qb = quat.normalise(a), quat.normalise(b)
    assert same_rotation(
        quat.multiply(qa, qb), (Rotation.from_quat(qa) * Rotation.from_quat(qb)).as_quat()
    )
    assert same_rotation(quat.multiply(qa, quat.conjugate(qa)), quat.IDENTITY)


@given(quats, quats, st.floats(0, 1))
def test_slerp(a, b, weight):
    qa, qb = quat.normalise(a), quat.normalise(b)
    assume(quat.angle_between(qa, qb) < 3.1)  # at pi both ways round are short
    expected = Slerp([0, 1], Rotation.from_quat([qa, qb]))(weight).as_quat()
    assert same_rotation(quat.slerp(qa, qb, weight), expected, 1e-5)


@given(quats, quats)
def test_rotation_vector_takes_start_to_end(a, b):
    qa, qb = quat.normalise(a), quat.normalise(b)
    v = quat.rotation_vector(qa, qb)
    assert np.linalg.norm(v) <= np.pi + 1e-9
    assert same_rotation(quat.multiply(quat.from_rotation_vector(v), qa), qb)


@given(st.tuples(st.floats(-3, 3), st.floats(-1.5, 1.5), st.floats(-3, 3)))
def test_euler_round_trip(euler):
    q = quat.from_euler_xyz(euler)
    assert same_rotation(q, Rotation.from_euler("xyz", euler).as_quat())
    assert quat.to_euler_xyz(q) == pytest.approx(euler, abs=1e-6)


@pytest.mark.parametrize("pitch", [np.pi / 2, -np.pi / 2])
def test_euler_at_the_pole_is_still_the_rotation(pitch):
    q = quat.from_euler_xyz((0.3, pitch, 0.2))
    assert same_rotation(quat.from_euler_xyz(quat.to_euler_xyz(q)), q, 1e-6)


@given(quats)
def test_matrix(q):
    unit = quat.normalise(q)
    np.testing.assert_allclose(quat.matrix(unit), Rotation.from_quat(unit).as_matrix(), atol=1e-12)


@pytest.mark.parametrize("bad", [(0, 0, 0, 0), (float("nan"), 0, 0, 1), (0, float("inf"), 0, 1)])
def test_normalise_refuses_what_is_no_rotation(bad):
    with pytest.raises(quat.QuaternionError):
        quat.normalise(bad)
