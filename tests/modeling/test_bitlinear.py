import copy

import pytest
import torch
from torch import nn

from karla_hf.modeling.bitlinear_karla import BitLinear, set_packed
from karla_hf.modeling.reference_bitlinear import naive_bitlinear
from karla_hf.modeling.ternary_karla import quantize_activation, quantize_weight


def double_layer(in_features, out_features, **arguments):
    return BitLinear(in_features, out_features, **arguments).double()


def same_weight(layer, **arguments):
    """A layer with a copy of the weight and its own constructor arguments."""
    twin = BitLinear(layer.in_features, layer.out_features, **arguments).to(layer.weight.dtype)
    twin.load_state_dict(layer.state_dict())
    return twin


def output_and_gradients(function, x, weight, grad_y):
    """y = function(x) and the gradients of sum(y * grad_y) with respect to x and weight."""
    y = function(x)
    return y.detach(), *torch.autograd.grad(y, (x, weight), grad_y)


def assert_equals_naive(layer, x):
    """Compare output and both gradients in float64."""
    x, weight = x.detach().double().requires_grad_(), layer.weight.detach().double().requires_grad_()
    layer = copy.deepcopy(layer).double()
    grad_y = torch.randn(*x.shape[:-1], layer.out_features, dtype=torch.float64)
    actual = output_and_gradients(layer, x, layer.weight, grad_y)
    expected = output_and_gradients(lambda x: naive_bitlinear(x, weight, layer.norm, layer.eps), x, weight, grad_y)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize(
    ("shape", "out_features"),
    [((3, 7), 5), ((1, 64), 8), ((2, 5, 33), 12), ((5, 1), 3), ((4, 3), 1), ((130,), 20), ((0, 6), 4)],
)
def test_output_and_gradients_equal_naive(shape, out_features, norm):
    assert_equals_naive(double_layer(shape[-1], out_features, norm=norm), 3 * torch.randn(shape))


@pytest.mark.parametrize("magnitude", [0, 1e-12, 1e-9, 3.1e-8, 3.3e-8, 1e-6, 1e-3, 1e6])
@pytest.mark.parametrize("norm", [True, False])
def test_rows_of_any_magnitude_equal_naive(magnitude, norm):
    # Around 3.2e-8 = 1e-5 sqrt(eps) the clamp of max|h| at 1e-5 begins to bind.
    x = torch.randn(4, 30, dtype=torch.float64)
    x[1] *= magnitude / x[1].abs().max()
    layer = double_layer(30, 8, norm=norm)
    assert_equals_naive(layer, x)
    expected = naive_bitlinear(x, layer.weight, norm)[1]
    torch.testing.assert_close(layer(x)[1], expected, rtol=1e-10, atol=1e-12 * expected.abs().max().item())


def test_eps_is_the_one_given():
    layer, x = double_layer(10, 4, eps=0.1), 0.01 * torch.randn(3, 10, dtype=torch.float64)
    assert_equals_naive(layer, x)
    assert layer(x).abs().max() < same_weight(layer, eps=1e-5)(x).abs().max() / 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_quantising_before_the_norm_rounds_no_worse_than_after(dtype):
    x = torch.randn(2000, 128).to(dtype)
    exact = x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + 1e-5)
    after = (x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-5)).to(torch.float32)
    reference, ours, norm_first = (quantize_activation(value)[0].int() for value in (exact, x, after))
    assert (ours - reference).abs().max() <= 1  # half-way values fall to either side
    assert (ours != reference).double().mean() <= max(1.2 * (norm_first != reference).double().mean(), 1e-5)


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_input_costs_only_the_rounding_of_the_output(rows, dtype):
    layer, x = BitLinear(129, 36), torch.randn(rows, 129).to(dtype).requires_grad_()
    y = layer(x)
    reference = naive_bitlinear(x.double(), layer.weight.double())
    one_code = (x.abs().amax() / 127 * quantize_weight(layer.weight)[1]).item()
    torch.testing.assert_close(y.double(), reference, rtol=torch.finfo(dtype).eps, atol=2 * one_code)
    grad_y = torch.randn(rows, 36).to(dtype)
    ours = torch.autograd.grad(y, (x, layer.weight), grad_y)
    theirs = torch.autograd.grad(reference, (x, layer.weight), grad_y.double())
    assert (y.dtype, ours[0].dtype, ours[1].dtype) == (dtype, dtype, torch.float32)
    assert y.is_contiguous()
    for actual, expected in zip(ours, theirs, strict=True):
        tolerance = 8 * torch.finfo(dtype).eps * expected.abs().max().item()
        torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=tolerance + 2 * one_code)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(dtype):
    layer, x = BitLinear(33, 12), torch.randn(5, 33, dtype=dtype, requires_grad=True)
    grad_y = torch.randn(5, 12, dtype=dtype)
    plain = output_and_gradients(layer, x, layer.weight, grad_y)
    with torch.autocast("cpu", torch.bfloat16):
        cast = output_and_gradients(layer, x, layer.weight, grad_y)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(plain, cast, strict=True))


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_all_ways_to_the_output_are_bit_equal(dtype, norm):
    layer, x = BitLinear(50, 24, norm=norm), torch.randn(7, 50).to(dtype)
    pair = layer.quantized_weight()
    outputs = [layer(x), layer(x, pair)]
    with torch.no_grad():
        outputs += [layer(x), layer(x, pair), layer.eval()(x), layer(x)]
    packed = copy.deepcopy(layer).to_packed()
    outputs += [packed(x), packed(x, pair), packed(x, packed.quantized_weight())]
    with torch.inference_mode():
        outputs += [packed(x), layer(x)]
    outputs += [packed(x.clone().requires_grad_())]
    assert all(torch.equal(output, outputs[0]) for output in outputs)


