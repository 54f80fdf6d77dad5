"""Reports of an experiment: Markdown with the paper's figures beside ours, JSON, a plot.

Rows not run are marked, incomplete ones state how much was run, and every score comes with its
number of trials, clock, step limit and interval.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from openhelix.benchmarks.evaluation.plots import (
    BOOTSTRAP,
    WILSON,
    Drawing,
    beside,
    lines,
    trials,
)
from openhelix.benchmarks.evaluation.report import interval, markdown_table, percent
from openhelix.benchmarks.evaluation.suites import CHAINS
from openhelix.benchmarks.evaluation.sweep import STEP_S
from openhelix.benchmarks.paper.judge import STATISTICS, WITHDRAWN, rules_out
from openhelix.runtime.core.files import replace_file

Outcome = Mapping[str, Any]
DISAGREES = "†"
WHY_WITHDRAWN = (
    "Withdrawn: measured or judged by older rules than today's (docs/experiments.md). The figures "
    "are kept as a record; no verdict rests on them."
)


def to_markdown(outcome: Outcome, pictures: Sequence[str] = ()) -> str:
    """Return an experiment as Markdown."""
    parts = [f"# {label(outcome['name'])}: {outcome['title']}\n", headline(outcome) + "\n"]
    parts += [f"![{name}]({name})\n" for name in pictures]
    for title, rows in by_suite(outcome).items():
        if len(by_suite(outcome)) > 1:
            parts.append(f"## {title}\n")
        parts.append(markdown_table(table(rows)))
        parts += [markdown_table(found) for found in [patterns_table(rows)] if found]
    if any(row["paper_disagrees"] for row in outcome["rows"]):
        parts.append(
            f"{DISAGREES} The paper's average length is not what its own rates add up to; "
            "comparisons use the sum of the rates.\n"
        )
    if outcome["contrasts"]:
        parts += ["## Does it hold here?\n", markdown_table(contrast_table(outcome))]
        parts.append(
            "Pairs are the same episodes, the unit is the start. p is that of what the verdict says "
            "(an exact permutation by start against no difference, or for *the same* two one-sided "
            "tests against the margin, which was stated beforehand), after Holm over this page's "
            "claims, those not run yet included; *shows* is the smallest true difference that so "
            "many starts find in four of five comparisons, before that correction; *paper* is the "
            "paper's difference, *outside* if not in our interval. Two arms differ in the axis "
            "alone. *Not testable*: a score is missing that the claim presupposes.\n"
        )
    for title, header, rows in outcome.get("tables", ()):
        parts += [f"## {title}\n", markdown_table((header, rows))]
    if outcome["notes"]:
        parts += ["## To know\n", "\n".join(f"- {note}" for note in outcome["notes"]) + "\n"]
    used = used_table(outcome)
    if used[1]:
        parts += ["## What was measured\n", markdown_table(used)]
    return "\n".join(parts)


def label(name: str) -> str:
    """Return "Table 2" for "table2", "Axis: latent" for "axis_latent"."""
    kind, _, rest = name.partition("_")
    if rest:
        return f"{kind.capitalize()}: {rest.replace('_', ' ')}"
    head = name.rstrip("0123456789")
    return f"{head.capitalize()} {name[len(head) :]}".strip()


def headline(outcome: Outcome) -> str:
    """Return in one paragraph what state an experiment is in."""
    scale = outcome["scale"]
    text = f"State: **{outcome['state']}**. Scale: {scale['name']} ({scale['says']})"
    text += f", seed {outcome['seed']}. Again: `{outcome['command']}`."
    if not scale["official"]:
        text += " A test of the plumbing: its figures mean nothing."
    return text


def by_suite(outcome: Outcome) -> dict[str, list[Outcome]]:
    """Return the rows by the benchmark that they are of."""
    found: dict[str, list[Outcome]] = {}
    for row in outcome["rows"]:
        found.setdefault(str(row["suite"]).upper(), []).append(row)
    return found


def table(rows: Sequence[Outcome]) -> tuple[list[str], list[list[str]]]:
    """Return rows of one suite as a table: ours, with interval and n, beside the paper's."""
    if rows[0]["suite"] not in CHAINS:
        header = ["", "ours: success %", "95 % interval", "n", "paper: success %"]
        return header, [
            [row["name"], *_rate(row), percent(_paper_rate(row)) or "-"] for row in rows
        ]
    header = ["", "ours: 1 to 5 in a row, %", "avg. length", "95 % interval", "n"]
    header += ["paper: 1 to 5 in a row, %", "avg. length"]
    return header, [[row["name"], *_chain(row), *_paper_chain(row)] for row in rows]


