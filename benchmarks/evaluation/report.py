"""Reports of an evaluation: Markdown, and one HTML page with its plots, films and episodes.

The page needs nothing from elsewhere; the films that it plays lie beside it in `videos/`, and the plots,
for papers, in `plots/`.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openhelix.benchmarks.evaluation.results import VIDEOS
from openhelix.runtime.core.files import replace_file

if TYPE_CHECKING:
    from openhelix.benchmarks.evaluation.plots import Drawing

PLOTS = "plots"  # folder of the plots, as PNG, SVG and PDF
Table = tuple[list[str], list[list[str]]]  # header, rows
POSTER_PX, FILMS_SHOWN, FAILURES_SHOWN = 480, 12, 24

STYLE = """
:root { --ink: #22303c; --dim: #5b6b76; --line: #dde4e8; --good: #0072B2; --bad: #C4501B; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); margin: 2rem auto; max-width: 64rem;
       padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2.2rem; }
table { border-collapse: collapse; font-size: 13px; margin: .6rem 0; }
th, td { padding: .2rem .7rem; text-align: left; border-bottom: 1px solid var(--line); }
td:not(:first-child), th:not(:first-child) { text-align: right; }
.words td:not(:first-child), .episodes td, .episodes th { text-align: left; vertical-align: top; }
.episodes td:nth-child(5) { text-align: right; }
img { max-width: 100%; } .score { font-size: 1.3rem; } .note { color: var(--dim); font-size: 13px; }
.good { color: var(--good); font-weight: 600; } .bad { color: var(--bad); font-weight: 600; }
.plots { display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-start; }
.films { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(18rem, 1fr)); }
figure { margin: 0; } video { width: 100%; background: #10141a; display: block; }
figcaption { font-size: 13px; padding: .25rem 0; }
form { display: flex; flex-wrap: wrap; gap: .6rem; font-size: 14px; margin: .6rem 0; }
select, input { font: inherit; padding: .2rem .4rem; }
[hidden] { display: none; }
@media (max-width: 46rem) { table { display: block; overflow-x: auto; } }
"""

# Filters the list of episodes; without it the whole list is there.
SCRIPT = """
const form = document.getElementById("filter"), rows = [...document.querySelectorAll("tr[data-result]")];
function filter() {
  const task = form.task.value, result = form.result.value, word = form.word.value.toLowerCase();
  let count = 0;
  for (const row of rows) {
    const fits = (!task || row.dataset.tasks.split(" ").includes(task))
      && (!result || row.dataset.result === result)
      && (!word || row.textContent.toLowerCase().includes(word));
    row.hidden = !fits;
    count += fits;
  }
  document.getElementById("count").textContent = `${count} of ${rows.length}`;
}
form.addEventListener("input", filter);
form.addEventListener("submit", (event) => event.preventDefault());
filter();
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
        else f"System 2 every {counted(report['interval'], 'step')}"
        + (f", {counted(report['latency'], 'step')} late" if report["latency"] else ", at once")
    )
    if "trigger" in report:
        cadence = {
            "change": "System 2 when somebody changes the scene",
            "learned": "System 2 when a gate expects another answer",
        }[report["trigger"]]
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
        *_demand(report["work"]),
        ["seconds an episode", f"{report['timing']['episode_s_mean'] or 0:.1f}"],
        ["ended by an error", str(report["n_errors"])],
        ["program", ", ".join(report["code"])],
    ]
    return ["", ""], rows


