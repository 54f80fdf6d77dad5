"""Every number of a System 1 policy in one frozen dataclass, with the presets beside it.

The presets are the documentation: `official_calvin` is what a published checkpoint needs to
be read, `small` is what two CPU cores can train and run. A checkpoint carries its
configuration as JSON, so a field is never renamed without a reader for the old name.

A configuration may come from a stranger's file: every size has a range (`RANGES`), and what they
come to together is limited as well, to `MAX_WEIGHTS` weights and `MAX_FEATURES` numbers for an
image, so that no file makes a policy take more than about 2 GB.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from pydantic import ConfigDict

from openhelix.runtime.core.config import ConfigError
from openhelix.runtime.core.files import as_record
from openhelix.runtime.core.interfaces import ActionSpec, CameraSpec, LatentSpec, PolicySpec
from openhelix.runtime.core.plugins import none_of

# The policy that comes with the project, where one does; `DiffusionPolicy.load("shipped")`.
SHIPPED = Path(__file__).resolve().parent.parent / "checkpoints" / "system1-laptop"

Head = Literal[
    "diffuser_actor", "trajectory", "plain", "dit", "lstm", "transformer", "map", "expert"
]
DIRECT = ("lstm", "transformer", "map")  # heads that give a trajectory at once
Encoder = Literal["light", "vit", "efficientnet"]
Sensor = Literal["rgb", "depth", "tactile", "proprio"]
LIVE: frozenset[Sensor] = frozenset({"rgb", "depth", "tactile"})  # what shows the world as it is
TACTILE = "tactile"  # the camera that shows where the fingertips touch
Prediction = Literal["epsilon", "sample", "v", "flow"]
ScheduleName = Literal["scaled_linear", "linear", "squaredcos_cap_v2", "rectified_flow"]
SamplerName = Literal["ddpm", "ddim", "dpmpp", "euler"]
DIFFUSION_SAMPLERS, FLOW_SAMPLERS = ("ddpm", "ddim", "dpmpp"), ("euler",)
FLOW_PREDICTIONS = ("sample", "flow")

KEYPOSES = 2  # labels of a frame: the next keypose; the next change of the gripper or the end

# Bounds of the gripper-relative workspace on which the published CALVIN checkpoints were
# trained (the union over scenes A to D with a buffer of 1 cm), metres.
OFFICIAL_BOUNDS_M = (
    (-0.30205888509750366, -0.25688798189163208, -0.21557966828346252),
    (0.36127854347229004, 0.3377084231376648, 0.18373555898666382),
)


MAX_WEIGHTS = 250_000_000  # about; the official policy has 19 million
MAX_FEATURES = 64_000_000  # of one image in the encoder; the official policy's have 8 million
RANGES: Mapping[str, tuple[float, float]] = {
    "horizon": (1, 1024),
    "hz": (0.1, 1000),
    "nhist": (1, 64),
    "latent_tokens": (1, 4096),
    "latent_dim": (1, 65_536),
    "latent_memory": (1, 256),
    "n_tasks": (1, 65_536),
    "dim": (6, 4096),
    "heads": (1, 256),
    "encoder_width": (1, 2048),
    "context_layers": (0, 64),
    "layers": (1, 64),
    "ffn_mult": (1, 16),
    "scene_tokens": (0, 65_536),
    "dropout": (0, 0.99),
    "given_rows": (0, 1023),
    "train_steps": (1, 10_000),
    "clip_sample": (0, 1000),
}
PIXELS, WORK_PIXELS = (1, 8192), (8, 512)  # of a side, as delivered and as encoded
MAX_CAMERAS = 8


@dataclass(frozen=True, slots=True)
class CameraConfig:
    """One camera: what the robot delivers and what the encoder works on."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    name: str
    height: int  # pixels, as delivered
    width: int
    work_height: int  # pixels, as encoded
    work_width: int

    def __post_init__(self) -> None:
        for field, (low, high) in (
            *((name, PIXELS) for name in ("height", "width")),
            *((name, WORK_PIXELS) for name in ("work_height", "work_width")),
        ):
            if not low <= getattr(self, field) <= high:
                raise ConfigError(
                    f"cameras: {self.name}.{field}: {getattr(self, field)} is not in {low}..{high}"
                )


