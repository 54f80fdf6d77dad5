"""Messages to frames and back: a small msgpack header, then raw array buffers.

The header is `HEAD` (magic, protocol version, length) and msgpack of `[kind, schema
fingerprint, values]`. Arrays up to `INLINE_BYTES` are among the values. Larger ones are raw
buffers: behind the header in the same frame if all together have at most `PACK_BYTES`, since
up to there a copy is cheaper than another frame; otherwise each in a frame of its own, which
is received without a copy. Decoded arrays are read-only.

Nothing on the wire says what to construct: the receiver names the class that it expects, whose
annotations are compiled into an encoder and a decoder (`Plan`), and the class says what each
value has to be. Every size that a message claims is compared with the bytes that are really
there before anything is made of it. Whatever arrives, `decode` returns a checked message or
raises `WireError` with one of `REASONS`. Nothing is ever unpickled.
"""

from __future__ import annotations

import dataclasses
import math
import operator
import struct
import types
import typing
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Literal, TypeVar, Union

import msgspec
import numpy as np
import numpy.typing as npt

from openhelix.runtime.core.interfaces import (
    Action,
    ActionChunk,
    CameraFrame,
    GoalRequest,
    LatentGoal,
    Observation,
)

VERSION: Final = 3
MAGIC: Final = b"OH"
# Magic, version, bytes of padding before packed arrays, bytes of msgpack that follow.
HEAD: Final = struct.Struct("<2sBBI")
INLINE_BYTES: Final = 1024  # arrays up to this size ride in the header
PACK_BYTES: Final = 64 * 1024  # larger ones behind it, up to this size together
MAX_HEADER_BYTES: Final = 256 * 1024
MAX_FRAME_BYTES: Final = 64 * 1024 * 1024
MAX_FRAMES: Final = 256
MAX_NDIM: Final = 6
MAX_DIM: Final = 1 << 26
MAX_ENTRIES: Final = 4096  # of one mapping or tuple
MAX_DEPTH: Final = 64  # of a free-form message
INT_MIN: Final = -(1 << 63)
INT_MAX: Final = (1 << 63) - 1
_DICT: Final = "dict:"  # kinds of free-form messages begin with it
_PLAIN: Final = (bool, int, float, str, bytes, np.ndarray)  # what they hold
_ARRAY_EXT: Final = 1  # msgpack's number for an array in them
_PAD: Final = bytes(8)
_pack: Final = msgspec.msgpack.Encoder().encode
_unpack_plain: Final = msgspec.msgpack.Decoder().decode

Reason = Literal[
    "version", "kind", "dtype", "shape", "truncated", "oversize", "header", "field", "nonfinite"
]
REASONS: Final[tuple[str, ...]] = typing.get_args(Reason)
Buffer = bytes | memoryview
T = TypeVar("T")

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


# Arrays ------------------------------------------------------------------------------------------


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


# Records -----------------------------------------------------------------------------------------