def _state(row: Outcome) -> str:
    if row["variant"] is None:
        return "-"
    if row.get("training_failed"):
        return f"training failed: {row['training_failed']}"
    done = row.get("n_so_far", 0)
    return f"not finished ({done} of {row['n_wanted']})" if done else "not run"


def _rate(row: Outcome) -> list[str]:
    score = row["score"]
    if score is None:
        return [_state(row), "", ""]
    return [percent(score["success_rate"]), interval(score["ci95"]), str(score["n_episodes"])]


def _chain(row: Outcome) -> list[str]:
    score = row["score"]
    if score is None:
        return [_state(row), "", "", ""]
    rates = " ".join(f"{100 * x:.0f}" for x in score["success_in_a_row"])
    limits = interval(score["ci95"], 1, 2)
    return [rates, f"{score['avg_len']:.2f}", limits, str(score["n_sequences"])]


def _paper_chain(row: Outcome) -> list[str]:
    paper = row["paper"]
    if paper is None or paper["in_a_row"] is None:
        return ["-", "-"]
    length = paper["avg_len"] if paper["avg_len"] is not None else row["paper_length"]
    mark = DISAGREES if row["paper_disagrees"] else ""
    return [" ".join(f"{x:g}" for x in paper["in_a_row"]), f"{length:.2f}{mark}"]


def _paper_rate(row: Outcome) -> float | None:
    patterns = (row["paper"] or {}).get("patterns")
    return sum(patterns.values()) / len(patterns) / 100 if patterns else None


def patterns_table(rows: Sequence[Outcome]) -> tuple[list[str], list[list[str]]] | None:
    """Return success by motion, ours beside the paper's, or None where nothing moves."""
    if rows[0]["suite"] != "calvin-d":
        return None
    ours = [row["score"].get("per_motion", {}) if row["score"] else {} for row in rows]
    theirs = [_paper_motions(row) for row in rows]
    groups = sorted({g for found in (*ours, *theirs) for g in found}, key=_by_motion)
    lines_: list[list[str]] = []
    for row, found, given in zip(rows, ours, theirs, strict=True):
        if row["score"] is not None:
            lines_.append([f"{row['name']}: ours", *(_cell(found.get(g)) for g in groups)])
        if given:
            cells = [f"{given[g]:g}" if g in given else "-" for g in groups]
            lines_.append([f"{row['name']}: paper", *cells])
    return (["by motion and speed, %", *groups], lines_) if lines_ else None


def _paper_motions(row: Outcome) -> dict[str, float]:
    """Return the paper's rates by motion, named as ours are: all moved at the paper's speed."""
    given = (row["paper"] or {}).get("patterns") or {}
    return {g if g == "static" else f"{g} paper": rate for g, rate in given.items()}


def _by_motion(group: str) -> tuple[bool, str]:
    return group != "static", group


def _cell(rate: Outcome | None) -> str:
    if rate is None or rate["success_rate"] is None:
        return "-"
    return f"{percent(rate['success_rate'])} (n {rate['n_episodes']})"


