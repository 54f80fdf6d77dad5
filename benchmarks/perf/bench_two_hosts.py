"""One run across two hosts: age of the latents, offset of the clocks, deadlines.

Starts a cluster with `ray up deploy/cluster.yaml` on two hosts that are namespaces of this
machine (root, `deploy/install-debian.sh hosts`), then one `openhelix run` with the laptop's parts:
System 2 on one host, everything else on the other, TCP with CURVE between them. Both share
this machine's cores, so ages and lateness are upper bounds of what two machines do.

    python -m openhelix.benchmarks.perf.bench_two_hosts [--steps 600] [--out FILE] [section.field=value ...]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from openhelix.benchmarks.perf.places import results_file
from tests.integration.hosts import why_not
from tests.integration.two_hosts import AHEAD_S, two_hosts

FIGURES = (
    *("latent_age_s", "clock_offset_s", "control_hz", "ticks", "deadline_missed"),
    *("tick_lateness_s", "latents_received", "latents_missed", "s1_latency_s", "s2_latency_s"),
    *("safe_stops", "ready_s", "first_action_s", "realtime", "versions"),
)
OUT = results_file("two_hosts.json")


def main() -> int:
    """Write the figures; 1 where hosts cannot be made."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--steps", type=int, default=600, help="environment steps")
    arguments.add_argument("--out", type=Path, default=OUT)
    options, words = arguments.parse_known_args()
    reason = why_not()
    if reason:
        print(f"bench_two_hosts: {reason}", file=sys.stderr)
        return 1
    with two_hosts() as cluster:
        result: dict[str, Any] = {"ray_up_s": cluster.up(), "gpu_host_s": cluster.await_gpu()}
        run = cluster.start(
            *("output.video=false", f"tasks.steps_limit={options.steps}"),
            *("tasks.instruction=lift the red block", "system2.placement.threads=2", *words),
        )
        code = run.wait(420)
        if code not in (0, 3):
            print(run.output, file=sys.stderr)
            return code
        report = run.report()
    result |= {"clock_ahead_s": AHEAD_S} | {name: report.get(name) for name in FIGURES}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
