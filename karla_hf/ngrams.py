"""Losses of n-gram models that were counted on the same tokens: what a language model has to beat."""

from __future__ import annotations

import torch


DISCOUNT = 0.75


def unigram_loss(train: torch.Tensor, held_out: torch.Tensor, vocab_size: int) -> float:
    """Mean loss in nats of token frequencies, with absolute discounting towards the uniform distribution.

    Args:
        train: [N, T] int64, sequences to count in.
        held_out: [M, T] int64; every token but the first of a sequence is predicted.
        vocab_size: tokens that exist.

    Example:
        >>> sequences = torch.tensor([[0, 1, 0, 1]])
        >>> round(unigram_loss(sequences, sequences, vocab_size=2), 4) == round(torch.log(torch.tensor(2.0)).item(), 4)
        True
    """
    counts = torch.bincount(train.flatten(), minlength=vocab_size)
    return -_discounted(counts)[held_out[:, 1:]].log().mean().item()


def bigram_loss(train: torch.Tensor, held_out: torch.Tensor, vocab_size: int) -> float:
    """Mean loss in nats of an interpolated Kneser-Ney bigram model (Ney, Essen and Kneser, 1994).

    p(b | a) = max(c(ab) - d, 0) / c(a) + d n(a) / c(a) q(b), with n(a) the number of tokens seen after a, and q(b) in proportion
    to the number of tokens that b was seen after; d = 0.75. After a token never seen, q alone.

    Args: as of `unigram_loss`.

    Example:
        >>> cycle = torch.arange(300).remainder(3)[None]
        >>> bigram_loss(cycle, cycle, vocab_size=3) < 0.05 < 1.0 < unigram_loss(cycle, cycle, vocab_size=3)
        True
    """
    pairs, counts = _pairs(train, vocab_size).unique(return_counts=True)
    first, second = pairs // vocab_size, pairs % vocab_size
    totals = torch.zeros(vocab_size, dtype=torch.float64).index_add_(0, first, counts.double())
    kinds = torch.bincount(first, minlength=vocab_size)
    follows = _discounted(torch.bincount(second, minlength=vocab_size))
    asked = _pairs(held_out, vocab_size)
    place = torch.searchsorted(pairs, asked).clamp(max=len(pairs) - 1)
    seen = torch.where(pairs[place] == asked, counts[place] - DISCOUNT, 0.0)
    before, now = asked // vocab_size, asked % vocab_size
    known = totals[before] > 0
    total = totals[before].clamp(min=1)
    chance = seen / total + torch.where(known, DISCOUNT * kinds[before] / total, 1.0) * follows[now]
    return -chance.log().mean().item()


def _pairs(sequences: torch.Tensor, vocab_size: int) -> torch.Tensor:
    return (sequences[:, :-1] * vocab_size + sequences[:, 1:]).flatten()


def _discounted(counts: torch.Tensor) -> torch.Tensor:
    """Probabilities [V] in float64: every count less the discount, which all tokens share."""
    kept = (counts.double() - DISCOUNT).clamp(min=0)
    return (kept + (counts.sum() - kept.sum()) / len(counts)) / counts.sum()
