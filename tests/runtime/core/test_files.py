"""Files: whole or not at all on a full disk, and bounded whatever a file claims."""

from __future__ import annotations

import errno
import io
import json
import os
import resource
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save, save_file

from openhelix.runtime.core import files
from openhelix.runtime.core.files import (
    BadFile,
    load_torch,
    read_arrays,
    read_json,
    refusal_of,
    replace_file,
    tensor_header,
    written,
)

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}


def fails(number: int):
    def write(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return write


# Writing -----------------------------------------------------------------------------------------


def test_a_file_is_written_whole_and_its_folder_made(tmp_path) -> None:
    place = tmp_path / "new" / "file"
    replace_file(place, b"one")
    replace_file(place, b"two", sync=True)
    assert place.read_bytes() == b"two"
    assert [p.name for p in place.parent.iterdir()] == ["file"]


@pytest.mark.parametrize("number", files.NO_ROOM)
def test_a_full_disk_names_the_file_keeps_the_old_one_and_leaves_nothing(tmp_path, number) -> None:
    place = tmp_path / "file"
    place.write_bytes(b"old")

    def write() -> None:
        with written(place) as part:
            part.write_bytes(b"ne")
            fails(number)()

    with pytest.raises(OSError) as caught:
        write()
    assert caught.value.errno == number and caught.value.filename == str(place)
    assert place.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_another_error_is_not_taken_for_the_disk(tmp_path) -> None:
    def write() -> None:
        with written(tmp_path / "file") as part:
            part.write_bytes(b"x")
            raise KeyError("a defect")

    with pytest.raises(KeyError):
        write()
    assert not list(tmp_path.iterdir())


LIMITED = """
import sys, resource, torch
from pathlib import Path
from safetensors.torch import save_file
from openhelix.runtime.core.files import written
place = Path(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    with written(place) as part:
        save_file({"a": torch.zeros(10_000)}, part)
except OSError as error:
    print(error.errno, error.filename == str(place), [p.name for p in place.parent.iterdir()])
"""


def test_what_a_library_calls_a_full_disk_is_told_as_one(tmp_path) -> None:
    """The file may grow to 1000 bytes; safetensors says so in an error of its own."""
    words = [sys.executable, "-c", LIMITED, str(tmp_path / "x.safetensors")]
    said = subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()
    assert int(said[0]) in files.NO_ROOM and said[1:] == ["True", "[]"]


def test_the_refusal_is_found_behind_other_errors() -> None:
    error = RuntimeError("cannot save")
    error.__cause__ = OSError(errno.ENOSPC, "full")
    assert refusal_of(error) == errno.ENOSPC
    text = "Error while serializing: I/O error: No space left on device (os error 28)"
    assert refusal_of(SafetensorError(text)) == errno.ENOSPC
    assert refusal_of(ValueError("wrong")) is None


# Reading -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"{", "not JSON"),
        (b"", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "nested too deep"),
        (b"[]", "holds list, must be a JSON object"),
        (b"null", "holds NoneType"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "not JSON"),
    ],
)
def test_what_is_no_object_is_refused_by_the_files_name(tmp_path, data, said) -> None:
    place = tmp_path / "config.json"
    place.write_bytes(data)
    with pytest.raises(BadFile, match=said) as caught:
        read_json(place)
    assert str(caught.value).startswith(str(place)) and "\n" not in str(caught.value)


def test_a_file_that_is_too_large_missing_or_a_folder_is_refused(tmp_path) -> None:
    place = tmp_path / "config.json"
    place.write_bytes(b" " * 101)
    with pytest.raises(BadFile, match="larger than"):
        read_json(place, limit=100)
    with pytest.raises(BadFile, match="no such file"):
        read_json(tmp_path / "none")
    with pytest.raises(BadFile, match="cannot be read"):
        read_json(tmp_path)


def header(entries: object, tensors: bytes = b"") -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + tensors


