"""`openhelix probe --sentences`: shares, confusions, pictures, and mistakes in one line."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from openhelix.benchmarks.calvin.phrases import PhraseError
from openhelix.benchmarks.calvin.tasks import TASK_NAMES
from openhelix.benchmarks.evaluation import naming
from openhelix.runtime.cli.main import main
from openhelix.runtime.core.config import ConfigError, RunConfig, System2Config
from openhelix.runtime.core.interfaces import F32
from openhelix.system1.latent_adapter import task_anchors, task_margin
from openhelix.system1.policy import DiffusionPolicy
from openhelix.system2.prompt import BadImage
from tests.system1.test_policy import tiny


class Understands:
    """An engine that says the task whose name is in the sentence; remembers the pictures."""

    def __init__(self, policy: DiffusionPolicy) -> None:
        anchors = task_anchors(policy.model)
        assert anchors is not None
        self.anchors = anchors.numpy()
        self.seen: list[tuple[Any, str]] = []

    def encode(self, images: Sequence[Any], instructions: Sequence[str]) -> F32:
        self.seen += zip(images, instructions, strict=True)
        return np.stack([self.anchors[TASK_NAMES.index(s.split()[-1])] for s in instructions])


@pytest.fixture(scope="module")
def policy() -> DiffusionPolicy:
    return DiffusionPolicy.build(tiny(latent_dim=128), 0)


def test_shares_and_confusions(policy: DiffusionPolicy) -> None:
    engine = Understands(policy)
    said = {
        "open_drawer": ("do open_drawer", "well open_drawer", "oh close_drawer", "so close_drawer"),
        "turn_on_led": tuple(f"{n} turn_on_led" for n in range(10)),
        "turn_off_led": ("1 turn_on_led",),
    }
    shown = {task: np.full((4, 4, 3), i, np.uint8) for i, task in enumerate(said)}
    made = naming.name_sentences(engine, policy, said, shown)
    assert made["n"] == 15
    assert made["named"] == pytest.approx(12 / 15, abs=1e-4)
    assert made["refused"] == 0
    assert made["per_task"]["open_drawer"] == {"named": 0.5, "refused": 0.0, "n": 4}
    assert made["per_task"]["turn_on_led"]["named"] == 1
    assert made["confusions"] == [
        {"task": "open_drawer", "as": "close_drawer", "count": 2, "example": "oh close_drawer"},
        {"task": "turn_off_led", "as": "turn_on_led", "count": 1, "example": "1 turn_on_led"},
    ]
    assert [int(image.max()) for image, _ in engine.seen] == [0] * 4 + [1] * 10 + [2]
    assert "80.0 %" in naming.page(made)


def test_what_is_hardly_nearer_to_a_task_than_to_none_is_refused(policy: DiffusionPolicy) -> None:
    engine = Understands(policy)
    latents = engine.encode([None, None], ["open_drawer", "turn_on_led"])
    margins = task_margin(policy.model, torch.from_numpy(latents))
    assert margins is not None
    between = float(margins.mean())
    expected = ["open_drawer", None] if margins[0] > margins[1] else [None, "turn_on_led"]
    assert naming.named(policy, latents, between) == expected
    assert naming.named(policy, latents) == ["open_drawer", "turn_on_led"]
    said = {"open_drawer": ("open_drawer",), "turn_on_led": ("turn_on_led",)}
    made = naming.name_sentences(engine, policy, said, dict.fromkeys(said), between)
    assert (made["named"], made["refused"], made["confusions"]) == (0.5, 0.5, [])


def test_a_policy_without_a_table_names_nothing() -> None:
    with pytest.raises(ConfigError, match="no task table"):
        naming.named(object(), np.zeros((1, 1, 4), np.float32))


def test_lists_and_files(tmp_path: Path) -> None:
    assert len(naming.sentences("development")) == len(naming.sentences("unseen")) == 34
    assert naming.sentences("validation")["turn_on_led"]
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"open_drawer": ["open it"]}))
    assert naming.sentences(str(path)) == {"open_drawer": ("open it",)}
    with pytest.raises(PhraseError, match="cannot be read"):
        naming.sentences(str(tmp_path / "none.json"))


def test_pictures_of_the_scene_or_one_for_all(tmp_path: Path) -> None:
    Image.new("RGB", (8, 6), (1, 2, 3)).save(tmp_path / "one.png")
    given = Namespace(image=tmp_path / "one.png", scene="D", seed=0)
    shown = naming.pictures(given, ("open_drawer", "turn_on_led"))
    assert shown["open_drawer"].shape == (6, 8, 3)
    with pytest.raises(BadImage, match="cannot read"):
        naming.pictures(Namespace(image=tmp_path / "no.png", scene="D", seed=0), ("open_drawer",))
    drawn = Namespace(image=None, scene="D", seed=0)
    first = naming.pictures(drawn, ("open_drawer", "close_drawer"))
    assert first["open_drawer"].shape == (200, 200, 3)
    assert not np.array_equal(first["open_drawer"], first["close_drawer"])
    assert np.array_equal(
        first["open_drawer"], naming.pictures(drawn, ("open_drawer",))["open_drawer"]
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sentences", "nowhere.json"], "nowhere.json: cannot be read"),
        (["--sentences", "validation", "--scene", "X"], "scene: 'X' is not one of A, B, C, D"),
        (["--sentences", "validation", "--picture"], "unknown option"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["probe", *words]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_blind_reaches_the_engine() -> None:
    config = RunConfig.model_validate({"system2": {"blind": True}})
    assert config.system2.engine.options["blind"] is True
    again = RunConfig.model_validate_json(config.model_dump_json())
    assert again.system2 == config.system2
    assert "blind" not in RunConfig().system2.engine.options
    with pytest.raises(ValueError, match=r"beside system2\.connect"):
        System2Config(blind=True, connect="tcp://10.0.0.1:5555")
