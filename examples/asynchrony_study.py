"""What does an older latent cost? Success against the steps from one latent to the next.

    python examples/asynchrony_study.py [EPISODES] [STEPS] [INTERVAL ...]

In lockstep a latent is as old as one says, whatever the machine. `openhelix sweep` does the same for
a whole grid of intervals and latencies, resumably and on several cores.
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

import openhelix


def main(episodes: int = 3, steps: int = 60, *intervals: int) -> Path:
    intervals = intervals or (2, 30, 60)
    scores = []
    for interval in intervals:
        result = openhelix.evaluate(
            tasks=["open_drawer", "turn_on_led", "lift_red_block_table"],
            episodes_per_task=episodes,
            steps=steps,
            interval=interval,
        )
        scores.append(result.score)
        print(f"a latent every {interval} steps: {result.score}")
    figure, axes = plt.subplots(figsize=(5, 3.2), layout="constrained")
    rates = [100 * score.value for score in scores]
    below = [100 * (score.value - score.low) for score in scores]
    above = [100 * (score.high - score.value) for score in scores]
    seconds = [interval / 30 for interval in intervals]
    axes.errorbar(seconds, rates, yerr=[below, above], marker="o", capsize=3)
    axes.set(
        xlabel="time from one latent to the next (s)",
        ylabel=f"success (%), n = {scores[0].n} each",
        ylim=(0, 100),
        title="bars: 95 % Wilson intervals",
    )
    out = Path("asynchrony.png")
    figure.savefig(out, dpi=150)
    print(out)
    return out


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
