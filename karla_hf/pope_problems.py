"""Problems with oracle solutions: how they are given, cut at step boundaries, and put into a prompt."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from datasets import Dataset


Prompt: TypeAlias = str | list[dict[str, str]]
Render: TypeAlias = Callable[[str, str], str]
COLUMNS = ("problem_id", "prompt", "solution", "answer")

_BREAKS = (r"\n[ \t]*\n\s*", r"\n\s*", r"(?<=[.!?])\s+")


def guide(problem: str, prefix: str) -> str:
    """Put the beginning of a solution under a problem, and ask to study and continue it; without one, just the problem.

    To continue is what is asked for, not what is forced, so the answer may repeat, check or doubt the given steps, and
    meets states that an unguided answer reaches too (POPE, arXiv 2601.18779).

    Args:
        problem: its text.
        prefix: the first steps of its solution; "" for the unguided version.

    Example:
        >>> guide("What is 2 + 3 + 4?", "")
        'What is 2 + 3 + 4?'
        >>> guide("What is 2 + 3 + 4?", "2 + 3 = 5").splitlines()[2:4]
        ['A solution begins like this:', '2 + 3 = 5']
    """
    if not prefix:
        return problem
    return (
        f"{problem}\n\nA solution begins like this:\n{prefix}\n\nStudy these steps: what do they do, and what do they "
        "establish? Then go on from where they stop, and finish the solution."
    )


def split_steps(solution: str) -> list[str]:
    r"""Cut a text at blank lines; if it has none, at line breaks; if it has none of these either, after sentences.

    Args:
        solution: the text.

    Returns:
        The steps, with the white space that follows each; together they are the text.

    Example:
        >>> split_steps("Add 2 and 3.\nThat is 5.\n")
        ['Add 2 and 3.\n', 'That is 5.\n']
        >>> split_steps("Add 2 and 3. That is 5.")
        ['Add 2 and 3. ', 'That is 5.']
    """
    for pattern in _BREAKS:
        ends = [match.end() for match in re.finditer(pattern, solution) if match.end() < len(solution)]
        if ends:
            return [solution[start:end] for start, end in zip([0, *ends], [*ends, len(solution)], strict=True)]
    return [solution] if solution.strip() else []


def make_problems(
    rows: Iterable[Mapping[str, Any]], *, separator: str = "\n", split: Callable[[str], list[str]] = split_steps
) -> Dataset:
    r"""Check problems and bring their solutions into steps.

    Args:
        rows: a `datasets.Dataset` or a list with `prompt` (a text, or chat messages that end with a user's turn),
            `solution` (a list of steps, or a text that `split` cuts), `answer`, and, if wanted, `problem_id` and further
            columns, which reward functions receive.
        separator: what follows a listed step that ends without white space.
        split: cuts a text into steps that together are the text.

    Returns:
        `problem_id` str, `prompt`, `solution` list of str, `answer` str, and the further columns.

    Raises:
        ValueError: naming the problem, for a missing column, solution or answer, a solution of fewer than two steps, or
            a name that occurs twice.

    Example:
        >>> make_problems([{"prompt": "1 + 2 + 3 = ", "solution": ["1 + 2 = 3", "3 + 3 = 6"], "answer": 6}])[0]
        {'problem_id': '0', 'prompt': '1 + 2 + 3 = ', 'solution': ['1 + 2 = 3\n', '3 + 3 = 6\n'], 'answer': '6'}
    """
    problems, seen = [], set()
    for number, row in enumerate(rows):
        name = str(row.get("problem_id") if row.get("problem_id") is not None else number)
        if name in seen:
            raise ValueError(f"Two problems have the `problem_id` {name!r}; give each its own.")
        seen.add(name)
        problem = {
            "problem_id": name,
            "prompt": _check_prompt(name, row),
            "solution": _steps(name, row, separator, split),
            "answer": str(_required(name, row, "answer")),
        }
        problems.append({**problem, **{key: value for key, value in row.items() if key not in problem}})
    if not problems:
        raise ValueError("There are no problems; give at least one.")
    return Dataset.from_list(problems)


def prefix_text(solution: Sequence[str], num_steps: int) -> str:
    """The first steps of a solution, without the white space behind them.

    Example:
        >>> prefix_text(["1 + 2 = 3\\n", "3 + 3 = 6\\n"], 1)
        '1 + 2 = 3'
    """
    return "".join(solution[:num_steps]).rstrip()


def prefix_fraction(solution: Sequence[str], num_steps: int) -> float:
    """The share of a solution's characters that its first steps have.

    Example:
        >>> prefix_fraction(["1 + 2 = 3\\n", "3 + 3 = 6\\n"], 1)
        0.5
    """
    return len("".join(solution[:num_steps])) / len("".join(solution))


def render_prompt(problem: Mapping[str, Any], num_steps: int, render: Render, *, chat: bool = False) -> Prompt:
    """A problem as the model gets it, with the first steps of its solution in the user's turn.

    Args:
        problem: a row of `make_problems`.
        num_steps: how many steps to give; 0 for the unguided version.
        render: puts them into the text.
        chat: whether a plain text becomes a user's turn.
    """
    prompt, prefix = problem["prompt"], prefix_text(problem["solution"], num_steps)
    if isinstance(prompt, str):
        text = render(prompt, prefix)
        return [{"role": "user", "content": text}] if chat else text
    *before, turn = prompt
    return [*before, {**turn, "content": render(turn["content"], prefix)}]


def _required(name: str, row: Mapping[str, Any], column: str) -> Any:
    value = row.get(column)
    if value is None or (isinstance(value, str | list) and not value):
        raise ValueError(f"Problem {name!r} has no `{column}`; add it, or leave the problem out.")
    return value


def _check_prompt(name: str, row: Mapping[str, Any]) -> Prompt:
    prompt = _required(name, row, "prompt")
    if not isinstance(prompt, str) and not (isinstance(prompt, list) and prompt[-1].get("role") == "user"):
        raise ValueError(
            f"The prompt of problem {name!r} is neither a text nor a list of chat messages that ends with a user's turn; "
            "give one of them."
        )
    return prompt


def _steps(name: str, row: Mapping[str, Any], separator: str, split: Callable[[str], list[str]]) -> list[str]:
    solution = _required(name, row, "solution")
    if isinstance(solution, str):
        steps = split(solution)
    else:
        steps = [step if step[-1:].isspace() else step + separator for step in map(str, solution)]
    if len(steps) < 2:
        raise ValueError(
            f"The solution of problem {name!r} has {len(steps)} step, so that no beginning can be cut from it; give a list "
            "of steps, or a text with line breaks between them, or leave the problem out."
        )
    return steps
