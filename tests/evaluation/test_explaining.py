"""`openhelix probe --recording` and `--run`: what mattered, what it was near to, and mistakes in a line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from openhelix.benchmarks.calvin.tasks import TASK_NAMES
from openhelix.benchmarks.evaluation import explaining
from openhelix.runtime.cli.main import main
from openhelix.runtime.core.config import ConfigError
from openhelix.runtime.core.interfaces import F32, CameraFrame, LatentGoal, LatentSpec
from openhelix.runtime.observe.recorder import FILE_NAME, InstructionRecord, RecordingWriter
from openhelix.runtime.observe.status_source import NoRun
from openhelix.system1.latent_adapter import task_anchors
from openhelix.system1.policy import DiffusionPolicy
from tests.evaluation.small import small_config
from tests.fakes import LATENT, PERIOD_NS
from tests.system1.test_policy import tiny


class Corner:
    """An engine whose latent turns with how bright the image's upper right corner is."""

    spec = LatentSpec("act_last", 1, 4)

    def encode(self, images: Sequence[Any], instructions: Sequence[str]) -> F32:
        angles = [float(np.asarray(image)[:20, 20:].mean()) / 255 for image in images]
        return np.array([[[np.cos(a), np.sin(a), 0, 0]] for a in angles], np.float32)


def image(bright: int) -> np.ndarray:
    made = np.full((40, 40, 3), 30, np.uint8)
    made[4:12, 26:34] = bright
    return made


def test_what_is_covered_and_turns_the_latent_is_what_mattered() -> None:
    found = np.array(explaining.occlusion(Corner(), image(250), "look", 4))
    assert found.shape == (4, 4) and (found[:, :2] < 1e-6).all() and (found[2:] < 1e-6).all()
    assert found[:2, 2:].min() > 1e-5  # its four parts hold the spot


def test_drift_confidence_and_what_is_recomputed() -> None:
    policy = DiffusionPolicy.build(tiny(latent_dim=128), 0)
    anchors = task_anchors(policy.model)
    assert anchors is not None

    class Says:
        spec = policy.spec.latent

        def encode(self, images: Sequence[Any], instructions: Sequence[str]) -> F32:
            return np.stack([anchors[TASK_NAMES.index(s)].numpy() for s in instructions])

    a, b = TASK_NAMES[3], TASK_NAMES[5]
    seen = [
        explaining.Seen(float(i), text, image(90), z, 0.9, False)
        for i, (text, z) in enumerate([(a, None), (b, None), (b, anchors[3].numpy())])
    ]
    rows = explaining.explain(seen, Says(), policy, 0)
    assert [row["tasks"][0]["task"] for row in rows] == [a, b, a]
    assert all(1 >= row["tasks"][0]["confidence"] > row["tasks"][1]["confidence"] for row in rows)
    assert rows[0]["drift"] == {"first": 1.0, "before": 1.0}
    assert rows[1]["drift"]["first"] == rows[1]["drift"]["before"] < 0.999
    assert rows[2]["drift"]["first"] == pytest.approx(1.0, abs=1e-5)
    assert rows[1]["recomputed"] == 1.0 and rows[2]["recomputed"] < 0.999
    assert all(row["map"] is None for row in rows)


def record(folder: Path, count: int = 5, camera: str = "static") -> Path:
    """A recording of a few latents, as the small parts would give them."""
    config = small_config().model_dump(mode="json")
    writer = RecordingWriter(folder / FILE_NAME, {"config": config})
    writer.put("/instruction", 0, InstructionRecord(1, "turn_on_led", "press the button"))
    for i in range(count):
        t_ns = (i + 1) * 10 * PERIOD_NS
        frame = CameraFrame(t_ns, image(50 * i), None, np.eye(3), np.eye(4))
        writer.put_frame(camera, frame)
        z = np.full((1, LATENT.dim), 0.1 * (i + 1), np.float32)
        refused = i == 2
        goal = LatentGoal(z, i, 1, t_ns, t_ns, LATENT.spec_id, understood=0.9, refused=refused)
        writer.put("/latent", t_ns + PERIOD_NS, goal)
    writer.finish({"complete": True, "records": writer.records})
    return folder


