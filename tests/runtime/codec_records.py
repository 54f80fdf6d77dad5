"""Records of every kind that travels, and what the codec's tests share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import hypothesis.extra.numpy as hnp
import numpy as np
from hypothesis import strategies as st

from openhelix.runtime.core.interfaces import (
    F32,
    Action,
    ActionChunk,
    CameraFrame,
    GoalRequest,
    LatentGoal,
    Observation,
)
from openhelix.runtime.transport.codec import WireError, encode, register


@dataclasses.dataclass(frozen=True, slots=True)
class Everything:
    """All that a field may be, in one record."""

    flag: bool
    names: tuple[str, ...]
    maybe: int | None
    mode: Literal["a", "b"]
    inner: Action | None
    by_name: Mapping[str, Action]
    ratio: float
    big: F32


register("test_everything", Everything)

INTS = st.integers(-(2**63), 2**63 - 1)
FLOATS = st.floats(width=64, allow_nan=False)
FINITE = st.floats(-1e6, 1e6)


def arrays(dtype: str, shape: Any) -> st.SearchStrategy[Any]:
    if dtype == "u1":
        return hnp.arrays(dtype, shape)
    return hnp.arrays(dtype, shape, elements=st.floats(-1e6, 1e6, width=32))


@st.composite
def cameras(draw: st.DrawFn) -> CameraFrame:
    h, w = draw(st.integers(1, 24)), draw(st.integers(1, 24))
    depth = draw(st.none() | arrays("f4", (h, w)))
    return CameraFrame(
        draw(INTS),
        draw(arrays("u1", (h, w, 3))),
        depth,
        draw(arrays("f8", (3, 3))),
        draw(arrays("f8", (4, 4))),
    )


@st.composite
def chunks(draw: st.DrawFn) -> ActionChunk:
    h = draw(st.integers(0, 40))
    return ActionChunk(
        draw(INTS), draw(INTS), draw(arrays("f8", (h, 7))), draw(arrays("f8", h)), draw(INTS)
    )


ACTIONS = st.builds(
    Action,
    pose=arrays("f8", 7),
    gripper=FINITE,
    instruction_id=INTS,
    t_ns=INTS,
    info=st.dictionaries(st.text(max_size=8), FLOATS, max_size=3),
)
MESSAGES = st.one_of(
    cameras(),
    chunks(),
    ACTIONS,
    st.builds(
        Observation,
        t_ns=INTS,
        frames=st.dictionaries(st.text(max_size=8), cameras(), max_size=2),
        tcp_pose=arrays("f8", 7),
        gripper_width=FLOATS,
        gripper_open=st.booleans(),
        joints=arrays("f8", st.integers(0, 9)),
        instruction_id=INTS,
    ),
    st.builds(
        GoalRequest,
        rgb=arrays("u1", st.tuples(st.integers(1, 30), st.integers(1, 30), st.just(3))),
        instruction=st.text(max_size=40),
        robot=st.text(max_size=8),
        seq=INTS,
        instruction_id=INTS,
        t_obs_ns=INTS,
        source=st.text(max_size=8),
        proprio=st.none() | arrays("f4", 9),
    ),
    st.builds(
        LatentGoal,
        z=arrays("f4", st.tuples(st.integers(0, 4), st.integers(0, 300))),
        seq=INTS,
        instruction_id=INTS,
        t_obs_ns=INTS,
        t_pub_ns=INTS,
        spec_id=st.text(max_size=12),
        source=st.text(max_size=8),
        compute_s=FINITE,
    ),
    st.builds(
        Everything,
        flag=st.booleans(),
        names=st.lists(st.text(max_size=4), max_size=4).map(tuple),
        maybe=st.none() | INTS,
        mode=st.sampled_from(["a", "b"]),
        inner=st.none() | ACTIONS,
        by_name=st.dictionaries(st.text(max_size=4), ACTIONS, max_size=2),
        ratio=FLOATS,
        big=arrays("f4", st.integers(0, 600)),
    ),
)


def same(a: Any, b: Any) -> bool:
    if dataclasses.is_dataclass(a):
        names = [field.name for field in dataclasses.fields(a)]
        return type(a) is type(b) and all(same(getattr(a, n), getattr(b, n)) for n in names)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and bool((a == b).all())
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return type(a) is type(b) and a == b


def on_the_wire(message: Any) -> list[bytes]:
    return [bytes(frame) for frame in encode(message)]


def attempt(action: Callable[[], Any]) -> tuple[Any, str | None]:
    """Return (result, None) or (None, reason); anything but a WireError propagates."""
    try:
        return action(), None
    except WireError as error:
        return None, error.reason


def latent(**changes: Any) -> LatentGoal:
    base = LatentGoal(np.ones((1, 512), np.float32), 3, 1, 10, 20, "spec", "me")
    return dataclasses.replace(base, **changes)
