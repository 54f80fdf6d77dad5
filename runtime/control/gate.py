"""A gate that has learned when a new latent is worth asking for.

`LearnedTrigger` looks as `ChangeTrigger` does, and decides by a small network what that one
decides by a rule: whether a latent of now would say something else than the one in use. It is
told what has become of the scene since System 2 was last asked, away from the robot and beside
it, standing and just now; how far the robot is from where its plan has it; how old the latent is,
and how much of the plan is left (`FEATURES`). `openhelix gate` fits it to what one System 2 says,
so its file names that System 2, and another one is refused.

The network has one hidden layer of `tanh`; in numpy it takes some microseconds.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import numpy as np

from openhelix.runtime.control.trigger import (
    LEVEL,
    LOOK_S,
    STILL,
    Mask,
    sight,
    spread,
    squares,
)
from openhelix.runtime.core.config import ConfigError
from openhelix.runtime.core.interfaces import (
    F32,
    F64,
    ActionChunk,
    LatentSpec,
    Observation,
    SpecMismatch,
)
from openhelix.runtime.core.paths import CHECKPOINTS
from openhelix.runtime.core.quaternion import angle_between, normalise

SHIPPED: Final = CHECKPOINTS / "trigger.json"
FORMAT: Final = 1
STREAK: Final = 3  # looks in a row; more are as good
MOST: Final = 6.0  # standard deviations; further out nothing was seen while it was fitted
# Numbers of cells are of a picture of 50 by 50, as log(1 + n).
FEATURES: Final = (
    "age_s",  # since System 2 was asked
    "elsewhere",  # cells changed since then where the robot has not been, and standing
    "elsewhere_streak",  # looks in a row at which a square of two by two of them stood
    "elsewhere_level",  # by how much of full scale they differ
    "elsewhere_far",  # from the middle of the robot's cells to theirs, in picture heights
    "left_behind",  # cells changed where it has been
    "beside",  # cells changed that hang together with the robot
    "jump",  # cells that differ from the last look and do not hang together with the robot
    "jump_beside",  # and that do
    "most_jump",  # the most of each since System 2 was asked
    "most_jump_beside",
    "way_m",  # of the hand, straight, since System 2 was asked
    "step_m",  # of the hand, since the last look
    "gripper_differs",  # from what it was when System 2 was asked
    "off_plan_m",  # from where the plan has the hand now
    "off_plan_rad",
    "off_plan_gripper",
    "plan_left_s",
    "frame_age_s",  # of System 2's picture
)
NUMBERS: Final = ("x", "y", "z", "open", *FEATURES[-5:])  # of a look that are not of the picture


class Plan(Protocol):
    """What a gate knows of the plan; see `openhelix.runtime.control.plans.ChunkBuffer`."""

    def ahead(self, start_ns: int, dt_ns: int, rows: int) -> ActionChunk | None: ...
    def remaining_s(self, t_ns: int) -> float: ...


@dataclass(frozen=True, slots=True)
class Look:
    """What a gate takes in of one observation."""

    t_ns: int
    seen: F32  # (h, w, 3) colours of cells, 0 to 1
    robot: Mask  # (h, w) those that may show the robot
    numbers: F64  # see `NUMBERS`; m, rad, s


def look_at(
    observation: Observation,
    camera: str,
    base_m: tuple[float, float, float],
    plan: Plan | None,
) -> Look | None:
    """Return what a gate takes in of an observation; None without a picture of its camera."""
    frame = observation.frames.get(camera)
    if frame is None:
        return None
    pose, now_ns = observation.tcp_pose, observation.t_ns
    off_m = off_rad = off_gripper = 0.0
    planned = None if plan is None else plan.ahead(now_ns, 1, 1)
    if planned is not None:
        off_m = float(np.linalg.norm(planned.poses[0, :3] - pose[:3]))
        turn = normalise(planned.poses[0, 3:].tolist())
        off_rad = angle_between(turn, normalise(pose[3:].tolist()))
        off_gripper = abs(float(planned.gripper[0]) - observation.gripper_open)
    left_s = 0.0 if plan is None else plan.remaining_s(now_ns)
    age_s = (now_ns - frame.t_ns) * 1e-9
    numbers = (*pose[:3], observation.gripper_open, off_m, off_rad, off_gripper, left_s, age_s)
    return Look(now_ns, *sight(frame, observation, base_m), np.array(numbers, np.float64))


class Memory:
    """What has become of the scene since System 2 was asked, one look after another.

    Args:
        asked: the look at which it was.
    """

    def __init__(self, asked: Look) -> None:
        self._asked = self._before = asked
        self._known = np.where(asked.robot[..., None], np.float32(np.nan), asked.seen)
        self._been = asked.robot
        self._streak, self._most = 0, (0, 0)

    def take(self, look: Look) -> F64:
        """Take in another look; return its `FEATURES` (n,)."""
        before, self._before = self._before, look
        moved = np.abs(look.seen - before.seen).max(-1)
        robot, still = look.robot | before.robot, moved < STILL
        gap = np.abs(look.seen - self._known).max(-1)  # NaN where nothing is known
        own = spread(robot, gap > LEVEL)
        changed = (gap > LEVEL) & ~robot
        self._been = self._been | own
        elsewhere = changed & ~self._been & still
        behind = changed & self._been & ~own
        jumped = (moved > LEVEL) & ~robot
        beside = jumped & spread(robot, moved > LEVEL)
        jumps = int((jumped & ~beside).sum()), int(beside.sum())
        self._most = max(self._most[0], jumps[0]), max(self._most[1], jumps[1])
        self._streak = min(STREAK, self._streak + 1) if squares(elsewhere).any() else 0
        fresh = np.isnan(gap) & still & ~look.robot
        self._known[fresh] = look.seen[fresh]
        scale = 2500 / gap.size
        counts = [elsewhere.sum(), behind.sum(), (own & changed).sum(), *jumps, *self._most]
        there, behind_n, beside_n, jump, jump_beside, most, most_beside = np.log1p(
            np.array(counts) * scale
        )
        hand, first, last = (one.numbers[:3] for one in (look, self._asked, before))
        return np.array(
            (
                (look.t_ns - self._asked.t_ns) * 1e-9,
                there,
                self._streak,
                gap[elsewhere].mean() if elsewhere.any() else 0.0,
                _apart(elsewhere, look.robot),
                behind_n,
                beside_n,
                jump,
                jump_beside,
                most,
                most_beside,
                np.linalg.norm(hand - first),
                np.linalg.norm(hand - last),
                abs(look.numbers[3] - self._asked.numbers[3]),
                *look.numbers[4:],
            )
        )


def _apart(one: Mask, other: Mask) -> float:
    """Return the distance of two masks' middles in heights of the picture; 0 if one is empty."""
    if not one.any() or not other.any():
        return 0.0
    middles = [np.argwhere(mask).mean(0) for mask in (one, other)]
    return float(np.linalg.norm(middles[0] - middles[1]) / one.shape[0])


