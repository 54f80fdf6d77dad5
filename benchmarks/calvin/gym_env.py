"""CALVIN's worlds with gymnasium's API: `make_env("playtable")`, `make_env("calvin")`.

For a single-task episode, `reset(options={"task": "open_drawer"})` draws a start in which the
task is feasible; the step that completes it is rewarded with 1 and ends the episode. Without a
task the episode continues, and `info["completed"]` lists the tasks completed since `reset`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import gymnasium
import numpy as np
from gymnasium import spaces

from openhelix.benchmarks.calvin.env import PlayTableEnv
from openhelix.benchmarks.calvin.sequences import get_sequences, initial_state
from openhelix.benchmarks.calvin.starts import begin, carry_over
from openhelix.benchmarks.calvin.tasks import get_task
from openhelix.runtime.core import plugins
from openhelix.runtime.core.interfaces import F64
from openhelix.runtime.core.quaternion import from_euler_xyz, normalise
from openhelix.runtime.robots.base import WorldPlugin
from openhelix.runtime.robots.env import CAMERA_SIZES

Actions = Literal["relative", "absolute"]
OPTIONS = ("task", "sequence", "robot_obs", "scene_obs")


def make_env(
    world: str = "playtable",
    scene: str = "D",
    cameras: Sequence[str] = ("static", "gripper"),
    *,
    actions: Actions = "relative",
    max_steps: int = 360,
    seed: int = 0,
) -> CalvinGymEnv:
    """Return a world as a gymnasium environment.

    Args:
        world: a name of the group `openhelix.worlds`: "playtable" or "calvin", or another
            package's.
        scene: "A" to "D".
        cameras: what observations show, of "static" and "gripper".
        actions: see `CalvinGymEnv`.
        max_steps: environment steps (1/30 s) until an episode is truncated.
        seed: of the first `reset` without one.

    Raises:
        ValueError: an unknown world, scene, camera or kind of action, or a world that is not
            installed; one line says what is valid.
    """
    if not isinstance(world, str):
        raise ValueError(f"world: {world!r} is no name of a world")
    plugin: WorldPlugin = plugins.find(plugins.WORLDS, world)
    return CalvinGymEnv(plugin, scene, cameras, actions=actions, max_steps=max_steps, seed=seed)


class CalvinGymEnv(gymnasium.Env[dict[str, Any], F64]):
    """One world of CALVIN's kind.

    Observations, by name (`C` is each camera):

        rgb_C (H, W, 3) uint8; depth_C (H, W) float32, m
        K_C (3, 3) float64, pixels; T_world_C (4, 4) float64, camera to world (OpenCV axes)
        tcp_pose (7,) float64: m, unit quaternion xyzw, in the world frame
        robot_obs (15,) and scene_obs (24,) float64, as CALVIN writes them

    Actions (float64): "relative" is CALVIN's own (7,) in [-1, 1], of which 1 is 2 cm or
    0.05 rad per step, and the gripper (below 0 closes); "absolute" is a pose (7,) as `tcp_pose`
    and the gripper's openness, 0 to 1.

    Args:
        plugin: the world.
        scene, cameras, max_steps, seed: see `make_env`.
        actions: "relative" or "absolute".

    Attributes:
        world: the wrapped env, with calvin_env's own verbs.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 30}  # noqa: RUF012
    render_mode = "rgb_array"

    def __init__(
        self,
        plugin: WorldPlugin,
        scene: str = "D",
        cameras: Sequence[str] = ("static", "gripper"),
        *,
        actions: Actions = "relative",
        max_steps: int = 360,
        seed: int = 0,
    ) -> None:
        if actions not in ("relative", "absolute"):
            raise ValueError(f"actions: {actions!r} is neither 'relative' nor 'absolute'")
        if max_steps < 1:
            raise ValueError(f"max_steps: {max_steps} is below 1")
        self._plugin, self._scene, self._actions = plugin, scene, actions
        self._max_steps, self._seed = max_steps, seed
        self.world = plugin.make_env(scene, tuple(cameras), seed)
        self._cameras = tuple(cameras)
        self._task = ""
        self._steps = 0
        self._closed = False
        self._start: Mapping[str, Any] | None = None
        self.observation_space = _observations(self._cameras)
        self.action_space: Any = _action_space(actions)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Start an episode.

        Args:
            seed: of what is drawn; the same seed gives the same start.
            options: `task`, a name of CALVIN's 34: draw a start in which it can be done; or
                `sequence`, 0 to 999: the start of CALVIN's sequence; or `robot_obs` (15,) and
                `scene_obs` (24,), CALVIN's own. A `task` beside these is what is judged.

        Raises:
            ValueError: an unknown option or task, or a state that cannot be taken.
            RuntimeError: the environment is closed.
        """
        self._check_open("reset")
        if seed is None and self._np_random is None:
            seed = self._seed
        super().reset(seed=seed)
        options = dict(options or {})
        for name in options:
            if name not in OPTIONS:
                raise ValueError(f"options: no option {name!r}; valid: {', '.join(OPTIONS)}")
        self._task = str(options.get("task", ""))
        if self._task:
            get_task(self._task)
        self._place(options)
        self._start = self.world.get_info()
        self._steps = 0
        return self._observe(), self._info()

    def step(self, action: Any) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Run one environment step (1/30 s).

        Returns:
            Observation, reward (1.0 in the step that completes the task), terminated, truncated
            (after `max_steps`), and info: calvin_env's, with `task`, `instruction`,
            `completed` (names of all tasks done since `reset`) and `steps`.

        Raises:
            ValueError: an action of the wrong shape, or that is not finite.
            gymnasium.error.ResetNeeded: `reset` has not been called yet.
            RuntimeError: the environment is closed.
        """
        self._check_open("step")
        if self._start is None:
            raise gymnasium.error.ResetNeeded("step: call reset() first")
        self.world.advance(self._command(action))
        self._steps += 1
        info = self._info()
        terminated = bool(self._task) and self._task in info["completed"]
        return self._observe(), float(terminated), terminated, self._steps >= self._max_steps, info

    def render(self) -> Any:
        """Return the static camera's picture (200, 200, 3) uint8."""
        self._check_open("render")
        return self.world.render()

    def close(self) -> None:
        """Release the world; safe to call twice."""
        self._closed = True
        self.world.close()

    def _check_open(self, verb: str) -> None:
        if self._closed:
            raise RuntimeError(f"{verb}: this environment is closed; make_env() makes another")

    def _place(self, options: Mapping[str, Any]) -> None:
        """Bring the world into an episode's start."""
        draw = int(self.np_random.integers(2**31))
        if "sequence" in options:
            number = int(options["sequence"])
            if not 0 <= number < 1000:
                raise ValueError(f"options.sequence: {number} is not in 0..999")
            state, _ = get_sequences(number + 1)[number]
            self.world.reset(*initial_state(state, self._scene))
        elif "robot_obs" in options or "scene_obs" in options:
            self.world.reset(options.get("robot_obs"), options.get("scene_obs"))
        elif self._task:
            self._draw(np.random.default_rng(draw))
        else:
            if hasattr(self.world, "seed"):
                self.world.seed(draw)
            self.world.reset()

    def _draw(self, rng: np.random.Generator) -> None:
        """Draw a start for the task; for another world than PlayTable in one, and carry it over."""
        if isinstance(self.world, PlayTableEnv):
            begin(self.world, self._task, rng)
            return
        with PlayTableEnv(self._scene, cameras=()) as model:
            begin(model, self._task, rng)
            carry_over(model, self.world)

    def _command(self, action: Any) -> Any:
        values = np.asarray(action, np.float64)
        if values.shape != self.action_space.shape:
            want = self.action_space.shape
            raise ValueError(f"action: shape {values.shape}, must be {want} ({self._actions})")
        if not np.isfinite(values).all():
            raise ValueError("action: is not finite")
        if self._actions == "relative":
            return np.array([*np.clip(values[:6], -1.0, 1.0), 1.0 if values[6] >= 0 else -1.0])
        x, y, z, *q = values[:7].tolist()
        return ((x, y, z), normalise(q), 1 if values[7] >= 0.5 else -1)

    def _observe(self) -> dict[str, Any]:
        obs = self.world.get_state_obs() if isinstance(self.world, PlayTableEnv) else None
        if obs is None:
            whole = self.world.get_obs()
            obs = {name: np.asarray(whole[name], np.float64) for name in ("robot_obs", "scene_obs")}
        found = {"robot_obs": obs["robot_obs"], "scene_obs": obs["scene_obs"]}
        euler = obs["robot_obs"][3:6].tolist()
        found["tcp_pose"] = np.array([*obs["robot_obs"][:3], *from_euler_xyz(euler)])
        if self._cameras:
            for name, frame in self.world.camera_frames(t_ns=0).items():
                found |= {f"rgb_{name}": frame.rgb, f"depth_{name}": frame.depth}
                found |= {f"K_{name}": frame.K, f"T_world_{name}": frame.T_world_cam}
        return found

    def _info(self) -> dict[str, Any]:
        info = dict(self.world.get_info())
        done = self._plugin.completed(self._start or info, info)
        sentence = get_task(self._task).sentence if self._task else ""
        return info | {
            "task": self._task,
            "instruction": sentence,
            "completed": done,
            "steps": self._steps,
        }


