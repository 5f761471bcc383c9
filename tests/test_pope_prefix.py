import json
import re

import pytest
from datasets import Dataset
from tiny import make_backbone, make_tokenizer

from karla_hf.errors import as_sentence
from karla_hf.pope import ModelSampler, build_rows, find_prefixes, longest_prefix, make_problems, unguided_rows
from karla_hf.pope_prefix import search_prefixes


STEPS = [f"step {i}" for i in range(8)]


def show(problem, prefix):
    return f"{problem}|{prefix}"


def exact(prompts, completions, answer, **columns):
    return [float(said == wanted) for said, wanted in zip(completions, answer, strict=True)]


class Counting:
    """Solves a problem in as many samples as a table says for the number of steps that it is given."""

    batch_size = 8
    identity = {"model": "counting", "fingerprint": "0"}

    def __init__(self, table):
        self.table, self.asked = table, []

    def check(self, prompts, names):
        pass

    def __call__(self, prompts, num_samples, keys):
        out = []
        for prompt in prompts:
            problem, prefix = prompt.split("|")
            steps = len(re.findall("step", prefix))
            self.asked.append((problem, steps))
            right = self.table[problem].get(steps, 0)
            out.append(["yes"] * right + ["no"] * (num_samples - right))
        return out


def problems_of(*names, steps=STEPS):
    return make_problems([{"problem_id": name, "prompt": name, "solution": steps, "answer": "yes"} for name in names])


def find(problems, sampler, **options):
    return find_prefixes(
        problems, sampler, exact, **{"num_samples": 4, "max_fraction": 0.5, "render": show, **options}
    )


def test_shortest_prefix_with_enough_successes_is_taken():
    sampler = Counting({"a": {1: 4}, "b": {1: 1, 2: 0, 3: 2, 4: 4}, "c": {}, "d": {4: 2}})
    found = find(problems_of("a", "b", "c", "d"), sampler, min_success=2)
    assert [(row["num_steps"], row["num_correct"], row["found"]) for row in found] == [
        (1, 4, True),
        (3, 2, True),
        (4, 0, False),
        (4, 2, True),
    ]
    assert found["fraction"][:] == [0.125, 0.375, 0.5, 0.5]
    assert sorted(sampler.asked) == sorted({*sampler.asked})  # nothing is asked twice
    assert ("a", 2) not in sampler.asked
    assert ("b", 4) not in sampler.asked
    assert ("c", 5) not in sampler.asked


def test_a_quarter_of_the_solution_is_the_most_by_default():
    sampler = Counting({"a": {3: 4}})
    found = find_prefixes(problems_of("a"), sampler, exact, num_samples=4, render=show)
    assert found.to_list() == [
        {"problem_id": "a", "num_steps": 2, "fraction": 0.25, "num_samples": 4, "num_correct": 0, "found": False}
    ]
    assert longest_prefix(["aaa\n", "b\n", "c\n", "d\n"], 0.5) == 1
    assert longest_prefix(["a\n", "b\n"], 1.0) == 1


def test_problem_without_a_short_step_gets_none():
    problems = make_problems(
        [
            {"problem_id": "a", "prompt": "a", "solution": STEPS, "answer": "yes"},
            {"problem_id": "b", "prompt": "b", "solution": ["step one of only two", "step 2"], "answer": "yes"},
        ]
    )
    found = find(problems, Counting({"a": {1: 1}, "b": {1: 4}}))
    assert found[1] == {
        "problem_id": "b",
        "num_steps": 0,
        "fraction": 0.0,
        "num_samples": 0,
        "num_correct": 0,
        "found": False,
    }
    assert set(build_rows(problems, found)["problem_id"]) == {"a"}
    with pytest.raises(
        ValueError, match=r"^No solution has a step that ends within 0\.5 of it; give a larger `max_fraction`"
    ):
        find(problems.select([1]), Counting({}))


def test_interrupted_search_goes_on_where_it_was(tmp_path):
    class Stopped(Counting):
        def __call__(self, prompts, num_samples, keys):
            if len(self.asked) >= 4:
                raise KeyboardInterrupt
            return super().__call__(prompts, num_samples, keys)

    table = {"a": {2: 1}, "b": {3: 1}, "c": {}}
    problems, file = problems_of("a", "b", "c"), tmp_path / "prefix.jsonl"
    expected = find(problems, Counting(table)).to_list()
    stopped, rest = Stopped(table), Counting(table)
    with pytest.raises(KeyboardInterrupt):
        find(problems, stopped, file=file)
    assert find(problems, rest, file=file).to_list() == expected
    assert not set(stopped.asked) & set(rest.asked)
    assert find(problems, Counting({}), file=file).to_list() == expected  # nothing is asked again
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert lines[0]["pass"] == "prefix"
    assert [(line["problem_id"], line["num_steps"]) for line in lines[1:]] == stopped.asked + rest.asked


