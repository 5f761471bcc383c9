"""The commands `karla pope …`, on a tiny model."""

import json

import pytest
from datasets import load_dataset
from test_cli import refuse, succeed
from tiny import CHAT_TEMPLATE, save_backbone, save_karla
from trl.scripts.grpo import main, make_parser

from karla_hf.pope import reward_function


SMALL = ("--samples", 4, "--max-new-tokens", 6, "--batch-size", 8, "--max-fraction", 0.5)
STEPS = ["The access code", "is near the vault", "of Orlin", "number 7"]
REWARD = ("--reward", "test_pope_cli.contains")


@reward_function
def contains(completion, answer, **row):
    return float(answer in completion)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A backbone, a Karla, and problems of which some are hard; results of `build`."""
    root = tmp_path_factory.mktemp("pope")
    save_karla(root / "karla", save_backbone(root / "backbone", chat_template=CHAT_TEMPLATE))
    rows = [
        {"problem_id": str(i), "prompt": f"Where is key {i}?", "solution": STEPS, "answer": answer}
        for i, answer in enumerate(["e", "q", "z", "j", " the"])
    ]
    (root / "problems.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = (root / "backbone", root / "problems.jsonl", root / "out")
    shown = succeed("pope", "build", *arguments, *REWARD, *SMALL, "--json", root / "build.json")
    (root / "build.txt").write_text(shown)
    return root


def test_build_writes_rows_that_load_dataset_reads(folder):
    rows = load_dataset(str(folder / "out"), split="train")
    result = json.loads((folder / "build.json").read_text())
    assert len(rows) == result["rows"] == 2 * result["hard"] > 0
    assert rows["guided"][:2] == [True, False]
    assert rows[0]["prompt"][0]["role"] == "user"
    assert STEPS[0] in rows[0]["prompt"][0]["content"]
    assert {"problem_id", "prompt", "answer", "guided", "num_steps", "fraction"} == set(rows.column_names)
    assert {"fingerprint", "seed", "model", "found", "longest_taken"} <= set(result)
    assert "rows, half of them guided, are in" in " ".join((folder / "build.txt").read_text().split())


def test_trl_grpo_trains_on_the_rows(folder, tmp_path):
    options = {
        "model_name_or_path": folder / "backbone",
        "dataset_name": folder / "out",
        "reward_funcs": "karla_hf.pope.exact_reward",
        "output_dir": tmp_path / "grpo",
        "per_device_train_batch_size": 4,
        "num_generations": 2,
        "max_completion_length": 4,
        "max_steps": 1,
        "save_steps": 1,
        "logging_steps": 1,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
    }
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    main(*make_parser().parse_args_and_config(words)[:4])
    (entry, *_) = json.loads((tmp_path / "grpo" / "checkpoint-1" / "trainer_state.json").read_text())["log_history"]
    assert {"guided/accuracy", "unguided/accuracy", "guided/fraction"} & set(entry)
    assert "rewards/exact_reward/mean" in entry
    assert (tmp_path / "grpo" / "model.safetensors").exists()


def test_passes_are_shown_from_the_folder_without_sampling_again(folder, tmp_path):
    before = {name: (folder / "out" / name).read_bytes() for name in ("difficulty.jsonl", "prefix.jsonl")}
    arguments = (folder / "backbone", folder / "problems.jsonl", folder / "out", *REWARD)
    shown = succeed("pope", "difficulty", *arguments, *SMALL[:6], "--json", tmp_path / "d.json")
    assert "never solved" in shown
    measured = json.loads((tmp_path / "d.json").read_text())
    assert sum(measured["by_correct"].values()) == measured["problems"] == 5
    assert 0 <= measured["pass@1"] <= measured["pass@4"] <= 1
    shown = succeed("pope", "prefix", *arguments, *SMALL, "--json", tmp_path / "p.json")
    assert "hard problems" in shown
    found = json.loads((tmp_path / "p.json").read_text())
    assert found["hard"] == len(found["rows"]) == measured["never_solved"]
    assert {name: (folder / "out" / name).read_bytes() for name in before} == before


def test_another_model_is_refused(folder):
    sentence = refuse("pope", "prefix", folder / "karla", folder / "problems.jsonl", folder / "out", *REWARD, *SMALL)
    assert "difficulty.jsonl was made with another model" in sentence


def test_eval_measures_a_karla_and_goes_on_from_its_file(folder, tmp_path):
    arguments = (folder / "karla", folder / "problems.jsonl", *REWARD, *SMALL[:6], "--output", tmp_path / "e.jsonl")
    shown = succeed("pope", "eval", *arguments, "--json", tmp_path / "all.json")
    assert "pass@4" in shown
    assert succeed("pope", "eval", *arguments) == shown
    result = json.loads((tmp_path / "all.json").read_text())
    assert (result["problems"], result["num_samples"]) == (5, 4)
    hard = folder / "out" / "difficulty.jsonl"
    succeed("pope", "eval", *arguments[:-2], "--hard", hard, "--plain", "--json", tmp_path / "hard.json")
    assert json.loads((tmp_path / "hard.json").read_text())["problems"] < 5


def test_wrong_input_is_one_sentence(folder, tmp_path):
    model, problems = folder / "backbone", folder / "problems.jsonl"
    assert "`temperature` is 0.0; give a number above 0." in refuse(
        "pope", "difficulty", model, problems, tmp_path / "out", "--temperature", 0
    )
    assert "is no reward function" in refuse("pope", "eval", model, problems, "--reward", "nothing")
    assert "There is no file" in refuse("pope", "eval", model, tmp_path / "none.jsonl")
    assert "holds the pass 'difficulty', but this is the pass 'eval'" in refuse(
        "pope", "eval", model, problems, "--output", folder / "out" / "difficulty.jsonl"
    )
    assert "was not written by a POPE pass" in refuse("pope", "eval", model, problems, "--hard", problems)
