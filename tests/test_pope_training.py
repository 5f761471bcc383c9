"""Recipes of Phase 2, whole runs on a tiny model."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny import CHAT_TEMPLATE, OPTIONS, files_in, save_backbone

from karla_hf import KarlaForCausalLM
from karla_hf.errors import as_sentence
from karla_hf.phases import run as run_recipe
from karla_hf.pope import reward_function


RECIPES = Path(__file__).parents[1] / "recipes"
TINY = {
    **OPTIONS,
    "num_samples": 2,
    "num_generations": 2,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "max_completion_length": 4,
    "max_steps": 1,
    "temperature": 1.0,
    "bf16": False,
    "use_cpu": True,
    "gradient_checkpointing": False,
    "dataloader_pin_memory": False,
    "disable_tqdm": True,
    "report_to": "none",
}


@reward_function
def always(completion, answer, **row):
    return 1.0


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return save_backbone(tmp_path_factory.mktemp("models") / "backbone", chat_template=CHAT_TEMPLATE)


@pytest.fixture
def problems(tmp_path):
    words = ["The access code", "Where is", "The vault", "number 7", "Orlin", "a key"]
    steps = ["a first step\n", "a second one\n", "a third one\n", "the end\n", "and more\n"]
    rows = [{"problem": word, "solution": "".join(steps), "answer": "no such text"} for word in words]
    (tmp_path / "problems.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "problems.jsonl"


@pytest.fixture
def recipe(backbone, problems, tmp_path):
    def write(**changes):
        values = {
            **TINY,
            "phase": "pope",
            "model_name_or_path": str(backbone),
            "problems": str(problems),
            "problems_columns": {"prompt": "problem"},
            "reward": "exact",
            "output_dir": str(tmp_path / "out"),
            "save_strategy": "no",
            "logging_steps": 1,
            **changes,
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    return write


def as_overrides(values):
    return [part for key, value in values.items() for part in (f"--{key}", json.dumps(value))]


@pytest.mark.parametrize("name", ["smollm2-135m", "qwen2.5-1.5b"])
def test_shipped_recipe_runs_for_a_step_on_a_tiny_model(name, backbone, problems, tmp_path):
    changes = {"model_name_or_path": str(backbone), "output_dir": str(tmp_path / "out"), **TINY}
    if name == "smollm2-135m":
        changes |= {"problems_limit": 4}
    else:
        changes |= {"problems": str(problems)}
    summary = run_recipe(RECIPES / name / "pope.yaml", as_overrides(changes))
    assert summary["steps"] == 1
    assert summary["hard"] == summary["problems"] == (4 if name == "smollm2-135m" else 6)
    assert summary["before"]["pass@16"] == summary["base_pass@1"] == 0.0
    assert set(summary["after"]) == {"pass@1", "pass@16", "problems", "num_samples"}
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == summary
    model = KarlaForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.ctm_packed
    assert {"difficulty.jsonl", "prefix.jsonl", "eval.jsonl", "summary.json"} <= set(files_in(tmp_path / "out"))


@pytest.mark.slow
def test_passes_are_not_run_twice_and_training_is_resumed(recipe, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2, "learning_rate": 1e-2}
    first = run_recipe(recipe(**options))
    out = tmp_path / "out"
    passes = {name: (out / name).read_bytes() for name in ("difficulty.jsonl", "prefix.jsonl", "eval.jsonl")}
    second = run_recipe(recipe(**options), ["--resume_from_checkpoint", str(out / "checkpoint-1")])
    assert {name: (out / name).read_bytes() for name in passes} == passes
    assert (first["steps"], second["steps"]) == (2, 2)
    assert first["before"] == second["before"]
    (out / "difficulty.jsonl").write_text((out / "difficulty.jsonl").read_text().replace('"seed": 42', '"seed": 1'))
    with pytest.raises(ValueError, match=r"difficulty\.jsonl was made with seed 1, but now it is 42; give the same"):
        run_recipe(recipe(**options))


@pytest.mark.slow
@pytest.mark.parametrize("curriculum", ["adaptive", "staged"])
def test_curricula_are_options_of_a_recipe(recipe, curriculum, tmp_path):
    path = recipe(curriculum=curriculum, search_steps=1, held_out_share=0, save_strategy="steps", save_steps=1)
    summary = run_recipe(path)
    assert summary["measured"] == "the hard problems of the training"
    state = json.loads((tmp_path / "out" / "checkpoint-1" / "trainer_state.json").read_text())
    assert set(state["stateful_callbacks"]["pope_prefixes"]["num_steps"].values()) <= {0, 1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"phase": "popes"}, r"recipe\.yaml: `phase` is 'popes'; give warm-up, pope, fine-tune"),
        ({"problems": None}, r"`problems` is missing; give champ, chain-sum, a file, or a data set on the Hub\.$"),
        ({"model_name_or_path": None}, r"`model_name_or_path` is missing"),
        ({"curriculum": "steep"}, r"`curriculum` is 'steep'; give one of none, adaptive, staged\.$"),
        ({"held_out_share": 1.0}, r"`held_out_share` is 1\.0; give a share from 0 to below 1, such as 0\.2\.$"),
        ({"eval_samples": 8}, r"`eval_samples` is 8; give 16 or more, for pass@16\.$"),
        ({"min_sucess": 1}, r"`min_sucess` is no key of a recipe, which are those of PopeArguments, GRPOConfig and .*"
                            r"did you mean `min_success`\?$"),
        ({"reward": "nothing"}, r"^'nothing' is no reward function; give one of exact, math, reasoning-gym"),
    ],
)  # fmt: skip
def test_recipe_that_cannot_be_used(recipe, changes, message):
    with pytest.raises(ValueError, match=message) as error:
        run_recipe(recipe(**changes))
    assert as_sentence(error.value) == str(error.value)


def test_batch_that_the_rows_cannot_fill_is_refused_and_the_passes_are_kept(recipe, tmp_path):
    with pytest.raises(
        ValueError, match=r"^A generation takes 50 rows \(100 completions, 2 of each\), but there are 8; give"
    ):
        run_recipe(recipe(per_device_train_batch_size=100))
    assert (tmp_path / "out" / "prefix.jsonl").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"reward": "test_pope_training.always"},
            r"^No problem is hard: of each of the 6, more than 0 samples were correct",
        ),
        (
            {"problems_limit": 1},
            r"^Only one problem is hard, too few to hold one out; give more problems, or set `held_",
        ),
        (
            {"max_fraction": 0.01},
            r"^No solution has a step that ends within 0\.01 of it; give a larger `max_fraction`",
        ),
        (
            {"max_completion_length": 2040},
            r"^The prompt of problem '0' has \d+ tokens, which with 2,040 new ones is more",
        ),
    ],
)
def test_problems_that_cannot_be_used(recipe, changes, message):
    with pytest.raises(ValueError, match=message) as error:
        run_recipe(recipe(**changes))
    assert as_sentence(error.value) == str(error.value)


def run_process(*command, cwd=None):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    finished = subprocess.run(
        command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=500, check=False
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished


@pytest.mark.slow
def test_two_processes_run_the_passes_once_and_log_once(recipe, tmp_path):
    path = recipe(
        curriculum="adaptive", ddp_backend="gloo", ddp_find_unused_parameters=False, per_device_train_batch_size=2
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = "import sys, torch; torch.set_num_threads(1); from karla_hf.phases import run; run(sys.argv[1])"
    script = tmp_path / "run.py"
    script.write_text(code)
    run_process(
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        str(port),
        str(script),
        str(path),
    )
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["steps"] == 1
    lines = (tmp_path / "out" / "difficulty.jsonl").read_text().splitlines()
    assert len(lines) == 1 + 6
