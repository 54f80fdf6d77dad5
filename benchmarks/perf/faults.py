"""The fault campaign: everything is broken in every way, and what the arm was told is counted.

    python -m openhelix.benchmarks.perf.faults [--quick] [--only WORDS] [--on plain,ray,hosts]
    python -m openhelix.benchmarks.perf.faults --soak 30 [--on ray]

Each fault is tried on a whole `openhelix run` with an arm that logs every call (`fault_arm.py`): with
plain processes, with Ray, and with System 2 on another host (namespaces of this machine: root,
`deploy/install-debian.sh hosts`). The arm goes round and round, so that each target that it should
not get any more is seen. The table says how long it took to be safe, how many targets were sent
until then and after the stop, what was lost and whether that was counted, and whether a process
was left. A soak runs without faults and fits a line through every process's memory and descriptors.

Leave the machine alone meanwhile; `--slack 4` forgives one that is busy.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from openhelix.benchmarks.perf.fault_arm import Told, moving, read_log
from openhelix.benchmarks.perf.fault_peers import Line, Peer
from openhelix.benchmarks.perf.fault_system import (
    GONE_S,
    Broken,
    System,
    await_port,
    ended,
    free_ports,
    serve,
    small_disk,
)
from openhelix.benchmarks.perf.fault_table import ENDINGS, Fault, Stage, faults
from openhelix.benchmarks.perf.places import results_file
from openhelix.runtime.transport.sockets import generate
from tests.integration.hosts import Lab, lab, why_not

PAUSE_NS = 300_000_000  # without a target that moves: the arm stands
IN_FLIGHT = 2  # latents that a run which ends may leave on the way

# Trying one --------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What became of the arm."""

    fault: str
    kind: str
    on: str
    expected: str
    allowed_s: float = 0.0  # to be safe, or between two targets where it goes on
    ok: bool = False
    why: str = ""  # it is not
    safe_s: float | None = None  # from the fault to the last target that moved, or to `stop`
    targets_after: int = 0  # until then
    after_stop: int = 0  # and after it
    stop: str = ""  # its reason
    back_s: float | None = None  # from healed to moving
    lost: int | None = None  # latents that never arrived, as the run counted
    uncounted: int | None = None  # and those that are in no count
    counted: str = ""
    left: list[str] = field(default_factory=list)
    code: int | None = None
    report: bool = False


@contextmanager
def staged(fault: Fault, on: str, folder: Path, made: Lab | None) -> Iterator[Stage]:
    """A running system with what its fault needs; ends all of it."""
    words = [word for word in fault.words if word != "disk"]
    with ExitStack() as stack:
        host = None
        stage_lab = None
        notes: dict[str, Any] = {}
        peer: Peer | None = None
        between: Line | None = None
        server: subprocess.Popen[bytes] | None = None
        if fault.needs or on == "hosts":
            keys = folder / "keys"
            for name in ("server", "robot0"):
                generate(keys, name)
        if on == "hosts":
            assert made is not None
            stage_lab, host = made, made.hosts["robot"]
            address = f"tcp://{made.hosts['gpu'].address}:5720"
            notes |= {"address": address, "keys": keys}
            server = serve(made.hosts["gpu"], address, keys)
            folder = host.base / folder.name
            shutil.copytree(keys, folder / "keys")
            words += [f"system2.connect={address}", f"transport.keys=/srv/{folder.name}/keys"]
        elif fault.needs:
            near = free_ports(6)
            address = f"tcp://127.0.0.1:{near}"
            words += [f"system2.connect={address}", f"transport.keys={keys}"]
            if fault.needs == "peer":
                peer = Peer(address, keys)
                stack.callback(peer.close)
            else:
                server = serve(None, f"tcp://127.0.0.1:{near + 3}", keys)
                await_port(near + 5)
                between = Line({near + i: near + 3 + i for i in range(3)})
                stack.callback(between.close)
        if "disk" in fault.words:
            stack.enter_context(small_disk(folder / "out"))
        system = System(folder, on == "ray", words, host, fault.output)
        stack.callback(system.close)
        stage = Stage(system, peer, between, server, stage_lab, notes)
        stack.callback(lambda: ended(stage.served))
        system.start()
        yield stage


