"""Windows: which stretches of a text the backbone sees at once while a text is read."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch

from .sentences_karla import sentence_age


class Window(NamedTuple):
    """A stretch of a text that the backbone sees at once.

    Attributes:
        text: index of the text.
        start: first token shown.
        keep: first token whose hidden state is used.
        end: one past the last token shown.
    """

    text: int
    start: int
    keep: int
    end: int


def sentence_starts(ids: torch.Tensor, boundaries: torch.Tensor, least: int) -> list[int]:
    """Where the sentences of a text begin; a short one is joined with the next.

    Args:
        ids: [N] int64 token ids.
        boundaries: [V] uint8, see `sentence_boundaries`.
        least: tokens from one start to the next.

    Returns:
        Ascending, 0 first.
    """
    starts = [0]
    for start in (sentence_age(ids[None].numpy(), boundaries.numpy())[0] == 0).nonzero()[0].tolist():
        if start - starts[-1] >= least:
            starts.append(start)
    return starts


def plan_windows(lengths: list[int], window: int, stride: int, starts: list[list[int]] | None = None) -> list[Window]:
    """Cover texts by windows so that every token but the last of a text is used exactly once.

    The first window of a sentence is used whole, every other for its last `stride` tokens.

    Args:
        lengths: tokens of every text.
        window: most tokens shown at once, >= 2.
        stride: tokens that a window moves on by where a sentence is longer, 1 to `window`.
        starts: of every text, the tokens at which a sentence begins, 0 first; windows do not look back beyond one. None
            takes every text for one sentence.

    Returns:
        The windows, in reading order.

    Example:
        >>> [tuple(w) for w in plan_windows([9], window=4, stride=2)]
        [(0, 0, 0, 4), (0, 2, 4, 6), (0, 4, 6, 8)]
        >>> [tuple(w) for w in plan_windows([9], window=4, stride=2, starts=[[0, 3]])]
        [(0, 0, 0, 3), (0, 3, 3, 7), (0, 4, 7, 8)]
    """
    windows = []
    for text, length in enumerate(lengths):
        usable = length - 1  # the last token has no successor
        begins = [start for start in (starts[text] if starts else [0]) if start < usable]
        for first, last in itertools.pairwise([*begins, usable]):
            end = min(first + window, last)
            windows.append(Window(text, first, first, end))
            while end < last:
                keep, end = end, min(end + stride, last)
                windows.append(Window(text, max(first, end - window), keep, end))
    return windows
