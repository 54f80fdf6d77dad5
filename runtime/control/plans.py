"""Plans: how the loop queries System 1, and how the trajectories it gets are joined by time.

System 1 is in its own process (`RemotePlanner`) or within the tick (`SyncPlanner`). Both take the
newest observation when a new chunk is due and hand finished chunks back without blocking, so
the control loop is the same on both clocks. A chunk is due a fixed time after the observation of
the last one, and at once when the instruction has changed.

On the wall clock System 1 has its own process, because threads of one Python process share one
interpreter lock: a policy thread that is preempted while holding it stops a control thread of any
priority.

A chunk arrives well after the observation it was computed from, so its first rows are already in
the past, and the arm is in the middle of the previous chunk. `ChunkBuffer` drops what has expired
and blends what overlaps; it maps a time to a target. It never counts rows that might have been
executed (an estimate that a warm-up or a slow call inflates, which makes the arm jump), only what
the loop actually sampled.

    older plan   o----o----o----o----o----o
    new chunk         o----o----o----o----o----o----o
                           ^ now
    joined                 *====o----o----o----o----o     * = what was being executed at `now`
                           |blend|                        = is mixed, afterwards the new one

Where nothing was being executed, the arm stood still while the chunk was made, and its first rows
are not past: the plan begins at the row nearest to where the arm is held, and all its times are
moved so that this row is due next.

    arm          x  x  x  x  x  x            held at x
    new chunk    o----o----o----o----o----o
                           ^ now
    joined                 x====o----o----o----o----o----o

The later chunks come, the farther from its observation a plan is carried out, where it knows least.
So where more than a share `slow_after` of a plan has passed when it arrives, plans are carried out
slower, in proportion: then only that share has.

    chunk        o----o----o----o----o----o
                           ^ arrives: two rows past where one may be
    slowed       o---------o---------o---------o---------o---------o

Planners and buffer belong to one thread, the control loop's: no locks.
"""

from __future__ import annotations

import logging
import time
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import dist
from typing import Protocol

import numpy as np

from openhelix.runtime.core.interfaces import (
    F64,
    Action,
    ActionChunk,
    GoesOn,
    LatentGoal,
    Observation,
    PartFailed,
    Policy,
    PolicyFault,
)
from openhelix.runtime.core.quaternion import (
    Quat,
    QuaternionError,
    angle_between,
    conjugate,
    multiply,
    normalise,
    slerp,
)
from openhelix.runtime.transport.codec import register
from openhelix.runtime.transport.wire import NewestReader, Publisher

# ------------------------------------------------------------------------------------------------
# System 1, beside the loop or inside the tick


log = logging.getLogger(__name__)

LATENCIES_KEPT = 4096
METRES_PER_RADIAN = 0.1  # a turn of the hand, compared with a way: about its fingers' length
DELAYS_KEPT = 10  # chunks whose delays say how late the next one will be
EARLY_NS = 500_000  # a tick may come a little early; half a millisecond is still due
LOST_AFTER_NS = 1_000_000_000  # an answer this late is not waited for: System 1 may have died


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """What System 1 needs for one chunk."""

    observation: Observation  # names the instruction that the chunk is for
    latents: tuple[LatentGoal, ...]  # newest last
    seed: int  # of this instruction's randomness
    plan: ActionChunk | None = None  # that is being executed; None: nothing to go on from
    given: int = 0  # rows of it that will have been executed
    join: str = "blend"


@dataclass(frozen=True, slots=True)
class PlanReply:
    """What System 1 made of it."""

    instruction_id: int
    t_obs_ns: int  # of the request's observation
    chunk: ActionChunk | None  # None: the policy failed
    compute_s: float


register("plan_request", PlanRequest)
register("plan_reply", PlanReply, finite=("compute_s",))


