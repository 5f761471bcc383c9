"""The head against its equations, written out position by position."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig

from karla_hf import KarlaConfig
from karla_hf.modeling import thinking_karla
from karla_hf.modeling.attention_karla import cut_blocks
from karla_hf.modeling.bitlinear_karla import set_packed
from karla_hf.modeling.cache_karla import KarlaCacheLayer
from karla_hf.modeling.head_karla import KarlaHead
from karla_hf.modeling.reference_ctm import naive_head
from karla_hf.modeling.thinking_karla import Plan, Sources, think


WIDTH, SOURCES, WINDOW, TICKS = 12, 2, 4, 4
SIZES = {
    "ctm_hidden_size": 8,
    "ctm_num_heads": 2,
    "ctm_num_neurons": 6,
    "ctm_history_length": 3,
    "ctm_neuron_hidden_size": 5,
    "ctm_num_pairs": 8,
    "ctm_num_self_pairs": 2,
    "ctm_stream_size": 12,
    "ctm_num_registers": 3,
    "ctm_source_layers": [0, 2],
}
PARTS = {
    "both": {},
    "neurons only": {"ctm_stream_size": 0},
    "stream only": {"ctm_num_neurons": 0},
    "longer history than ticks": {"ctm_history_length": 9},
    "no history": {"ctm_history_length": 1},
    "one register": {"ctm_num_registers": 1},
}


def make_head(**options) -> KarlaHead:
    """A head in float64 whose every parameter is random."""
    text_config = LlamaConfig(hidden_size=WIDTH, num_attention_heads=1, num_hidden_layers=2)
    head = KarlaHead(KarlaConfig(text_config=text_config, engram_num_heads=2, **{**SIZES, **options})).double()
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.5)
    return head


def inputs(batch, total, length=None, padding=0):
    """Sources, states, positions and validity; the first `padding` positions of the first sequence are padding."""
    sources = torch.randn(batch, total, SOURCES, WIDTH, dtype=torch.float64)
    states = torch.randn(batch, length or total, WIDTH, dtype=torch.float64)
    valid = torch.ones(batch, total, dtype=torch.bool)
    valid[0, :padding] = False
    return sources, states, (valid.long().cumsum(-1) - 1).clamp(min=0), valid


def fast_deltas(head, sources, states, positions, valid, window=WINDOW, num_ticks=TICKS):
    keys_values = head.memory(sources, positions)
    blocks = cut_blocks(keys_values, valid, head.memory.registers, positions[:, -states.shape[1] :], window)
    deltas = []
    head(states, blocks, num_ticks, lambda tick, delta: deltas.append(delta.view(states.shape)))
    return torch.stack(deltas)


def thought_deltas(head, sources, states, positions, valid, window=WINDOW, num_ticks=TICKS):
    """The same through `think`, which cuts positions into chunks."""
    ids = valid.long() - 1
    sources = Sources(list(sources.unbind(2)), positions, ids, KarlaCacheLayer(window - 1, 0))
    return think(head, states.clone(), sources, window, Plan(num_ticks, None, False, True, 2)).deltas


def naive_deltas(head, sources, states, positions, valid, window=WINDOW, num_ticks=TICKS):
    weights = head.state_dict(keep_vars=True)
    sizes = {"num_heads": head.num_heads, "window": window, "num_ticks": num_ticks}
    return naive_head(weights, sources, states, positions, valid, **sizes)


def assert_close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("total", [1, 2, WINDOW, WINDOW + 1, 2 * WINDOW + 1])
def test_every_tick_equals_naive(part, total):
    head, arguments = make_head(**PARTS[part]), inputs(2, total)
    with torch.no_grad():
        assert_close(fast_deltas(head, *arguments), naive_deltas(head, *arguments))


@pytest.mark.parametrize("length", [1, 2, WINDOW, WINDOW + 1])
@pytest.mark.parametrize("padding", [0, 3, 8])
def test_last_positions_alone_equal_naive(length, padding):
    head, arguments = make_head(), inputs(2, 9, length, padding)
    with torch.no_grad():
        assert_close(fast_deltas(head, *arguments), naive_deltas(head, *arguments))


@pytest.mark.parametrize("window", [1, 2, 3, 100])
def test_every_window_equals_naive(window):
    head, arguments = make_head(), inputs(1, 7)
    with torch.no_grad():
        assert_close(fast_deltas(head, *arguments, window), naive_deltas(head, *arguments, window))


@pytest.mark.parametrize("size", [1, 3, 7, 64])
@pytest.mark.parametrize("length", [1, 5, 9])
def test_chunks_equal_naive(monkeypatch, size, length):
    monkeypatch.setattr(thinking_karla, "CHUNK", {"cpu": size})
    head, arguments = make_head(), inputs(3, 9, length, padding=3)
    with torch.no_grad():
        assert_close(thought_deltas(head, *arguments), naive_deltas(head, *arguments))


@pytest.mark.parametrize("size", [None, 1, 4, 8])
@pytest.mark.parametrize("part", ["both", "neurons only", "stream only"])
def test_gradients_equal_naive(monkeypatch, part, size):
    """Without checkpointing, and with chunks of `size` positions whose ticks are thought again."""
    head, (sources, states, positions, valid) = make_head(**PARTS[part]).train(), inputs(2, 6, 5, padding=1)
    head.gradient_checkpointing = size is not None
    monkeypatch.setattr(thinking_karla, "TRAINED_TICKS", TICKS * (size or 1))
    sources.requires_grad_()
    states.requires_grad_()
    direction = torch.randn(TICKS, *states.shape, dtype=torch.float64)
    variables = {"sources": sources, "states": states, **dict(head.named_parameters())}
    gradients = []
    for deltas in (thought_deltas, naive_deltas):
        loss = (deltas(head, sources, states, positions, valid) * direction).sum()
        gradients.append(torch.autograd.grad(loss, list(variables.values())))
    for name, ours, theirs in zip(variables, *gradients, strict=True):
        assert ours.any(), f"no gradient reaches {name}"
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


def test_gradient_of_the_last_tick_alone_equals_naive():
    head, arguments = make_head(), inputs(1, 5)
    sources, states, positions, valid = arguments
    direction = torch.randn_like(states)
    blocks = cut_blocks(head.memory(sources, positions), valid, head.memory.registers, positions, WINDOW)
    ours = torch.autograd.grad(
        (head(states, blocks, TICKS).view_as(states) * direction).sum(), list(head.parameters())
    )
    theirs = torch.autograd.grad((naive_deltas(head, *arguments)[-1] * direction).sum(), list(head.parameters()))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-8, atol=1e-10)


def test_checkpointing_keeps_less_and_changes_nothing():
    head, arguments = make_head().train(), inputs(2, 9)
    results = []
    for head.gradient_checkpointing in (False, True):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.nbytes) or t, lambda t: t):
            deltas = thought_deltas(head, *arguments, num_ticks=12)
        results.append((sum(kept), deltas.detach(), *torch.autograd.grad(deltas.square().sum(), head.parameters())))
    (plain, *expected), (saved, *found) = results
    assert saved < plain / 10
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


def test_packed_head_thinks_the_same():
    head, (sources, states, positions, valid) = make_head(ctm_num_neurons=8).float(), inputs(2, 7)
    arguments = (sources.float(), states.float(), positions, valid)
    with torch.no_grad():
        before = fast_deltas(head, *arguments)
        set_packed(head, True)
        assert torch.equal(fast_deltas(head, *arguments), before)


def test_head_stops_when_it_is_told_to():
    head, (sources, states, positions, valid) = make_head(), inputs(1, 5)
    blocks = cut_blocks(head.memory(sources, positions), valid, head.memory.registers, positions, WINDOW)
    seen = []
    with torch.no_grad():
        last = head(
            states, blocks, 9, lambda tick, delta: seen.append(delta) or (torch.tensor([]) if tick == 2 else None)
        )
        assert len(seen) == 2
        assert torch.equal(last, seen[1])
        assert torch.equal(head(states, blocks, 2), last)


def test_arguments_are_not_modified():
    head, arguments = make_head(), inputs(1, 6)
    copies = [argument.clone() for argument in arguments]
    with torch.no_grad():
        fast_deltas(head, *arguments)
    assert all(torch.equal(argument, copy) for argument, copy in zip(arguments, copies, strict=True))


def test_pairs_are_drawn_once_and_travel_with_the_weights():
    head, same, other = make_head(), make_head(), make_head(ctm_seed=1)
    assert torch.equal(head.sync.pairs, same.sync.pairs)
    assert not torch.equal(head.sync.pairs, other.sync.pairs)
    other.load_state_dict(head.state_dict())
    assert torch.equal(head.sync.pairs, other.sync.pairs)
    left, right = head.sync.pairs.chunk(2)
    assert (left == right)[[0, 1, 8, 9]].all(), "each half begins with its self pairs"


def test_synchronisation_decays_by_less_than_one():
    head = make_head()
    for value in (-50.0, 0.0, 50.0):
        nn.init.constant_(head.sync.decay, value)
        keep, factors = head.sync.schedule(TICKS)
        assert ((keep >= 0) & (keep <= 1)).all()
        assert torch.isfinite(torch.stack(factors)).all()
