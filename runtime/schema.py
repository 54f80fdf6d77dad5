"""A record's annotations, compiled into an encoder and a decoder.

Nothing on the wire says what to construct: the receiver names the class it expects and the
class says what each value has to be. `runtime.codec` is the way in.
"""

from __future__ import annotations

import dataclasses
import math
import operator
import types
import typing
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Literal, Union

import numpy as np

from runtime.buffers import (
    CODES,
    DTYPES,
    INLINE_BYTES,
    Buffer,
    Inbox,
    WireError,
    array_in,
    array_out,
)

MAX_ENTRIES: Final = 4096  # of one mapping or tuple
INT_MIN: Final = -(1 << 63)
INT_MAX: Final = (1 << 63) - 1

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
    raise TypeError(f"{name}: {hint!r} cannot travel; see runtime.codec")


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

    def check(self, values: Sequence[Any], *, everything: bool) -> None:
        """Compare values with what `register` was told: shapes, and where to refuse NaN.

        A letter in a shape means the same size throughout. Without `everything`, arrays that
        travelled in a frame of their own are not read through again: their sender did so,
        and fetching them into this core's cache would take longer than all else here.
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
            if value is None or not (
                everything or value.__class__ is float or value.nbytes <= INLINE_BYTES
            ):
                continue
            if not _is_finite(value):
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
        self.check(values, everything=True)
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
        self.check(values, everything=False)
        try:
            return self.cls(*values)
        except (ValueError, TypeError) as error:  # the record's own __post_init__ refused
            raise WireError("field", f"{self.cls.__name__}: {error}") from None
