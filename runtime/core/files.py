"""Files that may be damaged, hostile, or on a disk without room.

Writing: `written` and `replace_file` put a file in place whole or not at all. Whatever a library
calls it, a disk that refuses becomes an `OSError` that names the file, and nothing is left beside
it: a half-written file must not take the room that is missing.

Reading: nothing is unpacked, built or allocated because a file merely claims it. Every reader has
a limit on what it takes from a file, and tells what is wrong in one line that names the file
(`BadFile`).

    JSON          `MAX_JSON_BYTES`
    .npz          `MAX_ARRAYS_BYTES` of arrays, whatever their packed size
    safetensors   a header of `MAX_HEADER_BYTES`; its tensors fill the file exactly, so that they
                  take no more memory than the file takes disk
"""

from __future__ import annotations

import errno
import io
import json
import math
import os
import struct
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Final, Literal, TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import TypeAdapter, ValidationError

from openhelix.runtime.core.config import explain

T = TypeVar("T")

MAX_JSON_BYTES: Final = 64 * 1024 * 1024
MAX_HEADER_BYTES: Final = 16 * 1024 * 1024  # of a safetensors file; 7B models need 0.1 MB
MAX_ARRAYS_BYTES: Final = 512 * 1024 * 1024  # of a .npz, unpacked; a unit of data has 1 MB
NO_ROOM: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_ITEM_BITS: Final[Mapping[str, int]] = {  # of safetensors' types
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6},
}


class BadFile(ValueError):
    """A file that is not what it should be; one line names it and says what is wrong."""


class CheckpointError(BadFile):
    """A folder of weights that cannot serve; one line names what is wrong or missing."""


@contextmanager
def told_as(kind: type[BadFile], name: str) -> Iterator[None]:
    """Put the name of the setting in front that a bad file was given as.

    Raises:
        BadFile: of that kind, for every one that the block raises.
    """
    try:
        yield
    except BadFile as error:
        raise kind(f"{name}: {error}") from None


# Writing -----------------------------------------------------------------------------------------


@contextmanager
def written(path: Path | str) -> Iterator[Path]:
    """Give the name under which to write a file; it takes its place when the block is left.

    Raises:
        OSError: the disk refuses, whatever the library that wrote calls it; `filename` is the
            file's. What was there before stays, and nothing else is left.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        part.replace(path)
    except BaseException as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        number = refusal_of(error)
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def replace_file(path: Path | str, data: bytes, *, sync: bool = False) -> None:
    """Write a file whole or not at all; its folder is made.

    Args:
        path: of the file.
        data: all that it holds.
        sync: have it on the disk before it takes its place, also if the machine stops.

    Raises:
        OSError: the disk refuses; `filename` is the file's.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with written(path) as part, part.open("wb") as stream:
        stream.write(data)
        if sync:
            stream.flush()
            os.fsync(stream.fileno())


def refusal_of(error: BaseException) -> int | None:
    """Return the number of the system's error behind `error`; None where it is another kind.

    Libraries written in C or Rust tell a full disk in words, or in an error that caused theirs.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno is not None:
            return seen.errno
        for number in NO_ROOM:
            if f"os error {number})" in str(seen) or os.strerror(number) in str(seen):
                return number
        seen = seen.__cause__ or seen.__context__
    return None


class CalmFile:
    """A new file for libraries that do not survive a disk that refuses.

    The first refusal is kept in `error`. From then on all is well as far as the library can
    tell, and nothing more is written: whoever owns the file looks at `error`.

    Args:
        path: of the file.
        mode: "w" replaces a file of that name, "x" refuses to.

    Raises:
        OSError: the file cannot be made.
    """

    def __init__(self, path: Path | str, mode: Literal["w", "x"] = "w") -> None:
        self.path = Path(path)
        self.error: OSError | None = None
        self._stream = open(path, f"{mode}b", buffering=0)  # noqa: SIM115
        self._at = self._end = 0

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Write all of `data`, or from the first refusal on nothing."""
        left = memoryview(data).cast("B")
        size = len(left)
        while left and self.error is None:
            try:
                left = left[self._stream.write(left) :]
            except OSError as error:
                self.error = OSError(error.errno, error.strerror, str(self.path))
        self._at += size
        self._end = max(self._end, self._at)
        return size

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a place; see `io.IOBase.seek`."""
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._end}[whence]
        if self.error is None:
            self._stream.seek(self._at)
        return self._at

    def tell(self) -> int:
        """Return where the next byte goes."""
        return self._at

    def flush(self) -> None:
        """Nothing waits in this process."""

    def cut(self, size: int) -> None:
        """Drop what comes after the first `size` bytes, as far as the disk lets us."""
        with suppress(OSError):
            self._stream.truncate(size)

    def close(self) -> None:
        """Close the file; twice is fine."""
        with suppress(OSError):
            self._stream.close()


# Reading -----------------------------------------------------------------------------------------


def read_bytes(path: Path | str, limit: int) -> bytes:
    """Return a file's content.

    Raises:
        BadFile: there is none, it cannot be read, or it is larger than `limit` bytes.
    """
    try:
        with open(path, "rb") as stream:
            data = stream.read(limit + 1)
    except FileNotFoundError:
        raise BadFile(f"{path}: no such file") from None
    except OSError as error:
        raise BadFile(f"{path}: cannot be read: {error.strerror}") from None
    if len(data) > limit:
        raise BadFile(f"{path}: larger than {limit >> 20} MiB, which no such file is")
    return data


def read_json(path: Path | str, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        BadFile: it cannot be read, is no JSON, or holds something else than an object.
    """
    return parse_object(read_bytes(path, limit), str(path))


