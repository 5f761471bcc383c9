"""Programs over two registers with one rare rule: the task of POPE's demonstration.

Registers A and B hold numbers modulo 11. A program is a start and a list of operations: `A+1` … `A+4`, `B+1` … `B+4`, and
`AB`, which adds B to A. Its trace is both registers after each operation; the answer is the whole trace, so that errors
cannot cancel out:

    <q> 3 4 A+2 . AB . <h> <a> 5 4 9 4        (a prompt, up to <a>, and the trace that completes it)
    <q> 3 4 A+2 . AB . <h> 5 4 <a> 9 4        (the same, with the first step given)

With or without given steps, an operation stands equally far before its place in the trace. A model that is trained on
traces whose `AB` is right in only a share of the cases (and off by one otherwise) knows the right rule but rarely uses it.
"""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


MODULUS = 11
RARE = "AB"
OPERATIONS = (*(f"{register}+{number}" for register in "AB" for number in range(1, 5)), RARE)
RARE_INDEX = OPERATIONS.index(RARE)
NUMBERS = tuple(str(number) for number in range(MODULUS))
WORDS = (*NUMBERS, *OPERATIONS, ".", "<q>", "<h>", "<a>", "<eos>", "<pad>")


def run_program(start: tuple[int, int], operations: list[str]) -> list[tuple[int, int]]:
    """Both registers after each operation.

    Args:
        start: A and B, each from 0 to 10.
        operations: names from `OPERATIONS`.

    Example:
        >>> run_program((3, 4), ["A+2", "AB", "B+4", "AB"])
        [(5, 4), (9, 4), (9, 8), (6, 8)]
    """
    a, b = start
    trace = []
    for operation in operations:
        if operation == RARE:
            a += b
        elif operation[0] == "A":
            a += int(operation[2:])
        else:
            b += int(operation[2:])
        a, b = a % MODULUS, b % MODULUS
        trace.append((a, b))
    return trace


def trace_programs(starts: torch.Tensor, operations: torch.Tensor, wrong: torch.Tensor | None = None) -> torch.Tensor:
    """Both registers after each operation, for many programs at once.

    Args:
        starts: [n, 2] int64 in [0, 11).
        operations: [n, L] int64, indices into `OPERATIONS`.
        wrong: [n, L] bool, where `AB` adds one too many; elsewhere and by default it is right.

    Returns:
        [n, L, 2] int64 in [0, 11).

    Example:
        >>> trace_programs(torch.tensor([[3, 4]]), torch.tensor([[1, RARE_INDEX]])).tolist()
        [[[5, 4], [9, 4]]]
    """
    rare = operations == RARE_INDEX
    added = operations % 4 + 1
    slips = torch.zeros_like(rare) if wrong is None else wrong
    b = (starts[:, 1:] + (added * ((operations >= 4) & ~rare)).cumsum(1)) % MODULUS  # AB leaves B as it is
    steps_of_a = torch.where(rare, b + (slips & rare), added * (operations < 4))
    return torch.stack([(starts[:, :1] + steps_of_a.cumsum(1)) % MODULUS, b], dim=2)


