"""The faults that `faults.py` tries, and what must become of the arm in each."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import psutil

from openhelix.benchmarks.perf.fault_peers import Line, Peer
from openhelix.benchmarks.perf.fault_system import ARM, GRACE_S, LATENT_S, System, serve
from openhelix.runtime.observe.status_source import StatusRecord
from tests.integration.hosts import Lab

Expect = Literal["ends", "stops", "holds", "resumes", "survives", "goes on"]
CAMERA_S, STATE_S = 1.0, 0.25  # how old a frame and a state may be: the defaults
SILENT_S = LATENT_S + GRACE_S + 0.3  # 0.2 s of a latent's way, and ticks
PLAN_S = 0.9  # a plan of 16 rows, the latency of the last, and a blend


@dataclass
class Stage:
    """What a fault may act on."""

    system: System
    peer: Peer | None = None
    line: Line | None = None
    served: subprocess.Popen[bytes] | None = None
    lab: Lab | None = None
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Fault:
    """One way to break it, and what must become of the arm.

    Attributes:
        name: what is broken, and how.
        kind: the heading that it comes under.
        act: breaks it.
        expect: "ends" with the command; "stops" for good; "holds"; "resumes" after a hold or a
            stop, by itself or once it is healed; "goes on"; "survives": one of these two.
        within_s: from the fault to the safe state, or between two targets where it goes on.
        on: how it is hosted: "plain", "ray", "hosts".
        words: more settings.
        needs: "peer", "line" or "server" between the robot and its System 2.
        heal: ends the fault.
        look_s: how long to look before that.
        drain_s: how long to let it run afterwards, so that what is on the way arrives.
        calls_stop: whether `stop` can be called: not by a process that is gone.
        counter: a metric that must have grown, as a regular expression.
        output: see `System`.
        quick: part of the short campaign.
    """

    name: str
    kind: str
    act: Callable[[Stage], None]
    expect: Expect
    within_s: float
    on: tuple[str, ...] = ("plain",)
    words: tuple[str, ...] = ()
    needs: str = ""
    heal: Callable[[Stage], None] | None = None
    look_s: float = 3.0
    drain_s: float = 0.0
    calls_stop: bool = True
    counter: str = ""
    output: str = "file"
    quick: bool = False
    report: bool | None = None  # whether there must be one


def sends(name: str, number: signal.Signals = signal.SIGKILL) -> Callable[[Stage], None]:
    """A signal to a part."""
    return lambda stage: stage.notes.update({name: stage.system.kill(name, number)})


def goes_on(name: str) -> Callable[[Stage], None]:
    """SIGCONT to the part that was stopped."""
    return lambda stage: os.kill(stage.notes[name], signal.SIGCONT)


def twice(stage: Stage) -> None:
    """Ctrl-C by somebody who sees nothing happen."""
    stage.system.kill("head", signal.SIGINT)
    time.sleep(0.15)
    stage.system.kill("head", signal.SIGINT)


def halted_then_killed(stage: Stage) -> None:
    """Somebody has halted a part that the end of the command does not reach."""
    stage.system.kill("system2", signal.SIGSTOP)
    stage.system.kill("head")


def hangs_up(stage: Stage) -> None:
    """The terminal is closed, or the reader of a pipe ends."""
    os.close(stage.system.ours)
    stage.system.ours = -1


def slows(name: str, seconds: float = 3.0) -> Callable[[Stage], None]:
    """A part gets a tenth of the time it wants."""

    def act(stage: Stage) -> None:
        pid, give_up_s = stage.system.pid(name), time.monotonic() + seconds
        while time.monotonic() < give_up_s:
            os.kill(pid, signal.SIGSTOP)
            time.sleep(0.09)
            os.kill(pid, signal.SIGCONT)
            time.sleep(0.01)

    return act


def limits(name: str, what: int, more: int) -> Callable[[Stage], None]:
    """A part has leaked until the system refuses it more memory, or descriptors."""

    def act(stage: Stage) -> None:
        process = psutil.Process(stage.system.pid(name))
        have = process.memory_info().vms if what == resource.RLIMIT_AS else process.num_fds()
        stage.notes["limited"] = process.pid
        resource.prlimit(process.pid, what, (have + more, resource.getrlimit(what)[1]))

    return act


def unlimits(what: int) -> Callable[[Stage], None]:
    """The limit is lifted again."""

    def heal(stage: Stage) -> None:
        hard = resource.getrlimit(what)[1]
        resource.prlimit(stage.notes["limited"], what, (hard, hard))

    return heal


def orders(text: str) -> Callable[[Stage], None]:
    """The arm or its cameras break; see `FaultArm`."""

    def act(stage: Stage) -> None:
        part = stage.system.orders.with_suffix(".part")
        part.write_text(text)
        part.rename(stage.system.orders)

    return act


def lies(mode: str) -> Callable[[Stage], None]:
    """System 2 sends what is wrong; see `Peer`."""

    def act(stage: Stage) -> None:
        assert stage.peer is not None
        stage.peer.mode = mode

    return act


def line(mode: str | float) -> Callable[[Stage], None]:
    """The network between the robot and System 2; see `Line`."""

    def act(stage: Stage) -> None:
        assert stage.line is not None
        stage.line.mode = mode

    return act


def link(*words: str) -> Callable[[Stage], None]:
    """The cable of System 2's host: words for the switch."""

    def act(stage: Stage) -> None:
        assert stage.lab is not None
        stage.lab.operator.run(*words)

    return act


