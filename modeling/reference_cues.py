"""Plain loops for the names of `cues_karla`, one position at a time, each from its last `HISTORY` tokens alone."""

from __future__ import annotations

import numpy as np

from .cues_karla import HISTORY, LEAST_OPENING, MAX_SETS, QUESTION, REACH, cue_name
from .hashing_karla import NO_NAME, scramble
from .sentences_karla import NO_TOKEN
from .words_karla import LEAD_IN, Lexicon, find_sentences, find_words, is_request, normalised, word_sets


BASE = 0x9E3779B97F4A7C15


def naive_opening(tokens: list[int], lexicon: Lexicon) -> int:
    """The opening's name of the last of `tokens`, or `NO_NAME`."""
    tokens = tokens[-HISTORY:]
    texts = ["\0" if token == NO_TOKEN else lexicon.texts[token] for token in tokens]
    if _breaks(texts[-1]):
        return NO_NAME
    for start in range(len(texts) - 1, 0, -1):
        before, text = texts[start - 1], texts[start]
        ended = before.rstrip("'\")").endswith((".", "?", "!")) and text[:1].isspace()
        if _breaks(before) or ended:
            break
    else:
        return NO_NAME
    letters = b"".join("".join(normalised(text).split()).encode() for text in texts[start:])
    if len(letters) < LEAST_OPENING:
        return NO_NAME
    total = sum((letter + 1) * BASE**i for i, letter in enumerate(letters)) % 2**64
    total ^= 2 * len(letters) + texts[-1][-1:].isspace()
    return int(scramble(np.array([total], np.uint64).view(np.int64))[0])


def naive_sets(tokens: list[int], lexicon: Lexicon) -> list[int]:
    """The names of the sets of words at the last of `tokens`, most telling first; empty outside a slot."""
    reply = lexicon.reply.tolist()
    for opener in range(len(tokens) - 1, max(-1, len(tokens) - 1 - REACH), -1):
        head = tokens[max(0, opener - QUESTION + 1) : opener + 1]
        replies = bool(reply) and tokens[max(0, opener - len(reply) + 1) : opener + 1] == reply
        if replies or _asks(head, lexicon):
            break
    else:
        return []
    turns = lexicon.text(head[: -len(reply)] if replies else head).rstrip("\0\n " if replies else "\n ")
    line = turns.split("\0")[-1]
    if not replies:
        line = line.split("\n")[-1]
        if "/" in line.split(" ")[-1]:
            return []
    sentences = [line[first:last] for first, last in find_sentences(line)]
    words = find_words(sentences[-1], lexicon.known) if sentences else []
    if not any(word.rank for word in words):
        words = find_words(line, lexicon.known)
    said = lexicon.text(tokens[opener + 1 :])
    return [cue_name(key, LEAD_IN.sub("", said, count=1)) for key in word_sets(words)[:MAX_SETS]]


def _breaks(text: str) -> bool:
    return "\n" in text or "\0" in text


def _asks(tokens: list[int], lexicon: Lexicon) -> bool:
    if tokens[-1] == NO_TOKEN:
        return False
    last = lexicon.texts[tokens[-1]]
    if "?" in last:
        return True
    requested = any(token != NO_TOKEN and lexicon.is_request[token] for token in tokens[:-1])
    if not last.rstrip().endswith((".", ":")) or not requested:
        return False
    text = lexicon.text(tokens).split("\0")[-1]
    first, end = list(find_sentences(text))[-1]
    return is_request(text[first:end])
