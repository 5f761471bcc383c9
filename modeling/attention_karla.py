"""Keys and values of the head: several backbone layers of the last W positions, and a few learned registers.

Keys and values depend on the backbone alone, so they are computed once and every tick only asks them new questions.
Symbols: B batch, T positions, S source layers, H heads, d head width, W window, R registers, G queries per position.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from .bitlinear_karla import BitLinear


def rotate(x: torch.Tensor, position_ids: torch.Tensor, theta: float = 1000.0) -> torch.Tensor:
    """Rotary position embedding (https://arxiv.org/abs/2104.09864), halves rotated against each other.

    Args:
        x: [B, T, ..., d], d even. Not modified.
        position_ids: [B, T] int64.
        theta: base of the wavelengths; 1000 suits windows of some hundred positions.

    Returns:
        As `x`.
    """
    half = x.shape[-1] // 2
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    frequency = theta ** (-torch.arange(half, dtype=dtype, device=x.device) / half)
    angle = position_ids.to(dtype)[..., None] * frequency
    angle = angle.view(*position_ids.shape, *[1] * (x.dim() - 3), half)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class WindowBlocks(NamedTuple):
    """Keys and values cut into blocks of queries, ready for one attention call per tick.

    Attributes:
        keys: [B * N, H, L, d], N blocks of C queries; L = R + (C + W - 1) * S.
        values: as `keys`.
        mask: [B * N, 1, C, L] bool, True where a query may look.
        batch: B.
        length: number T' of query positions, the last ones of the sequence.
    """

    keys: torch.Tensor
    values: torch.Tensor
    mask: torch.Tensor
    batch: int
    length: int

    def attend(self, queries: torch.Tensor) -> torch.Tensor:
        """Scaled dot-product attention of every position over its window.

        Args:
            queries: [B, T', G, H, d].

        Returns:
            [B, T', G, H * d]; each position depends on its own window only.
        """
        groups, heads, width = queries.shape[2:]
        block = self.mask.shape[2]
        pad = -self.length % block
        q = nn.functional.pad(queries, (0, 0, 0, 0, 0, 0, 0, pad))
        q = q.reshape(-1, block * groups, heads, width).transpose(1, 2)
        mask = self.mask.repeat_interleave(groups, dim=2) if groups > 1 else self.mask
        out = nn.functional.scaled_dot_product_attention(q, self.keys, self.values, attn_mask=mask)
        out = out.transpose(1, 2).reshape(self.batch, self.length + pad, groups, heads * width)
        return out[:, : self.length]


def cut_blocks(
    keys_values: torch.Tensor, valid: torch.Tensor, registers: torch.Tensor, length: int, window: int
) -> WindowBlocks:
    """Cut a sequence of keys and values into blocks of queries that see their last `window` positions.

    Args:
        keys_values: [B, T, S, 2, H, d] of all positions within reach, oldest first. Not modified.
        valid: [B, T] bool, False at padding.
        registers: [R, 2, H, d], seen by every query.
        length: number T' of query positions, the last ones.
        window: W, positions seen, the query's own included.

    Returns:
        The blocks.
    """
    batch, total = valid.shape
    block = min(length, window)
    blocks = -(-length // block)
    reach = window - 1
    left = reach - (total - length)  # missing positions before the first query's window
    right = blocks * block - length
    if left < 0:
        keys_values, valid, left = keys_values[:, -left:], valid[:, -left:], 0
    keys_values = nn.functional.pad(keys_values, (0, 0, 0, 0, 0, 0, 0, 0, left, right))
    valid = nn.functional.pad(valid, (left, right))
    span = block + reach
    cut = keys_values.unfold(1, span, block).permute(0, 1, 6, 2, 3, 4, 5)  # [B, N, span, S, 2, H, d]
    seen = valid.unfold(1, span, block)  # [B, N, span]
    query = torch.arange(block, device=valid.device)[:, None]
    key = torch.arange(span, device=valid.device)[None]
    band = (key >= query) & (key <= query + reach)
    mask = (seen[:, :, None] & band)[..., None].expand(-1, -1, -1, -1, keys_values.shape[2])
    mask = nn.functional.pad(mask.reshape(batch * blocks, 1, block, -1), (len(registers), 0), value=True)
    always = registers.expand(batch * blocks, *registers.shape)
    cut = torch.cat([always, cut.reshape(batch * blocks, -1, *registers.shape[1:])], dim=1)
    keys, values = cut.permute(2, 0, 3, 1, 4).unbind(0)
    return WindowBlocks(keys.contiguous(), values.contiguous(), mask, batch, length)


class SourceMemory(nn.Module):
    """Projects backbone states of several layers to keys and values.

    One ternary projection serves all source layers; a learned embedding per layer tells them apart.

    Args:
        hidden_size: width D of the backbone's states.
        size: E = H * d, width of keys and of values.
        num_heads: H.
        num_sources: S.
        num_registers: R.
        packed: build packed ternary weights.
    """

    def __init__(
        self, hidden_size: int, size: int, num_heads: int, num_sources: int, num_registers: int, packed: bool = False
    ):
        super().__init__()
        self.num_heads = num_heads
        self.project = BitLinear(hidden_size, 2 * size, packed=packed)
        self.layer_embedding = nn.Parameter(torch.empty(num_sources, 2 * size))
        self.registers = nn.Parameter(torch.empty(num_registers, 2, num_heads, size // num_heads))

    def forward(self, sources: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """Keys and values of every position.

        Args:
            sources: [B, T, S, D] backbone states. Not modified.
            position_ids: [B, T] int64.

        Returns:
            [B, T, S, 2, H, d]; keys are rotated to their position.
        """
        projected = self.project(sources) + self.layer_embedding.to(sources.dtype)
        keys, values = projected.unflatten(-1, (2, self.num_heads, -1)).unbind(3)
        return torch.stack([rotate(keys, position_ids), values], dim=3)
