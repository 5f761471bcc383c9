import itertools
import json
import random

import pytest
from tiny import CHAT_TEMPLATE, make_backbone, make_tokenizer

from karla_hf.errors import as_sentence
from karla_hf.pope import (
    ModelSampler,
    evaluate,
    make_problems,
    mean_pass_at_k,
    measure_difficulty,
    pass_at_k,
    reward_function,
    select_hard,
)
from karla_hf.pope_difficulty import count_correct


@reward_function
def has_letter(completion, answer, **row):
    return float(answer in completion)


@pytest.fixture
def problems():
    prompts = ["The access code of", "Where is the key", "The vault", "Orlin's", "number 7"]
    return make_problems(
        [
            {"problem_id": name, "prompt": prompt, "solution": ["one", "two"], "answer": answer}
            for name, prompt, answer in zip("abcde", prompts, ["a", "e", "1", "no such", "o"], strict=True)
        ]
    )


@pytest.fixture(scope="module")
def model():
    return make_backbone(max_position_embeddings=64)


def sampler_of(model, **options):
    return ModelSampler(model, make_tokenizer(), **{"max_new_tokens": 6, "batch_size": 8, **options})


class StoppedSampler:
    """Is killed at a given call."""

    def __init__(self, sampler, calls):
        self.sampler, self.calls = sampler, calls
        self.identity, self.batch_size, self.check = sampler.identity, sampler.batch_size, sampler.check

    def __call__(self, *arguments):
        self.calls -= 1
        if self.calls < 0:
            raise KeyboardInterrupt
        return self.sampler(*arguments)


@pytest.mark.parametrize(
    ("n", "c", "k"), [(5, 0, 3), (5, 2, 1), (5, 2, 3), (5, 4, 2), (5, 5, 5), (1, 1, 1), (6, 1, 6)]
)
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(n, c, k):
    subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_k_is_unbiased():
    rng, p, k = random.Random(0), 0.1, 4
    estimates = [pass_at_k(16, sum(rng.random() < p for _ in range(16)), k) for _ in range(4000)]
    assert sum(estimates) / len(estimates) == pytest.approx(1 - (1 - p) ** k, abs=0.01)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((4, 1, 5), "pass@5 was asked of 4 samples; give a k from 1 to the number of samples."),
        ((4, 1, 0), "pass@0 was asked of 4"),
        ((4, 5, 1), "5 of 4 samples cannot be correct; give 0 to 4."),
    ],
)
def test_numbers_out_of_range(numbers, message):
    with pytest.raises(ValueError, match=message):
        pass_at_k(*numbers)


def test_difficulty_counts_correct_samples(problems, model, tmp_path):
    file = tmp_path / "difficulty.jsonl"
    sampler = sampler_of(model)
    found = measure_difficulty(problems, sampler, has_letter, num_samples=4, file=file)
    said = sampler(problems["prompt"], 4, [f"{name}/0" for name in problems["problem_id"]])
    expected = [sum(answer in text for text in texts) for answer, texts in zip(problems["answer"], said, strict=True)]
    assert found["num_correct"][:] == expected
    assert found.column_names == ["problem_id", "num_samples", "num_correct"]
    assert set(found["num_samples"]) == {4}
    assert 0 < sum(expected) < 20
    assert mean_pass_at_k(found, 1) == pytest.approx(sum(expected) / 20)
    settings, *records = [json.loads(line) for line in file.read_text().splitlines()]
    assert settings == {"pass": "difficulty", **sampler.identity, "num_samples": 4, "reward": "has_letter"}
    assert {"model", "revision", "fingerprint", "seed", "temperature", "top_p", "max_new_tokens"} <= set(settings)
    assert [record["num_correct"] for record in records] == expected


@pytest.mark.parametrize("torn", [False, True])
def test_interrupted_pass_goes_on_to_the_same_bytes(problems, model, tmp_path, torn):
    whole, part = tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
    expected = measure_difficulty(problems, sampler_of(model), has_letter, num_samples=4, file=whole)
    with pytest.raises(KeyboardInterrupt):
        measure_difficulty(problems, StoppedSampler(sampler_of(model), 2), has_letter, num_samples=4, file=part)
    assert whole.read_bytes().startswith(part.read_bytes())
    assert part.read_text().count("\n") == 1 + 4  # two batches of two problems
    if torn:
        part.write_bytes(whole.read_bytes()[: part.stat().st_size + 10])
    counting = StoppedSampler(sampler_of(model), 100)
    again = measure_difficulty(problems, counting, has_letter, num_samples=4, file=part)
    assert counting.calls == 99
    assert again.to_list() == expected.to_list()
    assert part.read_bytes() == whole.read_bytes()
    finished = measure_difficulty(problems, StoppedSampler(sampler_of(model), 0), has_letter, num_samples=4, file=part)
    assert finished.to_list() == expected.to_list()


