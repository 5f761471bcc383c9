"""Which token ids a reader would call the same word."""

from __future__ import annotations

import unicodedata

import torch


_LONE_SPACE = "\ue000"
# Unicode's white space, which the reference strips; str.strip() would take the separators \x1c to \x1f too
_WHITE_SPACE = "".join(char for char in map(chr, range(0x3001)) if char.isspace() and char not in "\x1c\x1d\x1e\x1f")


def compress_vocabulary(tokenizer, vocab_size: int) -> torch.Tensor:
    """Map token ids that a reader would call the same word to one id (Engram, section 2.2).

    A token's text is NFKC- and NFD-normalised, stripped of accents, lower-cased, its white space collapsed and stripped
    (a lone space stays one); tokens that are no valid text by themselves keep their raw form. Ids are dense, in the
    order of first appearance.

    Args:
        tokenizer: a transformers tokenizer.
        vocab_size: rows of the model's embedding; ids beyond the tokenizer's keep an id of their own.

    Returns:
        [vocab_size] int64.
    """
    count = min(len(tokenizer), vocab_size)
    texts = [tokenizer.decode([token], skip_special_tokens=False) for token in range(count)]
    raw = tokenizer.convert_ids_to_tokens(list(range(count)))
    ids: dict[str, int] = {}
    mapped = [
        ids.setdefault(name if "�" in text else _normalised(text), len(ids))
        for text, name in zip(texts, raw, strict=True)
    ]
    mapped += range(len(ids), len(ids) + vocab_size - count)
    return torch.tensor(mapped, dtype=torch.int64)


def _normalised(text: str) -> str:
    form = unicodedata.normalize("NFD", unicodedata.normalize("NFKC", text))
    form = "".join(char.lower() for char in form if not unicodedata.category(char).startswith("M"))
    for blank in "\t\r\n":
        form = form.replace(blank, " ")
    while "  " in form:
        form = form.replace("  ", " ")
    form = _LONE_SPACE if form == " " else form.strip(_WHITE_SPACE)
    return form.replace(_LONE_SPACE, " ") or text
