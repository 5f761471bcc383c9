"""Recipes: flat YAML files that say which model is trained, on what, and how."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from trl import SFTConfig, TrlParser

from karla_hf.documents import read_text
from karla_hf.modeling.configuration_karla import KarlaConfig
from karla_hf.overrides import as_overrides, parse_yaml, read_overrides
from karla_hf.states import DTYPES


MODEL_OPTIONS = tuple(
    name
    for name in KarlaConfig.__annotations__
    if name.startswith(("engram_", "ctm_", "certainty_", "tick_", "ponder_"))
)


QUICK = "quick"
M3_OPTIONS = ("learning_rate", "betas", "alpha", "period", "eps")


@dataclass
class ModelArguments:
    """The model of a recipe.

    Attributes:
        phase: by which it is known what the recipe trains; see `karla_hf.phases`.
        model_name_or_path: a backbone, which gets a fresh memory and head, or a Karla, whose head is trained further.
        model_revision: its revision on the Hub.
        backbone_quantization: "nf4", "int8" or arguments of `BitsAndBytesConfig` for a fresh Karla's backbone.
        backbone_dtype: dtype of the backbone's weights, such as "bfloat16"; None keeps the checkpoint's.
        save_packed: whether the result holds ternary weights with 2 bits each. Checkpoints always hold floats.
    """

    phase: str = field(default="warm-up", metadata={"help": "What the recipe trains."})
    model_name_or_path: str = field(default="", metadata={"help": "A backbone or a Karla."})
    model_revision: str | None = field(default=None, metadata={"help": "Its revision on the Hub."})
    backbone_quantization: dict | str | None = field(default=None, metadata={"help": "nf4, int8 or a mapping."})
    backbone_dtype: str | None = field(default=None, metadata={"help": "dtype of the backbone's weights."})
    save_packed: bool = field(default=True, metadata={"help": "Save the result's ternary weights in 2 bits each."})

    def __post_init__(self):
        if not self.model_name_or_path:
            raise ValueError("`model_name_or_path` is missing; give a backbone's name or the folder of a Karla.")


@dataclass
class KarlaArguments(ModelArguments):
    """The model and the texts of a recipe. Everything about the training itself is a key of TRL's `SFTConfig`.

    Attributes:
        dataset_name: "python-reference" (the Python language reference, there without a network) or a Hub data set.
        dataset_config: its configuration on the Hub.
        dataset_split: its split on the Hub.
        dataset_files: files to train on instead of a named data set: `.jsonl` with `text`, `messages` or `prompt` and
            `completion` on each line, anything else as one plain text each; a folder stands for the texts in it.
        held_out_share: share of the rows, above 0 and below 1, that is kept from training and measured at the end; the
            Python reference has a fixed split by topic instead.
        held_out_limit: measure on the first so many held-out rows, counted after packing; None takes all.
        cache_states: run the frozen backbone over the data once, and train from its stored states; pays from the second
            epoch on.
        cache_dir: folder for the states; None takes `states` in `output_dir`.
        cache_dtype: "bfloat16", "float16" or "float32", of stored states.
        ternary_weight_decay: weight decay of the ternary weights; None takes `weight_decay`.
        ternary_decay_share: share of the training, from 0 to 1, after which that of ternary weights is 0.
        ternary_warmup: share of the training, from 0 to 1, over which weights go from float to ternary.
        muon_learning_rate: learning rate of Muon for the ternary weights; None trains them as the others, with `optim`.
        m3: options of `karla_hf.m3.M3` for them instead: `learning_rate`, and `betas`, `alpha`, `period`, `eps` if wanted.
        update_periods: steps between two changes of the parameters whose names match a regular expression.
        read_texts: the memory reads the first so many texts of the training data once, when the head is trained.
    """

    dataset_name: str | None = field(default=None, metadata={"help": "python-reference or a Hub data set."})
    dataset_config: str | None = field(default=None, metadata={"help": "Its configuration on the Hub."})
    dataset_split: str = field(default="train", metadata={"help": "Its split on the Hub."})
    dataset_files: list[str] | None = field(default=None, metadata={"help": "Text or JSON Lines files."})
    held_out_share: float = field(default=0.1, metadata={"help": "Share of the rows that is measured at the end."})
    held_out_limit: int | None = field(default=None, metadata={"help": "Measure on the first so many rows."})
    cache_states: bool = field(default=False, metadata={"help": "Run the backbone over the data once."})
    cache_dir: str | None = field(default=None, metadata={"help": "Folder for the backbone's states."})
    cache_dtype: str = field(default="bfloat16", metadata={"help": "dtype of stored states."})
    ternary_weight_decay: float | None = field(default=None, metadata={"help": "Decay of the ternary weights."})
    ternary_decay_share: float = field(default=1.0, metadata={"help": "Share of the training in which they decay."})
    ternary_warmup: float = field(default=0.0, metadata={"help": "Share of the training from float to ternary."})
    muon_learning_rate: float | None = field(default=None, metadata={"help": "Muon's, for the ternary weights."})
    m3: dict | None = field(default=None, metadata={"help": "M3's options, for the ternary weights."})
    update_periods: dict | None = field(default=None, metadata={"help": "Steps between changes, by a name's part."})
    read_texts: int = field(default=0, metadata={"help": "Texts that the memory reads at the end."})

    def __post_init__(self):
        super().__post_init__()
        if (self.dataset_name is None) == (self.dataset_files is None):
            raise ValueError("Of `dataset_name` and `dataset_files` exactly one must be given; set one of them.")
        if not 0 < self.held_out_share < 1:
            raise ValueError(
                f"`held_out_share` is {self.held_out_share}; give a share above 0 and below 1, such as 0.1."
            )
        if self.held_out_limit is not None and self.held_out_limit < 1:
            raise ValueError(f"`held_out_limit` is {self.held_out_limit}; give 1 or more rows, or leave it out.")
        if self.cache_dtype not in DTYPES:
            raise ValueError(f"`cache_dtype` is {self.cache_dtype!r}; give one of {', '.join(DTYPES)}.")
        if not 0 <= self.ternary_decay_share <= 1:
            raise ValueError(f"`ternary_decay_share` is {self.ternary_decay_share}; give a share from 0 to 1.")
        if not 0 <= self.ternary_warmup <= 1:
            raise ValueError(f"`ternary_warmup` is {self.ternary_warmup}; give a share of the training from 0 to 1.")
        if self.muon_learning_rate is not None and self.muon_learning_rate <= 0:
            raise ValueError(
                f"`muon_learning_rate` is {self.muon_learning_rate}; give a number above 0, such as 0.02."
            )
        if self.read_texts < 0:
            raise ValueError(
                f"`read_texts` is {self.read_texts}; give how many texts the memory reads, or 0 for none."
            )
        if self.m3 is not None:
            self._check_m3()

    def _check_m3(self):
        assert self.m3 is not None
        if self.muon_learning_rate is not None:
            raise ValueError("Both `m3` and `muon_learning_rate` are given; remove one of them.")
        if "learning_rate" not in self.m3 or set(self.m3) - set(M3_OPTIONS):
            raise ValueError(
                f"`m3` has the keys {sorted(self.m3)}; give `learning_rate`, and of {', '.join(M3_OPTIONS[1:])} what is wanted."
            )


# What argparse, and the checks of `TrainingArguments` and `SFTConfig`, raise for values of the wrong kind.
_WRONG_VALUES = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError, ImportError)


class Recipe(NamedTuple):
    """A recipe that has been read.

    Attributes:
        arguments: model and texts.
        training: how to train; a checked `trl.SFTConfig`.
        model_options: fields of `KarlaConfig`.
    """

    arguments: KarlaArguments
    training: SFTConfig
    model_options: dict[str, Any]


def parse_recipe(
    path: str | Path, overrides: Sequence[str] = (), kind: type[KarlaArguments] = KarlaArguments
) -> Recipe:
    """Read a recipe and check every key in it.

    Args:
        path: a YAML file, one mapping of fields of `KarlaArguments`, of `trl.SFTConfig`, and of the `engram_`, `ctm_`,
            `certainty_` and `tick_` fields of `KarlaConfig`.
        overrides: `["--key", "value", ...]` or `["--key=value", ...]`; the values are YAML and go before the recipe's.
            `--epochs` is `--num_train_epochs` and takes away `max_steps`; `--batch-size` is `--per_device_train_batch_size`.
        kind: `KarlaArguments`, or a dataclass made of it.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for a file that is no YAML mapping, for an unknown key, or for a value of the wrong kind.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "recipe.yaml")
        ...     _ = path.write_text("{model_name_or_path: me/model, dataset_name: python-reference, bf16: false}")
        ...     recipe = parse_recipe(path, ["--learning_rate", "1e-3", "--ctm_num_ticks=4"])
        >>> recipe.training.learning_rate, recipe.model_options
        (0.001, {'ctm_num_ticks': 4})
    """
    return Recipe(*parse_values(path, read_recipe(path, overrides), kind, SFTConfig))


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The keys of a recipe and their values as they stand there; see `parse_recipe`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for a file that is no YAML mapping, or damaged overrides.
    """
    values = {**_read_mapping(path), **read_overrides(overrides)}
    values.pop(QUICK, None)
    return values


