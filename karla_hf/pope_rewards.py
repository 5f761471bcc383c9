"""Rewards for outcomes, with the signature of `trl.GRPOTrainer`, that log guided and unguided accuracy apart.

`trl grpo --reward_funcs karla_hf.pope.exact_reward` finds them by their import path.
"""

import functools
import importlib
import json
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias


RewardFunction: TypeAlias = Callable[..., list[float | None]]
CORRECT = 1.0  # the least reward of a correct answer
TIME_LIMIT = 5  # seconds to compare two answers as mathematics

_MARK = re.compile(r"(?:####|answer\s*(?:is|:)|<answer>)[ \t]*", re.IGNORECASE)


def reward_function(score: Callable[..., float | None]) -> RewardFunction:
    """Make a reward function for `trl.GRPOTrainer` of a score for one completion.

    The result takes `prompts`, `completions` (texts or chat messages), the columns of the data set as lists, and
    `log_metric` and `log_extra` if the trainer gives them. With a column `guided`, it logs the share of correct answers
    (score 1 or more) as `guided/accuracy` and `unguided/accuracy`: one call per completion, so that the means are those of
    all completions of all processes, and a process without rows of a kind adds nothing. It also adds the columns
    `problem_id`, `guided` and `num_steps` to the table of completions.

    Args:
        score: takes `completion` (a text) and the row's columns by name, such as `answer`; returns a reward, 1 or more if
            the answer is correct, or None where it does not apply, which the trainer leaves out.

    Raises:
        RewardError: when the reward function is called and `score` raises, naming the problem.

    Example:
        >>> @reward_function
        ... def ends_with(completion, answer, **row):
        ...     return float(completion.endswith(answer))
        >>> ends_with(prompts=["1+1=", "1+2="], completions=["2", "4"], answer=["2", "3"])
        [1.0, 0.0]
    """

    @functools.wraps(score)
    def reward(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        columns.pop("trainer_state", None)
        log_metric, log_extra = columns.pop("log_metric", None), columns.pop("log_extra", None)
        rows = {key: values for key, values in columns.items() if isinstance(values, list)}
        rewards: list[float | None] = []
        for i, completion in enumerate(completions):
            row = {key: values[i] for key, values in rows.items()}
            try:
                rewards.append(score(completion=completion_text(completion), **row))
            except Exception as error:
                raise RewardError(reward, row.get("problem_id"), error) from error
        if log_metric is not None and "guided" in rows:
            for guided, value in zip(rows["guided"], rewards, strict=True):
                if value is not None:
                    log_metric("guided/accuracy" if guided else "unguided/accuracy", float(is_correct(value)))
            for guided, fraction in zip(rows["guided"], rows.get("fraction", ()), strict=False):
                if guided:
                    log_metric("guided/fraction", fraction)
        if log_extra is not None:
            for key in ("problem_id", "guided", "num_steps"):
                if key in rows:
                    log_extra(key, list(rows[key]))
        return rewards

    return reward


class RewardError(ValueError):
    """A reward function raised.

    Args:
        reward: the function.
        name: of the problem, if it is known.
        error: what it raised.
    """

    def __init__(self, reward: Callable, name: str | None, error: Exception):
        where = "" if name is None else f" for problem {name!r}"
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        called = getattr(reward, "__name__", str(reward))
        super().__init__(f"The reward function {called!r} failed{where} ({reason}); correct it, and start again.")


def is_correct(reward: float) -> bool:
    """Whether a reward is that of a correct answer: 1 or more."""
    return reward >= CORRECT


def completion_text(completion: str | Sequence[Mapping[str, Any]]) -> str:
    """The text of a completion, which is a text or chat messages."""
    if isinstance(completion, str):
        return completion
    return "".join(message["content"] or "" for message in completion)


def final_answer(text: str) -> str:
    r"""What a completion gives as its answer.

    The last `\boxed{…}`; else what follows the last "Answer:", "answer is", "####" or "<answer>" on its line; else the last
    line.

    Args:
        text: the completion.

    Example:
        >>> final_answer("So 2 + 3 = 5.\nAnswer: 5."), final_answer(r"Thus \boxed{\frac{1}{2}}."), final_answer("5\n7\n")
        ('5', '\\frac{1}{2}', '7')
    """
    boxed = _last_boxed(text)
    if boxed is not None:
        return boxed.strip()
    marks = list(_MARK.finditer(text))
    rest = text[marks[-1].end() :].partition("</answer>")[0] if marks else text
    lines = [line.strip() for line in rest.splitlines() if line.strip()]
    answer = (lines[0] if marks else lines[-1]) if lines else ""
    return answer.strip("*$ ").removesuffix(".").strip("*$ ")


@reward_function
def exact_reward(completion: str, answer: str, **row: Any) -> float:
    """1 if the final answer of a completion is the row's, letter by letter and without regard to case; else 0.

    Example:
        >>> exact_reward(prompts=["1 + 1 = "], completions=["That is 2.\\nAnswer: 2"], answer=["2"])
        [1.0]
    """
    return float(_normal(final_answer(completion)) == _normal(answer))


@reward_function
def math_reward(completion: str, answer: str, **row: Any) -> float:
    """1 if the final answer of a completion equals the row's as mathematics (by `math-verify`), else 0.

    Needs `karla-hf[pope]`. An answer that takes longer than five seconds to compare counts as wrong; in another thread
    than the main one there is no such limit.

    Example:
        >>> math_reward(prompts=["1/2 + 1/4 = "], completions=[r"It is \\boxed{0.75}."], answer=["3/4"])
        [1.0]
    """
    from math_verify import verify

    if _normal(final_answer(completion)) == _normal(answer):  # also for answers in words
        return 1.0
    seconds = TIME_LIMIT if threading.current_thread() is threading.main_thread() else None  # it uses signals
    gold, said = (_parse(text, seconds) for text in (answer, final_answer(completion)))
    return float(bool(gold and said and verify(gold, said, timeout_seconds=seconds)))


@reward_function
def reasoning_gym_reward(completion: str, answer: str, task: str, metadata: str, **row: Any) -> float:
    """The score, from 0 to 1, that a task of `reasoning-gym` gives to the final answer of a completion.

    The rows need two more columns: `task`, the name of the task, and `metadata`, that of its entry as JSON. Needs
    `karla-hf[pope]`.

    Example:
        >>> row = {"answer": ["10"], "task": ["chain_sum"], "metadata": ["{}"]}
        >>> reasoning_gym_reward(prompts=["7 + 3 = "], completions=["Answer: 10"], **row)
        [1.0]
    """
    from reasoning_gym import get_score_answer_fn

    entry = {"answer": answer, "metadata": json.loads(metadata)}
    return float(get_score_answer_fn(task)(answer=final_answer(completion), entry=entry))


REWARDS = {"exact": exact_reward, "math": math_reward, "reasoning-gym": reasoning_gym_reward}


def find_reward(name: str) -> RewardFunction:
    """The reward function of a name: "exact", "math", "reasoning-gym", or an import path such as "my_package.my_reward".

    Raises:
        ValueError: if there is no such function.

    Example:
        >>> find_reward("exact") is find_reward("karla_hf.pope.exact_reward")
        True
    """
    if name in REWARDS:
        return REWARDS[name]
    module, _, function = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), function) if module else None
    except (ImportError, AttributeError) as error:
        raise ValueError(f"The reward {name!r} cannot be imported ({error}); give another import path.") from error
    if not callable(found):
        allowed = ", ".join(REWARDS)
        raise ValueError(f"{name!r} is no reward function; give one of {allowed}, or the import path of a function.")
    return found


@functools.lru_cache(maxsize=1024)  # every completion of a problem is compared with the same answer
def _parse(text: str, seconds: int | None) -> list:
    from math_verify import parse

    return parse(f"${text}$", parsing_timeout=seconds)


def _normal(text: str) -> str:
    return " ".join(text.split()).casefold()


def _last_boxed(text: str) -> str | None:
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    start, depth = start + len("\\boxed{"), 1
    for at in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if depth == 0:
            return text[start:at]
    return None