def contrast_table(outcome: Outcome) -> tuple[list[str], list[list[str]]]:
    """Return the verdicts as a table."""
    header = ["claim", "axis", "finding", "verdict", "difference", "95 % interval", "margin", "p"]
    header += ["shows", "starts", "pairs", "paper"]
    rows = []
    for c in outcome["contrasts"]:
        theirs = c["paper_difference"]
        cells = [""] * 7
        if c["n_pairs"]:
            cells = [f"{c['difference']:+.2f}", interval(c["ci95"], 1, 2)]
            margin = "" if c["margin"] is None else f"{c['margin']:g}"
            cells += [margin, "" if "p" not in c else f"{c['p']:.3g}"]
            cells += ["" if c["shows"] is None else f"{c['shows']:.2f}"]
            cells += [str(c["n_starts"]), str(c["n_pairs"])]
        paper = "" if theirs is None else f"{theirs:+.2f}{', outside' * rules_out(c)}"
        why = f" ({c['not_testable']})" if c["not_testable"] else ""
        finding = str(c["finding"] or "-")
        rows.append([c["says"], c["axis"], finding, c["verdict"] + why, *cells, paper])
    return header, rows


def used_table(outcome: Outcome) -> tuple[list[str], list[list[str]]]:
    """Return the conditions of each measured row."""
    header = ["row", "variant", "steps per task", "System 2 every", "clock", "trained"]
    header += ["weights", "held still", "evaluation"]
    rows = []
    for row in outcome["rows"]:
        if row["variant"] is None or row["score"] is None:
            continue
        score = row["score"]
        every = "1 step (each plan a fresh latent)"
        if row["interval"] > 1:
            every = f"{row['interval']} steps"
        took = row["training_s"]
        trained = "" if took is None else f"{took / 60:.0f} min (`{row['training']}`)"
        rows.append(
            [
                row["id"],
                row["says"],
                str(score["steps_limit"]),
                every,
                score["clock"],
                trained,
                weights(score),
                "" if score["hold_steps"] is None else f"{score['hold_steps']} steps",
                f"{score['cpu_s'] / 60:.1f} min of one core, {score['n_errors']} ended by an error",
            ]
        )
    return header, rows


def weights(score: Outcome) -> str:
    """Return by which hashes the weights of a score are known: the policy's, and the latents'."""
    latents = score["latents"]
    return f"`{score['policy_sha256']}`" + (f", latents `{latents}`" if latents else "")


def picture(outcome: Outcome) -> Drawing | None:
    """Return ours beside the paper's, or None where nothing has been run."""
    done = [row for row in outcome["rows"] if row["score"] is not None]
    if not done:
        return None
    if outcome["name"].startswith("figure") and len({r["interval"] for r in done}) > 1:
        points = [
            (r["interval"] * STEP_S, *(100 * v for v in (_score(r), *r["score"]["ci95"])))
            for r in done
        ]
        return lines(
            {"ours": points},
            "time from one latent to the next (s)",
            "success (%)",
            outcome["title"],
            _rests_on(done),
            [r["interval"] * STEP_S for r in done],
            100.0,
        )
    chains = [row for row in done if "avg_len" in row["score"]]
    rows = chains or done
    scale = 1.0 if chains else 100.0
    mixed = len({r["suite"] for r in rows}) > 1
    names = [r["name"] + (f" ({r['suite']})" if mixed else "") for r in rows]
    ours = [
        (scale * _score(r), scale * r["score"]["ci95"][0], scale * r["score"]["ci95"][1])
        for r in rows
    ]
    theirs = [r["paper_length"] if chains else _percent_of(r) for r in rows]
    label, top = ("tasks in a row", 5.0) if chains else ("success (%)", 100.0)
    return beside(names, ours, theirs, label, outcome["title"], _rests_on(rows), top)


def _rests_on(rows: Sequence[Outcome]) -> str:
    """Return what a plot rests on: trials and intervals."""
    scores = [row["score"] for row in rows]
    chains = all("avg_len" in score for score in scores)
    counts = [int(s.get("n_sequences") or s.get("n_episodes") or 0) for s in scores]
    what, bars = ("chains", BOOTSTRAP) if chains else ("episodes", WILSON)
    starts = {int(s["n_starts"]) for s in scores if "n_starts" in s}
    over = f", the unit is the start ({', '.join(map(str, sorted(starts)))})" if starts else ""
    return f"{trials(counts, what)}; bars: {bars}{over}"


