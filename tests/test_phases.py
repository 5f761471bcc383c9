"""Phase 3, and the three phases as one job."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from schedules import write_schedule
from tiny import OPTIONS, files_in
from typer.testing import CliRunner

from karla_hf import KarlaForCausalLM
from karla_hf.cli import app
from karla_hf.errors import as_sentence
from karla_hf.phases import run
from karla_hf.run_evaluation import evaluate_run
from karla_hf.runs import keep_recipe, last_checkpoint, read_summary, whole_checkpoints
from karla_hf.schedule import plan


RECIPES = Path(__file__).parents[1] / "recipes"
NAMES = ("warm-up", "pope", "fine-tune")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A schedule that was run, and what it returned."""
    folder = tmp_path_factory.mktemp("schedule")
    path = write_schedule(folder)
    return path, run(path)


def test_three_phases_run_as_one_job(trained):
    path, summary = trained
    out = path.with_suffix("")
    assert json.loads((out / "summary.json").read_text()) == summary
    assert tuple(summary["phases"]) == NAMES
    for name, found in summary["phases"].items():
        assert found["folder"] == str(out / name)
        assert {"held_out_loss", "pass@1", "pass@16", "expected_ticks", "memory_rows"} <= set(found)
        assert 0 <= found["expected_ticks"] <= 3
    losses = [found["held_out_loss"] for found in summary["phases"].values()]
    assert losses[0] < summary["phases"]["warm-up"]["backbone_loss"] - 0.1
    assert len(set(losses)) == 3  # each phase changed the head
    pope = read_summary(out / "pope")
    assert summary["phases"]["warm-up"]["pass@16"] == pope["before"]["pass@16"]
    assert summary["phases"]["pope"]["pass@16"] == pope["after"]["pass@16"]


def test_phases_continue_the_karla_of_the_one_before(trained):
    out = trained[0].with_suffix("")
    for before, name in itertools.pairwise(NAMES):
        kept = yaml.safe_load((out / name / "recipe.yaml").read_text())
        assert kept["model_name_or_path"] == str(out / before)


def test_fine_tuning_calibrates_and_watches(trained):
    folder = trained[0].with_suffix("") / "fine-tune"
    summary = read_summary(folder)
    model = KarlaForCausalLM.from_pretrained(folder)
    assert (model.config.certainty_threshold, model.config.ctm_num_ticks) == (
        summary["threshold"],
        summary["num_ticks"],
    )
    assert (model.config.tick_loss, model.config.ponder_cost) == ("mean", 0.01)
    assert summary["loss_at_threshold"] <= 1.0031 * summary["karla_loss"]
    assert summary["grokking"]["state"] == "FIT"
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    logged = {key for entry in history for key in entry}
    assert {"eval_train_loss", "eval_val_loss", "grokking/state", "grokking/weight_norm"} <= logged
    assert {"ticks", "certainty", "expected_ticks"} <= logged
    assert sum("grokking/state" in entry for entry in history) == 2


def test_finished_phases_are_not_repeated(trained, capsys):
    path, summary = trained
    before = files_in(path.with_suffix(""))
    assert run(path) == summary
    assert files_in(path.with_suffix("")) == before
    assert capsys.readouterr().out.count("finished before") == 3


def test_phase_that_was_begun_with_other_values_is_refused(trained):
    with pytest.raises(
        ValueError, match=r"fine-tune was begun with `learning_rate` 0\.01, but now it is 0\.5; give"
    ) as e:
        run(trained[0], ["--fine-tune.learning_rate", "0.5"])
    assert as_sentence(e.value) == str(e.value)


@pytest.mark.parametrize("which", ["last", "best", "2"])
def test_checkpoints_are_measured(trained, which, tmp_path):
    out = trained[0].with_suffix("")
    result = CliRunner().invoke(
        app, ["eval", "all", str(out), "--checkpoint", which, "--json", str(tmp_path / "all.json")]
    )
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "all.json").read_text())
    history = json.loads((out / "fine-tune" / "trainer_state.json").read_text())["log_history"]
    losses = {entry["step"]: entry["eval_val_loss"] for entry in history if "eval_val_loss" in entry}
    step = {"last": 4, "2": 2, "best": min(losses, key=losses.get)}[which]
    assert Path(found["folder"]).name == f"checkpoint-{step}"
    assert found["held_out_loss"] == pytest.approx(losses[step], abs=0.02)  # mean over batches there, over tokens here
    assert {"pass@1", "pass@16", "expected_ticks", "memory_rows"} <= set(found)
    assert "expected ticks" in result.output


