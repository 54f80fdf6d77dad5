"""A run in Rerun: the scene large, images with the plan in them, and what was said, over time.

Rerun is large and optional (`pip install 'openhelix[viewer]'`); it is imported only when a viewer is
asked for. It runs off the control thread: a viewer that is slow or gone loses pictures, counted, and
nothing else. The same class shows a run that is alive, writes `run.rrd` beside a report, and makes
one of a recording afterwards (`openhelix view`).

What is written is thinned to stay below 10 MB per minute: images as JPEG at most ten times per second,
poses fifteen, a coarse point cloud once. A file gets many rows at once, for every piece that is
written of an entity costs more than a kilobyte; who looks on live sees each row soon.
"""

from __future__ import annotations

import importlib
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import numpy as np

from openhelix.runtime.core.interfaces import F64, ActionChunk, CameraFrame, LatentGoal
from openhelix.runtime.observe.background import Background, Counted
from openhelix.runtime.observe.overlay import TRAIL, About, encode_jpeg, halves, strokes
from openhelix.runtime.observe.ticks import TickMessage

FILE_NAME: Final = "run.rrd"
IMAGE_S, POSE_S, CLOUD_S = 0.1, 1 / 15, 1.0  # least time between two of a kind
JPEG_QUALITY: Final = 60
CLOUD_STEP: Final = 4  # every fourth pixel, both ways
TRAIL_S: Final = 8.0
WINDOW_S: Final = 60.0  # of the curves
PIECE_S: Final = 5.0  # how much of a run a file may lack when the process is killed
FRUSTUM_M: Final = 0.06  # a camera 3.6 m away must not be what one sees of the scene
TARGET: Final = (255, 190, 60)
STATES: Final[Mapping[str, tuple[str, int]]] = {
    "wait": ("waits for a plan", 0x9AA4AFFF),
    "run": ("runs", 0x3B8EDBFF),
    "hold": ("holds", 0xE2A23BFF),
    "stop": ("stopped", 0xD1495BFF),
}
LEVELS: Final = {"held": "WARN"}
SERVED: Final = "256MB"  # of a run, kept for those who look later
UP_S: Final = 30.0  # for Rerun to begin, on a busy machine


class ViewerFailed(RuntimeError):
    """Rerun does not work; the message says how."""


class ViewerMissing(ValueError):
    """Rerun is not installed; the message says how to get it."""


