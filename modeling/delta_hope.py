"""Fast weights that rewrite themselves: the gated delta rule over memories that make their own keys, values and gates.

Each head holds one matrix S, [R, K], of stacked memories that share keys and gates: content, value, key, and a row for the
learning rate and for the decay. With the streams a_t (key), c_t (value), q_t (query), the gates g_t, and M, the snapshot of
S at the last boundary of the head's period (nested learning, https://arxiv.org/abs/2512.24695, in a bounded form):

    k_t = |a_t + M_k a_t|      eta_t = sigmoid(g_1 + m_eta a_t)      alpha_t = sigmoid(g_2 + m_alpha a_t)
    v_t = c_t + M_v c_t        u_t = [ |v_t + M_B v_t| for B in content, value, key;  tanh(g_3 + m_eta v_t), tanh(g_4 + m_alpha v_t) ]
    S_t = alpha_t S_{t-1} (I - eta_t k_t k_t^T) + eta_t u_t k_t^T              o_t = S_content,t q_t

where |x| = x / ||x||. Every target has norm 1 and every factor of S lies in [0, 1], so S stays bounded. Since M changes at
boundaries only, a chunk is one triangular system for all memories (the WY form of https://arxiv.org/abs/2412.06464):

    (I + tril_{-1}(k_t . k_s e^{g_t - g_s} eta_s)) E = u - e^g K S^T,      g = cumulated log alpha
    o = e^g Q S_content^T + tril(q_t . k_s e^{g_t - g_s} eta_s) E_content,      S <- e^{g_C} S + E^T (eta K e^{g_C - g})

All of it is computed in float32 (float64 for float64 streams), also under autocast, and is differentiable through the writes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional


NORM_EPS = 1e-6


class Streams(NamedTuple):
    """What the fast weights of one layer are fed with; N is batch times heads.

    Attributes:
        query: [N, T, K].
        key: [N, T, K].
        value: [N, T, K].
        gates: [N, T, 4] before the squashing: learning rate, decay, and the targets of their rows.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    gates: torch.Tensor


class FastWeights(NamedTuple):
    """State of one layer.

    Attributes:
        running: [N, R, K] fast weights after the last token.
        snapshot: [N, R, K] those that projections read; None where there is nothing self-referential.
    """

    running: torch.Tensor
    snapshot: torch.Tensor | None = None


class Span(NamedTuple):
    """Tokens between two boundaries of chunks.

    Attributes:
        start: first column.
        stop: column after the last.
        due: whose snapshot is taken before the first token: all, none, or [N, 1, 1] bool.
    """

    start: int
    stop: int
    due: torch.Tensor | bool


def num_rows(head_dim: int, self_referential: bool) -> int:
    """R, rows of a head's fast weights.

    Example:
        >>> num_rows(64, True), num_rows(64, False)
        (194, 64)
    """
    return 3 * head_dim + 2 if self_referential else head_dim


class _Unit(torch.autograd.Function):
    """x / sqrt(||x||^2 + eps), whose backward pass keeps the result instead of every step."""

    @staticmethod
    def forward(ctx, x):
        scale = torch.linalg.vecdot(x, x).add_(NORM_EPS).rsqrt_().unsqueeze(-1)
        y = x * scale
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    def backward(ctx, grad):
        y, scale = ctx.saved_tensors
        return torch.addcmul(grad, y, torch.linalg.vecdot(grad, y).unsqueeze(-1), value=-1) * scale


def unit(x: torch.Tensor) -> torch.Tensor:
    """x / ||x|| along the last dimension, 0 for 0. Not modified."""
    return _Unit.apply(x)