def draw_programs(
    count: int, length: int, rare: int | None, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random programs with a given number of rare operations.

    Args:
        count: how many; they may repeat.
        length: operations of each.
        rare: how many of them are `AB`, at random places; None: a random number for each program, 0 to `length`.
        generator: source of randomness.

    Returns:
        Starts [count, 2] and operations [count, length], both int64, as `trace_programs` takes them.
    """
    starts = torch.randint(MODULUS, (count, 2), generator=generator)
    operations = torch.randint(RARE_INDEX, (count, length), generator=generator)
    if rare is None:
        number = torch.randint(length + 1, (count, 1), generator=generator)
    else:
        number = torch.full((count, 1), rare)
    places = torch.rand(count, length, generator=generator).argsort(1)
    return starts, operations.masked_fill(places < number, RARE_INDEX)


def distinct_problems(count: int, length: int, rare: int, seed: int) -> list[dict]:
    """Distinct programs as problems with their solution step by step.

    Args:
        count: how many.
        length: operations of each.
        rare: how many of them are `AB`.
        seed: equal seeds give equal problems; the first ones do not depend on `count`.

    Returns:
        `problem_id`, `prompt`, `solution` (one string per step) and `answer` (all of it).

    Raises:
        ValueError: if there are too few different programs.

    Example:
        >>> row = distinct_problems(1, length=2, rare=1, seed=0)[0]
        >>> row["prompt"], row["solution"], row["answer"]
        ('<q> 10 7 AB . A+1 .', ['6 7', '7 7'], '6 7 7 7')
    """
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, dict] = {}
    for _ in range(20 * count):
        starts, operations = draw_programs(1, length, rare, generator)
        names = [OPERATIONS[index] for index in operations[0]]
        prompt = f"<q> {starts[0, 0]} {starts[0, 1]} " + " ".join(f"{name} ." for name in names)
        steps = [f"{a} {b}" for a, b in run_program((int(starts[0, 0]), int(starts[0, 1])), names)]
        found.setdefault(prompt, {"prompt": prompt, "solution": steps, "answer": " ".join(steps)})
        if len(found) == count:
            return [{"problem_id": f"{rare}-{index}", **row} for index, row in enumerate(found.values())]
    raise ValueError(
        f"Only {len(found)} different programs of {length} operations with {rare} `AB` were found, but {count} are asked "
        "for; ask for fewer, or for longer programs."
    )


def render(problem: str, prefix: str) -> str:
    """The prompt of a problem, with the steps that are given.

    Example:
        >>> render("<q> 3 4 A+2 . AB .", "5 4"), render("<q> 3 4 A+2 .", "")
        ('<q> 3 4 A+2 . AB . <h> 5 4 <a>', '<q> 3 4 A+2 . <h> <a>')
    """
    return " ".join(part for part in (problem, "<h>", prefix, "<a>") if part)


def new_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer in which each of `WORDS` is one token.

    Example:
        >>> new_tokenizer()("<q> 3 10 AB . <h> <a>")["input_ids"]
        [21, 3, 10, 19, 20, 22, 23]
    """
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>", padding_side="left")


def draw_texts(count: int, length: int, right: float, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens to train a base on: programs of every kind, half of them with some steps given.

    Args:
        count: how many.
        length: operations of each.
        right: the share of `AB` steps that are right; the others add one too many.
        generator: source of randomness.

    Returns:
        `input_ids` and `labels`, both [count, 4 length + 6] int64; labels are -100 up to and including `<a>`.
    """
    starts, operations = draw_programs(count, length, None, generator)
    wrong = torch.rand(operations.shape, generator=generator) >= right
    given = torch.randint(1, length, (count,), generator=generator)
    given = given * (torch.rand(count, generator=generator) < 0.5)
    return encode(starts, operations, trace_programs(starts, operations, wrong), given)


def encode(
    starts: torch.Tensor, operations: torch.Tensor, trace: torch.Tensor, given: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens of `render`'s prompt, the rest of the trace and `<eos>`.

    Args:
        starts: [n, 2] int64.
        operations: [n, L] int64, indices into `OPERATIONS`.
        trace: [n, L, 2] int64 in [0, 11).
        given: [n] int64 in [0, L): how many steps are given.

    Returns:
        `input_ids` and `labels`, both [n, 4 L + 6] int64; labels are -100 up to and including `<a>`.
    """
    count, length = operations.shape

    def column(word: str) -> torch.Tensor:
        return torch.full((count, 1), WORDS.index(word))

    separated = torch.stack([operations + len(NUMBERS), column(".").expand(count, length)], dim=2).flatten(1)
    head = torch.cat([column("<q>"), starts, separated, column("<h>")], dim=1)
    tail = torch.cat([trace.flatten(1), column("<eos>"), column("<eos>")], dim=1)  # the last one makes room for <a>
    place = torch.arange(tail.shape[1]).expand(count, -1)
    border = 2 * given[:, None]
    tail = tail.gather(1, place - (place > border).long()).where(place != border, column("<a>"))
    hidden = torch.cat([torch.full_like(head, -100), tail.masked_fill(place <= border, -100)], dim=1)
    return torch.cat([head, tail], dim=1), hidden
