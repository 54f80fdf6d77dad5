"""Collections: resumable, equal for equal seeds, honest about what is in them."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import settings as property_settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from openhelix.benchmarks.calvin import collect as frames_module
from openhelix.benchmarks.calvin import collect as module
from openhelix.benchmarks.calvin.collect import (
    CollectConfig,
    collect,
    demonstrations,
    draw,
    main,
)
from openhelix.benchmarks.calvin.dataset import Dataset
from openhelix.benchmarks.calvin.demonstrations import Demonstration
from openhelix.benchmarks.calvin.frames import FramesConfig, chosen_steps, instructions, usable_rows
from openhelix.benchmarks.calvin.phrases import training
from openhelix.benchmarks.calvin.tasks import TASK_NAMES
from openhelix.benchmarks.calvin.units import collect_unit, read_unit, unit_bytes
from openhelix.runtime.core.config import ConfigError
from openhelix.runtime.core.files import BadFile
from openhelix.runtime.core.paths import cache_folder
from openhelix.system1.data import Cache

TASKS = ("turn_on_led", "open_drawer", "place_in_drawer")


def config(folder: Path, **changes: object) -> CollectConfig:
    values: dict = {"out": folder, "scenes": "A", "tasks": TASKS, "per_task": 1, "jobs": 1}
    return CollectConfig(**{**values, **changes})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """A small collection of two units with its frames, and its card."""
    folder = tmp_path_factory.mktemp("collection") / "data"
    settings = config(folder, per_task=2, frames=FramesConfig(every=6, system2_px=25))
    card = collect(settings)
    return folder, card | draw(settings)


def test_a_unit_has_one_success_of_every_task(made: tuple[Path, dict]) -> None:
    folder, card = made
    for path in sorted((folder / "units").glob("*.npz")):
        about, found = read_unit(path)
        assert sorted(d.task for d in found) == sorted(TASKS)
        for row, d in zip(about["demonstrations"], found, strict=True):
            assert d.success and 0 < d.steps <= 64 and d.scene == "A"
            assert d.instruction in training()[d.task]
            assert len(d.states) == len(d.targets) + 1 == row["steps"] + 1
    assert card["demonstrations"] == 6
    assert card["steps"] == sum(len(d.targets) for d in demonstrations(folder))


def test_the_card_vouches_for_every_file(made: tuple[Path, dict]) -> None:
    folder, card = made
    for name, digest in card["files"].items():
        assert hashlib.sha256((folder / "units" / name).read_bytes()).hexdigest() == digest
    assert len(card["files"]) == 2 and card["frames_files"] == 2
    assert len(card["frames_sha256"]) == 64
    assert 0.0 <= card["expert_success"] <= 1.0


def test_equal_seeds_give_equal_units() -> None:
    first = collect_unit("B", 3, TASKS, seed=9)
    again = collect_unit("B", 3, TASKS, seed=9)
    other = collect_unit("B", 3, TASKS, seed=10)
    assert unit_bytes(first) == unit_bytes(again) != unit_bytes(other)


def test_a_killed_collection_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(tmp_path / "data", per_task=2, tasks=("turn_on_led",))
    real, calls = module.write_unit, []

    def dies_second(*args: object) -> int:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "write_unit", dies_second)
    with pytest.raises(KeyboardInterrupt):
        collect(settings)
    (tmp_path / "data" / "units" / ".A_00001.npz.123.part").write_bytes(b"torn")
    kept = {p: p.read_bytes() for p in (tmp_path / "data" / "units").glob("*.npz")}
    monkeypatch.setattr(module, "write_unit", real)
    card = collect(settings)
    assert card["new_units"] == 1 and card["demonstrations"] == 2
    assert all(p.read_bytes() == data for p, data in kept.items())
    assert not list((tmp_path / "data" / "units").glob(".*"))


def test_foreign_folders_are_left_alone(tmp_path: Path, made: tuple[Path, dict]) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="other data"):
        collect(config(tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]
    before = sorted(p.name for p in made[0].rglob("*"))
    for change in ({"seed": 5}, {"scenes": "B"}, {"tasks": ("open_drawer",)}):
        with pytest.raises(ConfigError, match="begun with"):
            collect(config(made[0], **change))
    assert sorted(p.name for p in made[0].rglob("*")) == before


def test_the_cache_shows_what_was_done(made: tuple[Path, dict]) -> None:
    folder, _ = made
    cache = Cache(folder / "frames")
    tensors = load_file(folder / "frames" / "A_00000.safetensors")
    _, found = read_unit(folder / "units" / "A_00000.npz")
    n = len(tensors["task"])
    assert tensors["rgb.static"].shape == (n, 100, 100, 3)
    assert tensors["rgb.gripper"].shape == (n, 84, 84, 3)
    for i in range(n):
        d, step = found[tensors["episode"][i] % 100], int(tensors["step"][i])
        rows = int(tensors["target_mask"][i].sum())
        assert rows >= 4 and tensors["target_mask"][i, :rows].all()
        sent = d.targets[step : step + rows]
        assert np.array_equal(tensors["target_pose"][i, :rows], sent[:, :7])
        assert np.array_equal(tensors["target_open"][i, :rows], sent[:, 7])
        assert np.array_equal(tensors["proprio"][i, 0], d.proprio[step])
        at = [np.flatnonzero((d.proprio[:, :7] == p).all(1)) for p in tensors["keypose_pose"][i]]
        change = at[1][-1]  # the gripper keeps its state until there, or to the end
        assert at[0][-1] > step or step > d.steps - 4
        assert change >= step or change == len(d.targets) - 1
        assert len(set(d.targets[step : max(change, step + 1), 7])) == 1
        assert tensors["keypose_open"][i, 1] == d.targets[change, 7]
        assert TASK_NAMES[tensors["task"][i]] == d.task
        assert instructions()[tensors["instruction"][i]] == d.instruction
        assert tensors["steps_left"][i] == d.steps - step
    assert cache.task[:n].tolist() == tensors["task"].tolist()
    assert cache.meta["instructions"][int(tensors["instruction"][0])] in training()[found[0].task]


def test_a_batch_comes_out_of_the_cache(made: tuple[Path, dict]) -> None:
    cache = Cache(made[0] / "frames")
    batch = cache.batch(torch.arange(5), torch.Generator().manual_seed(0))
    assert batch.rows.shape == (5, 16, 9) and batch.inputs.rgb[0].shape == (5, 3, 100, 100)
    first = batch.rows[:, 0, :3].norm(dim=-1)
    assert (first < 0.09).all()  # the next target is near the tool
    points = batch.inputs.xyz[0].permute(0, 2, 3, 1)[:, 40:60, 40:60].reshape(-1, 3)
    middle = points.median(0).values  # the static camera looks at the middle of the table
    assert (middle - torch.tensor([0.0, -0.05, 0.45])).norm() < 0.25


def test_system2_sees_the_same_moments(made: tuple[Path, dict]) -> None:
    folder = made[0] / "frames"
    for name in ("A_00000", "A_00001"):
        ours = load_file(folder / f"{name}.safetensors")["rgb.static"].astype(float)
        theirs = load_file(folder / "system2" / f"{name}.safetensors")["rgb"].astype(float)
        assert theirs.shape == (len(ours), 25, 25, 3)
        coarse = ours.reshape(len(ours), 25, 4, 25, 4, 3).mean((2, 4))
        assert np.abs(coarse - theirs).mean() < 6.0


def test_touch_is_drawn_beside_frames_that_are_there(made: tuple[Path, dict]) -> None:
    folder, card = made
    settings = config(folder, per_task=2, frames=FramesConfig(every=6, system2_px=25))
    stamps = {p: p.stat().st_mtime_ns for p in (folder / "frames").glob("*.safetensors")}
    felt = config(folder, per_task=2, frames=settings.frames.model_copy(update={"tactile": True}))
    try:
        assert draw(felt)["frames"] == card["frames"]
        assert all(p.stat().st_mtime_ns == t for p, t in stamps.items())
        cache = Cache(folder / "frames")
        assert cache.cameras == ["static", "gripper", "tactile"]
        rgb = cache.gather("rgb.tactile", torch.arange(len(cache)))
        assert rgb.shape == (len(cache), 24, 48, 3)
        grasps = torch.tensor([cache.meta["tasks"][t] == "place_in_drawer" for t in cache.task])
        dents = rgb[..., 2].float().mean((1, 2))
        assert dents[grasps].max() > 100 and dents[~grasps].median() == 0
        batch = cache.batch(torch.arange(4), torch.Generator().manual_seed(0))
        assert batch.inputs.rgb[2].shape == (4, 3, 24, 48)
    finally:
        draw(settings)  # the index as the other tests know it
    assert Cache(folder / "frames").cameras == ["static", "gripper"]
    draw(felt)
    torn = folder / "frames" / "tactile" / "A_00001.safetensors"
    torn.write_bytes(torn.read_bytes()[:100])
    with pytest.raises(BadFile, match="tactile/A_00001"):
        Cache(folder / "frames")
    draw(settings)


def test_frames_are_not_drawn_twice_nor_beyond_the_limit(made: tuple[Path, dict]) -> None:
    folder, card = made
    settings = config(folder, per_task=2, frames=FramesConfig(every=6, system2_px=25))
    stamps = {p: p.stat().st_mtime_ns for p in (folder / "frames").iterdir()}
    assert draw(settings)["frames"] == card["frames"]
    assert all(p.stat().st_mtime_ns == t for p, t in stamps.items() if p.suffix == ".safetensors")
    with pytest.raises(ConfigError, match="other settings"):
        draw(config(folder, frames=FramesConfig(every=2)))


def test_frames_can_be_trained_on_while_they_are_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A killed drawing leaves an index of what is complete, System 2's images included."""
    settings = config(tmp_path / "data", per_task=2, tasks=("turn_on_led",))
    settings = settings.model_copy(update={"frames": FramesConfig(every=6, system2_px=20)})
    collect(settings)
    real, calls = frames_module.draw_unit, []

    def dies_second(*args: object) -> bytes:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(frames_module, "INDEX_EVERY", 1)
    monkeypatch.setattr(frames_module, "draw_unit", dies_second)
    with pytest.raises(KeyboardInterrupt):
        draw(settings)
    folder = tmp_path / "data" / "frames"
    index = json.loads((folder / "cache.json").read_text())
    assert [shard["file"] for shard in index["shards"]] == ["A_00000.safetensors"]
    monkeypatch.setattr(frames_module, "draw_unit", real)
    card = draw(settings)
    assert card["frames_files"] == 2 and len(Cache(folder)) == card["frames"]
    images = folder / "system2" / "A_00001.safetensors"
    before = images.read_bytes()
    images.unlink()  # drawn alone they are the same
    assert draw(settings)["frames_files"] == 2 and images.read_bytes() == before


