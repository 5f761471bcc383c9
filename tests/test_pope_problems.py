import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from karla_hf.errors import as_sentence
from karla_hf.pope import guide, make_problems, split_steps
from karla_hf.pope_problems import prefix_text


ROW = {"prompt": "1+2+3=", "solution": ["1+2=3", "3+3=6"], "answer": "6"}


@given(st.text(alphabet="ab.!? \n\t"))
def test_steps_of_a_text_are_the_text(text):
    steps = split_steps(text)
    assert "".join(steps) == (text if text.strip() else "")
    assert all(step.strip() for step in steps[1:])


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("One. Two.\nThree.\n\nFour.\n", ["One. Two.\nThree.\n\n", "Four.\n"]),
        ("One. Two.\n  Three.\n", ["One. Two.\n  ", "Three.\n"]),
        ("One. Two! Is 0.5 three?", ["One. ", "Two! ", "Is 0.5 three?"]),
        ("one", ["one"]),
        ("", []),
    ],
)
def test_texts_are_cut_at_their_coarsest_breaks(text, steps):
    assert split_steps(text) == steps


def test_problems_are_named_and_keep_further_columns():
    rows = [{**ROW, "task": "sum"}, {**ROW, "solution": "1+2=3. 3+3=6", "answer": 6, "task": "sum"}]
    for given_rows in (rows, Dataset.from_list(rows[:1])):
        problems = make_problems(given_rows)
        assert problems["problem_id"][:] == [str(i) for i in range(len(problems))]
        assert problems["task"][:] == ["sum"] * len(problems)
    assert make_problems(rows)["solution"][:] == [["1+2=3\n", "3+3=6\n"], ["1+2=3. ", "3+3=6"]]
    assert make_problems(make_problems(rows[:1])).to_list() == make_problems(rows[:1]).to_list()
    assert make_problems([{**ROW, "problem_id": 7}], separator=" ")[0]["solution"] == ["1+2=3 ", "3+3=6 "]


def test_prefix_ends_with_its_last_step():
    steps = ["1+2=3\n\n", "3+3=6\n"]
    assert [prefix_text(steps, k) for k in range(3)] == ["", "1+2=3", "1+2=3\n\n3+3=6"]


def test_guidance_is_asked_for_after_the_prefix():
    text = guide("Question?", "First step.")
    assert text.index("Question?") < text.index("First step.") < text.index("Study") < text.index("go on")
    assert guide("Question?", "") == "Question?"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"solution": None}, "Problem 'x' has no `solution`; add it, or leave the problem out."),
        ({"solution": []}, "Problem 'x' has no `solution`;"),
        ({"solution": ""}, "Problem 'x' has no `solution`;"),
        ({"answer": None}, "Problem 'x' has no `answer`;"),
        ({"prompt": ""}, "Problem 'x' has no `prompt`;"),
        (
            {"solution": "all at once"},
            r"The solution of problem 'x' has 1 step, so that no beginning can be cut from it; give",
        ),
        ({"solution": ["one"]}, "The solution of problem 'x' has 1 step"),
        ({"solution": " \n"}, "The solution of problem 'x' has 0 step"),
        (
            {"prompt": [{"role": "assistant", "content": "a"}]},
            "The prompt of problem 'x' is neither a text nor a list of",
        ),
        ({"prompt": 7}, "The prompt of problem 'x' is neither"),
    ],
)
def test_unusable_problem_is_named(changes, message):
    with pytest.raises(ValueError, match="^" + message) as error:
        make_problems([ROW, {**ROW, "problem_id": "x", **changes}])
    assert as_sentence(error.value) == str(error.value)


def test_problems_are_needed_and_have_names_of_their_own():
    with pytest.raises(ValueError, match=r"^There are no problems; give at least one\.$"):
        make_problems([])
    with pytest.raises(ValueError, match=r"^Two problems have the `problem_id` 'x'; give each its own\.$"):
        make_problems([{**ROW, "problem_id": "x"}] * 2)
