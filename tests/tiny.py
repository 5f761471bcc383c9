"""A tiny backbone with a tokenizer in a folder, and a Karla made of it: what the commands are tested on."""

import hashlib
from pathlib import Path
from types import SimpleNamespace

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from karla_hf import KarlaForCausalLM
from karla_hf.checkpoints import create_checkpoint
from karla_hf.facts import make_facts


VOCAB_SIZE = 400
OPTIONS = {
    "engram_rows_per_head": 5000,
    "ctm_hidden_size": 64,
    "ctm_num_heads": 4,
    "ctm_num_neurons": 32,
    "ctm_num_pairs": 32,
    "ctm_num_self_pairs": 4,
    "ctm_stream_size": 64,
    "ctm_window": 8,
    "ctm_num_ticks": 3,
}
TRAINING = {
    "bf16": False,
    "use_cpu": True,
    "gradient_checkpointing": False,
    "dataloader_pin_memory": False,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "report_to": "none",
    "disable_tqdm": True,
}
CHAT_TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def make_tokenizer(vocab_size: int = VOCAB_SIZE, **options) -> PreTrainedTokenizerFast:
    """Byte-level BPE of made-up facts: every text can be written, and common words are single tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=alphabet, special_tokens=["<|end|>"], show_progress=False
    )
    backend.train_from_iterator([fact.text for fact in make_facts(50)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", **options)


def make_backbone(**options) -> LlamaForCausalLM:
    """A random Llama whose predictions differ clearly from position to position."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "vocab_size": VOCAB_SIZE}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    special = {"pad_token_id": None, "eos_token_id": 0, "bos_token_id": None}
    defaults = {**sizes, **heads, **special, "tie_word_embeddings": True, "initializer_range": 0.1}
    return LlamaForCausalLM(LlamaConfig(**{**defaults, **options})).eval()


def save_backbone(folder: Path, *, chat_template: str | None = None, **options) -> Path:
    """Write backbone and tokenizer; returns the folder."""
    make_backbone(**options).save_pretrained(folder)
    make_tokenizer(chat_template=chat_template).save_pretrained(folder)
    return folder


def save_karla(folder: Path, backbone: Path, **options) -> Path:
    """Write a Karla; returns the folder."""
    create_checkpoint(str(backbone), folder, options={**OPTIONS, **options})
    return folder


def speak(model: KarlaForCausalLM) -> KarlaForCausalLM:
    """Give the projections through which a head speaks random weights, in place; a fresh head is silent."""
    for layer in model.model.ctm.zero_initialised:
        nn.init.normal_(layer.weight, std=0.1)
    return model


def files_in(folder: Path) -> dict[str, bytes]:
    """Everything in a folder, to compare it with later."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class BagOfWords:
    """An encoder without weights: each word is a fixed random direction."""

    model = SimpleNamespace(config=SimpleNamespace(hidden_size=256))

    def encode(self, texts):
        rows = torch.zeros(len(texts), 256)
        for row, text in zip(rows, texts, strict=True):
            for word in text.split():
                seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:7], "big")
                row += torch.randn(256, generator=torch.Generator().manual_seed(seed))
        return nn.functional.normalize(rows, dim=-1)