def test_rows_do_not_influence_each_other():
    layer, x = BitLinear(576, 16), torch.randn(2, 6, 576)
    other = x.clone()
    other[:, 3] = 1e4 * torch.randn(2, 576)
    kept = [0, 1, 2, 4, 5]
    assert torch.equal(layer(x)[:, kept], layer(other)[:, kept])
    assert not torch.equal(layer(x)[:, 3], layer(other)[:, 3])
    for row in range(6):  # decoding token by token
        assert torch.equal(layer(x[:, row : row + 1]), layer(x)[:, row : row + 1])


def test_strides_of_the_input_do_not_matter():
    # oneDNN leaves its output unwritten when a size-1 dimension has a stride below the row length.
    layer, x = BitLinear(24, 12), torch.randn(1, 24)
    assert torch.equal(layer(x.as_strided((1, 24), (0, 1))), layer(x))
    assert torch.equal(layer(x.expand(3, 24)), layer(x).expand(3, 12))
    wide = torch.randn(24, 6)
    torch.testing.assert_close(layer(wide.t()), layer(wide.t().contiguous()))
    transposed = same_weight(layer)
    transposed.weight = nn.Parameter(layer.weight.detach().t().contiguous().t())
    assert torch.equal(transposed(x), layer(x))


def test_gradients_of_a_packed_layer_reach_its_input():
    layer, x, grad_y = BitLinear(18, 8), torch.randn(5, 18, requires_grad=True), torch.randn(5, 8)
    _, expected, _ = output_and_gradients(layer, x, layer.weight, grad_y)
    packed = copy.deepcopy(layer).to_packed()
    with torch.inference_mode():
        packed(x)  # keeps the codes, which the backward below needs
    (grad_x,) = torch.autograd.grad(packed(x), x, grad_y)
    assert torch.equal(grad_x, expected)


def test_frozen_weight_and_constant_input_get_no_gradient():
    layer, x = BitLinear(6, 4), torch.randn(3, 6)
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    assert x.grad is None
    layer.requires_grad_(False)
    assert not layer(x).requires_grad
    assert layer(x.requires_grad_()).requires_grad


@pytest.mark.parametrize("norm", [True, False])
def test_only_the_norm_keeps_float_activations(norm):
    layer, x = BitLinear(64, 4, norm=norm), torch.randn(9, 64, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor
    ):
        layer(x)
    activations = [tensor for tensor in saved if tensor.numel() == x.numel()]
    assert [tensor.dtype for tensor in activations] == ([torch.float32, torch.int8] if norm else [torch.int8])
    assert all(tensor is x or tensor.dtype == torch.int8 for tensor in activations)  # x by reference, no copy


def test_wrong_use_is_refused():
    layer = BitLinear(6, 8)
    with pytest.raises(
        ValueError, match=r"^x is torch.float32 of shape \(2, 5\); give floats with in_features=6 columns"
    ):
        layer(torch.randn(2, 5))
    with pytest.raises(ValueError, match=r"^x is torch.int64 of shape \(2, 6\); give floats"):
        layer(torch.ones(2, 6, dtype=torch.int64))
    with pytest.raises(
        ValueError, match=r"codes of shape \(4, 6\), but BitLinear\(in_features=6, out_features=8, norm=T"
    ):
        layer(torch.randn(2, 6), BitLinear(6, 4).quantized_weight())
    with pytest.raises(ValueError, match=r"^Got in_features=6, out_features=0, eps=1e-05; give numbers > 0\.$"):
        BitLinear(6, 0)
    with pytest.raises(ValueError, match=r"eps=0; give numbers > 0"):
        BitLinear(6, 4, eps=0)
    with pytest.raises(ValueError, match=r"^out_features is 6, but packing"):
        BitLinear(6, 6, packed=True)
    with pytest.raises(RuntimeError, match=r"^A packed BitLinear has no float weight to draw; call to_trainable\(\)"):
        layer.to_packed().reset_parameters()


def test_fresh_weight_is_drawn_as_by_linear():
    torch.manual_seed(3)
    layer = BitLinear(30, 20)
    torch.manual_seed(3)
    assert torch.equal(layer.weight, nn.Linear(30, 20, bias=False).weight)


@pytest.mark.parametrize("packed", [False, True])
def test_layer_compiles_to_one_graph(packed):
    layer, x = BitLinear(16, 8).eval(), torch.randn(3, 16, requires_grad=True)
    set_packed(layer, packed)
    compiled, grad_y = torch.compile(layer, backend="aot_eager", fullgraph=True), torch.randn(3, 8)
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x))
    torch.testing.assert_close(torch.autograd.grad(compiled(x), x, grad_y), torch.autograd.grad(layer(x), x, grad_y))
