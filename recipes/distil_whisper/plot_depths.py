"""Error rate of students over their size and over their speed, with the Pareto front.

Launch: python recipes/distil_whisper/plot_depths.py exp/distil_whisper/barista-layers* [--output FILE]
Runs of one depth and several seeds are one point, their mean, with the range of the error rates.
"""

import argparse
import statistics
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tabulate_results import Group, group_measures, read_results

from speechkd.files import atomic_write

DEFAULT_OUTPUT = Path(__file__).with_name("depths.png")


def pareto_front(costs: list[float], error_rates: list[float]) -> list[int]:
    """Positions that no other point beats in one and equals in the other, from the cheapest on; low is good in both."""
    front: list[int] = []
    for index in sorted(range(len(costs)), key=lambda index: (costs[index], error_rates[index])):
        if not front or error_rates[index] < error_rates[front[-1]]:
            front.append(index)
    return front


def plot_depths(groups: list[Group], path: Path) -> None:
    """Draw the groups of `group_measures`: WER over parameters and over RTFx."""
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    over_size, over_speed = figure.subplots(1, 2, sharey=True)
    _panel(over_size, groups, "parameters", 1e-6, higher_is_better=False)
    over_size.set_xlabel("parameters (millions)")
    over_size.set_ylabel("word error rate (%)")
    _panel(over_speed, groups, "rtfx", 1.0, higher_is_better=True)
    over_speed.set_xlabel("RTFx (seconds of audio a second)")
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _panel(axes: Axes, groups: list[Group], key: str, scale: float, *, higher_is_better: bool) -> None:
    x = [statistics.mean(run[key] * scale for run in runs) for _, runs in groups]
    rates = [[run["wer"] for run in runs] for _, runs in groups]
    means = [statistics.mean(of_group) for of_group in rates]
    below = [mean - min(of_group) for mean, of_group in zip(means, rates, strict=True)]
    above = [max(of_group) - mean for mean, of_group in zip(means, rates, strict=True)]
    axes.errorbar(x, means, yerr=[below, above], fmt="o", capsize=3)
    front = pareto_front([-value for value in x] if higher_is_better else x, means)
    axes.step(
        [x[index] for index in front], [means[index] for index in front], where="post", linestyle="--", linewidth=1
    )
    for (name, _), value, mean in zip(groups, x, means, strict=True):
        axes.annotate(name, (value, mean), textcoords="offset points", xytext=(6, 6))
    axes.margins(0.2)
    axes.grid(alpha=0.3)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Pareto plot of students of several depths.")
    parser.add_argument("runs", nargs="+", type=Path, help="run folders of students with different decoder layers")
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, help="PNG file")
    parser.add_argument("--bench", type=Path, help="output of `speechkd bench --json`, whose RTFx is drawn")
    arguments = parser.parse_args(argv)
    results = read_results(arguments.runs, arguments.bench)
    plot_depths(group_measures(arguments.runs, results, "layers"), arguments.output)
    print(arguments.output)


if __name__ == "__main__":
    main()
