"""Every record survives the wire; nothing that arrives raises anything but WireError."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import hypothesis.extra.numpy as hnp
import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime import codec
from runtime.buffers import INLINE_BYTES
from runtime.codec import WireError, decode, decode_dict, encode, encode_dict, register
from runtime.types import (
    F32,
    F64,
    Action,
    ActionChunk,
    CameraFrame,
    GoalRequest,
    LatentGoal,
    Observation,
)


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
    epoch=INTS,
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
        epoch=INTS,
    ),
    st.builds(
        GoalRequest,
        rgb=arrays("u1", st.tuples(st.integers(1, 30), st.integers(1, 30), st.just(3))),
        instruction=st.text(max_size=40),
        robot=st.text(max_size=8),
        seq=INTS,
        epoch=INTS,
        t_obs_ns=INTS,
        source=st.text(max_size=8),
    ),
    st.builds(
        LatentGoal,
        z=arrays("f4", st.tuples(st.integers(0, 4), st.integers(0, 300))),
        seq=INTS,
        epoch=INTS,
        t_obs_ns=INTS,
        t_pub_ns=INTS,
        spec_id=st.text(max_size=12),
        source=st.text(max_size=8),
        compute_s=FLOATS,
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


@settings(max_examples=150, deadline=None)
@given(MESSAGES)
def test_round_trip(message: Any) -> None:
    assert same(decode(on_the_wire(message), type(message)), message)


@settings(max_examples=200, deadline=None)
@given(MESSAGES, st.data())
def test_mutations_raise_only_wire_errors(message: Any, data: st.DataObject) -> None:
    frames = on_the_wire(message)
    for _ in range(data.draw(st.integers(1, 4))):
        index = data.draw(st.integers(0, len(frames) - 1))
        frame = bytearray(frames[index])
        at = data.draw(st.integers(0, len(frame)))
        match data.draw(st.sampled_from(["set", "cut", "insert", "drop", "repeat"])):
            case "set" if at < len(frame):
                frame[at] = data.draw(st.integers(0, 255))
            case "cut":
                del frame[at:]
            case "insert":
                frame[at:at] = data.draw(st.binary(max_size=9))
            case "drop" if len(frames) > 1:
                del frames[index]
                continue
            case "repeat":
                frames.append(bytes(frame))
        frames[index] = bytes(frame)
    result, reason = attempt(lambda: decode(frames, type(message)))
    assert reason in codec.REASONS or type(result) is type(message)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.binary(max_size=200), max_size=5),
    st.booleans(),
    st.sampled_from([LatentGoal, Observation, Everything]),
)
def test_arbitrary_bytes_raise_wire_error(frames: list[bytes], prefix: bool, cls: type) -> None:
    if prefix and frames:
        frames[0] = headed(frames[0])
    with pytest.raises(WireError) as caught:
        decode(frames, cls)
    assert caught.value.reason in codec.REASONS


ROW = st.recursive(
    st.none() | st.booleans() | INTS | FLOATS | st.text(max_size=4) | st.binary(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=9) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=20,
)


@settings(max_examples=200, deadline=None)
@given(ROW, st.sampled_from([LatentGoal, Observation, Everything, Action]))
def test_well_formed_nonsense_raises_wire_error(row: Any, cls: type) -> None:
    with pytest.raises(WireError):
        decode([header(row, cls)], cls)


def headed(body: bytes, pad: int = 0) -> bytes:
    return codec.HEAD.pack(codec.MAGIC, codec.VERSION, pad, len(body)) + body


def header(row: Any, cls: type = LatentGoal) -> bytes:
    return headed(msgpack.packb([codec.kind_of(cls), codec._PLANS[cls].fingerprint, row]))


def packed(row: Any, tail: bytes) -> bytes:
    body = msgpack.packb(["latent", codec._PLANS[LatentGoal].fingerprint, row])
    return headed(body, pad=5) + bytes(5) + tail


def latent_row(array: Any) -> list[Any]:
    return [array, 0, 0, 0, 0, "s", "", 0.0]


@pytest.mark.parametrize(
    ("frames", "reason"),
    [
        ([], "truncated"),
        ([b"OH\x01"], "truncated"),
        ([b"XY\x01\0\1\0\0\0\x90"], "header"),
        ([b"OH\x02\0\1\0\0\0\x90"], "version"),
        ([b"OH\x01\0\2\0\0\0\x90"], "truncated"),
        ([b"OH\x01\0\xff\xff\xff\xff\x90"], "oversize"),
        ([headed(b"")], "header"),
        ([headed(b"\xdd\xff\xff\xff\xff")], "header"),
        ([headed(b"\x91" * 5000)], "header"),
        ([headed(b"\x90")], "header"),
        ([header(latent_row([2, [1, 4], None]))], "truncated"),
        ([packed(latent_row([2, [1, 4], None]), b"\0" * 8)], "truncated"),
        ([packed(latent_row([2, [1, 4], None]), b"\0" * 24)], "oversize"),
        ([packed(latent_row([2, [1, 4], None]), b"\0" * 16) + b"x", b"\0" * 16], "oversize"),
        ([headed(msgpack.packb(["latent", 0, []]), pad=255)], "field"),
        ([header(latent_row([2, [1, 0], b""])) + b"x"], "oversize"),
        ([header(latent_row([2, [1, 4], None])), b"\0" * 15], "truncated"),
        ([header(latent_row([2, [1, 4], None])), b"\0" * 17], "oversize"),
        ([header(latent_row([2, [1, 4], None])), b"\0" * 16, b""], "oversize"),
        ([header(latent_row([2, [1 << 26] * 6, None])), b""], "truncated"),
        ([packed(latent_row([2, [1 << 26] * 6, None]), b"")], "truncated"),
        ([header(latent_row([2, [1 << 40, 1 << 40], None])), b""], "shape"),
        ([header(latent_row([2, [-1, 4], None])), b""], "shape"),
        ([header(latent_row([2, [0] + [1 << 26] * 5, None])), b""], "shape"),
        ([header(latent_row([2, [1] * 7, None])), b"\0" * 4], "shape"),
        ([header(latent_row([2, [4], None])), b"\0" * 16], "shape"),
        ([header(latent_row([3, [1, 2], None])), b"\0" * 16], "dtype"),
        ([header(latent_row(["O", [1, 2], None])), b"\0" * 16], "dtype"),
        ([header(latent_row([True, [1, 2], None])), b"\0" * 16], "dtype"),
        ([header(latent_row([2, [1, 1], np.float32(np.nan).tobytes()]))], "nonfinite"),
        ([header(latent_row([2, [1, 1], b"123"]))], "truncated"),
        ([header(latent_row([2, [1, 1], "1234"]))], "truncated"),
        ([header(latent_row(None))], "field"),
        ([header([1])], "field"),
        ([header({}, LatentGoal)], "field"),
        ([header(latent_row([2, [1, 0], b""])), *[b""] * 300], "oversize"),
        ([headed(b"\0" * (codec.MAX_HEADER_BYTES + 1))], "oversize"),
        ([headed(msgpack.packb(["action", 0, []]))], "kind"),
        ([headed(msgpack.packb(["latent", 0, []]))], "field"),
    ],
)
def test_hostile_frames(frames: list[bytes], reason: str) -> None:
    with pytest.raises(WireError) as caught:
        decode(frames, LatentGoal)
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (latent(z=np.ones((1, 512))), "dtype"),
        (latent(z=np.array([[object()]])), "dtype"),
        (latent(z=np.ones((1, 512), ">f4")), "dtype"),
        (latent(z=[1.0]), "dtype"),
        (latent(z=np.ones(512, np.float32)), "shape"),
        (latent(z=np.full((1, 512), np.inf, np.float32)), "nonfinite"),
        (latent(seq=1.5), "field"),
        (latent(seq=True), "field"),
        (latent(seq=2**63), "field"),
        (latent(spec_id=b"x"), "field"),
        (latent(compute_s="1"), "field"),
        (Action(np.zeros(7), 0.0, info={1: 2.0}), "field"),  # type: ignore[dict-item]
        (Action(np.zeros(7), 0.0, info=None), "field"),  # type: ignore[arg-type]
        (ActionChunk(0, 1, np.zeros((3, 7)), np.zeros(2), 0), "shape"),
        (latent(spec_id="x" * codec.MAX_HEADER_BYTES), "oversize"),
        (object(), "kind"),
    ],
)
def test_a_sender_cannot_break_the_schema(message: Any, reason: str) -> None:
    with pytest.raises(WireError) as caught:
        encode(message)
    assert caught.value.reason == reason


def test_huge_finite_values_are_finite() -> None:
    z = np.full((1, 512), 1e38, np.float32)  # their sum overflows
    assert same(decode(on_the_wire(latent(z=z)), LatentGoal).z, z)


def test_numpy_scalars_and_strided_arrays_travel() -> None:
    z = np.arange(4096, dtype=np.float32).reshape(2, 2048)[:, ::2]
    message = latent(z=z, seq=np.int64(5), compute_s=np.float32(0.5))
    got = decode(on_the_wire(message), LatentGoal)
    assert (got.z == z).all()
    assert (got.seq, got.compute_s) == (5, 0.5)
    assert type(got.seq) is int


def test_large_arrays_are_not_copied_and_cannot_be_written() -> None:
    message = latent(z=np.ones((2, 32768), np.float32))
    frames = encode(message)
    assert np.shares_memory(np.frombuffer(frames[1], np.float32), message.z)
    received = [bytearray(frame) for frame in frames]
    got = decode(received, LatentGoal)  # type: ignore[arg-type]
    assert np.shares_memory(np.frombuffer(received[1], np.float32), got.z)
    with pytest.raises(ValueError, match="read-only"):
        got.z[0, 0] = 1.0


@pytest.mark.parametrize("prefix", [b"", b"topic\0", b"12345678"])
@pytest.mark.parametrize("count", [1, 257, 4096, 16384, 16385])
def test_how_arrays_travel_depends_on_their_size(prefix: bytes, count: int) -> None:
    z = np.arange(count, dtype=np.float32)[None]
    frames = [bytes(frame) for frame in encode(latent(z=z), prefix)]
    inline, one_frame = z.nbytes <= INLINE_BYTES, z.nbytes <= codec.PACK_BYTES
    assert len(frames) == (1 if one_frame else 2)
    assert frames[0].startswith(prefix + codec.MAGIC)
    got = decode(frames, LatentGoal, len(prefix))
    assert (got.z == z).all()
    assert got.z.flags.aligned
    assert not got.z.flags.writeable
    if not inline:
        whole = np.frombuffer(frames[-1], np.uint8)
        assert np.shares_memory(whole, got.z)


def test_a_prefix_may_be_put_in_front_afterwards() -> None:
    z = np.arange(4096, dtype=np.float32)[None]
    for count in range(9):
        frame = b"x" * count + bytes(encode(latent(z=z))[0])
        got = decode([frame], LatentGoal, count)
        assert (got.z == z).all()
        assert got.z.flags.aligned


def test_several_packed_arrays_keep_their_order_and_alignment() -> None:
    chunk = ActionChunk(0, 1, np.arange(301 * 7.0).reshape(301, 7), np.arange(301.0), 3)
    frames = on_the_wire(chunk)
    assert len(frames) == 1
    assert same(decode(frames, ActionChunk), chunk)
    odd = GoalRequest(np.arange(7 * 61 * 3, dtype=np.uint8).reshape(7, 61, 3), "x", "y", 0, 0, 0)
    assert same(decode(on_the_wire(odd), GoalRequest), odd)


def test_an_unaligned_frame_gives_an_aligned_array() -> None:
    frames = on_the_wire(latent(z=np.ones((2, 32768), np.float32)))
    shifted = memoryview(b"\0" + frames[1])[1:]
    got = decode([frames[0], shifted], LatentGoal)
    assert got.z.flags.aligned
    assert (got.z == 1.0).all()


def test_a_record_that_refuses_its_values_is_a_wire_error() -> None:
    @dataclasses.dataclass(frozen=True)
    class Picky:
        n: int

        def __post_init__(self) -> None:
            if self.n < 0:
                raise ValueError("n is negative")

    # Annotations are resolved in module scope, so give the plan what it needs.
    Picky.__annotations__ = {"n": int}
    register("test_picky", Picky)
    good = on_the_wire(Picky(1))
    assert decode(good, Picky) == Picky(1)
    with pytest.raises(WireError, match="negative"):
        decode([good[0][:-1] + b"\xff"], Picky)  # the last byte is n, now -1


def test_register_refuses_what_cannot_travel() -> None:
    @dataclasses.dataclass(frozen=True)
    class Opaque:
        x: object

    Opaque.__annotations__ = {"x": object}
    with pytest.raises(TypeError, match=r"Opaque\.x"):
        register("test_opaque", Opaque)
    with pytest.raises(ValueError, match="taken"):
        register("latent", Action)
    with pytest.raises(ValueError, match="taken"):
        register("test_action_again", Action)
    assert register("action", Action) is Action  # the same again is fine
    with pytest.raises(WireError) as caught:
        decode([], Opaque)
    assert caught.value.reason == "kind"


def test_dict_round_trip() -> None:
    big: F64 = np.arange(300.0).reshape(3, 100)
    body = {
        "a": [1, 2.5, None, True, {"b": big, "c": np.zeros(3, np.uint8)}],
        "t": (1, 2),
        "n": np.float64(0.25),
        "raw": b"\0\xff",
    }
    got = decode_dict([bytes(frame) for frame in encode_dict("call", body)], "call")
    assert (got["a"][4]["b"] == big).all()
    assert got["a"][4]["c"].dtype == np.uint8
    assert got["a"][:4] == [1, 2.5, None, True]
    assert (got["t"], got["n"], got["raw"]) == ([1, 2], 0.25, b"\0\xff")


@pytest.mark.parametrize("value", [object(), {1, 2}, np.array([None]), 2**70, lambda: 0])
def test_dicts_refuse_what_cannot_travel(value: Any) -> None:
    with pytest.raises(WireError):
        encode_dict("call", {"x": value})


def test_a_dict_that_contains_itself_is_refused() -> None:
    body: dict[str, Any] = {}
    body["x"] = body
    with pytest.raises(WireError):
        encode_dict("call", body)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_mutated_dicts_raise_only_wire_errors(data: st.DataObject) -> None:
    body = {"m": "x", "args": {"z": np.zeros(500), "s": np.zeros(2), "k": [1, "two", None]}}
    frames = [bytearray(frame) for frame in encode_dict("call", body)]
    for _ in range(data.draw(st.integers(1, 5))):
        frame = frames[data.draw(st.integers(0, len(frames) - 1))]
        if frame:
            frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    got, reason = attempt(lambda: decode_dict([bytes(frame) for frame in frames], "call"))
    assert reason in codec.REASONS or type(got) is dict


def test_dict_kinds_do_not_mix_with_records() -> None:
    frames = [bytes(frame) for frame in encode_dict("latent", {})]
    with pytest.raises(WireError) as caught:
        decode(frames, LatentGoal)
    assert caught.value.reason == "kind"
    with pytest.raises(WireError):
        decode_dict(frames, "call")
    with pytest.raises(WireError):
        decode_dict(on_the_wire(latent()), "latent")
