"""Reports of an evaluation: Markdown, and one self-contained HTML page."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from openhelix.benchmarks.evaluation import plots
from openhelix.benchmarks.evaluation.results import VIDEOS
from openhelix.runtime.core.files import replace_file

Table = tuple[list[str], list[list[str]]]  # header, rows
STILLS, STILL_PX, FILMS_SHOWN = 6, 480, 8

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #22303c; margin: 2rem auto; max-width: 60rem;
       padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; font-size: 13px; margin: .6rem 0; }
th, td { padding: .2rem .7rem; text-align: left; border-bottom: 1px solid #dde4e8; }
td:not(:first-child), th:not(:first-child) { text-align: right; }
img { max-width: 100%; } .stills img { width: 31%; margin: .2rem; }
.score { font-size: 1.3rem; } .note { color: #5b6b76; font-size: 13px; }
"""


def percent(value: float | None) -> str:
    """Return a rate as text."""
    return "" if value is None else f"{100 * value:.1f}"


def counted(number: int, what: str) -> str:
    """Return "1 episode" or "2 episodes"."""
    return f"{number} {what}" + ("" if number == 1 else "s")


def interval(limits: Sequence[float] | None, scale: float = 100.0, digits: int = 1) -> str:
    """Return an interval as text."""
    if limits is None:
        return ""
    return f"{scale * limits[0]:.{digits}f} to {scale * limits[1]:.{digits}f}"


def headline(report: Mapping[str, Any]) -> str:
    """Return the score in one sentence, with all that it depends on."""
    if "avg_len" in report:
        score = (
            f"Average length {report['avg_len']:.2f} "
            f"(95 % interval {interval(report['ci95'], 1, 2)}) "
            f"over {counted(report['n_sequences'], 'sequence')}"
        )
    else:
        score = (
            f"Success {percent(report['success_rate'])} % "
            f"(95 % interval {interval(report['ci95'])}) "
            f"over {counted(report['n_episodes'], 'episode')}"
        )
    cadence = (
        f"System 2 at {report['hz2']:g} Hz"
        if report["hz2"]
        else f"System 2 every {report['interval']} steps, {report['latency']} late"
    )
    if report["system2"] is None:
        cadence = "no System 2"
    return (
        f"{score}; {report['clock']} clock, at most {report['steps_limit']} environment steps a "
        f"task, {cadence}, {report['world']} scene {report['scene']}, seed {report['seed']}."
    )


def settings(report: Mapping[str, Any]) -> Table:
    """Return what was evaluated, as a table."""
    policy, system2 = report["policy"], report["system2"]
    latent = [system2["spec"]["kind"], system2["spec_id"]] if system2 else ["none"]
    rows = [
        ["policy", f"{policy['target']} ({policy['checkpoint'] or 'no checkpoint'})"],
        ["policy, sha256", policy["sha256"]],
        ["untrained, as asked for", ", ".join(report["untrained"]) or "nothing"],
        ["System 2", f"{system2['target']}" if system2 else "none"],
        ["latent", ", ".join(filter(None, latent))],
        ["replanning", f"every {report['replan_steps']} steps"],
        ["environment steps", str(report["work"]["env_steps"])],
        ["latents per task", f"{report['work']['latents_per_task'] or 0:.1f}"],
        ["seconds an episode", f"{report['timing']['episode_s_mean'] or 0:.1f}"],
        ["ended by an error", str(report["n_errors"])],
        ["program", ", ".join(report["code"])],
    ]
    return ["", ""], rows


def task_table(report: Mapping[str, Any]) -> Table:
    """Return the table of tasks."""
    header = ["task", "success %", "95 % interval", "trials", "median steps"]
    rows = []
    for name, row in report["per_task"].items():
        steps = "" if row["median_steps"] is None else f"{row['median_steps']:.0f}"
        rows.append(
            [
                name,
                percent(row["success_rate"]),
                interval(row["ci95"]),
                str(row["n_episodes"]),
                steps,
            ]
        )
    return header, rows


def group_tables(report: Mapping[str, Any]) -> dict[str, Table]:
    """Return a table for each grouping that has more than one row."""
    found: dict[str, Table] = {}
    for key, groups in report.items():
        if not key.startswith("per_") or key == "per_task" or len(groups) < 2:
            continue
        rows = []
        for name, row in groups.items():
            if "avg_len" in row:
                score = [f"{row['avg_len']:.2f}", interval(row["ci95"], 1, 2)]
                rows.append([name, *score, str(row["n_sequences"])])
            else:
                score = [percent(row["success_rate"]), interval(row["ci95"])]
                rows.append([name, *score, str(row["n_episodes"])])
        what = "average length" if "avg_len" in report else "success %"
        found[key.removeprefix("per_")] = [key[4:], what, "95 % interval", "trials"], rows
    return found


