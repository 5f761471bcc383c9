"""The turns of the head's residual stream in decoding, all ticks in one call of the compiled kernel."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from .attention_karla import WindowBlocks
from .fast_bitlinear_karla import FastBitLinear
from .native_karla import c_function


class _Stream(ctypes.Structure):
    """`karla_stream` of ticks.c."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("query", "out", "into", "write")] + [
        (name, ctypes.c_int64) for name in ("heads", "width", "keys")
    ]


def stream_ticks(
    layers: Sequence[FastBitLinear | None],
    blocks: WindowBlocks,
    stream: torch.Tensor,
    writes: torch.Tensor,
    ticks: int,
) -> bool:
    """Run ticks of `r <- r + W_o attention(W_r r)`, `w = W_2 silu(W_1 r)`, `r <- r + w`, `writes <- writes + w`.

    Args:
        layers: W_r, W_o, W_1, W_2 as `BitLinear.compiled` gives them.
        blocks: keys and values; one position of every sequence.
        stream: [B, D] float32, contiguous. Changed in place.
        writes: [B, D] float32, contiguous. Changed in place.
        ticks: turns to run.

    Returns:
        Whether the kernel could run; False, with nothing changed, where there is none or the tensors are not such.
    """
    keys, values, mask, turn = blocks
    kernel = c_function("karla_stream_ticks", "pppppiippp")
    floats = (keys, values, mask, stream, writes)
    if kernel is None or any(layer is None for layer in layers) or torch.is_grad_enabled():
        return False
    if mask.shape[2] != 1 or any(not t.is_cpu or t.dtype != torch.float32 for t in floats):
        return False
    if not (stream.is_contiguous() and writes.is_contiguous() and len(keys) == len(stream)):
        return False
    heads, count, width = keys.shape[1:]
    query, out, into, write = (layer for layer in layers if layer is not None)
    head = _Stream(query.address, out.address, into.address, write.address, heads, width, count)
    scratch = stream.new_empty(2 * heads * width + count + stream.shape[1] + into.out_features)
    # Held until the call is over.
    given = keys.contiguous(), values.contiguous(), mask.contiguous(), torch.view_as_real(turn).contiguous()
    places = [tensor.data_ptr() for tensor in given]
    kernel(
        ctypes.addressof(head), *places, len(stream), ticks, stream.data_ptr(), writes.data_ptr(), scratch.data_ptr()
    )
    return True
