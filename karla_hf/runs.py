"""The folder of a training run: the recipe it was trained with, its checkpoints, its log, and its summary."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from transformers import TrainerCallback

from karla_hf.documents import read_text


RECIPE, SUMMARY, STATE = "recipe.yaml", "summary.json", "trainer_state.json"
NOT_KEPT = ("resume_from_checkpoint", "hub_token")


def keep_recipe(values: Mapping[str, Any], folder: str | Path) -> None:
    """Write the values of a recipe, overrides included, as `recipe.yaml` into the folder of its run.

    Args:
        values: of `karla_hf.arguments.read_recipe`. Secrets, and what says how to resume, are left out.
        folder: made if it is not there.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    fresh = folder / f".{RECIPE}"
    fresh.write_text(yaml.safe_dump(kept(values), sort_keys=False, allow_unicode=True), encoding="utf-8")
    os.replace(fresh, folder / RECIPE)


def kept(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a recipe that `keep_recipe` writes.

    Example:
        >>> kept({"max_steps": 5, "hub_token": "hf_abc"})
        {'max_steps': 5}
    """
    return {key: value for key, value in values.items() if key not in NOT_KEPT}


def read_kept(folder: str | Path) -> dict[str, Any] | None:
    """The values that `keep_recipe` wrote; None if there are none."""
    path = Path(folder, RECIPE)
    return yaml.safe_load(read_text(path)) if path.is_file() else None


def read_summary(folder: str | Path) -> dict[str, Any] | None:
    """The summary of a run that is finished; None for any other."""
    return _read_json(Path(folder, SUMMARY))


def whole_checkpoints(folder: str | Path) -> dict[int, Path]:
    """The checkpoints of a run by their step, in order, without one whose writing was interrupted.

    A trainer writes `trainer_state.json` last.
    """
    found = {}
    for path in Path(folder).glob("checkpoint-*"):
        step = path.name.removeprefix("checkpoint-")
        if step.isdigit() and _read_json(path / STATE) is not None:
            found[int(step)] = path
    return dict(sorted(found.items()))


def last_checkpoint(folder: str | Path) -> Path | None:
    """The last checkpoint that is whole; None if there is none."""
    return next(reversed(whole_checkpoints(folder).values()), None)


def log_history(folder: str | Path) -> list[dict[str, Any]]:
    """What a trainer logged, entry by entry: of the run if it is finished, else up to its last checkpoint.

    Raises:
        OSError: if there is no log.
    """
    for place in (Path(folder), last_checkpoint(folder)):
        state = None if place is None else _read_json(place / STATE)
        if state is not None:
            return state["log_history"]
    raise FileNotFoundError(f"{folder} holds no log of a training run; give the `output_dir` of one that saved.")


def find_checkpoint(folder: str | Path, which: str) -> Path:
    """A checkpoint of a run.

    Args:
        folder: of the run.
        which: "last", "best" (with the lowest loss on held-out data, among those that are there), or a step.

    Raises:
        ValueError: if it is not there, or the run did not evaluate.
    """
    found = whole_checkpoints(folder)
    if not found:
        raise ValueError(f"{folder} holds no checkpoints; give the `output_dir` of a run that saved some.")
    if which == "last":
        return list(found.values())[-1]
    if which != "best":
        if not which.isdigit() or int(which) not in found:
            steps = ", ".join(map(str, found))
            raise ValueError(f"{folder} has no checkpoint {which!r}; give best, last, or one of the steps {steps}.")
        return found[int(which)]
    losses = {entry["step"]: loss for entry in log_history(folder) if (loss := held_out_loss(entry)) is not None}
    measured = [step for step in found if step in losses]
    if not measured:
        raise ValueError(
            f"None of the checkpoints of {folder} was evaluated on the way; give last, or train with `eval_strategy: steps` "
            "and `eval_steps` that divide `save_steps`."
        )
    return found[min(measured, key=lambda step: losses[step])]


def held_out_loss(entry: Mapping[str, Any]) -> float | None:
    """The loss on held-out data in an entry of a log, or None.

    Example:
        >>> held_out_loss({"eval_val_loss": 2.5, "step": 10}), held_out_loss({"loss": 2.5, "step": 10})
        (2.5, None)
    """
    return entry.get("eval_val_loss", entry.get("eval_loss"))


class PhaseName(TrainerCallback):
    """Puts the name of the phase before a trainer's progress bar.

    Args:
        trainer: whose bar is meant.
        name: of the phase.
    """

    def __init__(self, trainer: Any, name: str):
        self.callbacks, self.name = trainer.callback_handler.callbacks, name

    def on_train_begin(self, args, state, control, **kwargs):
        """Name the bar, which exists by now."""
        for callback in self.callbacks:
            bar = getattr(callback, "training_bar", None)
            if bar is not None:
                bar.set_description(self.name)


def _read_json(path: Path) -> dict[str, Any] | None:
    """A whole JSON mapping, or None."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return data if isinstance(data, dict) else None
