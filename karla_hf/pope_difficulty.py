"""How hard problems are for a model as it is now: correct answers among n samples, and unbiased pass@k of them."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset
from transformers.utils import logging

from karla_hf.pope_journal import Journal, digest
from karla_hf.pope_problems import Prompt, Render, guide, render_prompt
from karla_hf.pope_rewards import RewardError, RewardFunction, is_correct
from karla_hf.pope_sampling import Sampler


class Question(NamedTuple):
    """A problem with a number of given steps.

    Attributes:
        problem: a row of `make_problems`.
        num_steps: steps of its solution that the prompt gives.
    """

    problem: Mapping[str, Any]
    num_steps: int


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """The chance that at least one of k samples is correct: 1 - C(n - c, k) / C(n, k), unbiased (arXiv 2107.03374, eq. 1).

    Args:
        num_samples: n, at least k.
        num_correct: c, from 0 to n.
        k: samples that may be tried.

    Raises:
        ValueError: for numbers outside these ranges.

    Example:
        >>> pass_at_k(16, 1, 1), pass_at_k(16, 1, 8), pass_at_k(16, 0, 16)
        (0.0625, 0.5, 0.0)
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"pass@{k} was asked of {num_samples} samples; give a k from 1 to the number of samples.")
    if not 0 <= num_correct <= num_samples:
        raise ValueError(f"{num_correct} of {num_samples} samples cannot be correct; give 0 to {num_samples}.")
    return 1 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def mean_pass_at_k(difficulty: Dataset, k: int) -> float:
    """The mean of `pass_at_k` over problems.

    Args:
        difficulty: of `measure_difficulty`.
        k: samples that may be tried.
    """
    chances = [pass_at_k(row["num_samples"], row["num_correct"], k) for row in difficulty]
    return sum(chances) / len(chances)


def measure_difficulty(
    problems: Dataset,
    sampler: Sampler,
    reward: RewardFunction,
    *,
    num_samples: int = 16,
    render: Render = guide,
    chat: bool = False,
    file: str | Path | None = None,
    progress: bool = True,
) -> Dataset:
    """Sample each problem without help, and count the correct answers.

    Args:
        problems: of `make_problems`.
        sampler: the model.
        reward: a reward function; an answer is correct if its reward is 1 or more.
        num_samples: completions per problem.
        render: puts a prefix into a prompt; here the empty one.
        chat: whether plain prompts become a user's turn.
        file: where results are kept, batch by batch; an interrupted pass goes on from there.
        progress: whether to show a progress bar.

    Returns:
        `problem_id`, `num_samples` and `num_correct` of each problem.

    Raises:
        ValueError: for a prompt that is too long, a reward function that fails or gives no number, or a file of another
            model, other settings or other problems. Finished batches stay in the file.
    """
    journal = open_journal("difficulty", sampler, reward, num_samples, file)
    questions = [Question(problem, 0) for problem in problems]
    found = answer_questions(questions, sampler, reward, journal, num_samples, render, chat, progress, "difficulty")
    return Dataset.from_list(
        [{key: record[key] for key in ("problem_id", "num_samples", "num_correct")} for record in found]
    )


def select_hard(problems: Dataset, difficulty: Dataset, max_correct: int = 0) -> Dataset:
    """The problems of which at most `max_correct` samples were correct.

    Args:
        problems: of `make_problems`.
        difficulty: of `measure_difficulty`.
        max_correct: 0 takes those that the model never solved.

    Raises:
        ValueError: if a problem was not measured, or none is hard.
    """
    correct = {row["problem_id"]: row["num_correct"] for row in difficulty}
    missing = [name for name in problems["problem_id"] if name not in correct]
    if missing:
        raise ValueError(f"The difficulty of problem {missing[0]!r} was not measured; measure it first.")
    hard = [i for i, name in enumerate(problems["problem_id"]) if correct[name] <= max_correct]
    if not hard:
        raise ValueError(
            f"No problem is hard: of each of the {len(problems)}, more than {max_correct} samples were correct; give harder "
            "problems, or allow more correct samples."
        )
    return problems.select(hard)


def open_journal(
    name: str, sampler: Sampler, reward: RewardFunction, num_samples: int, file: str | Path | None
) -> Journal:
    """The file of a pass, with what its results depend on.

    Raises:
        ValueError: if `num_samples` is below 1, or the file was made with other settings.
    """
    if num_samples < 1:
        raise ValueError(f"`num_samples` is {num_samples}; give 1 or more.")
    called = getattr(reward, "__name__", str(reward))
    return Journal(file, {"pass": name, **sampler.identity, "num_samples": num_samples, "reward": called})


