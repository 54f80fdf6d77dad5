"""What code written against calvin_env reaches for beyond its five verbs.

Evaluation wrappers take cameras from `env.cameras` to lift depth images, with OpenGL
matrices as Bullet writes them; here they are made from our camera poses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from runtime.types import F32, F64, U8

if TYPE_CHECKING:
    from benchmarks.playtable.env import PlayTableEnv

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
