"""What POPE's demonstration found, as a table and as a figure."""

from __future__ import annotations

from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console

from karla_hf.pope_demo_arms import ARMS, GRPO, MIX, POPE, SFT
from karla_hf.pope_demo_problems import DemoArguments
from karla_hf.report import new_table


BASE = "base"
METRICS = ("pass@1", "pass@16", "easy", "zero_gradient", "zero_groups", "rollouts", "seconds", "cpu_seconds")
HEADINGS = ("held-out hard: pass@1", "pass@16", "easy: pass@1", "steps without gradient", "seconds")
SHOWN = ("pass@1", "pass@16", "easy", "zero_gradient", "seconds")
COLOURS = {GRPO: "#9aa5b1", POPE: "#1f6f78", MIX: "#d9822b", SFT: "#8a5fbf"}


class Job(NamedTuple):
    """What one process does at a time.

    Attributes:
        name: `BASE` for what the arms share, or an arm.
        right: the base's share of right `AB` steps.
        seed: of the run.
    """

    name: str
    right: float
    seed: int


def collect(found: dict[Job, dict[str, Any]], options: DemoArguments) -> dict[str, Any]:
    """Put the results of all jobs in order.

    Args:
        found: by job, what `prepare` and `run_arm` returned.
        options: the demonstration.

    Returns:
        `arms`: by arm and metric, a value per seed; `base`: what was measured of each base; `expected`: how many successes
        of the base are expected within the rollouts of one arm; `sweep`: by share `right`, the same three; `curves`: by
        arm, the curve of each seed.
    """
    seeds = range(options.seeds)
    arms = (BASE, *ARMS)
    curves = {arm: [found[Job(arm, options.right, seed)]["curve"] for seed in seeds] for arm in ARMS}
    rights = [options.right, *(options.sweep or [])]
    return {
        **_at(options.right, seeds, arms, found, options),
        "sweep": {
            f"{right:g}": _at(right, seeds if right == options.right else range(1), (BASE, GRPO, POPE), found, options)
            for right in rights
        },
        "curves": curves,
    }


def _at(
    right: float, seeds: range, arms: tuple[str, ...], found: dict[Job, dict[str, Any]], options: DemoArguments
) -> dict[str, Any]:
    rows = {arm: [found[Job(arm, right, seed)] for seed in seeds] for arm in arms}
    budget = mean(row["rollouts"] for row in rows[GRPO])
    return {
        "arms": {
            arm: {key: [row[key] for row in own] for key in METRICS if key in own[0]} for arm, own in rows.items()
        },
        "base": {key: [row[key] for row in rows[BASE]] for key in rows[BASE][0] if key not in METRICS},
        "expected": {
            "rollouts": budget,
            "by right": budget * right**options.rare,
            "by probability": [budget * row["trace"] for row in rows[BASE]],
            "by samples": [budget * row["pass@1"] for row in rows[BASE]],
        },
    }


def describe(job: Job, result: dict[str, Any]) -> str:
    """One line about a job that has ended."""
    measured = ", ".join(f"{key} {result[key]:.3f}" for key in ("pass@1", "pass@16", "easy") if key in result)
    return f"right {job.right:g}, seed {job.seed}, {job.name}: {measured}"


def table_rows(results: dict[str, Any]) -> list[list[str]]:
    """Per arm its name and `SHOWN`, each as mean and spread over the seeds."""
    return [
        [arm, *(spread(values[key], digits=0 if key == "seconds" else 3) if key in values else "" for key in SHOWN)]
        for arm, values in results["arms"].items()
    ]


def spread(values: list[float], digits: int = 3) -> str:
    """Mean and standard deviation over seeds.

    Example:
        >>> spread([0.5, 0.75]), spread([0.5])
        ('0.625 ± 0.177', '0.500')
    """
    deviation = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{deviation}"


def sentence(results: dict[str, Any]) -> str:
    """How many successes of the base the budget lets expect."""
    expected, settings = results["expected"], results["settings"]
    return (
        f"Expected successes of the base within the {expected['rollouts']:,.0f} rollouts of one arm: "
        f"{expected['by right']:.1e} ({settings['right']:g}^{settings['rare']} times the rollouts), "
        f"{mean(expected['by probability']):.1e} (its own probabilities of right traces), "
        f"{mean(expected['by samples']):.2f} (sampled, {settings['num_samples']} per held-out problem)."
    )


def markdown_table(results: dict[str, Any]) -> str:
    """The table and what is expected of the base, as Markdown."""
    lines = [["arm", *HEADINGS], ["---"] * (len(HEADINGS) + 1), *table_rows(results)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + f"\n\n{sentence(results)}\n"


def show(results: dict[str, Any], console: Console) -> None:
    """Print the table."""
    number = len(results["arms"][GRPO]["pass@1"])
    title = f"Without help, mean ± standard deviation of {number} seeds" if number > 1 else "Without help, one seed"
    table = new_table(["arm", *HEADINGS], title=title)
    for row in table_rows(results):
        table.add_row(*row)
    console.print(table)
    console.print(sentence(results), highlight=False)
    console.print(
        f"{results['seconds']:.0f} s on the clock, {results['cpu_seconds']:.0f} s of CPU time, {results['processes']} processes"
    )


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw held-out accuracy and groups without gradient over steps, and the result over the base's share `right`.

    Args:
        results: as `collect` returns them.
        path: the PNG file.
    """
    rights = [float(right) for right in results["sweep"]]
    panels = 3 if len(rights) > 1 else 2
    figure = Figure(figsize=(4 * panels, 3.6), layout="constrained")
    learning, silent, *rest = figure.subplots(1, panels)
    for arm, curves in results["curves"].items():
        _band(learning, [curve["held_out"] for curve in curves], arm)
        _band(silent, [_smooth(curve["frac_reward_zero_std"]) for curve in curves], arm)
    learning.set_title("held-out hard programs, pass@1 without help", fontsize=10)
    silent.set_title("share of groups without gradient, mean of 10 steps", fontsize=10)
    for axes in (learning, silent):
        axes.set_xlabel("step")
    for axes in rest:
        for arm in (GRPO, POPE):
            found = [entry["arms"][arm] for entry in results["sweep"].values()]
            for key, style in (("pass@1", "o-"), ("pass@16", "s:")):
                means = [mean(values[key]) for values in found]
                axes.plot(rights, means, style, color=COLOURS[arm], label=f"{arm}, {key}")
        axes.set_xlabel("share of right AB steps in the base's data")
        axes.set_title("held-out hard programs after training", fontsize=10)
    for axes in (learning, silent, *rest):
        axes.set_ylim(-0.03, 1.03)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in (learning, *rest):
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


def _band(axes: Axes, curves: list[list[list[float]]], arm: str) -> None:
    """The mean of several curves as a line, their range as a band."""
    steps = [step for step, _ in curves[0]]
    columns = list(zip(*([value for _, value in curve] for curve in curves), strict=True))
    axes.plot(steps, [mean(column) for column in columns], color=COLOURS[arm], label=arm)
    axes.fill_between(steps, [min(column) for column in columns], [max(column) for column in columns],
                      color=COLOURS[arm], alpha=0.15, linewidth=0)  # fmt: skip


def _smooth(curve: list[list[float]], width: int = 10) -> list[list[float]]:
    values = [value for _, value in curve]
    return [[step, mean(values[max(0, i - width + 1) : i + 1])] for i, (step, _) in enumerate(curve)]
