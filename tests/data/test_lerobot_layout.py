"""LeRobot's datasets: versions 2.1 and 3.0, what their numbers are, and what is wrong with them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.spatial.transform import Rotation

from openhelix.benchmarks.data.build import Build, CacheSettings
from openhelix.benchmarks.data.inspect import as_text, report
from openhelix.benchmarks.data.source import DataError, open_source
from openhelix.benchmarks.data.writers import convert
from openhelix.system1.data import Cache
from tests.data.small import LED, OPEN, as_published, write_split

TOP = "observation.images.top"
STATE = ["ee.x", "ee.y", "ee.z", "ee.roll", "ee.pitch", "ee.yaw", "gripper"]


def write_v21(folder: Path, names: list[str], lengths: tuple[int, ...] = (12, 8)) -> Path:
    """Write a dataset of version 2.1 as people's are: video, no depth, no cameras' geometry."""
    tasks = ["pick it", "place it"]
    (folder / "meta").mkdir(parents=True)
    for number, length in enumerate(lengths):
        rows = np.array([state(number, t) for t in range(length)], np.float32)
        data = folder / f"data/chunk-000/episode_{number:06d}.parquet"
        data.parent.mkdir(parents=True, exist_ok=True)
        columns: dict[str, Any] = {
            "observation.state": rows.tolist(),
            "action": np.roll(rows, -1, 0).tolist(),
            "timestamp": (np.arange(length) / 10).tolist(),
            "episode_index": [number] * length,
            "frame_index": list(range(length)),
            "task_index": [number] * length,
        }
        pq.write_table(pa.table(columns), data)
        film = folder / f"videos/chunk-000/{TOP}/episode_{number:06d}.mp4"
        film.parent.mkdir(parents=True, exist_ok=True)
        with av.open(str(film), "w") as out:
            stream = out.add_stream("libx264", rate=10, options={"crf": "10"})
            stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
            for t in range(length):
                image = np.full((32, 48, 3), 20 + 7 * t, np.uint8)
                frame = av.VideoFrame.from_ndarray(image, format="rgb24")
                out.mux(stream.encode(frame))
            out.mux(stream.encode())
    lines = {
        "tasks": [{"task_index": i, "task": t} for i, t in enumerate(tasks)],
        "episodes": [
            {"episode_index": i, "tasks": [tasks[i]], "length": n} for i, n in enumerate(lengths)
        ],
    }
    for name, rows in lines.items():
        (folder / "meta" / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    feature = {"dtype": "float32", "shape": [7], "names": {"motors": names}}
    info = {
        "codebase_version": "v2.1",
        "fps": 10,
        "chunks_size": 1000,
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
        "features": {
            "observation.state": feature,
            "action": feature,
            TOP: {"dtype": "video", "shape": [3, 32, 48], "names": ["c", "h", "w"]},
        },
    }
    (folder / "meta" / "info.json").write_text(json.dumps(info))
    return folder


def state(episode: int, t: int) -> list[float]:
    return [0.1 + 0.01 * t, 0.2 * episode, 0.3, 3.1, 0.0, 0.05 * t, 1.0 if t < 5 else -1.0]


def say(folder: Path, **told: Any) -> Path:
    place = folder / "meta" / "openhelix.json"
    place.write_text(json.dumps(told))
    return place


EULER = {"position": [0, 1, 2], "rotation": {"as": "euler_xyz", "at": [3, 4, 5]}}
GRIP = {"open": {"at": 6, "closed": -1, "opened": 1}}


def test_a_dataset_without_depth_is_shown_and_says_what_it_lacks(tmp_path: Path) -> None:
    source = open_source(write_v21(tmp_path / "d", STATE))
    found = report(source, 0, tmp_path / "strip.png")
    assert (found["frames"], found["hz"], found["episodes"]) == (20, 10.0, 2)
    assert set(found["tasks"]) == {"pick it", "place it"}
    (camera,) = found["cameras"]
    assert (camera["height"], camera["width"], camera["depth"]) == (32, 48, False)
    assert camera["lacks"] == "depth, intrinsics, a pose"
    said = "\n".join(found["problems"])
    assert "no camera with depth, intrinsics and a pose, which System 1 needs" in said
    assert "features.action: [7]: x, y, z, roll, pitch, yaw, gripper, which do not say" in said
    assert (tmp_path / "strip.png").exists() and "not for System 1" in as_text(found)
    with pytest.raises(DataError, match=r"top lacks depth, intrinsics, a pose\. System 1"):
        Build(source, "", CacheSettings(), tmp_path / "c").run(lambda text: None)


def test_videos_are_decoded_where_they_are_asked_for(tmp_path: Path) -> None:
    source = open_source(write_v21(tmp_path, STATE, (30, 25)))
    for first, steps in ((0, [0, 1, 7, 29]), (30, [3, 3, 24])):
        views = source.views([first + s for s in steps], ["top"])
        for step, view in zip(steps, views, strict=True):
            assert abs(float(view["top"].rgb.mean()) - (20 + 7 * step)) < 4
            assert view["top"].depth is None and np.isnan(view["top"].K).all()


def test_what_the_numbers_are_can_be_told(tmp_path: Path) -> None:
    folder = write_v21(tmp_path, ["j1", "j2", "j3", "j4", "j5", "j6", "j7"])
    with pytest.raises(DataError, match=r"observation.state: \[7\]: j1, .* which do not say where"):
        open_source(folder).motion(0, 5)
    say(folder, state=EULER | GRIP, action={"is": "absolute", **EULER, **GRIP})
    motion = open_source(folder).motion(12, 15)
    np.testing.assert_allclose(motion.proprio[2, :3], [0.12, 0.2, 0.3], atol=1e-6)
    np.testing.assert_allclose(motion.targets[2, :3], [0.13, 0.2, 0.3], atol=1e-6)
    turned = Rotation.from_quat(motion.proprio[2, 3:7]).as_euler("xyz")
    np.testing.assert_allclose(turned, [3.1, 0, 0.1], atol=1e-6)
    assert motion.proprio[:, 8].tolist() == [1, 1, 1, 1]
    assert open_source(folder).motion(0, 11).targets[:, 7].tolist() == [1] * 4 + [0] * 7 + [1]


@pytest.mark.parametrize("kind", ["relative", "next_state"])
def test_actions_may_be_relative_or_missing(tmp_path: Path, kind: str) -> None:
    folder = write_v21(tmp_path, STATE)
    action: dict[str, Any] = {"is": kind}
    if kind == "relative":
        turn = {"as": "rotation_vector", "at": [3, 4, 5]}
        action |= {"position": [0, 1, 2], "rotation": turn, "position_m": 0.1, "rotation_rad": 0.0}
        action |= GRIP
    say(folder, state=EULER | GRIP, action=action)
    motion = open_source(folder).motion(0, 11)
    here = motion.proprio[:, :3]
    if kind == "relative":
        told = np.array([state(0, (t + 1) % 12)[:3] for t in range(12)])
        np.testing.assert_allclose(motion.targets[:, :3], here + 0.1 * told, atol=1e-5)
        np.testing.assert_allclose(motion.targets[:, 3:7], motion.proprio[:, 3:7], atol=1e-6)
    else:
        np.testing.assert_allclose(motion.targets[:-1, :3], here[1:], atol=1e-6)
        np.testing.assert_allclose(motion.targets[-1, :3], here[-1], atol=1e-6)


def test_episodes_with_several_tasks_are_several_segments(tmp_path: Path) -> None:
    folder = write_v21(tmp_path, STATE)
    place = folder / "data/chunk-000/episode_000000.parquet"
    table = pq.read_table(place)
    at = table.column_names.index("task_index")
    pq.write_table(table.set_column(at, "task_index", pa.array([0] * 5 + [1] * 7)), place)
    rows = [
        {"episode_index": 0, "tasks": ["pick it", "place it"], "length": 12},
        {"episode_index": 1, "tasks": ["place it"], "length": 8},
    ]
    (folder / "meta/episodes.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = [(s.first, s.last, s.text) for s in open_source(folder).segments]
    assert found == [(0, 4, "pick it"), (5, 11, "place it"), (12, 19, "place it")]


def test_a_policy_can_be_trained_on_what_has_depth(tmp_path: Path) -> None:
    split = as_published(write_split(tmp_path / "training", ((OPEN, LED),)))
    convert(open_source(split), tmp_path / "l", "lerobot", lambda text: None, video=False)
    caches = []
    for name in ("training", "l"):
        source = open_source(tmp_path / name)
        Build(source, "", CacheSettings(), tmp_path / f"c-{name}").run(lambda text: None)
        caches.append(Cache(tmp_path / f"c-{name}"))
    one, two = caches
    assert one.meta["cameras"] == two.meta["cameras"] and one.meta["tasks"] == two.meta["tasks"]
    assert len(Cache([tmp_path / "c-training", tmp_path / "c-l"])) == len(one) + len(two)


def edited(name: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        place = folder / name
        content = json.loads(place.read_text())
        change(content)
        place.write_text(json.dumps(content))

    return spoil


def content(name: str, data: bytes | None) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        if data is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(data)

    return spoil


def column(name: str, values: list[Any]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        place = folder / "data/chunk-000/episode_000000.parquet"
        table = pq.read_table(place)
        pq.write_table(table.set_column(table.column_names.index(name), name, [values]), place)

    return spoil


INFO, DATA = "meta/info.json", "data/chunk-000/episode_000000.parquet"
FILM = f"videos/chunk-000/{TOP}/episode_000000.mp4"


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (content(INFO, b"{"), "meta/info.json: not JSON"),
        (edited(INFO, lambda i: i.update(codebase_version="v9")), "codebase_version: 'v9', known"),
        (edited(INFO, lambda i: i.update(fps=0)), "info.json: fps: 0.0, must be above 0"),
        (edited(INFO, lambda i: i.pop("features")), "info.json: fps, features: missing"),
        (
            edited(INFO, lambda i: i.update(data_path="/etc/x")),
            "data_path, video_path: '/etc/x' leads",
        ),
        (
            edited(INFO, lambda i: i["features"][TOP].update(shape=[1])),
            f"features.{TOP}.shape: [1]",
        ),
        (content("meta/tasks.jsonl", None), "meta/tasks.jsonl: no such file"),
        (content("meta/episodes.jsonl", b"{"), "meta/episodes.jsonl: line 1: not JSON"),
        (content("meta/episodes.jsonl", b""), "meta/episodes.jsonl: lists no episode"),
        (content(DATA, None), f"{DATA}: no such file"),
        (content(DATA, b"PAR1 no"), f"{DATA}: damaged or no parquet"),
        (column("episode_index", [7] * 12), "episode_index: 0 frames of episode 0, meta/ says 12"),
        (column("action", [[float("nan")] * 7] * 12), "action[0, 0]: nan, must be finite"),
        (content(FILM, None), f"{FILM}: no such file"),
        (content(FILM, b"no film"), f"{FILM}: {TOP}: cannot be decoded"),
        (content("meta/openhelix.json", b'{"state": {"position": [0]}}'), "openhelix.json: state"),
        (
            content("meta/openhelix.json", b'{"camera": {}}'),
            "openhelix.json: camera: no such field",
        ),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path: Path, spoil: Any, said: str) -> None:
    folder = write_v21(tmp_path, STATE)
    say(folder, state=EULER | GRIP, action={"is": "absolute", **EULER, **GRIP})
    spoil(folder)

    def read() -> None:
        source = open_source(folder)
        source.motion(0, 11)
        list(source.views([0, 11], ["top"]))

    with pytest.raises(DataError, match=re.escape(said)) as caught:
        read()
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