def _observations(cameras: Sequence[str]) -> spaces.Dict:
    def box(shape: tuple[int, ...], low: float = -np.inf, high: float = np.inf) -> spaces.Box:
        return spaces.Box(low, high, shape, np.float64)

    found: dict[str, spaces.Space[Any]] = {
        "tcp_pose": box((7,)),
        "robot_obs": box((15,)),
        "scene_obs": box((24,)),
    }
    for name in cameras:
        height, width = CAMERA_SIZES[name]
        found[f"rgb_{name}"] = spaces.Box(0, 255, (height, width, 3), np.uint8)
        found[f"depth_{name}"] = spaces.Box(0.0, np.inf, (height, width), np.float32)
        found[f"K_{name}"] = box((3, 3))
        found[f"T_world_{name}"] = box((4, 4))
    return spaces.Dict(found)


def _action_space(actions: Actions) -> spaces.Box:
    if actions == "relative":
        return spaces.Box(-1.0, 1.0, (7,), np.float64)
    low = np.array([-0.6, -0.8, 0.3, -1.0, -1.0, -1.0, -1.0, 0.0])
    high = np.array([0.6, 0.4, 0.9, 1.0, 1.0, 1.0, 1.0, 1.0])
    return spaces.Box(low, high, dtype=np.float64)
