"""Property tests fail for what they find, not for how busy the machine is or how lucky the day.

`HYPOTHESIS_PROFILE=search` looks at other examples each time.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

import openhelix  # noqa: F401  before NumPy: tests and the processes that they start add alike

_QUIET = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None)
settings.register_profile("repeat", _QUIET, derandomize=True)
settings.register_profile("search", _QUIET, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or "repeat")
# Who else can log in on this host is no part of what the tests are about; those that are clear it.
os.environ["OPENHELIX_TRUST_HOST"] = "1"


@pytest.fixture(scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache folder that is thrown away, but for the models that are made of what is installed.

    Making one takes half a minute, so the person's own are linked.
    """
    from openhelix.system2.model import BUILTIN, builtin

    folder = tmp_path_factory.mktemp("cache")
    (folder / "system2").mkdir()
    for made in map(builtin, BUILTIN):
        (folder / "system2" / made.name).symlink_to(made.resolve())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENHELIX_CACHE", str(folder))
        yield folder


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Add why tests were skipped to the file that `make test` prints at its end."""
    path = os.environ.get("OPENHELIX_SKIPPED")
    if not path:
        return
    with Path(path).open("a") as file:
        for report in terminalreporter.stats.get("skipped", []):
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
            file.write(str(reason).removeprefix("Skipped: ") + "\n")
