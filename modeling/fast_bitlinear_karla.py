"""Ternary linears without gradients on the CPU: one call of the compiled kernel, which reads the two-bit weights."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable

import torch

from .native_karla import c_function
from .ternary_karla import CODES_PER_BYTE, MIN_SCALE


MAX_FEATURES = 16384  # the kernel's scratch is on the stack
MAX_ROWS = (2, 512, 512)  # beyond, torch's threads can win; by level: plain C, AVX2, AVX512-VNNI
DTYPES = (torch.float32, torch.bfloat16)


class _Layer(ctypes.Structure):
    """`karla_layer` of bitlinear.h."""

    _fields_ = [
        ("packed", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("eps", ctypes.c_double),
        ("floor", ctypes.c_double),
        ("in_features", ctypes.c_int64),
        ("out_features", ctypes.c_int64),
    ]


class FastBitLinear:
    """The compiled layer with the weights that lie in `packed` and `scale` at the time of a call.

    Args:
        packed: [N / 4, K] uint8, contiguous, K at most 16384, on the CPU.
        scale: float32, one element.
        eps: of the RMSNorm; None for no norm.

    Example:
        >>> packed, scale = torch.full((1, 6), 0b10101010, dtype=torch.uint8), torch.ones(1)  # all codes are 1
        >>> FastBitLinear.can_run(packed, scale) and FastBitLinear(packed, scale, None)(torch.ones(1, 6)).tolist() or 6
        [[6.0, 6.0, 6.0, 6.0]]
    """

    function: Callable[..., None]
    __slots__ = ("address", "function", "key", "layer", "max_elements", "out_features", "packed", "scale")

    @staticmethod
    def can_run(packed: torch.Tensor, scale: torch.Tensor) -> bool:
        """Whether there is a kernel, and it takes these weights."""
        return (
            packed.is_cpu
            and packed.is_contiguous()
            and scale.dtype == torch.float32
            and 0 < packed.shape[1] <= MAX_FEATURES
            and packed.shape[0] > 0
            and c_function("karla_bitlinear", "ppiip") is not None
        )

    def __init__(self, packed: torch.Tensor, scale: torch.Tensor, eps: float | None):
        width, floor = packed.shape[1], MIN_SCALE if eps is None else MIN_SCALE * math.sqrt(eps)
        self.packed, self.scale, self.out_features = packed, scale, packed.shape[0] * CODES_PER_BYTE
        self.key = packed.data_ptr(), scale.data_ptr()
        self.layer = _Layer(*self.key, -1.0 if eps is None else eps, floor, width, self.out_features)
        self.address = ctypes.addressof(self.layer)
        function, level = c_function("karla_bitlinear", "ppiip"), c_function("karla_level", "", "i")
        assert function is not None, "ask can_run first"
        assert level is not None
        self.function = function
        self.max_elements = MAX_ROWS[level()] * width

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[..., N] in the dtype of x [..., K], float32 or bfloat16 on the CPU."""
        if not x.is_contiguous():
            x = x.contiguous()
        y = x.new_empty(*x.shape[:-1], self.out_features)  # a tuple costs 0.3 us
        self.function(self.address, x.data_ptr(), x.numel(), x.dtype == torch.bfloat16, y.data_ptr())
        return y
