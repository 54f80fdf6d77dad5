"""The whole configuration: frozen pydantic models, one YAML file, dotted overrides.

Every number a run depends on has one place, a unit in its name and a valid range. An
unknown key is refused with the nearest valid name, since a misspelt key that is silently
ignored is the costliest kind of default. `ConfigError` always carries exactly one line.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Self, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from openhelix.runtime.core.quaternion import Vec3

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Rate = Annotated[float, Field(gt=0, le=1000)]  # per second; a loop that never sleeps is no rate
Count = Annotated[int, Field(ge=1, lt=2**31)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
MAX_YAML_BYTES = 4 * 1024 * 1024
TARGET = r"^[\w.]+:[\w.]+$"  # "module:Class"
METRICS_PARTS = ("control", "system2", "eval", "system1", "observer")  # in order of their ports
M = TypeVar("M", bound=BaseModel)


# The two failures that a person is told of in one line, without a traceback.


class ConfigError(ValueError):
    """What was asked for is wrong; the line names the field and what is valid. Exit code 2."""


class CommandFailed(RuntimeError):
    """A command could not do its work, through no mistake in what was asked. Exit code 1."""


SENTENCE_CHARS = 500  # of an instruction; what people say is a tenth of that
# Characters that turn the direction of a text around: a terminal would show another sentence.
TURNING = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def checked_sentence(text: object, name: str) -> str:
    """Return an instruction as it is used: trimmed, with single spaces.

    Args:
        text: what was given.
        name: of the field or command, for the message.

    Raises:
        ConfigError: it is no text, empty, too long, or has control characters.
    """
    if not isinstance(text, str):
        raise ConfigError(f"{name}: {type(text).__name__}, expected a sentence")
    plain = " ".join(text.split())
    if not plain:
        raise ConfigError(f"{name}: is empty; write what the robot is to do")
    if len(plain) > SENTENCE_CHARS:
        raise ConfigError(f"{name}: {len(plain)} characters; at most {SENTENCE_CHARS} are taken")
    for place, character in enumerate(plain):
        if unicodedata.category(character) in ("Cc", "Cs", "Cn") or character in TURNING:
            raise ConfigError(
                f"{name}: has a control character (U+{ord(character):04X}) at position {place + 1}"
            )
    return plain


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class Part(_Section):
    """A class to build: where it is and what it is given."""

    target: str = Field(pattern=TARGET)
    options: dict[str, Any] = {}


class EnginePart(Part):
    """A System 2 engine."""

    target: Annotated[str, Field(pattern=TARGET)] = "openhelix.system2.engines.vllm:VllmEngine"


class PolicyPart(Part):
    """A System 1 policy."""

    target: Annotated[str, Field(pattern=TARGET)] = "openhelix.system1.policy:DiffusionPolicy.load"


class Placement(_Section):
    """What a process asks of the machine that hosts it."""

    cpus: NonNegative = 0.5  # a share for placement, not a limit
    gpus: NonNegative = 0.0
    resources: dict[str, float] = {}  # custom Ray resources, for example {robot: 1}
    threads: Count = 1  # OpenMP and torch threads
    nice: Annotated[int, Field(ge=0, le=19)] = 0  # once it is ready; 0 is woken at once
    fifo: Annotated[int, Field(ge=0, le=49)] = 0  # SCHED_FIFO priority of all its threads


class System2Config(_Section):
    """The slow system."""

    engine: EnginePart = EnginePart()
    hz: Rate = 1.0
    camera: str = "static"
    # When a new latent is asked for: `hz` times per second, when somebody changes the scene, or when
    # a gate that was fitted to this System 2 expects another answer. The rest is of the latter two.
    trigger: Literal["cadence", "change", "learned"] = "cadence"
    trigger_floor_s: Positive = 0.2  # least time between two latents
    trigger_ceiling_s: Positive = 10.0  # longest time between two latents
    trigger_base_m: Vec3 = (-0.34, -0.46, 0.24)  # where the arm stands, in W
    trigger_weights: Path | None = None  # of "learned": the gate; None takes the shipped one
    connect: str | None = None  # a System 2 that `openhelix serve` runs; None starts one
    connect_timeout_s: Positive = 60.0  # how long to wait for it to be up
    placement: Placement = Placement(cpus=0.5, threads=1, nice=10)
    blind: bool = False  # System 2 is shown black pictures: what it does without seeing

    @property
    def shortest_s(self) -> float:
        """Least time between two latents."""
        return 1.0 / self.hz if self.trigger == "cadence" else self.trigger_floor_s

    @property
    def longest_s(self) -> float:
        """Longest time between two latents, as long as System 2 keeps up."""
        return 1.0 / self.hz if self.trigger == "cadence" else self.trigger_ceiling_s

    @model_validator(mode="after")
    def _check_trigger(self) -> Self:
        if self.trigger_floor_s >= self.trigger_ceiling_s:
            raise ValueError(
                f"trigger_floor_s: {self.trigger_floor_s:g}, must be less than "
                f"trigger_ceiling_s={self.trigger_ceiling_s:g}"
            )
        if self.trigger_weights is not None and self.trigger != "learned":
            raise ValueError(f"trigger_weights: belongs to trigger=learned, not to {self.trigger}")
        return self

    @model_validator(mode="after")
    def _tell_the_engine(self) -> Self:
        if self.blind and self.connect is not None:
            raise ValueError("blind: belongs where System 2 runs, not beside system2.connect")
        if self.blind and not self.engine.options.get("blind"):
            options = {**self.engine.options, "blind": True}
            seen = self.engine.model_copy(update={"options": options})
            object.__setattr__(self, "engine", seen)
        return self


class System1Config(_Section):
    """The fast system."""

    policy: PolicyPart = PolicyPart()
    replan_steps: Count = 4  # control ticks from one chunk's observation to the next one's
    # How a new chunk follows what is being executed: mixed over `blend_s`, or made to go on from it.
    # Blending lost least where chunks came late: docs/evaluation.md, "Late plans".
    join: Literal["blend", "inpaint", "prefix"] = "blend"
    blend_s: NonNegative = 0.1  # overlap of two chunks over which they are blended
    # Where more of a plan than this share has passed when it arrives, plans are carried out slower,
    # in proportion; 1: never.
    slow_after: Annotated[float, Field(gt=0, le=1)] = 0.25
    latent_memory: Count = 1  # recent latents handed to the policy
    placement: Placement = Placement(cpus=0.5, threads=1, nice=5)


class ControlConfig(_Section):
    """The control loop."""

    clock: Literal["realtime", "lockstep"] = "realtime"
    hz: Rate = 30.0
    fifo_priority: Annotated[int, Field(ge=0, le=99)] = 50  # 0: no SCHED_FIFO
    spin_us: NonNegative = 300.0  # sleep until this long before a deadline, then spin
    cpu: Annotated[int, Field(ge=0)] | None = None  # pin the control thread to this core
    hold_limit_s: Positive = 60.0  # how long one instruction may wait, all in all
    # All of its threads: a normal one that holds the interpreter or a socket while others use
    # the core would stop the control thread, whatever its own priority.
    placement: Placement = Placement(cpus=0.5, threads=1, fifo=5)


class LockstepConfig(_Section):
    """The deterministic clock (paper Sec. 5.6): asynchrony counted in environment steps."""

    interval_steps: Count | None = None  # System 2 refreshes every so many steps; None: hz / HZ2
    latency_steps: Annotated[int, Field(ge=0)] = 0  # steps from a refresh to its arrival
    plan_delay_steps: Annotated[int, Field(ge=0)] = 0  # from an observation to its chunk's arrival


class RobotConfig(_Section):
    """Which robot or simulator, by the name of its driver."""

    name: str = "sim"
    id: str = Field(default="robot0", pattern=r"^[\w-]{1,64}$")  # unique at a shared System 2
    options: dict[str, Any] = {}


def _known_scene(value: str) -> str:
    """A scene's name, as far as it can be told without the worlds themselves."""
    if not re.fullmatch(r"[A-D]|R(0|[1-9]\d{0,4})", value):
        raise ValueError("must be 'A', 'B', 'C' or 'D', or a generated scene, R0 to R99999")
    return value


