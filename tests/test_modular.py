import json
import re
from pathlib import Path

import pytest
import torch
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments
from typer.testing import CliRunner

from karla_hf.cli import app
from karla_hf.grokking import Probe, State
from karla_hf.grokking_callback import SLOW_FILE, SUSPENDED, GrokkingCallback, GrokkingOptions, watch_grokking
from karla_hf.modular import ModularMlp, keep_batch, run_modular, split_pairs


RECIPE = Path(__file__).parents[1] / "recipes" / "grokking" / "modular-addition.yaml"
SMALL = ["--modulus", "7", "--eval_steps", "5", "--logging_steps", "5"]


@pytest.mark.parametrize(("modulus", "share"), [(2, 0.5), (7, 0.01), (31, 0.6), (5, 0.999)])
def test_every_pair_is_in_one_part_with_its_sum(modulus, share):
    training, validation = split_pairs(modulus, share, seed=3)
    assert len(training) > 0
    assert len(validation) > 0
    pairs = torch.cat([training.input_ids, validation.input_ids])
    assert len({tuple(pair) for pair in pairs.tolist()}) == len(pairs) == modulus**2
    for part in (training, validation):
        assert torch.equal((part.input_ids[:, 0] + part.input_ids[:, 1]) % modulus, part.labels)
        assert torch.equal(part.__getitems__([0])["labels"][0], part[0]["labels"])


@pytest.mark.parametrize("learner", ["mlp", "ctm"])
def test_command_writes_summary_and_figure(tmp_path, learner):
    options = ["--max_steps", "20", "--learner", learner, "--output_dir", str(tmp_path / "out")]
    result = CliRunner().invoke(app, ["train", str(RECIPE), *SMALL, *options], catch_exceptions=False)
    assert result.exit_code == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert {"state", "mem_step", "t50", "t95", "t99", "detected_step", "delay_ratio"} <= set(summary)
    assert [probe["step"] for probe in summary["probes"]] == [5, 10, 15, 20]
    assert (tmp_path / "out" / "grokking.png").read_bytes().startswith(b"\x89PNG")


def test_a_resumed_run_is_the_whole_run(tmp_path):
    options = [*SMALL, "--save_strategy", "steps", "--save_steps", "15", "--grokking_raise_decay", "true",
               "--grokking_slow_gradients", "true", "--grokking_stall_ratio", "1.5", "--weight_decay", "0.01"]  # fmt: skip
    whole = run_modular(RECIPE, [*options, "--max_steps", "60", "--output_dir", str(tmp_path / "whole")])
    split = ["--output_dir", str(tmp_path / "split")]
    run_modular(RECIPE, [*options, *split, "--max_steps", "45"])
    again = run_modular(RECIPE, [*options, *split, "--max_steps", "60", "--resume_from_checkpoint", "true"])
    assert State.STALLED.value in {probe["state"] for probe in whole["probes"]}
    assert (tmp_path / "split" / "checkpoint-45" / SLOW_FILE).is_file()
    again["seconds"] = whole["seconds"]
    assert again == whole


def test_bad_values_are_named(tmp_path):
    for options, message in (
        (["--modulus", "1"], "`modulus` is 1; give a number from 2"),
        (["--train_share", "1.0"], "`train_share` is 1.0; give a share above 0 and below 1"),
        (["--learner", "lstm"], "`learner` is 'lstm'; give one of mlp, ctm"),
        (["--modulu", "7"], "`modulu` is no key of a recipe.*did you mean `modulus`"),
        (["--phase", "sorting"], "`phase` is 'sorting'; give warm-up, pope, fine-tune"),
    ):
        result = CliRunner().invoke(app, ["train", str(RECIPE), *options, "--output_dir", str(tmp_path)])
        assert result.exit_code == 1
        assert re.search(message, " ".join(result.output.split()))


def tiny_trainer(tmp_path, **arguments):
    training, validation = split_pairs(5, 0.6, seed=0)
    return Trainer(
        model=ModularMlp(5),
        args=TrainingArguments(
            str(tmp_path), report_to="none", use_cpu=True, remove_unused_columns=False, **arguments
        ),
        data_collator=keep_batch,
        train_dataset=training,
        eval_dataset={"train": training, "val": validation},
    )