def test_killed_while_the_file_was_begun(problems, model, tmp_path):
    file = tmp_path / "difficulty.jsonl"
    file.touch()
    assert len(measure_difficulty(problems, sampler_of(model), has_letter, num_samples=4, file=file)) == 5


def test_more_problems_and_another_batch_size_go_on_in_the_same_file(problems, model, tmp_path):
    file = tmp_path / "difficulty.jsonl"
    measure_difficulty(problems.select([3, 0]), sampler_of(model), has_letter, num_samples=4, file=file)
    counting = StoppedSampler(sampler_of(model, batch_size=4), 100)
    found = measure_difficulty(problems, counting, has_letter, num_samples=4, file=file)
    assert counting.calls == 97
    assert found.to_list() == measure_difficulty(problems, sampler_of(model), has_letter, num_samples=4).to_list()


def test_other_model_settings_or_problems_are_refused(problems, model, tmp_path):
    file = tmp_path / "difficulty.jsonl"
    measure_difficulty(problems, sampler_of(model, name="me/first"), has_letter, num_samples=4, file=file)
    before = file.read_bytes()

    def refused(message, *, data=problems, reward=has_letter, num_samples=4, run=measure_difficulty, sampler=None):
        with pytest.raises(ValueError, match=message) as error:
            run(data, sampler or sampler_of(model), reward, num_samples=num_samples, file=file)
        assert as_sentence(error.value) == str(error.value)
        assert file.read_bytes() == before

    other = sampler_of(
        make_backbone(max_position_embeddings=64, initializer_range=0.2), name="me/second", revision="v2"
    )
    refused(r"was made with another model \(me/first, \w{16}\) than this one \(me/second, v2, \w{16}\); give that model, or",
            sampler=other)  # fmt: skip
    refused(r"was made with temperature 1\.0, but now it is 0\.5; give the same, or another file\.$",
            sampler=sampler_of(model, temperature=0.5))  # fmt: skip
    refused(r"was made with seed 0, but now it is 3", sampler=sampler_of(model, seed=3))
    refused(r"was made with num_samples 4, but now it is 5", num_samples=5)
    refused(r"was made with reward 'has_letter', but now it is 'other'", reward=_named("other", has_letter))
    refused(r"^Problem 'a' is another in .*difficulty\.jsonl; give another file, or the same problems and prompts\.$",
            data=problems.map(lambda row: {"answer": "x"}))  # fmt: skip
    refused(r"holds the pass 'difficulty', but this is the pass 'eval'; give another file\.$",
            run=lambda *a, **k: evaluate(*a, **k, ks=[1]))  # fmt: skip


def _named(name, function):
    def other(*arguments, **columns):
        return function(*arguments, **columns)

    other.__name__ = name
    return other


@pytest.mark.parametrize("text", ["not JSON\n", "[1, 2]\n", '{"seed": 0}\n', "\n"])
def test_other_files_are_left_alone(problems, model, tmp_path, text):
    file = tmp_path / "notes.txt"
    file.write_text(text)
    with pytest.raises(
        ValueError, match=r"notes\.txt was not written by a POPE pass .*; give another file, or delete it\.$"
    ):
        measure_difficulty(problems, sampler_of(model), has_letter, num_samples=4, file=file)
    assert file.read_text() == text