Point = tuple[float, float, float]


class StaticCamera(_Section):
    """Where the simulated world's static camera stands; what is left out is the scene's own."""

    eye: Point | None = None  # m, in W
    target: Point | None = None  # m, in W: what it looks at
    up: Point | None = None  # which way is up in its image, in W
    fov: Annotated[float, Field(gt=1, lt=120)] | None = None  # degrees, vertical

    @model_validator(mode="after")
    def _looks_somewhere(self) -> Self:
        if self.eye is not None and self.eye == self.target:
            raise ValueError("eye: is where the target is; a camera has to look somewhere")
        if self.up == (0.0, 0.0, 0.0):
            raise ValueError("up: [0, 0, 0] is no direction")
        return self


class WorldConfig(_Section):
    """The simulated world behind the `sim` driver."""

    name: str = "playtable"  # an entry of the group `openhelix.worlds`
    scene: Annotated[str, AfterValidator(_known_scene)] = "D"
    seed: Seed = 0  # of what is drawn at random in its first state
    # {eye: [x, y, z] in m, target: what it looks at, up: a direction, fov: degrees, vertical}, all in
    # W; what is left out is the scene's own.
    static_camera: StaticCamera | None = None
    # Its first state, in words: {drawer: open, blocks: {red: drawer}}; docs/talk.md lists them.
    layout: dict[str, Any] | None = None
    # "tactile" is what PlayTable's fingertips feel, an image like the others.
    cameras: tuple[Literal["static", "gripper", "tactile"], ...] = ("static", "gripper")
    camera_hz: Rate = 10.0
    # A world that the machine is too busy to step looks like a robot that does not answer.
    placement: Placement = Placement(cpus=0.3, fifo=5)
    camera_placement: Placement = Placement(cpus=0.3, nice=5)


