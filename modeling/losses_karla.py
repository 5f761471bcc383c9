"""Losses that look at the answers of all ticks, one tick and one chunk of positions at a time.

The output layer is frozen, so what a cross-entropy needs for its backward pass is known in its forward pass: the gradient
of the state, D numbers a position. No logits are kept, and never more than those of `CHUNK` positions exist.
"""

from __future__ import annotations

import torch
from torch import nn

from .certainty_karla import Candidates, certainty, expected_ticks, halting_ticks


CHUNK = 64  # positions whose logits are held at once: 39 MB for a vocabulary of 151,936
PONDER_CERTAINTY = 0.8  # where no threshold is set


class _FrozenCrossEntropy(torch.autograd.Function):
    """-log softmax(f(x W^T + b))_label with f(l) = l, or cap tanh(l / cap); W and b take no gradient.

    dx = ((p - onehot) f'(l)) W, computed with the loss.
    """

    @staticmethod
    def forward(ctx, state, labels, weight, bias, cap):
        losses, gradients = [], []
        for x, label in zip(state.split(CHUNK), labels.split(CHUNK), strict=True):
            logits = nn.functional.linear(x.to(weight.dtype), weight, bias)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            if cap is not None:
                logits = torch.tanh(logits / cap).mul_(cap)
            total = logits.logsumexp(-1, keepdim=True)
            losses.append((total - logits.gather(-1, label[:, None]))[:, 0])
            if ctx.needs_input_grad[0]:
                slope = None if cap is None else 1 - (logits / cap).square_()
                p = logits.sub_(total).exp_()
                p.scatter_add_(-1, label[:, None], p.new_full((len(p), 1), -1.0))
                p = p if slope is None else p.mul_(slope)
                gradients.append((p.to(weight.dtype) @ weight).to(state.dtype))
        ctx.save_for_backward(torch.cat(gradients) if gradients else None)
        return torch.cat(losses) if losses else state.new_zeros(0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (gradient,) = ctx.saved_tensors
        return grad.to(gradient.dtype)[:, None] * gradient, None, None, None, None


def frozen_cross_entropy(
    state: torch.Tensor,
    labels: torch.Tensor,
    output_embeddings: torch.Tensor,
    bias: torch.Tensor | None = None,
    cap: float | None = None,
) -> torch.Tensor:
    """Cross-entropy of states against labels over the whole vocabulary of a frozen output layer.

    Args:
        state: [n, D]; gradients flow into it only.
        labels: [n] int64.
        output_embeddings: [V, D] scaled rows of the output layer.
        bias: [V] or None.
        cap: soft cap of the logits, or None.

    Returns:
        [n] losses in nats, float32 (float64 for a float64 output layer).

    Example:
        >>> loss = frozen_cross_entropy(torch.zeros(1, 2), torch.tensor([1]), torch.eye(2))
        >>> round(loss.item(), 4)
        0.6931
    """
    return _FrozenCrossEntropy.apply(state, labels, output_embeddings, bias, cap)


def two_tick_loss(
    state: torch.Tensor,
    deltas: torch.Tensor,
    labels: torch.Tensor,
    output_embeddings: torch.Tensor,
    bias: torch.Tensor | None = None,
    count: int = 64,
    cap: float | None = None,
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
        cap: soft cap of the logits, or None.

    Returns:
        [n] losses in nats, unreduced.
    """
    picked = []
    with torch.no_grad():
        for at in range(0, len(labels), CHUNK):
            part = slice(at, at + CHUNK)
            candidates = Candidates(state[part], output_embeddings, bias, count, labels[part])
            logits = torch.stack([candidates.logits(state[part] + delta[part]) for delta in deltas])  # label first
            best = (logits[..., 0] - logits.logsumexp(-1)).argmax(0)
            picked.append(torch.stack([best, certainty(logits).argmax(0)]))
    position = torch.arange(len(labels), device=labels.device)
    ticks = torch.cat(picked, dim=1) if picked else position.new_zeros(2, 0)
    losses = [
        frozen_cross_entropy(state + deltas[tick, position], labels, output_embeddings, bias, cap) for tick in ticks
    ]
    return (losses[0] + losses[1]) / 2


def mean_tick_loss(
    state: torch.Tensor,
    deltas: torch.Tensor,
    labels: torch.Tensor,
    output_embeddings: torch.Tensor,
    bias: torch.Tensor | None = None,
    cap: float | None = None,
) -> torch.Tensor:
    """Mean of the cross-entropies over all ticks: (1 / S) sum_t CE(state + delta_t).

    Args: as of `two_tick_loss`.

    Returns:
        [n] losses in nats, unreduced.
    """
    losses = [frozen_cross_entropy(state + delta, labels, output_embeddings, bias, cap) for delta in deltas]
    return sum(losses[1:], losses[0]) / len(losses)


def tick_certainties(
    state: torch.Tensor,
    deltas: torch.Tensor,
    output_embeddings: torch.Tensor,
    bias: torch.Tensor | None = None,
    count: int = 64,
) -> torch.Tensor:
    """Certainties before thinking and after every tick, over each position's candidates.

    Args: as of `two_tick_loss`; gradients flow into `state` and `deltas`.

    Returns:
        [S + 1, n] in [0, 1].
    """

    found = []
    for at in range(0, len(state), CHUNK):
        part = slice(at, at + CHUNK)
        candidates = Candidates(state[part].detach(), output_embeddings, bias, count)
        states = (state[part], *(state[part] + deltas[:, part]).unbind(0))
        found.append(torch.stack([certainty(candidates.logits(each)) for each in states]))
    return torch.cat(found, dim=1) if found else state.new_zeros(len(deltas) + 1, 0)


class _KeepGradient(torch.autograd.Function):
    """function(state, deltas, labels) of single positions, of which nothing is kept but its gradient."""

    @staticmethod
    def forward(ctx, function, state, deltas, labels):
        losses, gradients = [], []
        for at in range(0, len(labels), CHUNK):
            part = slice(at, at + CHUNK)
            with torch.enable_grad():
                variables = [x.detach().requires_grad_() for x in (state[part], deltas[:, part])]
                loss = function(*variables, labels[part])
                gradients.append(torch.autograd.grad(loss.sum(), variables))
            losses.append(loss.detach())
        state_gradients, delta_gradients = zip(*gradients, strict=True) if gradients else ([state], [deltas])
        ctx.save_for_backward(
            torch.cat(state_gradients) if ctx.needs_input_grad[1] else None, torch.cat(delta_gradients, dim=1)
        )
        return torch.cat(losses) if losses else state.new_zeros(0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        state_gradient, delta_gradient = ctx.saved_tensors
        column = grad.to(delta_gradient.dtype)[:, None]
        return None, None if state_gradient is None else column * state_gradient, column * delta_gradient, None


class TickJudge:
    """The loss of every position by its labels and the deltas of all its ticks.

    `tick_loss` "mean" and "two_tick" have their functions here; "last" is the cross-entropy of the answer, which with
    a threshold is that of the halting tick. With `ponder_cost` > 0, lambda times `expected_ticks` is added.

    Args:
        config: a `KarlaConfig`.
        labels: [B, T] int64 of the same positions (shifted already), -100 where there is no loss.
        output_embeddings: [V, D] scaled rows of the output layer.
        bias: [V] or None.
        threshold: certainty that ends a thought, or None.
    """

    def __init__(
        self,
        config,
        labels: torch.Tensor,
        output_embeddings: torch.Tensor,
        bias: torch.Tensor | None,
        threshold: float | None = None,
    ):
        self.config, self.labels, self.threshold = config, labels, threshold
        self.projection = output_embeddings, bias
        self.cap = getattr(config.text_config, "final_logit_softcapping", None)

    def __call__(self, rows: slice, columns: slice, state: torch.Tensor, deltas: torch.Tensor) -> torch.Tensor:
        """Losses [b, n] of a chunk with states [b, n, D] and deltas [S, b, n, D]; zero where there is no label."""
        labels = self.labels[rows, columns]
        used = labels != -100
        arguments = state[used], deltas[:, used], labels[used]
        if self.config.ponder_cost:  # every tick takes part twice, in the loss and by its certainty
            losses = _KeepGradient.apply(self._losses, *arguments)
        else:
            losses = self._losses(*arguments)
        return losses.new_zeros(used.shape).masked_scatter(used, losses)

    def _losses(self, state: torch.Tensor, deltas: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        config, count = self.config, self.config.certainty_candidates
        threshold, sure = self.threshold, None
        if config.ponder_cost:
            sure = tick_certainties(state, deltas, *self.projection, count)
        if config.tick_loss == "mean":
            losses = mean_tick_loss(state, deltas, labels, *self.projection, self.cap)
        elif config.tick_loss == "two_tick":
            losses = two_tick_loss(state, deltas, labels, *self.projection, count, self.cap)
        else:
            delta = deltas[-1]
            if threshold is not None and sure is not None:
                ticks = halting_ticks(sure.detach(), threshold)
                position = torch.arange(len(labels), device=labels.device)
                delta = torch.where((ticks > 0)[:, None], deltas[(ticks - 1).clamp(min=0), position], 0.0)
            losses = frozen_cross_entropy(state + delta, labels, *self.projection, self.cap)
        if sure is not None:
            soft = expected_ticks(sure, PONDER_CERTAINTY if threshold is None else threshold)
            losses = losses + config.ponder_cost * soft
        return losses
