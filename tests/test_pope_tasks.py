import json

import pytest
from datasets import Dataset

from karla_hf.errors import as_sentence
from karla_hf.pope import build_rows, exact_reward, load_problems, longest_prefix, math_reward, reasoning_gym_reward
from karla_hf.pope_problems import prefix_text


@pytest.fixture(scope="module")
def champ():
    return load_problems("champ")


def test_champ_becomes_a_data_set(champ):
    assert len(champ) == 266  # of 270; the others are solved in one step
    assert len(set(champ["problem_id"])) == 266
    assert set(champ["category"]) == {"Combinatorics", "Inequality", "Number-Theory", "Polynomial", "Sequence"}
    first = champ[0]
    assert first["problem_id"] == "P_Combinatorics_1"
    assert first["answer"] == "239"
    assert len(first["solution"]) == 6
    assert first["prompt"].endswith("put the final answer into \\boxed{}.")
    assert not [answer for answer in champ["answer"] if "equivalent" in answer or not answer]


def test_champ_becomes_rows_for_the_trainer(champ):
    steps = [longest_prefix(row["solution"]) for row in champ]
    assert sum(k > 0 for k in steps) == 195  # the others have no step within a quarter of their solution
    prefixes = Dataset.from_list(
        [{"problem_id": n, "num_steps": k} for n, k in zip(champ["problem_id"], steps, strict=True)]
    )
    rows = build_rows(champ, prefixes, chat=True)
    assert (len(rows), sum(rows["guided"])) == (390, 195)
    assert max(rows["fraction"]) <= 0.25
    solutions = {row["problem_id"]: row["solution"] for row in champ}
    for row in rows:
        (turn,) = row["prompt"]
        given = prefix_text(solutions[row["problem_id"]], row["num_steps"])
        assert bool(given) == row["guided"]
        assert not given or f"\n{given}\n" in turn["content"]
        following = solutions[row["problem_id"]][row["num_steps"]].strip()
        assert len(following) < 40 or following not in turn["content"]


def test_answers_of_champ_are_right_for_their_reward(champ):
    answers = champ["answer"][:]
    boxed = [f"So it is \\boxed{{{answer}}}." for answer in answers]
    assert sum(exact_reward(prompts=["?"] * 266, completions=boxed, answer=answers)) > 255  # a brace ends some early
    numbers = [answer for answer in answers if answer.isdecimal()][:10]
    said = [f"It is \\boxed{{{2 * int(answer)}/2}}." for answer in numbers]
    assert math_reward(prompts=["?"] * 10, completions=said, answer=numbers) == [1.0] * 10
    said = [f"It is \\boxed{{{int(answer) + 1}}}." for answer in numbers]
    assert math_reward(prompts=["?"] * 10, completions=said, answer=numbers) == [0.0] * 10


def test_chain_sums_come_with_a_solvers_steps():
    problems = load_problems("chain-sum", limit=20)
    assert problems.to_list() == load_problems("chain-sum").select(range(20)).to_list()
    for row in problems:
        *lines, last = [line.strip() for line in row["solution"]]
        value = None
        for line in lines:
            left, _, right = line.partition(" = ")
            assert value is None or left.startswith(value)
            assert eval(left) == int(right)
            value = right
        assert last == f"Answer: {row['answer']}"
        assert value == row["answer"]
    columns = {key: problems[key][:] for key in ("answer", "task", "metadata")}
    solved = ["".join(solution) for solution in problems["solution"]]
    assert reasoning_gym_reward(prompts=problems["prompt"][:], completions=solved, **columns) == [1.0] * 20
    assert longest_prefix(problems[0]["solution"]) >= 1


def test_files_are_read_with_their_own_column_names(tmp_path):
    rows = [{"question": f"{i}?", "steps": ["a", "b"], "gold": str(i)} for i in range(3)]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    Dataset.from_list(rows).to_parquet(tmp_path / "p.parquet")
    columns = {"prompt": "question", "solution": "steps", "answer": "gold"}
    for name in ("p.jsonl", "p.parquet"):
        problems = load_problems(str(tmp_path / name), columns=columns, limit=2)
        assert problems["prompt"][:] == ["0?", "1?"]
        assert problems["solution"][0] == ["a\n", "b\n"]


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ('{"prompt": "a"\n', {}, r"p\.jsonl:1 is not JSON \(.*\); correct the line\.$"),
        ("\n", {}, r"p\.jsonl holds no text; give a UTF-8 file"),
        ('{"prompt": "a", "answer": "b"}', {}, r"^Problem '0' has no `solution`; add it, or leave the problem out\.$"),
        ('{"prompt": "a"}', {"columns": {"answer": "gold"}}, r"p\.jsonl has no column 'gold'; it has prompt\.$"),
        ('{"prompt": "a"}', {"limit": 0}, r"^`limit` is 0; give 1 or more problems\.$"),
    ],
)
def test_damaged_files_are_named(tmp_path, text, options, message):
    (tmp_path / "p.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        load_problems(str(tmp_path / "p.jsonl"), **options)
    assert as_sentence(error.value) == str(error.value)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no file .*none\.jsonl"):
        load_problems(str(tmp_path / "none.jsonl"))
