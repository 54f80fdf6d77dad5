"""openhelix.runtime.observe.film and overlay: the film decodes to what a run was, large and on time."""

from __future__ import annotations

import errno
import subprocess
import sys
from dataclasses import replace

import av
import numpy as np
import pytest
from PIL import Image

from openhelix.runtime.control.talk import Entry
from openhelix.runtime.core.interfaces import CameraFrame
from openhelix.runtime.observe import overlay
from openhelix.runtime.observe.film import LiveFilm, Mp4, Sheet, Story, frames_of, make_film
from openhelix.runtime.observe.overlay import About, fitted, font, halves, project, stroke, strokes
from tests.runtime.ticks import PERIOD_NS, frame, ticks, told

BARE = About(committed=2)
SIZE = (640, 360)


class Painted:
    """A scenery of one colour, which its state decides."""

    def picture(self, visual, view, width, height):
        rgb = np.full((height, width, 3), round(float(visual[0])), np.uint8)
        looks_down = np.diag([1.0, -1.0, -1.0, 1.0])
        looks_down[2, 3] = 1.5
        K = np.array([[height, 0, width / 2], [0, height, height / 2], [0, 0, 1.0]])
        return CameraFrame(0, rgb, None, K, looks_down)


def decoded(path):
    with av.open(str(path)) as container:
        return [
            (float(shot.pts * shot.time_base), shot.to_ndarray(format="rgb24"))
            for shot in container.decode(video=0)
        ]


def test_a_film_of_a_drawn_world_is_large_smooth_and_as_long_as_the_run(tmp_path):
    path = tmp_path / "v.mp4"
    about = replace(BARE, lines=("scene D",), scenery=Painted())
    heard = []
    count = make_film(told(ticks(30), visual=np.array([200.0])), path, about, tell=heard.append)
    shots = decoded(path)
    assert len(shots) == count == heard[-1] == 48 + 30  # the title, then a frame a tick
    np.testing.assert_allclose([t for t, _ in shots], np.arange(count) / 30, atol=2e-3)
    assert shots[-1][1].shape == (720, 1280, 3)
    assert shots[0][1].mean() < 60 < 150 < shots[-1][1].mean()  # a dark card, then the world


def test_the_instruction_the_age_and_the_outcome_are_written_over_it():
    def drawn(**changes):
        (message,) = told(ticks(1), "open_drawer", visual=np.array([200.0]))
        message = replace(message, **changes)
        story = Story()
        story.take(message)
        return Sheet(about, SIZE).draw(message, story).astype(int)

    about = replace(BARE, scenery=Painted())
    plain = drawn(instruction="")
    top, bottom = slice(0, 60), slice(330, 350)
    told_ = drawn()
    assert np.abs(told_[top, :300] - plain[top, :300]).max() > 100
    longer = drawn(instruction="open the drawer as far as it goes, please")
    assert np.abs(longer[top, :400] - told_[top, :400]).max() > 100
    ended = [Entry(1, 0, "ended", "success", task="open_drawer", steps=41, success=True)]
    good, bad = drawn(entries=ended), drawn(entries=[replace(ended[0], success=False)])
    where = slice(270, 320)
    assert np.abs(good[where] - told_[where]).max() > 100
    assert np.abs(good[where] - bad[where]).max() > 50  # another mark and another colour
    tick = replace(told(ticks(1))[0].tick, latent_age_s=2.9)
    old = drawn(tick=tick)
    assert np.abs(old[bottom, 40:180] - told_[bottom, 40:180]).max() > 80


