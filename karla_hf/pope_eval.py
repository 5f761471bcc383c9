"""pass@k of a model on problems without help, outside the trainer."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from karla_hf.pope_difficulty import Question, answer_questions, mean_pass_at_k, open_journal
from karla_hf.pope_problems import Render, guide
from karla_hf.pope_rewards import RewardFunction
from karla_hf.pope_sampling import Sampler


def evaluate(
    problems: Dataset,
    sampler: Sampler,
    reward: RewardFunction,
    *,
    num_samples: int = 16,
    ks: Sequence[int] = (1, 16),
    render: Render = guide,
    chat: bool = False,
    file: str | Path | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Sample each problem without help, and average the unbiased pass@k.

    Args:
        problems: of `make_problems`.
        sampler: the model. Give it another seed than the difficulty pass: problems that were chosen because their samples
            failed would fail again with the same samples.
        reward: a reward function; an answer is correct if its reward is 1 or more.
        num_samples: completions per problem, at least the largest k.
        ks: which pass@k to measure.
        render: puts a prefix into a prompt; here the empty one.
        chat: whether plain prompts become a user's turn.
        file: where results are kept, batch by batch; an interrupted evaluation goes on from there.
        progress: whether to show a progress bar.

    Returns:
        `pass@k` for each k, `problems` and `num_samples`.

    Raises:
        ValueError: if a k is not from 1 to `num_samples`, and as `measure_difficulty`.
    """
    wrong = [k for k in ks if not 1 <= k <= num_samples]
    if wrong:
        raise ValueError(
            f"pass@{wrong[0]} was asked of {num_samples} samples; give a k from 1 to the number of samples."
        )
    journal = open_journal("eval", sampler, reward, num_samples, file)
    questions = [Question(problem, 0) for problem in problems]
    found = answer_questions(questions, sampler, reward, journal, num_samples, render, chat, progress, "pass@k")
    results = Dataset.from_list(found)
    return {
        **{f"pass@{k}": mean_pass_at_k(results, k) for k in ks},
        "problems": len(found),
        "num_samples": num_samples,
    }
