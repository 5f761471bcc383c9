"""Overrides of a recipe, as they stand on the command line, and its YAML."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import yaml


ALIASES = {
    "epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "gradient_checkpointing": "activation_checkpointing",  # its name before transformers 5.23, which a recipe's would go before
}


def as_overrides(values: Mapping[str, Any]) -> list[str]:
    """Values as overrides that give them back.

    Example:
        >>> read_overrides(as_overrides({"max_steps": 5, "run_name": "5"}))
        {'max_steps': 5, 'run_name': '5'}
    """
    return [part for key, value in values.items() for part in (f"--{key}", json.dumps(value))]


def read_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """Overrides as values by key, in the order in which the keys were mentioned last; see `parse_recipe`.

    Example:
        >>> read_overrides(["--epochs", "2", "--batch-size=8"])
        {'num_train_epochs': 2, 'max_steps': -1, 'per_device_train_batch_size': 8}

    Raises:
        ValueError: for something that is no key, a key without a value, or a value that is not YAML.
    """
    values: dict[str, Any] = {}
    rest = list(overrides)
    while rest:
        key, equals, value = rest.pop(0).partition("=")
        if not key.startswith("--"):
            raise ValueError(f"{key!r} stands where a key should; write overrides as `--key value`.")
        if not equals:
            if not rest:
                raise ValueError(f"{key} has no value; write overrides as `--key value`.")
            value = rest.pop(0)
        phase, dot, name = key.removeprefix("--").replace("-", "_").rpartition(".")
        fresh = {ALIASES.get(name, name): parse_yaml(value, key)}
        if name == "epochs":
            fresh["max_steps"] = -1  # which would count instead
        for name, number in fresh.items():
            values.pop(f"{phase}{dot}{name}", None)
            values[f"{phase}{dot}{name}"] = number
    return values


def parse_yaml(text: str, place: str) -> Any:
    """What a YAML text says; ValueError for a text that is none, naming the place."""
    try:
        return _PlainLoader(text).get_single_data()
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        reason = " ".join(str(error).split())
    except RecursionError:
        reason = "it is nested too deeply"
    raise ValueError(f"{place} is not YAML ({reason}); correct it there.")


class _PlainLoader(yaml.SafeLoader):
    """Without aliases, of which a few lines can stand for more values than there is memory."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, "a recipe takes no aliases; write the value out", mark)
        return super().compose_node(parent, index)