def test_result_of_a_phase_is_what_the_schedule_measured(trained):
    path, summary = trained
    found = evaluate_run(path.with_suffix("") / "warm-up")
    expected = summary["phases"]["warm-up"]
    assert found["held_out_loss"] == pytest.approx(expected["held_out_loss"], abs=1e-5)
    assert found["pass@16"] == expected["pass@16"]


@pytest.mark.parametrize(
    ("which", "message"),
    [
        ("3", r"has no checkpoint '3'; give best, last, or one of the steps 2, 4\.$"),
        ("worst", r"has no checkpoint 'worst'"),
    ],
)
def test_checkpoint_that_is_not_there(trained, which, message):
    with pytest.raises(ValueError, match=message) as error:
        evaluate_run(trained[0].with_suffix(""), which)
    assert as_sentence(error.value) == str(error.value)


def test_run_that_did_not_evaluate_has_no_best(trained):
    with pytest.raises(ValueError, match=r"None of the checkpoints of .*warm-up was evaluated on the way; give last"):
        evaluate_run(trained[0].with_suffix("") / "warm-up", "best")


def test_folder_that_is_no_run(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no recipe\.yaml; give the `output_dir` of a training run\.$"):
        evaluate_run(tmp_path)
    keep_recipe({"phases": {"warm-up": {}}}, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"^No phase of .* has begun; run `karla train` first\.$"):
        evaluate_run(tmp_path)
    (tmp_path / "recipe.yaml").write_text("{phase: warm-up}")
    with pytest.raises(ValueError, match=r"holds no checkpoints; give the `output_dir` of a run that saved some\.$"):
        evaluate_run(tmp_path, "last")


def test_keys_go_to_the_phases_that_have_them(tmp_path):
    path = write_schedule(tmp_path)
    phases = yaml.safe_load(path.read_text())["phases"]
    changes = {"max_length": 64, "seed": 3, "warm_up.seed": 4, "ctm_num_neurons": 16, "pope.num_samples": 1}
    warmup, pope, finetune = plan(path, phases, changes, tmp_path / "out")
    own = {"output_dir": str(tmp_path / "out" / "warm-up"), "save_packed": False}
    assert warmup.changes == {"max_length": 64, "seed": 4, "ctm_num_neurons": 16, **own}
    assert {key: pope.changes[key] for key in ("seed", "num_samples")} == {"seed": 3, "num_samples": 1}
    assert "max_length" not in pope.changes  # a key of SFTConfig alone
    assert finetune.changes["max_length"] == 64
    assert [part.changes.get("save_packed") for part in (warmup, pope, finetune)] == [False, False, None]
    assert "ctm_num_neurons" not in finetune.changes  # the Karla has its shape by then
    # The last mention counts.
    warmup = plan(path, phases, {"warm_up.seed": 4, "seed": 3}, tmp_path / "out")[0]
    assert warmup.changes["seed"] == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"phases": None}, r"needs `output_dir` and `phases`; add what is missing\.$"),
        ({"output_dir": None}, r"needs `output_dir` and `phases`; add what is missing\.$"),
        ({"phases": {"warmup": {"recipe": "warmup.yaml"}}}, r"phase 'warmup' cannot be used; give warm-up, pope, fine-tune, each"),
        ({"phases": {"pope": {}}}, r"phase 'pope' cannot be used; give"),
        ({"phases": {"pope": {"recipe": "warmup.yaml"}}}, r"warmup\.yaml is no recipe of the phase 'pope'; give one that is\.$"),
        ({"seeed": 3}, r"`seeed` is a key of none of the phases warm-up, pope, fine-tune; correct it, or remove it\.$"),
        ({"pop.seed": 3}, r"`pop\.seed` is a key of none of the phases"),
        ({"pope.model_name_or_path": "x"}, r"`model_name_or_path` of the phase 'pope' is set by the schedule; remove it\.$"),
        ({"warm-up.output_dir": "x"}, r"`output_dir` of the phase 'warm-up' is set by the schedule; remove it\.$"),
        ({"resume_from_checkpoint": "true"}, r"`resume_from_checkpoint` is a key of none of the phases"),
    ],
)  # fmt: skip
def test_schedule_that_cannot_be_used(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message) as error:
        run(write_schedule(tmp_path, **changes))
    assert as_sentence(error.value) == str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"probe_rows": 0}, r"`probe_rows` is 0; give a number from 1 to 512\.$"),
        ({"max_loss_rise": -1}, r"`max_loss_rise` is -1\.0; give 0 or more, such as 0\.003\.$"),
        ({"read_texts": -1}, r"`read_texts` is -1; give how many texts the memory reads, or 0 for none\.$"),
        ({"held_out_limit": 0}, r"`held_out_limit` is 0; give 1 or more rows, or leave it out\.$"),
        ({"eval_strategy": "no"}, r"^Grokking is seen by evaluating train and val, but .*set `eval_strategy`\.$"),
    ],
)
def test_fine_tuning_recipe_that_cannot_be_used(tmp_path, changes, message):
    write_schedule(tmp_path)
    options = {"model_name_or_path": str(tmp_path / "backbone"), "output_dir": str(tmp_path / "out"), **changes}
    overrides = [part for key, value in options.items() for part in (f"--{key}", json.dumps(value))]
    with pytest.raises(ValueError, match=message) as error:
        run(tmp_path / "finetune.yaml", overrides)
    assert as_sentence(error.value) == str(error.value)


