"""What a HOPE consists of, in parameters, bytes, and how often each part changes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import nn

from karla_hf.modeling.learning_hope import LEARNING_FILE
from karla_hf.modeling.modeling_hope import HopeForCausalLM


@dataclass(frozen=True)
class Part:
    """A part of a HOPE.

    Attributes:
        name: "encoder", "fast weights", "level 1" and so on.
        changes: how often.
        parameters: numbers it holds.
        trainable: those that a trainer changes.
        bytes_in_ram: size of its tensors.
        learned: numbers that `learn` has added.
    """

    name: str
    changes: str
    parameters: int
    trainable: int
    bytes_in_ram: int
    learned: int


def describe_hope(model: HopeForCausalLM) -> list[Part]:
    """Measure the parts of a HOPE, from the slowest to the fastest, and their total.

    Example:
        >>> from karla_hf import HopeConfig
        >>> encoder = {"model_type": "bert", "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1,
        ...            "intermediate_size": 8, "vocab_size": 9}
        >>> sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 3 - 1, "snapshot_periods": [64]}
        >>> [part.name for part in describe_hope(HopeForCausalLM(HopeConfig(encoder_config=encoder, **sizes)))]
        ['encoder', 'level 3', 'level 2', 'level 1', 'fast weights', 'total']
    """
    encoder = cast(nn.Module, model.model.slow.encoder)
    parts = [_part("encoder", "never", list(encoder.parameters()), 0)]
    rest, *levels = model.level_parameter_groups()
    for number, group in reversed(list(enumerate(levels, start=1))):
        period = group["update_period"]
        changes = "every step, every chunk learned" if period == 1 else f"every {period} steps or chunks learned"
        chains = [layer.levels[number - 1] for layer in model.model.layers]
        learned = sum(delta.numel() for level in chains for delta in level.deltas or ())
        parts.append(_part(group["name"], changes, group["params"], learned))
    parts.append(_part("fast weights", "state: every token; projections: every step", rest["params"], 0))
    sums = (
        sum(getattr(part, name) for part in parts) for name in ("parameters", "trainable", "bytes_in_ram", "learned")
    )
    return [*parts, Part("total", "", *sums)]


@torch.no_grad()
def state_bytes(model: HopeForCausalLM) -> int:
    """Bytes of the recurrent state of one sequence, which does not grow with its length."""
    one = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    return int(model(one, use_cache=True).past_key_values.num_bytes)


def learned_bytes(directory: str | Path) -> int:
    """Bytes of what was learned, on disk."""
    path = Path(directory, LEARNING_FILE)
    return path.stat().st_size if path.is_file() else 0


def _part(name: str, changes: str, parameters: list[nn.Parameter], learned: int) -> Part:
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    size = sum(p.numel() * p.element_size() for p in parameters) + 8 * learned  # a delta and what waits for it
    return Part(name, changes, sum(p.numel() for p in parameters), trainable, size, learned)
