import copy
import io
import pickle
import weakref

import bitsandbytes
import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from karla_hf.modeling.bitlinear_karla import BitLinear, set_packed


def assert_sees_its_weight(layer, x):
    """The kept codes are those of the weight as it is."""
    with torch.no_grad():
        fresh = copy.deepcopy(layer)  # starts without kept codes
        assert torch.equal(layer(x), fresh(x))
        assert torch.equal(layer.quantized_weight()[0], fresh.quantized_weight()[0])


def test_codes_are_kept_in_eval_mode_without_grad_only():
    layer = BitLinear(10, 8)
    with torch.no_grad():
        assert layer.quantized_weight()[0] is not layer.quantized_weight()[0]
        layer.eval()
        kept = layer.quantized_weight()[0]
        assert layer.quantized_weight()[0] is kept
    assert layer.quantized_weight()[0] is not kept
    with torch.no_grad():
        assert layer.quantized_weight()[0] is not kept
        kept = layer.quantized_weight()[0]
        assert layer.eval().quantized_weight()[0] is not kept
    layer.to_packed().train()
    assert layer.quantized_weight()[0] is layer.quantized_weight()[0]


def step(optimizer_class, **arguments):
    def change(layer):
        optimizer = optimizer_class(layer.parameters(), lr=0.5, **arguments)
        layer(torch.randn(4, 64)).square().sum().backward()
        optimizer.step()

    return change


def assign(layer):
    layer.load_state_dict(BitLinear(64, 128).state_dict(), assign=True)


CHANGES = {
    "sgd": step(torch.optim.SGD),
    "fused adamw": step(torch.optim.AdamW, fused=True),  # raises no version counter
    "bitsandbytes": step(bitsandbytes.optim.AdamW8bit),  # raises no version counter
    "copy": lambda layer: layer.load_state_dict(BitLinear(64, 128).state_dict()),
    "assign": assign,
    "assign twice": lambda layer: (assign(layer), assign(layer)),
    "in place": lambda layer: nn.init.normal_(layer.weight),
    "data and eval": lambda layer: (layer.weight.data.copy_(torch.randn(128, 64)), layer.eval()),
    "new storage": lambda layer: setattr(layer.weight, "data", torch.randn(128, 64)),
    "double": lambda layer: layer.double(),
    "bfloat16": lambda layer: layer.to(torch.bfloat16),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_change_of_the_weight_is_seen(change):
    layer, x = BitLinear(64, 128).eval(), torch.randn(3, 64)
    assert_sees_its_weight(layer, x)
    with torch.no_grad():
        before = layer.quantized_weight()
    change(layer)
    assert_sees_its_weight(layer, x)
    with torch.no_grad():
        after = layer.quantized_weight()
    assert after[0] is not before[0]
    assert not torch.equal(after[0] * after[1], before[0] * before[1]) or layer.weight.dtype == torch.float64


def test_replaced_weight_lives_on_until_its_codes_are_renewed():
    # Otherwise a third weight could take over its address and be mistaken for it.
    layer = BitLinear(6, 8).eval()
    with torch.no_grad():
        layer.quantized_weight()
        storage = StorageWeakRef(layer.weight.untyped_storage())
        layer.weight = nn.Parameter(torch.zeros(8, 6))
        assert not storage.expired()
        layer.quantized_weight()
        assert storage.expired()


def test_conversion_frees_the_kept_codes():
    layer = BitLinear(6, 8).eval()
    with torch.no_grad():
        kept = weakref.ref(layer.quantized_weight()[0])
    assert kept() is not None
    layer.double()
    assert kept() is None


def test_change_of_packed_buffers_is_seen():
    layer, x = BitLinear(6, 8).to_packed(), torch.randn(3, 6)
    for assign_tensors in (False, True):
        assert_sees_its_weight(layer, x)
        layer.load_state_dict(BitLinear(6, 8).to_packed().state_dict(), assign=assign_tensors)
        assert_sees_its_weight(layer, x)
    y = layer(x)
    layer.weight_scale = 2 * layer.weight_scale
    assert torch.equal(layer(x), 2 * y)


def test_weight_made_in_inference_mode_is_never_kept():
    x = torch.randn(3, 6)
    with torch.inference_mode():
        layer = BitLinear(6, 8).eval()
        for _ in range(2):
            assert_sees_its_weight(layer, x)
            layer.weight.normal_()


def test_state_dict_keys_of_both_modes():
    layer, x = BitLinear(6, 8), torch.randn(3, 6)
    assert {name: value.dtype for name, value in layer.state_dict().items()} == {"weight": torch.float32}
    state = copy.deepcopy(layer).to_packed().state_dict()
    assert {name: (tuple(value.shape), value.dtype) for name, value in state.items()} == {
        "packed_weight": ((2, 6), torch.uint8),
        "weight_scale": ((1,), torch.float32),
    }
    assert state["weight_scale"] == layer.weight.abs().mean()
    loaded = BitLinear(6, 8, packed=True)
    assert not loaded(x).any()
    loaded.load_state_dict(state)
    assert torch.equal(loaded(x), layer(x))
    assert not list(loaded.parameters())


@pytest.mark.parametrize("convert", [nn.Module.half, nn.Module.double, lambda layer: layer.to(torch.bfloat16)])
def test_packed_scale_stays_float32(convert):
    layer = BitLinear(6, 8).to_packed()
    scale, x = layer.weight_scale.clone(), torch.randn(3, 6)
    before = layer(x)
    convert(layer)
    assert layer.weight_scale.dtype == torch.float32
    assert torch.equal(layer.weight_scale, scale)
    assert torch.equal(layer(x), before)
    assert "weight_scale" in layer.state_dict()


@pytest.mark.parametrize("packed", [False, True])
def test_copies_and_pickles_work_and_carry_no_kept_codes(packed):
    layer, x = BitLinear(64, 64).eval(), torch.randn(3, 64)
    set_packed(layer, packed)
    size = len(pickle.dumps(layer))
    with torch.no_grad():
        y = layer(x)
        layer(x)
        assert len(pickle.dumps(layer)) < size + 64
        stored = io.BytesIO()
        torch.save(layer, stored)
        stored.seek(0)
        loaded = torch.load(stored, weights_only=False)
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), loaded):
            assert torch.equal(twin(x), y)
            assert twin.is_packed == packed
        assert torch.equal(layer(x), y)


