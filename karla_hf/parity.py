"""Cumulative parity: a task that needs one step of thought per bit, and a Continuous Thought Machine that learns it.

Which bits of a sequence are 0, counted from its beginning: the answer at every position is whether their number so far is
odd (https://arxiv.org/abs/2505.05522, section 5). One prediction answers all positions at once, at every tick.

    python -m karla_hf.parity recipes/parity/length8.yaml --max_steps 500
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from matplotlib.figure import Figure
from rich.console import Console
from torch.utils.data import Dataset
from transformers import EvalPrediction, HfArgumentParser, Trainer, TrainingArguments, set_seed

from karla_hf.modeling.configuration_ctm import CtmConfig
from karla_hf.modeling.modeling_ctm import CtmModel
from karla_hf.report import write_json


LONGEST = 30  # bits; a sequence is a number below 2 ** length
MODEL_KEYS = sorted(set(CtmConfig.__annotations__) - {"vocab_size", "output_size", "num_classes", "model_type"})


@dataclass
class ParityArguments:
    """Which sequences.

    Attributes:
        length: bits of a sequence.
        held_out: sequences that training never sees.
    """

    length: int = 8
    held_out: int = 64


class ParitySequences(Dataset):
    """Sequences of bits and their cumulative parity.

    Args:
        numbers: [n] int64, each a sequence: its bits from the lowest.
        length: bits of a sequence.

    Example:
        >>> row = ParitySequences(torch.tensor([6]), length=4)[0]
        >>> row["input_ids"].tolist(), row["labels"].tolist()
        ([0, 1, 1, 0], [1, 1, 1, 0])
    """

    def __init__(self, numbers: torch.Tensor, length: int):
        self.input_ids = numbers[:, None] >> torch.arange(length) & 1
        self.labels = (1 - self.input_ids).cumsum(1) % 2

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.input_ids[index], "labels": self.labels[index]}


def split_sequences(length: int, held_out: int, count: int, seed: int) -> tuple[ParitySequences, ParitySequences]:
    """`count` random sequences for training, and others that are not among them.

    Args:
        length: bits.
        held_out: how many sequences are kept from training, all distinct.
        count: how many are drawn for training, with replacement.
        seed: of both.

    Returns:
        Those for training and those held out.

    Raises:
        ValueError: if a sequence is longer than `LONGEST` or more are held out than there are others.

    Example:
        >>> training, held_out = split_sequences(length=4, held_out=5, count=100, seed=0)
        >>> seen = {tuple(row) for row in training.input_ids.tolist()}
        >>> len(held_out), seen & {tuple(row) for row in held_out.input_ids.tolist()}
        (5, set())
    """
    if not 2 <= length <= LONGEST or not 1 <= held_out <= 2 ** (length - 1):
        raise ValueError(
            f"`length` is {length} and `held_out` {held_out}; give a length from 2 to {LONGEST}, and hold out at most half "
            "of its sequences."
        )
    generator = torch.Generator().manual_seed(seed)
    kept = torch.randperm(min(2**length, 2**20), generator=generator)[:held_out]  # of the first million
    drawn = torch.randint(2**length, (2 * count + 64,), generator=generator)
    drawn = drawn[~torch.isin(drawn, kept)]
    while len(drawn) < count:
        drawn = torch.cat([drawn, drawn])
    return ParitySequences(drawn[:count], length), ParitySequences(kept, length)


def measure(predictions: torch.Tensor, certainties: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """What share of bits and of whole sequences is right where the model is most certain.

    Args:
        predictions: [n, 2 L, T] logits.
        certainties: [n, 2, T].
        labels: [n, L].

    Returns:
        `bits` and `sequences` in [0, 1], `tick`: the mean most certain tick from 1, `last_tick`: bits at the last tick.
    """
    right = _right(predictions, labels)
    surest = certainties[:, 1].argmax(1)
    chosen = right[torch.arange(len(right)), :, surest]
    return {
        "bits": chosen.mean().item(),
        "sequences": chosen.prod(1).mean().item(),
        "tick": surest.float().mean().item() + 1,
        "last_tick": right[..., -1].mean().item(),
    }


@torch.no_grad()
def examine(model: CtmModel, data: ParitySequences) -> dict:
    """Accuracy and certainty of every tick, accuracy of every position, and where attention lies at every tick.

    Args:
        model: trained; not modified.
        data: sequences.

    Returns:
        `measure`'s numbers; `ticks`: per tick `bits` and `certainty`; `positions`: bits where most certain; `attention`:
        [T][L], the mean over sequences and heads.
    """
    was_training = model.training
    out = model.eval()(input_ids=data.input_ids, output_attentions=True)
    model.train(was_training)
    right = _right(out.predictions, data.labels)
    surest = out.certainties[:, 1].argmax(1)
    return {
        **measure(out.predictions, out.certainties, data.labels),
        "ticks": {
            "bits": right.mean((0, 1)).tolist(),
            "certainty": out.certainties[:, 1].mean(0).tolist(),
        },
        "positions": right[torch.arange(len(right)), :, surest].mean(0).tolist(),
        "attention": out.attentions.mean((0, 2)).tolist(),
    }


def train(recipe: Path, overrides: list[str] = ()) -> dict:  # type: ignore[assignment]
    """Train a `CtmModel` as a recipe says; writes the model, `summary.json` and `parity.png` to its `output_dir`.

    Args:
        recipe: YAML of transformers' `TrainingArguments`, `CtmConfig` and `ParityArguments`.
        overrides: `--key value` pairs.

    Returns:
        `examine`'s result on the `held_out` sequences, `bits_trained_on`: the same share of 1,024 training sequences,
        `curve`: what was measured on the way, `seconds` of CPU and `parameters`.

    Raises:
        ValueError: for a key that none of the three has.
    """
    values = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    values |= {
        key.removeprefix("--"): yaml.safe_load(value) for key, value in zip(*[iter(overrides)] * 2, strict=True)
    }
    options = {key: values.pop(key) for key in MODEL_KEYS if key in values}
    parser = HfArgumentParser([ParityArguments, TrainingArguments])  # type: ignore[list-item]
    task, arguments = parser.parse_dict(values)
    set_seed(arguments.seed)
    count = arguments.max_steps * arguments.train_batch_size
    training, held_out = split_sequences(task.length, task.held_out, count, arguments.seed)
    model = CtmModel(CtmConfig(**options, vocab_size=2, output_size=2 * task.length, num_classes=2))
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=training,
        eval_dataset=held_out,
        compute_metrics=_metrics,
        preprocess_logits_for_metrics=lambda outputs, _: outputs[:2],
    )
    began = time.process_time()
    resume = arguments.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=True if str(resume).lower() == "true" else resume)
    seconds = time.process_time() - began
    names = {"bits": "eval_bits", "sequences": "eval_sequences", "tick": "eval_tick", "loss": "eval_loss"}
    curve = [
        {"step": entry["step"], **{name: entry[key] for name, key in names.items()}}
        for entry in trainer.state.log_history
        if "eval_bits" in entry
    ]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    result = {**examine(model, held_out), "curve": curve, "seconds": seconds, "parameters": parameters}
    result["held_out"] = len(held_out)
    shown = ParitySequences((training.input_ids[:1024] << torch.arange(task.length)).sum(1), task.length)
    result["bits_trained_on"] = examine(model, shown)["bits"]
    folder = Path(arguments.output_dir)
    model.save_pretrained(str(arguments.output_dir))
    write_json(folder / "summary.json", result)
    draw(result, folder / "parity.png")
    return result


def draw(result: dict, path: Path) -> None:
    """Draw the learning curve, accuracy and certainty over ticks, and attention over ticks.

    Args:
        result: as `train` returns it.
        path: the PNG file.
    """
    figure = Figure(figsize=(12, 3.4), layout="constrained")
    learning, thinking, looking = figure.subplots(1, 3)
    steps = [point["step"] for point in result["curve"]]
    for name, label, colour in (("bits", "bits", "#1f6f78"), ("sequences", "whole sequences", "#d9822b")):
        learning.plot(steps, [point[name] for point in result["curve"]], label=label, color=colour)
    learning.set_title("right on held-out sequences, over steps", fontsize=10)
    ticks = range(1, len(result["attention"]) + 1)
    thinking.plot(ticks, result["ticks"]["bits"], label="bits right", color="#1f6f78")
    thinking.plot(ticks, result["ticks"]["certainty"], label="certainty", color="#9aa5b1")
    thinking.axvline(result["tick"], color="#d9822b", linewidth=1, label="most certain tick, mean")
    thinking.set_title("over ticks", fontsize=10)
    for axes in (learning, thinking):
        axes.set_ylim(0, 1.05)
        axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    image = looking.imshow(torch.tensor(result["attention"]).t(), aspect="auto", cmap="Blues", vmin=0, origin="upper",
                           extent=(0.5, len(ticks) + 0.5, len(result["positions"]) + 0.5, 0.5))  # fmt: skip
    looking.set_title("attention: position over tick, mean of heads", fontsize=10)
    figure.colorbar(image, ax=looking)
    figure.savefig(path, dpi=110)


def _right(predictions: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """[n, L, T]: 1.0 where a bit is right."""
    return (predictions.unflatten(1, (-1, 2)).argmax(2) == labels[..., None]).float()


def _metrics(evaluated: EvalPrediction) -> dict[str, float]:
    return measure(*(torch.from_numpy(part) for part in (*evaluated.predictions, evaluated.label_ids)))


if __name__ == "__main__":
    if len(sys.argv) < 2 or len(sys.argv) % 2:
        sys.exit("Give a recipe and overrides: python -m karla_hf.parity RECIPE [--key value ...]")
    found = train(Path(sys.argv[1]), sys.argv[2:])
    Console().print(
        f"{found['bits']:.4f} of the bits and {found['sequences']:.3f} of the sequences right, at tick "
        f"{found['tick']:.1f} on average; {found['seconds']:.0f} s of CPU time"
    )
