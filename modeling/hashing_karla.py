"""Names of what has just been read: compressed token ids, multiplicative-XOR n-gram hashes, 64 scrambled bits.

The hash is the one of "Conditional Memory via Scalable Lookup" (Engram, https://arxiv.org/abs/2601.07372): the last `n`
compressed token ids are multiplied by odd constants and XORed into one 63-bit `mix`. The memory scrambles it into a
64-bit name, by which its rows are found exactly; the paper's own tables, with row `mix mod M_{n,j}` in the table of prime
size `M_{n,j}` of head `j`, are there too (`hash_constants`, `row_addresses`). All constants are drawn once, stored with the
model as tensors and never derived again when a checkpoint is loaded.

A *family* is one way to name what has just been read. An n-gram family names it by its last `order` tokens. Every family
offers `span` (how many tokens of history it needs, itself included) and `mix` (one 63-bit number per position).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import torch

from .native_karla import c_function, c_integers
from .sentences_karla import NO_TOKEN, sentence_age


_MULTIPLIER_SEED_STRIDE = 10007
_FAMILY_STRIDE = 0x1E3779B97F4A7C15  # odd, below 2^61: separates the families' mixes
NO_NAME = 0


class HashConstants(NamedTuple):
    """What the addresses depend on; saved with the model.

    Attributes:
        multipliers: [max order] int64, odd; `multipliers[k]` belongs to the token `k` steps back.
        primes: [F, H] int64, rows of each table, one table per family and head.
        offsets: [F, H] int64, first row of each table in the common row space.
        token_map: [V] int64, compressed id of every token id.
        pad_id: compressed id that is hashed where there is no token (before the first, or at a masked position).
    """

    multipliers: torch.Tensor
    primes: torch.Tensor
    offsets: torch.Tensor
    token_map: torch.Tensor
    pad_id: int

    @property
    def num_rows(self) -> int:
        """Rows of all tables together."""
        return int(self.primes.sum())


class NameConstants(NamedTuple):
    """What the names of a memory depend on; saved with it.

    Attributes:
        multipliers: [longest order] int64, odd; `multipliers[k]` belongs to the token `k` steps back.
        token_map: [V] int64, compressed id of every token id.
        boundaries: [V] uint8, what every token says of sentences: a sum of `ENDS`, `BREAKS` and `BEGINS`.
        pad_id: compressed id that is hashed where there is no token (before the first, or at a masked position).
    """

    multipliers: torch.Tensor
    token_map: torch.Tensor
    boundaries: torch.Tensor
    pad_id: int


class NgramFamily(NamedTuple):
    """Names a position by its last `order` compressed token ids.

    Attributes:
        order: number of tokens, >= 1.
        weight: share of a written correction that goes to this family, > 0.
        sentence: whether what precedes the current sentence counts as absent, so that a sentence has the same names in a
            paragraph and alone. A position has such a name once the sentence has half of `order` tokens.
    """

    order: int
    weight: float
    sentence: bool = False

    @property
    def span(self) -> int:
        """Tokens of history needed, the current one included."""
        return self.order

    def mix(self, history: torch.Tensor, multipliers: torch.Tensor) -> torch.Tensor:
        """Hash the suffix n-gram of every position that has `order` tokens before it.

        mix_t = XOR_{k < order} x_{t-k} * m_k (Engram, section 2.2; no product exceeds 63 bits).

        Args:
            history: [B, N] int64 compressed ids, oldest first.
            multipliers: [max order] int64.

        Returns:
            [B, N - order + 1] int64, non-negative; entry `i` belongs to position `order - 1 + i`.

        Example:
            >>> NgramFamily(2, 1.0).mix(torch.tensor([[5, 6, 7]]), torch.tensor([1, 3])).tolist()
            [[9, 21]]
        """
        windows = np.lib.stride_tricks.sliding_window_view(history.numpy(), self.order, axis=1)
        return torch.from_numpy(np.bitwise_xor.reduce(windows * multipliers[: self.order].flip(0).numpy(), axis=-1))


def hash_constants(
    orders: list[int], num_heads: int, rows_per_head: int, token_map: torch.Tensor, pad_id: int, seed: int
) -> HashConstants:
    """Draw the constants of a new memory, as the published reference does.

    Multipliers are odd, `2r + 1` with `r` uniform in [0, (2^63 - 1) / V' / 2) from `numpy.random.default_rng`, so that
    no product with a compressed id overflows. Table sizes are consecutive primes >= `rows_per_head`, all distinct.

    Args:
        orders: n-gram order of every family.
        num_heads: tables per family.
        rows_per_head: least number of rows of a table.
        token_map: [V] int64, see `vocabulary_karla`.
        pad_id: token id (not compressed) that stands for "no token".
        seed: seed of the multipliers; the reference's `seed + 10007 * layer` with layer 0.

    Returns:
        The constants, on the CPU.

    Example:
        >>> constants = hash_constants([2, 3], 2, 10, torch.arange(50), 0, seed=0)
        >>> constants.primes.tolist(), constants.offsets.tolist()
        ([[11, 13], [17, 19]], [[0, 11], [24, 41]])
    """
    return HashConstants(
        multipliers=torch.from_numpy(_multipliers(max(orders), int(token_map.max()) + 1, seed)),
        primes=(primes := _distinct_primes(len(orders), num_heads, rows_per_head)),
        offsets=(primes.flatten().cumsum(0) - primes.flatten()).view_as(primes),
        token_map=token_map,
        pad_id=int(token_map[pad_id]),
    )


def name_constants(
    longest: int, token_map: torch.Tensor, boundaries: torch.Tensor, pad_id: int, seed: int
) -> NameConstants:
    """Draw the constants of a new memory; the multipliers are those of `hash_constants`.

    Args:
        longest: n of the longest n-gram.
        token_map: [V] int64, see `vocabulary_karla`.
        boundaries: [V] uint8, see `sentence_boundaries`.
        pad_id: token id (not compressed) that stands for "no token".
        seed: seed of the multipliers.

    Example:
        >>> name_constants(2, torch.arange(50), torch.zeros(50, dtype=torch.uint8), 0, seed=0).multipliers % 2
        tensor([1, 1])
    """
    multipliers = torch.from_numpy(_multipliers(longest, int(token_map.max()) + 1, seed))
    return NameConstants(multipliers, token_map, boundaries, int(token_map[pad_id]))


def _multipliers(count: int, vocab_size: int, seed: int, layer: int = 0) -> np.ndarray:
    half_bound = max(1, (np.iinfo(np.int64).max // vocab_size) // 2)
    generator = np.random.default_rng(seed + _MULTIPLIER_SEED_STRIDE * layer)
    return generator.integers(0, half_bound, size=(count,), dtype=np.int64) * 2 + 1


def _distinct_primes(num_families: int, num_heads: int, at_least: int) -> torch.Tensor:
    found: list[int] = []
    candidate = max(2, at_least)
    while len(found) < num_families * num_heads:
        if all(candidate % divisor for divisor in range(2, int(candidate**0.5) + 1)):
            found.append(candidate)
        candidate += 1
    return torch.tensor(found, dtype=torch.int64).view(num_families, num_heads)


def name_positions(history: torch.Tensor, families: list[NgramFamily], constants: NameConstants) -> torch.Tensor:
    """Name every position of a text by every family.

    A name is the family's 63-bit mix, salted with the family's number and scrambled by the bijection of splitmix64, so
    that each half of it picks a bucket evenly and two families never share a name.

    Args:
        history: [B, S - 1 + T] int64 token ids, `NO_TOKEN` where there is none; the first S - 1, with S the longest span,
            are context only.
        families: the F families.
        constants: see `NameConstants`.

    Returns:
        [B, T, F] int64 names; `NO_NAME` where fewer tokens precede a position than the shortest family needs, and for
        a sentence family where fewer tokens of the sentence do than half of its order.
    """
    reach, shortest, *arrays = _sizes(tuple(families))
    kernel = c_function("karla_name_positions", "piippppiippiup")
    if kernel is not None:
        history = history.contiguous()
        names = torch.empty(len(history), history.shape[1] - reach + 1, len(families), dtype=torch.int64)
        orders, sentence, least = arrays
        kernel(history.data_ptr(), *history.shape, constants.token_map.data_ptr(), constants.boundaries.data_ptr(),
               constants.multipliers.data_ptr(), orders, len(families), reach, sentence, least, constants.pad_id,
               _FAMILY_STRIDE, names.data_ptr())  # fmt: skip
        return names
    ids = history.numpy()
    missing = ids == NO_TOKEN
    tokens = np.where(missing, constants.pad_id, constants.token_map.numpy()[ids])
    age = sentence_age(ids, constants.boundaries.numpy())[:, reach - 1 :]
    lags = np.arange(reach)
    backwards = np.lib.stride_tricks.sliding_window_view(tokens, reach, axis=1)[:, :, ::-1]
    in_sentence = np.where(lags <= age[:, :, None], backwards, constants.pad_id)
    multipliers = constants.multipliers[:reach].numpy()
    mixes = {False: np.bitwise_xor.accumulate(backwards * multipliers, axis=-1),
             True: np.bitwise_xor.accumulate(in_sentence * multipliers, axis=-1)}  # fmt: skip
    unfilled = np.lib.stride_tricks.sliding_window_view(missing, shortest, axis=1)[:, -age.shape[1] :].any(-1)
    found = np.empty((*age.shape, len(families)), np.int64)
    strides = np.arange(1, len(families) + 1) * _FAMILY_STRIDE  # wraps around, as in C
    for number, family in enumerate(families):
        named = age + 1 >= family.order // 2 if family.sentence else ~unfilled
        mix = mixes[family.sentence][:, :, family.order - 1]
        found[:, :, number] = np.where(named, scramble(mix + strides[number]), NO_NAME)
    return torch.from_numpy(found)


@functools.cache
def _sizes(families: tuple[NgramFamily, ...]) -> tuple:
    """Longest and shortest span; for the C kernel orders, which look at their sentence alone, and the shortest span."""
    shortest = min(family.span for family in families)
    orders, sentence = zip(*((family.order, family.sentence) for family in families), strict=True)
    return (
        max(family.span for family in families), shortest,
        c_integers(*orders), c_integers(*sentence), c_integers(shortest),
    )  # fmt: skip


def scramble(values: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64: a bijection of 64-bit integers all of whose bits depend on all bits of the input.

    Args:
        values: int64. Not modified.

    Returns:
        int64 of the same shape, never `NO_NAME` (what would be becomes 1).

    Example:
        >>> scramble(np.array([0, 1, 2])).tolist()
        [1, 6238072747940578789, -2606959012126976886]
    """
    bits = values.view(np.uint64)
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    bits = (bits ^ (bits >> np.uint64(31))).view(np.int64)
    return np.where(bits == NO_NAME, 1, bits)


def row_addresses(mix: torch.Tensor, constants: HashConstants) -> torch.Tensor:
    """Rows that a mix addresses in the published tables, one per head: offset + mix mod prime.

    Args:
        mix: [..., F] int64, non-negative.
        constants: see `HashConstants`.

    Returns:
        [..., F, H] int64 in [0, `constants.num_rows`).
    """
    return mix[..., None] % constants.primes + constants.offsets
