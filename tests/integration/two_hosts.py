"""`ray up deploy/cluster.yaml` on hosts that are namespaces of this machine, and runs on them.

`test_two_hosts.py` runs small parts on them and breaks things;
`benchmarks/perf/bench_two_hosts.py` measures a run with the real ones.

Of deploy/cluster.yaml only addresses, the SSH user and key and the set-up commands are
adapted: the hosts share this checkout's .venv, where real ones would install their own.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from tests.integration.hosts import REPO, USER, Lab, Machine, lab

AHEAD_S = 5000  # the GPU host's monotonic clock before the robot host's
BIN = REPO / ".venv" / "bin"
RUN = ("--config", "configs/cluster.yaml", "system2.placement.gpus=0", "output.live=false")
METRICS = "http://127.0.0.1:9108/metrics"
FETCH = "import sys, urllib.request as u; print(u.urlopen(sys.argv[1], timeout=5).read().decode())"


class Run:
    """One `openhelix run` on the robot's host."""

    def __init__(self, cluster: TwoHosts, words: tuple[str, ...], folder: str) -> None:
        self._cluster, self._folder = cluster, folder
        where = f"transport.hosts={{system2: {cluster.gpu.address}}}"
        told = ["run", *RUN, where, f"output.folder={folder}", *words]
        command = (
            f"cd ~/openhelix && source ~/.bashrc && exec .venv/bin/openhelix {shlex.join(told)}"
        )
        self._output = cluster.lab.folder / f"{folder}.txt"
        with self._output.open("w") as output:
            self._process = subprocess.Popen(
                cluster.lab.ssh(cluster.robot, command),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self, timeout_s: float) -> int:
        """Wait for the end; return the exit code."""
        return self._process.wait(timeout_s)

    def interrupt(self) -> None:
        """Ctrl-C on the robot's host."""
        self._cluster.robot.run("pkill", "-INT", "-f", f"openhelix run .*{self._folder}")

    @property
    def output(self) -> str:
        return self._output.read_text()

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def counts(self, timeout_s: float = 30.0) -> dict[str, float]:
        """What its control loop serves to Prometheus; waits where the host is busy."""
        found: dict[str, float] = {}

        def served() -> bool:
            found.update(self._cluster.metrics(self._cluster.robot))
            return bool(found) or not self.running

        until("metrics", served, timeout_s)
        assert found, f"the run has ended: {self.output}"
        return found

    def grows(self, name: str, by: float = 3, timeout_s: float = 20.0) -> None:
        """Wait until a counter has grown."""
        goal = self.counts()[name] + by
        until(f"more {name}", lambda: self.counts()[name] >= goal, timeout_s)

    def report(self) -> dict[str, Any]:
        path = self._cluster.robot.home / "openhelix" / self._folder / "latest" / "report.json"
        return json.loads(path.read_text())

    def close(self) -> None:
        if self.running:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


