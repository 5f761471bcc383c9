import copy

import pytest
import torch
from torch import nn

from karla_hf.modeling.bitlinear_karla import BitLinear, set_ternary_share
from karla_hf.modeling.straight_through_karla import blend_ternary
from karla_hf.muon import MuonAdamW, TernaryWarmup


def make():
    torch.manual_seed(0)
    return nn.Sequential(BitLinear(6, 8), nn.Linear(8, 3))


def groups(model, lr=0.03):
    linear, dense = model
    return [{"params": list(dense.parameters())}, {"params": [linear.weight], "lr": lr, "muon": True}]


def train(model, optimizers, steps):
    for step in range(steps):
        x = torch.randn(5, 6, generator=torch.Generator().manual_seed(step))
        model(x).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()


def test_steps_are_those_of_adamw_and_muon():
    ours = make()
    theirs = copy.deepcopy(ours)
    train(ours, [MuonAdamW(groups(ours), lr=0.01, weight_decay=0.1)], 7)
    muon = torch.optim.Muon([theirs[0].weight], lr=0.03, weight_decay=0.0)  # a group's own decay, 0 if it has none
    train(theirs, [torch.optim.AdamW(theirs[1].parameters(), lr=0.01, weight_decay=0.1), muon], 7)
    for ours_now, theirs_now in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(ours_now, theirs_now)


def test_a_saved_optimizer_goes_on_as_it_would_have():
    whole, halves = make(), make()
    train(whole, [MuonAdamW(groups(whole), lr=0.01)], 6)
    first = MuonAdamW(groups(halves), lr=0.01)
    train(halves, [first], 3)
    second = MuonAdamW(groups(halves), lr=0.01)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for step in range(3, 6):
        x = torch.randn(5, 6, generator=torch.Generator().manual_seed(step))
        halves(x).square().sum().backward()
        second.step()
        halves.zero_grad()
    for ours, theirs in zip(whole.parameters(), halves.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_vector_is_refused():
    with pytest.raises(ValueError, match="2D"):
        MuonAdamW([{"params": [nn.Parameter(torch.zeros(3))], "muon": True}])


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_share_blends_float_and_ternary(share):
    layer = BitLinear(6, 8).double()
    x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    set_ternary_share(layer, share)
    y = layer(x)
    weight = layer.weight.detach()
    if share < 1:
        normed = x / (x.square().mean(-1, keepdim=True) + layer.eps).sqrt()
        scale = weight.abs().mean()
        rounded = (weight / scale).round().clamp(-1, 1) * scale
        torch.testing.assert_close(y, normed @ (weight + share * (rounded - weight)).T, rtol=0, atol=1e-12)
        torch.testing.assert_close(
            blend_ternary(weight, share), torch.lerp(weight, rounded, share), rtol=0, atol=1e-12
        )
    y.square().sum().backward()
    assert layer.weight.grad.abs().sum() > 0
    with torch.no_grad():
        torch.testing.assert_close(layer(x), y, rtol=0, atol=1e-12)
        assert (layer.compiled() is None) or share == 1


def test_blended_gradient_is_straight_through():
    layer = BitLinear(6, 8, norm=False).double()
    set_ternary_share(layer, 0.7)
    x, out = torch.randn(5, 6, dtype=torch.float64), torch.randn(5, 8, dtype=torch.float64)
    layer(x).backward(out)
    torch.testing.assert_close(layer.weight.grad, out.T @ x, rtol=0, atol=1e-12)


def test_packed_layers_stay_ternary():
    layer, x = BitLinear(6, 8).eval(), torch.randn(3, 6)
    expected = layer(x)
    layer.to_packed()
    set_ternary_share(layer, 0.0)
    assert torch.equal(layer(x), expected)


def test_warmup_follows_the_steps():
    class State:
        global_step, max_steps = 0, 8

    model, state, shares = BitLinear(4, 4), State(), []
    for state.global_step in range(8):
        TernaryWarmup(0.5).on_step_begin(None, state, None, model=model)
        shares.append(model.ternary_share)
    assert shares == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0]
    model.ternary_share = 0.2
    TernaryWarmup(0.5).on_train_end(None, state, None, model=model)
    assert model.ternary_share == 1.0


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_impossible_shares_are_refused(share):
    with pytest.raises(ValueError, match="from 0 to 1"):
        set_ternary_share(nn.Identity(), share)
    with pytest.raises(ValueError, match="ternary_warmup"):
        TernaryWarmup(share)
