"""Reading and writing the two object arrays of CALVIN's layout without trusting them.

`auto_lang_ann.npy` and `scene_info.npy` are dictionaries inside an object array, which
NumPy stores as a pickle, and a pickle may run any code that its author likes. CALVIN's own
code reads nothing else, so ours writes them, but beside each goes the same content as JSON
(embeddings as a plain array), which is what we read when it is there. Otherwise the pickle
is read by an unpickler that admits plain containers, numbers, strings and arrays, and
refuses every other global by name.
"""

from __future__ import annotations

import io
import json
import os
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

LANG_FILE = Path("lang_annotations") / "auto_lang_ann.npy"
LANG_TWIN = Path("lang_annotations") / "auto_lang_ann.json"
EMB_TWIN = Path("lang_annotations") / "auto_lang_emb.npy"
# What array pickles are made of, under the names of NumPy 1 and NumPy 2.
_ADMITTED = {
    *(("numpy", name) for name in ("ndarray", "dtype")),
    *(
        (f"numpy.{core}.{module}", name)
        for core in ("core", "_core")
        for module, name in (
            ("multiarray", "_reconstruct"),
            ("multiarray", "scalar"),
            ("numeric", "_frombuffer"),
        )
    ),
    ("_codecs", "encode"),
}


class DatasetError(ValueError):
    """A dataset file is missing, damaged, or holds what it must not."""


@dataclass(frozen=True, slots=True)
class Annotation:
    """One labelled stretch of play.

    Attributes:
        start: First frame.
        end: Last frame, inclusive.
        task: One of the 34 names.
        text: The instruction.
    """

    start: int
    end: int
    task: str
    text: str


class _ArrayUnpickler(pickle.Unpickler):
    """Admits containers, numbers, strings and arrays only."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ADMITTED:
            raise DatasetError(f"holds {module}.{name}, which is not data")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def load_object_array(path: Path) -> Any:
    """The one object inside a `.npy` file that CALVIN wrote, read by the guarded loader.

    Raises:
        DatasetError: Not an object array of one element, damaged, or not plain data.
    """
    data = path.read_bytes()
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        read = (
            np.lib.format.read_array_header_1_0
            if version == (1, 0)
            else np.lib.format.read_array_header_2_0
        )
        shape, _, dtype = read(stream)
        if not dtype.hasobject or shape != ():
            raise DatasetError(f"is an array {dtype} {shape}, not one pickled object")
        array = _ArrayUnpickler(stream).load()
        return array.item()
    except DatasetError as error:
        raise DatasetError(f"{path.name}: {error}") from None
    except Exception as error:
        raise DatasetError(f"{path.name}: cannot be read ({type(error).__name__})") from error


def replace_file(path: Path, data: bytes) -> None:
    """Write a file so that a reader sees the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def npy_bytes(array: npt.NDArray[Any]) -> bytes:
    """An array as the content of a `.npy` file; objects pickled only if it holds objects."""
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=array.dtype.hasobject)
    return stream.getvalue()


def object_bytes(value: Any) -> bytes:
    """One object as CALVIN stores it: a zero-dimensional object array."""
    box = np.empty((), dtype=object)
    box[()] = value
    return npy_bytes(box)


def write_annotations(
    folder: Path, annotations: Sequence[Annotation], embeddings: npt.NDArray[np.float32]
) -> None:
    """Write `lang_annotations/` for CALVIN's code, and the plain twins for ours.

    Args:
        folder: The split's folder, for example `training`.
        annotations: What was done when.
        embeddings: (N, 1, d) sentence embeddings, one per annotation; d may be 0.

    Raises:
        DatasetError: The embeddings do not fit.
    """
    if embeddings.ndim != 3 or embeddings.shape[:2] != (len(annotations), 1):
        raise DatasetError(
            f"embeddings: shape {embeddings.shape}, wants ({len(annotations)}, 1, d)"
        )
    language = {
        "ann": [a.text for a in annotations],
        "task": [a.task for a in annotations],
        "emb": embeddings,
    }
    spans = [(a.start, a.end) for a in annotations]
    content = {"language": language, "info": {"episodes": [], "indx": spans}}
    replace_file(folder / LANG_FILE, object_bytes(content))
    replace_file(folder / EMB_TWIN, npy_bytes(embeddings))
    rows = [[a.start, a.end, a.task, a.text] for a in annotations]
    replace_file(folder / LANG_TWIN, json.dumps(rows).encode())


def read_annotations(folder: Path) -> tuple[list[Annotation], npt.NDArray[np.float32]]:
    """The annotations of a split, from the plain twins if they are there.

    Returns:
        Annotations and their embeddings (N, 1, d).

    Raises:
        DatasetError: Neither form is there, or it is damaged.
    """
    if (folder / LANG_TWIN).exists() and (folder / EMB_TWIN).exists():
        try:
            rows = json.loads((folder / LANG_TWIN).read_text(encoding="utf-8"))
            embeddings = np.load(folder / EMB_TWIN, allow_pickle=False)
            return [Annotation(int(s), int(e), str(t), str(x)) for s, e, t, x in rows], embeddings
        except (ValueError, TypeError) as error:
            raise DatasetError(f"{LANG_TWIN}: cannot be read ({error})") from error
    if not (folder / LANG_FILE).exists():
        raise DatasetError(f"{folder}: has no {LANG_FILE}")
    content = load_object_array(folder / LANG_FILE)
    try:
        language: Mapping[str, Any] = content["language"]
        spans = content["info"]["indx"]
        annotations = [
            Annotation(int(span[0]), int(span[1]), str(task), str(text))
            for span, task, text in zip(spans, language["task"], language["ann"], strict=True)
        ]
        embeddings = np.asarray(language["emb"], dtype=np.float32)
        return annotations, embeddings.reshape(len(annotations), 1, -1)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise DatasetError(f"{LANG_FILE}: not CALVIN's annotations ({error})") from error
