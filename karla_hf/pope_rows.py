"""Rows for `trl.GRPOTrainer`: each problem once with the beginning of its solution and once without."""

from collections.abc import Mapping
from typing import Any

from datasets import Dataset
from transformers.utils import logging

from karla_hf.pope_problems import COLUMNS, Render, guide, prefix_fraction, render_prompt


logger = logging.get_logger(__name__)


def build_rows(problems: Dataset, prefixes: Dataset, *, chat: bool = False, render: Render = guide) -> Dataset:
    """Make two rows of each problem, guided and unguided.

    The prefix is in the prompt, so no token of it enters the loss, and a row is a group of completions of its own, so
    guided and unguided ones are never compared. `GRPOTrainer` shuffles rows, and keeps the ratio of 1:1 in every epoch.

    Args:
        problems: of `make_problems`.
        prefixes: of `find_prefixes`, for all problems or some; the others, and those without steps, are left out.
        chat: whether a plain prompt becomes a user's turn, for the chat template.
        render: puts a prefix into a prompt.

    Returns:
        `problem_id`, `prompt`, `answer`, `guided`, `num_steps`, `fraction`, and the further columns of the problems, without
        the solutions.

    Raises:
        ValueError: if no problem has a prefix.

    Example:
        >>> from karla_hf.pope_problems import make_problems
        >>> problems = make_problems([{"prompt": "1+2+3=", "solution": ["1+2=3", "3+3=6"], "answer": "6"}])
        >>> prefixes = Dataset.from_list([{"problem_id": "0", "num_steps": 1}])
        >>> rows = build_rows(problems, prefixes, render=lambda problem, prefix: f"{problem} {prefix}")
        >>> rows["prompt"][:], rows["guided"][:]
        (['1+2+3= 1+2=3', '1+2+3= '], [True, False])
    """
    steps = {row["problem_id"]: row["num_steps"] for row in prefixes}
    chosen = [problem for problem in problems if steps.get(problem["problem_id"])]
    if not chosen:
        raise ValueError(
            "No problem has a prefix, so there are no guided rows; give a larger `max_fraction` to the search."
        )
    if len(chosen) < len(problems):
        logger.warning(f"{len(problems) - len(chosen)} of {len(problems)} problems have no prefix and are left out.")
    wanted = [(problem, num_steps) for problem in chosen for num_steps in (steps[problem["problem_id"]], 0)]
    return Dataset.from_list([make_row(problem, num_steps, chat=chat, render=render) for problem, num_steps in wanted])


def unguided_rows(problems: Dataset, *, chat: bool = False, render: Render = guide) -> Dataset:
    """Make one row of each problem, without help: what plain GRPO trains on.

    Args:
        problems: of `make_problems`.
        chat: see `build_rows`.
        render: see `build_rows`.

    Returns:
        The columns of `build_rows`.
    """
    return Dataset.from_list([make_row(problem, 0, chat=chat, render=render) for problem in problems])


def make_row(problem: Mapping[str, Any], num_steps: int, *, chat: bool, render: Render) -> dict[str, Any]:
    """A row with the first steps of the solution in the prompt; see `build_rows`."""
    return {
        "problem_id": problem["problem_id"],
        "prompt": render_prompt(problem, num_steps, render, chat=chat),
        "answer": problem["answer"],
        "guided": num_steps > 0,
        "num_steps": num_steps,
        "fraction": prefix_fraction(problem["solution"], num_steps),
        **{key: value for key, value in problem.items() if key not in COLUMNS},
    }
