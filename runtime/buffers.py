"""Arrays as raw buffers: how they are described, found again and distrusted.

Every size that a message claims is compared with the bytes that are really there before
anything is made of it, and nothing is ever allocated by a claim.
"""

from __future__ import annotations

import typing
from collections.abc import Sequence
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

INLINE_BYTES: Final = 1024  # arrays up to this size ride in the header
MAX_FRAME_BYTES: Final = 64 * 1024 * 1024
MAX_NDIM: Final = 6
MAX_DIM: Final = 1 << 26

Reason = Literal[
    "version", "kind", "dtype", "shape", "truncated", "oversize", "header", "field", "nonfinite"
]
REASONS: Final[tuple[str, ...]] = typing.get_args(Reason)
Buffer = bytes | memoryview

DTYPES: Final[dict[int, np.dtype[Any]]] = {
    1: np.dtype("u1"),
    2: np.dtype("<f4"),
    3: np.dtype("<f8"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    6: np.dtype("?"),
    7: np.dtype("<u2"),
    8: np.dtype("<f2"),
}
CODES: Final[dict[np.dtype[Any], int]] = {dtype: code for code, dtype in DTYPES.items()}


class WireError(ValueError):
    """A message cannot be encoded or decoded; `reason` is one of `REASONS`."""

    def __init__(self, reason: Reason, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason: Reason = reason


def padded(size: int) -> int:
    """Round up to a multiple of 8, where arrays may begin."""
    return -(-size // 8) * 8


class Inbox:
    """The arrays of one message in order, each taken exactly once.

    They are either frames of their own (all but the first), or packed behind the header in
    the first and only frame, 8 bytes or a multiple of that apart.

    Args:
        frames: the message.
        at: where packed arrays begin in the first frame.
    """

    __slots__ = ("at", "frames", "packed", "used")

    def __init__(self, frames: Sequence[Buffer], at: int) -> None:
        self.frames = frames
        self.packed = len(frames) == 1
        self.at = at
        self.used = 1

    def take(self, nbytes: int) -> tuple[Buffer, int]:
        """Return the buffer that has the next array, and where in it that begins."""
        if self.packed:
            begin = self.at
            self.at += padded(nbytes)
            if self.at > len(self.frames[0]):
                raise WireError("truncated", "an array reaches beyond the message")
            return self.frames[0], begin
        if self.used >= len(self.frames):
            raise WireError("truncated", f"{len(self.frames)} frames, more are referred to")
        frame = self.frames[self.used]
        self.used += 1
        if len(frame) != nbytes:
            reason: Reason = "truncated" if len(frame) < nbytes else "oversize"
            raise WireError(reason, f"a frame of {len(frame)} bytes, its array has {nbytes}")
        return frame, 0

    def close(self) -> None:
        """Check that nothing is left over."""
        if self.used != len(self.frames) or (self.packed and self.at < len(self.frames[0])):
            raise WireError("oversize", "there is more than the header refers to")


def array_out(array: npt.NDArray[Any], out: list[Buffer], name: str) -> list[Any]:
    """Describe an array as [dtype code, shape, bytes or None]; None: `Inbox.take`."""
    code = CODES.get(array.dtype)
    if code is None:
        raise WireError("dtype", f"{name} has dtype {array.dtype}, which does not travel")
    if array.nbytes <= INLINE_BYTES:
        return [code, array.shape, array.tobytes()]
    if array.nbytes > MAX_FRAME_BYTES:
        raise WireError("oversize", f"{name} has {array.nbytes} bytes, at most {MAX_FRAME_BYTES}")
    if not array.flags.c_contiguous:
        array = np.ascontiguousarray(array)
    out.append(memoryview(array).cast("B"))  # type: ignore[arg-type]
    return [code, array.shape, None]


def array_in(value: Any, inbox: Inbox, name: str, want: np.dtype[Any] | None) -> npt.NDArray[Any]:
    """Undo `array_out`; every claim is checked against the bytes that are really there."""
    if type(value) is not list or len(value) != 3:
        raise WireError("field", f"{name} is not an array")
    code, shape, data = value
    dtype = DTYPES.get(code) if type(code) is int else None
    if dtype is None or (want is not None and dtype is not want):
        raise WireError("dtype", f"{name} is {dtype}, expected {want}")
    if type(shape) is not list or len(shape) > MAX_NDIM:
        raise WireError("shape", f"{name} has no usable shape")
    nbytes = dtype.itemsize
    for dim in shape:
        if type(dim) is not int or not 0 <= dim <= MAX_DIM:
            raise WireError("shape", f"{name} has a dimension of {dim!r}")
        nbytes *= dim
    if data is None:
        data, begin = inbox.take(nbytes)
    elif type(data) is bytes and len(data) == nbytes:
        begin = 0
    else:
        raise WireError("truncated", f"{name} does not have the {nbytes} bytes of its shape")
    try:
        array = np.ndarray(shape, dtype, data, begin)
    except (ValueError, TypeError) as error:
        raise WireError("shape", f"{name}: {error}") from None
    flags = array.flags
    if not flags.aligned:  # libzmq may hand out a message at any offset of its buffer
        array = array.copy()
        flags = array.flags
    flags.writeable = False
    return array
