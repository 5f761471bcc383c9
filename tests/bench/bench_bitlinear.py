"""The ternary linear against `F.linear`: the compiled kernel, the layer around it, and a training step.

A call includes quantising the rows and allocating the output. Rows named bf16 get bf16 on both sides. One thread.
"""

import torch
from torch import nn
from torch.nn import functional

from karla_hf.bench import Row
from karla_hf.modeling.bitlinear_karla import BitLinear
from karla_hf.modeling.fast_bitlinear_karla import FastBitLinear


SIZE = 512
CALLS = {1: 20000, 64: 1000}


def repeated(call, x, times):
    """Calls without a gradient, many in one timing."""

    def run():
        with torch.no_grad():
            for _ in range(times):
                call(x)

    return run


def inference_rows():
    """`c_*`: the kernel as decoding calls it; `layer_*`: through `BitLinear.forward`."""
    layer = BitLinear(SIZE, SIZE).eval().to_packed()
    kernel = FastBitLinear(layer.packed_weight, layer.weight_scale, layer.eps)
    for rows, calls in CALLS.items():
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            x, weight = torch.randn(rows, SIZE, dtype=dtype), torch.randn(SIZE, SIZE, dtype=dtype)
            peer = repeated(lambda x, weight=weight: functional.linear(x, weight), x, calls)
            for kind, call in (("c", kernel), ("layer", layer)):
                yield Row(f"{kind}_m{rows}_{name}", calls, "calls", repeated(call, x, calls), f"{name} F.linear", peer)


def training_row(rows=512, steps=10):
    """Forward and backward, all gradients; the weight is quantised in every step."""
    x, grad_y = torch.randn(rows, SIZE, requires_grad=True), torch.randn(rows, SIZE)

    def train(layer):
        def run():
            for _ in range(steps):
                x.grad = None
                layer.zero_grad()
                layer(x).backward(grad_y)

        return run

    ours, peer = train(BitLinear(SIZE, SIZE, norm=False)), train(nn.Linear(SIZE, SIZE, bias=False))
    return Row(f"train_m{rows}", steps, "steps", ours, "nn.Linear", peer)


def rows():
    """All rows."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield from inference_rows()
    yield training_row()
