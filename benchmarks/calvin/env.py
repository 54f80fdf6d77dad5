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

from openhelix.benchmarks.calvin.appearance import Appearance
from openhelix.benchmarks.calvin.physics import (
    Arm,
    Mechanisms,
    SubstepHook,
    World,
    euler_from_quaternion,
    place_blocks,
    put_blocks,
)
from openhelix.benchmarks.calvin.scene import SUBSTEPS, TABLE_LINKS, Scene, get_scene
from openhelix.benchmarks.calvin.spaces import (
    ObservationError,
    State,
    parse_action,
    parse_robot_obs,
    parse_scene_obs,
)
from openhelix.runtime.core.interfaces import F32, F64, U8, CameraFrame

if TYPE_CHECKING:
    from openhelix.benchmarks.calvin.cameras import RenderedFrame, SceneRenderer

# -- Cameras as code written against calvin_env expects them ---------------------------
#
# Evaluation wrappers take cameras from `env.cameras` to lift depth images, with OpenGL
# matrices as Bullet writes them; here they are made from our camera poses.

_OPENGL_FROM_OPENCV = np.diag([1.0, -1.0, -1.0, 1.0])  # y up and z backward


class CalvinCamera:
    """One camera with the attributes and methods of calvin_env's.

    Attributes:
        name, width, height: pixels.
        fov: degrees; `nearval`, `farval`: m.
        cid, robot_uid, gripper_cam_link: Bullet's numbers.
    """

    def __init__(self, env: PlayTableEnv, name: str) -> None:
        assert env.renderer is not None
        self._env, self._renderer = env, env.renderer
        spec = next(c for c in self._renderer.cameras if c.name == name)
        self.name, self.width, self.height = name, spec.size, spec.size
        self.fov, self.nearval, self.farval = spec.fov_deg, spec.near, spec.far
        world = env.world
        self.cid, self.robot_uid = world.client, world.robot
        self.gripper_cam_link = world.links["gripper_cam"]

    @property
    def T_world_cam(self) -> F64:
        """The camera's pose now (4, 4), OpenCV axes."""
        return self._renderer.pose_at(self.name, self._env.visual_state())

    @property
    def view_matrix(self) -> tuple[float, ...]:
        """World to camera in OpenGL axes, 16 numbers by column."""
        view = _OPENGL_FROM_OPENCV @ np.linalg.inv(self.T_world_cam)
        return tuple(view.T.reshape(-1).tolist())

    @property
    def projection_matrix(self) -> tuple[float, ...]:
        """OpenGL's projection, 16 numbers by column."""
        f = 1.0 / np.tan(np.radians(self.fov) / 2)
        near, far = self.nearval, self.farval
        matrix = np.zeros((4, 4))
        matrix[0, 0] = matrix[1, 1] = f
        matrix[2, 2], matrix[2, 3] = (near + far) / (near - far), 2 * near * far / (near - far)
        matrix[3, 2] = -1.0
        return tuple(matrix.T.reshape(-1).tolist())

    # calvin_env's static camera spells them so
    @property
    def viewMatrix(self) -> tuple[float, ...]:
        """Same as `view_matrix`; always that of this moment, so setting it changes nothing."""
        return self.view_matrix

    @viewMatrix.setter
    def viewMatrix(self, matrix: Any) -> None:
        """Wrappers refresh the gripper camera's matrix this way before they use it."""

    @property
    def projectionMatrix(self) -> tuple[float, ...]:
        """Same as `projection_matrix`."""
        return self.projection_matrix

    def render(self) -> tuple[U8, F32]:
        """Colour (H, W, 3) and depth (H, W), m."""
        frame = self._env.render_frames()[self.name]
        return frame.rgb, frame.depth

    def project(self, point: Any) -> tuple[int, int]:
        """Pixel (column, row) of a homogeneous world point (4,)."""
        x, y, z, _ = np.linalg.inv(self.T_world_cam) @ np.asarray(point, float)
        f = self.height / 2 / np.tan(np.radians(self.fov) / 2)
        return int(np.floor(f * x / z + self.width / 2)), int(np.floor(f * y / z + self.height / 2))

    def deproject(self, point: tuple[int, int], depth_img: F32, homogeneous: bool = False) -> F64:
        """World point (3,), or (4,) if `homogeneous`, of the pixel (column, row)."""
        u, v = point
        z = float(depth_img[v, u])
        f = self.height / 2 / np.tan(np.radians(self.fov) / 2)
        camera = [(u + 0.5 - self.width / 2) * z / f, (v + 0.5 - self.height / 2) * z / f, z, 1.0]
        world = self.T_world_cam @ np.array(camera)
        return world if homogeneous else world[:3]


# -- The environment -------------------------------------------------------------------


class PlayTableEnv:
    """One PlayTable.

    Args:
        scene: "A" to "D" (or "calvin_scene_A" ...), or a `Scene`.
        cameras: which cameras observations carry, of "static" and "gripper"; with none,
            nothing is ever drawn.
        seed: seeds the block placement of `reset()` without arguments.
        appearance: textures, light and noise; None for the scene's own look.
        use_scene_info: whether info carries "scene_info".
        static_camera: where the static camera stands instead of the scene's own; see
            `openhelix.benchmarks.calvin.cameras.static_pose`.

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
        static_camera: Mapping[str, Any] | None = None,
    ) -> None:
        self.scene = get_scene(scene)
        self.use_scene_info = use_scene_info
        self.renderer = None
        if cameras:
            self.renderer = _renderer(self.scene, cameras, appearance, static_camera)
        self.world = World(self.scene)
        self.robot = Arm(self.world)
        self.seed(seed)
        self.mechanisms = Mechanisms(self.world)
        # Who judges in the oracles' place where what is right changes; see
        # `openhelix.benchmarks.evaluation.changing`.
        self.referee: Any = None
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
        self._check_open()
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
            action: see `openhelix.benchmarks.calvin.spaces`.

        Raises:
            ActionError: a bad action; the world keeps its state.
        """
        self.advance(action)
        return self.get_obs(), 0, False, self.get_info()

    def advance(self, action: Any, substeps: int = SUBSTEPS) -> None:
        """`step` without gathering an observation: physics and mechanism logic alone.

        Args:
            action: as `step` takes it.
            substeps: of physics, 1/240 s each; an environment step has `SUBSTEPS`.
        """
        self._check_open()
        command = parse_action(action)
        self.robot.apply(command)
        for _ in range(substeps):
            self.world.substep()
        self.mechanisms.step()

    def get_obs(self) -> dict[str, Any]:
        """Return `rgb_obs`, `depth_obs`, `robot_obs` (15,) and `scene_obs` (24,).

        Raises:
            RuntimeError: the world is closed, as every verb does then.
        """
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
        self._check_open()
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
        self._check_open()
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

    def _check_open(self) -> None:
        if self.world.client < 0:  # Bullet would answer for another client, or not at all
            raise RuntimeError("PlayTableEnv: this world is closed; make another")

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
        """Everything that can be seen, (36,) f64; see `openhelix.benchmarks.calvin.cameras`."""
        self._check_open()
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
        self._check_open()
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


def _renderer(
    scene: Scene,
    cameras: Sequence[str],
    appearance: Appearance | None,
    static_camera: Mapping[str, Any] | None,
) -> SceneRenderer:
    # Imported here: a world without cameras then needs no compiler, 100 MB and a second less.
    from openhelix.benchmarks.calvin.cameras import SceneRenderer

    return SceneRenderer(scene, cameras, appearance, static_camera=static_camera)