class TwoHosts:
    """A robot's host and a GPU host.

    Args:
        made: the switch.
        bare: add a host that should have a GPU and has none.
    """

    def __init__(self, made: Lab, bare: bool = False) -> None:
        self.lab = made
        self.robot = made.add("robot", 10)
        self.gpu = made.add("gpu", 20, ahead_s=AHEAD_S)
        self.hosts = [self.robot, self.gpu]
        if bare:
            self.bare = made.add("bare", 30)
            self.hosts.append(self.bare)
        self._runs: list[Run] = []
        cache = os.environ.get("OPENHELIX_CACHE", Path.home() / ".cache" / "openhelix")
        # The mounted code runs; only the tests' small parts come from the checkout.
        shared = f"export PYTHONPATH=$HOME/openhelix:{REPO} OPENHELIX_CACHE={cache}\n"
        for host in self.hosts:
            (host.home / ".bashrc").write_text(shared)
        with (self.gpu.home / ".bashrc").open("a") as file:
            file.write("export OPENHELIX_WITHOUT_GPU=1\n")

    def up(self) -> float:
        """Make token and keys, adapt the file, `ray up`; return the seconds it took."""
        operator = self.lab.operator
        operator.run(str(BIN / "ray"), "get-auth-token", "--generate")
        keys = "/srv/home/.openhelix/keys"
        operator.run(str(BIN / "openhelix"), "keys", keys, "--robot", "robot0")
        config = yaml.safe_load((REPO / "deploy" / "cluster.yaml").read_text())
        workers = [host.address for host in self.hosts if host is not self.robot]
        config["provider"] |= {"head_ip": self.robot.address, "worker_ips": workers}
        config["auth"] |= {"ssh_user": USER}
        setup = [f"ln -sfn {REPO}/.venv ~/openhelix/.venv"]
        config |= {"head_setup_commands": setup, "worker_setup_commands": setup}
        (operator.home / "cluster.yaml").write_text(yaml.safe_dump(config))
        start_s = time.monotonic()
        words = ("env", "RAY_USAGE_STATS_ENABLED=0", str(BIN / "ray"), "up", "-y")
        operator.run(*words, "--no-config-cache", "/srv/home/cluster.yaml", timeout_s=180)
        return time.monotonic() - start_s

    def status(self) -> str:
        """What `ray status` says on the head."""
        return self.on(self.robot, f"RAY_AUTH_MODE=token {BIN}/ray status")

    def await_gpu(self, timeout_s: float = 300.0) -> float:
        """Wait until Ray knows the GPU host; return how long it took."""
        try:
            return until("s2_gpu", lambda: "s2_gpu" in self.status(), timeout_s, every_s=3.0)
        except AssertionError as error:
            raise AssertionError(f"{error}: {self.status()} {self.monitor_log()[-6000:]}") from None

    def on(self, host: Machine, command: str, timeout_s: float = 60.0) -> str:
        """Run a shell command on a host over SSH; return all that it printed."""
        done = subprocess.run(
            self.lab.ssh(host, command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
        )
        return done.stdout

    def monitor_log(self) -> str:
        """What Ray's autoscaler, which starts the workers, has logged on the head."""
        return self.on(self.robot, "cat /tmp/ray/session_latest/logs/monitor.*")

    def start(self, *words: str) -> Run:
        """Call `openhelix run` on the robot's host."""
        run = Run(self, words, f"outputs-{len(self._runs)}")
        self._runs.append(run)
        return run

    def metrics(self, host: Machine, url: str = METRICS) -> dict[str, float]:
        """Scrape on a host; by name and labels as written. Empty while nobody serves."""
        text = host.run(sys.executable, "-c", FETCH, url, check=False)
        found = re.findall(r"^([a-z]\S*) ([-+.\deE]+)$", text, re.MULTILINE)
        return {name: float(value) for name, value in found}

    @contextmanager
    def prometheus(self) -> Iterator[None]:
        """On the robot's host, as docs/operate.md starts it, with what `ray up` brought there."""
        home = "/srv/home"
        words = (
            *("prometheus", f"--config.file={home}/openhelix/deploy/prometheus/prometheus.yml"),
            *(f"--storage.tsdb.path={home}/prometheus", "--web.listen-address=127.0.0.1:9090"),
        )
        log = (self.lab.folder / "prometheus.log").open("wb")
        process = subprocess.Popen(self.robot.command(words), stdout=log, stderr=log)
        try:
            yield
        finally:
            self.robot.run("pkill", "-x", "prometheus", check=False)  # of that host's processes
            process.wait(30.0)
            log.close()

    def ask(self, expr: str) -> list[dict[str, Any]]:
        """Put a question to that Prometheus; nothing while it does not answer."""
        url = f"http://127.0.0.1:9090/api/v1/query?{urllib.parse.urlencode({'query': expr})}"
        text = self.robot.run(sys.executable, "-c", FETCH, url, check=False)
        try:
            return list(json.loads(text)["data"]["result"])
        except ValueError:
            return []

    def close(self) -> None:
        for run in self._runs:
            run.close()
        logs = os.environ.get("OPENHELIX_TEST_LOGS")
        if logs:  # where somebody wants to know why
            for host in self.hosts:
                for path in host.base.glob("tmp/ray/session_2*/logs"):
                    shutil.copytree(
                        path, Path(logs) / host.name, dirs_exist_ok=True, ignore=_sockets
                    )
            for path in self.lab.folder.glob("outputs-*.txt"):
                shutil.copy(path, logs)


def _sockets(folder: str, names: list[str]) -> list[str]:
    """Return what cannot be copied."""
    return [
        name
        for name in names
        if not Path(folder, name).is_file() and not Path(folder, name).is_dir()
    ]


def until(what: str, test: Callable[[], bool], timeout_s: float, every_s: float = 0.5) -> float:
    """Wait for something; return how long it took."""
    start_s = time.monotonic()
    while not test():
        if time.monotonic() - start_s > timeout_s:
            raise AssertionError(f"{what} did not come about within {timeout_s:g} s")
        time.sleep(every_s)
    return time.monotonic() - start_s


@contextmanager
def two_hosts(bare: bool = False) -> Iterator[TwoHosts]:
    """Hosts without a cluster yet; afterwards nothing is left of them. See `TwoHosts`."""
    folder = Path(tempfile.mkdtemp(prefix="openhelix-hosts-"))
    try:
        with lab(folder) as made:
            cluster = TwoHosts(made, bare)
            try:
                yield cluster
            finally:
                cluster.close()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
