import threading

import pytest

from karla_hf.errors import as_sentence
from karla_hf.pope import exact_reward, final_answer, find_reward, math_reward, reasoning_gym_reward, reward_function
from karla_hf.pope_tasks import chain_sum


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"So \boxed{1} or rather \boxed{\frac{1}{\sqrt{2}}}.", r"\frac{1}{\sqrt{2}}"),
        ("Answer: 4\nNo.\n**Answer:** 5.\nBye", "5"),
        ("The answer is 7.", "7"),
        ("2 + 2\n#### 4", "4"),
        ("<answer> 12 </answer> done", "12"),
        ("2 + 2 = 4\n4\n\n", "4"),
        ("open \\boxed{3", "open \\boxed{3"),
        ("Answer:", ""),
        ("", ""),
    ],
)
def test_final_answer_of_a_completion(text, answer):
    assert final_answer(text) == answer


def test_exact_reward_takes_texts_and_messages():
    said = ["Answer: No", "answer:  no.", "Answer: Yes"]
    assert exact_reward(prompts=["?"] * 3, completions=said, answer=["No"] * 3) == [1.0, 1.0, 0.0]
    messages = [[{"role": "assistant", "content": text}] for text in said]
    assert exact_reward(prompts=["?"] * 3, completions=messages, answer=["No"] * 3) == [1.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("said", "answer", "reward"),
    [
        (r"\boxed{\frac{3}{6}}", "1/2", 1.0),
        ("Answer: 0.5", "1/2", 1.0),
        (r"\boxed{2^{n-1}}", "2^(n-1)", 1.0),
        (r"\boxed{n+1}", "n", 0.0),
        ("I do not know", "n", 0.0),
        ("Answer: no", "No", 1.0),
        ("", "5", 0.0),
    ],
)
def test_math_reward_compares_values(said, answer, reward):
    assert math_reward(prompts=["?"], completions=[said], answer=[answer]) == [reward]


def test_math_reward_works_outside_the_main_thread():
    found = []
    thread = threading.Thread(
        target=lambda: found.extend(math_reward(prompts=["?"], completions=["Answer: 2/4"], answer=["1/2"]))
    )
    thread.start()
    thread.join()
    assert found == [1.0]


def test_reasoning_gym_reward_is_that_of_the_task():
    (row,) = chain_sum(1)
    columns = {key: [row[key]] * 3 for key in ("answer", "task", "metadata")}
    said = [
        f"Answer: +{row['answer']}.0" if int(row["answer"]) >= 0 else f"Answer: {row['answer']}.0",
        "Answer: 99",
        "x",
    ]
    scores = reasoning_gym_reward(prompts=["?"] * 3, completions=said, **columns)
    assert scores[0] == 1.0
    assert max(scores[1:]) < 1.0


def test_metrics_are_logged_once_per_completion():
    logged, extra = [], {}
    rewards = exact_reward(
        prompts=["?"] * 4,
        completions=["2", "3", "2", "2"],
        completion_ids=[[1]] * 4,
        answer=["2"] * 4,
        guided=[True, True, False, False],
        fraction=[0.25, 0.25, 0.0, 0.0],
        num_steps=[1, 1, 0, 0],
        problem_id=["a", "a", "b", "b"],
        trainer_state=object(),
        log_metric=lambda name, value: logged.append((name, value)),
        log_extra=extra.__setitem__,
    )
    assert rewards == [1.0, 0.0, 1.0, 1.0]
    assert logged == [
        ("guided/accuracy", 1.0),
        ("guided/accuracy", 0.0),
        ("unguided/accuracy", 1.0),
        ("unguided/accuracy", 1.0),
        ("guided/fraction", 0.25),
        ("guided/fraction", 0.25),
    ]
    assert extra == {
        "problem_id": ["a", "a", "b", "b"],
        "guided": [True, True, False, False],
        "num_steps": [1, 1, 0, 0],
    }


def test_process_without_guided_rows_logs_no_guided_accuracy():
    logged = []
    exact_reward(prompts=["?"], completions=["2"], answer=["2"], guided=[False],
                 log_metric=lambda name, value: logged.append(name))  # fmt: skip
    assert logged == ["unguided/accuracy"]


def test_none_is_passed_on_and_not_counted():
    @reward_function
    def only_long(completion, **row):
        return float(len(completion) > 3) if completion else None

    logged = []
    rewards = only_long(prompts=["?"] * 2, completions=["", "long"], guided=[True, True],
                        log_metric=lambda name, value: logged.append((name, value)))  # fmt: skip
    assert rewards == [None, 1.0]
    assert logged == [("guided/accuracy", 1.0)]


def test_rewards_are_found_by_name_or_import_path():
    assert find_reward("math") is math_reward
    assert find_reward("karla_hf.pope_rewards.exact_reward") is exact_reward
    for name, message in (
        ("maths", r"^'maths' is no reward function; give one of exact, math, reasoning-gym, or the import path"),
        (
            "no_such_module.f",
            r"^The reward 'no_such_module\.f' cannot be imported \(No module named 'no_such_module'\); give",
        ),
        ("karla_hf.pope.nothing", r"cannot be imported \(module 'karla_hf\.pope' has no attribute 'nothing'\)"),
        ("karla_hf.pope_rewards.CORRECT", "is no reward function"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            find_reward(name)
        assert as_sentence(error.value) == str(error.value)
