"""The leaderboard: every system that has been scored, on every suite, in one sortable page.

It is made of the results of the experiments, as far as they are by today's rules, and of evaluations
of one's own (`openhelix eval`), which have the same format. The page needs nothing from elsewhere.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from openhelix.benchmarks.evaluation.report import interval, markdown_table, page, percent
from openhelix.benchmarks.evaluation.results import REPORT, read_run
from openhelix.benchmarks.evaluation.suites import CHAINS
from openhelix.benchmarks.paper.measures import score_of
from openhelix.benchmarks.paper.tables import Outcome, outdated
from openhelix.runtime.core.config import ConfigError
from openhelix.runtime.core.files import read_json, replace_file

PAGE, TEXT = "leaderboard.html", "leaderboard.md"
HEADER = (
    *("system", "suite", "score", "95 % interval", "starts", "trials", "clock", "steps a task"),
    *("System 2 every", "late", "held still", "ms a plan", "ms a latent", "latents a task"),
    *("weights", "from"),
)
WORDS = frozenset({0, 1, 3, 6, 14, 15})  # columns that are sorted as text
HOW = (
    "Scores of chains are tasks in a row, of 5; of all else, successes in percent. The unit is the "
    "start. Click a column to sort by it. Scores compare within a suite, on one clock, at one step "
    "limit. Steps held still count to the limit."
)
STYLE = """<style>
body { max-width: 96rem; } th { cursor: pointer; white-space: nowrap; }
th[aria-sort=ascending]::after { content: " ↑"; } th[aria-sort=descending]::after { content: " ↓"; }
table { display: block; overflow-x: auto; } td:nth-child(2) { text-align: left; }
label { margin-right: 1rem; }
</style>"""
SCRIPT = """
const table = document.querySelector("table"), body = table.tBodies[0];
const heads = [...table.tHead.rows[0].cells], suite = document.getElementById("suite");
function sort(column, down) {
  const value = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent;
  const number = heads[column].dataset.kind === "number";
  const rows = [...body.rows].sort((a, b) => {
    const [x, y] = [value(a), value(b)];
    if (!number) return x.localeCompare(y);
    if (x === "" || y === "") return (x === "") - (y === "") || 0;
    return Number(x) - Number(y);
  });
  if (down) rows.reverse();
  heads.forEach((head, i) => head.setAttribute("aria-sort",
    i !== column ? "none" : down ? "descending" : "ascending"));
  body.append(...rows);
}
heads.forEach((head, i) => head.addEventListener("click", () =>
  sort(i, head.getAttribute("aria-sort") === "ascending"
    || (head.getAttribute("aria-sort") === "none" && head.dataset.kind === "number"))));
suite.addEventListener("input", () => {
  for (const row of body.rows) row.hidden = !!suite.value && row.cells[1].textContent !== suite.value;
});
sort(2, true);
"""
Entry = Mapping[str, Any]


def entries(outcomes: Iterable[Outcome], own: Mapping[str, Path]) -> list[Entry]:
    """Return one entry for each evaluation: `system`, `source`, `name` of its weights, `score`.

    Args:
        outcomes: of experiments; what was measured by older rules is left out.
        own: folders of evaluations, by the name of their system.

    Raises:
        ConfigError: a folder holds no finished evaluation; one line.
    """
    found: dict[str, Entry] = {}
    for outcome in outcomes:
        if outdated(outcome):
            continue
        for row in outcome["rows"]:
            if row["score"] is not None:
                entry = {"system": row["name"], "source": outcome["name"], "score": row["score"]}
                found.setdefault(str(row["evaluation"]), entry)
    for name, folder in own.items():
        read_run(folder)  # refuses what is no evaluation, or one of another format
        report = folder / REPORT
        if not report.is_file():
            raise ConfigError(f"--systems: {name}: {folder} is not finished: no {REPORT}")
        score = score_of(read_json(report))
        found[f"{name} {folder}"] = {"system": name, "source": str(folder), "score": score}
    return sorted(found.values(), key=lambda e: (e["score"]["suite"], -_value(e["score"])))


def _value(score: Outcome) -> float:
    return float(score["avg_len"] if score["suite"] in CHAINS else 100 * score["success_rate"])


def cells(entry: Entry) -> list[str]:
    """Return an entry as the cells of a line."""
    score = entry["score"]
    chain = score["suite"] in CHAINS
    trials = score["n_sequences"] if chain else score["n_episodes"]
    limits = interval(score["ci95"], 1, 2) if chain else interval(score["ci95"])
    shown = f"{score['avg_len']:.2f}" if chain else percent(score["success_rate"])
    times = [_ms(score.get(name)) for name in ("s1_s_per_plan", "s2_s_per_latent")]
    work = score["latents_per_task"]
    return [
        *(entry["system"], score["suite"], shown, limits),
        *(str(score["n_starts"]), str(trials), score["clock"], str(score["steps_limit"])),
        *(str(score["interval"]), str(score["latency"]), str(score["hold_steps"]), *times),
        *("" if work is None else f"{work:.1f}", str(score["policy_sha256"]), entry["source"]),
    ]


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e3 * seconds:.0f}"


def to_html(found: Sequence[Entry]) -> str:
    """Return the page."""
    suites = list(dict.fromkeys(entry["score"]["suite"] for entry in found))
    options = "".join(f"<option>{html.escape(name)}</option>" for name in suites)
    heads = "".join(
        f'<th aria-sort="none" data-kind="{"text" if i in WORDS else "number"}">{html.escape(name)}</th>'
        for i, name in enumerate(HEADER)
    )
    lines = []
    for entry in found:
        line = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells(entry))
        lines.append(f"<tr>{line}</tr>")
    body = [
        STYLE,
        f'<p class="note">{html.escape(HOW)}</p>',
        f'<label>suite <select id="suite"><option value="">all</option>{options}</select></label>',
        f"<table><thead><tr>{heads}</tr></thead><tbody>{''.join(lines)}</tbody></table>",
        f"<script>{SCRIPT}</script>",
    ]
    return page("Leaderboard: systems, suites, clocks", body)


def to_markdown(found: Sequence[Entry]) -> str:
    """Return the same as Markdown, suite by suite."""
    parts = ["# Leaderboard\n", HOW.replace(" Click a column to sort by it.", "") + "\n"]
    for suite in dict.fromkeys(entry["score"]["suite"] for entry in found):
        rows = [cells(entry) for entry in found if entry["score"]["suite"] == suite]
        parts += [f"## {suite.upper()}\n", markdown_table((list(HEADER), rows))]
    return "\n".join(parts)


def write_leaderboard(
    folder: Path, outcomes: Iterable[Outcome], own: Mapping[str, Path]
) -> Path | None:
    """Write page and text into a folder of results; None where nothing has been scored."""
    found = entries(outcomes, own)
    if not found:
        return None
    replace_file(folder / TEXT, to_markdown(found).encode())
    replace_file(folder / PAGE, to_html(found).encode())
    return folder / PAGE


def named_folders(words: Sequence[str]) -> dict[str, Path]:
    """Read `NAME=FOLDER` words.

    Raises:
        ConfigError: one is not of that form, or a name comes twice.
    """
    found: dict[str, Path] = {}
    for word in words:
        name, mark, folder = word.partition("=")
        if not (name and mark and folder):
            raise ConfigError(f"--systems: {word!r} is not NAME=FOLDER, FOLDER of an evaluation")
        if name in found:
            raise ConfigError(f"--systems: {name!r} is named twice")
        found[name] = Path(folder).expanduser()
    return found
