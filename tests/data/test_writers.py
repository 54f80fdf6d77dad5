"""Datasets written in other layouts come back as they were, from other projects' readers too."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from mcap.reader import make_reader
from mcap_protobuf.decoder import DecoderFactory

from openhelix.benchmarks.calvin import dataset as layout
from openhelix.benchmarks.calvin.dataset import Annotation
from openhelix.benchmarks.calvin.tasks import TASK_NAMES
from openhelix.benchmarks.data.source import DataError, Source, open_source
from openhelix.benchmarks.data.writers import convert
from openhelix.runtime.cli.main import main
from tests.data.small import LED, OPEN, annotate, as_published, write_split

NAMES = ["static", "gripper"]


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "training"
    return as_published(write_split(folder, ((OPEN, LED), (OPEN,))))


def written(split: Path, out: Path, kind: str, **more: Any) -> Source:
    said: list[str] = []
    convert(open_source(split), out, kind, said.append, **more)
    assert "3 episodes, 59 frames" in said[0] or "2 episodes" in said[-1]
    return open_source(out)


def same_segment(
    a: Source, number: int, b: Source, other: int, colour: float, far: float, actions: int = 100
) -> None:
    """Compare everything that two sources say of one segment, and its first `actions` actions."""
    one, two = a.segments[number], b.segments[other]
    assert (one.text, one.task) == (two.text, two.task)
    left, right = a.motion(one.first, one.last), b.motion(two.first, two.last)
    for name in ("proprio", "targets"):
        x, y = getattr(left, name)[:actions], getattr(right, name)[:actions]
        sign = np.sign((x[:, 3:7] * y[:, 3:7]).sum(1, keepdims=True))  # q and -q are one rotation
        np.testing.assert_allclose(x[:, 3:7], sign * y[:, 3:7], atol=1e-6)
        np.testing.assert_allclose(
            np.delete(x, range(3, 7), 1), np.delete(y, range(3, 7), 1), atol=1e-6
        )
    np.testing.assert_allclose(left.relative[:actions], right.relative[:actions], atol=2e-5)
    steps = [0, 3, 4, one.last - one.first]
    for was, now in zip(
        a.views([one.first + s for s in steps], NAMES),
        b.views([two.first + s for s in steps], NAMES),
        strict=True,
    ):
        for name in NAMES:
            assert np.abs(was[name].rgb.astype(int) - now[name].rgb).mean() <= colour
            np.testing.assert_allclose(was[name].depth, now[name].depth, atol=far)
            np.testing.assert_allclose(was[name].K, now[name].K, atol=1e-6)
            np.testing.assert_allclose(was[name].T_world_cam, now[name].T_world_cam, atol=1e-6)


@pytest.mark.parametrize("video", [True, False])
def test_lerobot_comes_back(split: Path, tmp_path: Path, video: bool) -> None:
    made, source = written(split, tmp_path / "out", "lerobot", video=video), open_source(split)
    assert (made.layout, made.hz, made.tasks) == ("LeRobot", 30.0, TASK_NAMES)
    assert made.spans.tolist() == [[0, 19], [20, 38], [39, 58]] and made.problems() == []
    for number in range(3):
        # random squares lose some of their colour in a video; another frame's differ by 85
        same_segment(source, number, made, number, 15.0 if video else 0.0, 1.1e-4)
    assert bool(list((tmp_path / "out" / "videos").rglob("*.mp4"))) == video


def test_lerobots_own_index_is_whole(split: Path, tmp_path: Path) -> None:
    written(split, tmp_path, "lerobot")
    info = json.loads((tmp_path / "meta" / "info.json").read_text())
    assert (info["codebase_version"], info["total_episodes"], info["total_frames"]) == (
        "v3.0",
        3,
        59,
    )
    data = pq.read_table(tmp_path / info["data_path"].format(chunk_index=0, file_index=0))
    assert set(data.column_names) == {
        name for name, feature in info["features"].items() if feature["dtype"] != "video"
    }
    assert data["index"].to_pylist() == list(range(59))
    episodes = pq.read_table(tmp_path / "meta/episodes/chunk-000/file-000.parquet").to_pylist()
    assert [(e["dataset_from_index"], e["dataset_to_index"]) for e in episodes] == [
        (0, 20), (20, 39), (39, 59),
    ]  # fmt: skip
    key = "videos/observation.images.static/from_timestamp"
    assert [e[key] for e in episodes] == pytest.approx([0, 20 / 30, 39 / 30])
    stats = json.loads((tmp_path / "meta" / "stats.json").read_text())
    rows = np.array(data["action"].to_pylist())
    np.testing.assert_allclose(stats["action"]["mean"], rows.mean(0), atol=1e-6)
    np.testing.assert_allclose(stats["action"]["std"], rows.std(0), atol=1e-6)
    assert np.shape(stats["observation.images.static"]["mean"]) == (3, 1, 1)
    (table,) = (json.loads(pq.read_schema(tmp_path / "meta/tasks.parquet").metadata[b"pandas"]),)
    assert table["index_columns"] == ["__index_level_0__"]


def test_lerobots_own_reader_takes_it(split: Path, tmp_path: Path) -> None:
    dataset = pytest.importorskip("lerobot.datasets.lerobot_dataset")
    written(split, tmp_path, "lerobot", video=False)
    read = dataset.LeRobotDataset("openhelix/test", root=tmp_path)
    source = open_source(split)
    assert len(read) == 59 and read.num_episodes == 3
    item = read[25]
    assert item["task"] == LED[3]
    motion = source.motion(15, 15)
    np.testing.assert_allclose(item["action"].numpy(), motion.targets[0], atol=1e-6)
    view = next(source.views([15], ["static"]))["static"]
    rgb = item["observation.images.static"].permute(1, 2, 0).numpy() * 255
    np.testing.assert_allclose(rgb, view.rgb, atol=0.5)


def test_calvins_layout_comes_back(split: Path, tmp_path: Path) -> None:
    made, source = written(split, tmp_path / "out", "calvin"), open_source(split)
    assert made.spans.tolist() == source.spans.tolist()
    for number in range(3):
        same_segment(source, number, made, number, 0.0, 0.0)
    for index in (0, 17):  # CALVIN's own arrays too
        with (
            np.load(split / layout.frame_name(index)) as was,
            np.load(tmp_path / "out" / layout.frame_name(index)) as now,
        ):
            for name in ("actions", "rel_actions", "robot_obs", "scene_obs"):
                np.testing.assert_array_equal(was[name], now[name])


def test_a_long_way_round_ends_where_it_began(split: Path, tmp_path: Path) -> None:
    written(split, tmp_path / "a", "lerobot", video=False)
    said: list[str] = []
    convert(open_source(tmp_path / "a"), tmp_path / "b", "calvin", said.append)
    assert "scene_obs are unknown" in said[-1]
    back = open_source(tmp_path / "b")
    # CALVIN's actions are where the hand was one frame later, and the episode's last frame has none
    same_segment(open_source(split), 1, back, 1, 0.0, 1.1e-4, actions=18)


def test_mcap_is_read_by_mcaps_own_reader(split: Path, tmp_path: Path) -> None:
    made, source = written(split, tmp_path / "out", "mcap"), open_source(split)
    for number in range(3):
        same_segment(source, number, made, number, 0.0, 0.0)
    with (tmp_path / "out" / "episode-000001.mcap").open("rb") as stream:
        reader = make_reader(stream, decoder_factories=[DecoderFactory()])
        images = list(reader.iter_decoded_messages(topics=["/camera/static/rgb"]))
        said = [json.loads(m.data) for _, _, m in reader.iter_messages(topics=["/instruction"])]
    assert len(images) == 19 and said[0]["text"] == LED[3] and said[0]["task"] == LED[2]
    view = next(source.views([12], ["static"]))["static"]
    image = images[2].decoded_message
    assert image.encoding == "rgb8" and bytes(image.data) == view.rgb.tobytes()
    assert images[2].message.log_time == pytest.approx(2e9 / 30, abs=1)


def test_what_a_layout_has_no_place_for_is_told(
    split: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("mine")
    assert main(["data", "convert", str(split), f"out={tmp_path / 'full'}"]) == 2
    assert "full is there already; name a new folder" in capsys.readouterr().err
    own = as_published(write_split(tmp_path / "own", ((OPEN,),)))
    annotate(
        own, [Annotation(0, 9, "fold_towel", "fold it"), Annotation(0, 9, "open_drawer", "fold it")]
    )
    with pytest.raises(DataError, match="task 'fold_towel' is none of CALVIN's 34"):
        convert(open_source(own), tmp_path / "c", "calvin", lambda text: None)
    with pytest.raises(DataError, match="'fold it' stands for fold_towel and open_drawer"):
        convert(open_source(own), tmp_path / "l", "lerobot", lambda text: None)


def test_the_command_says_what_it_made(
    split: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["data", "convert", str(split), str(out), "format=mcap"]
    assert main([*words, f"out={out}"]) == 2
    assert "out: " in (said := capsys.readouterr().err) and "one folder too many" in said
    assert main([*words, "--json"]) == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["episodes"] == 3
    assert re.search(r"3 episodes, 59 frames, 0\.00 GB", told.err) and "3 of 3" in told.err
