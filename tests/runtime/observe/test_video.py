"""openhelix.runtime.observe.video: the file decodes to the frames and the times that went in."""

from __future__ import annotations

import subprocess
import sys

import av
import numpy as np
import pytest

from openhelix.runtime.observe.video import TILE_PX, Caption, Mp4, VideoRecorder
from tests.runtime.ticks import ticks


def decoded(path):
    with av.open(str(path)) as container:
        return [
            (float(frame.pts * frame.time_base), frame.to_ndarray(format="rgb24"))
            for frame in container.decode(video=0)
        ]


def film(path, run, **options):
    video = VideoRecorder(path, lossless=True, **options)
    for tick in run:
        video(tick)
    assert video.close()
    assert video.close()
    return video


def test_a_frame_for_every_new_image_at_its_own_time(tmp_path):
    video = film(tmp_path / "v.mp4", ticks(30, camera_every=3))
    shots = decoded(tmp_path / "v.mp4")
    assert len(shots) == video.written == 10
    np.testing.assert_allclose([t for t, _ in shots], np.arange(10) * 0.1, atol=2e-3)


def test_both_cameras_are_there_side_by_side(tmp_path):
    film(tmp_path / "v.mp4", ticks(31, camera_every=30))
    image = decoded(tmp_path / "v.mp4")[-1][1].astype(int)
    assert image.shape[1] == 2 * TILE_PX
    # The last tick's cameras: red above (90 and 150), dark below.
    assert image[TILE_PX // 4, TILE_PX // 2, 0] == pytest.approx(90, abs=12)
    assert image[TILE_PX // 4, TILE_PX * 3 // 2, 0] == pytest.approx(150, abs=12)
    assert image[TILE_PX * 3 // 4, TILE_PX // 2, 0] == pytest.approx(40, abs=12)


def test_the_caption_is_written_under_the_images(tmp_path):
    film(tmp_path / "empty.mp4", ticks(1))
    film(tmp_path / "full.mp4", ticks(1), caption=lambda: Caption("t", "open the drawer", "1 of 5"))
    empty, full = (decoded(tmp_path / f"{name}.mp4")[0][1] for name in ("empty", "full"))
    written = (full[TILE_PX:].max(axis=-1) > 180).sum()
    assert written > (empty[TILE_PX:].max(axis=-1) > 180).sum() + 50


def test_a_camera_that_is_missing_is_black_and_nothing_breaks(tmp_path):
    film(tmp_path / "v.mp4", ticks(4), cameras=("static", "wrist"))
    image = decoded(tmp_path / "v.mp4")[0][1]
    assert image[:TILE_PX, TILE_PX + 8 :].max() < 24


def test_times_that_repeat_still_make_a_valid_file(tmp_path):
    mp4 = Mp4(tmp_path / "v.mp4", 64, 64)
    for _ in range(3):
        mp4.write(np.zeros((64, 64, 3), np.uint8), 5)
    mp4.close()
    mp4.close()
    assert len(decoded(tmp_path / "v.mp4")) == 3


def moving(count):
    rng = np.random.default_rng(0)
    for i in range(count):
        yield rng.integers(0, 255, (64, 64, 3), np.uint8), i * 33_000_000


def test_a_film_that_is_not_finished_can_be_seen_up_to_its_last_second(tmp_path):
    mp4 = Mp4(tmp_path / "v.mp4", 64, 64)
    for image, t_ns in moving(120):
        mp4.write(image, t_ns)
    (tmp_path / "killed.mp4").write_bytes((tmp_path / "v.mp4").read_bytes())
    mp4.close()
    assert len(decoded(tmp_path / "v.mp4")) == 120
    # Besides the fragment that is being filled, x264 looks ahead by some frames.
    assert len(decoded(tmp_path / "killed.mp4")) >= 120 - 2 * 31


FULL = """
import resource, sys
from pathlib import Path
from openhelix.runtime.observe.video import VideoRecorder
from tests.runtime.ticks import ticks
limit = int(sys.argv[2])
video = VideoRecorder(Path(sys.argv[1]), lossless=True)
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
for tick in ticks(120, camera_every=1, noise=True):
    video(tick)
assert not video.close()
assert not video.close()
print(video.written, video.dropped, video.error)
"""


@pytest.mark.parametrize("limit", [0, 100, 100_000, 1_000_000])
def test_a_full_disk_ends_the_film_and_not_the_process(tmp_path, limit):
    path = tmp_path / "v.mp4"
    words = [sys.executable, "-c", FULL, str(path), str(limit)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    written, dropped, error = done.stdout.split(maxsplit=2)
    assert int(written) + int(dropped) == 120
    assert (int(written) > 0) == (limit > 100)
    assert error.startswith(f"{path}: ")
    assert path.stat().st_size <= limit


def test_bad_sizes_and_no_camera(tmp_path):
    with pytest.raises(ValueError, match="even"):
        Mp4(tmp_path / "v.mp4", 63, 64)
    with pytest.raises(ValueError, match="no camera"):
        VideoRecorder(tmp_path / "v.mp4", cameras=())
