"""One System 2 for one robot or many: newest request in, latent out, at a set cadence.

`GoalScheduler` decides who is served when, on a clock it is given; it knows no socket and
no model. Every robot has its own grid of absolute deadlines `t_first + i / hz`. At a
deadline its newest request is due; robots that are due together go through the engine as
one batch, the longest overdue first, owners (CURVE keys) in turn. One batch at a time:
deadlines that pass by a whole period while the engine is busy are skipped and counted, never
caught up. A new instruction is due at once, since the robot is waiting for it.
`openhelix.system2.publisher` is the process around it.

`Names` says whose name is whose. Two robots under one name would get each other's latents and
act on them, so a name belongs to the robot that uses it until that has been silent for a
while, and a run asks for its name before it starts. A second robot is refused, when it asks
(`claim`) and when it does not.
"""

from __future__ import annotations

import logging
import re
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import numpy as np

from openhelix.runtime.core.clock import Clock, percentiles
from openhelix.runtime.core.interfaces import (
    F32,
    Engine,
    GoalRequest,
    Judgement,
    LatentGoal,
    judged,
)
from openhelix.runtime.transport.wire import TAKEOVER_NS

log = logging.getLogger(__name__)
CLAIM_NS: Final = 10_000_000_000  # how long a claimed name waits for its robot's first request
_NAME: Final = re.compile(r"[\w.:/-]{1,64}", re.ASCII)  # a name becomes part of a topic

# ------------------------------------------------------------------------------------------------
# Names


