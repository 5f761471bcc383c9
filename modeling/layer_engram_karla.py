"""Trained rows: the Engram module of the paper, inserted before early blocks of the frozen backbone.

"Conditional Memory via Scalable Lookup" (Engram, https://arxiv.org/abs/2601.07372), sections 2.2 and 2.3, one branch:

    e_t = concat over orders n and heads j of table[offset_{n,j} + mix_n(t) mod prime_{n,j}]
    s = <RMSNorm(h), RMSNorm(W_K e)> / sqrt(D)        alpha = sigmoid(sign(s) sqrt(max(|s|, 1e-6)))
    v = alpha W_V e        Y = v + SiLU(conv(RMSNorm(v)))        h <- h + Y   (before attention and MLP of the block)

`conv` is causal and depthwise, with kernel 4 and the longest order as dilation. The paper starts it at zero; here W_V starts
at zero too, so that a fresh module changes no bit of the backbone. Rows are trained by gradients; what is learned by reading
lies elsewhere (`engram_karla`).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.functional import pad, silu
from transformers.cache_utils import Cache

from .cache_karla import RowsCacheLayer, karla_layer
from .hashing_karla import HashConstants, NgramFamily, hash_constants, row_addresses
from .sentences_karla import NO_TOKEN


KERNEL = 4
_LAYER_SEED_STRIDE = 10007
_LEAST_SCORE = 1e-6


class HashedRows(nn.Embedding):
    """One table of trained rows for all inserted modules. It stays on the CPU and has sparse gradients.

    The constants of the hash are buffers: saved with the rows, loaded with them, and never derived again.

    Args:
        config: a `KarlaConfig` with `engram_layer_ids`.

    Attributes:
        weight: [R, head_dim] the rows of all layers, orders and heads.
        multipliers: [L, longest order] int64, odd; of each layer.
        primes: [L * F, H] int64 rows of each head's part, all distinct.
        offsets: [L * F, H] int64 where it begins.
        token_map: [V] int64 compressed ids, see `compress_vocabulary`.
        pad_id: [] int64 compressed id that is hashed where there is no token.
    """

    def __init__(self, config):
        self.orders, self.layer_ids = list(config.engram_layer_orders), list(config.engram_layer_ids)
        self.sizes = (config.engram_layer_num_heads, config.engram_layer_rows_per_head)
        self.seed = config.engram_seed
        with torch.device("cpu"):  # also while the rest is built on the meta device
            constants = self._draw(torch.arange(config.text_config.vocab_size), pad_id=0)
        super().__init__(int(constants["primes"].sum()), config.engram_layer_head_dim, sparse=True)
        for name, value in constants.items():
            self.register_buffer(name, value)

    def _draw(self, token_map: torch.Tensor, pad_id: int) -> dict[str, torch.Tensor]:
        heads, rows = self.sizes
        seeds = [self.seed + _LAYER_SEED_STRIDE * layer for layer in self.layer_ids]
        orders = self.orders * len(seeds)  # one draw of primes for all layers, so that no two are equal
        drawn = [hash_constants(orders, heads, rows, token_map, pad_id, seed) for seed in seeds]
        return {
            "multipliers": torch.stack([constants.multipliers for constants in drawn]),
            "primes": drawn[0].primes,
            "offsets": drawn[0].offsets,
            "token_map": token_map,
            "pad_id": torch.tensor(drawn[0].pad_id),
        }

    def use_token_map(self, token_map: torch.Tensor, pad_id: int) -> None:
        """Draw the constants anew for a vocabulary [V] int64 and its token id `pad_id`; for untrained rows."""
        for name, value in self._draw(token_map, pad_id).items():
            self.get_buffer(name).copy_(value)

    def compress(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Compressed ids [B, T] int64 on the CPU, `NO_TOKEN` where `attention_mask` [B, T] is 0."""
        compressed = self.token_map.cpu()[input_ids.cpu()]
        return compressed if attention_mask is None else compressed.masked_fill(attention_mask.cpu() == 0, NO_TOKEN)

    def addresses(self, history: torch.Tensor) -> torch.Tensor:
        """Rows of every position.

        Args:
            history: [B, S - 1 + T] int64 compressed ids, S the longest order, `NO_TOKEN` where there is none.

        Returns:
            [B, T, L * F, H] int64 in [0, R), layer by layer.
        """
        tokens, longest = history.cpu().masked_fill(history.cpu() == NO_TOKEN, int(self.pad_id)), max(self.orders)
        mix = [
            NgramFamily(order, 1.0).mix(tokens, multipliers)[:, longest - order :]
            for multipliers in self.multipliers.cpu()
            for order in self.orders
        ]
        own = (self.multipliers, self.primes.cpu(), self.offsets.cpu(), self.token_map)
        return row_addresses(torch.stack(mix, dim=-1), HashConstants(*own, pad_id=int(self.pad_id)))

    def forward(self, history: torch.Tensor) -> torch.Tensor:
        """Gather the rows of every position: [B, T, L, F * H * head_dim]. `history` as for `addresses`."""
        rows = super().forward(self.addresses(history).to(self.weight.device))
        return rows.unflatten(2, (len(self.layer_ids), -1)).flatten(3)

    def _apply(self, fn, recurse=True):
        """Take a new dtype, but stay on the CPU: a large table would not fit elsewhere."""
        if self.weight.is_meta:
            return super()._apply(fn, recurse)
        dtype = fn(torch.empty(0, dtype=self.weight.dtype)).dtype
        return super()._apply(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor, recurse)


