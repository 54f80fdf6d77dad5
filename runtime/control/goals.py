"""Where latent goals come from: another process (`WireGoals`) or a schedule (`LockstepGoals`).

The loop offers its newest image every tick and polls; it never waits. `recent` holds the
last latents of the current instruction, newest last. What is not what was agreed is counted and
never used: a latent for another instruction, which is no longer followed; one of a model other
than the run began with, which System 1 would misinterpret even if its shape matches; one whose
image is from the future, from too long ago, or from before the robot was last stopped. A latent
whose instruction System 2 does not understand (`LatentGoal.refused`) is counted and empties
`recent`: while it is the newest there is nothing to plan from, and the robot holds.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable
from math import inf
from typing import Final, Protocol

from openhelix.runtime.control.gate import LearnedTrigger
from openhelix.runtime.control.trigger import Cadence, Trigger
from openhelix.runtime.core.interfaces import (
    F32,
    U8,
    CameraFrame,
    Engine,
    GoalRequest,
    Judgement,
    LatentGoal,
    LatentSpec,
    Observation,
    PartFailed,
    encode_one,
    judged,
    proprio_of,
)
from openhelix.runtime.core.safety import Watchdog
from openhelix.runtime.transport.wire import ReaderStats

MISTIMED: Final = ("future", "old", "before_stop")


class Goals(Protocol):
    """What the loop knows of System 2."""

    recent: deque[LatentGoal]
    received: int
    void: int  # for another instruction
    mismatched: int  # of another model
    mistimed: Counter[str]  # dropped for the time of their image, by reason; see `MISTIMED`
    mismatch: str  # what the first of those was; "" while there was none
    refusals: int  # of this run's latents, those whose instruction was not understood
    newest: LatentGoal | None  # of the current instruction, refused or not
    latencies_s: deque[float]  # the engine's time for each latent received

    @property
    def missed(self) -> int:
        """Latents published but lost on the way."""

    def begin(self, instruction_id: int, instruction: str) -> None:
        """A new instruction: older latents are void from here on."""

    def forget(self, now_ns: int) -> None:
        """The robot was stopped: what was seen until now is no goal any more."""

    def update(self, observation: Observation, now_ns: int) -> LatentGoal | None:
        """Offer the newest image and return a newly arrived latent, if there is one."""

    def close(self) -> None: ...


def refused(goals: Goals | None) -> bool:
    """Whether the current instruction is one that System 2 does not understand."""
    return goals is not None and goals.newest is not None and goals.newest.refused


class _Recent:
    """The newest latents of the current instruction and of the expected model.

    Args:
        memory: how many to keep.
        max_age_s: the oldest image, in seconds, that a latent may be of when it arrives.
        trigger: says when System 2 is asked; None: whenever the image is new enough.
    """

    def __init__(self, memory: int, max_age_s: float, trigger: Trigger | None) -> None:
        self.trigger = trigger
        self._max_age_ns = max_age_s * 1e9
        self._stopped_ns: int | None = None  # when the robot was last stopped
        self.mistimed: Counter[str] = Counter()
        self.recent: deque[LatentGoal] = deque(maxlen=memory)
        self.latencies_s: deque[float] = deque(maxlen=4096)
        self.received = 0
        self.void = 0
        self.mismatched = 0
        self.mismatch = ""
        self.refusals = 0
        self.newest: LatentGoal | None = None
        self.instruction_id = 0
        self.instruction = ""
        self._spec_id = ""  # no latent carries that one
        self.senses = False  # whether System 2 is told the robot's own state

    def expect(self, spec: LatentSpec) -> None:
        """Accept this model's latents alone: the one that was checked against the policy.

        Raises:
            SpecMismatch: what decides when to ask was fitted to another model.
        """
        if isinstance(self.trigger, LearnedTrigger):
            self.trigger.expect(spec)
        self._spec_id, self.senses = spec.spec_id, spec.senses

    def begin(self, instruction_id: int, instruction: str) -> None:
        self.instruction_id, self.instruction = instruction_id, instruction
        self.recent.clear()
        self.newest = None

    def forget(self, now_ns: int) -> None:
        self._stopped_ns = now_ns
        self.recent.clear()
        self.newest = None

    def accept(self, latent: LatentGoal, now_ns: int) -> bool:
        if latent.spec_id != self._spec_id:
            self.mismatched += 1
            self.mismatch = self.mismatch or (
                f"System 2 sends {latent.spec_id or 'no spec'}, the run began with "
                f"{self._spec_id or 'none'}"
            )
            return False
        if latent.instruction_id != self.instruction_id:
            self.void += 1
            return False
        wrong = self._wrong_time(latent.t_obs_ns, now_ns)
        if wrong:
            self.mistimed[wrong] += 1
            return False
        self.received += 1
        self.newest = latent
        if latent.refused:
            self.refusals += 1
            self.recent.clear()
        else:
            self.recent.append(latent)
        self.latencies_s.append(latent.compute_s)
        return True

    def _wrong_time(self, t_obs_ns: int, now_ns: int) -> str:
        # The robot's own stamp, which System 2 gave back: no other host's clock is in it.
        if t_obs_ns - now_ns > Watchdog.FUTURE_S * 1e9:
            return "future"
        if self._stopped_ns is not None and t_obs_ns <= self._stopped_ns:
            return "before_stop"
        return "old" if now_ns - t_obs_ns > self._max_age_ns else ""


class GoalSender(Protocol):
    """The sending half of a channel; see `openhelix.runtime.transport.wire.Publisher`."""

    @property
    def sent(self) -> int: ...
    @property
    def dropped(self) -> int: ...
    def send(self, message: GoalRequest) -> object: ...
    def reconnect(self) -> None: ...
    def await_reader(self, timeout_s: float) -> bool: ...
    def close(self) -> None: ...


class GoalReader(Protocol):
    """The receiving half of a channel; see `openhelix.runtime.transport.wire.NewestReader`."""

    stats: ReaderStats

    @property
    def gaps(self) -> int: ...
    def poll(self) -> LatentGoal | None: ...
    def reconnect(self) -> None: ...
    def close(self) -> None: ...


class WireGoals(_Recent):
    """System 2 in another process: truly asynchronous.

    An image goes out when it is new, at most every `min_interval_ns`; System 2 takes the
    newest when its own cadence comes round, so sending more would be wasted bandwidth. With a
    `trigger` an image goes out when that says so.
    """

    def __init__(
        self,
        sender: GoalSender,
        reader: GoalReader,
        robot: str,
        camera: str,
        min_interval_ns: int,
        memory: int = 1,
        *,
        max_age_s: float,
        trigger: Trigger | None = None,
    ) -> None:
        super().__init__(memory, max_age_s, trigger)
        self.sender, self.reader = sender, reader
        self._robot, self._camera = robot, camera
        self._min_interval_ns = min_interval_ns
        self._sent_ns = -min_interval_ns
        self._seq = 0

    @property
    def missed(self) -> int:
        return self.reader.gaps

    def reconnect(self) -> None:
        """Connect anew to System 2, which is bound by now.

        Attempts fail while it loads, and the next may be some time off. What is sent before a connection
        stands is lost: with an image the time to the next one, with a latent a whole period.
        """
        self.reader.reconnect()
        if not self.heard(0.0):
            self.sender.reconnect()

    def heard(self, timeout_s: float) -> bool:
        """Wait until System 2 listens; False where it did not within `timeout_s`."""
        return self.sender.await_reader(timeout_s)

    def begin(self, instruction_id: int, instruction: str) -> None:
        super().begin(instruction_id, instruction)
        self._sent_ns = -self._min_interval_ns  # the next image goes out at once
        if self.trigger is not None:
            self.trigger.begin()

    def forget(self, now_ns: int) -> None:
        super().forget(now_ns)
        if self.trigger is not None:
            self.trigger.begin()

    def update(self, observation: Observation, now_ns: int) -> LatentGoal | None:
        frame = observation.frames.get(self._camera)
        if frame is not None and self._is_due(frame, observation):
            self._sent_ns = frame.t_ns
            self.sender.send(
                GoalRequest(
                    rgb=frame.rgb,
                    instruction=self.instruction,
                    robot=self._robot,
                    seq=self._seq,
                    instruction_id=self.instruction_id,
                    t_obs_ns=frame.t_ns,
                    proprio=proprio_of(observation) if self.senses else None,
                )
            )
            self._seq += 1
        latent = self.reader.poll()
        return latent if latent is not None and self.accept(latent, now_ns) else None

    def _is_due(self, frame: CameraFrame, observation: Observation) -> bool:
        if self.trigger is not None:
            # The same picture again shows nothing new, and must not be taken for one that does.
            return frame.t_ns > self._sent_ns and self.trigger.due(observation)
        return frame.t_ns - self._sent_ns >= self._min_interval_ns

    def close(self) -> None:
        self.sender.close()
        self.reader.close()


class LockstepGoals(_Recent):
    """System 2 on a schedule counted in environment steps (the paper's asynchrony interval).

    A latent is computed from the image of every `interval`-th tick after an instruction
    began, or when `trigger` says so, and arrives `latency` ticks later. An engine that raises, or whose latent is not finite
    or not of its spec, ends the run (`PartFailed`): no plan may be made from it.
    """

    missed = 0
    trigger: Trigger

    def __init__(
        self,
        engine: Engine,
        camera: str,
        interval: int,
        latency: int,
        memory: int = 1,
        timer: Callable[[], float] = time.perf_counter,
        trigger: Trigger | None = None,
    ) -> None:
        # How old a latent gets is the schedule's to say.
        super().__init__(memory, inf, Cadence(interval) if trigger is None else trigger)
        self._engine, self._camera = engine, camera
        self._latency = latency
        self.expect(engine.spec)
        self._timer = timer
        self._tick = 0
        self._seq = 0
        self._on_the_way: deque[tuple[int, LatentGoal]] = deque()

    def begin(self, instruction_id: int, instruction: str) -> None:
        super().begin(instruction_id, instruction)
        self._tick = 0
        self.trigger.begin()
        self._on_the_way.clear()

    def forget(self, now_ns: int) -> None:
        super().forget(now_ns)
        self.trigger.begin()

    def update(self, observation: Observation, now_ns: int) -> LatentGoal | None:
        if self.trigger.due(observation):
            latent = self._compute(observation)
            self._on_the_way.append((self._tick + self._latency, latent))
        arrived = None
        while self._on_the_way and self._on_the_way[0][0] <= self._tick:
            _, latent = self._on_the_way.popleft()
            if self.accept(latent, now_ns):
                arrived = latent
        self._tick += 1
        return arrived

    def _compute(self, observation: Observation) -> LatentGoal:
        frame, start = observation.frames[self._camera], self._timer()
        z = self._encode(frame.rgb, self.instruction, proprio_of(observation))
        took_s, judgement = self._timer() - start, self._judge(z)
        latent = LatentGoal(
            z=z,
            seq=self._seq,
            instruction_id=self.instruction_id,
            t_obs_ns=frame.t_ns,
            t_pub_ns=frame.t_ns,
            spec_id=self._engine.spec.spec_id,  # as it is now: weights can be swapped
            source="lockstep",
            compute_s=took_s,
            understood=judgement.understood,
            refused=judgement.refused,
        )
        self._seq += 1
        return latent

    def _judge(self, z: F32 | None) -> Judgement:
        """Return what System 2 thinks of the instruction; raises PartFailed where it fails."""
        try:
            latents = None if z is None else z[None]
            return judged(self._engine, [self.instruction], latents)[0]
        except Exception as error:
            raise PartFailed("system2", error) from error

    def _encode(self, image: U8, instruction: str, proprio: F32) -> F32:
        """Return System 2's latent, checked; raises PartFailed where it gives none."""
        try:
            return encode_one(self._engine, image, instruction, proprio)
        except Exception as error:
            raise PartFailed("system2", error) from error

    def close(self) -> None:
        self._engine.close()
