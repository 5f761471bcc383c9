"""One block of HOPE: fast weights that rewrite themselves, then the chain of persistent levels."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional
from transformers.modeling_layers import GradientCheckpointingLayer

from .cache_hope import HopeCacheLayer
from .cms_hope import Levels
from .delta_hope import FastWeights, Span, Streams, num_rows, run_fast_weights
from .frames_hope import Frame


START_RATE = -2.0  # eta = sigmoid of it, 0.12: a write erases little of its neighbours' until training opens the gate
START_DECAY = (2.0, 6.0)  # alpha = sigmoid of it: half lives of 5 to 280 tokens over the heads


class Plan(NamedTuple):
    """What all blocks share in one call.

    Attributes:
        frame: places of the tokens.
        spans: chunks of frame columns.
        real: [B H, F] bool where there are tokens, or None for everywhere.
    """

    frame: Frame
    spans: list[Span]
    real: torch.Tensor | None


class SelfModifyingMemory(nn.Module):
    """Projections, a short causal convolution, and the fast weights of `delta_hope`.

    Args:
        config: a `HopeConfig`.
    """

    def __init__(self, config):
        super().__init__()
        size, self.num_heads, self.self_referential = (
            config.hidden_size,
            config.num_attention_heads,
            config.self_referential,
        )
        head_dim = config.head_dim
        self.streams = nn.Linear(size, 3 * size, bias=False)  # query, key, value
        self.gates = nn.Linear(size, 4 * self.num_heads)
        self.conv = nn.Parameter(torch.empty(3 * size, config.conv_size))
        self.start = nn.Parameter(torch.empty(self.num_heads, num_rows(head_dim, self.self_referential), head_dim))
        self.norm = nn.RMSNorm(head_dim, eps=config.rms_norm_eps)
        self.out = nn.Linear(size, size, bias=False)

    def forward(self, x: torch.Tensor, plan: Plan, cached: HopeCacheLayer | None) -> torch.Tensor:
        """[B, T, D] from compact [B, T, D]; the cache's state moves on."""
        batch, frame = len(x), plan.frame
        z, tail = causal_convolution(self.streams(x), self.conv, None if cached is None else cached.conv, frame.counts)
        z = frame.enter(functional.silu(z)).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        gates = frame.enter(self.gates(x)).unflatten(-1, (self.num_heads, 4)).transpose(1, 2)
        streams = Streams(*z.flatten(1, 2), gates.flatten(0, 1))
        state = self.fresh(batch) if cached is None or cached.fast is None else cached.fast
        out, state = run_fast_weights(streams, state, plan.spans, plan.real)
        if cached is not None:
            cached.fast, cached.conv = state, tail
        return self.out(frame.leave(self.norm(out).unflatten(0, (batch, -1)).transpose(1, 2).flatten(-2)))

    def fresh(self, batch: int) -> FastWeights:
        """The learned state before the first token."""
        start = (
            self.start.to(torch.promote_types(self.start.dtype, torch.float32)).expand(batch, -1, -1, -1).flatten(0, 1)
        )
        return FastWeights(start, start if self.self_referential else None)


def causal_convolution(
    x: torch.Tensor, weight: torch.Tensor, before: torch.Tensor | None, counts: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """y_t = sum_i w_i x_{t - k + 1 + i} for every channel.

    Args:
        x: [B, T, C]. Not modified.
        weight: [C, k].
        before: [B, k - 1, C] inputs before the first, or None for zeros.
        counts: [B] int64 on the CPU, inputs of each sequence that are real; they come first.

    Returns:
        y [B, T, C], and the last k - 1 real inputs [B, k - 1, C].

    Example:
        >>> y, tail = causal_convolution(torch.ones(1, 3, 1), torch.ones(1, 2), None, torch.tensor([3]))
        >>> y.flatten().tolist(), tail.flatten().tolist()
        ([1.0, 2.0, 2.0], [1.0])
    """
    batch, length, channels = x.shape
    reach = weight.shape[1] - 1
    padded = functional.pad(x, (0, 0, reach, 0)) if before is None else torch.cat([before.to(x.dtype), x], dim=1)
    # Rows of channels are what 2-D convolutions call channels-last, which is 25 times faster than conv1d on CPUs.
    y = functional.conv2d(padded.transpose(1, 2).unsqueeze(2), weight[:, None, None], groups=channels)
    y = y.squeeze(2).transpose(1, 2)
    if bool((counts == length).all()):
        return y, padded[:, length:]
    places = (counts[:, None] + torch.arange(reach)).to(x.device)
    return y, padded[torch.arange(batch, device=x.device)[:, None], places]


class Block(GradientCheckpointingLayer):
    """x + fast weights, then the persistent levels.

    Args:
        config: a `HopeConfig`.
    """

    def __init__(self, config):
        super().__init__()
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.memory = SelfModifyingMemory(config)
        self.levels = Levels(config.hidden_size, config.level_sizes, config.level_periods, config.rms_norm_eps)

    def forward(self, x: torch.Tensor, plan: Plan, cached: HopeCacheLayer | None = None) -> torch.Tensor:
        """[B, T, D] from compact [B, T, D]."""
        return self.levels(x + self.memory(self.norm(x), plan, cached))


def start_decays(num_heads: int) -> torch.Tensor:
    """[H] bias of the decay gate, from fast heads to slow ones.

    Example:
        >>> start_decays(3).tolist()
        [2.0, 4.0, 6.0]
    """
    return torch.linspace(*START_DECAY, num_heads)


def start_taps(channels: int, size: int) -> torch.Tensor:
    """[3 D, k] taps of the convolution: queries and values of this token, keys of the one before.

    With projections of keys that start as those of queries, a token's query finds what followed the same token before.

    Example:
        >>> start_taps(3, 4).tolist()
        [[0.0, 0.0, 0.0, 1.0], [0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]]
    """
    taps = torch.zeros(3, channels // 3, size)
    taps[0, :, -1] = taps[1, :, max(size - 2, 0)] = taps[2, :, -1] = 1.0
    return taps.flatten(0, 1)


def residual_scale(num_layers: int, branches: int) -> float:
    """Factor of what is added to the residual stream at the start: 1 / sqrt(number of additions)."""
    return 1 / math.sqrt(num_layers * branches)