def test_too_many_frames_are_refused_before_any_is_drawn(tmp_path: Path) -> None:
    settings = config(tmp_path / "data", tasks=("turn_on_led",), frames=FramesConfig(max_gb=1e-6))
    collect(settings)
    with pytest.raises(ConfigError, match="max_gb"):
        draw(settings)
    assert not (tmp_path / "data" / "frames").exists()


def test_pushed_moments_keep_only_their_own_targets() -> None:
    clean = np.ones(30, bool)
    clean[10:14] = False
    done = Demonstration(
        "open_drawer", "A", True, 28, np.zeros((31, 36)), np.zeros((31, 9), np.float32),
        np.zeros((30, 8), np.float32), np.zeros((30, 7), np.float32), clean,
    )  # fmt: skip
    assert usable_rows(done, 0) == 11  # the target sent while the push begins is still meant
    assert usable_rows(done, 11) == 1
    assert usable_rows(done, 14) == 16
    steps = chosen_steps(done, FramesConfig(every=1), np.random.default_rng(0))
    assert set(steps) == {*range(8), *range(14, 27)}


def test_calvins_layout_can_be_read_back(tmp_path: Path) -> None:
    settings = config(tmp_path / "data", tasks=("turn_on_led",), format="calvin", compress=False)
    from openhelix.benchmarks.calvin.collect import export_calvin

    card = export_calvin(settings)
    data = Dataset(tmp_path / "data" / "training")
    (note,), _ = data.annotations()
    assert note.task == "turn_on_led" and note.text in training()["turn_on_led"]
    assert data.episodes[0, 1] + 1 == card["frames"]["training"]
    first = data.frame(0)
    assert first["rgb_static"].shape == (200, 200, 3) and first["robot_obs"].shape == (15,)
    assert np.abs(first["rel_actions"]).max() <= 1.0
    (done,) = demonstrations(tmp_path / "data" / "states")
    assert first["robot_obs"][:3] == pytest.approx(done.proprio[0, :3])
    (poses,) = json.loads((tmp_path / "data" / "training" / "keyposes.json").read_text())
    assert poses[-1] == len(done.proprio) - 1


