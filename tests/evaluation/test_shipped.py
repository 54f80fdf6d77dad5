"""The shipped pair does tasks in a scene that neither of its halves was trained on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from openhelix.runtime.cli.main import main
from openhelix.system1.config import SHIPPED

# Of every kind that the pair does well; it does nine tenths of these.
TASKS = (
    "open_drawer",
    "close_drawer",
    "move_slider_left",
    "move_slider_right",
    "place_in_drawer",
    "push_into_drawer",
    "push_pink_block_right",
    "push_blue_block_right",
    "lift_red_block_drawer",
    "lift_pink_block_slider",
)
AT_LEAST = 6  # of ten


@pytest.mark.skipif(not SHIPPED.is_dir(), reason="no weights are shipped")
def test_told_by_system2_it_does_most_of_ten_tasks_in_the_held_out_scene(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["eval", "--suite", "tasks", "--scene", "D", "--tasks", ",".join(TASKS)]
    words += ["--episodes-per-task", "1", "--steps", "60", "--seed", "3", "--json"]
    words += ["--out", str(tmp_path / "found")]
    words += ["system2.engine.target=openhelix.system2.engines.transformers:TransformersEngine"]
    assert main(words) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["n_episodes"] == len(TASKS)
    done = [task for task, row in report["per_task"].items() if row["success_rate"] == 1.0]
    assert len(done) >= AT_LEAST, done
