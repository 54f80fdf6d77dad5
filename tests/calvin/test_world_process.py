"""openhelix.benchmarks.calvin.world_process: what is asked of a world is answered, also at its end."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest

from openhelix.benchmarks.calvin.world_process import WorldProcess
from openhelix.runtime.core.interfaces import Action


def test_a_world_that_has_ended_says_so_at_once(tmp_path: Path) -> None:
    world = WorldProcess("D", f"ipc://{tmp_path}/actions", f"ipc://{tmp_path}/states")
    world.setup()
    stop = threading.Event()
    thread = threading.Thread(target=world.run, args=(stop,))
    thread.start()
    begin = world.handlers()["begin_task"]
    try:
        assert begin({"task": "open_drawer"}) == {"task_seq": 1}
    finally:
        stop.set()
        thread.join(timeout=20)
    begun_s = time.monotonic()
    with pytest.raises(RuntimeError, match="the world has ended"):
        begin({"task": "open_drawer"})
    assert time.monotonic() - begun_s < 5  # not the minute that a start may take
    world.close()


@pytest.mark.parametrize(("hz", "actions", "substeps"), [(30, 3, 24), (200, 20, 24), (240, 7, 7)])
def test_the_physics_keeps_its_rate_whatever_the_loop_s(
    tmp_path: Path, hz: float, actions: int, substeps: int
) -> None:
    ends = f"ipc://{tmp_path}/actions", f"ipc://{tmp_path}/states"
    world, taken = WorldProcess("D", *ends, hz=hz), []
    world.setup()
    world._env.add_substep_hook(lambda _: taken.append(1))
    pose = world._env.get_info()["robot_info"]
    target = np.array([*pose["tcp_pos"], 0.0, 0.0, 0.0, 1.0])
    for _ in range(actions):
        world._step(Action(target, 1.0, 0), 0)
    world.close()
    assert len(taken) == substeps


def test_a_loop_faster_than_the_physics_is_refused() -> None:
    with pytest.raises(ValueError, match=r"control\.hz: 300; the world's physics has 240"):
        WorldProcess("D", "ipc://a", "ipc://b", hz=300)
