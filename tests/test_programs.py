import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from karla_hf.programs import (
    MODULUS,
    OPERATIONS,
    RARE,
    RARE_INDEX,
    WORDS,
    distinct_problems,
    draw_programs,
    draw_texts,
    encode,
    new_tokenizer,
    render,
    run_program,
    trace_programs,
)


registers = st.tuples(*[st.integers(0, MODULUS - 1)] * 2)
programs = st.lists(st.integers(0, len(OPERATIONS) - 1), min_size=1, max_size=12)


@given(registers, programs)
def test_many_programs_at_once_equal_the_interpreter(start, operations):
    trace = trace_programs(torch.tensor([start]), torch.tensor([operations]))
    assert [tuple(state) for state in trace[0].tolist()] == run_program(start, [OPERATIONS[i] for i in operations])


@given(registers, programs, st.data())
def test_a_wrong_step_adds_one_too_many_from_there_on(start, operations, data):
    wrong = data.draw(st.lists(st.booleans(), min_size=len(operations), max_size=len(operations)))
    starts, indices = torch.tensor([start]), torch.tensor([operations])
    trace = trace_programs(starts, indices, torch.tensor([wrong]))
    surplus = torch.tensor([slip and i == RARE_INDEX for slip, i in zip(wrong, operations, strict=True)]).cumsum(0)
    expected = trace_programs(starts, indices)
    expected[0, :, 0] = (expected[0, :, 0] + surplus) % MODULUS
    assert torch.equal(trace, expected)


@given(st.integers(1, 9), st.data())
def test_tokens_are_those_of_the_rendered_text(length, data):
    given_steps = data.draw(st.integers(0, length - 1))
    rare = data.draw(st.integers(0, length))
    row = distinct_problems(1, length, rare, seed=data.draw(st.integers(0, 5)))[0]
    words = row["prompt"].split()
    starts = torch.tensor([[int(word) for word in words[1:3]]])
    operations = torch.tensor([[OPERATIONS.index(word) for word in words[3::2]]])
    assert (operations == RARE_INDEX).sum() == rare
    input_ids, labels = encode(starts, operations, trace_programs(starts, operations), torch.tensor([given_steps]))
    prompt = render(row["prompt"], " ".join(row["solution"][:given_steps]))
    rest = " ".join([*row["solution"][given_steps:], "<eos>"])
    assert input_ids.shape == labels.shape == (1, 4 * length + 6)
    assert new_tokenizer()(f"{prompt} {rest}")["input_ids"] == input_ids[0].tolist()
    assert new_tokenizer()(rest)["input_ids"] == labels[labels != -100].tolist()
    assert labels[0, : len(prompt.split())].eq(-100).all()


def test_a_place_in_the_trace_is_equally_far_from_its_operation_with_and_without_given_steps():
    generator = torch.Generator().manual_seed(0)
    starts, operations = draw_programs(8, 5, 2, generator)
    trace = trace_programs(starts, operations)
    plain = encode(starts, operations, trace, torch.zeros(8, dtype=torch.int64))[1]
    for given_steps in range(1, 5):
        helped = encode(starts, operations, trace, torch.full((8,), given_steps))[1]
        own = helped != -100
        assert torch.equal(helped[own], plain[own])
        assert (own.sum(1) == 2 * (5 - given_steps) + 1).all()


def test_the_share_of_right_steps_is_the_one_asked_for():
    length, right = 8, 0.3
    input_ids, labels = draw_texts(3000, length, right, torch.Generator().manual_seed(0))
    share, number, helped = 0, 0, 0
    for ids, own in zip(input_ids.tolist(), labels.tolist(), strict=True):
        words = [WORDS[index] for index in ids]
        trace = [int(word) for word in words[words.index("<h>") + 1 :] if word.isdigit()]
        states = [(int(words[1]), int(words[2])), *zip(trace[::2], trace[1::2], strict=True)]
        assert len(states) == length + 1
        assert WORDS[next(index for index in own if index != -100)] == words[words.index("<a>") + 1]
        helped += words[words.index("<a>") - 1] != "<h>"
        for before, after, name in zip(states, states[1:], words[3 : 3 + 2 * length : 2], strict=False):
            [(a, b)] = run_program(before, [name])
            if name == RARE:
                number += 1
                share += after == (a, b)
                assert after in ((a, b), ((a + 1) % MODULUS, b))
            else:
                assert after == (a, b)
    assert number / (3000 * length) == pytest.approx(0.5, abs=0.02)  # every number of AB is equally frequent
    assert share / number == pytest.approx(right, abs=0.02)  # 4 standard deviations
    assert helped / 3000 == pytest.approx(0.5, abs=0.04)


def test_problems_are_distinct_and_the_first_do_not_depend_on_the_count():
    some, more = distinct_problems(50, 8, 6, seed=1), distinct_problems(80, 8, 6, seed=1)
    assert some == more[:50]
    assert len({row["prompt"] for row in more}) == len({row["problem_id"] for row in more}) == 80
    assert all(row["answer"] == " ".join(row["solution"]) and len(row["solution"]) == 8 for row in more)
    assert distinct_problems(50, 8, 6, seed=2) != some


def test_too_few_programs_are_named():
    message = (
        "Only 121 different programs of 1 operations with 1 `AB` were found, but 130 are asked for; ask for fewer"
    )
    with pytest.raises(ValueError, match=message):
        distinct_problems(130, 1, 1, seed=0)
