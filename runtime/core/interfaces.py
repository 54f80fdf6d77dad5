"""The records that the systems, the loop and a robot exchange, and the interfaces of these parts.

Every array has one shape, one dtype, one unit and one frame, written beside it here and
nowhere else. `W` is the world frame (metres, z up). Poses are 7-vectors: position xyz in
metres, then a unit quaternion xyzw. All times are `time.monotonic_ns()` of the host that
stamped them.

The interfaces are small on purpose: any class with these methods qualifies, nothing needs to be
inherited.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import isfinite
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from openhelix.runtime.core.config import CommandFailed
from openhelix.runtime.core.quaternion import QuaternionError, normalise

# ------------------------------------------------------------------------------------------------
# Records


U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class CameraFrame:
    """One camera's image and geometry at one instant.

    `t_ns` is the time of the state that the image *shows*, not of its arrival.
    """

    t_ns: int
    rgb: U8  # (H, W, 3)
    depth: F32 | None  # (H, W), metres along the optical axis; None for a colour-only camera
    K: F64  # (3, 3) pinhole intrinsics, pixels; pixel centres at +0.5
    T_world_cam: F64  # (4, 4) camera to W; camera axes x right, y down, z forward (OpenCV)

    def points(self, rows: slice, columns: slice) -> F64:
        """Return the points (h, w, 3) in W, m, that pixels in these rows and columns show.

        Raises:
            ValueError: the frame has no depth.
        """
        if self.depth is None:
            raise ValueError("the frame has no depth")
        depth = self.depth[rows, columns].astype(np.float64)
        height, width = self.depth.shape
        v, u = np.arange(height)[rows, None] + 0.5, np.arange(width)[columns] + 0.5
        x = (u - self.K[0, 2]) / self.K[0, 0] * depth
        y = (v - self.K[1, 2]) / self.K[1, 1] * depth
        camera = np.stack((x, y, depth), -1)
        found: F64 = camera @ self.T_world_cam[:3, :3].T + self.T_world_cam[:3, 3]
        return found


@dataclass(frozen=True, slots=True)
class Observation:
    """What a robot senses at one control tick."""

    t_ns: int  # capture time of the proprioception
    frames: Mapping[str, CameraFrame]  # by camera name, for example "static", "gripper"
    tcp_pose: F64  # (7,) tool centre point in W
    gripper_width: float  # metres between the fingertips, 0 (closed) to 0.08
    gripper_open: bool  # the last commanded gripper state
    joints: F64  # (n,) radians
    instruction_id: int = 0  # of the instruction it is seen under; see `LatentGoal`


@dataclass(frozen=True, slots=True)
class GoalRequest:
    """System 2's input: one third-person image and what to do, for one robot.

    A robot publishes one per observation that System 2 may use; the newest wins.
    """

    rgb: U8  # (H, W, 3)
    instruction: str
    robot: str  # the robot's name, also the topic its latents come back on
    seq: int  # counts the requests of one robot, from 0
    instruction_id: int  # counts this robot's instructions; copied into the latent
    t_obs_ns: int  # capture time of the image
    source: str = ""  # identity of the requesting process, new at every start
    proprio: F32 | None = None  # (9,), see `proprio_of`; for a System 2 that senses it


@dataclass(frozen=True, slots=True)
class LatentGoal:
    """System 2's output: what the robot is to do, as an embedding (paper Sec. 3, z_t)."""

    z: F32  # (n_tokens, d)
    seq: int  # counts the latents of one publisher, from 0
    instruction_id: int  # of the request; a latent for another instruction is void
    t_obs_ns: int  # capture time of the image it was computed from
    t_pub_ns: int  # time of publication
    spec_id: str  # of the model that made it, see `LatentSpec`; one of another model is void
    source: str = ""  # identity of the publishing process, new at every start
    compute_s: float = 0.0  # what the engine took for it
    understood: float = 1.0  # how probably the instruction names a task; 1 where nobody judges
    refused: bool = False  # too improbable to act on: no plan may be made of it

    def age_s(self, now_ns: int) -> float:
        """Seconds from the capture of the image to `now_ns`."""
        return (now_ns - self.t_obs_ns) * 1e-9


@dataclass(frozen=True, slots=True)
class ActionChunk:
    """System 1's output: a trajectory of targets on a fixed time grid (paper Sec. 3, tau_t).

    Row i is the target for time `t_start_ns + i * dt_ns`.
    """

    t_start_ns: int
    dt_ns: int
    poses: F64  # (H, 7) TCP targets in W
    gripper: F64  # (H,) openness, 0 closed to 1 open
    instruction_id: int
    latent_seq: int = -1  # the latent it was conditioned on; -1 for none
    t_obs_ns: int = 0  # capture time of the observation it was computed from


@dataclass(frozen=True, slots=True)
class Action:
    """One control tick's target."""

    pose: F64  # (7,) TCP target in W
    gripper: float  # openness, 0 closed to 1 open
    instruction_id: int = 0
    info: Mapping[str, float] = field(default_factory=dict)  # what limited it, if anything
    t_ns: int = 0  # when the target is to be reached; 0 for as soon as possible


# ------------------------------------------------------------------------------------------------
# What each side promises and what it expects; a mismatch refuses to start.
#
# A wrong rotation layout or an inverted gripper costs a policy everything and crashes
# nothing, so producer and consumer state their conventions as data and `check_*` compares
# them before the first step.


class SpecMismatch(ValueError):
    """Producer and consumer disagree; the message names the field and both values."""


SENSES = "+proprio"  # how the `kind` of a latent ends for which the robot's own state is read