def pulled(seconds: float) -> Callable[[Stage], None]:
    """The cable of System 2's host is out for a moment."""

    def act(stage: Stage) -> None:
        link("ip", "link", "set", "v-gpu", "down")(stage)
        time.sleep(seconds)
        link("ip", "link", "set", "v-gpu", "up")(stage)

    return act


def fills_disk(stage: Stage) -> None:
    """Not a byte is left where the run writes."""
    with suppress(OSError), (stage.system.folder / "out" / "filler").open("wb") as file:
        while True:
            file.write(bytes(1 << 16))
            file.flush()


def guesses(stage: Stage) -> None:
    """A stranger tries tokens at the status page's stop button, and requests that are none."""
    (record,) = (stage.system.folder / "out").glob("run-*/status.json")
    token = StatusRecord.read(record.parent).token
    page = subprocess.Popen(
        [
            *(sys.executable, "-m", "openhelix", "status", "--web", "--json"),
            *("--listen", "127.0.0.1:0", f"output.folder={record.parent.parent}"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert page.stdout is not None
        url = json.loads(page.stdout.readline())["url"]
        tries = ["", "-", token[:-1], token + "x", token.swapcase()]
        tries += [uuid.uuid4().hex for _ in range(200)]
        accepted = 0
        for guess in tries:
            request = urllib.request.Request(f"{url}api/stop", b"{}", method="POST")
            request.add_header("Authorization", f"Bearer {guess}")
            with suppress(urllib.error.HTTPError):
                urllib.request.urlopen(request, timeout=10).close()
                accepted += 1
        host, port = url.removeprefix("http://").strip("/").rsplit(":", 1)
        for text in (b"\0" * 4096, b"GET /" + b"a" * 100_000, b"POST /api/stop HTTP/9.9\r\n\r\n"):
            with suppress(OSError), socket.create_connection((host, int(port)), 5) as end:
                end.sendall(text)
                end.settimeout(1.0)
                end.recv(4096)
        stage.notes["accepted"] = accepted
    finally:
        page.kill()  # it is nice to others, and would take its time to end in order
        page.wait(20)


ENDINGS: Final = "the command ends"  # the heading of what must halt within 0.2 s
SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
BOTH: Final = ("plain", "ray")
ALL: Final = (*BOTH, "hosts")
LEAKY = f"system2.engine={{target: '{ARM}:LeakyEngine', options: {{}}}}"
THROUGH_GRIPPER = (
    f"system1.policy={{target: '{ARM}:PatrolPolicy', options: {{cameras: [[gripper, 48, 48]]}}}}",
)


def policy(option: str) -> tuple[str, ...]:
    """Settings of a System 1 that fails."""
    return (f"system1.policy={{target: '{ARM}:PatrolPolicy', options: {{{option}}}}}",)


def faults() -> list[Fault]:
    """Return the whole table of faults."""
    return [
        *_endings(),
        *_processes(),
        *_cameras_and_states(),
        *_peers(),
        *_network(),
        *_surroundings(),
    ]


def _endings() -> Iterator[Fault]:
    kind = ENDINGS
    yield Fault(
        *("kill -9 of the command", kind, sends("head"), "ends", 0.2, ALL),
        quick=True,
        report=False,
    )
    yield Fault(
        *("kill -9 of the command, System 2 halted", kind, halted_then_killed, "ends", 0.2, BOTH),
        report=False,
    )
    for number in SIGNALS:
        act = sends("head", number)
        on = ALL if number == signal.SIGINT else BOTH
        yield Fault(number.name, kind, act, "ends", 0.2, on, report=True)
    yield Fault("SIGINT twice", kind, twice, "ends", 0.2, BOTH, quick=True, report=True)
    for name, output in (("terminal closed", "terminal"), ("reader of the output gone", "pipe")):
        yield Fault(
            *(name, kind, hangs_up, "ends", 0.2, BOTH), output=output, report=True, quick=True
        )


def _processes() -> Iterator[Fault]:
    kind = "a process"
    yield Fault(*("control killed", kind, sends("control"), "ends", 0.2, ALL), calls_stop=False)
    stopped = signal.SIGSTOP
    yield Fault(
        *("control stopped, 2 s", kind, sends("control", stopped), "resumes", 0.2, BOTH),
        heal=goes_on("control"),
        look_s=2.0,
    )
    yield Fault(
        *("command stopped", kind, sends("head", stopped), "goes on", 0.3),
        heal=goes_on("head"),
    )
    yield Fault("System 1 killed", kind, sends("system1"), "resumes", PLAN_S, ALL)
    yield Fault(
        *("System 1 stopped", kind, sends("system1", stopped), "resumes", PLAN_S, BOTH),
        heal=goes_on("system1"),
    )
    yield Fault("System 1 slow", kind, slows("system1"), "survives", PLAN_S, BOTH)
    yield Fault(
        *("System 1 raises", kind, sends("system1", signal.SIGUSR1), "holds", PLAN_S),
        words=policy("at_signal: raise"),
    )
    yield Fault(
        *("System 1 gives NaN", kind, sends("system1", signal.SIGUSR1), "holds", PLAN_S),
        words=policy("at_signal: nan"),
    )
    yield Fault(
        # With Ray the next one may be there before the last latent is too old to go on with.
        *("System 2 killed", kind, sends("system2"), "survives", SILENT_S, BOTH),
        counter="latents_received_total",
    )
    yield Fault(
        *("System 2 stopped", kind, sends("system2", stopped), "resumes", SILENT_S, BOTH),
        heal=goes_on("system2"),
        quick=True,
    )
    yield Fault("System 2 slow", kind, slows("system2"), "survives", SILENT_S, BOTH)
    memory, files = resource.RLIMIT_AS, resource.RLIMIT_NOFILE
    yield Fault(
        *("System 2 leaks memory", kind, limits("system2", memory, 64 << 20), "resumes"),
        *(SILENT_S + 3.0, ("plain",), (LEAKY,)),
        heal=unlimits(memory),
        look_s=6.0,
    )
    for name in ("system1", "control", "observer"):
        yield Fault(
            *(f"{name} leaks descriptors", kind, limits(name, files, 0), "goes on", 0.3),
        )
    yield Fault("observer killed", kind, sends("observer"), "goes on", 0.3, BOTH)
    yield Fault(
        *("observer stopped", kind, sends("observer", stopped), "goes on", 0.3),
        heal=goes_on("observer"),
    )
    ray = ("ray",)
    for name, what in (
        *(("ray", "Ray's driver"), ("raylet", "Ray's raylet")),
        *(("gcs_server", "Ray's GCS"), ("agent", "Ray's agent")),
    ):
        yield Fault(f"{what} killed", kind, sends(name), "ends", SILENT_S, ray, report=True)


def _cameras_and_states() -> Iterator[Fault]:
    kind = "camera"
    frozen_s = CAMERA_S + 0.2
    yield Fault("no new frames", kind, orders("freeze static"), "stops", frozen_s, ALL, quick=True)
    yield Fault("same pixels", kind, orders("pixels static"), "stops", frozen_s)
    yield Fault("two pictures in turn", kind, orders("alternate static"), "stops", frozen_s)
    yield Fault("frames of another size", kind, orders("shape static"), "stops", frozen_s)
    yield Fault("frames an hour ahead", kind, orders("future_frame static"), "stops", frozen_s)
    once = orders("future_frame_once static")
    yield Fault("one frame an hour ahead", kind, once, "goes on", 0.3)
    for order in ("freeze", "alternate"):
        yield Fault(
            *(f"System 2's camera alone: {order}", kind, orders(f"{order} static"), "stops"),
            *(frozen_s, ("plain",), THROUGH_GRIPPER),
        )
    kind = "robot"
    for order, name in (
        *(("nan", "its pose is NaN"), ("future", "its state an hour ahead")),
        *(("stale", "its state always the same"), ("fail", "it does not answer")),
        ("fail_send", "it takes no target"),
    ):
        on = ALL if order == "fail" else ("plain",)
        yield Fault(name, kind, orders(order), "stops", STATE_S + 0.15, on)
    yield Fault("one state an hour ahead", kind, orders("future_once"), "goes on", 0.3)
    yield Fault("it answers after 3 s", kind, orders("hang"), "resumes", 3.3)
    yield Fault("it answers after 0.2 s", kind, orders("slow"), "goes on", 0.5)


def _peers() -> Iterator[Fault]:
    kind = "wrong latents"
    refused = 'wire_dropped_total{channel="latents",reason="%s"}'
    counted = {
        "silent": "",
        "future": 'latents_mistimed_total{reason="future"}',
        "int64": 'latents_mistimed_total{reason="future"}',
        "old": 'latents_mistimed_total{reason="old"}',
        "nan": refused % "nonfinite",
        "inf": refused % "nonfinite",
        "jump": refused % "jump",
        "garbage": refused % "(truncated|header|oversize)",
        "flood": refused % "stale",
        "huge": refused % "oversize",
        "replay": refused % "stale",
        "shape": "chunks_total",
        "nan_beside": refused % "nonfinite",
        "future_beside": 'latents_mistimed_total{reason="future"}',
    }
    for mode in (*Peer.INSTEAD, *Peer.FLOODING):
        alone = mode in Peer.INSTEAD
        name = f"{mode}, nothing else" if alone else mode
        yield Fault(
            *(name, kind, lies(mode), "resumes" if alone else "survives", SILENT_S),
            needs="peer",
            heal=lies("good"),
            counter=counted[mode],
            quick=mode == "nan",
        )
    for mode in Peer.BESIDE:
        name = f"{mode.removesuffix('_beside')} beside right ones"
        yield Fault(*(name, kind, lies(mode), "goes on", 0.3), needs="peer", counter=counted[mode])
    yield Fault(
        *("another model's", kind, lies("other_model"), "stops", 0.5),
        needs="peer",
        counter="latents_mismatched_total",
    )


def _network() -> Iterator[Fault]:
    kind = "network to System 2"
    for mode, name in (("cut", "connections reset"), ("hole", "nothing passes")):
        yield Fault(
            *(name, kind, line(mode), "resumes", SILENT_S, BOTH),
            needs="line",
            heal=line("good"),
            quick=mode == "hole",
        )
    yield Fault(
        *("0.3 s late", kind, line(0.3), "goes on", 0.6),
        needs="line",
        heal=line("good"),
        drain_s=1.5,
    )
    yield Fault(
        *("2 s late", kind, line(2.0), "resumes", SILENT_S),
        needs="line",
        heal=line("good"),
        look_s=5.0,
        drain_s=6.0,
        counter='latents_mistimed_total{reason="(old|before_stop)"}',
    )
    hosts = ("hosts",)
    down, up = link("ip", "link", "set", "v-gpu", "down"), link("ip", "link", "set", "v-gpu", "up")
    yield Fault("cable pulled", kind, down, "resumes", SILENT_S, hosts, heal=up, look_s=6.0)
    yield Fault(
        *("cable pulled for 0.4 s", kind, pulled(0.4), "survives", SILENT_S, hosts), look_s=4.0
    )
    yield Fault(
        *("System 2's host killed, back with another clock", kind, _host_dies, "resumes"),
        *(SILENT_S, hosts),
        heal=_host_returns,
    )


def _surroundings() -> Iterator[Fault]:
    kind = "surroundings"
    record = ("output.record=true", "output.video=true")
    yield Fault("disk full", kind, fills_disk, "goes on", 0.3, BOTH, words=(*record, "disk"))
    yield Fault("token guessed, page attacked", kind, guesses, "goes on", 0.3, quick=True)


def _host_dies(stage: Stage) -> None:
    assert stage.lab is not None
    stage.lab.hosts["gpu"].kill()


def _host_returns(stage: Stage) -> None:
    assert stage.lab is not None
    host = stage.lab.hosts["gpu"]
    host.ahead_s = 90_000  # its clock jumps
    stage.lab.power_on(host)
    stage.served = serve(host, stage.notes["address"], stage.notes["keys"])
