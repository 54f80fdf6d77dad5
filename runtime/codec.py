"""Messages to frames and back: a small msgpack header, then raw array buffers.

The header is `HEAD` (magic, protocol version, length) and msgpack of `[kind, schema
fingerprint, values]`. Arrays up to `INLINE_BYTES` are among the values. Larger ones are raw
buffers: behind the header in the same frame if all together have at most `PACK_BYTES`, since
up to there a copy is cheaper than another frame; otherwise each in a frame of its own, which
is received without a copy. Decoded arrays are read-only. Whatever arrives, `decode` returns
a checked message or raises `WireError` with one of `REASONS`. Nothing is ever unpickled.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeVar

import msgpack
import numpy as np

from runtime.buffers import (
    MAX_FRAME_BYTES,
    REASONS,
    Buffer,
    Inbox,
    WireError,
    array_in,
    array_out,
    padded,
)
from runtime.schema import Plan
from runtime.types import Action, ActionChunk, CameraFrame, GoalRequest, LatentGoal, Observation

__all__ = [
    "HEAD",
    "MAGIC",
    "MAX_FRAMES",
    "MAX_FRAME_BYTES",
    "MAX_HEADER_BYTES",
    "PACK_BYTES",
    "REASONS",
    "VERSION",
    "Buffer",
    "WireError",
    "decode",
    "decode_dict",
    "encode",
    "encode_dict",
    "kind_of",
    "register",
]

VERSION: Final = 1
MAGIC: Final = b"OH"
# Magic, version, bytes of padding before packed arrays, bytes of msgpack that follow.
HEAD: Final = struct.Struct("<2sBBI")
PACK_BYTES: Final = 64 * 1024
MAX_HEADER_BYTES: Final = 256 * 1024
MAX_FRAMES: Final = 256
_ARRAY_EXT: Final = 1
_PAD: Final = bytes(8)
_DICT: Final = "dict:"  # kinds of free-form messages begin with it
T = TypeVar("T")

# Filled at import by `register`, constant afterwards.
_BY_KIND: dict[str, type[Any]] = {}
_KIND_OF: dict[type[Any], str] = {}
_PLANS: dict[type[Any], Plan] = {}


def register(
    kind: str,
    cls: type[T],
    *,
    shapes: Mapping[str, tuple[int | str, ...]] | None = None,
    finite: Sequence[str] = (),
) -> type[T]:
    """Let a frozen dataclass travel under the name `kind`; call it where the class is defined.

    Args:
        kind: the name on the wire, for example "latent".
        cls: fields may be int, float, bool, str, arrays with a declared dtype, other records,
            `Mapping[str, ...]`, `tuple[..., ...]` or `Literal` of these, each `| None`.
        shapes: by field, a size per dimension; a letter means "any, but the same throughout".
        finite: fields in which NaN and infinity are refused, by the sender always, by the
            receiver in scalars and in arrays up to `INLINE_BYTES`.

    Raises:
        ValueError: another class has that kind, or the class another kind.
        TypeError: a field's annotation cannot travel.
    """
    if _BY_KIND.get(kind) is cls:
        return cls
    if kind in _BY_KIND or cls in _KIND_OF or kind.startswith(_DICT):
        raise ValueError(f"register: {kind!r} or {cls.__name__} is already taken")
    _PLANS[cls] = Plan(cls, shapes or {}, finite, _PLANS)
    _BY_KIND[kind], _KIND_OF[cls] = cls, kind
    return cls


def kind_of(cls: type[Any]) -> str:
    """Return the wire name of a registered class; `WireError("kind")` for any other."""
    kind = _KIND_OF.get(cls)
    if kind is None:
        raise WireError("kind", f"{cls.__name__} is not registered")
    return kind


def encode(message: Any, prefix: bytes = b"") -> list[Buffer]:
    """Write a record as frames: the header with small arrays, then one per large array.

    The buffers are views of the message's own arrays; do not change those before the frames
    are sent.

    Args:
        message: of a registered class.
        prefix: what the first frame begins with, before the header. Putting it there
            afterwards works too, and costs a copy on both sides.

    Raises:
        WireError: the message breaks its own schema (type, dtype, shape, size, finiteness).
    """
    kind = kind_of(type(message))
    plan = _PLANS[type(message)]
    frames: list[Buffer] = [b""]
    row = plan.enc(message, frames)
    return _finish(frames, [kind, plan.fingerprint, row], prefix)


def decode(frames: Sequence[Buffer], expect: type[T], start: int = 0) -> T:
    """Read a record of class `expect` from frames.

    Arrays of the result are read-only and share memory with `frames` where they can.

    Args:
        frames: the header, then the array buffers.
        expect: the class to build; any other kind of message is refused.
        start: the length of the first frame's prefix.

    Raises:
        WireError: anything at all is wrong with the frames.
    """
    plan = _PLANS.get(expect)
    kind = kind_of(expect)
    head, at = _open(frames, start, None)
    if plan is None or head[0] != kind:
        raise WireError("kind", f"{head[0]!r:.60}, expected {kind!r}")
    if head[1] != plan.fingerprint:
        raise WireError("field", f"the sender's {kind!r} has other fields than ours")
    inbox = Inbox(frames, at)
    message: T = plan.dec(head[2], inbox)
    inbox.close()
    return message


def encode_dict(kind: str, body: Mapping[str, Any]) -> list[Buffer]:
    """Write a free-form message: nested dicts and lists of scalars, str, bytes and arrays.

    Raises:
        WireError: something in it cannot travel.
    """
    frames: list[Buffer] = [b""]

    def default(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return msgpack.ExtType(_ARRAY_EXT, msgpack.packb(array_out(value, frames, kind)))
        if isinstance(value, np.generic):
            return value.item()
        if isinstance(value, Mapping):
            return dict(value)
        raise WireError("field", f"{kind}: a {type(value).__name__} cannot travel")

    return _finish(frames, [_DICT + kind, 0, dict(body)], b"", default)


def decode_dict(frames: Sequence[Buffer], kind: str) -> dict[str, Any]:
    """Undo `encode_dict`; tuples come back as lists.

    Raises:
        WireError: anything at all is wrong with the frames.
    """
    inbox = Inbox(frames, 0)

    def hook(code: int, data: bytes) -> Any:
        if code != _ARRAY_EXT:
            raise WireError("dtype", f"{kind}: extension {code}")
        return array_in(_unpack(data, None), inbox, kind, None)

    def begin(at: int) -> None:
        inbox.at = at

    head, _ = _open(frames, 0, hook, begin)
    if head[0] != _DICT + kind:
        raise WireError("kind", f"{head[0]!r:.60}, expected {_DICT + kind!r}")
    body = head[2]
    if type(body) is not dict:
        raise WireError("field", f"{kind} is not a dict")
    inbox.close()
    return body


def _finish(
    frames: list[Buffer], head: list[Any], prefix: bytes, default: Any = None
) -> list[Buffer]:
    """Put the header in front, and the arrays behind it where they are small."""
    try:
        header = msgpack.packb(head, default=default)
    except WireError:
        raise
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise WireError("field", str(error)) from None
    if len(header) > MAX_HEADER_BYTES:
        raise WireError("oversize", f"the header has {len(header)} bytes")
    if len(frames) > MAX_FRAMES:
        raise WireError("oversize", f"{len(frames)} frames, at most {MAX_FRAMES}")
    sizes = [len(frame) for frame in frames[1:]]
    if not sizes or sum(sizes) > PACK_BYTES:
        frames[0] = b"".join((prefix, HEAD.pack(MAGIC, VERSION, 0, len(header)), header))
        return frames
    end = len(prefix) + HEAD.size + len(header)
    pad = padded(end) - end
    head_bytes = HEAD.pack(MAGIC, VERSION, pad, len(header))
    parts: list[Buffer] = [prefix, head_bytes, header, _PAD[:pad]]
    for size, frame in zip(sizes, frames[1:], strict=True):
        parts.append(frame)
        parts.append(_PAD[: padded(size) - size])
    return [b"".join(parts)]


def _open(
    frames: Sequence[Buffer], start: int, hook: Any, begin: Callable[[int], None] | None = None
) -> tuple[list[Any], int]:
    """Check the outer limits; return [kind, fingerprint, values] and where packed arrays begin."""
    if not frames or len(frames[0]) < start + HEAD.size:
        raise WireError("truncated", "no header")
    first = frames[0]
    magic, version, pad, size = HEAD.unpack_from(first, start)
    if magic != MAGIC:
        raise WireError("header", "not an OpenHelix message")
    if version != VERSION:
        raise WireError("version", f"{version}, this side speaks {VERSION}")
    end = start + HEAD.size + size
    if len(frames) > MAX_FRAMES or size > MAX_HEADER_BYTES:
        raise WireError("oversize", f"{len(frames)} frames, header of {size} bytes")
    if len(first) < end:
        raise WireError("truncated", f"{len(first)} bytes of {end}")
    if len(frames) > 1 and (pad or end != len(first)):
        raise WireError("oversize", "bytes between header and frames")
    at = end + pad
    if begin is not None:
        begin(at)
    head = _unpack(memoryview(first)[start + HEAD.size : end], hook)
    if type(head) is not list or len(head) != 3:
        raise WireError("header", "not [kind, fingerprint, values]")
    return head, at


def _unpack(data: Buffer, hook: Any) -> Any:
    try:
        if hook is None:
            return msgpack.unpackb(data, strict_map_key=True)
        return msgpack.unpackb(data, strict_map_key=True, ext_hook=hook)
    except WireError:
        raise
    except Exception as error:  # msgpack's errors share no base class
        raise WireError("header", f"{type(error).__name__}: {error}"[:120]) from None


register(
    "camera",
    CameraFrame,
    shapes={"rgb": ("H", "W", 3), "depth": ("H", "W"), "K": (3, 3), "T_world_cam": (4, 4)},
)
register("observation", Observation, shapes={"tcp_pose": (7,), "joints": ("n",)})
register("goal_request", GoalRequest, shapes={"rgb": ("H", "W", 3)})
register("latent", LatentGoal, shapes={"z": ("n", "d")}, finite=("z",))
register(
    "chunk", ActionChunk, shapes={"poses": ("H", 7), "gripper": ("H",)}, finite=("poses", "gripper")
)
register("action", Action, shapes={"pose": (7,)}, finite=("pose", "gripper"))
