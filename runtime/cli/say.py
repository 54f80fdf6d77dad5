"""`openhelix say TEXT`: tell a running robot what to do, from another terminal.

    openhelix say "put the red block in the drawer"
    openhelix say stop
    openhelix say "open the drawer" --follow

A sentence replaces the instruction that the robot follows, within a tick. "stop", "wait" and "go on"
are the runtime's words: it obeys them itself. The command comes back when the first action of the new
instruction is sent; with --follow, when the robot has stopped following it. If two people talk at
once the last one wins, and both are told.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from openhelix.runtime.cli.arguments import Options, Positional, option, parse
from openhelix.runtime.core.config import CommandFailed, NonNegative, RunConfig, load
from openhelix.runtime.core.output import answer
from openhelix.runtime.observe.display import Audience
from openhelix.runtime.observe.robot import Robot, Told


class SayOptions(Options):
    """Options of `say`."""

    text: Annotated[tuple[str, ...], Positional(many=True)] = option(
        ..., "what the robot is to do", "TEXT"
    )
    run: Path | None = option(None, "folder of a run (the newest)", "FOLDER")
    who: str | None = option(None, "who says it (your user name)", "NAME")
    follow: bool = option(False, "tell what happens until the instruction has ended")
    timeout: NonNegative = option(15.0, "seconds to wait for the first action (15)", "S")


def main(argv: Sequence[str]) -> int:
    """Tell a running robot what to do.

    0 when it was heard; 1 where no run is alive, or it did nothing in time.
    """
    options, overrides = parse(
        "say", SayOptions, argv, __doc__ or "", RunConfig, ("output.folder",)
    )
    base = load(options.config, overrides).output.folder
    with Robot(options.run, outputs=base, who=options.who) as robot:
        told = robot.say(" ".join(options.text), options.timeout)
        if options.as_json:
            entries = _followed(robot, told, False) if options.follow else []
            answer(json.dumps({**asdict(told), "entries": entries}))
        else:
            for line in lines(told):
                answer(line)
            if options.follow and not told.replaced:
                _followed(robot, told, True)
    if told.refused:
        raise CommandFailed("the robot holds still: System 2 does not understand the sentence")
    acted = told.word or told.replaced or told.first_action_s is not None
    if not acted and options.timeout > 0:
        raise CommandFailed(
            f"heard, but no action within {options.timeout:g} s; `openhelix status` says why"
        )
    return 0


def lines(told: Told) -> list[str]:
    """Return what became of something that was said, for a person."""
    if told.word:
        return [told.came_of_it or f"{told.word}: heard"]
    found = [f"follows: {told.text}"]
    if told.replaces:
        by = f", said by {told.replaces_who}" if told.replaces_who else ""
        found.append(f"instead of: {told.replaces}{by}")
    if told.answer:
        found.append(f"System 2: {told.answer}")
    if told.replaced:
        found.append(f"replaced by {told.replaced}")
    elif told.first_action_s is not None:
        found.append(f"first action after {told.first_action_s:.2f} s")
    return found


def _followed(robot: Robot, told: Told, tell: bool) -> list[dict[str, Any]]:
    """Tell what happens until the instruction has ended, or nobody reads it; return it."""
    kept = []
    readers = Audience()
    begun = False
    for entry in robot.events(over=lambda: tell and readers.gone):
        begun = begun or entry["said"] >= told.said
        if not begun or entry["kind"] in ("begun", "acting"):
            continue
        if entry["said"] < told.said and entry["kind"] == "ended":
            continue  # what this one replaces
        kept.append(entry)
        if tell and not (entry["kind"] == "said" and entry["said"] == told.said):
            answer(entry["line"])
        if entry["said"] == told.said and entry["kind"] in ("ended", "held"):
            break
    return kept
