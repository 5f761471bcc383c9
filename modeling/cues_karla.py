"""Cues: by which words of a question, in whatever order, an answer is found that was read in other words.

An n-gram continues a sentence only as it was written. A question shares a few words with that sentence: what it is about
(the *head*: a name, else a word that the vocabulary does not hold, else a number, else the longest word) and something else
of it. So an answer lives under unordered pairs {head, other word} together with what has been said of it already:

    name = hash(head, other, answer so far)              its row says the next token of the answer.

Writing knows the whole sentence, words after the answer included. What may be asked for, the *spans*, are its names,
unknown words and numbers; each lives under the pairs of the words around it. Reading happens in *slots* only, the tokens
after a question mark, after a request or where the assistant begins; elsewhere a position has no cue, so that running text
cannot be disturbed. A cue depends on the last `HISTORY` tokens alone.

The few words of English in this file are the three lists below.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

from .hashing_karla import NO_TOKEN


REACH = 40  # tokens of a slot
QUESTION = 88  # tokens before a slot that are taken for its question
HISTORY = REACH + QUESTION  # tokens that a cue depends on, its own included
MAX_PAIRS = 16  # pairs of a question that are looked up
_STEM = 5  # letters of a known word that count

_STOP_WORDS = frozenset(
    "a about all am an and any are as at be been being but by can could did do does for from had has have he her him his how "
    "i if in into is it its may me might must my no not of on one or our please shall she should so some such that the their "
    "them then there these they this those to under up us was we were what when where which while who whom whose why will "
    "with would you your assistant user system answer question".split()
)
_REQUESTS = frozenset(
    "complete describe find give identify list mention name please provide quote recall remind repeat report say show specify "
    "state tell write".split()
)
# What may stand between the beginning of a slot and the answer.
_LEAD_IN = re.compile(
    r"(?:\s*(?:A:|Answer:|(?:[Ii]t|[Tt]hat|[Tt]he|is|was|are|were|answer|on|in|at|of|to|by)\b))*[\n]*"
)
_SENTENCE_END = re.compile(r"[.!?]['\")]*\s+|\s*\n\s*")
_WORD = re.compile(r"\w+")


class Lexicon:
    """What tokens look like, so that token ids can be read as words.

    Args:
        blob: [bytes] uint8, UTF-8 texts of all tokens one after the other; a special token is the character U+0000.
        ends: [V] int64, where each text ends in `blob`.
        reply: [n] int64, the tokens after which the assistant begins; empty where there is no chat template.
    """

    def __init__(self, blob: torch.Tensor, ends: torch.Tensor, reply: torch.Tensor):
        self.blob, self.ends, self.reply = blob, ends, reply

    @classmethod
    def from_tokenizer(cls, tokenizer, vocab_size: int) -> Lexicon:
        """Read the texts of a tokenizer's tokens.

        Args:
            tokenizer: a transformers tokenizer.
            vocab_size: rows of the model's embedding; ids beyond the tokenizer's have no text.
        """
        special = set(tokenizer.all_special_ids)
        texts = [
            b"\0" if token in special else tokenizer.decode([token]).encode() if token < len(tokenizer) else b""
            for token in range(vocab_size)
        ]
        ends = torch.tensor([len(text) for text in texts]).cumsum(0)
        return cls(torch.frombuffer(bytearray(b"".join(texts)), dtype=torch.uint8), ends, _reply_marker(tokenizer))

    @cached_property
    def texts(self) -> list[str]:
        """The text of every token id."""
        data, ends = self.blob.numpy().tobytes(), [0, *self.ends.tolist()]
        return [data[start:end].decode("utf-8", "replace") for start, end in zip(ends, ends[1:], strict=False)]

    @cached_property
    def known(self) -> frozenset[str]:
        """Words that are one token at the beginning of a word, normalised."""
        return frozenset(_normalised(text[1:]) for text in self.texts if text[:1] == " " and text[1:].isalpha())

    @cached_property
    def asks(self) -> np.ndarray:  # [V] tokens that end a question
        return np.array(["?" in text for text in self.texts])

    @cached_property
    def request_ends(self) -> np.ndarray:  # [V] tokens that may end a request
        return np.array([text.rstrip().endswith((".", ":")) for text in self.texts])

    @cached_property
    def requests(self) -> np.ndarray:  # [V] tokens that may begin one
        return np.array([text.strip().lower() in _REQUESTS for text in self.texts])

    def text(self, ids) -> str:
        """The text of token ids; missing tokens are as special ones."""
        return "".join("\0" if token < 0 else self.texts[token] for token in ids)


class Word(NamedTuple):
    """A word that counts: not one of the stop words.

    Attributes:
        start: first character in its sentence.
        end: one past its last character.
        key: what it is compared by.
        rank: 3 for a name, 2 for a word that the vocabulary does not hold, 1 for a number, 0 for any other.
    """

    start: int
    end: int
    key: str
    rank: int


def find_words(sentence: str, known: frozenset[str]) -> list[Word]:
    """The words of a sentence that count, in order.

    Args:
        sentence: one sentence.
        known: words of the vocabulary, see `Lexicon.known`.

    Example:
        >>> [(word.key, word.rank) for word in find_words("Who founded the 2 mills of Foo?", frozenset({"founded", "mills"}))]
        [('found', 0), ('2', 1), ('mills', 0), ('foo', 3)]
    """
    words = []
    for number, found in enumerate(_WORD.finditer(sentence)):
        text = found.group()
        key = _normalised(text)
        digit = any(char.isdigit() for char in key)
        if key in _STOP_WORDS or (len(key) < 2 and not digit):
            continue
        foreign = key not in known
        named = text[0].isupper() and (foreign or number > 0)
        rank = 1 if digit else 3 if named else 2 if foreign else 0
        words.append(Word(*found.span(), key if rank else key[:_STEM], rank))
    return words


def pair_words(words: list[Word]) -> list[tuple[str, str]]:
    """Every head with every other word, each pair in alphabetical order; the most telling pairs first.

    Args:
        words: of a question, or of a sentence without the span that is asked for.

    Example:
        >>> pair_words(find_words("When was the mill of Foo founded?", frozenset({"mill", "founded"})))
        [('foo', 'found'), ('foo', 'mill')]
    """
    if not words:
        return []
    top = max(word.rank for word in words)
    longest = max(len(word.key) for word in words)
    heads = [word.key for word in words if word.rank == top and (top > 0 or len(word.key) == longest)]
    others = sorted(words, key=lambda word: (-word.rank, -len(word.key)))
    return list(dict.fromkeys((min(h, o.key), max(h, o.key)) for o in others for h in heads if o.key != h))


def cue_name(pair: tuple[str, str], said: str) -> int:
    """The name of a pair of words after `said`: 63 bits, never 0.

    Args:
        pair: in alphabetical order.
        said: what has been said of the answer.
    """
    digest = hashlib.blake2b("\0".join((*pair, said)).encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 1) or 1


class CueWrite(NamedTuple):
    """One token of an answer that was read.

    Attributes:
        names: by which it is found.
        token: the token to say.
    """

    names: list[int]
    token: int


def cues_to_write(ids: list[int], lexicon: Lexicon) -> Iterator[CueWrite]:
    """The answers in a text that is known as a whole, under the words around them.

    Where one pair of a sentence leads to two of its spans, the longer one is meant.

    Args:
        ids: token ids of the text.
        lexicon: see `Lexicon`.

    Yields:
        One entry per token of a span.
    """
    starts = np.cumsum([0] + [len(lexicon.texts[token]) for token in ids])
    text = lexicon.text(ids)
    for first, last in _sentences(text):
        sentence = text[first:last]
        words = find_words(sentence, lexicon.known)
        taken: set[tuple[str, str]] = set()
        for core, start, end in sorted(_spans(sentence, words), key=lambda span: span[1] - span[2]):
            pairs = [pair for pair in pair_words([word for word in words if word not in core]) if pair not in taken]
            taken.update(pairs)
            begin = int(np.searchsorted(starts, first + start, side="right")) - 1
            stop = int(np.searchsorted(starts, first + end, side="left"))
            for at in range(begin, stop):
                said = text[starts[begin] : starts[at]]
                yield CueWrite([cue_name(pair, said) for pair in pairs], ids[at])


def _sentences(text: str) -> Iterator[tuple[int, int]]:
    """Beginning and end of every sentence, its end mark included and the space around it not."""
    first = len(text) - len(text.lstrip())
    for found in _SENTENCE_END.finditer(text):
        last = found.start() + len(found.group().rstrip())
        if last > first:
            yield first, last
        first = found.end()
    if len(text.rstrip()) > first:
        yield first, len(text.rstrip())


def _spans(sentence: str, words: list[Word]) -> Iterator[tuple[list[Word], int, int]]:
    """What may be asked for: runs of names, unknown words and numbers, with their first and one past their last character.

    The space before a run belongs to it, and what touches it there ("$"); so do the word after a number (its unit) and
    the end of the sentence after the run.
    """
    runs: list[list[Word]] = []
    follows: dict[int, Word] = {}
    before: Word | None = None
    for word in words:
        joined = before is not None and word.start - before.end <= 1
        if word.rank and joined and before.rank:
            runs[-1].append(word)
        elif word.rank:
            runs.append([word])
        elif joined and before.rank == 1 and sentence[before.end] == " ":
            follows[len(runs) - 1] = word
        before = word
    for number, core in enumerate(runs):
        start, end = core[0].start, follows.get(number, core[-1]).end
        while start > 0 and not sentence[start - 1].isspace():
            start -= 1
        end += end + 1 == len(sentence)
        yield core, max(start - 1, 0), end


def cues_to_read(history: torch.Tensor, lexicon: Lexicon, keep: int) -> torch.Tensor:
    """The names under which the last positions look for an answer.

    Args:
        history: [B, N] int64 token ids, `NO_TOKEN` where there is none; N >= `keep`. A position's names depend on
            its last `HISTORY` tokens.
        lexicon: see `Lexicon`.
        keep: positions wanted, from the end.

    Returns:
        [B, keep, MAX_PAIRS] int64; 0 where a position has fewer pairs, or is in no slot.
    """
    batch, length = history.shape
    names = np.zeros((batch, keep, MAX_PAIRS), dtype=np.int64)
    first = length - keep
    for row, ids in enumerate(history.numpy()):
        openers = _openers(ids, lexicon, max(0, first - REACH + 1))
        for opener, following in zip(openers, [*openers[1:], length], strict=True):
            pairs = pair_words(_question(ids[max(0, opener - QUESTION + 1) : opener + 1], lexicon))[:MAX_PAIRS]
            said = ""
            for at in range(opener, min(opener + REACH, following) if pairs else opener):
                said += lexicon.text(ids[at : at + 1]) if at > opener else ""
                if at >= first:
                    rest = said[_LEAD_IN.match(said).end() :]
                    names[row, at - first, : len(pairs)] = [cue_name(pair, rest) for pair in pairs]
    return torch.from_numpy(names)


def _openers(ids: np.ndarray, lexicon: Lexicon, first: int) -> list[int]:
    """Positions from `first` on after which an answer may stand."""
    tokens = np.maximum(ids, 0)
    there = ids != NO_TOKEN
    opens = lexicon.asks[tokens] & there
    reply = lexicon.reply.numpy()
    if len(reply) and len(ids) >= len(reply):
        windows = np.lib.stride_tricks.sliding_window_view(ids, len(reply))
        opens[len(reply) - 1 :] |= (windows == reply).all(-1)
    requests = np.flatnonzero(lexicon.requests[tokens] & there)
    if len(requests):
        for at in np.flatnonzero(lexicon.request_ends[tokens] & there):
            if at >= first and not opens[at] and ((requests < at) & (requests > at - QUESTION)).any():
                text = lexicon.text(ids[max(0, at - QUESTION + 1) : at + 1]).rpartition("\0")[2]
                opens[at] = _is_request(text[list(_sentences(text))[-1][0] :])
    return [int(at) for at in np.flatnonzero(opens) if at >= first]


def _is_request(sentence: str) -> bool:
    words = [word.lower() for word in _WORD.findall(sentence)[:2]]
    return bool(words) and words[0] in _REQUESTS


def _question(ids: np.ndarray, lexicon: Lexicon) -> list[Word]:
    """The words of the last sentence; of the last line or turn where it names nothing."""
    line = lexicon.text(ids).rstrip("\0\n ")
    reply = lexicon.reply.numpy()
    if len(reply) and np.array_equal(ids[-len(reply) :], reply):
        line = lexicon.text(ids[: -len(reply)]).rstrip("\0\n ").rpartition("\0")[2]
    else:
        line = line.rpartition("\0")[2].rpartition("\n")[2]
    sentences = list(_sentences(line))
    last = find_words(line[sentences[-1][0] :], lexicon.known) if sentences else []
    return last if any(word.rank for word in last) else find_words(line, lexicon.known)


def _normalised(text: str) -> str:
    """Lower case, without accents."""
    form = unicodedata.normalize("NFD", unicodedata.normalize("NFKC", text))
    return "".join(char for char in form if not unicodedata.combining(char)).lower()


def _reply_marker(tokenizer) -> torch.Tensor:
    """Tokens of the chat template after which the assistant begins."""
    if not getattr(tokenizer, "chat_template", None):
        return torch.empty(0, dtype=torch.int64)
    turn = [{"role": "user", "content": "?"}]
    without, opened = (
        tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=p) for p in (False, True)
    )
    return torch.tensor(tokenizer(opened[len(without) :], add_special_tokens=False)["input_ids"])
