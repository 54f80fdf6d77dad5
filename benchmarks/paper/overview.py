"""The overview of a folder of results: the five findings, and the state of every experiment."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from openhelix.benchmarks.evaluation.report import markdown_table
from openhelix.benchmarks.paper.catalogue import FINDINGS
from openhelix.benchmarks.paper.judge import HOLDS, NOT, finding_verdict
from openhelix.benchmarks.paper.tables import Outcome, label, read
from openhelix.runtime.core.files import replace_file


def write_overview(folder: Path, names: Sequence[str]) -> None:
    """Write the overview of all experiments that a folder holds."""
    outcomes = [found for name in names if (found := read(folder, name)) is not None]
    if not outcomes:
        return
    replace_file(folder / "README.md", summary(outcomes).encode())
    text = json.dumps(findings(outcomes), indent=1)
    replace_file(folder / "findings.json", text.encode() + b"\n")


def findings(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Return the five findings with what the experiments say of each."""
    found = []
    for number, text in FINDINGS.items():
        rows = [
            {"experiment": o["name"], "says": c["says"], "verdict": c["verdict"]}
            for o in outcomes
            for c in o["contrasts"]
            if c["finding"] == number
        ]
        verdict = finding_verdict([r["verdict"] for r in rows])
        found.append({"finding": number, "text": text, "verdict": verdict, "claims": rows})
    return found


def summary(outcomes: Sequence[Outcome]) -> str:
    """Return the overview of all experiments as Markdown."""
    states = [
        [f"[{label(o['name'])}]({o['name']}.md)", o["title"], o["state"], o["scale"]["name"]]
        for o in outcomes
    ]
    rows = []
    for f in findings(outcomes):
        counts = [sum(c["verdict"] == v for c in f["claims"]) for v in (HOLDS, NOT)]
        rows.append([f"{f['finding']}. {f['text']}", f["verdict"], *map(str, counts)])
    return "\n".join(
        [
            "# The paper's experiments, here\n",
            "Measured by `openhelix experiment NAME --scale SCALE`; each page has its command, its "
            "weights' hashes, trials and intervals.\n",
            *scales_used(outcomes),
            "## The five findings\n",
            markdown_table((["finding", "verdict", "claims that hold", "contradicted"], rows)),
            "## Tables and figures\n",
            markdown_table((["", "about", "state", "scale"], states)),
        ]
    )


def scales_used(outcomes: Sequence[Outcome]) -> list[str]:
    """Return what the scales are that something was measured at, and what to know of them."""
    used = {o["scale"]["name"]: o["scale"] for o in outcomes if o["state"] != "not run"}
    found = []
    for name, scale in used.items():
        text = f"- *{name}*: {scale['says']}."
        if not scale["official"]:
            text += " A test of the plumbing: its figures mean nothing."
        found.append(" ".join([text, *scale["notes"]]))
    return ["\n".join(found) + "\n"] if found else []
