"""What the frozen language model makes of the frames, computed once and kept.

Two kinds, each in a folder named by everything that it depends on, so that what was made for
other settings is never read:

- `prefix`: keys and values of image and sentence before `<ACT>` (`system2.prefix`), with
  which `<ACT>` can be trained exactly. For SmolLM2-135M 2.2 MB a frame in bfloat16.
- `states`: read-outs at an `<ACT>` that no longer learns, a kilobyte each.

A part file appears whole or not at all, so a killed run goes on where it was. What would
need more disk than allowed or free is refused before it begins.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from runtime.config import ConfigError

log = logging.getLogger(__name__)
ABOUT = "about.json"
Encode = Callable[[Tensor, Tensor], dict[str, Tensor]]


@dataclass(frozen=True, slots=True)
class Plan:
    """Which frames, and which sentences for each.

    Attributes:
        frames: (N,) ascending.
        instructions: (N, P).
        bytes_each: disk a frame takes, at most.
        part: frames a file.
    """

    frames: Tensor
    instructions: Tensor
    bytes_each: int
    part: int

    @property
    def parts(self) -> int:
        """How many files."""
        return -(-len(self.frames) // self.part)

    def rows(self, part: int) -> slice:
        """Return the rows of a file."""
        return slice(part * self.part, min((part + 1) * self.part, len(self.frames)))


class Store:
    """A folder of part files and the plan that they follow."""

    def __init__(self, root: Path, kind: str, identity: dict[str, Any], plan: Plan) -> None:
        self.plan, self.kind = plan, kind
        self.identity = identity | {"frames": len(plan.frames), "part": plan.part}
        text = json.dumps(self.identity, sort_keys=True)
        chosen = hashlib.sha256(plan.instructions.numpy().tobytes())
        chosen.update(plan.frames.numpy().tobytes())
        name = hashlib.sha256((text + chosen.hexdigest()).encode()).hexdigest()[:12]
        self.folder = root / f"{kind}-{name}"
        self._files: dict[int, Any] = {}

    def path(self, part: int) -> Path:
        """Return a part's file."""
        return self.folder / f"part-{part:05d}.safetensors"

    def missing(self) -> list[int]:
        """Return the parts still to do."""
        return [part for part in range(self.plan.parts) if not self.path(part).is_file()]

    def check_disk(self, max_gb: float) -> None:
        """Refuse what does not fit.

        Raises:
            ConfigError: more is needed than allowed or free.
        """
        todo = sum(self.plan.rows(p).stop - self.plan.rows(p).start for p in self.missing())
        need = todo * self.plan.bytes_each
        root = self.folder.parent
        root.mkdir(parents=True, exist_ok=True)
        there = sum(f.stat().st_size for f in root.rglob("*.safetensors"))
        if there + need > max_gb * 1e9:
            raise ConfigError(
                f"latent.max_gb: {(there + need) / 1e9:.2f} GB would lie in {root}, {max_gb:g} are "
                "allowed; take fewer latent.frames, a larger latent.stride, or remove old folders"
            )
        free = shutil.disk_usage(root).free
        if need > free:
            raise ConfigError(f"out: {need / 1e9:.2f} GB are needed, {free / 1e9:.2f} are free")

    def build(self, encode: Encode, max_gb: float, deadline_ns: int = 0) -> bool:
        """Make what is missing; return whether all is there.

        Args:
            encode: frames (B,) and instructions (B, P) to tensors with a row a frame.
            max_gb: most that may lie in the folder above.
            deadline_ns: monotonic time after which no further part is begun; 0 for none.
        """
        todo = self.missing()
        if not todo:
            return True
        self.check_disk(max_gb)
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / ABOUT).write_text(json.dumps(self.identity, indent=1) + "\n")
        size = len(self.plan.frames) * self.plan.bytes_each / 1e9
        log.info("%s: %d frames, at most %.2f GB", self.kind, len(self.plan.frames), size)
        begun, done = time.monotonic_ns(), 0
        for part in todo:
            if deadline_ns and time.monotonic_ns() >= deadline_ns:
                return False
            rows = self.plan.rows(part)
            tensors = encode(self.plan.frames[rows], self.plan.instructions[rows])
            temporary = self.path(part).with_suffix(".part")
            save_file({k: v.contiguous() for k, v in tensors.items()}, temporary)
            temporary.replace(self.path(part))
            done += rows.stop - rows.start
            each = (time.monotonic_ns() - begun) * 1e-9 / done
            left = sum(self.plan.rows(p).stop - self.plan.rows(p).start for p in todo) - done
            log.info(
                "%s: %d left, %.3f s a frame, %.1f min to go",
                self.kind,
                left,
                each,
                left * each / 60,
            )
        return True

    def read(self, rows: Tensor) -> list[dict[str, Tensor]]:
        """Return the tensors of some rows (B,), one dictionary a row."""
        out = []
        for row in rows.tolist():
            part, at = divmod(row, self.plan.part)
            if part not in self._files:
                self._files[part] = safe_open(self.path(part), framework="pt")
            file = self._files[part]
            out.append({k: file.get_slice(k)[at : at + 1][0] for k in file.keys()})  # noqa: SIM118
        return out

    def whole(self) -> dict[str, Tensor]:
        """Return every tensor of the store in memory, in the plan's order."""
        parts = []
        for part in range(self.plan.parts):
            with safe_open(self.path(part), framework="pt") as file:
                parts.append({k: file.get_tensor(k) for k in file.keys()})  # noqa: SIM118
        return {k: torch.cat([p[k] for p in parts]) for k in parts[0]}
