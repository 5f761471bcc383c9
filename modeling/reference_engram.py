"""Slow references for hashing_karla.py and engram_karla.py: dicts of rows, and plain Python loops.

Only tests and benchmarks import this file, so it never travels to the Hub.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from .engram_karla import Engram
from .hashing_karla import NO_NAME, NameConstants, NgramFamily
from .levels_karla import EngramLayout, Level, Pack
from .sentences_karla import BEGINS, BREAKS, ENDS, NO_TOKEN


_BITS = 2**64 - 1
Rows = dict[int, torch.Tensor]  # [width] float64 by name


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


def naive_names(ids: list[list[int]], families: list[NgramFamily], constants: NameConstants) -> list[list[list[int]]]:
    """Name of every suffix n-gram: the published mix, the family's stride added, through the finaliser of splitmix64.

    Args:
        ids: B lists of T token ids, `NO_TOKEN` where there is none. Not modified.
        families: the F families.
        constants: see `NameConstants`.

    Returns:
        B x T x F signed 64-bit integers; 0 where not even the shortest n-gram is complete, and for a sentence family
        where the sentence has less than half of its tokens.

    Example:
        >>> constants = NameConstants(torch.tensor([1, 3]), torch.arange(9), torch.zeros(9, dtype=torch.uint8), 0)
        >>> naive_names([[3, 4]], [NgramFamily(2, 1.0)], constants)
        [[[0], [834254763131718849]]]
    """
    multipliers, token_map = constants.multipliers.tolist(), constants.token_map.tolist()
    shortest = min(family.order for family in families)
    names: list = []
    for text in ids:
        names.append([])
        for t in range(len(text)):
            recent = [text[t - k] if t >= k else NO_TOKEN for k in range(max(family.order for family in families))]
            length = _sentence_length(text[: t + 1], constants.boundaries.tolist())
            names[-1].append([])
            for number, family in enumerate(families, start=1):
                mix = 0
                for k, token in enumerate(recent[: family.order]):
                    absent = token == NO_TOKEN or (family.sentence and k >= length)
                    mix ^= (constants.pad_id if absent else token_map[token]) * multipliers[k]
                bits = _splitmix64((mix + number * 0x1E3779B97F4A7C15) & _BITS) or 1
                named = length >= family.order // 2 if family.sentence else NO_TOKEN not in recent[:shortest]
                names[-1][-1].append((bits - 2**64 if bits >= 2**63 else bits) if named else NO_NAME)
    return names


def _sentence_length(text: list[int], boundaries: list[int]) -> int:
    """Tokens of the sentence that a text ends in; what comes before the text, or is masked, ends one."""
    for length in range(1, len(text)):
        before, here = text[-length - 1], text[-length]
        if before == NO_TOKEN or boundaries[before] & BREAKS:
            return length
        if here != NO_TOKEN and boundaries[before] & ENDS and boundaries[here] & BEGINS:
            return length
    return len(text)


def _splitmix64(bits: int) -> int:
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9 & _BITS
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB & _BITS
    return bits ^ (bits >> 31)


class NaivePack:
    """`Pack` with a dict of rows per level.

    Args:
        layout: sizes; `max_rows` is kept to the name, as a table of one bucket keeps it.

    Attributes:
        levels: rows by name, the fastest level first; what a row holds is a float16.
        step: chunks counted.
        lost: names that found no place in the slowest level.
    """

    def __init__(self, layout: EngramLayout):
        self.layout = layout
        self.levels: list[Rows] = [{} for _ in layout.update_periods]
        self.step = self.lost = 0

    def claim(self, names: list[int], level: int = 0) -> list[bool]:
        """Give names rows of a level; the first of them where not all fit. Returns which have one."""
        rows = self.levels[level]
        limit = self.layout.max_rows if level == len(self.levels) - 1 else None
        for name in names:
            if name != NO_NAME and (limit is None or len(rows) < limit):
                rows.setdefault(name, torch.zeros(self.layout.width, dtype=torch.float64))
        self.lost += len({name for name in names if name != NO_NAME and name not in rows})
        return [name in rows for name in names]

    def add(self, changes: Rows, level: int = 0) -> None:
        """Add changes to rows of a level and round them to float16."""
        for name, change in changes.items():
            self.levels[level][name] = (self.levels[level][name] + change).half().double()

    def tick(self) -> None:
        """Count a chunk; each level that is due takes over all that the one before it holds."""
        self.step += 1
        for level in range(1, len(self.levels)):
            if self.step % self.layout.update_periods[level] == 0:
                names = sorted(self.levels[level - 1])
                kept = [name for name, has in zip(names, self.claim(names, level), strict=True) if has]
                self.add({name: self.levels[level - 1][name] for name in kept}, level)
                self.levels[level - 1] = {}


def coordinates_of(layout: EngramLayout, family: int, num_families: int) -> list[int]:
    """Coordinates of the hidden state that a family owns: a run from its share of the way on, around the end."""
    start = family * layout.hidden_size // num_families
    return [(start + k) % layout.hidden_size for k in range(layout.width)]


def rows_by_level(pack: Pack | NaivePack) -> list[Rows]:
    """What every level holds, slot by slot: its rows by name."""
    if isinstance(pack, NaivePack):
        return pack.levels
    return [_rows_of(level) for level in pack.levels]


def _rows_of(level: Level) -> Rows:
    rows = {}
    for table in level.tables:
        for slot, name in enumerate(table.names.flatten().tolist()):
            if name != NO_NAME:
                rows[name] = torch.from_numpy(table.rows[slot]).double()
    return rows


def naive_read(engram: Engram, names: torch.Tensor) -> torch.Tensor:
    """`Engram.read` coordinate by coordinate, in Python floats.

    Args:
        engram: the memory, of `Pack` or `NaivePack`. Not modified.
        names: [P, F] int64.

    Returns:
        [P, D] float64.
    """
    memory = torch.zeros(len(names), engram.hidden_size, dtype=torch.float64)
    for pack in engram.packs.values() if engram.enabled else []:
        for rows in rows_by_level(pack):
            for p, position in enumerate(names.tolist()):
                for f, name in enumerate(position):
                    if name in rows:
                        coordinates = coordinates_of(engram.layout, f, len(position))
                        for coordinate, value in zip(coordinates, rows[name].tolist(), strict=True):
                            memory[p, coordinate] += value
    return memory
