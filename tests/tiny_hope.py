"""A tiny sentence encoder with a tokenizer in a folder, and a HOPE made of it."""

from pathlib import Path

import torch
from tiny import VOCAB_SIZE, make_tokenizer
from transformers import BertConfig, BertModel

from karla_hf.hope_checkpoints import create_hope, load_hope


HOPE_OPTIONS = {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "chunk_size": 8,
    "sequence_length": 32,
    "snapshot_periods": [8, 16],
    "level_sizes": [24, 16],
    "level_periods": [1, 2],
    "initializer_range": 0.2,
}


def save_encoder(folder: Path) -> Path:
    """Write encoder and tokenizer; returns the folder."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=VOCAB_SIZE, initializer_range=0.3, **sizes)).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def save_hope(folder: Path, encoder: Path, **options) -> Path:
    """Write an untrained HOPE; returns the folder."""
    torch.manual_seed(0)
    create_hope(str(encoder), folder, options={**HOPE_OPTIONS, **options})
    return folder


def save_trained(folder: Path, hope: Path) -> Path:
    """Write a copy of a HOPE whose gates and norms are not those of a fresh one; returns the folder."""
    model, tokenizer = load_hope(hope)
    torch.nn.init.normal_(model.model.slow.gate)
    torch.nn.init.normal_(model.model.norm.weight, mean=1.0, std=0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
