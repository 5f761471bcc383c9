"""Where problems with oracle solutions come from: files, the Hub, CHAMP, and tasks of reasoning-gym with a solver's steps."""

import importlib.util
import json
import operator
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset

from karla_hf.documents import read_text
from karla_hf.pope_problems import make_problems


CHAMP = "champ"
CHAIN_SUM = "chain-sum"
CHAIN_SIZES = {"min_terms": 5, "max_terms": 5, "min_digits": 1, "max_digits": 1}


def load_problems(
    source: str, *, split: str = "train", limit: int | None = None, columns: Mapping[str, str] | None = None
) -> Dataset:
    """Load problems by name; the same arguments give the same problems.

    Args:
        source: "champ", "chain-sum", a `.jsonl` or `.parquet` file, or a data set on the Hub.
        split: the Hub data set's split.
        limit: take the first so many; None takes all, of "chain-sum" 128.
        columns: what the file or the data set calls `prompt`, `solution`, `answer` and `problem_id`.

    Returns:
        As `make_problems`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for a damaged file, a missing column, or a problem that cannot be used.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"`limit` is {limit}; give 1 or more problems.")
    if source == CHAMP:
        return make_problems(_champ()[:limit])
    if source == CHAIN_SUM:
        return make_problems(chain_sum(limit or 128))
    rows = _read(source, split)
    for name, column in (columns or {}).items():
        if column not in rows.column_names:
            raise ValueError(f"{source} has no column {column!r}; it has {', '.join(rows.column_names)}.")
        rows = rows.rename_column(column, name) if column != name else rows
    return make_problems(rows.select(range(min(limit or len(rows), len(rows)))))


def chain_sum(size: int, seed: int = 0, sizes: Mapping[str, int] | None = None) -> list[dict[str, Any]]:
    """Problems of reasoning-gym's `chain_sum`, solved term by term.

    Args:
        size: how many.
        seed: other seeds give other problems.
        sizes: options of the task, such as `min_terms` and `max_digits`; None takes sums of 5 terms of one digit.

    Returns:
        Rows as `make_problems` takes them, with the columns that `reasoning_gym_reward` needs.

    Example:
        >>> row = chain_sum(1, sizes={"min_terms": 3, "max_terms": 3, "min_digits": 1, "max_digits": 1})[0]
        >>> row["solution"], row["answer"]
        (['8 + 6 = 14', '14 + 0 = 14', 'Answer: 14'], '14')
    """
    import reasoning_gym

    rows = []
    for entry in reasoning_gym.create_dataset("chain_sum", seed=seed, size=size, **(sizes or CHAIN_SIZES)):
        expression = entry["metadata"]["expression"]
        rows.append(
            {
                "problem_id": f"chain-sum-{seed}-{entry['metadata']['source_index']}",
                "prompt": f"Compute {expression}. Write one line for each operation, and the result at the end as "
                '"Answer: " and the number.',
                "solution": [*_running_sums(expression), f"Answer: {entry['answer']}"],
                "answer": entry["answer"],
                "task": "chain_sum",
                "metadata": json.dumps(entry["metadata"]),
            }
        )
    return rows


def _running_sums(expression: str) -> list[str]:
    first, *rest = expression.split()
    value, lines = int(first), []
    for sign, term in zip(rest[::2], rest[1::2], strict=True):
        result = {"+": operator.add, "-": operator.sub}[sign](value, int(term))
        lines.append(f"{value} {sign} {term} = {result}")
        value = result
    return lines


def _champ() -> list[dict[str, Any]]:
    """The problems of CHAMP whose solution has more than one step: 266 of 270 (arXiv 2401.06961)."""
    package = importlib.util.find_spec("champ_dataset")  # not imported: that needs natsort, to sort what is sorted
    if package is None or package.origin is None:
        raise ImportError("CHAMP needs the package champ-dataset; install it.")
    data = json.loads(Path(package.origin).with_name("dataset_files").joinpath("v0.json").read_text(encoding="utf-8"))
    rows = []
    for problem in data["problems"].values():
        steps = [step["_text"] for step in problem["solution"]["steps"]]
        if len(steps) > 1:
            rows.append(
                {
                    "problem_id": problem["identifier"],
                    "prompt": f"{problem['_text']}\n\nReason step by step, and put the final answer into \\boxed{{}}.",
                    "solution": steps,
                    "answer": re.split(r", or (?:equivalently|approximately|an equivalent form)", problem["_answer"])[
                        0
                    ],
                    "category": problem["category"],
                }
            )
    return rows


def _read(source: str, split: str) -> Dataset:
    path = Path(source)
    if path.suffix == ".parquet" and path.is_file():
        return Dataset.from_parquet(source)
    if path.suffix != ".jsonl":
        return load_dataset(source, split=split)
    rows = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"{source}:{number} is not JSON ({error}); correct the line.") from None
    return Dataset.from_list(rows)
