import re
from pathlib import Path

import pytest
import yaml

from karla_hf import KarlaConfig
from karla_hf.arguments import MODEL_OPTIONS, parse_recipe
from karla_hf.documents import read_text
from karla_hf.errors import as_sentence
from karla_hf.fine_tuning import FineTuneArguments
from karla_hf.pope_arguments import parse_pope_recipe


RECIPES = Path(__file__).parents[1] / "recipes"
OWN_COMMAND = {"parity", "pope-demo"}
FILES = sorted(path for path in RECIPES.rglob("*.yaml") if path.parent.name not in OWN_COMMAND)
ELSEWHERE = (
    "all",
    "modular-addition",
    "pretrain",
    "python-docs",
)  # parsed in test_phases, test_modular and test_hope_training
TRAINED = [path for path in FILES if path.stem not in ELSEWHERE]


@pytest.fixture
def recipe(tmp_path):
    def write(text="", **values):
        values = {"model_name_or_path": "me/model", "dataset_name": "python-reference", "bf16": False, **values}
        (tmp_path / "recipe.yaml").write_text(text or yaml.safe_dump(values))
        return tmp_path / "recipe.yaml"

    return write


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(RECIPES)))
def test_recipe_says_how_to_run_it(path):
    command = f"karla train {path.relative_to(RECIPES.parent)}"
    assert command in re.match(r"(#.*\n)+", read_text(path))[0]
    assert yaml.safe_load(path.read_text())["output_dir"].startswith("outputs/")


@pytest.mark.parametrize("path", TRAINED, ids=lambda path: str(path.relative_to(RECIPES)))
def test_recipe_parses(path):
    kinds = (FineTuneArguments,) if path.stem == "finetune" else ()
    parse = parse_pope_recipe if path.stem == "pope" else parse_recipe
    parsed = parse(path, ["--bf16", "false"], *kinds)  # bf16 is refused where the hardware has none
    assert parsed.arguments.model_name_or_path
    KarlaConfig(**parsed.model_options)


def test_every_recipe_stands_in_the_table():
    table = read_text(RECIPES / "README.md")
    assert FILES
    for path in FILES:
        assert f"]({path.relative_to(RECIPES)})" in table


def test_full_size_recipe_of_phase_2_says_where_each_value_comes_from():
    (path,) = RECIPES.glob("qwen2.5-1.5b/pope.yaml")
    parsed = parse_pope_recipe(path, ["--bf16", "false"])
    arguments = parsed.arguments
    assert (arguments.num_samples, arguments.max_correct, arguments.min_success) == (128, 0, 1)
    assert (arguments.max_fraction, arguments.curriculum, arguments.reward) == (0.25, "none", "math")
    assert (parsed.training.beta, parsed.training.loss_type) == (0.0, "dapo")
    lines = read_text(path).split("phase: pope\n")[1].split("bf16:")[0].splitlines()
    values = [line for line in lines if line]
    assert len(values) > 20
    assert [line for line in values if not re.search(r" # \[(paper|secondary|ours)\]", line)] == []


def test_small_recipe_runs_on_the_cpu():
    parsed = parse_recipe(RECIPES / "smollm2-135m" / "warmup.yaml")
    assert (parsed.training.bf16, parsed.training.use_cpu) == (False, True)


def test_large_recipe_quantises_its_backbone():
    parsed = parse_recipe(RECIPES / "qwen2.5-1.5b" / "warmup.yaml", ["--bf16", "false"])
    assert parsed.arguments.model_name_or_path == "Qwen/Qwen2.5-1.5B"
    assert parsed.arguments.backbone_quantization == "nf4"


def test_values_are_typed_and_overrides_go_first(recipe):
    path = recipe(learning_rate="5e-4", max_steps=7, run_name=123, ctm_num_ticks=4, ctm_source_layers=[0, 2])
    parsed = parse_recipe(path, ["--max-steps=9", "--ctm_num_ticks", "6", "--dataset_files", "null", "--seed", "3"])
    training = parsed.training
    assert (training.learning_rate, training.max_steps, training.run_name, training.seed) == (5e-4, 9, "123", 3)
    assert parsed.model_options == {"ctm_num_ticks": 6, "ctm_source_layers": [0, 2]}
    files = parse_recipe(path, ["--dataset_name", "null", "--dataset_files", "[a.txt, b.txt]"]).arguments.dataset_files
    assert files == ["a.txt", "b.txt"]


