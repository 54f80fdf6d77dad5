"""Every action form is read as calvin_env reads it; bad ones name their field."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from openhelix.benchmarks.calvin.spaces import ActionError, parse_action

numbers = st.floats(-3, 3, allow_nan=False)
grippers = st.sampled_from([-1, 1])


@given(
    st.lists(numbers, min_size=6, max_size=6), grippers, st.sampled_from([list, np.array, tuple])
)
def test_seven_numbers_are_relative(values, gripper, kind):
    command = parse_action(kind([*values, gripper]))
    assert command.kind == "cartesian_rel"
    assert command.values.tolist() == values
    assert command.gripper == gripper


@given(st.lists(numbers, min_size=3, max_size=3), grippers, st.integers(3, 4))
def test_tuple_and_dict_forms_of_an_absolute_pose_agree(position, gripper, size):
    rotation = [0.5] * size
    wanted = [*position, *rotation]
    for action in (
        (position, rotation, gripper),
        (np.array(position), tuple(rotation), np.array([float(gripper)])),
        {"type": "cartesian_abs", "action": (position, rotation, gripper)},
        {"type": "cartesian_abs", "action": [*wanted, gripper]},
    ):
        command = parse_action(action)
        assert (command.kind, command.gripper) == ("cartesian_abs", gripper)
        assert command.values.tolist() == wanted


def test_joint_forms():
    for kind in ("joint_rel", "joint_abs"):
        command = parse_action({"type": kind, "action": [*range(7), -1]})
        assert (command.kind, command.gripper) == (kind, -1)
        assert command.values.tolist() == list(range(7))
    command = parse_action({"type": "cartesian_rel", "action": np.ones(7)})
    assert command.kind == "cartesian_rel"


@pytest.mark.parametrize(
    ("action", "field"),
    [
        (np.zeros(6), "action: shape (6,)"),
        (np.zeros((7, 1)), "action: shape (7, 1)"),
        (np.zeros(8), "action: shape (8,)"),
        ([0, 0, 0, 0, 0, np.nan, 1], "action: contains NaN"),
        ([0, 0, 0, 0, 0, 0, 0.5], "gripper: 0.5"),
        ([0, 0, 0, 0, 0, 0, 0], "gripper"),
        (((0, 0), (0, 0, 0), 1), "action.position"),
        (((0, 0, 0), (0, 0), 1), "action.orientation"),
        (((0, 0, 0), (0, 0, 0, 0), 1), "action.orientation: a quaternion of length 0"),
        (((0, 0, np.inf), (0, 0, 0), 1), "action.position: contains NaN"),
        (((0, 0, 0), (0, 0, 0), "open"), "gripper"),
        ((None, (0, 0, 0), 1), "action.position"),
        (3.0, "action: float"),
        (None, "action: NoneType"),
        ({"type": "spin", "action": [0]}, "action.type: 'spin'"),
        ({"type": "joint_abs"}, "action.action: missing"),
        ({"type": "joint_abs", "action": np.zeros(7)}, "action.action: shape (7,)"),
        ({"type": "cartesian_abs", "action": 1.0}, "action.action: not a pose"),
    ],
)
def test_a_bad_action_names_its_field_in_one_line(action, field):
    with pytest.raises(ActionError) as error:
        parse_action(action)
    assert field in str(error.value)
    assert "\n" not in str(error.value)