@pytest.mark.parametrize(
    ("words", "field"),
    [
        (["scenes=AX"], "scenes"),
        (["tasks=[fly]"], "tasks"),
        (["per_task=0"], "per_task"),
        (["jbos=2"], "jobs"),
        (["--frobnicate"], "frobnicate"),
        (["frames.every=-1"], "frames.every"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_bad_words_get_one_line(words: list[str], field: str) -> None:
    with pytest.raises(ConfigError, match=field) as caught:
        main(words)
    assert "\n" not in str(caught.value)


def test_words_become_settings(tmp_path: Path, monkeypatch) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("scenes: D\nper_task: 3\n")
    given: list[CollectConfig] = []
    monkeypatch.setattr(module, "collect", lambda config, report: given.append(config) or {})
    main(["--config", str(file), "per_task=4", "--json", "frames.every=0"])
    (settings,) = given
    assert settings.scenes == "D" and settings.per_task == 4
    assert settings.frames.every == 0
    assert settings.folder == cache_folder() / "data" / "demonstrations_D"


def test_main_prints_one_json_object(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    words = ["scenes=A", "tasks=[turn_on_led]", "per_task=1", "jobs=1", "frames.every=0"]
    assert main([*words, f"out={tmp_path / 'data'}", "--json"]) == 0
    card = json.loads(capsys.readouterr().out)
    assert card["demonstrations"] == 1 and card["folder"] == str(tmp_path / "data")


# -- Damage, and a full disk -----------------------------------------------------------


def stored(folder: Path, **changes: object) -> Path:
    """A unit with one demonstration, parts of it changed; None leaves an array out."""
    about = {
        "scene": "A",
        "number": 0,
        "demonstrations": [
            {"task": "open_drawer", "success_step": 3, "steps": 4, "instruction": "open it"}
        ],
        **{name: {} for name in ("tried", "failed", "no_start")},
    }
    arrays: dict = {
        "states": np.zeros((5, 36), np.float32),
        "proprio": np.zeros((5, 9), np.float32),
        "targets": np.zeros((4, 8), np.float32),
        "relative": np.zeros((4, 7), np.float32),
        "clean": np.ones(4, bool),
    }
    text = changes.pop("text", None)
    row = about["demonstrations"][0]
    for name, value in changes.items():
        if name in arrays:
            arrays[name] = value
        else:
            (about if name in about else row)[name] = value
    text = json.dumps(about).encode() if text is None else text
    kept = {k: v for k, v in arrays.items() if v is not None}
    np.savez_compressed(folder / "u.npz", about=np.frombuffer(text, np.uint8), **kept)
    return folder / "u.npz"


def test_a_whole_unit_is_read(tmp_path: Path) -> None:
    about, (found,) = read_unit(stored(tmp_path))
    assert (about["scene"], found.task, found.steps) == ("A", "open_drawer", 3)
    assert found.states.shape == (5, 36) and found.clean.shape == (4,)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"text": b"{"}, "about: not JSON"),
        ({"text": b"[]"}, "about: holds list"),
        ({"text": b"{}"}, "about: scene"),
        ({"demonstrations": "x"}, "about: demonstrations"),
        ({"demonstrations": [3]}, "about: demonstrations.0"),
        ({"steps": "4"}, "about: demonstrations.0.steps"),
        ({"steps": -4}, "about: open_drawer: 3 of -4 steps"),
        ({"steps": 10**12}, "states: float32(5, 36), needs"),
        ({"task": "fly"}, "about: task: 'fly' is none"),
        ({"states": None}, "no states"),
        ({"states": np.zeros((2, 36), np.float32)}, "states: float32(2, 36), needs (5, 36)"),
        ({"states": np.zeros((5, 7), np.float32)}, "states: float32(5, 7), needs (5, 36)"),
        ({"targets": np.zeros((9, 8), np.float32)}, "targets: float32(9, 8), needs (4, 8)"),
        ({"targets": np.full((4, 8), np.nan, np.float32)}, "targets has values that are not"),
        ({"clean": np.ones(4, np.float32)}, "clean: float32(4,), needs (4,)"),
    ],
)
def test_a_damaged_unit_is_named(tmp_path: Path, changes: dict, said: str) -> None:
    path = stored(tmp_path, **changes)
    with pytest.raises(BadFile) as caught:
        read_unit(path)
    assert str(caught.value).startswith(f"{path}: ") and said in str(caught.value)