def chain_table(report: Mapping[str, Any]) -> Table:
    """Return the table of tasks in a row."""
    header = ["tasks in a row", "chains %", "95 % interval"]
    pairs = zip(report["success_in_a_row"], report["success_in_a_row_ci95"], strict=True)
    rows = [[str(k), percent(rate), interval(ci)] for k, (rate, ci) in enumerate(pairs, 1)]
    return header, rows


def sections(report: Mapping[str, Any]) -> dict[str, Table]:
    """Return the tables of a report by their titles."""
    found: dict[str, Table] = {}
    if "avg_len" in report:
        found["Tasks in a row"] = chain_table(report)
    for name, table in group_tables(report).items():
        found[f"By {name}"] = table
    what = "attempts within the chains" if "avg_len" in report else "episodes"
    found[f"By task ({what})"] = task_table(report)
    if report["errors"]:
        errors = [[row["key"], row["error"]] for row in report["errors"]]
        found["Episodes that an error ended (counted as failures)"] = ["episode", "reason"], errors
    found["What was evaluated"] = settings(report)
    return found


def markdown_table(table: Table) -> str:
    """Return a table as Markdown."""
    header, rows = table
    marks = ["---", *["---:"] * (len(header) - 1)]
    clean = [[cell.replace("|", "\\|") for cell in row] for row in [header, marks, *rows]]
    return "\n".join(f"| {' | '.join(row)} |" for row in clean) + "\n"


def html_table(table: Table) -> str:
    """Return a table as HTML."""

    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

    header, rows = table
    return f"<table>{line(header, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"


def image(data: bytes, kind: str = "png") -> str:
    """Return an image as HTML that carries its bytes."""
    return f'<img alt="" src="data:image/{kind};base64,{base64.b64encode(data).decode()}">'


def page(title: str, body: Sequence[str]) -> str:
    """Return a whole HTML page."""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}'
        f"</title><style>{STYLE}</style></head><body><h1>{html.escape(title)}</h1>"
        f"{''.join(body)}</body></html>\n"
    )


def to_markdown(report: Mapping[str, Any]) -> str:
    """Return the report as Markdown."""
    parts = [f"# {title_of(report)}\n", headline(report) + "\n"]
    for title, table in sections(report).items():
        parts += [f"## {title}\n", markdown_table(table)]
    return "\n".join(parts)


def to_html(report: Mapping[str, Any], films: Mapping[str, Sequence[bytes]]) -> str:
    """Return the report as one page; `films` has JPEG stills by episode."""
    body = [f'<p class="score">{html.escape(headline(report))}</p>']
    if "avg_len" in report:
        rates = report["success_in_a_row"], report["success_in_a_row_ci95"]
        body.append(image(plots.chain(*rates, "Tasks in a row")))
    if report["per_task"]:
        body.append(image(plots.rates(report["per_task"], "Success by task")))
    for title, table in sections(report).items():
        body += [f"<h2>{html.escape(title)}</h2>", html_table(table)]
    for name, stills in films.items():
        body += [f"<h2>{html.escape(name)}</h2>", '<div class="stills">']
        body += [*(image(still, "jpeg") for still in stills), "</div>"]
    return page(title_of(report), body)


def title_of(report: Mapping[str, Any]) -> str:
    """Return a report's title."""
    return f"{report['suite']} in {report['world']}, scene {report['scene']}"


def stills(path: Path, count: int = STILLS) -> list[bytes]:
    """Return `count` evenly spread frames of a video as JPEG."""
    import av

    with av.open(str(path)) as container:
        frames = [frame.to_image() for frame in container.decode(video=0)]
    found = []
    for i in range(min(count, len(frames))):
        picture = frames[round(i * (len(frames) - 1) / max(1, min(count, len(frames)) - 1))]
        picture.thumbnail((STILL_PX, STILL_PX))
        stream = io.BytesIO()
        picture.save(stream, "JPEG", quality=80)
        found.append(stream.getvalue())
    return found


def write_reports(report: Mapping[str, Any], folder: Path) -> None:
    """Write `report.md` and `report.html` beside the results."""
    videos = sorted((folder / VIDEOS).glob("*.mp4"))[:FILMS_SHOWN]
    films = {path.stem: stills(path) for path in videos}
    replace_file(folder / "report.md", to_markdown(report).encode())
    replace_file(folder / "report.html", to_html(report, films).encode())
