"""Dictionaries, of calls and answers, survive the wire or are refused with a WireError."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.msgpack import Ext

from openhelix.runtime.core.interfaces import F64, LatentGoal
from openhelix.runtime.transport import codec
from openhelix.runtime.transport.codec import WireError, decode, decode_dict, encode_dict
from tests.runtime.codec_records import attempt, latent, on_the_wire


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


@pytest.mark.parametrize("value", [object(), np.array([None]), 2**70, lambda: 0])
def test_dicts_refuse_what_cannot_travel(value: Any) -> None:
    with pytest.raises(WireError):
        encode_dict("call", {"x": value})


def deep(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    "value", [{1: 2}, {b"k": 2}, [{"a": {None: 1}}], datetime.now(UTC), Ext(7, b"x"), deep(200)]
)
def test_dicts_refuse_what_is_never_sent(value: Any) -> None:
    raw = msgspec.msgpack.encode(["dict:call", 0, {"x": value}])
    head = codec.HEAD.pack(codec.MAGIC, codec.VERSION, 0, len(raw))
    with pytest.raises(WireError):
        decode_dict([head + raw], "call")


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
