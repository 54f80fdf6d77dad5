"""A sweep for people: tables, and a plot a suite of success against the age of the latent."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.dsvlabench import plots
from benchmarks.dsvlabench.report import html_table, image, interval, markdown_table, page
from benchmarks.dsvlabench.results import replace_file

Cell = dict[str, Any]


def table_of(cells: Sequence[Cell]) -> tuple[list[str], list[list[str]]]:
    """Return the cells of one suite as a table."""
    chain = "avg_len" in cells[0]
    header = [
        "interval",
        "latency",
        "average length" if chain else "success %",
        "95 % interval",
        "against the first: difference",
        "p",
        "latent age, steps",
        "drift: cosine",
        "latents a task",
        "System 2, s a task",
        "of processor time",
    ]
    scale, digits = (1.0, 2) if chain else (100.0, 1)
    rows = []
    for c in cells:
        drift = c["drift"] or {}
        cosine, age = drift.get("cosine_mean"), c["latent_age_steps"]["mean"]
        rows.append(
            [
                str(c["interval"]),
                "its own" if c["latency"] is None else str(c["latency"]),
                f"{scale * _score(c):.{digits}f}",
                interval(c["ci95"], scale, digits),
                f"{scale * c['against']['difference']:+.{digits}f}",
                f"{c['against']['p']:.3g}",
                "" if age is None else f"{age:.1f}",
                "" if cosine is None else f"{cosine:.3f}",
                f"{c['latents_per_task'] or 0:.1f}",
                f"{c['s2_s_per_task']:.2f}",
                "" if c.get("s2_cpu_s_per_task") is None else f"{c['s2_cpu_s_per_task']:.2f}",
            ]
        )
    return header, rows


def _score(c: Cell) -> float:
    return float(c["avg_len"] if "avg_len" in c else c["success_rate"])


def suites_of(report: Mapping[str, Any]) -> dict[str, list[Cell]]:
    """Return the cells by suite and clock."""
    found: dict[str, list[Cell]] = {}
    for c in report["cells"]:
        name = c["suite"] + ("" if c["clock"] == "lockstep" else " on the wall clock")
        found.setdefault(name, []).append(c)
    return found


def note(report: Mapping[str, Any], cells: Sequence[Cell]) -> str:
    """Return what a table's scores depend on, in one sentence."""
    trials = cells[0].get("n_sequences") or cells[0].get("n_episodes")
    kind = "sequences" if "avg_len" in cells[0] else "episodes"
    return (
        f"{trials} {kind} a cell, {cells[0]['clock']} clock, at most {report['steps_limit']} "
        f"environment steps a task, {report['world']} scene {report['scene']}, seed "
        f"{report['seed']}; interval and latency in environment steps of 1/30 s."
    )


def weights(report: Mapping[str, Any]) -> str:
    """Return in one sentence what was measured."""
    policy, system2 = report["policy"], report["system2"]
    text = f"Policy `{policy['checkpoint'] or 'untrained'}` (hash {policy['sha256']})"
    if not system2:
        return f"{text}, without System 2."
    # On the wall clock System 2 is in another process, which does not say.
    return text + (f", latents {system2['spec_id']}." if system2["spec_id"] else ".")


def to_markdown(report: Mapping[str, Any], pictures: bool = False) -> str:
    """Return the sweep as Markdown, with the pictures that lie beside it or without."""
    parts = ["# Asynchrony sweep\n", weights(report) + "\n"]
    parts += [f"Again: `{report['command']}`\n"] if "command" in report else []
    for name, cells in suites_of(report).items():
        parts += [f"## {name}\n", note(report, cells) + "\n"]
        parts += [f"![{name}]({picture_of(name)})\n"] if pictures else []
        parts.append(markdown_table(table_of(cells)))
    return "\n".join(parts)


def picture_of(name: str) -> str:
    """Return the file of a suite's plot."""
    return f"{name.replace(' ', '-')}.png"


def command_again(argv: Sequence[str]) -> str:
    """Return what to call to have a sweep's figures again, without places and workers."""
    left = [word for word in argv if not word.startswith("output.")]
    for name in ("--out", "--results", "--workers"):
        while name in left:
            at = left.index(name)
            del left[at : at + 2]
    return shlex.join(["openhelix", "sweep", *left])


def to_keep(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return a report without the places that only this machine knows."""
    cells = [{k: v for k, v in cell.items() if k != "folder"} for cell in report["cells"]]
    return {**report, "cells": cells}


def plot(name: str, cells: Sequence[Cell]) -> bytes:
    """Return score against interval, one line a latency, as PNG."""
    chain = "avg_len" in cells[0]
    scale = 1.0 if chain else 100.0
    series: dict[str, list[tuple[float, float, float, float]]] = {}
    for c in cells:
        low, high = c["ci95"]
        point = (float(c["interval"]), scale * _score(c), scale * low, scale * high)
        late = "its own latency" if c["latency"] is None else f"latency {c['latency']} steps"
        series.setdefault(late, []).append(point)
    return plots.lines(
        series,
        "environment steps from one latent to the next",
        "tasks in a row" if chain else "success, %",
        f"{name}: success against asynchrony",
        sorted({c["interval"] for c in cells}),
    )


def write(report: Mapping[str, Any], folder: Path, kept: bool = False) -> None:
    """Write the sweep as JSON, Markdown and one PNG a suite; with HTML if it is not to be kept."""
    body: list[str] = []
    for name, cells in suites_of(report).items():
        picture = plot(name, cells)
        replace_file(folder / picture_of(name), picture)
        body += [f"<h2>{name}</h2><p>{note(report, cells)}</p>", image(picture)]
        body.append(html_table(table_of(cells)))
    replace_file(folder / "sweep.json", json.dumps(report, indent=1).encode() + b"\n")
    replace_file(folder / "sweep.md", to_markdown(report, pictures=True).encode())
    if not kept:
        replace_file(folder / "sweep.html", page("Asynchrony sweep", body).encode())
