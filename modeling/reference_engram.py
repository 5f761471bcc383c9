"""Slow references for hashing_karla.py and engram_karla.py: plain Python loops over positions, families and heads.

Only tests and benchmarks import this file, so it never travels to the Hub.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from .engram_karla import Engram, EngramTable
from .hashing_karla import Names
from .writing_karla import DEFAULT_RULE, WriteResult, WriteRule


def naive_ngram_rows(
    compressed_ids: list[list[int]],
    orders: list[int],
    num_heads: int,
    rows_per_head: int,
    vocab_size: int,
    pad_id: int,
    seed: int,
    layer: int = 0,
) -> list[list[list[list[int]]]]:
    """Row of every suffix n-gram in its head's own table, as the published reference hashes it.

    mix = XOR_{k < n} x_{t-k} m_k and row = mix mod M_{n,j}: odd multipliers m_k from numpy's default generator, seeded
    with seed + 10007 layer, and primes M_{n,j} that grow from head to head and never repeat (Engram, section 2.2,
    https://arxiv.org/abs/2601.07372). Python's integers do not overflow, so a product beyond 63 bits would show.

    Args:
        compressed_ids: B lists of T compressed ids. Not modified.
        orders: n of every family.
        num_heads: H.
        rows_per_head: least number of rows of a table.
        vocab_size: V', number of compressed ids.
        pad_id: compressed id that stands before the first token.
        seed: seed of the multipliers.
        layer: its second part.

    Returns:
        B x T x F x H rows, each below its table's prime (no offset added).

    Example:
        >>> naive_ngram_rows([[3, 4]], [1], num_heads=2, rows_per_head=5, vocab_size=10, pad_id=0, seed=0)
        [[[[4, 5]], [[2, 2]]]]
    """
    generator = np.random.default_rng(seed + 10007 * layer)
    bound = max(1, (2**63 - 1) // vocab_size // 2)
    multipliers = [2 * int(r) + 1 for r in generator.integers(0, bound, size=max(orders), dtype=np.int64)]
    seen: list[int] = []
    primes = []
    for _ in orders:
        heads = []
        at_least = rows_per_head
        for _ in range(num_heads):
            while at_least in seen or not _is_prime(at_least):
                at_least += 1
            seen.append(at_least)
            heads.append(at_least)
        primes.append(heads)
    rows: list = []
    for ids in compressed_ids:
        rows.append([])
        for t in range(len(ids)):
            rows[-1].append([])
            for order, heads in zip(orders, primes, strict=True):
                mix = 0
                for k in range(order):
                    mix ^= (ids[t - k] if t >= k else pad_id) * multipliers[k]
                rows[-1][-1].append([mix % prime for prime in heads])
    return rows


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))


def naive_read(engram: Engram, names: Names) -> torch.Tensor:
    """`Engram.read` coordinate by coordinate, in Python floats.

    Args:
        engram: the memory. Not modified.
        names: of P positions.

    Returns:
        [P, D] float64.
    """
    memory = torch.zeros(len(names.rows), engram.hidden_size, dtype=torch.float64)
    if engram.enabled:
        for table in engram.packs.values():
            for p in range(len(names.rows)):
                for f, j in _owned(engram, table, names, p):
                    row = table.rows[names.rows[p, f, j]].tolist()
                    for coordinate, value in zip(engram.coordinates[f, j].tolist(), row, strict=True):
                        memory[p, coordinate] += value
    return memory


def _owned(engram: Engram, table: EngramTable, names: Names, p: int) -> list[tuple[int, int]]:
    """Families and heads whose row of position p belongs to its name."""
    families, heads, _ = engram.coordinates.shape
    named = [f for f in range(families) if names.fingerprints[p, f] != 0]
    return [
        (f, j) for f in named for j in range(heads) if table.owners[names.rows[p, f, j]] == names.fingerprints[p, f]
    ]


@torch.no_grad()
def naive_write_chunk(
    engram: Engram,
    table: EngramTable,
    names: Names,
    hidden_states: torch.Tensor,
    targets: torch.Tensor,
    output_embeddings: torch.Tensor,
    bias: torch.Tensor | None = None,
    rule: WriteRule = DEFAULT_RULE,
) -> WriteResult:
    """`write_chunk` position by position, in float64; only the rows themselves are rounded, to the dtype they have.

    Give the table `rows` in float64 and nothing is rounded at all. Arguments and result are those of `write_chunk`, with
    surprises in float64.
    """
    count = len(targets)
    before, after = torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
    written = torch.zeros(count, dtype=torch.bool)
    weight = output_embeddings.double()
    pending = list(range(count))
    for turn in range(rule.rounds):
        memory = naive_read(engram, names)
        problems = {}
        for p in pending:
            logits = weight @ (hidden_states[p].double() + memory[p])
            if bias is not None:
                logits = logits + bias.double()
            after[p] = logits.logsumexp(0) - logits[targets[p]]
            if turn == 0:
                before[p] = after[p]
            if after[p] > -math.log(rule.target):
                problems[p] = _Problem(logits, int(targets[p]), weight, rule.candidates)
        pending = list(problems)
        if not pending:
            break
        named, log_odds = _correct(engram, table, names, problems, rule)
        for p in pending:
            after[p] = math.log1p(math.exp(-log_odds[p]))
            written[p] |= named[p]
    return WriteResult(before, after, written)


class _Problem:
    """One position's target against its likeliest tokens and a constant mass of all others."""

    def __init__(self, logits: torch.Tensor, target: int, weight: torch.Tensor, count: int):
        likeliest = logits.topk(min(count, len(logits))).indices.tolist()
        rivals = [token for token in likeliest if token != target]
        total = float(logits.logsumexp(0))
        tracked = sum(math.exp(float(logits[token]) - total) for token in [target, *rivals])
        self.logits = [float(logits[token]) for token in [target, *rivals]]
        self.embeddings = [weight[token] for token in [target, *rivals]]
        self.rest = total + math.log1p(-min(tracked, 1 - 1e-7))
        self.mean_embedding = weight.mean(0)

    def direction(self, moved: torch.Tensor) -> tuple[torch.Tensor, float]:
        """W_y minus the mean competitor, and the log-odds of y, after the memory has moved."""
        logits = [value + float(row @ moved) for value, row in zip(self.logits, self.embeddings, strict=True)]
        rivals = [*logits[1:], self.rest]
        largest = max(rivals)
        masses = [math.exp(value - largest) for value in rivals]
        competitor = torch.zeros_like(moved)
        for mass, row in zip(masses, [*self.embeddings[1:], self.mean_embedding], strict=True):
            competitor += mass / sum(masses) * row
        return self.embeddings[0] - competitor, logits[0] - largest - math.log(sum(masses))


def _correct(
    engram: Engram, table: EngramTable, names: Names, problems: dict[int, _Problem], rule: WriteRule
) -> tuple[dict[int, bool], dict[int, float]]:
    """Correct positions until they reach the target; which have a row of their own, and the log-odds of y."""
    _claim(engram, table, names, list(problems))
    owned = {p: _owned(engram, table, names, p) for p in problems}
    aim = math.log(rule.target / (1 - rule.target))
    start = naive_read(engram, names)
    for _ in range(rule.repeats):
        moved = naive_read(engram, names) - start
        changes: dict[int, list[torch.Tensor]] = {}
        for p, problem in problems.items():
            direction, log_odds = problem.direction(moved[p])
            if log_odds >= aim or not owned[p]:
                continue
            reached = 0.0
            for f, j in owned[p]:
                for coordinate in engram.coordinates[f, j].tolist():
                    reached += engram.families[f].weight * float(direction[coordinate]) ** 2
            whole, own = float(direction @ direction), float(problem.embeddings[0] @ problem.embeddings[0])
            divisor = max(reached, rule.least_coverage * whole, rule.least_separation * own)
            change = direction * (min(aim + rule.overshoot - log_odds, rule.max_margin) / divisor)
            for f, j in owned[p]:
                share = engram.families[f].weight * change[engram.coordinates[f, j]]
                changes.setdefault(int(names.rows[p, f, j]), []).append(share)
        if not changes:
            break
        for row, shares in changes.items():
            table.rows[row] = (table.rows[row].double() + sum(shares) / len(shares)).to(table.rows.dtype)
    moved = naive_read(engram, names) - start
    log_odds_after = {p: problem.direction(moved[p])[1] for p, problem in problems.items()}
    return {p: bool(owned[p]) for p in problems}, log_odds_after


def _claim(engram: Engram, table: EngramTable, names: Names, positions: list[int]) -> None:
    """An empty row becomes the first name's that asks for it."""
    for p in positions:
        for f in range(len(engram.families)):
            for row in names.rows[p, f].tolist():
                if table.owners[row] == 0:
                    table.owners[row] = names.fingerprints[p, f]
