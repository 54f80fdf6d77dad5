"""Records on disk: a folder of append-only segments of the wire's own frames.

One record is a length-prefixed multipart message of `runtime.codec` with a topic, a time and
a checksum, so what a run recorded is what its processes said to each other, nothing is
pickled, and a file that a crash cut off is read up to the cut. `meta.json` says whether the
recording is complete; it says "no" until the writer has closed.

    segment   MAGIC, then records
    record    u32 crc of all that follows | u32 bytes of body | i64 time (ns) |
              u8 bytes of topic | u16 frames | topic | u32 bytes of each frame | frames
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Final

MAGIC: Final = b"OHREC\0\0\1"
META: Final = "meta.json"
_HEAD: Final = struct.Struct("<IIqBH")
MAX_BODY_BYTES: Final = 256 * 1024 * 1024

Record = tuple[str, int, list[bytes]]  # topic, time (ns), frames


class RecordingError(ValueError):
    """A path that holds no recording of this kind."""


class SegmentWriter:
    """Appends records, a new file every `segment_bytes`.

    Args:
        folder: made if needed; must not hold a recording already.
        segment_bytes: size at which the next file begins.
        max_bytes: size of the whole recording at which `write` refuses.
        meta: kept in `meta.json`.

    Raises:
        RecordingError: the folder holds a recording.
    """

    def __init__(
        self,
        folder: Path,
        segment_bytes: int = 256 * 1024 * 1024,
        max_bytes: int = 20 * 1024**3,
        meta: dict[str, Any] | None = None,
    ) -> None:
        self.folder = Path(folder)
        if (self.folder / META).exists():
            raise RecordingError(f"{self.folder}: holds a recording already; name another folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._segment_bytes, self._max_bytes = segment_bytes, max_bytes
        self._file: BinaryIO | None = None
        self._segments = 0
        self.bytes = 0
        self.records = 0
        self.meta = dict(meta or {})
        self.save_meta({"complete": False})

    def write(self, topic: str, t_ns: int, frames: Sequence[bytes | memoryview]) -> None:
        """Append one record.

        Raises:
            OSError: the disk refuses, or the recording has reached `max_bytes`.
        """
        name = topic.encode()
        sizes = [memoryview(frame).nbytes for frame in frames]
        body = len(name) + 4 * len(sizes) + sum(sizes)
        if self.bytes + body + _HEAD.size > self._max_bytes:
            raise OSError(f"the recording has reached its limit of {self._max_bytes} bytes")
        parts: list[bytes | memoryview] = [
            _HEAD.pack(0, body, t_ns, len(name), len(sizes))[4:],
            name,
            struct.pack(f"<{len(sizes)}I", *sizes),
            *frames,
        ]
        crc = 0
        for part in parts:
            crc = zlib.crc32(part, crc)
        file = self._open()
        file.write(struct.pack("<I", crc))
        file.writelines(parts)
        self.bytes += body + _HEAD.size
        self.records += 1

    def save_meta(self, extra: dict[str, Any]) -> None:
        """Write `meta.json`, whole or not at all."""
        text = json.dumps(self.meta | extra, indent=2)
        temporary = self.folder / (META + ".new")
        temporary.write_text(text)
        temporary.replace(self.folder / META)

    def close(self) -> None:
        """Close the last file; `meta.json` is the caller's to finish."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self) -> BinaryIO:
        if self._file is not None and self._file.tell() >= self._segment_bytes:
            self.close()
        if self._file is None:
            self._file = open(self.folder / f"{self._segments:06d}.ohr", "wb")  # noqa: SIM115
            self._file.write(MAGIC)
            self._segments += 1
        return self._file


class SegmentReader:
    """Reads what `SegmentWriter` wrote.

    Raises:
        RecordingError: the folder holds no recording.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        try:
            self.meta: dict[str, Any] = json.loads((self.folder / META).read_text())
        except FileNotFoundError:
            raise RecordingError(f"{self.folder}: no recording there (no {META})") from None
        except (OSError, ValueError) as error:
            raise RecordingError(f"{self.folder / META}: cannot be read: {error}") from None
        self.cut = False  # a record was cut off or damaged; set while reading

    @property
    def complete(self) -> bool:
        """Whether the writer closed properly and dropped nothing, and no damage was found."""
        return bool(self.meta.get("complete")) and not self.cut

    def __iter__(self) -> Iterator[Record]:
        """Yield every record in order; a damaged file is read up to the damage."""
        found = 0
        for path in sorted(self.folder.glob("*.ohr")):
            with open(path, "rb") as file:
                if file.read(len(MAGIC)) != MAGIC:
                    self.cut = True
                    continue
                while (record := self._read(file)) is not None:
                    found += 1
                    yield record
        # A file cut off between two records looks whole; the writer's count tells.
        self.cut = self.cut or found < self.meta.get("records", 0)

    def _read(self, file: BinaryIO) -> Record | None:
        head = file.read(_HEAD.size)
        if not head:
            return None
        if len(head) < _HEAD.size:
            self.cut = True
            return None
        crc, size, t_ns, topic_bytes, count = _HEAD.unpack(head)
        body = file.read(size) if size <= MAX_BODY_BYTES else b""
        if len(body) < size or zlib.crc32(body, zlib.crc32(head[4:])) != crc:
            self.cut = True
            return None
        # Checked against its checksum: from here on the sizes are what was written.
        topic = body[:topic_bytes].decode()
        at = topic_bytes + 4 * count
        frames = []
        for length in struct.unpack_from(f"<{count}I", body, topic_bytes):
            frames.append(body[at : at + length])
            at += length
        return topic, t_ns, frames
