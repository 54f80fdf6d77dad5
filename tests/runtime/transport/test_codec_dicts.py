"""Dictionaries, of calls and answers, survive the wire or are refused with a WireError."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openhelix.runtime.core.types import F64, LatentGoal
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