def test_the_plan_is_where_the_camera_sees_it_with_its_committed_part_apart():
    message = next(m for m in told(ticks(12), visual=np.array([0.0])) if m.tick.new_chunk)
    chunk = message.tick.new_chunk
    # A line of 40 cm to the right, at the height where the camera sees 1 m from 1 m away.
    chunk.poses[:, :3] = np.linspace([-0.2, 0, 0.5], [0.2, 0, 0.5], 4)
    seen = Painted().picture(np.array([0.0]), "room", 640, 360)
    (first, amber), (rest, blue) = strokes(seen, chunk, committed=1)
    np.testing.assert_allclose(first[0], (320 - 0.2 * 360, 180), atol=1e-6)
    np.testing.assert_allclose(rest[-1], (320 + 0.2 * 360, 180), atol=1e-6)
    np.testing.assert_allclose(first[-1], rest[0])
    assert amber != blue
    story = Story(images=False)
    story.take(message)
    picture = Sheet(replace(BARE, scenery=Painted(), committed=1), (640, 360))
    image = picture.draw(message, story).astype(int)
    near = image[178:183]
    assert (np.abs(near - amber).sum(axis=-1) < 60).any()
    assert (np.abs(near - blue).sum(axis=-1) < 60).any()


def test_a_plan_of_another_instruction_is_gone():
    run = told(ticks(20, instruction_ids=2))
    story = Story()
    for message in run[:10]:
        story.take(message)
    assert story.plan is not None
    story.take(run[10])
    assert story.plan is None


def test_a_part_of_a_run_at_another_speed():
    run = told(ticks(60), visual=np.array([9.0]))
    about = replace(BARE, scenery=Painted())
    sheet = Sheet(about, SIZE)
    whole = list(frames_of(run, sheet, about, fps=10))
    assert len(whole) == 20
    assert len(list(frames_of(run, sheet, about, fps=10, speed=2.0))) == 10
    assert len(list(frames_of(run, sheet, about, fps=10, begin_s=1.0))) == 10
    assert len(list(frames_of(run, sheet, about, fps=10, begin_s=0.5, end_s=1.0))) in (5, 6)


def test_time_in_which_nothing_came_is_seen_to_pass():
    run = told(ticks(4), visual=np.array([9.0]))
    late = replace(run[-1], tick=replace(run[-1].tick, t_ns=run[2].tick.t_ns + 10 * PERIOD_NS))
    about = replace(BARE, scenery=Painted())
    assert len(list(frames_of([*run[:3], late], Sheet(about, SIZE), about))) == 13


@pytest.mark.parametrize("suffix", [".webp", ".gif"])
def test_a_moving_picture_for_a_page(tmp_path, suffix):
    run = told(ticks(30, camera_every=1))
    count = make_film(run, tmp_path / f"v{suffix}", BARE, SIZE, fps=10)
    with Image.open(tmp_path / f"v{suffix}") as image:
        assert image.size == SIZE and image.n_frames == count == 10
        if suffix == ".gif":  # Pillow does not tell it of a WebP
            assert image.info["duration"] == 100


def test_what_is_no_film_is_refused_and_nothing_is_left(tmp_path):
    with pytest.raises(ValueError, match=r"\.mp4, \.webp or \.gif"):
        make_film([], tmp_path / "v.avi", BARE)
    with pytest.raises(ValueError, match="no ticks"):
        make_film([], tmp_path / "v.mp4", BARE)
    assert not list(tmp_path.iterdir())


def test_a_live_film_has_a_frame_for_every_new_image_at_its_own_time(tmp_path):
    film = LiveFilm(tmp_path / "v.mp4", BARE, lossless=True)
    for message in told(ticks(30, camera_every=3)):
        film(message)
    assert film.close() and film.close()
    shots = decoded(tmp_path / "v.mp4")
    assert len(shots) == film.written == 10
    np.testing.assert_allclose([t for t, _ in shots], np.arange(10) * 0.1, atol=2e-3)
    # The cameras are red above: the first fills the middle, the second is the inset.
    image = shots[-1][1].astype(int)
    assert image[250, 640, 0] == pytest.approx(81, abs=14)
    assert image[60, 1280 - 20 - 108, 0] == pytest.approx(135, abs=14)


def test_a_camera_that_is_missing_leaves_its_place_dark(tmp_path):
    film = LiveFilm(tmp_path / "v.mp4", replace(BARE, cameras=("wrist",)), lossless=True)
    for message in told(ticks(3)):
        film(message)
    assert film.close()
    assert decoded(tmp_path / "v.mp4")[0][1][200:500].max() < 60


