"""`openhelix completion SHELL`: a script that lets a shell complete commands, options and settings.

    openhelix completion bash > ~/.local/share/bash-completion/completions/openhelix
    openhelix completion zsh > ~/.zfunc/_openhelix        with ~/.zfunc in fpath
    openhelix completion fish > ~/.config/fish/completions/openhelix.fish

It is made of what every command says in its `--help`, other packages' commands too; make it again
after an update.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

from openhelix.runtime.cli.arguments import Options, Positional, option, parse
from openhelix.runtime.core import plugins
from openhelix.runtime.core.config import ConfigError
from openhelix.runtime.core.output import answer

SHELLS = ("bash", "zsh", "fish")
BASH = """# Completion of openhelix for bash; made by `openhelix completion bash`.
_openhelix() {{
  local word=${{COMP_WORDS[COMP_CWORD]}} words values=
  if [[ $COMP_CWORD == 1 ]]; then
    COMPREPLY=($(compgen -W "{commands}" -- "$word"))
    return
  fi
  case ${{COMP_WORDS[1]}} in
{cases}
  esac
  case "${{COMP_WORDS[1]}} ${{COMP_WORDS[COMP_CWORD-1]}}" in
{values}
  esac
  if [[ $values ]]; then
    COMPREPLY=($(compgen -W "$values" -- "$word"))
    return
  fi
  COMPREPLY=($(compgen -W "$words" -- "$word"))
  if [[ ${{#COMPREPLY[@]}} == 0 ]]; then
    COMPREPLY=($(compgen -f -- "$word"))
  elif [[ ${{COMPREPLY[0]}} == *= ]]; then
    compopt -o nospace
  fi
}}
complete -F _openhelix openhelix
"""
ZSH = """#compdef openhelix
# Completion of openhelix for zsh; made by `openhelix completion zsh`.
_openhelix() {{
  local -a commands
  if (( CURRENT == 2 )); then
    commands=({described})
    _describe command commands
    return
  fi
  case "${{words[2]}} ${{words[CURRENT-1]}}" in
{values}
  esac
  case ${{words[2]}} in
{cases}
  esac
}}
"""


class CompletionOptions(Options):
    """Options of `completion`."""

    shell: Annotated[str, Positional()] = option(..., ", ".join(SHELLS), "SHELL")


def main(argv: Sequence[str]) -> int:
    """Print a script for completion in bash, zsh or fish."""
    options, _ = parse("completion", CompletionOptions, argv, __doc__ or "")
    if options.shell not in SHELLS:
        raise ConfigError(f"SHELL: {plugins.none_of(options.shell, SHELLS)}")
    answer(SCRIPTS[options.shell](words()))
    return 0


@dataclass(frozen=True, slots=True)
class Taken:
    """What a command takes: its options and settings, and the values of options that have few."""

    words: tuple[str, ...]
    values: Mapping[str, tuple[str, ...]]


def words() -> dict[str, Taken]:
    """Return what every command takes that can say so."""
    found = {}
    for name, path in plugins.entries(plugins.COMMANDS).items():
        said = io.StringIO()
        # Other packages' commands may do anything when asked for help but give it.
        with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit, Exception):
            plugins.resolve(path)(["--help"])
        found[name] = taken(said.getvalue())
    return found


def taken(text: str) -> Taken:
    """Return what a command takes, by its help."""
    flags = re.findall(r"^  (?:-\w, )?(--[a-z][\w-]*)", text, re.M)
    _, _, listed = text.rpartition("\nsettings, written")
    settings = re.findall(r"  ([a-z_][\w.]*=)", listed)
    choices = re.findall(r"^  (--[a-z][\w-]*) ([\w.-]+(?:\|[\w.-]+)+)", text, re.M)
    values = {  # words in capitals and dots stand for others
        flag: tuple(v for v in listed.split("|") if v.islower() and v.strip("."))
        for flag, listed in choices
    }
    return Taken(tuple(dict.fromkeys([*flags, *settings])), values)


def bash(found: Mapping[str, Taken]) -> str:
    """Return the script for bash."""
    cases = [f'    {name}) words="{" ".join(own.words)}" ;;' for name, own in found.items()]
    values = [
        f'    "{name} {flag}") values="{" ".join(valid)}" ;;'
        for name, own in found.items()
        for flag, valid in own.values.items()
    ]
    return BASH.format(commands=" ".join(found), cases="\n".join(cases), values="\n".join(values))


def zsh(found: Mapping[str, Taken]) -> str:
    """Return the script for zsh."""
    paths = plugins.entries(plugins.COMMANDS)
    described = " ".join(
        "'" + f"{name}:{plugins.summary(paths[name])}".replace("'", "") + "'" for name in found
    )
    cases = []
    for name, own in found.items():
        flags = " ".join(word for word in own.words if not word.endswith("="))
        settings = " ".join(word for word in own.words if word.endswith("="))
        cases.append(f"    {name}) compadd -- {flags}; compadd -S '' -- {settings}; _files ;;")
    values = [
        f"    '{name} {flag}') compadd -- {' '.join(valid)}; return ;;"
        for name, own in found.items()
        for flag, valid in own.values.items()
    ]
    return ZSH.format(described=described, cases="\n".join(cases), values="\n".join(values))


def fish(found: Mapping[str, Taken]) -> str:
    """Return the script for fish."""
    paths = plugins.entries(plugins.COMMANDS)
    lines = ["# Completion of openhelix for fish; made by `openhelix completion fish`."]
    for name, own in found.items():
        says = plugins.summary(paths[name]).replace("'", "")
        lines.append(f"complete -c openhelix -n __fish_use_subcommand -f -a {name} -d '{says}'")
        lines += [
            f"complete -c openhelix -n '__fish_seen_subcommand_from {name}' -a '{word}'"
            for word in own.words
        ]
        lines += [
            f"complete -c openhelix -n '__fish_seen_subcommand_from {name}' "
            f"-l {flag.removeprefix('--')} -x -a '{' '.join(valid)}'"
            for flag, valid in own.values.items()
        ]
    return "\n".join(lines) + "\n"


SCRIPTS = {"bash": bash, "zsh": zsh, "fish": fish}
