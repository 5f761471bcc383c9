"""Certainty of a thought, and the rule that ends it.

Certainty (CTM, https://arxiv.org/abs/2505.05522, section 2.5) is 1 - H(p) / log K over the K tokens that are likeliest
before thinking. The candidates are fixed before the first tick, so certainty costs K dot products a tick, not a
vocabulary's.
"""

from __future__ import annotations

import math

import torch
from torch import nn


FEW = 8  # positions
LOGITS_CHUNK = 32  # positions whose logits are held at once: 19 MB for a vocabulary of 151,936


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

    Attributes:
        all_logits: [n, V] of the states before thinking, for a few positions; None for more than eight.
    """

    @torch.no_grad()
    def __init__(
        self,
        state: torch.Tensor,
        output_embeddings: torch.Tensor,
        bias: torch.Tensor | None,
        count: int,
        labels: torch.Tensor | None = None,
    ):
        index = []
        for at in range(0, max(len(state), 1), LOGITS_CHUNK):
            part = slice(at, at + LOGITS_CHUNK)
            logits = nn.functional.linear(state[part].to(output_embeddings.dtype), output_embeddings, bias)
            self.all_logits = logits if labels is None and len(state) <= FEW else None
            if labels is not None:
                logits.scatter_(-1, labels[part, None], torch.inf)  # sorts the label first
            index.append(logits.topk(min(count, logits.shape[-1]), dim=-1).indices)
            del logits
        self.index = torch.cat(index) if len(index) > 1 else index[0]
        self.embeddings = nn.functional.embedding(self.index, output_embeddings)  # [n, K, D]
        self.bias = None if bias is None else bias[self.index]

    def logits(self, state: torch.Tensor) -> torch.Tensor:
        """Logits [n, K] of the candidates for states [n, D]: float32, or float64 for a float64 output layer."""
        logits = torch.bmm(self.embeddings, state.to(self.embeddings.dtype)[..., None])[..., 0]
        logits = logits if self.bias is None else logits + self.bias
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def keep(self, rows: torch.Tensor) -> None:
        """Forget all positions but `rows` [n'] int64."""
        self.index, self.embeddings = self.index.index_select(0, rows), self.embeddings.index_select(0, rows)
        self.bias = None if self.bias is None else self.bias.index_select(0, rows)


class StoppingRule:
    """Decides at every tick which positions have their answer; these leave.

    With a threshold, a position stops at its first tick whose certainty reaches it, tick 0 (no thought) included;
    its answer is that tick's. Without one, or if it is never reached, the answer is the last tick's, or with
    `most_certain` the most certain one's.

    Decisions are made once. After `begin`, the same ticks may be thought again, as gradient checkpointing does, and end
    as they did, whatever rounding does to the certainties.

    Args:
        candidates: of the n positions; forgotten piece by piece.
        state: [n, D] states before thinking.
        threshold: certainty in [0, 1], or None.
        most_certain: whether the most certain tick answers instead of the last.

    Attributes:
        thinking: index [n'] int64 of the positions that think at all.
        ticks_used: [n] int64 ticks thought.
        certainty: [n] of the answers.
    """

    def __init__(self, candidates: Candidates, state: torch.Tensor, threshold: float | None, most_certain: bool):
        self._threshold, self._most_certain = threshold, most_certain
        self._candidates: Candidates | None = candidates
        self._state = state.detach()
        self._decisions: dict[int, tuple] = {}
        self._rows = torch.arange(len(state), device=state.device)
        self.ticks_used = torch.zeros_like(self._rows)
        self._sure = certainty(candidates.logits(self._state))
        self.certainty = self._sure.clone()
        self._leave(self._sure)
        self.thinking = self._rows
        self.begin()

    def begin(self) -> None:
        """Start, or start again."""
        self._best: torch.Tensor | None = None
        self._answers: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __call__(self, tick: int, delta: torch.Tensor) -> torch.Tensor | None:
        """Take in the deltas [n'', D] of a tick of the positions that still think.

        Returns:
            Which of them go on, as an index int64; None for all.
        """
        if tick not in self._decisions:
            with torch.no_grad():
                self._decisions[tick] = self._decide(tick, delta.detach())
        better, left = self._decisions[tick]
        if better is not None and self._best is not None:
            delta = torch.where(better[:, None], delta, self._best)
        self._best = delta
        if left is None:
            return None
        done, going, rows = left
        self._answers.append((rows, self._best.index_select(0, done)))
        self._best = self._best.index_select(0, going)
        return going

    def answer(self, state: torch.Tensor) -> torch.Tensor:
        """The answers [n, D] as changes of the states, in the dtype and on the device of `state` [n, D]."""
        self._candidates = None
        rows, deltas = zip(*self._answers, (self._rows, self._best), strict=True)
        if len(rows) == 1 and len(self._rows) == len(state):
            return deltas[0]
        return torch.zeros_like(state).index_copy(0, torch.cat(rows), torch.cat(deltas))

    def _decide(self, tick: int, delta: torch.Tensor) -> tuple:
        """Where this tick is better than all before (None: everywhere), and who leaves with it (None: nobody)."""
        assert self._candidates is not None
        reached, better = certainty(self._candidates.logits(self._state + delta)), None
        if self._most_certain and tick > 1:
            better = reached > self._sure
            reached = torch.where(better, reached, self._sure)
        self.certainty[self._rows], self.ticks_used[self._rows] = reached, tick
        self._sure = reached
        return better, self._leave(reached)

    def _leave(self, reached: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """Forget the positions that have their answer: these among those left so far, the others, and their numbers."""
        done = None if self._threshold is None else reached >= self._threshold
        if done is None or not bool(done.any()):
            return None
        stopped, going = done.nonzero()[:, 0], (~done).nonzero()[:, 0]
        rows, self._rows = self._rows[stopped], self._rows[going]
        assert self._candidates is not None
        self._candidates.keep(going)
        self._state, self._sure = self._state.index_select(0, going), self._sure.index_select(0, going)
        return stopped, going, rows


def halting_ticks(certainties: torch.Tensor, threshold: float) -> torch.Tensor:
    """The ticks at which positions stop, with the certainties of all ticks in hand.

    Args:
        certainties: [S + 1, n] after tick 0 (no thought), 1, ..., S.
        threshold: certainty in [0, 1].

    Returns:
        [n] int64: the first tick whose certainty reaches the threshold, or S.

    Example:
        >>> halting_ticks(torch.tensor([[0.9, 0.1, 0.1], [0.1, 0.8, 0.1], [0.1, 0.9, 0.1]]), 0.8)
        tensor([0, 1, 2])
    """
    reached = certainties >= threshold
    reached[-1] = True
    return reached.int().argmax(0)


def expected_ticks(certainties: torch.Tensor, threshold: float, width: float = 0.1) -> torch.Tensor:
    """Ticks that a position is expected to think if it stops at random, surely where it is certain.

    lambda_t = sigmoid((c_t - threshold) / width),   E[ticks] = sum_{t=0}^{S-1} prod_{k=0}^{t} (1 - lambda_k)

    since tick t + 1 is thought exactly if none of the ticks 0 .. t stopped. For width -> 0 these are the ticks of
    `halting_ticks`. Halting probabilities and their cost come from Adaptive Computation Time (Graves 2016,
    https://arxiv.org/abs/1603.08983); that their product is a distribution over ticks, from PonderNet (Banino et al.
    2021, https://arxiv.org/abs/2107.05407). Here they are no outputs of their own but made of the certainties.

    Args:
        certainties: [S + 1, n] after tick 0 (no thought), 1, ..., S.
        threshold: certainty at which the probability of stopping is one half.
        width: change of certainty by which the odds of stopping grow by e.

    Returns:
        [n] in (0, S), differentiable.

    Example:
        >>> certainties = torch.tensor([[0.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
        >>> expected_ticks(certainties, threshold=0.5, width=0.01).round(decimals=3)
        tensor([2., 0.])
    """
    going = torch.sigmoid((threshold - certainties[:-1]) / width)
    return going.cumprod(0).sum(0)
