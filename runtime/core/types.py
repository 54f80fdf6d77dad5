"""The frozen records passed between the two systems, the loop and a robot.

Every array has one shape, one dtype, one unit and one frame, written beside it here and
nowhere else. `W` is the world frame (metres, z up). Poses are 7-vectors: position xyz in
metres, then a unit quaternion xyzw. All times are `time.monotonic_ns()` of the host that
stamped them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

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
