"""The ternary linear in torch operations, and its straight-through gradient; `bitlinear_karla` has the equations."""

from __future__ import annotations

import math

import torch

from .fast_bitlinear_karla import MAX_FEATURES
from .native_karla import c_function
from .ternary_karla import MIN_SCALE, int_matmul, quantize_activation, quantize_weight, unpack_ternary, widen


def ternary_linear(
    x: torch.Tensor, w_q: torch.Tensor, scale: torch.Tensor, eps: float | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Quantise rows, multiply, scale.

    Dividing a row by its root mean square changes s_x but not h_q, so x is quantised as it is and the norm costs one
    factor per row. Clamping max|h| at 1e-5 is clamping max|x| at 1e-5 sqrt(eps): it binds only where mean(x^2) is below
    1e-10 eps, where the root mean square is sqrt(eps) up to a relative 5e-11.

    Args:
        x: [..., K] of any floating dtype. Not modified.
        w_q: [N, K] int8 codes.
        scale: s_w, one element.
        eps: of the RMSNorm; None for no norm.

    Returns:
        y [..., N] in the dtype of x, h_q [M, K] int8, 1 / s_x [M, 1], and 1 / sqrt(mean(x^2) + eps) [M, 1] or None.

    Example:
        >>> ternary_linear(torch.tensor([[2.0, -1.0]]), torch.tensor([[1, 0]], dtype=torch.int8), torch.ones(1), None)[0]
        tensor([[2.]])
    """
    rows = widen(x.reshape(-1, x.shape[-1]))
    h_q, inverse_s_x, inverse_rms = _quantize_rows(rows, eps)
    y = int_matmul(h_q, w_q).to(rows.dtype).mul_(inverse_s_x * scale)
    return y.to(x.dtype).view(*x.shape[:-1], w_q.shape[0]), h_q, inverse_s_x, inverse_rms


def _quantize_rows(rows: torch.Tensor, eps: float | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """h_q [M, K] int8, 1 / s_x [M, 1] and 1 / sqrt(mean(x^2) + eps) [M, 1] or None, of rows [M, K]."""
    floor = MIN_SCALE if eps is None else MIN_SCALE * math.sqrt(eps)
    if not torch.compiler.is_compiling() and rows.is_cpu and rows.dtype == torch.float32 and rows.numel():
        kernel = c_function("karla_quantise_rows", "pddiippp")
        if kernel is not None and rows.shape[1] <= MAX_FEATURES:
            rows = rows.detach().contiguous()
            h_q = torch.empty_like(rows, dtype=torch.int8)
            inverse_s_x, inverse_rms = rows.new_empty(2, len(rows), 1)
            places = (tensor.data_ptr() for tensor in (h_q, inverse_s_x, inverse_rms))
            kernel(rows.data_ptr(), -1.0 if eps is None else eps, floor, *rows.shape, *places)
            return h_q, inverse_s_x, None if eps is None else inverse_rms
    h_q, s_x = quantize_activation(rows, floor)
    if eps is None:
        return h_q, s_x.reciprocal(), None
    inverse_rms = _inverse_rms(rows, eps)
    return h_q, inverse_rms / s_x, inverse_rms


def _inverse_rms(rows: torch.Tensor, eps: float) -> torch.Tensor:
    """[M, 1], in double, so that the order of summation does not show and the compiled kernel gives the same floats."""
    length = torch.linalg.vector_norm(rows, 2, -1, keepdim=True, dtype=torch.float64)
    return length.square_().mul_(1 / rows.shape[-1]).add_(eps).rsqrt_().to(rows.dtype)


def input_gradient(
    grad_rows: torch.Tensor,
    w_q: torch.Tensor,
    scale: torch.Tensor,
    x: torch.Tensor | None,
    inverse_rms: torch.Tensor | None,
) -> torch.Tensor:
    """Gradient of the rows of x: dH = dY (W_t s_w), then through the RMSNorm if x and its factor are given.

    With h = x r: dX = r (dH - h mean(dH h)).

    Args:
        grad_rows: [M, N].
        w_q: [N, K] int8 codes.
        scale: s_w.
        x: [..., K] what was normalised, or None.
        inverse_rms: r [M, 1], or None.

    Returns:
        [M, K], in the dtype of grad_rows.
    """
    grad_h = grad_rows @ w_q.to(grad_rows.dtype).mul_(scale)
    if x is None or inverse_rms is None:
        return grad_h
    rows, grad_h = widen(x.reshape(-1, x.shape[-1])), widen(grad_h)
    share = (grad_h * rows).mean(-1, keepdim=True) * inverse_rms.square()
    return torch.addcmul(grad_h, rows, share, value=-1).mul_(inverse_rms).to(grad_rows.dtype)


class StraightThrough(torch.autograd.Function):
    """:func:`ternary_linear` differentiated as if nothing were rounded and both scales were constants.

    dW = dY^T (h_q / s_x) and :func:`input_gradient`, in the dtype of dY whatever autocast says. The activations kept for
    dW are int8; x itself is kept for the RMSNorm only.
    """

    @staticmethod
    def forward(ctx, x, weight, w_q, scale, eps):
        """y of :func:`ternary_linear`; `weight` is the master that w_q and scale were made of, or None."""
        y, h_q, inverse_s_x, inverse_rms = ternary_linear(x, w_q, scale, eps)
        kept_x = x if ctx.needs_input_grad[0] and eps is not None else None
        kept_h_q = h_q if ctx.needs_input_grad[1] else None
        ctx.save_for_backward(kept_x, kept_h_q, inverse_s_x, inverse_rms, w_q, scale)
        ctx.x_shape = x.shape
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_y):
        """Gradients of x and weight."""
        x, h_q, inverse_s_x, inverse_rms, w_q, scale = ctx.saved_tensors
        grad_rows = grad_y.reshape(-1, w_q.shape[0])
        grad_x = grad_weight = None
        with torch.autocast(grad_y.device.type, enabled=False):
            if ctx.needs_input_grad[1]:
                grad_weight = grad_rows.t() @ h_q.to(grad_y.dtype).mul_(inverse_s_x)
            if ctx.needs_input_grad[0]:
                grad_x = input_gradient(grad_rows, w_q, scale, x, inverse_rms).reshape(ctx.x_shape)
        return grad_x, grad_weight, None, None, None


def packed_linear(x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, eps: float | None) -> torch.Tensor:
    """:func:`ternary_linear` of a packed weight [N / 4, K] uint8; y alone."""
    return ternary_linear(x, unpack_ternary(packed), scale, eps)[0]


def packed_input_gradient(
    grad_y: torch.Tensor, x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, eps: float | None
) -> torch.Tensor:
    """Gradient of :func:`packed_linear` with respect to x, in its shape and dtype."""
    grad_rows, w_q = grad_y.reshape(-1, grad_y.shape[-1]), unpack_ternary(packed)
    inverse_rms = None if eps is None else _inverse_rms(widen(x.reshape(-1, x.shape[-1])), eps)
    return input_gradient(grad_rows, w_q, scale, x, inverse_rms).reshape(x.shape).to(x.dtype)


def blend_ternary(weight: torch.Tensor, share: float) -> torch.Tensor:
    """W + share (W_t s_w - W) [N, K], in the dtype of the master; its gradient is the master's.

    Example:
        >>> blend_ternary(torch.tensor([[2.0, -0.5, 0.5, 1.0]]), 0.5)
        tensor([[ 1.5000, -0.2500,  0.2500,  1.0000]])
    """
    codes, scale = quantize_weight(weight)
    return weight + (share * (codes.to(weight.dtype) * scale - weight)).detach()


def float_linear(x: torch.Tensor, weight: torch.Tensor, eps: float | None) -> torch.Tensor:
    """RMSNorm(x) W^T (x W^T if eps is None) without any rounding, [..., N] in the dtype of x, under autocast too."""
    with torch.autocast(x.device.type, enabled=False):
        rows = widen(x)
        if eps is not None:
            rows = torch.nn.functional.rms_norm(rows, (rows.shape[-1],), eps=eps)
        return torch.nn.functional.linear(rows, weight.to(rows.dtype)).to(x.dtype)