def test_a_recordings_latents_come_with_their_images(tmp_path) -> None:
    found = explaining.recorded(record(tmp_path), small_config(), 3)
    assert [round(s.t_s * 30) for s in found] == [0, 20, 40]  # evenly, first and last among them
    assert [int(s.image.max()) for s in found] == [30, 100, 200]
    assert [s.refused for s in found] == [False, True, False]
    assert {s.instruction for s in found} == {"press the button"}
    assert len(explaining.recorded(tmp_path, small_config(), 99)) == 5
    other = record(tmp_path / "other", camera="gripper")
    with pytest.raises(ConfigError, match="no latent with its image"):
        explaining.recorded(other, small_config(), 3)


def test_the_command_writes_one_picture_and_says_what_is_in_it(tmp_path, capsys) -> None:
    folder, out = record(tmp_path), tmp_path / "out"
    words = ["--recording", str(folder), "--latents", "2", "--grid", "2", "--out", str(out)]
    assert main(["probe", *words, "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["spec_id"] == LATENT.spec_id and len(made["latents"]) == 2
    first = made["latents"][0]
    assert first["tasks"] is None and first["understood"] == 0.9  # this policy has no table
    assert np.shape(first["map"]) == (2, 2) and "image" not in first
    with Image.open(made["picture"]) as picture:
        assert picture.size[0] > 1000 and len(picture.getcolors(1 << 24)) > 100
    assert main(["probe", *words]) == 0
    assert "understood (90 %)" in capsys.readouterr().out


def test_what_nobody_judged_is_not_said_to_be_understood() -> None:
    row = {"instruction": "go", "drift": {"first": 1.0, "before": 1.0}, "refused": False}
    assert explaining.said(row | {"understood": 1.0}).startswith("'go'\n")
    assert explaining.said(row | {"understood": 0.98}).startswith("'go': understood (98 %)\n")
    refused = row | {"refused": True, "understood": 0.02}
    assert explaining.said(refused).startswith("'go': refused (2 %)\n")


def test_a_map_of_next_to_nothing_says_so_and_is_dark(tmp_path: Path) -> None:
    row = {
        "t_s": 0.0, "instruction": "go", "understood": None, "refused": False, "tasks": None,
        "drift": {"first": 1.0, "before": 1.0}, "image": np.zeros((40, 40, 3), np.uint8),
    }  # fmt: skip
    shown = []
    for most in (0.0001, 0.5):
        explaining.picture([row | {"map": [[0.0, most], [0.0, 0.0]]}], tmp_path / "made.png")
        with Image.open(tmp_path / "made.png") as made:
            shown.append(np.asarray(made.convert("RGB"), int)[40:220, 340:680])
    bright = [int((part[..., 0] > part[..., 2] + 60).sum()) for part in shown]
    assert bright[0] == 0 < bright[1]


def test_a_run_gives_its_newest_latents_once_each(monkeypatch) -> None:
    answers = [
        {},
        {"seq": 4, "rgb": image(10), "t_obs_ns": 0},
        {"seq": 4, "rgb": image(10), "t_obs_ns": 0},
        {"seq": 5, "t_obs_ns": 3},  # its image is no longer at hand
        {"seq": 6, "rgb": image(20), "t_obs_ns": 10**9},
        NoRun("it has ended"),
    ]
    more = {"spec_id": LATENT.spec_id, "instruction": "go", "understood": 1.0, "refused": False}
    more["z"] = np.ones((1, LATENT.dim), np.float32)

    class Source:
        def __init__(self, *_: Any) -> None: ...
        def close(self) -> None: ...
        def latent(self) -> dict[str, Any]:
            found = answers.pop(0)
            if isinstance(found, Exception):
                raise found
            return found | more if found else {}

    monkeypatch.setattr(explaining, "RunSource", Source)
    monkeypatch.setattr(explaining, "LOOK_S", 0.0)
    options = explaining.ExplainOptions(run="newest", latents=5)
    kept = list(answers)
    found = list(explaining.running(options, small_config(), LATENT.spec_id))
    assert [(s.t_s, int(s.image.max())) for s in found] == [(0.0, 30), (1.0, 30)]
    answers[:] = kept
    with pytest.raises(ConfigError, match="its latents are of"):
        list(explaining.running(options, small_config(), "another"))
    answers[:] = [NoRun("nobody")]
    with pytest.raises(NoRun):
        list(explaining.running(options, small_config(), LATENT.spec_id))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--recording", "x", "--run", "newest"), "one of them"),
        (("--recording", "/nowhere"), "no recording there"),
        (("--run", "newest", "--grid", "99"), "--grid 0 to 32"),
    ],
)
def test_mistakes_are_one_line(words, message, capsys) -> None:
    assert main(["probe", *words]) == 2
    said = capsys.readouterr().err.strip()
    assert message in said and "\n" not in said