def test_what_watching_needs_is_said(tmp_path):
    trainer = tiny_trainer(tmp_path)
    with pytest.raises(
        ValueError, match="Grokking is seen by evaluating train and val, but the trainer evaluates train, val"
    ):
        watch_grokking(trainer)
    trainer.args.eval_strategy = "steps"
    callback = watch_grokking(trainer)
    metrics = {"eval_train_loss": 1.0, "eval_val_loss": 1.0}
    with pytest.raises(ValueError, match="The evaluation of 'train' has no 'accuracy'; let `compute_metrics` give it"):
        callback.on_evaluate(trainer.args, trainer.state, trainer.control, metrics, trainer.model)


def test_losses_serve_where_there_is_no_accuracy(tmp_path):
    trainer = tiny_trainer(tmp_path, eval_strategy="steps", eval_steps=1, max_steps=2)
    callback = watch_grokking(trainer, GrokkingOptions(grokking_classes=5))
    trainer.train()
    assert len(callback.detector.probes) == 2
    assert callback.detector.probes[0].val_score == pytest.approx(0.0, abs=0.5)
    states = [entry for entry in trainer.state.log_history if "grokking/state" in entry]
    assert [entry["step"] for entry in states] == [1, 2]


def acting(state, options, groups=(0.01, 0.0)):
    """A callback whose detector is about to stay in `state`, an optimiser and a schedule."""
    callback = GrokkingCallback(options)
    weights = [torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2))]
    optimizer = torch.optim.AdamW(
        [{"params": [w], "weight_decay": decay} for w, decay in zip(weights, groups, strict=True)], lr=0.1
    )
    return callback, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)


@pytest.mark.parametrize(
    ("groups", "raised"), [((0.01, 0.0), (0.03, 0.0)), ((0.0, 0.0), (0.01, 0.0)), ((0.5, 0.5), (1.0, 1.0))]
)
def test_decay_is_raised_on_the_groups_that_decay_and_restored(tmp_path, groups, raised):
    callback, optimizer, schedule = acting(State.MEMORISED, GrokkingOptions(grokking_raise_decay=True), groups)
    trainer = tiny_trainer(tmp_path)
    act = lambda before, now: callback._act(before, now, trainer.state, trainer.control, optimizer, schedule)  # noqa: E731
    act(State.FIT, State.MEMORISED)
    assert tuple(group["weight_decay"] for group in optimizer.param_groups) == raised
    for _ in range(9):
        act(State.MEMORISED, State.PRE_GROK)
    assert max(group["weight_decay"] for group in optimizer.param_groups) == 1.0
    callback.detector.t99 = 500
    assert act(State.PRE_GROK, State.GROKKED)["grokking/weight_decay"] == max(groups)
    assert tuple(group["weight_decay"] for group in optimizer.param_groups) == groups


def test_a_run_that_grokked_slows_down_and_is_kept(tmp_path):
    callback, optimizer, schedule = acting(State.GROKKED, GrokkingOptions(grokking_finish=True))
    trainer = tiny_trainer(tmp_path)
    trainer.state.global_step = 7
    callback._act(State.PRE_GROK, State.GROKKED, trainer.state, trainer.control, optimizer, schedule)
    assert trainer.control.should_save
    optimizer.step()
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.095, 0.095])
    folder = tmp_path / "checkpoint-7"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    callback.on_save(trainer.args, trainer.state, trainer.control)
    assert (tmp_path / "grokked-7" / "model.safetensors").read_bytes() == b"weights"
    for _ in range(60):
        callback._act(State.GROKKED, State.GROKKED, trainer.state, trainer.control, optimizer, schedule)
    assert schedule.base_lrs == pytest.approx([0.01, 0.01])


