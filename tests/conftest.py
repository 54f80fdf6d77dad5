"""Property tests fail for what they find, not for how busy the machine is or how lucky the day.

`HYPOTHESIS_PROFILE=search` looks at other examples each time.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

_QUIET = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None)
settings.register_profile("repeat", _QUIET, derandomize=True)
settings.register_profile("search", _QUIET, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or "repeat")
