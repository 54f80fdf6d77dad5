"""Lists of scenes as people write them: `ABC`, `D`, `R17`, `random:0-199`, `ABC,R0-R199`."""

from __future__ import annotations

import re

from openhelix.benchmarks.calvin.random_scenes import MOST_SCENES
from openhelix.benchmarks.calvin.scene import SCENES, SceneError

_NUMBERS = re.compile(r"(?:random:R?|R)(\d+)(?:-R?(\d+))?")
WHAT = "letters out of ABCD, R17, random:0-199, or several of these with commas"


def scene_names(text: str) -> tuple[str, ...]:
    """The scenes that a list names, in its order.

    Raises:
        SceneError: it names none, an unknown one, or one twice.
    """
    names: list[str] = []
    for part in text.replace("calvin_scene_", "").split(","):
        numbers = _NUMBERS.fullmatch(part.strip())
        if numbers is None:
            wrong = [letter for letter in part.strip() if letter not in SCENES]
            if wrong or not part.strip():
                raise SceneError(f"{text!r} is no choice of scenes: {WHAT}")
            names += part.strip()
            continue
        first = int(numbers[1])
        last = first if numbers[2] is None else int(numbers[2])
        if not first <= last < MOST_SCENES:
            raise SceneError(
                f"{part.strip()!r} is no range of generated scenes; they are R0 to "
                f"R{MOST_SCENES - 1}"
            )
        names += [f"R{number}" for number in range(first, last + 1)]
    if len(set(names)) != len(names):
        raise SceneError(f"{text!r} names a scene twice")
    return tuple(names)


def written(names: tuple[str, ...]) -> str:
    """The shortest list that `scene_names` reads as these; fit for the name of a folder."""
    parts: list[str] = []
    span: list[int] = []

    def close() -> None:
        if span:
            parts.append(f"R{span[0]}" + (f"-R{span[-1]}" if len(span) > 1 else ""))
            span.clear()

    for name in names:
        if name.startswith("R"):
            if span and int(name[1:]) != span[-1] + 1:
                close()
            span.append(int(name[1:]))
        elif parts and not span and parts[-1].isalpha():
            parts[-1] += name
        else:
            close()
            parts.append(name)
    close()
    return ",".join(parts)