class RerunViewer(Counted):
    """A sink that shows a run.

    Args:
        path: file to write; None serves it instead, at `url`, to viewers that connect.
        about: of the run.
        queue_size: ticks that may wait.
        lossless: wait instead of dropping (the lockstep clock, and recordings).

    Attributes:
        url: where a viewer connects; None for a file.

    Raises:
        ViewerMissing: rerun-sdk is not installed.
        ViewerFailed: its server does not begin.
    """

    def __init__(
        self,
        path: Path | None = None,
        about: About | None = None,
        queue_size: int = 64,
        lossless: bool = False,
    ) -> None:
        self._rr = rr = require()
        self._about = about or About()
        batching = None
        if path is not None:
            batching = rr.ChunkBatcherConfig(flush_tick=timedelta(seconds=PIECE_S))
        name = f"openhelix {self._about.robot}"
        self._stream = rr.RecordingStream(name, batcher_config=batching)
        self.url: str | None = None
        self._server: RerunProcess | None = None
        if path is None:
            # Its own server, within this process, would listen on every network of this host.
            self._server = RerunProcess("--serve-grpc", "--server-memory-limit", SERVED)
            self._server.answers()
            self.url = self._server.url
            self._stream.connect_grpc(self.url)
        else:
            self._stream.save(str(path))
        self._due_s: dict[str, float] = {}  # when each kind of thing may be logged again
        self._start_ns: int | None = None
        self._frames_ns: dict[str, int] = {}
        self._links: dict[int, str] = {}  # entities of the scenery's links
        self._places: F64 | None = None
        self._joints: list[Any] = []  # of the URDF
        self._plan: ActionChunk | None = None
        self._last_tcp: F64 | None = None
        self._latents: list[LatentGoal] = []  # the instruction's first and newest
        self._state = ""
        self._work: Background[TickMessage] = Background(
            "viewer", self._show, self._end, queue_size, lossless
        )

    def __call__(self, message: TickMessage) -> None:
        """Take one tick; a few microseconds."""
        self._work.offer(message)

    def close(self, timeout_s: float = 30.0) -> bool:
        """Send what waits; False if that took too long. Twice is fine."""
        return self._work.close(timeout_s)

    def _end(self) -> None:
        try:
            self._stream.flush(timeout_sec=10.0)
            self._stream.disconnect()
        finally:
            if self._server is not None:
                self._server.end()

    def _show(self, message: TickMessage) -> None:
        tick = message.tick
        if self._start_ns is None:
            self._start_ns = tick.t_ns
            self._begin(message)
        t_s = (tick.t_ns - self._start_ns) * 1e-9
        self._stream.set_time("run", duration=t_s)
        if self._plan is not None and self._plan.instruction_id != tick.observation.instruction_id:
            self._plan = None
            self._stream.log("world/plan", self._rr.Clear(recursive=True))
        self._plan = tick.new_chunk or self._plan
        self._tell(message)
        self._cameras(message, t_s)
        self._arm(message, t_s)
        if tick.new_chunk is not None:
            self._chunk(tick.new_chunk)
        self._numbers(message)

    # -- before the first tick ------------------------------------------------------------

    def _begin(self, message: TickMessage) -> None:
        rr, log = self._rr, self._stream.log
        log("world", rr.ViewCoordinates.RIGHT_HAND_Z_UP, static=True)
        for name, (path, colour) in SERIES.items():
            log(path, rr.SeriesLines(names=name, colors=colour, widths=2.0), static=True)
        labels = [label for label, _ in STATES.values()]
        colours = np.array([colour for _, colour in STATES.values()], np.uint32)
        log("state/loop", rr.StateConfiguration(values=labels, colors=colours), static=True)
        scenery = self._about.scenery
        if scenery is not None and message.visual is not None:
            for part in scenery.parts():
                path = f"world/scene/{part.name}"
                self._links[part.link] = path
                log(path, _mesh(rr, part.triangles, part.colours), static=True)
        if self._about.urdf is not None:
            self._urdf(self._about.urdf)
        self._stream.send_blueprint(self._blueprint(message))

    def _urdf(self, path: Path) -> None:
        tree = importlib.import_module("rerun.urdf").UrdfTree.from_file_path(
            path, entity_path_prefix="world/arm"
        )
        tree.log_urdf_to_recording(self._stream)
        self._joints = [j for j in tree.joints() if j.joint_type in ("revolute", "continuous")]

    def _blueprint(self, message: TickMessage) -> Any:
        rrb = importlib.import_module("rerun.blueprint")
        cameras = list(message.tick.observation.frames)
        eye, target = _eye(message, self._links)
        scene = rrb.Spatial3DView(
            origin="world",
            name="Scene",
            eye_controls=rrb.EyeControls3D(position=eye, look_target=target, eye_up=(0, 0, 1)),
            line_grid=rrb.LineGrid3D(visible=not self._links),
            background=(28, 32, 38),
            overrides={"world/trail": rrb.VisibleTimeRanges(_last(rrb, TRAIL_S))},
        )
        images = [
            rrb.Spatial2DView(origin=f"world/cameras/{name}", name=name, contents="$origin/**")
            for name in cameras
        ]
        window = _last(rrb, WINDOW_S)
        curves = [
            rrb.TimeSeriesView(
                origin="latent",
                name="Latent age, s",
                contents=["+ latent/age", "+ latent/limit"],
                axis_y=rrb.ScalarAxis(range=(0.0, 1.15 * self._about.latent_max_age_s)),
                time_ranges=window,
            ),
            rrb.TimeSeriesView(
                origin="latent",
                name="Similarity of latents",
                contents=["+ latent/similarity/**"],
                axis_y=rrb.ScalarAxis(range=(-0.1, 1.05)),
                time_ranges=window,
            ),
            rrb.TimeSeriesView(
                origin="loop", name="Tick, ms", contents=["+ loop/**"], time_ranges=window
            ),
            rrb.TimeSeriesView(
                origin="gripper", name="Gripper, m", contents=["+ gripper/**"], time_ranges=window
            ),
        ]
        told = rrb.TextLogView(origin="told", name="What happened")
        states = rrb.StateTimelineView(origin="state", name="State")
        side = rrb.Vertical(
            *([rrb.Horizontal(*images)] if images else []),
            told,
            rrb.Tabs(*curves),
            row_shares=[*([4] if images else []), 3, 3],
        )
        return rrb.Blueprint(
            rrb.Horizontal(
                rrb.Vertical(scene, states, row_shares=[7, 1]), side, column_shares=[3, 2]
            ),
            rrb.BlueprintPanel(state="collapsed"),
            rrb.SelectionPanel(state="collapsed"),
            rrb.TimePanel(state="collapsed", timeline="run"),
        )

    # -- at every tick --------------------------------------------------------------------

    def _is_due(self, kind: str, t_s: float, every_s: float) -> bool:
        if t_s < self._due_s.get(kind, -math.inf):
            return False
        self._due_s[kind] = t_s + every_s - 1e-3
        return True

    def _tell(self, message: TickMessage) -> None:
        rr = self._rr
        for entry in message.entries:
            good = entry.success is True or entry.kind == "seen"
            level = LEVELS.get(entry.kind, "INFO")
            self._stream.log(
                "told",
                rr.TextLog(
                    entry.line(),
                    level="WARN" if entry.success is False else level,
                    color=(90, 170, 255) if good else None,
                ),
            )
        state = message.tick.state
        if state != self._state:
            self._state = state
            self._stream.log("state/loop", rr.StateChange(state=STATES[state][0]))
            if message.tick.reason:
                self._stream.log("told", rr.TextLog(message.tick.reason, level="WARN"))

    def _cameras(self, message: TickMessage, t_s: float) -> None:
        rr, log = self._rr, self._stream.log
        for name, frame in message.tick.observation.frames.items():
            if self._frames_ns.get(name) == frame.t_ns or not self._is_due(name, t_s, IMAGE_S):
                continue
            self._frames_ns[name] = frame.t_ns
            at = f"world/cameras/{name}"
            height, width = frame.rgb.shape[:2]
            T = frame.T_world_cam
            log(at, rr.Transform3D(translation=T[:3, 3], mat3x3=T[:3, :3]))
            log(
                at,
                rr.Pinhole(
                    image_from_camera=frame.K,
                    width=width,
                    height=height,
                    image_plane_distance=FRUSTUM_M,
                ),
            )
            jpeg = encode_jpeg(frame.rgb, JPEG_QUALITY)
            log(f"{at}/rgb", rr.EncodedImage(contents=jpeg, media_type="image/jpeg"))
            self._drawn_plan(f"{at}/rgb/plan", frame)
            # Beside the scene itself a cloud of its own pixels only hides it.
            if frame.depth is None or self._links:
                continue
            if self._is_due(f"{name} cloud", t_s, CLOUD_S):
                points, colors = point_cloud(frame, CLOUD_STEP)
                shown = points.astype(np.float32)
                log(f"world/points/{name}", rr.Points3D(shown, colors=colors, radii=0.003))

    def _drawn_plan(self, path: str, frame: CameraFrame) -> None:
        """The plan as the camera would see it, over its image."""
        drawn = []
        if self._plan is not None:
            drawn = strokes(frame, self._plan, self._about.committed)
        lines, colours = [line for line, _ in drawn], [colour for _, colour in drawn]
        strips = self._rr.LineStrips2D(lines, colors=colours, radii=0.6, draw_order=10)
        self._stream.log(path, strips)

    def _chunk(self, chunk: ActionChunk) -> None:
        parts = halves(chunk, self._about.committed)
        lines = [points.astype(np.float32) for points, _ in parts]
        colours = [colour for _, colour in parts]
        strips = self._rr.LineStrips3D(lines, colors=colours, radii=[0.004, 0.0025])
        self._stream.log("world/plan", strips)

    def _arm(self, message: TickMessage, t_s: float) -> None:
        rr, log = self._rr, self._stream.log
        if not self._is_due("poses", t_s, POSE_S):
            return
        tick = message.tick
        pose = tick.observation.tcp_pose
        if self._last_tcp is not None and np.linalg.norm(pose[:3] - self._last_tcp) > 1e-4:
            log(
                "world/trail",
                rr.LineStrips3D(
                    [np.stack([self._last_tcp, pose[:3]]).astype(np.float32)],
                    colors=TRAIL,
                    radii=0.0015,
                ),
            )
        self._last_tcp = pose[:3]
        target = tick.sent.pose[:3].astype(np.float32)
        log("world/target", rr.Points3D([target], radii=0.007, colors=TARGET))
        scenery = self._about.scenery
        if scenery is not None and message.visual is not None:
            places = scenery.transforms(message.visual)
            before, self._places = self._places, places
            for link, path in self._links.items():
                T = places[link]
                if before is None or np.abs(T - before[link]).max() > 1e-5:
                    log(path, rr.Transform3D(translation=T[:3, 3], mat3x3=T[:3, :3]))
        for joint, angle in zip(self._joints, tick.observation.joints, strict=False):
            log(f"world/joints/{joint.name}", joint.compute_transform(float(angle), clamp=False))
        if not self._links and not self._joints:
            log(
                "world/tcp",
                rr.Transform3D(translation=pose[:3], quaternion=rr.Quaternion(xyzw=pose[3:])),
                rr.TransformAxes3D(0.08),
            )

    def _numbers(self, message: TickMessage) -> None:
        tick = message.tick
        values: dict[str, float | None] = {
            "loop/duration": tick.duration_s * 1e3,
            "latent/age": tick.latent_age_s,
            "latent/limit": self._about.latent_max_age_s,
            "gripper/width": tick.observation.gripper_width,
        }
        latent = tick.new_latent
        if latent is not None:
            if self._latents and self._latents[0].instruction_id != latent.instruction_id:
                self._latents.clear()
            if self._latents:
                values["latent/similarity/before"] = similarity(self._latents[-1], latent)
                values["latent/similarity/first"] = similarity(self._latents[0], latent)
            self._latents = [*self._latents[:1], latent]
        for path, value in values.items():
            if value is not None:
                self._stream.log(path, self._rr.Scalars(value))


