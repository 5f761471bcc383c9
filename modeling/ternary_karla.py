"""Ternary weights and int8 activations of BitNet b1.58: quantisers, 2-bit packing, exact integer product.

    s_w = clamp(mean|W|, 1e-5)       one scale per weight;  W_t = clamp(round(W / s_w), -1, 1)    (absmean)
    s_x = 127 / clamp(max|x|, 1e-5)  one scale per row;     x_q = round(x s_x), int8              (absmax)

(Ma et al. 2024, https://arxiv.org/abs/2402.17764.) Codes and bytes are those of transformers.integrations.bitnet.
M counts rows, K is in_features, N out_features.
"""

import torch
import torch.nn.functional as F


MIN_SCALE = 1e-5
CODES_PER_BYTE = 4
FOUR_ZEROS = 0b01010101  # the byte of four codes 0

# Without AVX512 torch._int_mm is a scalar loop on the CPU, some twenty times slower than a float32 product.
CPU_HAS_INT8_GEMM = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"


def widen(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor in float32, or as it is if it is float64."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def quantize_weight(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a weight to {-1, 0, 1} times the mean of its magnitudes, as `WeightQuant` of transformers does.

    Args:
        weight: [N, K] float. Not modified; no gradient flows.

    Returns:
        W_t [N, K] int8, contiguous, and s_w, a float32 scalar (float64 for a float64 weight).

    Example:
        >>> codes, scale = quantize_weight(torch.tensor([[2.0, -0.5, 0.5, 1.0]]))
        >>> codes.tolist(), scale.item()
        ([[1, 0, 0, 1]], 1.0)
    """
    weight = widen(weight.detach())
    scale = weight.abs().mean().clamp_(min=MIN_SCALE)
    codes = (weight * scale.reciprocal()).round_().clamp_(-1, 1)
    return codes.to(torch.int8, memory_format=torch.contiguous_format), scale


def quantize_activation(x: torch.Tensor, min_absmax: float = MIN_SCALE) -> tuple[torch.Tensor, torch.Tensor]:
    """Round every row to int8 so that its largest magnitude becomes 127.

    Args:
        x: [..., K] float. Not modified; no gradient flows.
        min_absmax: lower bound of max|x| in the scale, in the unit of x; keeps the scale of a zero row finite.

    Returns:
        round(x s_x) [..., K] int8 in [-127, 127], contiguous, and s_x [..., 1] float32 (float64 for float64 x).

    Example:
        >>> x_q, scale = quantize_activation(torch.tensor([[1.0, -2.0], [0.0, 0.0]]))
        >>> x_q.tolist(), scale[0].item()
        ([[64, -127], [0, 0]], 63.5)
    """
    x = widen(x.detach())
    scale = 127 / torch.linalg.vector_norm(x, torch.inf, -1, keepdim=True).clamp_min_(min_absmax)
    # |x s_x| passes 127 by rounding errors only, so a clamp to [-128, 127] would change nothing. contiguous_format also
    # gives size-1 dimensions their usual stride, which int_matmul needs.
    return (x * scale).round_().to(torch.int8, memory_format=torch.contiguous_format), scale


def pack_ternary(ternary: torch.Tensor) -> torch.Tensor:
    """Pack four codes into a byte: bits 2i and 2i + 1 of byte (r, c) hold ternary[i N/4 + r, c] + 1.

    Args:
        ternary: [N, K] int8 in {-1, 0, 1}, N a multiple of 4. Not modified.

    Returns:
        [N / 4, K] uint8.

    Raises:
        ValueError: if ternary is not a matrix, N is not a multiple of 4 or a value is not in {-1, 0, 1}.

    Example:
        >>> pack_ternary(torch.tensor([[-1], [0], [1], [1]], dtype=torch.int8)).tolist()
        [[164]]
    """
    if ternary.dim() != 2:
        raise ValueError(f"pack_ternary got shape {tuple(ternary.shape)}; give a matrix [out_features, in_features].")
    check_packable(ternary.shape[0])
    if ((ternary < -1) | (ternary > 1)).any():
        raise ValueError("pack_ternary got values outside {-1, 0, 1}; give the codes that quantize_weight returns.")
    first, second, third, fourth = (ternary + 1).to(torch.uint8).chunk(CODES_PER_BYTE)
    return first | second << 2 | third << 4 | fourth << 6


def unpack_ternary(packed: torch.Tensor) -> torch.Tensor:
    """Undo :func:`pack_ternary`: [N / 4, K] uint8 (not modified) to [N, K] int8, contiguous.

    Example:
        >>> unpack_ternary(torch.tensor([[164]], dtype=torch.uint8)).flatten().tolist()
        [-1, 0, 1, 1]
    """
    return torch.cat([(packed >> 2 * i) & 3 for i in range(CODES_PER_BYTE)]).to(torch.int8).sub_(1)


def check_packable(out_features: int) -> None:
    """Raise ValueError unless out_features is a multiple of 4."""
    if out_features % CODES_PER_BYTE:
        raise ValueError(
            f"out_features is {out_features}, but packing puts four rows into a byte; use a multiple of 4 or keep the "
            "layer trainable."
        )


def int_matmul(x_q: torch.Tensor, w_q: torch.Tensor) -> torch.Tensor:
    """Multiply quantised rows with the transpose of a quantised weight, exactly.

    torch._int_mm where it is fast and right: on a CPU with AVX512 if K > 1 (oneDNN leaves the result unwritten, without
    an error, if a leading dimension is below the row length: pytorch#195066), and on CUDA if K and N are multiples of 8,
    with M padded beyond 16. Elsewhere a float32 product, exact while 127 K < 2^24.

    Args:
        x_q: [M, K] int8 in [-127, 127], with the contiguous strides (K, 1). Not modified.
        w_q: [N, K] int8 in {-1, 0, 1}, contiguous. Not modified.

    Returns:
        [M, N] integers, as int32 or float32.

    Example:
        >>> int_matmul(torch.tensor([[100, 7]], dtype=torch.int8), torch.tensor([[1, -1]], dtype=torch.int8)).item()
        93
    """
    (rows, in_features), out_features = x_q.shape, w_q.shape[0]
    device = x_q.device.type
    if device == "cpu" and CPU_HAS_INT8_GEMM and in_features > 1:
        if rows > 4:
            return torch._int_mm(x_q, w_q.t())
        # For the few rows of decoding, the weight on the left takes as little as 0.6 of the time.
        product = torch._int_mm(w_q, x_q.t())
        return product.view(1, -1) if rows == 1 else product.t().contiguous()
    if device == "cuda" and in_features % 8 == 0 and out_features % 8 == 0:
        return torch._int_mm(F.pad(x_q, (0, 0, 0, max(0, 17 - rows))), w_q.t())[:rows]
    with torch.autocast(device, enabled=False):
        return F.linear(x_q.float(), w_q.float())
