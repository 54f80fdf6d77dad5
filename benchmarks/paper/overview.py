"""The overview of a folder of results: the five findings, and the state of every experiment."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from openhelix.benchmarks.evaluation.report import markdown_table
from openhelix.benchmarks.paper.catalogue import AXIS, FINDINGS
from openhelix.benchmarks.paper.judge import HOLDS, MISSING, NOT, WITHDRAWN, decide, finding_verdict
from openhelix.benchmarks.paper.leaderboard import TEXT as BOARD
from openhelix.benchmarks.paper.tables import Outcome, label, read, withdraw
from openhelix.runtime.core.files import replace_file

Planned = Mapping[str, Sequence[Mapping[str, Any]]]


def write_overview(folder: Path, planned: Planned) -> None:
    """Write the overview of all experiments that a folder holds.

    Args:
        folder: of results.
        planned: the claims of every experiment there is, as `judge.missing` returns them.
    """
    for name in planned:
        withdraw(folder, name)
    outcomes = [found for name in planned if (found := read(folder, name)) is not None]
    if not outcomes:
        return
    text = summary(outcomes, planned)
    if (folder / BOARD).is_file():
        text += f"\nAll systems, suite by suite: [leaderboard]({BOARD}), or sortable `leaderboard.html`.\n"
    replace_file(folder / "README.md", text.encode())
    text = json.dumps(findings(outcomes, planned), indent=1)
    replace_file(folder / "findings.json", text.encode() + b"\n")


def findings(outcomes: Sequence[Outcome], planned: Planned) -> list[dict[str, Any]]:
    """Return the five findings with what the experiments say of each.

    The verdicts are corrected over all claims of the paper's tables and figures, those that have
    not been run yet too; the axes of Appendix A.2 bear on no finding.
    """
    pages = {o["name"]: o for o in outcomes}
    claims = [
        {**_found(claim, pages.get(name)), "experiment": name}
        for name, stated in planned.items()
        if not name.startswith(AXIS)
        for claim in stated
    ]
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


def _found(claim: Mapping[str, Any], page: Outcome | None) -> Mapping[str, Any]:
    """Return a claim as a page has it; as planned where none does, or none that decides."""
    if page is None:
        return claim
    if page["state"].startswith(WITHDRAWN):
        return {**claim, "verdict": WITHDRAWN}
    if not page["scale"].get("decides", True):
        return claim
    names = ("a", "b", "says", "expect", "margin")
    same = (c for c in page["contrasts"] if all(c[n] == claim[n] for n in names))
    measured = next(same, None)
    return claim if measured is None else {**measured, "finding": claim["finding"]}


def summary(outcomes: Sequence[Outcome], planned: Planned) -> str:
    """Return the overview of all experiments as Markdown."""
    states = [
        [f"[{label(o['name'])}]({o['name']}.md)", o["title"], o["state"], o["scale"]["name"]]
        for o in outcomes
    ]
    rows = []
    for f in findings(outcomes, planned):
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
            "p is corrected over all claims of the tables and figures, those not run yet included (Holm).\n",
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
