"""Figures of measured results, written as PNG files."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure


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