@property_settings(deadline=None, max_examples=60)
@given(st.data())
def test_no_cut_or_changed_unit_is_more_than_one_line(tmp_path_factory, data) -> None:
    path = stored(tmp_path_factory.mktemp("fuzz"))
    whole = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(0, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(whole[: data.draw(st.integers(0, len(whole)))]))
    try:
        read_unit(path)
    except BadFile as error:
        said = str(error)
    else:
        said = str(path)
    assert str(path) in said and "\n" not in said


WORLD = 'from openhelix.benchmarks.calvin.env import PlayTableEnv; PlayTableEnv("A").close()'
LIMITED = """
import resource, sys
from openhelix.runtime.cli.main import main
limit = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
raise SystemExit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize("refused", ["collection.json", "units/A_00000.npz", "the cache"])
def test_a_full_disk_ends_a_collection_in_one_line_that_names_the_file(
    tmp_path: Path, refused: str
) -> None:
    out, cache = tmp_path / "data", tmp_path / "cache"
    words = ["collect", "--json", f"out={out}", "scenes=A", "tasks=[turn_on_led]", "per_task=1"]
    if refused != "the cache":
        cache = cache_folder()
        # What the simulator keeps there is there, in a process of its own: this one remembers what
        # it has written, and does not write it again where another test has moved the cache.
        subprocess.run([sys.executable, "-c", WORLD], check=True, timeout=300)
    limit = 100 if refused == "collection.json" else 1000
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(limit), *words, "jobs=1", "frames.every=0"],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OPENHELIX_CACHE": str(cache)},
    )
    assert done.returncode == 1 and done.stdout == ""
    if refused == "the cache":
        assert re.fullmatch(
            rf"openhelix collect: {cache}/playtable/.+: File too large",
            done.stderr.splitlines()[-1],
        )
        assert not [path for path in cache.rglob(".*") if path.is_file()]
    else:
        last = f"openhelix collect: {out}/{refused}: File too large"
        assert done.stderr.splitlines()[-1] == last
    assert "Traceback" not in done.stderr
    assert not list(out.rglob("*.part"))
    # The same command goes on once there is room.
    assert main([*words[1:], "jobs=1", "frames.every=0"]) == 0


def test_when_a_collection_is_killed_its_processes_end() -> None:
    work = (
        "import time\n"
        "from openhelix.benchmarks.calvin.collect import pooled\n"
        "for _ in pooled(time.sleep, [(0.0,), (600.0,)], 2):\n"
        "    print(flush=True)"
    )
    parent = subprocess.Popen([sys.executable, "-c", work], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    parent.stdout.readline()  # one of them has begun, and waits for more
    children = psutil.Process(parent.pid).children()
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs(children, timeout=20)
    for child in alive:
        child.kill()
    parent.stdout.close()
    assert len(children) >= 2 and not alive