@dataclass(frozen=True, slots=True)
class SafetyLimits:
    """Limits in W, for a Panda at CALVIN's table unless said otherwise.

    CALVIN's largest relative action is 0.02 m and 0.05 rad per axis and 1/30 s step, that is
    0.6 m/s and 1.5 rad/s per axis; the speed limits are that along a diagonal, so that no legal
    CALVIN action is cut. The accelerations are the Cartesian limits of Franka's control
    interface (13 m/s², 25 rad/s²).
    """

    box_min_m: Vec3 = (-0.60, -0.70, 0.26)
    box_max_m: Vec3 = (0.60, 0.40, 0.95)
    max_linear_speed_m_s: float = 1.04
    max_angular_speed_rad_s: float = 2.6
    max_linear_acceleration_m_s2: float = 13.0
    max_angular_acceleration_rad_s2: float = 25.0
    max_tick_s: float = 0.1  # a longer tick (a stall) allows no longer step than this one
    camera_max_age_s: float = 1.0
    proprioception_max_age_s: float = 0.25
    latent_max_age_s: float = 4.0  # older: System 2 counts as silent
    latent_grace_s: float = 5.0  # how long to go on with the last latent after that
    frozen_motion_m: float = 0.03  # an image unchanged over this much motion is frozen

    def __post_init__(self) -> None:
        for axis, low, high in zip("xyz", self.box_min_m, self.box_max_m, strict=True):
            if not (isfinite(low) and isfinite(high) and low < high):
                raise ValueError(f"safety.box: {axis} runs from {low} to {high} m, which is empty")
        for name in _POSITIVE:
            value = getattr(self, name)
            if not (isfinite(value) and value > 0.0):
                raise ValueError(f"safety.{name}: {value} is not a positive number")
        if not (isfinite(self.latent_grace_s) and self.latent_grace_s >= 0.0):
            raise ValueError(f"safety.latent_grace_s: {self.latent_grace_s} is no number from 0")


_POSITIVE = (
    "max_linear_speed_m_s",
    "max_angular_speed_rad_s",
    "max_linear_acceleration_m_s2",
    "max_angular_acceleration_rad_s2",
    "max_tick_s",
    "camera_max_age_s",
    "proprioception_max_age_s",
    "latent_max_age_s",
    "frozen_motion_m",
)


class TasksConfig(_Section):
    """What the robot is told to do."""

    sequence: Annotated[int, Field(ge=0, le=999)] = 0  # index into the CALVIN sequences
    steps_limit: Count = 360  # environment steps per instruction
    stop_at_failure: bool = False  # CALVIN's protocol; False attempts all tasks
    count_holds: bool = False  # steps held still, as before the first latent, count to the limit
    instruction: str | None = None  # a sentence of one's own, instead of a sequence
    instructions: tuple[str, ...] = ()  # several, one after the other
    task: str | None = None  # one of the world's tasks, from a state in which it can be done

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        given = [name for name in ("instruction", "instructions", "task") if getattr(self, name)]
        if len(given) > 1:
            raise ValueError(f"{given[0]} and {given[1]} are both given; give one")
        if self.instruction is not None:
            checked_sentence(self.instruction, "tasks.instruction")
        for number, text in enumerate(self.instructions, 1):
            checked_sentence(text, f"tasks.instructions[{number}]")
        return self

    @property
    def sentences(self) -> tuple[str, ...]:
        """The sentences of one's own, as they are used; () for a sequence or a task."""
        own = self.instructions if self.instruction is None else (self.instruction,)
        return tuple(checked_sentence(text, "tasks.instructions") for text in own)


