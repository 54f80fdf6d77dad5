"""Made-up ticks for the tests of what listens to the loop."""

from __future__ import annotations

import numpy as np

from openhelix.runtime.control.loop import Tick
from openhelix.runtime.core.interfaces import (
    Action,
    ActionChunk,
    CameraFrame,
    LatentGoal,
    Observation,
)
from openhelix.runtime.observe.ticks import TickMessage

PERIOD_NS = 33_333_333


def frame(t_ns, size, shade, noise=False):
    rgb = np.full((size, size, 3), 40, np.uint8)
    if noise:  # which does not pack
        rgb[:] = np.random.default_rng(t_ns).integers(0, 255, rgb.shape, np.uint8)
    rgb[: size // 2, :, 0] = shade % 256
    K = np.array([[size, 0, size / 2], [0, size, size / 2], [0, 0, 1.0]])
    T = np.diag([1.0, -1.0, -1.0, 1.0])
    T[2, 3] = 1.5
    return CameraFrame(t_ns, rgb, np.ones((size, size), np.float32), K, T)


def latent(seq, instruction_id, t_ns):
    z = np.full((1, 8), seq, np.float32)
    return LatentGoal(
        z=z, seq=seq, instruction_id=instruction_id, t_obs_ns=t_ns, t_pub_ns=t_ns, spec_id="x"
    )


def chunk_for(observation, latents):
    """What the fake policy answers: a function of exactly what it was given."""
    seq = latents[-1].seq if latents else -1
    poses = np.tile(observation.tcp_pose, (4, 1))
    poses[:, 1] += 0.01 * seq
    poses[:, 2] += 1e-4 * float(observation.frames["static"].rgb[0, 0, 0])
    return ActionChunk(
        t_start_ns=observation.t_ns + PERIOD_NS,
        dt_ns=PERIOD_NS,
        poses=poses,
        gripper=np.full(4, 0.5),
        instruction_id=observation.instruction_id,
        latent_seq=seq,
        t_obs_ns=observation.t_ns,
    )


def ticks(
    count, camera_every=3, latent_every=5, chunk_every=4, delay=2, instruction_ids=1, noise=False
):
    """A run: cameras slower than the loop, chunks that come `delay` ticks after their input."""
    made, frames, recent, waiting = [], {}, [], []
    for i in range(count):
        t, instruction_id = 10**9 + i * PERIOD_NS, i * instruction_ids // count
        if i % camera_every == 0:
            frames = {"static": frame(t, 64, 3 * i, noise), "gripper": frame(t, 32, 5 * i, noise)}
        pose = np.array([0.01 * i, 0, 0.5, 0, 0, 0, 1.0])
        observation = Observation(t, frames, pose, 0.05, True, np.zeros(7), instruction_id)
        new_latent = latent(i // latent_every, instruction_id, t) if i % latent_every == 0 else None
        recent = [new_latent] if new_latent else recent
        if i % chunk_every == 0 and recent and recent[0].instruction_id == instruction_id:
            waiting.append((i + delay, chunk_for(observation, recent)))
        ready = [
            chunk for due, chunk in waiting if due == i and chunk.instruction_id == instruction_id
        ]
        made.append(
            Tick(
                index=i + 1,
                t_ns=t,
                observation=observation,
                state="run",
                reason="",
                sent=Action(pose, 1.0, instruction_id, t_ns=t + PERIOD_NS),
                new_latent=new_latent,
                new_chunk=ready[0] if ready else None,
                latent_age_s=0.25,
                duration_s=1e-4,
            )
        )
    return made


def told(run, task="", instruction="open the drawer", visual=None, entries=None):
    """The ticks of a run as observers are told of them; `entries` by the number of their tick."""
    return [
        TickMessage(
            tick,
            task,
            instruction,
            number=1,
            steps=tick.index,
            judged=0,
            succeeded=0,
            visual=visual,
            entries=tuple((entries or {}).get(tick.index, ())),
        )
        for tick in run
    ]
