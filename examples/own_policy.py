"""A policy and a System 2 of one's own: two small classes, evaluated like any other pair.

    python examples/own_policy.py [STEPS]

The policy moves straight to the point that its latent names; this System 2 always names the same.
"""

import sys

import numpy as np

import openhelix

SPEC = openhelix.LatentSpec(kind="point", n_tokens=1, dim=3)
HZ, ROWS, STEP_M = 30.0, 8, 0.01


class GoThere:
    """System 1: newest latent and observation in, trajectory out."""

    spec = openhelix.PolicySpec(
        cameras=(), latent=SPEC, action=openhelix.ActionSpec(hz=HZ), horizon=ROWS
    )

    def warm_up(self) -> None: ...

    def reset(self, seed: int | None = None) -> None: ...

    def act(self, observation, latents):
        way = latents[-1].z[0] - observation.tcp_pose[:3]
        length = max(float(np.linalg.norm(way)), 1e-9)
        steps = np.arange(1, ROWS + 1)[:, None] * min(STEP_M, length / ROWS)
        dt_ns = round(1e9 / HZ)
        return openhelix.ActionChunk(
            t_start_ns=observation.t_ns + dt_ns,
            dt_ns=dt_ns,
            poses=np.hstack(
                [
                    observation.tcp_pose[:3] + steps * way / length,
                    np.tile(observation.tcp_pose[3:], (ROWS, 1)),
                ]
            ),
            gripper=np.ones(ROWS),
            instruction_id=observation.instruction_id,
            t_obs_ns=observation.t_ns,
        )


class AboveTheButton:
    """System 2: images and instructions in, latents out."""

    spec = SPEC

    def warm_up(self) -> None: ...

    def encode(self, images, instructions):
        return np.tile(np.float32([-0.12, -0.12, 0.46]), (len(images), 1, 1))

    def close(self) -> None: ...


def main(steps: int = 60) -> None:
    result = openhelix.evaluate(
        GoThere(), AboveTheButton(), tasks=["turn_on_led"], episodes_per_task=1, steps=steps
    )
    print(result.score)
    print("films, figures and every attempt:", result.folder / "report.html")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
