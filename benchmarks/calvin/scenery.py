"""PlayTable as people like to see it: large, without jagged edges, with shadows on table and floor.

For films and viewers only. What the robot's cameras see is drawn by
`openhelix.benchmarks.calvin.cameras`, as CALVIN draws it; here the same triangles, with a finer
arm, are drawn at twice the size and averaged. Shadows are what stands in the light, flattened along
it onto the table's top and the floor, which is where a hand above a block needs one.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import radians, tan

import numpy as np
from numba import njit  # type: ignore[import-untyped]

from openhelix.benchmarks.calvin.appearance import LIGHT_DIRECTION
from openhelix.benchmarks.calvin.cameras import (
    CAMERAS,
    CameraError,
    SceneRenderer,
    Stand,
    camera_of,
)
from openhelix.benchmarks.calvin.meshes import MOVING, link_transforms, scene_visuals
from openhelix.benchmarks.calvin.scene import TABLE_TOP_Z_M, Scene, get_scene
from openhelix.runtime.core.interfaces import F32, F64, U8, CameraFrame
from openhelix.runtime.robots.base import ScenePart

FINE_CELL_M = 0.003  # of the arm's meshes, about a pixel at 720 rows
TIMES = 2  # pixels drawn per pixel shown, each way
ROOM_FOV = 1.2  # a little more than the static camera's, vertically, for the whole arm
NEAR_M, FAR_M = 0.01, 10.0
SHADE = 0.62  # the part of a surface's brightness that a shadow leaves
SHADOW_M = 0.004  # a surface this near to the flattened shadow, along the view, is in it
LIGHT = np.array(LIGHT_DIRECTION) / np.linalg.norm(LIGHT_DIRECTION)


@dataclass(frozen=True, slots=True)
class _View:
    """One camera at one size: what `raster.draw` wants, and what never moves before it."""

    K: F64
    pinhole: F64
    T_world_cam: F64
    rgb: U8
    depth: F32
    dark: U8  # (H, W) 1 where what never moves casts its shadow


class PlayTableScenery:
    """Draws one scene; see `openhelix.runtime.robots.base.Scenery`.

    Args:
        scene: "A" to "D", a generated one's name, or a `Scene`.
        static_camera: where the static camera stands instead of the scene's own.

    Raises:
        SceneError: there is no such scene.
    """

    def __init__(self, scene: str | Scene, static_camera: Stand | None = None) -> None:
        self._fine = _Fine(get_scene(scene), static_camera)

    def parts(self) -> list[ScenePart]:
        """Return table, blocks and arm, each with its plain colours; no floor."""
        scene = self._fine.scene
        visuals = scene_visuals(scene)
        names = {0: "table"} | {1 + i: part.removesuffix("_link") for i, part in enumerate(MOVING)}
        names |= {1 + len(MOVING) + i: block for i, block in enumerate(scene.blocks)}
        colours = self._fine.plain_colours(visuals.materials, visuals.colours, visuals.texture)
        seen = visuals.material != visuals.materials.index("floor")
        made = []
        for link in np.unique(visuals.link):
            of = (visuals.link == link) & seen
            made.append(
                ScenePart(
                    names.get(int(link), f"arm/{int(link) - len(names)}"),
                    int(link),
                    np.ascontiguousarray(visuals.position[of]),
                    colours[visuals.material[of]],
                )
            )
        return made

    def transforms(self, visual: F64) -> F64:
        """Return where every link is, (L, 4, 4) link to W."""
        return self._fine.places(visual)

    def picture(self, visual: F64, view: str, width: int, height: int) -> CameraFrame:
        """Draw one view; see `Scenery.picture`.

        Raises:
            CameraError: there is no such view.
        """
        if view != "room" and view not in CAMERAS:
            raise CameraError(f"view: {view!r}; there are room, {', '.join(CAMERAS)}")
        return self._fine.picture(np.asarray(visual, np.float64), view, width, height)


class _Fine(SceneRenderer):
    """The renderer with a finer arm, any size of picture, and shadows."""

    def __init__(self, scene: Scene, static_camera: Stand | None) -> None:
        super().__init__(
            scene, ("static", "gripper"), arm_cell_m=FINE_CELL_M, static_camera=static_camera
        )
        static = camera_of(scene, "static", static_camera).fov_deg
        self._room_fov_deg = static * ROOM_FOV
        self._views: dict[tuple[str, int, int], _View] = {}

    def places(self, visual: F64) -> F64:
        return link_transforms(self._visuals, np.asarray(visual, np.float64))

    def plain_colours(
        self, names: tuple[str, ...], colours: tuple[tuple[float, float, float], ...], texture: U8
    ) -> U8:
        """Return a colour (n, 3) u8 for each material; a texture's is its mean."""
        mean = self._texels.reshape(len(self._texels), -1, 3).mean(axis=1)
        table = {"handle": self.appearance.handle, "button": (0.05,) * 3, "bulb": (1.0, 0.95, 0.5)}
        rows = [table.get(name, rgb) for name, rgb in zip(names, colours, strict=True)]
        made = np.array(rows) * 255
        made[texture >= 0] = mean[texture[texture >= 0]]
        return np.asarray(made.clip(0, 255), np.uint8)

    def picture(self, state: F64, name: str, width: int, height: int) -> CameraFrame:
        places, v = self.places(state), self._visuals
        colours = self._colours(bool(state[13]), bool(state[14]))
        view = self._view(name, width, height, places)
        rgb, depth = view.rgb.copy(), view.depth.copy()
        mask = np.empty(depth.shape, np.uint8)
        fixed, last = v.n_fixed, len(v.link)
        if name != "room":  # it moves: nothing was drawn before, and it does not see its mount
            last -= v.n_mount
            self._draw(
                (0, fixed), view.pinhole, view.T_world_cam, places, colours, rgb, depth, mask
            )
        _darken(self._shadows((fixed, last), places, view, depth), 2, rgb)
        parts = (fixed, last)
        self._draw(parts, view.pinhole, view.T_world_cam, places, colours, rgb, depth, mask)
        shown = np.empty((height, width, 3), np.uint8)
        _average(rgb, shown)
        return CameraFrame(0, shown, None, view.K, view.T_world_cam)

    def _view(self, name: str, width: int, height: int, places: F64) -> _View:
        key = (name, width, height)
        if key in self._views:
            return self._views[key]
        room = name == "room"
        fov = radians(self._room_fov_deg if room else CAMERAS[name].fov_deg)
        f, w, h = height / 2 / tan(fov / 2), width / 2, height / 2
        K = np.array([[f, 0, w], [0, f, h], [0, 0, 1.0]])
        pinhole = np.array([TIMES * f, TIMES * f, TIMES * w, TIMES * h, NEAR_M, FAR_M])
        pose = self.camera_pose("static" if room else name, places)
        rgb = np.full((TIMES * height, TIMES * width, 3), 245, np.uint8)
        depth = np.full(rgb.shape[:2], FAR_M, np.float32)
        view = _View(K, pinhole, pose, rgb, depth, np.zeros(depth.shape, np.uint8))
        if room:
            v, mask = self._visuals, np.empty(depth.shape, np.uint8)
            colours = self._colours(False, False)
            self._draw((0, v.n_fixed), pinhole, pose, places, colours, rgb, depth, mask)
            view.dark[:] = self._shadows((0, v.n_fixed), places, view, depth, 1)
            _darken(view.dark, 1, rgb)
            self._views[key] = view
        return view

    def _shadows(
        self, parts: tuple[int, int], places: F64, view: _View, depth: F32, mark: int = 2
    ) -> U8:
        """Return the view's shadows, with those of some triangles marked besides."""
        v, dark = self._visuals, view.dark.copy()
        for height_m in (TABLE_TOP_Z_M, 0.0):
            _flatten(
                *parts,
                v.position,
                v.link,
                places,
                np.linalg.inv(view.T_world_cam),
                view.pinhole,
                LIGHT,
                height_m,
                depth,
                mark,
                dark,
            )
        return dark


