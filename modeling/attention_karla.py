"""Keys and values of the head: several backbone layers of the last W positions, and a few learned registers.

Keys and values depend on the backbone alone, so they are computed once and every tick only asks them new questions.
Symbols: B batch, T positions, S source layers, H heads, d head width, W window, R registers, G queries per position.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from .bitlinear_karla import BitLinear


def rotations(position_ids: torch.Tensor, width: int, dtype: torch.dtype, theta: float = 1000.0) -> torch.Tensor:
    """Unit complex numbers of the rotary position embedding (https://arxiv.org/abs/2104.09864).

    Args:
        position_ids: [B, T] int64.
        width: d, even.
        dtype: of what is rotated; float64 gives complex128, everything else complex64.
        theta: base of the wavelengths; 1000 suits windows of some hundred positions.

    Returns:
        [B, T, d / 2] complex: exp(i p theta^(-2k/d)).
    """
    real = torch.float64 if dtype == torch.float64 else torch.float32
    frequency = theta ** (-torch.arange(width // 2, dtype=real, device=position_ids.device) / (width // 2))
    angle = position_ids.to(real)[..., None] * frequency
    return torch.polar(torch.ones_like(angle), angle)


def rotate(x: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """Turn neighbouring pairs of coordinates; `x` [..., d] float is not modified, `turn` broadcasts to [..., d / 2]."""
    pairs = torch.view_as_complex(x.to(turn.real.dtype).unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)


class WindowBlocks(NamedTuple):
    """Keys and values cut into blocks of queries, ready for one attention call per tick.

    Attributes:
        keys: [B * N, H, L, d], N blocks of C queries; L = R + S * (positions that a block can reach).
        values: as `keys`.
        mask: [B * N, 1, C, L], 0 where a query may look and -inf elsewhere.
        turn: [B, T', 1, 1, d / 2] complex, rotation of the queries.
        slot: after `keep`, [B * N * C] int64: the query in every place of a block (the last one again where it has fewer).
        place: after `keep`, [B * T'] int64: the place of every query.
    """

    keys: torch.Tensor
    values: torch.Tensor
    mask: torch.Tensor
    turn: torch.Tensor
    slot: torch.Tensor | None = None
    place: torch.Tensor | None = None

    def attend(self, queries: torch.Tensor) -> torch.Tensor:
        """Scaled dot-product attention of every position over its window.

        Args:
            queries: [B, T', G, H, d], not rotated.

        Returns:
            [B, T', G, H * d]; each position depends on its own window only.
        """
        batch, length, groups, heads, width = queries.shape
        block = self.mask.shape[2]
        q, pad = rotate(queries, self.turn), 0
        if self.slot is not None:
            q = q.flatten(0, 1).index_select(0, self.slot)
        elif pad := -length % block:
            q = nn.functional.pad(q, (0, 0, 0, 0, 0, 0, 0, pad))
        q = q.reshape(-1, block * groups, heads, width).transpose(1, 2)
        mask = self.mask.repeat_interleave(groups, dim=2) if block > 1 else self.mask.expand(-1, -1, groups, -1)
        out = nn.functional.scaled_dot_product_attention(q, self.keys, self.values, attn_mask=mask).transpose(1, 2)
        if self.place is not None:
            out = out.reshape(-1, groups, heads * width).index_select(0, self.place)
            return out.view(batch, length, groups, -1)
        return out.reshape(batch, length + pad, groups, heads * width)[:, :length]

    def keep(self, rows: torch.Tensor) -> WindowBlocks:
        """The blocks for some of the queries only: blocks without any are dropped, and blocks are as long as the fullest.

        Args:
            rows: [n] int64, ascending: which of the B * T' queries, at least one.

        Returns:
            Blocks whose `attend` takes queries [n, 1, G, H, d].
        """
        block = self.mask.shape[2]
        if self.place is None:
            length = self.turn.shape[1]
            place = rows // length * (-(-length // block) * block) + rows % length
        else:
            place = self.place[rows]
        kept, number, counts = torch.unique_consecutive(place // block, return_inverse=True, return_counts=True)
        size, first = int(counts.max()), counts.cumsum(0) - counts
        slot = first[:, None] + torch.arange(size, device=rows.device)
        slot = torch.minimum(slot, (first + counts - 1)[:, None])
        keys, values = self.keys, self.values
        if len(kept) < len(keys):
            keys, values = keys.index_select(0, kept), values.index_select(0, kept)
        mask = self.mask[kept[:, None], 0, place[slot] % block][:, None]
        turn = self.turn.flatten(0, 1).index_select(0, rows)[:, None]
        place = number * size + torch.arange(len(rows), device=rows.device) - first[number]
        return WindowBlocks(keys, values, mask, turn, slot.flatten(), place)


def cut_blocks(
    keys_values: torch.Tensor,
    valid: torch.Tensor,
    registers: torch.Tensor,
    position_ids: torch.Tensor,
    window: int,
) -> WindowBlocks:
    """Cut a sequence of keys and values into blocks of queries that see their last `window` positions.

    Args:
        keys_values: [B, 2, H, T, S, d] of all positions within reach, oldest first. Not modified.
        valid: [B, T] bool, False at padding.
        registers: [2, H, R, d], seen by every query.
        position_ids: [B, T'] of the queries, which are the last T' positions.
        window: W, positions seen, the query's own included.

    Returns:
        The blocks.
    """
    window = min(window, valid.shape[1])  # no query sees more; short texts would drag empty keys along
    cut = _cut_one if position_ids.shape[1] == 1 else _cut_many
    keys, values, mask = cut(keys_values, valid, registers, position_ids.shape[1], window)
    turn = rotations(position_ids, keys.shape[-1], keys.dtype)[:, :, None, None]
    return WindowBlocks(keys, values, mask.to(keys.dtype), turn)


def _cut_one(keys_values, valid, registers, _, window: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys, values and mask of one query each: a block is what the window holds, and nothing is masked but padding."""
    sources, valid = keys_values.shape[4], valid[:, -window:]
    seen = keys_values[:, :, :, -window:].flatten(3, 4)  # [B, 2, H, W * S, d]
    always = registers.expand(len(valid), -1, -1, -1, -1)
    keys, values = (torch.cat([always[:, i], seen[:, i]], dim=2) for i in range(2))
    hidden = nn.functional.pad(~valid[..., None].expand(-1, -1, sources).flatten(1), (registers.shape[2], 0))
    mask = torch.zeros(hidden.shape, device=valid.device).masked_fill_(hidden, -torch.inf)
    return keys, values, mask[:, None, None]


def _cut_many(
    keys_values, valid, registers, length: int, window: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys, values and mask of any number of queries; arguments are those of `cut_blocks`."""
    batch, total = valid.shape
    block = min(length, window)
    blocks = -(-length // block)
    reach = window - 1
    left = reach - (total - length)  # missing positions before the first query's window
    if left < 0:
        keys_values, valid, left = keys_values[:, :, :, -left:], valid[:, -left:], 0
    right = blocks * block - length
    if blocks > 1 or left or right:
        keys_values = nn.functional.pad(keys_values, (0, 0, 0, 0, left, right))
        valid = nn.functional.pad(valid, (left, right))
    span = block + reach
    cut = keys_values.unfold(3, span, block).permute(1, 0, 3, 2, 6, 4, 5)  # [2, B, N, H, span, S, d]
    cut = cut.reshape(2, batch * blocks, cut.shape[3], -1, cut.shape[-1])
    always = registers[:, None].expand(-1, batch * blocks, -1, -1, -1)
    keys, values = torch.cat([always, cut], dim=3).unbind(0)
    mask = _band(valid.unfold(1, span, block), block, reach, keys_values.shape[4], registers.shape[2])
    return keys, values, mask


def _band(seen: torch.Tensor, block: int, reach: int, num_sources: int, num_registers: int) -> torch.Tensor:
    """[B * N, 1, C, R + span * S]: 0 within the window and at registers, -inf elsewhere. `seen` is [B, N, span]."""
    query = torch.arange(block, device=seen.device)[:, None]
    key = torch.arange(seen.shape[-1], device=seen.device)[None]
    allowed = seen[:, :, None] & (key >= query) & (key <= query + reach)
    allowed = (
        allowed[..., None].expand(-1, -1, -1, -1, num_sources).reshape(-1, 1, block, seen.shape[-1] * num_sources)
    )
    allowed = nn.functional.pad(allowed, (num_registers, 0), value=True)
    return torch.zeros(allowed.shape, device=seen.device).masked_fill_(~allowed, -torch.inf)


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
        self.registers = nn.Parameter(torch.empty(2, num_heads, num_registers, size // num_heads))

    def forward(self, sources: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """Keys and values of every position.

        Args:
            sources: [B, T, S, D] backbone states. Not modified.
            position_ids: [B, T] int64.

        Returns:
            [B, 2, H, T, S, d]; keys are rotated to their position.
        """
        projected = self.project(sources) + self.layer_embedding.to(sources.dtype)
        keys, values = projected.unflatten(-1, (2, self.num_heads, -1)).permute(3, 0, 4, 1, 2, 5).unbind(0)
        turn = rotations(position_ids, keys.shape[-1], keys.dtype)[:, None, :, None]  # [B, 1, T, 1, d / 2]
        return torch.stack([rotate(keys, turn), values], dim=1)
