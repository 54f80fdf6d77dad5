"""CALVIN's two worlds as plug-ins: PlayTable, and the real calvin_env.

Both have CALVIN's scenes, tasks and sequences; see `openhelix.runtime.robots.base.WorldPlugin`.
Nothing is imported before it is asked for: naming a world must not need a simulator.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, ClassVar

from openhelix.runtime.core import plugins
from openhelix.runtime.robots.base import Scenery


class _CalvinTasks:
    """What the two worlds share."""

    @staticmethod
    def completed(start_info: Mapping[str, Any], end_info: Mapping[str, Any]) -> set[str]:
        """Return the names of all tasks done between two infos."""
        from openhelix.benchmarks.calvin.tasks import completed

        return completed(start_info, end_info)

    @staticmethod
    def sequence(number: int, scene: str) -> tuple[list[tuple[str, str]], dict[str, list[float]]]:
        """Return the tasks of CALVIN's sequence `number` with their sentences, and its start."""
        from openhelix.benchmarks.calvin.sequences import get_sequences, initial_state
        from openhelix.benchmarks.calvin.tasks import TASKS

        state, names = get_sequences(number + 1)[number]
        robot_obs, scene_obs = initial_state(state, scene)
        start = {"robot_obs": robot_obs.tolist(), "scene_obs": scene_obs.tolist()}
        return [(name, TASKS[name].sentence) for name in names], start

    @staticmethod
    def task(name: str, scene: str, seed: int) -> tuple[list[tuple[str, str]], dict[str, Any]]:
        """Return one of CALVIN's tasks with its sentence, and how to begin it.

        Raises:
            ValueError: there is no such task.
        """
        from openhelix.benchmarks.calvin.tasks import get_task

        sentence = get_task(name).sentence
        options = {"task": name, "seed": seed}
        stage = {"target": "openhelix.benchmarks.calvin.starts:put_up", "options": options}
        return [(name, sentence)], {"stage": stage}

    @staticmethod
    def layout(layout: Mapping[str, Any], scene: str, seed: int) -> dict[str, Any]:
        """Return the start of a layout in words; see `starts.Layout.of`.

        Raises:
            ValueError: it says what cannot be.
        """
        from openhelix.benchmarks.calvin.scene import get_scene
        from openhelix.benchmarks.calvin.starts import Layout

        Layout.of(layout, get_scene(scene))  # told now, not by the world's process
        options = {"layout": dict(layout), "seed": seed}
        stage = {"target": "openhelix.benchmarks.calvin.starts:lay_out", "options": options}
        return {"stage": stage}


@lru_cache(maxsize=4)
def _scenery(scene: str, static_camera: str) -> Scenery:
    made: Scenery = plugins.resolve("openhelix.benchmarks.calvin.scenery:PlayTableScenery")(
        scene, json.loads(static_camera)
    )
    return made


class PlayTable(_CalvinTasks):
    """The embedded world; it also runs in real time, in two processes."""

    processes: ClassVar[Mapping[str, str]] = {
        "world": "openhelix.benchmarks.calvin.world_process:WorldProcess",
        "camera": "openhelix.benchmarks.calvin.world_process:CameraProcess",
    }
    drawable = True

    @staticmethod
    def make_env(
        scene: str,
        cameras: Sequence[str],
        seed: int = 0,
        static_camera: Mapping[str, Any] | None = None,
    ) -> Any:
        """Return a new `PlayTableEnv`."""
        return plugins.resolve("openhelix.benchmarks.calvin.env:PlayTableEnv")(
            scene=scene, cameras=tuple(cameras), seed=seed, static_camera=static_camera
        )

    @staticmethod
    def scenery(scene: str, static_camera: Mapping[str, Any] | None = None) -> Scenery:
        """Return a `PlayTableScenery`; one for each scene and process."""
        return _scenery(scene, json.dumps(static_camera))

    @staticmethod
    def require() -> str:
        """Return what is installed.

        Raises:
            ResolveError: pybullet is not.
        """
        plugins.resolve("pybullet:getAPIVersion")
        return "pybullet"


class Calvin(_CalvinTasks):
    """The real calvin_env, in a process of its own; it steps and has no real-time processes."""

    processes: ClassVar[Mapping[str, str]] = {}
    drawable = False

    @staticmethod
    def make_env(
        scene: str,
        cameras: Sequence[str],
        seed: int = 0,
        static_camera: Mapping[str, Any] | None = None,
    ) -> Any:
        """Return a new `CalvinEnv`; `seed` is not used, its own reset has no randomness.

        Raises:
            ValueError: a static camera is given: calvin_env's own is in its settings.
        """
        if static_camera is not None:
            raise ValueError("world.static_camera: calvin_env has its own and takes no other")
        return plugins.resolve("openhelix.benchmarks.calvin.calvin_env:CalvinEnv")(
            scene=scene, cameras=tuple(cameras)
        )

    @staticmethod
    def scenery(scene: str, static_camera: Mapping[str, Any] | None = None) -> None:
        """Return None: its state cannot be drawn without its simulator."""

    @staticmethod
    def require() -> str:
        """Return where calvin_env was found.

        Raises:
            ValueError: it is not installed; the line says how to get it.
        """
        checkout, interpreter = plugins.resolve("openhelix.benchmarks.calvin.calvin_env:locate")()
        return f"{checkout}, run by {interpreter}"