def test_trainable_again_means_the_same_function():
    layer, x = BitLinear(40, 16).to_packed(), torch.randn(5, 40)
    y, (codes, scale) = layer(x), layer.quantized_weight()
    assert layer.to_trainable() is layer
    assert layer.weight.requires_grad
    again_codes, again_scale = layer.quantized_weight()
    assert torch.equal(again_codes, codes)
    torch.testing.assert_close(again_scale.reshape(1), scale, rtol=1e-6, atol=0)
    torch.testing.assert_close(layer(x), y, rtol=1e-6, atol=1e-6)
    assert list(layer.state_dict()) == ["weight"]


def test_weight_of_zeros_survives_both_conversions():
    layer = BitLinear(3, 4, packed=True).to_trainable()
    assert torch.equal(layer.weight, torch.zeros(4, 3))
    assert not layer.to_packed()(torch.randn(2, 3)).any()


def test_set_packed_converts_all_layers_or_none():
    model = nn.ModuleDict({"a": BitLinear(4, 8), "b": nn.Sequential(nn.Linear(4, 4), BitLinear(8, 6))})
    with pytest.raises(ValueError, match=r"^out_features is 6, but packing puts four rows into a byte"):
        set_packed(model, True)
    assert not model["a"].is_packed
    model["b"][1] = BitLinear(8, 12)
    for packed in (True, True, False, False):
        set_packed(model, packed)
        assert model["a"].is_packed == model["b"][1].is_packed == packed
    with pytest.raises(ValueError, match=r"^Linear contains no BitLinear; give the module that holds"):
        set_packed(nn.Linear(2, 2), True)
