"""How much of the project runs between an observation and an action, and for one latent.

A run is started as usual, without video, recording, metrics and status page. In each of its
processes every call of a function of the project is noted, once the process is in its stride:
in the control process from one `ControlLoop.tick` to a later one (not the first ones, which warm
up), in System 1's from one `act` to a later one, in System 2's from one `encode` to a later one,
all threads included. Counted are the files that the noted functions are in, and the lines of these
files; an environment within the checkout is not of the project. The simulator's
processes are left out, and its files.

- `observation_to_action`: the control process and System 1's.
- `latent`: System 2's process.
- `lockstep` (`--lockstep`; minutes, the simulator is watched too): all of it in one process.

    python -m openhelix.benchmarks.perf.path_length [--checkout DIR] [--module NAME] [--lockstep]

With `--checkout` it counts in another checkout, an older one too, whose command is the module.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from openhelix.runtime.core.paths import ROOT

SIMULATOR = ("benchmarks/",)
QUIET = (
    *("output.video=false", "output.record=false", "output.viewer=false", "output.status=false"),
    *("output.live=false", "output.metrics_port=null"),
)
# Not every safe stop of a busy machine is to end the run before it was in its stride, nor a first
# latent that takes its time: what is watched is slow.
PATIENT = (
    *(f"safety.{name}_max_age_s=60" for name in ("camera", "proprioception", "latent")),
    "control.hold_limit_s=3600",
)
MARKS = {  # process: the function that is called once a round, and from which round to which
    "control": ("ControlLoop.tick", 20, 60),
    "system1": ("DiffusionPolicy.act", 5, 7),
    "system2": ("EngineBase.encode", 3, 4),
}
# Goes into every process of the run as `sitecustomize`. Compiled code is noted at its first call;
# class bodies and modules, which run at an import, are none of ours (no CO_OPTIMIZED).
HOOK = """
import json, os, sys, threading

ROOT, OUT, MARKS = os.environ["PATH_ROOT"], os.environ["PATH_OUT"], json.loads(os.environ["PATH_MARKS"])
ELSEWHERE = tuple(os.path.realpath(folder) + "/" for folder in (sys.prefix, sys.base_prefix))
rounds, noted = {}, {}
names = {name: process for process, (name, _, _) in MARKS.items()}
known = {}

def noted_call(frame, event, argument):
    # A tracer that returns nothing is told of calls alone, not of lines.
    code = frame.f_code
    where = known.get(code)
    if where is None:
        path = code.co_filename
        path = os.path.realpath(path) if path.startswith("/") else ""  # "<string>", "<frozen abc>"
        # An environment (`.venv`) may lie within the checkout; what it holds is not of the project.
        ours = path.startswith(ROOT + "/") and not path.startswith(ELSEWHERE)
        inside = ours and "/site-packages/" not in path and code.co_flags & 1
        where = known[code] = path[len(ROOT) + 1:] if inside else ""
    if not where:
        return
    for files in noted.values():
        files.add(where)
    process = names.get(code.co_qualname)
    if process is None:
        return
    _, first, last = MARKS[process]
    rounds[process] = count = rounds.get(process, 0) + 1
    if count == first:
        noted[process] = {where}
    elif count == last:
        part = os.path.join(OUT, f"{process}.part")
        with open(part, "w") as stream:
            json.dump(sorted(noted.pop(process)), stream)
        os.replace(part, os.path.join(OUT, f"{process}-{os.getpid()}.json"))

# Not in the simulator, whose compiler takes minutes when it is watched.
if "benchmarks" not in " ".join(sys.orig_argv):
    threading.settrace(noted_call)
    sys.settrace(noted_call)
"""


def trace(root: Path, module: str, clock: str) -> dict[str, set[str]]:
    """Run for a while; return the files that each process used in its stride."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "sitecustomize.py").write_text(HOOK, encoding="utf-8")
        environment = os.environ | {
            "PYTHONPATH": f"{folder}{os.pathsep}{root}",
            "PATH_ROOT": str(root),
            "PATH_OUT": str(folder),
            "PATH_MARKS": json.dumps(MARKS),
        }
        command = [sys.executable, "-m", module, "run", "--no-ray", f"control.clock={clock}"]
        command += ["--config", str(root / "configs" / "run.yaml"), "system2.hz=5"]
        engine = "system2.engines.transformers:TransformersEngine"  # loads in a sixth of the time
        package = "openhelix." if module.startswith("openhelix.") else ""
        command += [f"system2.engine.target={package}{engine}"]
        command += ["tasks.steps_limit=360", f"output.folder={folder / 'outputs'}"]
        running = subprocess.Popen(
            [*command, *QUIET, *PATIENT], cwd=root, env=environment, stdout=sys.stderr
        )
        while running.poll() is None and len(list(folder.glob("*-*.json"))) < len(MARKS):
            time.sleep(0.5)
        running.send_signal(signal.SIGINT)  # every process has been seen
        running.wait()
        found: dict[str, set[str]] = {}
        for path in folder.glob("*-*.json"):
            part = path.name.partition("-")[0]
            found.setdefault(part, set()).update(json.loads(path.read_text()))
    missing = [process for process in MARKS if process not in found]
    if missing:
        raise SystemExit(f"{clock}: {', '.join(missing)} was never in its stride")
    return found


def count(root: Path, files: Iterable[str], listed: bool) -> dict[str, object]:
    """Return how many files these are, simulator left out, and how many lines they have."""
    kept = sorted(name for name in files if not name.startswith(SIMULATOR))
    lines = {name: len((root / name).read_text(encoding="utf-8").splitlines()) for name in kept}
    total: dict[str, object] = {"files": len(lines), "lines": sum(lines.values())}
    return total | ({"of": lines} if listed else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkout", type=Path, default=ROOT)
    parser.add_argument("--module", default="openhelix.runtime.cli.main", help="of the command")
    parser.add_argument("--files", action="store_true", help="list them with their lines")
    parser.add_argument("--lockstep", action="store_true", help="count a lockstep run too")
    options = parser.parse_args()
    root = options.checkout.resolve()
    wall = trace(root, options.module, "realtime")
    report = {
        "observation_to_action": count(root, wall["control"] | wall["system1"], options.files),
        "latent": count(root, wall["system2"], options.files),
    }
    if options.lockstep:
        step = trace(root, options.module, "lockstep")
        report["lockstep"] = count(root, set().union(*step.values()), options.files)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