class Following:
    """What a new chunk is to go on from, asked for when one is begun.

    Args:
        chunks: the plan that is being executed.
        join: "inpaint" or "prefix"; see `openhelix.runtime.core.interfaces.GoesOn`.
        horizon: rows of the policy's chunks.
        hz: their rate.
    """

    def __init__(self, chunks: ChunkBuffer, join: str, horizon: int, hz: float) -> None:
        self._join = join
        self._chunks, self._horizon, self._dt_ns = chunks, horizon, round(1e9 / hz)
        self._took_ns: deque[int] = deque(maxlen=DELAYS_KEPT)

    def took(self, delay_ns: int) -> None:
        """A chunk came so long after its observation."""
        self._took_ns.append(delay_ns)

    def joined(self, request: PlanRequest, delay_ns: int | None = None) -> PlanRequest:
        """Return the request with the plan in the new chunk's own times, as far as there is one.

        Args:
            request: for the new chunk.
            delay_ns: until it arrives; None: as long as the longest of the newest ones took.
        """
        dt_ns = round(
            self._dt_ns * self._chunks.slowed
        )  # what is a row to the policy lasts so long
        rows = self._chunks.ahead(request.observation.t_ns + dt_ns, dt_ns, self._horizon)
        if rows is None:
            return request
        late_ns = max(self._took_ns, default=0) if delay_ns is None else delay_ns
        given = min(len(rows.poses), -(-(late_ns - EARLY_NS) // dt_ns))
        return replace(request, plan=rows, given=given, join=self._join)


def planned(policy: Policy, request: PlanRequest) -> ActionChunk:
    """Return what a policy makes of a request, stamped.

    Raises:
        TypeError: it is no `ActionChunk`.
    """
    seen, latents = request.observation, request.latents
    if request.plan is None:
        return checked_chunk(policy.act(seen, latents), seen)
    going: GoesOn = policy  # type: ignore[assignment]  # its spec says so
    made = going.go_on(seen, latents, request.plan, request.given, request.join)
    return checked_chunk(made, seen)


class Planner(Protocol):
    """What the loop knows of System 1."""

    latencies_s: deque[float]  # of `Policy.act`, newest last, warm-up excluded
    failures: int

    def offer(self, observation: Observation, latents: Sequence[LatentGoal]) -> None:
        """Give the newest input; a plan is started if one is due."""

    def poll(self, now_ns: int) -> ActionChunk | None:
        """Return a chunk that is finished by `now_ns` once, or None."""

    def follow(self, following: Following) -> None:
        """From now on every new chunk is made to go on from the plan that is being executed."""

    def reset(self, seed: int) -> None:
        """A new instruction: the next offer is due at once."""

    def close(self) -> None: ...


def checked_chunk(made: object, observation: Observation) -> ActionChunk:
    """Return what a policy's `act` gave, stamped; TypeError unless it is an `ActionChunk`.

    A policy may leave the stamp of its observation out; what is planned before a stop or a refusal
    is told from what is planned afterwards by it.
    """
    if not isinstance(made, ActionChunk):
        raise TypeError(f"act returned {type(made).__name__}, not an ActionChunk")
    if made.t_obs_ns == observation.t_ns:
        return made
    return replace(made, t_obs_ns=observation.t_ns)


class _Due:
    """Decides when the next chunk is to be planned."""

    def __init__(self, replan_ns: int) -> None:
        self._replan_ns = replan_ns
        self._last_ns: int | None = None  # time of the last plan's observation

    def __call__(self, observation: Observation) -> bool:
        if self._last_ns is None:
            return True
        return observation.t_ns - self._last_ns >= self._replan_ns - EARLY_NS

    def mark(self, observation: Observation) -> None:
        self._last_ns = observation.t_ns

    def clear(self) -> None:
        self._last_ns = None


class SyncPlanner:
    """System 1 inside the tick: deterministic, for the lockstep clock.

    A `PolicyFault` is counted and the loop goes on without that chunk, as on the wall clock.
    Whatever else a policy raises ends the run as a `PartFailed`: a study must not score a
    defect as a failure of the method.

    Args:
        policy: System 1.
        replan_ns: time from one chunk's observation to the next one's.
        delay_ns: from an observation to the arrival of its chunk; until then no other is begun.
    """

    def __init__(self, policy: Policy, replan_ns: int, delay_ns: int = 0) -> None:
        self._policy = policy
        self._due = _Due(replan_ns)
        self._delay_ns = delay_ns
        self._chunk: ActionChunk | None = None
        self._ready_ns = 0
        self._following: Following | None = None
        self.latencies_s: deque[float] = deque(maxlen=LATENCIES_KEPT)
        self.failures = 0

    def offer(self, observation: Observation, latents: Sequence[LatentGoal]) -> None:
        if self._chunk is not None or not self._due(observation):
            return
        self._due.mark(observation)
        self._ready_ns = observation.t_ns + self._delay_ns
        request = PlanRequest(observation, tuple(latents), 0)
        if self._following is not None:
            request = self._following.joined(request, self._delay_ns)
        start_s = time.perf_counter()
        try:
            self._chunk = planned(self._policy, request)
        except PolicyFault as fault:
            self.failures += 1
            log.warning("System 1: %s; the loop goes on without this chunk", fault)
            return
        except PartFailed:  # a latent that was computed only now, because the policy looks at it
            raise
        except Exception as error:
            raise PartFailed("system1", error) from error
        self.latencies_s.append(time.perf_counter() - start_s)

    def poll(self, now_ns: int) -> ActionChunk | None:
        if self._chunk is None or now_ns < self._ready_ns - EARLY_NS:
            return None
        chunk, self._chunk = self._chunk, None
        return chunk

    def follow(self, following: Following) -> None:
        self._following = following

    def reset(self, seed: int) -> None:
        self._due.clear()
        self._chunk = None
        try:
            self._policy.reset(seed)
        except Exception as error:
            raise PartFailed("system1", error) from error

    def close(self) -> None:
        """Nothing to release."""


class RemotePlanner:
    """System 1 in another process; see `openhelix.runtime.launch.parts.System1Process`.

    A request is out until its reply comes or `LOST_AFTER_NS` have passed, so that a slow
    policy is given a fresh observation when it is free instead of a queue of old ones.
    """

    def __init__(self, sender: Publisher, reader: NewestReader[PlanReply], replan_ns: int) -> None:
        self.sender, self.reader = sender, reader
        self._due = _Due(replan_ns)
        self._out: tuple[int, int] | None = None  # the request's instruction and time
        self._seed = 0
        self._following: Following | None = None
        self.latencies_s: deque[float] = deque(maxlen=LATENCIES_KEPT)
        self.failures = 0

    def offer(self, observation: Observation, latents: Sequence[LatentGoal]) -> None:
        if self._out is not None and observation.t_ns - self._out[1] < LOST_AFTER_NS:
            return
        if not self._due(observation):
            return
        self._due.mark(observation)
        self._out = (observation.instruction_id, observation.t_ns)
        request = PlanRequest(observation, tuple(latents), self._seed)
        if self._following is not None:
            request = self._following.joined(request)
        self.sender.send(request)

    def poll(self, now_ns: int) -> ActionChunk | None:
        reply = self.reader.poll()
        if reply is None:
            return None
        if self._out == (reply.instruction_id, reply.t_obs_ns):
            self._out = None
        if reply.chunk is None:
            self.failures += 1
        else:
            self.latencies_s.append(reply.compute_s)
            if self._following is not None:
                self._following.took(now_ns - reply.t_obs_ns)
        return reply.chunk

    def follow(self, following: Following) -> None:
        self._following = following

    def reset(self, seed: int) -> None:
        self._due.clear()
        self._out = None
        self._seed = seed

    def close(self) -> None:
        """Close both channels."""
        self.sender.close()
        self.reader.close()


# ------------------------------------------------------------------------------------------------
# The plan on its time line


_Row = tuple[float, float, float, Quat, float]  # x, y, z in W (m), rotation, openness


@dataclass(slots=True)
class ChunkCounters:
    """What became of the chunks and their rows since the buffer was made.

    Every row of an accepted or late chunk ends up in exactly one of consumed, expired,
    replaced and voided, or is still in the buffer.
    """

    actions_sampled: int = 0  # targets that the loop really took
    rows_consumed: int = 0  # rows whose time came while they were the plan
    rows_expired: int = 0  # rows whose time had passed when their chunk arrived
    rows_replaced: int = 0  # rows that a newer chunk took the place of
    rows_voided: int = 0  # rows dropped by a new instruction or a reset
    rows_blended: int = 0  # rows mixed with what was being executed
    chunks_accepted: int = 0
    chunks_used: int = 0  # of the accepted: at least one action was sampled from it
    chunks_void: int = 0  # refused: for another instruction, or of before the plan was voided
    chunks_slowed: int = 0  # of the accepted: they came late and are carried out slower
    chunks_moved: int = 0  # of the accepted: the arm stood still, and the plan began from there
    chunks_late: int = 0  # refused: every row had expired
    chunks_stale: int = 0  # refused: older observation than the plan's
    chunks_bad: int = 0  # refused: wrong shape, not finite, no rotation, no time step
    runs_out: int = 0  # times that the loop found the buffer run out


class ChunkBuffer:
    """A plan on a time line, made of the chunks that came in.

    Args:
        blend_s: seconds over which a new chunk takes over from what is being executed; 0 for
            at once.
        instruction_id: of the instruction whose chunks are accepted.
        slow_after: where more than this share of chunks has passed when they arrive, on average
            over the newest ones, they are carried out slower, in proportion; 1: never.
    """

    def __init__(
        self,
        blend_s: float = 0.1,
        instruction_id: int = 0,
        slow_after: float = 1.0,
    ) -> None:
        if not 0.0 <= blend_s < 10.0:
            raise ValueError(f"blend_s: {blend_s} is not a time between 0 and 10 s")
        self._blend_ns = round(blend_s * 1e9)
        self._instruction_id = instruction_id
        if not 0.0 < slow_after <= 1.0:
            raise ValueError(f"slow_after: {slow_after} is no share above 0 and up to 1")
        self._slow_after = slow_after
        self._passed: deque[float] = deque(maxlen=DELAYS_KEPT)  # shares, when chunks arrived
        self.counters = ChunkCounters()
        # One plan as parallel lists: row i is due at _times[i]. _joins[i] False: there is a
        # hole in time before row i that must not be interpolated across. _mine[i] False: a
        # row that only anchors interpolation, not one of a chunk's own.
        self._times: list[int] = []
        self._rows: list[_Row] = []
        self._joins: list[bool] = []
        self._mine: list[bool] = []
        self._fresh = False  # the newest chunk has not been sampled yet
        self._fresh_from_ns = 0
        self._t_obs_ns: int | None = None
        self._from_ns = 0  # chunks of older observations are void
        self._latent_seq = -1
        self._ran_out = False
        self.late_s: float | None = None  # of the newest chunk, where it came after its last row

    @property
    def instruction_id(self) -> int:
        """Of the instruction whose chunks are accepted."""
        return self._instruction_id

    @property
    def latent_seq(self) -> int:
        """The latent that the newest accepted chunk was conditioned on; -1 for none."""
        return self._latent_seq

    @property
    def slowed(self) -> float:
        """How many times as long as planned plans take, because chunks come late; 1 if not."""
        if not self._passed:
            return 1.0
        return max(1.0, sum(self._passed) / len(self._passed) / self._slow_after)

    def void(self, instruction_id: int, from_ns: int = 0) -> None:
        """Drop the whole plan; from now on accept chunks of `instruction_id` only.

        Args:
            instruction_id: may be the present one.
            from_ns: and of those only ones whose observation is of then or later.
        """
        self.counters.rows_voided += sum(self._mine)
        self._clear()
        self._instruction_id, self._from_ns = instruction_id, from_ns
        self._t_obs_ns = None
        self._latent_seq = -1
        self._ran_out = False
        self.late_s = None

    def put(self, chunk: ActionChunk, now_ns: int, held: F64 | None = None) -> bool:
        """Join a chunk to the plan; return whether it was accepted.

        A refused chunk (for another instruction, wholly expired, older than the plan's,
        malformed) is counted and changes nothing.

        Args:
            chunk: rows due at `t_start_ns + i * dt_ns`; quaternions need not be unit.
            now_ns: the loop's time, on the clock that stamped the chunk.
            held: pose (7,) at which the arm stands, in W, m and a unit quaternion; looked at only
                where there is no plan. None: unknown, and the chunk keeps its times.

        Raises:
            TypeError: it is no `ActionChunk`.
        """
        if not isinstance(chunk, ActionChunk):
            raise TypeError(f"chunk: {type(chunk).__name__}, must be an ActionChunk")
        count = self.counters
        if chunk.instruction_id != self._instruction_id or chunk.t_obs_ns < self._from_ns:
            count.chunks_void += 1
            return False
        rows = _rows(chunk)
        if rows is None:
            count.chunks_bad += 1
            return False
        if self._t_obs_ns is not None and chunk.t_obs_ns < self._t_obs_ns:
            count.chunks_stale += 1
            return False
        late_ns = now_ns - chunk.t_start_ns - (len(rows) - 1) * chunk.dt_ns
        if late_ns > 0:
            count.chunks_late += 1
            count.rows_expired += len(rows)
            self.late_s = late_ns * 1e-9
            return False
        seen_ns = chunk.t_start_ns - chunk.dt_ns  # row 0 is due a row after what was seen
        self._passed.append(max(0, now_ns - seen_ns) / (len(rows) * chunk.dt_ns))
        dt_ns = round(chunk.dt_ns * self.slowed)
        start_ns, standing = seen_ns + dt_ns, None
        # Rows up to now are past; the last of them still anchors the interpolation at now.
        first = max(0, -((start_ns - now_ns) // dt_ns))
        if first and held is not None and self._at(now_ns) is None:
            x, y, z, *turn = held.tolist()
            standing = (x, y, z, normalise(turn), rows[0][4])
            first = _nearest(rows[: first + 2], standing)
            start_ns = now_ns + (1 - first) * dt_ns
            count.chunks_moved += 1
        count.rows_expired += first
        count.chunks_accepted += 1
        self.late_s = None
        count.chunks_slowed += dt_ns > chunk.dt_ns
        times = [start_ns + i * dt_ns for i in range(len(rows))]
        self._join(times, rows, first, dt_ns, now_ns, standing)
        self._fresh, self._fresh_from_ns = True, max(now_ns, times[0])
        self._t_obs_ns, self._latent_seq = chunk.t_obs_ns, chunk.latent_seq
        return True

    def sample(self, t_ns: int) -> Action | None:
        """Return the target for time `t_ns`, or None where there is no plan for it.

        Interpolates linearly in position and openness, spherically in rotation.
        """
        row = self._at(t_ns)
        if row is None:
            if self._times and t_ns > self._times[-1] and not self._ran_out:
                self._ran_out = True
                self.counters.runs_out += 1
            self._consume(t_ns)
            return None
        self._ran_out = False
        self.counters.actions_sampled += 1
        if self._fresh and t_ns >= self._fresh_from_ns:
            self._fresh = False
            self.counters.chunks_used += 1
        self._consume(t_ns)
        x, y, z, (qx, qy, qz, qw), openness = row
        return Action(
            np.array((x, y, z, qx, qy, qz, qw)), openness, self._instruction_id, t_ns=t_ns
        )

    def rehearse(self, t_ns: int) -> None:
        """Go through what `sample` does, without taking anything."""
        self._at(t_ns)

    def ahead(self, start_ns: int, dt_ns: int, rows: int) -> ActionChunk | None:
        """Return the plan at `start_ns + i * dt_ns`, up to `rows` rows, as far as it goes.

        None where there is no plan at `start_ns`. Nothing is taken.
        """
        found: list[_Row] = []
        for i in range(rows):
            row = self._at(start_ns + i * dt_ns)
            if row is None:
                break
            found.append(row)
        if not found:
            return None
        poses = np.array([(x, y, z, *turn) for x, y, z, turn, _ in found])
        gripper = np.array([row[4] for row in found])
        return ActionChunk(start_ns, dt_ns, poses, gripper, self._instruction_id)

    def remaining_s(self, t_ns: int) -> float:
        """Return the seconds of plan left after `t_ns`; 0 when it has run out."""
        if not self._times:
            return 0.0
        return max(0.0, (self._times[-1] - t_ns) * 1e-9)

    # -- inside ---------------------------------------------------------------------------

    def _clear(self) -> None:
        self._times, self._rows, self._joins, self._mine = [], [], [], []
        self._fresh = False

    def _at(self, t_ns: int) -> _Row | None:
        times = self._times
        if not times or t_ns < times[0] or t_ns > times[-1]:
            return None
        after = bisect_right(times, t_ns)
        before = after - 1
        if times[before] == t_ns:
            return self._rows[before]
        if not self._joins[after]:
            return None
        return _mix(
            self._rows[before],
            self._rows[after],
            (t_ns - times[before]) / (times[after] - times[before]),
        )

    def _consume(self, t_ns: int) -> None:
        """Count the rows whose time has come and forget all but the last of them."""
        due = bisect_right(self._times, t_ns)
        if due == 0:
            return
        self.counters.rows_consumed += sum(self._mine[:due])
        keep = due - 1
        if due == len(self._times) and t_ns > self._times[-1]:
            self._clear()  # run out: nothing is left to interpolate to
            return
        self._mine[keep] = False  # counted; stays as the anchor of the next interpolation
        del self._times[:keep], self._rows[:keep], self._joins[:keep], self._mine[:keep]

    def _join(
        self,
        times: list[int],
        rows: list[_Row],
        first: int,
        dt_ns: int,
        now_ns: int,
        standing: _Row | None,
    ) -> None:
        """Replace the plan from the later of `now` and the chunk's start by the chunk.

        `standing` is where the arm is held at `now`; None where it follows a plan, or the chunk
        is not to begin from there.
        """
        blend_ns = self._blend_ns * self.slowed
        start_ns = now_ns if standing is not None else max(now_ns, times[0])
        at_start = standing or self._at(start_ns)
        old_rows: list[_Row | None] = [None] * (len(rows) - first)
        if at_start is not None:
            overlap = bisect_left(times, start_ns + blend_ns, first) - first
            fresh = range(first, first + overlap)
            if standing is not None:
                old_rows[:overlap] = [standing] * overlap
            else:
                # An older plan that ends within the blend goes on as the new one does, from where
                # it ends: to hold there would brake the arm at every border of a slow System 1.
                end_ns, last = self._times[-1], self._rows[-1]
                met = _row_at(times, rows, end_ns)
                old_rows[:overlap] = [
                    self._at(times[i]) or _carried(rows[i], met, last) for i in fresh
                ]
        kept = bisect_right(self._times, start_ns)
        if kept and self._times[kept - 1] == start_ns:
            kept -= 1
        self.counters.rows_replaced += sum(self._mine[kept:])
        # What is before `now` was counted when it was sampled; what lies between `now` and a
        # chunk that starts later remains the plan until then.
        self._times, self._rows = self._times[:kept], self._rows[:kept]
        self._joins, self._mine = self._joins[:kept], self._mine[:kept]
        if standing is not None:
            self._append(start_ns, standing, False, mine=False)
        elif times[first] > start_ns:  # between two rows: an anchor at the join itself
            anchor = _mix(rows[first - 1], rows[first], (start_ns - times[first - 1]) / dt_ns)
            if at_start is not None and self._blend_ns:
                anchor = (*at_start[:4], anchor[4])
            self._append(start_ns, anchor, at_start is not None, mine=False)
        for t, row, old in zip(times[first:], rows[first:], old_rows, strict=True):
            if old is not None:
                row = (*_mix(old, row, (t - start_ns) / blend_ns)[:4], row[4])
                self.counters.rows_blended += 1
            joins = t > start_ns or self._close(t, dt_ns)
            self._append(t, row, joins, mine=True)

    def _close(self, t_ns: int, dt_ns: int) -> bool:
        """Whether the plan so far ends within one row of `t_ns`: then there is no hole."""
        return bool(self._times) and t_ns - self._times[-1] <= dt_ns

    def _append(self, t_ns: int, row: _Row, joins: bool, *, mine: bool) -> None:
        self._times.append(t_ns)
        self._rows.append(row)
        self._joins.append(joins)
        self._mine.append(mine)


def _rows(chunk: ActionChunk) -> list[_Row] | None:
    """Return the chunk as tuples of floats, rotations at unit length; None if it is unusable."""
    try:
        poses, gripper = np.asarray(chunk.poses, float), np.asarray(chunk.gripper, float)
    except (TypeError, ValueError):
        return None
    if poses.ndim != 2 or poses.shape[1] != 7 or gripper.shape != poses.shape[:1]:
        return None
    if not len(poses) or chunk.dt_ns <= 0:
        return None
    if not (np.isfinite(poses).all() and np.isfinite(gripper).all()):
        return None
    try:
        return [
            (p[0], p[1], p[2], normalise(p[3:]), g)
            for p, g in zip(poses.tolist(), gripper.tolist(), strict=True)
        ]
    except QuaternionError:
        return None


def _nearest(rows: Sequence[_Row], to: _Row) -> int:
    """Return the first of the rows that are nearest to a pose, or the next where it is past that.

    A millimetre is nothing: of rows that stand still, as around a grasp, none may be left out.
    """
    far = [dist(row[:3], to[:3]) + METRES_PER_RADIAN * angle_between(row[3], to[3]) for row in rows]
    least = min(far)
    i = next(i for i, away in enumerate(far) if away <= least + 1e-3)
    if i + 1 == len(rows):
        return i
    way = [(b - a) * (x - a) for a, b, x in zip(rows[i][:3], rows[i + 1][:3], to[:3], strict=True)]
    return i + (sum(way) > 1e-6)


def _row_at(times: Sequence[int], rows: Sequence[_Row], t_ns: int) -> _Row:
    """Return a chunk's row at a time, the first or last one outside it."""
    after = bisect_right(times, t_ns)
    if after == 0 or after == len(rows):
        return rows[max(0, after - 1)]
    before = after - 1
    return _mix(rows[before], rows[after], (t_ns - times[before]) / (times[after] - times[before]))


def _carried(row: _Row, start: _Row, to: _Row) -> _Row:
    """Return `row` moved along with `start`, as that is brought to `to`."""
    x, y, z = (r + b - a for r, a, b in zip(row[:3], start[:3], to[:3], strict=True))
    turn = multiply(multiply(to[3], conjugate(start[3])), row[3])
    return (x, y, z, normalise(turn), row[4])


def _mix(a: _Row, b: _Row, weight: float) -> _Row:
    """Return the row `weight` of the way from `a` to `b`."""
    u = 1.0 - weight
    return (
        u * a[0] + weight * b[0],
        u * a[1] + weight * b[1],
        u * a[2] + weight * b[2],
        slerp(a[3], b[3], weight),
        u * a[4] + weight * b[4],
    )
