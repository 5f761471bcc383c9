"""The arms of POPE's demonstration: one base, one budget of rollouts, different data for the stock `trl.GRPOTrainer`."""

from __future__ import annotations

import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset, concatenate_datasets
from transformers import (
    LlamaForCausalLM,
    PreTrainedModel,
    PrinterCallback,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from karla_hf.pope import build_rows, evaluate, unguided_rows
from karla_hf.pope_demo_problems import (
    EVALUATION_SEED,
    DemoArguments,
    easy_problems,
    measure_model,
    new_measure,
    whole_trace,
)
from karla_hf.programs import new_tokenizer, render


GRPO, POPE, MIX, SFT = "GRPO", "POPE", "GRPO, easy and hard", "SFT, then GRPO"
LOGGED = ("frac_reward_zero_std", "guided/accuracy", "unguided/accuracy")
ARMS = (GRPO, POPE, MIX, SFT)


def run_arm(arm: str, options: DemoArguments, settings: dict[str, Any], seed: int, folder: Path) -> dict[str, Any]:
    """Train one arm and measure it on the held-out problems; every process of a group calls it.

    Args:
        arm: one of `ARMS`.
        options: the demonstration.
        settings: of `GRPOConfig`; `per_device_train_batch_size` is that of all processes together.
        seed: of the run.
        folder: of `prepare`.

    Returns:
        `pass@1`, `pass@16` and `easy` (process 0 only), `zero_gradient`: share of steps in which no group had both right
        and wrong answers, `zero_groups`: mean share of such groups, `rollouts`: completions that were rewarded, `seconds`
        of the training on the clock, `cpu_seconds` of this process for everything, and `curve`.
    """
    began = time.process_time()
    set_seed(seed)
    problems, held_out = (Dataset.from_json(str(folder / f"{name}.jsonl")) for name in ("training", "held_out"))
    model = LlamaForCausalLM.from_pretrained(folder / "base")
    rows = _rows(arm, problems, options, seed, folder)
    clock = time.perf_counter()
    if arm == SFT:
        _fine_tune(model, problems, options, settings, seed)
    curve = _Curve(held_out.select(range(min(options.curve_problems, len(held_out)))), options, seed)
    reward = _Counted()
    trainer = GRPOTrainer(model, reward, args=GRPOConfig(**_shared(settings, seed)), train_dataset=rows,
                          processing_class=new_tokenizer(), callbacks=[curve])  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    seconds = time.perf_counter() - clock - curve.seconds
    log = [entry for entry in trainer.state.log_history if "frac_reward_zero_std" in entry]
    zero = [entry["frac_reward_zero_std"] for entry in log]
    return {
        **(measure_model(model, held_out, options, seed) if trainer.is_world_process_zero() else {}),
        "zero_gradient": sum(share == 1 for share in zero) / len(zero),
        "zero_groups": sum(zero) / len(zero),
        "rollouts": int(trainer.accelerator.reduce(torch.tensor(reward.count))),
        "seconds": seconds,
        "cpu_seconds": time.process_time() - began,
        "curve": {
            "held_out": curve.points,
            **{key: [[entry["step"], entry[key]] for entry in log if key in entry] for key in LOGGED},
        },
    }


def _rows(arm: str, problems: Dataset, options: DemoArguments, seed: int, folder: Path) -> Dataset:
    """The training data of an arm."""
    if arm == POPE:
        prefixes = Dataset.from_json(str(folder / "prefixes.jsonl"))
        return build_rows(problems, prefixes, render=render)
    hard = unguided_rows(problems, render=render)
    if arm != MIX:
        return hard
    easy = unguided_rows(easy_problems(options, seed)[1], render=render)
    return concatenate_datasets([hard, easy.select([i % len(easy) for i in range(len(hard))])])


def _shared(settings: dict[str, Any], seed: int) -> dict[str, Any]:
    """The trainer's settings with the batch shared among the processes.

    Raises:
        ValueError: if the batch cannot be shared evenly.
    """
    state, batch = PartialState(cpu=settings.get("use_cpu", False)), settings["per_device_train_batch_size"]
    if batch % state.num_processes:
        raise ValueError(
            f"`per_device_train_batch_size` is {batch}, which {state.num_processes} processes cannot share; give a multiple."
        )
    return {**settings, "seed": seed, "per_device_train_batch_size": batch // state.num_processes}


def _fine_tune(
    model: PreTrainedModel, problems: Dataset, options: DemoArguments, settings: dict[str, Any], seed: int
) -> None:
    """Train on the oracle's solutions, in place."""
    rows = [{"prompt": render(row["prompt"], ""), "completion": " " + "".join(row["solution"])} for row in problems]
    batch = {"per_device_train_batch_size": options.sft_batch_size, "max_steps": options.sft_steps}
    names = {field.name for field in fields(TrainingArguments)}
    common = {key: value for key, value in settings.items() if key in names}
    trainer = SFTTrainer(model, args=SFTConfig(**_shared({**common, **batch}, seed)),
                         train_dataset=Dataset.from_list(rows), processing_class=new_tokenizer())  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.train()


class _Counted:
    """`whole_trace`, and how many completions it was given."""

    __name__ = "whole_trace"

    def __init__(self):
        self.count = 0

    def __call__(self, prompts: list, completions: list, **columns: Any) -> list[float | None]:
        self.count += len(completions)
        return whole_trace(prompts=prompts, completions=completions, **columns)


class _Curve(TrainerCallback):
    """Measures held-out problems without help while a model is trained, in process 0; its time is kept apart."""

    def __init__(self, problems: Dataset, options: DemoArguments, seed: int):
        self.problems, self.options, self.seed = problems, options, seed
        self.points: list[list[float]] = []
        self.seconds = 0.0

    def on_train_begin(self, args, state, control, model=None, **unused):
        """The point at step 0."""
        self._add(model, state)

    def on_step_end(self, args, state, control, model=None, **unused):
        """A point every `curve_every` steps."""
        if state.global_step % self.options.curve_every == 0:
            self._add(model, state)

    def _add(self, model: PreTrainedModel, state: TrainerState) -> None:
        if not state.is_world_process_zero:
            return
        began = time.perf_counter()
        measure = new_measure(model, self.options, EVALUATION_SEED + self.seed)
        found = measure(evaluate, self.problems, num_samples=4, ks=(1,))
        self.points.append([state.global_step, found["pass@1"]])
        self.seconds += time.perf_counter() - began
