"""Where sentences begin, told from token ids alone."""

from __future__ import annotations

import numpy as np
import torch


NO_TOKEN = -1
_FULL_STOPS, _CLOSING = (".", "?", "!", "。", "？", "！"), " \"')]}»”’"
_WORD_MARKS = ("Ġ", "▁", " ")  # how tokenizers write a leading space
ENDS, BREAKS, BEGINS = 1, 2, 4  # ends a sentence if a word begins next; ends it in any case; begins a word


def sentence_boundaries(tokenizer, vocab_size: int) -> torch.Tensor:
    """What every token says of sentences: a sum of `ENDS`, `BREAKS` and `BEGINS`.

    A token that ends in a full stop, a question mark or an exclamation mark, closing quotes aside, ends a sentence if the
    next token begins a word (so "3.5" is whole); a line break and a special token end it in any case.

    Args:
        tokenizer: a transformers tokenizer.
        vocab_size: rows of the model's embedding; ids beyond the tokenizer's say nothing.

    Returns:
        [vocab_size] uint8.
    """
    flags = torch.zeros(vocab_size, dtype=torch.uint8)
    special = set(tokenizer.all_special_ids)
    for token, raw in enumerate(tokenizer.convert_ids_to_tokens(list(range(min(len(tokenizer), vocab_size))))):
        text = tokenizer.decode([token], skip_special_tokens=False)
        ends = text.rstrip(_CLOSING).endswith(_FULL_STOPS)
        breaks = token in special or "\n" in text
        begins = breaks or raw[:1] in _WORD_MARKS or text[:1].isspace()
        flags[token] = ENDS * ends + BREAKS * breaks + BEGINS * begins
    return flags


def sentence_age(ids: np.ndarray, boundaries: np.ndarray) -> np.ndarray:
    """Tokens of the sentence before each token.

    Args:
        ids: [B, N] int64 token ids, `NO_TOKEN` where there is none.
        boundaries: [V] uint8, see `sentence_boundaries`.

    Returns:
        [B, N] int64, 0 for the first token of a sentence; N where the sentence began before the first token.
    """
    flags = np.where(ids == NO_TOKEN, BREAKS, boundaries[ids])
    begins = np.zeros(ids.shape, np.bool_)
    before, here = flags[:, :-1], flags[:, 1:]
    begins[:, 1:] = (before & BREAKS > 0) | (before & ENDS > 0) & (here & BEGINS > 0)
    index = np.arange(ids.shape[1])
    start = np.maximum.accumulate(np.where(begins, index, -1), axis=1)
    return np.where(start < 0, ids.shape[1], index - start)
