"""`make dashboards`: writes docs/metrics.md from the catalogue of runtime/observe/metrics.py.

Beside each metric it says where it is seen without asking: on which dashboards and in which
alerts, straight or through a recording rule.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import yaml

from openhelix.runtime.core.config import METRICS_PARTS, OutputConfig
from openhelix.runtime.observe.metrics import Entry, sections

DEPLOY = Path(__file__).resolve().parent
PAGE = DEPLOY.parent / "docs" / "metrics.md"
HEAD = """# Every metric

Written by `make dashboards` from `runtime/observe/metrics.py`; [operate.md](operate.md) says how to scrape
them and what the alerts mean. *Seen* names the dashboards and alerts that a metric feeds, straight or
through a recording rule; *by hand* is one that a person asks Prometheus for when something is wrong.

Base units throughout: seconds, bytes, hertz; a counter ends in `_total`, a distribution gives
`_bucket`, `_sum` and `_count`. A counter that is broken down has every value of its labels at 0
from the start wherever they are known, so that `rate` and `increase` see its first event. No label
ever carries an episode, a time or a sentence.
"""
TAIL = """
## What others count

Every part also serves `process_cpu_seconds_total`, `process_resident_memory_bytes` and the like of
its own process. System 2 on vLLM serves vLLM's `vllm:...` on its own endpoint, since vLLM's engine
is inside that process: `vllm:num_requests_running`, `vllm:num_requests_waiting`,
`vllm:prompt_tokens_total`, `vllm:request_queue_time_seconds` and more. Ray's `ray_...` come from
Ray's own agents on every host where its dashboard runs; Ray writes dashboards for them to
`/tmp/ray/session_latest/metrics/grafana/dashboards`.
"""


def page() -> str:
    """Return docs/metrics.md."""
    ports = ", ".join(f"{part} {OutputConfig().metrics_port_of(part)}" for part in METRICS_PARTS)
    seen = seen_where()
    blocks = [f"{HEAD}\nParts and their ports, as they are by default: {ports}.\n"]
    for section in sections():
        blocks.append(f"\n## {section.title}\n\nServed by: {section.served_by}.\n\n")
        blocks.append("| name | type | labels | what | seen |\n|---|---|---|---|---|\n")
        blocks += [_row(entry, seen[entry.name]) for entry in section.entries]
    return "".join([*blocks, TAIL])


def seen_where() -> dict[str, list[str]]:
    """Return the dashboards and alerts that each metric feeds, in Markdown; [] is none."""
    rules = {name: _rules(name) for name in ("recording", "alerts")}
    boards = {title: " ".join(asked) for title, asked in _boards().items()}
    alerts = {
        f"[{name.removeprefix('OpenHelix')}](operate.md#{name.lower()})": expr
        for name, expr in rules["alerts"].items()
    }
    found: dict[str, list[str]] = {}
    for section in sections():
        for entry in section.entries:
            names = {entry.name, *(f"{entry.name}_{end}" for end in ("bucket", "sum", "count"))}
            while more := {n for n, e in rules["recording"].items() if _uses(e, names)} - names:
                names |= more
            found[entry.name] = [n for n, e in {**boards, **alerts}.items() if _uses(e, names)]
    return found


def _uses(expression: str, names: set[str]) -> bool:
    return not names.isdisjoint(re.findall(r"[\w:]+", expression))


def _boards() -> dict[str, list[str]]:
    """Return the queries of every dashboard by its title."""
    found = {}
    for path in sorted((DEPLOY / "grafana" / "dashboards").glob("*.json")):
        board = json.loads(path.read_text())
        panels = [panel for panel in board["panels"] if panel["type"] != "row"]
        title = board["title"].removeprefix("OpenHelix").strip(" :/-")
        found[title] = [target["expr"] for panel in panels for target in panel["targets"]]
    return found


def _rules(name: str) -> Mapping[str, str]:
    """Return the expressions of a file of rules by what they record or raise."""
    text = (DEPLOY / "prometheus" / "rules" / f"{name}.yml").read_text()
    rules = [rule for group in yaml.safe_load(text)["groups"] for rule in group["rules"]]
    return {rule.get("record") or rule["alert"]: rule["expr"] for rule in rules}


def _row(entry: Entry, seen: list[str]) -> str:
    text = entry.help
    if entry.buckets:
        low, high = entry.buckets[0], entry.buckets[-1]
        text += f" Buckets from {low:g} to {high:g}, {len(entry.buckets)} of them."
    labels = ", ".join(f"`{label}`" for label in entry.labels)
    return (
        f"| `{entry.name}` | {entry.kind} | {labels} | {text} | {', '.join(seen) or 'by hand'} |\n"
    )


def main() -> None:
    """Write the page."""
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
