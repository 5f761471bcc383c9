"""Modular addition: a task that small networks learn by heart first and understand much later, if their weights decay.

All pairs (a, b) of numbers below p with the answer (a + b) mod p; a share of them is trained on, the others are validation
data (https://arxiv.org/abs/2201.02177). Every step takes all of the training data.

    karla train recipes/grokking/modular-addition.yaml --seed 1
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import nn
from torch.utils.data import Dataset, Subset
from transformers import EvalPrediction, LlamaConfig, Trainer, TrainingArguments, set_seed

from karla_hf.arguments import fill, read_recipe
from karla_hf.grokking import State
from karla_hf.grokking_callback import GrokkingOptions, watch_grokking
from karla_hf.modeling.attention_karla import cut_blocks
from karla_hf.modeling.configuration_karla import KarlaConfig
from karla_hf.modeling.modeling_karla import KarlaForCausalLM
from karla_hf.report import write_json


LEARNERS = ("mlp", "ctm")
PROBE_ROWS = 512  # of the training data, at most
STATE_COLOURS = {
    State.FIT: "#f4f5f7", State.MEMORISED: "#fde9d3", State.PRE_GROK: "#fdf6c9", State.STALLED: "#f8d7da",
    State.GROKKED: "#d5eedd",
}  # fmt: skip


@dataclass
class ModularArguments:
    """The task and who learns it.

    Attributes:
        modulus: p, at least 2.
        train_share: share of the p^2 pairs that is trained on, above 0 and below 1.
        learner: "mlp", or "ctm": Karla's thinking head.
    """

    modulus: int = 31
    train_share: float = 0.6
    learner: str = "mlp"

    def __post_init__(self):
        if self.modulus < 2:
            raise ValueError(f"`modulus` is {self.modulus}; give a number from 2.")
        if not 0 < self.train_share < 1:
            raise ValueError(f"`train_share` is {self.train_share}; give a share above 0 and below 1, such as 0.6.")
        if self.learner not in LEARNERS:
            raise ValueError(f"`learner` is {self.learner!r}; give one of {', '.join(LEARNERS)}.")


class ModularPairs(Dataset):
    """Pairs and their sums.

    Args:
        numbers: [n] int64, each a pair: a p + b.
        modulus: p.

    Example:
        >>> row = ModularPairs(torch.tensor([5 * 7 + 4]), modulus=7)[0]
        >>> row["input_ids"].tolist(), row["labels"].item()
        ([5, 4], 2)
    """

    def __init__(self, numbers: torch.Tensor, modulus: int):
        self.input_ids = torch.stack([numbers // modulus, numbers % modulus], dim=1)
        self.labels = self.input_ids.sum(1) % modulus

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.input_ids[index], "labels": self.labels[index]}

    def __getitems__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        """A whole batch at once, for a loader that does not collate."""
        return {"input_ids": self.input_ids[indices], "labels": self.labels[indices]}


def keep_batch(batch: Any) -> dict[str, torch.Tensor]:
    """The collator for `ModularPairs`, which gives batches as they are."""
    return batch


def split_pairs(modulus: int, train_share: float, seed: int) -> tuple[ModularPairs, ModularPairs]:
    """Divide all pairs into training and validation data.

    Example:
        >>> training, validation = split_pairs(5, 0.6, seed=0)
        >>> len(training), len(validation)
        (15, 10)
    """
    order = torch.randperm(modulus**2, generator=torch.Generator().manual_seed(seed))
    count = min(max(1, round(train_share * modulus**2)), modulus**2 - 1)
    return ModularPairs(order[:count], modulus), ModularPairs(order[count:], modulus)


class ModularMlp(nn.Module):
    """Embeddings of both numbers side by side, one hidden layer, p outputs; no norms.

    Args:
        modulus: p.
    """

    def __init__(self, modulus: int, width: int = 64, hidden_size: int = 128):
        super().__init__()
        self.embedding = nn.Embedding(modulus, width)
        self.layers = nn.Sequential(nn.Linear(2 * width, hidden_size), nn.ReLU(), nn.Linear(hidden_size, modulus))

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """`logits` [n, p], and `loss` if there are labels [n], for pairs [n, 2]."""
        logits = self.layers(self.embedding(input_ids).flatten(1))
        loss = {} if labels is None else {"loss": nn.functional.cross_entropy(logits, labels)}
        return {**loss, "logits": logits}


class ModularHead(nn.Module):
    """Karla's thinking head over the embeddings of both numbers and of the question, which it answers after its last tick.

    The head is as it is over a backbone, in ternary weights, with neurons beside its stream; the embeddings stand where the
    backbone's states do. Each place has embeddings of its own, so that a + b and b + a are different problems.

    Args:
        modulus: p.
    """

    places: torch.Tensor

    def __init__(self, modulus: int, width: int = 128, num_ticks: int = 2):
        super().__init__()
        text = LlamaConfig(vocab_size=2 * modulus + 1, hidden_size=width, num_hidden_layers=1, num_attention_heads=4)
        config = KarlaConfig(
            text_config=text, ctm_num_ticks=num_ticks, ctm_stream_size=4 * width, ctm_hidden_size=64, ctm_num_heads=4,
            ctm_num_neurons=64, ctm_num_pairs=64, ctm_num_self_pairs=8, ctm_source_layers=[0], engram_rows_per_head=8,
        )  # fmt: skip
        self.head = KarlaForCausalLM(config, init_backbone=False).model.ctm
        self.embedding = nn.Embedding(2 * modulus + 1, width)
        self.answer = nn.Linear(width, modulus, bias=False)
        self.num_ticks, self.window = num_ticks, config.ctm_window
        self.register_buffer("places", torch.tensor([0, modulus, 2 * modulus]), persistent=False)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """`logits` [n, p], and `loss` if there are labels [n], for pairs [n, 2]."""
        states = self.embedding(nn.functional.pad(input_ids, (0, 1)) + self.places)  # [n, 3, D]
        positions = torch.arange(3, device=states.device).expand(len(states), -1)
        memory, valid = self.head.memory, torch.ones_like(positions, dtype=torch.bool)
        keys_values = memory(states[:, :, None], positions)
        blocks = cut_blocks(keys_values, valid, memory.registers, positions[:, 2:], self.window)
        thought = states[:, 2] + self.head(states[:, 2:], blocks, self.num_ticks)
        logits = self.answer(thought)
        loss = {} if labels is None else {"loss": nn.functional.cross_entropy(logits, labels)}
        return {**loss, "logits": logits}


class ModularTrainer(Trainer):
    """A `Trainer` in which only weights decay: no biases, norms, start states, temperatures or decays."""

    def get_decay_parameter_names(self, model) -> list[str]:
        """Names of the parameters that decay."""
        return [name for name in super().get_decay_parameter_names(model) if "weight" in name.rpartition(".")[2]]


def run_modular(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Train on modular addition as a recipe says; writes `summary.json` and `grokking.png` to its `output_dir`.

    Args:
        path: YAML of transformers' `TrainingArguments`, `ModularArguments` and `GrokkingOptions`. Every step takes all
            training pairs.
        overrides: `["--key", "value", ...]`, which go before the recipe's.

    Returns:
        `GrokkingDetector.summary()`, `steps`, CPU `seconds`, and `probes`: what was measured at every evaluation, with the
        state of the detector.

    Raises:
        FileNotFoundError, ValueError: for a recipe that cannot be used.
        OSError: if the results cannot be written.
    """
    values = {key: value for key, value in read_recipe(path, overrides).items() if key != "phase"}
    task, options, arguments = fill(path, values, [ModularArguments, GrokkingOptions, TrainingArguments])
    training, validation = split_pairs(task.modulus, task.train_share, arguments.seed)
    arguments.per_device_train_batch_size = len(training)
    arguments.per_device_eval_batch_size = max(len(training), len(validation))
    set_seed(arguments.seed)
    model = ModularMlp(task.modulus) if task.learner == "mlp" else ModularHead(task.modulus)
    probe = Subset(training, range(min(PROBE_ROWS, len(training))))
    trainer = ModularTrainer(
        model=model,
        args=arguments,
        train_dataset=training,
        eval_dataset={options.grokking_train: probe, options.grokking_validation: validation},
        data_collator=keep_batch,
        compute_metrics=_accuracy,
    )
    callback = watch_grokking(trainer, options)
    began = time.process_time()
    resume = arguments.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=True if str(resume).lower() == "true" else resume)
    seconds = time.process_time() - began
    result = {**callback.detector.to_dict(), "steps": trainer.state.global_step, "seconds": seconds}
    folder = Path(str(arguments.output_dir))
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "summary.json", result)
    draw_grokking({folder.name: result}, folder / "grokking.png")
    return result