@dataclass(frozen=True, slots=True)
class PolicyConfig:
    """A policy's architecture, diffusion and interface."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    head: Head = "trajectory"
    cameras: tuple[CameraConfig, ...] = (
        CameraConfig("static", 200, 200, 100, 100),
        CameraConfig("gripper", 84, 84, 84, 84),
    )
    # What the policy is given of an observation: the rest is masked out. Depth is the point cloud.
    sensors: tuple[Sensor, ...] = ("rgb", "depth", "proprio")
    encoder: Encoder = "light"  # of each camera
    # interface
    horizon: int = 16  # rows of a chunk
    hz: float = 30.0  # rows a second
    nhist: int = 1  # proprioceptive readings, newest last
    # condition
    latent_kind: str = "act_last"
    latent_tokens: int = 1
    latent_dim: int = 512
    latent_memory: int = 1  # how many recent latents are looked at
    latent_model_id: str = ""  # hash of the System 2 weights trained with; "" accepts any
    use_latent: bool = True  # False: null latent and the task table only
    n_tasks: int = 34  # rows of the learned table for "policy only"
    # widths
    dim: int = 144
    heads: int = 6
    encoder_width: int = 32
    context_layers: int = 1
    layers: int = 4
    ffn_mult: int = 2
    scene_tokens: int = 0  # farthest-point-sampled scene tokens; 0 keeps all
    keyposes: int = 0  # next keyposes that the scene's tokens vote for; 0 for none
    dropout: float = 0.0
    given_rows: int = 0  # first rows, at most, that a chunk can be made to go on from; 0 for none
    # diffusion
    train_steps: int = 100
    position_schedule: ScheduleName = "squaredcos_cap_v2"
    rotation_schedule: ScheduleName = "squaredcos_cap_v2"
    prediction: Prediction = "sample"
    sampler: SamplerName = "ddim"
    sample_steps: int = 5
    clip_sample: float = 0.0  # clamp of the predicted clean sample; 0 for none
    rotation: Literal["so3", "euler"] = "so3"
    # Of published weights: "xyzw" were trained reading CALVIN's w, x, y, z in that order.
    quaternion: Literal["wxyz", "xyzw"] = "wxyz"

    def __post_init__(self) -> None:
        for name, (low, high) in RANGES.items():
            if not low <= getattr(self, name) <= high:  # so written that NaN is none either
                raise ConfigError(f"{name}: {getattr(self, name)} is not in {low}..{high}")
        if self.dim % self.heads:
            raise ConfigError(f"dim: {self.dim} is not a multiple of heads={self.heads}")
        if (self.dim // self.heads) % 6 and self.head == "trajectory":
            raise ConfigError(
                f"heads: dim/heads is {self.dim // self.heads}, needs a multiple of 6"
            )
        if not 1 <= self.sample_steps <= self.train_steps:
            raise ConfigError(f"sample_steps: {self.sample_steps} is not in 1..{self.train_steps}")
        self._check_path()
        self._check_sensors()
        if self.given_rows and self.head != "trajectory":
            raise ConfigError(
                f"given_rows: {self.given_rows}; head {self.head!r} goes on from none"
            )
        if self.given_rows >= self.horizon:
            raise ConfigError(
                f"given_rows: {self.given_rows}, must be less than horizon={self.horizon}"
            )
        if self.quaternion != "wxyz" and self.head != "diffuser_actor":
            raise ConfigError(f"quaternion: {self.quaternion!r}; only published weights have it")
        if self.keyposes not in (0, KEYPOSES):
            raise ConfigError(f"keyposes: {self.keyposes} is neither 0 nor {KEYPOSES}")
        if not 1 <= len(self.cameras) <= MAX_CAMERAS:
            raise ConfigError(f"cameras: {len(self.cameras)}, must be 1 to {MAX_CAMERAS}")
        self._check_size()

    @property
    def flow(self) -> bool:
        """Whether noise and trajectory are joined by a straight line: flow matching."""
        return self.position_schedule == "rectified_flow"

    @property
    def sees(self) -> bool:
        """Whether it looks at the world itself; a pseudo dual system's policy does not."""
        return bool(LIVE & set(self.sensors))

    def _check_sensors(self) -> None:
        """Refuse sensors that there are not, and those that head, encoder or cameras lack."""
        if isinstance(self.sensors, str):
            raise ConfigError(f"sensors: {self.sensors!r}; want a list, [{self.sensors}]")
        object.__setattr__(self, "sensors", tuple(self.sensors))  # a file's list
        given = set(self.sensors)
        for name, value, valid in (
            *(("sensors", sensor, get_args(Sensor)) for sensor in self.sensors),
            ("encoder", self.encoder, get_args(Encoder)),
        ):
            if value not in valid:
                raise ConfigError(f"{name}: {none_of(str(value), valid)}")
        if not given or len(given) < len(self.sensors):
            raise ConfigError(f"sensors: {list(self.sensors)}; want one or more, each once")
        if self.head == "diffuser_actor" and given != {"rgb", "depth", "proprio"}:
            raise ConfigError("sensors: published weights need rgb, depth and proprio")
        if (TACTILE in given) != any(camera.name == TACTILE for camera in self.cameras):
            has = "no camera" if TACTILE in given else "a camera"
            raise ConfigError(f"sensors: {list(self.sensors)} beside {has} {TACTILE!r}")
        if self.encoder == "efficientnet" and "rgb" not in given:
            raise ConfigError("encoder: efficientnet sees colours alone: sensors must have rgb")

    def _check_path(self) -> None:
        """Refuse schedules, predictions and samplers that do not go together."""
        if self.flow != (self.rotation_schedule == "rectified_flow"):
            raise ConfigError(
                f"rotation_schedule: {self.rotation_schedule!r}; rectified_flow is for position "
                "and rotation or for neither"
            )
        if self.flow and self.prediction not in FLOW_PREDICTIONS:
            names = " or ".join(FLOW_PREDICTIONS)
            raise ConfigError(f"prediction: {self.prediction!r}; with rectified_flow it is {names}")
        if not self.flow and self.prediction == "flow":
            raise ConfigError("prediction: 'flow' needs both schedules to be rectified_flow")
        if self.sampler not in self.samplers:
            raise ConfigError(f"sampler: {self.sampler!r} is not {' or '.join(self.samplers)}")

    @property
    def samplers(self) -> tuple[str, ...]:
        """The samplers that fit the schedules."""
        return FLOW_SAMPLERS if self.flow else DIFFUSION_SAMPLERS

    def _check_size(self) -> None:
        """Refuse what is within its range field by field, and beyond reason taken together."""
        a_layer = self.dim**2 * (8 + 2 * self.ffn_mult)
        weights = a_layer * (self.layers + self.context_layers) + 16 * self.encoder_width**2
        weights += self.dim * (self.latent_dim + self.n_tasks + 9 * self.horizon)
        if weights > MAX_WEIGHTS:
            raise ConfigError(
                f"dim, layers, ...: about {weights // 10**6} million weights; at most "
                f"{MAX_WEIGHTS // 10**6} million are built"
            )
        for camera in self.cameras:
            features = camera.work_height * camera.work_width * self.encoder_width
            if features > MAX_FEATURES:
                raise ConfigError(
                    f"cameras: {camera.name}: {features // 10**6} million features an image with "
                    f"encoder_width={self.encoder_width}; at most {MAX_FEATURES // 10**6} million"
                )

    @property
    def dt_ns(self) -> int:
        """Nanoseconds between two rows of a chunk."""
        return round(1e9 / self.hz)

    def spec(self) -> PolicySpec:
        """Return what the policy expects and promises; see `openhelix.runtime.core.interfaces`."""
        latent = None
        if self.use_latent:
            latent = LatentSpec(
                self.latent_kind, self.latent_tokens, self.latent_dim, self.latent_model_id
            )
        cameras = tuple(CameraSpec(c.name, c.height, c.width) for c in self.cameras)
        joins = ("blend",)
        if self.head not in (*DIRECT, "diffuser_actor"):  # the others sample with our own loop
            joins = ("blend", "inpaint", *(("prefix",) if self.given_rows else ()))
        return PolicySpec(cameras, latent, ActionSpec(hz=self.hz), self.horizon, joins)

    def to_json(self) -> dict[str, Any]:
        """Return plain data, ready for `json.dumps`."""
        return asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any], where: str = "config") -> PolicyConfig:
        """Read `to_json`'s output.

        Raises:
            BadFile: a field is unknown, of another type or out of range; the line begins with
                `where`.
        """
        return as_record(PolicyConfig, data, where)


