"""What stands between a policy and an arm, under one name.

`limits` bends every target into the workspace, speed and acceleration limits; `watchdog`
knows the age of everything the loop relies on and turns findings into run, hold or stop.
"""

from __future__ import annotations

from openhelix.runtime.core.limits import SafetyFilter, SafetyLimits
from openhelix.runtime.core.watchdog import Mode, SafeStop, SafetyState, Watchdog

__all__ = ["Mode", "SafeStop", "SafetyFilter", "SafetyLimits", "SafetyState", "Watchdog"]
