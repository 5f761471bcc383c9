"""Levels by the clock, and M3, in a recipe."""

import json

import pytest
import torch
from safetensors.torch import load_file
from schedules import write_schedule

from karla_hf.errors import as_sentence
from karla_hf.training import run_recipe


def as_overrides(**values):
    return [part for key, value in values.items() for part in (f"--{key}", json.dumps(value))]


def train(folder, name, *extra, **values):
    """Train the tiny warm-up; returns the floats of its checkpoints by step."""
    write_schedule(folder)
    values = {"output_dir": str(folder / name), "held_out_limit": 1, "save_steps": 1, "weight_decay": 0.1, **values}
    run_recipe(folder / "warmup.yaml", [*as_overrides(**values), *extra])
    return {
        int(path.name.split("-")[1]): load_file(path / "model.safetensors")
        for path in (folder / name).glob("checkpoint-*")
    }


def changed(states, step):
    """Names whose bytes changed in a step."""
    return {name for name in states[step] if not torch.equal(states[step][name], states[step - 1][name])}


def test_levels_change_by_the_clock(tmp_path):
    states = train(tmp_path, "out", max_steps=4, update_periods={"ctm.*neurons|ctm.*nlm": 2, "synapse": 3})
    names = set(states[1])
    slow = {name for name in names if "synapse" in name}
    assert slow
    assert slow.isdisjoint(changed(states, 2))
    assert slow <= changed(states, 3)
    assert slow.isdisjoint(changed(states, 4))
    every = {name for name in names if changed(states, 2) >= {name}}
    assert "model.ctm.up.weight" in every


@pytest.mark.parametrize("options", [{"update_periods": {"synapse": 3}}, {"m3": {"learning_rate": 0.01, "period": 2}},
                                     {"m3": {"learning_rate": 0.01}, "update_periods": {"synapse": 3}}])  # fmt: skip
def test_resumed_run_is_bitwise_the_whole_run(tmp_path, options):
    whole = train(tmp_path, "whole", max_steps=4, **options)
    again = train(tmp_path, "whole", "--resume_from_checkpoint", str(tmp_path / "whole" / "checkpoint-2"), max_steps=4,
                  **options)  # fmt: skip
    assert whole[4].keys() == again[4].keys()
    assert all(torch.equal(whole[4][name], again[4][name]) for name in whole[4])


def test_m3_steps_the_ternary_weights_alone(tmp_path):
    still = train(tmp_path, "still", max_steps=2, learning_rate=0.0, weight_decay=0.0, m3={"learning_rate": 0.01})
    moved = changed(still, 2)
    assert moved
    assert all(still[2][name].dim() == 2 for name in moved)
    steps = [(still[2][name] - still[1][name]).square().mean().sqrt().item() for name in moved]
    assert max(steps) < 0.21 * 0.01


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"m3": {"rate": 1}},
            r"`m3` has the keys \['rate'\]; give `learning_rate`, and of betas, alpha, period, eps what",
        ),
        (
            {"m3": {"learning_rate": 1}, "muon_learning_rate": 1},
            r"Both `m3` and `muon_learning_rate` are given; remove one",
        ),
        ({"m3": {"learning_rate": 1}, "optim": "sgd"}, r"`optim` is 'sgd', but beside M3 only 'adamw_torch'"),
        (
            {"update_periods": {"nothing": 2}},
            r"`update_periods` has 'nothing', which no trained parameter's name matches",
        ),
        ({"update_periods": {"synapse": 0}}, r"`update_period` is 0; give a whole number of steps of at least 1\.$"),
    ],
)
def test_what_cannot_be_used_is_said(tmp_path, values, message):
    with pytest.raises(ValueError, match=message) as error:
        train(tmp_path, "out", **values)
    assert as_sentence(error.value) == str(error.value)