def parse_object(data: bytes | str, where: str) -> dict[str, Any]:
    """Return the object in JSON text.

    Raises:
        BadFile: it is no JSON, or something else than an object; the line begins with `where`.
    """
    try:
        found = json.loads(data)
    except RecursionError:
        raise BadFile(f"{where}: not JSON: nested too deep") from None
    except ValueError as error:  # of JSON, of UTF-8, or a number of too many digits
        raise BadFile(f"{where}: not JSON: {error}") from None
    if not isinstance(found, dict):
        raise BadFile(f"{where}: holds {type(found).__name__}, must be a JSON object")
    return found


def as_record(cls: type[T], data: Mapping[str, Any], where: str) -> T:
    """Return a dataclass from the fields that a file has for it, each of the type it says.

    Raises:
        BadFile: a field is unknown, missing, of another type or out of range; the line begins
            with `where` and names it.
    """
    try:
        return TypeAdapter(cls).validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(map(str, first["loc"]))
        said = explain(name, first)
        if first["type"] == "unexpected_keyword_argument":
            names = getattr(cls, "__dataclass_fields__", ())
            valid = ", ".join(sorted(name for name in names if not name.startswith("_")))
            said = f"{name}: no such field" + (f"; valid are {valid}" if "." not in name else "")
        raise BadFile(f"{where}: {said}") from None


