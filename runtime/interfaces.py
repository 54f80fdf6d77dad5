"""The verbs of the parts that the loop joins; tiny on purpose.

A class that has these methods fits; nothing needs to be inherited.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from runtime.spec import LatentSpec, PolicySpec
from runtime.types import F32, ActionChunk, LatentGoal, Observation


class PolicyFault(RuntimeError):
    """System 1's output was not finite: no chunk was made of it, nothing may be sent."""


class Policy(Protocol):
    """System 1: newest latent and live observation in, trajectory out."""

    @property
    def spec(self) -> PolicySpec: ...

    def warm_up(self) -> None:
        """Run once on made-up input, so that the first real call is not the slow one."""

    def reset(self, seed: int | None = None) -> None:
        """Forget the past; with a seed, what follows is deterministic."""

    def act(self, observation: Observation, latents: Sequence[LatentGoal]) -> ActionChunk:
        """Return a trajectory that starts one control period after `observation.t_ns`.

        `latents` holds the recent latents of this epoch, newest last; empty when the policy
        runs without System 2.

        Raises:
            PolicyFault: the output was not finite. On both clocks the fault is counted, the
                loop holds when its plan runs out, and the policy is asked again.
        """


class Engine(Protocol):
    """System 2: images and instructions in, latents out."""

    @property
    def spec(self) -> LatentSpec: ...

    def warm_up(self) -> None: ...

    def encode(self, images: Sequence[Any], instructions: Sequence[str]) -> F32:
        """Return latents (B, n_tokens, d); images are PIL images or (H, W, 3) uint8 arrays.

        Raises:
            ValueError: an image or instruction is unusable; the message names which.
        """

    def close(self) -> None: ...