class NameRefused(ValueError):
    """A robot cannot have a name; one line says why, `reason` is a metric's label."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason


def usable(name: str) -> bool:
    """Whether a robot may be called that."""
    return _NAME.fullmatch(name) is not None


def in_use(heard_ns: int | None, now_ns: int) -> bool:
    """Whether a robot that was heard then still has its name."""
    return heard_ns is not None and now_ns - heard_ns < TAKEOVER_NS


def in_turn(names: Sequence[str], owner_of: Callable[[str], str]) -> Iterator[str]:
    """Yield one robot of each owner after the other: many names bring nobody more."""
    waiting: dict[str, deque[str]] = {}
    for name in names:
        waiting.setdefault(owner_of(name), deque()).append(name)
    while waiting:
        for owner in list(waiting):
            yield waiting[owner].popleft()
            if not waiting[owner]:
                del waiting[owner]


class Names:
    """Claims of runs that are about to ask for their first latent.

    Args:
        clock: a monotonic clock.
        max_robots: how many names there may be at once.
    """

    def __init__(self, clock: Clock, max_robots: int) -> None:
        self._clock, self._max_robots = clock, max_robots
        self._claims: dict[str, tuple[str, int]] = {}  # by name: which run, and since when

    def claim(self, name: str, run: str, heard_ns: Mapping[str, int]) -> None:
        """Reserve a name for a run; again by the same run is fine.

        Args:
            name: the robot's.
            run: identity of the run, new at every start.
            heard_ns: when each robot was last heard.

        Raises:
            NameRefused: the name is in use or unusable, or there are too many robots.
        """
        now = self._clock.now_ns()
        for other, (_, since) in list(self._claims.items()):
            if now - since > CLAIM_NS and not in_use(heard_ns.get(other), now):
                del self._claims[other]
        if self._claims.get(name, ("", 0))[0] != run:
            self._check(name, heard_ns, now)
        self._claims[name] = (run, now)

    def _check(self, name: str, heard_ns: Mapping[str, int], now: int) -> None:
        if not usable(name):
            text = f"robot.id: {name[:80]!r}, must be 1 to 64 letters, digits, `-` and `_`"
            raise NameRefused("bad_name", text)
        if name in self._claims or in_use(heard_ns.get(name), now):
            raise NameRefused(
                "name_taken",
                f"robot.id: {name!r} is in use at this System 2; choose another, or wait "
                f"{CLAIM_NS * 1e-9:.0f} s if that robot has just ended",
            )
        names = self._claims.keys() | heard_ns.keys()
        if name not in names and len(names) >= self._max_robots:
            text = f"system2.connect: this System 2 serves {self._max_robots} robots at most"
            raise NameRefused("too_many_robots", text)


# ------------------------------------------------------------------------------------------------
# Deadlines


class EngineBroken(RuntimeError):
    """The engine does not even do its own warm-up any more; the process should restart."""


class WrongLatents(RuntimeError):
    """The engine gave something else than one finite latent for each request."""

    reason = "latents"


class Sink(Protocol):
    """Where latents go; one topic per robot."""

    def send(self, robot: str, goal: LatentGoal) -> None: ...


@dataclass(slots=True)
class RobotState:
    """What is remembered of one robot."""

    instruction_id: int
    source: str
    due_ns: int  # the next deadline
    heard_ns: int
    sender: object = None  # who speaks under this name; None where nobody says
    owner: str = ""  # whose robot it is: its CURVE key; "" without keys
    pending: GoalRequest | None = None
    seq: int = 0  # latents published, and so the next one's number
    superseded: int = 0  # requests replaced by a newer one before they were due
    skipped: int = 0  # deadlines that passed while the engine was busy
    refused: int = 0
    failed: int = 0
    last_error: str = ""


@dataclass(frozen=True, slots=True)
class Limits:
    """What bounds the load.

    Attributes:
        max_batch: most requests in one engine call.
        max_robots: requests of further robots are shed ("too_many_robots").
        max_wait_s: a request that waited longer than this for its turn is shed ("too_old").
        forget_s: a robot that was silent for so long gives its place back.
        max_failures: after so many failed calls in a row the engine has to show, on an input
            of its own, that it is the requests that are at fault.
    """

    max_batch: int = 8
    max_robots: int = 64
    max_wait_s: float = 5.0
    forget_s: float = 30.0
    max_failures: int = 5

    def __post_init__(self) -> None:
        for name in ("max_batch", "max_robots", "max_wait_s", "forget_s", "max_failures"):
            if not getattr(self, name) > 0:
                raise ValueError(f"limits.{name}: {getattr(self, name)}, must be above 0")


@dataclass(slots=True)
class Totals:
    """Counters over all robots."""

    published: int = 0
    batches: int = 0
    refused: int = 0
    not_understood: int = 0  # of the published
    failed: int = 0
    skipped: int = 0
    shed: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)  # `failed` by reason
    compute_s: deque[float] = field(default_factory=lambda: deque(maxlen=4096))
    wait_s: deque[float] = field(default_factory=lambda: deque(maxlen=4096))


class GoalScheduler:
    """Serves requests at `hz` per robot; see the module's text.

    Args:
        engine: images and instructions to latents.
        sink: where latents go.
        clock: a monotonic clock.
        hz: latents per second for each robot.
        limits: bounds on the load.
        source: identity of this publisher, new at every start.
    """

    def __init__(
        self,
        engine: Engine,
        sink: Sink,
        clock: Clock,
        hz: float,
        limits: Limits | None = None,
        source: str = "",
    ) -> None:
        if not (np.isfinite(hz) and hz > 0):
            raise ValueError(f"hz: {hz}, must be above 0")
        self._engine, self._sink, self._clock = engine, sink, clock
        self._period_ns = max(1, round(1e9 / hz))
        self._limits = limits or Limits()
        self._source = source or uuid.uuid4().hex[:12]
        self.robots: dict[str, RobotState] = {}
        self.totals = Totals()
        self._failures = 0
        self._names = Names(clock, self._limits.max_robots)

    def claim(self, name: str, run: str) -> None:
        """Reserve a name for a run that is about to ask; see `Names`.

        Raises:
            ValueError: the name is in use or unusable, or there are too many robots.
        """
        heard_ns = {robot: state.heard_ns for robot, state in list(self.robots.items())}
        try:
            self._names.claim(name, run, heard_ns)
        except NameRefused as refusal:
            self._shed(refusal.reason, name)
            raise

    def offer(self, request: GoalRequest, sender: object = None, owner: str = "") -> bool:
        """Take a request in place of the robot's older one; False when it was shed or stale.

        Args:
            request: of one robot.
            sender: who sent it, where that is known: another one is refused the name.
            owner: whose robot it is; when there is too much to do, owners take turns.
        """
        now = self._clock.now_ns()
        robot = self.robots.get(request.robot)
        if robot is None:
            if not usable(request.robot):
                self._shed("bad_name", request.robot)
                return False
            if len(self.robots) >= self._limits.max_robots and not self._make_room(now):
                self._shed("too_many_robots", request.robot)
                return False
            robot = RobotState(request.instruction_id, request.source, due_ns=now, heard_ns=now)
            self.robots[request.robot] = robot
        elif (
            robot.sender not in (None, sender)
            and sender is not None
            and in_use(robot.heard_ns, now)
        ):
            self._shed("name_taken", request.robot)
            return False
        robot.heard_ns, robot.sender, robot.owner = now, sender, owner
        fresh = (request.instruction_id, request.source) != (robot.instruction_id, robot.source)
        if not fresh and robot.pending is not None and request.seq < robot.pending.seq:
            self.totals.shed["out_of_order"] += 1
            return False
        if fresh:
            robot.instruction_id, robot.source = request.instruction_id, request.source
            robot.due_ns = now
        if robot.pending is not None:
            robot.superseded += 1
        robot.pending = request
        return True

    def next_due_ns(self) -> int | None:
        """Return when the next robot with a request is due; None while nobody waits."""
        return min((r.due_ns for r in self.robots.values() if r.pending is not None), default=None)

    def serve(self) -> int:
        """Serve the robots that are due, at most one batch; return how many latents went out.

        Raises:
            EngineBroken: see `Limits.max_failures`.
        """
        now = self._clock.now_ns()
        names = [n for n, r in self.robots.items() if r.pending is not None and r.due_ns <= now]
        names.sort(key=lambda name: (self.robots[name].due_ns, self.robots[name].seq))
        batch: list[GoalRequest] = []
        for name in in_turn(names, lambda name: self.robots[name].owner):
            if len(batch) == self._limits.max_batch:
                break
            request = self._take(name, now)
            if request is not None:
                batch.append(request)
        if not batch:
            return 0
        self.totals.batches += 1
        try:
            return self._compute(batch)
        finally:
            self._skip_passed(now)

    def forget_silent(self) -> None:
        """Drop robots not heard of for `forget_s`."""
        limit = self._clock.now_ns() - round(self._limits.forget_s * 1e9)
        for name in [n for n, robot in self.robots.items() if robot.heard_ns < limit]:
            del self.robots[name]

    def _shed(self, reason: str, robot: str) -> None:
        self.totals.shed[reason] += 1
        count = self.totals.shed[reason]
        if count & (count - 1) == 0:  # who is refused asks again and again
            log.warning("robot %.80r refused: %s, %d so far", robot, reason, count)

    def _make_room(self, now: int) -> bool:
        self.forget_silent()
        return len(self.robots) < self._limits.max_robots

    def _take(self, name: str, now: int) -> GoalRequest | None:
        """Move a robot to its next deadline and return the request it is due for."""
        robot = self.robots[name]
        request, robot.pending = robot.pending, None
        waited_s = (now - robot.heard_ns) * 1e-9
        self.totals.wait_s.append(min(now - robot.due_ns, now - robot.heard_ns) * 1e-9)
        # Deadlines at which a silent robot had nothing to ask for are no fault of anybody.
        robot.due_ns += ((now - robot.due_ns) // self._period_ns + 1) * self._period_ns
        if waited_s > self._limits.max_wait_s:
            self.totals.shed["too_old"] += 1
            return None
        return request

    def _skip_passed(self, start_ns: int) -> None:
        """Skip and count deadlines that went by, by a whole period, while the engine worked."""
        now = self._clock.now_ns()
        for robot in self.robots.values():
            late = (now - robot.due_ns) // self._period_ns
            active = robot.heard_ns >= start_ns - 2 * self._period_ns
            if late > 0 and active:
                robot.due_ns += late * self._period_ns
                robot.skipped += late
                self.totals.skipped += late

    def _compute(self, batch: Sequence[GoalRequest]) -> int:
        start = self._clock.now_ns()
        try:
            latents = self._encode(batch)
            judgements = judged(self._engine, [r.instruction for r in batch], latents)
        except ValueError as error:
            if len(batch) > 1:  # find out whose request it is; the others are served
                return sum(self._compute([request]) for request in batch)
            self._refuse(batch[0], str(error))
            return 0
        except Exception as error:
            if len(batch) > 1:
                return sum(self._compute([request]) for request in batch)
            self._fail(batch[0], error)
            return 0
        self._failures = 0
        took = (self._clock.now_ns() - start) * 1e-9
        self.totals.compute_s.append(took)
        parts = zip(batch, latents, judgements, strict=True)
        return sum(self._publish(r, z, j, took) for r, z, j in parts)

    def _encode(self, batch: Sequence[GoalRequest]) -> F32:
        own = ([r.proprio for r in batch],) if self._engine.spec.senses else ()
        latents = self._engine.encode([r.rgb for r in batch], [r.instruction for r in batch], *own)
        if latents.shape[0] != len(batch) or not np.isfinite(latents).all():
            raise WrongLatents(
                f"engine: gave {latents.shape} for {len(batch)} requests, or not finite"
            )
        return latents

    def _publish(
        self, request: GoalRequest, z: F32, judgement: Judgement, compute_s: float
    ) -> bool:
        robot = self.robots[request.robot]
        now = self._clock.now_ns()
        goal = LatentGoal(
            z=z,
            seq=robot.seq,
            instruction_id=request.instruction_id,
            t_obs_ns=request.t_obs_ns,
            t_pub_ns=now,
            spec_id=self._engine.spec.spec_id,
            source=self._source,
            compute_s=compute_s,
            understood=judgement.understood,
            refused=judgement.refused,
        )
        # Counted first: who has the latent and asks for the counts must find it among them.
        robot.seq += 1
        self.totals.published += 1
        self.totals.not_understood += judgement.refused
        try:
            self._sink.send(request.robot, goal)
        except Exception as error:  # what cannot travel is this latent's fault, not the robots'
            robot.seq -= 1
            self.totals.published -= 1
            self.totals.not_understood -= judgement.refused
            self._note(request, error)
            return False
        robot.last_error = ""
        return True

    def _refuse(self, request: GoalRequest, reason: str) -> None:
        robot = self.robots[request.robot]
        robot.refused += 1
        self.totals.refused += 1
        if robot.last_error != reason:  # once, not at every deadline
            log.warning("robot %s, request %d refused: %s", request.robot, request.seq, reason)
        robot.last_error = reason

    def _fail(self, request: GoalRequest, error: Exception) -> None:
        self._note(request, error)
        self._failures += 1
        if self._failures < self._limits.max_failures:
            return
        try:
            self._engine.warm_up()
        except Exception as own:
            raise EngineBroken(
                f"{self._failures} engine calls failed in a row, then its own warm-up: {own}"
            ) from own
        self._failures = 0  # the engine works: no request may make it start anew for everybody

    def _note(self, request: GoalRequest, error: Exception) -> None:
        """Count and tell a failure that is no fault of the request's own text or image."""
        robot = self.robots[request.robot]
        reason = str(getattr(error, "reason", type(error).__name__))
        robot.failed += 1
        self.totals.failed += 1
        self.totals.failures[reason] += 1
        told, robot.last_error = robot.last_error, f"{type(error).__name__}: {error}"
        if robot.last_error != told:  # once, not at every deadline
            log.error("robot %s, request %d: %s", request.robot, request.seq, robot.last_error)

    def health(self) -> dict[str, Any]:
        """Return counters and times; safe to call from another thread."""
        return health_of(self.totals, self.robots)


def health_of(totals: Totals, robots: Mapping[str, RobotState]) -> dict[str, Any]:
    """Return counters and times, of a scheduler or of one that is not there yet."""
    return {
        "published": totals.published,
        "batches": totals.batches,
        "skipped": totals.skipped,
        "refused": totals.refused,
        "not_understood": totals.not_understood,
        "failed": totals.failed,
        "failures": dict(totals.failures),
        "shed": dict(totals.shed),
        "compute_s": percentiles(list(totals.compute_s)),
        "wait_s": percentiles(list(totals.wait_s)),
        "robots": {
            name: {
                "instruction_id": robot.instruction_id,
                "published": robot.seq,
                "skipped": robot.skipped,
                "superseded": robot.superseded,
                "refused": robot.refused,
                "error": robot.last_error,
            }
            for name, robot in list(robots.items())
        },
    }
