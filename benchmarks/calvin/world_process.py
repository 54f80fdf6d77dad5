"""PlayTable as two processes of the real-time graph: the world, and its cameras.

The world steps by a control period for every action that arrives and stamps the new state with the
time for which that action was meant, so that a state stamped t is what a robot would be in at t.
If no action arrives for a while, it holds its target and time continues without the loop, as
on a real arm. The cameras run in a process of their own, at their own rate, from the newest
state: a frame is stamped with the time of the state that it shows, however late it is drawn.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from openhelix.benchmarks.calvin import tasks
from openhelix.benchmarks.calvin.cameras import SceneRenderer
from openhelix.benchmarks.calvin.env import PlayTableEnv
from openhelix.benchmarks.calvin.scene import CONTROL_HZ, PHYSICS_HZ
from openhelix.runtime.core.interfaces import Action
from openhelix.runtime.core.plugins import resolve
from openhelix.runtime.robots.sim import FrameSet, WorldState
from openhelix.runtime.transport.wire import NewestReader, Publisher

STARVED_AFTER_S = 0.1  # three control periods of 1/30 s without an action
JOB_TIMEOUT_S = 60.0  # an expert may have to do a task first
Handlers = Mapping[str, Callable[[dict[str, Any]], dict[str, Any]]]


class WorldProcess:
    """Physics, oracles and the robot's proprioception.

    Args:
        scene: "A" to "D".
        seed: of the placement of blocks where no state is set.
        actions: endpoint on which actions arrive (bound here).
        states: endpoint on which `WorldState` goes out (bound here).
        keys: folder of CURVE keys, off loopback.
        hz: actions per second; a period has whole steps of physics, now one more, now one less.

    Raises:
        ValueError: there are more actions than steps of physics.
    """

    def __init__(
        self,
        scene: str,
        actions: str,
        states: str,
        keys: str | None = None,
        seed: int = 0,
        hz: float = CONTROL_HZ,
    ) -> None:
        if hz > PHYSICS_HZ:
            raise ValueError(
                f"control.hz: {hz:g}; the world's physics has {PHYSICS_HZ} steps per second"
            )
        self._hz, self._owed = hz, 0.0  # steps of physics that are due and have not been taken
        self._scene, self._keys, self._seed = scene, keys, seed
        self._endpoints = (actions, states)
        self._jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._task: str | None = None  # that is watched for; "" for whichever is done
        self._task_seq = 0
        self._completed: tuple[str, ...] = ()
        self._env_steps = self._starved_steps = 0
        self._actions: NewestReader[Action] | None = None
        self._held: Action | None = None  # the target that the arm keeps
        self._ended = threading.Event()  # nobody does jobs any more

    def setup(self) -> None:
        self._env = PlayTableEnv(scene=self._scene, cameras=(), seed=self._seed)
        self._env.reset()
        self._start_info = self._env.get_info()
        actions, states = self._endpoints
        self._actions = NewestReader(actions, "actions", Action, bind=True, keys=self._keys)
        self._states = Publisher(states, "states", keys=self._keys)

    def run(self, stop: threading.Event) -> None:
        try:
            self._run(stop)
        finally:
            self._ended.set()

    def _run(self, stop: threading.Event) -> None:
        assert self._actions is not None
        last_s = time.monotonic()
        while not stop.is_set():
            self._actions.wait(0.02)
            if self._do_jobs():
                last_s = time.monotonic()
            action = self._actions.poll()
            if action is not None:
                self._held = action
                self._step(action, action.t_ns or time.monotonic_ns())
                last_s = time.monotonic()
            elif time.monotonic() - last_s > STARVED_AFTER_S:
                # Nobody commands the arm: it keeps its target and time goes on.
                last_s += 1.0 / self._hz
                if self._held is None:
                    self._publish(time.monotonic_ns())
                else:
                    self._starved_steps += 1
                    self._step(self._held, time.monotonic_ns())

    def health(self) -> dict[str, Any]:
        stats = self._actions.stats if self._actions else None
        return {
            "env_steps": self._env_steps,
            "starved_steps": self._starved_steps,
            "actions_received": stats.received if stats else 0,
            "actions_lost": stats.gaps if stats else 0,
            "actions_dropped": dict(stats.dropped) if stats else {},
        }

    def handlers(self) -> Handlers:
        return {
            "reset": self._on_reset,
            "stage": self._on_stage,
            "begin_task": self._on_begin,
        }

    def close(self) -> None:
        for name in ("_env", "_actions", "_states"):
            part = getattr(self, name, None)
            if part is not None:
                part.close()

    def _step(self, action: Action, t_ns: int) -> None:
        gripper = 1.0 if action.gripper >= 0.5 else -1.0
        self._owed += PHYSICS_HZ / self._hz
        substeps = int(self._owed + 1e-6)
        self._owed -= substeps
        self._env.advance((action.pose[:3], action.pose[3:], gripper), substeps)
        self._env_steps += 1
        if self._task is not None and (self._task == "" or not self._completed):
            self._completed = self._judge(self._task, self._env.get_info())
        self._publish(t_ns)

    def _judge(self, task: str, info: Mapping[str, Any]) -> tuple[str, ...]:
        """Return what has been done of what is asked for, or instead of it."""
        if task and self._env.referee is not None:
            return tuple(self._env.referee.completed(info))
        if task:
            return (task,) if tasks.is_completed(task, self._start_info, info) else ()
        done = tasks.completed(self._start_info, info)
        return self._completed + tuple(sorted(done.difference(self._completed)))

    def _publish(self, t_ns: int) -> None:
        self._states.send(
            WorldState(
                t_ns=t_ns,
                robot_obs=self._env.get_state_obs()["robot_obs"],
                visual=self._env.visual_state(),
                task_seq=self._task_seq,
                env_steps=self._env_steps,
                completed=self._completed,
            )
        )

    def _on_reset(self, arguments: dict[str, Any]) -> dict[str, Any]:
        obs = [arguments.get(name) for name in ("robot_obs", "scene_obs")]
        values = [None if o is None else np.asarray(o, np.float64) for o in obs]
        return self._begin_anew(lambda: self._env.reset(*values))

    def _on_stage(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Let `target(env, **options)` put the world into a state that no vector describes."""
        put = resolve(str(arguments["target"]))
        return self._begin_anew(lambda: put(self._env, **arguments["options"]))

    def _begin_anew(self, put: Callable[[], object]) -> dict[str, Any]:
        def reset() -> int:
            put()
            self._task, self._completed, self._held = None, (), None
            self._env_steps = 0
            now_ns = time.monotonic_ns()
            self._publish(now_ns)
            return now_ns

        return {"t_ns": self._in_run(reset)}

    def _on_begin(self, arguments: dict[str, Any]) -> dict[str, Any]:
        task = str(arguments["task"])
        if task and task not in tasks.TASKS:
            raise ValueError(f"task: {task!r} is unknown; valid: {', '.join(tasks.TASKS)}")

        def begin() -> int:
            self._task, self._completed = task, ()
            self._task_seq += 1
            self._start_info = self._env.get_info()
            if self._env.referee is not None:
                self._env.referee.begin(self._start_info)
            return self._task_seq

        return {"task_seq": self._in_run(begin)}

    def _in_run(self, job: Callable[[], int]) -> int:
        """Run a job in the physics thread, which owns the world, and wait for it."""
        done: queue.SimpleQueue[int | Exception] = queue.SimpleQueue()

        def guarded() -> None:
            try:
                done.put(job())
            except Exception as error:  # handed to whoever asked
                done.put(error)

        self._jobs.put(guarded)
        give_up_s = time.monotonic() + JOB_TIMEOUT_S
        while True:
            try:
                result = done.get(timeout=0.05)
                break
            except queue.Empty:
                # Whoever asked has a robot to stop: it must not wait for one that is gone.
                if self._ended.is_set():
                    raise RuntimeError("the world has ended") from None
                if time.monotonic() > give_up_s:
                    raise TimeoutError(
                        f"the world did not do it within {JOB_TIMEOUT_S:g} s"
                    ) from None
        if isinstance(result, Exception):
            raise result
        return result

    def _do_jobs(self) -> bool:
        """Run what was asked for since the last step; whether there was anything."""
        any_done = False
        while not self._jobs.empty():
            self._jobs.get()()
            any_done = True
        return any_done


