"""A demonstration with untrained bases of two short programs: its shape, its budget and its errors, not its result."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import LlamaForCausalLM

from karla_hf.pope_demo import list_jobs, needed, read_recipe, run, work
from karla_hf.pope_demo_arms import ARMS, GRPO, POPE, SFT, run_arm
from karla_hf.pope_demo_base import BaseArguments, new_model, rule_probabilities, train_base
from karla_hf.pope_demo_problems import DemoArguments, prepare
from karla_hf.pope_demo_report import BASE, METRICS, Job, collect, markdown_table
from karla_hf.programs import OPERATIONS, RARE, draw_programs, new_tokenizer, run_program


RECIPE = Path(__file__).parents[1] / "recipes" / "pope-demo" / "demo.yaml"
SMALL = {
    "length": 3, "rare": 2, "hidden_size": 16, "base_steps": 2, "adapt_steps": 1, "base_batch_size": 4, "easy_pass": 0,
    "problems": 6, "held_out": 5, "easy": 6, "num_samples": 3, "search_samples": 2, "sft_steps": 1, "sft_batch_size": 2,
    "curve_every": 2, "curve_problems": 2, "seeds": 1, "sweep": [], "workers": 1,
    "max_steps": 3, "per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 7,
}  # fmt: skip


def overrides(folder, **options):
    values = {**SMALL, "output_dir": str(folder), **options}
    return [part for key, value in values.items() for part in (f"--{key}", json.dumps(value))]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Options, settings, and the folder of a base that is prepared."""
    options, settings = read_recipe(RECIPE, overrides(tmp_path_factory.mktemp("demo")))
    result = work(Job(BASE, options.right, 0), options, settings)
    return options, settings, Path(settings["output_dir"]) / "right0.05-seed0", result


def test_the_recipe_is_the_published_comparison():
    options, settings = read_recipe(RECIPE)
    assert (options.length, options.rare, options.right, options.seeds) == (8, 6, 0.05, 3)
    assert options.problems >= 256
    assert settings["per_device_train_batch_size"] // settings["num_generations"] == 16
    assert (settings["beta"], settings["loss_type"], settings["learning_rate"]) == (0.0, "dapo", 3e-4)
    assert settings["max_completion_length"] == 2 * options.length + 1
    assert options.easy_pass >= 0.98
    budget = settings["max_steps"] * settings["per_device_train_batch_size"]
    assert options.right**options.rare * budget < 1


def test_every_job_comes_after_the_one_it_needs():
    options = DemoArguments(seeds=2, sweep=[0.2])
    jobs = list_jobs(options)
    assert len(jobs) == len(set(jobs)) == 2 * (1 + len(ARMS)) + 3
    for index, job in enumerate(jobs):
        assert needed(job, options) in [None, *jobs[:index]]
    assert [job for job in jobs if needed(job, options) is None] == [Job(BASE, 0.05, 0), Job(BASE, 0.05, 1)]


def test_held_out_and_training_problems_are_apart(prepared):
    options, _, folder, result = prepared
    rows = {name: Dataset.from_json(str(folder / f"{name}.jsonl")) for name in ("training", "held_out", "prefixes")}
    assert not set(rows["training"]["prompt"]) & set(rows["held_out"]["prompt"])
    assert rows["training"]["problem_id"][:] == rows["prefixes"]["problem_id"][:]
    assert (result["training"], result["held_out"]) == (len(rows["training"]), len(rows["held_out"]))
    assert result["training"] <= options.problems
    assert result["held_out"] <= options.held_out
    assert sum(result["prefix_steps"]) == len(rows["prefixes"])
    assert result["prefix_samples"] == options.search_samples * sum(rows["prefixes"]["num_steps"][:])


