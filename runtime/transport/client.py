"""A client of a running `openhelix serve`: one System 2, available to any process.

It needs neither torch nor the model. What it returns is what the engine in the server returns
in process, so it stands in for one (`openhelix.runtime.core.interfaces.Engine`).
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from openhelix.runtime.core.interfaces import (
    F32,
    GoalRequest,
    Judgement,
    LatentGoal,
    LatentSpec,
    SpecMismatch,
)
from openhelix.runtime.transport.rpc import RpcClient, RpcError
from openhelix.runtime.transport.sockets import Keys, check_connect, served
from openhelix.runtime.transport.wire import NewestReader, Publisher

ROBOT: Final = re.compile(r"[\w-]{1,64}")  # as `robot.id` of a run
KEPT: Final = 1024  # latents whose judgement is remembered
RESEND_S = 0.5  # a request that left before the server had subscribed is lost, as is an answer


class System2Error(RuntimeError):
    """System 2 cannot be reached, refuses this client or does not answer; one line says which."""


class System2Client:
    """One robot's line to a shared System 2.

    Args:
        address: what the server was started with, `tcp://HOST:PORT` or `ipc://PATH`.
        robot: this client's name, of letters, digits, `-` and `_`; one client per name.
        keys: folder of CURVE keys (`openhelix keys`); needed beyond this host.
        timeout_s: how long an answer may take. A server with `system2.hz=1` answers each robot
            once per second.

    Raises:
        System2Error: no System 2 answers there, or it refuses the name.
        ValueError: the address, the name or the keys cannot be used.
    """

    judges_latents: Final = True  # what is understood comes with each latent

    def __init__(
        self,
        address: str,
        robot: str = "client",
        *,
        keys: Keys | None = None,
        timeout_s: float = 10.0,
    ) -> None:
        if not isinstance(address, str):
            raise ValueError(f"address: {address!r}, must be text such as tcp://HOST:PORT")
        if not isinstance(robot, str) or not ROBOT.fullmatch(robot):
            raise ValueError(f"robot: {robot!r}, must be 1 to 64 letters, digits, - or _")
        ends = served(address)
        for endpoint in ends.values():
            check_connect(endpoint, keys)
        self.address, self.robot, self._timeout_s = address, robot, timeout_s
        self._endpoint = ends["control"]
        self._control = RpcClient(ends["control"], keys=keys)
        self._sender: Publisher | None = None
        self._reader: NewestReader[LatentGoal] | None = None
        self._asked = self._seq = 0
        self._judged: dict[tuple[str, bytes], Judgement] = {}
        try:
            self._spec = self._read_spec()
            self._claim()
            self._reader = NewestReader(ends["latents"], f"latents/{robot}", LatentGoal, keys=keys)
            self._sender = Publisher(ends["requests"], robot, bind=False, keys=keys)
        except BaseException:
            self.close()
            raise

    @property
    def spec(self) -> LatentSpec:
        """What the server's latents are, as it said when this client connected."""
        return self._spec

    def warm_up(self) -> None:
        """The server is warm."""

    def encode(
        self,
        images: Sequence[Any],
        instructions: Sequence[str],
        proprio: Sequence[F32] | None = None,
    ) -> F32:
        """Return latents (B, n_tokens, d) float32, asked for one after the other.

        Args:
            images: PIL images, or (H, W, 3) uint8 arrays.
            instructions: one per image.
            proprio: (9,) each, for a System 2 whose spec `senses`.

        Raises:
            System2Error: no answer within `timeout_s`.
            openhelix.runtime.core.interfaces.SpecMismatch: the server has other weights by now.
            ValueError: an image is no (H, W, 3) uint8 array, or the instructions are not a list
                with one text per image.
        """
        if isinstance(instructions, str):
            raise ValueError("instructions: is one text, must be a list with one per image")
        if len(images) != len(instructions):
            raise ValueError(f"instructions: {len(instructions)} for {len(images)} images")
        own = [None] * len(images) if proprio is None else proprio
        asked = zip(images, instructions, own, strict=True)
        rows = [self.ask(image, text, state).z for image, text, state in asked]
        if not rows:
            return np.zeros((0, self._spec.n_tokens, self._spec.dim), np.float32)
        return np.stack(rows)

    def judge(self, instructions: Sequence[str], latents: F32 | None) -> list[Judgement]:
        """Return what the server understood, which came with each latent.

        Args:
            instructions: B texts.
            latents: what `encode` gave for them (B, n_tokens, d).

        Raises:
            ValueError: a latent is none of the last `KEPT` that this client was given.
        """
        if latents is None or len(latents) != len(instructions):
            raise ValueError("latents: must be what encode gave, one for each instruction")
        try:
            pairs = zip(instructions, latents, strict=True)
            return [self._judged[text, z.tobytes()] for text, z in pairs]
        except KeyError as error:
            raise ValueError(
                f"latents: not given by this client for {error.args[0][0]!r}"
            ) from None

    def ask(self, image: Any, instruction: str, proprio: F32 | None = None) -> LatentGoal:
        """Return the latent of one image and instruction, with its times; see `encode`."""
        if self._sender is None or self._reader is None:
            raise System2Error(f"{self.address}: the client is closed")
        rgb = np.ascontiguousarray(np.asarray(image))
        if rgb.ndim != 3 or rgb.shape[2] != 3 or rgb.dtype != np.uint8 or not rgb.size:
            raise ValueError(
                f"images: {rgb.dtype}{rgb.shape}, must be uint8 (H, W, 3) with H and W above 0"
            )
        if not isinstance(instruction, str):
            raise ValueError(f"instructions: {instruction!r} is no text")
        self._asked += 1
        t_ns, deadline_s, next_s = time.monotonic_ns(), time.monotonic() + self._timeout_s, 0.0
        while (now_s := time.monotonic()) < deadline_s:
            if now_s >= next_s:
                if next_s:
                    self._raise_refusal()
                next_s = now_s + RESEND_S
                self._send(rgb, instruction, t_ns, proprio)
            self._reader.wait(min(0.05, max(0.0, deadline_s - now_s)))
            latent = self._reader.poll()
            if latent is not None and latent.instruction_id == self._asked:
                if latent.spec_id != self._spec.spec_id:
                    raise SpecMismatch(
                        f"latent.spec_id: {self.address} gave {latent.spec_id}, and "
                        f"{self._spec.spec_id} when this client connected: it has other weights"
                    )
                if len(self._judged) >= KEPT:
                    self._judged.clear()
                judgement = Judgement(latent.understood, latent.refused)
                self._judged[instruction, latent.z.tobytes()] = judgement
                return latent
        self._raise_refusal()
        raise System2Error(f"{self.address}: no latent within {self._timeout_s:g} s")

    def close(self) -> None:
        """Release the sockets; safe to call twice."""
        for part in (self._sender, self._reader, self._control):
            if part is not None:
                part.close()
        self._sender = self._reader = None

    def __enter__(self) -> System2Client:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _send(
        self, rgb: np.ndarray, instruction: str, t_ns: int, proprio: F32 | None = None
    ) -> None:
        assert self._sender is not None
        self._sender.send(
            GoalRequest(
                rgb=rgb,
                instruction=instruction,
                robot=self.robot,
                seq=self._seq,
                instruction_id=self._asked,
                t_obs_ns=t_ns,
                proprio=proprio,
            )
        )
        self._seq += 1

    def _call(self, method: str, arguments: dict[str, Any]) -> dict[str, Any]:
        try:
            return self._control.call(method, arguments, self._timeout_s)
        except RpcError as error:
            said = str(error).removeprefix(f"{self._endpoint}: ")
            raise System2Error(f"{self.address}: {said}; `openhelix serve` runs one") from error

    def _read_spec(self) -> LatentSpec:
        deadline_s = time.monotonic() + self._timeout_s
        while True:
            health = self._call("health", {})
            if health.get("latent_spec"):
                return LatentSpec(**health["latent_spec"])
            state, why = health.get("state"), health.get("error")
            if state in ("failed", "refused") or time.monotonic() > deadline_s:
                raise System2Error(
                    f"{self.address}: System 2 is {state}" + (f": {why}" if why else "")
                )
            time.sleep(0.1)

    def _claim(self) -> None:
        run = os.urandom(8).hex()
        asked = {"question": "claim", "robot": self.robot, "run": run}
        refused = self._call("ask", asked)["refused"]
        if refused:
            raise System2Error(f"{self.address}: {refused}")

    def _raise_refusal(self) -> None:
        """Raise what the server says of the request that it has not answered, if anything."""
        about = self._call("health", {})["robots"].get(self.robot, {})
        if about.get("instruction_id") == self._asked and about.get("error"):
            raise System2Error(f"{self.address}: {about['error']}")