@njit(cache=True, nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _flatten(
    first: int,
    last: int,
    position: F32,  # (T, 3, 3) link frame
    link: np.ndarray,  # (T,) i32
    T_world_link: F64,  # (L, 4, 4)
    T_cam_world: F64,  # (4, 4)
    pinhole: F64,  # fx, fy, cx, cy, near, far
    light: F64,  # (3,) unit vector towards it
    height_m: float,  # of the plane
    depth: F32,  # (H, W) of what is there
    mark: int,
    dark: U8,  # (H, W), `mark` is written where the shadow lies and nothing is written yet
) -> None:
    """Mark where the triangles' shadow on a horizontal plane lies on what is drawn there."""
    rows, columns = depth.shape
    fx, fy, cx, cy, near, _ = pinhole
    sx, sy, iz = np.empty(3), np.empty(3), np.empty(3)
    for t in range(first, last):
        k = link[t]
        usable, highest = True, 0.0
        for c in range(3):
            x, y, z = position[t, c, 0], position[t, c, 1], position[t, c, 2]
            wx = T_world_link[k, 0, 0] * x + T_world_link[k, 0, 1] * y + T_world_link[k, 0, 2] * z
            wy = T_world_link[k, 1, 0] * x + T_world_link[k, 1, 1] * y + T_world_link[k, 1, 2] * z
            wz = T_world_link[k, 2, 0] * x + T_world_link[k, 2, 1] * y + T_world_link[k, 2, 2] * z
            wx += T_world_link[k, 0, 3]
            wy += T_world_link[k, 1, 3]
            up = wz + T_world_link[k, 2, 3] - height_m
            if up < 0.0:
                usable = False
                break
            highest = max(highest, up)
            wx, wy, wz = wx - light[0] * up / light[2], wy - light[1] * up / light[2], height_m
            px = T_cam_world[0, 0] * wx + T_cam_world[0, 1] * wy + T_cam_world[0, 2] * wz
            py = T_cam_world[1, 0] * wx + T_cam_world[1, 1] * wy + T_cam_world[1, 2] * wz
            pz = T_cam_world[2, 0] * wx + T_cam_world[2, 1] * wy + T_cam_world[2, 2] * wz
            px, py, pz = px + T_cam_world[0, 3], py + T_cam_world[1, 3], pz + T_cam_world[2, 3]
            if pz < near:
                usable = False
                break
            iz[c] = 1.0 / pz
            sx[c], sy[c] = fx * px / pz + cx, fy * py / pz + cy
        if not usable or highest < SHADOW_M:  # below the plane, or the plane itself
            continue
        area = (sx[1] - sx[0]) * (sy[2] - sy[0]) - (sx[2] - sx[0]) * (sy[1] - sy[0])
        if area == 0.0:
            continue
        x_min = max(int(np.ceil(min(sx[0], sx[1], sx[2]) - 0.5)), 0)
        x_max = min(int(np.floor(max(sx[0], sx[1], sx[2]) - 0.5)), columns - 1)
        y_min = max(int(np.ceil(min(sy[0], sy[1], sy[2]) - 0.5)), 0)
        y_max = min(int(np.floor(max(sy[0], sy[1], sy[2]) - 0.5)), rows - 1)
        inv = 1.0 / area
        for row in range(y_min, y_max + 1):
            yy = row + 0.5
            for col in range(x_min, x_max + 1):
                if dark[row, col]:
                    continue
                xx = col + 0.5
                w1 = ((xx - sx[0]) * (sy[2] - sy[0]) - (sx[2] - sx[0]) * (yy - sy[0])) * inv
                w2 = ((sx[1] - sx[0]) * (yy - sy[0]) - (xx - sx[0]) * (sy[1] - sy[0])) * inv
                w0 = 1.0 - w1 - w2
                if w0 < 0.0 or w1 < 0.0 or w2 < 0.0:
                    continue
                z = 1.0 / (w0 * iz[0] + w1 * iz[1] + w2 * iz[2])
                if abs(z - depth[row, col]) < SHADOW_M:
                    dark[row, col] = mark


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _darken(dark: U8, mark: int, rgb: U8) -> None:
    for row in range(dark.shape[0]):
        for col in range(dark.shape[1]):
            if dark[row, col] == mark:
                for c in range(3):
                    rgb[row, col, c] = np.uint8(rgb[row, col, c] * SHADE)


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _average(large: U8, small: U8) -> None:
    """Write the mean of every TIMES x TIMES pixels."""
    for row in range(small.shape[0]):
        for col in range(small.shape[1]):
            for c in range(3):
                total = 0
                for i in range(TIMES):
                    for j in range(TIMES):
                        total += large[TIMES * row + i, TIMES * col + j, c]
                small[row, col, c] = np.uint8(total // (TIMES * TIMES))
