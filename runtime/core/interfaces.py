"""The interfaces of the parts that the loop connects; small on purpose.

Any class with these methods qualifies; nothing needs to be inherited.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

import numpy as np

from openhelix.runtime.core.config import CommandFailed
from openhelix.runtime.core.types import F32, ActionChunk, CameraFrame, LatentGoal, Observation

# ------------------------------------------------------------------------------------------------
# What each side promises and what it expects; a mismatch refuses to start.
#
# A wrong rotation layout or an inverted gripper costs a policy everything and crashes
# nothing, so producer and consumer state their conventions as data and `check_*` compares
# them before the first step.


class SpecMismatch(ValueError):
    """Producer and consumer disagree; the message names the field and both values."""


@dataclass(frozen=True, slots=True)
class LatentSpec:
    """What System 2 publishes and what System 1 was trained on."""

    kind: str  # the read-out, for example "act_last"; see openhelix.system2.latents
    n_tokens: int
    dim: int
    model_id: str = ""  # hash of the weights that shape the latent; "" accepts any

    @property
    def spec_id(self) -> str:
        """Twelve hexadecimal digits that travel with every latent."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass(frozen=True, slots=True)
class CameraSpec:
    """One camera as a policy wants it or a robot delivers it."""

    name: str
    height: int
    width: int
    depth: bool = True


@dataclass(frozen=True, slots=True)
class ActionSpec:
    """How targets are written; see `openhelix.runtime.core.types.ActionChunk`."""

    frame: Literal["world"] = "world"
    rotation: Literal["quat_xyzw"] = "quat_xyzw"
    gripper: Literal["openness01"] = "openness01"
    hz: float = 30.0


@dataclass(frozen=True, slots=True)
class PolicySpec:
    """What a System 1 policy expects and promises."""

    cameras: tuple[CameraSpec, ...]
    latent: LatentSpec | None  # None: the policy runs without System 2
    action: ActionSpec
    horizon: int  # rows of a chunk

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> PolicySpec:
        """Return the spec that `dataclasses.asdict` gave, for example after it was JSON."""
        latent = data["latent"]
        return cls(
            cameras=tuple(CameraSpec(**camera) for camera in data["cameras"]),
            latent=None if latent is None else LatentSpec(**latent),
            action=ActionSpec(**data["action"]),
            horizon=int(data["horizon"]),
        )


@dataclass(frozen=True, slots=True)
class RobotSpec:
    """What a robot delivers and accepts."""

    cameras: tuple[CameraSpec, ...]
    action: ActionSpec


def check_latent(produced: LatentSpec, expected: LatentSpec) -> None:
    """Raise `SpecMismatch` unless System 2's latent is the one System 1 was trained on."""
    for name in ("kind", "n_tokens", "dim", "model_id"):
        have, want = getattr(produced, name), getattr(expected, name)
        if name == "model_id" and not want:
            continue
        if have != want:
            raise SpecMismatch(f"latent.{name}: System 2 gives {have!r}, System 1 needs {want!r}")


def check_robot(robot: RobotSpec, policy: PolicySpec) -> None:
    """Raise `SpecMismatch` unless the robot has every camera and convention the policy needs."""
    have = {camera.name: camera for camera in robot.cameras}
    for want in policy.cameras:
        got = have.get(want.name)
        if got is None:
            names = ", ".join(sorted(have)) or "none"
            raise SpecMismatch(f"camera {want.name!r}: the robot has {names}")
        if (got.height, got.width) != (want.height, want.width):
            raise SpecMismatch(
                f"camera {want.name!r}: the robot gives {got.height}x{got.width} pixels, "
                f"the policy needs {want.height}x{want.width}"
            )
        if want.depth and not got.depth:
            raise SpecMismatch(f"camera {want.name!r}: the policy needs depth, the robot has none")
    for name in ("frame", "rotation", "gripper", "hz"):
        a, b = getattr(robot.action, name), getattr(policy.action, name)
        if a != b:
            raise SpecMismatch(f"action.{name}: the robot takes {a!r}, the policy gives {b!r}")


def check_frame(frame: CameraFrame, spec: CameraSpec) -> None:
    """Raise `SpecMismatch` unless a live frame has the promised shapes and dtypes."""
    if frame.rgb.shape != (spec.height, spec.width, 3) or frame.rgb.dtype != "uint8":
        raise SpecMismatch(
            f"camera {spec.name!r}: rgb is {frame.rgb.dtype}{frame.rgb.shape}, "
            f"promised uint8{(spec.height, spec.width, 3)}"
        )
    if not spec.depth:
        return
    depth = frame.depth
    if depth is None or depth.shape != (spec.height, spec.width) or depth.dtype != "float32":
        got = "missing" if depth is None else f"{depth.dtype}{depth.shape}"
        raise SpecMismatch(
            f"camera {spec.name!r}: depth is {got}, promised float32{(spec.height, spec.width)}"
        )


class PolicyFault(RuntimeError):
    """System 1's output was not finite: no chunk was made of it, nothing may be sent."""


