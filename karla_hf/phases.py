"""Which trainer a recipe is for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from karla_hf.arguments import read_recipe


def run(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Train what a recipe says.

    Args:
        path: the recipe. Its `task` is "warm-up" (the head learns to predict the next token; also where it is missing) or
            "modular-addition".
        overrides: `["--key", "value", ...]`, which go before the recipe's.

    Returns:
        The summary, which also lies in the recipe's `output_dir`.

    Raises:
        FileNotFoundError, ValueError: for a recipe that cannot be used.
        OSError: if a model is found nowhere, or the results cannot be written.
    """
    task = read_recipe(path, overrides).get("task", "warm-up")
    if task == "warm-up":
        from karla_hf.training import run_recipe

        return run_recipe(path, overrides)
    if task == "modular-addition":
        from karla_hf.modular import run_modular

        return run_modular(path, overrides)
    raise ValueError(f"{path}: `task` is {task!r}; give one of warm-up, modular-addition.")
