"""deploy/install-debian.sh installs what its options name and nothing else; with stand-ins for Debian's."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "deploy" / "install-debian.sh"
HOSTS = {"openssh-server", "openssh-client", "rsync", "iproute2", "util-linux"}
STANDINS = {
    "dpkg-query": 'for last; do :; done; [[ " $PRESENT " == *" $last "* ]] && echo installed',
    "apt-get": '[[ " $* " == *" install "* ]] && echo "$*" >> "$LOG"; true',
    "sudo": '"$@"',
}


def install(folder: Path, *words: str, present: str = "") -> tuple[int, str, set[str]]:
    """Call the script; return its exit code, what it complains of, and what it installs."""
    for name, body in STANDINS.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    log = folder / "log"
    done = subprocess.run(
        [str(SCRIPT), *words],
        env={"PATH": f"{folder}:/usr/bin:/bin", "LOG": str(log), "PRESENT": present},
        capture_output=True,
        text=True,
    )
    told = log.read_text().split() if log.exists() else []
    return done.returncode, done.stderr, {w for w in told if w[0] != "-" and w != "install"}


@pytest.mark.parametrize(
    ("words", "packages"),
    [
        (("hosts",), HOSTS),
        (("prometheus",), {"prometheus"}),
        (("browser",), {"chromium"}),
        (("prometheus", "browser"), {"prometheus", "chromium"}),
        (("tests",), {*HOSTS, "prometheus", "chromium", "zsh", "fish"}),
    ],
)
def test_an_option_installs_what_it_names(
    tmp_path: Path, words: tuple[str, ...], packages: set[str]
) -> None:
    assert install(tmp_path, *words) == (0, "", packages)


def test_what_is_there_is_not_installed_again(tmp_path: Path) -> None:
    assert install(tmp_path, "prometheus", present="prometheus") == (0, "", set())
    code, _, packages = install(tmp_path, "hosts", present="rsync iproute2")
    assert code == 0 and packages == HOSTS - {"rsync", "iproute2"}


@pytest.mark.parametrize("words", [(), ("promtheus",), ("browser", "all")])
def test_what_it_does_not_know_is_one_line(tmp_path: Path, words: tuple[str, ...]) -> None:
    code, told, packages = install(tmp_path, *words)
    assert code == 2 and not packages and len(told.splitlines()) == 1
    assert "hosts, prometheus, browser, tests" in told
