"""The film of a run: large and smooth, with what the images do not show.

Of a simulated world a film is drawn anew from a run's track, after the run, from where the static
camera stands, at any size; see `openhelix.runtime.robots.base.Scenery`. Of a physical arm, or a world
that only its own simulator can draw, it is what the cameras saw. Over the picture: the instruction,
the plan with its committed part, where the hand has been, the age of the latent, the state, and what
the world said of each task.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any, Final

import numpy as np
from PIL import Image, ImageDraw

from openhelix.runtime.control.talk import Entry
from openhelix.runtime.core.files import CalmFile
from openhelix.runtime.core.interfaces import F64, U8, ActionChunk, CameraFrame
from openhelix.runtime.observe.background import Background, Counted
from openhelix.runtime.observe.overlay import (
    BAD,
    DIM,
    GOOD,
    GROUND,
    INK,
    TRAIL,
    WAIT,
    About,
    fitted,
    font,
    project,
    shade,
    stroke,
    strokes,
    tick_mark,
)
from openhelix.runtime.observe.ticks import TickMessage

FILE_NAME: Final = "video.mp4"
FPS: Final = 30
SIZE: Final = (1280, 720)
TITLE: Final = "OpenHelix"
TITLE_S: Final = 1.6
MARK_S: Final = 1.3  # how long what became of a task is shown
TRAIL_TICKS: Final = 45
_MS: Final = Fraction(1, 1000)
Scene = tuple[CameraFrame, U8 | None]  # from the room, and (side, side, 3) from the hand
WORDS: Final = {"wait": "waits for a plan", "run": "", "hold": "holds", "stop": "stopped"}


class Mp4:
    """Encodes RGB images (H, W, 3) u8 into an H.264 file, each at its own time.

    Args:
        path: of the file; its folder must exist.
        width, height: pixels, even.
        fps: about how many frames per second will come; the file's times are exact.
        crf: x264's constant quality, lower is better.
        threads: of the encoder; during a run the other cores belong to System 1 and System 2.

    It grows by fragments of a second: when the disk is full, or the process is killed, what was
    filmed until then can be seen.

    Raises:
        OSError: the file cannot be made.
    """

    def __init__(
        self,
        path: Path,
        width: int,
        height: int,
        fps: float = FPS,
        crf: int = 23,
        threads: int = 1,
    ) -> None:
        if width % 2 or height % 2:
            raise ValueError(f"video: {width}x{height} pixels; H.264 needs even numbers")
        import av  # a tenth of a second, which only those who write a video are to wait for

        self._frame = av.VideoFrame.from_ndarray
        # ffmpeg crashes when it closes a film that it could not write: it is told of no error.
        self._file = CalmFile(path)
        self._container = av.open(
            self._file,
            "w",
            format="mp4",
            options={"movflags": "hybrid_fragmented+delay_moov", "frag_duration": "1000000"},  # us
        )
        rate = Fraction(fps).limit_denominator(1000)
        self._stream = self._container.add_stream("libx264", rate=rate)
        self._stream.width, self._stream.height = width, height
        self._stream.pix_fmt = "yuv420p"
        self._stream.options = {"preset": "veryfast", "crf": str(crf), "threads": str(threads)}
        self._stream.codec_context.time_base = _MS
        self._first_ns: int | None = None
        self._last_ms = -1
        self.frames = 0

    def write(self, image: U8, t_ns: int) -> None:
        """Append a frame shown from `t_ns` on; times may only advance.

        Raises:
            OSError: the disk refuses; the film is over.
        """
        self._first_ns = t_ns if self._first_ns is None else self._first_ns
        ms = max(self._last_ms + 1, round((t_ns - self._first_ns) / 1_000_000))
        frame = self._frame(np.ascontiguousarray(image), format="rgb24")
        frame.pts, frame.time_base = ms, _MS
        self._container.mux(self._stream.encode(frame))
        self._last_ms = ms
        if self._file.error is not None:
            raise self._file.error
        self.frames += 1

    def close(self) -> None:
        """Finish the file; safe to call twice.

        Raises:
            OSError: the disk refuses; the film ends where it began to.
        """
        if self._container is None:
            return
        self._container.mux(self._stream.encode(None))
        self._container.close()
        self._container = None
        self._file.close()
        if self._file.error is not None:
            self.frames = _frames_in(self._file.path)
            raise self._file.error


def _frames_in(path: Path) -> int:
    """Return how many frames a film holds that may be cut."""
    import av
    import av.error

    found = 0
    try:
        with av.open(str(path)) as container:
            for packet in container.demux(video=0):
                found += bool(packet.size)
    except (av.error.FFmpegError, OSError, IndexError):
        pass  # the cut
    return found


class Story:
    """What a film remembers from tick to tick.

    Args:
        images: whether it shows what the cameras saw; where not, none of their frames is looked at,
            which might draw it.
    """

    def __init__(self, images: bool = True) -> None:
        self._images = images
        self.plan: ActionChunk | None = None
        self.trail: deque[F64] = deque(maxlen=TRAIL_TICKS)
        self.frames: Mapping[str, CameraFrame] = {}
        self.start_ns: int | None = None
        self._mark: tuple[int, Entry] | None = None
        self._marked = False

    def take(self, message: TickMessage) -> None:
        """Note a tick."""
        tick = message.tick
        self.start_ns = tick.t_ns if self.start_ns is None else self.start_ns
        if self.plan is not None and self.plan.instruction_id != tick.observation.instruction_id:
            self.plan = None
        self.plan = tick.new_chunk or self.plan
        self.trail.append(tick.observation.tcp_pose[:3])
        if self._images:
            self.frames = {**self.frames, **tick.observation.frames}
        self._marked = False
        for entry in message.entries:
            if entry.kind in ("ended", "seen") and entry.text != "replaced":
                self._mark, self._marked = (tick.t_ns, entry), True

    @property
    def marked(self) -> bool:
        """Whether anything became of a task at the newest tick."""
        return self._marked

    def mark(self, t_ns: int) -> Entry | None:
        """Return what became of a task a moment ago."""
        if self._mark is None or t_ns - self._mark[0] > MARK_S * 1e9:
            return None
        return self._mark[1]


class Sheet:
    """Lays a frame of the film out.

    Args:
        about: of the run.
        size: width and height, pixels, even.
    """

    def __init__(self, about: About, size: tuple[int, int] = SIZE) -> None:
        self._about, self.size = about, size
        self._unit = size[1] / 720.0  # what is written scales with the picture

    def draw(self, message: TickMessage, story: Story, scene: Scene | None = None) -> U8:
        """Return the frame (H, W, 3) of a tick, which `story` has taken.

        Args:
            message: the tick.
            story: of the run so far.
            scene: what `scene_of` drew for it before; None draws it now.
        """
        picture, inset = scene or self.scene_of(message) or self._seen(story)
        image = Image.fromarray(picture.rgb)
        self._plan(image, picture, story)
        if inset is not None:
            self._inset(image, inset)
        self._instruction(image, message)
        self._status(image, message, story)
        mark = story.mark(message.tick.t_ns)
        if mark is not None:
            self._mark(image, mark)
        return np.asarray(image)

    def title(self) -> U8:
        """Return the title card (H, W, 3)."""
        width, height = self.size
        image = Image.new("RGB", self.size, GROUND)
        pen, left = ImageDraw.Draw(image), self._px(96)
        top = round(height * 0.36)
        pen.rectangle((left, top, left + self._px(6), top + self._px(150)), fill=GOOD)
        pen.text((left + self._px(30), top - self._px(6)), TITLE, INK, font(self._px(54)))
        rows = [
            row
            for line in self._about.lines
            for row in fitted(line, self._px(24), width - left - self._px(120), 2)
        ]
        for i, row in enumerate(rows):
            at = (left + self._px(32), top + self._px(68 + 34 * i))
            pen.text(at, row, INK if i == 0 else DIM, font(self._px(24)))
        return np.asarray(image)

    # -- parts ----------------------------------------------------------------------------

    def _px(self, pixels: float) -> int:
        return max(1, round(pixels * self._unit))

    def scene_of(self, message: TickMessage) -> Scene | None:
        """Draw the world as it was at a tick, from the room and from the hand; None without a scenery.

        Takes nearly all of a frame's time, and may run in several threads at once.
        """
        scenery, visual, side = self._about.scenery, message.visual, self._px(216)
        if scenery is None or visual is None:
            return None
        room = scenery.picture(visual, "room", *self.size)
        inset = None
        if "gripper" in self._about.cameras:
            inset = scenery.picture(visual, "gripper", side, side).rgb
        return room, inset

    def _seen(self, story: Story) -> Scene:
        side = self._px(216)
        first, second, *_ = [*(story.frames.get(name) for name in self._about.cameras), None, None]
        return self._framed(first), None if second is None else _resized(second.rgb, side)

    def _framed(self, frame: CameraFrame | None) -> CameraFrame:
        """A camera's image in the middle of the picture, as large as it fits."""
        width, height = self.size
        canvas = np.full((height, width, 3), GROUND, np.uint8)
        if frame is None:
            return CameraFrame(0, canvas, None, np.eye(3), np.eye(4))
        rows, columns = frame.rgb.shape[:2]
        scale = min(height / rows, width / columns)
        size = (round(columns * scale), round(rows * scale))
        left, top = (width - size[0]) // 2, (height - size[1]) // 2
        shown = Image.fromarray(np.ascontiguousarray(frame.rgb)).resize(size, _SMOOTH)
        canvas[top : top + size[1], left : left + size[0]] = np.asarray(shown)
        K = np.diag([scale, scale, 1.0]) @ frame.K
        K[:2, 2] += (left, top)
        return CameraFrame(frame.t_ns, canvas, None, K, frame.T_world_cam)

    def _plan(self, image: Image.Image, picture: CameraFrame, story: Story) -> None:
        if len(story.trail) > 1:
            pixels, ahead = project(picture, np.stack(story.trail))
            if ahead.all():
                stroke(image, pixels, TRAIL, self._unit * 1.6, ends=False)
        if story.plan is not None:
            drawn = strokes(picture, story.plan, self._about.committed)
            for pixels, colour in reversed(drawn):
                stroke(image, pixels, colour, self._unit * 4.0)

    def _inset(self, image: Image.Image, rgb: U8) -> None:
        side, gap = rgb.shape[0], self._px(20)
        left, top = image.width - side - gap, gap
        edge = self._px(2)
        frame = (left - edge, top - edge, left + side + edge, top + side + edge)
        image.paste(INK, frame)
        image.paste(Image.fromarray(rgb), (left, top))

    def _instruction(self, image: Image.Image, message: TickMessage) -> None:
        if not message.instruction:
            return
        gap, size = self._px(20), self._px(30)
        rows = fitted(message.instruction, size, round(image.width * 0.62))
        note = f"instruction {message.number}" + (f"  ·  {message.task}" if message.task else "")
        small = font(self._px(17))
        width = max(*(font(size).getlength(row) for row in rows), small.getlength(note))
        height = self._px(40) * len(rows) + self._px(44)
        box = (gap, gap, gap + round(width) + self._px(36), gap + height)
        shade(image, box)
        pen = ImageDraw.Draw(image)
        pen.rectangle((gap, gap, gap + self._px(4), gap + height), fill=GOOD)
        pen.text((gap + self._px(18), gap + self._px(9)), note, DIM, small)
        for i, row in enumerate(rows):
            at = (gap + self._px(18), gap + self._px(32 + 40 * i))
            pen.text(at, row, INK, font(size))

    def _status(self, image: Image.Image, message: TickMessage, story: Story) -> None:
        tick, gap = message.tick, self._px(20)
        height, width = self._px(52), image.width - 2 * gap
        top = image.height - gap - height
        shade(image, (gap, top, gap + width, top + height))
        pen, type_ = ImageDraw.Draw(image), font(self._px(19))
        middle = top + height // 2
        left = gap + self._px(18)
        age, limit = tick.latent_age_s, self._about.latent_max_age_s
        pen.text((left, middle), "latent age", DIM, type_, anchor="lm")
        bar = (
            left + self._px(106),
            middle - self._px(6),
            left + self._px(366),
            middle + self._px(6),
        )
        pen.rectangle(bar, fill=(58, 66, 76))
        if age is not None:
            part = min(1.0, age / limit)
            colour = GOOD if part < 0.5 else WAIT if part < 1.0 else BAD
            end = bar[0] + round((bar[2] - bar[0]) * part)
            pen.rectangle((bar[0], bar[1], end, bar[3]), fill=colour)
        told = "no latent yet" if age is None else f"{age:.2f} s"
        pen.text((bar[2] + self._px(14), middle), told, INK, type_, anchor="lm")
        word = WORDS[tick.state] + (f": {tick.reason}" if tick.reason and WORDS[tick.state] else "")
        colour = {"stop": BAD, "run": INK}.get(tick.state, WAIT)
        row = fitted(word, self._px(19), self._px(440), 1)[0]
        pen.text((left + self._px(510), middle), row, colour, type_, anchor="lm")
        seconds = (tick.t_ns - (story.start_ns or tick.t_ns)) * 1e-9
        clock = f"step {message.steps}    {int(seconds) // 60}:{seconds % 60:04.1f}"
        pen.text((gap + width - self._px(18), middle), clock, DIM, type_, anchor="rm")

    def _mark(self, image: Image.Image, entry: Entry) -> None:
        good = entry.kind == "seen" or bool(entry.success)
        plain = entry.kind == "ended" and entry.success is None
        size, gap = self._px(28), self._px(20)
        side = self._px(44)
        row = fitted(entry.line(), size, round(image.width * 0.75), 1)[0]
        width = round(font(size).getlength(row)) + side + self._px(64)
        left, top = gap, image.height - gap - self._px(52) - self._px(90)
        shade(image, (left, top, left + width, top + self._px(74)), 0.8)
        if not plain:
            tick_mark(image, (left + self._px(18), top + self._px(15)), side, good)
        pen = ImageDraw.Draw(image)
        at = (left + side + self._px(36), top + self._px(37))
        colour = INK if plain else GOOD if good else BAD
        pen.text(at, row, colour, font(size), anchor="lm")


