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

from .engram_karla import Engram, EngramTable
from .hashing_karla import NO_TOKEN, Names, name_positions
from .writing_karla import write_chunk


class ReadReport(NamedTuple):
    """What one call of `read` did.

    Attributes:
        texts: number of texts.
        tokens: tokens read.
        positions_written: positions whose next token had been unlikely.
        rows_written: rows of the pack that belong to a name and did not before.
        load: owned rows over all rows of the pack, 0 to 1.
        surprise_before: mean -log p of the next token before the write, in nats.
        surprise_after: the same right after the write.
        seconds: wall time.
        tokens_per_second: tokens / seconds.
    """

    texts: int
    tokens: int
    positions_written: int
    rows_written: int
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
    names: Names  # of P positions


def _batches(texts: list[torch.Tensor], windows: list[Window], engram: Engram, per_batch: int) -> Iterator[_Batch]:
    named: dict[int, Names] = {}
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
            names.append(named[w.text].select(slice(w.keep, w.end)))
        rows, prints = (torch.cat(part) for part in zip(*names, strict=True))
        yield _Batch(ids, mask, used, torch.cat(targets), Names(rows, prints))


def _name_text(ids: torch.Tensor, engram: Engram) -> Names:
    history = torch.nn.functional.pad(engram.compress(ids[None]), (engram.history, 0), value=NO_TOKEN)
    return name_positions(history, engram.families, engram.constants).select(0)


def read_texts(
    texts: list[torch.Tensor],
    engram: Engram,
    table: EngramTable,
    hidden_states: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    output_embeddings: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    window: int = 32,
    stride: int = 16,
    chunk: int = 256,
    batch_tokens: int = 1024,
    progress: bool = True,
) -> ReadReport:
    """Write texts into a pack, in order, in one pass.

    Args:
        texts: token ids of every text, each [N] int64 with N >= 2.
        engram: the memory.
        table: the pack that is written (modified in place).
        hidden_states: maps input ids and attention mask, both [B, W] int64, to final hidden states [B, W, D] without
            the memory.
        output_embeddings: [V, D] scaled rows of the output layer.
        bias: [V] of the output layer, or None.
        window: tokens shown to the backbone at once.
        stride: tokens a window moves on by.
        chunk: positions written together; reads within a chunk see the table as it was before.
        batch_tokens: tokens per forward pass of the backbone.
        progress: whether to show a progress bar.

    Returns:
        The report.
    """
    started = time.perf_counter()
    rows_before = table.num_owned
    windows = plan_windows([len(text) for text in texts], window, stride)
    tokens = sum(len(text) for text in texts)
    before, after, written = [], [], 0
    bar = logging.tqdm(total=tokens, unit="tok", desc="reading", disable=not progress)
    for batch in _batches(texts, windows, engram, max(1, batch_tokens // window)):
        states = hidden_states(batch.input_ids, batch.attention_mask)
        states = states[batch.used.to(states.device)]
        for at in range(0, len(states), chunk):
            part = slice(at, at + chunk)
            targets = batch.targets[part].to(states.device)
            result = write_chunk(
                engram, table, batch.names.select(part), states[part], targets, output_embeddings, bias
            )
            before.append(result.surprise_before)
            after.append(result.surprise_after)
            written += int(result.written.sum())
        bar.update(len(states))
    bar.update(tokens - bar.n)
    bar.close()
    seconds = time.perf_counter() - started
    rows = table.num_owned
    return ReadReport(
        texts=len(texts),
        tokens=tokens,
        positions_written=written,
        rows_written=rows - rows_before,
        load=rows / len(table.owners),
        surprise_before=float(torch.cat(before).mean()),
        surprise_after=float(torch.cat(after).mean()),
        seconds=seconds,
        tokens_per_second=tokens / seconds,
    )
