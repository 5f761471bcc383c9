import json
import shutil

import pytest
from test_pope import make_model, make_trainer, many_letters
from tiny import make_tokenizer

from karla_hf.errors import as_sentence
from karla_hf.pope import (
    AdaptivePrefixes,
    PrefixCurriculum,
    StagedPrefixes,
    build_rows,
    make_problems,
    reward_function,
)


STEPS = [f"step {i}" for i in range(8)]
ALL = {"max_fraction": 1.0, "num_samples": 4, "tolerance": 0.25}


def show(problem, prefix):
    return f"{problem}|{prefix}"


def make_parts(**steps):
    problems = make_problems(
        [{"problem_id": name, "prompt": f"{name}:", "solution": STEPS, "answer": "aeo"} for name in steps]
    )
    return problems, type(problems).from_list([{"problem_id": name, "num_steps": k} for name, k in steps.items()])


def play(curriculum, reward=many_letters, **hits):
    """A step in which the guided row of each problem has the given share of correct answers."""
    rows = curriculum.dataset[:]
    watched = curriculum.watch(lambda prompts, completions, **columns: completions)
    for name, share in hits.items():
        place = rows["problem_id"].index(name)
        columns = {key: [values[place]] * len(share) for key, values in rows.items() if key != "prompt"}
        assert watched(prompts=["…"] * len(share), completions=share, **columns) == share
    curriculum.num_steps.update(curriculum.change(1))


def test_dataset_is_that_of_build_rows_with_the_prefixes_of_the_moment():
    problems, prefixes = make_parts(a=2, b=1, c=0)
    curriculum = PrefixCurriculum(problems, prefixes, render=show)
    rows = curriculum.dataset
    assert rows[:] == build_rows(problems, prefixes, render=show).to_dict()
    assert rows[0]["prompt"] == "a:|step 0\nstep 1"
    curriculum.num_steps["a"] = 1
    assert rows[0]["prompt"] == "a:|step 0"
    curriculum.num_steps["a"] = 0
    assert (rows[0]["prompt"], rows[0]["guided"]) == ("a:|", False)
    assert rows[1]["prompt"] == "a:|"
    with pytest.raises(ValueError, match=r"^No problem has a prefix, so there is nothing to adapt; give a larger"):
        PrefixCurriculum(*make_parts(a=0))


def test_prefix_follows_the_success_of_its_problem():
    curriculum = AdaptivePrefixes(*make_parts(a=3, b=3, c=3, d=8), **ALL)
    play(curriculum, a=[1.0] * 4, b=[1.0, 0.0] * 2, c=[0.0] * 4, d=[0.0] * 4)
    assert curriculum.num_steps == {"a": 2, "b": 3, "c": 4, "d": 8}
    play(curriculum, a=[1.0] * 3)
    assert curriculum.num_steps["a"] == 2  # too few to judge
    play(curriculum, a=[None, 0.5, 0.0])
    assert curriculum.num_steps["a"] == 2  # 3 of 5; what has no reward does not count
    assert AdaptivePrefixes(*make_parts(a=1)).longest == {"a": 2}


def test_prefix_that_is_withdrawn_stays_so():
    curriculum = AdaptivePrefixes(*make_parts(a=2), **ALL)
    for steps in (1, 0, 0):
        play(curriculum, a=[1.0] * 4)
        assert curriculum.num_steps == {"a": steps}
    play(curriculum, a=[0.0] * 8)
    assert curriculum.num_steps == {"a": 0}


def test_completions_of_an_older_prefix_do_not_count():
    curriculum = AdaptivePrefixes(*make_parts(a=4), **ALL)
    old = curriculum.dataset[0]
    play(curriculum, a=[1.0] * 4)
    watched = curriculum.watch(many_letters)
    watched(
        prompts=["…"] * 4,
        completions=["aeo"] * 4,
        **{key: [value] * 4 for key, value in old.items() if key != "prompt"},
    )
    assert curriculum.change(2) == {}
    assert watched.__name__ == "many_letters"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"target": 1.0},
            r"^`target` is 1\.0 and `tolerance` 0\.25; give a target above 0 and below 1, and a tolerance",
        ),
        ({"target": 0.9}, r"^`target` is 0\.9 and `tolerance` 0\.25; give"),
    ],
)
def test_targets_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        AdaptivePrefixes(*make_parts(a=1), **options)
    with pytest.raises(ValueError, match=r"^`every` is 0; give 1 or more steps between two searches\.$"):
        StagedPrefixes(*make_parts(a=1), many_letters, every=0)
    with pytest.raises(ValueError, match=r"^`min_success` is 9; give a number from 1 to the 4 samples\.$"):
        StagedPrefixes(*make_parts(a=1), many_letters, every=1, num_samples=4, min_success=9)


