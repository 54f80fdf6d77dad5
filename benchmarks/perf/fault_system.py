"""One whole `openhelix run` under observation, for `faults.py` to break."""

from __future__ import annotations

import fcntl
import json
import os
import re
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import psutil

from openhelix.benchmarks.perf.fault_arm import moving, read_log
from openhelix.runtime.transport.rpc import RpcClient, RpcError
from tests.integration.hosts import Machine

ARM: Final = "openhelix.benchmarks.perf.fault_arm"
MARK: Final = "OPENHELIX_FAULT"
LATENT_S, GRACE_S = 1.0, 0.5  # how old a latent may be, and how long to go on after that
START_S = 180.0
TIOCSPTLCK, TIOCGPTN = 0x40045431, 0x80045430  # of Linux; `os.openpty` would take it as ours
GONE_S = 5.0  # until when nothing may be left
BASE: Final = (
    f"robot.name={ARM}:FaultArm",
    "system2.engine={target: 'openhelix.runtime.robots.fake:PointEngine', options: {}}",
    "system2.hz=5",
    f"system1.policy={{target: '{ARM}:PatrolPolicy', options: {{}}}}",
    *("tasks.instruction=reach 0.0 -0.15 0.6", "tasks.steps_limit=1000000"),
    *("control.hold_limit_s=600", "output.video=false", "output.metrics_port=0"),
    *(f"safety.latent_max_age_s={LATENT_S}", f"safety.latent_grace_s={GRACE_S}"),
)


class Broken(RuntimeError):
    """A run did not get as far as to be broken on purpose."""


