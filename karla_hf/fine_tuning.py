"""Phase 3: a trained head is fine-tuned to think as long as it must, watched for grokking, and calibrated."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset

from karla_hf.arguments import KarlaArguments, Recipe
from karla_hf.checkpoints import save_option
from karla_hf.grokking_callback import GrokkingCallback, GrokkingOptions, watch_grokking
from karla_hf.modeling.modeling_karla import KarlaForCausalLM
from karla_hf.report import new_console
from karla_hf.ticks import TickTable, calibrate, measure_rows
from karla_hf.trainer import KarlaSFTTrainer
from karla_hf.training import run_recipe


@dataclass
class FineTuneArguments(KarlaArguments, GrokkingOptions):
    """A recipe of Phase 3: that of Phase 1, how it is watched (`GrokkingOptions`), and how the threshold is found.

    `grokking_classes` is the vocabulary unless set, since a language model is judged by its loss.

    Attributes:
        phase: "fine-tune", by which such a recipe is known.
        probe_rows: fixed rows of the training data, from 1 to 512, whose loss is compared with that of the held-out rows at
            every evaluation.
        max_loss_rise: share by which the calibrated ticks may raise the held-out loss above the lowest that any have.
    """

    phase: str = field(default="fine-tune", metadata={"help": "fine-tune."})
    probe_rows: int = field(default=512, metadata={"help": "Rows of the training data that are evaluated."})
    max_loss_rise: float = field(default=0.003, metadata={"help": "Most that stopping early may cost."})

    def __post_init__(self):
        super().__post_init__()
        if not 1 <= self.probe_rows <= 512:
            raise ValueError(f"`probe_rows` is {self.probe_rows}; give a number from 1 to 512.")
        if self.max_loss_rise < 0:
            raise ValueError(f"`max_loss_rise` is {self.max_loss_rise}; give 0 or more, such as 0.003.")


def run_finetune_recipe(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Train as `run_recipe` does, watch for grokking, and let the result stop thinking where it is certain enough.

    Adaptive computation: a `ponder_cost` and a `tick_loss` over several ticks are options of the model. At the end the number
    of ticks and the threshold of certainty with the fewest expected ticks are found on the held-out rows (`choose_ticks`) and
    written into the Karla's configuration.

    Args:
        path: the recipe, whose keys are those of `FineTuneArguments`, `trl.SFTConfig` and the model options. It must evaluate
            (`eval_strategy`).
        overrides: `["--key", "value", ...]`, which go before the recipe's.

    Returns:
        The summary of `run_recipe`, that of `choose_ticks`, and `grokking`, the detector's summary.

    Raises:
        FileNotFoundError, ValueError, OSError: as `run_recipe`.
    """
    watching: list[GrokkingCallback] = []

    def prepare(trainer: KarlaSFTTrainer, recipe: Recipe) -> None:
        watching.append(_watch(trainer, recipe.arguments))  # type: ignore[arg-type]

    def extend(trainer: KarlaSFTTrainer, recipe: Recipe, rows: Dataset) -> dict[str, Any]:
        model = trainer.accelerator.unwrap_model(trainer.model)
        found = expect_ticks(model, trainer, rows, recipe.arguments.max_loss_rise)  # type: ignore[attr-defined]
        for option, name in (("ctm_num_ticks", "num_ticks"), ("certainty_threshold", "threshold")):
            setattr(model.config, option, found[name])
            save_option(str(trainer.args.output_dir), option, found[name])
        trainer.log({"expected_ticks": found["expected_ticks"]})
        trainer.save_state()
        new_console().print(
            f"Expected ticks {found['expected_ticks']:.2f} of at most {found['num_ticks']}, certainty that ends a thought "
            f"{found['threshold']}, loss {found['loss_at_threshold']:.4f}.",
            markup=False,
        )
        return {**found, "grokking": watching[0].detector.summary()}

    return run_recipe(path, overrides, kind=FineTuneArguments, prepare=prepare, extend=extend)


def expect_ticks(
    model: KarlaForCausalLM, trainer: KarlaSFTTrainer, rows: Dataset, max_rise: float = 0.003
) -> dict[str, Any]:
    """How many ticks a Karla is expected to need on rows; see `choose_ticks`.

    Args:
        model: its own threshold plays no part. Not modified.
        trainer: whose collator says what counts.
        rows: tokenized.
        max_rise: share by which the loss may rise.
    """
    return choose_ticks(measure_rows(model, (_on(model, trainer.plain_collator([row])) for row in rows)), max_rise)


def choose_ticks(table: TickTable, max_rise: float) -> dict[str, Any]:
    """The number of ticks and the threshold of certainty that think least and lose next to nothing.

    Tokens that are certain gain by thinking too, so fewer ticks for all may cost less than an early end for some; both are
    tried together.

    Args:
        table: what every token is after every tick.
        max_rise: share by which the loss may rise above the lowest that any choice has.

    Returns:
        `num_ticks`, the most that a token thinks; `threshold`, or None if all think that many; `expected_ticks`, and
        `loss_at_threshold`.

    Example:
        >>> import torch
        >>> losses = torch.tensor([[3.0, 3.0], [1.0, 1.0], [1.2, 1.2]])  # the second tick does harm
        >>> sure = torch.tensor([[0.0, 0.0], [0.1, 0.2], [0.3, 0.4]])
        >>> choose_ticks(TickTable(sure, losses, losses < 2, torch.tensor([0, 0])), max_rise=0.01)
        {'num_ticks': 1, 'threshold': None, 'expected_ticks': 1.0, 'loss_at_threshold': 1.0}
    """
    choices: list[dict[str, Any]] = []
    for most in range(1, table.num_ticks + 1):
        end = most + 1
        part = TickTable(table.certainties[:end], table.losses[:end], table.hits[:end], table.group)
        found = calibrate(part)
        all_ticks: dict[str, Any] = {**found.per_tick[-1], "threshold": None, "ticks": float(most)}
        entries: list[dict[str, Any]] = [all_ticks, *found.per_threshold]
        choices += [
            {"num_ticks": most, "threshold": entry["threshold"], "expected_ticks": entry["ticks"],
             "loss_at_threshold": entry["loss"]}
            for entry in entries
        ]  # fmt: skip
    limit = (1 + max_rise) * min(choice["loss_at_threshold"] for choice in choices)
    allowed = [choice for choice in choices if choice["loss_at_threshold"] <= limit]
    return min(allowed, key=lambda choice: (choice["expected_ticks"], choice["loss_at_threshold"]))


def _on(model: KarlaForCausalLM, batch: dict[str, Any]) -> dict[str, Any]:
    return {key: value.to(model.device) for key, value in batch.items()}


def _watch(trainer: KarlaSFTTrainer, arguments: FineTuneArguments) -> GrokkingCallback:
    """Let a trainer evaluate a fixed part of its training rows too, and watch both losses."""
    count = min(arguments.probe_rows, len(trainer.train_dataset))
    probe = trainer.train_dataset.select(range(count))
    parts: Any = {arguments.grokking_train: probe, arguments.grokking_validation: trainer.eval_dataset}
    trainer.eval_dataset = parts
    if arguments.grokking_classes is None:
        arguments.grokking_classes = trainer.model.config.text_config.vocab_size
    names = GrokkingOptions.__dataclass_fields__
    return watch_grokking(trainer, GrokkingOptions(**{name: getattr(arguments, name) for name in names}))
