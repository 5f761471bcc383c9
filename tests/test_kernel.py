"""The compiled kernel for decoding equals the torch path, bit for bit."""

import pytest
import torch

import karla_hf
from karla_hf import kernel
from karla_hf.modeling.bitlinear_karla import BitLinear, _ternary_linear, decode_kernel
from karla_hf.modeling.reference_bitlinear import naive_bitlinear


needs_kernel = pytest.mark.skipif(decode_kernel() is None, reason="no C compiler")


@needs_kernel
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize(
    ("rows", "width", "out"), [(1, 1, 1), (1, 63, 5), (2, 64, 7), (3, 65, 4), (5, 191, 33), (8, 576, 64)]
)
def test_kernel_equals_torch(rows, width, out, norm):
    layer = BitLinear(width, out, norm=norm).eval()
    x = torch.randn(rows, width) * torch.logspace(-3, 3, rows)[:, None]
    with torch.no_grad():
        ours = layer(x)
        torch_alone = _ternary_linear(x, *layer.quantized_weight(), layer.eps if norm else None)[0]
        assert torch.equal(ours, torch_alone)
        expected = naive_bitlinear(x, layer.weight, norm=norm)
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@needs_kernel
def test_zero_rows_and_nan_rows():
    layer = BitLinear(70, 6).eval()
    x = torch.zeros(3, 70)
    x[1, 3] = torch.nan
    with torch.no_grad():
        y = layer(x)
    assert torch.equal(y[0], torch.zeros(6))
    assert y[1].isnan().all()
    assert torch.equal(y[2], torch.zeros(6))


@needs_kernel
def test_registered_operator_passes_opcheck():
    codes, scale = BitLinear(64, 8).quantized_weight()
    arguments = (torch.randn(2, 64), codes, scale, 1e-5, 1e-8)
    checks = ("test_schema", "test_faketensor")
    result = torch.library.opcheck(torch.ops.karla_hf.bitlinear.default, arguments, test_utils=checks)
    assert set(result.values()) == {"SUCCESS"}


def test_without_a_compiler_there_is_a_log_line_and_no_kernel(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("CC", "no-such-compiler")
    with caplog.at_level("INFO", logger=kernel.__name__):
        assert kernel.build("engram", tmp_path) is None
    assert "No C compiler" in caplog.text


def test_a_compiler_that_fails_is_logged(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("CC", "false")
    with caplog.at_level("INFO", logger=kernel.__name__):
        assert kernel.build("engram", tmp_path) is None
    assert "cannot build" in caplog.text
    assert list(tmp_path.iterdir()) == []


@needs_kernel
def test_a_build_is_reused(tmp_path):
    first = kernel.build("engram", tmp_path)
    assert first is not None
    assert kernel.build("engram", tmp_path) == first
    assert [path.name for path in tmp_path.iterdir()] == [first.name]
    assert karla_hf.kernel is kernel