def test_times_that_repeat_still_make_a_valid_file(tmp_path):
    mp4 = Mp4(tmp_path / "v.mp4", 64, 64)
    for _ in range(3):
        mp4.write(np.zeros((64, 64, 3), np.uint8), 5)
    mp4.close()
    mp4.close()
    assert len(decoded(tmp_path / "v.mp4")) == 3


def test_bad_sizes_and_no_camera(tmp_path):
    with pytest.raises(ValueError, match="even"):
        Mp4(tmp_path / "v.mp4", 63, 64)
    with pytest.raises(ValueError, match="no camera"):
        LiveFilm(tmp_path / "v.mp4", replace(BARE, cameras=()))


# Drawing -----------------------------------------------------------------------------------------


def test_points_are_projected_as_a_pinhole_sees_them():
    seen = frame(0, 64, 0)  # 1.5 m up, looking down; 64 pixels a metre at 1 m
    pixels, ahead = project(seen, [[0, 0, 0.5], [0.25, 0.25, 0.5], [0, 0, 2.0]])
    np.testing.assert_allclose(pixels[:2], [[32, 32], [48, 16]])
    assert ahead.tolist() == [True, True, False]


def test_the_committed_part_of_a_plan_meets_the_rest():
    chunk = next(t.new_chunk for t in ticks(12) if t.new_chunk)
    for committed in (0, 1, 3, 99):
        (first, _), (rest, _) = halves(chunk, committed)
        assert len(first) + len(rest) == len(chunk.poses) + 1
        np.testing.assert_array_equal(first[-1], rest[0])


def test_a_stroke_has_no_jagged_edges_and_stays_inside():
    image = Image.new("RGB", (100, 100))
    stroke(image, np.array([[-50.0, 20.3], [150.0, 61.9]]), (255, 255, 255), 3.0)
    values = np.unique(np.asarray(image)[..., 0])
    assert values.max() > 240 and len(values) > 6  # many greys between
    before = np.asarray(image).copy()
    stroke(image, np.array([[300.0, 300.0], [400.0, 400.0]]), (255, 255, 255), 3.0)
    np.testing.assert_array_equal(np.asarray(image), before)


@pytest.mark.parametrize(
    "text", ["", "short", "a sentence of quite a few words that takes two lines", "x" * 500]
)
def test_what_is_written_fits(text):
    rows = fitted(text, 20, 200, lines=2)
    assert 1 <= len(rows) <= 2
    assert all(font(20).getlength(row) <= 200 for row in rows)
    assert overlay.font(20) is font(20)


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
from openhelix.runtime.observe import film
from openhelix.runtime.observe.overlay import About
from tests.runtime.ticks import ticks, told
film.SIZE = (128, 72)
limit = int(sys.argv[2])
video = film.LiveFilm(Path(sys.argv[1]), About(cameras=("static",), lines=("a run",)), lossless=True)
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
for message in told(ticks(90, camera_every=1, noise=True)):
    video(message)
assert not video.close()
assert not video.close()
print(video.written, video.dropped, video.error)
"""


@pytest.mark.parametrize("limit", [0, 100, 40_000, 120_000])
def test_a_full_disk_ends_the_film_and_not_the_process(tmp_path, limit):
    path = tmp_path / "v.mp4"
    words = [sys.executable, "-c", FULL, str(path), str(limit)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    written, dropped, error = done.stdout.split(maxsplit=2)
    assert int(written) + int(dropped) == 90
    assert int(written) < 90 and error.startswith(f"{path}: ")
    if limit <= 100:
        assert int(written) == 0
    assert path.stat().st_size <= limit


def test_a_film_for_which_there_is_no_room_leaves_nothing(tmp_path, monkeypatch):
    def refuse(self, data):
        self.error = OSError(errno.ENOSPC, "No space left on device", str(self.path))
        return len(data)

    monkeypatch.setattr("openhelix.runtime.core.files.CalmFile.write", refuse)
    with pytest.raises(OSError, match="No space left"):
        make_film(told(ticks(60)), tmp_path / "v.mp4", replace(BARE, cameras=("static",)))
    assert not list(tmp_path.iterdir())