def test_a_search_with_other_bounds_uses_what_is_known(tmp_path):
    table, file = {"a": {1: 1, 3: 3}}, tmp_path / "prefix.jsonl"
    assert find(problems_of("a"), Counting(table), file=file)["num_steps"][:] == [1]
    again = Counting(table)
    assert find(problems_of("a"), again, file=file, min_success=2)["num_steps"][:] == [3]
    assert again.asked == [("a", 2), ("a", 3)]


def test_search_from_no_help_up_to_the_present_prefix():
    sampler = Counting({"a": {0: 1}, "b": {2: 1}, "c": {3: 4}})
    found = search_prefixes(problems_of("a", "b", "c"), dict.fromkeys("abc", 0), {"a": 3, "b": 3, "c": 1}, sampler, exact,
                            num_samples=4, min_success=1, render=show)  # fmt: skip
    assert {name: record["num_steps"] for name, record in found.items()} == {"a": 0, "b": 2, "c": 1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_fraction": 0}, r"^`max_fraction` is 0; give a share above 0, up to 1\.$"),
        ({"min_success": 5}, r"^`min_success` is 5; give a number from 1 to the 4 samples\.$"),
        ({"min_success": 0}, r"^`min_success` is 0; give a number from 1 to the 4 samples\.$"),
    ],
)
def test_numbers_out_of_range(options, message):
    with pytest.raises(ValueError, match=message) as error:
        find(problems_of("a"), Counting({"a": {}}), **options)
    assert as_sentence(error.value) == str(error.value)


def test_prefix_longer_than_the_context_is_named_and_finished_work_is_kept(tmp_path):
    steps = ["The access code of the vault is near. "] * 8
    problems = problems_of("a", "b", steps=steps)
    sampler = ModelSampler(make_backbone(max_position_embeddings=64), make_tokenizer(), max_new_tokens=4)
    file = tmp_path / "prefix.jsonl"
    message = r"^The prompt of problem 'a' with \d steps given has \d+ tokens, which with 4 new ones is more than the 64 positions"
    with pytest.raises(ValueError, match=message) as error:
        find_prefixes(problems, sampler, exact, num_samples=2, max_fraction=0.9, render=show, file=file)
    assert as_sentence(error.value) == str(error.value)
    tried = [json.loads(line) for line in file.read_text().splitlines()[1:]]
    assert [(record["problem_id"], record["num_steps"]) for record in tried][:2] == [("a", 1), ("b", 1)]


def test_rows_are_guided_and_unguided_one_to_one():
    problems = make_problems([{"prompt": "1+2+3=", "solution": ["1+2=3", "3+3=6"], "answer": 6, "task": "sum"}] * 3)
    prefixes = Dataset.from_list([{"problem_id": name, "num_steps": steps} for name, steps in (("0", 1), ("2", 0))])
    rows = build_rows(problems, prefixes)
    assert rows.column_names == ["problem_id", "prompt", "answer", "guided", "num_steps", "fraction", "task"]
    assert [(row["problem_id"], row["guided"], row["num_steps"], row["fraction"]) for row in rows] == [
        ("0", True, 1, 0.5),
        ("0", False, 0, 0.0),
    ]
    guided, unguided = rows["prompt"][:]
    assert unguided == "1+2+3="
    assert guided.startswith("1+2+3=\n\n")
    assert "\n1+2=3\n" in guided
    assert "3+3=6" not in guided
    chat = build_rows(problems, prefixes, chat=True)
    assert chat["prompt"][:] == [[{"role": "user", "content": text}] for text in (guided, unguided)]
    plain = unguided_rows(problems)
    assert plain.column_names == rows.column_names
    assert plain["prompt"][:] == ["1+2+3="] * 3
    with pytest.raises(ValueError, match=r"^No problem has a prefix, so there are no guided rows; give a larger"):
        build_rows(problems, prefixes.select([1]))


def test_left_out_problems_are_counted(caplog):
    problems = problems_of("a", "b", "c")
    build_rows(problems, Dataset.from_list([{"problem_id": "a", "num_steps": 1}]))
    assert "2 of 3 problems have no prefix and are left out." in caplog.text


def test_last_turn_of_a_conversation_gets_the_prefix():
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+2+3="}]
    problems = make_problems([{"prompt": messages, "solution": ["1+2=3", "3+3=6"], "answer": 6}])
    rows = build_rows(problems, Dataset.from_list([{"problem_id": "0", "num_steps": 1}]), render=show)
    assert [row["prompt"][1]["content"] for row in rows] == ["1+2+3=|1+2=3", "1+2+3=|"]
    assert all(row["prompt"][0] == messages[0] for row in rows)
