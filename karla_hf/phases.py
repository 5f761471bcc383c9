"""Which trainer a recipe is for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from karla_hf.arguments import quick_overrides, read_recipe


def run(path: str | Path, overrides: Sequence[str] = (), *, quick: bool = False) -> dict[str, Any]:
    """Train what a recipe says.

    Args:
        path: the recipe. Its `phase` is "warm-up" (the head learns to predict the next token; also where it is missing),
            "pope" (it learns from problems), "fine-tune" (it learns to think as long as it must), "all" (the three as one
            job), "hope" (fast weights and levels on a sentence encoder) or "modular-addition" (a small network groks).
        overrides: `["--key", "value", ...]`, which go before the recipe's.
        quick: whether the recipe's `quick` values go before its others, for a run that only shows that all works.

    Returns:
        The summary, which also lies in the recipe's `output_dir`.

    Raises:
        FileNotFoundError, ValueError: for a recipe that cannot be used.
        OSError: if a model is found nowhere, or the results cannot be written.
    """
    overrides = [*(quick_overrides(path) if quick else ()), *overrides]
    phase = read_recipe(path, overrides).get("phase", "warm-up")
    if phase == "warm-up":
        from karla_hf.training import run_recipe

        return run_recipe(path, overrides)
    if phase == "pope":
        from karla_hf.pope_training import run_pope_recipe

        return run_pope_recipe(path, overrides)
    if phase == "fine-tune":
        from karla_hf.fine_tuning import run_finetune_recipe

        return run_finetune_recipe(path, overrides)
    if phase == "all":
        from karla_hf.schedule import run_all

        return run_all(path, overrides)
    if phase == "modular-addition":
        from karla_hf.modular import run_modular

        return run_modular(path, overrides)
    if phase == "hope":
        from karla_hf.hope_training import run_hope_recipe

        return run_hope_recipe(path, overrides)
    raise ValueError(
        f"{path}: `phase` is {phase!r}; give warm-up, pope, fine-tune, all, hope or modular-addition, or leave it out for "
        "warm-up."
    )
