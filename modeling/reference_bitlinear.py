"""Slow references for bitlinear_karla.py and ternary_karla.py: plain differentiable torch, plain Python loops.

Only tests and benchmarks import this file, so it never travels to the Hub.
"""

import torch


def naive_bitlinear(x: torch.Tensor, weight: torch.Tensor, norm: bool = True, eps: float = 1e-5) -> torch.Tensor:
    """BitNet b1.58 linear layer as its equations are written, with fake quantisation in the dtype of the arguments.

    h = x / sqrt(mean(x^2) + eps); y = Q(h) T(weight)^T, where Q rounds each row to 127 steps of its largest magnitude,
    T rounds to {-1, 0, 1} times mean|weight|, and both have the gradient of the identity: u + stop_gradient(Q(u) - u).
    (Ma et al. 2024, https://arxiv.org/abs/2402.17764.) Use float64: in float32 the sum u + (Q(u) - u) rounds.

    Args:
        x: [..., K] float. Not modified.
        weight: [N, K] float, same dtype. Not modified.
        norm: whether x is normalised, else h = x.
        eps: added to the mean square in the norm.

    Returns:
        [..., N] in the dtype of the arguments.

    Example:
        >>> x, weight = torch.tensor([[1.0, -2.0]]).double(), torch.tensor([[1.0, -1.0]]).double()
        >>> round(naive_bitlinear(x, weight, norm=False).item() * 127)  # (64 + 127) 2 / 127, times mean|weight| = 1
        382
    """
    h = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) if norm else x
    x_scale = 127 / h.abs().amax(-1, keepdim=True).clamp(min=1e-5)
    h_quantized = (h * x_scale).round().clamp(-128, 127) / x_scale
    weight_scale = weight.abs().mean().clamp(min=1e-5)
    weight_quantized = (weight / weight_scale).round().clamp(-1, 1) * weight_scale
    h = h + (h_quantized - h).detach()
    weight = weight + (weight_quantized - weight).detach()
    return h @ weight.transpose(0, 1)


def naive_pack_ternary(ternary: list[list[int]]) -> list[list[int]]:
    """Pack rows of {-1, 0, 1} four to a byte, one code at a time.

    Args:
        ternary: N lists of K integers in {-1, 0, 1}, N a multiple of 4. Not modified.

    Returns:
        N / 4 lists of K integers in [0, 170]; bits 2i and 2i + 1 of entry (r, c) hold ternary[i N/4 + r][c] + 1.

    Example:
        >>> naive_pack_ternary([[-1], [0], [1], [1]])
        [[164]]
    """
    packed_rows = len(ternary) // 4
    packed = [[0] * len(row) for row in ternary[:packed_rows]]
    for n, row in enumerate(ternary):
        for k, value in enumerate(row):
            packed[n % packed_rows][k] += (value + 1) * 4 ** (n // packed_rows)
    return packed
