"""Small verifiable tasks that a small backbone does badly, and the backbone's states over their prompts.

Every answer is one or two digits, so the loss and the choice are among the backbone's ten digit tokens.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import reasoning_gym
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase


TRAIN_ROWS, VALIDATION_ROWS, TEST_ROWS = 2000, 200, 500
DIGITS = "0123456789"


def count(rng: random.Random) -> tuple[str, str]:
    """How many of eight digits are 1: ("81103171=", "3")."""
    digits = "".join(rng.choice(DIGITS) if rng.random() < 0.6 else "1" for _ in range(8))
    return digits + "=", str(digits.count("1"))


def chain(rng: random.Random) -> tuple[str, str]:
    """Three terms of one digit whose sum is not negative: ("7+5-3=", "09")."""
    while True:
        a, b, c = (rng.randrange(10) for _ in range(3))
        first, second = rng.choice((1, -1)), rng.choice((1, -1))
        value = a + first * b + second * c
        if value >= 0:
            return f"{a}{'-+'[first > 0]}{b}{'-+'[second > 0]}{c}=", f"{value:02d}"


def chain_sum(_rng: random.Random) -> Iterator[tuple[str, str]]:
    """Four terms of reasoning-gym's `chain_sum` whose sum is not negative: ("4 - 1 - 7 + 7 = ", "03")."""
    sizes = {"min_terms": 4, "max_terms": 4, "min_digits": 1, "max_digits": 1}
    for row in reasoning_gym.create_dataset("chain_sum", seed=1, size=2**20, **sizes):
        if int(row["answer"]) >= 0:
            yield row["metadata"]["expression"] + " = ", f"{int(row['answer']):02d}"


def _endless(task: Callable[[random.Random], tuple[str, str]]) -> Callable[[random.Random], Iterator[tuple[str, str]]]:
    def rows(rng: random.Random) -> Iterator[tuple[str, str]]:
        while True:
            yield task(rng)

    return rows


TASKS = {"count": _endless(count), "chain": _endless(chain), "chain_sum": chain_sum}


def task_rows(name: str, number: int) -> list[tuple[str, str]]:
    """Distinct prompts with their answers, always the same ones.

    Args:
        name: of a task in `TASKS`.
        number: of rows.

    Example:
        >>> task_rows("count", 1)
        [('31515818=', '3')]
    """
    rows: dict[str, str] = {}
    for prompt, answer in TASKS[name](random.Random(f"{name}0")):
        rows[prompt] = answer
        if len(rows) == number:
            break
    return list(rows.items())


class TaskStates(NamedTuple):
    """A task as a head sees it, n rows of T positions.

    Attributes:
        sources: [n, T, S, D] float32 states of the backbone's layers.
        labels: [n, A] int64 digits of the answers; the last A positions predict them.
        digits: [10, D] rows of the output layer.
        cpu_seconds: what the states took.
    """

    sources: torch.Tensor
    labels: torch.Tensor
    digits: torch.Tensor
    cpu_seconds: float


def encode(tokenizer: PreTrainedTokenizerBase, rows: list[tuple[str, str]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [n, T] of prompts and answers without the last digit, and the digits [n, A] of the answers."""
    ids = torch.tensor([tokenizer(prompt + answer)["input_ids"][:-1] for prompt, answer in rows])
    return ids, torch.tensor([[int(digit) for digit in answer] for _, answer in rows])


def digit_rows(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Rows [10, D] float32 of the output layer for the ten digits."""
    weight = model.get_output_embeddings().weight.detach()
    return weight[tokenizer.convert_tokens_to_ids(list(DIGITS))].float()


@torch.no_grad()
def task_states(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[tuple[str, str]], layers: list[int]
) -> TaskStates:
    """Run the backbone over all rows once.

    Args:
        model: the bare backbone. Not modified.
        tokenizer: its tokenizer.
        rows: prompts and answers that give the same number of tokens.
        layers: 0 for the embeddings, up to the number of blocks for the final states.
    """
    ids, labels = encode(tokenizer, rows)
    started, parts = time.process_time(), []
    for chunk in ids.split(64):
        out = model.model(chunk, output_hidden_states=True, use_cache=False)
        states = [*out.hidden_states[:-1], out.last_hidden_state]
        parts.append(torch.stack([states[layer] for layer in layers], dim=2))
    return TaskStates(torch.cat(parts), labels, digit_rows(model, tokenizer), time.process_time() - started)
