"""Recipes of HOPE: which encoder, which texts, and how."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from transformers import TrainingArguments

from karla_hf.arguments import fill, read_recipe


HOPE_OPTIONS = (
    "encoder_context", "num_hidden_layers", "num_attention_heads", "sequence_length", "chunk_size", "self_referential",
    "snapshot_periods", "conv_size", "level_sizes", "level_periods", "initializer_range",
)  # fmt: skip


@dataclass
class HopeArguments:
    """Encoder and texts of a recipe. Everything about the training itself is a key of transformers' `TrainingArguments`.

    Attributes:
        encoder_name_or_path: a sentence encoder, which stays frozen under fresh fast weights and levels.
        encoder_revision: its revision on the Hub.
        model_name_or_path: a HOPE to train further, instead of an encoder.
        dataset_name: "python-reference" (the Python language reference, there without a network) or a Hub data set.
        dataset_config: its configuration on the Hub.
        dataset_split: its split on the Hub.
        dataset_files: files, or folders of texts, to train on instead of a named data set.
        held_out_share: share of the rows that is kept from training; the Python reference has a fixed split instead.
        streaming: read a Hub data set as far as training gets, without a copy of it on this machine; needs `max_steps`.
        held_out_rows: so many first rows of a stream are kept from training.
        compare: whether to train a causal transformer of as many trainable parameters on the same tokens too.
    """

    phase: str = field(default="hope", metadata={"help": "What the recipe trains."})
    encoder_name_or_path: str | None = field(default=None, metadata={"help": "A sentence encoder."})
    encoder_revision: str | None = field(default=None, metadata={"help": "Its revision on the Hub."})
    model_name_or_path: str | None = field(default=None, metadata={"help": "A HOPE to train further."})
    dataset_name: str | None = field(default=None, metadata={"help": "python-reference or a Hub data set."})
    dataset_config: str | None = field(default=None, metadata={"help": "Its configuration on the Hub."})
    dataset_split: str = field(default="train", metadata={"help": "Its split on the Hub."})
    dataset_files: list[str] | None = field(default=None, metadata={"help": "Text or JSON Lines files."})
    held_out_share: float = field(default=0.1, metadata={"help": "Share of the rows that is measured at the end."})
    streaming: bool = field(default=False, metadata={"help": "Read a Hub data set as far as training gets."})
    held_out_rows: int = field(default=500, metadata={"help": "First rows of a stream that are measured at the end."})
    compare: bool = field(default=False, metadata={"help": "Train a transformer of the same size too."})

    def __post_init__(self):
        if (self.encoder_name_or_path is None) == (self.model_name_or_path is None):
            raise ValueError(
                "Of `encoder_name_or_path` and `model_name_or_path` exactly one must be given; set one of them."
            )
        if (self.dataset_name is None) == (self.dataset_files is None):
            raise ValueError("Of `dataset_name` and `dataset_files` exactly one must be given; set one of them.")
        if not 0 < self.held_out_share < 1:
            raise ValueError(
                f"`held_out_share` is {self.held_out_share}; give a share above 0 and below 1, such as 0.1."
            )
        if self.streaming and self.dataset_name in (None, "python-reference"):
            raise ValueError("`streaming` is true, but only a Hub data set is streamed; name one in `dataset_name`.")
        if self.held_out_rows < 1:
            raise ValueError(f"`held_out_rows` is {self.held_out_rows}; give 1 or more.")


class HopeRecipe(NamedTuple):
    """A recipe that has been read.

    Attributes:
        arguments: encoder and texts.
        training: how to train.
        options: fields of `HopeConfig`.
    """

    arguments: HopeArguments
    training: TrainingArguments
    options: dict[str, Any]


def parse_hope_recipe(path: str | Path, overrides: Sequence[str] = ()) -> HopeRecipe:
    """Read a recipe and check every key in it.

    Args:
        path: a YAML file, one mapping of fields of `HopeArguments`, of `TrainingArguments`, and of those fields of
            `HopeConfig` that `HOPE_OPTIONS` names.
        overrides: `["--key", "value", ...]`, which go before the recipe's.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for a file that is no YAML mapping, for an unknown key, or for a value of the wrong kind.
    """
    values = read_recipe(path, overrides)
    options = {key: values.pop(key) for key in HOPE_OPTIONS if key in values}
    arguments, training = fill(path, values, [HopeArguments, TrainingArguments], HOPE_OPTIONS)
    if arguments.streaming and training.max_steps < 1:
        raise ValueError(f"{path}: a stream has no known end; give `max_steps`.")
    if arguments.model_name_or_path and options:
        raise ValueError(
            f"{path}: {arguments.model_name_or_path} was made with its own {', '.join(options)}; remove them from the recipe."
        )
    return HopeRecipe(arguments, training, options)