def attempt(fault: Fault, on: str, folder: Path, slack: float, made: Lab | None) -> Outcome:
    """Try one fault."""
    outcome = Outcome(fault.name, fault.kind, on, fault.expect, fault.within_s)
    try:
        with staged(fault, on, folder, made) as stage:
            _attempt(fault, stage, slack, outcome)
    except (Broken, RuntimeError, AssertionError, OSError, subprocess.SubprocessError) as error:
        outcome.why = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return outcome


def _attempt(fault: Fault, stage: Stage, slack: float, outcome: Outcome) -> None:
    system = stage.system
    before = system.counters() if fault.counter else {}
    t0_ns = time.monotonic_ns()
    fault.act(stage)
    quiet_s = time.monotonic() + fault.look_s * min(slack, 2.0)
    assert system.process is not None
    while time.monotonic() < quiet_s and system.process.poll() is None:
        time.sleep(0.02)
    healed_ns = time.monotonic_ns()
    if fault.heal is not None:
        fault.heal(stage)
    if fault.expect in ("resumes", "survives"):
        with suppress(Broken):
            outcome.back_s = system.until(
                "going on", lambda: bool(since(moving(read_log(system.log)), healed_ns)), 60 * slack
            )
    looked_ns = time.monotonic_ns()
    time.sleep(fault.drain_s)
    after = system.counters() if fault.counter else {}
    outcome.code = system.end()
    outcome.left = system.left(GONE_S * slack)
    rows = read_log(system.log)
    report = system.report()
    outcome.report = report is not None
    _count(outcome, report)
    grown = [
        (name, after[name] - before.get(name, 0.0))
        for name in after
        if fault.counter and re.fullmatch(f"openhelix_{_pattern(fault.counter)}.*", name)
    ]
    total = sum(more for _, more in grown)
    if not total and report is not None:  # a run that has stopped for good is asked no more
        total = float(report.get(fault.counter.removesuffix("_total"), 0.0))
    outcome.counted = f"{total:.0f}" if fault.counter else ""
    back = fault.expect in ("resumes", "survives")
    end_ns = healed_ns if fault.heal is not None or back else looked_ns
    _judge(fault, outcome, since(rows, t0_ns), t0_ns, end_ns, looked_ns, slack)
    if fault.counter and total <= 0:
        outcome.why = outcome.why or f"{fault.counter} has not grown"
    if stage.notes.get("accepted"):
        outcome.why = f"{stage.notes['accepted']} wrong tokens were accepted"
    outcome.ok = not outcome.why


def _pattern(counter: str) -> str:
    return counter.replace("{", r"\{").replace("}", r"\}")


def since(rows: Sequence[Told], t_ns: int) -> list[Told]:
    """Return what was told from a time on."""
    return [row for row in rows if row.t_ns >= t_ns]


def _count(outcome: Outcome, report: Mapping[str, Any] | None) -> None:
    if report is None or report.get("latents_published") is None:
        return
    names = ("received", "void", "mismatched", "missed", "overtaken")
    known = sum(int(report[f"latents_{name}"]) for name in names)
    known += sum(sum(report[f"latents_{name}"].values()) for name in ("mistimed", "dropped"))
    outcome.lost = int(report["latents_missed"])
    if outcome.fault.startswith("System 2") or outcome.kind == "wrong latents":
        return  # its own count began anew, or it lies
    outcome.uncounted = max(0, int(report["latents_published"]) - known - IN_FLIGHT)


