"""openhelix.benchmarks.calvin.world_process: what is asked of a world is answered, also at its end."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from openhelix.benchmarks.calvin.world_process import WorldProcess


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
