"""Thinking about a sequence chunk by chunk, so that memory does not grow with its length.

Positions think on their own given keys and values, so the order of chunks changes nothing. Without gradients, keys and
values are made chunk by chunk too and live only as long as a later position may look at them. With gradients they are
made once, and with gradient checkpointing the backward pass thinks a chunk's ticks again instead of keeping them: what is
kept of a position does not grow with its ticks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch.utils.checkpoint import checkpoint

from .attention_karla import WindowBlocks, cut_blocks
from .cache_karla import KarlaCacheLayer
from .certainty_karla import Candidates, StoppingRule
from .head_karla import KarlaHead
from .sentences_karla import NO_TOKEN


CHUNK = {"cpu": 64}  # positions that think together without gradients; 256 on any other device
MEASURED_SHARE = 2  # of that, where certainty is measured: every position holds its candidates' embeddings
TRAINED_TICKS = 2560  # positions times ticks that a backward pass thinks again together


class Plan(NamedTuple):
    """How to think.

    Attributes:
        num_ticks: S.
        threshold: certainty in [0, 1] that ends a thought, or None.
        most_certain: whether the most certain tick answers.
        all_ticks: whether the deltas of all ticks are wanted; nothing ends a thought then.
        num_candidates: tokens over which certainty is measured.
        judge: gives the losses [b, n] of a chunk from its rows, columns, states [b, n, D] and deltas [S, b, n, D], or
            None. Nothing ends a thought that is judged.
    """

    num_ticks: int
    threshold: float | None
    most_certain: bool
    all_ticks: bool
    num_candidates: int
    judge: Callable[[slice, slice, torch.Tensor, torch.Tensor], torch.Tensor] | None = None

    @property
    def thinks_all(self) -> bool:
        """Whether every position thinks all ticks, and all of them are looked at."""
        return self.all_ticks or self.judge is not None

    @property
    def measures(self) -> bool:
        """Whether certainty is measured on the way."""
        return not self.thinks_all and (self.threshold is not None or self.most_certain)


class Sources(NamedTuple):
    """What keys and values are made of.

    Attributes:
        layers: backbone states of T new positions, each [B, T, D].
        position_ids: [B, T] int64.
        token_ids: [B, T] int64 on the CPU, negative at padding.
        cached: keys, values and token ids of earlier positions; takes in the new ones.
    """

    layers: list[torch.Tensor]
    position_ids: torch.Tensor
    token_ids: torch.Tensor
    cached: KarlaCacheLayer


class Thoughts(NamedTuple):
    """Answers to N positions.

    Attributes:
        state: [B, N, D] with what was thought.
        ticks_used: [B, N] int64.
        certainty: [B, N] float32, or None where nothing measured it.
        deltas: [S, B, N, D] changes after every tick, or None.
        logits: [B, N, V] the output layer's result where no position thought; None elsewhere, or if it was not computed.
        losses: [B, N] of what was judged, or None.
    """

    state: torch.Tensor
    ticks_used: torch.Tensor
    certainty: torch.Tensor | None = None
    deltas: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    losses: torch.Tensor | None = None


class _Chunk(NamedTuple):
    rows: slice  # sequences
    columns: slice  # of the positions that think
    keys_values: torch.Tensor
    valid: torch.Tensor
    position_ids: torch.Tensor


def think(
    head: KarlaHead,
    state: torch.Tensor,
    sources: Sources,
    window: int,
    plan: Plan,
    projection: tuple[torch.Tensor, torch.Tensor | None] | None = None,
) -> Thoughts:
    """Think about the last N positions.

    Args:
        head: the head.
        state: [B, N, D] what they know before thinking. Modified in place where no gradient is wanted.
        sources: of T >= N positions. What is cached is updated.
        window: positions that a position may look at, itself included.
        plan: how to think.
        projection: scaled rows [V, D] and bias of the output layer, where `plan.measures`.

    Returns:
        The answers.
    """
    layers, parts, starts = head.quantized(), [], []
    for chunk in _chunks(head, state, sources, window, plan):
        part = state[chunk.rows, chunk.columns]
        thoughts = _think_chunk(head, part, chunk, window, plan, projection, layers)
        if not torch.is_grad_enabled():  # in place, chunk by chunk: no second copy of all states
            part += thoughts.state.to(part.dtype)
            thoughts = thoughts._replace(state=part)
        parts.append(thoughts)
        starts.append(chunk.rows.start)
    across = starts.count(starts[0])

    def joined(name: str, dim: int) -> torch.Tensor | None:
        pieces = [getattr(part, name) for part in parts]
        if pieces[0] is None or len(pieces) == 1:
            return pieces[0]
        rows = [torch.cat(pieces[at : at + across], dim) for at in range(0, len(pieces), across)]
        return torch.cat(rows, dim - 1) if len(rows) > 1 else rows[0]

    new_state = state
    if torch.is_grad_enabled():
        new_state = state + joined("state", 1).to(state.dtype)
    logits = parts[0].logits if len(parts) == 1 else None
    return Thoughts(
        new_state, joined("ticks_used", 1), joined("certainty", 1), joined("deltas", 2), logits, joined("losses", 1)
    )


def _chunks(head, state, sources: Sources, window: int, plan: Plan) -> Iterator[_Chunk]:
    """Cut the positions that think into chunks, with keys and values in reach of each."""
    (batch, total), length = sources.token_ids.shape, state.shape[1]
    if torch.is_grad_enabled():
        yield from _trained_chunks(head, batch, length, sources, window, plan)
        return
    size = CHUNK.get(state.device.type, 256)
    size = max(1, size // MEASURED_SHARE) if plan.measures else size
    cached = sources.cached
    first = max(0, total - max(cached.keep + cached.slack, length + window - 1))
    cuts = [*range(first, total - length, size), *range(total - length, total, size), total]
    together = batch if total == 1 else max(1, size // min(size, total - first))
    parts = []
    for row in range(0, batch, together):
        rows = slice(row, row + together)
        layer = cached if together >= batch else cached.part(rows)
        layer.skip(first)
        parts.append(layer)
        for a, b in pairwise(cuts):
            positions = sources.position_ids[rows, a:b]
            new = torch.stack([states[rows, a:b] for states in sources.layers], dim=2)
            new = head.memory(new.to(head.memory.registers.dtype), positions)
            keys_values, ids = layer.update(new, sources.token_ids[rows, a:b])
            if b > total - length:
                columns = slice(a - total + length, b - total + length)
                yield _Chunk(rows, columns, keys_values, (ids != NO_TOKEN).to(new.device), positions)
    if parts[0] is not cached:
        cached.join(parts)


def _trained_chunks(head, batch: int, length: int, sources: Sources, window: int, plan: Plan) -> Iterator[_Chunk]:
    """The same with gradients: keys and values of all positions at once."""
    new = torch.stack(sources.layers, dim=2).to(head.memory.registers.dtype)
    keys_values, ids = sources.cached.update(head.memory(new, sources.position_ids), sources.token_ids)
    valid, positions = (ids != NO_TOKEN).to(new.device), sources.position_ids[:, -length:]
    size = max(batch * length, 1)
    if plan.measures or _checkpoints(head):
        size = max(1, TRAINED_TICKS // plan.num_ticks)
    step = length if batch * length <= size else min(length, size, max(window, size // batch))
    together, earlier = max(1, size // step), keys_values.shape[3] - length
    for row in range(0, batch, together):
        rows = slice(row, row + together)
        for a in range(0, length, step):
            b, reach = min(a + step, length), slice(max(0, a + earlier - window + 1), min(a + step, length) + earlier)
            yield _Chunk(rows, slice(a, b), keys_values[rows, :, :, reach], valid[rows, reach], positions[rows, a:b])


def _checkpoints(head: KarlaHead) -> bool:
    return head.gradient_checkpointing and head.training and torch.is_grad_enabled()


def _think_chunk(head, state, chunk: _Chunk, window, plan: Plan, projection, layers) -> Thoughts:
    """Answers as changes of the state, [b, n, D]."""
    state, shape = state.to(chunk.keys_values.dtype), state.shape[:2]
    rule = logits = None
    if plan.measures:
        flat = state.detach().flatten(0, 1)
        candidates = Candidates(flat, *projection, plan.num_candidates)
        rule = StoppingRule(candidates, flat, plan.threshold, plan.most_certain)
        if not len(rule.thinking):
            logits = candidates.all_logits
            logits = None if logits is None else logits.view(*shape, -1)

    def run(state: torch.Tensor, keys_values: torch.Tensor) -> torch.Tensor:
        if rule is not None and not len(rule.thinking):
            return torch.zeros_like(state)
        registers = head.memory.registers
        blocks = cut_blocks(keys_values, chunk.valid, registers, chunk.position_ids, window)
        return _answers(head, state, blocks, plan, rule, layers)

    if _checkpoints(head):
        delta = checkpoint(run, state, chunk.keys_values, use_reentrant=False, preserve_rng_state=False)
    else:
        delta = run(state, chunk.keys_values)
    used = torch.full(shape, plan.num_ticks, dtype=torch.int64, device=state.device)
    if rule is None:
        losses = None if plan.judge is None else plan.judge(chunk.rows, chunk.columns, state, delta)
        deltas = delta if plan.all_ticks else None
        return Thoughts(delta[-1] if plan.thinks_all else delta, used, None, deltas, None, losses)
    return Thoughts(delta, rule.ticks_used.view(shape), rule.certainty.view(shape), None, logits)


def _answers(head, state, blocks: WindowBlocks, plan: Plan, rule: StoppingRule | None, layers) -> torch.Tensor:
    """Delta [b, n, D] of every answer, or [S, b, n, D] of all ticks."""
    if plan.thinks_all:
        deltas: list[torch.Tensor] = []
        head(state, blocks, plan.num_ticks, lambda tick, delta: deltas.append(delta), layers)
        return torch.stack(deltas).view(-1, *state.shape)
    if rule is None:
        return head(state, blocks, plan.num_ticks, None, layers).view_as(state)
    rule.begin()
    asked = state
    if len(rule.thinking) < state.shape[0] * state.shape[1]:
        asked, blocks = state.flatten(0, 1).index_select(0, rule.thinking)[:, None], blocks.keep(rule.thinking)
    head(asked, blocks, plan.num_ticks, rule, layers)
    return rule.answer(state.flatten(0, 1)).view_as(state)