_SMOOTH: Final = Image.Resampling.LANCZOS


def _resized(rgb: U8, side: int) -> U8:
    image = Image.fromarray(np.ascontiguousarray(rgb))
    return np.asarray(image.resize((side, side), _SMOOTH))


# Making one --------------------------------------------------------------------------------------


def frames_of(
    messages: Iterable[TickMessage],
    sheet: Sheet,
    about: About,
    begin_s: float = 0.0,
    end_s: float | None = None,
    speed: float = 1.0,
    fps: float = FPS,
) -> Iterator[U8]:
    """Yield a film's frames (H, W, 3), the title card first.

    A frame shows the newest tick at its time, so that a run that stood still is seen to.

    Args:
        messages: of a run, in order.
        sheet: lays them out.
        about: of the run.
        begin_s, end_s: the part of the run that is shown, from its first tick on.
        speed: seconds of the run per second of the film.
        fps: frames per second of the film.
    """
    if about.lines:
        card = sheet.title()
        yield from (card for _ in range(round(TITLE_S * fps)))
    story, frame = Story(images=about.scenery is None), None
    steps = _steps(messages, begin_s, end_s, 1e9 * speed / fps)
    for message, times, scene in _drawn_ahead(steps, sheet.scene_of):
        story.take(message)
        if times is None:
            continue
        frame = sheet.draw(message, story, scene)
        yield from (frame for _ in range(times))
    if frame is not None and story.marked:  # what became of the last task
        yield from (frame for _ in range(round(MARK_S * fps)))