SERIES: Final[Mapping[str, tuple[str, int]]] = {
    "age of the latent in use": ("latent/age", 0x3B8EDBFF),
    "stops the robot": ("latent/limit", 0xD1495BFF),
    "to the latent before": ("latent/similarity/before", 0x3B8EDBFF),
    "to the instruction's first": ("latent/similarity/first", 0xE2A23BFF),
    "a tick's own work": ("loop/duration", 0x3B8EDBFF),
    "between the fingertips": ("gripper/width", 0x3B8EDBFF),
}


def _last(rrb: Any, seconds: float) -> Any:
    """The time range of a view that ends at what is shown."""
    boundary = rrb.TimeRangeBoundary.cursor_relative
    return rrb.VisibleTimeRange("run", start=boundary(seconds=-seconds), end=boundary(seconds=0.0))


def similarity(a: LatentGoal, b: LatentGoal) -> float:
    """Return the cosine of two latents, all tokens together; 0 where one is nothing."""
    x, y = a.z.reshape(-1).astype(np.float64), b.z.reshape(-1).astype(np.float64)
    if x.shape != y.shape:
        return 0.0
    size = float(np.linalg.norm(x) * np.linalg.norm(y))
    return float(x @ y) / size if size > 0 else 0.0


def _eye(message: TickMessage, links: Mapping[int, str]) -> tuple[Sequence[float], Sequence[float]]:
    """Where to look from, and at what: the arm's workplace, over the shoulder of the camera."""
    tcp = message.tick.observation.tcp_pose[:3]
    frames = list(message.tick.observation.frames.values())
    target = tcp - np.array([0.0, 0.0, 0.1])
    if not frames:
        return [*(tcp + np.array([1.1, -1.1, 0.8]))], [*target]
    away = frames[0].T_world_cam[:3, 3] - target
    distance = min(float(np.linalg.norm(away)), 1.7)
    return [*(target + away / np.linalg.norm(away) * distance)], [*target]


