"""Figures of measured results, written as PNG files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isnan, log2
from pathlib import Path

from matplotlib.figure import Figure

from karla_hf.grokking import State


_GREY, _TEAL, _RED, _ORANGE = "#9aa5b1", "#1f6f78", "#d1495b", "#d9822b"
# Titles of panels; in each, the keys of a trainer's log with label and colour.
_CURVES = {
    "loss, nats per token": {
        "loss": ("training", _GREY), "eval_loss": ("held out", _TEAL), "eval_train_loss": ("training rows", _ORANGE),
        "eval_val_loss": ("held out", _TEAL),
    },
    "learning rate": {"learning_rate": ("learning rate", _TEAL)},
    "ticks": {"ticks": ("of the probe", _TEAL), "expected_ticks": ("calibrated", _RED)},
    "certainty": {"certainty": ("certainty", _TEAL)},
    "correct completions": {"guided/accuracy": ("guided", _ORANGE), "unguided/accuracy": ("unguided", _TEAL)},
    "reward": {"reward": ("reward", _TEAL)},
    "groups without a gradient": {"frac_reward_zero_std": ("share", _TEAL)},
    "weight norm": {"grokking/weight_norm": ("weight norm", _TEAL)},
    "grokking": {"grokking/state": ("state", _TEAL)},
    "memory rows": {"memory_rows": ("rows", _TEAL)},
    "memory writes": {"memory_writes": ("positions", _TEAL)},
    "surprise of what is read": {"surprise_before": ("before", _GREY), "surprise_after": ("after", _TEAL)},
}  # fmt: skip


def draw_before_after(measured: dict, path: Path) -> None:
    """Draw what a reading changed: recalled facts and three perplexities, before and after.

    Args:
        measured: has `facts`, and `recall_`, `reread_`, `related_`, `unrelated_` each with `before` and `after`.
        path: the PNG file.
    """
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    recall, perplexity = figure.subplots(1, 2, width_ratios=(1, 2.4))
    colours = ("#9aa5b1", "#1f6f78")
    bars = recall.bar(("before", "after"), (measured["recall_before"], measured["recall_after"]), color=colours)
    recall.bar_label(bars)
    recall.set_ylim(0, measured["facts"] * 1.12)
    recall.set_title(f"facts recalled, of {measured['facts']}")
    texts = ("reread", "related", "unrelated")
    for side, (when, colour) in enumerate(zip(("before", "after"), colours, strict=True)):
        values = [measured[f"{text}_{when}"] for text in texts]
        bars = perplexity.bar([x + 0.38 * side for x in range(len(texts))], values, 0.36, label=when, color=colour)
        perplexity.bar_label(bars, fmt="%.2f")
    perplexity.set_xticks([x + 0.19 for x in range(len(texts))], ("the document read", "a related one", "unrelated"))
    perplexity.set_title("perplexity (lower is better)")
    perplexity.legend(frameon=False)
    for axes in (recall, perplexity):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def draw_baselines(rows: dict[str, dict[str, float]], facts: int, path: Path) -> None:
    """Draw methods side by side: recall, two perplexities, CPU seconds to learn.

    Args:
        rows: by method, with `recall`, `re-read`, `unrelated` and `seconds`.
        facts: how many were asked.
        path: the PNG file.
    """
    figure = Figure(figsize=(11, 0.7 + 0.42 * len(rows)), layout="constrained")
    titles = {
        "recall": f"facts recalled, of {facts}",
        "re-read": "perplexity, document read",
        "unrelated": "perplexity, unrelated story",
        "seconds": "CPU seconds to learn",
    }
    names = list(rows)
    colours = ["#1f6f78" if name.startswith("Karla") else "#9aa5b1" for name in names]
    for axes, (column, title) in zip(figure.subplots(1, len(titles), sharey=True), titles.items(), strict=True):
        bars = axes.barh(names, [rows[name][column] for name in names], color=colours)
        axes.bar_label(bars, fmt="%.0f" if column in ("recall", "seconds") else "%.2f", padding=2)
        axes.margins(x=0.3)
        axes.set_title(title, fontsize=10)
        axes.set_xticks([])
        axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.invert_yaxis()  # shared: the first method on top of every panel
    figure.savefig(path, dpi=150)


def draw_ticks(measured: dict, path: Path) -> None:
    """Draw loss and accuracy against expected ticks, for stopping by certainty and for stopping all after one tick.

    Args:
        measured: has `per_tick` and `per_threshold`, lists of dicts, and `chosen`, one of the latter or None.
        path: the PNG file.
    """
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    for axes, (name, title) in zip(
        figure.subplots(1, 2), {"loss": "loss, nats per token", "token_accuracy": "tokens right"}.items(), strict=True
    ):
        fixed, rule = measured["per_tick"], sorted(measured["per_threshold"], key=lambda entry: entry["ticks"])
        axes.plot([entry["tick"] for entry in fixed], [entry[name] for entry in fixed], "o-", color="#9aa5b1",
                  markersize=4, label="all after one tick")  # fmt: skip
        axes.plot([entry["ticks"] for entry in rule], [entry[name] for entry in rule], color="#1f6f78",
                  label="when certain")  # fmt: skip
        if measured["chosen"] is not None:
            chosen = measured["chosen"]
            axes.plot(chosen["ticks"], chosen[name], "*", color="#d1495b", markersize=12,
                      label=f"certainty {chosen['threshold']:g}")  # fmt: skip
        axes.set_xlabel("expected ticks")
        axes.set_title(title)
        axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def draw_run(histories: Mapping[str, Sequence[Mapping[str, float]]], path: Path) -> list[str]:
    """Draw what trainers logged, one panel for each kind of number that occurs, phase after phase.

    Args:
        histories: by phase, `log_history` of its trainer.
        path: the PNG file.

    Returns:
        The titles of the panels.

    Raises:
        ValueError: if nothing that is drawn was logged.
    """
    panels = {title: lines for title, lines in _CURVES.items()
              if any(key in entry for entries in histories.values() for entry in entries for key in lines)}  # fmt: skip
    if not panels:
        raise ValueError("The run has logged nothing yet; let it train longer, or log more often (`logging_steps`).")
    columns = min(3, len(panels))
    figure = Figure(figsize=(4.2 * columns, 3 * -(-len(panels) // columns)), layout="constrained")
    for axes, (title, lines) in zip(figure.subplots(-(-len(panels) // columns), columns, squeeze=False).flat, panels.items(),
                                    strict=False):  # fmt: skip
        _draw_curves(axes, histories, lines)
        axes.set_title(title, fontsize=10, pad=14)
        axes.set_xlabel("step")
        axes.spines[["top", "right"]].set_visible(False)
        axes.yaxis.get_major_formatter().set_useOffset(False)
        if title == "grokking":
            axes.set_yticks(range(len(State)), [state.value for state in State], fontsize=7)
        elif len(axes.get_legend_handles_labels()[1]) > 1:
            axes.legend(frameon=False, fontsize=8)
    for axes in figure.axes[len(panels) :]:
        axes.set_visible(False)
    figure.savefig(path, dpi=150)
    return list(panels)


def _draw_curves(axes, histories: Mapping[str, Sequence[Mapping[str, float]]], lines: Mapping[str, tuple[str, str]]):
    """Lines of a panel; phases stand side by side, a thin line between them."""
    begin, labelled = 0.0, set()
    for number, (phase, entries) in enumerate(histories.items()):
        if number:
            axes.axvline(begin, color="#d5dae0", linewidth=1, zorder=0)
        for key, (label, colour) in lines.items():
            points = [(begin + entry["step"], entry[key]) for entry in entries if _is_shown(key, entry)]
            if points:
                marker = "o" if len(points) == 1 else ""
                axes.plot(*zip(*points, strict=True), color=colour, marker=marker, markersize=3,
                          label=label if label not in labelled else "_")  # fmt: skip
                labelled.add(label)
        length = max((entry["step"] for entry in entries), default=0)
        if len(histories) > 1:
            title = axes.annotate(phase, (begin + length / 2, 1), xycoords=("data", "axes fraction"), ha="center", va="bottom",
                          fontsize=7, color="#6b7785", annotation_clip=False)  # fmt: skip
            title.set_in_layout(False)
        begin += length
    axes.set_xlim(0, begin * 1.02)


def _is_shown(key: str, entry: Mapping[str, float]) -> bool:
    """Whether a number of an entry is drawn; the loss of an entry with a reward is not in nats per token."""
    return key in entry and not (key == "loss" and "reward" in entry)


def draw_forgetting(matrices: dict[str, list[list[float]]], titles: list[str], path: Path) -> None:
    """Draw forgetting matrices as heat maps: perplexities, coloured by their ratio to the bare backbone's.

    Args:
        matrices: by method, rows of perplexities, NaN where a document was not read yet; the first one has the single
            row of the bare backbone.
        titles: of the columns.
        path: the PNG file.
    """
    names = list(matrices)
    bare = matrices[names[0]][0]
    heights = [len(matrices[name]) + 1.5 for name in names]
    figure = Figure(figsize=(1.6 + 0.95 * len(titles), 0.42 * sum(heights)), layout="constrained")
    panels = figure.subplots(len(names), 1, height_ratios=heights)
    for axes, name in zip(panels, names, strict=True):
        matrix = matrices[name]
        ratios = [[log2(value / base) for value, base in zip(row, bare, strict=True)] for row in matrix]
        image = axes.imshow(ratios, cmap="RdYlBu_r", vmin=-3, vmax=3, aspect="auto")
        for i, row in enumerate(matrix):
            for j, value in enumerate(row):
                colour = "white" if abs(ratios[i][j]) > 1.8 else "black"
                text = "" if isnan(value) else f"{value:.2f}"
                axes.text(j, i, text, ha="center", va="center", fontsize=8, color=colour)
        axes.set_xticks(range(len(titles)), titles, fontsize=8)
        labels = [f"after {title}" for title in titles[: len(matrix)]] if len(matrix) > 1 else [""]
        axes.set_yticks(range(len(matrix)), labels, fontsize=8)
        axes.set_title(f"{name}: perplexity", fontsize=10)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=list(panels), shrink=0.4, ticks=[-3, 0, 3])
    bar.ax.set_yticklabels(["1/8", "equal", "8 x"])
    bar.ax.set_title("of the bare\nbackbone's", fontsize=8)
    figure.savefig(path, dpi=150)