class System:
    """One `openhelix run` and all its processes.

    Args:
        folder: for all that it writes.
        ray: whether Ray hosts its parts.
        words: settings.
        host: where it is started; None for this machine.
        output: what its output goes to: a file, a "terminal" or a "pipe" of ours.
        env: more environment.
    """

    def __init__(
        self,
        folder: Path,
        ray: bool,
        words: Sequence[str] = (),
        host: Machine | None = None,
        output: str = "file",
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.folder, self._host = folder, host
        folder.mkdir(parents=True, exist_ok=True)
        self.mark = uuid.uuid4().hex
        self.log = folder / "arm.log"
        self.orders = folder / "orders"
        inside = self._inside(folder)
        options = f"{{log: {inside}/arm.log, orders: {inside}/orders"
        options += ", cameras: {static: [64, 64], gripper: [48, 48]}}"
        self._words = [
            *(sys.executable, "-m", "openhelix", "run", *BASE, f"ray={str(ray).lower()}"),
            *(f"output.folder={inside}/out", f"robot.options={options}", *words),
        ]
        path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), os.getcwd()]))
        self._env = {MARK: self.mark, "PYTHONPATH": path, "RAY_USAGE_STATS_ENABLED": "0"}
        self._env |= {"TERM": "xterm" if output == "terminal" else "dumb", **(env or {})}
        self._output, self.ours = output, -1  # our end of a terminal or pipe
        self.process: subprocess.Popen[bytes] | None = None

    def _inside(self, path: Path) -> Path:
        """Return a path as the run sees it."""
        return Path("/srv") / path.relative_to(self._host.base) if self._host else path

    def start(self) -> None:
        """Start it, and wait until the arm has gone some way."""
        words, env = self._words, dict(os.environ) | self._env
        if self._host is not None:
            named = [f"{name}={value}" for name, value in self._env.items()]
            words = self._host.command(["env", f"--chdir={os.getcwd()}", *named, *words])
        theirs: Any = None
        with ExitStack() as stack:
            if self._output == "terminal":
                self.ours, theirs = terminal()
                stack.callback(os.close, theirs)
            elif self._output == "pipe":
                self.ours, theirs = os.pipe()
                stack.callback(os.close, theirs)
            else:
                theirs = stack.enter_context((self.folder / "output.txt").open("wb"))
            self.process = subprocess.Popen(
                words,
                env=env,
                stdin=theirs if self._output == "terminal" else subprocess.DEVNULL,
                stdout=theirs,
                stderr=theirs,
                start_new_session=True,
                preexec_fn=_in_a_terminal if self._output == "terminal" else _by_hand,
            )
        if self.ours >= 0:
            threading.Thread(target=self._drain, daemon=True).start()
        self.until("the arm's first way", lambda: len(moving(read_log(self.log))) > 45, START_S)

    def _drain(self) -> None:
        with suppress(OSError, ValueError):  # ours is closed
            # Never inside a read for long: that would keep the end open that is to be closed.
            while not select.select([self.ours], [], [], 0.05)[0] or os.read(self.ours, 65536):
                pass

    def until(self, what: str, test: Callable[[], bool], patience_s: float) -> float:
        """Wait; return the seconds it took.

        Raises:
            Broken: it did not come about, or the run has ended.
        """
        start_s = time.monotonic()
        while not test():
            ended = self.process is not None and self.process.poll() is not None
            if ended or time.monotonic() - start_s > patience_s:
                how = "the run has ended" if ended else f"not within {patience_s:.0f} s"
                raise Broken(f"{what}: {how}: {self.said()[-300:]}")
            time.sleep(0.02)
        return time.monotonic() - start_s

    def said(self) -> str:
        """What it has written to its output."""
        with suppress(OSError):
            return " ".join((self.folder / "output.txt").read_text(errors="replace").split())
        return ""

    # -- its processes --------------------------------------------------------------------

    def processes(self) -> dict[int, str]:
        """Return the command lines of all that belong to it and live, by number."""
        found = {}
        for number in psutil.pids():
            with suppress(OSError, psutil.Error):
                home = Path(f"/proc/{number}")
                ours = self.mark.encode() in (home / "environ").read_bytes()
                if ours and psutil.Process(number).status() != psutil.STATUS_ZOMBIE:
                    line = (home / "cmdline").read_bytes().replace(b"\0", b" ")
                    found[number] = line.decode(errors="replace")
        return found

    def pid(self, name: str) -> int:
        """Return the process of a part: "head", a node's name, or what a command line has."""
        processes = self.processes()
        patterns = {"head": "-m openhelix run ", "agent": "DashboardAgent|dashboard/agent.py"}
        for number, line in processes.items():
            wrapped = "nsenter" in line or line.startswith("env ")
            if f'"name": "{name}"' in line[:400] and "launch.processes" in line:
                return number
            if not wrapped and re.search(patterns.get(name, f"^{name}$|/{name} "), line):
                return number
        health = self.health(name)
        if health.get("pid") in processes:
            return int(health["pid"])
        raise Broken(f"no process {name!r} among {list(processes.values())}")

    def kill(self, name: str, number: signal.Signals = signal.SIGKILL) -> int:
        """Send a signal to a part; return its process."""
        pid = self.pid(name)
        os.kill(pid, number)
        return pid

    def health(self, name: str = "control") -> dict[str, Any]:
        """Ask a node how it is; {} where it does not answer."""
        for number, line in self.processes().items():
            if '"name": "control"' in line[:400]:
                control = json.loads(re.search(r"\{.*\}", line).group())["control"]  # type: ignore[union-attr]
                path = f"/proc/{number}/root{control.removeprefix('ipc://')}"
                client = RpcClient(f"ipc://{path.replace('control.rpc', f'{name}.rpc')}")
                try:
                    return client.call("health", {}, 1.0)
                except RpcError:
                    return {}
                finally:
                    client.close()
        return {}

    def counters(self) -> dict[str, float]:
        """What its control loop counts, as Prometheus reads it; {} where it does not answer."""
        url = self.health().get("metrics_url")
        if url is None or self._host is not None:
            return {}
        with suppress(OSError, urllib.error.URLError):
            with urllib.request.urlopen(url, timeout=5) as page:
                text = page.read().decode()
            rows = re.findall(r"^(openhelix_\S*) ([-+.\deE]+)$", text, re.MULTILINE)
            return {name: float(value) for name, value in rows}
        return {}

    # -- its end --------------------------------------------------------------------------

    def end(self) -> int | None:
        """Ctrl-C, if it is still there; return the exit code."""
        assert self.process is not None
        if self.process.poll() is None:
            with suppress(Broken, OSError):
                self.kill("head", signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            return self.process.wait(90.0)
        return None

    def left(self, patience_s: float = GONE_S) -> list[str]:
        """Return what is still there some seconds after its end."""
        give_up_s = time.monotonic() + patience_s
        while (left := self.processes()) and time.monotonic() < give_up_s:
            time.sleep(0.05)
        return [line[:60] for line in left.values()]

    def report(self) -> dict[str, Any] | None:
        """Return its report, if there is one."""
        with suppress(OSError, ValueError):
            return dict(json.loads((self.folder / "out" / "latest" / "report.json").read_text()))
        return None

    def close(self) -> None:
        """End all that is left of it."""
        for number in self.processes():
            with suppress(OSError):
                os.kill(number, signal.SIGKILL)
        if self.process is not None:
            self.process.wait(20.0)
        if self.ours >= 0:
            with suppress(OSError):
                os.close(self.ours)
            self.ours = -1


def terminal() -> tuple[int, int]:
    """Return both ends of a new terminal that is nobody's yet, ours first."""
    ours = os.open("/dev/ptmx", os.O_RDWR | os.O_NOCTTY)
    fcntl.ioctl(ours, TIOCSPTLCK, bytes(4))
    (number,) = struct.unpack("i", fcntl.ioctl(ours, TIOCGPTN, bytes(4)))
    return ours, os.open(f"/dev/pts/{number}", os.O_RDWR | os.O_NOCTTY)


def _by_hand() -> None:
    """Hear the signals that `nohup` and a shell's background jobs make their children ignore."""
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)


