"""Whose name is whose at a System 2 that several robots share.

Two robots under one name would get each other's latents and act on them. So a name belongs
to the robot that uses it until that has been silent for a while, and a run asks for its name
before it starts. A robot's owner is whose key it comes with.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final

from runtime.clock import Clock
from runtime.newest import TAKEOVER_NS

CLAIM_NS: Final = 10_000_000_000  # how long a claimed name waits for its robot's first request
_NAME: Final = re.compile(r"[\w.:/-]{1,64}", re.ASCII)  # a name becomes part of a topic


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
