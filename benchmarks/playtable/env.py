"""PlayTable: CALVIN's world with calvin_env's own interface.

`reset`, `step`, `get_obs`, `get_info` and `close` take and return what calvin_env's do, so
code written against it runs unchanged; beyond that an env can be copied (`state`,
`restore`), many live in one process, equal inputs give equal bits, and what the cameras see
is a plain vector (`visual_state`) that any process can draw.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.playtable.actions import parse_action
from benchmarks.playtable.appearance import Appearance
from benchmarks.playtable.calvin_api import CalvinCamera
from benchmarks.playtable.mechanisms import Mechanisms
from benchmarks.playtable.observations import (
    ObservationError,
    State,
    parse_robot_obs,
    parse_scene_obs,
)
from benchmarks.playtable.physics import (
    SubstepHook,
    World,
    euler_from_quaternion,
)
from benchmarks.playtable.placement import place_blocks, put_blocks
from benchmarks.playtable.robot import Arm
from benchmarks.playtable.scene import SUBSTEPS, TABLE_LINKS, Scene, get_scene
from runtime.types import F32, F64, U8, CameraFrame

if TYPE_CHECKING:
    from benchmarks.playtable.cameras import RenderedFrame, SceneRenderer


class PlayTableEnv:
    """One PlayTable.

    Args:
        scene: "A" to "D" (or "calvin_scene_A" ...), or a `Scene`.
        cameras: which cameras observations carry, of "static" and "gripper"; with none,
            nothing is ever drawn.
        seed: seeds the block placement of `reset()` without arguments.
        appearance: textures, light and noise; None for the scene's own look.
        use_scene_info: whether info carries "scene_info".

    Raises:
        SceneError: unknown scene.
        CameraError: unknown camera.
    """

    def __init__(
        self,
        scene: str | Scene = "D",
        cameras: Sequence[str] = ("static", "gripper"),
        *,
        seed: int | None = 0,
        appearance: Appearance | None = None,
        use_scene_info: bool = True,
    ) -> None:
        self.scene = get_scene(scene)
        self.use_scene_info = use_scene_info
        self.renderer = _renderer(self.scene, cameras, appearance) if cameras else None
        self.world = World(self.scene)
        self.robot = Arm(self.world)
        self.seed(seed)
        self.mechanisms = Mechanisms(self.world)
        self.reset()

    # -- calvin_env's interface --------------------------------------------------------

    def seed(self, seed: int | None = None) -> list[int | None]:
        """Seed the block placement of a default reset."""
        self.np_random = np.random.default_rng(seed)
        return [seed]

    def reset(self, robot_obs: Any = None, scene_obs: Any = None) -> dict[str, Any]:
        """Start an episode and return its first observation.

        Args:
            robot_obs: (15,) of which the joints and the gripper width are read; None for the
                initial pose.
            scene_obs: (24,) doors, button, switch, lights and block poses (euler; a (27,)
                with quaternions is taken too); None places the blocks at random.

        Raises:
            ObservationError: wrong length, NaN, or a light that is neither 0 nor 1; the
                world keeps its state.
        """
        joints, finger_m = parse_robot_obs(robot_obs)
        parsed = None if scene_obs is None else parse_scene_obs(scene_obs)
        if self.world.journal:  # else it was just built
            self.world.rebuild()
        self.mechanisms.clear()
        if parsed is None:
            place_blocks(self.world, self.np_random)
        else:
            joints_m, lights, poses = parsed
            self.mechanisms.put(joints_m, lights)
            put_blocks(self.world, poses)
        self.robot.reset(joints, finger_m)
        self.world.substep()
        return self.get_obs()

    def step(self, action: Any) -> tuple[dict[str, Any], int, bool, dict[str, Any]]:
        """Run one control step (1/30 s).

        Args:
            action: see `benchmarks.playtable.actions`.

        Raises:
            ActionError: a bad action; the world keeps its state.
        """
        self.advance(action)
        return self.get_obs(), 0, False, self.get_info()

    def advance(self, action: Any) -> None:
        """`step` without gathering an observation: physics and mechanism logic alone."""
        command = parse_action(action)
        self.robot.apply(command)
        for _ in range(SUBSTEPS):
            self.world.substep()
        self.mechanisms.step()

    def get_obs(self) -> dict[str, Any]:
        """Return `rgb_obs`, `depth_obs`, `robot_obs` (15,) and `scene_obs` (24,)."""
        rgb_obs, depth_obs = self.get_camera_obs()
        return {"rgb_obs": rgb_obs, "depth_obs": depth_obs, **self.get_state_obs()}

    def get_camera_obs(self) -> tuple[dict[str, U8], dict[str, F32]]:
        """Return `rgb_obs` and `depth_obs`, by "rgb_static", "depth_static" and so on."""
        frames = self.render_frames()
        rgb_obs = {f"rgb_{name}": frame.rgb for name, frame in frames.items()}
        return rgb_obs, {f"depth_{name}": frame.depth for name, frame in frames.items()}

    @property
    def cameras(self) -> list[CalvinCamera]:
        """The cameras with calvin_env's attributes."""
        specs = () if self.renderer is None else self.renderer.cameras
        return [CalvinCamera(self, spec.name) for spec in specs]

    def render(self, mode: str = "rgb_array") -> U8:
        """Return the static camera's picture (200, 200, 3); there is no window.

        Raises:
            ValueError: another mode, or an env without the static camera.
        """
        if mode != "rgb_array":
            raise ValueError(f"mode: {mode!r}; only 'rgb_array' is drawn")
        frames = self.render_frames()
        if "static" not in frames:
            raise ValueError("cameras: this env has no static camera to draw")
        return frames["static"].rgb

    def proprioception(self) -> tuple[F64, F64]:
        """Return `robot_obs` (15,) and the TCP's quaternion xyzw (4,), f64."""
        tcp_pos, tcp_quat = self.robot.tcp()
        robot_obs = np.array(
            [
                *tcp_pos,
                *euler_from_quaternion(tcp_quat),
                sum(self.robot.fingers()),
                *self.robot.joints(),
                self.robot.gripper_action,
            ]
        )
        return robot_obs, np.array(tcp_quat)

    def get_state_obs(self) -> dict[str, F64]:
        """Return `robot_obs` (15,) and `scene_obs` (24,) f64."""
        robot_obs, _ = self.proprioception()
        scene_obs = self.mechanisms.values()
        for name in self.scene.blocks:
            position, quaternion = self.world.block_pose(name)
            scene_obs += [*position, *euler_from_quaternion(quaternion)]
        return {"robot_obs": robot_obs, "scene_obs": np.array(scene_obs)}

    def get_info(self) -> dict[str, Any]:
        """Return calvin_env's info: `robot_info` and, if wanted, `scene_info`."""
        tcp_pos, tcp_quat = self.robot.tcp()
        info: dict[str, Any] = {
            "robot_info": {
                "tcp_pos": tcp_pos,
                "tcp_orn": euler_from_quaternion(tcp_quat),
                "gripper_opening_width": sum(self.robot.fingers()),
                "arm_joint_states": self.robot.joints(),
                "gripper_action": self.robot.gripper_action,
                "uid": self.world.robot,
                "contacts": self.world.contacts(self.world.robot),
            }
        }
        if self.use_scene_info:
            info["scene_info"] = self.get_scene_info()
        return info

    def get_scene_info(self) -> dict[str, Any]:
        """Return the scene's part of info."""
        w = self.world
        blocks = {}
        for name, uid in w.blocks.items():
            position, quaternion = w.block_pose(name)
            linear, angular = w.block_velocity(name)
            blocks[name] = {
                "current_pos": position,
                "current_orn": quaternion,
                "current_lin_vel": linear,
                "current_ang_vel": angular,
                "contacts": w.contacts(uid),
                "uid": uid,
            }
        return {
            "fixed_objects": {
                "table": {
                    "uid": w.table,
                    "links": dict(TABLE_LINKS),
                    "contacts": w.contacts(w.table),
                }
            },
            "movable_objects": blocks,
            **self.mechanisms.info(),
        }

    def close(self) -> None:
        """Release the physics client; safe to call twice, and when construction failed."""
        world = getattr(self, "world", None)
        if world is not None:
            world.close()

    def __enter__(self) -> PlayTableEnv:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __del__(self, _ending: Callable[[], bool] = sys.is_finalizing) -> None:
        # At the interpreter's end the modules that `close` needs may be gone already, and the
        # physics client ends with the process.
        if not _ending():
            self.close()

    # -- beyond calvin_env -------------------------------------------------------------

    @property
    def bulb(self) -> bool:
        """Whether the light bulb is on; may be set."""
        return self.mechanisms.bulb

    @bulb.setter
    def bulb(self, on: bool) -> None:
        self.mechanisms.bulb = on

    @property
    def led(self) -> bool:
        """Whether the LED is on; may be set."""
        return self.mechanisms.led

    @led.setter
    def led(self, on: bool) -> None:
        self.mechanisms.led = on

    def visual_state(self) -> F64:
        """Everything that can be seen, (36,) f64; see `benchmarks.playtable.cameras`."""
        w = self.world
        values = list(w.arm_joints())
        values += self.mechanisms.values()
        for name in self.scene.blocks:
            position, quaternion = w.block_pose(name)
            values += [*position, *quaternion]
        return np.array(values)

    def render_frames(self) -> dict[str, RenderedFrame]:
        """Draw the cameras this env was made with."""
        if self.renderer is None:
            return {}
        return self.renderer.render(self.visual_state())

    def set_appearance(self, appearance: Appearance | None) -> None:
        """Change textures, light and noise; None for the scene's own look."""
        if self.renderer is not None:
            self.renderer.set_appearance(appearance or Appearance.of(self.scene))

    def camera_frames(self, t_ns: int) -> Mapping[str, CameraFrame]:
        """The cameras' frames with intrinsics and extrinsics, stamped `t_ns`."""
        return {name: frame.camera_frame(t_ns) for name, frame in self.render_frames().items()}

    def state(self) -> State:
        """A copy of the whole env; an env that restores it goes on to the same bits.

        Hooks are not part of it; what they did to the world is.
        """
        arm = self.robot
        return State(
            scene=self.scene.name,
            journal=tuple(self.world.journal),
            target_pos=tuple(arm.target_pos.tolist()),
            target_euler=tuple(arm.target_euler.tolist()),
            gripper_action=arm.gripper_action,
            logic=self.mechanisms.logic(),
        )

    def restore(self, state: State) -> None:
        """Go back to a state of this env, or to one of another env of the same scene.

        Takes about as long as simulating the episode up to there.

        Raises:
            ObservationError: the state is of another scene; the world keeps its state.
        """
        if state.scene != self.scene.name:
            raise ObservationError(f"state.scene: {state.scene!r}, this is {self.scene.name!r}")
        self.world.replay(state.journal)
        self.robot.target_pos = np.array(state.target_pos)
        self.robot.target_euler = np.array(state.target_euler)
        self.robot.gripper_action = state.gripper_action
        self.mechanisms.set_logic(state.logic)

    def add_substep_hook(self, hook: SubstepHook) -> None:
        """Call `hook(world)` before every physics substep, over resets, until it is removed."""
        self.world.hooks.append(hook)

    def remove_substep_hook(self, hook: SubstepHook) -> None:
        """Stop calling `hook`; unknown hooks are ignored."""
        if hook in self.world.hooks:
            self.world.hooks.remove(hook)


def _renderer(scene: Scene, cameras: Sequence[str], appearance: Appearance | None) -> SceneRenderer:
    # Imported here: a world without cameras then needs no compiler, 100 MB and a second less.
    from benchmarks.playtable.cameras import SceneRenderer

    return SceneRenderer(scene, cameras, appearance)