def test_dictionaries_stay_dictionaries(recipe):
    quantization = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    parsed = parse_recipe(recipe(backbone_quantization=quantization, lr_scheduler_kwargs={"num_cycles": 2}))
    assert parsed.arguments.backbone_quantization == quantization
    assert parsed.training.lr_scheduler_kwargs == {"num_cycles": 2}
    assert parse_recipe(recipe(backbone_quantization="int8")).arguments.backbone_quantization == "int8"


def test_model_options_are_the_fields_of_the_configuration():
    assert {"ctm_num_ticks", "engram_families", "certainty_threshold", "tick_loss"} <= set(MODEL_OPTIONS)
    assert not {"text_config", "backbone_included", "model_type"} & set(MODEL_OPTIONS)


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("lerning_rate", "did you mean `learning_rate`?"),
        ("ctm_num_tick", "did you mean `ctm_num_ticks`?"),
        ("datasetname", "did you mean `dataset_name`?"),
        ("text_config", "?"),
        ("config", "?"),
        ("env", "remove it."),
    ],
)
def test_unknown_key_is_named_in_one_sentence(recipe, key, hint):
    for values, overrides in (({key: 1}, []), ({}, [f"--{key}", "1"])):
        with pytest.raises(ValueError, match=rf"recipe\.yaml: `{key}` is no key of a recipe") as error:
            parse_recipe(recipe(**values), overrides)
        message = str(error.value)
        assert message.endswith(hint)
        assert as_sentence(error.value) == message


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_steps": "many"}, r"--max_steps/--max-steps: invalid int value: 'many'; correct the value\.$"),
        ({"max_steps": 2.5}, r"invalid int value: '2\.5'; correct the value\.$"),
        ({"learning_rate": "fast"}, r"--learning_rate/--learning-rate: invalid float value: 'fast'; correct"),
        ({"bf16": "perhaps"}, r"--bf16.*perhaps"),
        ({"save_strategy": "never"}, r"never is not a valid SaveStrategy"),
        ({"held_out_share": 1}, r"`held_out_share` is 1\.0; give a share above 0 and below 1, such as 0\.1\.$"),
        ({"model_name_or_path": None}, r"`model_name_or_path` is missing; give a backbone's name or"),
        ({"dataset_name": None}, r"`dataset_name` and `dataset_files` exactly one must be given; set one of them\.$"),
        ({"dataset_files": ["a.txt"]}, r"`dataset_name` and `dataset_files` exactly one must be given"),
    ],
)
def test_wrong_values_are_named(recipe, values, message):
    with pytest.raises(ValueError, match=message) as error:
        parse_recipe(recipe(**values))
    assert str(error.value).startswith(str(recipe()))
    assert as_sentence(error.value) == str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", r"recipe\.yaml is not YAML \(.*line 1.*\); correct it there\.$"),
        ("just words", r"recipe\.yaml holds a str, but a recipe is a mapping; write `key: value` lines\.$"),
        ("- a\n- b", r"recipe\.yaml holds a list, but"),
    ],
)
def test_file_that_is_no_recipe(recipe, text, message):
    with pytest.raises(ValueError, match=message) as error:
        parse_recipe(recipe(text))
    assert as_sentence(error.value) == str(error.value)


def test_missing_recipe(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no file .*none\.yaml"):
        parse_recipe(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["max_steps", "3"], r"'max_steps' stands where a key should; write overrides as `--key value`\.$"),
        (["--max_steps"], r"--max_steps has no value; write overrides as `--key value`\.$"),
        (["--max_steps", "{"], r"--max_steps is not YAML"),
    ],
)
def test_damaged_overrides(recipe, overrides, message):
    with pytest.raises(ValueError, match=message):
        parse_recipe(recipe(), overrides)


def test_epochs_and_batch_size_are_aliases(recipe):
    training = parse_recipe(recipe(max_steps=7), ["--epochs", "2", "--batch-size=3"]).training
    assert (training.num_train_epochs, training.max_steps, training.per_device_train_batch_size) == (2, -1, 3)
    assert parse_recipe(recipe(), ["--epochs", "2", "--max_steps", "5"]).training.max_steps == 5
    training = parse_recipe(recipe(activation_checkpointing=False), ["--gradient_checkpointing", "true"]).training
    assert (training.activation_checkpointing, training.gradient_checkpointing) == (True, True)