class Policy(Protocol):
    """System 1: newest latent and live observation in, trajectory out."""

    @property
    def spec(self) -> PolicySpec: ...

    def warm_up(self) -> None:
        """Run once on made-up input, so that the first real call is not the slow one."""

    def reset(self, seed: int | None = None) -> None:
        """Forget the past; with a seed, what follows is deterministic."""

    def act(self, observation: Observation, latents: Sequence[LatentGoal]) -> ActionChunk:
        """Return a trajectory that starts one control period after `observation.t_ns`.

        `latents` holds the recent latents of this instruction, newest last; empty when the
        policy runs without System 2.

        Raises:
            PolicyFault: the output was not finite. On both clocks the fault is counted, the
                loop holds when its plan runs out, and the policy is asked again.
        """


class PartFailed(CommandFailed):
    """A policy or an engine raised, or returned what it may not; one line says which and what.

    Args:
        part: "system1" or "system2".
        error: what it raised, or what is wrong with its result.
    """

    def __init__(self, part: str, error: BaseException) -> None:
        super().__init__(f"{part}: {type(error).__name__}: {' '.join(str(error).split())}")


class BadLatent(ValueError):
    """System 2 returned what is no latent of its own spec; one line says why."""


def check_policy(policy: object, where: str = "policy") -> None:
    """Raise `SpecMismatch` unless an object has the verbs and the spec of a `Policy`."""
    if isinstance(policy, type):
        raise SpecMismatch(f"{where}: {policy.__name__} is a class; give an object of it")
    _check_verbs(policy, where, "policy", ("warm_up", "reset", "act"))
    if not isinstance(getattr(policy, "spec", None), PolicySpec):
        raise SpecMismatch(f"{where}: {type(policy).__name__}.spec is no PolicySpec")


def check_engine(engine: object, where: str = "system2") -> None:
    """Raise `SpecMismatch` unless an object has the verbs and the spec of an `Engine`."""
    if isinstance(engine, type):
        raise SpecMismatch(f"{where}: {engine.__name__} is a class; give an object of it")
    _check_verbs(engine, where, "System 2 engine", ("encode",))
    if not isinstance(getattr(engine, "spec", None), LatentSpec):
        raise SpecMismatch(f"{where}: {type(engine).__name__}.spec is no LatentSpec")


def _check_verbs(part: object, where: str, kind: str, verbs: Sequence[str]) -> None:
    missing = [verb for verb in verbs if not callable(getattr(part, verb, None))]
    if missing:
        raise SpecMismatch(f"{where}: {type(part).__name__} is no {kind}: no {', '.join(missing)}")


def encode_one(engine: Engine, image: Any, instruction: str) -> F32:
    """Return one latent (n_tokens, d), checked as it would be on the wire.

    Raises:
        BadLatent: its shape or dtype is not the spec's, or it is not finite.
    """
    spec, encoded = engine.spec, engine.encode([image], [instruction])
    if not isinstance(encoded, np.ndarray):
        raise BadLatent(f"encode returned {type(encoded).__name__}, not an array")
    want = (1, spec.n_tokens, spec.dim)
    if encoded.shape != want or encoded.dtype != np.float32:
        raise BadLatent(
            f"the latent is {encoded.dtype}{encoded.shape}, the spec says float32{want}"
        )
    if not np.isfinite(encoded).all():
        raise BadLatent("the latent is not finite")
    latent: F32 = encoded[0]
    return latent


@dataclass(frozen=True, slots=True)
class Judgement:
    """Whether an instruction names something that can be done.

    Attributes:
        understood: calibrated probability that it does, 0 to 1.
        refused: whether that is too little to act on; where the line is, the engine knows.
    """

    understood: float = 1.0
    refused: bool = False


def judged(engine: object, instructions: Sequence[str]) -> list[Judgement]:
    """Return an engine's judgements; one without the verb `judge` understands everything.

    Raises:
        BadLatent: it gave something else than one judgement an instruction.
    """
    judge = getattr(engine, "judge", None)
    if judge is None:
        return [Judgement()] * len(instructions)
    found = list(judge(instructions))
    if len(found) != len(instructions) or not all(
        isinstance(one, Judgement) and 0.0 <= one.understood <= 1.0 for one in found
    ):
        raise BadLatent(f"judge gave {found!r} for {len(instructions)} instructions")
    return found


class Engine(Protocol):
    """System 2: images and instructions in, latents out.

    One that knows which instructions it does not understand has another verb,
    `judge(instructions) -> Sequence[Judgement]`; it is asked through `judged`.
    """

    @property
    def spec(self) -> LatentSpec: ...

    def warm_up(self) -> None: ...

    def encode(self, images: Sequence[Any], instructions: Sequence[str]) -> F32:
        """Return latents (B, n_tokens, d); images are PIL images or (H, W, 3) uint8 arrays.

        Raises:
            ValueError: an image or instruction is unusable; the message names which.
        """

    def close(self) -> None: ...
