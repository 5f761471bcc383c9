"""Trained rows in plain loops, one position at a time: the yardstick of `layer_engram_karla`."""

from __future__ import annotations

import math

import torch

from .layer_engram_karla import HashedRows, RowGate


def naive_addresses(rows: HashedRows, ids: list[int]) -> list[list[list[int]]]:
    """Rows of every position of one text.

    Args:
        rows: the table with the constants of the hash.
        ids: token ids (not compressed).

    Returns:
        For every position, for every layer and order, one row per head.
    """
    tokens = [int(rows.token_map[i]) for i in ids]
    found = []
    for at in range(len(tokens)):
        families = []
        for layer, multipliers in enumerate(rows.multipliers.tolist()):
            for place, order in enumerate(rows.orders):
                mix = 0
                for back in range(order):
                    token = tokens[at - back] if at >= back else int(rows.pad_id)
                    mix ^= token * multipliers[back]
                family = layer * len(rows.orders) + place
                primes, offsets = rows.primes[family].tolist(), rows.offsets[family].tolist()
                families.append([offset + mix % prime for prime, offset in zip(primes, offsets, strict=True)])
        found.append(families)
    return found


def naive_added(rows: HashedRows, gate: RowGate, layer: int, ids: list[int], hidden: torch.Tensor) -> torch.Tensor:
    """What one inserted module adds to the hidden states of one text.

    Args:
        rows: the table.
        gate: the module.
        layer: its place among the inserted modules.
        ids: T token ids.
        hidden: [T, D] before the block. Gradients flow through it and through all weights.

    Returns:
        [T, D].
    """
    orders, longest = len(rows.orders), max(rows.orders)
    values: list[torch.Tensor] = []
    added = []
    for at, families in enumerate(naive_addresses(rows, ids)):
        own = families[layer * orders : (layer + 1) * orders]
        e = torch.cat([rows.weight[row] for family in own for row in family])
        query, key = _rms(hidden[at], gate.norm_query), _rms(gate.key.weight @ e, gate.norm_key)
        score = (query * key).sum() / math.sqrt(len(query))
        root = torch.sqrt(torch.clamp(abs(score), min=1e-6))
        alpha = 1 / (1 + torch.exp(-root if score > 0 else root))
        values.append(alpha * (gate.value.weight @ e))
        mixed = torch.zeros_like(values[-1])
        for tap in range(4):
            back = (3 - tap) * longest
            if at >= back:
                mixed = mixed + gate.conv[tap] * _rms(values[at - back], gate.norm_value)
        added.append(values[at] + mixed / (1 + torch.exp(-mixed)))
    return torch.stack(added)


def _rms(x: torch.Tensor, norm) -> torch.Tensor:
    return x / torch.sqrt((x * x).mean() + norm.eps) * norm.weight
