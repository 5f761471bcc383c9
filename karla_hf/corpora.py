"""Texts to train on, split into rows for training and rows that are held out."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from datasets import Dataset, load_dataset

from karla_hf.documents import find_texts, python_reference, read_text


PYTHON_REFERENCE = "python-reference"
# One topic of each kind: statements, expressions, literals, the data model.
HELD_OUT_TOPICS = ("assignment", "calls", "comparisons", "objects", "raise", "strings")
ROW_KINDS = ({"text"}, {"messages"}, {"prompt", "completion"})


class Corpus(NamedTuple):
    """Rows as TRL's `SFTTrainer` takes them, with `text`, `messages`, or `prompt` and `completion`.

    Attributes:
        train: rows for training.
        held_out: rows that training must not see.
    """

    train: Dataset
    held_out: Dataset


def load_corpus(
    name: str | None = None,
    *,
    files: Sequence[str | Path] | None = None,
    config: str | None = None,
    split: str = "train",
    held_out_share: float = 0.1,
) -> Corpus:
    """Load a data set by name, or files, and hold some rows out; the same arguments give the same rows.

    Args:
        name: "python-reference", or a data set on the Hub. Not needed with `files`.
        files: paths; `.jsonl` files hold a row on each line, every other file is one text, a folder holds those that
            `find_texts` finds.
        config: the Hub data set's configuration.
        split: the Hub data set's split.
        held_out_share: share of the rows that is held out, drawn with a fixed seed. A single text gives its end. The
            Python reference has its own split, by topic.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: for a file that holds no rows or damaged ones, or if nothing is left to train on.

    Example:
        >>> load_corpus("python-reference").held_out
        Dataset({
            features: ['text'],
            num_rows: 6
        })
    """
    if files is not None:
        rows = [row for path in files for row in _read_rows(Path(path))]
        _check_same_kind(rows, files)
        if len(rows) == 1 and "text" in rows[0]:
            return _cut_text(rows[0]["text"], held_out_share)
        data = Dataset.from_list(rows)
    elif name == PYTHON_REFERENCE:
        return _split_reference()
    else:
        data = load_dataset(name, config, split=split)
    if len(data) < 2:
        raise ValueError(f"{files or name} holds {len(data)} row(s), too few to hold one out; give 2 or more.")
    parts = data.train_test_split(test_size=held_out_share, seed=0)
    return Corpus(parts["train"], parts["test"])


def _split_reference() -> Corpus:
    """The Python reference without its repetitions: some topics are parts of others, such as "for" of "compound".

    A paragraph that stands in a held-out topic is in no training row, and no training row repeats one of another.
    """
    topics = python_reference()
    held_out = [topics.pop(topic) for topic in HELD_OUT_TOPICS]
    seen = {_normal(paragraph) for text in held_out for paragraph in text.split("\n\n")}
    train = []
    for topic in sorted(topics):
        fresh = []
        for paragraph in topics[topic].split("\n\n"):
            if _normal(paragraph) not in seen:
                fresh.append(paragraph)
                seen.add(_normal(paragraph))
        if fresh:
            train.append("\n\n".join(fresh))
    return Corpus(Dataset.from_dict({"text": train}), Dataset.from_dict({"text": held_out}))


def _normal(paragraph: str) -> str:
    return " ".join(paragraph.split())


def _cut_text(text: str, held_out_share: float) -> Corpus:
    """The beginning of one text, and its end, cut between two paragraphs, or else between two lines."""
    separator = "\n\n" if "\n\n" in text.strip() else "\n"
    parts = text.strip().split(separator)
    if len(parts) < 2:
        raise ValueError("The only text given is a single line, so nothing can be held out; give a longer text.")
    cut = min(max(round(len(parts) * (1 - held_out_share)), 1), len(parts) - 1)
    train, held_out = separator.join(parts[:cut]), separator.join(parts[cut:])
    return Corpus(Dataset.from_dict({"text": [train]}), Dataset.from_dict({"text": [held_out]}))


def _read_rows(path: Path) -> list[dict]:
    if path.is_dir():
        return [{"text": text} for text in find_texts(path).texts.values()]
    text = read_text(path)
    if path.suffix != ".jsonl":
        return [{"text": text}]
    lines = enumerate(text.split("\n"), start=1)
    return [_parse_row(line, f"{path}, line {number}") for number, line in lines if line.strip()]


def _parse_row(line: str, place: str) -> dict:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place} is not JSON ({error.msg} at column {error.colno}); correct the line.") from None
    except (ValueError, RecursionError):
        raise ValueError(f"{place} is JSON with too many digits or brackets; correct the line.") from None
    keys = set(row) if isinstance(row, dict) else set()
    kinds = [kind for kind in ROW_KINDS if kind <= keys and all(row[key] for key in kind)]
    if len(kinds) != 1:
        raise ValueError(
            f'{place} has the keys {sorted(keys)}; give one of "text", "messages", or "prompt" and "completion", not blank.'
        )
    return {key: row[key] for key in sorted(kinds[0])}


def _check_same_kind(rows: list[dict], files: Sequence[str | Path]) -> None:
    kinds = {tuple(row) for row in rows}
    if len(kinds) > 1:
        raise ValueError(
            f"{', '.join(map(str, files))} mix rows with {' and with '.join(str(list(kind)) for kind in sorted(kinds))}; "
            "give rows of one kind."
        )