def quick_overrides(path: str | Path) -> list[str]:
    """The overrides that a recipe has under `quick`, for a run that only shows that all works.

    Raises:
        FileNotFoundError, ValueError: as `read_recipe`, or if it has none.
    """
    quick = _read_mapping(path).get(QUICK)
    if not isinstance(quick, dict):
        raise ValueError(f"{path} has no `{QUICK}` values; leave --quick out, or add a mapping of keys to replace.")
    return as_overrides(quick)


def parse_values(
    path: str | Path, values: dict[str, Any], own: type, training: type
) -> tuple[Any, Any, dict[str, Any]]:
    """Check the keys and values of a recipe that trains a Karla, and sort them.

    Args:
        path: of the recipe, for messages.
        values: of `read_recipe`.
        own: `KarlaArguments` or another dataclass of arguments.
        training: a configuration of TRL.

    Returns:
        An `own`, a `training`, and the fields of `KarlaConfig`.

    Raises:
        ValueError: for an unknown key, or for a value of the wrong kind.
    """
    options = {key: values[key] for key in MODEL_OPTIONS if key in values}
    rest = {key: value for key, value in values.items() if key not in options}
    arguments, configuration = fill(path, rest, [own, training], MODEL_OPTIONS)
    return arguments, configuration, options


def fill(path: str | Path, values: dict[str, Any], kinds: Sequence[type], others: Sequence[str] = ()) -> tuple:
    """Make dataclasses of a recipe's values, which argparse converts and checks.

    Args:
        path: of the recipe, for messages.
        values: by key, as YAML gives them.
        kinds: dataclasses; each key is a field of one of them.
        others: keys that were known too, for the hint at a key that is not.

    Returns:
        One object of each kind.

    Raises:
        ValueError: for an unknown key, or for a value of the wrong kind.
    """
    known = {*others, *(item.name for kind in kinds for item in fields(kind) if item.init)}
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean `{near[0]}`?" if near else "remove it."
            owners = ", ".join(kind.__name__ for kind in kinds) + (
                " and the model options of KarlaConfig" if others else ""
            )
            raise ValueError(f"{path}: `{key}` is no key of a recipe, which are those of {owners}; {hint}")
    parser = _RecipeParser(list(kinds))  # type: ignore[arg-type]
    # argparse converts and checks defaults that are strings, and takes everything else as it is.
    try:
        parser.set_defaults_with_config(**{key: _as_argument(value) for key, value in values.items()})
        return tuple(parser.parse_args_into_dataclasses(args=[], look_for_args_file=False))
    except _WRONG_VALUES as error:
        reason = " ".join(str(error).split()).removesuffix(".") or type(error).__name__
        raise ValueError(f"{path}: {reason}.") from error


class _RecipeParser(TrlParser):
    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print before it left the process."""
        raise ValueError(f"{message.removeprefix('argument ')}; correct the value.")


def _as_argument(value: Any) -> Any:
    return value if value is None or isinstance(value, dict | list) else str(value)


def _read_mapping(path: str | Path) -> dict[str, Any]:
    values = parse_yaml(read_text(path), str(path))
    if not isinstance(values, dict):
        raise ValueError(
            f"{path} holds a {type(values).__name__}, but a recipe is a mapping; write `key: value` lines."
        )
    odd = [type(key).__name__ for key in values if not isinstance(key, str)]
    if odd:
        raise ValueError(f"{path} has a key that is a {odd[0]}, but keys are words; write `key: value` lines.")
    return values