def test_failing_reward_names_the_problem_and_finished_batches_stay(problems, model, tmp_path):
    @reward_function
    def breaks(completion, answer, problem_id, **row):
        return 1 / (problem_id != "c")

    def plain(prompts, completions, problem_id, **columns):
        return [1 / (name != "c") for name in problem_id]

    for number, reward in enumerate((breaks, plain)):
        file = tmp_path / f"{number}.jsonl"
        message = (
            rf"^The reward function '{reward.__name__}' failed for problem 'c' \(ZeroDivisionError: division by zero\); "
            r"correct it, and start again\.$"
        )
        with pytest.raises(ValueError, match=message) as error:
            measure_difficulty(problems, sampler_of(model), reward, num_samples=4, file=file)
        assert as_sentence(error.value) == str(error.value)
        assert [json.loads(line).get("problem_id") for line in file.read_text().splitlines()] == [None, "a", "b"]


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (
            lambda completions, **_: [None] * len(completions),
            r"returned None for problem 'a'; return a number for every",
        ),
        (lambda completions, **_: [float("nan")] * len(completions), r"returned nan for problem 'a'; return a number"),
        (
            lambda completions, **_: [1.0],
            r"returned 1 values for the 4 completions of problem 'a'; return a list with one",
        ),
        (lambda completions, **_: 1.0, r"returned a float for the 4 completions of problem 'a'"),
    ],
)
def test_reward_that_is_no_number(problems, model, reward, message):
    with pytest.raises(ValueError, match=message) as error:
        measure_difficulty(problems, sampler_of(model), reward, num_samples=4)
    assert as_sentence(error.value) == str(error.value)


def test_reward_functions_get_the_columns_of_their_problem():
    seen = []

    def reward(prompts, completions, **columns):
        seen.append((prompts, completions, columns))
        return [1.0, 0.5]

    problem = {"problem_id": "a", "prompt": "x", "solution": ["1", "2"], "answer": "3", "task": "sum"}
    assert count_correct([problem], ["prompt"], [["u", "v"]], reward) == [1]
    assert count_correct([problem], [[{"role": "user", "content": "prompt"}]], [["u", "v"]], reward) == [1]
    columns = {"problem_id": ["a", "a"], "answer": ["3", "3"], "task": ["sum", "sum"]}
    assert seen[0] == (["prompt", "prompt"], ["u", "v"], columns)
    assert seen[1][1] == [[{"role": "assistant", "content": "u"}], [{"role": "assistant", "content": "v"}]]


def test_chat_form_is_sampled_with_the_template(problems, model):
    sampler = ModelSampler(model, make_tokenizer(chat_template=CHAT_TEMPLATE), max_new_tokens=6)
    plain = measure_difficulty(problems, sampler, has_letter, num_samples=8)
    chat = measure_difficulty(problems, sampler, has_letter, num_samples=8, chat=True)
    assert plain["num_correct"][:] != chat["num_correct"][:]


def test_hard_problems_are_those_that_failed(problems, model):
    found = measure_difficulty(problems, sampler_of(model), has_letter, num_samples=4)
    assert "d" in select_hard(problems, found)["problem_id"]
    assert all(
        row["num_correct"] == 0 for row in found if row["problem_id"] in select_hard(problems, found)["problem_id"]
    )
    assert select_hard(problems, found, max_correct=4).to_list() == problems.to_list()
    easy = found.filter(lambda row: row["num_correct"] > 0)
    with pytest.raises(ValueError, match=r"^The difficulty of problem '.' was not measured; measure it first\.$"):
        select_hard(problems, easy)
    rest = problems.filter(lambda row: row["problem_id"] in easy["problem_id"])
    with pytest.raises(
        ValueError, match=r"^No problem is hard: of each of the \d, more than 0 samples were correct; give"
    ):
        select_hard(rest, easy)


def test_evaluation_averages_pass_at_k(problems, model, tmp_path):
    sampler = sampler_of(model, seed=7)
    result = evaluate(problems, sampler, has_letter, num_samples=8, ks=[1, 4], file=tmp_path / "eval.jsonl")
    found = measure_difficulty(problems, sampler, has_letter, num_samples=8)
    assert result == {
        "pass@1": mean_pass_at_k(found, 1),
        "pass@4": mean_pass_at_k(found, 4),
        "problems": 5,
        "num_samples": 8,
    }
    assert 0 < result["pass@1"] < result["pass@4"] < 1
    assert (
        evaluate(
            problems, StoppedSampler(sampler, 0), has_letter, num_samples=8, ks=[1, 4], file=tmp_path / "eval.jsonl"
        )
        == result
    )
    with pytest.raises(
        ValueError, match=r"^pass@16 was asked of 8 samples; give a k from 1 to the number of samples\.$"
    ):
        evaluate(problems, sampler, has_letter, num_samples=8)
    with pytest.raises(ValueError, match=r"^`num_samples` is 0; give 1 or more\.$"):
        measure_difficulty(problems, sampler, has_letter, num_samples=0)