def train(curriculum, folder, reward, **options):
    trainer = make_trainer(
        make_model("llama", folder), curriculum.dataset, folder, reward, callbacks=[curriculum],
        **{"per_device_train_batch_size": 4, "num_generations": 2, **options},
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=options.get("resume_from_checkpoint"))
    return trainer


@reward_function
def always(completion, answer, **row):
    return 1.0


@reward_function
def first_steps(completion, answer, **row):
    return float("e" in completion)


def test_prefixes_shrink_to_none_while_the_trainer_trains(tmp_path):
    curriculum = AdaptivePrefixes(*make_parts(a=1, b=2), num_samples=2)
    seen = []

    @reward_function
    def noted(completion, answer, problem_id, num_steps, **row):
        seen.append((problem_id, num_steps))
        return 1.0

    train(curriculum, tmp_path, curriculum.watch(noted), max_steps=12)
    assert curriculum.num_steps == {"a": 0, "b": 0}
    assert {steps for name, steps in seen if name == "b"} == {0, 1, 2}
    last = [steps for _, steps in seen[-8:]]
    assert last == [0] * 8


def test_resumed_training_takes_the_prefixes_of_its_checkpoint(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole = AdaptivePrefixes(*make_parts(a=6, b=6), num_samples=2, max_fraction=0.9)
    first = train(whole, tmp_path / "whole", whole.watch(first_steps), **options)
    saved = json.loads((tmp_path / "whole" / "out" / "checkpoint-2" / "trainer_state.json").read_text())
    at_two = saved["stateful_callbacks"]["pope_prefixes"]["num_steps"]
    assert at_two != {"a": 6, "b": 6}
    shutil.copytree(tmp_path / "whole" / "out" / "checkpoint-2", tmp_path / "again" / "out" / "checkpoint-2")
    again = AdaptivePrefixes(*make_parts(a=6, b=6), num_samples=2, max_fraction=0.9)
    last = str(tmp_path / "again" / "out" / "checkpoint-2")
    began = []
    again.on_step_begin = lambda args, state, control, **kwargs: began.append(dict(again.num_steps))
    second = train(again, tmp_path / "again", again.watch(first_steps), resume_from_checkpoint=last, **options)
    assert began[0] == at_two
    assert second.state.global_step == first.state.global_step == 4
    plain = PrefixCurriculum(*make_parts(a=6, b=6))
    state = json.loads((tmp_path / "again" / "out" / "checkpoint-2" / "trainer_state.json").read_text())
    del state["stateful_callbacks"]["pope_prefixes"]
    (tmp_path / "again" / "out" / "checkpoint-2" / "trainer_state.json").write_text(json.dumps(state))
    with pytest.raises(
        ValueError, match=r"^The checkpoint holds no prefixes, so it was not trained with a prefix"
    ) as error:
        train(plain, tmp_path / "again", first_steps, resume_from_checkpoint=last, **options)
    assert as_sentence(error.value) == str(error.value)


def test_stages_search_again_from_none_to_the_present_prefix(tmp_path):
    asked = []

    @reward_function
    def needs_two(completion, answer, problem_id, **row):
        return 1.0

    def search_reward(prompts, completions, problem_id, **columns):
        steps = prompts[0].count("step")
        asked.append((problem_id[0], steps))
        return [float(problem_id[0] == "a" and steps >= 1)] * len(completions)

    curriculum = StagedPrefixes(
        *make_parts(a=3, b=2), search_reward, every=2, num_samples=2, render=show, sampling={"max_new_tokens": 3}
    )
    train(curriculum, tmp_path, needs_two, max_steps=3)
    assert curriculum.num_steps == {"a": 1, "b": 2}
    assert asked == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("b", 2)]  # once, after step 2


def test_worker_processes_are_refused(tmp_path):
    curriculum = PrefixCurriculum(*make_parts(a=1, b=1))
    with pytest.raises(
        ValueError, match=r"^`dataloader_num_workers` is 1, but other processes would not see"
    ) as error:
        train(curriculum, tmp_path, always, dataloader_num_workers=1)
    assert as_sentence(error.value) == str(error.value)


def test_karla_is_searched_with_its_ticks_and_stays_in_training_mode(tmp_path):
    curriculum = StagedPrefixes(*make_parts(a=1), always, every=1, num_samples=2, sampling={"max_new_tokens": 2})
    model = make_model("karla", tmp_path).train()
    assert curriculum.change(1, model=model, processing_class=make_tokenizer()) == {"a": 0}
    assert model.training
