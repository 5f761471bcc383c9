"""Sequences to train a HOPE on: tokens of whole texts, end to end, cut into equal pieces."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import NamedTuple

import torch
from datasets import Dataset, IterableDataset, load_dataset
from transformers import PreTrainedTokenizerBase

from karla_hf.corpora import load_corpus
from karla_hf.hope_arguments import HopeArguments


SHUFFLED_TEXTS = 1000  # of a stream, held at once


class Sequences(NamedTuple):
    """Rows with `input_ids` and `labels`, both of `sequence_length` tokens.

    Attributes:
        train: for training; of a stream, an `IterableDataset`.
        held_out: that training does not see.
    """

    train: Dataset | IterableDataset
    held_out: Dataset


def load_sequences(arguments: HopeArguments, tokenizer: PreTrainedTokenizerBase, length: int) -> Sequences:
    """The data of a recipe as sequences; a remainder shorter than one is left out.

    Args:
        arguments: of the recipe. A stream is read as far as training gets; its first `held_out_rows` rows are held out.
        tokenizer: the encoder's.
        length: tokens of a sequence.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: for rows that are no texts, or too few tokens for one sequence.
    """
    if arguments.streaming:
        assert arguments.dataset_name is not None
        stream = load_dataset(
            arguments.dataset_name, arguments.dataset_config, split=arguments.dataset_split, streaming=True
        )
        held_out = [row["text"] for row in stream.take(arguments.held_out_rows)]
        rest = stream.skip(arguments.held_out_rows).shuffle(seed=0, buffer_size=SHUFFLED_TEXTS)
        names = list(next(iter(stream)))
        packed = rest.map(
            lambda rows: pack(rows["text"], tokenizer, length), batched=True, batch_size=100, remove_columns=names
        )
        return Sequences(packed, _packed(held_out, tokenizer, length, "held-out rows"))
    corpus = load_corpus(
        arguments.dataset_name,
        files=arguments.dataset_files,
        config=arguments.dataset_config,
        split=arguments.dataset_split,
        held_out_share=arguments.held_out_share,
    )
    if "text" not in corpus.train.column_names:
        raise ValueError(f"The rows have the keys {corpus.train.column_names}; HOPE learns from rows with `text`.")
    parts = {"training rows": corpus.train, "held-out rows": corpus.held_out}
    return Sequences(*(_packed(rows["text"], tokenizer, length, name) for name, rows in parts.items()))


def pack(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, length: int) -> dict[str, list[list[int]]]:
    """Tokens of all texts, each with an end-of-text token, cut into sequences.

    Returns:
        `input_ids` and `labels`, which are the same; models shift them.
    """
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    ends = [] if end is None else [end]
    encoded = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    tokens = list(chain.from_iterable([*ids, *ends] for ids in encoded))
    sequences = [tokens[at : at + length] for at in range(0, len(tokens) - length + 1, length)]
    return {"input_ids": sequences, "labels": sequences}


def as_tensor(rows: Dataset) -> torch.Tensor:
    """[N, T] int64: all sequences."""
    return torch.tensor(rows["input_ids"][:])


def _packed(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, length: int, name: str) -> Dataset:
    rows = pack(texts, tokenizer, length)
    if not rows["input_ids"]:
        raise ValueError(
            f"The {name} have fewer than {length} tokens, one sequence; give more text or a smaller `sequence_length`."
        )
    return Dataset.from_dict(rows)
