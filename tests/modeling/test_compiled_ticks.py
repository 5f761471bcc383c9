"""Ticks in one compiled call equal the loop in torch."""

from types import SimpleNamespace

import pytest
import torch
from tiny import OPTIONS
from torch import nn
from transformers import LlamaConfig

from karla_hf import kernel
from karla_hf.modeling.attention_karla import cut_blocks
from karla_hf.modeling.bitlinear_karla import BitLinear, set_packed
from karla_hf.modeling.configuration_karla import KarlaConfig
from karla_hf.modeling.ctm_karla import NeuronModels, Synchronisation
from karla_hf.modeling.head_karla import Fixed, KarlaHead, Thought
from karla_hf.modeling.ticks_karla import can_tick, compiled_ticks, neuron_ticks, stream_ticks


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
        compiled = [layer.compiled() for layer in layers]
        assert can_tick(compiled, blocks, stream, writes)
        stream_ticks(compiled, blocks, stream, writes, ticks)
    for ours, theirs in zip((stream, writes), expected, strict=True):
        # An activation on the edge between two of its 255 steps may fall to the other side.
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-2 * float(theirs.abs().max()))
        assert (ours - theirs).abs().median() < 1e-2 * theirs.abs().median()
    if ticks == 1:
        assert (stream - expected[0]).abs().median() < 1e-5


@pytest.mark.parametrize("ticks", [1, 10])
@pytest.mark.parametrize("sizes", [(1, 20, 2, 6, 5, 0, 0), (3, 64, 4, 16, 9, 0, 3)])
def test_ticks_of_neurons_equal_the_head(sizes, ticks):
    batch, neurons, heads, width, window, _, padding = sizes
    blocks = make(batch, 16, heads, width, window, 4, padding)[1]
    query, synapse = BitLinear(24, heads * width).eval(), BitLinear(heads * width + neurons, 2 * neurons).eval()
    norm, models = nn.LayerNorm(neurons), NeuronModels(neurons, 7, 5)
    sync = Synchronisation(neurons, 24, 3, torch.Generator().manual_seed(0))
    for parameter in (*norm.parameters(), *models.parameters(), sync.decay):
        nn.init.normal_(parameter)
    with torch.no_grad():
        z, past = torch.randn(batch, neurons), torch.randn(batch, neurons, 7)
        keep, factors = sync.schedule(ticks)
        alpha = sync.products(z)
        ours = [z.clone(), past.clone(), alpha.clone()]
        compiled = [query.compiled(), synapse.compiled()]
        assert can_tick(compiled, blocks, *ours)
        neuron_ticks(compiled, (norm, models, sync), (keep, torch.stack(factors[:ticks])), blocks, *ours)
        for tick in range(ticks):
            q = query((alpha * factors[tick])[:, :24]).view(batch, 1, 1, heads, width)
            seen = blocks.attend(q).flatten(0, 1)[:, 0]
            signal = norm(nn.functional.glu(synapse(torch.cat([seen, z], -1)), -1))
            past = torch.cat([past[..., 1:], signal[..., None]], -1)
            z = models(list(past.permute(2, 1, 0)))
            alpha = torch.addcmul(sync.products(z), keep, alpha)
    for ours_, theirs in zip(ours, (z, past, alpha), strict=True):
        torch.testing.assert_close(ours_, theirs, rtol=0, atol=5e-2 * float(theirs.abs().max()))
        assert (ours_ - theirs).abs().median() < 1e-5 * max(1.0, float(theirs.abs().max()))


def test_what_the_kernel_cannot_do_is_known():
    layers, blocks, state = make(2, 16, 2, 4, 3, 8)
    compiled = [layer.compiled() for layer in layers]
    assert not can_tick(compiled, blocks, state)  # with grad
    with torch.no_grad():
        assert can_tick(compiled, blocks, state)
        assert not can_tick([*compiled[:3], None], blocks, state)
        assert not can_tick(compiled, blocks, state.double())
        assert not can_tick(compiled, blocks, state.t())


@pytest.mark.parametrize("off", [{}, {"ctm_num_neurons": 0}, {"ctm_stream_size": 0}])
@pytest.mark.parametrize("packed", [False, True])
def test_a_head_thinks_the_same(off, packed):
    sizes = {
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "intermediate_size": 8,
        "vocab_size": 9,
    }
    config = KarlaConfig(text_config=LlamaConfig(**sizes).to_dict(), **{**OPTIONS, "ctm_num_ticks": 6, **off})
    head, blocks = KarlaHead(config).eval(), make(3, 64, 4, 16, 8, 4, 2)[1]
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.3)
    set_packed(head, packed)
    state = torch.randn(3, 1, 64)
    with torch.inference_mode():
        layers = {n: m.quantized_weight() for n, m in head.named_children() if isinstance(m, BitLinear)}
        fixed = Fixed(blocks, layers, *(head.sync.schedule(6) if head.has_neurons else ()))
        begun = head._begin(state[:, 0], layers)
        at_once = compiled_ticks(head, begun, fixed, 1, 6)
        in_two = compiled_ticks(head, compiled_ticks(head, begun, fixed, 1, 2), fixed, 3, 4)
        thought = begun
        for tick in range(1, 7):
            thought = head._tick(thought, fixed, tick, (3, 1))
        ours, twice, theirs = (head._answer(t, fixed, 6) for t in (at_once, in_two, thought))
        deltas = []
        forward = head(state, blocks, 6), head(state, blocks, 6, lambda tick, delta: deltas.append(delta))
    assert torch.equal(ours, twice)
    assert len(deltas) == 6
    assert all(torch.equal(ours, other) for other in (*forward, deltas[-1]))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=5e-2 * float(theirs.abs().max()))
    assert (ours - theirs).abs().median() < 1e-2 * theirs.abs().median()
    assert compiled_ticks(head, begun, fixed, 1, 1) is None  # with grad


@pytest.mark.parametrize("change", [{"hidden_size": 0}, {"temperature": True}, {"dropout": 0.1}])
def test_the_kernel_leaves_other_neurons_to_torch(change):
    blocks = make(3, 64, 4, 16, 8, 4, 2)[1]
    head = SimpleNamespace(has_neurons=True, neurons=NeuronModels(8, 4, **{"hidden_size": 2, **change}))
    with torch.no_grad():
        assert compiled_ticks(head, Thought(), Fixed(blocks, {}), 1, 1) is None
