"""Reading: texts become windows, windows become hidden states, hidden states are written into a pack.

Closed-book reading shows the backbone each sentence alone, so that what is surprising is what the model would not know
without the document, and a sentence is learned as it will be asked for. Addresses always see the text as it stands.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from transformers.utils import logging

from .engram_karla import Engram
from .hashing_karla import name_positions
from .levels_karla import Pack
from .ranks_karla import Ranks
from .sentences_karla import NO_TOKEN
from .windows_karla import Window, plan_windows, sentence_starts
from .writing_karla import write_chunk


GROUP_TOKENS = 4096  # tokens whose windows are sorted by length together


class ReadReport(NamedTuple):
    """What one call of `read` did.

    Attributes:
        texts: number of texts.
        tokens: tokens read.
        positions_written: positions whose next token had been unlikely.
        rows_written: change in the names of the pack that have a row.
        rows_lost: names that found no row, because the pack is full and may not grow.
        load: names of the pack that have a row over all rows of its slowest level.
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


class _Batch(NamedTuple):
    """One call of the backbone."""

    input_ids: torch.Tensor  # [B, W]
    attention_mask: torch.Tensor  # [B, W]
    used: torch.Tensor  # [B, W] bool


class _Group(NamedTuple):
    """Windows that follow each other, in batches of like lengths so that little is padded."""

    batches: list[_Batch]
    order: torch.Tensor  # [P] which of the states that the batches give is that of each position
    names: torch.Tensor  # [P, F]
    targets: torch.Tensor  # [P]


def _groups(texts: list[torch.Tensor], windows: list[Window], engram: Engram, batch_tokens: int) -> Iterator[_Group]:
    named: dict[int, torch.Tensor] = {}
    at = 0
    while at < len(windows):
        first, shown = at, 0
        while at < len(windows) and shown < GROUP_TOKENS:
            shown += windows[at].end - windows[at].start
            at += 1
        group = windows[first:at]
        for w in group:
            if w.text not in named:
                named = {**{text: named[text] for text in named if text >= group[0].text},
                         w.text: _name_text(texts[w.text], engram)}  # fmt: skip
        by_length = sorted(range(len(group)), key=lambda i: group[i].end - group[i].start)
        counts = [group[i].end - group[i].keep for i in by_length]
        starts = dict(zip(by_length, itertools.accumulate(counts, initial=0), strict=False))
        order = [torch.arange(starts[i], starts[i] + w.end - w.keep) for i, w in enumerate(group)]
        yield _Group(
            [_batch(texts, [group[i] for i in part]) for part in _parts(by_length, group, batch_tokens)],
            torch.cat(order),
            torch.cat([named[w.text][w.keep : w.end] for w in group]),
            torch.cat([texts[w.text][w.keep + 1 : w.end + 1] for w in group]),
        )


def _parts(by_length: list[int], group: list[Window], batch_tokens: int) -> Iterator[list[int]]:
    part: list[int] = []
    for i in by_length:
        if part and (len(part) + 1) * (group[i].end - group[i].start) > batch_tokens:
            yield part
            part = []
        part.append(i)
    yield part


def _batch(texts: list[torch.Tensor], windows: list[Window]) -> _Batch:
    ids = torch.zeros(len(windows), max(w.end - w.start for w in windows), dtype=torch.int64)
    mask, used = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    for row, w in enumerate(windows):
        ids[row, : w.end - w.start] = texts[w.text][w.start : w.end]
        mask[row, : w.end - w.start] = 1
        used[row, w.keep - w.start : w.end - w.start] = True
    return _Batch(ids, mask, used)


def _name_text(ids: torch.Tensor, engram: Engram) -> torch.Tensor:
    history = torch.nn.functional.pad(engram.history_ids(ids[None]), (engram.history, 0), value=NO_TOKEN)
    return name_positions(history, engram.families, engram.constants)[0]


_HiddenStates = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
_Positions = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # names [P, F], hidden states [P, D], targets [P]


