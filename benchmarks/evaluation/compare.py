"""`openhelix compare A B`: is B better than A, on the same episodes?

    openhelix compare outputs/eval/tasks-D-0001 outputs/eval/tasks-D-0002
    openhelix compare outputs/eval/tasks-D-0001 outputs/eval/tasks-D-0002 --out outputs/compared

Episodes are paired by their key, so both runs faced the same starts, instructions and noise. All
other differences between the runs are listed, because a result can be attributed to a cause only
if nothing else differs.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console as RichConsole
from rich.markdown import Markdown

from openhelix.benchmarks.calvin.sequences import LENGTH
from openhelix.benchmarks.calvin.tasks import TASK_NAMES
from openhelix.benchmarks.evaluation import plots
from openhelix.benchmarks.evaluation.report import (
    html_table,
    image,
    interval,
    markdown_table,
    page,
)
from openhelix.benchmarks.evaluation.results import read_results, read_run, start_of
from openhelix.benchmarks.evaluation.stats import paired_by_start
from openhelix.benchmarks.evaluation.suites import CHAINS
from openhelix.runtime.cli.arguments import Options, Positional, option, parse
from openhelix.runtime.core.config import ConfigError
from openhelix.runtime.core.files import replace_file
from openhelix.runtime.core.output import answer

MUST_AGREE = ("name", "seed")  # else equal keys are not equal episodes
Result = Mapping[str, Any]


def compare(first: Path, second: Path) -> dict[str, Any]:
    """Compare two evaluations by folder.

    Raises:
        ValueError: one of them is no evaluation or is damaged, or they share no episodes.
    """
    a, b = (read_run(folder)["identity"] for folder in (first, second))
    for name in MUST_AGREE:
        if a.get(name) != b.get(name):
            what = "suite" if name == "name" else name
            raise ConfigError(f"{what} is {a.get(name)!r} in A, {b.get(name)!r} in B")
    pairs = paired(read_results(first), read_results(second))
    if not pairs:
        raise ConfigError(f"{first} and {second} have no episode in common")
    found: dict[str, Any] = {
        "a": str(first),
        "b": str(second),
        "suite": a["name"],
        "seed": a["seed"],
        "clock": [a["clock"], b["clock"]],
        "steps_limit": [a["steps_limit"], b["steps_limit"]],
        "n_pairs": len(pairs),
        "differs": {
            key: [a.get(key), b.get(key)]
            for key in sorted(set(a) | set(b))
            if a.get(key) != b.get(key)
        },
    }
    if a["name"] in CHAINS:
        found["avg_len"] = _means(pairs, lambda r: r["in_a_row"])
        found["success_in_a_row"] = [_successes(pairs, _reached(k)) for k in range(LENGTH)]
    else:
        found["success_rate"] = _successes(pairs, lambda r: r["success"])
    return found | {"per_task": per_task(pairs)}


def paired(first: Sequence[Result], second: Sequence[Result]) -> list[tuple[Result, Result]]:
    """Return the episodes that both have, in A's order."""
    there = {r["key"]: r for r in second}
    return [(r, there[r["key"]]) for r in first if r["key"] in there]


def per_task(pairs: Sequence[tuple[Result, Result]]) -> dict[str, Any]:
    """Compare tasks that both attempted in the same episode."""
    rows: dict[str, list[tuple[bool, bool, str]]] = {}
    for a, b in pairs:
        for mine, other in zip(a["tasks"], b["tasks"], strict=False):
            row = mine["success"], other["success"], start_of(a)
            rows.setdefault(mine["task"], []).append(row)
    return {name: _both(rows[name], 1.0) for name in TASK_NAMES if name in rows}


def _reached(k: int) -> Callable[[Result], bool]:
    return lambda result: bool(result["in_a_row"] > k)


def _successes(
    pairs: Sequence[tuple[Result, Result]], value: Callable[[Result], bool]
) -> dict[str, Any]:
    return _both([(value(a), value(b), start_of(a)) for a, b in pairs], 1.0)


def _means(
    pairs: Sequence[tuple[Result, Result]], value: Callable[[Result], float]
) -> dict[str, Any]:
    return _both([(value(a), value(b), start_of(a)) for a, b in pairs], float(LENGTH))


def _both(rows: Sequence[tuple[float, float, str]], most: float) -> dict[str, Any]:
    """Compare values of A and B, each pair with its start; `most` is the largest difference."""
    a, b, starts = zip(*rows, strict=True)
    test = paired_by_start(a, b, starts, most)
    kept = ("n", "starts", "difference", "p", "test", "better", "worse")
    found = {name: getattr(test, name) for name in kept}
    found |= {"ci95": list(test.ci95), "shows": test.shows()}
    return {"a": sum(a) / len(a), "b": sum(b) / len(b)} | found


