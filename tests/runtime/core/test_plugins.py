"""openhelix.runtime.core.plugins: what another package brings is found as our own is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from openhelix.runtime.core import plugins
from openhelix.runtime.core.paths import CHECKOUT
from openhelix.runtime.launch.node import NodeSpec

MODULE = '''
def greet(argv):
    """Greet whoever is named."""
    print("hello", *argv)
    return 0


class Moon:
    processes = {}

    @staticmethod
    def require():
        raise ValueError("world: the moon is not installed")
'''
ENTRIES = """
[openhelix.commands]
greet = other_package:greet

[openhelix.worlds]
moon = other_package:Moon
"""


@pytest.fixture
def other(tmp_path: Path) -> dict[str, str]:
    """The environment of a process that sees a package of somebody else's."""
    (tmp_path / "other_package.py").write_text(MODULE)
    info = tmp_path / "other_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRIES)
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(CHECKOUT)])}


def command(env: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "openhelix", *words], env=env, capture_output=True, text=True
    )


def test_a_command_of_another_package_is_one_of_ours(other) -> None:
    assert command(other, "greet", "you").stdout == "hello you\n"
    assert "greet       Greet whoever is named." in command(other, "--help").stdout


FIND = "from openhelix.runtime.core.plugins import resolve; print(resolve('my_parts:greet')([]))"


def test_a_module_of_the_commands_folder_is_found(tmp_path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "my_parts.py").write_text(MODULE)
    env = os.environ | {"PYTHONPATH": str(CHECKOUT)}
    env.pop(plugins.FOLDER, None)
    told = env | {plugins.FOLDER: str(tmp_path / "mine")}  # as a run tells its processes
    for where, seen in ((tmp_path / "mine", env), (tmp_path, told)):
        # -P: as of a console script, the current folder is not on the path.
        done = subprocess.run(
            [sys.executable, "-P", "-c", FIND], cwd=where, env=seen, capture_output=True, text=True
        )
        assert done.stdout == "hello\n0\n", done.stderr


def test_the_processes_of_a_run_are_told_the_folder(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv(plugins.FOLDER, raising=False)
    monkeypatch.chdir(tmp_path)
    assert NodeSpec("a", "b:C", "ipc://d").environment[plugins.FOLDER] == str(tmp_path)


def test_a_world_of_another_package_is_found_and_asked_whether_it_is_there(other, tmp_path) -> None:
    words = ("eval", "--suite", "tasks", "--world", "moon", "--out", str(tmp_path / "out"))
    done = command(other, *words, "output.metrics_port=null")
    assert done.returncode == 2 and done.stderr.endswith("world: the moon is not installed\n")
    assert not (tmp_path / "out").exists()


def test_every_entry_of_ours_leads_somewhere() -> None:
    for group in (plugins.COMMANDS, plugins.WORLDS, plugins.ROBOTS, plugins.NODES):
        found = plugins.entries(group)
        assert found
        for name in found:
            assert callable(plugins.find(group, name)), name
    for path in plugins.entries(plugins.COMMANDS).values():
        said = plugins.summary(path)
        assert said.endswith(".") and len(said) < 80, path


def test_unknown_names_say_what_was_meant() -> None:
    with pytest.raises(plugins.ResolveError, match="no world 'calvn'; did you mean 'calvin'"):
        plugins.find(plugins.WORLDS, "calvn")
    with pytest.raises(plugins.ResolveError, match="has no 'Nothing'"):
        plugins.resolve("openhelix.runtime.core.interfaces:Nothing")
    assert plugins.missing(ModuleNotFoundError(name="ray.util")) is not None
    assert plugins.missing(ModuleNotFoundError(name="nobody")) is None
