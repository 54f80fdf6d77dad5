"""`openhelix probe --sentences`: shares, confusions, pictures, and mistakes in one line."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from openhelix.benchmarks.calvin.phrases import PhraseError
from openhelix.benchmarks.calvin.tasks import TASK_NAMES
from openhelix.benchmarks.evaluation import naming
from openhelix.benchmarks.evaluation.referring import Referred, referred
from openhelix.runtime.cli.main import main
from openhelix.runtime.core.config import ConfigError, RunConfig, System2Config
from openhelix.runtime.core.interfaces import F32, Judgement
from openhelix.system1.latent_adapter import task_anchors
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


def test_what_system_2_does_not_understand_is_refused_whatever_its_latent_is_near_to(
    policy: DiffusionPolicy,
) -> None:
    class Doubts(Understands):
        def judge(self, instructions: Sequence[str], latents: np.ndarray) -> list[Judgement]:
            assert len(latents) == len(instructions)
            return [Judgement(0.1, "not" in s.split()) for s in instructions]

    said = {"open_drawer": ("open_drawer", "not open_drawer"), "denied": ("not turn_on_led",)}
    made = naming.name_sentences(Doubts(policy), policy, said, dict.fromkeys(said))
    assert (made["named"], made["refused"]) == (0.3333, 0.6667)
    assert made["per_task"]["denied"] == {"named": 0.0, "refused": 1.0, "n": 1}
    assert made["confusions"] == []
    again = naming.name_sentences(Understands(policy), policy, said, dict.fromkeys(said))
    assert again["refused"] == 0  # one without the verb understands everything


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
        (["--sentences", "validation", "--seed", "-1"], "--seed: input should be greater than or"),
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


def test_calvin_r_is_named_with_each_start_s_own_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """A System 2 that looks names all of it; one that is shown another picture does not."""
    episodes = referred(("A",), references=("toggle_led",))
    shades = {"turn_on_led": 10, "turn_off_led": 200}

    def drawn(asked: Sequence[Referred]) -> Iterator[tuple[Referred, np.ndarray]]:
        for episode in asked:
            yield episode, np.full((8, 8, 3), shades[episode.task], np.uint8)

    monkeypatch.setattr(naming, "referring_pictures", drawn)
    monkeypatch.setattr(naming, "referred", lambda *_: episodes)
    names = list(TASK_NAMES)

    class Looks:
        def encode(self, images: Sequence[np.ndarray], instructions: Sequence[str]) -> np.ndarray:
            lit = [image[0, 0, 0] > 100 for image in images]
            tasks = ["turn_off_led" if on else "turn_on_led" for on in lit]
            return np.array([[[names.index(task)]] for task in tasks], np.float32)

    def by_number(policy: object, latents: np.ndarray) -> list[str | None]:
        return [names[int(z[0, 0])] for z in latents]

    monkeypatch.setattr(naming, "named", by_number)
    options = naming.NamingOptions(sentences="calvin-r", scene="A")
    right = naming.name_references(Looks(), None, naming.seen_references(options))
    assert right["named"] == 1.0 and right["blind_chance"] == 0.5
    assert right["per_reference"] == {"toggle_led": {"named": 1.0, "refused": 0.0, "n": 2}}
    other = naming.NamingOptions(sentences="calvin-r", scene="A", shuffled=True)
    assert naming.name_references(Looks(), None, naming.seen_references(other))["named"] == 0.0


def test_what_calvin_r_and_other_lists_cannot_be_asked(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--image"):
        naming.main(["--sentences", "calvin-r", "--image", str(tmp_path / "x.png")])
    with pytest.raises(ConfigError, match=r"--shuffled"):
        naming.main(["--sentences", "seen", "--shuffled"])
