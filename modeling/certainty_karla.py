"""Certainty of a thought, the rule that ends it, and the loss that trains it.

Certainty (CTM, https://arxiv.org/abs/2505.05522, section 2.5) is 1 - H(p) / log K over the K tokens that are likeliest
before thinking. The candidates are fixed before the first tick, so certainty costs K dot products a tick, not a
vocabulary's.
"""

from __future__ import annotations

import math

import torch
from torch import nn


def certainty(logits: torch.Tensor) -> torch.Tensor:
    """1 - entropy / log K of the softmax over the last dimension.

    Args:
        logits: [..., K], K >= 2. Not modified.

    Returns:
        [...] in [0, 1], 1 for a sure answer.

    Example:
        >>> [round(c, 3) for c in certainty(torch.tensor([[0.0, 0.0], [90.0, 0.0]])).tolist()]
        [0.0, 1.0]
    """
    log_p = logits.log_softmax(-1)
    return 1.0 + (log_p.exp() * log_p).sum(-1) / math.log(logits.shape[-1])


class Candidates:
    """The K likeliest tokens of every position before thinking, and their logits after any change of the state.

    Args:
        state: [n, D] states before thinking.
        output_embeddings: [V, D] scaled rows of the output layer.
        bias: [V] or None.
        count: K, at most V.
        labels: [n] tokens that must be among the candidates (they come first), or None.
    """

    def __init__(
        self,
        state: torch.Tensor,
        output_embeddings: torch.Tensor,
        bias: torch.Tensor | None,
        count: int,
        labels: torch.Tensor | None = None,
    ):
        logits = nn.functional.linear(state.to(output_embeddings.dtype), output_embeddings, bias)
        if labels is not None:
            logits.scatter_(-1, labels[:, None], torch.inf)  # sorts the label first
        index = logits.topk(min(count, logits.shape[-1]), dim=-1).indices
        self.embeddings = output_embeddings[index]  # [n, K, D]
        self.bias = None if bias is None else bias[index]

    def logits(self, state: torch.Tensor) -> torch.Tensor:
        """Logits [n, K] of the candidates for states [n, D]."""
        logits = torch.einsum("nkd,nd->nk", self.embeddings, state.to(self.embeddings.dtype))
        return (logits if self.bias is None else logits + self.bias).float()


class StoppingRule:
    """Decides at every tick which positions have their answer.

    With a threshold, a position stops at its first tick whose certainty reaches it, tick 0 (no thought) included;
    its answer is that tick's. Without one, or if it is never reached, the answer is the last tick's, or with
    `most_certain` the most certain one's.

    Args:
        candidates: of the n positions.
        state: [n, D] states before thinking.
        threshold: certainty in [0, 1], or None.
        most_certain: whether the most certain tick answers instead of the last.

    Attributes:
        delta: [n, D] answers so far, as a change of the state.
        ticks_used: [n] int64 ticks thought.
        certainty: [n] float32 of the answers.
        done: [n] bool.
    """

    def __init__(self, candidates: Candidates, state: torch.Tensor, threshold: float | None, most_certain: bool):
        self.candidates, self.state, self.threshold, self.most_certain = candidates, state, threshold, most_certain
        self.delta = torch.zeros_like(state)
        self.ticks_used = torch.zeros(len(state), dtype=torch.int64, device=state.device)
        self.certainty = certainty(candidates.logits(state))
        self.done = torch.zeros(len(state), dtype=torch.bool, device=state.device)
        self._stop()

    def __call__(self, tick: int, delta: torch.Tensor) -> bool:
        """Take in the delta of a tick, of any shape with n * D entries; True when every position is done."""
        delta = delta.reshape(self.delta.shape)
        reached = certainty(self.candidates.logits(self.state + delta))
        better = ~self.done
        if self.most_certain and tick > 1:
            better = better & (reached > self.certainty)
        self.delta = torch.where(better[:, None], delta, self.delta)
        self.certainty = torch.where(better, reached, self.certainty)
        self.ticks_used = torch.where(self.done, self.ticks_used, tick)
        self._stop()
        return bool(self.done.all())

    def _stop(self) -> None:
        if self.threshold is not None:
            self.done = self.done | (self.certainty >= self.threshold)


def two_tick_loss(
    state: torch.Tensor,
    deltas: torch.Tensor,
    labels: torch.Tensor,
    output_embeddings: torch.Tensor,
    bias: torch.Tensor | None = None,
    count: int = 64,
) -> torch.Tensor:
    """Mean of the cross-entropies at each position's best and most certain tick (CTM, section 2.5).

    The two ticks are chosen over candidate tokens; the full vocabulary is evaluated at those two only.

    Args:
        state: [n, D] states before thinking.
        deltas: [S, n, D] changes after every tick; gradients flow into them.
        labels: [n] int64.
        output_embeddings: [V, D] scaled rows of the output layer.
        bias: [V] or None.
        count: candidates.

    Returns:
        [n] losses in nats, unreduced.
    """
    with torch.no_grad():
        candidates = Candidates(state, output_embeddings, bias, count, labels)
        logits = torch.stack([candidates.logits(state + delta) for delta in deltas])  # [S, n, K], label first
        best = (logits[..., 0] - logits.logsumexp(-1)).argmax(0)
        surest = certainty(logits).argmax(0)
    position = torch.arange(len(labels), device=labels.device)
    losses = []
    for tick in (best, surest):
        full = nn.functional.linear(
            (state + deltas[tick, position]).to(output_embeddings.dtype), output_embeddings, bias
        )
        losses.append(nn.functional.cross_entropy(full.float(), labels, reduction="none"))
    return (losses[0] + losses[1]) / 2
