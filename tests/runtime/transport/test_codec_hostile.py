"""Nothing that arrives as a record raises anything but WireError."""

from __future__ import annotations

import dataclasses
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openhelix.runtime.core.interfaces import Action, LatentGoal, Observation
from openhelix.runtime.transport import codec
from openhelix.runtime.transport.codec import WireError, decode, register
from tests.runtime.codec_records import FLOATS, INTS, MESSAGES, Everything, attempt, on_the_wire


@settings(max_examples=200, deadline=None)
@given(MESSAGES, st.data())
def test_mutations_raise_only_wire_errors(message: Any, data: st.DataObject) -> None:
    frames, refused = attempt(lambda: on_the_wire(message))
    if refused == "nonfinite":  # nobody sends it
        return
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
    return headed(msgspec.msgpack.encode([codec.kind_of(cls), codec._PLANS[cls].fingerprint, row]))


def packed(row: Any, tail: bytes) -> bytes:
    body = msgspec.msgpack.encode(["latent", codec._PLANS[LatentGoal].fingerprint, row])
    return headed(body, pad=5) + bytes(5) + tail


def latent_row(array: Any) -> list[Any]:
    return [array, 0, 0, 0, 0, "s", "", 0.0, 1.0, False]


@pytest.mark.parametrize(
    ("frames", "reason"),
    [
        ([], "truncated"),
        ([b"OH\x03"], "truncated"),
        ([b"XY\x02\0\1\0\0\0\x90"], "header"),
        ([b"OH\x63\0\1\0\0\0\x90"], "version"),
        ([b"OH\x03\0\2\0\0\0\x90"], "truncated"),
        ([b"OH\x03\0\xff\xff\xff\xff\x90"], "oversize"),
        ([headed(b"")], "header"),
        ([headed(b"\xdd\xff\xff\xff\xff")], "header"),
        ([headed(b"\x91" * 5000)], "header"),
        ([headed(b"\x90")], "header"),
        ([header(latent_row([2, [1, 4], None]))], "truncated"),
        ([packed(latent_row([2, [1, 4], None]), b"\0" * 8)], "truncated"),
        ([packed(latent_row([2, [1, 4], None]), b"\0" * 24)], "oversize"),
        ([packed(latent_row([2, [1, 4], None]), b"\0" * 16) + b"x", b"\0" * 16], "oversize"),
        ([headed(msgspec.msgpack.encode(["latent", 0, []]), pad=255)], "field"),
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
        ([headed(msgspec.msgpack.encode(["action", 0, []]))], "kind"),
        ([headed(msgspec.msgpack.encode(["latent", 0, []]))], "field"),
    ],
)
def test_hostile_frames(frames: list[bytes], reason: str) -> None:
    with pytest.raises(WireError) as caught:
        decode(frames, LatentGoal)
    assert caught.value.reason == reason


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
