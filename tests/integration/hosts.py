"""Two hosts on one machine: network, mount, process, host name and time namespaces of their own.

Each `Machine` has an address, a home, a /tmp, a process table and an sshd; killing its first
process is pulling its plug. A host may have a monotonic clock of its own, as two real ones
always do. An operator's machine, from which `ray up` is called, is the switch between them.
Needs root and `deploy/install-debian.sh hosts`; `why_not()` says what is missing.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

NETWORK = "10.77.0"
USER = "root"  # inside a host its home is the host's own

REPO = Path(__file__).resolve().parents[2]

# The checkout stays where it is even if that is below /tmp.
PRIVATE = r"""
mount --bind "$REPO" /srv/repo
mount --bind /srv/passwd /etc/passwd
mount --bind /srv/hosts /etc/hosts
mount --bind /srv/resolv.conf /etc/resolv.conf
mount --bind /srv/tmp /tmp
[ -d "$REPO" ] || { mkdir -p "$REPO" && mount --bind /srv/repo "$REPO"; }
"""

START = r"""
set -e
mount --make-rprivate /
mount --bind "$BASE" /srv
mount -t tmpfs -o size=2g tmpfs /dev/shm
@PRIVATE@mkdir -p /run/sshd
ip link set lo up
for i in $(seq 200); do ip link show eth0 >/dev/null 2>&1 && break; sleep 0.05; done
ip addr add "$ADDRESS/24" dev eth0
ip link set eth0 up
ip route add default via "$SWITCH"
hostname "$NAME"
exec /usr/sbin/sshd -D -e -f /srv/sshd_config
""".replace("@PRIVATE@", PRIVATE)

SWITCH = r"""
set -e
mount --make-rprivate /
mount --bind "$BASE" /srv
@PRIVATE@ip link set lo up
ip link add br0 type bridge
ip addr add "$ADDRESS/24" dev br0
ip link set br0 up
hostname "$NAME"
touch /srv/ready
exec sleep infinity
""".replace("@PRIVATE@", PRIVATE)

SSHD = """
Port 22
ListenAddress {address}
HostKey /srv/host_key
PidFile none
PermitRootLogin yes
StrictModes no
UsePAM no
PasswordAuthentication no
AuthorizedKeysFile /srv/home/.ssh/authorized_keys
MaxStartups 100
"""


def why_not() -> str:
    """Why hosts cannot be made here; empty when they can."""
    if os.geteuid() != 0:
        return "needs root, for network namespaces"
    tools = ("setpriv", "unshare", "nsenter", "ip", "ssh", "ssh-keygen", "rsync", "/usr/sbin/sshd")
    missing = [tool for tool in tools if shutil.which(tool) is None]
    if missing:
        return f"needs {', '.join(missing)}: run deploy/install-debian.sh hosts"
    words = ["unshare", *_FLAGS, "--monotonic", "1", "true"]
    trial = subprocess.run(words, capture_output=True, text=True)
    if trial.returncode != 0:
        return f"namespaces are not allowed here: {trial.stderr.strip()}"
    return ""


_WITH_US = ("setpriv", "--pdeathsig", "KILL")  # a host outlives no test that was killed
_FLAGS = ("-n", "-m", "-p", "-u", "-T", "--fork", "--kill-child", "--mount-proc")


class Machine:
    """One host. `base` is its disk, which survives `kill`."""

    def __init__(self, name: str, number: int, base: Path, ahead_s: int = 0) -> None:
        self.name, self.address = name, f"{NETWORK}.{number}"
        self.card = f"02:00:00:00:00:{number:02x}"
        self.base, self.ahead_s = base, ahead_s
        self._shell: subprocess.Popen[bytes] | None = None
        self.init = 0  # pid of its first process, as seen from outside

    @property
    def home(self) -> Path:
        return self.base / "home"

    def start(self, script: str) -> None:
        """Switch it on."""
        for name in ("home", "repo"):
            (self.base / name).mkdir(parents=True, exist_ok=True)
        lines = Path("/etc/passwd").read_text().splitlines()
        others = [line for line in lines if not line.startswith("root:")]
        root = "root:x:0:0:root:/srv/home:/bin/bash"
        (self.base / "passwd").write_text("\n".join([root, *others]) + "\n")
        # Its own name without asking a name server, of which there is none.
        (self.base / "hosts").write_text(f"127.0.0.1 localhost\n{self.address} {self.name}\n")
        (self.base / "resolv.conf").write_text("")
        shutil.rmtree(self.base / "tmp", ignore_errors=True)  # a reboot clears it
        (self.base / "tmp").mkdir()
        clock = ("--monotonic", str(self.ahead_s), "--boottime", str(self.ahead_s))
        environment = {
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": "/srv/home",
            "BASE": str(self.base),
            "REPO": str(REPO),
            "NAME": self.name,
            "ADDRESS": self.address,
            "SWITCH": f"{NETWORK}.1",
        }
        log = (self.base / "init.log").open("ab")
        self._shell = subprocess.Popen(
            [*_WITH_US, "unshare", *_FLAGS, *clock, "bash", "-c", script],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        give_up_s = time.monotonic() + 10.0
        while True:
            children = psutil.Process(self._shell.pid).children()
            if children:
                self.init = children[0].pid
                return
            if self._shell.poll() is not None or time.monotonic() > give_up_s:
                raise RuntimeError(f"{self.name} did not start: {self.log()}")
            time.sleep(0.02)

    def kill(self) -> None:
        """Pull the plug: nothing on it gets a chance to say goodbye."""
        if self._shell is not None and self._shell.poll() is None:
            os.kill(self.init, signal.SIGKILL)
            self._shell.wait(timeout=10)
        self._shell = None

    def command(self, words: Sequence[str]) -> list[str]:
        """Return the words that run `words` on this machine."""
        environment = ["HOME=/srv/home", f"PATH={os.environ['PATH']}", "TERM=dumb", "LANG=C.UTF-8"]
        inside = ["nsenter", "-t", str(self.init), "-n", "-m", "-p", "-u", "-T"]
        return [*inside, "env", "-i", *environment, *words]

    def run(
        self, *words: str, timeout_s: float = 60.0, check: bool = True, cwd: Path | None = None
    ) -> str:
        """Run a command on it and return what it printed.

        nsenter changes to the root directory with a mount namespace, hence `cwd`.
        """
        told = ["env", f"--chdir={cwd or REPO}", *words]
        done = subprocess.run(
            self.command(told),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            timeout=timeout_s,
        )
        if check and done.returncode != 0:
            raise RuntimeError(f"{self.name}: {' '.join(words)}: {done.stdout}")
        return done.stdout

    def log(self) -> str:
        return (self.base / "init.log").read_text()


class Lab:
    """A switch, which is the operator's machine, and hosts at it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.key = folder / "operator" / "home" / ".ssh" / "id_ed25519"
        self.operator = Machine("operator", 1, folder / "operator")
        self.hosts: dict[str, Machine] = {}

    def open(self) -> None:
        self.key.parent.mkdir(parents=True)
        _keygen(self.key)
        self.operator.start(SWITCH)
        _wait((self.operator.base / "ready").exists, f"the switch: {self.operator.log()}")

    def add(self, name: str, number: int, ahead_s: int = 0) -> Machine:
        """Make a host and switch it on."""
        host = Machine(name, number, self.folder / name, ahead_s)
        (host.home / ".ssh").mkdir(parents=True)
        shutil.copy(self.key.with_suffix(".pub"), host.home / ".ssh" / "authorized_keys")
        _keygen(host.base / "host_key")
        config = SSHD.format(address=host.address)
        (host.base / "sshd_config").write_text(config)
        self.hosts[name] = host
        self.power_on(host)
        return host

    def power_on(self, host: Machine) -> None:
        """Switch a host on and plug it in; returns when its sshd answers."""
        host.start(START)
        port = f"v-{host.name}"[:15]
        # From outside, so that the number of the host's first process is the one known here.
        switch = ("nsenter", "-t", str(self.operator.init), "-n")
        # The same network card after a reboot: others remember its address for a while.
        card = ("name", "eth0", "address", host.card, "netns", str(host.init))
        make = ("ip", "link", "add", port, "type", "veth", "peer", *card)
        plug = ("ip", "link", "set", port, "master", "br0", "up")
        for words in (make, plug):
            subprocess.run([*switch, *words], check=True)
        _wait(lambda: self._answers(host), f"sshd of {host.name}: {host.log()}")

    def ssh(self, host: Machine, command: str) -> list[str]:
        """Return the words that run a shell command on a host, from outside the lab."""
        options = ("-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null")
        quiet = ("-o", "LogLevel=ERROR", "-o", "ServerAliveInterval=5", "-o", "ConnectTimeout=5")
        words = [
            "ssh",
            *options,
            *quiet,
            "-i",
            "/srv/home/.ssh/id_ed25519",
            f"{USER}@{host.address}",
            command,
        ]
        return self.operator.command(words)

    def _answers(self, host: Machine) -> bool:
        done = subprocess.run(self.ssh(host, "true"), capture_output=True, stdin=subprocess.DEVNULL)
        return done.returncode == 0

    def close(self) -> None:
        for host in (*self.hosts.values(), self.operator):
            host.kill()


@contextmanager
def lab(folder: Path) -> Iterator[Lab]:
    """A lab that leaves no process behind."""
    made = Lab(folder)
    try:
        made.open()
        yield made
    finally:
        made.close()


def _keygen(path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)


def _wait(test: object, what: str, timeout_s: float = 20.0) -> None:
    give_up_s = time.monotonic() + timeout_s
    while not test():  # type: ignore[operator]
        if time.monotonic() > give_up_s:
            raise RuntimeError(f"it did not come: {what}")
        time.sleep(0.1)
