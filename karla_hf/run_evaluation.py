"""Measures a Karla of a training run as the recipes of the run say: held-out loss, ticks, unguided pass@k, memory."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

from datasets import Dataset
from rich.table import Table

from karla_hf import training as warmup
from karla_hf.arguments import Recipe, parse_recipe
from karla_hf.fine_tuning import FineTuneArguments, expect_ticks
from karla_hf.modeling.backbone_karla import load_tokenizer
from karla_hf.modeling.modeling_karla import KarlaForCausalLM
from karla_hf.pope_arguments import PopeRecipe, parse_pope_recipe
from karla_hf.pope_training import evaluate_problems, measured_problems
from karla_hf.report import new_console, new_table, write_json
from karla_hf.runs import RECIPE, find_checkpoint, read_kept


WARM_UP, POPE, FINE_TUNE = "warm-up", "pope", "fine-tune"


class Sources(NamedTuple):
    """Where the data of an evaluation come from.

    Attributes:
        texts: folder of a run of Phase 1 or 3, whose held-out rows are used; None for none.
        problems: folder of a run of Phase 2, whose measured problems are used; None for none.
    """

    texts: Path | None
    problems: Path | None


def evaluate_run(
    directory: str | Path, checkpoint: str | None = None, json_file: Path | None = None
) -> dict[str, Any]:
    """Measure the result or a checkpoint of a run, and print a table; see `karla eval all`.

    Args:
        directory: `output_dir` of a recipe. Of several phases, the last is meant; a phase of several also knows the data
            of the others.
        checkpoint: "best", "last" or a step; None takes the result.
        json_file: where the numbers go, or None.

    Raises:
        OSError: if this is no run, or the model is found nowhere.
        ValueError: if there is no such checkpoint.
    """
    folder, phases = find_phases(Path(directory))
    target = folder if checkpoint is None else find_checkpoint(folder, checkpoint)
    result = {"folder": str(target), **measure(target, sources(phases))}
    new_console().print(results_table({target.name: result}))
    write_json(json_file, result)
    return result


def find_phases(directory: Path) -> tuple[Path, dict[str, Path]]:
    """The folder of the last phase in a run, and those of all phases by name.

    Raises:
        FileNotFoundError: if a folder holds no run.
    """
    values = read_kept(directory)
    if values is None:
        raise FileNotFoundError(f"{directory} holds no {RECIPE}; give the `output_dir` of a training run.")
    parent = read_kept(directory.parent) or {}
    if "phases" in values:
        phases = {name: directory / name for name in values["phases"] if read_kept(directory / name) is not None}
        if not phases:
            raise FileNotFoundError(f"No phase of {directory} has begun; run `karla train` first.")
        return list(phases.values())[-1], phases
    if directory.name in parent.get("phases", ()):
        return directory, find_phases(directory.parent)[1]
    return directory, {values.get("phase", WARM_UP): directory}


def sources(phases: Mapping[str, Path]) -> Sources:
    """Where the phases of a run have texts and problems; of two with texts, the later one's are taken."""
    problems = phases.get(POPE)
    if problems is not None and not Path(problems, "eval.jsonl").is_file():
        problems = None
    return Sources(phases.get(FINE_TUNE, phases.get(WARM_UP)), problems)


def measure(
    folder: Path, data: Sources, known: Mapping[str, float] | None = None, file: Path | None = None
) -> dict[str, Any]:
    """Measure a Karla.

    Args:
        folder: of the Karla. Not modified.
        data: what to measure on.
        known: pass@k, if that was measured before.
        file: where samples for pass@k are kept, so that an interrupted pass goes on; None keeps none.

    Returns:
        `memory_rows`; with texts `held_out_loss`, `backbone_loss`, `loss_without_memory` if it has rows, `tokens`,
        and what `choose_ticks` gives; with problems `pass@1`, `pass@16` and `problems`.
    """
    tokenizer = load_tokenizer(str(folder))
    texts = None if data.texts is None else _text_recipe(data.texts)
    problems = None if data.problems is None else _pope_recipe(data.problems)
    first = texts or problems
    assert first is not None
    dtype = first.arguments.backbone_dtype
    model = KarlaForCausalLM.from_pretrained(str(folder), backbone_kwargs={} if dtype is None else {"dtype": dtype})
    model.to(first.training.device).eval()
    result: dict[str, Any] = {"memory_rows": sum(model.packs().values())}
    if texts is not None:
        result |= _measure_texts(model, tokenizer, texts)
    if known is not None:
        result |= known
    elif data.problems is not None and problems is not None:
        rows = measured_problems(problems, data.problems)
        found = evaluate_problems(problems, model, tokenizer, rows, file)
        result |= {key: value for key, value in found.items() if key != "num_samples"}
    return result


def _measure_texts(model: KarlaForCausalLM, tokenizer: Any, recipe: Recipe) -> dict[str, Any]:
    """Losses with memory and, where it holds something, without; ticks are expected of the memory as it is."""
    corpus = warmup.load_texts(recipe.arguments)
    held_out = warmup.Corpus(corpus.held_out, corpus.held_out)
    trainer = warmup.make_trainer(recipe, model, tokenizer, held_out)
    rows = cast(Dataset, trainer.eval_dataset)
    batch_size = recipe.training.per_device_eval_batch_size
    backbone, karla, tokens = warmup.held_out_losses(model, rows, trainer.plain_collator, batch_size)
    result = {"held_out_loss": karla, "backbone_loss": backbone, "tokens": tokens}
    if any(model.packs().values()):
        model.use_memory(False)
        result["loss_without_memory"] = warmup.held_out_losses(model, rows, trainer.plain_collator, batch_size)[1]
        model.use_memory(True)
    rise = getattr(recipe.arguments, "max_loss_rise", FineTuneArguments.max_loss_rise)
    return {**result, **expect_ticks(model, trainer, rows, rise)}


def _text_recipe(folder: Path) -> Recipe:
    """The recipe of a text phase, without what belongs to its training alone."""
    quiet = ["--report_to", "none", "--cache_states", "false", "--push_to_hub", "false"]
    kind = (read_kept(folder) or {}).get("phase", WARM_UP)
    return parse_recipe(folder / RECIPE, quiet, *([FineTuneArguments] if kind == FINE_TUNE else []))


def _pope_recipe(folder: Path) -> PopeRecipe:
    return parse_pope_recipe(folder / RECIPE, ["--report_to", "none", "--push_to_hub", "false"])


def results_table(results: Mapping[str, Mapping[str, Any]]) -> Table:
    """What `measure` gave, a line for each name."""
    columns = {"held-out loss": ("held_out_loss", ".4f"), "memory off": ("loss_without_memory", ".4f"),
               "bare backbone": ("backbone_loss", ".4f"),
               "pass@1": ("pass@1", ".3f"), "pass@16": ("pass@16", ".3f"), "expected ticks": ("expected_ticks", ".2f"),
               "memory rows": ("memory_rows", ",")}  # fmt: skip
    caption = (
        "Losses in nats per held-out token; pass@k without help; ticks at the threshold that costs next to nothing."
    )
    table = new_table(["", *columns], caption=caption)
    for name, found in results.items():
        cells = [format(found[key], style) if key in found else "" for key, style in columns.values()]
        table.add_row(name, *cells)
    return table
