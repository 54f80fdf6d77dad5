"""Every record survives the wire, and no sender can send what breaks its schema."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings

from openhelix.runtime.core.interfaces import Action, ActionChunk, GoalRequest, LatentGoal
from openhelix.runtime.transport import codec
from openhelix.runtime.transport.codec import INLINE_BYTES, WireError, decode, encode, register
from tests.runtime.codec_records import MESSAGES, latent, on_the_wire, same


@settings(max_examples=150, deadline=None)
@given(MESSAGES)
def test_round_trip(message: Any) -> None:
    assert same(decode(on_the_wire(message), type(message)), message)


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (latent(z=np.ones((1, 512))), "dtype"),
        (latent(z=np.array([[object()]])), "dtype"),
        (latent(z=np.ones((1, 512), ">f4")), "dtype"),
        (latent(z=[1.0]), "dtype"),
        (latent(z=np.ones(512, np.float32)), "shape"),
        (latent(z=np.full((1, 512), np.inf, np.float32)), "nonfinite"),
        (latent(compute_s=np.inf), "nonfinite"),
        (latent(understood=np.nan), "nonfinite"),
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


@pytest.mark.parametrize("count", [1, 8, 256, 257, 512, 16384, 16385, 1 << 18])
@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_no_value_of_a_received_array_is_nan_whatever_its_size(count: int, wrong: float) -> None:
    z = np.full((1, count), 7.0, np.float32)
    frames = [bytearray(frame) for frame in on_the_wire(latent(z=z))]
    at = frames[-1].rfind(z[:, -1:].tobytes())
    frames[-1][at : at + 4] = np.float32(wrong).tobytes()
    with pytest.raises(WireError, match="nonfinite"):
        decode(frames, LatentGoal)  # type: ignore[arg-type]
    poses, gripper = np.full((count // 8 + 1, 7), 5.0), np.full(count // 8 + 1, 0.25)
    frames = [bytearray(f) for f in on_the_wire(ActionChunk(0, 1, poses, gripper, 1))]
    whole = b"".join(frames)
    for value in (np.float64(5.0), np.float64(0.25)):
        spoilt, cut = bytearray(whole), whole.rfind(value.tobytes())
        spoilt[cut : cut + 8] = np.float64(wrong).tobytes()
        parts, begin = [], 0
        for frame in frames:
            parts.append(bytes(spoilt[begin : begin + len(frame)]))
            begin += len(frame)
        with pytest.raises(WireError, match="nonfinite"):
            decode(parts, ActionChunk)


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