def run_fast_weights(
    streams: Streams, state: FastWeights, spans: list[Span], real: torch.Tensor | None = None
) -> tuple[torch.Tensor, FastWeights]:
    """Read and write the fast weights over a sequence; see the module's description for the equations.

    Args:
        streams: queries, keys, values and gates. Not modified.
        state: the state before. Not modified. Without a snapshot the rule is plain gated DeltaNet: k = |a|, u = c.
        spans: spans that cover the columns in order.
        real: [N, T] bool, False where nothing is to be written; None for everywhere.

    Returns:
        Outputs [N, T, K] in the streams' dtype, and the state after.

    Example:
        >>> streams = Streams(*torch.randn(3, 2, 5, 4), torch.randn(2, 5, 4))
        >>> state = FastWeights(torch.zeros(2, 14, 4), torch.zeros(2, 14, 4))
        >>> out, state = run_fast_weights(streams, state, [Span(0, 3, True), Span(3, 5, True)])
        >>> out.shape, state.running.shape
        (torch.Size([2, 5, 4]), torch.Size([2, 14, 4]))
    """
    given = streams.query.dtype
    dtype = torch.promote_types(given, torch.float32)
    with torch.autocast(streams.query.device.type, enabled=False):
        widths = [span.stop - span.start for span in spans]
        pieces = zip(*(stream.to(dtype).split(widths, dim=1) for stream in streams), strict=True)
        running, snapshot = state
        outputs = []
        for (start, stop, due), (query, key, value, gates) in zip(spans, pieces, strict=True):
            if snapshot is None:
                k, u, eta, log_alpha = _plain(key, value, gates)
            else:
                snapshot = _refreshed(snapshot, running, due)
                k, u, eta, log_alpha = _self_referential(key, value, gates, snapshot)
            if real is not None:
                eta, log_alpha = eta * real[:, start:stop], log_alpha * real[:, start:stop]
            step = _token if stop - start == 1 else _chunk
            output, running = step(running, unit(query), k, u, eta, log_alpha)
            outputs.append(output)
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
    return output.to(given), FastWeights(running, snapshot)


def _refreshed(snapshot: torch.Tensor, running: torch.Tensor, due: torch.Tensor | bool) -> torch.Tensor:
    if isinstance(due, bool):
        return running if due else snapshot
    return torch.where(due, running, snapshot)


def _plain(key, value, gates):
    return unit(key), value, torch.sigmoid(gates[..., 0]), functional.logsigmoid(gates[..., 1])


def _self_referential(key, value, gates, snapshot):
    """Keys [N, C, K], targets [N, C, R], learning rates and log decays [N, C] as the snapshot makes them."""
    size = key.shape[-1]
    _, of_value, of_key = snapshot.split([size, size, size + 2], dim=1)  # the third: key, learning rate, decay
    made, rates = (key @ of_key.mT).split([size, 2], dim=-1)
    first, second, *_ = gates.unbind(-1)
    eta, decay = rates.unbind(-1)
    v = value + value @ of_value.mT
    own, rows = (v @ snapshot.mT).split([3 * size, 2], dim=-1)
    targets = unit(own.unflatten(-1, (3, size)) + v.unsqueeze(-2)).flatten(-2)
    target = torch.cat([targets, torch.tanh(gates[..., 2:] + rows)], dim=-1)
    return unit(key + made), target, torch.sigmoid(first + eta), functional.logsigmoid(second + decay)


def _chunk(running, query, key, target, eta, log_alpha):
    """Outputs [N, C, K] and fast weights after C tokens."""
    size = key.shape[-1]
    g = log_alpha.cumsum(-1)
    decay = (g.unsqueeze(-1) - g.unsqueeze(-2)).tril().exp()  # entries above the diagonal are not used
    read, write = (query @ key.mT * decay).tril(), key @ key.mT * decay
    eta, grown = eta.unsqueeze(-1), g.exp().unsqueeze(-1)
    right = torch.baddbmm(target, grown * key, running.mT, alpha=-1)
    error = torch.linalg.solve_triangular(write * eta.mT, right, upper=False, unitriangular=True)
    output = torch.baddbmm((read * eta.mT) @ error[..., :size], grown * query, running[:, :size].mT)
    rest = (g[:, -1:] - g).exp().unsqueeze(-1)
    return output, torch.baddbmm(grown[:, -1:] * running, error.mT, key * (rest * eta))


def _token(running, query, key, target, eta, log_alpha):
    """The same for one token: outputs [N, 1, K] and fast weights after it."""
    decayed = running * log_alpha.exp().unsqueeze(-1)
    written = eta.unsqueeze(-1) * (target - key @ decayed.mT)
    running = torch.baddbmm(decayed, written.mT, key)
    return query @ running[:, : key.shape[-1]].mT, running
