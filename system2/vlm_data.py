"""Pictures with questions on disk: few files, compressed, readable without the simulator.

A folder holds shards and one record of how they came about:

    about.json          what made it: seed, scenes, kinds; free text for people
    00000.bin           the shard's pictures, one encoded file after the other
    00000.jsonl.gz      a line a picture: `bytes` [start, stop] in the .bin, `group`,
                        `questions` [[kind, question, answer, held-out wording 0 or 1]],
                        `labels` {name: word}, `numbers` [float or null]

`labels` and `numbers` are what a read-out without language is trained on; a folder of other
pictures may leave both empty. A shard whose second file stands is whole, so that a maker that
was killed goes on with the next one, and a folder can grow.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from openhelix.runtime.core.files import read_json
from openhelix.runtime.core.interfaces import U8

ABOUT = "about.json"
MAX_TEXT_BYTES = (
    256 * 1024 * 1024
)  # of a shard's questions, unpacked; a thousand pictures have 1 MB
# Instructions to a robot, answered by the plain sentence that is meant: only the picture tells
# which, or the words do; or nothing is meant that the robot can do.
GOAL_KINDS = ("goal look", "goal told", "goal nothing")


class TalkError(ValueError):
    """A folder of pictures and questions that cannot be read; the message says what is wrong."""


@dataclass(frozen=True, slots=True)
class Question:
    """One question about one picture; `held_out`: in a wording that training never sees."""

    kind: str
    text: str
    answer: str
    held_out: bool = False


@dataclass(frozen=True, slots=True)
class Record:
    """A picture and what is asked of it.

    Attributes:
        picture: the encoded file.
        group: the scene, or whatever else results are grouped by.
        questions: with their answers.
        labels: by name, one word.
        numbers: None where there is none to tell.
    """

    picture: bytes
    group: str
    questions: tuple[Question, ...]
    labels: dict[str, str]
    numbers: tuple[float | None, ...] = ()

    def image(self) -> Image.Image:
        """Return the picture, RGB."""
        with Image.open(io.BytesIO(self.picture)) as opened:
            return opened.convert("RGB")


def encoded(image: Image.Image | U8, quality: int = 80) -> bytes:
    """Return a picture as JPEG with whole colours: a light is a few pixels large."""
    picture = image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image))
    out = io.BytesIO()
    picture.save(out, format="JPEG", quality=quality, subsampling=0)
    return out.getvalue()


def write_shard(folder: Path, index: int, records: Sequence[Record]) -> None:
    """Write one shard; it stands when this returns, and not before."""
    folder.mkdir(parents=True, exist_ok=True)
    lines, start = [], 0
    part = folder / f".{index:05d}.bin.part"
    with part.open("wb") as out:
        for record in records:
            out.write(record.picture)
            line = {
                "bytes": [start, start + len(record.picture)],
                "group": record.group,
                "questions": [
                    [q.kind, q.text, q.answer, int(q.held_out)] for q in record.questions
                ],
                "labels": record.labels,
                "numbers": record.numbers,
            }
            start += len(record.picture)
            lines.append(json.dumps(line, separators=(",", ":")))
    part.rename(folder / f"{index:05d}.bin")
    text = folder / f".{index:05d}.part"
    # No time stamp inside: the same questions are the same bytes.
    text.write_bytes(gzip.compress("\n".join(lines).encode(), mtime=0))
    text.rename(folder / f"{index:05d}.jsonl.gz")


def write_about(folder: Path, about: dict[str, Any]) -> None:
    """Write what made a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ABOUT).write_text(json.dumps(about, indent=1, sort_keys=True) + "\n")


def shards(folder: Path) -> list[int]:
    """Return the numbers of the whole shards of a folder."""
    return sorted(int(file.name.split(".")[0]) for file in folder.glob("[0-9]*.jsonl.gz"))


def read_shard(folder: Path, index: int) -> Iterator[Record]:
    """Yield the records of one shard.

    Raises:
        TalkError: it is damaged.
    """
    try:
        blob = (folder / f"{index:05d}.bin").read_bytes()
        with gzip.open(folder / f"{index:05d}.jsonl.gz") as packed:
            text = packed.read(MAX_TEXT_BYTES + 1)
        if len(text) > MAX_TEXT_BYTES:
            raise TalkError(f"unpacks to more than {MAX_TEXT_BYTES >> 20} MiB")
        for line in text.decode().splitlines():
            row = json.loads(line)
            start, stop = row["bytes"]
            if not 0 <= start < stop <= len(blob):
                raise TalkError("its .bin is too short")
            asked = tuple(
                Question(kind, words, answer, bool(held))
                for kind, words, answer, held in row["questions"]
            )
            yield Record(
                blob[start:stop], row["group"], asked, row["labels"], tuple(row["numbers"])
            )
    # What gzip, JSON and wrong kinds of values raise; a record is a few hundred bytes of text.
    except (OSError, EOFError, zlib.error, LookupError, TypeError, ValueError, RecursionError) as e:
        raise TalkError(f"data: {folder}/{index:05d}: {' '.join(str(e).split())}") from e


def read(folder: Path, limit: int = 0) -> list[Record]:
    """Return the records of a folder, in the order of its shards; at most `limit` unless 0.

    Raises:
        TalkError: there is none, or it is damaged.
    """
    found: list[Record] = []
    for index in shards(folder):
        found.extend(read_shard(folder, index))
        if limit and len(found) >= limit:
            return found[:limit]
    if not found:
        raise TalkError(f"data: no pictures with questions in {folder}")
    return found


def read_about(folder: Path) -> dict[str, Any]:
    """Return what made a folder; empty where nobody wrote it down."""
    file = folder / ABOUT
    return read_json(file) if file.is_file() else {}
