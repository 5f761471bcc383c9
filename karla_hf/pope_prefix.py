"""The shortest beginning of a solution from which a model succeeds (POPE, arXiv 2601.18779)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from karla_hf.pope_difficulty import Question, answer_questions, open_journal
from karla_hf.pope_problems import Render, guide, prefix_fraction
from karla_hf.pope_rewards import RewardFunction
from karla_hf.pope_sampling import Sampler


def longest_prefix(solution: Sequence[str], max_fraction: float = 0.25) -> int:
    """The number of steps that fit into a share of a solution's characters; the last step never counts.

    Args:
        solution: its steps.
        max_fraction: the share, above 0 and up to 1.

    Example:
        >>> longest_prefix(["a = 1\\n", "b = 2\\n", "c = 3\\n", "d = 4\\n"]), longest_prefix(["a = 1\\n", "b = 2\\n"])
        (1, 0)
    """
    allowed = [k for k in range(1, len(solution)) if prefix_fraction(solution, k) <= max_fraction]
    return max(allowed, default=0)


def find_prefixes(
    problems: Dataset,
    sampler: Sampler,
    reward: RewardFunction,
    *,
    num_samples: int = 16,
    min_success: int = 1,
    max_fraction: float = 0.25,
    render: Render = guide,
    chat: bool = False,
    file: str | Path | None = None,
    progress: bool = True,
) -> Dataset:
    """Find, for each problem, the shortest prefix of its solution from which the model succeeds.

    Prefixes end at step boundaries and are tried from one step on, `num_samples` times each, up to `max_fraction` of the
    solution's characters. The first with `min_success` correct samples is taken, and `found` is true. If none has them,
    the longest one is taken, and `found` is false. If even the first step is longer than `max_fraction`, the problem gets
    no steps, and `found` is false.

    Args:
        problems: of `make_problems`, usually the hard ones.
        sampler: the model.
        reward: a reward function; an answer is correct if its reward is 1 or more.
        num_samples: completions per prefix.
        min_success: correct ones that are enough, from 1 to `num_samples`.
        max_fraction: above 0 and up to 1.
        render: puts a prefix into a prompt.
        chat: whether plain prompts become a user's turn.
        file: where results are kept, batch by batch; an interrupted search goes on from there.
        progress: whether to show a progress bar.

    Returns:
        `problem_id`, `num_steps`, `fraction` (of the solution's characters), `num_samples`, `num_correct` (with this
        prefix; 0 of 0 without steps) and `found`.

    Raises:
        ValueError: for numbers out of range, if no solution has a step within `max_fraction`, and as
            `measure_difficulty`. Finished batches stay in the file.
    """
    if not 0 < max_fraction <= 1:
        raise ValueError(f"`max_fraction` is {max_fraction}; give a share above 0, up to 1.")
    longest = {row["problem_id"]: longest_prefix(row["solution"], max_fraction) for row in problems}
    if not any(longest.values()):
        raise ValueError(
            f"No solution has a step that ends within {max_fraction:g} of it; give a larger `max_fraction`, or solutions "
            "in smaller steps."
        )
    tried = search_prefixes(problems, dict.fromkeys(longest, 1), longest, sampler, reward, num_samples=num_samples,
                            min_success=min_success, render=render, chat=chat, file=file, progress=progress)  # fmt: skip
    return Dataset.from_list([_result(problem, tried.get(problem["problem_id"]), min_success) for problem in problems])


def search_prefixes(
    problems: Dataset,
    shortest: Mapping[str, int],
    longest: Mapping[str, int],
    sampler: Sampler,
    reward: RewardFunction,
    *,
    num_samples: int,
    min_success: int,
    render: Render = guide,
    chat: bool = False,
    file: str | Path | None = None,
    progress: bool = True,
) -> dict[str, dict[str, Any]]:
    """Try prefixes between two lengths, shortest first, until one has `min_success` correct samples.

    Args:
        problems: of `make_problems`.
        shortest: by problem, the number of steps to begin with; 0 is the problem without help.
        longest: by problem, the number of steps to end with; below `shortest`, the problem is not tried.

    Returns:
        By problem, the record of the last prefix that was tried.

    Raises:
        ValueError: see `find_prefixes`.
    """
    if not 1 <= min_success <= num_samples:
        raise ValueError(f"`min_success` is {min_success}; give a number from 1 to the {num_samples} samples.")
    journal = open_journal("prefix", sampler, reward, num_samples, file)
    last: dict[str, dict[str, Any]] = {}
    waiting = [Question(row, shortest[row["problem_id"]]) for row in problems]
    waiting = [question for question in waiting if question.num_steps <= longest[question.problem["problem_id"]]]
    while waiting:
        title = f"prefix search, {len(waiting)} open"
        records = answer_questions(waiting, sampler, reward, journal, num_samples, render, chat, progress, title)
        last.update({record["problem_id"]: record for record in records})
        waiting = [
            Question(question.problem, question.num_steps + 1)
            for question, record in zip(waiting, records, strict=True)
            if record["num_correct"] < min_success and question.num_steps < longest[record["problem_id"]]
        ]
    return last


def _result(problem: Mapping[str, Any], record: Mapping[str, Any] | None, min_success: int) -> dict[str, Any]:
    record = record or {"num_steps": 0, "num_samples": 0, "num_correct": 0}
    return {
        "problem_id": problem["problem_id"],
        "num_steps": record["num_steps"],
        "fraction": prefix_fraction(problem["solution"], record["num_steps"]),
        "num_samples": record["num_samples"],
        "num_correct": record["num_correct"],
        "found": record["num_samples"] > 0 and record["num_correct"] >= min_success,
    }
