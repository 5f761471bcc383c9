"""Ticks in one compiled call equal the loop in torch."""

import pytest
import torch
from torch import nn

from karla_hf import kernel
from karla_hf.modeling.attention_karla import cut_blocks
from karla_hf.modeling.bitlinear_karla import BitLinear
from karla_hf.modeling.ticks_karla import stream_ticks


pytestmark = pytest.mark.skipif(not kernel.address("karla_stream_ticks"), reason="no C compiler")


def make(batch, hidden, heads, width, window, wide, padding=0):
    """Layers W_r, W_o, W_1, W_2, blocks of one position each, and states."""
    size = heads * width
    shapes = [(hidden, size, True), (size, hidden, False), (hidden, wide, True), (wide, hidden, False)]
    layers = [BitLinear(i, o, norm=norm).eval() for i, o, norm in shapes]
    keys_values = torch.randn(batch, 2, heads, window, 2, width)
    valid = torch.ones(batch, window, dtype=torch.bool)
    valid[0, :padding] = False
    registers, positions = torch.randn(2, heads, 3, width), torch.full((batch, 1), window + 5)
    return layers, cut_blocks(keys_values, valid, registers, positions, window), torch.randn(batch, hidden)


def in_torch(layers, blocks, stream, writes, ticks, heads):
    query, out, into, write = layers
    for _ in range(ticks):
        q = query(stream).view(len(stream), 1, 1, heads, -1)
        stream = stream + out(blocks.attend(q).flatten(0, 1)[:, 0])
        change = write(nn.functional.silu(into(stream)))
        stream, writes = stream + change, writes + change
    return stream, writes


@pytest.mark.parametrize("ticks", [1, 10])
@pytest.mark.parametrize(
    "sizes", [(1, 64, 2, 32, 8, 96), (3, 36, 2, 6, 5, 20, 4), (2, 576, 8, 64, 128, 1024, 100), (2, 20, 2, 2, 1, 4)]
)
def test_ticks_equal_the_loop_in_torch(sizes, ticks):
    layers, blocks, state = make(*sizes)
    with torch.no_grad():
        expected = in_torch(layers, blocks, state, torch.zeros_like(state), ticks, sizes[2])
        stream, writes = state.clone(), torch.zeros_like(state)
        assert stream_ticks([layer.compiled() for layer in layers], blocks, stream, writes, ticks)
    for ours, theirs in zip((stream, writes), expected, strict=True):
        # An activation on the edge between two of its 255 steps may fall to the other side.
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-2 * float(theirs.abs().max()))
        assert (ours - theirs).abs().median() < 1e-2 * theirs.abs().median()
    if ticks == 1:
        assert (stream - expected[0]).abs().median() < 1e-5


def test_what_the_kernel_cannot_do_is_left_alone():
    layers, blocks, state = make(2, 16, 2, 4, 3, 8)
    compiled, stream, writes = [layer.compiled() for layer in layers], state.clone(), torch.zeros_like(state)
    assert not stream_ticks(compiled, blocks, stream, writes, 2)  # with grad
    with torch.no_grad():
        assert not stream_ticks([*compiled[:3], None], blocks, stream, writes, 2)
        assert not stream_ticks(compiled, blocks, stream.double(), writes.double(), 2)
    assert torch.equal(stream, state)
    assert not writes.any()