class OutputConfig(_Section):
    """What a run leaves behind."""

    folder: Path = Path("outputs")
    video: bool = True
    track: bool = True  # what the robot did, without images: 2 to 4 MB per minute, for film, viewer
    record: bool = False  # the same with every image: 400 MB per minute
    viewer: bool = False
    urdf: Path | None = None  # of the arm, for the viewer; its root is the world frame
    # The first of the ports at which the parts serve their metrics (METRICS_PARTS); 0: free
    # ones, null: no metrics.
    metrics_port: Annotated[int, Field(ge=0, le=65000)] | None = 9108
    metrics_host: str = "127.0.0.1"  # the address that they bind; whoever reaches it may read
    live: bool = True
    status: bool = True  # keep what `openhelix status` shows, in the process that looks on

    def metrics_port_of(self, part: str) -> int | None:
        """Return where a part of the run serves its metrics; 0 for a free port."""
        port = self.metrics_port
        return port + METRICS_PARTS.index(part) if port else port


class TransportConfig(_Section):
    """How the processes reach one another."""

    host: str = "ipc"  # "ipc", or the address at which the nodes reach one another
    hosts: dict[str, str] = {}  # addresses of single nodes, for example {system2: 10.0.0.2}
    base_port: Annotated[int, Field(ge=1024, le=65000)] = 5700
    keys: Path | None = None  # folder of CURVE keys; required off loopback