@dataclass(frozen=True, slots=True)
class Gate:
    """A fitted gate.

    Attributes:
        system2: `LatentSpec.spec_id` of the System 2 that it was fitted to.
        mean, scale: (n,) of the features.
        hidden, hidden_bias: (n, k) and (k,).
        out, out_bias: (k,) and one number.
        threshold: probability from which System 2 is asked.
        about: what it was fitted to and how well it does, as plain data.
    """

    system2: str
    mean: F64
    scale: F64
    hidden: F64
    hidden_bias: F64
    out: F64
    out_bias: float
    threshold: float
    about: dict[str, object]

    def probability(self, features: F64) -> float:
        """Return how probably a latent of now would say something else; features (n,)."""
        given = np.clip((features - self.mean) / self.scale, -MOST, MOST)
        odds = np.tanh(given @ self.hidden + self.hidden_bias) @ self.out + self.out_bias
        return float(1.0 / (1.0 + np.exp(-odds)))

    def check(self, spec: LatentSpec, file: Path) -> None:
        """Raise SpecMismatch unless this is the System 2 that the gate was fitted to."""
        if spec.spec_id != self.system2:
            raise SpecMismatch(
                f"system2.trigger: {file} was fitted to System 2 {self.system2}, this is "
                f"{spec.spec_id}; fit one to it (openhelix gate), or say change or cadence"
            )

    def save(self, file: Path) -> None:
        """Write it."""
        arrays = ("mean", "scale", "hidden", "hidden_bias", "out")
        data = {
            "format": FORMAT,
            "system2": self.system2,
            "threshold": self.threshold,
            "about": self.about,
            "features": FEATURES,
            **{name: np.round(getattr(self, name), 5).tolist() for name in arrays},
            "out_bias": round(self.out_bias, 5),
        }
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(data) + "\n")

    @classmethod
    def load(cls, file: Path) -> Gate:
        """Read one.

        Raises:
            ConfigError: there is none, or it is no gate of this program.
        """
        where = f"system2.trigger_weights: {file}"
        try:
            data = json.loads(file.read_text())
        except OSError as error:
            raise ConfigError(
                f"{where}: {error.strerror}; `openhelix gate` fits one, or say "
                "system2.trigger=change"
            ) from None
        except ValueError:
            raise ConfigError(f"{where}: not JSON") from None
        known = isinstance(data, dict) and data.get("features") == list(FEATURES)
        if not known or data.get("format") != FORMAT:
            raise ConfigError(f"{where}: no gate of this program; `openhelix gate` fits one")
        try:
            made = cls(
                system2=str(data["system2"]),
                mean=np.array(data["mean"], np.float64),
                scale=np.array(data["scale"], np.float64),
                hidden=np.array(data["hidden"], np.float64),
                hidden_bias=np.array(data["hidden_bias"], np.float64),
                out=np.array(data["out"], np.float64),
                out_bias=float(data["out_bias"]),
                threshold=float(data["threshold"]),
                about=dict(data["about"]),
            )
            n, k = made.hidden.shape
            shapes = (made.mean.shape, made.scale.shape, made.hidden_bias.shape, made.out.shape)
            fits = n == len(FEATURES) and shapes == ((n,), (n,), (k,), (k,))
            fits = fits and bool(
                (made.scale > 0).all() and np.isfinite(made.probability(made.mean))
            )
        except (KeyError, TypeError, ValueError):
            fits = False
        if not fits:
            raise ConfigError(f"{where}: its weights do not fit together")
        return made


