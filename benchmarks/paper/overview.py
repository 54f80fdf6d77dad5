"""The overview of a folder of results: the five findings, and the state of every experiment."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from openhelix.benchmarks.evaluation.report import markdown_table
from openhelix.benchmarks.paper.catalogue import FINDINGS
from openhelix.benchmarks.paper.judge import HOLDS, MISSING, NOT, decide, finding_verdict
from openhelix.benchmarks.paper.tables import Outcome, label, read, withdraw
from openhelix.runtime.core.files import replace_file


def write_overview(folder: Path, names: Sequence[str]) -> None:
    """Write the overview of all experiments that a folder holds."""
    for name in names:
        withdraw(folder, name)
    outcomes = [found for name in names if (found := read(folder, name)) is not None]
    if not outcomes:
        return
    replace_file(folder / "README.md", summary(outcomes).encode())
    text = json.dumps(findings(outcomes), indent=1)
    replace_file(folder / "findings.json", text.encode() + b"\n")


def findings(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Return the five findings with what the experiments say of each.

    The verdicts on their claims are corrected over all claims of all experiments.
    """
    claims = [{**c, "experiment": o["name"]} for o in outcomes for c in o["contrasts"]]
    decide(claims, "paper")
    found = []
    kept = ("experiment", "says", "verdict", "verdict_paper", "p_paper", "n_starts", "shows")
    for number, text in FINDINGS.items():
        of = [c for c in claims if c["finding"] == number]
        verdict, reason = finding_verdict(of) if of else (MISSING, "No comparison bears on it.")
        rows = [{name: c.get(name) for name in kept} for c in of]
        found.append(
            {"finding": number, "text": text, "verdict": verdict, "reason": reason, "claims": rows}
        )
    return found


def summary(outcomes: Sequence[Outcome]) -> str:
    """Return the overview of all experiments as Markdown."""
    states = [
        [f"[{label(o['name'])}]({o['name']}.md)", o["title"], o["state"], o["scale"]["name"]]
        for o in outcomes
    ]
    rows = []
    for f in findings(outcomes):
        counts = [sum(c["verdict_paper"] == v for c in f["claims"]) for v in (HOLDS, NOT)]
        rows.append([f"{f['finding']}. {f['text']}", f["verdict"], f["reason"], *map(str, counts)])
    header = ["finding", "verdict", "why", "claims that hold", "contradicted"]
    return "\n".join(
        [
            "# The paper's experiments, here\n",
            "Measured by `openhelix experiment NAME --scale SCALE`; each page has its command, its "
            "weights' hashes, trials and intervals.\n",
            *scales_used(outcomes),
            "## The five findings\n",
            "p is corrected over all claims of all pages (Holm).\n",
            markdown_table((header, rows)),
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