def answer_questions(
    questions: Sequence[Question],
    sampler: Sampler,
    reward: RewardFunction,
    journal: Journal,
    num_samples: int,
    render: Render,
    chat: bool,
    progress: bool,
    title: str,
) -> list[dict[str, Any]]:
    """Sample questions that the journal does not answer yet, and add the answers to it.

    Returns:
        The record of each question: `problem_id`, `num_steps`, `num_samples`, `num_correct` and `digest`.

    Raises:
        ValueError: see `measure_difficulty`.
    """
    prompts = [render_prompt(question.problem, question.num_steps, render, chat=chat) for question in questions]
    digests = [digest(prompt, question.problem["answer"]) for prompt, question in zip(prompts, questions, strict=True)]
    known = {(record["problem_id"], record["num_steps"]): record for record in journal.records}
    for question, own in zip(questions, digests, strict=True):
        record = known.get(_key(question))
        if record is not None and record["digest"] != own:
            raise ValueError(
                f"Problem {question.problem['problem_id']!r} is another in {journal.path}; give another file, or the same "
                "problems and prompts."
            )
    waiting = [i for i, question in enumerate(questions) if _key(question) not in known]
    sampler.check([prompts[i] for i in waiting], [_name(questions[i]) for i in waiting])
    at_once = max(1, sampler.batch_size // num_samples)
    with logging.tqdm(total=len(questions), initial=len(questions) - len(waiting), unit="problem", desc=title,
                      disable=not progress) as bar:  # fmt: skip
        for at in range(0, len(waiting), at_once):
            batch = waiting[at : at + at_once]
            keys = ["/".join(map(str, _key(questions[i]))) for i in batch]
            completions = sampler([prompts[i] for i in batch], num_samples, keys)
            counts = count_correct(
                [questions[i].problem for i in batch], [prompts[i] for i in batch], completions, reward
            )
            records = [
                {"problem_id": questions[i].problem["problem_id"], "num_steps": questions[i].num_steps,
                 "num_samples": num_samples, "num_correct": count, "digest": digests[i]}
                for i, count in zip(batch, counts, strict=True)
            ]  # fmt: skip
            journal.add(records)
            known.update({(record["problem_id"], record["num_steps"]): record for record in records})
            bar.update(len(batch))
    return [known[_key(question)] for question in questions]


def count_correct(
    problems: Sequence[Mapping[str, Any]],
    prompts: Sequence[Prompt],
    completions: Sequence[Sequence[str]],
    reward: RewardFunction,
) -> list[int]:
    """How many completions of each problem a reward function finds correct.

    Raises:
        ValueError: if the reward function raises, or does not give a number for each completion.
    """
    counts = []
    for problem, prompt, texts in zip(problems, prompts, completions, strict=True):
        said = texts if isinstance(prompt, str) else [[{"role": "assistant", "content": text}] for text in texts]
        rows = {key: [value] * len(texts) for key, value in problem.items() if key not in ("prompt", "solution")}
        counts.append(sum(map(is_correct, _rewards(reward, problem["problem_id"], prompt, said, rows))))
    return counts


def _rewards(
    reward: RewardFunction, name: str, prompt: Prompt, completions: Sequence[Any], rows: Mapping[str, list]
) -> Iterator[float]:
    called = getattr(reward, "__name__", str(reward))
    try:
        values = reward(prompts=[prompt] * len(completions), completions=completions, **rows)
    except RewardError:
        raise
    except Exception as error:
        raise RewardError(reward, name, error) from error
    if not isinstance(values, list) or len(values) != len(completions):
        given = f"{len(values)} values" if isinstance(values, list) else f"a {type(values).__name__}"
        raise ValueError(
            f"The reward function {called!r} returned {given} for the {len(completions)} completions of problem {name!r}; "
            "return a list with one number for each."
        )
    for value in values:
        if value is None or math.isnan(value):
            raise ValueError(
                f"The reward function {called!r} returned {value} for problem {name!r}; return a number for every completion, "
                "such as 0 for an answer that cannot be judged."
            )
        yield value


def _key(question: Question) -> tuple[str, int]:
    return question.problem["problem_id"], question.num_steps


def _name(question: Question) -> str:
    given = f" with {question.num_steps} steps given" if question.num_steps else ""
    return f"problem {question.problem['problem_id']!r}{given}"