def test_equal_seeds_give_equal_bases_and_others_do_not():
    options = BaseArguments(length=3, rare=2, hidden_size=16, base_steps=2, base_batch_size=4)
    first, again, other = (train_base(options, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_probabilities_of_the_right_rule_are_those_of_a_token_by_token_walk():
    options = BaseArguments(length=3, rare=2, hidden_size=16)
    model, tokenizer = new_model(options).eval(), new_tokenizer()
    starts, operations = draw_programs(7, options.length, options.rare, torch.Generator().manual_seed(5))
    traces, rules = [], []
    for start, indices in zip(starts.tolist(), operations.tolist(), strict=True):
        names = [OPERATIONS[index] for index in indices]
        ids = tokenizer(" ".join(["<q>", *map(str, start), *(f"{name} ." for name in names), "<h> <a>"]))["input_ids"]
        trace = 1.0
        words = [str(register) for state in run_program(tuple(start), names) for register in state]
        for place, token in enumerate(tokenizer(" ".join([*words, "<eos>"]))["input_ids"]):
            with torch.no_grad():
                chance = model(torch.tensor([ids])).logits[0, -1].double().softmax(0)[token].item()
            if place < len(words) and place % 2 == 0 and names[place // 2] == RARE:
                rules.append(chance)
            trace, ids = trace * chance, [*ids, token]
        traces.append(trace)
    found = rule_probabilities(model, options, seed=5, count=7)
    assert found == pytest.approx({"trace": sum(traces) / 7, "rule": sum(rules) / len(rules)}, rel=1e-5)
    assert len(rules) == 7 * options.rare


@pytest.fixture(scope="module")
def found(prepared):
    """What every job of one seed and one further share returned, done in this process."""
    options, settings, _, _ = prepared
    options = replace(options, sweep=[0.5])
    return options, {job: work(job, options, settings) for job in list_jobs(options)}


def test_every_arm_has_the_same_budget(prepared, found):
    _, settings, _, _ = prepared
    _, results = found
    for job, result in results.items():
        if job.name == BASE:
            continue
        assert result["rollouts"] == settings["max_steps"] * settings["per_device_train_batch_size"], job
        assert [step for step, _ in result["curve"]["held_out"]] == [0, 2]
        assert len(result["curve"]["frac_reward_zero_std"]) == settings["max_steps"]
        assert bool(result["curve"]["guided/accuracy"]) == (job.name == POPE)
        assert bool(result["curve"]["unguided/accuracy"])


def test_equal_seeds_give_equal_runs(prepared, found):
    options, settings, folder, _ = prepared
    again = run_arm(POPE, options, settings, 0, folder)
    first = dict(found[1][Job(POPE, options.right, 0)])
    for result in (first, again):
        assert result.pop("seconds") > 0
        assert result.pop("cpu_seconds") > 0
    assert first == again


@pytest.mark.parametrize("arm", [GRPO, SFT])
def test_supervised_fine_tuning_alone_changes_a_model_that_earns_no_reward(prepared, arm, tmp_path):
    """Without a right answer GRPO has no gradient, so that a large learning rate moves only the arm that fine-tunes."""
    options, settings, folder, _ = prepared
    hard = Dataset.from_json(str(folder / "training.jsonl"))
    for name, rows in (("training", hard.map(lambda row: {"answer": "none"})), ("held_out", hard)):
        rows.to_json(tmp_path / f"{name}.jsonl")
    LlamaForCausalLM.from_pretrained(folder / "base").save_pretrained(tmp_path / "base")
    taught = replace(options, sft_steps=100)
    found = run_arm(arm, taught, {**settings, "learning_rate": 1e-2}, 0, tmp_path)
    assert found["zero_gradient"] == 1
    assert (found["pass@1"] > 0.3) == (arm == SFT)


def test_results_have_a_value_per_arm_metric_and_seed(found):
    options, jobs = found
    results = json.loads(json.dumps(collect(jobs, options)))
    assert list(results["arms"]) == [BASE, *ARMS]
    for arm in ARMS:
        assert set(results["arms"][arm]) == set(METRICS)
    assert all(len(values) == 1 for arm in results["arms"].values() for values in arm.values())
    assert list(results["sweep"]) == ["0.05", "0.5"]
    assert list(results["sweep"]["0.5"]["arms"]) == [BASE, GRPO, POPE]
    assert results["expected"]["rollouts"] == 24
    assert results["expected"]["by right"] == pytest.approx(24 * 0.05**2)
    assert results["sweep"]["0.5"]["expected"]["by right"] == pytest.approx(24 * 0.5**2)
    [trace] = results["base"]["trace"]
    assert results["expected"]["by probability"] == pytest.approx([24 * trace])


@pytest.mark.slow  # its workers import everything
def test_a_run_spreads_over_workers_and_goes_on_where_it_was_interrupted(tmp_path, capsys):
    results = run(RECIPE, overrides(tmp_path, seeds=2, sweep=[0.5], workers=2))
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(results))
    assert all(len(values) == 2 for arm in results["arms"].values() for values in arm.values())
    assert (tmp_path / "table.md").read_text() == markdown_table(results)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert len(re.findall(r"seed \d, ", capsys.readouterr().out)) == 2 * 5 + 3
    options, settings = read_recipe(RECIPE, overrides(tmp_path, seeds=2, sweep=[0.5], workers=2))
    job = Job(GRPO, 0.05, 1)
    expected = results["arms"][GRPO]["seconds"][1]
    assert work(job, options, settings)["seconds"] == expected  # taken from its file
    assert work(job, options, {**settings, "learning_rate": 1e-5})["seconds"] != expected  # other settings: done again


def test_a_base_that_slips_on_easy_programs_is_refused(tmp_path):
    options, _ = read_recipe(RECIPE, overrides(tmp_path, easy_pass=0.98))
    with pytest.raises(ValueError, match=r"The base solves 0\.0000 of easy programs, less than `easy_pass` = 0\.98"):
        prepare(options, 0, tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("seeds", 0, "`seeds` is 0; give 1 or more"),
        ("workers", -1, "`workers` is -1; give 1 or more"),
        ("rare", 9, "`rare` is 9; give 0 to `length` = 8"),
        ("learning_rat", 1, "learning_rat"),
    ],
)
def test_impossible_settings_are_named(key, value, message):
    with pytest.raises(ValueError, match=message):
        read_recipe(RECIPE, [f"--{key}", str(value)])


@pytest.mark.slow  # two processes import everything
def test_two_processes_share_every_run_and_report_once(tmp_path):
    alone = run(RECIPE, overrides(tmp_path / "alone"))
    folder = tmp_path / "shared"
    path = os.pathsep.join([str(RECIPE.parents[2]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, "-m", "karla_hf.pope_demo", str(RECIPE), *overrides(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    shared = json.loads((folder / "results.json").read_text())
    assert shared["processes"] == 2
    assert {arm: set(values) for arm, values in shared["arms"].items()} == {
        arm: set(values) for arm, values in alone["arms"].items()
    }
    for arm in ARMS:
        assert shared["arms"][arm]["rollouts"] == alone["arms"][arm]["rollouts"] == [24]
        for key, points in shared["curves"][arm][0].items():  # each step once
            assert [step for step, _ in points] == [step for step, _ in alone["curves"][arm][0][key]], (arm, key)
    assert [path.name for path in folder.rglob("results.json")] == ["results.json"]
    lines = re.findall(r"seed 0, (.+): pass@1", done.stdout)
    assert lines == [BASE, *ARMS]
    assert done.stdout.count("Expected successes") == 1


def test_a_batch_that_processes_cannot_share_is_named(prepared, monkeypatch):
    options, settings, folder, _ = prepared
    monkeypatch.setattr(PartialState(), "num_processes", 3)
    with pytest.raises(ValueError, match="`per_device_train_batch_size` is 8, which 3 processes cannot share"):
        run_arm(GRPO, options, settings, 0, folder)
