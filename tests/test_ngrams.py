import math
from collections import Counter
from itertools import pairwise

import pytest
import torch

from karla_hf.ngrams import DISCOUNT, bigram_loss, unigram_loss


VOCAB = 7
GENERATOR = torch.Generator().manual_seed(0)
TRAIN = torch.randint(0, 5, (3, 11), generator=GENERATOR)  # 5 and 6 never occur
HELD_OUT = torch.randint(0, VOCAB, (2, 9), generator=GENERATOR)


def discounted(counts: Counter, total: int) -> list[float]:
    kept = [max(counts[token] - DISCOUNT, 0.0) for token in range(VOCAB)]
    return [(value + (total - sum(kept)) / VOCAB) / total for value in kept]


def test_unigrams_are_discounted_frequencies():
    chance = discounted(Counter(TRAIN.flatten().tolist()), TRAIN.numel())
    assert sum(chance) == pytest.approx(1.0)
    targets = HELD_OUT[:, 1:].flatten().tolist()
    expected = -sum(math.log(chance[token]) for token in targets) / len(targets)
    assert unigram_loss(TRAIN, HELD_OUT, VOCAB) == pytest.approx(expected)


def test_bigrams_are_interpolated_with_continuations():
    pairs = Counter((a, b) for row in TRAIN.tolist() for a, b in pairwise(row))
    follows = discounted(Counter(b for _, b in pairs), len(pairs))

    def chance(a: int, b: int) -> float:
        total = sum(count for (first, _), count in pairs.items() if first == a)
        if not total:
            return follows[b]
        kinds = sum(first == a for first, _ in pairs)
        return max(pairs[a, b] - DISCOUNT, 0.0) / total + DISCOUNT * kinds / total * follows[b]

    for a in range(VOCAB):
        assert sum(chance(a, b) for b in range(VOCAB)) == pytest.approx(1.0)
    asked = [(a, b) for row in HELD_OUT.tolist() for a, b in pairwise(row)]
    expected = -sum(math.log(chance(a, b)) for a, b in asked) / len(asked)
    assert bigram_loss(TRAIN, HELD_OUT, VOCAB) == pytest.approx(expected)
