"""Ternary linear layer of BitNet b1.58: weights in {-1, 0, 1}, int8 activations, no bias.

For a row x [K] and a weight W [N, K]:

    h   = x / sqrt(mean(x^2) + eps)                  RMSNorm without weight (norm=True), else h = x
    s_x = 127 / clamp(max|h|, 1e-5)                  one scale per row;     h_q = round(h s_x), int8
    s_w = clamp(mean|W|, 1e-5)                       one scale per weight;  W_t = clamp(round(W / s_w), -1, 1)
    y   = (h_q W_t^T) s_w / s_x                      the product is an exact integer

(Ma et al. 2024, https://arxiv.org/abs/2402.17764). Training keeps a float master W and passes gradients straight through
both roundings (Bengio et al. 2013, https://arxiv.org/abs/1308.3432). Shipping keeps two bits per weight in the byte
layout of transformers' `pack_weights` and `weight_scale` = s_w, a factor to multiply with (as AutoBitLinear of
transformers reads it; its BitLinear divides, so it needs 1 / s_w). M counts rows, K is in_features, N out_features.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .fast_bitlinear_karla import DTYPES, FastBitLinear
from .straight_through_karla import StraightThrough, blend_ternary, float_linear, ternary_linear
from .ternary_karla import (
    CODES_PER_BYTE,
    FOUR_ZEROS,
    check_packable,
    pack_ternary,
    quantize_weight,
    unpack_ternary,
)


def compiled_op() -> Callable[..., torch.Tensor] | None:
    """`karla_hf::bitlinear`, which the `karla_hf` package registers: for graphs, where the C kernel is no operation."""
    namespace = torch.ops.karla_hf
    return namespace.bitlinear.default if hasattr(namespace, "bitlinear") else None


class BitLinear(nn.Module):
    """Linear layer with ternary weights and int8 activations, no bias; the module docstring has the equations.

    Trainable, it owns the float master `weight` [N, K]. Packed, it owns the buffers `packed_weight` [N / 4, K] uint8 and
    `weight_scale` [1] float32 (also after `.to(dtype)`) instead, and still passes gradients to its input. The outputs of
    the two are bit-equal, unless the master is float64: the packed scale is then rounded to float32.

    Args:
        in_features: K.
        out_features: N; a multiple of 4 if the layer is to be packed.
        norm: apply an RMSNorm without weight to the input.
        eps: added to the mean square in the RMSNorm.
        packed: build the packed structure, all weights 0, ready for a packed state dict.

    Raises:
        ValueError: if a size or eps is not positive, or a packed layer's out_features is not a multiple of 4.

    Example:
        >>> layer, x = BitLinear(6, 8).eval(), torch.randn(2, 3, 6)
        >>> before, after = layer(x), layer.to_packed()(x)
        >>> after.shape, torch.equal(before, after), sorted(layer.state_dict())
        (torch.Size([2, 3, 8]), True, ['packed_weight', 'weight_scale'])
    """

    weight: nn.Parameter | None
    packed_weight: torch.Tensor
    weight_scale: torch.Tensor

    def __init__(
        self, in_features: int, out_features: int, norm: bool = True, eps: float = 1e-5, packed: bool = False
    ) -> None:
        super().__init__()
        if min(in_features, out_features, eps) <= 0:
            raise ValueError(
                f"Got in_features={in_features}, out_features={out_features}, eps={eps}; give numbers > 0."
            )
        self.in_features, self.out_features, self.norm, self.eps = in_features, out_features, norm, eps
        self.ternary_share = 1.0
        self._cache: tuple | None = None
        self._fast: tuple | None = None
        self.register_parameter("weight", None)
        self.register_buffer("packed_weight", None)
        self.register_buffer("weight_scale", None)
        if packed:
            check_packable(out_features)
            shape = (out_features // CODES_PER_BYTE, in_features)
            self.packed_weight = torch.full(shape, FOUR_ZEROS, dtype=torch.uint8)
            self.weight_scale = torch.ones(1, dtype=torch.float32)
        else:
            self.weight = nn.Parameter(torch.empty(out_features, in_features))
            self.reset_parameters()

    @property
    def is_packed(self) -> bool:
        """Whether the layer owns packed buffers instead of a float master."""
        return self.weight is None

    def extra_repr(self) -> str:
        """Constructor arguments, for print."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, norm={self.norm}, eps={self.eps}, "
            f"packed={self.is_packed}"
        )

    def reset_parameters(self) -> None:
        """Draw the master as nn.Linear does, uniform in +-1 / sqrt(K). Raises RuntimeError if the layer is packed."""
        if self.weight is None:
            raise RuntimeError("A packed BitLinear has no float weight to draw; call to_trainable() first.")
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def to_packed(self) -> "BitLinear":
        """Replace the master by its codes and scale, in place; ValueError if out_features is not a multiple of 4."""
        if self.weight is not None:
            codes, scale = quantize_weight(self.weight)
            self.packed_weight, self.weight_scale = pack_ternary(codes), scale.float().reshape(1)
            self.weight = self._cache = self._fast = None
        return self

    def to_trainable(self) -> "BitLinear":
        """Replace the packed buffers by a float32 master, in place.

        The master is codes * weight_scale / mean|codes|, which quantises back to the same codes and, up to rounding, the
        same scale; codes * weight_scale would shrink the output by the share of non-zero codes.
        """
        if self.is_packed:
            codes = unpack_ternary(self.packed_weight).float()
            share = codes.abs().mean().clamp_(min=1 / codes.numel())
            self.weight = nn.Parameter(codes * (self.weight_scale / share))
            self.register_buffer("packed_weight", None)
            self.register_buffer("weight_scale", None)
            self._cache = self._fast = None
        return self

    def quantized_weight(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Codes [N, K] int8 and scale (one element) of the weight as it is now, to pass to several calls of the layer.

        With `ternary_share` below 1: the blended weight [N, K], through which gradients flow, and None.

        Packed layers keep the unpacked codes between calls. Trainable ones keep theirs in eval mode without grad only:
        fused optimizers write weights without raising the version counter that would show the change. What is kept is
        renewed when the storage, version or device of the weight changes, after `.to()`, `train()` and `eval()`, and
        after a use with grad. Call `eval()` after writing through `weight.data` between two calls without grad.
        """
        if self.weight is None:
            return self._keep(unpack_ternary, self.packed_weight), self.weight_scale
        if self.ternary_share < 1.0:
            return blend_ternary(self.weight, self.ternary_share), None
        if self.training or torch.is_grad_enabled():
            self._cache = None
            return quantize_weight(self.weight)
        return self._keep(quantize_weight, self.weight)

    def _keep(self, function: Callable[[torch.Tensor], Any], source: torch.Tensor) -> Any:
        """function(source), computed again only if source has changed."""
        if torch.compiler.is_compiling() or source.is_inference():  # no address, no version counter
            return function(source)
        key = (source.data_ptr(), source._version, source.device)
        cache = self._cache
        if cache is None or cache[0] != key:
            # Not inference tensors: a packed layer may save them for a backward later. The alias of source keeps its
            # storage alive, so that no other weight can take over the address.
            with torch.inference_mode(False), torch.no_grad():
                self._cache = cache = key, source.detach(), function(source)
        return cache[2]

    def train(self, mode: bool = True) -> "BitLinear":
        """Set the mode as nn.Module does and forget kept codes."""
        self._cache = self._fast = None
        return super().train(mode)

    def _apply(self, fn, recurse=True):
        self._cache, self._fast, scale = None, None, self.weight_scale
        super()._apply(fn, recurse)
        if scale is not None and self.weight_scale.dtype != torch.float32:
            self.weight_scale = scale.to(self.weight_scale.device)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": None, "_fast": None}

    def forward(
        self, x: torch.Tensor, quantized: tuple[torch.Tensor, torch.Tensor | None] | None = None
    ) -> torch.Tensor:
        """Apply the layer to the last dimension.

        Args:
            x: [..., K] of any floating dtype; scales are computed in float32 (float64 for float64). Not modified.
            quantized: this layer's current :meth:`quantized_weight`; computed here if None.

        Returns:
            [..., N] in the dtype of x, under autocast too.

        Raises:
            ValueError: if the last dimension of x or the shape of the codes does not fit the layer.
        """
        if not x.is_floating_point() or x.shape[-1] != self.in_features:
            raise ValueError(
                f"x is {x.dtype} of shape {tuple(x.shape)}; give floats with in_features={self.in_features} columns."
            )
        if quantized is not None and quantized[0].shape != (self.out_features, self.in_features):
            raise ValueError(
                f"quantized has codes of shape {tuple(quantized[0].shape)}, but {self} needs its own; pass its "
                "quantized_weight()."
            )
        weight, eps, learns = self._parameters["weight"], self.eps if self.norm else None, torch.is_grad_enabled()
        learns = learns and (x.requires_grad or (weight is not None and weight.requires_grad))
        if torch.compiler.is_compiling():
            if weight is None and (op := compiled_op()) is not None:
                return op(x, self.packed_weight, self.weight_scale, eps)
        elif not learns and x.dtype in DTYPES and x.is_cpu:
            fast = self.compiled(quantized)
            if fast is not None and x.numel() <= fast.max_elements:
                return fast(x)
        w_q, scale = self.quantized_weight() if quantized is None else quantized
        if scale is None:
            return float_linear(x, w_q, eps)
        if learns:
            return StraightThrough.apply(x, weight, w_q, scale, eps)
        return ternary_linear(x, w_q, scale, eps)[0]

    def compiled(self, quantized: tuple[torch.Tensor, torch.Tensor | None] | None = None) -> FastBitLinear | None:
        """The compiled kernel with this layer's weights, for calls without gradients; None where it cannot run.

        Args:
            quantized: this layer's current :meth:`quantized_weight`; computed here if the layer is not packed and it is
                None.
        """
        packed, kept = self._buffers["packed_weight"], self._fast
        if packed is not None:
            quantized = packed, self.weight_scale
        source, scale = self.quantized_weight() if quantized is None else quantized
        if scale is None:
            return None
        if kept is None or kept[0] is not source or kept[1] != (source.data_ptr(), scale.data_ptr()):
            fast = None
            if packed is None and source.is_cpu and source.shape[0] % CODES_PER_BYTE == 0:
                packed = pack_ternary(source)
            if packed is not None and FastBitLinear.can_run(packed, scale):
                fast = FastBitLinear(packed, scale, self.eps if self.norm else None)
            self._fast = kept = source, (source.data_ptr(), scale.data_ptr()), fast
        return kept[2]


def set_ternary_share(module: nn.Module, share: float) -> None:
    """Set how far the weights of every BitLinear in a module are rounded, for training that begins with floats.

    y = RMSNorm(x) (W + share (W_t s_w - W))^T with float activations while share < 1, the ternary layer at 1 (the warm-up of
    https://huggingface.co/blog/1_58_llm_extreme_quantization). Packed layers are always ternary.

    Args:
        module: a BitLinear or a module that contains some.
        share: in [0, 1].

    Raises:
        ValueError: if the share is not in [0, 1].

    Example:
        >>> layer = BitLinear(4, 8)
        >>> set_ternary_share(layer, 0.0)
        >>> torch.equal(layer(torch.ones(4)), nn.functional.linear(torch.ones(4) / (1 + 1e-5) ** 0.5, layer.weight))
        True
    """
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"The share of ternary weights is {share}; give a number from 0 to 1.")
    for layer in module.modules():
        if isinstance(layer, BitLinear):
            layer.ternary_share = share
            layer._cache = layer._fast = None


def set_packed(module: nn.Module, packed: bool) -> None:
    """Pack, or make trainable, every BitLinear in a module, in place.

    Args:
        module: a BitLinear or a module that contains some.
        packed: True for `to_packed`, False for `to_trainable`.

    Raises:
        ValueError: if there is no BitLinear, or one whose out_features is not a multiple of 4 is to be packed; nothing
            is converted then.

    Example:
        >>> model = nn.Sequential(BitLinear(4, 8), nn.SiLU(), BitLinear(8, 4))
        >>> set_packed(model, True)
        >>> model[0].is_packed, model[2].is_packed
        (True, True)
    """
    layers = [layer for layer in module.modules() if isinstance(layer, BitLinear)]
    if not layers:
        raise ValueError(
            f"{type(module).__name__} contains no BitLinear; give the module that holds the ternary layers."
        )
    if packed:
        for layer in layers:
            check_packable(layer.out_features)
    for layer in layers:
        layer.to_packed() if packed else layer.to_trainable()
