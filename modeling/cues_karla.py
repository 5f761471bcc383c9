"""Cues: by which words of a question, in whatever order, an answer is found that was read in other words.

An n-gram continues a text as it was written. A question shares a few words with the sentence that answers it: what it is
about (the *head*, see `words_karla`) and one or two other words. So an answer lives under unordered sets {head, other, other}
of the words around it, together with what has been said of it already:

    name = hash(set of words, answer so far)                  its row says the answer's next token.

Writing knows the whole sentence, words after the answer included. What may be asked for, the *spans*, are its names, unknown
words and numbers. Reading happens in *slots*: the tokens after a question mark, after a request, or where the assistant
begins. Elsewhere a position has no sets, so that running text cannot be disturbed.

One further name holds everywhere, the *opening*: a hash of all letters of the sentence so far, whatever their case and
however they fall into tokens. Names depend on the last `HISTORY` tokens alone.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from .hashing_karla import NO_NAME, scramble
from .sentences_karla import NO_TOKEN
from .words_karla import FOREIGN, LEAD_IN, Lexicon, Word, find_sentences, find_words, is_request, word_sets


REACH = 40  # tokens of a slot
QUESTION = 88  # tokens before a slot that are taken for its question
HISTORY = REACH + QUESTION  # tokens that a name depends on, its position's included
MAX_SETS = 32  # sets of a question's words that are looked up
LEAST_OPENING = 16  # letters
_SIGNS = "$€£¥#+-~@"  # what belongs to a span that it touches
_BASE = 0x9E3779B97F4A7C15  # odd
_INVERSE = pow(_BASE, -1, 1 << 64)


def cue_name(words: tuple[str, ...], said: str) -> int:
    """The name of a set of words after `said`: 63 bits, never `NO_NAME`.

    Args:
        words: in alphabetical order.
        said: what has been said of the answer.
    """
    digest = hashlib.blake2b("\0".join((*words, said)).encode("utf-8", "replace"), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 1) or 1


def name_openings(history: np.ndarray, lexicon: Lexicon) -> np.ndarray:
    """Name every position by its sentence so far.

    The bytes c_i of the sentence's normalised texts, white space left out, give sum_i (c_i + 1) b^(i - start) mod 2^64; how many
    they are, and whether white space follows them, is mixed in.

    Args:
        history: [N] int64 token ids, `NO_TOKEN` where there is none.
        lexicon: see `Lexicon`.

    Returns:
        [N] int64; `NO_NAME` where the sentence began before the `HISTORY` tokens up to a position, or has fewer than
        `LEAST_OPENING` letters.
    """
    tokens, missing = np.maximum(history, 0), history == NO_TOKEN
    blob, begins = lexicon.squeezed
    sizes = np.where(missing, 0, begins[tokens + 1] - begins[tokens])
    upto = np.cumsum(sizes)
    inside = np.arange(sizes.sum()) - np.repeat(upto - sizes, sizes)
    letters = blob[np.repeat(begins[tokens], sizes) + inside].astype(np.uint64) + np.uint64(1)
    sums = np.concatenate([[np.uint64(0)], np.cumsum(letters * _powers(_BASE, len(letters)), dtype=np.uint64)])

    broken = lexicon.is_break[tokens] | missing
    spaced = lexicon.is_spaced[tokens]
    starts = np.zeros(len(history), np.bool_)
    starts[1:] = broken[:-1] | (lexicon.is_stop[tokens[:-1]] & spaced[1:, 0])
    at = np.arange(len(history))
    start = np.maximum.accumulate(np.where(starts, at, -1))
    first = (upto - sizes)[np.maximum(start, 0)]
    mixed = (sums[upto] - sums[first]) * _powers(_INVERSE, len(letters) + 1)[first]
    mixed ^= ((upto - first) * 2 + spaced[:, 1]).astype(np.uint64)
    there = (start > 0) & (start - 1 > at - HISTORY) & (upto - first >= LEAST_OPENING) & ~broken
    return np.where(there, scramble(mixed.view(np.int64)), NO_NAME)


def name_last_opening(history: np.ndarray, lexicon: Lexicon) -> int:
    """The last name of `name_openings`, from the last sentence alone.

    Args:
        history: [N] int64 token ids, N >= 1, `NO_TOKEN` where there is none.
        lexicon: see `Lexicon`.

    Returns:
        A name, or `NO_NAME`.
    """
    tokens = history[-HISTORY:].tolist()
    breaks, stops, spaced = lexicon.is_break, lexicon.is_stop, lexicon.is_spaced
    start = len(tokens)
    if tokens[-1] == NO_TOKEN or breaks[tokens[-1]]:
        return NO_NAME
    while start := start - 1:
        before = tokens[start - 1]
        if before == NO_TOKEN or breaks[before] or (stops[before] and spaced[tokens[start], 0]):
            break
    if not start:
        return NO_NAME
    blob, begins = lexicon.squeezed
    letters = np.concatenate([blob[begins[token] : begins[token + 1]] for token in tokens[start:]])
    if len(letters) < LEAST_OPENING:
        return NO_NAME
    mixed = ((letters + np.uint64(1)) * _powers(_BASE, len(letters))).sum(keepdims=True)
    mixed ^= np.uint64(len(letters) * 2 + int(spaced[tokens[-1], 1]))
    return int(scramble(mixed.view(np.int64))[0])


def _powers(base: int, count: int) -> np.ndarray:
    """base^0, base^1, ... mod 2^64, [count] uint64."""
    factors = np.full(count, base, np.uint64)
    factors[:1] = 1
    return np.cumprod(factors, dtype=np.uint64)


class CueWrite(NamedTuple):
    """One token of an answer that was read.

    Attributes:
        names: under which it is found, int64.
        token: the token to say.
    """

    names: list[int]
    token: int


def cues_to_write(ids: list[int], lexicon: Lexicon) -> Iterator[CueWrite]:
    """The answers in a text that is known as a whole, under the words around them.

    Where one set of a sentence leads to two of its spans, the longer one is meant. The sentence so far counts from its
    first foreign word on, since before it nothing tells what the sentence is about.

    Args:
        ids: token ids of the text.
        lexicon: see `Lexicon`.

    Yields:
        One entry per token of a span.
    """
    text = lexicon.text(ids)
    starts = np.cumsum([0] + [len(lexicon.texts[token]) for token in ids])
    openings = name_openings(np.array([NO_TOKEN, *ids]), lexicon).tolist()  # one place later: of the token before
    for first, last in find_sentences(text):
        sentence = text[first:last]
        words = find_words(sentence, lexicon.known)
        spans = _spans(sentence, words)
        about = first + min((word.start for word in words if word.rank & FOREIGN), default=len(sentence))
        taken: set[tuple[str, ...]] = set()
        for core, start, end in sorted(spans, key=lambda span: span[1] - span[2]):
            keys = [key for key in word_sets([word for word in words if word not in core]) if key not in taken]
            taken.update(keys)
            begin = int(np.searchsorted(starts, first + start, side="right")) - 1
            stop = int(np.searchsorted(starts, first + end, side="left"))
            for at in range(begin, stop):
                said = text[starts[begin] : starts[at]]
                names = [cue_name(key, said) for key in keys]
                if first + start > about and openings[at] != NO_NAME:
                    names.append(openings[at])
                yield CueWrite(names, ids[at])


def _spans(sentence: str, words: list[Word]) -> list[tuple[list[Word], int, int]]:
    """What may be asked for: runs of names, unknown words and numbers, with their first and one past their last character.

    The space before a run belongs to it, and what touches it there ("$"); so do the word after a number (its unit) and
    the end of the sentence after the run.
    """
    runs: list[list[Word]] = []
    units: dict[int, Word] = {}
    before = Word(-9, -9, "", 0)
    for word in words:
        joined = word.start - before.end <= 1
        if word.rank and joined and before.rank:
            runs[-1].append(word)
        elif word.rank:
            runs.append([word])
        elif joined and before.rank == 1 and sentence[before.end] == " ":
            units[len(runs) - 1] = word
        before = word
    spans = []
    for number, core in enumerate(runs):
        start, end = core[0].start, units.get(number, core[-1]).end
        while start > 0 and sentence[start - 1] in _SIGNS:
            start -= 1
        spans.append((core, max(start - 1, 0), end + (end + 1 == len(sentence))))
    return spans


def cues_to_read(history: torch.Tensor, lexicon: Lexicon, keep: int) -> torch.Tensor:
    """The names under which the last positions look for an answer.

    Args:
        history: [B, N] int64 token ids, `NO_TOKEN` where there is none; N >= `keep`. What a position lacks of its last
            `HISTORY` tokens it does not see.
        lexicon: see `Lexicon`.
        keep: positions wanted, from the end.

    Returns:
        [B, keep, 1 + MAX_SETS] int64: the opening, then the sets, most telling first; `NO_NAME` where there is none.
    """
    batch, length = history.shape
    names = np.full((batch, keep, 1 + MAX_SETS), NO_NAME)
    first = length - keep
    for row, ids in enumerate(history.numpy()):
        names[row, :, 0] = name_last_opening(ids, lexicon) if keep == 1 else name_openings(ids, lexicon)[first:]
        openers = _openers(ids, lexicon, max(0, first - REACH + 1))
        for opener, following in itertools.pairwise([*openers, length]):
            keys = word_sets(_question(ids[max(0, opener - QUESTION + 1) : opener + 1], lexicon))[:MAX_SETS]
            said = ""
            for at in range(opener, min(opener + REACH, following) if keys else opener):
                said += lexicon.text(ids[at : at + 1]) if at > opener else ""
                if at >= first:
                    rest = LEAD_IN.sub("", said, count=1)
                    names[row, at - first, 1 : 1 + len(keys)] = [cue_name(key, rest) for key in keys]
    return torch.from_numpy(names)


def _openers(ids: np.ndarray, lexicon: Lexicon, first: int) -> list[int]:
    """Positions from `first` on after which an answer may stand."""
    tokens, there = np.maximum(ids, 0), ids != NO_TOKEN
    opens = lexicon.is_ask[tokens] & there
    reply = lexicon.reply.numpy()
    if len(reply):
        for at in np.flatnonzero(ids == reply[-1]):
            opens[at] |= np.array_equal(ids[max(0, at - len(reply) + 1) : at + 1], reply)
    requests = np.flatnonzero(lexicon.is_request[tokens] & there)
    if len(requests):
        for at in np.flatnonzero(lexicon.is_close[tokens] & there & ~opens):
            if at >= first and ((requests < at) & (requests > at - QUESTION)).any():
                text = lexicon.text(ids[max(0, at - QUESTION + 1) : at + 1]).rpartition("\0")[2]
                opens[at] = is_request(text[list(find_sentences(text))[-1][0] :])
    return [int(at) for at in np.flatnonzero(opens) if at >= first]


def _question(ids: np.ndarray, lexicon: Lexicon) -> list[Word]:
    """The words of the last sentence before a slot; of its whole line or turn where that sentence names nothing."""
    reply = lexicon.reply.numpy()
    if len(reply) and np.array_equal(ids[-len(reply) :], reply):
        line = lexicon.text(ids[: -len(reply)]).rstrip("\0\n ").rpartition("\0")[2]
    else:
        line = lexicon.text(ids).rstrip("\n ").rpartition("\0")[2].rpartition("\n")[2]
        if "/" in line[line.rfind(" ") + 1 :]:  # an address
            return []
    sentences = list(find_sentences(line))
    last = find_words(line[sentences[-1][0] :], lexicon.known) if sentences else []
    return last if any(word.rank for word in last) else find_words(line, lexicon.known)