Enc = Callable[[Any, list[Buffer]], Any]
Dec = Callable[[Any, Inbox], Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Field:
    """How one annotation is written and read, and the text that its fingerprint covers."""

    enc: Enc
    dec: Dec
    text: str
    plain: type[Any] | None = None  # values of exactly this type travel as they are


def _scalar(name: str, kind: type[Any]) -> Field:
    def fail(value: Any) -> WireError:
        return WireError("field", f"{name} is {value!r:.60}, expected {kind.__name__}")

    def whole(value: Any) -> int:
        number: int = operator.index(value)
        if isinstance(value, (bool, np.bool_)) or not INT_MIN <= number <= INT_MAX:
            raise fail(value)
        return number

    def enc(value: Any, _: list[Buffer]) -> Any:
        try:
            if kind is int:
                return whole(value)
            if kind is float and isinstance(value, (int, float, np.number)):
                return float(value)
        except (TypeError, OverflowError):
            raise fail(value) from None
        if kind is bool and isinstance(value, (bool, np.bool_)):
            return bool(value)
        if kind is str and isinstance(value, str):
            return str(value)
        raise fail(value)

    def dec(value: Any, _: Inbox) -> Any:
        if type(value) is not kind or (kind is int and not INT_MIN <= value <= INT_MAX):
            raise fail(value)
        return value

    return Field(enc, dec, kind.__name__, kind)


def _array(name: str, dtype: np.dtype[Any]) -> Field:
    def enc(value: Any, out: list[Buffer]) -> Any:
        if not isinstance(value, np.ndarray) or value.dtype != dtype:
            have = getattr(value, "dtype", type(value).__name__)
            raise WireError("dtype", f"{name} is {have}, expected {dtype}")
        return array_out(value, out, name)

    def dec(value: Any, inbox: Inbox) -> Any:
        return array_in(value, inbox, name, dtype)

    return Field(enc, dec, f"array[{dtype.str}]")


def _optional(inner: Field) -> Field:
    return Field(
        lambda value, out: None if value is None else inner.enc(value, out),
        lambda value, inbox: None if value is None else inner.dec(value, inbox),
        f"{inner.text}?",
    )


def _mapping(name: str, inner: Field) -> Field:
    def enc(value: Any, out: list[Buffer]) -> Any:
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise WireError("field", f"{name} is not a mapping with str keys")
        return {key: inner.enc(item, out) for key, item in value.items()}

    def dec(value: Any, inbox: Inbox) -> Any:
        if type(value) is not dict or len(value) > MAX_ENTRIES:
            raise WireError("field", f"{name} is not a mapping of at most {MAX_ENTRIES}")
        if not all(type(key) is str for key in value):
            raise WireError("field", f"{name} has a key that is not a str")
        return {key: inner.dec(item, inbox) for key, item in value.items()}

    return Field(enc, dec, f"map[{inner.text}]")


def _sequence(name: str, inner: Field) -> Field:
    def enc(value: Any, out: list[Buffer]) -> Any:
        if not isinstance(value, tuple):
            raise WireError("field", f"{name} is not a tuple")
        return [inner.enc(item, out) for item in value]

    def dec(value: Any, inbox: Inbox) -> Any:
        if type(value) is not list or len(value) > MAX_ENTRIES:
            raise WireError("field", f"{name} is not a tuple of at most {MAX_ENTRIES}")
        return tuple(inner.dec(item, inbox) for item in value)

    return Field(enc, dec, f"tuple[{inner.text}]")


def _field(name: str, hint: Any, plans: Mapping[type[Any], Plan]) -> Field:
    """Choose how to write and read an annotation.

    Raises:
        TypeError: the annotation cannot travel.
    """
    if hint in (int, float, bool, str):
        return _scalar(name, hint)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType) and len(args) == 2 and type(None) in args:
        return _optional(_field(name, args[0] if args[1] is type(None) else args[1], plans))
    if origin is np.ndarray:
        dtype = np.dtype(typing.get_args(args[1])[0])
        if dtype in CODES:
            return _array(name, DTYPES[CODES[dtype]])
    if isinstance(origin, type) and issubclass(origin, Mapping) and args[0] is str:
        return _mapping(name, _field(name, args[1], plans))
    if origin is tuple and len(args) == 2 and args[1] is Ellipsis:
        return _sequence(name, _field(name, args[0], plans))
    if origin is Literal and all(isinstance(arg, str) for arg in args):
        return _literal(name, args)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        plan = plans.get(hint) or Plan(hint, {}, (), plans)
        return Field(plan.enc, plan.dec, plan.text)
    raise TypeError(f"{name}: {hint!r} cannot travel; see openhelix.runtime.transport.codec")


def _literal(name: str, options: tuple[str, ...]) -> Field:
    def check(value: Any, _: Any) -> Any:
        if type(value) is not str or value not in options:
            raise WireError("field", f"{name} is {value!r:.60}, expected one of {options}")
        return value

    return Field(check, check, f"literal{sorted(options)}")