def _judge(
    fault: Fault,
    outcome: Outcome,
    rows: Sequence[Told],
    t0_ns: int,
    end_ns: int,
    looked_ns: int,
    slack: float,
) -> None:
    """Compare what the arm was told after the fault with what had to become of it."""
    targets = [row for row in rows if row.kind == "target"]
    moves = moving(list(rows))
    stops = [row for row in rows if row.kind == "stop"]
    limit_s, complaints = fault.within_s * slack, []
    back = fault.expect in ("resumes", "survives")
    if fault.expect == "goes on":
        times = [t0_ns, *(row.t_ns for row in moves if row.t_ns < looked_ns), looked_ns]
        gap_s = float(np.diff(times).max()) * 1e-9
        outcome.safe_s = None
        if gap_s > limit_s:
            complaints.append(f"{gap_s:.2f} s without a target that moves")
        if stops and stops[0].t_ns < looked_ns:
            complaints.append(f"stopped: {stops[0].text}")
    else:
        stop_ns = stops[0].t_ns if stops else None
        stood = stop_ns is not None and stop_ns <= end_ns
        if stop_ns is not None and stood:
            safe_ns = stop_ns
        elif fault.expect == "ends":
            safe_ns = targets[-1].t_ns if targets else t0_ns
        else:
            safe_ns = _pause([t0_ns, *(row.t_ns for row in moves if row.t_ns < end_ns), end_ns])
            stood = safe_ns < end_ns
        outcome.safe_s = max(0.0, (safe_ns - t0_ns) * 1e-9)
        outcome.targets_after = sum(row.t_ns <= safe_ns for row in targets)
        until_ns = end_ns if back else looked_ns + 10**12
        if stop_ns is not None and stop_ns <= end_ns:
            if fault.heal is not None or not back:  # else it may go on when it can
                outcome.after_stop = sum(stop_ns < row.t_ns < until_ns for row in targets)
            outcome.stop = stops[0].text
        if fault.expect == "survives" and not stood:
            outcome.safe_s, outcome.targets_after = None, 0  # it has gone on all the while
        elif outcome.safe_s > limit_s:
            complaints.append(f"safe after {outcome.safe_s:.2f} s, not {limit_s:.2f}")
        if outcome.after_stop:
            complaints.append(f"{outcome.after_stop} targets after the stop")
        if fault.calls_stop and fault.expect in ("ends", "stops") and not stops:
            complaints.append("stop was not called")
        if back and outcome.back_s is None:
            complaints.append("did not resume")
    if outcome.left:
        complaints.append(f"left: {outcome.left}")
    if outcome.uncounted:
        complaints.append(f"{outcome.uncounted} latents lost and not counted")
    if fault.report is not None and outcome.report != fault.report:
        complaints.append("no report" if fault.report else "a report")
    outcome.why = "; ".join(complaints)


def _pause(times_ns: Sequence[int]) -> int:
    """Return when it began not to move for a while; the last time where it never did."""
    for before, after in itertools.pairwise(times_ns):
        if after - before > PAUSE_NS:
            return before
    return times_ns[-1]


# The campaign ------------------------------------------------------------------------------------


@contextmanager
def two_machines(folder: Path) -> Iterator[Lab]:
    """A robot's host and System 2's, whose clock is an hour ahead."""
    with lab(folder) as made:
        made.add("robot", 10)
        made.add("gpu", 20, ahead_s=3600)
        yield made


def campaign(
    chosen: Sequence[tuple[Fault, str]], slack: float, tell: Callable[[Outcome], None]
) -> list[Outcome]:
    """Try faults one after the other."""
    outcomes = []
    with ExitStack() as stack:
        base = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="openhelix-faults-")))
        made = None
        for number, (fault, on) in enumerate(chosen):
            if on == "hosts" and made is None:
                made = stack.enter_context(two_machines(base / "lab"))
            outcome = attempt(fault, on, base / f"{number:03d}", slack, made)
            tell(outcome)
            outcomes.append(outcome)
    return outcomes


