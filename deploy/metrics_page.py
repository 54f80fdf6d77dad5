"""`make dashboards`: writes docs/metrics.md from the catalogue of runtime/metrics.py."""

from __future__ import annotations

from pathlib import Path

from runtime.config import METRICS_PARTS, OutputConfig
from runtime.metrics import Entry, sections

PAGE = Path(__file__).resolve().parents[1] / "docs" / "metrics.md"
HEAD = """# Every metric

Written by `make dashboards` from `runtime/metrics.py`; [operate.md](operate.md) says how to scrape
them and what the alerts mean.

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
    blocks = [f"{HEAD}\nParts and their ports, as they are by default: {ports}.\n"]
    for section in sections():
        blocks.append(f"\n## {section.title}\n\nServed by: {section.served_by}.\n\n")
        blocks.append("| name | type | labels | what |\n|---|---|---|---|\n")
        blocks += [_row(entry) for entry in section.entries]
    return "".join([*blocks, TAIL])


def _row(entry: Entry) -> str:
    text = entry.help
    if entry.buckets:
        low, high = entry.buckets[0], entry.buckets[-1]
        text += f" Buckets from {low:g} to {high:g}, {len(entry.buckets)} of them."
    labels = ", ".join(f"`{label}`" for label in entry.labels)
    return f"| `{entry.name}` | {entry.kind} | {labels} | {text} |\n"


def main() -> None:
    """Write the page."""
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