def _steps(
    messages: Iterable[TickMessage], begin_s: float, end_s: float | None, step_ns: float
) -> Iterator[tuple[TickMessage, int | None]]:
    """Yield every tick with how often its frame is shown; None for one that is not drawn."""
    first_ns, number = None, 0
    for message in messages:
        t_ns = message.tick.t_ns
        first_ns = t_ns if first_ns is None else first_ns
        if end_s is not None and t_ns - first_ns > end_s * 1e9:
            return
        late_ns = t_ns - first_ns - begin_s * 1e9 + 1e6 - number * step_ns
        times = int(late_ns // step_ns) + 1 if late_ns >= 0 else 0
        number += times
        yield message, times if times or message.entries else None


def _drawn_ahead(
    steps: Iterable[tuple[TickMessage, int | None]], draw: Callable[[TickMessage], Scene | None]
) -> Iterator[tuple[TickMessage, int | None, Scene | None]]:
    """Yield the steps with their scenes, which as many threads draw as there are cores."""
    cores, ahead = os.cpu_count() or 1, 0
    waiting: deque[tuple[TickMessage, int | None, Future[Scene | None] | None]] = deque()
    with ThreadPoolExecutor(cores, "film") as pool:
        for message, times in steps:
            waiting.append((message, times, None if times is None else pool.submit(draw, message)))
            ahead += times is not None
            while ahead > 2 * cores:
                first, shown, drawn = waiting.popleft()
                ahead -= drawn is not None
                yield first, shown, None if drawn is None else drawn.result()
        for first, shown, drawn in waiting:
            yield first, shown, None if drawn is None else drawn.result()


def make_film(
    messages: Iterable[TickMessage],
    path: Path,
    about: About,
    size: tuple[int, int] = SIZE,
    tell: Callable[[int], None] = lambda frames: None,
    **part: Any,
) -> int:
    """Write a film; return its number of frames.

    Args:
        messages: of a run, in order; see `openhelix.runtime.observe.recorder.playback`.
        path: of the file: .mp4, or .webp or .gif for a moving picture in a page.
        about: of the run.
        size: width and height, pixels, even.
        tell: hears how many frames there are so far.
        part: `begin_s`, `end_s`, `speed`, `fps`; see `frames_of`.

    Raises:
        ValueError: another kind of file, or there is nothing to show.
    """
    if path.suffix not in (".mp4", ".webp", ".gif"):
        raise ValueError(f"--out: {path.name}: a film is .mp4, .webp or .gif")
    frames = frames_of(messages, Sheet(about, size), about, **part)
    fps = float(part.get("fps", FPS))
    unfinished = path.with_name(f".{path.name}")
    write = _write_mp4 if path.suffix == ".mp4" else _write_pictures
    try:
        count = write(_told(frames, tell), unfinished, path.suffix, size, fps)
        if count:
            unfinished.rename(path)
    finally:
        unfinished.unlink(missing_ok=True)
    if not count:
        raise ValueError(f"{path.name}: the run has no ticks to show")
    return count


def _told(frames: Iterator[U8], tell: Callable[[int], None]) -> Iterator[U8]:
    for number, frame in enumerate(frames, 1):
        tell(number)
        yield frame


def _write_mp4(
    frames: Iterator[U8], path: Path, suffix: str, size: tuple[int, int], fps: float
) -> int:
    mp4 = Mp4(path, *size, fps=fps, crf=21, threads=2)
    try:
        for number, frame in enumerate(frames):
            mp4.write(frame, round(number * 1e9 / fps))
    finally:
        mp4.close()
    return mp4.frames


def _write_pictures(
    frames: Iterator[U8], path: Path, suffix: str, size: tuple[int, int], fps: float
) -> int:
    images = [Image.fromarray(frame) for frame in frames]
    if not images:
        return 0
    more: dict[str, Any] = {"format": "WEBP", "quality": 62, "method": 4}
    if suffix == ".gif":
        images, more = _with_one_palette(images), {"format": "GIF", "optimize": True}
    images[0].save(
        path, save_all=True, append_images=images[1:], duration=round(1000 / fps), loop=0, **more
    )
    return len(images)


def _with_one_palette(images: Sequence[Image.Image]) -> list[Image.Image]:
    """Colours of the whole film: what does not move then costs nothing."""
    picked = [images[i * (len(images) - 1) // 7] for i in range(8)]
    sheet = Image.new("RGB", (images[0].width, images[0].height * 8))
    for row, image in enumerate(picked):
        sheet.paste(image, (0, row * image.height))
    palette = sheet.quantize(96)
    return [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]


class LiveFilm(Counted):
    """A sink that films what the cameras see, a frame for every new image.

    Args:
        path: of the mp4.
        about: of the run; without a scenery.
        fps: about how many images per second will come.
        queue_size: images that may wait.
        lossless: wait instead of dropping (the lockstep clock).

    Raises:
        ValueError: there is no camera.
    """

    def __init__(
        self,
        path: Path,
        about: About,
        fps: float = FPS,
        queue_size: int = 64,
        lossless: bool = False,
    ) -> None:
        if not about.cameras:
            raise ValueError("video: there is no camera to film")
        self._about, self._fps = about, fps
        self._sheet, self._story = Sheet(about), Story()
        self._mp4 = Mp4(path, *SIZE, fps)
        self._newest_ns: tuple[int, ...] = ()
        self._cards = 0  # frames before the first image
        self._work: Background[TickMessage] = Background(
            "video", self._write, self._mp4.close, queue_size, lossless
        )

    def __call__(self, message: TickMessage) -> None:
        """Take one tick; a few microseconds."""
        frames = [message.tick.observation.frames.get(name) for name in self._about.cameras]
        stamps = tuple(-1 if frame is None else frame.t_ns for frame in frames)
        if stamps == self._newest_ns and not message.entries:
            return
        self._newest_ns = stamps
        self._work.offer(message)

    def close(self, timeout_s: float = 60.0) -> bool:
        """Finish the file; False if that took too long or failed. Twice is fine."""
        return self._work.close(timeout_s) and self._work.error is None

    @property
    def _unkept(self) -> int:
        kept = max(0, self._mp4.frames - self._cards)
        return self._work.written - min(kept, self._work.written)

    def _write(self, message: TickMessage) -> None:
        t_ns = message.tick.t_ns
        self._story.take(message)
        if self._mp4.frames == 0 and self._about.lines:
            card = self._sheet.title()
            for i in range(round(TITLE_S * self._fps)):
                self._mp4.write(card, t_ns - round((TITLE_S - i / self._fps) * 1e9))
                self._cards += 1
        self._mp4.write(self._sheet.draw(message, self._story), t_ns)
