import json
import re
from pathlib import Path

import pytest
import torch

from karla_hf import CtmModel
from karla_hf.parity import ParitySequences, examine, measure, split_sequences, train


RECIPES = Path(__file__).parents[1] / "recipes" / "parity"
SMALL = [
    "--num_neurons",
    "16",
    "--hidden_size",
    "8",
    "--feature_size",
    "8",
    "--num_ticks",
    "3",
    "--num_attention_heads",
    "2",
]


def test_labels_count_zeros_as_a_loop_does():
    data = ParitySequences(torch.randint(2**11, (50,)), 11)
    for row in data:
        odd, expected = False, []
        for bit in row["input_ids"].tolist():
            odd ^= bit == 0
            expected.append(int(odd))
        assert row["labels"].tolist() == expected


@pytest.mark.parametrize("length", [3, 8, 30])
def test_held_out_sequences_are_distinct_and_never_trained_on(length):
    training, held_out = split_sequences(length, held_out=4, count=999, seed=1)
    assert (len(training), len(held_out)) == (999, 4)
    kept = {tuple(row) for row in held_out.input_ids.tolist()}
    assert len(kept) == 4
    assert not kept & {tuple(row) for row in training.input_ids.tolist()}
    assert torch.equal(split_sequences(length, 4, 999, seed=1)[0].input_ids, training.input_ids)


@pytest.mark.parametrize(("length", "held_out"), [(1, 1), (31, 4), (4, 9), (8, 0)])
def test_impossible_tasks_are_named(length, held_out):
    message = rf"`length` is {length} and `held_out` {held_out}; give a length from 2 to 30, and hold out at most half"
    with pytest.raises(ValueError, match=message):
        split_sequences(length, held_out, 10, seed=0)


def test_the_most_certain_tick_answers():
    labels = torch.tensor([[0, 1]])
    right, wrong = torch.tensor([5.0, 0.0, 0.0, 5.0]), torch.tensor([0.0, 5.0, 0.0, 5.0])
    predictions = torch.stack([wrong, right, wrong], dim=1)[None]
    certainties = torch.tensor([[[0.9, 0.1, 0.8], [0.1, 0.9, 0.2]]])
    found = measure(predictions, certainties, labels)
    assert found == {"bits": 1.0, "sequences": 1.0, "tick": 2.0, "last_tick": 0.5}


def test_a_few_steps_write_model_curve_and_figure(tmp_path):
    recipe = RECIPES / "length8.yaml"
    overrides = ["--output_dir", str(tmp_path), "--max_steps", "6", "--eval_steps", "2", *SMALL]
    result = train(recipe, overrides)
    assert [point["step"] for point in result["curve"]] == [2, 4, 6]
    assert json.loads((tmp_path / "summary.json").read_text()) == result
    assert (tmp_path / "parity.png").read_bytes().startswith(b"\x89PNG")
    model = CtmModel.from_pretrained(tmp_path)
    assert torch.equal(model.sync.pairs, CtmModel(model.config).sync.pairs)
    held_out = split_sequences(8, result["held_out"], 1, seed=42)[1]
    assert examine(model, held_out)["ticks"] == result["ticks"]
    assert len(result["attention"]) == 3
    assert all(sum(looks) == pytest.approx(1.0) for looks in result["attention"])


def test_unknown_key_is_named(tmp_path):
    with pytest.raises(ValueError, match="num_tick"):
        train(RECIPES / "length8.yaml", ["--num_tick", "3"])


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.name)
def test_recipe_says_how_to_run_it(path):
    command = f"python -m karla_hf.parity {path.relative_to(RECIPES.parents[1])}"
    assert command in re.match(r"(#.*\n)+", path.read_text())[0]


@pytest.mark.slow
def test_length_eight_is_solved_and_carries_over_to_unseen_sequences(tmp_path):
    result = train(RECIPES / "length8.yaml", ["--output_dir", str(tmp_path)])
    assert result["bits_trained_on"] >= 0.99
    assert result["bits"] >= 0.99
