"""The leaderboard: every system that has been scored, on every suite, in one sortable page.

It is made of the results of the experiments, as far as they are by today's rules, and of evaluations
of one's own (`openhelix eval`), which have the same format. The page needs nothing from elsewhere but
the films that it links to, which lie beside it: of each evaluation one success and one failure, as
far as some were filmed, small.
"""

from __future__ import annotations

import hashlib
import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from openhelix.benchmarks.evaluation.report import (
    film_of,
    interval,
    markdown_table,
    page,
    percent,
    succeeded,
)
from openhelix.benchmarks.evaluation.results import (
    REPORT,
    VIDEOS,
    ResultsError,
    read_results,
    read_run,
)
from openhelix.benchmarks.evaluation.suites import CHAINS
from openhelix.benchmarks.paper.measures import score_of
from openhelix.benchmarks.paper.tables import Outcome, outdated
from openhelix.runtime.core.config import ConfigError
from openhelix.runtime.core.files import BadFile, read_json, replace_file, written
from openhelix.runtime.observe.film import Mp4

PAGE, TEXT = "leaderboard.html", "leaderboard.md"
HEADER = (
    *("system", "suite", "score", "95 % interval", "films", "starts", "trials", "clock"),
    *("steps per task", "a plan every", "System 2 every", "late", "held still", "errors"),
    *("ms per plan", "ms per latent", "latents per task", "weights", "where", "from"),
)
TEXT_COLUMNS = ("system", "suite", "95 % interval", "films", "clock", "weights", "where", "from")
WORDS = frozenset(map(HEADER.index, TEXT_COLUMNS))  # sorted as text
AT = HEADER.index("films")
FILMS = "films"
FILM_SIZE, FILM_EVERY, FILM_CRF = (384, 216), 3, 30  # of films with 30 pictures per second
HOW = (
    "Scores of chains are tasks in a row, of 5; of all else, successes in percent. The unit is the "
    "start. Click a column to sort by it. Scores compare within a suite in one scene, on one "
    "clock, at one step limit, with a plan as often and over the same trials. Steps held still count "
    "to the limit."
)
STYLE = """<style>
body { max-width: 96rem; } th { cursor: pointer; white-space: nowrap; }
th[aria-sort=ascending]::after { content: " ↑"; } th[aria-sort=descending]::after { content: " ↓"; }
table { display: block; overflow-x: auto; } td:nth-child(2) { text-align: left; }
td { white-space: nowrap; }
label { margin-right: 1rem; } td a { margin-right: 0.4rem; }
dialog { border: none; padding: 0.6rem; } dialog video { display: block; width: min(48rem, 90vw); }
dialog p { margin: 0 0 0.4rem; } dialog::backdrop { background: #0009; }
</style>"""
SCRIPT = """
const table = document.querySelector("table"), body = table.tBodies[0];
const heads = [...table.tHead.rows[0].cells], suite = document.getElementById("suite");
function sort(column, down) {
  const value = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent;
  const number = heads[column].dataset.kind === "number";
  const rows = [...body.rows].sort((a, b) => {
    const [x, y] = [value(a), value(b)];
    if (!number) return (down ? -1 : 1) * x.localeCompare(y);
    if (x === "" || y === "") return (x === "") - (y === "");  // what is not known comes last
    return (down ? -1 : 1) * (Number(x) - Number(y));
  });
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
const player = document.querySelector("dialog");
body.addEventListener("click", (event) => {
  const link = event.target.closest("a.film");
  if (!link) return;
  event.preventDefault();
  player.querySelector("p").textContent = link.title;
  player.querySelector("video").src = link.getAttribute("href");
  player.showModal();
});
player.addEventListener("click", () => player.close());
player.addEventListener("close", () => player.querySelector("video").pause());
"""
Entry = Mapping[str, Any]
Films = Mapping[str, Mapping[str, str]]


def entries(outcomes: Iterable[Outcome], own: Iterable[Entry] = ()) -> list[Entry]:
    """Return one entry for each evaluation: `system`, `source`, `score` and its `key`.

    Args:
        outcomes: of experiments; what was measured by older rules is left out.
        own: evaluations of one's own, as `own_entries` returns them.
    """
    found: dict[str, Entry] = {}
    for outcome in outcomes:
        if outdated(outcome):
            continue
        for row in outcome["rows"]:
            if row["score"] is not None:
                key = str(row["evaluation"])
                source = f"{outcome['name']} ({outcome['scale']['name']})"
                entry = {"system": row["name"], "source": source, "score": row["score"]}
                found.setdefault(key, {**entry, "key": key})
    found |= {str(entry["key"]): entry for entry in own}
    return sorted(found.values(), key=lambda e: (e["score"]["suite"], -_value(e["score"])))


