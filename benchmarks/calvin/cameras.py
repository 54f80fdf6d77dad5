"""The two cameras, the fingertips' touch, and a renderer that draws them from a state vector.

`SceneRenderer` holds meshes, textures and light, and no physics: give it what
`PlayTableEnv.visual_state()` returned, in this process or in another, and it returns
colour, metric depth and segmentation with intrinsics and extrinsics. What never moves
before the static camera is drawn once and kept.

"tactile" is what the fingertips feel, as calvin_env's tactile camera: an image of each pad, side by
side. It follows from the same state: where something lies within a soft layer's thickness of the
pad, the layer is dented, and the image shows its slope and by how much.

`visual_state`, (36,) f64: 0-6 arm joints rad; 7-8 fingers m; 9-12 slide, drawer, button,
switch m; 13-14 bulb, LED (0 or 1); then per block, in the scene's order, position m and
quaternion xyzw.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import atan, cos, degrees, pi, radians, sin, tan
from typing import Any

import numpy as np
import numpy.typing as npt

from openhelix.benchmarks.calvin import raster
from openhelix.benchmarks.calvin.appearance import TILE_M, Appearance, floor_texture, wood_texture
from openhelix.benchmarks.calvin.meshes import (
    ARM_CELL_M,
    VISUAL_STATE_SIZE,
    Visuals,
    link_transforms,
    scene_visuals,
)
from openhelix.benchmarks.calvin.scene import Scene, get_scene
from openhelix.benchmarks.calvin.urdf import PAD_HI, PAD_LO
from openhelix.runtime.core.interfaces import F32, F64, U8, CameraFrame

I32 = npt.NDArray[np.int32]


class CameraError(ValueError):
    """An unknown camera."""


@dataclass(frozen=True, slots=True)
class Pinhole:
    """A pinhole camera with square pixels.

    Attributes:
        name: "static" or "gripper".
        size: width and height, pixels.
        fov_deg: vertical field of view.
        near, far: m; nothing is seen outside.
    """

    name: str
    size: int
    fov_deg: float
    near: float
    far: float

    @property
    def K(self) -> F64:
        """Intrinsics (3, 3), pixel centres at +0.5."""
        f = self.size / 2 / tan(radians(self.fov_deg) / 2)
        return np.array([[f, 0, self.size / 2], [0, f, self.size / 2], [0, 0, 1.0]])

    @property
    def pinhole(self) -> F64:
        """fx, fy, cx, cy (pixels), near, far (m), as `raster.draw` takes them."""
        K = self.K
        return np.array([K[0, 0], K[1, 1], K[0, 2], K[1, 2], self.near, self.far])


STATIC_EYE = (2.871459009488717, -2.166602199425597, 2.555159848480571)
STATIC_TARGET = (-0.026242351159453392, -0.0302329882979393, 0.3920000493526459)
STATIC_UP = (0.4041403970338857, 0.22629790978217404, 0.8862616969685161)
CAMERAS = {
    "static": Pinhole("static", 200, 10.0, 0.01, 10.0),
    "gripper": Pinhole("gripper", 84, 75.0, 0.01, 2.0),
}


def look(eye: npt.ArrayLike, forward: npt.ArrayLike, up: npt.ArrayLike) -> F64:
    """Pose (4, 4) of a camera at `eye` looking along `forward`, OpenCV axes."""
    z = np.asarray(forward, float)
    z = z / np.linalg.norm(z)
    x = np.cross(z, np.asarray(up, float))
    x /= np.linalg.norm(x)
    T_world_cam = np.eye(4)
    T_world_cam[:3, 0], T_world_cam[:3, 1], T_world_cam[:3, 2] = x, np.cross(z, x), z
    T_world_cam[:3, 3] = eye
    return T_world_cam


# Where the gripper's camera is from the TCP (4, 4), OpenCV axes: calvin_env mounts it 0.1 m behind
# the hand, turned by rpy (1.3, 0, -1.57), and the TCP is 0.14 m in front of that.
_c, _s, _a, _b = cos(1.3), sin(1.3), cos(1.57), sin(1.57)
HAND_CAMERA = look((-0.1, 0.0, -0.14), (_b * _c, _a * _c, _s), (_b * _s, _a * _s, -_c))

TACTILE = "tactile"
PAD_PIXELS = 24  # of a side of one finger's image; two lie side by side
PAD_VIEW_M = 0.026  # of that side: the pad is 18.4 mm wide and 25 mm long
SOFT_M = 0.002  # thickness of the soft layer before the pad
# Each pad is looked at from behind, so far that the rays are nearly parallel.
BEHIND_M = 0.2
PAD_CAMERA = Pinhole(
    TACTILE,
    PAD_PIXELS,
    2 * degrees(atan(PAD_VIEW_M / 2 / BEHIND_M)),
    BEHIND_M - 0.008,  # the finger is as thick
    BEHIND_M + SOFT_M,
)

Stand = Mapping[str, Any]  # where the static camera stands: "eye", "target", "up", "fov" or None


def camera_of(scene: Scene, name: str, stand: Stand | None = None) -> Pinhole:
    """A camera as it is in a scene."""
    spec, own = CAMERAS[name], scene.variant
    if name == "static" and stand is not None and stand.get("fov") is not None:
        return replace(spec, fov_deg=float(stand["fov"]))
    if own is None:
        return spec
    return replace(spec, fov_deg=spec.fov_deg * own.fov[0 if name == "static" else 1])


def static_pose(scene: Scene, stand: Stand | None = None) -> F64:
    """Pose (4, 4) of the static camera in a scene, OpenCV axes.

    Args:
        scene: whose own camera it is.
        stand: what differs from that: "eye" and "target", m in W, and "up".

    Raises:
        CameraError: it would look along its own up.
    """
    eye, target, up = np.array(STATIC_EYE), np.array(STATIC_TARGET), np.array(STATIC_UP)
    own = scene.variant
    if own is not None:
        away = eye - target
        aside, upwards = own.orbit_rad
        c, s = np.cos(aside), np.sin(aside)
        turn = np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]])
        size = float(np.linalg.norm(away))
        height = np.arcsin(away[2] / size) + upwards
        flat = turn[:2, :2] @ away[:2] / np.linalg.norm(away[:2]) * np.cos(height)
        target = target + own.target_m
        eye = target + np.array([*flat, np.sin(height)]) * size * own.distance
        up = turn @ up
    given = stand or {}
    eye, target, up = (
        own if given.get(name) is None else np.array(given[name], float)
        for name, own in (("eye", eye), ("target", target), ("up", up))
    )
    if np.linalg.norm(np.cross(target - eye, up)) < 1e-6:
        raise CameraError("world.static_camera.up: it would look along it; name another direction")
    return look(eye, target - eye, up)


def camera_matrices(scene: Scene) -> dict[str, dict[str, Any]]:
    """What has to be known of a scene's cameras to make points of their pixels, as plain data.

    Returns:
        Per camera "height" and "width" (pixels), "K" (3, 3), and "T_world_cam" (4, 4), or
        "T_tcp_cam" for the one on the hand.
    """
    out: dict[str, dict[str, Any]] = {}
    for name in CAMERAS:
        spec = camera_of(scene, name)
        out[name] = {"height": spec.size, "width": spec.size, "K": spec.K.tolist()}
        if name == "static":
            out[name]["T_world_cam"] = static_pose(scene).tolist()
        else:
            out[name]["T_tcp_cam"] = HAND_CAMERA.tolist()
    return out


@dataclass(frozen=True, slots=True)
class RenderedFrame:
    """One camera's view of one state.

    Attributes:
        rgb: (H, W, 3) u8.
        depth: (H, W) f32, m along the optical axis; the far plane where nothing is.
        segmentation: (H, W) i32, body id + (link index + 1) << 24 as Bullet codes it,
            -1 where nothing is.
        K: (3, 3) intrinsics, pixels.
        T_world_cam: (4, 4) camera to W, OpenCV axes.
    """

    rgb: U8
    depth: F32
    segmentation: I32
    K: F64
    T_world_cam: F64

    def camera_frame(self, t_ns: int) -> CameraFrame:
        """The frame as the runtime knows it, stamped with the time of the state it shows."""
        return CameraFrame(t_ns, self.rgb, self.depth, self.K, self.T_world_cam)

    def points(self) -> F64:
        """World points (H, W, 3) of every pixel, m."""
        height, width = self.depth.shape
        v, u = np.mgrid[0:height, 0:width] + 0.5
        x = (u - self.K[0, 2]) / self.K[0, 0] * self.depth
        y = (v - self.K[1, 2]) / self.K[1, 1] * self.depth
        camera = np.stack([x, y, self.depth], axis=-1)
        return camera @ self.T_world_cam[:3, :3].T + self.T_world_cam[:3, 3]


class SceneRenderer:
    """Draws one scene.

    Args:
        scene: "A" to "D" or a `Scene`.
        cameras: which of "static", "gripper" and "tactile".
        appearance: None for the scene's own look.
        arm_cell_m: how coarse the arm is; see `scene_visuals`.
        static_camera: where the static camera stands instead of the scene's own; see `static_pose`.

    Raises:
        CameraError: unknown camera.
    """

    def __init__(
        self,
        scene: str | Scene,
        cameras: Sequence[str] = ("static", "gripper"),
        appearance: Appearance | None = None,
        arm_cell_m: float = ARM_CELL_M,
        static_camera: Stand | None = None,
    ) -> None:
        known = (*CAMERAS, TACTILE)
        wrong = cameras if isinstance(cameras, str) else [c for c in cameras if c not in known]
        if wrong:
            raise CameraError(f"cameras: {wrong!r}; give a list out of {', '.join(known)}")
        self.scene = get_scene(scene)
        self.feels = TACTILE in cameras
        self.cameras = tuple(
            camera_of(self.scene, name, static_camera) for name in cameras if name != TACTILE
        )
        self._static_pose = static_pose(self.scene, static_camera)
        self._visuals: Visuals = scene_visuals(self.scene, arm_cell_m)
        self._things = things(self._visuals) if self.feels else None
        self.set_appearance(appearance or Appearance.of(self.scene))

    def set_appearance(self, appearance: Appearance) -> None:
        """Change textures, light and noise."""
        self.appearance = appearance
        woods = [
            wood_texture(appearance.wood, appearance.texture_seed),
            wood_texture(appearance.panel_wood, appearance.texture_seed + 1),
        ]
        for i, across in enumerate(appearance.crosswise):
            woods[i] = woods[i].swapaxes(0, 1) if across else woods[i]
        tiles = floor_texture(appearance.floor)
        repeat = woods[0].shape[0] // tiles.shape[0]
        self._texels = np.stack([*woods, tiles.repeat(repeat, 0).repeat(repeat, 1)])
        self._texture_m = np.array([1.0, 1.0, 2 * TILE_M], np.float32)
        direction = np.array(appearance.light_direction, float)
        direction /= np.linalg.norm(direction)
        strengths = (appearance.ambient, appearance.diffuse, appearance.specular)
        self._light = np.array([*direction, *strengths, *appearance.light_colour])
        rng = np.random.default_rng(appearance.noise_seed)
        self._errors = {
            name: _pose_error(rng, appearance.camera_shift_m, appearance.camera_turn_rad)
            for name in CAMERAS
        }
        self._background: tuple[U8, F32, I32] | None = None

    def camera_pose(self, name: str, T_world_link: F64) -> F64:
        """Pose (4, 4) of a camera, OpenCV axes, given the link transforms."""
        if name == "static":
            pose = self._static_pose
        else:
            mount = T_world_link[self._visuals.camera_link]
            pose = look(mount[:3, 3], mount[:3, 1], -mount[:3, 2])
        return np.asarray(pose @ self._errors[name])

    def pose_at(self, name: str, visual_state: npt.ArrayLike) -> F64:
        """Pose (4, 4) of a camera for a visual state, OpenCV axes."""
        state = np.asarray(visual_state, dtype=np.float64)
        return self.camera_pose(name, link_transforms(self._visuals, state))

    def render(self, visual_state: npt.ArrayLike) -> dict[str, RenderedFrame]:
        """Draw every camera of this renderer.

        Args:
            visual_state: (36,), see the module's docstring.

        Raises:
            ValueError: the vector has another length.
        """
        state = np.asarray(visual_state, dtype=np.float64)
        if state.shape != (VISUAL_STATE_SIZE,):
            raise ValueError(f"visual_state: shape {state.shape}, must be ({VISUAL_STATE_SIZE},)")
        transforms = link_transforms(self._visuals, state)
        colours = self._colours(bool(state[13]), bool(state[14]))
        found = {
            camera.name: self._render_one(camera, transforms, colours, state)
            for camera in self.cameras
        }
        return found | ({TACTILE: self._felt(transforms, colours)} if self.feels else {})

    def _felt(self, transforms: F64, colours: F32) -> RenderedFrame:
        """Return what both pads feel, the left finger's first; pose and `K` are its camera's."""
        v, seen = self._visuals, self._things
        assert seen is not None
        depths, masks, poses = [], [], []
        for link, turn in zip(v.fingers, (0.0, pi), strict=True):
            rgb, depth, mask = _blank(PAD_CAMERA)
            poses.append(transforms[link] @ pad_camera(turn))
            raster.draw(
                0, len(seen.link), seen.position, seen.normal, seen.uv, seen.link, seen.material,
                seen.segment, transforms, np.linalg.inv(poses[-1]), PAD_CAMERA.pinhole, colours,
                v.texture, self._texels, self._texture_m, self._light, rgb, depth, mask,
            )  # fmt: skip
            depths.append(depth)
            masks.append(mask)
        rgb = np.concatenate([dent_image(depth) for depth in depths], axis=1)
        depth, mask = np.concatenate(depths, axis=1), np.concatenate(masks, axis=1)
        return RenderedFrame(rgb, depth, mask, PAD_CAMERA.K, poses[0])

    def _colours(self, bulb: bool, led: bool) -> F32:
        look_, names = self.appearance, self._visuals.materials
        table = {
            "handle": look_.handle,
            "slot": tuple(0.8 * c for c in look_.wood.colour),
            "button": (0.0, 0.0, 0.0),
            "led": (0.0, 1.0, 0.0) if led else (1.0, 1.0, 1.0),
            "bulb": (1.0, 1.0, 0.0) if bulb else (1.0, 1.0, 1.0),
        }
        rows = [
            table.get(name, rgb) for name, rgb in zip(names, self._visuals.colours, strict=True)
        ]
        out = np.array(rows, dtype=np.float32)
        robot = [name == "robot" for name in names]
        out[robot] *= np.array(look_.robot, dtype=np.float32)
        return out

    def _render_one(
        self, camera: Pinhole, transforms: F64, colours: F32, state: F64
    ) -> RenderedFrame:
        T_world_cam = self.camera_pose(camera.name, transforms)
        v = self._visuals
        start, end = v.n_fixed, len(v.link)
        if camera.name == "static":
            if self._background is None:
                self._background = _blank(camera)
                self._draw(
                    (0, v.n_fixed),
                    camera.pinhole,
                    T_world_cam,
                    transforms,
                    colours,
                    *self._background,
                )
            rgb, depth, mask = (
                self._background[0].copy(),
                self._background[1].copy(),
                self._background[2].copy(),
            )
        else:
            rgb, depth, mask = _blank(camera)
            start, end = 0, end - v.n_mount
        parts = (start, end)
        self._draw(parts, camera.pinhole, T_world_cam, transforms, colours, rgb, depth, mask)
        rgb, depth = self._noise(rgb, depth, state)
        return RenderedFrame(rgb, depth, mask, camera.K, T_world_cam)

    def _draw(
        self,
        parts: tuple[int, int],
        pinhole: F64,
        T_world_cam: F64,
        transforms: F64,
        colours: F32,
        rgb: U8,
        depth: F32,
        mask: npt.NDArray[Any],
    ) -> None:
        v = self._visuals
        raster.draw(
            *parts,
            v.position,
            v.normal,
            v.uv,
            v.link,
            v.material,
            v.segment,
            transforms,
            np.linalg.inv(T_world_cam),
            pinhole,
            colours,
            v.texture,
            self._texels,
            self._texture_m,
            self._light,
            rgb,
            depth,
            mask,
        )

    def _noise(self, rgb: U8, depth: F32, state: F64) -> tuple[U8, F32]:
        """Sensor noise: a function of the seed and the state, so that it can be repeated."""
        look_ = self.appearance
        if look_.rgb_noise <= 0 and look_.depth_noise_m <= 0:
            return rgb, depth
        rng = np.random.default_rng([look_.noise_seed, zlib.crc32(state.tobytes()), rgb.shape[0]])
        noisy = rng.standard_normal(rgb.shape, np.float32) * np.float32(255 * look_.rgb_noise)
        noisy += rgb
        far = depth + rng.standard_normal(depth.shape, np.float32) * np.float32(look_.depth_noise_m)
        return np.clip(noisy + 0.5, 0, 255).astype(np.uint8), far


def pad_camera(turn_rad: float) -> F64:
    """Pose (4, 4) in a finger's frame of what looks at its pad from behind, fingertip down.

    Args:
        turn_rad: of the finger about its own length: 0 for the left one, pi for the right.
    """
    low, high = PAD_LO, PAD_HI
    eye = np.array([0.0, low[1] + BEHIND_M, (low[2] + high[2]) / 2])
    c, s = cos(turn_rad), sin(turn_rad)
    turn = np.eye(4)
    turn[:2, :2] = [[c, -s], [s, c]]
    pose: F64 = turn @ look(eye, (0.0, -1.0, 0.0), (0.0, 0.0, -1.0))
    return pose


def things(visuals: Visuals) -> Visuals:
    """Return the triangles of all that can be touched: what is no part of the robot."""
    first = min(min(joint.parent, joint.child) for joint in visuals.arm)
    chosen = np.flatnonzero(visuals.link < first)
    return replace(
        visuals,
        position=visuals.position[chosen],
        normal=visuals.normal[chosen],
        uv=visuals.uv[chosen],
        link=visuals.link[chosen],
        material=visuals.material[chosen],
        segment=visuals.segment[chosen],
    )


def dent_image(depth: F32) -> U8:
    """Return the image (H, W, 3) of a soft layer that depths (H, W), m, dent.

    Red and green are the slope across and along the finger (128 is flat), blue how deep the dent
    is: 0 untouched, 255 down to the pad.
    """
    dent = np.clip(BEHIND_M + SOFT_M - depth.astype(np.float64), 0.0, SOFT_M)
    along, across = np.gradient(dent, PAD_VIEW_M / PAD_PIXELS)
    length = np.sqrt(across**2 + along**2 + 1.0)
    slope = [128.0 - 127.0 * part / length for part in (across, along)]
    return np.stack([*slope, 255.0 * dent / SOFT_M], axis=-1).round().astype(np.uint8)


def _blank(camera: Pinhole) -> tuple[U8, F32, I32]:
    shape = (camera.size, camera.size)
    return (
        np.full((*shape, 3), 255, np.uint8),
        np.full(shape, camera.far, np.float32),
        np.full(shape, -1, np.int32),
    )


def _pose_error(rng: np.random.Generator, shift_m: float, turn_rad: float) -> F64:
    """A small fixed motion (4, 4) in the camera's own frame."""
    shift, turn = rng.normal(0.0, 1.0, 3) * shift_m, rng.normal(0.0, 1.0, 3) * turn_rad
    angle = float(np.linalg.norm(turn))
    T = np.eye(4)
    if 0 < angle < pi:
        x, y, z = turn / angle
        cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
        T[:3, :3] += np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross
    T[:3, 3] = shift
    return T