def _in_a_terminal() -> None:
    """Make standard input the terminal of this session, whose end is then told by SIGHUP."""
    _by_hand()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def serve(host: Machine | None, address: str, keys: Path) -> subprocess.Popen[bytes]:
    """Start a System 2 for others to share."""
    if host is not None:
        shutil.copytree(keys, host.base / "keys", dirs_exist_ok=True)
    words = [
        *(sys.executable, "-m", "openhelix", "serve", address, *BASE[1:3], "--json"),
        *("output.metrics_port=null", f"transport.keys={'/srv/keys' if host else keys}"),
    ]
    env = {"PYTHONPATH": os.environ.get("PYTHONPATH", os.getcwd())}
    if host is not None:
        named = [f"{name}={value}" for name, value in env.items()]
        words = host.command(["env", f"--chdir={os.getcwd()}", *named, *words])
    return subprocess.Popen(
        words,
        env=dict(os.environ) | env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def ended(process: subprocess.Popen[bytes] | None) -> None:
    """End a process of ours, and those behind it."""
    if process is None:
        return
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(20)


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """A disk of 12 MB, which takes root."""
    folder.mkdir(parents=True)
    words = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(folder)]
    if subprocess.run(words, capture_output=True).returncode != 0:
        raise Broken("a small disk cannot be mounted here; that takes root")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


def await_port(port: int) -> None:
    """Wait until somebody listens there."""
    give_up_s = time.monotonic() + START_S
    while time.monotonic() < give_up_s:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1.0):
            return
        time.sleep(0.05)
    raise Broken(f"nobody listens on port {port}")


def free_ports(count: int) -> int:
    """Return the first of some ports in a row that nobody uses."""
    for port in range(23_000, 29_000, 41):
        with ExitStack() as stack, suppress(OSError):
            for i in range(count):
                stack.enter_context(socket.create_server(("127.0.0.1", port + i)))
            return port
    raise Broken("no free ports")