class RunConfig(_Section):
    """One run of the whole system."""

    seed: Seed = 0
    robot: RobotConfig = RobotConfig()
    world: WorldConfig = WorldConfig()
    tasks: TasksConfig = TasksConfig()
    system1: System1Config = System1Config()
    system2: System2Config = System2Config()
    control: ControlConfig = ControlConfig()
    lockstep: LockstepConfig = LockstepConfig()
    safety: SafetyLimits = SafetyLimits()
    transport: TransportConfig = TransportConfig()
    output: OutputConfig = OutputConfig()
    ray: bool = True
    ray_address: str | None = None  # a running cluster; None starts one here

    @property
    def sha256(self) -> str:
        """Twelve hexadecimal digits of the settings, for a report to say which they were.

        Where a run's files go is not among them.
        """
        text = json.dumps(self.model_dump(mode="json", exclude={"output"}), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def interval_steps(self) -> int:
        """Environment steps from one refresh of System 2 to the next in lockstep."""
        if self.lockstep.interval_steps is not None:
            return self.lockstep.interval_steps
        return max(1, round(self.control.hz / self.system2.hz))


def load(path: Path | None, overrides: Iterable[str] = ()) -> RunConfig:
    """Return the configuration of a run; see `read_settings`."""
    return read_settings(RunConfig, path, overrides)


def read_settings(model: type[M], path: Path | None, overrides: Iterable[str] = ()) -> M:
    """Read a YAML file, apply `a.b=value` overrides, validate.

    Raises:
        ConfigError: in one line, the field and what is valid.
    """
    return validate(model, apply_overrides(read_yaml(path), overrides, model))


class _StrictLoader(yaml.SafeLoader):
    """YAML in which a key that is there twice is an error: the last would win without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    where = key.start_mark.line + 1
                    raise yaml.YAMLError(f"line {where}: {key.value!r} is there twice")
                seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)


def read_yaml(path: Path | None) -> dict[str, Any]:
    """Return the mapping in a YAML file; an empty one without a file."""
    if path is None:
        return {}
    try:
        with path.open() as file:
            text = file.read(MAX_YAML_BYTES + 1)
        if len(text) > MAX_YAML_BYTES:
            raise ConfigError(f"{path}: larger than {MAX_YAML_BYTES >> 20} MiB: no settings")
        data = yaml.load(text, _StrictLoader)
    except FileNotFoundError:
        raise ConfigError(f"--config: no file {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config: cannot read {path}: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ConfigError(f"{path}: nested too deep") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a mapping of sections, got {type(data).__name__}")
    return data


def apply_overrides(
    data: dict[str, Any], overrides: Iterable[str], model: type[BaseModel] | None = None
) -> dict[str, Any]:
    """Return a copy of `data` with each `a.b=value` set.

    Values are read as YAML; where `model` has a text or a path they are taken as they stand,
    for an instruction may hold a colon and a folder's name may look like a number. Where a word
    names another `target`, the options that `data` has for its own go: they are that class's.
    """
    result, overrides = _copy(data), list(overrides)
    _drop_options(result, overrides, model)
    for text in overrides:
        key, sign, value = text.partition("=")
        if not sign or not key:
            raise ConfigError(f"{text!r}: write an override as section.field=value")
        if not value.strip():  # to YAML nothing is null: a default would be used without a word
            raise ConfigError(f"{key}: nothing follows '='; write a value, or null for none")
        node = result
        *parents, last = key.removeprefix("--").replace("-", "_").split(".")
        for name in parents:
            child = node.setdefault(name, {})
            if not isinstance(child, dict):
                raise ConfigError(f"{key}: {name!r} holds a value, not a section")
            node = child
        node[last] = value if _is_text(model, [*parents, last], value) else _from_yaml(value)
    return result


def _drop_options(
    data: dict[str, Any], overrides: Sequence[str], model: type[BaseModel] | None
) -> None:
    """Take out the options of every part that a word gives another target."""
    for text in overrides:
        key, _, value = text.partition("=")
        *parents, last = key.removeprefix("--").split(".")
        node: Any = data
        section: Any = model
        for name in parents:
            node = node.get(name) if isinstance(node, dict) else None
            field = getattr(section, "model_fields", {}).get(name)
            section = field.annotation if field is not None else None
        if last != "target" or not isinstance(node, dict) or "options" not in node:
            continue
        field = getattr(section, "model_fields", {}).get("target")
        if _from_yaml(value) != node.get("target", field.default if field is not None else None):
            del node["options"]


def _from_yaml(value: str) -> Any:
    try:
        return yaml.safe_load(value)
    except (yaml.YAMLError, RecursionError):
        return value


def _is_text(model: type[BaseModel] | None, path: Sequence[str], value: str) -> bool:
    """Whether a value is for a field of text or a path, and is neither quoted nor null."""
    section: Any = model
    for name in path:
        field = getattr(section, "model_fields", {}).get(name)
        section = field.annotation if field is not None else None
    choices = get_args(section) if get_origin(section) in (Union, UnionType) else (section,)
    kinds = {kind for kind in choices if kind is not type(None)}
    return (
        bool(kinds)
        and kinds <= {str, Path}
        and value not in ("null", "~")
        and (value[0] not in "\"'")
    )


def validate(model: type[M], data: dict[str, Any]) -> M:
    """Return `model(**data)`; a wrong value becomes a one-line `ConfigError`."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ConfigError(_explain(model, first)) from None


def _explain(model: type[BaseModel], error: Any) -> str:
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"{where}: unknown key{_suggestion(model, error['loc'])}"
    return explain(where, error)


def explain(where: str, error: Any) -> str:
    """Return pydantic's account of one error as a line that begins with `where`."""
    value = "" if isinstance(error["input"], dict) else f", got {error['input']!r}"
    text = re.sub("a valid (tuple|array)", "a list", error["msg"].removeprefix("Value error, "))
    if error["msg"].startswith("Value error, "):  # our own words say what was given
        if where and text.startswith(f"{where}."):
            return text  # and which field of the section it is
        name = where.removeprefix("--").rpartition(".")[2]
        for said in (name, name.removesuffix("s")) if name else ():
            text = text.removeprefix(f"{said}: ")  # and may name the field themselves
        return f"{where}: {text}" if where else text
    return f"{where}: {text[0].lower()}{text[1:]}{value}"


def _suggestion(model: type[BaseModel], loc: Sequence[Any]) -> str:
    section: Any = model
    for name in loc[:-1]:
        field = getattr(section, "model_fields", {}).get(name)
        section = field.annotation if field is not None else None
        if get_origin(section) in (Union, UnionType):  # a section that may be null
            kinds = [kind for kind in get_args(section) if hasattr(kind, "model_fields")]
            section = kinds[0] if kinds else None
    names = list(getattr(section, "model_fields", getattr(section, "__dataclass_fields__", {})))
    near = difflib.get_close_matches(str(loc[-1]), names, n=1, cutoff=0.5)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; valid: {', '.join(names)}" if names else ""


def _copy(data: dict[str, Any]) -> dict[str, Any]:
    return {key: _copy(value) if isinstance(value, dict) else value for key, value in data.items()}