@pytest.mark.parametrize("size", ["smollm2-135m", "qwen2.5-1.5b"])
def test_shipped_schedules_can_be_planned(size):
    from karla_hf.arguments import parse_recipe, quick_overrides
    from karla_hf.fine_tuning import FineTuneArguments
    from karla_hf.overrides import as_overrides, read_overrides
    from karla_hf.pope_arguments import parse_pope_recipe

    path = RECIPES / size / "all.yaml"
    values = yaml.safe_load(path.read_text())
    plans = [{}]
    if size == "smollm2-135m":
        quick = read_overrides(quick_overrides(path))
        assert quick.pop("output_dir") != values["output_dir"]
        plans.append(quick)
    for changes in plans:
        for phase in plan(path, values["phases"], changes, Path(values["output_dir"])):
            overrides = [*as_overrides(phase.changes), "--bf16", "false"]
            kinds = {"fine-tune": (FineTuneArguments,)}
            parse = parse_pope_recipe if phase.name == "pope" else parse_recipe
            recipe = parse(phase.recipe, overrides, *kinds.get(phase.name, ()))
            assert recipe.training.output_dir == str(phase.folder)


def test_full_size_schedule_runs_for_a_step_on_a_tiny_model(tmp_path):
    write_schedule(tmp_path)
    text = {"dataset_name": None, "dataset_files": [str(tmp_path / "text.txt")], "max_length": 32, "held_out_limit": 2}
    pope = {"problems": str(tmp_path / "problems.jsonl"), "problems_split": None, "problems_columns": None,
            "reward": "schedules.vowels", "num_samples": 2, "max_completion_length": 4, "num_generations": 2}  # fmt: skip
    steps = {"max_steps": 1, "save_steps": 1, "eval_steps": 1, "logging_steps": 1, "gradient_accumulation_steps": 1}
    here = {"bf16": False, "use_cpu": True, "per_device_train_batch_size": 2, "probe_rows": 2, "warmup_steps": 0}
    values = {
        **OPTIONS, **text, **pope, **steps, **here, "output_dir": str(tmp_path / "out"),
        "warm-up.model_name_or_path": str(tmp_path / "backbone"), "backbone_quantization": None, "fine-tune.read_texts": 3,
    }  # fmt: skip
    overrides = [part for key, value in values.items() for part in (f"--{key}", json.dumps(value))]
    summary = run(RECIPES / "qwen2.5-1.5b" / "all.yaml", overrides)
    assert tuple(summary["phases"]) == NAMES
    for name in NAMES:
        assert read_summary(tmp_path / "out" / name)["steps"] == 1
    losses = [found["held_out_loss"] for found in summary["phases"].values()]
    assert losses[2] != losses[1]
    memory = {name: found["memory_rows"] for name, found in summary["phases"].items()}
    assert (memory["warm-up"], memory["pope"]) == (0, 0)
    assert memory["fine-tune"] > 0
    assert losses[2] < summary["phases"]["fine-tune"]["loss_without_memory"]  # facts of the same kind were read
    kept = yaml.safe_load((tmp_path / "out" / "fine-tune" / "recipe.yaml").read_text())
    assert (kept["tick_loss"], kept["ponder_cost"], kept["backbone_dtype"]) == ("two_tick", 0.01, "bfloat16")