def load_tensors(
    path: Path | str, names: Iterable[str] | None = None, more: Iterable[str] = ()
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the torch tensors of a safetensors file and its metadata.

    Args:
        path: of the file.
        names: what it has to hold, no more and no less; None takes what there is.
        more: what it may hold besides.

    Raises:
        BadFile: it cannot be read, holds other tensors, or one with a value that is not finite.
    """
    from safetensors import SafetensorError, safe_open

    found, metadata = tensor_header(path)
    if names is not None:
        wanted = set(names)
        if missing := sorted(wanted - set(found)):
            raise BadFile(f"{path}: no {missing[0]}")
        if extra := sorted(set(found) - wanted - set(more)):
            raise BadFile(f"{path}: holds {extra[0]!r}, which does not belong there")
    try:
        with safe_open(path, framework="pt") as stream:
            tensors = {name: stream.get_tensor(name) for name in found}
    except (OSError, SafetensorError) as error:
        raise BadFile(f"{path}: cannot be read as safetensors: {error}") from None
    check_finite(tensors, str(path))
    return tensors, metadata


def check_finite(tensors: Mapping[str, Any], where: str) -> None:
    """Raise `BadFile` where a torch tensor has a value that is not finite; one line names it."""
    for name, tensor in tensors.items():
        # aminmax passes NaN on and takes a tenth of the time of isfinite().all(), or less
        if not tensor.is_floating_point() or tensor.numel() == 0:
            continue
        if not all(bool(end.isfinite()) for end in tensor.aminmax()):
            raise BadFile(f"{where}: {name} has values that are not finite")


def check_kinds(
    tensors: Mapping[str, Any], where: str, wanted: Mapping[str, Any] | None = None
) -> None:
    """Raise `BadFile` where a tensor has whole numbers and those it is read for have fractions.

    torch copies either into the other without a word, and the numbers mean something else then.

    Args:
        tensors: what a file has, by name.
        where: the file; the line begins with it.
        wanted: what each is read for; those not named are of fractions.
    """
    like = wanted or {}
    for name, tensor in tensors.items():
        fractions = name not in like or like[name].is_floating_point()
        if tensor.is_floating_point() != fractions:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise BadFile(
                f"{where}: {name} is {kind}, needs {'fractions' if fractions else 'whole numbers'}"
            )


def save_tensors(
    path: Path | str, tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None
) -> None:
    """Write torch tensors as safetensors, whole or not at all.

    Raises:
        OSError: the disk refuses; `filename` is the file's.
    """
    from safetensors.torch import save_file

    plain = {name: t.detach().to("cpu").contiguous() for name, t in tensors.items()}
    with written(path) as part:
        save_file(plain, part, metadata=dict(metadata) if metadata is not None else None)
        part.chmod(0o666 & ~_umask())


def _umask() -> int:
    """Return what this process takes from the mode of new files; asking is setting it."""
    with suppress(OSError, ValueError):
        for row in Path("/proc/self/status").read_text().splitlines():
            if row.startswith("Umask:"):
                return int(row.split()[1], 8)
    return 0o022


def tensor_header(
    path: Path | str,
) -> tuple[dict[str, tuple[str, tuple[int, ...]]], dict[str, str]]:
    """Return type and shape of each tensor of a safetensors file, and its metadata.

    No tensor is read. The header is checked against the file: tensors lie one after the other and
    fill it, so that reading them takes no more memory than the file has bytes.

    Raises:
        BadFile: the file is empty, cut, or its header is not as the format says.
    """
    try:
        with open(path, "rb") as stream:
            total = os.fstat(stream.fileno()).st_size
            begin = stream.read(8)
            if len(begin) < 8:
                raise BadFile(f"{path}: not safetensors: {total} bytes, too short for a header")
            (length,) = struct.unpack("<Q", begin)
            if length > min(MAX_HEADER_BYTES, total - 8):
                raise BadFile(
                    f"{path}: not safetensors, or cut: claims a header of {length} bytes"
                    f"{'' if length > MAX_HEADER_BYTES else f', the file has {total}'}"
                )
            head = parse_object(stream.read(length), f"{path}: header")
    except FileNotFoundError:
        raise BadFile(f"{path}: no such file") from None
    except OSError as error:
        raise BadFile(f"{path}: cannot be read: {error.strerror}") from None
    metadata = head.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise BadFile(f"{path}: header: its metadata is not text by name")
    found = {name: _described(path, name, entry) for name, entry in head.items()}
    end = 0
    for start, stop, name in sorted((a, b, name) for name, (_, _, a, b) in found.items()):
        if start != end:
            raise BadFile(f"{path}: header: {name} does not begin where the one before ends")
        end = stop
    if end != total - 8 - length:
        raise BadFile(
            f"{path}: cut or damaged: its header describes {end} bytes of tensors, "
            f"it has {total - 8 - length}"
        )
    return {name: (kind, shape) for name, (kind, shape, *_) in found.items()}, metadata


def _described(path: Path | str, name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    """Return type, shape, first and last offset of one tensor, as its header entry says."""
    try:
        kind, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        bits = _ITEM_BITS[kind]
        numbers = (*shape, start, stop)
        whole = all(type(n) is int and 0 <= n < 1 << 63 for n in numbers)
    except (KeyError, TypeError, ValueError):
        whole = False
    if not whole:
        raise BadFile(f"{path}: header: {name[:80]!r} is not described as the format says")
    if (stop - start) * 8 != math.prod(shape) * bits:
        raise BadFile(f"{path}: header: {name[:80]!r} has another size than its shape {shape}")
    return kind, shape, start, stop


def read_arrays(
    path: Path | str, limit: int = MAX_ARRAYS_BYTES, names: Iterable[str] | None = None
) -> dict[str, npt.NDArray[Any]]:
    """Return the arrays of a `.npz` file by name; objects are refused.

    Sizes are compared before anything is unpacked, and unpacking ends where they say it does.

    Args:
        path: of the file.
        limit: most bytes that all of its arrays may have.
        names: which to read; None for all.

    Raises:
        BadFile: it is damaged or cut, holds objects, or would unpack to more than `limit` bytes.
    """
    try:
        with zipfile.ZipFile(path) as packed:
            members = packed.infolist()
            total = sum(member.file_size for member in members)
            if total > limit:
                raise BadFile(
                    f"{path}: would unpack to {total >> 20} MiB; at most {limit >> 20} are read"
                )
            found = {member.filename.removesuffix(".npy"): member for member in members}
            for name in names or ():
                if name not in found:
                    raise BadFile(f"{path}: no {name}")
            return {name: _member(packed, found[name], path) for name in names or found}
    except BadFile:
        raise
    except FileNotFoundError:
        raise BadFile(f"{path}: no such file") from None
    except OSError as error:
        raise BadFile(f"{path}: cannot be read: {error.strerror or error}") from None
    # zipfile and zlib let through what their parsers meet: BadZipFile, error, EOFError, ...
    except Exception as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise BadFile(f"{path}: damaged or no .npz: {said}") from None


def _member(packed: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path | str) -> npt.NDArray[Any]:
    with packed.open(member) as stream:
        try:
            return _array(stream, member.file_size)
        except BadFile as error:
            raise BadFile(f"{path}: {member.filename}: {error}") from None


def read_array(path: Path | str, limit: int = MAX_ARRAYS_BYTES) -> npt.NDArray[Any]:
    """Return the array of a `.npy` file; objects are refused.

    Raises:
        BadFile: it is damaged or cut, holds objects, or is larger than `limit` bytes.
    """
    data = read_bytes(path, limit)
    try:
        return _array(io.BytesIO(data), len(data))
    except Exception as error:  # numpy lets through what its parser meets
        raise BadFile(f"{path}: damaged or no .npy: {' '.join(str(error).split())}") from None


def _array(stream: IO[bytes], total: int) -> npt.NDArray[Any]:
    """Read one array from a stream of `total` bytes; no more is made room for than that."""
    version = np.lib.format.read_magic(stream)
    reader = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)
    if reader is None:
        raise BadFile(f"format {version}")
    shape, column_major, dtype = reader(stream)
    if dtype.hasobject:
        raise BadFile("holds objects, which are not read")
    size = math.prod(shape) * dtype.itemsize
    if stream.tell() + size != total:
        raise BadFile(f"has another size than its shape {shape}")
    array: npt.NDArray[Any] = np.empty(shape, dtype, order="F" if column_major else "C")
    room = array.reshape(-1, order="A").view(np.uint8) if size else np.empty(0, np.uint8)
    at = 0
    while at < size:
        part = np.frombuffer(stream.read(min(size - at, 1 << 20)), np.uint8)
        if not len(part):
            raise BadFile("cut")
        room[at : at + len(part)] = part
        at += len(part)
    return array


def _lfs_pointer(path: Path) -> str:
    """Return how large the file is that a git-lfs pointer stands for; empty if it is none."""
    try:
        with path.open("rb") as stream:
            head = stream.read(512)
    except OSError:
        return ""
    if not head.startswith(b"version https://git-lfs.github.com/spec/"):
        return ""
    size = next((x[5:] for x in head.decode(errors="replace").split("\n") if x[:5] == "size "), "?")
    return f"a file of {size} bytes"


def load_torch(path: Path | str, load: Any) -> Any:
    """Return what a file of `torch.save` holds, read by `load` (`torch.load`) without code.

    Its parts lie unpacked in a zip archive, so that they take no more memory than the file has
    bytes; one with packed parts was not written by torch.

    Raises:
        BadFile: it is no such file, damaged, or wants to run code.
    """
    if Path(path).is_file() and (text := _lfs_pointer(Path(path))):
        raise BadFile(f"{path}: is only a pointer of git-lfs to {text}; `git lfs pull` brings it")
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            packed = [member for member in members if member.compress_type != zipfile.ZIP_STORED]
            named = any(member.filename.endswith("data.pkl") for member in members)
    except FileNotFoundError:
        raise BadFile(f"{path}: no such file") from None
    except OSError as error:
        raise BadFile(f"{path}: cannot be read: {error.strerror or error}") from None
    except Exception:  # zipfile lets through what its parser meets
        members, packed, named = [], [], False
    if not members or packed or not named:
        raise BadFile(f"{path}: no checkpoint that torch.save wrote, or a damaged one")
    try:
        return load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        said = " ".join(str(error).split())
        if "weights_only" in said or "Unsupported" in said:
            said = "it holds more than tensors, and reading that could run code"
        raise BadFile(f"{path}: cannot be read as weights: {said[:200]}") from None
