"""The shipped pair does tasks in a scene that neither of its halves was trained on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from openhelix.benchmarks.calvin import phrases
from openhelix.benchmarks.evaluation.naming import NamingOptions, pictures
from openhelix.runtime.cli.main import main
from openhelix.runtime.control.assembly import make
from openhelix.runtime.core.config import load
from openhelix.runtime.core.interfaces import judged
from openhelix.system1.config import SHIPPED
from openhelix.system2 import model
from openhelix.system2.understanding import FILE

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
NO_TASK = ["do not open the drawer", "lift the umbrella", "sing"]
TRANSFORMERS = "system2.engine.target=openhelix.system2.engines.transformers:TransformersEngine"
judges = pytest.mark.skipif(
    not (model.SHIPPED / FILE).is_file(), reason="the shipped pair has no head that refuses"
)


@pytest.mark.skipif(not SHIPPED.is_dir(), reason="no weights are shipped")
def test_told_by_system2_it_does_most_of_ten_tasks_in_the_held_out_scene(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["eval", "--suite", "tasks", "--scene", "D", "--tasks", ",".join(TASKS)]
    words += ["--episodes-per-task", "1", "--steps", "60", "--seed", "3", "--json"]
    words += ["--out", str(tmp_path / "found")]
    words += [TRANSFORMERS]
    assert main(words) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["n_episodes"] == len(TASKS)
    done = [task for task, row in report["per_task"].items() if row["success_rate"] == 1.0]
    assert len(done) >= AT_LEAST, done


@judges
def test_what_names_no_task_is_refused_and_plain_sentences_are_not() -> None:
    plain = [(task, text) for task, texts in phrases.validation().items() for text in texts]
    shown = pictures(NamingOptions(sentences="validation"), tuple(task for task, _ in plain))
    engine = make(load(None, [TRANSFORMERS]).system2.engine)
    images = [shown[task] for task, _ in plain]
    texts = [text for _, text in plain]
    for said, refused in ((texts, False), (NO_TASK, True)):
        found = judged(engine, said, engine.encode(images[: len(said)], said))
        assert [t for t, j in zip(said, found, strict=True) if j.refused != refused] == []


@judges
def test_a_robot_that_is_told_what_names_no_task_holds(tmp_path: Path) -> None:
    words = ["run", "--no-ray", "control.clock=lockstep", TRANSFORMERS]
    words += ["tasks.instruction=do not open the drawer", "tasks.steps_limit=6"]
    words += ["control.hold_limit_s=1", "output.track=false", f"output.folder={tmp_path}"]
    assert main(words) in (0, 1)
    report = json.loads((tmp_path / "latest" / "report.json").read_text())
    assert report["latents_refused"] > 0 and report["tasks"][0]["refused"]