def table(outcomes: Sequence[Outcome], slack: float) -> str:
    """Return the outcomes as Markdown."""
    failed = [o for o in outcomes if not o.ok]
    timed = [o for o in outcomes if o.safe_s is not None]
    ends = [o.safe_s or 0.0 for o in timed if o.kind == ENDINGS]
    others = [(o.safe_s or 0.0) / o.allowed_s for o in timed if o.kind != ENDINGS and o.allowed_s]
    counts = (
        f"{len(outcomes)} faults, {len(failed)} not as they should be. Worst time from the end of "
        f"the command to the halt: {max(ends, default=0.0) * 1e3:.0f} ms of 200. Worst of the others: "
        f"{max(others, default=0.0):.0%} of the time that its source allows. Targets after a stop: "
        f"{sum(o.after_stop for o in outcomes)}. Latents lost and not counted: "
        f"{sum(o.uncounted or 0 for o in outcomes)}. Processes left: "
        f"{sum(len(o.left) for o in outcomes)}."
    )
    lines = [
        "# Fault campaign",
        "",
        "Written by `make faults`; `benchmarks/perf/faults.py` says how. *Safe after*: seconds from the",
        "fault to the stop, or to the last target that moved the arm, of those that are allowed. *Targets*:",
        "sent until then / after the stop. *Lost*: latents that never arrived / that are in no count.",
        "*Counted*: wrong messages.",
        *(
            ["", f"Times allowed were multiplied by {slack:g}: a busy machine."]
            if slack != 1
            else []
        ),
        "",
        counts,
        "",
        *by_kind(outcomes),
        "",
        "| | fault | on | expected | safe after | targets | reason | back after | lost | counted | |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    kind = ""
    for o in outcomes:
        lost = "" if o.lost is None else f"{o.lost} / {'?' if o.uncounted is None else o.uncounted}"
        lines.append(
            f"| {o.kind if o.kind != kind else ''} | {o.fault} | {o.on} | {o.expected} "
            f"| {_of(o.safe_s, o.allowed_s)} | {o.targets_after} / {o.after_stop} | {o.stop} "
            f"| {_number(o.back_s)} | {lost} | {o.counted} | {'' if o.ok else '**' + o.why + '**'} |"
        )
        kind = o.kind
    return "\n".join(lines) + "\n"


def by_kind(outcomes: Sequence[Outcome]) -> list[str]:
    """Return a short table with a row for each kind of fault, as lines of Markdown."""
    lines = [
        "| what breaks | tried | as expected | slowest to be safe, of the time allowed | "
        "targets after a stop | lost and not counted | processes left |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind in dict.fromkeys(o.kind for o in outcomes):
        rows = [o for o in outcomes if o.kind == kind]
        timed = [o for o in rows if o.safe_s is not None and o.allowed_s]
        slowest = max(timed, key=lambda o: (o.safe_s or 0.0) / o.allowed_s, default=None)
        told = "" if slowest is None else f"{slowest.safe_s:.2f} s of {slowest.allowed_s:.2f} s"
        lines.append(
            f"| {kind} | {len(rows)} | {sum(o.ok for o in rows)} | {told} "
            f"| {sum(o.after_stop for o in rows)} | {sum(o.uncounted or 0 for o in rows)} "
            f"| {sum(len(o.left) for o in rows)} |"
        )
    return lines


def _of(value: float | None, allowed: float) -> str:
    return "" if value is None else f"{value:.2f} of {allowed:.2f}"


def joined(before: Sequence[Outcome], now: Sequence[Outcome]) -> list[Outcome]:
    """Return the rows of both, each once: what was tried again counts. In the table's order."""
    rows = {(o.kind, o.fault, o.on): o for o in (*before, *now)}
    order = [(fault.kind, fault.name, on) for fault in faults() for on in fault.on]
    return [rows[key] for key in order if key in rows]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


# The soak ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Slope:
    """A line through what a process took."""

    process: str
    what: str  # "MB" or "descriptors"
    at_start: float  # mean of the first of `BLOCKS` parts
    per_hour: float
    error: float  # of the slope, at 95 %
    at_end: float

    @property
    def flat(self) -> bool:
        """Whether the slope is within its noise, or within a megabyte or a descriptor an hour."""
        return self.per_hour - self.error <= 1.0


def soak(
    minutes: float, ray: bool, words: Sequence[str] = ()
) -> tuple[list[Slope], dict[str, list[tuple[float, float]]]]:
    """Run without faults and fit a line through the memory and descriptors of every process.

    Returns:
        The lines, and about sixty of the samples (seconds, value) behind each.
    """
    seen: dict[tuple[str, str], list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory(prefix="openhelix-soak-") as folder:
        system = System(Path(folder), ray, [*words, "output.record=true"])
        try:
            system.start()
            start_s = time.monotonic()
            while (t_s := time.monotonic() - start_s) < minutes * 60:
                for number, line in system.processes().items():
                    with suppress(psutil.Error):
                        process = psutil.Process(number)
                        name = f"{_title(line)} ({number})"
                        memory = process.memory_full_info().uss / 1e6
                        seen.setdefault((name, "MB"), []).append((t_s, memory))
                        seen.setdefault((name, "descriptors"), []).append((t_s, process.num_fds()))
                time.sleep(max(1.0, minutes / 5))
            system.end()
        finally:
            system.close()
    fits = [fitted(name, what, rows, minutes) for (name, what), rows in sorted(seen.items())]
    slopes = [slope for slope in fits if slope is not None]
    samples = {
        f"{name}, {what}": [
            (round(t_s, 1), round(value, 2)) for t_s, value in rows[:: len(rows) // 60 + 1]
        ]
        for (name, what), rows in sorted(seen.items())
    }
    return slopes, samples


BLOCKS = 8  # what a process takes at one moment depends on the moment before: means of so many
STUDENT = 2.45  # 95 % of such a fit's errors are within so many standard errors, of 6 degrees


def fitted(
    name: str, what: str, rows: Sequence[tuple[float, float]], minutes: float
) -> Slope | None:
    """Fit a line through samples (seconds, value), once it is warm; None where there are too few."""
    kept = np.array([row for row in rows if row[0] > minutes * 12])  # warm after a fifth
    if len(kept) < 2 * BLOCKS:
        return None
    means = np.array([block.mean(axis=0) for block in np.array_split(kept, BLOCKS)])
    (slope, _), covariance = np.polyfit(means[:, 0], means[:, 1], 1, cov=True)
    error = STUDENT * float(np.sqrt(max(0.0, covariance[0, 0])))
    return Slope(
        *(name, what, float(means[0, 1]), float(slope) * 3600, error * 3600, float(means[-1, 1]))
    )


def _title(line: str) -> str:
    node = re.search(r'"name": "(\w+)"', line[:400])
    if node is not None:
        return node.group(1)
    return "command" if "openhelix run" in line else Path(line.split()[0]).name[:24]


def slopes_table(slopes: Sequence[Slope], minutes: float) -> str:
    """Return the soak as Markdown."""
    lines = [
        "# Soak",
        "",
        f'`make faults ARGS="--soak {minutes:g}"`: {minutes:g} minutes at 30 Hz, recording; a line fitted',
        "through each process's own memory and descriptors after the first fifth.",
        "",
        "| process | what | at first | at last | per hour | ± | |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {s.process} | {s.what} | {s.at_start:.1f} | {s.at_end:.1f} | {s.per_hour:+.2f} "
        f"| {s.error:.2f} | {'' if s.flat else '**grows**'} |"
        for s in slopes
    ]
    return "\n".join(lines) + "\n"


# The command -------------------------------------------------------------------------------------


def choose(
    quick: bool, only: Sequence[str], hostings: Sequence[str]
) -> tuple[list[tuple[Fault, str]], list[str]]:
    """Return what to try, and what is left out and why."""
    chosen, left_out = [], []
    reason = why_not() if "hosts" in hostings else ""
    for fault in faults():
        for on in fault.on:
            if on not in hostings or (quick and not (fault.quick and on == "plain")):
                continue
            words = f"{fault.kind}: {fault.name}, {on}"
            if only and not any(word in words for word in only):
                continue
            if on == "hosts" and reason:
                left_out.append(f"{words}: {reason}")
            elif "disk" in fault.words and os.geteuid() != 0:
                left_out.append(f"{words}: needs root, for a small disk")
            else:
                chosen.append((fault, on))
    # Each kind of host once: the namespaces stay, Ray's files are warm.
    order = ("plain", "ray", "hosts")
    chosen.sort(key=lambda pair: order.index(pair[1]))
    return chosen, left_out


def main() -> int:
    """Write the table; 1 where something was not as it should be."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="the few that the tests try too")
    parser.add_argument(
        "--only", nargs="+", default=[], help="those with one of these in their row"
    )
    parser.add_argument("--on", default="plain,ray,hosts", help="how it is hosted")
    parser.add_argument("--slack", type=float, default=1.0, help="multiplies the times allowed")
    parser.add_argument("--list", action="store_true", help="only say what would be tried")
    parser.add_argument("--soak", type=float, metavar="MINUTES", help="no faults, but slopes")
    parser.add_argument(
        "--keep", action="store_true", help="keep what was tried before and is not tried now"
    )
    parser.add_argument("--out", type=Path, help="folder for faults.md and .json")
    options = parser.parse_args()
    folder = options.out or results_file("faults.json").parent
    folder.mkdir(parents=True, exist_ok=True)
    hostings = options.on.split(",")
    if options.soak:
        slopes, samples = soak(options.soak, "ray" in hostings and "plain" not in hostings)
        text = slopes_table(slopes, options.soak)
        lines = [asdict(slope) for slope in slopes]
        _write(
            folder / "soak", text, {"minutes": options.soak, "slopes": lines, "samples": samples}
        )
        print(text)
        return int(not all(slope.flat for slope in slopes))
    chosen, left_out = choose(options.quick, options.only, hostings)
    for words in left_out:
        print(f"left out: {words}", file=sys.stderr)
    if options.list:
        print("\n".join(f"{fault.kind}: {fault.name}, {on}" for fault, on in chosen))
        return 0

    before: list[Outcome] = []
    if options.keep and (folder / "faults.json").is_file():
        rows = json.loads((folder / "faults.json").read_text())["faults"]
        before = [Outcome(**row) for row in rows]
    tried: list[Outcome] = []

    def write() -> str:
        """Write all that is known; after every row, because half an hour is long."""
        outcomes = joined(before, tried)
        text = table(outcomes, options.slack)
        data = {
            "slack": options.slack,
            "left_out": left_out,
            "faults": [asdict(o) for o in outcomes],
        }
        _write(folder / "faults", text, data)
        return text

    def tell(o: Outcome) -> None:
        tried.append(o)
        write()
        print(
            f"{'ok  ' if o.ok else 'BAD '} {o.on:<5} {o.kind}: {o.fault}: {o.expected}, safe after "
            f"{_number(o.safe_s) or '-'} s, {o.targets_after}/{o.after_stop} targets {o.why}",
            file=sys.stderr,
            flush=True,
        )

    campaign(chosen, options.slack, tell)
    print(write())
    return int(not all(outcome.ok for outcome in tried))


def _write(path: Path, text: str, data: Mapping[str, Any]) -> None:
    path.with_suffix(".md").write_text(text)
    path.with_suffix(".json").write_text(json.dumps(data, indent=2) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
