"""Heads of several kinds trained on the backbone's states over a small task, all in the same way."""

from __future__ import annotations

import math
import time
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedConfig

from karla_hf.modeling.attention_karla import cut_blocks
from karla_hf.modeling.bitlinear_karla import BitLinear, set_ternary_share
from karla_hf.modeling.configuration_karla import KarlaConfig
from karla_hf.modeling.modeling_karla import KarlaForCausalLM
from karla_hf.muon import MuonAdamW
from karla_hf.tasks import TEST_ROWS, TRAIN_ROWS, VALIDATION_ROWS, TaskStates


LEARNING_RATE, MUON_LEARNING_RATE = 1e-3, 0.02  # of AdamW, and of Muon for the weights of linears
WARMUP_STEPS = 20  # before the cosine of both


class TaskHead(nn.Module):
    """A Karla's head over stored states.

    Args:
        text_config: configuration of the backbone.
        num_ticks: ticks of thought.
        options: `ctm_` fields of `KarlaConfig`.
    """

    def __init__(self, text_config: PreTrainedConfig, num_ticks: int, **options: Any):
        super().__init__()
        config = KarlaConfig(text_config=text_config, ctm_num_ticks=num_ticks, engram_rows_per_head=8, **options)
        self.head = KarlaForCausalLM(config, init_backbone=False).model.ctm
        self.num_ticks, self.window = num_ticks, config.ctm_window

    def forward(self, sources: torch.Tensor, answers: int) -> torch.Tensor:
        """States [S, B * A, D] of the last A positions after every tick, from states [B, T, L, D]."""
        batch, length = sources.shape[:2]
        positions = torch.arange(length).expand(batch, -1)
        memory, state = self.head.memory, sources[:, -answers:, -1]
        valid = torch.ones(batch, length, dtype=torch.bool)
        keys_values = memory(sources, positions)
        blocks = cut_blocks(keys_values, valid, memory.registers, positions[:, -answers:], self.window)
        deltas: list[torch.Tensor] = []
        self.head(state, blocks, self.num_ticks, lambda tick, delta: deltas.append(delta))
        return state.flatten(0, 1) + torch.stack(deltas)


class MlpHead(nn.Module):
    """Two float layers on the last state, h + W_2 SiLU(W_1 RMSNorm(h)), W_2 zero at first.

    Args:
        width: D.
        hidden_size: of the layer between.
    """

    def __init__(self, width: int, hidden_size: int):
        super().__init__()
        self.first, self.second = nn.Linear(width, hidden_size), nn.Linear(hidden_size, width)
        nn.init.zeros_(self.second.weight)

    def forward(self, sources: torch.Tensor, answers: int) -> torch.Tensor:
        """States [1, B * A, D] of the last A positions, from states [B, T, L, D]."""
        state = sources[:, -answers:, -1].flatten(0, 1)
        hidden = nn.functional.silu(self.first(nn.functional.rms_norm(state, state.shape[-1:])))
        return (state + self.second(hidden))[None]


class Trained(NamedTuple):
    """What a run gave.

    Attributes:
        validation, test: share of answers with all digits right after the last tick.
        test_by_tick: the same after every tick.
        cpu_seconds: of training.
        parameters: that were trained.
    """

    validation: float
    test: float
    test_by_tick: list[float]
    cpu_seconds: float
    parameters: int


def train_head(
    head: nn.Module,
    task: TaskStates,
    *,
    passes: int,
    seed: int,
    ternary_warmup: float = 0.5,
    batch_size: int = 8,
) -> Trained:
    """Train a head with the mean loss over ticks and measure it.

    Args:
        head: a `TaskHead` or an `MlpHead`. Modified in place.
        task: rows for training, validation and test, in this order.
        passes: over the rows for training.
        seed: of the order of the rows.
        ternary_warmup: share of the steps from float to ternary weights; infinity keeps floats.
        batch_size: rows per step.
    """
    optimizer = _optimizer(head)
    peaks = [group["lr"] for group in optimizer.param_groups]
    generator, steps, step = torch.Generator().manual_seed(seed), passes * TRAIN_ROWS // batch_size, 0
    started = time.process_time()
    for _ in range(passes):
        for rows in torch.randperm(TRAIN_ROWS, generator=generator).split(batch_size):
            share = min(1.0, (step + 1) / WARMUP_STEPS) * (1 + math.cos(math.pi * step / steps)) / 2
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * share
            set_ternary_share(head, min(1.0, step / (ternary_warmup * steps)) if ternary_warmup else 1.0)
            logits = head(task.sources[rows], task.labels.shape[1]) @ task.digits.T
            labels = task.labels[rows].flatten().repeat(len(logits))
            cross_entropy(logits.flatten(0, 1), labels).backward()
            nn.utils.clip_grad_norm_(head.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
    seconds = time.process_time() - started
    validation = accuracy(head, task, TRAIN_ROWS, VALIDATION_ROWS)
    test = accuracy(head, task, TRAIN_ROWS + VALIDATION_ROWS, TEST_ROWS)
    return Trained(validation[-1], test[-1], test, seconds, sum(p.numel() for p in head.parameters()))


@torch.no_grad()
def accuracy(head: nn.Module, task: TaskStates, first: int, number: int) -> list[float]:
    """Share of answers with all digits right after every tick, over rows `first` to `first + number - 1`."""
    right = []
    for rows in torch.arange(first, first + number).split(100):
        logits = head(task.sources[rows], task.labels.shape[1]) @ task.digits.T
        right.append((logits.argmax(-1).view(len(logits), *task.labels[rows].shape) == task.labels[rows]).all(-1))
    return torch.cat(right, dim=1).float().mean(1).tolist()


def _optimizer(head: nn.Module) -> MuonAdamW:
    """Muon for the matrices of linears, AdamW for the rest."""
    matrices = [module.weight for module in head.modules() if isinstance(module, BitLinear | nn.Linear)]
    chosen = {id(matrix) for matrix in matrices}
    rest = [parameter for parameter in head.parameters() if id(parameter) not in chosen]
    groups = [
        {"params": rest, "weight_decay": 0.0},
        {"params": matrices, "lr": MUON_LEARNING_RATE, "weight_decay": 0.0, "muon": True},
    ]
    return MuonAdamW(groups, lr=LEARNING_RATE)
