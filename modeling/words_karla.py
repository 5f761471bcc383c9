"""Words: how token ids are read as words and sentences, and which words of a sentence, taken together,
tell it from others.

The little English that the memory knows stands here, in three lists.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch


NAME, FOREIGN = 2, 4  # ranks of words
TELLING = 5  # other words that go into sets of three
STEM = 5  # letters of a known word that count
_STOP_WORDS = """
a about all am an and any are as at be been being but by can could did do does for from had has have he her him his how i if
in into is it its me my no not of on one or our please shall she should so some such that the their them then there these
they this those to under up us was we were what when where which while who whom whose why will with would you your
assistant user system answer question
"""
_REQUESTS = """
complete describe find give identify list mention name please provide quote recall remind repeat report say show specify
state tell write
"""
STOP_WORDS, REQUESTS = (frozenset(words.split()) for words in (_STOP_WORDS, _REQUESTS))
# What may stand between the beginning of a slot and the answer.
LEAD_IN = re.compile(r"(?:\s*(?:A:|Answer:|(?:[Ii]t|[Tt]hat|[Tt]he|is|was|are|were|answer|on|in|at|of|to|by)\b))*\n*")

_ARRAYS = ("token_texts", "token_text_ends", "reply_marker")  # names in a saved memory
_SENTENCE_END = re.compile(r"[.?!]['\")]*\s+|\s*\n\s*")
_WORD = re.compile(r"\w+")


class Lexicon:
    """What tokens look like, so that token ids can be read as words.

    Args:
        blob: [bytes] uint8, UTF-8 texts of all tokens one after the other; a special token is the character U+0000.
        ends: [V] int64, where each text ends in `blob`.
        reply: [n] int64, the tokens after which the assistant begins; empty where there is no chat template.

    Example:
        >>> lexicon = Lexicon.from_texts(["\\0", "The", " mill"])
        >>> lexicon.text([1, 2, 0]), sorted(lexicon.known)
        ('The mill\\x00', ['mill'])
    """

    def __init__(self, blob: torch.Tensor, ends: torch.Tensor, reply: torch.Tensor):
        self.blob, self.ends, self.reply = blob, ends, reply

    @classmethod
    def from_texts(cls, texts: list[str], reply: torch.Tensor | None = None) -> Lexicon:
        """Put together from the text of every token id."""
        encoded = [text.encode("utf-8", "replace") for text in texts]
        blob = torch.frombuffer(bytearray(b"".join(encoded)) or bytearray(1), dtype=torch.uint8)
        ends = torch.tensor([len(text) for text in encoded]).cumsum(0)
        return cls(blob, ends, torch.empty(0, dtype=torch.int64) if reply is None else reply)

    @classmethod
    def from_tokenizer(cls, tokenizer, vocab_size: int) -> Lexicon:
        """Read the texts of a tokenizer's tokens.

        Args:
            tokenizer: a transformers tokenizer.
            vocab_size: rows of the model's embedding; ids beyond the tokenizer's have no text.
        """
        special = set(tokenizer.all_special_ids)
        count = min(len(tokenizer), vocab_size)
        texts = ["\0" if token in special else tokenizer.decode([token]) for token in range(count)]
        return cls.from_texts(texts + [""] * (vocab_size - count), _reply_marker(tokenizer))

    @classmethod
    def from_arrays(cls, arrays) -> Lexicon:
        """The lexicon that `arrays` came from; copies."""
        return cls(*(torch.from_numpy(arrays[name].copy()) for name in _ARRAYS))

    def arrays(self) -> dict[str, np.ndarray]:
        """What a saved memory keeps of it."""
        return {name: part.numpy() for name, part in zip(_ARRAYS, (self.blob, self.ends, self.reply), strict=True)}

    @cached_property
    def texts(self) -> list[str]:
        """The text of every token id."""
        data, ends = self.blob.numpy().tobytes(), [0, *self.ends.tolist()]
        return [data[start:end].decode("utf-8", "replace") for start, end in itertools.pairwise(ends)]

    @cached_property
    def known(self) -> frozenset[str]:
        """Words that are one token at the beginning of a word, normalised."""
        return frozenset(normalised(text[1:]) for text in self.texts if text[:1] == " " and text[1:].isalpha())

    @cached_property
    def squeezed(self) -> tuple[np.ndarray, np.ndarray]:
        """Normalised texts without white space: bytes one after the other, uint8, and [V + 1] where each begins."""
        parts = ["".join(normalised(text).replace("\0", "").split()).encode("utf-8", "replace") for text in self.texts]
        return np.frombuffer(b"".join(parts), np.uint8), np.cumsum([0] + [len(part) for part in parts])

    @cached_property
    def is_ask(self) -> np.ndarray:
        """[V] bool: holds a question mark."""
        return np.array(["?" in text for text in self.texts], np.bool_)

    @cached_property
    def is_request(self) -> np.ndarray:
        """[V] bool: one of `REQUESTS`."""
        return np.array([text.strip().lower() in REQUESTS for text in self.texts], np.bool_)

    @cached_property
    def is_close(self) -> np.ndarray:
        """[V] bool: may end a request."""
        return np.array([text.rstrip().endswith((".", ":")) for text in self.texts], np.bool_)

    @cached_property
    def is_stop(self) -> np.ndarray:
        """[V] bool: ends a sentence if white space follows."""
        return np.array([text.rstrip("'\")").endswith((".", "?", "!")) for text in self.texts], np.bool_)

    @cached_property
    def is_break(self) -> np.ndarray:
        """[V] bool: ends a line or a turn."""
        return np.array(["\n" in text or "\0" in text for text in self.texts], np.bool_)

    @cached_property
    def is_spaced(self) -> np.ndarray:
        """[V, 2] bool: begins with white space, ends with it."""
        return np.array([(text[:1].isspace(), text[-1:].isspace()) for text in self.texts], np.bool_).reshape(-1, 2)

    def text(self, ids) -> str:
        """The text of token ids; missing tokens are as special ones."""
        return "".join("\0" if token < 0 else self.texts[token] for token in ids)


class Word(NamedTuple):
    """A word that counts: not one of the stop words.

    Attributes:
        start: first character in its sentence.
        end: one past its last character.
        key: what it is compared by.
        rank: of two kinds of words that tell much, `NAME` for one with a capital that does not begin its sentence, or
            that the vocabulary does not hold, and `FOREIGN` added where the vocabulary does not hold it; else 1 for a
            number and 0 for any other.
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
        >>> words = find_words("Who founded the 2 mills of Foo?", frozenset({"founded", "mills"}))
        >>> [(word.key, word.rank) for word in words]
        [('found', 0), ('2', 1), ('mills', 0), ('foo', 6)]
    """
    words = []
    for number, found in enumerate(_WORD.finditer(sentence)):
        text = found.group()
        key = normalised(text)
        digit = any(char.isdigit() for char in key)
        if key in STOP_WORDS or (len(key) < 2 and not digit):
            continue
        foreign = key not in known
        named = text[0].isupper() and (foreign or number > 0)
        rank = 1 if digit else NAME * named + FOREIGN * foreign
        words.append(Word(*found.span(), key if rank else key[:STEM], rank))
    return words


def word_sets(words: list[Word]) -> list[tuple[str, ...]]:
    """Every head with two other words, then every head with one, the most telling first; each set in alphabetical order.

    The heads are the names, or without any the words that the vocabulary does not hold. A name that it does hold tells
    little: it goes only with names, foreign words and numbers.

    Args:
        words: of a question, or of a sentence without the span that is asked for.

    Example:
        >>> word_sets(find_words("When was the mill of Foo founded?", frozenset({"mill", "founded"})))
        [('foo', 'found', 'mill'), ('foo', 'found'), ('foo', 'mill')]
    """
    heads = [word for word in words if word.rank & NAME] or [word for word in words if word.rank & FOREIGN]
    telling = sorted(words, key=lambda word: (-word.rank, -len(word.key)))
    triples, pairs = [], []
    for head in heads:
        others = dict.fromkeys(o.key for o in telling if o.key != head.key and (head.rank & FOREIGN or o.rank))
        pairs += [tuple(sorted((head.key, other))) for other in others]
        two = itertools.combinations(list(others)[:TELLING], 2)
        triples += [tuple(sorted((head.key, *both))) for both in two]
    return list(dict.fromkeys(triples + pairs))


def find_sentences(text: str) -> Iterator[tuple[int, int]]:
    """Beginning and end of every sentence or line, its end mark included and the space around it not.

    Example:
        >>> [("A b.  C? d"[first:last]) for first, last in find_sentences("A b.  C? d")]
        ['A b.', 'C?', 'd']
    """
    first = len(text) - len(text.lstrip())
    for found in _SENTENCE_END.finditer(text):
        last = found.start() + len(found.group().rstrip())
        if last > first:
            yield first, last
        first = found.end()
    if len(text.rstrip()) > first:
        yield first, len(text.rstrip())


def is_request(sentence: str) -> bool:
    """Whether a sentence begins with one of `REQUESTS`."""
    first = _WORD.search(sentence)
    return first is not None and first.group().lower() in REQUESTS


def normalised(text: str) -> str:
    """Lower case, without accents."""
    if text.isascii():
        return text.lower()
    form = unicodedata.normalize("NFD", unicodedata.normalize("NFKC", text))
    return "".join(char for char in form if not unicodedata.combining(char)).lower()


def _reply_marker(tokenizer) -> torch.Tensor:
    """Tokens of the chat template after which the assistant begins."""
    if not getattr(tokenizer, "chat_template", None):
        return torch.empty(0, dtype=torch.int64)
    turn = [{"role": "user", "content": "?"}]
    without, opened = (
        tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=added) for added in (False, True)
    )
    marker = tokenizer(opened[len(without) :], add_special_tokens=False)["input_ids"]
    return torch.tensor(marker, dtype=torch.int64)