def _mesh(rr: Any, triangles: Any, colours: Any) -> Any:
    """Triangles as a mesh with the corners that they share, and smooth where nearly flat."""
    edges = np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0])
    flat = edges / np.maximum(np.linalg.norm(edges, axis=1, keepdims=True), 1e-12)
    return rr.Mesh3D(
        vertex_positions=triangles.reshape(-1, 3).astype(np.float32),
        vertex_normals=np.repeat(flat, 3, axis=0).astype(np.float32),
        vertex_colors=np.repeat(colours, 3, axis=0),
    )


def point_cloud(frame: CameraFrame, step: int) -> tuple[Any, Any]:
    """Return points (n, 3) in W and colours (n, 3) of every `step`-th pixel with a depth.

    Raises:
        ValueError: the frame has no depth.
    """
    every = slice(None, None, step)
    points = frame.points(every, every).reshape(-1, 3)
    assert frame.depth is not None
    kept = (frame.depth[every, every] > 0).reshape(-1)
    return points[kept], frame.rgb[::step, ::step].reshape(-1, 3)[kept]


class RerunProcess:
    """A program of Rerun's, which only this host can reach.

    Args:
        words: of its command line.

    Attributes:
        url: where data goes and comes from, where it serves them.
        page: with `--web-viewer`, what a browser opens.
    """

    def __init__(self, *words: str) -> None:
        self._port, shown = free_port(), free_port()
        self.url = f"rerun+http://127.0.0.1:{self._port}/proxy"
        ports = ["--port", str(self._port)]
        if "--web-viewer" in words:
            source = next((word for word in words if "://" in word), self.url)
            self.page = f"http://127.0.0.1:{shown}/?url={quote(source, safe='')}"
            ports += ["--web-viewer-port", str(shown)]
            self._port = shown
        command = [sys.executable, "-m", "rerun", *words, "--bind", "127.0.0.1", *ports]
        # What it logs is for its developers. The module starts a child, which ends with its session.
        env = {"RUST_LOG": "error"} | os.environ
        self.process = subprocess.Popen(command, start_new_session=True, env=env)

    def answers(self) -> None:
        """Wait until it can be connected to.

        Raises:
            ViewerFailed: it cannot, and has been ended.
        """
        end_s = time.monotonic() + UP_S
        while self.process.poll() is None and time.monotonic() < end_s:
            with suppress(OSError), socket.create_connection(("127.0.0.1", self._port), 0.2):
                return
            time.sleep(0.05)
        code = self.process.poll()
        self.end()
        raise ViewerFailed(
            f"Rerun does not answer after {UP_S:g} s"
            if code is None
            else f"Rerun has ended with {code}"
        )

    def end(self) -> None:
        """End it; safe to call twice."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(3.0)


def free_port() -> int:
    """Return a port of this host that nobody uses just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def require() -> Any:
    try:
        return importlib.import_module("rerun")
    except ModuleNotFoundError:
        raise ViewerMissing(
            "output.viewer: Rerun is not installed; `.venv/bin/python -m pip install "
            "'rerun-sdk>=0.41'` installs it (about 490 MB)"
        ) from None
