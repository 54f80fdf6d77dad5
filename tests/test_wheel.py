"""The wheel of a clean checkout does its work in an environment of its own, outside any checkout."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
import zipfile
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
SITE = Path(sysconfig.get_path("purelib"))

pytestmark = pytest.mark.timeout(900)


def run(*words: str | Path, cwd: Path, timeout_s: float = 600) -> subprocess.CompletedProcess[str]:
    """Run a command that sees nothing of this environment's Python path."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    return subprocess.run(
        list(map(str, words)), cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout_s
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of the files that git tracks, as they are now."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "checkout"
    copy.mkdir()
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    subprocess.run(
        ["tar", "--null", "-T", "-", "--ignore-failed-read", "-cf", folder / "files.tar"],
        cwd=ROOT,
        input=files.stdout,
        check=True,
    )
    subprocess.run(["tar", "-xf", folder / "files.tar"], cwd=copy, check=True)
    words = ("wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder), ".")
    done = run(sys.executable, "-m", "pip", *words, cwd=copy)
    assert done.returncode == 0, done.stderr
    (made,) = folder.glob("*.whl")
    return made


def environment(wheel: Path, folder: Path, dependencies: Path) -> Path:
    """Install the wheel into an empty environment that sees a folder of dependencies."""
    done = run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    assert done.returncode == 0, done.stderr
    python = folder / "bin" / "python"
    words = ("--python", str(python), "install", "-q", "--no-deps", str(wheel))
    done = run(sys.executable, "-m", "pip", *words, cwd=folder.parent)
    assert done.returncode == 0, done.stderr
    (site,) = (folder / "lib").glob("python*/site-packages")
    (site / "dependencies.pth").write_text(f"{dependencies}\n")
    return folder / "bin"


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """Programs of an environment with all dependencies."""
    return environment(wheel, tmp_path_factory.mktemp("full") / "venv", SITE)


def closure(wheel: Path) -> set[Distribution]:
    """Return the base dependencies of the wheel with all that they need."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        text = archive.read(name).decode()
    todo = [Requirement(r) for r in re.findall(r"^Requires-Dist: (.*)$", text, re.M)]
    found: dict[str, Distribution] = {}
    while todo:
        requirement = todo.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            dist = distribution(requirement.name)
        except PackageNotFoundError:
            continue
        if dist.metadata["Name"] not in found:
            found[dist.metadata["Name"]] = dist
            todo += [Requirement(text) for text in dist.requires or ()]
    return set(found.values())


@pytest.fixture(scope="module")
def base(wheel, tmp_path_factory) -> Path:
    """Programs of an environment with the base dependencies alone."""
    folder = tmp_path_factory.mktemp("base")
    packages = folder / "packages"
    packages.mkdir()
    for dist in closure(wheel):
        for name in {file.parts[0] for file in dist.files or ()} - {"..", "__pycache__"}:
            target = Path(str(dist.locate_file(name)))
            if target.exists() and not (packages / name).exists():
                (packages / name).symlink_to(target)
    return environment(wheel, folder / "venv", packages)


def test_the_wheel_holds_weights_configurations_and_licence(wheel) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    for name in (
        "openhelix/checkpoints/system1-laptop/model.safetensors",
        "openhelix/checkpoints/system2-laptop/vision.safetensors",
        "openhelix/checkpoints/system2-laptop/language.safetensors",
        "openhelix/checkpoints/system2-laptop/latent.safetensors",
        "openhelix/checkpoints/system2-laptop/understanding.safetensors",
        "openhelix/checkpoints/trigger.json",
        "openhelix/checkpoints/text-laptop/text.safetensors",
        "openhelix/configs/run.yaml",
        "openhelix/py.typed",
        "openhelix/benchmarks/calvin/sequences.json",
        "openhelix/runtime/observe/status_page/index.html",
    ):
        assert name in names, name
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not any("/results/" in name or name.startswith("tests") for name in names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"openhelix"}
    assert wheel.stat().st_size < 32 << 20


def test_it_evaluates_outside_any_checkout(installed, tmp_path) -> None:
    where = run(
        installed / "python", "-c", "import openhelix; print(openhelix.__path__)", cwd=tmp_path
    )
    assert str(installed.parent) in where.stdout
    done = run(installed / "openhelix", "doctor", "--json", cwd=tmp_path)
    assert json.loads(done.stdout)["healthy"] == (done.returncode == 0), done.stderr
    words = ("--suite", "tasks", "--tasks", "open_drawer", "--episodes-per-task", "1", "--json")
    done = run(installed / "openhelix", "eval", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["n_episodes"] == 1 and report["n_errors"] == 0
    assert report["policy"]["checkpoint"] == "shipped"
    assert (tmp_path / "outputs" / "eval" / "tasks-D-0001" / "report.html").is_file()


def test_a_base_install_helps_and_says_which_extra_is_missing(base, tmp_path) -> None:
    done = run(base / "python", "-c", "import openhelix, torch", cwd=tmp_path)
    assert "No module named 'torch'" in done.stderr
    done = run(base / "openhelix", "--help", cwd=tmp_path)
    assert done.returncode == 0 and "  eval " in done.stdout, done.stderr
    assert run(base / "openhelix", "--version", cwd=tmp_path).stdout.startswith("openhelix 0.")
    done = run(base / "openhelix", "doctor", "--json", cwd=tmp_path)
    checks = {row["name"]: row for row in json.loads(done.stdout)["checks"]}
    assert done.returncode == 1 and "openhelix[sim]" in checks["simulator"]["remedy"]
    for words, extra in (
        (("eval", "--suite", "tasks"), "sim"),
        (("run",), "cluster"),
        (("run", "--no-ray", "control.clock=lockstep"), "sim"),
        (("train", "policy"), "cpu"),
    ):
        done = run(base / "openhelix", *words, cwd=tmp_path)
        lines = done.stderr.strip().splitlines()
        said = [line for line in lines if not re.match(r" *\d+\.\d s  ", line)]  # what is starting
        assert done.returncode == 2 and len(said) == 1, (words, done.stderr)
        assert re.search(r"openhelix\[(sim|cpu|cluster)\]", said[0]), (words, extra, lines)