def small(**changes: Any) -> PolicyConfig:
    """Return the preset for two CPU cores: a few million parameters, its own light encoder."""
    return replace(PolicyConfig(), **{"keyposes": KEYPOSES, **changes})


def official_calvin(nhist: int = 1, latent_tokens: int = 1, **changes: Any) -> PolicyConfig:
    """Return the preset that published CALVIN checkpoints are read into.

    `nhist` 1 or 3 and `latent_tokens` 1 (OpenHelix) or 16 (3D Diffuser Actor) are in use.
    """
    base = PolicyConfig(
        head="diffuser_actor",
        cameras=(
            CameraConfig("static", 200, 200, 160, 160),
            CameraConfig("gripper", 84, 84, 160, 160),
        ),
        horizon=19,
        nhist=nhist,
        latent_kind="act_last" if latent_tokens == 1 else "clip_text",
        latent_tokens=latent_tokens,
        dim=192,
        heads=8,
        layers=4,
        ffn_mult=1,
        train_steps=25,
        position_schedule="scaled_linear",
        rotation_schedule="squaredcos_cap_v2",
        prediction="epsilon",
        sampler="ddpm",
        sample_steps=25,
        clip_sample=1.0,
        rotation="euler",
    )
    return replace(base, **changes)


def small_flow(**changes: Any) -> PolicyConfig:
    """Return `small` trained by flow matching (Lipman et al. 2023) instead of diffusion."""
    flow = {
        "position_schedule": "rectified_flow",
        "rotation_schedule": "rectified_flow",
        "prediction": "flow",
        "sampler": "euler",
    }
    return small(**{**flow, **changes})


PRESETS = {"small": small, "small_flow": small_flow, "official_calvin": official_calvin}