def _is_finite(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    flat = value.reshape(-1)
    with np.errstate(over="ignore", invalid="ignore"):
        total = float(flat.dot(flat))
    # A sum of squares is finite only if every value is, and is found in a third of the time
    # that looking at each takes; where it overflows, do look at each.
    return math.isfinite(total) or bool(np.isfinite(flat).all())


class Plan:
    """One record class, compiled."""

    def __init__(
        self,
        cls: type[Any],
        shapes: Mapping[str, tuple[int | str, ...]],
        finite: Sequence[str],
        plans: Mapping[type[Any], Plan],
    ) -> None:
        self.cls = cls
        hints = typing.get_type_hints(cls)
        self.names = [field.name for field in dataclasses.fields(cls)]
        if any(not field.init or field.kw_only for field in dataclasses.fields(cls)):
            raise TypeError(f"{cls.__name__}: fields must be positional")
        fields = [_field(f"{cls.__name__}.{name}", hints[name], plans) for name in self.names]
        self._fields = fields
        self._declared = shapes
        self._shapes = [
            (
                self.names.index(name),
                len(dims),
                [(axis, dim) for axis, dim in enumerate(dims) if isinstance(dim, int)],
                [(axis, dim) for axis, dim in enumerate(dims) if isinstance(dim, str)],
            )
            for name, dims in shapes.items()
        ]
        self._finite = [self.names.index(name) for name in finite]
        pairs = ",".join(f"{n}:{f.text}" for n, f in zip(self.names, fields, strict=True))
        self.text = f"{cls.__name__}({pairs})"
        self.fingerprint = zlib.crc32(self.text.encode())

    def check(self, values: Sequence[Any]) -> None:
        """Compare values with what `register` was told: shapes, and where to refuse NaN.

        A letter in a shape means the same size throughout.
        """
        sizes: dict[str, int] = {}
        for index, ndim, fixed, letters in self._shapes:
            array = values[index]
            if array is None:
                continue
            shape = array.shape
            good = len(shape) == ndim
            if good:
                for axis, size in fixed:
                    good &= shape[axis] == size
                for axis, letter in letters:
                    good &= sizes.setdefault(letter, shape[axis]) == shape[axis]
            if not good:
                name = self.names[index]
                expected = self._declared[name]
                raise WireError("shape", f"{self.cls.__name__}.{name} is {shape}, not {expected}")
        for index in self._finite:
            value = values[index]
            if value is not None and not _is_finite(value):
                raise WireError("nonfinite", f"{self.cls.__name__}.{self.names[index]}")

    def enc(self, message: Any, out: list[Buffer]) -> list[Any]:
        if type(message) is not self.cls:
            raise WireError("kind", f"{type(message).__name__}, expected {self.cls.__name__}")
        values = [getattr(message, name) for name in self.names]
        row = []
        for value, field in zip(values, self._fields, strict=True):
            kind = field.plain
            if type(value) is kind and (kind is not int or INT_MIN <= value <= INT_MAX):
                row.append(value)
            else:
                row.append(field.enc(value, out))
        self.check(values)
        return row

    def dec(self, row: Any, inbox: Inbox) -> Any:
        if type(row) is not list or len(row) != len(self._fields):
            raise WireError("field", f"{self.cls.__name__} needs {len(self._fields)} fields")
        values = []
        for value, field in zip(row, self._fields, strict=True):
            kind = field.plain  # most fields are; a call for each would cost more than all else
            if type(value) is kind and (kind is not int or INT_MIN <= value <= INT_MAX):
                values.append(value)
            else:
                values.append(field.dec(value, inbox))
        self.check(values)
        try:
            return self.cls(*values)
        except (ValueError, TypeError) as error:  # the record's own __post_init__ refused
            raise WireError("field", f"{self.cls.__name__}: {error}") from None


# Messages ----------------------------------------------------------------------------------------

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
        finite: fields in which NaN and infinity are refused, by sender and receiver.

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
            described = _pack(array_out(value, frames, kind))
            return msgspec.msgpack.Ext(_ARRAY_EXT, described)
        if isinstance(value, np.generic):
            return value.item()
        if isinstance(value, Mapping):
            return dict(value)
        raise WireError("field", f"{kind}: a {type(value).__name__} cannot travel")

    return _finish(frames, [_DICT + kind, 0, dict(body)], b"", default)


def decode_dict(frames: Sequence[Buffer], kind: str) -> dict[str, Any]:
    """Undo `encode_dict`; tuples and sets come back as lists.

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
    _check_plain(body, kind)
    inbox.close()
    return body


def _check_plain(value: Any, kind: str, depth: int = 0) -> None:
    """Refuse what msgpack can say and `encode_dict` never does: other keys, dates, extensions."""
    if depth > MAX_DEPTH:
        raise WireError("field", f"{kind} is nested more than {MAX_DEPTH} deep")
    if type(value) is dict:
        if not all(type(key) is str for key in value):
            raise WireError("field", f"{kind} has a key that is not a str")
        for item in value.values():
            _check_plain(item, kind, depth + 1)
    elif type(value) is list:
        for item in value:
            _check_plain(item, kind, depth + 1)
    elif value is not None and type(value) not in _PLAIN:
        raise WireError("field", f"{kind} has a {type(value).__name__}")


def _finish(
    frames: list[Buffer], head: list[Any], prefix: bytes, default: Any = None
) -> list[Buffer]:
    """Put the header in front, and the arrays behind it where they are small."""
    try:
        header = _pack(head) if default is None else msgspec.msgpack.encode(head, enc_hook=default)
    except WireError:
        raise
    except (TypeError, ValueError, OverflowError, RecursionError, msgspec.MsgspecError) as error:
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
        return _unpack_plain(data) if hook is None else msgspec.msgpack.decode(data, ext_hook=hook)
    except WireError:
        raise
    except (msgspec.MsgspecError, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise WireError("header", f"{type(error).__name__}: {error}"[:120]) from None


register(
    "camera",
    CameraFrame,
    shapes={"rgb": ("H", "W", 3), "depth": ("H", "W"), "K": (3, 3), "T_world_cam": (4, 4)},
)
register("observation", Observation, shapes={"tcp_pose": (7,), "joints": ("n",)})
register(
    "goal_request",
    GoalRequest,
    shapes={"rgb": ("H", "W", 3), "proprio": (9,)},
    finite=("proprio",),
)
register("latent", LatentGoal, shapes={"z": ("n", "d")}, finite=("z", "compute_s", "understood"))
register(
    "chunk", ActionChunk, shapes={"poses": ("H", 7), "gripper": ("H",)}, finite=("poses", "gripper")
)
register("action", Action, shapes={"pose": (7,)}, finite=("pose", "gripper"))
