"""The real calvin_env behind PlayTable's interface, in a process of its own.

calvin_env needs packages that the project does not, prints to standard output, and mixes up
its physics clients as soon as a second one exists; so every `CalvinEnv` starts one process
(possibly under another interpreter) and talks to it over a socket. Any failure of that
process is raised here as one clear error, and nothing is left behind.

Two environment variables say where things are, `OPENHELIX_CALVIN_ENV` (a git checkout of
calvin_env) and `OPENHELIX_CALVIN_PYTHON` (the interpreter); by default both are looked for
under the project's cache folder.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import weakref
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from openhelix.benchmarks.calvin import calvin_env_child
from openhelix.benchmarks.calvin.scene import SceneError, get_scene
from openhelix.benchmarks.calvin.spaces import parse_action
from openhelix.runtime.core.config import ConfigError
from openhelix.runtime.core.interfaces import F64, CameraFrame
from openhelix.runtime.core.paths import cache_folder
from openhelix.runtime.robots.pipe import end, pack, receive, start

CAMERAS = ("static", "gripper")
NEEDS = (
    *("hydra-core==1.3.8", "gym==0.26.2", "gitpython", "numpy-quaternion", "numba"),
    *("pybullet==3.2.7", "scipy", "opencv-python-headless"),
)
START_TIMEOUT_S = 120.0
CALL_TIMEOUT_S = 60.0
CLOSE_TIMEOUT_S = 5.0
STDERR_LINES = 6
# Bullet's software renderer looks through each pixel's lower left corner, not its centre:
# back-projected, the table top is then flat to 0.03 mm, and 0.5 to 1.1 mm off otherwise.
HALF_PIXEL = 0.5
HOLD = (0.0,) * 6  # a relative action that goes nowhere, without its gripper


class CalvinUnusableError(ConfigError):
    """calvin_env was asked for and is missing or does not start; says in one line what to do."""


class CalvinError(RuntimeError):
    """calvin_env failed, or its process died; the env is closed if the process did."""


class CalvinInputError(ValueError):
    """A camera or observation that calvin_env cannot take; the world keeps its state."""


def instructions() -> str:
    """How to install calvin_env, as commands."""
    cache = cache_folder()
    return (
        "calvin_env is not on PyPI. Install it in an environment of its own:\n"
        f"  git clone https://github.com/mees/calvin_env {cache / 'calvin_env'}\n"
        f"  python3.11 -m venv {cache / 'calvin-venv'}\n"
        f"  {cache / 'calvin-venv'}/bin/pip install {' '.join(NEEDS)}\n"
        "or name an existing checkout in OPENHELIX_CALVIN_ENV and the interpreter that has "
        "these packages in OPENHELIX_CALVIN_PYTHON."
    )


def locate() -> tuple[Path, Path]:
    """The checkout of calvin_env and the interpreter to run it.

    Raises:
        CalvinUnusableError: One of them is missing.
    """
    checkout = Path(
        os.environ.get("OPENHELIX_CALVIN_ENV") or cache_folder() / "calvin_env"
    ).absolute()
    if not (checkout / "calvin_env" / "__init__.py").is_file():
        raise CalvinUnusableError(
            f"world: calvin_env is not installed (no checkout at {checkout}). {instructions()}"
        )
    if not any((folder / ".git").exists() for folder in (checkout, *checkout.parents)):
        raise CalvinUnusableError(
            f"world: {checkout} is not inside a git repository, and calvin_env records its "
            f"commit when it starts; use a git clone. {instructions()}"
        )
    named = os.environ.get("OPENHELIX_CALVIN_PYTHON")
    own = cache_folder() / "calvin-venv" / "bin" / "python"
    if named or own.is_file():
        python = Path(named or own)
    elif find_spec("hydra") and find_spec("gym"):
        python = Path(sys.executable)
    else:
        raise CalvinUnusableError(
            f"world: no interpreter with calvin_env's packages (none at {own}). {instructions()}"
        )
    if not os.access(python, os.X_OK):
        raise CalvinUnusableError(
            f"world: OPENHELIX_CALVIN_PYTHON is {python}, which is not an interpreter. "
            f"{instructions()}"
        )
    return checkout, python


def is_installed() -> bool:
    """Whether `CalvinEnv` has what it needs."""
    try:
        locate()
    except CalvinUnusableError:
        return False
    return True


class CalvinEnv:
    """One calvin_env, used like `openhelix.benchmarks.calvin.env.PlayTableEnv`.

    Args:
        scene: "A" to "D".
        cameras: Which cameras observations carry, of "static" and "gripper"; with none,
            calvin_env draws nothing.

    Raises:
        SceneError: Unknown scene.
        CalvinInputError: Unknown camera.
        CalvinUnusableError: calvin_env is missing or does not start.
    """

    def __init__(self, scene: str = "D", cameras: Sequence[str] = CAMERAS) -> None:
        self.scene = get_scene(scene)
        if self.scene.variant is not None:
            raise SceneError(f"scene: calvin_env has no {self.scene.name}, only A, B, C and D")
        unknown = [name for name in cameras if name not in CAMERAS]
        if unknown:
            raise CalvinInputError(f"cameras: {unknown[0]!r} is not one of {', '.join(CAMERAS)}")
        checkout, python = locate()
        words = (str(checkout), self.scene.name, ",".join(cameras))
        try:
            child = start(str(python), calvin_env_child.__file__, *words)
        except OSError as error:
            raise CalvinUnusableError(
                f"world: {python} cannot be run ({error}). {instructions()}"
            ) from error
        self._process, self._pipe, self._log = child
        self._finalizer = weakref.finalize(self, end, *child, CLOSE_TIMEOUT_S)
        try:
            self._receive(START_TIMEOUT_S)
        except CalvinError as error:
            self.close()
            raise CalvinUnusableError(f"world: {error}; {checkout} is run by {python}") from error

    # -- calvin_env's interface --------------------------------------------------------

    def reset(self, robot_obs: Any = None, scene_obs: Any = None) -> dict[str, Any]:
        """Start an episode; see `PlayTableEnv.reset`.

        Raises:
            CalvinInputError: Wrong length or NaN; the world keeps its state.
        """
        robot = _vector(robot_obs, "robot_obs", (15, 16))
        scene = _vector(scene_obs, "scene_obs", (24, 27))
        return self._call("reset", robot_obs=robot, scene_obs=scene)["obs"]

    def step(self, action: Any) -> tuple[dict[str, Any], int, bool, dict[str, Any]]:
        """Run one control step (1/30 s); see `PlayTableEnv.step`.

        Raises:
            ActionError: A bad action; the world keeps its state.
        """
        reply = self._act("step", action)
        return reply["obs"], reply["reward"], reply["done"], _as_info(reply["info"])

    def advance(self, action: Any) -> None:
        """`step` without drawing or gathering an observation.

        Raises:
            ActionError: A bad action; the world keeps its state.
        """
        self._act("advance", action)

    def get_obs(self) -> dict[str, Any]:
        """`rgb_obs`, `depth_obs`, `robot_obs` (15,) and `scene_obs` (24,)."""
        return self._call("get_obs")["obs"]

    def get_info(self) -> dict[str, Any]:
        """`robot_info` and `scene_info`, as the oracles read them."""
        return _as_info(self._call("get_info")["info"])

    def close(self) -> None:
        """End the process and reap it; safe to call again."""
        finalizer = getattr(self, "_finalizer", None)
        if finalizer is not None:
            finalizer()

    def __enter__(self) -> CalvinEnv:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # -- beyond calvin_env -------------------------------------------------------------

    def settle(self) -> None:
        """Let blocks that hang free land: one held step if any block touches nothing.

        A reset ends with one physics substep, after which a block that was put where it had
        come to rest still hangs a few micrometres above the table, without a contact; the
        oracles of push, lift and push_into_drawer read the contacts of the start. A start in
        which every block touches something is left as it is, as CALVIN's protocol has it.
        """
        info = self.get_info()
        blocks = info["scene_info"]["movable_objects"].values()
        if not all(block["contacts"] for block in blocks):
            gripper = 1.0 if info["robot_info"]["gripper_action"] > 0 else -1.0
            self.advance([*HOLD, gripper])

    def camera_frames(self, t_ns: int) -> Mapping[str, CameraFrame]:
        """Fresh frames with intrinsics and extrinsics, stamped `t_ns`."""
        reply = self._call("frames")
        frames = {}
        for name, view in reply["views"].items():
            height, width = view["size"]
            focal = height / 2 / np.tan(np.radians(view["fov_deg"]) / 2)
            cx, cy = width / 2 + HALF_PIXEL, height / 2 - HALF_PIXEL
            intrinsics = np.array([[focal, 0, cx], [0, focal, cy], [0, 0, 1.0]])
            frames[name] = CameraFrame(
                t_ns=t_ns,
                rgb=reply["obs"]["rgb_obs"][f"rgb_{name}"],
                depth=reply["obs"]["depth_obs"][f"depth_{name}"],
                K=intrinsics,
                T_world_cam=camera_pose(view["view"]),
            )
        return frames

    def time_steps(self, count: int) -> float:
        """Seconds that `count` steps of calvin_env itself take, the socket left out."""
        return float(self._call("time_steps", count=count)["seconds"])

    # -- the process -------------------------------------------------------------------

    def _act(self, name: str, action: Any) -> dict[str, Any]:
        command = parse_action(action)
        return self._call(name, kind=command.kind, values=command.values, gripper=command.gripper)

    def _call(self, name: str, **arguments: Any) -> dict[str, Any]:
        if not self._finalizer.alive:
            raise CalvinError("calvin_env: this env is closed")
        try:
            self._pipe.settimeout(CALL_TIMEOUT_S)
            self._pipe.sendall(pack({"call": name, **arguments}))
        except OSError as error:
            raise self._died(error) from error
        return self._receive(CALL_TIMEOUT_S)

    def _receive(self, timeout_s: float) -> dict[str, Any]:
        self._pipe.settimeout(timeout_s)
        try:
            reply = receive(self._pipe)
        except TimeoutError as error:
            self._process.kill()
            raise self._died(error, f"did not answer within {timeout_s:g} s") from error
        except (EOFError, OSError) as error:
            raise self._died(error) from error
        if "error" in reply:
            raise CalvinError(f"calvin_env: {reply['error']}")
        return reply

    def _died(self, error: Exception, what: str = "") -> CalvinError:
        """Reap the child and say what it last said."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(CLOSE_TIMEOUT_S)
        code = self._process.poll()
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        self.close()
        tail = " | ".join(lines[-STDERR_LINES:])
        return CalvinError(
            f"calvin_env: its process {what or f'ended with status {code}'}; it last said: {tail}"
        )


def camera_pose(view: F64) -> F64:
    """(4, 4) camera to world, OpenCV axes, from Bullet's view matrix (16 numbers, by column)."""
    world_to_gl = np.asarray(view, dtype=np.float64).reshape(4, 4, order="F")
    pose = np.linalg.inv(np.diag([1.0, -1.0, -1.0, 1.0]) @ world_to_gl)
    return np.asarray(pose, dtype=np.float64)


def _vector(value: Any, name: str, sizes: tuple[int, ...]) -> F64 | None:
    if value is None:
        return None
    try:
        array = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise CalvinInputError(f"{name}: not numbers") from error
    if array.ndim != 1 or array.shape[0] not in sizes or not np.isfinite(array).all():
        wanted = " or ".join(f"({n},)" for n in sizes)
        raise CalvinInputError(f"{name}: shape {array.shape}, must be {wanted} and finite")
    return array


def _as_info(info: dict[str, Any]) -> dict[str, Any]:
    """Give back the tuples that the wire made lists of, where calvin_env has tuples."""
    info = {key: _tuples(value) for key, value in info.items()}
    info["robot_info"]["arm_joint_states"] = list(info["robot_info"]["arm_joint_states"])
    return info


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