def _percent_of(row: Outcome) -> float | None:
    rate = _paper_rate(row)
    return None if rate is None else 100 * rate


def _score(row: Outcome) -> float:
    score = row["score"]
    return float(score["avg_len"] if "avg_len" in score else score["success_rate"])


def write(outcome: Outcome, folder: Path, drawn: Mapping[str, bytes] | None = None) -> bool:
    """Write an experiment as JSON, Markdown and a plot, unless better is there.

    A folder of results that was made elsewhere, with more measured or at a scale that decides
    where this one does not, is left as it is.

    Args:
        outcome: what to write.
        folder: where to.
        drawn: pictures by file name; None draws the usual one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    before = read(folder, str(outcome["name"]))
    now, then = _worth(outcome), _worth(before)
    if now < then and (now <= NOTHING or not outdated(before)):
        return False
    if drawn is None:
        found = picture(outcome)
        drawn = {} if found is None else found.files(str(outcome["name"]))
    for name, data in drawn.items():
        replace_file(folder / name, data)
    _write_pages(outcome, folder, drawn)
    return True


def withdraw(folder: Path, name: str) -> None:
    """Mark what was measured by older rules, if a folder holds it: its claims have no verdict."""
    outcome = read(folder, name)
    if outcome is None or not outdated(outcome) or "withdrawn" in outcome["state"]:
        return
    none = {"verdict": WITHDRAWN, "not_testable": "", "n_pairs": 0, "axis": ""}
    said = ("a", "b", "says", "finding", "expect", "margin", "patterns", "paper_difference")
    claims = [{k: c[k] for k in said if k in c} | none for c in outcome["contrasts"]]
    scores = [{**row, "score": _since(row["score"])} for row in outcome["rows"]]
    marked = {
        **outcome,
        "state": f"withdrawn ({outcome['state']})",
        "rows": scores,
        "contrasts": claims,
        "notes": [WHY_WITHDRAWN, *outcome["notes"]],
    }
    _write_pages(marked, folder, sorted(p.name for p in folder.glob(f"{name}*.png")))


def outdated(outcome: Outcome | None) -> bool:
    """Whether an outcome rests on something measured by older rules than today's."""
    return (
        outcome is not None and outcome.get("statistics") != STATISTICS and _measured(outcome) > 0
    )


def _since(score: Outcome | None) -> Outcome | None:
    """Return a score with what older ones did not keep."""
    return None if score is None else {"hold_steps": None, **score}


def _write_pages(outcome: Outcome, folder: Path, drawn: Iterable[str]) -> None:
    shown = [name for name in drawn if name.endswith(".png")]  # the others are for papers
    replace_file(folder / f"{outcome['name']}.md", to_markdown(outcome, shown).encode())
    text = json.dumps(outcome, indent=1, default=str)
    replace_file(folder / f"{outcome['name']}.json", text.encode() + b"\n")


def read(folder: Path, name: str) -> Outcome | None:
    """Return an experiment that was written before, or None; damage counts as none."""
    try:
        return dict(json.loads((folder / f"{name}.json").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None


NOTHING = (False, 0)


def _worth(outcome: Outcome | None) -> tuple[bool, int]:
    """Return by what an outcome is better than another: whether it decides, what it rests on."""
    count = _measured(outcome)
    if outcome is None or count == 0:
        return False, count
    return bool(outcome["scale"].get("decides", True)), count


def _measured(outcome: Outcome | None) -> int:
    """Return how many episodes and probes an outcome rests on."""
    if outcome is None:
        return -1
    scores = [row["score"] for row in outcome["rows"] if row["score"] is not None]
    trials = sum(int(s.get("n_sequences") or s.get("n_episodes") or 0) for s in scores)
    return trials + sum(int(p["n_starts"]) for p in outcome.get("probes", {}).values())
