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
from typing import Annotated

from openhelix.runtime.cli.arguments import Options, Positional, option, parse
from openhelix.runtime.core import plugins
from openhelix.runtime.core.config import ConfigError
from openhelix.runtime.core.output import answer

SHELLS = ("bash", "zsh", "fish")
BASH = """# Completion of openhelix for bash; made by `openhelix completion bash`.
_openhelix() {{
  local word=${{COMP_WORDS[COMP_CWORD]}} words
  if [[ $COMP_CWORD == 1 ]]; then
    COMPREPLY=($(compgen -W "{commands}" -- "$word"))
    return
  fi
  case ${{COMP_WORDS[1]}} in
{cases}
  esac
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
  local -a words
  if (( CURRENT == 2 )); then
    words=({described})
    _describe command words
    return
  fi
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


def words() -> dict[str, list[str]]:
    """Return the options and settings of every command that can say what it takes."""
    found = {}
    for name, path in plugins.entries(plugins.COMMANDS).items():
        said = io.StringIO()
        # Other packages' commands may do anything when asked for help but give it.
        with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit, Exception):
            plugins.resolve(path)(["--help"])
        found[name] = taken(said.getvalue())
    return found


def taken(text: str) -> list[str]:
    """Return the options and settings that a command takes, by its help."""
    flags = re.findall(r"^  (?:-\w, )?(--[a-z][\w-]*)", text, re.M)
    _, _, listed = text.rpartition("\nsettings, written")
    return [*dict.fromkeys([*flags, *re.findall(r"  ([a-z_][\w.]*=)", listed)])]


def bash(found: Mapping[str, Sequence[str]]) -> str:
    """Return the script for bash."""
    cases = "\n".join(f'    {name}) words="{" ".join(own)}" ;;' for name, own in found.items())
    return BASH.format(commands=" ".join(found), cases=cases)


def zsh(found: Mapping[str, Sequence[str]]) -> str:
    """Return the script for zsh."""
    paths = plugins.entries(plugins.COMMANDS)
    described = " ".join(
        "'" + f"{name}:{plugins.summary(paths[name])}".replace("'", "") + "'" for name in found
    )
    cases = "\n".join(
        f"    {name}) compadd -S '' -- {' '.join(own)}; _files ;;" for name, own in found.items()
    )
    return ZSH.format(described=described, cases=cases)


def fish(found: Mapping[str, Sequence[str]]) -> str:
    """Return the script for fish."""
    paths = plugins.entries(plugins.COMMANDS)
    lines = ["# Completion of openhelix for fish; made by `openhelix completion fish`."]
    for name, own in found.items():
        says = plugins.summary(paths[name]).replace("'", "")
        lines.append(f"complete -c openhelix -n __fish_use_subcommand -f -a {name} -d '{says}'")
        lines += [
            f"complete -c openhelix -n '__fish_seen_subcommand_from {name}' -a '{word}'"
            for word in own
        ]
    return "\n".join(lines) + "\n"


SCRIPTS = {"bash": bash, "zsh": zsh, "fish": fish}