def _demand(work: Mapping[str, Any]) -> list[list[str]]:
    """Return rows on when System 2 was asked, where somebody changed something or a trigger asks."""
    rows = []
    if "changes" in work:
        came = work["changes"]
        kinds = ", ".join(f"{k} {v['seen']} of {v['n']}" for k, v in came["by_kind"].items())
        rows.append(["changes shown to System 2", f"{came['seen']} of {came['n']} ({kinds})"])
        rows.append(["done after a change", f"{came['succeeded']} of {came['n']}"])
        rows.append(["steps until it was asked, p50 and p90", f"{came['p50']}, {came['p90']}"])
    if "reaction_steps" in work:
        known = work["reaction_steps"]
        rows.append(
            ["steps until the first plan that knew, p50 and p90", f"{known['p50']}, {known['p90']}"]
        )
    if "alarms" in work:
        rows.append(
            ["asked though nothing had changed, per task", f"{work['alarms_per_task']:.2f}"]
        )
    return rows


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


def html_table(table: Table, kind: str = "") -> str:
    """Return a table as HTML, of a class of its own if need be."""

    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

    header, rows = table
    return (
        f'<table class="{kind}">'
        f"{line(header, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"
    )


def image(data: bytes, kind: str = "png") -> str:
    """Return an image as HTML that carries its bytes."""
    return f'<img alt="" src="data:image/{kind};base64,{base64.b64encode(data).decode()}">'


def page(title: str, body: Sequence[str]) -> str:
    """Return a whole HTML page."""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}"
        f"</title><style>{STYLE}</style></head><body><h1>{html.escape(title)}</h1>"
        f"{''.join(body)}</body></html>\n"
    )


def to_markdown(report: Mapping[str, Any]) -> str:
    """Return the report as Markdown."""
    parts = [f"# {title_of(report)}\n", headline(report) + "\n"]
    for title, table in sections(report).items():
        parts += [f"## {title}\n", markdown_table(table)]
    return "\n".join(parts)


def to_html(
    report: Mapping[str, Any],
    results: Sequence[Mapping[str, Any]] = (),
    films: Mapping[str, bytes] | None = None,
) -> str:
    """Return the report as one page.

    Args:
        report: of the evaluation.
        results: of its episodes, for the list that can be filtered.
        films: a still as JPEG for each film in the folder `videos`, by its name; the page plays the
            films from there.
    """
    films = films or {}
    body = [f'<p class="score">{html.escape(headline(report))}</p>', '<div class="plots">']
    body += [image(made.svg, "svg+xml") for made in drawings(report).values()]
    body.append("</div>")
    by_name = {film_of(row): row for row in results}
    failed = [n for n in films if n in by_name and not succeeded(by_name[n])]
    others = [n for n in films if n not in failed]
    for title, names in (
        ("Failures", failed[:FAILURES_SHOWN]),
        ("Films", others[:FILMS_SHOWN]),
    ):
        if names:
            body += [f"<h2>{title}</h2>", '<div class="films">']
            body += [_film(name, films[name], by_name.get(name)) for name in names]
            body.append("</div>")
    for title, table in sections(report).items():
        kind = "words" if table[0] == ["", ""] or "reason" in table[0] else ""
        body += [f"<h2>{html.escape(title)}</h2>", html_table(table, kind)]
    if results:
        body += ["<h2>Episodes</h2>", _filter(report), _episodes(results, films)]
        body.append(f"<script>{SCRIPT}</script>")
    return page(title_of(report), body)


def drawings(report: Mapping[str, Any]) -> dict[str, Drawing]:
    """Return the plots of a report by name."""
    from openhelix.benchmarks.evaluation import plots  # matplotlib takes a second

    made = {}
    if "avg_len" in report:
        rates = report["success_in_a_row"], report["success_in_a_row_ci95"]
        made["chains"] = plots.chain(*rates, "Tasks in a row", report["n_sequences"])
    if report["per_task"]:
        made["tasks"] = plots.rates(report["per_task"], "Success by task")
    return made


def succeeded(result: Mapping[str, Any]) -> bool:
    """Whether all that an episode asked for was done."""
    return bool(result["tasks"]) and all(row["success"] for row in result["tasks"])


def film_of(result: Mapping[str, Any]) -> str:
    """Return the name of an episode's film, without its ending."""
    return str(result["key"]).replace("/", "-")