def to_markdown(found: Mapping[str, Any]) -> str:
    """Return a comparison as Markdown."""
    header = ["", "A", "B", "B - A", "95 % interval", "p", "pairs", "starts", "B better"]
    header += ["B worse", "shows"]
    rows = []
    if "avg_len" in found:
        rows.append(_row("average length", found["avg_len"], 1.0))
        rows += [
            _row(f"{k} in a row, %", row, 100.0)
            for k, row in enumerate(found["success_in_a_row"], 1)
        ]
    else:
        rows.append(_row("success, %", found["success_rate"], 100.0))
    tasks = [_row(name, row, 100.0) for name, row in found["per_task"].items()]
    differs = [[key, _text(a), _text(b)] for key, (a, b) in found["differs"].items()]
    clocks, limits = (
        " and ".join(dict.fromkeys(map(str, found[k]))) for k in ("clock", "steps_limit")
    )
    parts = [
        f"# {found['suite']}: A and B\n",
        f"A is `{found['a']}`, B is `{found['b']}`; {found['n_pairs']} pairs of episodes, "
        f"{clocks} clock, at most {limits} environment steps per task, seed {found['seed']}.\n",
        markdown_table((header, rows)),
        "p: exact permutation by start; intervals: t over starts; *shows*: the smallest true "
        "difference that so many starts would find in four of five comparisons.\n",
        "## What differs\n",
        markdown_table((["setting", "A", "B"], differs)) if differs else "Nothing.\n",
        "## By task, %\n",
        markdown_table((header, tasks)),
    ]
    return "\n".join(parts)


def _row(name: str, row: Mapping[str, Any], scale: float) -> list[str]:
    digits = 2 if scale == 1.0 else 1
    return [
        name,
        f"{scale * row['a']:.{digits}f}",
        f"{scale * row['b']:.{digits}f}",
        f"{scale * row['difference']:+.{digits}f}",
        interval(row["ci95"], scale, digits),
        f"{row['p']:.3g}",
        str(row["n"]),
        str(row["starts"]),
        str(row["better"]),
        str(row["worse"]),
        "" if row["shows"] is None else f"{scale * row['shows']:.{digits}f}",
    ]


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 100 else text[:97] + "..."


def drawing_of(found: Mapping[str, Any]) -> plots.Drawing:
    """Return B minus A with its interval, over all and by task."""
    chain = "avg_len" in found
    rows = {"all episodes": found["success_rate"]} if not chain else {}
    if chain:
        steps = enumerate(found["success_in_a_row"], 1)
        rows = {f"{number} in a row": row for number, row in steps}
    rows |= found["per_task"]
    counts = [row["n"] for row in rows.values()]
    note = f"{plots.trials(counts, 'pairs')}; lines: 95 % intervals; filled where they leave out 0"
    label = "B - A, success (percentage points)"
    return plots.differences(rows, label, f"{found['suite']}: B against A", note, 100.0)


def to_html(found: Mapping[str, Any]) -> str:
    """Return a comparison as a page with its plot."""
    text = to_markdown(found)
    body = [image(drawing_of(found).svg, "svg+xml")]
    for block in text.split("\n\n")[1:]:
        lines = block.strip().split("\n")
        if lines[0].startswith("## "):
            body.append(f"<h2>{html.escape(lines[0][3:])}</h2>")
            lines = lines[1:]
        if lines and lines[0].startswith("|"):
            cells = [[c.strip() for c in line.strip("|").split("|")] for line in lines]
            kind = "words" if cells[0][0] == "setting" else ""
            body.append(html_table((cells[0], cells[2:]), kind))
        elif any(lines):
            told = re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(" ".join(lines)))
            body.append(f"<p>{told}</p>")
    return page(f"{found['suite']}: A and B", body)


class CompareOptions(Options):
    """Options of `compare`."""

    out: Path | None = option(None, "write compare.html, .md and the plot there", "DIR")

    a: Annotated[Path, Positional()] = option(..., "folder of an evaluation")
    b: Annotated[Path, Positional()] = option(..., "folder of another evaluation")


def main(argv: Sequence[str]) -> int:
    """Compare two evaluations on the same episodes.

    Raises:
        ValueError: bad input, in one line.
    """
    options, _ = parse("compare", CompareOptions, argv, __doc__ or "")
    for place in () if options.out is None else (options.out, *options.out.parents):
        if place.exists() and not place.is_dir():
            raise ConfigError(f"--out: {place} is a file; name a folder")
    found = compare(options.a, options.b)
    if options.out is not None:
        files = drawing_of(found).files("compare")
        files |= {
            "compare.md": to_markdown(found).encode(),
            "compare.html": to_html(found).encode(),
        }
        for name, data in files.items():
            replace_file(options.out / name, data)
    if not options.as_json and RichConsole().is_terminal:
        RichConsole().print(Markdown(to_markdown(found)))
        if options.out is not None:
            RichConsole(stderr=True).print(f"{options.out}/compare.html", soft_wrap=True)
        return 0
    answer(json.dumps(found) if options.as_json else to_markdown(found))
    return 0