def entry(shape: list[object], end: object, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "too short"),
        (b"\0" * 7, "too short"),
        (struct.pack("<Q", 100) + b"{}", "claims a header of 100 bytes, the file has 10"),
        (struct.pack("<Q", 2**63) + b"{}", "claims a header of 9223372036854775808 bytes"),
        (struct.pack("<Q", 2) + b"[]", "header: holds list"),
        (struct.pack("<Q", 2) + b"{ ", "header: not JSON"),
        (header({"a": entry([10**6, 10**6], 4 * 10**12)}), "cut or damaged"),
        (header({"a": entry([2], 4)}, b"\0" * 4), "another size than its shape"),
        (header({"a": entry([-1], -4)}), "not described"),
        (header({"a": entry(["2"], 8)}, b"\0" * 8), "not described"),
        (header({"a": entry([True], 4)}, b"\0" * 4), "not described"),
        (header({"a": entry([1], 4, "F31")}, b"\0" * 4), "not described"),
        (header({"a": []}), "not described"),
        (header({"a": entry([1], 4)}, b"\0" * 5), "cut or damaged"),
        (header({"a": entry([1], 4), "b": entry([1], 4)}, b"\0" * 4), "does not begin"),
        (header({"__metadata__": {"a": 1}}), "metadata"),
        (header({"__metadata__": []}), "metadata"),
    ],
)
def test_a_header_that_lies_is_refused_without_reading_a_tensor(tmp_path, data, said) -> None:
    place = tmp_path / "model.safetensors"
    place.write_bytes(data)
    with pytest.raises(BadFile, match=said) as caught:
        tensor_header(place)
    assert str(caught.value).startswith(str(place)) and "\n" not in str(caught.value)


def test_a_whole_header_is_read(tmp_path) -> None:
    place = tmp_path / "model.safetensors"
    save_file(TENSORS, place, metadata={"what": "a test"})
    found, metadata = tensor_header(place)
    assert found == {"a": ("F32", (2, 3)), "b": ("BF16", (4,))}
    assert metadata == {"what": "a test"}


@settings(deadline=None)
@given(st.data())
def test_no_damage_to_safetensors_gets_past_the_header_unnoticed(tmp_path_factory, data) -> None:
    """Whatever bytes are changed or cut: refused in one line, or the library reads it too."""
    whole = bytearray(save(TENSORS))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(whole)))
    place = tmp_path_factory.mktemp("fuzz") / "model.safetensors"
    place.write_bytes(bytes(whole[: cut or None]))
    found = tried(tensor_header, place)
    if found is not None:
        found = found[0]
        size = sum(t.nbytes for t in load_file(place).values()) if readable(place) else 0
        assert size <= place.stat().st_size and len(found) <= len(TENSORS) + 1


def tried(read, place: Path):
    """What a reader gives; None where it refuses, in one line that names the file."""
    try:
        return read(place)
    except BadFile as error:
        said = str(error)
    assert str(place) in said and "\n" not in said
    return None


def readable(place: Path) -> bool:
    try:
        load_file(place)
    except SafetensorError:
        return False
    return True


