"""Train a HOPE on texts, as a recipe says, each level at its own rate."""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments, default_data_collator, set_seed
from transformers.utils import logging

from karla_hf.checkpoints import save_tokenizer
from karla_hf.hope_arguments import HopeArguments, parse_hope_recipe
from karla_hf.hope_checkpoints import fresh_hope, load_hope
from karla_hf.hope_data import Sequences, as_tensor, load_sequences
from karla_hf.modeling.modeling_hope import HopeForCausalLM
from karla_hf.multi_rate import MultiRateOptimizer
from karla_hf.ngrams import bigram_loss, unigram_loss
from karla_hf.report import new_console, new_table, write_json
from karla_hf.training import resume_folder
from karla_hf.transformer_peer import TransformerPeer, num_trainable


class HopeTrainer(Trainer):
    """transformers' Trainer with AdamW whose levels step at their own rates; vectors do not decay."""

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The optimiser over `level_parameter_groups`, each divided into matrices and vectors."""
        if self.optimizer is None:
            hope: Any = self.model
            groups = [part for group in hope.level_parameter_groups() for part in self._parts(group)]
            betas = (self.args.adam_beta1, self.args.adam_beta2)
            self.optimizer = MultiRateOptimizer(
                torch.optim.AdamW(groups, lr=self.args.learning_rate, betas=betas, eps=self.args.adam_epsilon)
            )
        return self.optimizer

    def _parts(self, group: dict[str, Any]) -> list[dict[str, Any]]:
        matrices = [parameter for parameter in group["params"] if parameter.ndim > 1]
        vectors = [parameter for parameter in group["params"] if parameter.ndim < 2]
        parts = [(matrices, self.args.weight_decay), (vectors, 0.0)]
        return [{**group, "params": params, "weight_decay": decay} for params, decay in parts if params]


def run_hope_recipe(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Train what a recipe says, save it, and compare its held-out loss with n-gram models and, if asked, a transformer.

    Writes to `output_dir`: the HOPE with its tokenizer, the Trainer's checkpoints, and `summary.json`. The encoder is not
    modified. An optimiser other than AdamW is refused.

    Args:
        path: the recipe; see `parse_hope_recipe`. `resume_from_checkpoint` is a checkpoint's folder, or true for the last
            one in `output_dir`; training goes on in the middle of an epoch.
        overrides: `["--key", "value", ...]`, which go before the recipe's.

    Returns:
        The summary: losses in nats per held-out token by model, tokens, steps, CPU seconds of training.

    Raises:
        FileNotFoundError, ValueError: for a recipe, texts, or a checkpoint that cannot be used.
        OSError: if the encoder is found nowhere, or the results cannot be written.
    """
    arguments, training, options = parse_hope_recipe(path, overrides)
    resume = resume_folder(training)
    set_seed(training.seed)
    model, tokenizer = _model(arguments, options)
    data = load_sequences(arguments, tokenizer, model.config.sequence_length)
    trainer = HopeTrainer(
        model=model, args=training, train_dataset=data.train, eval_dataset=data.held_out,
        data_collator=default_data_collator,
    )  # fmt: skip
    losses = _ngram_losses(data, model.config.vocab_size)
    seconds = _train(trainer, resume)
    output = Path(str(training.output_dir))
    model.eval().save_pretrained(output)
    save_tokenizer(tokenizer, output)
    losses = {"HOPE": held_out_loss(model, data.held_out, training), **losses}
    summary: dict[str, Any] = {
        "recipe": str(path),
        "encoder": model.config.encoder_name_or_path,
        "data": arguments.dataset_name or ", ".join(arguments.dataset_files or ()),
        "trainable": {"HOPE": num_trainable(model)},
        "held_out_tokens": len(data.held_out) * (model.config.sequence_length - 1),
        "trained_tokens": trainer.state.global_step * _batch(training) * model.config.sequence_length,
        "steps": trainer.state.global_step,
        "cpu_seconds": {"HOPE": round(seconds, 1)},
        "threads": torch.get_num_threads(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {model.device.type}",
        "versions": {name: version(name) for name in ("karla-hf", "torch", "transformers")},
    }
    _finish(output, summary, losses)
    if arguments.compare:
        name = "causal transformer"
        peer, summary["cpu_seconds"][name] = _train_peer(model, training, data)
        losses[name], summary["trainable"][name] = held_out_loss(peer, data.held_out, training), num_trainable(peer)
        _finish(output, summary, losses)
    return summary


@torch.no_grad()
def held_out_loss(model: nn.Module, rows: Dataset, training: TrainingArguments) -> float:
    """Mean loss in nats of the tokens of all sequences but the first of each, in float32."""
    model.eval()
    size, total = training.per_device_eval_batch_size, 0.0
    device = next(model.parameters()).device
    for start in logging.tqdm(range(0, len(rows), size), desc="held-out loss", disable=training.disable_tqdm):
        ids = torch.tensor(rows[start : start + size]["input_ids"], device=device)
        total += model(input_ids=ids, labels=ids, num_items_in_batch=1)["loss"].item()
    return total / (len(rows) * (len(rows[0]["input_ids"]) - 1))


def _model(arguments: HopeArguments, options: dict[str, Any]) -> tuple[HopeForCausalLM, PreTrainedTokenizerBase]:
    if arguments.model_name_or_path is not None:
        return load_hope(arguments.model_name_or_path)
    return fresh_hope(arguments.encoder_name_or_path, revision=arguments.encoder_revision, options=options)


def _ngram_losses(data: Sequences, vocab_size: int) -> dict[str, float]:
    """Held-out losses of what is counted on the training tokens; of a stream, nothing is counted."""
    if not isinstance(data.train, Dataset):
        return {}
    counted, asked = as_tensor(data.train), as_tensor(data.held_out)
    return {
        "bigrams (Kneser-Ney)": bigram_loss(counted, asked, vocab_size),
        "unigrams": unigram_loss(counted, asked, vocab_size),
    }


def _finish(output: Path, summary: dict[str, Any], losses: dict[str, float]) -> None:
    """Write and show what is known so far."""
    summary["losses"] = dict(losses)
    write_json(output / "summary.json", summary)
    _show(summary)


def _train(trainer: Trainer, resume: str | None) -> float:
    began = time.process_time()
    trainer.train(resume_from_checkpoint=resume)
    return time.process_time() - began


def _train_peer(hope: HopeForCausalLM, training: TrainingArguments, data: Sequences) -> tuple[TransformerPeer, float]:
    """The same recipe on a transformer, without checkpoints."""
    set_seed(training.seed)
    peer = TransformerPeer(hope, hope.config.sequence_length)
    training.save_strategy = "no"
    trainer = Trainer(
        model=peer, args=training, train_dataset=data.train, eval_dataset=data.held_out,
        data_collator=default_data_collator,
    )  # fmt: skip
    return peer, _train(trainer, None)


def _batch(training: TrainingArguments) -> int:
    return training.train_batch_size * training.gradient_accumulation_steps * training.world_size


def _show(summary: dict[str, Any]) -> None:
    table = new_table(
        ["", "nats per token", "perplexity", "trainable", "CPU seconds"],
        title=f"Loss on {summary['held_out_tokens']:,} held-out tokens of {summary['data']}",
        caption=f"{summary['steps']:,} steps over {summary['trained_tokens']:,} tokens",
    )
    for name, loss in sorted(summary["losses"].items(), key=lambda item: item[1]):
        size, seconds = (summary[key].get(name) for key in ("trainable", "cpu_seconds"))
        table.add_row(
            name, f"{loss:.3f}", f"{math.exp(min(loss, 700)):,.1f}", "" if size is None else f"{size:,}",
            "" if seconds is None else f"{seconds:,.0f}",
        )  # fmt: skip
    new_console().print(table)