def own_entries(own: Mapping[str, Path]) -> list[Entry]:
    """Return the entries of finished evaluations in folders, by the name of their system.

    Raises:
        ConfigError: a folder holds none, or a report that its episodes do not show; one line.
    """
    found: list[Entry] = []
    for name, folder in own.items():
        key = f"own-{hashlib.sha256(f'{name} {folder}'.encode()).hexdigest()[:12]}"
        entry = {"system": name, "source": str(folder), "score": _finished(name, folder)}
        found.append({**entry, "key": key})
    return found


def _finished(name: str, folder: Path) -> Outcome:
    """Return the score of a finished evaluation, which its episodes must show."""
    path = folder / REPORT
    try:
        read_run(folder)
        results = read_results(folder)
        report = read_json(path) if path.is_file() else None
    except (ResultsError, BadFile) as error:
        raise ConfigError(f"--systems: {name}: {error}") from None
    if report is None:
        raise ConfigError(f"--systems: {name}: {folder} is not finished: no {REPORT}")
    try:
        score = score_of(report)
        shown, trials = _value(score), _trials(score)
    except (KeyError, TypeError, ValueError):
        raise ConfigError(f"--systems: {name}: {path} is no report of an evaluation") from None
    chain = score["suite"] in CHAINS
    got = [r["in_a_row"] if chain else 100 * r["success"] for r in results]
    if len(got) != trials or abs(sum(got) / max(len(got), 1) - shown) > 0.01:
        raise ConfigError(
            f"--systems: {name}: {path} does not say what the episodes beside it show"
        )
    return score


def _value(score: Outcome) -> float:
    return float(score["avg_len"] if score["suite"] in CHAINS else 100 * score["success_rate"])


def _trials(score: Outcome) -> int:
    return int(score["n_sequences"] if score["suite"] in CHAINS else score["n_episodes"])


def cells(entry: Entry) -> list[str]:
    """Return an entry as the cells of a line, but for the films."""
    score = entry["score"]
    chain = score["suite"] in CHAINS
    limits = interval(score["ci95"], 1, 2) if chain else interval(score["ci95"])
    shown = f"{score['avg_len']:.2f}" if chain else percent(score["success_rate"])
    times = [_ms(score.get(name)) for name in ("s1_s_per_plan", "s2_s_per_latent")]
    work = score["latents_per_task"]
    return [
        *(entry["system"], score["suite"], shown, limits),
        *(str(score["n_starts"]), str(_trials(score)), score["clock"], str(score["steps_limit"])),
        _plain(score.get("replan_steps")),
        *("" if score["latents"] is None else _plain(score[n]) for n in ("interval", "latency")),
        *(_plain(score["hold_steps"]), str(score["n_errors"]), *times),
        *("" if work is None else f"{work:.1f}", str(score["policy_sha256"])),
        *(f"{score.get('world', 'playtable')} {score['scene']}", entry["source"]),
    ]


def _plain(value: int | None) -> str:
    return "" if value is None else str(value)  # on the wall clock neither is chosen


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e3 * seconds:.0f}"


def films_of(found: Sequence[Entry], folder: Path, places: Mapping[str, Path]) -> Films:
    """Return the films of entries by key and what they show, relative to a folder of results.

    What was filmed is made small and put there; films that are there already stay.

    Args:
        found: the entries.
        folder: of the page.
        places: folders of evaluations by key, as far as they are on this machine.
    """
    made: dict[str, dict[str, str]] = {}
    for key in (entry["key"] for entry in found):
        filmed = {} if key not in places else _filmed(places[key])
        for what in ("success", "failure"):
            name = f"{FILMS}/{key}-{what}.mp4"
            if what in filmed and not (folder / name).is_file():
                (folder / FILMS).mkdir(parents=True, exist_ok=True)
                small_film(filmed[what], folder / name)
            if (folder / name).is_file():
                made.setdefault(key, {})[what] = name
    return made