class CameraProcess:
    """Draws the newest state at its own rate and publishes all cameras as one `FrameSet`.

    Args:
        scene: "A" to "D".
        cameras: names, for example ("static", "gripper").
        hz: draws a second.
        states: endpoint of the world.
        frames: endpoint on which the frames go out (bound here).
        keys: folder of CURVE keys, off loopback.
        static_camera: where the static camera stands instead of the scene's own.
    """

    def __init__(
        self,
        scene: str,
        cameras: Sequence[str],
        hz: float,
        states: str,
        frames: str,
        keys: str | None = None,
        static_camera: Mapping[str, Any] | None = None,
    ) -> None:
        self._scene, self._cameras, self._keys = scene, tuple(cameras), keys
        self._stand = static_camera
        self._period_s = 1.0 / hz
        self._endpoints = (states, frames)
        self._drawn = 0
        self._draw_s = 0.0

    def setup(self) -> None:
        states, frames = self._endpoints
        self._renderer = SceneRenderer(self._scene, self._cameras, static_camera=self._stand)
        self._states = NewestReader(states, "states", WorldState, keys=self._keys)
        self._publisher = Publisher(frames, "frames", keys=self._keys)

    def run(self, stop: threading.Event) -> None:
        next_s = time.monotonic()
        while not stop.is_set():
            state = self._states.poll()
            if state is not None:
                self._draw(state)
            # Its own cadence, but never a burst to make up for a slow draw.
            next_s = max(next_s + self._period_s, time.monotonic())
            stop.wait(max(0.0, next_s - time.monotonic()))

    def _draw(self, state: WorldState) -> None:
        start_s = time.perf_counter()
        drawn = self._renderer.render(state.visual)
        frames = {name: frame.camera_frame(state.t_ns) for name, frame in drawn.items()}
        self._publisher.send(FrameSet(frames))
        self._drawn += 1
        self._draw_s = time.perf_counter() - start_s

    def health(self) -> dict[str, Any]:
        return {"frames": self._drawn, "draw_s": self._draw_s}

    def handlers(self) -> Handlers:
        return {}

    def close(self) -> None:
        for part in ("_states", "_publisher"):
            if hasattr(self, part):
                getattr(self, part).close()