def _positions(
    groups: Iterator[_Group],
    hidden_states: _HiddenStates,
    nothing: torch.Tensor,
    ranks: Ranks,
    on_shown: Callable[[int], object],
) -> Iterator[_Positions]:
    """The positions of each group, in reading order. Of as many groups as processes, each process runs some batches.

    `on_shown` gets the number of positions after each batch that this process runs.
    """

    def run(batch: _Batch) -> torch.Tensor:
        shown = hidden_states(batch.input_ids, batch.attention_mask)
        on_shown(int(batch.used.sum()))
        return shown[batch.used.to(shown.device)]

    while together := list(itertools.islice(groups, ranks.size)):
        batches = [batch for group in together for batch in group.batches]
        states = ranks.map(run, batches, [int(batch.used.sum()) for batch in batches], nothing)
        for group, own in zip(together, states.split([len(group.targets) for group in together]), strict=True):
            yield group.names, own[group.order.to(own.device)], group.targets.to(own.device)


def _chunks(positions: Iterator[_Positions], size: int) -> Iterator[_Positions]:
    """The same in chunks of `size` positions, wherever the groups end."""
    waiting: list[_Positions] = []
    for fresh in positions:
        waiting.append(fresh)
        names, states, targets = map(torch.cat, zip(*waiting, strict=True))
        whole = len(targets) - len(targets) % size
        for at in range(0, whole, size):
            yield names[at : at + size], states[at : at + size], targets[at : at + size]
        waiting = [(names[whole:], states[whole:], targets[whole:])]
    if waiting and len(waiting[0][2]):
        yield waiting[0]


def read_texts(
    texts: list[torch.Tensor],
    engram: Engram,
    pack: Pack,
    hidden_states: _HiddenStates,
    output_embeddings: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    window: int = 64,
    stride: int = 48,
    least: int | None = 8,
    batch_tokens: int = 256,
    sign: int = 1,
    after_text: Callable[[int], None] | None = None,
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
        window: most tokens shown to the backbone at once.
        stride: tokens a window moves on by.
        least: tokens that a sentence has at least, each being shown alone; None shows texts without regard to sentences.
        batch_tokens: tokens per forward pass of the backbone; fewer mean less padding, more keep a GPU busy.
        sign: 1 to learn the texts, -1 to unlearn them.
        after_text: called with the number of each text, in order, at the end of the chunk in which it ends.
        progress: whether to show a progress bar.

    Returns:
        The report. Several processes (`engram.ranks`) divide the work; what they write and report is as of one.

    Raises:
        ValueError: if the processes were given different texts.
    """
    started, ranks = time.perf_counter(), engram.ranks
    packs = [(name, other is pack, other.clock.step) for name, other in engram.packs.items()]
    ranks.check_same([text.tolist() for text in texts], packs, window, stride, least, batch_tokens, sign)
    counted = pack.count()
    starts = None if least is None else [sentence_starts(text, engram.constants.boundaries, least) for text in texts]
    windows = plan_windows([len(text) for text in texts], window, stride, starts)
    tokens = sum(len(text) for text in texts)
    before, after, written = [], [], 0
    ends, finished, read = list(itertools.accumulate(len(text) - 1 for text in texts)), 0, 0
    mean = output_embeddings.mean(0)
    groups = _groups(texts, windows, engram, batch_tokens)
    shown = 0

    def show(count: int) -> None:
        nonlocal shown
        count = min(count * ranks.size, tokens - shown)
        shown += count
        bar.update(count)

    # counts what the backbone has seen: a whole group's states are made before its first chunk is written, and take longer
    with logging.tqdm(total=tokens, unit="tok", desc="reading", disable=not progress or ranks.rank > 0) as bar:
        positions = _positions(groups, hidden_states, output_embeddings[:0], ranks, show)
        for names, states, targets in _chunks(positions, engram.layout.chunk_size):
            result = write_chunk(
                engram, pack, names, states, targets, output_embeddings, bias, sign=sign, mean_embedding=mean
            )
            pack.tick()
            read += len(targets)
            while after_text is not None and finished < len(texts) and ends[finished] <= read:
                after_text(finished)
                finished += 1
            before.append(result.surprise_before)
            after.append(result.surprise_after)
            written += int(result.written.sum())
        show(tokens - shown)
    pack.tokens += tokens
    rows = pack.count()
    seconds = float(ranks.gather_numbers([time.perf_counter() - started]).max())
    return ReadReport(
        texts=len(texts),
        tokens=tokens,
        positions_written=written,
        rows_written=rows.owned - counted.owned,
        rows_lost=rows.lost - counted.lost,
        load=rows.owned / rows.rows,
        surprise_before=float(torch.cat(before).mean()),
        surprise_after=float(torch.cat(after).mean()),
        seconds=seconds,
        tokens_per_second=tokens / seconds,
    )
