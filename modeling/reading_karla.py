"""Reading: texts become windows, windows become hidden states, hidden states are written into a pack.

Closed-book reading shows the backbone only short, overlapping windows, so that what is surprising is what the model would
not know without the document. The n-gram history is never cut at a window: addresses always see the text as it stands.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from transformers.utils import logging

from .engram_karla import Engram, Pack
from .hashing_karla import NO_TOKEN, name_positions
from .writing_karla import write_chunk


class ReadReport(NamedTuple):
    """What one call of `read` did.

    Attributes:
        texts: number of texts.
        tokens: tokens read.
        positions_written: positions whose next token had been unlikely.
        rows_written: change in the rows of the pack that have a name.
        rows_lost: names that found no row, because the pack is full and may not grow.
        load: owned rows over all rows of the pack's slowest level, 0 to 1.
        surprise_before: mean -log p of the next token before the write, in nats.
        surprise_after: the same right after the write.
        seconds: wall time.
        tokens_per_second: tokens / seconds.
    """

    texts: int
    tokens: int
    positions_written: int
    rows_written: int
    rows_lost: int
    load: float
    surprise_before: float
    surprise_after: float
    seconds: float
    tokens_per_second: float


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


def plan_windows(lengths: list[int], window: int, stride: int) -> list[Window]:
    """Cover texts by overlapping windows so that every token but the last of a text is used exactly once.

    The first window of a text is used whole, every other for its last `stride` tokens.

    Args:
        lengths: tokens of every text.
        window: tokens shown at once, >= 2.
        stride: tokens a window moves on by, 1 to `window`.

    Returns:
        The windows, in reading order.

    Example:
        >>> [tuple(w) for w in plan_windows([9], window=4, stride=2)]
        [(0, 0, 0, 4), (0, 2, 4, 6), (0, 4, 6, 8)]
    """
    windows = []
    for text, length in enumerate(lengths):
        usable = length - 1  # the last token has no successor
        end = min(window, usable)
        windows.append(Window(text, 0, 0, end))
        while end < usable:
            keep, end = end, min(end + stride, usable)
            windows.append(Window(text, max(0, end - window), keep, end))
    return windows


class _Batch(NamedTuple):
    input_ids: torch.Tensor  # [B, W]
    attention_mask: torch.Tensor  # [B, W]
    used: torch.Tensor  # [B, W] bool
    targets: torch.Tensor  # [P]
    names: torch.Tensor  # [P, F]


def _batches(texts: list[torch.Tensor], windows: list[Window], engram: Engram, per_batch: int) -> Iterator[_Batch]:
    named: dict[int, torch.Tensor] = {}
    for first in range(0, len(windows), per_batch):
        group = windows[first : first + per_batch]
        width = max(w.end - w.start for w in group)
        ids = torch.zeros(len(group), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        used = torch.zeros_like(ids, dtype=torch.bool)
        targets, names = [], []
        for row, w in enumerate(group):
            if w.text not in named:
                named = {w.text: _name_text(texts[w.text], engram)}
            ids[row, : w.end - w.start] = texts[w.text][w.start : w.end]
            mask[row, : w.end - w.start] = 1
            used[row, w.keep - w.start : w.end - w.start] = True
            targets.append(texts[w.text][w.keep + 1 : w.end + 1])
            names.append(named[w.text][w.keep : w.end])
        yield _Batch(ids, mask, used, torch.cat(targets), torch.cat(names))


def _name_text(ids: torch.Tensor, engram: Engram) -> torch.Tensor:
    history = torch.nn.functional.pad(engram.history_ids(ids[None]), (engram.history, 0), value=NO_TOKEN)
    return name_positions(history, engram.families, engram.constants)[0]


def _chunks(
    batches: Iterator[_Batch], hidden_states: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], size: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Names [P, F], hidden states [P, D] and targets [P] in chunks of `size` positions, wherever the batches end."""
    waiting: list[tuple[torch.Tensor, ...]] = []
    for batch in batches:
        states = hidden_states(batch.input_ids, batch.attention_mask)
        fresh = (batch.names, states[batch.used.to(states.device)], batch.targets.to(states.device))
        waiting = [tuple(map(torch.cat, zip(*waiting, fresh, strict=True)))] if waiting else [fresh]
        names, states, targets = waiting.pop()
        whole = len(targets) - len(targets) % size
        for at in range(0, whole, size):
            yield names[at : at + size], states[at : at + size], targets[at : at + size]
        if whole < len(targets):
            waiting = [(names[whole:], states[whole:], targets[whole:])]
    if waiting:
        names, states, targets = waiting.pop()
        yield names, states, targets


def read_texts(
    texts: list[torch.Tensor],
    engram: Engram,
    pack: Pack,
    hidden_states: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    output_embeddings: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    window: int = 32,
    stride: int = 16,
    batch_tokens: int = 1024,
    sign: int = 1,
    progress: bool = True,
) -> ReadReport:
    """Write texts into a pack, in order, in one pass.

    Args:
        texts: token ids of every text, each [N] int64 with N >= 2.
        engram: the memory; its layout says how many positions are written together.
        pack: the pack that is written (modified in place).
        hidden_states: maps input ids and attention mask, both [B, W] int64, to final hidden states [B, W, D] without
            the memory.
        output_embeddings: [V, D] scaled rows of the output layer.
        bias: [V] of the output layer, or None.
        window: tokens shown to the backbone at once.
        stride: tokens a window moves on by.
        batch_tokens: tokens per forward pass of the backbone.
        sign: 1 to learn the texts, -1 to unlearn them.
        progress: whether to show a progress bar.

    Returns:
        The report.
    """
    started = time.perf_counter()
    rows_before, lost_before = pack.num_owned, pack.num_lost
    windows = plan_windows([len(text) for text in texts], window, stride)
    tokens = sum(len(text) for text in texts)
    before, after, written = [], [], 0
    batches = _batches(texts, windows, engram, max(1, batch_tokens // window))
    with logging.tqdm(total=tokens, unit="tok", desc="reading", disable=not progress) as bar:
        for names, states, targets in _chunks(batches, hidden_states, engram.layout.chunk_size):
            result = write_chunk(engram, pack, names, states, targets, output_embeddings, bias, sign=sign)
            pack.tick()
            before.append(result.surprise_before)
            after.append(result.surprise_after)
            written += int(result.written.sum())
            bar.update(len(targets))
        bar.update(tokens - bar.n)
    pack.tokens += tokens
    seconds = time.perf_counter() - started
    return ReadReport(
        texts=len(texts),
        tokens=tokens,
        positions_written=written,
        rows_written=pack.num_owned - rows_before,
        rows_lost=pack.num_lost - lost_before,
        load=pack.load,
        surprise_before=float(torch.cat(before).mean()),
        surprise_after=float(torch.cat(after).mean()),
        seconds=seconds,
        tokens_per_second=tokens / seconds,
    )