class LearnedTrigger:
    """Ask when a gate says so.

    Args:
        camera: System 2's; it needs depth.
        floor_s: least time between two requests, s.
        ceiling_s: longest time between two requests, s.
        base_m: where the arm stands, in W.
        gate: decides in between.
        file: where that is from.

    Attributes:
        changes: how often the gate was the reason for asking.
    """

    def __init__(
        self,
        camera: str,
        floor_s: float,
        ceiling_s: float,
        base_m: tuple[float, float, float],
        gate: Gate,
        file: Path = SHIPPED,
    ) -> None:
        self._camera, self._base, self._gate, self._file = camera, base_m, gate, file
        self._floor_ns, self._ceiling_ns = round(floor_s * 1e9), round(ceiling_s * 1e9)
        self._plan: Plan | None = None
        self._memory: Memory | None = None
        self._asked_ns: int | None = None
        self._looked_ns = 0
        self.changes = 0

    def expect(self, spec: LatentSpec) -> None:
        """Raise SpecMismatch unless System 2 is the one that the gate was fitted to."""
        self._gate.check(spec, self._file)

    def follow(self, plan: Plan) -> None:
        """This is the plan that is being executed."""
        self._plan = plan

    def begin(self) -> None:
        self._asked_ns = None

    def due(self, observation: Observation) -> bool:
        now_ns = observation.t_ns
        if not self._late(now_ns) and now_ns - self._looked_ns < LOOK_S * 1e9:
            return False
        look = look_at(observation, self._camera, self._base, self._plan)
        return self.decide(now_ns, look)

    def decide(self, now_ns: int, look: Look | None) -> bool:
        """Whether to ask, as `due`; `look` is None where there is no picture."""
        if look is not None:
            self._looked_ns = now_ns
        if self._late(now_ns):
            return self._ask(now_ns, look)
        if look is None:
            return False
        if self._memory is None:
            self._memory = Memory(look)
            return False
        sure = self._gate.probability(self._memory.take(look)) >= self._gate.threshold
        if sure and self._asked_ns is not None and now_ns - self._asked_ns >= self._floor_ns:
            self.changes += 1
            return self._ask(now_ns, look)
        return False

    def _late(self, now_ns: int) -> bool:
        return self._asked_ns is None or now_ns - self._asked_ns >= self._ceiling_ns

    def _ask(self, now_ns: int, look: Look | None) -> bool:
        self._asked_ns = now_ns
        self._memory = None if look is None else Memory(look)
        return True