@dataclass(frozen=True, slots=True)
class LatentSpec:
    """What System 2 publishes and what System 1 was trained on."""

    kind: str  # the read-out, for example "act_last"; see openhelix.system2.latents
    n_tokens: int
    dim: int
    model_id: str = ""  # hash of the weights that shape the latent; "" accepts any

    @property
    def senses(self) -> bool:
        """Whether System 2 is given the robot's own state beside the image; see `proprio_of`."""
        return self.kind.endswith(SENSES)

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
    """How targets are written; see `openhelix.runtime.core.interfaces.ActionChunk`."""

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
    # How its chunks can follow one that is being executed; see `GoesOn`. Empty: not known yet.
    joins: tuple[str, ...] = ("blend",)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> PolicySpec:
        """Return the spec that `dataclasses.asdict` gave, for example after it was JSON."""
        latent = data["latent"]
        return cls(
            cameras=tuple(CameraSpec(**camera) for camera in data["cameras"]),
            latent=None if latent is None else LatentSpec(**latent),
            action=ActionSpec(**data["action"]),
            horizon=int(data["horizon"]),
            joins=tuple(data.get("joins", ())),
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
    """Raise `SpecMismatch` unless the robot has every camera and convention the policy needs.

    A robot may take more targets per second than a plan has rows: between them it is interpolated.
    """
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
        if a < b if name == "hz" else a != b:
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


def check_action(action: Action) -> None:
    """Raise a one-line ValueError unless `action` has the shapes and finite numbers it must."""
    pose = np.asarray(action.pose)
    if pose.shape != (7,):
        raise ValueError(f"action.pose: shape {pose.shape}, expected (7,): xyz, quaternion xyzw")
    values = pose.tolist()  # seven plain floats are looked at in a fraction of numpy's time
    if not all(map(isfinite, values)):
        raise ValueError(f"action.pose: {values} is not finite")
    try:
        normalise(values[3:])
    except QuaternionError as error:
        raise ValueError(f"action.pose: {error}") from None
    if not 0.0 <= action.gripper <= 1.0:
        raise ValueError(f"action.gripper: {action.gripper} is not between 0 (closed) and 1 (open)")


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


class GoesOn(Protocol):
    """A policy whose chunks can go on from the plan that is being executed meanwhile.

    Its spec's `joins` says how: "inpaint" (real-time chunking: the overlap is imposed on the
    sampled chunk, firmly where it will have been executed and ever less after that) or "prefix"
    (it was trained given the first rows).
    """

    def go_on(
        self,
        observation: Observation,
        latents: Sequence[LatentGoal],
        plan: ActionChunk,
        given: int,
        join: str,
    ) -> ActionChunk:
        """Return a trajectory as `act` does, whose first rows are the plan's.

        Args:
            observation, latents: see `Policy.act`.
            plan: what is being executed, in rows of this policy's own times: row i is due when
                row i of the new chunk is.
            given: its first rows that will have been executed when the new chunk arrives.
            join: "inpaint" or "prefix".
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


def proprio_of(observation: Observation) -> F32:
    """Return what a System 2 that senses is given, (9,).

    TCP position in W (m) and quaternion xyzw, the fingers' width (m), and 1 where they were last
    told to open, else 0.
    """
    own = [*observation.tcp_pose, observation.gripper_width, float(observation.gripper_open)]
    return np.array(own, np.float32)


def encode_one(engine: Engine, image: Any, instruction: str, proprio: F32 | None = None) -> F32:
    """Return one latent (n_tokens, d), checked as it would be on the wire.

    Args:
        engine: System 2.
        image, instruction: what it is asked.
        proprio: (9,), used where the engine senses it; see `proprio_of`.

    Raises:
        BadLatent: its shape or dtype is not the spec's, or it is not finite.
    """
    spec = engine.spec
    own = ([proprio],) if spec.senses and proprio is not None else ()
    encoded = engine.encode([image], [instruction], *own)
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


def judged(
    engine: object, instructions: Sequence[str], latents: F32 | None = None
) -> list[Judgement]:
    """Return an engine's judgements; one without the verb `judge` understands everything.

    Args:
        engine: System 2.
        instructions: what robots were told.
        latents: what `encode` gave for each (B, n_tokens, d); None for an engine that judges
            sentences alone.

    Raises:
        BadLatent: it gave something else than one judgement an instruction.
    """
    judge = getattr(engine, "judge", None)
    if judge is None:
        return [Judgement()] * len(instructions)
    found = list(judge(instructions, latents))
    if len(found) != len(instructions) or not all(
        isinstance(one, Judgement) and 0.0 <= one.understood <= 1.0 for one in found
    ):
        raise BadLatent(f"judge gave {found!r} for {len(instructions)} instructions")
    return found


class Engine(Protocol):
    """System 2: images and instructions in, latents out.

    One that knows which instructions it does not understand has another verb,
    `judge(instructions, latents) -> Sequence[Judgement]`, where `latents` is what `encode` gave
    for them; it is asked through `judged`. If it needs no latents for that, they may be None;
    one that does says so with `judges_latents = True`.
    """

    @property
    def spec(self) -> LatentSpec: ...

    def warm_up(self) -> None: ...

    def encode(self, images: Sequence[Any], instructions: Sequence[str], *proprio: Any) -> F32:
        """Return latents (B, n_tokens, d); images are PIL images or (H, W, 3) uint8 arrays.

        An engine whose spec `senses` is given a third list, of `proprio_of` (9,) each; no other is.

        Raises:
            ValueError: an image or instruction is unusable; the message names which.
        """

    def close(self) -> None: ...
