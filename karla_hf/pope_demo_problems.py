"""The hard problems of POPE's demonstration, and how a model is measured on them."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel

from karla_hf.pope import (
    ModelSampler,
    evaluate,
    find_prefixes,
    make_problems,
    measure_difficulty,
    reward_function,
    select_hard,
)
from karla_hf.pope_demo_base import BaseArguments, rule_probabilities, train_base
from karla_hf.programs import distinct_problems, new_tokenizer, render


BASE_SEED, EASY_SEED, HARD_SEED = 1_000, 2_000, 3_000  # added to the run's seed
EVALUATION_SEED = 4_000  # other random numbers than those by which the hard problems were chosen


@dataclass
class DemoArguments(BaseArguments):
    """The problems and how they are measured.

    Attributes:
        problems: hard programs for training.
        held_out: hard programs for the test.
        easy: programs without `AB`, half for the guard and half for the mixed arm.
        easy_pass: the least pass@1 of the base on easy programs.
        num_samples: completions per problem when difficulty and the results are measured.
        search_samples: completions per prefix.
        min_success: correct ones that are enough.
        max_fraction: longest prefix, as a share of the solution.
        sft_steps: steps of supervised fine-tuning on the oracle's solutions, with `sft_batch_size` problems each.
        sft_batch_size: problems per step of supervised fine-tuning.
        curve_every: steps between two measurements on the first `curve_problems` held-out problems, 4 samples each.
        curve_problems: how many.
        seeds: runs of every arm.
        sweep: further shares `right`, with GRPO and POPE alone and one seed.
        workers: processes that work side by side; under torchrun, its processes share every arm instead.
    """

    problems: int = 256
    held_out: int = 256
    easy: int = 256
    easy_pass: float = 0.98
    num_samples: int = 32
    search_samples: int = 16
    min_success: int = 1
    max_fraction: float = 1.0
    sft_steps: int = 32
    sft_batch_size: int = 16
    curve_every: int = 10
    curve_problems: int = 64
    seeds: int = 3
    sweep: list[float] | None = None
    workers: int = 2


@reward_function
def _rest_of_trace(completion: str, answer: str, given: str, **row: Any) -> float:
    return float([*given.split(), *completion.split()] == answer.split())


def whole_trace(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
    """1 if the steps that the prompt gives and the completion are together the answer, else 0.

    Example:
        >>> whole_trace(["<q> 3 4 A+2 . AB . <h> 5 4 <a>"] * 2, ["9 4", "10 4"], answer=["5 4 9 4"] * 2)
        [1.0, 0.0]
    """
    given = [prompt.partition("<h>")[2].removesuffix("<a>") for prompt in prompts]
    return _rest_of_trace(prompts=prompts, completions=completions, given=given, **columns)


def prepare(options: DemoArguments, seed: int, folder: Path, start: Path | None = None) -> dict[str, Any]:
    """Make what the arms of one seed share: the base, the hard problems, and their prefixes.

    Args:
        options: the demonstration.
        seed: of the run.
        folder: where the base and `training.jsonl`, `held_out.jsonl`, `prefixes.jsonl` go.
        start: a base to adapt instead of training from scratch.

    Returns:
        `measure_model`'s and `rule_probabilities`' numbers for the base; `hits` of the `samples` of the difficulty pass;
        how many problems were `training` and `held_out`; `prefix_steps`: how many prefixes have 0, 1, … steps,
        `prefix_found`, `prefix_samples`; `cpu_seconds`, and `parts` of them.

    Raises:
        ValueError: if the base is not good enough on easy programs, or no program is hard.
    """
    clocks = [time.process_time()]
    model = train_base(options, BASE_SEED + seed, start)
    model.save_pretrained(folder / "base")
    clocks.append(time.process_time())
    measure = new_measure(model, options, seed)
    easy = measure(evaluate, easy_problems(options, seed)[0], ks=(1,))["pass@1"]
    if easy < options.easy_pass:
        raise ValueError(
            f"The base solves {easy:.4f} of easy programs, less than `easy_pass` = {options.easy_pass}, so that its slips "
            "would pass for hard problems; raise `base_steps`."
        )
    problems = _problems(options.problems + options.held_out, options, options.rare, HARD_SEED + seed)
    difficulty = measure(measure_difficulty, problems)
    clocks.append(time.process_time())
    wanted = range(options.problems), range(options.problems, len(problems))
    training, held_out = (select_hard(problems.select(part), difficulty) for part in wanted)
    sampler = _sampler(model, options, seed)
    prefixes = find_prefixes(
        training, sampler, whole_trace, num_samples=options.search_samples, min_success=options.min_success,
        max_fraction=options.max_fraction, render=render, progress=False,
    )  # fmt: skip
    clocks.append(time.process_time())
    for name, rows in (("training", training), ("held_out", held_out), ("prefixes", prefixes)):
        rows.to_json(folder / f"{name}.jsonl")
    lengths = prefixes["num_steps"][:]
    parts = [after - before for before, after in itertools.pairwise(clocks)]
    return {
        **measure_model(model, held_out, options, seed),
        **rule_probabilities(model, options, EVALUATION_SEED + seed),
        "hits": sum(difficulty["num_correct"]),
        "samples": sum(difficulty["num_samples"]),
        "training": len(training),
        "held_out": len(held_out),
        "prefix_steps": [lengths.count(number) for number in range(options.length)],
        "prefix_found": sum(prefixes["found"]),
        "prefix_samples": options.search_samples * sum(lengths),
        "parts": dict(zip(("base", "difficulty", "prefixes"), parts, strict=True)),
        "cpu_seconds": time.process_time() - clocks[0],
    }


def measure_model(model: PreTrainedModel, held_out: Dataset, options: DemoArguments, seed: int) -> dict[str, float]:
    """pass@1 and pass@16 on held-out hard problems without help, and pass@1 on easy ones.

    Args:
        model: not modified.
        held_out: problems.
        options: the demonstration.
        seed: of the run.
    """
    measure = new_measure(model, options, EVALUATION_SEED + seed)
    hard = measure(evaluate, held_out, ks=(1, min(16, options.num_samples)))
    easy = measure(evaluate, easy_problems(options, seed)[0], ks=(1,))
    return {"pass@1": hard["pass@1"], "pass@16": hard[f"pass@{min(16, options.num_samples)}"], "easy": easy["pass@1"]}


def easy_problems(options: DemoArguments, seed: int) -> tuple[Dataset, Dataset]:
    """Programs without `AB`: those that guard, and those of the mixed arm."""
    problems = _problems(options.easy, options, 0, EASY_SEED + seed)
    half = options.easy // 2
    return problems.select(range(half)), problems.select(range(half, options.easy))


def _problems(count: int, options: DemoArguments, rare: int, seed: int) -> Dataset:
    return make_problems(distinct_problems(count, options.length, rare, seed), separator=" ")


def _sampler(model: PreTrainedModel, options: DemoArguments, seed: int) -> ModelSampler:
    new_tokens = 2 * options.length + 1
    return ModelSampler(model, new_tokenizer(), max_new_tokens=new_tokens, seed=seed, batch_size=512, name="base")


def new_measure(model: PreTrainedModel, options: DemoArguments, seed: int) -> Callable[..., Any]:
    """Calls a pass of `karla_hf.pope` on problems, with this model and these settings."""

    def measure(function: Callable, problems: Dataset, **further: Any) -> Any:
        settings = {"num_samples": options.num_samples, "render": render, "progress": False}
        return function(problems, _sampler(model, options, seed), whole_trace, **{**settings, **further})

    return measure
