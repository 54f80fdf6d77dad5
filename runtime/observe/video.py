"""A video of the run, annotated with what the images do not show.

Frames are drawn and encoded in a thread below control's priority; a frame that finds the
queue full is dropped and counted. Each frame keeps its own time, so a camera that slowed down
or froze is seen to do so instead of making the video run fast. A film grows by fragments of a
second: when the disk is full, or the process is killed, what was filmed until then can be seen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from openhelix.runtime.core.files import CalmFile
from openhelix.runtime.core.interfaces import U8
from openhelix.runtime.observe.background import Background, Counted

if TYPE_CHECKING:
    from openhelix.runtime.control.loop import Tick

TILE_PX = 320
LINE_PX = 18
INK, DIM, GOOD, BAD = (235, 235, 235), (150, 150, 150), (110, 220, 120), (255, 120, 100)
_MS = Fraction(1, 1000)


class Mp4:
    """Encodes RGB images (H, W, 3) u8 into an H.264 file, each at its own time.

    Args:
        path: of the file; its folder must exist.
        width, height: pixels, even.
        fps: about how many frames per second will come; the file's times are exact.

    Raises:
        OSError: the file cannot be made.
    """

    def __init__(self, path: Path, width: int, height: int, fps: float = 30.0) -> None:
        if width % 2 or height % 2:
            raise ValueError(f"video: {width}x{height} pixels; H.264 needs even numbers")
        import av  # a tenth of a second, which only those who write a video are to wait for

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
        # One thread: the other cores belong to System 1 and System 2.
        self._stream.options = {"preset": "veryfast", "crf": "23", "threads": "1"}
        self._stream.codec_context.time_base = _MS
        self._frame = av.VideoFrame.from_ndarray
        self._first_ns: int | None = None
        self._last_ms = -1
        self.frames = 0

    def write(self, image: U8, t_ns: int) -> None:
        """Append a frame shown from `t_ns` on; times may only advance.

        Raises:
            OSError: the disk refuses; the film is over.
        """
        self._first_ns = t_ns if self._first_ns is None else self._first_ns
        ms = max(self._last_ms + 1, (t_ns - self._first_ns) // 1_000_000)
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


class Caption(NamedTuple):
    """What is written under the images."""

    task: str = ""
    instruction: str = ""
    note: str = ""  # for example "task 2 of 5"


class _Shot(NamedTuple):
    images: list[U8]
    t_ns: int
    caption: Caption
    line: str
    state: str


class VideoRecorder(Counted):
    """A subscriber that films what the cameras see.

    A frame is written whenever a camera has a new image.

    Args:
        path: of the mp4.
        cameras: names, from left to right.
        caption: asked at every new image, on the control thread; must be quick.
        fps: about how many images per second will come.
        queue_size: images that may wait.
        lossless: wait instead of dropping (the lockstep clock).
    """

    def __init__(
        self,
        path: Path,
        cameras: Sequence[str] = ("static", "gripper"),
        caption: Callable[[], Caption] = Caption,
        fps: float = 30.0,
        queue_size: int = 64,
        lossless: bool = False,
    ) -> None:
        if not cameras:
            raise ValueError("video: there is no camera to film")
        self._cameras, self._caption = tuple(cameras), caption
        self._newest_ns: tuple[int, ...] = ()
        self._width, self._height = TILE_PX * len(self._cameras), TILE_PX + 3 * LINE_PX + 10
        self._font = ImageFont.load_default(size=13)
        self._mp4 = Mp4(path, self._width, self._height, fps)
        self._work: Background[_Shot] = Background(
            "video", self._write, self._mp4.close, queue_size, lossless
        )

    def __call__(self, tick: Tick) -> None:
        """Take one tick; a few microseconds."""
        frames = [tick.observation.frames.get(name) for name in self._cameras]
        stamps = tuple(-1 if frame is None else frame.t_ns for frame in frames)
        if stamps == self._newest_ns:
            return
        self._newest_ns = stamps
        images = [_BLACK if frame is None else frame.rgb for frame in frames]
        age = "no latent" if tick.latent_age_s is None else f"latent {tick.latent_age_s:5.2f} s old"
        line = f"tick {tick.index}   {age}   {tick.state}"
        if tick.reason:
            line += f": {tick.reason}"
        self._work.offer(_Shot(images, tick.t_ns, self._caption(), line, tick.state))

    def close(self, timeout_s: float = 60.0) -> bool:
        """Finish the file; False if that took too long or failed. Twice is fine."""
        return self._work.close(timeout_s) and self._work.error is None

    @property
    def _unkept(self) -> int:
        return self._work.written - self._mp4.frames

    def _write(self, shot: _Shot) -> None:
        self._mp4.write(self._draw(shot), shot.t_ns)

    def _draw(self, shot: _Shot) -> U8:
        canvas = Image.new("RGB", (self._width, self._height), (18, 18, 20))
        for i, pixels in enumerate(shot.images):
            tile = Image.fromarray(np.ascontiguousarray(pixels))
            scale = TILE_PX / max(tile.size)
            size = (round(tile.width * scale), round(tile.height * scale))
            canvas.paste(tile.resize(size, Image.Resampling.BILINEAR), (i * TILE_PX, 0))
        draw = ImageDraw.Draw(canvas)
        task, instruction, note = shot.caption
        colour = {"run": GOOD, "stop": BAD}.get(shot.state, DIM)
        rows: list[tuple[str, Any]] = [
            (f"{note}   {task}".strip(), DIM),
            (instruction, INK),
            (shot.line, colour),
        ]
        for row, (text, ink) in enumerate(rows):
            draw.text((8, TILE_PX + 5 + row * LINE_PX), text, fill=ink, font=self._font)
        return np.asarray(canvas)


_BLACK: U8 = np.zeros((8, 8, 3), np.uint8)