def mark(success: bool) -> str:
    """Return a check mark or a cross; also to be told apart without colours."""
    return '<span class="good">&#10003;</span>' if success else '<span class="bad">&#10007;</span>'


def _film(name: str, still: bytes, result: Mapping[str, Any] | None) -> str:
    poster = f"data:image/jpeg;base64,{base64.b64encode(still).decode()}"
    told = html.escape(name)
    if result is not None:
        last = result["tasks"][-1] if result["tasks"] else {"task": "", "reason": result["error"]}
        said = f"{last['task']}: {last['reason'] or result['error']}"
        told = f"{mark(succeeded(result))} {html.escape(result['key'])}, {html.escape(said)}"
    return (
        f'<figure><video controls preload="none" poster="{poster}" src="{VIDEOS}/{name}.mp4"></video>'
        f"<figcaption>{told}</figcaption></figure>"
    )


def _filter(report: Mapping[str, Any]) -> str:
    tasks = "".join(f"<option>{html.escape(name)}</option>" for name in report["per_task"])
    return (
        '<form id="filter"><select name="task"><option value="">every task</option>'
        f'{tasks}</select><select name="result"><option value="">every result</option>'
        '<option value="success">successes</option><option value="failure">failures</option>'
        '</select><input name="word" placeholder="a word"><span id="count" class="note"></span></form>'
    )


def _episodes(results: Sequence[Mapping[str, Any]], films: Mapping[str, bytes]) -> str:
    lines = []
    for result in results:
        rows = result["tasks"]
        tasks = " ".join(row["task"] for row in rows)
        told = "<br>".join(f"{mark(row['success'])} {html.escape(row['task'])}" for row in rows)
        said = "<br>".join(html.escape(row["instruction"]) for row in rows)
        steps = "<br>".join(str(row["env_steps"]) for row in rows)
        why = html.escape(result["error"] or (rows[-1]["reason"] if rows else ""))
        name, film = film_of(result), ""
        if name in films:
            film = f'<a href="{VIDEOS}/{name}.mp4">film</a>'
        lines.append(
            f'<tr data-result="{"success" if succeeded(result) else "failure"}" '
            f'data-tasks="{html.escape(tasks)}"><td>{html.escape(result["key"])}</td><td>{told}</td>'
            f"<td>{said}</td><td>{why}</td><td>{steps}</td><td>{film}</td></tr>"
        )
    header = "".join(
        f"<th>{name}</th>" for name in ("episode", "tasks", "told", "ended by", "steps", "")
    )
    return f'<table class="episodes"><tr>{header}</tr>{"".join(lines)}</table>'


def title_of(report: Mapping[str, Any]) -> str:
    """Return a report's title."""
    return f"{report['suite']} in {report['world']}, scene {report['scene']}"


def still(path: Path) -> bytes:
    """Return the last picture of a film as JPEG: what became of the episode is written in it."""
    import av

    with av.open(str(path)) as container:
        shot = None
        for frame in container.decode(video=0):
            shot = frame
    if shot is None:
        return b""
    picture = shot.to_image()
    picture.thumbnail((POSTER_PX, POSTER_PX))
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=80)
    return stream.getvalue()


def write_reports(
    report: Mapping[str, Any], folder: Path, results: Sequence[Mapping[str, Any]] = ()
) -> None:
    """Write `report.md`, `report.html` and the plots beside the results.

    Args:
        report: of the evaluation.
        folder: of its results.
        results: of its episodes.
    """
    films = {path.stem: still(path) for path in sorted((folder / VIDEOS).glob("*.mp4"))}
    for name, made in drawings(report).items():
        for file, data in made.files(name).items():
            replace_file(folder / PLOTS / file, data)
    replace_file(folder / "report.md", to_markdown(report).encode())
    replace_file(folder / "report.html", to_html(report, results, films).encode())