def zipped(place: Path, members: dict[str, bytes], **options: int) -> Path:
    with zipfile.ZipFile(place, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, data in members.items():
            packed.writestr(name, data)
    return place


def npy(array: np.ndarray, claim: tuple[int, ...] | None = None) -> bytes:
    stream = io.BytesIO()
    about = np.lib.format.header_data_from_array_1_0(array)
    np.lib.format.write_array_header_1_0(stream, about | ({"shape": claim} if claim else {}))
    return stream.getvalue() + array.tobytes()


def test_arrays_come_back_in_either_order_and_empty(tmp_path) -> None:
    arrays = {
        "rows": np.arange(6.0).reshape(2, 3),
        "columns": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "none": np.empty((0, 4), np.float32),
        "one": np.array(3),
    }
    np.savez_compressed(tmp_path / "x.npz", **arrays)
    found = read_arrays(tmp_path / "x.npz")
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


def test_a_small_file_that_unpacks_to_gigabytes_is_refused_by_its_size(tmp_path) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    place = zipped(tmp_path / "bomb.npz", {"about.npy": bytes(40 << 20)})
    assert place.stat().st_size < 1 << 20
    with pytest.raises(BadFile, match=r"bomb.npz: would unpack to 40 MiB; at most 32 are read"):
        read_arrays(place, limit=32 << 20)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 120 << 10  # KiB; the 40 MiB were made here


def test_an_archive_that_lies_about_its_size_is_read_no_further(tmp_path) -> None:
    place = zipped(tmp_path / "lie.npz", {"a.npy": npy(np.zeros(1 << 20, np.uint8))})
    data = place.read_bytes()
    size = len(npy(np.zeros(1 << 20, np.uint8)))
    assert data.count(struct.pack("<I", size)) == 2
    place.write_bytes(data.replace(struct.pack("<I", size), struct.pack("<I", 1000)))
    with pytest.raises(BadFile, match=r"lie.npz"):
        read_arrays(place)


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ({"a.npy": npy(np.zeros(4), claim=(10**9, 10**9))}, "another size than its shape"),
        ({"a.npy": npy(np.zeros(4), claim=(3,))}, "another size than its shape"),
        ({"a.npy": b"\x93NUMPY\x09\x00" + bytes(100)}, "format"),
        ({"a.npy": b"no array"}, "damaged"),
        ({"a.npy": b""}, "damaged"),
    ],
)
def test_an_array_that_is_not_as_it_says_is_refused(tmp_path, members, said) -> None:
    place = zipped(tmp_path / "x.npz", members)
    with pytest.raises(BadFile, match=said) as caught:
        read_arrays(place)
    assert str(place) in str(caught.value) and "\n" not in str(caught.value)


def test_objects_are_not_unpickled(tmp_path) -> None:
    np.savez(tmp_path / "x.npz", a=np.array([{}], dtype=object))
    with pytest.raises(BadFile, match="holds objects"):
        read_arrays(tmp_path / "x.npz")


@settings(deadline=None)
@given(st.data())
def test_no_damage_to_an_archive_is_more_than_one_line(tmp_path_factory, data) -> None:
    stream = io.BytesIO()
    np.savez_compressed(stream, a=np.arange(50), b=np.ones((2, 3), np.float32))
    whole = bytearray(stream.getvalue())
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(whole)))
    place = tmp_path_factory.mktemp("fuzz") / "x.npz"
    place.write_bytes(bytes(whole[: cut or None]))
    found = tried(read_arrays, place)
    if found is not None:
        assert sum(array.nbytes for array in found.values()) < 4096


class Marking:
    """Runs code when it is unpickled the careless way."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_a_checkpoint_of_torch_is_read_and_code_in_one_is_not_run(tmp_path) -> None:
    place, mark = tmp_path / "x.pth", tmp_path / "mark"
    torch.save({"weight": {"a": torch.ones(2)}}, place)
    assert torch.equal(load_torch(place, torch.load)["weight"]["a"], torch.ones(2))
    torch.save({"a": Marking(mark)}, place)
    with pytest.raises(BadFile, match="more than tensors"):
        load_torch(place, torch.load)
    assert not mark.exists()


@pytest.mark.parametrize("data", [b"", b"hello", b"\x80\x02}q\x00.", bytes(2000)])
def test_what_torch_did_not_write_is_refused(tmp_path, data) -> None:
    place = tmp_path / "x.pth"
    place.write_bytes(data)
    with pytest.raises(BadFile, match=r"no checkpoint that torch\.save wrote"):
        load_torch(place, torch.load)


def test_a_packed_checkpoint_is_refused_before_it_is_unpacked(tmp_path) -> None:
    torch.save({"a": torch.zeros(1 << 20)}, tmp_path / "x.pth")
    with zipfile.ZipFile(tmp_path / "x.pth") as source:
        members = {member.filename: source.read(member) for member in source.infolist()}
    with pytest.raises(BadFile, match="no checkpoint"):
        load_torch(zipped(tmp_path / "bomb.pth", members), torch.load)
