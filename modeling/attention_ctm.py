"""Attention with one query per tick over keys and values that stay the same."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from torch.autograd.function import once_differentiable


class _Late:
    """Factors of the features' gradient, sum over ticks of left^T right, collected during one backward pass."""

    def __init__(self):
        self.task, self.factors = -1, []

    def add(self, left: torch.Tensor, right: torch.Tensor) -> None:
        task = torch._C._current_graph_task_id()
        if task != self.task:  # what an earlier pass over the same graph has left
            self.task, self.factors = task, []
        self.factors.append((left, right))

    def total(self) -> torch.Tensor | None:
        """The gradient, in one product over all ticks; None if no tick of this backward pass has added to it."""
        factors, self.factors = self.factors, []
        if not factors or self.task != torch._C._current_graph_task_id():
            return None
        left, right = (torch.cat(parts, dim=1) for parts in zip(*factors, strict=True))
        return torch.bmm(left.transpose(1, 2), right)


class _Share(torch.autograd.Function):
    """Features that all ticks look at; their gradient is made when the last tick has been passed."""

    @staticmethod
    def forward(ctx, features, late):
        ctx.set_materialize_grads(False)
        ctx.late = late
        return features.view_as(features)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return ctx.late.total(), None


class _Look(torch.autograd.Function):
    """softmax(q x^T) x for queries [B, H, E] and features x [B, S, E], and the weights [B, H, S].

    The gradient of x, 2 H outer products per tick, is only collected: added up tick by tick it would cost more than all
    the rest of the attention.
    """

    @staticmethod
    def forward(ctx, query, features, late):
        weights = torch.bmm(query, features.transpose(1, 2)).softmax(-1)
        ctx.late = late
        ctx.save_for_backward(query, features, weights)
        ctx.mark_non_differentiable(weights)
        return torch.bmm(weights, features), weights

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient, _):
        query, features, weights = ctx.saved_tensors
        of_weights = torch.bmm(gradient, features.transpose(1, 2))
        of_scores = weights * (of_weights - (of_weights * weights).sum(-1, keepdim=True))
        if ctx.needs_input_grad[1]:
            ctx.late.add(torch.cat([weights, of_scores], dim=1), torch.cat([gradient, query], dim=1))
        return torch.bmm(of_scores, features), None, None


class Memory(NamedTuple):
    """What all ticks attend to.

    Attributes:
        keys: [B, H, S, d], or the features [B, S, E] themselves.
        values: as `keys`.
        query: weight [E, E] and bias [E] of the queries.
        value_bias: [E].
        projections: if `keys` are features, the weights of keys [H, d, E], scaled, and of values [H, E, d]; else None.
        late: collects what makes the gradient of the features, if `keys` are features.
    """

    keys: torch.Tensor
    values: torch.Tensor
    query: tuple[torch.Tensor, torch.Tensor]
    value_bias: torch.Tensor
    projections: tuple[torch.Tensor, torch.Tensor] | None = None
    late: _Late | None = None


class TickAttention(nn.Module):
    """`nn.MultiheadAttention` of one query at a time over the same S features, with its parameters.

    Scores are q_h . (W_K,h x_s), which are (W_K,h^T q_h) . x_s, and outputs sum_s p_s W_V,h x_s, which are
    W_V,h sum_s p_s x_s. So either the features are projected once, at S E^2 multiplications, or the queries and outputs of
    every tick are, and attention runs over the features, H times as wide as the keys of a head: whichever is less. A bias
    of the keys shifts all scores of a query alike and has no effect, so it is left out.

    Args:
        size: E = H * d.
        num_heads: H.
        dropout: rate at the attention weights.
    """

    def __init__(self, size: int, num_heads: int, dropout: float):
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.in_weight = nn.Parameter(torch.empty(3 * size, size))
        self.in_bias = nn.Parameter(torch.zeros(3 * size))
        self.out = nn.Linear(size, size)

    def remember(self, features: torch.Tensor, num_ticks: int) -> Memory:
        """Prepare features [B, S, E] for `num_ticks` queries each."""
        size = features.shape[-1]
        query_weight, key_weight, value_weight = self.in_weight.chunk(3)
        query_bias, _, value_bias = self.in_bias.chunk(3)
        key_weight = key_weight * (size // self.num_heads) ** -0.5
        fixed = {"query": (query_weight, query_bias), "value_bias": value_bias}
        dropping = self.dropout > 0 and self.training  # the bias would have to be dropped with the weights
        if num_ticks * self.num_heads < size and not dropping:
            weights = [weight.unflatten(0, (self.num_heads, -1)) for weight in (key_weight, value_weight)]
            late = _Late()
            features = _Share.apply(features, late)
            return Memory(features, features, **fixed, projections=(weights[0], weights[1].transpose(1, 2)), late=late)
        keys = nn.functional.linear(features, key_weight)
        values = nn.functional.linear(features, value_weight, value_bias)
        keys, values = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (keys, values))
        return Memory(keys, values, **fixed)

    def forward(self, query: torch.Tensor, memory: Memory) -> tuple[torch.Tensor, torch.Tensor]:
        """Attend once.

        Args:
            query: [B, E].
            memory: from `remember`.

        Returns:
            [B, E], and the attention weights [B, H, S], without a gradient.
        """
        query = nn.functional.linear(query, *memory.query).unflatten(-1, (self.num_heads, -1))  # [B, H, d]
        if memory.projections is None:
            weights = (query[:, :, None] @ memory.keys.transpose(2, 3)).softmax(-1)
            kept = nn.functional.dropout(weights, self.dropout, self.training) if self.dropout else weights
            return self.out((kept @ memory.values).flatten(1)), weights[:, :, 0].detach()
        key_weight, value_weight = memory.projections
        query = torch.bmm(query.transpose(0, 1), key_weight).transpose(0, 1)  # [B, H, E]
        seen, weights = _Look.apply(query, memory.keys, memory.late)
        seen = torch.bmm(seen.transpose(0, 1), value_weight)  # [H, B, d]
        return self.out(seen.transpose(0, 1).flatten(1) + memory.value_bias), weights
