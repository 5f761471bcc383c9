"""HOPE's fast weights token by token, as the equations are written: what fast code is compared with."""

from __future__ import annotations

import torch

from .delta_hope import NORM_EPS, FastWeights, Streams


def naive_unit(x: torch.Tensor) -> torch.Tensor:
    """x / sqrt(||x||^2 + eps) along the last dimension."""
    return x / (x.square().sum(-1, keepdim=True) + NORM_EPS).sqrt()


def naive_token(
    running: torch.Tensor, snapshot: torch.Tensor | None, q: torch.Tensor, a: torch.Tensor, c: torch.Tensor, g: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """One token: output [N, K] and running fast weights [N, R, K] after it, from q, a, c [N, K] and gates g [N, 4]."""
    size = a.shape[-1]
    if snapshot is None:
        k, u = naive_unit(a), c
        eta, alpha = torch.sigmoid(g[:, 0]), torch.sigmoid(g[:, 1])
    else:
        content, value, key = (snapshot[:, i * size : (i + 1) * size] for i in range(3))
        m_eta, m_alpha = snapshot[:, 3 * size], snapshot[:, 3 * size + 1]
        k = naive_unit(a + torch.einsum("nij,nj->ni", key, a))
        v = c + torch.einsum("nij,nj->ni", value, c)
        eta = torch.sigmoid(g[:, 0] + (m_eta * a).sum(-1))
        alpha = torch.sigmoid(g[:, 1] + (m_alpha * a).sum(-1))
        own = [naive_unit(v + torch.einsum("nij,nj->ni", memory, v)) for memory in (content, value, key)]
        rows = torch.stack([g[:, 2] + (m_eta * v).sum(-1), g[:, 3] + (m_alpha * v).sum(-1)], dim=-1)
        u = torch.cat([*own, torch.tanh(rows)], dim=-1)
    decayed = alpha[:, None, None] * running
    error = u - torch.einsum("nrk,nk->nr", decayed, k)
    running = decayed + eta[:, None, None] * error[:, :, None] * k[:, None, :]
    return torch.einsum("nrk,nk->nr", running[:, :size], naive_unit(q)), running


def naive_run_fast_weights(
    streams: Streams, state: FastWeights, periods: list[int], start: int = 0, real: torch.Tensor | None = None
) -> tuple[torch.Tensor, FastWeights]:
    """`run_fast_weights` token by token.

    Args:
        streams: as there.
        state: as there.
        periods: for each of the N rows, tokens between two snapshots.
        start: position of the first token.
        real: as there.
    """
    running, snapshot = state
    outputs = []
    for t in range(streams.query.shape[1]):
        if snapshot is not None:
            due = torch.tensor([(start + t) % period == 0 for period in periods])
            snapshot = torch.where(due[:, None, None], running, snapshot)
        output, after = naive_token(running, snapshot, *(stream[:, t] for stream in streams))
        if real is not None:
            after = torch.where(real[:, t, None, None], after, running)
        running = after
        outputs.append(output)
    return torch.stack(outputs, dim=1), FastWeights(running, snapshot)
