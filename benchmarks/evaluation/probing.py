"""`openhelix probe`: inspect System 2's response to a picture and an instruction.

    openhelix probe --image scene.png --text "open the drawer"
    openhelix probe --ask "Is the drawer open?" --scene D
    openhelix probe --sentences sentences.json --scene D --json
    openhelix probe --places 1500 --scene ABC
    openhelix probe --recording outputs/latest --out outputs/explained

With `--ask QUESTION` it answers in words (`asking`), with `--sentences FILE` it names every
sentence of a list by its task (`naming`), with `--places N` it says how precisely its states tell where a
block is (`placing`), with `--recording` or `--run` it explains the latents of a
recording or of a robot that runs (`explaining`), otherwise it lists the words nearest to its latent
(`openhelix.system2.probe`). Each has its own `--help`.
"""

from __future__ import annotations

from collections.abc import Sequence

from openhelix.benchmarks.evaluation import asking, explaining, naming, placing
from openhelix.runtime.cli.arguments import fitted
from openhelix.runtime.core.config import ConfigError
from openhelix.runtime.core.output import answer
from openhelix.system2 import probe

WAYS = ("--recording", "--run", "--ask", "--sentences", "--places")


def main(argv: Sequence[str]) -> int:
    """Inspect System 2: its nearest words, answers, tasks, places.

    Raises:
        ValueError: bad input, in one line.
    """
    given = {word.partition("=")[0] for word in argv}
    if given & {"-h", "--help"}:
        answer(f"{fitted(__doc__ or '')}\n")  # the ways, before the help of the one asked for
    ways = [way for way in WAYS if way in given]
    if given & {"--recording", "--run"} and "--ask" in ways:
        ways.remove("--ask")  # of its latents
    if len(ways) > 1:
        raise ConfigError(f"{ways[0]} and {ways[1]} exclude each other; say one of them")
    if given & {"--recording", "--run"}:
        return explaining.main(argv)
    if "--ask" in given:
        return asking.main(argv)
    if "--sentences" in given:
        return naming.main(argv)
    if "--places" in given:
        return placing.main(argv)
    return probe.main(argv)
