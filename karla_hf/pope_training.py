"""Phase 2: problems that the model never solves become learnable through oracle prefixes, on a recipe."""

import os
import platform
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from rich.table import Table
from transformers import TrainerCallback, set_seed
from trl import GRPOConfig, GRPOTrainer

from karla_hf import training as warmup
from karla_hf.pope import (
    AdaptivePrefixes,
    ModelSampler,
    StagedPrefixes,
    build_rows,
    evaluate,
    find_prefixes,
    find_reward,
    load_problems,
    measure_difficulty,
    select_hard,
)
from karla_hf.pope_arguments import PopeRecipe, parse_pope_recipe
from karla_hf.report import new_console, new_table, write_json


def run_pope_recipe(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Find the hard problems and their prefixes, train with `trl.GRPOTrainer`, and compare unguided pass@k before and after.

    Writes to `output_dir`: the passes as `difficulty.jsonl`, `prefix.jsonl` and `eval.jsonl`, which an interrupted run goes
    on from, the Karla, its tokenizer, TRL's checkpoints, and `summary.json`. Only the head is trained. Of several
    processes, the first runs the passes while the others wait, up to `ddp_timeout`.

    Args:
        path: the recipe; see `karla_hf.pope_arguments.parse_pope_recipe`. `resume_from_checkpoint` is a checkpoint's
            folder, or true for the last one in `output_dir`.
        overrides: `["--key", "value", ...]`, which go before the recipe's.

    Returns:
        The summary. Of several processes, only the first measures; the others return an empty one.

    Raises:
        FileNotFoundError, ValueError: for a recipe, problems, or passes that cannot be used.
        OSError: if the model is found nowhere, or the results cannot be written.
    """
    recipe = parse_pope_recipe(path, overrides)
    arguments, training = recipe.arguments, recipe.training
    resume = warmup.resume_folder(training)
    problems = load_problems(arguments.problems, split=arguments.problems_split, limit=arguments.problems_limit,
                             columns=arguments.problems_columns)  # fmt: skip
    set_seed(training.seed)  # a fresh head is drawn here
    model, tokenizer = warmup.load_model(arguments, recipe.model_options)
    if arguments.save_packed:
        warmup.check_packable(model)
    folder = Path(str(training.output_dir))
    folder.mkdir(parents=True, exist_ok=True)
    with training.main_process_first(local=False, desc="passes"):
        difficulty, parts, before = _run_passes(recipe, model, tokenizer, problems, folder)
    train, prefixes, measured = parts
    rows, reward, callbacks = _rows(recipe, train, prefixes)
    _check_rows(rows, training)
    trainer = GRPOTrainer(model=model, reward_funcs=reward, args=training, train_dataset=rows,
                          processing_class=tokenizer, callbacks=callbacks)  # fmt: skip
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=resume)
    seconds = time.perf_counter() - start
    summary: dict[str, Any] = {}
    if trainer.is_world_process_zero():
        model = trainer.accelerator.unwrap_model(trainer.model)
        model.pack(arguments.save_packed)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        after = _evaluate(recipe, model, tokenizer, measured, None)
        summary = {
            "recipe": str(path),
            "model": arguments.model_name_or_path,
            "problems": len(problems),
            "hard": len(train) + (len(measured) if arguments.held_out_share else 0),
            "trained_on": len(set(prefixes.filter(lambda row: row["num_steps"] > 0)["problem_id"])),
            "prefixes_found": sum(prefixes["found"]),
            "mean_prefix": sum(prefixes["fraction"]) / len(prefixes),
            "base_pass@1": sum(row["num_correct"] / row["num_samples"] for row in difficulty) / len(difficulty),
            "measured": "held-out hard problems" if arguments.held_out_share else "the hard problems of the training",
            "before": before,
            "after": after,
            "zero_gradient": _zero_share(trainer),
            "steps": trainer.state.global_step,
            "seconds": round(seconds, 1),
            "threads": torch.get_num_threads(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, {model.device.type}",
            "versions": {name: version(name) for name in ("karla-hf", "torch", "transformers", "trl")},
        }
        write_json(folder / "summary.json", summary)
        new_console().print(_table(summary))
    trainer.accelerator.wait_for_everyone()
    trainer.end()
    return summary


def _run_passes(
    recipe: PopeRecipe, model: Any, tokenizer: Any, problems: Dataset, folder: Path
) -> tuple[Dataset, tuple[Dataset, Dataset, Dataset], dict[str, Any]]:
    """The difficulty of all problems; hard ones to train on, their prefixes, and ones to measure on; pass@k before."""
    arguments, reward = recipe.arguments, find_reward(recipe.arguments.reward)
    sampler = _sampler(recipe, model, tokenizer)
    difficulty = measure_difficulty(problems, sampler, reward, num_samples=arguments.num_samples, chat=arguments.chat,
                                    file=folder / "difficulty.jsonl")  # fmt: skip
    hard = select_hard(problems, difficulty, arguments.max_correct)
    train = measured = hard
    if arguments.held_out_share:
        if len(hard) < 2:
            raise ValueError(
                "Only one problem is hard, too few to hold one out; give more problems, or set `held_out_share: 0`."
            )
        split = hard.train_test_split(test_size=arguments.held_out_share, seed=0)
        train, measured = split["train"], split["test"]
    prefixes = find_prefixes(train, sampler, reward, num_samples=arguments.num_samples, chat=arguments.chat,
                             min_success=arguments.min_success, max_fraction=arguments.max_fraction,
                             file=folder / "prefix.jsonl")  # fmt: skip
    before = _evaluate(recipe, model, tokenizer, measured, folder / "eval.jsonl")
    return difficulty, (train, prefixes, measured), before


def _sampler(recipe: PopeRecipe, model: Any, tokenizer: Any, seed: int = 0) -> ModelSampler:
    return ModelSampler(model, tokenizer, name=recipe.arguments.model_name_or_path,
                        revision=recipe.arguments.model_revision, **_sampling(recipe, seed))  # fmt: skip


def _sampling(recipe: PopeRecipe, seed: int = 0) -> dict[str, Any]:
    """The options of a sampler that draws as the training does."""
    training = recipe.training
    return {
        "max_new_tokens": training.max_completion_length,
        "temperature": training.temperature,
        "top_p": training.top_p,
        "top_k": max(0, training.top_k or 0),
        "seed": training.seed + seed,
        "batch_size": recipe.arguments.sampling_batch_size,
    }


def _evaluate(recipe: PopeRecipe, model: Any, tokenizer: Any, problems: Dataset, file: Path | None) -> dict[str, Any]:
    sampler = _sampler(recipe, model, tokenizer, seed=1)  # not the samples by which the problems were chosen
    arguments = recipe.arguments
    return evaluate(problems, sampler, find_reward(arguments.reward), num_samples=arguments.eval_samples,
                    chat=arguments.chat, file=file)  # fmt: skip


def _rows(recipe: PopeRecipe, problems: Dataset, prefixes: Dataset) -> tuple[Dataset, Any, list[TrainerCallback]]:
    """The rows, the reward function and the callbacks that the trainer gets."""
    arguments, reward = recipe.arguments, find_reward(recipe.arguments.reward)
    if arguments.curriculum == "adaptive":
        adaptive = AdaptivePrefixes(problems, prefixes, target=arguments.target_success, chat=arguments.chat,
                                    num_samples=cast(int, recipe.training.num_generations),
                                    max_fraction=arguments.max_fraction)  # fmt: skip
        return adaptive.dataset, adaptive.watch(reward), [adaptive]
    if arguments.curriculum == "staged":
        staged = StagedPrefixes(problems, prefixes, reward, every=arguments.search_steps, chat=arguments.chat,
                                num_samples=arguments.num_samples, min_success=arguments.min_success,
                                sampling=_sampling(recipe, seed=2))  # fmt: skip
        return staged.dataset, reward, [staged]
    return build_rows(problems, prefixes, chat=arguments.chat), reward, []


def _check_rows(rows: Dataset, training: GRPOConfig) -> None:
    """Refuse a batch that the rows cannot fill: GRPOTrainer would stop at step 0 without an error."""
    completions, per_row = cast(int, training.generation_batch_size), cast(int, training.num_generations)
    needed = completions // per_row
    if len(rows) < needed:
        raise ValueError(
            f"A generation takes {needed} rows ({completions} completions, {per_row} of each), "
            f"but there are {len(rows)}; give more problems, or a smaller batch."
        )


def _zero_share(trainer: GRPOTrainer) -> float | None:
    """The mean share of groups without a gradient, because all their rewards are the same."""
    shares = [entry["frac_reward_zero_std"] for entry in trainer.state.log_history if "frac_reward_zero_std" in entry]
    return sum(shares) / len(shares) if shares else None


def _table(summary: dict[str, Any]) -> Table:
    title = f"Unguided, on {summary['before']['problems']} of {summary['measured']}"
    caption = (
        f"{summary['hard']} of {summary['problems']} problems are hard; a prefix was found for "
        f"{summary['prefixes_found']} of {summary['trained_on']}. {summary['steps']} steps in {summary['seconds']:.0f} s."
    )
    table = new_table(["", "pass@1", "pass@16"], title=title, caption=caption)
    for name in ("before", "after"):
        table.add_row(f"{name} the training", *(f"{summary[name][key]:.3f}" for key in ("pass@1", "pass@16")))
    return table