class RowGate(nn.Module):
    """Gate, value projection and short convolution of one inserted module.

    Args:
        hidden_size: D.
        width: E = F * H * head_dim.
        dilation: steps between the taps of the convolution.

    Attributes:
        conv: [KERNEL, D] taps of the convolution, the oldest first.
    """

    def __init__(self, hidden_size: int, width: int, dilation: int):
        super().__init__()
        self.dilation = dilation
        self.key = nn.Linear(width, hidden_size, bias=False)
        self.value = nn.Linear(width, hidden_size, bias=False)
        self.norm_query = nn.RMSNorm(hidden_size, eps=1e-5)
        self.norm_key = nn.RMSNorm(hidden_size, eps=1e-5)
        self.norm_value = nn.RMSNorm(hidden_size, eps=1e-5)
        self.conv = nn.Parameter(torch.empty(KERNEL, hidden_size))

    @property
    def zero_initialised(self) -> list[nn.Parameter]:
        """The weights that start at zero, so that a fresh module adds nothing."""
        return [self.value.weight, self.conv]

    def forward(
        self, hidden: torch.Tensor, rows: torch.Tensor, valid: torch.Tensor, past: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the module adds to the hidden states.

        Args:
            hidden: [B, T, D] before the block.
            rows: [B, T, E] gathered rows.
            valid: [B, T, 1] bool, False at padding.
            past: [B, (KERNEL - 1) * dilation, D] inputs of the convolution before these positions, zero where none were.

        Returns:
            Y [B, T, D], and the inputs of the convolution at these positions [B, T, D].
        """
        query, key = self.norm_query(hidden), self.norm_key(self.key(rows))
        score = (query * key).sum(-1, keepdim=True) / query.shape[-1] ** 0.5
        score = score.sign() * score.abs().clamp(min=_LEAST_SCORE).sqrt()
        value = (torch.sigmoid(score) * self.value(rows)).masked_fill(~valid, 0.0)
        new = self.norm_value(value)
        inputs, length = torch.cat([past, new], dim=1), hidden.shape[1]
        mixed = torch.zeros_like(value)
        for tap, weight in enumerate(self.conv):
            mixed = mixed + inputs[:, tap * self.dilation : tap * self.dilation + length] * weight
        return value + silu(mixed), new


@dataclass
class _Call:
    """One pass of the backbone: what its blocks add, and what they leave for the next pass."""

    rows: torch.Tensor
    valid: torch.Tensor
    past: torch.Tensor | None
    inputs: dict[int, torch.Tensor] = field(default_factory=dict)


class LayerEngram(nn.Module):
    """The trained rows and the modules that add them, inserted into a backbone with `insert`.

    Args:
        config: a `KarlaConfig` with `engram_layer_ids`.

    Example:
        >>> from transformers import GPT2Config, GPT2Model
        >>> from karla_hf import KarlaConfig
        >>> text = GPT2Config(n_embd=8, n_head=1, n_layer=2, vocab_size=9)
        >>> engram = LayerEngram(KarlaConfig(text_config=text, engram_layer_ids=[1], engram_layer_rows_per_head=20))
        >>> engram.insert(backbone := GPT2Model(text))
        >>> ids = torch.tensor([[1, 2, 3]])
        >>> with engram.reading(ids):
        ...     changed = backbone(ids).last_hidden_state
        >>> changed.shape
        torch.Size([1, 3, 8])
    """

    def __init__(self, config):
        super().__init__()
        self.rows = HashedRows(config)
        longest, heads = max(config.engram_layer_orders), config.engram_layer_num_heads
        width = len(config.engram_layer_orders) * heads * config.engram_layer_head_dim
        self.gates = nn.ModuleList(
            RowGate(config.text_config.hidden_size, width, longest) for _ in config.engram_layer_ids
        )
        self.reach, self.slack = (KERNEL - 1) * longest, config.ctm_window
        self._call: _Call | None = None
        self._handles: list = []

    def insert(self, backbone: nn.Module) -> None:
        """Hook the modules before their blocks of a backbone, and out of the backbone that they were in before.

        Outside `reading` the hooks do nothing. bitsandbytes packs 4-bit weights on some CPUs into a format that passes no
        gradient; that is switched off for this backbone.

        Raises:
            ValueError: if the blocks are not found, or the weights are packed already.
        """
        blocks = find_blocks(backbone)
        for module in backbone.modules():
            if getattr(getattr(getattr(module, "weight", None), "quant_state", None), "packing_format_for_cpu", False):
                raise ValueError(
                    "The backbone's 4-bit weights are packed for inference, so rows cannot be trained below them; load the "
                    "backbone anew and make the Karla before its first forward pass."
                )
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        for handle in self._handles:
            handle.remove()
        self._handles = [
            blocks[layer].register_forward_pre_hook(functools.partial(self._before_block, index), with_kwargs=True)
            for index, layer in enumerate(self.rows.layer_ids)
        ]

    def cache_layer(self, cache: Cache, past: int) -> RowsCacheLayer:
        """These modules' layer of a cache, appended if the cache held nothing (`past` 0) before."""
        return karla_layer(cache, keep=self.reach, slack=self.slack, past=past, kind=RowsCacheLayer)

    @contextlib.contextmanager
    def reading(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, cache: Cache | None = None, past=0
    ) -> Iterator[None]:
        """Let the modules take part in the backbone's pass over these tokens, inside `with`.

        Args:
            input_ids: [B, T] int64.
            attention_mask: [B, past + T], 0 at padding, or None.
            cache: where token history and inputs of the convolutions are kept, or None.
            past: positions that the cache held before.

        Raises:
            ValueError: if another model filled the cache.
        """
        mask = None if attention_mask is None else attention_mask[:, past:]
        new = self.rows.compress(input_ids, mask)
        layer = self.cache_layer(cache, past) if cache is not None and past else None
        history, inputs, before = new, None, max(self.rows.orders) - 1
        if layer is not None and layer.keys is not None:
            history = torch.cat([layer.values, new], dim=1)[:, -(before + new.shape[1]) :]
            inputs = layer.keys[:, 0, 0, -self.reach :]
        history = pad(history, (before + new.shape[1] - history.shape[1], 0), value=NO_TOKEN)
        device = self.gates[0].conv.device
        self._call = call = _Call(self.rows(history).to(device), (new != NO_TOKEN)[..., None].to(device), inputs)
        try:
            yield
        finally:
            self._call = None
        if cache is not None:
            states = torch.stack([call.inputs[index].to(device) for index in range(len(self.gates))], dim=2)
            self.cache_layer(cache, past).update(states[:, None, None], new)

    def _before_block(self, index: int, block: nn.Module, args: tuple, kwargs: dict):
        """Add a module's Y to the hidden states that a block is called with."""
        call = self._call
        if call is None:
            return None
        hidden, gate = args[0] if args else kwargs["hidden_states"], self.gates[index]
        state = hidden.to(gate.conv)
        past = state[:, :0] if call.past is None else call.past[:, :, index].to(state)
        past = pad(past, (0, 0, self.reach - past.shape[1], 0))
        added, call.inputs[index] = gate(state, call.rows[:, :, index].to(state), call.valid.to(state.device), past)
        hidden = hidden + added.to(hidden)
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})


def find_blocks(backbone: nn.Module) -> nn.ModuleList:
    """The decoder blocks of a backbone: its first ModuleList with one entry per hidden layer.

    Raises:
        ValueError: if there is none.
    """
    count = backbone.config.num_hidden_layers
    for module in backbone.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise ValueError(
        f"{type(backbone).__name__} has no list of {count} blocks to insert trained rows into; set engram_layer_ids to None."
    )
