"""A mismatch between producer and consumer refuses to start and says which field."""

import numpy as np
import pytest

from openhelix.runtime.core.interfaces import (
    ActionSpec,
    CameraFrame,
    CameraSpec,
    LatentSpec,
    PolicySpec,
    RobotSpec,
    SpecMismatch,
    check_frame,
    check_latent,
    check_robot,
)
from openhelix.runtime.core.plugins import ResolveError, resolve

STATIC = CameraSpec("static", 200, 200)
POLICY = PolicySpec((STATIC,), LatentSpec("act_last", 1, 512), ActionSpec(), horizon=16)


def test_a_robot_may_be_told_more_often_than_a_plan_has_rows() -> None:
    check_robot(RobotSpec((STATIC,), ActionSpec(hz=200.0)), POLICY)


def test_equal_specs_pass() -> None:
    check_latent(LatentSpec("act_last", 1, 512, "abc"), LatentSpec("act_last", 1, 512))
    check_robot(RobotSpec((STATIC, CameraSpec("gripper", 84, 84)), ActionSpec()), POLICY)


@pytest.mark.parametrize(
    ("robot", "field"),
    [
        (RobotSpec((), ActionSpec()), "camera 'static'"),
        (RobotSpec((CameraSpec("static", 100, 200),), ActionSpec()), "100x200"),
        (RobotSpec((CameraSpec("static", 200, 200, depth=False),), ActionSpec()), "depth"),
        (RobotSpec((STATIC,), ActionSpec(hz=20.0)), "action.hz"),
    ],
)
def test_robot_mismatch_names_the_field(robot: RobotSpec, field: str) -> None:
    with pytest.raises(SpecMismatch, match=field):
        check_robot(robot, POLICY)


@pytest.mark.parametrize(
    "spec",
    [
        LatentSpec("max_pool", 1, 512),
        LatentSpec("act_last", 4, 512),
        LatentSpec("act_last", 1, 192),
        LatentSpec("act_last", 1, 512, "other"),
    ],
)
def test_latent_mismatch_is_refused(spec: LatentSpec) -> None:
    with pytest.raises(SpecMismatch, match="latent"):
        check_latent(spec, LatentSpec("act_last", 1, 512, "mine"))


def test_frame_of_wrong_shape_or_dtype_is_refused() -> None:
    good = CameraFrame(
        0,
        np.zeros((200, 200, 3), np.uint8),
        np.zeros((200, 200), np.float32),
        np.eye(3),
        np.eye(4),
    )
    check_frame(good, STATIC)
    bad = CameraFrame(0, good.rgb, good.depth[:100], good.K, good.T_world_cam)  # type: ignore[index]
    with pytest.raises(SpecMismatch, match="depth"):
        check_frame(bad, STATIC)


def test_resolve_names_what_is_missing() -> None:
    assert resolve("openhelix.runtime.core.interfaces:LatentSpec") is LatentSpec
    for path, word in [
        ("openhelix.runtime.core.interfaces", "module:Name"),
        ("no.such:X", "no"),
        ("openhelix.runtime.core.interfaces:Y", "Y"),
    ]:
        with pytest.raises(ResolveError, match=word):
            resolve(path)
