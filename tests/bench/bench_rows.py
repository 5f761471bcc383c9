"""Trained rows on SmolLM2-135M against their controls: one row per table, shuffled addresses, LoRA of equal size.

Every variant trains once, on the same windows in the same order, with the head frozen and silent; the loss is that of the
held-out topics of the Python reference. A memory that is worth its rows beats "one row" and loses by "shuffled".

    python tests/bench/bench_rows.py rows.json
"""

import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, inject_adapter_in_model
from transformers import set_seed
from trl import SFTConfig

from karla_hf import KarlaForCausalLM, load_tokenizer
from karla_hf.bench import environment
from karla_hf.corpora import load_corpus
from karla_hf.report import write_json
from karla_hf.trainer import KarlaSFTTrainer
from karla_hf.training import held_out_losses


NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
ROWS = {"engram_layer_ids": [1]}
SILENT_HEAD = {
    "ctm_hidden_size": 16, "ctm_num_heads": 1, "ctm_num_neurons": 8, "ctm_history_length": 1, "ctm_num_pairs": 8,
    "ctm_neuron_hidden_size": 1, "ctm_num_self_pairs": 0, "ctm_stream_size": 0, "ctm_num_ticks": 1, "ctm_window": 1,
    "ctm_num_registers": 1, "ctm_source_layers": [0],
}  # fmt: skip
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA_RANK = 9  # 2.75 million weights; the inserted module has 2.73 million
LEARNING_RATES = {"rows": 5e-3, "LoRA": 1e-3}  # chosen on windows of the training topics
LENGTH, EVERY, HELD_OUT_EVERY = 128, 5, 3  # of the windows, every fifth and every third


def windows(texts: list[str], every: int) -> Dataset:
    """Every `every`-th window of LENGTH tokens."""
    tokenizer = load_tokenizer(NAME)
    ids = [token for text in texts for token in tokenizer(text, truncation=False)["input_ids"]]
    cut = [ids[at : at + LENGTH] for at in range(0, len(ids) - LENGTH + 1, LENGTH)]
    return Dataset.from_dict({"input_ids": cut[::every]})


def make(variant: str) -> KarlaForCausalLM:
    """A fresh Karla on SmolLM2 in bfloat16 whose head is frozen."""
    set_seed(0)
    model = KarlaForCausalLM.from_backbone(
        NAME, backbone_kwargs={"dtype": "bfloat16"}, **SILENT_HEAD, **(ROWS if variant != "LoRA" else {})
    )
    model.model.ctm.requires_grad_(False)
    if variant == "one row":
        model.model.layer_engram.rows.primes.fill_(1)  # each head reads the first row of its table, whatever the text
    if variant == "LoRA":
        config = LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules=TARGETS)
        inject_adapter_in_model(config, model.model.backbone)
        for name, parameter in model.model.backbone.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.float()
    return model


def train(model: KarlaForCausalLM, rows: Dataset, held_out: Dataset, rate: float) -> tuple[KarlaSFTTrainer, float]:
    """One epoch; returns the trainer and the seconds it took."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            output_dir=folder, use_cpu=True, bf16=False, gradient_checkpointing=False, dataloader_pin_memory=False,
            per_device_train_batch_size=2, num_train_epochs=1, learning_rate=rate, lr_scheduler_type="cosine",
            warmup_steps=4, logging_steps=1000, save_strategy="no", report_to="none", disable_tqdm=True, seed=0,
            max_length=LENGTH,
        )  # fmt: skip
        trainer = KarlaSFTTrainer(
            model=model,
            args=arguments,
            train_dataset=rows,
            eval_dataset=held_out,
            processing_class=load_tokenizer(NAME),
        )
        start = time.perf_counter()
        trainer.train()
        return trainer, time.perf_counter() - start


def measure(rows: Dataset, held_out: Dataset) -> Iterator[tuple[str, dict[str, float]]]:
    """Train and measure one variant after the other."""

    def row(loss: float, trainable: int, seconds: float) -> dict[str, float]:
        return {"held-out loss": loss, "trainable weights": trainable, "seconds of training": round(seconds, 1)}

    for variant in ("rows", "one row", "LoRA"):
        model = make(variant)
        trainer, seconds = train(model, rows, held_out, LEARNING_RATES["LoRA" if variant == "LoRA" else "rows"])
        trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        backbone, loss, _ = held_out_losses(model, held_out, trainer.data_collator, 4)
        if variant == "rows":
            yield "bare backbone", row(backbone, 0, 0)
        yield variant, row(loss, trainable, seconds)
        if variant == "rows":
            table = model.model.layer_engram.rows
            table.multipliers.copy_(table.multipliers.flip(1) ^ 2)  # other odd numbers: every name finds other rows
            yield (
                "shuffled addresses",
                row(held_out_losses(model, held_out, trainer.data_collator, 4)[1], trainable, 0),
            )


def run() -> dict[str, Any]:
    """Held-out losses in nats per token, by variant."""
    corpus = load_corpus("python-reference")
    rows = windows(list(corpus.train["text"]), EVERY)
    held_out = windows(list(corpus.held_out["text"]), HELD_OUT_EVERY)
    tokens = {"train_tokens": len(rows) * LENGTH, "held_out_tokens": len(held_out) * (LENGTH - 1)}
    return {"rows": dict(measure(rows, held_out)), **tokens, "learning_rates": LEARNING_RATES}


if __name__ == "__main__":
    torch.set_num_threads(1)
    write_json(Path(sys.argv[1]), {"bench": "rows", **run(), **environment()})
