"""Training Karla's head on SmolLM2-135M against LoRA (r 16, all linears) on the same rows, both by TRL's trainer.

Rows of text are 256 tokens of the Python reference, with a label on every token. Short prompts are questions of
reasoning-gym's `chain_sum`, with labels on the answer only. Karla has the recipe's defaults (4 ticks); both sides run in float32, keep their activations and
take steps of four rows of text, or of 32 prompts. From cached states means after the pass that computed them. Memory is the
largest resident size, weights included, that a process of its own reaches in two steps on rows of text (Linux).
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import reasoning_gym
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers.utils import logging
from trl import SFTConfig, SFTTrainer

from karla_hf import KarlaForCausalLM, load_tokenizer
from karla_hf.bench import Result, Row
from karla_hf.corpora import load_corpus
from karla_hf.modeling.backbone_karla import load_backbone
from karla_hf.trainer import KarlaSFTTrainer


NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
LENGTH = 256
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
TRAINING = {
    "bf16": False, "use_cpu": True, "gradient_checkpointing": False, "dataloader_pin_memory": False,
    "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no", "max_steps": 1,
    "learning_rate": 2e-4, "max_length": LENGTH,
}  # fmt: skip


def rows() -> Iterator[Row | Result]:
    """The comparisons; see the module's description."""
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        for name, data, batch in (("", text_rows(), 4), ("_short", prompt_rows(), 32)):
            peer = Steps(make_trainer("lora", data, batch, folder), batch)
            karla = Steps(make_trainer("karla", data, batch, folder), batch)
            cached = Steps(make_trainer("cached", data, batch, f"{folder}/states{name}"), batch)
            yield Row(f"tokens_vs_lora{name}", karla.tokens, "tokens", karla, "LoRA r 16", peer)
            text = "" if name else "_text"
            yield Row(f"cached_vs_lora{text}", cached.tokens, "tokens", cached, "LoRA r 16", peer)
            yield Row(f"cached_vs_uncached{text}", cached.tokens, "tokens", cached, "Karla, uncached", karla)
    ours, theirs = peak_megabytes("karla"), peak_megabytes("lora")
    yield Result("memory_vs_lora", ours, "MB", "LoRA r 16", theirs)


def text_rows() -> Dataset:
    """Rows of 256 tokens."""
    tokenizer, text = load_tokenizer(NAME), "\n\n".join(load_corpus("python-reference").train["text"])
    ids = tokenizer(text, truncation=False)["input_ids"][: 16 * LENGTH]
    return Dataset.from_dict({"input_ids": [ids[at : at + LENGTH] for at in range(0, len(ids), LENGTH)]})


def prompt_rows() -> Dataset:
    """Questions of reasoning-gym's `chain_sum` with their answers."""
    rows = list(reasoning_gym.create_dataset("chain_sum", seed=0, size=128, min_terms=4, max_terms=4))
    return Dataset.from_dict(
        {"prompt": [row["question"] for row in rows], "completion": [f" {row['answer']}" for row in rows]}
    )


def make_trainer(kind: str, data: Dataset, batch: int, folder: str) -> SFTTrainer:
    """A trainer of a LoRA, of Karla, or of Karla from cached states."""
    arguments = SFTConfig(output_dir=folder, per_device_train_batch_size=batch, **TRAINING)
    tokenizer = load_tokenizer(NAME)
    common = {"args": arguments, "train_dataset": data, "processing_class": tokenizer}
    if kind == "lora":
        return SFTTrainer(model=load_backbone(NAME), peft_config=LoraConfig(**LORA), **common)
    model = KarlaForCausalLM.from_backbone(NAME, tokenizer, ctm_num_ticks=4)
    return KarlaSFTTrainer(model=model, states_dir=folder if kind == "cached" else None, **common)


class Steps:
    """Calls take one training step each: forward, backward, clipping and AdamW, on one batch after the other.

    Args:
        trainer: what trains.
        batch: rows of a step.
    """

    def __init__(self, trainer: SFTTrainer, batch: int):
        self.trainer = trainer
        trainer.create_optimizer_and_scheduler(num_training_steps=1000)
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1
        data = list(trainer.get_train_dataloader())
        self.batches, self.at = [part for part in data if len(part["input_ids"]) == batch], 0
        tokens = [int(part["attention_mask"].sum()) for part in self.batches]
        self.tokens = sum(tokens) / len(tokens)

    def __call__(self) -> None:
        batch = dict(self.batches[self.at % len(self.batches)])
        self.at += 1
        count = (batch["labels"][:, 1:] != -100).sum()
        self.trainer.training_step(self.trainer.model, batch, num_items_in_batch=count)
        weights: list[torch.Tensor] = [p for p in self.trainer.model.parameters() if p.requires_grad]
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        self.trainer.optimizer.step()
        self.trainer.optimizer.zero_grad()


def peak_megabytes(kind: str) -> float:
    """Largest resident size in two steps of a trainer, in a process of its own."""
    done = subprocess.run([sys.executable, __file__, kind], capture_output=True, text=True, check=True, timeout=900)
    return json.loads(done.stdout.splitlines()[-1])


def _measure_peak(kind: str) -> float:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        step = Steps(make_trainer(kind, text_rows(), 4, folder), 4)
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        step()
        step()
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(peak.split()[1]) / 1024


if __name__ == "__main__":
    print(json.dumps(_measure_peak(sys.argv[1])))  # noqa: T201