def draw_grokking(runs: dict[str, dict[str, Any]], path: Path) -> None:
    """Draw for each run its accuracies, its weight norm, and the states of the detector behind them.

    Args:
        runs: by title, as `run_modular` returns them.
        path: the PNG file.
    """
    figure = Figure(figsize=(4.6 * len(runs), 3.4), layout="constrained")
    for axes, (title, run) in zip(figure.subplots(1, len(runs), squeeze=False)[0], runs.items(), strict=True):
        probes = run["probes"]
        steps = [probe["step"] for probe in probes]
        for left, right, probe in zip([0, *steps], steps, probes, strict=False):
            axes.axvspan(left, right, color=STATE_COLOURS[State(probe["state"])], linewidth=0)
        axes.plot(steps, [probe["train_score"] for probe in probes], color="#9aa5b1", label="training")
        axes.plot(steps, [probe["val_score"] for probe in probes], color="#1f6f78", label="validation")
        norm = axes.twinx()
        norm.plot(steps, [probe["weight_norm"] for probe in probes], color="#d9822b", linewidth=1, label="weight norm")
        norm.set_ylim(bottom=0)
        axes.set(title=title, xlabel="step", ylim=(0, 1.03), xlim=(0, steps[-1]))
        lines = [*axes.get_lines(), *norm.get_lines()]
        axes.legend(lines, [line.get_label() for line in lines], fontsize=8, loc="center right")
    names = [Patch(color=colour, label=state.value) for state, colour in STATE_COLOURS.items()]
    figure.legend(handles=names, loc="outside lower center", ncols=len(names), fontsize=8, frameon=False)
    figure.savefig(path, dpi=120)


def _accuracy(evaluated: EvalPrediction) -> dict[str, float]:
    right = torch.as_tensor(evaluated.predictions).argmax(-1) == torch.as_tensor(evaluated.label_ids)
    return {"accuracy": right.float().mean().item()}