def copy_films(source: Path, folder: Path) -> None:
    """Put the films that lie beside a leaderboard beside another one, as far as they are not there."""
    for film in sorted((source / FILMS).glob("*.mp4")):
        if not (folder / FILMS / film.name).exists():
            (folder / FILMS).mkdir(parents=True, exist_ok=True)
            replace_file(folder / FILMS / film.name, film.read_bytes())


def _filmed(place: Path) -> dict[str, Path]:
    """Return an evaluation's first film of a success and of a failure, as far as there are any."""
    found: dict[str, Path] = {}
    if (place / VIDEOS).is_dir():
        for result in read_results(place):
            path = place / VIDEOS / f"{film_of(result)}.mp4"
            if path.is_file():
                found.setdefault("success" if succeeded(result) else "failure", path)
    return found


def small_film(source: Path, out: Path) -> None:
    """Write a film with fewer and smaller pictures, whole or not at all."""
    import av  # see `openhelix.runtime.observe.film`

    width, height = FILM_SIZE
    with written(out) as part, av.open(str(source)) as container:
        film = Mp4(part, width, height, 30 / FILM_EVERY, FILM_CRF)
        for number, frame in enumerate(container.decode(video=0)):
            if number % FILM_EVERY == 0:
                shown = frame.reformat(width=width, height=height, format="rgb24").to_ndarray()
                film.write(shown, round(1e9 * float(frame.time or 0.0)))
        film.close()


def _links(entry: Entry, films: Films) -> str:
    told = f"{entry['system']}, {entry['score']['suite']}"
    return "".join(
        f'<a class="film" href="{html.escape(name)}" title="{html.escape(f"{told}: {what}")}">{what}</a>'
        for what, name in films.get(entry["key"], {}).items()
    )


def to_html(found: Sequence[Entry], films: Films | None = None) -> str:
    """Return the page; `films` are links by an entry's key and what they show."""
    suites = list(dict.fromkeys(entry["score"]["suite"] for entry in found))
    options = "".join(f"<option>{html.escape(name)}</option>" for name in suites)
    heads = "".join(
        f'<th aria-sort="none" data-kind="{"text" if i in WORDS else "number"}">{html.escape(name)}</th>'
        for i, name in enumerate(HEADER)
    )
    lines = []
    for entry in found:
        line = [html.escape(cell) for cell in cells(entry)]
        line.insert(AT, _links(entry, films or {}))
        lines.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in line) + "</tr>")
    body = [
        STYLE,
        f'<p class="note">{html.escape(HOW)}</p>',
        f'<label>suite <select id="suite"><option value="">all</option>{options}</select></label>',
        f"<table><thead><tr>{heads}</tr></thead><tbody>{''.join(lines)}</tbody></table>",
        "<dialog><p></p><video controls autoplay muted></video></dialog>",
        f"<script>{SCRIPT}</script>",
    ]
    return page("Leaderboard: systems, suites, clocks", body)


def to_markdown(found: Sequence[Entry], films: Films | None = None) -> str:
    """Return the same as Markdown, suite by suite."""
    parts = ["# Leaderboard\n", HOW.replace(" Click a column to sort by it.", "") + "\n"]
    for suite in dict.fromkeys(entry["score"]["suite"] for entry in found):
        rows = []
        for entry in (e for e in found if e["score"]["suite"] == suite):
            of = (films or {}).get(entry["key"], {})
            row = cells(entry)
            row.insert(AT, " ".join(f"[{what}]({at})" for what, at in of.items()))
            rows.append(row)
        parts += [f"## {suite.upper()}\n", markdown_table((list(HEADER), rows))]
    return "\n".join(parts)


def write_leaderboard(
    folder: Path, outcomes: Iterable[Outcome], own: Iterable[Entry], evaluations: Path
) -> Path | None:
    """Write page, text and films into a folder of results; None where nothing has been scored.

    Args:
        folder: of results.
        outcomes, own: see `entries`.
        evaluations: holds the folders of the experiments' evaluations, by key.
    """
    found = entries(outcomes, own)
    if not found:
        return None
    places = {e["key"]: evaluations / e["key"] for e in found}
    places |= {e["key"]: Path(e["source"]) for e in found if e["key"].startswith("own-")}
    films = films_of(found, folder, places)
    replace_file(folder / TEXT, to_markdown(found, films).encode())
    replace_file(folder / PAGE, to_html(found, films).encode())
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