def test_actions_are_taken_back_when_a_run_goes_on_without_them(tmp_path):
    options = GrokkingOptions(grokking_raise_decay=True, grokking_finish=True, grokking_slow_gradients=True)
    callback, optimizer, schedule = acting(State.GROKKED, options)
    trainer = tiny_trainer(tmp_path)
    act = lambda before, now: callback._act(before, now, trainer.state, trainer.control, optimizer, schedule)  # noqa: E731
    act(State.MEMORISED, State.STALLED)
    callback.options = GrokkingOptions()
    assert act(State.STALLED, State.STALLED) == {"grokking/weight_decay": 0.01, "grokking/slow_gradients": 0}
    callback.options = options
    assert act(State.PRE_GROK, State.GROKKED)["grokking/learning_rate_factor"] == pytest.approx(0.95)
    callback.options = GrokkingOptions()
    assert act(State.GROKKED, State.GROKKED) == {"grokking/weight_decay": 0.01, "grokking/learning_rate_factor": 1.0}
    assert schedule.base_lrs == pytest.approx([0.1, 0.1])
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [
        (pytest.approx(0.1), 0.01),
        (pytest.approx(0.1), 0.0),
    ]


def test_times_and_early_stopping_are_logged_when_they_change(tmp_path):
    trainer = tiny_trainer(tmp_path, eval_strategy="steps")
    stopping = EarlyStoppingCallback(early_stopping_patience=2)
    callback = watch_grokking(trainer, early_stopping=stopping)
    for step, score in ((1, 0.0), (2, 0.0), (10, 0.6), (11, 0.96), (12, 0.97), (13, 1.0)):
        trainer.state.global_step = step
        for part, accuracy in (("train", 1.0), ("val", score)):
            metrics = {f"eval_{part}_loss": 1.0, f"eval_{part}_accuracy": accuracy}
            callback.on_evaluate(trainer.args, trainer.state, trainer.control, metrics, trainer.model)
    history = {entry["step"]: entry for entry in trainer.state.log_history}
    dropped = ("step", "epoch", "grokking/weight_norm", "grokking/state")
    assert {step: {k: v for k, v in entry.items() if k not in dropped} for step, entry in history.items()} == {
        1: {},
        2: {"grokking/mem_step": 2, "grokking/early_stopping": 0},
        10: {"grokking/t50": 10},
        11: {"grokking/t95": 11, "grokking/delay_ratio": 5.5},
        12: {"grokking/detected_step": 12, "grokking/early_stopping": 1},
        13: {"grokking/t99": 13},
    }


def test_early_stopping_waits_from_memorising_until_it_grokked(tmp_path):
    trainer = tiny_trainer(tmp_path)
    stopping = EarlyStoppingCallback(early_stopping_patience=2)
    callback = GrokkingCallback(early_stopping=stopping)
    trainer.state.max_steps, trainer.state.global_step = 100, 10
    stopping.early_stopping_patience_counter, trainer.control.should_training_stop = 2, True
    callback.detector.state = State.MEMORISED
    callback._suspend_early_stopping(trainer.control, trainer.state)
    assert not trainer.control.should_training_stop
    assert stopping.early_stopping_patience_counter == SUSPENDED
    callback.detector.state = State.GROKKED
    callback._suspend_early_stopping(trainer.control, trainer.state)
    assert stopping.early_stopping_patience_counter == 0


def test_the_callback_is_saved_and_restored(tmp_path):
    callback = GrokkingCallback(GrokkingOptions(grokking_raise_decay=True))
    for step in (1, 2, 3):
        callback.detector.update(Probe(step, 0.0, 5.0, 1.0, 1.0, 0.0))
    saved = json.loads(json.dumps(callback.state()))
    other = GrokkingCallback(**saved["args"])
    assert other.options == callback.options
    trainer = tiny_trainer(tmp_path)
    trainer.state.global_step, trainer.state.stateful_callbacks = 3, {"GrokkingCallback": saved}
    other.on_train_begin(trainer.args, trainer.state, trainer.control)
    assert other.detector.to_dict() == callback.detector.to_dict()


@pytest.mark.slow
@pytest.mark.parametrize(("decay", "actions", "groks"), [(1.0, False, True), (0.01, False, False), (0.01, True, True)])
def test_it_groks_if_weights_decay_or_the_callback_makes_them(tmp_path, decay, actions, groks):
    options = ["--weight_decay", str(decay), "--max_steps", "1700", "--output_dir", str(tmp_path)]
    found = run_modular(RECIPE, [*options, "--grokking_raise_decay", str(actions).lower()])
    assert (found["state"] == "GROKKED") == groks
    assert found["mem_step"] <= 100
    if groks:
        assert found["t95"] >= 3 * found["mem_step"]
        assert found["detected_step"] - found["t95"] <= 2 * 25
