import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from transformers.integrations import bitnet

from karla_hf.modeling import ternary_karla
from karla_hf.modeling.reference_bitlinear import naive_pack_ternary
from karla_hf.modeling.ternary_karla import (
    int_matmul,
    pack_ternary,
    quantize_activation,
    quantize_weight,
    unpack_ternary,
)


code_matrices = st.tuples(st.integers(1, 5), st.integers(1, 9)).flatmap(
    lambda size: arrays(np.int8, (4 * size[0], size[1]), elements=st.integers(-1, 1))
)


def random_codes(rows, columns):
    return torch.randint(-1, 2, (rows, columns), dtype=torch.int8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [(8, 12), (129, 65)])
def test_weight_codes_are_those_of_transformers(size, dtype):
    weight = torch.randn(size).to(dtype)
    codes, scale = quantize_weight(weight)
    with torch.compiler.set_stance("force_eager"):
        theirs = bitnet.WeightQuant.apply(weight)
    assert torch.equal(codes, theirs.sign().to(torch.int8))
    torch.testing.assert_close((codes * scale).to(dtype), theirs)
    assert (codes.dtype, scale.dtype, scale.shape) == (torch.int8, torch.float32, ())


def test_weight_is_rounded_half_to_even_in_its_own_precision():
    codes, scale = quantize_weight(torch.tensor([[2.0, -0.5, 0.5, 1.0]], dtype=torch.float64))
    assert codes.tolist() == [[1, 0, 0, 1]]
    assert scale.dtype == torch.float64
    assert scale == 1


def test_zero_weight_has_a_finite_scale():
    codes, scale = quantize_weight(torch.zeros(4, 3))
    assert not codes.any()
    assert scale == torch.tensor(1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_activation_codes_and_scales_are_those_of_transformers(dtype):
    x = torch.randn(50, 3, 37).to(dtype)
    x[7] = 0
    x_q, scale = quantize_activation(x)
    with torch.compiler.set_stance("force_eager"):
        theirs_q, theirs_scale = bitnet.BitLinear.activation_quant(None, x.float())
    assert torch.equal(x_q, theirs_q)
    assert torch.equal(scale, theirs_scale)
    assert x_q.abs().amax() == 127
    assert scale.isfinite().all()


def test_quantisers_leave_their_input_alone_and_carry_no_gradient():
    weight, x = torch.randn(8, 6, requires_grad=True), torch.randn(3, 6, requires_grad=True)
    weight_before, x_before = weight.detach().clone(), x.detach().clone()
    assert not any(result.requires_grad for result in (*quantize_weight(weight), *quantize_activation(x)))
    assert torch.equal(weight, weight_before)
    assert torch.equal(x, x_before)


def test_codes_are_contiguous_whatever_the_strides():
    for source in (
        torch.randn(6, 24).t(),
        torch.randn(1, 24).as_strided((1, 24), (0, 1)),
        torch.randn(5, 1).expand(5, 3),
    ):
        for codes, _ in (quantize_weight(source), quantize_activation(source)):
            assert codes.stride() == (source.shape[1], 1)


@pytest.mark.parametrize("size", [(4, 1), (8, 3), (64, 37), (512, 100)])
def test_bytes_are_those_of_transformers_and_of_the_loops(size):
    codes = random_codes(*size)
    before = codes.clone()
    packed = pack_ternary(codes)
    assert torch.equal(codes, before)
    assert packed.dtype == torch.uint8
    assert torch.equal(packed, bitnet.pack_weights(codes.clone()))  # a clone: pack_weights adds 1 to its argument
    assert packed.tolist() == naive_pack_ternary(codes.tolist())
    with torch.compiler.set_stance("force_eager"):
        assert torch.equal(unpack_ternary(packed), bitnet.unpack_weights(packed, torch.int8))


@given(code_matrices)
def test_unpack_undoes_pack(codes):
    codes = torch.from_numpy(codes)
    packed = pack_ternary(codes)
    assert packed.shape == (codes.shape[0] // 4, codes.shape[1])
    assert torch.equal(unpack_ternary(packed), codes)


@pytest.mark.parametrize("rows", [1, 6, 511])
def test_rows_that_do_not_fill_bytes_are_refused(rows):
    with pytest.raises(
        ValueError,
        match=rf"^out_features is {rows}, but packing puts four rows into a byte; use a multiple of 4 or keep",
    ):
        pack_ternary(random_codes(rows, 3))


def test_what_is_no_matrix_of_codes_is_refused():
    with pytest.raises(ValueError, match=r"^pack_ternary got shape \(4,\); give a matrix"):
        pack_ternary(torch.zeros(4, dtype=torch.int8))
    with pytest.raises(ValueError, match=r"^pack_ternary got values outside \{-1, 0, 1\}; give the codes"):
        pack_ternary(torch.full((4, 2), 2, dtype=torch.int8))


@pytest.fixture(params=[True, False], ids=["int_mm", "float32"])
def _both_products(request, monkeypatch):
    """Run with the integer product of this CPU, where it has one, and with the float32 product of other machines."""
    monkeypatch.setattr(ternary_karla, "CPU_HAS_INT8_GEMM", request.param and ternary_karla.CPU_HAS_INT8_GEMM)


@pytest.mark.usefixtures("_both_products")
@pytest.mark.parametrize("rows", [0, 1, 2, 4, 5, 17, 33])
def test_product_is_exact_for_every_size(rows):
    for in_features in (1, 2, 3, 8, 31, 64, 257):
        for out_features in (1, 2, 7, 16, 65):
            x_q = torch.randint(-127, 128, (rows, in_features), dtype=torch.int8)
            w_q = random_codes(out_features, in_features)
            assert torch.equal(int_matmul(x_q, w_q).long(), x_q.long() @ w_q.long().t())


@pytest.mark.usefixtures("_both_products")
@pytest.mark.parametrize("rows", [1, 6])
def test_product_is_exact_at_full_range_under_autocast(rows):
    x_q, w_q = torch.full((rows, 1021), 127, dtype=torch.int8), torch.ones(3, 1021, dtype=torch.int8)
    with torch.autocast("cpu", torch.bfloat16):
        assert (int_matmul(x_q, w_q).long() == 127 * 1021).all()


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [0, 1, 16, 17, 40])
@pytest.mark.parametrize("size", [(64, 128), (24, 8), (31, 16), (16, 7)])
def test_product_is_exact_on_cuda(rows, size):
    x_q = torch.randint(-127, 128, (rows, size[1]), dtype=torch.int8)
    w_q = random_codes(*size)
    assert torch.equal(int_matmul(x_q.cuda(), w_q.cuda()).cpu().long(), x_q.long() @ w_q.long().t())