def test_quick_values_go_first_and_overrides_before_them(tmp_path):
    (tmp_path / "recipe.yaml").write_text("{phase: none, quick: {phase: still-none, max_steps: 2}}")
    with pytest.raises(ValueError, match=r"`phase` is 'none'; give warm-up"):
        run(tmp_path / "recipe.yaml")
    with pytest.raises(ValueError, match=r"`phase` is 'still-none'; give warm-up"):
        run(tmp_path / "recipe.yaml", quick=True)
    with pytest.raises(ValueError, match=r"`phase` is 'other'; give warm-up"):
        run(tmp_path / "recipe.yaml", ["--phase", "other"], quick=True)
    (tmp_path / "recipe.yaml").write_text("{phase: none}")
    with pytest.raises(ValueError, match=r"recipe\.yaml has no `quick` values; leave --quick out"):
        run(tmp_path / "recipe.yaml", quick=True)


def test_checkpoint_whose_writing_was_interrupted_is_passed_over(tmp_path):
    for step, text in ((2, "{}"), (10, "{}"), (12, '{"log_hist')):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(text)
    (tmp_path / "checkpoint-14").mkdir()
    assert list(whole_checkpoints(tmp_path)) == [2, 10]
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert last_checkpoint(tmp_path / "none") is None


def test_kept_recipe_holds_no_token(tmp_path):
    keep_recipe({"hub_token": "hf_secret", "seed": 1}, tmp_path)
    assert (tmp_path / "recipe.yaml").read_text() == "seed: 1\n"


RUN = "import sys, torch; torch.set_num_threads(1); torch.use_deterministic_algorithms(True); from karla_hf.phases import run; run(sys.argv[1])"


def kill_when(path, command, environment):
    """Run a process until a path is there, and kill it at once."""
    process = subprocess.Popen(command, env=environment)
    try:
        deadline = time.monotonic() + 400
        while not path.exists():
            assert time.monotonic() < deadline, path
            assert process.poll() is None, path
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_job_goes_on_to_the_same_bits(tmp_path):
    changes = {"save_packed": False, "warm-up.max_steps": 12, "fine-tune.max_steps": 12}
    whole = write_schedule(tmp_path, "whole", **changes)
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])  # for the reward
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": paths}
    subprocess.run([sys.executable, "-c", RUN, str(whole)], env=environment, check=True, timeout=600)
    path = write_schedule(tmp_path, "killed", **changes)
    out = tmp_path / "killed"
    seen = {}
    for file in ("warm-up/checkpoint-4", "pope/checkpoint-1", "fine-tune/checkpoint-4", "fine-tune/model.safetensors"):
        kill_when(out / file, [sys.executable, "-c", RUN, str(path)], environment)
        for name, stamp in seen.items():  # a finished phase was left alone
            assert (out / name / "model.safetensors").stat().st_mtime_ns == stamp
        seen = {
            name: (out / name / "model.safetensors").stat().st_mtime_ns for name in NAMES if read_summary(out / name)
        }
    assert set(seen) == {"warm-up", "pope"}
    finished = subprocess.run([sys.executable, "-c", RUN, str(path)], env=environment, check=True, timeout=600,
                              capture_output=True, text=True)  # fmt: skip
    assert finished.stdout.count("finished before") == 2
    assert "goes on from checkpoint-" in finished.stdout
    for name in NAMES:
        files = [tmp_path / run / name / "model.safetensors" for run in ("whole", "killed")]
        assert files[0].read_bytes() == files[1].read_bytes(), name
    results = [read_summary(tmp_path / run)["phases"] for run in ("whole", "killed")]
    drop = ("folder",)
    assert [{k: v for k, v in found.items() if k not in drop} for found in results[0].values()] == [
        {k: v for k, v in found.items() if k not in drop} for found in results[1].values()
    ]
